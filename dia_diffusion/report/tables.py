"""Tables of results, protocols, environments and recipes."""

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


def protocol_label(record: EvaluationRecord) -> str:
    """The start of the protocol's hash, and its name if it has one."""
    return " ".join(filter(None, (record.protocol_hash()[:8], record.protocol_name)))


def results_table(records: Sequence[EvaluationRecord]) -> Table:
    """One row per record, in order of step; further metrics have their own columns."""
    rows = [
        {
            "step": _count(record.step),
            "images seen": _count(record.images_seen),
            "metric": record.metric,
            "distance": f"{record.distance:.3f}",
            "95 % interval": "" if record.low is None else f"[{record.low:.3f}, {record.high:.3f}]",
            **{name: describe_number(record, name) for name in numbers_of(record)},
            "seconds": f"{record.seconds:,.0f}",
            "protocol": protocol_label(record),
        }
        for record in sorted(records, key=lambda record: (record.step or 0, record.time))
    ]
    return Table.of(rows, "Every evaluation on record.", left=("metric", "protocol"))


def protocols_table(records: Iterable[EvaluationRecord]) -> Table:
    """A column per protocol, in order of first use."""
    protocols = {protocol_label(record): {"metric": record.metric, **record.protocol.to_dict()} for record in records}
    keys = list(dict.fromkeys(key for protocol in protocols.values() for key in protocol))
    return _side_by_side("Protocols. Distances of different protocols can't be compared.", keys, protocols)


def environment_table(folders: Iterable[RunFolder], records: Iterable[EvaluationRecord]) -> Table:
    """The environments in which runs were last trained, distances were measured, and this page was created."""
    used = {
        "training": [_environment_of(folder) for folder in folders if folder.path.is_dir()],
        "evaluations": [record.versions for record in records],
        "this page": [environment()],
    }
    columns = {}
    for name, all_of_them in used.items():
        for number, one in enumerate({str(one): one for one in all_of_them}.values(), start=1):
            columns[name if number == 1 else f"{name} ({number})"] = dict.fromkeys(environment(), "not on record") | one
    return _side_by_side("What was trained, measured and shown with.", list(environment()), columns)


def recipe_tables(experiments: Mapping[str, Experiment]) -> tuple[str, Table]:
    """The keys that all runs' recipes share, as YAML, and a row per run with those that differ, except `output`."""
    recipes = {name: flatten(experiment.to_dict()) for name, experiment in experiments.items()}
    first, *others = recipes.values()
    keys = dict.fromkeys(key for recipe in recipes.values() for key in recipe)
    different = [key for key in keys if any(other.get(key) != first.get(key) for other in others)]
    shared = nest({key: value for key, value in first.items() if key not in different})
    rows = []
    for name, recipe in recipes.items():
        values = {key: recipe.get(key) for key in different if key != "output"}
        rows.append({"run": name} | {key: "null" if value is None else str(value) for key, value in values.items()})
    return yaml.safe_dump(shared, sort_keys=False), Table.of(rows, "Where the runs' recipes differ.", left=("run",))


def _side_by_side(title: str, keys: Sequence[str], columns: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row per key that has a value, a column per mapping; hashes are shortened."""
    rows = []
    for key in keys:
        values = {name: column.get(key) for name, column in columns.items()}
        texts = {name: "" if value is None else str(value) for name, value in values.items()}
        if any(texts.values()):
            rows.append({"": key} | {name: text[:8] if key.endswith("_hash") else text for name, text in texts.items()})
    return Table.of(rows, title, left=("", *columns))


def _environment_of(folder: RunFolder) -> dict[str, Any]:
    try:
        return read_json_object(folder.environment)
    except (OSError, Unreadable):
        return {}  # an older run


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"
