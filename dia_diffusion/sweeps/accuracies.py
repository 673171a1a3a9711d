"""Test accuracies of trained classifiers over seeds, with Student's test against a baseline (Tables III to XIII)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dia_diffusion.errors import InputError
from dia_diffusion.io import verify_checksum
from dia_diffusion.reading import read_json_object
from dia_diffusion.sweeps.stats import holm, student_test
from dia_diffusion.training.classification import RESULT_FILE
from dia_diffusion.training.config import ClassifyExperiment
from dia_diffusion.training.recipe import flatten
from dia_diffusion.training.run_folder import RunFolder, read_metrics

INDIVIDUAL = "individual"
# Runs of the same setting may differ in the unit and in keys that don't affect the comparison.
UNIT_KEYS = {"model.attention", "model.attention_kwargs", "model.attention_stages", "model.attention_blocks"}
FREE_KEYS = ClassifyExperiment.MAY_CHANGE - {"train.max_steps"} | {"seed"}


@dataclass(frozen=True)
class ClassifierResult:
    """A finished run of `dia-diffusion classify`."""

    path: Path
    recipe: dict[str, Any]
    """Flattened: "model.attention" -> "se"."""
    accuracy: float | None
    """On the test images, 0..1; None if the training diverged."""
    diverged_at: int | None
    parameters: int
    train_fingerprint: str | None
    """None if an older version didn't write it."""
    test_fingerprint: str
    curve: list[tuple[int, float]]
    """Images seen and test accuracy at each test."""

    @property
    def seed(self) -> int:
        return int(self.recipe["seed"])

    def setting(self) -> dict[str, Any]:
        """The recipe without the unit and the keys that don't affect the comparison."""
        return {key: value for key, value in self.recipe.items() if key not in UNIT_KEYS | FREE_KEYS}

    def unit(self) -> str:
        """The unit with its options: "se-individual {reduction: 4}"."""
        options = dict(self.recipe.get("model.attention_kwargs") or {})
        name = str(self.recipe["model.attention"])
        if options.get("sharing") == INDIVIDUAL:
            name += f"-{INDIVIDUAL}"
        options.pop("sharing", None)
        for key in ("stages", "blocks"):
            if (value := self.recipe.get(f"model.attention_{key}")) is not None:
                options[key] = value
        text = ", ".join(f"{key}: {value}" for key, value in sorted(options.items()))
        return f"{name} {{{text}}}" if text else name


@dataclass(frozen=True)
class Row:
    """A unit's runs in one setting."""

    setting: str
    """What distinguishes the setting from the others; empty for a single one."""
    unit: str
    parameters: int
    results: list[ClassifierResult]
    """In order of seed."""
    difference: float | None = None
    """Mean accuracy minus the baseline's."""
    p: float | None = None
    """p value of Student's two-sample test against the baseline's seeds."""
    p_holm: float | None = None
    """The same with Holm's correction for the tests of all rows."""

    @property
    def accuracies(self) -> list[float]:
        """Accuracies of the runs that did not diverge."""
        return [result.accuracy for result in self.results if result.accuracy is not None]

    @property
    def mean(self) -> float | None:
        return float(np.mean(self.accuracies)) if self.accuracies else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over seeds."""
        return float(np.std(self.accuracies, ddof=1)) if len(self.accuracies) > 1 else None

    @property
    def diverged_at(self) -> list[int]:
        return [result.diverged_at for result in self.results if result.diverged_at is not None]

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values for JSON."""
        numbers = ("setting", "unit", "parameters", "mean", "deviation", "difference", "p", "p_holm")
        return {
            **{name: getattr(self, name) for name in numbers},
            "seeds": [result.seed for result in self.results],
            "accuracies": [result.accuracy for result in self.results],
            "diverged_at": [result.diverged_at for result in self.results],
            "curves": [result.curve for result in self.results],
        }


def read_result(path: str | Path) -> ClassifierResult:
    """A run's result.

    Raises:
        InputError: it isn't a classify run, has not ended yet, or its files were altered.
    """
    folder = RunFolder(path)
    file = folder.path / RESULT_FILE
    if not file.is_file():
        raise InputError(f"each RUN must be a finished run of dia-diffusion classify, got {path} without {RESULT_FILE}")
    try:
        record = verify_checksum(read_json_object(file))
        lines = read_metrics(folder.metrics) if folder.metrics.is_file() else []
        # A diverged run records the first skipped step; metrics lines may follow it.
        if record["diverged_at"] is None and lines and lines[-1]["step"] > record["step"]:
            raise InputError(f"{path} is being trained again since its {RESULT_FILE}; let it end first")
        return ClassifierResult(
            folder.path,
            flatten(ClassifyExperiment().to_dict()) | flatten(record["recipe"]),  # an older recipe lacks newer keys
            record.get("test_accuracy"),
            record["diverged_at"],
            int(record["parameters"]),
            record.get("train_data", {}).get("fingerprint"),
            str(record["test_data"]["fingerprint"]),
            [(line["images"], line["test_accuracy"]) for line in lines if "test_accuracy" in line],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is truncated or corrupted; train the run again") from None


def compare(results: Sequence[ClassifierResult], baseline: str = "none") -> list[Row]:
    """A row for each unit in each setting, in the order of the runs, compared with the setting's baseline.

    baseline: the unit's name as in the rows, with or without its options.

    Raises:
        InputError: two runs of the same unit, setting and seed; runs trained or tested on different images; or no
            baseline.
    """
    settings: list[dict[str, Any]] = []
    for result in results:
        if result.setting() not in settings:
            settings.append(result.setting())
    rows = []
    for setting, name in zip(settings, _differences(settings), strict=True):
        here = [result for result in results if result.setting() == setting]
        for what in ("test", "train"):
            if len({getattr(result, f"{what}_fingerprint") for result in here} - {None}) > 1:
                raise InputError(
                    f"the {what} images of compared runs must be the same, got other images for {here[0].path}"
                )
        rows += _rows(name, here, baseline)
    if not any(_is(baseline, row.unit) for row in rows):
        raise InputError(f"`--baseline` must be one of {', '.join(_units(results))}, got {baseline!r}")
    adjusted = holm([row.p for row in rows])
    return [replace(row, p_holm=p) for row, p in zip(rows, adjusted, strict=True)]


def _rows(setting: str, results: Sequence[ClassifierResult], baseline: str) -> list[Row]:
    groups = {unit: [result for result in results if result.unit() == unit] for unit in _units(results)}
    for unit, group in groups.items():
        group.sort(key=lambda result: result.seed)
        for first, second in pairwise(group):
            if first.seed == second.seed:
                raise InputError(f"{first.path} and {second.path} are both {unit} of seed {first.seed}; leave one out")
    rows = [Row(setting, unit, group[0].parameters, group) for unit, group in groups.items()]
    base = next((row for row in rows if _is(baseline, row.unit)), None)
    return [row if row is base or base is None else _compared(row, base) for row in rows]


def _compared(row: Row, base: Row) -> Row:
    """The row with difference and p, if both have accuracies."""
    if row.mean is None or base.mean is None:
        return row
    return replace(row, difference=row.mean - base.mean, p=student_test(row.accuracies, base.accuracies))


def _is(name: str, unit: str) -> bool:
    """Whether a unit has this name, with its options or without."""
    return name in (unit, unit.split(" ")[0])


def _units(results: Sequence[ClassifierResult]) -> list[str]:
    return list(dict.fromkeys(result.unit() for result in results))


def _differences(settings: Sequence[dict[str, Any]]) -> list[str]:
    """What distinguishes each setting from the others: "backbone cifar-resnet20-basic, norm none"."""
    keys = [key for key in settings[0] if any(setting.get(key) != settings[0][key] for setting in settings)]
    return [", ".join(f"{key.split('.')[-1]} {setting.get(key)}" for key in keys) for setting in settings]
