"""Recipes as flat keys, train.batch_size and the like: how they are overridden, and how two of them differ."""

from collections.abc import Mapping
from typing import Any

from dia_diffusion.errors import InputError

PRECISION = "train.mixed_precision"
AUTO = "auto"
"""A precision that each new run chooses for its device; it agrees with the one that a run began in."""


def flatten(recipe: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"max_steps": 5}} -> {"train.max_steps": 5}, a key a line of a recipe."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        if not isinstance(key, str):
            raise InputError(f"recipe key {prefix}{key!r} is not a name")
        if isinstance(value, dict) and not prefix:  # a section; deeper, it is a value such as attention_kwargs
            flat.update(flatten(value, prefix=f"{key}."))
        else:
            flat[prefix + key] = value
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """What `flatten` flattened."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested


def differing_keys(
    old: dict[str, Any], new: dict[str, Any], defaults: dict[str, Any], may_differ: set[str]
) -> list[str]:
    """Keys of two recipes that differ: "train.batch_size: 32 -> 64".

    A key that an older version didn't know yet has its default, which is how that version trained. A new precision of
    "auto" differs from none.
    """
    known = flatten(defaults)
    before, after = known | flatten(old), known | flatten(new)
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if key not in may_differ
        and before.get(key) != after.get(key)
        and not (key == PRECISION and after.get(key) == AUTO)
    ]
