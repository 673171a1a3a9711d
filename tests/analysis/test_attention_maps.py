"""Attention maps against what the unit does to its features, and their variance against plain numpy."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dia_diffusion import UViT
from dia_diffusion.analysis.attention_maps import (
    MapMoments,
    attention_maps,
    maps_of_run,
    measure_maps,
    split_variance,
    summary,
)
from dia_diffusion.analysis.run import Coverage, open_runs
from dia_diffusion.attention import UNITS
from dia_diffusion.errors import InputError
from dia_diffusion.training.randomness import image_order

SMALL = {"sample_size": 8, "patch_size": 2, "hidden_size": 32, "num_layers": 3, "num_attention_heads": 4}


@pytest.mark.parametrize("unit", UNITS)
def test_maps_are_what_features_are_multiplied_with(unit: str) -> None:
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
        scales = (recalibrated / features)[:, 1:]  # of the patches; with maps over places each has its own
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
    # Written out with loops, as the law says it.
    channels = [np.var([h[b, :, :, n].mean() for n in range(6)]) for b in range(3)]
    times = [np.var([h[b, t, :, n].mean() for t in range(4)]) for b in range(3) for n in range(6)]
    images = [np.var(h[b, t, :, n]) for b in range(3) for t in range(4) for n in range(6)]
    assert split_variance([moments]) == pytest.approx(
        {
            "blocks": np.var([h[b].mean() for b in range(3)]),
            "channels": np.mean(channels),
            "times": np.mean(times),
            "images": np.mean(images),
        }
    )


@pytest.mark.parametrize(("source", "shape"), [("blocks", (3, 1, 1)), ("channels", (3, 1, 6)), ("times", (3, 4, 6))])
def test_each_cause_has_its_share(source: str, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(1).normal(size=shape)
    if source != "blocks":
        values -= values.mean(axis=(1, 2), keepdims=True)
    if source == "times":
        values -= values.mean(axis=1, keepdims=True)
    moments = MapMoments(np.broadcast_to(values, (3, 4, 6)), np.zeros((3, 4, 6)))
    assert summary([moments])["shares"][source] == pytest.approx(1)


def test_moments_of_a_run_are_those_of_image_after_image(tiny_run: Callable[[str], Path]) -> None:
    (run,) = open_runs([tiny_run("dia-lstm")])
    model = run.model(6)
    seen: list[int] = []
    (moments,) = measure_maps(run, model, Coverage(5, 3, seed=2, batch_size=2, progress=seen.append))
    assert sum(seen) == 15
    draws = run.draw(2, 0, 5)
    pixels = run.images.images[image_order(2, 0, 5, len(run.images))]
    maps = np.zeros((3, 3, 5, 16))
    for time in range(3):
        u = (time + 0.5) / 3
        alpha = np.exp(-(0.1 * u + 19.9 * u**2 / 2) / 2)
        for image in range(5):
            x = torch.from_numpy(pixels[image]).float() / 127.5 - 1
            x = x.flip(-1) if draws.flips[image] else x
            noisy = alpha * x + (1 - alpha**2) ** 0.5 * draws.noise[image]
            with torch.no_grad():
                maps[:, time, image] = attention_maps(model, noisy[None], torch.tensor([999 * u]))[:, 0]
    assert np.allclose(moments.mean, maps.mean(axis=2), atol=1e-6)
    assert np.allclose(moments.variance, maps.var(axis=2), atol=1e-7)


def test_records_begin_with_the_first_weights(tiny_run: Callable[[str], Path]) -> None:
    (run,) = open_runs([tiny_run("block-scale")])
    record = maps_of_run(run, coverage=Coverage(2, 2))
    assert [step["step"] for step in record["steps"]] == [0, 3, 6]
    first, last = record["steps"][0], record["steps"][-1]
    assert first["mean_by_block"] == pytest.approx([0.25] * 3) and first["variance"] == pytest.approx(0, abs=1e-12)
    assert last["mean_by_block"] == pytest.approx(run.model(6).unit.scale[:, 0].tolist())
    assert last["shares"]["blocks"] == pytest.approx(1, abs=1e-4)
    plain, _ = open_runs([tiny_run("none"), tiny_run("block-scale")])
    with pytest.raises(InputError, match="without attention unit"):
        maps_of_run(plain, coverage=Coverage(2, 2))


def test_other_images_than_it_was_trained_on_are_refused(tiny_run: Callable[[str], Path], tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((10, 8, 8), dtype=np.uint8))
    with pytest.raises(InputError, match=r"other images than .* was trained on; give those as --data"):
        open_runs([tiny_run("dia-lstm")], str(tmp_path / "images.npy"))
