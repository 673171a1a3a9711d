"""Replaced maps against controls with the same scales, lines for GELU against least squares, losses against scipy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from dia_diffusion import UViT
from dia_diffusion.analysis.ablations import ANALYSIS as ABLATIONS
from dia_diffusion.analysis.ablations import REPLACEMENTS, compared, losses, replaced_maps, replacement
from dia_diffusion.analysis.attention_maps import MapMoments, measure_maps
from dia_diffusion.analysis.linearity import ANALYSIS as LINEARITY
from dia_diffusion.analysis.linearity import LineFit, at_activations, lines_instead
from dia_diffusion.analysis.run import Coverage, TrainedRun, open_runs
from dia_diffusion.analysis.stages import uvit_blocks
from tests.analysis.conftest import MakeRun

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
            replaced = model(x, t).sample  # the block count restarts in each pass
        assert torch.allclose(replaced, control(x, t).sample, atol=1e-6)
        assert not torch.allclose(replaced, before, atol=1e-3)
        assert torch.equal(model(x, t).sample, before)


def test_replacements_average_over_the_axes_not_in_their_name() -> None:
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
def test_replacing_a_control_by_its_mean_changes_nothing(
    unit: str, unchanged: set[str], tiny_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = open_runs([tiny_run(unit)])
    model = run.model(6)
    # After six training steps the scales are still nearly equal and the MLPs have no effect on the loss.
    torch.manual_seed(0)
    torch.nn.init.normal_(model.unit.scale)
    for module in (*(block.mlp.fc2 for block in uvit_blocks(model)), model.decoder):
        module.weight.data *= 30
    monkeypatch.setattr(run, "model", lambda step, weights: model)
    (step,) = ABLATIONS.of_run(run, [6], Coverage(4, 2))["steps"]
    for name in REPLACEMENTS:
        loss = step["losses"][name]
        apart = max(abs(loss["difference"]), loss["difference_error"]) / step["losses"]["own"]["loss"]
        assert apart < 1e-6 if name in unchanged else apart > 1e-4, name


def test_means_and_losses_use_different_images(tiny_run: MakeRun) -> None:
    (run,) = open_runs([tiny_run("dia-lstm")])
    (step,) = ABLATIONS.of_run(run, [6], Coverage(4, 2, seed=3))["steps"]
    model, draws = run.model(6), run.draw(3, 1, 4)
    mean = torch.from_numpy(measure_maps(run, model, Coverage(4, 2, seed=3))[0].mean).float()
    for name, maps in (("h by block, time, channel", mean), ("h by block", mean.mean((1, 2), True).expand(-1, 2, 16))):
        expected = losses(
            run, model, draws, Coverage(4, 2), lambda time, maps=maps: replaced_maps([model.unit], [maps[:, time]])
        )
        assert step["losses"][name]["loss"] == pytest.approx(float(expected.mean()))


def test_maps_of_stages_are_replaced(tiny_classifier: MakeRun) -> None:
    (run,) = open_runs([tiny_classifier("block-channels")])
    (step,) = ABLATIONS.of_run(run, [4], Coverage(4, 16))["steps"]
    own = step["losses"]["own"]["loss"]
    assert abs(step["losses"]["h by block, channel"]["difference"]) < 1e-5 * own  # a control equals its mean
    assert abs(step["losses"]["h by block"]["difference"]) > 1e-6 * own


def test_lines_are_least_squares() -> None:
    torch.manual_seed(0)
    model = UViT(**SMALL, attention=None).eval()
    random = np.random.default_rng(0)
    inputs = random.normal(random.normal(size=(3, 1, 1, 128)), 2.0, size=(3, 6, 5, 128))  # blocks, B, L, H
    outputs = F.gelu(torch.from_numpy(inputs)).numpy()
    fit = LineFit(model)
    for block, image in np.ndindex(3, 6):  # added image by image
        fit.add(block, *(torch.from_numpy(values[block, image : image + 1]) for values in (inputs, outputs)))
    intercepts, slopes = fit.lines()
    summary = fit.summary()
    left, whole = np.zeros(3), np.zeros(3)
    for block in range(3):
        for unit in range(128):
            x, y = (values[block, :, :, unit].ravel() for values in (inputs, outputs))
            (a, b), residual, _, _ = np.linalg.lstsq(np.stack([np.ones_like(x), x], axis=1), y)
            assert (float(intercepts[block, unit]), float(slopes[block, unit])) == pytest.approx((a, b), rel=1e-5)
            left[block] += residual[0]
            whole[block] += np.square(y - y.mean()).sum()
    assert summary["explained_by_block"] == pytest.approx(list(1 - left / whole))
    assert summary["explained"] == pytest.approx(1 - left.sum() / whole.sum())
    deviations = np.sqrt(inputs.reshape(3, 30, 128).var(axis=1).mean(axis=1))
    assert summary["input_deviation_by_block"] == pytest.approx(list(deviations))


def test_a_unit_that_never_changes_is_a_constant() -> None:
    fit = LineFit(UViT(**SMALL, attention=None))
    for block in range(3):
        x = torch.randn(4, 5, 128)
        x[..., 0] = 1.0
        fit.add(block, x, F.gelu(x))
    intercepts, slopes = fit.lines()
    assert torch.allclose(intercepts[:, 0] + slopes[:, 0], F.gelu(torch.ones(3)))
    assert 0 < fit.summary()["explained"] < 1


@torch.no_grad()
def test_at_activations_sees_and_replaces_gelu() -> None:
    torch.manual_seed(0)
    model = UViT(**SMALL, attention="dia-lstm").eval()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0])
    before = model(x, t).sample
    seen = []
    with at_activations(model, lambda block, given, returned: seen.append((block, given, returned))):
        assert torch.equal(model(x, t).sample, before)
    assert [block for block, _, _ in seen] == [0, 1, 2]
    for _, given, returned in seen:
        assert given.shape == (2, 17, 128) and torch.equal(F.gelu(given), returned)
    a, b = torch.randn(3, 128), torch.randn(3, 128)
    with at_activations(model, lines_instead(a, b)):
        replaced = model(x, t).sample
    assert torch.equal(model(x, t).sample, before)
    for index, block in enumerate(uvit_blocks(model)):  # folds a + b x into one linear map of fc1's input
        one, two = block.mlp.fc1, block.mlp.fc2
        weight = two.weight @ (b[index][:, None] * one.weight)
        bias = two.bias + two.weight @ (a[index] + b[index] * one.bias)
        block.mlp.forward = lambda x, weight=weight, bias=bias: F.linear(x, weight, bias)
    assert torch.allclose(model(x, t).sample, replaced, atol=1e-4)


def with_inputs_scaled(run: TrainedRun, factor: float) -> TrainedRun:
    """The run with the inputs of its GELUs multiplied by `factor`."""
    model = run.model(6)
    for block in uvit_blocks(model):
        block.mlp.fc1.weight.data *= factor
        block.mlp.fc1.bias.data *= factor
        block.mlp.fc2.weight.data *= 30 / factor  # after six training steps the MLPs have no effect on the loss
    model.decoder.weight.data *= 30
    run.model = lambda step, weights: model
    return run


def test_tiny_inputs_are_linear_and_large_ones_are_not(tiny_run: MakeRun) -> None:
    records = {}
    for factor in (1e-3, 30.0):
        (run,) = open_runs([tiny_run("none")])
        run = with_inputs_scaled(run, factor)
        (records[factor],) = LINEARITY.of_run(run, [6], Coverage(8, 3, seed=1))["steps"]
        own = losses(run, run.model(6, "ema"), run.draw(1, 1, 8), Coverage(8, 3))
        assert records[factor]["losses"]["own"]["loss"] == pytest.approx(float(own.mean()))
    tiny, large = records[1e-3], records[30.0]
    assert min(tiny["explained_by_block"]) > 0.99999 and max(large["explained_by_block"]) < 0.95
    lines = "lines for GELU"
    assert abs(tiny["losses"][lines]["difference"]) < 1e-4 * tiny["losses"]["own"]["loss"]
    assert abs(large["losses"][lines]["difference"]) > 1e-3 * large["losses"]["own"]["loss"]
    ratios = np.divide(large["input_deviation_by_block"], tiny["input_deviation_by_block"])
    assert ratios[0] == pytest.approx(30.0 / 1e-3, rel=1e-3)  # first block: both runs have the same features there
