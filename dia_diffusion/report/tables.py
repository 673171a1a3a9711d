"""Tables of what was measured, how, and where, and what recipes have in common."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from dia_diffusion.environment import environment
from dia_diffusion.evaluation.record import EvaluationRecord, describe_number, numbers_of
from dia_diffusion.reading import Unreadable, read_json_object
from dia_diffusion.tables import Table
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.recipe import flatten, nest
from dia_diffusion.training.run_folder import RunFolder

OWN_KEYS = ("output",)
"""Of a recipe: different for each run, without effect on what it trains."""


def protocol_label(record: EvaluationRecord) -> str:
    """The start of its hash, and its name if it has one."""
    return _join([record.protocol_hash()[:8], record.protocol_name], " ")


def guidance_text(scale: float | None, interval: Sequence[float] | None, guide: Mapping[str, Any] | None = None) -> str:
    """Guidance in words, such as "guidance 2 in (0.3, 5] by 1a2b3c4d"; empty for none."""
    if scale in (None, 1):
        return ""
    within = "" if interval is None else f" in ({interval[0]:g}, {interval[1]:g}]"
    return f"guidance {scale:g}{within}" + ("" if guide is None else f" by {guide['weights_hash'][:8]}")


def protocols_table(records: Sequence[EvaluationRecord]) -> Table:
    """One row per protocol, in order of first use."""
    columns = ["protocol", "metric", "samples", "reference", "sampler", "weights", "seeds", "labels"]
    rows = {}
    for record in records:
        protocol = record.protocol
        guidance = guidance_text(protocol.guidance_scale, protocol.guidance_interval, protocol.guide)
        shape = "x".join(map(str, (protocol.reference_shape or ())[1:]))
        rows[record.protocol_hash()] = [
            protocol_label(record),
            record.metric,
            f"{protocol.num_samples:,}",
            _join([protocol.reference, protocol.reference_split, _count(protocol.reference_count), shape]),
            "" if protocol.sampler is None else f"{protocol.sampler}, {protocol.num_inference_steps} steps",
            _join([protocol.weights, protocol.dtype]),
            protocol.seeds or "",
            _join([protocol.class_labels, guidance]),
        ]
    title = "Protocols. Distances of different protocols can't be compared."
    left = [name for name in columns if name != "samples"]
    return Table(columns, list(rows.values()), title, left).without_empty_columns()


def results_table(records: Sequence[EvaluationRecord]) -> Table:
    """One row per record, in order of step; further metrics have columns of their own."""
    names = list(dict.fromkeys(name for record in records for name in numbers_of(record)))
    columns = ["step", "images seen", "metric", "distance", "95 % interval", *names, "seconds", "protocol"]
    rows = []
    for record in sorted(records, key=lambda record: (record.step or 0, record.time)):
        interval = "" if record.low is None or record.high is None else f"[{record.low:.3f}, {record.high:.3f}]"
        place = [_count(record.step), _count(record.images_seen)]
        metrics = [describe_number(record, name) for name in names]
        distance = [record.metric, f"{record.distance:.3f}", interval]
        rows.append([*place, *distance, *metrics, f"{record.seconds:,.0f}", protocol_label(record)])
    return Table(columns, rows, "Every evaluation on record.", left=("metric", "protocol"))


def environment_table(folders: Iterable[RunFolder], records: Iterable[EvaluationRecord]) -> Table:
    """What runs were last trained with, what distances were measured with, and what made this page."""
    columns = {
        "training": _distinct(_environment_of(folder) for folder in folders if folder.path.is_dir()),
        "evaluations": _distinct(record.versions for record in records),
        "this page": [environment()],
    }
    names = [f"{name} ({n + 1})" if n else name for name, group in columns.items() for n in range(len(group))]
    described = [one for group in columns.values() for one in group]
    rows = [[key, *(one.get(key, "not on record") for one in described)] for key in environment()]
    return Table(["", *names], rows, "What was trained, measured and shown with.", left=("", *names))


def differing_keys(experiments: Mapping[str, Experiment]) -> list[str]:
    """Keys of recipes that differ between runs, in the recipe's order."""
    recipes = [flatten(experiment.to_dict()) for experiment in experiments.values()]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if key not in OWN_KEYS)
    return [key for key in keys if any(recipe.get(key) != recipes[0].get(key) for recipe in recipes)]


def differences_table(experiments: Mapping[str, Experiment]) -> Table:
    """A row per run: its values of the keys that differ between runs."""
    keys, rows = differing_keys(experiments), []
    for name, experiment in experiments.items():
        values = flatten(experiment.to_dict())
        rows.append([name, *("null" if values.get(key) is None else str(values[key]) for key in keys)])
    return Table(["run", *keys], rows, "Where the runs' recipes differ.", left=("run",), folded=True)


def shared_recipe(experiments: Mapping[str, Experiment]) -> str:
    """The recipe that all runs have in common, as YAML."""
    own = {*differing_keys(experiments), *OWN_KEYS}
    recipe = flatten(next(iter(experiments.values())).to_dict())
    return yaml.safe_dump(nest({key: value for key, value in recipe.items() if key not in own}), sort_keys=False)


def _environment_of(folder: RunFolder) -> dict[str, str]:
    try:
        values = read_json_object(folder.environment)
    except (OSError, Unreadable):
        return {}  # an older run
    return {name: str(value) for name, value in values.items()}


def _distinct(groups: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    return list({tuple(one.items()): one for one in groups}.values())


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _join(parts: Iterable[str | None], separator: str = ", ") -> str:
    return separator.join(filter(None, parts))
