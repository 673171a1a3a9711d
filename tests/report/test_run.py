"""A run's page shows the contents of the run's folder, and shows all names as plain text."""

import base64
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from torch import nn

from dia_diffusion.errors import InputError
from dia_diffusion.models.uvit import UViT
from dia_diffusion.report.page import render
from dia_diffusion.report.subjects import run_page
from tests.report.conftest import parse


def test_a_page_shows_what_the_run_has(tmp_path: Path, write_run: Callable[..., Path], record) -> None:
    measured = [replace(record(9.5, 3, 8), low=9.0, high=10.0), record(4.25, 6, 8)]
    folder = write_run(tmp_path / "run", records=[measured[1], record(99.0, 3, 8), measured[0]])
    page = parse(render(run_page(folder)))

    (distance,) = page.traces("FD(digits)")
    assert (distance["x"], distance["y"]) == ([24, 48], [9.5, 4.25]), "in order of step, the later of two"
    (losses,), (rates,) = page.traces("loss"), page.traces("learning rate")
    assert losses["x"] == [8 * step for step in range(1, 7)]
    assert losses["y"] == [1 / step for step in range(1, 7)]
    assert rates["y"] == pytest.approx([0.001 * step for step in range(1, 7)])

    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    files = [(folder / "samples" / f"step-{step:08d}.png").read_bytes() for step in (3, 6)]
    assert [base64.b64decode((p["src"] or "").removeprefix("data:image/png;base64,")) for p in pictures] == files
    assert [p["alt"] for p in pictures] == [f"64 samples of run run at step {n}, seeds 0-63" for n in (3, 6)]

    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert yaml.safe_dump(config, sort_keys=False) in page.text
    of_others = ("backbone", "backbone_kwargs", "attention_at")
    network: nn.Module = UViT(**{key: value for key, value in config["model"].items() if key not in of_others})
    count = f"{sum(parameter.numel() for parameter in network.parameters()):,}"
    for shown in (count, "9.500", "4.250", measured[0].protocol_hash()[:8], "106 MiB", measured[0].versions["torch"]):
        assert shown in page.text
    assert "3 s" in page.text, "48 images at 16 a second"


def test_intervals_are_a_band_where_all_points_have_one(tmp_path: Path, write_run, record) -> None:
    first, second = (replace(record(9.5, 3, 8), low=9.0, high=10.0), replace(record(4.25, 6, 8), low=4.0, high=4.5))
    all_of_them = parse(render(run_page(write_run(tmp_path / "all", records=[first, second]))))
    band, line = all_of_them.plots[0]["data"]
    assert (band["y"], line["y"]) == ([9.0, 4.0, 4.5, 10.0], [9.5, 4.25])
    assert "[9.000, 10.000]" in all_of_them.text

    some = parse(render(run_page(write_run(tmp_path / "some", records=[replace(first, low=None, high=None), second]))))
    (line,) = some.plots[0]["data"]
    assert (line["error_y"]["arrayminus"], line["error_y"]["array"]) == ([0, 0.25], [0, 0.25])


def test_protocols_have_plots_of_their_own(tmp_path: Path, write_run, record) -> None:
    measured = [record(9, 3, 8), record(8, 6, 8), record(5, 3, 8, num_samples=90), record(4, 6, 8, num_samples=90)]
    alone = record(1, 6, 8, sampler="ddpm")
    page = parse(render(run_page(write_run(tmp_path / "run", records=[*measured, alone]))))
    assert [trace["y"] for trace in page.traces("FD(digits)")] == [[9, 8], [5, 4]]
    assert alone.protocol_hash()[:8] in page.text


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path, write_run, record) -> None:
    page = parse(render(run_page(write_run(tmp_path / "run", records=[record(9, 3, 8), record(8, 6, 8)]))))
    assert len(page.loaded) > 5
    assert all(place.startswith(("data:", "#")) for place in page.loaded)
    assert "url(" not in page.styles and "@import" not in page.styles and len(page.styles) > 1000
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "embed", "base", "form")][1:]
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and "default-src 'none'" in policy and "http" not in policy


def test_names_from_outside_are_text(tmp_path: Path, write_run, record) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    script = "</script><script>alert(1)</script>{{ 7 * 7 }}"
    records = [record(9, 3, 8, reference=script, features=hostile), record(8, 6, 8, reference=script, features=hostile)]
    overrides = ["--data.source", script]
    plain = parse(render(run_page(write_run(tmp_path / "run", records=[record(9, 3, 8), record(8, 6, 8)]))))
    page = parse(render(run_page(write_run(tmp_path / hostile, overrides, records))))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags], "no tag more than for a plain name"
    assert not [a for _, a in page.tags if "onerror" in a]
    assert hostile in page.text and script in page.text
    (alternative, *_) = [a["alt"] for tag, a in page.tags if tag == "img"]
    assert hostile in (alternative or "")
    # plotly interprets some markup in names and titles; it shows entities as the characters they stand for.
    (trace,) = page.traces("FD(&lt;img src=x onerror=alert(1)&gt;)")
    assert trace["y"] == [9, 8]
    assert not re.search(r"<(?!b>|/b>|br>|extra>|/extra>)\w", str(page.plots))


def test_missing_parts_are_reported(tmp_path: Path, write_run) -> None:
    new = write_run(tmp_path / "new", steps=())
    page = parse(render(run_page(new)))
    assert f"No evaluations yet; dia-diffusion fid {new}" in page.text
    assert "No grids yet" in page.text and "No metrics yet; dia-diffusion train" in page.text
    assert not page.plots
    (new / "checkpoints" / "step-00000003").mkdir(parents=True)  # a run that ends before its first logged line
    assert run_page(new).facts["steps"].startswith("3 of ")

    torn = write_run(tmp_path / "torn")
    (torn / "samples" / "step-00000003.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with (torn / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "ima')
    page = parse(render(run_page(torn)))
    assert "truncated or corrupted: step 3." in page.text
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 1
    assert len(page.traces("loss")[0]["x"]) == 6


def test_an_environment_that_was_altered_is_shown_as_text(tmp_path: Path, write_run) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "environment.json").write_text('{"torch": null, "device": ["two", "of them"]}')
    page = parse(render(run_page(folder)))
    assert ["device", "['two', 'of them']"] in [
        row[:2] for row in page.tables["What was trained, measured and shown with."]
    ]


def test_a_record_cut_short_is_refused(tmp_path: Path, write_run, record) -> None:
    folder = write_run(tmp_path / "run", records=[record(9, 3, 8)])
    with (folder / "evaluations.jsonl").open("a") as file:
        file.write('{"source": "run", "dist')
    with pytest.raises(InputError, match=r"evaluations\.jsonl, line 2: not a complete evaluation record"):
        run_page(folder)


def test_guidance_of_grids_and_of_distances_is_shown(tmp_path: Path, write_run, record) -> None:
    guide = {"weights_hash": "1a2b3c4d5e6f", "model_hash": "0"}
    guided = record(9, 3, 8, guidance_scale=2.5, guidance_interval=[0.25, 4.0], guide=guide)
    overrides = ["--model.num_classes", "10", "--data.label_dropout", "0.1", "--samples.guidance_scale", "1.5"]
    overrides += ["--samples.guidance_interval", "[0.5, 3.0]"]
    page = parse(render(run_page(write_run(tmp_path / "run", overrides, [guided]))))
    assert "guidance 1.5 in [0.5, 3.0]" in page.text
    rows = dict(page.tables["Protocols. Distances of different protocols can't be compared."][1:])
    assert (rows["guidance_scale"], rows["guidance_interval"]) == ("2.5", "[0.25, 4.0]")
    assert "1a2b3c4d" in rows["guide"] and rows["num_samples"] == str(guided.protocol.num_samples)
