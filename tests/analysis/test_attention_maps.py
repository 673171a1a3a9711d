"""Attention maps against the scaling of features; their variance, and its share explained by classes, against numpy."""

import numpy as np
import pytest
import torch

from dia_diffusion import UViT
from dia_diffusion.analysis.attention_maps import (
    ANALYSIS,
    ClassMeans,
    MapMoments,
    attention_maps,
    measure_maps,
    split_variance,
    summary,
)
from dia_diffusion.analysis.run import Coverage, open_runs
from dia_diffusion.attention import UNITS
from dia_diffusion.errors import InputError
from tests.analysis.conftest import MakeRun, noisy

SMALL = {"sample_size": 8, "patch_size": 2, "hidden_size": 32, "num_layers": 3, "num_attention_heads": 4}


@pytest.mark.parametrize("unit", UNITS)
def test_maps_are_the_scales_applied_to_features(unit: str) -> None:
    torch.manual_seed(0)
    model = UViT(**SMALL, attention=unit).eval()
    for parameter in model.unit.parameters():
        torch.nn.init.normal_(parameter)
    calls = []
    hook = model.unit.register_forward_hook(lambda _, given, returned: calls.append((given[0], returned[0])))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0])
    maps = attention_maps(model, x, t)
    hook.remove()
    assert maps.shape == (3, 2, 32) and len(calls) == 3
    for h, (features, recalibrated) in zip(maps, calls, strict=True):
        scales = (recalibrated / features)[:, 1:]  # of the patches; with spatial maps each patch has its own
        assert torch.allclose(h, scales.mean(1), rtol=1e-5, atol=1e-7)
    assert not model.unit._forward_hooks


def test_a_model_without_unit_has_no_maps() -> None:
    with pytest.raises(InputError, match="no attention unit"):
        attention_maps(UViT(**SMALL, attention=None), torch.randn(1, 3, 8, 8), torch.zeros(1))


def test_the_terms_add_up_to_the_variance() -> None:
    h = np.random.default_rng(0).normal(size=(3, 4, 5, 6)) * np.arange(1, 4)[:, None, None, None]  # L, T, I, N
    moments = MapMoments(h.mean(axis=2), h.var(axis=2))
    assert sum(split_variance([moments]).values()) == pytest.approx(h.var())
    assert sum(split_variance([moments.block(1)]).values()) == pytest.approx(h[1].var())
    # The law of total variance, written out with loops.
    channels = [np.var([h[b, :, :, n].mean() for n in range(6)]) for b in range(3)]
    times = [np.var([h[b, t, :, n].mean() for t in range(4)]) for b in range(3) for n in range(6)]
    images = [np.var(h[b, t, :, n]) for b in range(3) for t in range(4) for n in range(6)]
    expected = {"channels": np.mean(channels), "times": np.mean(times), "images": np.mean(images)}
    expected["blocks"] = np.var([h[b].mean() for b in range(3)])
    assert split_variance([moments]) == pytest.approx(expected)
    shares = {source: term / h.var() for source, term in expected.items()}
    assert summary([moments])["shares"] == pytest.approx(shares)


def test_batched_moments_match_single_images(tiny_run: MakeRun) -> None:
    (run,) = open_runs([tiny_run("dia-lstm")])
    model = run.model(6)
    seen: list[int] = []
    (moments,) = measure_maps(run, model, Coverage(5, 3, seed=2, batch_size=2, progress=seen.append))
    assert sum(seen) == 15
    draws = run.draw(2, 0, 5)
    maps = np.zeros((3, 3, 5, 16))
    for time, image in np.ndindex(3, 5):
        maps[:, time, image] = attention_maps(model, *noisy(run, draws, image, (time + 0.5) / 3))[:, 0]
    assert np.allclose(moments.mean, maps.mean(axis=2), atol=1e-6)
    assert np.allclose(moments.variance, maps.var(axis=2), atol=1e-7)


def test_records_begin_with_the_first_weights(tiny_run: MakeRun) -> None:
    (run,) = open_runs([tiny_run("block-scale")])
    record = ANALYSIS.of_run(run, over=Coverage(2, 2))
    assert [step["step"] for step in record["steps"]] == [0, 3, 6]
    first, last = record["steps"][0], record["steps"][-1]
    assert first["mean_by_block"] == pytest.approx([0.25] * 3) and first["variance"] == pytest.approx(0, abs=1e-12)
    assert last["mean_by_block"] == pytest.approx(run.model(6).unit.scale[:, 0].tolist())
    assert last["shares"]["blocks"] == pytest.approx(1, abs=1e-4)


def test_blocks_of_all_stages_follow_each_other(tiny_classifier: MakeRun) -> None:
    (run,) = open_runs([tiny_classifier("block-channels")])
    record = ANALYSIS.of_run(run, [4], Coverage(30, 16))
    last = record["steps"][0]
    expected = [float(row.mean()) for unit in run.model(4).attention_units for row in unit.scale]
    assert last["mean_by_block"] == pytest.approx(expected, rel=1e-4) and len(expected) == 9
    assert last["shares"]["times"] == 0 and last["shares"]["images"] < 1e-6
    assert [len(stage["blocks"]) for stage in record["stages"]] == [3, 3, 3] and not record["has_times"]
    assert len(last["classes"]["names"]) <= 10


def classes_of(stages: list[np.ndarray], labels: np.ndarray, batch: int = 7) -> dict:
    """The record for the maps (L, T, I, N) of each stage and the classes (I,), added batch by batch."""
    classes = [ClassMeans(h.shape[0], h.shape[1], h.shape[3]) for h in stages]
    for each, h in zip(classes, stages, strict=True):
        for start in range(0, len(labels), batch):
            for time in range(h.shape[1]):
                each.add(h[:, time, start : start + batch], time, labels[start : start + batch])
    moments = [MapMoments(h.mean(axis=2), h.var(axis=2)) for h in stages]
    return ClassMeans.summary(classes, moments, ["a", "b", "c", "d"])


def test_a_map_determined_by_the_class_is_fully_explained() -> None:
    labels = np.array([0, 1, 3, 1, 0, 3, 3, 0])
    h = np.random.default_rng(0).random((2, 3, 4, 5))[:, :, labels]
    record = classes_of([h], labels)
    assert record["share"] == pytest.approx(1) and record["adjusted"] == pytest.approx(1)
    assert record["names"] == ["a", "b", "d"] and record["counts"] == [3, 2, 3]
    deviation = h[1][:, labels == 3].mean() - h[1].mean()
    assert record["deviation_by_class_and_block"][2][1] == pytest.approx(deviation)


def test_a_known_share() -> None:
    """Class means -1 and 1, standard deviation 2 within a class: classes explain 1 / (1 + 4) of the variance."""
    within = np.array([-2.0, 2.0, -2.0, 2.0])
    h = np.concatenate([within - 1, within + 1])[None, None, :, None]
    record = classes_of([h], np.repeat([0, 1], 4))
    assert record["share"] == pytest.approx(0.2) and record["share_by_chance"] == pytest.approx(1 / 7)
    assert record["adjusted"] == pytest.approx(1 - 0.8 * 7 / 6)
    assert record["share_by_block"] == pytest.approx([0.2])
    constant = classes_of([np.ones((1, 1, 3, 2))], np.array([0, 1, 2]))
    assert constant["share"] == 0 and constant["adjusted"] is None


def test_random_classes_explain_only_the_share_by_chance() -> None:
    random = np.random.default_rng(2)
    stages = [random.normal(size=(2, 2, 40, 50)), random.normal(size=(1, 2, 40, 100))]
    record = classes_of(stages, np.arange(40) % 4)
    assert record["share"] == pytest.approx(3 / 39, rel=0.05) and abs(record["adjusted"]) < 0.01
    assert len(record["share_by_block"]) == 3
    assert np.mean(record["share_by_block"]) == pytest.approx(record["share"], rel=0.02)
