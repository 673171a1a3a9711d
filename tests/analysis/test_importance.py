"""Importances of maps with known dependencies; scores are computed on other images than the fits."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from dia_diffusion.analysis.attention_maps import measure_maps
from dia_diffusion.analysis.importance import MIN_R2, draw, draw_samples, importances
from dia_diffusion.analysis.run import Coverage, open_runs
from tests.analysis.conftest import MakeRun


def drawn(seed: int, count: int = 1500) -> np.ndarray:
    """Samples of four blocks: the third is a function of the first, the fourth is noise."""
    random = np.random.default_rng(seed)
    h = random.random((count, 4))
    h[:, 2] = np.sin(6 * h[:, 0])
    return h


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return importances(drawn(0), drawn(1), scale=0.5)


def test_importance_finds_the_block_that_a_map_is_computed_from(rows: list[dict[str, Any]]) -> None:
    second, third, fourth = rows
    assert third["importance"][0] > 0.95 and third["r2"] > 0.99
    assert second["r2"] < MIN_R2 and second["importance"] == [1.0]  # although its forest predicts nothing
    assert fourth["r2"] < 0.05 and sum(fourth["importance"]) == pytest.approx(1)


def test_forests_are_seeded_and_scored_on_other_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dia_diffusion.analysis.importance.TREES", 10)
    fit, score = drawn(0, 100), drawn(1, 100)
    assert importances(fit, score, 0.5, seed=3) == importances(fit, score, 0.5, seed=3)
    assert importances(fit, score, 0.5, seed=3) != importances(fit, score, 0.5, seed=4)
    assert importances(fit, fit, 0.5)[2]["r2"] > 0.3  # it fits its own samples even if they are noise
    fit[:, 1] = 0.25 + 1e-9 * fit[:, 0]
    assert importances(fit, score, 0.25)[0] == {"importance": [0.0], "r2": None}, "a constant block"


def test_samples_are_channels_of_images_at_times(tiny_run: MakeRun) -> None:
    (run,) = open_runs([tiny_run("block-channels")])
    model, coverage = run.model(6), Coverage(4, 2, batch_size=3, num_samples=40)
    moments = measure_maps(run, model, coverage)
    (found,) = draw_samples(run, model, coverage, 0, moments)  # 5 of the 16 channels per image and time
    assert found["maps"].shape == (40, 3) and np.abs(found["centred"]).max() < 1e-7
    scale = model.unit.scale.detach().numpy()  # (L, N), the same for every image
    chosen = [{tuple(row) for row in found["maps"][start : start + 5].round(6)} for start in range(0, 40, 5)]
    # No channel twice, and not always the same channels.
    assert all(len(rows) == 5 for rows in chosen) and len(set(map(frozenset, chosen))) > 1
    assert set.union(*chosen) <= {tuple(row) for row in scale.T.astype(np.float64).round(6)}
    (whole,) = draw_samples(run, model, replace(coverage, num_samples=10_000), 0, moments)
    assert len(whole["maps"]) == 4 * 2 * 16


def test_rows_that_predict_nothing_are_hatched(rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    hatched = []
    add = Axes.add_patch
    monkeypatch.setattr(Axes, "add_patch", lambda self, patch: (hatched.append(patch), add(self, patch))[1])
    stage = {"name": "", "blocks": ["1", "2", "3", "4"], "samples": 1500, "maps": rows, "centred": rows}
    run = {"run": "made", "least_r2": MIN_R2, "steps": [{"step": 1, "stages": [stage]}]}
    draw([run])
    rows_hatched = [round(patch.get_y() + 0.5) for patch in hatched if patch.get_hatch()]
    assert rows_hatched == [0, 2, 0, 2]  # blocks 2 and 4 of both triangles
