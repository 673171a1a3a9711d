"""Recipes are read, checked and written back, and match the models that they describe."""

import inspect
import re
from pathlib import Path

import pytest
import torch
import yaml

from dia_diffusion import UViT
from dia_diffusion.cli.main import main
from dia_diffusion.errors import InputError
from dia_diffusion.training.config import ClassifyExperiment, Experiment, ModelConfig
from dia_diffusion.training.diffusion import build_model
from dia_diffusion.training.recipe import changed_keys, flatten, override, read_experiment, recipes_folder, resolve


def test_model_keys_are_the_models_arguments() -> None:
    arguments = {name: p.default for name, p in inspect.signature(UViT).parameters.items()}
    assert resolve(Experiment()).to_dict()["model"] == {"backbone": "uvit", **arguments}
    attached = resolve(Experiment(model=ModelConfig(backbone="unet2d"))).to_dict()["model"]
    assert attached.keys() == ModelConfig.model_fields.keys() | {"backbone_kwargs", "attention_at"}


@pytest.mark.parametrize("command", ["train", "classify"])
def test_every_key_is_in_the_help_with_its_docstring(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    kind = Experiment if command == "train" else ClassifyExperiment
    for key in flatten(resolve(kind()).to_dict()):
        option = f"--{key} " if "." in key else f"--{key.replace('_', '-')} "
        assert re.search(option + r"\S+ \S+ \S+", text), key
    assert "Images per optimizer step, over all processes and accumulations together. (default: 128)" in text
    if command == "train":
        assert "heads; must divide hidden_size. (default: 8)" in text and "--model.attention_at" in text


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
        "cifar10_uvit_s2_flow",
        "cifar10_uvit_cpu_flow",
        "digits_uvit_flow",
    ):
        plain = flatten(read_experiment(base).to_dict())
        for suffix, unit in units[:1] if base.endswith(("_class", "_flow")) else units:
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


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("cifar10_uvit_s2", "cifar10_uvit_s2_flow"),
        ("cifar10_uvit_cpu", "cifar10_uvit_cpu_flow"),
        ("digits_uvit_cpu", "digits_uvit_flow"),
    ],
)
def test_recipes_of_the_flow_differ_in_the_noise_alone(base: str, name: str) -> None:
    plain, flow = (flatten(read_experiment(recipe).to_dict()) for recipe in (base, name))
    assert {key for key in plain if plain[key] != flow[key] and not key.startswith("noise.")} == {"output"}
    assert flow["noise.schedule"] == "flow"


def test_s2_recipe_is_uvits_own_setting() -> None:
    recipe = read_experiment("cifar10_uvit_s2")
    with torch.device("meta"):
        assert sum(p.numel() for p in build_model(recipe.model).parameters()) == 44_255_328
    assert (recipe.train.batch_size, recipe.train.max_steps, recipe.optimizer.learning_rate) == (128, 500_000, 2e-4)
    assert recipe.optimizer.betas == [0.99, 0.999] and recipe.optimizer.weight_decay == 0.03
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
    assert experiment.optimizer.betas == [0.5, 0.6] and experiment.optimizer.learning_rate == 1e-3
    assert experiment.model.attention_kwargs == {"reduction": 8} and experiment.trackers == ["tensorboard"]


BAD_RECIPES = {
    "train: {batchsize: 8}": "unknown key `train.batchsize`; did you mean `train.batch_size`?",
    "trian: {}": "unknown key `trian`; did you mean ",
    "1: 2": "unknown key `1`; did you mean ",
    "model: {hiden_size: 8}": "unknown key `model.hiden_size`; did you mean `model.hidden_size`?",
    "train: {max_steps: true}": "`train.max_steps` must be a whole number, got True",
    "train: {max_steps: 8.0}": "`train.max_steps` must be a whole number, got 8.0",
    "train: {max_steps: '8'}": "`train.max_steps` must be a whole number, got '8'",
    "train: 8": "`train` must be a mapping, got 8",
    "seed: 9223372036854775808": "`seed` must be below 9223372036854775808, got 9223372036854775808",
    "train: {mixed_precision: bf8}": "`train.mixed_precision` must be one of auto, none, bf16, fp16, got 'bf8'",
    "train: {compile: 1}": "`train.compile` must be one of auto, cuda-graphs or true or false, got 1",
    "train: {batch_size: 0}": "`train.batch_size` must be 1 or more, got 0",
    "train: {batch_size: null}": "`train.batch_size` must be a whole number, got null",
    "ema: {decay: 1.5}": "`ema.decay` must be below 1, got 1.5",
    "ema: {decay: .nan}": "`ema.decay` must be a finite number, got nan",
    "optimizer: {learning_rate: .inf}": "`optimizer.learning_rate` must be a finite number, got inf",
    "optimizer: {betas: [0.9, 1]}": "each of `optimizer.betas` must be below 1, got 1",
    "optimizer: {betas: [0.9]}": "`optimizer.betas` must be a list of 2 or more, got [0.9]",
    "trackers: tensorboard": "`trackers` must be a list, got 'tensorboard'",
    "noise: {schedule: linear}": "'linear'",
    "model: {backbone: vit}": "`model.backbone` must be one of uvit, unet2d, dit",
    "model: {attention_at: [x]}": "`model.attention_at` must be left out for backbone uvit, got ['x']",
    "model: {backbone: dit, hidden_size: 8}": "`model.hidden_size` must be left out for backbone dit, got 8",
    "model: {hidden_size: 8.5}": "`model.hidden_size` must be a whole number, got 8.5",
    "model: {attention_blocks: [a]}": "each of `model.attention_blocks` must be a whole number, got 'a'",
    "data: {label_dropout: 0.1}": "`data.label_dropout` must be 0 without `model.num_classes`, got 0.1",
    "samples: {guidance_scale: 2}": "must be 1 without `model.num_classes` and `data.label_dropout`, got 2.0",
    "samples: {guidance_scale: 0.5}": "`samples.guidance_scale` must be 1 or more, got 0.5",
    "init_from: ''": "`init_from` must be text of 1 or more characters, got ''",
    "data: {source: 's3://me:hunter2@x'}": "`data.source` must be a path or a name, got 's3://***@x'",
    "optimizer: {unit_learning_rate: 0}": "`optimizer.unit_learning_rate` must be above 0, got 0",
    "model: {attention: none}\noptimizer: {unit_learning_rate: 1e-3}": "null with `model.attention` none, got 0.001",
    "optimizer: {name: sgd}": "`optimizer.name` must be one of adamw, muon, got 'sgd'",
    "optimizer: {muon_learning_rate: 1e-3}": "must be null without `optimizer.name` muon, got 0.001",
    "optimizer: {decay_fraction: 0}": "`optimizer.decay_fraction` must be above 0, got 0",
    "optimizer: {schedule: warmup-stable-decay}\ntrain: {max_steps: 3000}": (
        "`optimizer.warmup_steps` must be at most 2,400, where `optimizer.decay_fraction` begins, got 2,500"
    ),
    "ema: {power_widths: [0.1], snapshot_every: 60}\ntrain: {max_steps: 50}": "at most `train.max_steps` 50, got 60",
    "train: {reference_batch_size: 0}": "`train.reference_batch_size` must be 1 or more, got 0",
    "optimizer: {beta1_in_images: true}": "must be false without `train.reference_batch_size`, got true",
    "- a list": "must be a recipe with keys such as data, model, train, got list",
    "a: [": "not a YAML recipe",
    "seed: !!python/object/apply:os.system [true]": "not a YAML recipe",
}
BAD_OPTIONS = {
    "--train.max_step 3": "unknown key `train.max_step`; did you mean `train.max_steps`?",
    "--train.max_steps many": "`train.max_steps` must be a whole number, got 'many'",
    "--train.max_steps": "`--train.max_steps` needs a value",
    "--train.max_steps [3": "`train.max_steps` must be YAML, got '[3' ",
    "train.max_steps 3": "options must be of the form --KEY VALUE, got 'train.max_steps'",
}


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        *((text, "", message) for text, message in BAD_RECIPES.items()),
        *(("{}", overrides, message) for overrides, message in BAD_OPTIONS.items()),
        ("train: 8", "--train.max_steps 3", "`train` must be a mapping where `train.max_steps` is given, got 8"),
    ],
)
def test_bad_recipes_are_one_line(text: str, overrides: str, message: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(InputError) as error:
        read_experiment(str(recipe), overrides.split())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_error_for_an_unknown_recipe_lists_the_existing_ones() -> None:
    with pytest.raises(InputError, match="cifar10_uvit_s2_dia"):
        read_experiment("cifar10_uvit_s3")


def test_text_stays_text_on_the_command_line() -> None:
    overrides = ["--output", "007", "--data.source", "a: b # c", "--model.attention", "null", "--init-from", "1e-3"]
    experiment = read_experiment("digits_uvit_cpu", [*overrides, "--model.attention_kwargs", "null"])
    assert (experiment.output, experiment.data.source, experiment.init_from) == ("007", "a: b # c", "1e-3")
    assert experiment.model.attention == "none" and experiment.model.attention_kwargs is None


def test_numbers_without_a_point_are_floats(tmp_path: Path) -> None:
    """YAML 1.1 reads them as text."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {attention: fixed-scale, attention_kwargs: {scale: 2e0}, mlp_ratio: 3e+0}\n")
    experiment = read_experiment(str(recipe), ["--optimizer.learning_rate", "1e-4"], {"ema.decay": 0})
    assert experiment.model.attention_kwargs == {"scale": 2.0} and experiment.to_dict()["model"]["mlp_ratio"] == 3.0
    assert experiment.optimizer.learning_rate == 1e-4 and type(experiment.ema.decay) is float


def test_override_checks_what_it_changes() -> None:
    recipe = read_experiment("digits_uvit_cpu_dia")
    changed = override(recipe, {"train.max_steps": 7, "model.attention": "se"})
    assert (changed.train.max_steps, changed.model.attention, recipe.train.max_steps) == (7, "se", 6000)
    with pytest.raises(InputError, match=r"`train\.max_steps` must be 1 or more, got 0"):
        override(recipe, {"train.max_steps": 0})


def test_arguments_of_the_unit_are_one_value() -> None:
    """However they are written, they replace the recipe's; a single one can be changed by its own key."""
    recipe = override(read_experiment("digits_uvit_cpu_dia"), {"model.attention_kwargs": {"reduction": 8}})
    for keys in ({"model.attention_kwargs": {"scale": 2.0}}, {"model": {"attention_kwargs": {"scale": 2.0}}}):
        assert override(recipe, flatten(keys)).model.attention_kwargs == {"scale": 2.0}
    changed = override(recipe, {"model.attention_kwargs.scale": 2.0})
    assert changed.model.attention_kwargs == {"reduction": 8, "scale": 2.0}


OLDER = {
    "digits_uvit_cpu": {"backbone_kwargs": None, "attention_at": None},
    "digits_unet_cpu": {"patch_size": 2, "hidden_size": 512, "pool_tokens": "all", "attention_blocks": None},
}


@pytest.mark.parametrize("name", OLDER)
def test_an_older_recipe_with_keys_of_all_backbones_is_the_same(name: str, tmp_path: Path) -> None:
    recipe = read_experiment(name)
    older = recipe.to_dict()
    older["model"].update(OLDER[name])
    del older["ssia"]  # older versions had neither this nor the keys below
    for key in ("unit_learning_rate", "name", "muon_learning_rate", "muon_momentum", "decay_fraction"):
        del older["optimizer"][key]
    written = tmp_path / "config.yaml"
    written.write_text(yaml.safe_dump(older))
    assert read_experiment(str(written)) == recipe and changed_keys(older, recipe) == []
    assert changed_keys(older, override(recipe, {"ssia.weight": 0.5})) == ["ssia.weight: 0.0 -> 0.5"]


def test_what_may_change_on_resuming() -> None:
    recipe = read_experiment("digits_uvit_cpu_dia")
    old = recipe.to_dict()
    assert flatten(old).keys() >= Experiment.MAY_CHANGE
    assert changed_keys(old, override(recipe, {"optimizer.weight_decay": 0.5, "train.log_every": 3})) == [
        "optimizer.weight_decay: 0.03 -> 0.5"
    ]
    longer = override(recipe, {"train.max_steps": 7000})
    assert recipe.optimizer.schedule == "cosine" and changed_keys(old, longer) == ["train.max_steps: 6000 -> 7000"]
    decaying = override(recipe, {"optimizer.schedule": "warmup-stable-decay"})
    assert changed_keys(decaying.to_dict(), override(decaying, {"train.max_steps": 7000})) != []
    constant = override(recipe, {"optimizer.schedule": "constant"})
    assert changed_keys(constant.to_dict(), override(constant, {"train.max_steps": 7000})) == []
    assert changed_keys(old, override(recipe, {"train.mixed_precision": "bf16"})) == [
        "train.mixed_precision: auto -> bf16"
    ]
    grids = override(recipe, {"train.sample_every": 7, "samples.count": 4, "samples.steps": 9})
    assert changed_keys(old, grids) == []
    begun_in = override(recipe, {"train.mixed_precision": "bf16"}).to_dict()
    assert changed_keys(begun_in, recipe) == []  # auto continues in the run's precision
