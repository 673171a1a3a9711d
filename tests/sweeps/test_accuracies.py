"""Accuracies over seeds, compared with scipy and with values computed by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from dia_diffusion.cli.main import main
from dia_diffusion.errors import InputError
from dia_diffusion.sweeps.accuracies import compare, read_result
from dia_diffusion.training.config import ClassifyExperiment

ACCURACIES = {"none": [0.5, 0.52, 0.51], "se": [0.53, 0.55, 0.56], "dia-lstm": [0.51, 0.6, 0.52]}


def write_run(folder: Path, unit: str, seed: int, accuracy: float | None, **changed: Any) -> Path:
    """A run's files as classify writes them."""
    recipe = ClassifyExperiment(seed=seed, output=str(folder)).to_dict()
    recipe["model"]["attention"] = unit
    for key, value in changed.items():
        recipe["model"][key] = value
    record: dict[str, Any] = {
        "step": 9,
        "diverged_at": 4 if accuracy is None else None,
        "parameters": 100,
        "recipe": recipe,
    }
    record["test_data"] = {"name": "test", "count": 10, "fingerprint": "f"}
    lines = [{"step": 3, "images": 384, "loss": 1.0}]
    if accuracy is not None:
        record["test_accuracy"] = accuracy
        lines += [{"step": s, "images": 128 * s, "test_accuracy": accuracy * s / 9} for s in (3, 6, 9)]
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [
        write_run(tmp_path / f"{unit}-{seed}", unit, seed, value)
        for unit, values in ACCURACIES.items()
        for seed, value in enumerate(values)
    ]


def test_runs_from_before_a_key_existed_have_its_default(tmp_path: Path) -> None:
    new, old = (write_run(tmp_path / name, "se", 0, 0.5) for name in ("new", "old"))
    record = json.loads((old / "result.json").read_text())
    del record["recipe"]["ssia"]
    (old / "result.json").write_text(json.dumps(record))
    assert read_result(old).setting() == read_result(new).setting()


def test_rows_are_scipys(runs: list[Path]) -> None:
    rows = {row.unit: row for row in compare([read_result(run) for run in reversed(runs)])}
    for unit, values in ACCURACIES.items():
        assert rows[unit].mean == pytest.approx(np.mean(values)) and rows[unit].accuracies == values
        assert rows[unit].deviation == pytest.approx(stats.tstd(values))
    p = {unit: stats.ttest_ind(ACCURACIES[unit], ACCURACIES["none"]).pvalue for unit in ("se", "dia-lstm")}
    assert rows["none"].p is None and rows["none"].difference is None
    assert all(rows[unit].p == pytest.approx(value) for unit, value in p.items())
    assert rows["se"].p_holm == pytest.approx(2 * p["se"]) and rows["dia-lstm"].p_holm == pytest.approx(p["dia-lstm"])
    assert rows["se"].difference == pytest.approx(0.11 / 3)
    assert rows["se"].results[0].curve == [(384, 0.53 / 3), (768, 0.53 * 6 / 9), (1152, 0.53)]


def test_settings_and_options_have_separate_rows(runs: list[Path], tmp_path: Path) -> None:
    individual = {"sharing": "individual", "reduction": 4}
    more = [
        write_run(tmp_path / "individual", "se", 0, 0.5, attention_kwargs=individual),
        write_run(tmp_path / "shared", "se", 0, 0.5, attention_kwargs={"reduction": 4}),
        write_run(tmp_path / "no-norm", "none", 0, None, norm="none"),
        write_run(tmp_path / "no-norm-dia", "dia-lstm", 0, 0.4, norm="none"),
    ]
    rows = compare([read_result(run) for run in [*runs, *more]])
    found = [(row.setting, row.unit) for row in rows]
    assert found == [
        ("norm batch", "none"),
        ("norm batch", "se"),
        ("norm batch", "dia-lstm"),
        ("norm batch", "se-individual {reduction: 4}"),
        ("norm batch", "se {reduction: 4}"),
        ("norm none", "none"),
        ("norm none", "dia-lstm"),
    ]
    assert rows[5].diverged_at == [4] and rows[5].mean is None and rows[6].difference is None


def test_the_command_writes_table_numbers_and_figure(runs: list[Path], tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["accuracies", *map(str, runs), "--out", str(out)]) == 0
    assert "53.00%" not in capsys.readouterr().err
    table = (out / "accuracies.md").read_text().splitlines()
    assert len(table) == 5 and table[3].startswith("| se | 100 | 3 | 54.67% | 1.53% | +3.67% | ")
    numbers = json.loads((out / "accuracies.json").read_text())
    assert [row["accuracies"] for row in numbers["rows"]] == list(ACCURACIES.values())
    assert min(Image.open(out / "accuracies.png").size) > 500
    assert main(["accuracies", *map(str, runs), "--out", str(out)]) == 2, "nothing is written over"


def test_what_is_refused(runs: list[Path], tmp_path: Path) -> None:
    results = [read_result(run) for run in runs]
    with pytest.raises(InputError, match="`--baseline` must be one of none, se, dia-lstm, got 'eca'"):
        compare(results, "eca")
    with pytest.raises(InputError, match="both se of seed 0"):
        compare([*results, read_result(write_run(tmp_path / "again", "se", 0, 0.5))])
    with pytest.raises(InputError, match=r"got .* without result\.json"):
        read_result(tmp_path)
    with (runs[1] / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({"step": 10, "images": 1280, "loss": 1.0}) + "\n")
    with pytest.raises(InputError, match="is being trained again since its result"):
        read_result(runs[1])
    (runs[0] / "result.json").write_text("{")
    with pytest.raises(InputError, match="truncated or corrupted"):
        read_result(runs[0])


def test_runs_that_were_trained_on_other_images_are_refused(runs: list[Path]) -> None:
    """The source may have moved, so images are compared by fingerprint."""
    for run, fingerprint in ((runs[0], "a"), (runs[1], "a")):
        alter(run, fingerprint)
    compare([read_result(run) for run in runs])  # the other results don't name their images
    alter(runs[3], "b")
    with pytest.raises(InputError, match="the train images of compared runs must be the same"):
        compare([read_result(run) for run in runs])


def alter(run: Path, fingerprint: str) -> None:
    """Adds the fingerprint of the train images to a run's result."""
    record = json.loads((run / "result.json").read_text())
    record["train_data"] = {"name": "train", "count": 10, "fingerprint": fingerprint}
    (run / "result.json").write_text(json.dumps(record))
