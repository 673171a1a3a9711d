"""Recipes: YAML files and command-line overrides, checked and turned into an Experiment by jsonargparse."""

import difflib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, overload

import jsonargparse

from dia_diffusion.errors import InputError
from dia_diffusion.reading import read_yaml
from dia_diffusion.reading.typed import check_types
from dia_diffusion.training.classify_config import ClassifyExperiment
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.recipe_keys import flatten, nest

# Help texts come from the docstring under each field.
jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


E = TypeVar("E", Experiment, ClassifyExperiment)


def recipes_folder(kind: type = Experiment) -> Path:
    """The shipped recipes: in an installed package beside the code, in a checkout in train/configs."""
    packaged = Path(str(files("dia_diffusion"))) / "recipes"
    folder = packaged if packaged.is_dir() else packaged.parents[1] / "train" / "configs"
    return folder if kind is Experiment else folder / "classify"


def recipe_path(name: str, kind: type = Experiment) -> Path:
    """A recipe's file, by path or by the name of a shipped one."""
    if Path(name).is_file():
        return Path(name)
    shipped = recipes_folder(kind) / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    names = sorted(path.stem for path in recipes_folder(kind).glob("*.yaml"))
    raise InputError(f"no recipe {name!r}; accepted: a YAML file or one of {', '.join(names)}")


def recipe_parser(kind: type = Experiment) -> jsonargparse.ArgumentParser:
    """A parser with one option a recipe key, such as --train.batch_size."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, nested_key=None)
    return parser


@overload
def read_experiment(
    config: str | None, overrides: Sequence[str] = (), keys: Mapping[str, Any] | None = None
) -> Experiment: ...
@overload
def read_experiment(
    config: str | None, overrides: Sequence[str] = (), keys: Mapping[str, Any] | None = None, *, kind: type[E]
) -> E: ...
def read_experiment(
    config: str | None,
    overrides: Sequence[str] = (),
    keys: Mapping[str, Any] | None = None,
    *,
    kind: type = Experiment,
) -> Any:
    """An Experiment from a recipe and what overrides it.

    overrides: in command-line form ("--train.batch_size", "32", ...).
    keys: the same as values ({"train.batch_size": 32}).
    kind: Experiment, or ClassifyExperiment.

    Raises:
        InputError: no such recipe, not YAML, an unknown key (the nearest valid one is named), a value of wrong type.
    """
    parser = recipe_parser(kind)
    recipe = {} if config is None else read_yaml(recipe_path(config, kind), "recipe", "data, model, train")
    known = flatten(kind().to_dict())
    sections = {key.partition(".")[0] for key in known}
    _check_keys([*flatten(recipe), *(key for key in recipe if key not in sections)], known, str(config))
    if keys:
        _check_keys([*keys], known, f"what changes {config}")
        recipe = nest({**flatten(recipe), **keys})
    _check_keys([o[2:].split("=")[0] for o in overrides if o.startswith("--")], known, "the command line")
    try:
        with_recipe = parser.parse_object(recipe, defaults=True)
        parsed = parser.parse_args(list(overrides), namespace=with_recipe)
        values = parser.instantiate(parsed)
        experiment: Any = object.__new__(kind)  # its checks come last, and take the types as they are told
        vars(experiment).update(vars(values))
        check_types(experiment)
        return kind(**vars(values))
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(" ".join(str(error).split())) from None


def _check_keys(keys: Sequence[str], known: dict[str, Any], where: str) -> None:
    for key in keys:
        # These are open: the unit and the network check what they are given.
        if key not in known and not key.startswith(("model.attention_kwargs", "model.backbone_kwargs")):
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise InputError(f"unknown key {key!r} in {where}; did you mean {nearest!r}?")
