"""A study's page: the numbers, grids and recipes of its runs, side by side."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.evaluation.record import append_record
from dia_diffusion.report.page import render
from dia_diffusion.report.subjects import page_of, study_page
from dia_diffusion.sweeps.sweep import STUDY_FILE, Study, read_study, write_study
from dia_diffusion.training.run_folder import RunFolder
from tests.report.conftest import Parsed, parse, write_run_of
from tests.sweeps.measured_studies import make_study
from tests.training.conftest import TINY

UNITS, SIZES, SEEDS = ["none", "dia-lstm"], [4, 8], [0, 1, 2]


@pytest.fixture(scope="module")
def unmeasured(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Eight runs of six steps, none of them measured."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "tiny.yaml").write_text(TINY)
    grid = {"units": UNITS, "batch_sizes": SIZES, "seeds": SEEDS}
    keys = {"output": str(folder / "runs"), "recipe": str(folder / "tiny.yaml"), "runs": [grid], "steps": 6}
    (folder / "twins.yaml").write_text(yaml.safe_dump(keys | {"points": 2, "protocol": "fd-digits"}))
    study = read_study(str(folder / "twins.yaml"))
    for run in study.runs:
        write_run_of(run.experiment)
    return study


@pytest.fixture(scope="module")
def page(unmeasured: Study) -> Parsed:
    """The page of the study before any run is measured."""
    return page_about(unmeasured.folder.parent / "twins.yaml")


@pytest.fixture
def study(unmeasured: Study, tmp_path: Path) -> Study:
    """A copy that tests may change, read from its own folder."""
    write_study(unmeasured)
    copy = shutil.copytree(unmeasured.folder, tmp_path / "copy")
    (unmeasured.folder / STUDY_FILE).unlink()
    return read_study(str(copy))


@pytest.fixture
def measure(record) -> Callable[[Study], dict[tuple[str, int, int, int], float]]:
    """Records a distance for each run at both of its steps; returns them by unit, batch size, seed and step."""

    def write(study: Study) -> dict[tuple[str, int, int, int], float]:
        random, written, protocol = np.random.default_rng(0), {}, EvalProtocol.read("fd-digits")
        for run in study.runs:
            for step in (3, 6):
                made = record(float(random.uniform(5, 9)), step, run.batch_size, num_samples=596)
                made = replace(made, seed=run.seed, unit=run.unit, protocol_name=protocol.name)
                append_record(run.folder / "evaluations.jsonl", replace(made, protocol_file_hash=protocol.hash()))
                written[run.unit, run.batch_size, run.seed, step] = made.distance
        return written

    return write


def page_about(subject: str | Path) -> Parsed:
    return parse(render(page_of(str(subject))[0]))


def test_curves_are_means_over_seeds_with_their_bands(study: Study, measure) -> None:
    distances = measure(study)
    page = page_about(study.folder)
    for size, plot in zip(SIZES, page.plots, strict=False):
        for unit in UNITS:
            seeds = [[distances[unit, size, seed, step] for step in (3, 6)] for seed in SEEDS]
            (mean,) = [trace for trace in plot["data"] if trace.get("name") == unit]
            assert (mean["x"], mean["y"]) == ([3 * size, 6 * size], pytest.approx(np.mean(seeds, axis=0)))
            pale = [trace["y"] for trace in plot["data"] if trace.get("opacity", 1) < 1]
            assert [y for y in pale if y in seeds] == seeds
            half = stats.t.ppf(0.975, len(SEEDS) - 1) * stats.sem(seeds)
            low, high = np.mean(seeds, axis=0) - half, np.mean(seeds, axis=0) + half
            assert [t for t in plot["data"] if t["y"] == pytest.approx([*low, *high[::-1]])], "the band"
    (ends,) = [trace for trace in page.plots[2]["data"] if trace["name"] == "none" and trace.get("showlegend", True)]
    assert ends["y"] == pytest.approx([np.mean([distances["none", size, seed, 6] for seed in SEEDS]) for size in SIZES])
    assert f"{ends['y'][0]:.3f} ± " in page.text
    differences = [distances["dia-lstm", 4, seed, 6] - distances["none", 4, seed, 6] for seed in SEEDS]
    assert f"{np.mean(differences):+.3f}" in page.text


def test_grids_stand_side_by_side(page: Parsed) -> None:
    alternatives = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    matches = [re.fullmatch(r"64 samples of run (.*)-b(\d)-s0 at step (\d), seeds 0-63", a or "") for a in alternatives]
    shown = [(match[2], match[3], match[1]) for match in matches if match]
    assert shown == [(size, step, unit) for size in "48" for step in "36" for unit in UNITS]


def test_losses_are_means_over_seeds(page: Parsed) -> None:
    means = [sum(1 / (step + seed) for seed in SEEDS) / len(SEEDS) for step in range(1, 7)]
    assert [plot["data"][0]["y"] for plot in page.plots[:2]] == [pytest.approx(means)] * 2


def test_recipes_are_shown_once_with_their_differences(page: Parsed) -> None:
    assert page.tables["Where the runs' recipes differ."][:2] == [
        ["run", "seed", "model.attention", "train.batch_size"],
        ["none-b4-s0", "0", "none", "4"],
    ]
    shared = page.text.partition("init_from: null")[2].partition("trackers: []")[0]
    assert "hidden_size: 16" in shared and "attention:" not in shared and "\n  batch_size:" not in shared


def test_a_study_is_found_by_its_folder_too(unmeasured: Study, study: Study, tmp_path: Path) -> None:
    page, folder = page_of(str(study.folder))
    assert (page.title, folder) == ("twins", study.folder)
    assert "No evaluations by protocol fd-digits yet; dia-diffusion curves" in parse(render(page)).text
    with pytest.raises(InputError, match=r"must be a run's folder.*study\.yaml.*runs"):
        page_of(str(unmeasured.folder))
    file = tmp_path / "new.yaml"
    config = yaml.safe_load((unmeasured.folder.parent / "twins.yaml").read_text())
    file.write_text(yaml.safe_dump(config | {"output": str(tmp_path / "new")}))
    with pytest.raises(InputError, match=r"nothing of study .*new\.yaml is in"):
        page_of(str(file))
    assert not (tmp_path / "new").exists()


def test_a_record_cut_short_is_refused(study: Study, measure) -> None:
    measure(study)
    file = study.runs[3].folder / "evaluations.jsonl"
    file.write_text(file.read_text()[:-20])
    with pytest.raises(InputError, match=r"evaluations\.jsonl, line 2: not a complete evaluation record"):
        page_of(str(study.folder))


def test_a_study_that_has_hardly_begun_has_a_page(study: Study, measure) -> None:
    measure(study)
    for run in study.runs[1:]:
        for file in ("evaluations.jsonl", "metrics.jsonl", "samples/step-00000003.png", "samples/step-00000006.png"):
            (run.folder / file).unlink()
    page = page_about(study.folder)
    assert f"1 of {len(study.runs)}" in page.text and "none yet" in page.text
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 2


def test_a_run_counts_as_trained_at_its_last_logged_step(tmp_path: Path) -> None:
    """With 620 steps and a line every 50, the last line is at step 600."""
    study = make_study(tmp_path, units=["none"], batch_sizes=[8], seeds=[0], steps=620)
    (run,) = study.runs
    assert run.experiment.train.log_every == 50
    for step, trained in ((550, "0 of 1"), (600, "1")):
        RunFolder(run.folder).log_metrics({"step": step, "images": 8 * step, "images_per_second": 100.0})
        assert study_page(study).facts["runs trained"] == trained
