"""Recipes: read from YAML and the command line, changed, migrated from older versions, and compared on resuming."""

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError, create_model
from typing_extensions import TypeVar

from dia_diffusion.errors import InputError
from dia_diffusion.io import shipped_folder
from dia_diffusion.reading import Unreadable, parse_yaml, read_yaml
from dia_diffusion.training.config import Experiment, ModelConfig, Recipe
from dia_diffusion.validation import Float, describe_error, model_in, shown, validate

AUTO = "auto"
"""The precision is chosen for the device of each new run; on resuming, "auto" matches any precision."""

R = TypeVar("R", bound=Recipe, default=Experiment)


def recipes_folder(kind: type[Recipe] = Experiment) -> Path:
    """The folder of a command's shipped recipes."""
    folder = shipped_folder("recipes")
    return folder if kind is Experiment else folder / kind.COMMAND


def recipe_names(kind: type[Recipe] = Experiment) -> str:
    """The names of the shipped recipes, for messages."""
    return ", ".join(sorted(path.stem for path in recipes_folder(kind).glob("*.yaml")))


def recipe_path(name: str, kind: type[Recipe] = Experiment) -> Path:
    """A recipe's file, given its path or the name of a shipped one."""
    if Path(name).is_file():
        return Path(name)
    shipped = recipes_folder(kind) / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    raise InputError(f"recipe must be a YAML file or one of {recipe_names(kind)}, got {name!r}")


def read_experiment(
    config: str | None,
    overrides: Sequence[str] = (),
    keys: Mapping[str, Any] | None = None,
    *,
    kind: type[R] = Experiment,  # type: ignore[assignment]
) -> R:
    """A recipe with overrides, fully checked.

    Args:
        config: a YAML file, or the name of a shipped recipe.
        overrides: in command-line form ("--train.batch_size", "32", ...).
        keys: overrides as values ({"train.batch_size": 32}).
        kind: Experiment, or ClassifyExperiment.

    Raises:
        InputError: no such recipe, not YAML, an unknown key (the message names the nearest valid one), or an invalid
            value.
    """
    return resolve(parse_recipe(config, overrides, keys, kind=kind))


def parse_recipe(
    config: str | None,
    overrides: Sequence[str] = (),
    keys: Mapping[str, Any] | None = None,
    *,
    kind: type[R],
) -> R:
    """The same without importing torch: what depends on registered classes isn't checked yet; see `resolve`."""
    recipe = {} if config is None else read_yaml(recipe_path(config, kind), "recipe", "data, model, train")
    return validate(kind, nest({**(keys or {}), **_parse_overrides(overrides, kind)}, recipe))


def override(recipe: R, keys: Mapping[str, Any]) -> R:
    """A copy of a recipe with other values, such as {"train.max_steps": 5}. Raises InputError for invalid ones."""
    return resolve(validate(type(recipe), nest(keys, recipe.model_dump())))


def resolve(recipe: R) -> R:
    """Checks what depends on registered classes, which requires torch: the names in `noise:`, and `model:`.

    The keys of `model:` are the arguments of the class that `model.backbone` names; its defaults are filled in.

    Raises:
        InputError: an unknown name or key, or a value of a type that doesn't match the signature.
    """
    if not isinstance(recipe, Experiment):
        return recipe
    from dia_diffusion.models.factory import recipe_arguments

    recipe.noise_process()
    backbone = recipe.model.backbone
    section = migrate({"model": recipe.model.model_dump()}, backbone)["model"]
    own, others = recipe_arguments(backbone), _arguments_of_others(backbone)
    for key in section.keys() - own.keys() - {"sample_size", "in_channels"}:  # these are for reading images
        if key in others:
            raise InputError(f"`model.{key}` must be left out for backbone {backbone}, got {shown(section[key])}")
    if "attention" not in own:
        section["attention"] = "none"
    kind = _section_kind(backbone)
    try:
        values = kind.model_validate(section).model_dump()
    except ValidationError as error:
        raise InputError(describe_error(error, kind, lambda key: ".".join(("model", *key)))) from None
    return recipe.model_copy(update={"model": ModelConfig(**values)})


def migrate(recipe: Mapping[str, Any], backbone: str) -> dict[str, Any]:
    """Converts a recipe of any version, from a config.yaml or a checkpoint, to this version's keys.

    Older recipes have the keys of all backbones in `model:`; those of other backbones are removed if they have their
    defaults. Keys that an older version didn't have get their defaults, which is how that version trained.
    """
    from dia_diffusion.models.factory import recipe_arguments

    own, others = recipe_arguments(backbone), _arguments_of_others(backbone)
    model = {
        key: value
        for key, value in recipe["model"].items()
        if key in own or key not in others or value not in others[key]
    }
    return {**recipe, "model": model}


def _arguments_of_others(backbone: str) -> dict[str, list[Any]]:
    """The keys of the other backbones, each with its default values."""
    from dia_diffusion.models.factory import BACKBONES, recipe_arguments

    defaults: dict[str, list[Any]] = {}
    for name in BACKBONES.keys() - {backbone}:
        for key, parameter in recipe_arguments(name).items():
            defaults.setdefault(key, []).append(parameter.default)
    return defaults


class _ClosedModelConfig(ModelConfig, extra="forbid"):
    """A `model:` section without unknown keys."""


@cache
def _section_kind(backbone: str) -> type[ModelConfig]:
    """The typed keys of `model:` for a backbone, from its class's signature."""
    from dia_diffusion.models.factory import recipe_arguments

    fields: dict[str, Any] = {}
    for name, parameter in recipe_arguments(backbone).items():
        if name not in ModelConfig.model_fields:
            types: dict[Any, Any] = {float: Float, float | None: Float | None, parameter.empty: Any}
            annotation = types.get(parameter.annotation, parameter.annotation)
            fields[name] = (annotation, ... if parameter.default is parameter.empty else parameter.default)
    return create_model("ModelSection", __base__=_ClosedModelConfig, **fields)


def command_of(recipe: Mapping[str, Any]) -> str:
    """The command for a recipe of any version: only recipes of `train` have a noise process."""
    return "train" if "noise" in recipe else "classify"


def changed_keys(old: Mapping[str, Any], recipe: R, may_change: frozenset[str] | None = None) -> list[str]:
    """Keys that differ from a run's recipe but must not, such as "train.batch_size: 32 -> 64".

    Args:
        old: the run's recipe, from to_dict of this version or an older one.
        may_change: keys that may differ; None is those that may change when a run resumes.

    A new precision of "auto" never counts as a change.
    """
    if may_change is None:
        may_change = recipe.MAY_CHANGE
        if flatten(old).get("optimizer.schedule") in ("cosine", "linear", "warmup-stable-decay"):
            may_change -= {"train.max_steps"}  # each step's rate depends on it
    recipe = resolve(recipe)
    defaults = type(recipe)().to_dict()
    if isinstance(recipe, Experiment):
        old = migrate(old, recipe.model.backbone)
        defaults["model"] = _section_kind(recipe.model.backbone).model_construct().model_dump()
    before, after = flatten(defaults) | flatten(old), flatten(recipe.to_dict())
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if key not in may_change
        and before.get(key) != after.get(key)
        and not (key == "train.mixed_precision" and after.get(key) == AUTO)
    ]


def flatten(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"max_steps": 5}} -> {"train.max_steps": 5}, with a key per line of a recipe."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        if not isinstance(key, str):
            raise InputError(f"recipe key {prefix}{key!r} must be text")
        # A section; deeper dicts are values such as attention_kwargs.
        if isinstance(value, dict) and not prefix and "." not in key:
            flat.update(flatten(value, prefix=f"{key}."))
        else:
            flat[prefix + key] = value
    return flat


def nest(flat: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The inverse of `flatten`, merged into a recipe if one is given."""
    nested = copy.deepcopy(dict(recipe or {}))
    for key, value in flat.items():
        section = nested
        *path, name = key.split(".")
        for depth, part in enumerate(path, start=1):
            if section.get(part) is None:
                section[part] = {}
            section = section[part]
            if not isinstance(section, dict):
                parent = ".".join(path[:depth])
                raise InputError(f"`{parent}` must be a mapping where `{key}` is given, got {shown(section)}")
        section[name] = value
    return nested


def _parse_overrides(arguments: Sequence[str], kind: type[Recipe]) -> dict[str, Any]:
    """The keys of --KEY VALUE and --KEY=VALUE; values are parsed as YAML, except for text keys."""
    keys: dict[str, Any] = {}
    remaining = iter(arguments)
    for argument in remaining:
        option, has_value, text = argument.partition("=")
        if not option.startswith("--"):
            raise InputError(f"options must be of the form --KEY VALUE, got {argument!r}")
        key = option[2:] if "." in option else option[2:].replace("-", "_")
        if not has_value:
            following = next(remaining, None)
            if following is None or following.startswith("--"):
                raise InputError(f"`{option}` needs a value")
            text = following
        keys[key] = _parse_value(text, key, kind)
    return keys


def _parse_value(text: str, key: str, kind: type[Recipe]) -> Any:
    annotation: Any = kind
    for part in key.split("."):
        model = model_in(annotation)
        field = None if model is None else model.model_fields.get(part)
        annotation = None if field is None else field.annotation
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    types = {get_args(part)[0] if get_origin(part) is Annotated else part for part in parts}
    if str in types and types <= {str, NoneType}:
        return None if text == "null" and NoneType in types else text
    try:
        return parse_yaml(text)
    except Unreadable as error:
        raise InputError(f"`{key}` must be YAML, got {text!r} ({' '.join(str(error).split())})") from None
