"""Recipes: read, checked, written back; and in step with the model they describe."""

import inspect
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from dia_diffusion import UViT
from dia_diffusion.errors import InputError
from dia_diffusion.training.config import MAY_CHANGE, OF_OTHERS, OF_UVIT, Experiment, ModelConfig, changed_keys
from dia_diffusion.training.diffusion import build_model
from dia_diffusion.training.recipe import read_experiment, recipes_folder
from dia_diffusion.training.recipe_keys import flatten


def test_model_keys_are_the_models_arguments() -> None:
    arguments = {name: p.default for name, p in inspect.signature(UViT.__init__).parameters.items() if name != "self"}
    own = {f.name: f.default for f in fields(ModelConfig) if f.name not in ("backbone", *OF_OTHERS)}
    assert own == arguments
    assert set(OF_UVIT) < arguments.keys() and not set(OF_OTHERS) & arguments.keys()


def test_every_key_has_a_docstring_in_the_help() -> None:
    from dia_diffusion.training.recipe import recipe_parser

    text = " ".join(recipe_parser().format_help().split())
    for key in ("--train.keep_last", "--optimizer.betas", "--ema.warmup", "--noise.loss_weighting"):
        assert key in text
    assert "Images an optimizer step, over all processes and accumulations together" in text


@pytest.mark.parametrize("path", sorted(recipes_folder().glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_round_trip(path: Path, tmp_path: Path) -> None:
    experiment = read_experiment(path.stem)
    written = tmp_path / "config.yaml"
    written.write_text(yaml.safe_dump(experiment.to_dict()))
    assert read_experiment(str(written)) == experiment


def test_recipes_of_units_differ_in_the_unit_alone() -> None:
    units = (("_dia", "dia-lstm"), ("_dia_light", "dia-lstm-light"), ("_dia_identity", "dia-lstm-identity"))
    for base in (
        "cifar10_uvit_s2",
        "cifar10_uvit_cpu",
        "digits_uvit_cpu",
        "cifar10_uvit_s2_class",
        "cifar10_uvit_cpu_class",
    ):
        plain = flatten(read_experiment(base).to_dict())
        for suffix, unit in units[:1] if base.endswith("_class") else units:
            twin = flatten(read_experiment(base + suffix).to_dict())
            assert {key for key in plain if plain[key] != twin[key]} == {"output", "model.attention"}
            assert plain["model.attention"] == "none" and twin["model.attention"] == unit


@pytest.mark.parametrize("base", ["cifar10_uvit_s2", "cifar10_uvit_cpu"])
def test_recipes_by_class_differ_in_the_classes_alone(base: str) -> None:
    plain, by_class = (flatten(read_experiment(name).to_dict()) for name in (base, f"{base}_class"))
    changed = {key: by_class[key] for key in plain if plain[key] != by_class[key]}
    expected = {"output", "model.num_classes", "data.label_dropout", "samples.count", "samples.guidance_scale"}
    assert changed.keys() == expected
    assert changed["samples.count"] % changed["model.num_classes"] == 0


def test_s2_recipe_is_uvits_own_setting() -> None:
    recipe = read_experiment("cifar10_uvit_s2")
    assert sum(p.numel() for p in build_model(recipe.model).parameters()) == 44_255_328
    assert (recipe.train.batch_size, recipe.train.max_steps, recipe.optimizer.learning_rate) == (128, 500_000, 2e-4)
    assert recipe.optimizer.betas == (0.99, 0.999) and recipe.optimizer.weight_decay == 0.03
    assert recipe.optimizer.warmup_steps == 2500 and recipe.ema.decay == 0.9999 and not recipe.ema.warmup
    assert recipe.data.random_flip and recipe.noise.schedule == "vp-continuous"


def test_overrides_reach_every_type(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train: {batch_size: 8}\noptimizer: {learning_rate: 1e-3}\n")
    overrides = (
        "--train.clip_grad_norm 1.5 --model.num_classes=10 --train.compile false --data.random_flip=true "
        "--optimizer.betas [0.5,0.6] --model.attention_kwargs.reduction 8 --trackers [tensorboard]"
    )
    experiment = read_experiment(str(recipe), overrides.split())
    assert experiment.train.batch_size == 8 and experiment.train.clip_grad_norm == 1.5
    assert experiment.model.num_classes == 10 and experiment.train.compile is False and experiment.data.random_flip
    assert tuple(experiment.optimizer.betas) == (0.5, 0.6) and experiment.optimizer.learning_rate == 1e-3
    assert experiment.model.attention_kwargs == {"reduction": 8} and experiment.trackers == ["tensorboard"]


@pytest.mark.parametrize(
    ("text", "overrides", "named"),
    [
        ("train: {batchsize: 8}", [], "'train.batchsize'.*did you mean 'train.batch_size'"),
        ("trian: {}", [], "'trian'"),
        ("", ["--train.max_step", "3"], "did you mean 'train.max_steps'"),
        ("", ["--train.max_steps", "many"], "train.max_steps.*many"),
        ("train: {mixed_precision: bf8}", [], "bf8"),
        ("train: {batch_size: 0}", [], "train.batch_size is 0"),
        ("ema: {decay: 1.5}", [], "ema.decay is 1.5"),
        ("data: {label_dropout: 0.1}", [], "class-conditional"),
        ("samples: {guidance_scale: 2}", [], "needs a null label that is trained"),
        ("model: {num_classes: 10}\nsamples: {guidance_scale: 2}", [], "set model.num_classes and data.label_dropout"),
        ("samples: {guidance_scale: .nan}", [], "guidance_scale is nan"),
        ("samples: {guidance_scale: 0.5}", [], "guidance_scale is 0.5; accepted: 1, which is none, or more"),
        ("init_from: ''", [], "init_from is empty; accepted"),
        ("optimizer: {unit_learning_rate: 0}", [], "optimizer.unit_learning_rate is 0.0; accepted: above 0, or null"),
        ("model: {attention: none}\noptimizer: {unit_learning_rate: 1e-3}", [], "0.001 and model.attention none"),
        ("train: {reference_batch_size: 0}", [], "`train.reference_batch_size` must be from 1 to 1,000,000, .*, got 0"),
        ("optimizer: {beta1_in_images: true}", [], "must be false without `train.reference_batch_size`, got true"),
        ("- a list", [], "not a recipe"),
        ("a: [", [], "not a YAML recipe"),
        ("seed: !!python/object/apply:os.system [true]", [], "not a YAML recipe"),
    ],
)
def test_bad_recipes_are_one_line(text: str, overrides: list[str], named: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text or "{}")
    with pytest.raises(InputError, match=named) as error:
        read_experiment(str(recipe), overrides)
    assert "\n" not in str(error.value)


def test_unknown_recipe_is_told_which_exist() -> None:
    with pytest.raises(InputError, match="cifar10_uvit_s2_dia"):
        read_experiment("cifar10_uvit_s3")


def test_what_may_change_on_resuming() -> None:
    assert flatten(Experiment().to_dict()).keys() >= MAY_CHANGE
    old, new = Experiment().to_dict(), Experiment().to_dict()
    new["train"]["max_steps"] += 1
    assert changed_keys(old, new) == []
    del old["optimizer"]["unit_learning_rate"]  # as written by a version that didn't know it
    assert changed_keys(old, new) == []
    new["optimizer"]["unit_learning_rate"] = 0.1
    assert changed_keys(old, new) == ["optimizer.unit_learning_rate: None -> 0.1"]
    new["optimizer"]["unit_learning_rate"] = None
    new["optimizer"]["weight_decay"] = 0.5
    assert changed_keys(old, new) == ["optimizer.weight_decay: 0.03 -> 0.5"]
