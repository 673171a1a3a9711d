"""Recipes of several runs: what they share, and in what they differ."""

from collections.abc import Mapping

import yaml

from dia_diffusion.report.page import Table
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.recipe import flatten, nest

OWN = ("output",)
"""Keys that are each run's own and say nothing of what it trains."""


def differing_keys(experiments: Mapping[str, Experiment]) -> list[str]:
    """Keys whose values differ between runs, in the recipe's order."""
    recipes = [flatten(experiment.to_dict()) for experiment in experiments.values()]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if key not in OWN)
    return [key for key in keys if any(recipe.get(key) != recipes[0].get(key) for recipe in recipes)]


def differences_table(experiments: Mapping[str, Experiment]) -> Table:
    """A row a run: its values of the keys in which runs differ."""
    keys = differing_keys(experiments)
    rows = [
        [name, *(_told(flatten(experiment.to_dict()).get(key)) for key in keys)]
        for name, experiment in experiments.items()
    ]
    return Table(["run", *keys], rows, "In what the runs' recipes differ.", numbers=set(keys), folded=True)


def shared_recipe(experiments: Mapping[str, Experiment]) -> str:
    """The recipe that all runs have in common, as YAML."""
    left_out = {*differing_keys(experiments), *OWN}
    recipe = flatten(next(iter(experiments.values())).to_dict())
    shared = nest({key: value for key, value in recipe.items() if key not in left_out})
    return yaml.safe_dump(shared, sort_keys=False)


def _told(value: object) -> str:
    if value is None:
        return "null"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
