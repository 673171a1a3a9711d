"""Save and load, attach and detach, and write and read restore the original exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dia_diffusion import UViT, attach
from dia_diffusion.attention import UNITS
from dia_diffusion.evaluation.frechet import FeatureStatistics
from dia_diffusion.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from dia_diffusion.training.config import ClassifyExperiment, Experiment
from dia_diffusion.training.recipe import changed_keys, read_experiment
from dia_diffusion.training.run_folder import RunFolder
from tests.attention.networks import Network, is_branch, tiny_dit, tiny_unet

COUNTS = st.integers(1, 10**9)
RATES = st.floats(1e-12, 1e3, allow_subnormal=False)
SHARES = st.floats(0, 1, exclude_max=True, allow_subnormal=False)


@given(
    heads=st.sampled_from([1, 2]), layers=st.sampled_from([1, 3, 5]), classes=st.none() | st.integers(1, 5),
    unit=st.sampled_from([None, *UNITS]), seed=st.integers(0, 99), long_skips=st.booleans(), final_conv=st.booleans(),
)  # fmt: skip
def test_a_model_that_is_saved_is_loaded_as_it_was(
    tmp_path_factory, heads: int, layers: int, classes: int | None, unit: str | None, seed: int, **options: bool
) -> None:
    torch.manual_seed(seed)
    sizes = {"sample_size": 8, "in_channels": 1, "patch_size": 4, "hidden_size": 16, "num_attention_heads": heads}
    model = UViT(**sizes, num_layers=layers, num_classes=classes, attention=unit, **options).eval()
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    loaded = UViT.from_pretrained(folder)
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    kept = {key for key in model.config if not key.startswith("_")}
    assert {key: model.config[key] for key in kept} == {key: loaded.config[key] for key in kept}
    inputs = [torch.randn(2, 1, 8, 8), torch.tensor([3.0, 500.0])]
    labels = {} if classes is None else {"class_labels": torch.tensor([0, classes])}
    with torch.no_grad():
        assert torch.equal(model(*inputs, **labels).sample, loaded(*inputs, **labels).sample)


FEW = {"reduction": 4}  # the networks below are 8 channels wide
UNITS_TO_ATTACH: list[tuple[str, dict[str, Any]]] = [
    ("dia-lstm", FEW), ("dia-lstm-light", FEW), ("lstm", {}), ("se", FEW), ("se", {**FEW, "sharing": "individual"}),
    ("cbam", FEW), ("eca", {}), ("srm", {"sharing": "individual"}), ("block-channels", {}), ("fixed-scale", {}),
]  # fmt: skip


@pytest.mark.parametrize("build", [Network, tiny_unet, tiny_dit])
@settings(max_examples=12)
@given(unit=st.sampled_from(UNITS_TO_ATTACH), seed=st.integers(0, 99))
def test_what_is_attached_and_taken_off_leaves_the_model_as_it_was(
    build, unit: tuple[str, dict[str, Any]], seed: int
) -> None:
    torch.manual_seed(seed)
    model: nn.Module = build().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    inputs: list[Any] = (
        [torch.randn(2, 8, 4, 4)] if build is Network else [torch.randn(2, 1, 8, 8), torch.tensor([3, 5])]
    )
    labels = {"class_labels": torch.tensor([0, 2])} if build is tiny_dit else {}

    def output() -> torch.Tensor:
        with torch.no_grad():
            found = model(*inputs, **labels)
        return found if isinstance(found, torch.Tensor) else found.sample

    plain = output()
    attached = attach(model, unit[0], is_branch if build is Network else None, **unit[1])
    output()
    attached.detach()
    assert torch.equal(output(), plain)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks


DIFFUSION = st.fixed_dictionaries(
    {},
    optional={
        "seed": COUNTS,
        "train.batch_size": COUNTS,
        "train.max_steps": COUNTS,
        "train.clip_grad_norm": st.none() | RATES,
        "train.compile": st.sampled_from(["auto", "cuda-graphs", True, False]),
        "optimizer.learning_rate": RATES,
        "optimizer.betas": st.tuples(SHARES, SHARES).map(list),
        "optimizer.weight_decay": RATES,
        "ema.decay": SHARES,
        "ema.warmup": st.booleans(),
        "noise.schedule": st.sampled_from(["vp-continuous", "ddpm-linear", "cosine"]),
        "model.attention": st.sampled_from(["none", *UNITS]),
        "model.attention_blocks": st.none() | st.lists(st.integers(0, 12), min_size=1, unique=True).map(sorted),
        "data.source": st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1),
    },
)
CLASSIFICATION = st.fixed_dictionaries(
    {"optimizer.schedule": st.just("steps")},
    optional={
        "seed": COUNTS,
        "train.batch_size": COUNTS,
        "train.label_smoothing": SHARES,
        "optimizer.learning_rate": RATES,
        "optimizer.milestones": st.lists(COUNTS, max_size=3).map(sorted),
        "optimizer.gamma": RATES,
        "data.cutout": st.integers(0, 16),
        "model.attention": st.sampled_from(["none", *UNITS]),
    },
)


@pytest.mark.parametrize(
    ("recipe", "kind", "keys"),
    [("digits_uvit_cpu", Experiment, DIFFUSION), ("cifar10_resnet20_cpu", ClassifyExperiment, CLASSIFICATION)],
)
@pytest.mark.parametrize("examples", [12, pytest.param(40, marks=pytest.mark.long)])
def test_a_recipe_is_its_own_config_yaml(
    recipe: str, kind: type, keys: st.SearchStrategy, examples: int, tmp_path: Path
) -> None:
    @settings(max_examples=examples)
    @given(keys)
    def holds(chosen: dict[str, Any]) -> None:
        experiment = read_experiment(recipe, keys={**chosen, "output": str(tmp_path)}, kind=kind)
        folder = RunFolder(tmp_path)
        folder.write_config(experiment)
        again = read_experiment(str(folder.config), kind=kind)
        assert again == experiment and again.to_dict() == experiment.to_dict()
        assert changed_keys(yaml.safe_load(folder.config.read_text(encoding="utf-8")), again) == []

    holds()


SHAPES = st.lists(st.integers(0, 4), max_size=3)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64])


@given(
    shapes=st.dictionaries(st.text("abc._", min_size=1), st.tuples(SHAPES, DTYPES), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_a_checkpoint_is_read_as_it_was_written(tmp_path_factory, shapes: dict, seed: int) -> None:
    torch.manual_seed(seed)
    tensors = {name: (torch.randn(shape) * 1e6).to(dtype) for name, (shape, dtype) in shapes.items()}
    kinds = dict.fromkeys(("model", "ema", "optimizer"), tensors)
    state = {"recipe": {"seed": seed}, "data": {"fingerprint": "ab"}}
    read = load_checkpoint(save_checkpoint(tmp_path_factory.mktemp("run"), seed, Checkpoint(kinds, state), 1))
    for kind in kinds:
        assert read.tensors[kind].keys() == tensors.keys()
        for name, tensor in tensors.items():
            found = read.tensors[kind][name]
            assert found.dtype == tensor.dtype and torch.equal(found, tensor)
    assert state.items() <= read.state.items() and read.state["step"] == seed


@given(seed=st.integers(0, 99), count=st.integers(2, 50), width=st.integers(1, 9))
def test_statistics_are_loaded_as_they_were(tmp_path_factory, seed: int, count: int, width: int) -> None:
    statistics = FeatureStatistics(width)
    statistics.update(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)))
    file = tmp_path_factory.mktemp("statistics") / "file.safetensors"
    statistics.save(file, {"of": "é", "seed": seed})
    loaded, provenance = FeatureStatistics.load(file)
    assert provenance == {"of": "é", "seed": seed} and loaded.count == count
    assert torch.equal(loaded.sum, statistics.sum) and torch.equal(loaded.outer, statistics.outer)
