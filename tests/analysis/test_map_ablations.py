"""Replaced attention maps against controls that hold the same numbers, and losses against scipy and closed forms."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from dia_diffusion import UViT
from dia_diffusion.analysis.ablations import (
    REPLACEMENTS,
    ablations_of_run,
    compared,
    losses,
    replaced_maps,
    replacement,
)
from dia_diffusion.analysis.attention_maps import MapMoments, measure_maps
from dia_diffusion.analysis.run import Coverage, open_runs
from dia_diffusion.analysis.stages import uvit_blocks
from dia_diffusion.cli.main import main
from dia_diffusion.errors import InputError
from dia_diffusion.training.randomness import image_order

SMALL = {"sample_size": 8, "patch_size": 2, "hidden_size": 32, "num_layers": 3, "num_attention_heads": 4}


def test_replaced_maps_are_a_learned_scale() -> None:
    torch.manual_seed(0)
    model = UViT(**SMALL, attention="dia-lstm").eval()
    control = UViT(**SMALL, attention="block-channels").eval()
    maps = torch.randn(3, 32)
    backbone = {name: value for name, value in model.state_dict().items() if not name.startswith("unit.")}
    control.load_state_dict({**backbone, "unit.scale": maps})
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0])
    with torch.no_grad():
        before = model(x, t).sample
        with replaced_maps([model.unit], [maps]):
            model(x, t)
            replaced = model(x, t).sample  # the blocks are counted anew in each pass
        assert torch.allclose(replaced, control(x, t).sample, atol=1e-6)
        assert not torch.allclose(replaced, before, atol=1e-3)
        assert torch.equal(model(x, t).sample, before)


def test_replacements_are_means_over_what_they_are_not_named_for() -> None:
    mean = np.random.default_rng(0).normal(size=(2, 3, 4))  # L, T, N
    moments = MapMoments(mean, np.zeros_like(mean))
    by = {name: replacement(moments, axes).numpy() for name, axes in REPLACEMENTS.items()}
    for block, time, channel in np.ndindex(2, 3, 4):
        expected = {
            "h by block, time, channel": mean[block, time, channel],
            "h by block, channel": mean[block, :, channel].mean(),
            "h by block, time": mean[block, time].mean(),
            "h by block": mean[block].mean(),
        }
        assert {name: maps[time, block, channel] for name, maps in by.items()} == pytest.approx(expected, rel=1e-6)


def test_losses_are_those_of_image_after_image(tiny_run: Callable[[str], Path]) -> None:
    """vp-continuous noise, uniform weights, noise predicted: the loss is the mean squared error of the noise."""
    (run,) = open_runs([tiny_run("dia-lstm")])
    model = run.model(6)
    draws = run.draw_others(2, 5)
    seen: list[int] = []
    measured = losses(run, model, draws, Coverage(5, 3, batch_size=2, progress=seen.append))
    assert measured.shape == (3, 5) and sum(seen) == 15
    order = image_order(2, 0, 10, len(run.images))
    assert np.array_equal(draws.indices, order[5:]) and len(set(order)) == 10
    for time, image in np.ndindex(3, 5):
        u = (time + 0.5) / 3
        alpha = np.exp(-(0.1 * u + 19.9 * u**2 / 2) / 2)
        x = torch.from_numpy(run.images.images[order[5 + image]]).float() / 127.5 - 1
        x = x.flip(-1) if draws.flips[image] else x
        noisy = alpha * x + (1 - alpha**2) ** 0.5 * draws.noise[image]
        with torch.no_grad():
            predicted = model(noisy[None], torch.tensor([999 * u])).sample[0]
        assert float(measured[time, image]) == pytest.approx(float((predicted - draws.noise[image]).square().mean()))


def test_differences_are_paired_by_image() -> None:
    random = np.random.default_rng(0)
    own = random.gamma(2.0, size=(1, 50)) + random.normal(0, 0.01, size=(4, 50))
    other = own + random.normal(0.02, 0.05, size=(4, 50))
    record = compared(torch.from_numpy(own), {"other": torch.from_numpy(other)})
    before, after = own.mean(axis=0), other.mean(axis=0)
    assert record["own"]["loss"] == pytest.approx(own.mean()) and record["own"]["difference_error"] == 0
    assert record["other"]["standard_error"] == pytest.approx(stats.sem(after))
    t = record["other"]["difference"] / record["other"]["difference_error"]
    assert t == pytest.approx(stats.ttest_rel(after, before).statistic)


@pytest.mark.parametrize(
    ("unit", "unchanged"),
    [("block-channels", {"h by block, time, channel", "h by block, channel"}), ("block-scale", set(REPLACEMENTS))],
)
def test_a_control_is_its_own_mean(
    unit: str, unchanged: set[str], tiny_run: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = open_runs([tiny_run(unit)])
    model = run.model(6)
    # Six steps of training leave the scales alike, and the MLPs without effect on the loss.
    torch.manual_seed(0)
    torch.nn.init.normal_(model.unit.scale)
    for module in (*(block.mlp.fc2 for block in uvit_blocks(model)), model.decoder):
        module.weight.data *= 30
    monkeypatch.setattr(run, "model", lambda step: model)
    (step,) = ablations_of_run(run, [6], Coverage(4, 2))["steps"]
    for name in REPLACEMENTS:
        loss = step["losses"][name]
        apart = max(abs(loss["difference"]), loss["difference_error"]) / step["losses"]["own"]["loss"]
        assert apart < 1e-6 if name in unchanged else apart > 1e-4, name


def test_means_are_of_other_images_than_losses(tiny_run: Callable[[str], Path]) -> None:
    (run,) = open_runs([tiny_run("dia-lstm")])
    (step,) = ablations_of_run(run, [6], Coverage(4, 2, seed=3))["steps"]
    model, draws = run.model(6), run.draw(3, 1, 4)
    mean = torch.from_numpy(measure_maps(run, model, Coverage(4, 2, seed=3))[0].mean).float()
    for name, maps in (("h by block, time, channel", mean), ("h by block", mean.mean((1, 2), True).expand(-1, 2, 16))):
        expected = losses(
            run, model, draws, Coverage(4, 2), lambda time, maps=maps: replaced_maps([model.unit], [maps[:, time]])
        )
        assert step["losses"][name]["loss"] == pytest.approx(float(expected.mean()))
    half = len(run.images) // 2
    with pytest.raises(InputError, match=f"accepted: {half} or fewer"):
        ablations_of_run(run, coverage=Coverage(half + 1, 2))


def test_the_commands_write_figures_and_numbers(
    tiny_run: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unit, control, plain = (str(tiny_run(name)) for name in ("dia-lstm", "block-channels", "none"))
    few = ["--out", str(tmp_path / "out"), "--seed", "1", "--images", "3", "--times", "2"]
    for arguments, count in (
        (["ablations", unit, control], 2),
        (["linearity", unit, plain, "--steps", "6"], 2),
        (["ablations", unit, "--steps", "3"], 1),
    ):
        assert main(["analyze", *arguments, *few]) == 0
        record = json.loads((tmp_path / "out" / f"{arguments[0]}.json").read_text())
        assert record["analysis"] == arguments[0] and len(record["runs"]) == count
        assert record["protocol"] == {"images": 3, "times": 2, "weights": "ema", "seed": 1, "randomness": 2}
        assert Image.open(tmp_path / "out" / f"{arguments[0]}.png").size[0] > 500
    capsys.readouterr()
    # The last run has no unit, which is told before the first is measured.
    assert main(["analyze", "ablations", unit, plain, *few]) == 2
    output = capsys.readouterr()
    assert "was trained without attention unit" in output.err and "measuring" not in output.out
