"""Correlations of maps against numpy.corrcoef, and runs with maps that are known to be equal or constant."""

import numpy as np
import pytest
import torch

from dia_diffusion.analysis.attention_maps import attention_maps
from dia_diffusion.analysis.correlation import ANALYSIS, Coefficients, pearson
from dia_diffusion.analysis.run import Coverage, open_runs
from tests.analysis.conftest import MakeRun


def by_hand() -> np.ndarray:
    """Maps (4, 3, 7): the last block's are 1 - 2 times the first's, and the third's are constant."""
    h = np.random.default_rng(0).random((4, 3, 7))
    h[2] = 0.25
    h[3] = 1 - 2 * h[0]
    return h


def test_the_distribution_covers_all_images_and_pairs() -> None:
    random = np.random.default_rng(1)
    h = random.random((5, 400, 12)) + random.random((5, 1, 12))
    coefficients = Coefficients(5)
    for start in range(0, 400, 150):  # batch by batch
        part = h[:, start : start + 150]
        coefficients.add(pearson(part, np.ones(part.shape[:2])))
    record = coefficients.summary()
    every = np.array([[np.corrcoef(h[:, image])[i, j] for image in range(400)] for i in range(5) for j in range(i)])
    assert record["mean"] == pytest.approx(every.mean()) and record["coefficients"] == 10 * 400
    assert record["mean_by_pair"][2][4] == record["mean_by_pair"][4][2] == pytest.approx(every[8].mean())
    assert record["mean_by_pair"][1][1] is None and record["undefined"] == 0
    for quantile, value in record["quantiles"].items():
        assert value == pytest.approx(np.quantile(every, float(quantile)), abs=0.006)


def test_constant_maps_are_counted_and_have_no_mean() -> None:
    h = by_hand()
    coefficients = Coefficients(4)
    coefficients.add(pearson(h, np.ones((4, 3))))
    record = coefficients.summary()
    assert record["undefined"] == 3 * 3 and record["coefficients"] == 3 * 3
    assert record["mean_by_pair"][0][2] is None and record["mean_by_pair"][0][3] == pytest.approx(-1)
    nothing = Coefficients(3)
    nothing.add(np.full((2, 3, 3), np.nan))
    assert nothing.summary()["mean"] is None and nothing.summary()["quantiles"] is None


def test_batched_correlations_match_single_images(tiny_run: MakeRun) -> None:
    (run,) = open_runs([tiny_run("dia-lstm")])
    seen: list[int] = []
    record = ANALYSIS.of_run(run, [6], Coverage(5, 2, seed=3, batch_size=2, progress=seen.append))
    assert sum(seen) == 2 * 5 * 2
    model, draws = run.model(6), run.draw(3, 0, 5)
    images, _ = run.batch(draws)
    own, apart = [], []
    for time in (0.25, 0.75):
        timestep = run.process.timestep(torch.tensor([time]).expand(5))
        noisy, _ = run.process.mix(images, draws.noise, timestep)
        h = attention_maps(model, noisy, timestep).double().numpy()  # (L, I, N)
        for image in range(5):
            own.append(np.corrcoef(h[:, image]))
            apart.append(np.corrcoef((h - h.mean(axis=1, keepdims=True))[:, image]))
    (stage,) = record["steps"][0]["stages"]
    for variant, expected in (("maps", np.mean(own, axis=0)), ("centred", np.mean(apart, axis=0))):
        found = np.array(stage[variant]["mean_by_pair"], dtype=float)
        assert np.allclose(found[~np.eye(3, dtype=bool)], expected[~np.eye(3, dtype=bool)], atol=1e-4)
        assert record["steps"][0]["mean"][variant] == pytest.approx(expected[np.triu_indices(3, 1)].mean(), abs=1e-4)


def test_block_channels_correlate_only_before_centering(tiny_run: MakeRun) -> None:
    """Learned channel scales are the same for every image: with their mean subtracted, nothing is left to correlate."""
    runs = open_runs([tiny_run("block-channels"), tiny_run("block-scale")])
    (channels,) = ANALYSIS.of_run(runs[0], [6], Coverage(4, 2))["steps"]
    expected = np.corrcoef(runs[0].model(6).unit.scale.detach().double().numpy())
    assert channels["mean"]["maps"] == pytest.approx(expected[np.triu_indices(3, 1)].mean(), abs=1e-3)
    assert channels["mean"]["centred"] is None and channels["stages"][0]["centred"]["undefined"] == 3 * 4 * 2
    (numbers,) = ANALYSIS.of_run(runs[1], [6], Coverage(4, 2))["steps"]
    assert numbers["mean"] == {"maps": None, "centred": None}


def test_each_stage_is_correlated_separately(tiny_classifier: MakeRun) -> None:
    (run,) = open_runs([tiny_classifier("se")])
    (step,) = ANALYSIS.of_run(run, [4], Coverage(6, 16, batch_size=4))["steps"]
    model, draws = run.model(4), run.draw(0, 0, 6)
    seen: dict[int, list[np.ndarray]] = {0: [], 1: [], 2: []}
    for index, unit in enumerate(model.attention_units):
        unit.register_forward_hook(lambda unit, _, out, kept=seen[index]: kept.append(unit.attention_map(out[1])))
    run.training_losses(model, draws)
    means = []
    for stage, maps in zip(step["stages"], seen.values(), strict=True):
        h = torch.stack(maps).double().numpy()
        assert len(h) == 3 and len(stage["blocks"]) == 3 and stage["channels"] == h.shape[2]
        pairs = [np.corrcoef(h[:, image])[np.triu_indices(3, 1)] for image in range(6)]
        assert stage["maps"]["mean"] == pytest.approx(np.mean(pairs), abs=1e-4)
        means.append(np.mean(pairs))
    assert step["mean"]["maps"] == pytest.approx(np.mean(means), abs=1e-4)  # each stage has the same number of pairs
