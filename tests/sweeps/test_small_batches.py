"""The statistical tests that docs/results/small-batches.md announces, on made-up results, compared with scipy."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from dia_diffusion.sweeps.sweep import read_study

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "eval" / "small_batches.py"))


def test_each_comparison_is_of_runs_that_the_studies_plan() -> None:
    planned = {
        (name, run.unit, run.batch_size, run.seed)
        for name in ("digits", "digits_clock", "digits_parts", "cifar10")
        for run in read_study(f"small_batch_{name}").runs
    }
    assert min(seed for *_, seed in planned) == 100
    for comparisons in SCRIPT["QUESTIONS"].values():
        for one in comparisons:
            sides = ((one.study, one.unit), (one.other_study, one.other))
            seeds = [
                {seed for *run, seed in planned if run == [study.removeprefix("small_batch_"), unit, one.batch_size]}
                for study, unit in sides
            ]
            assert len(seeds[0] & seeds[1]) in (6, 10, 20), one


def test_the_primary_outcome_is_the_paired_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    values = {unit: dict(enumerate(rng.normal(10, 1, 20), 100)) for unit in ("none", "dia-lstm-identity")}
    points = [
        {"unit": unit, "batch_size": 4, "seed": seed, "distance": distance}
        for unit, by_seed in values.items()
        for seed, distance in by_seed.items()
    ]
    (tmp_path / "small_batch_digits").mkdir()
    (tmp_path / "small_batch_digits" / "results.json").write_text(json.dumps({"final_points": points}))
    SCRIPT["main"](tmp_path)
    lines = capsys.readouterr().out.splitlines()
    first, second = (list(values[unit].values()) for unit in ("dia-lstm-identity", "none"))
    expected = stats.ttest_rel(first, second)
    low, high = expected.confidence_interval()
    mean = np.mean(first) - np.mean(second)
    assert lines[4] == (
        f"| 4 | dia-lstm-identity - none | 20 | {mean:+.3f} | [{low:+.3f}, {high:+.3f}] | {expected.pvalue:.4f} | - |"
    )
    sums, differences = np.add(first, second), np.subtract(first, second)
    spread = stats.pearsonr(sums, differences).pvalue  # the only secondary test that has its runs
    assert lines[9].endswith(f"| {spread:.4f} | {spread:.4f} |")
