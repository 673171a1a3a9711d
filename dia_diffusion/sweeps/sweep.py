"""A study: which runs are compared, over which recipe, measured by which protocol; read from a YAML file."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from dia_diffusion.errors import InputError
from dia_diffusion.io import shipped_folder, shipped_names, write_text
from dia_diffusion.reading import read_yaml
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.recipe import flatten, override, read_experiment
from dia_diffusion.validation import NonNegative, Positive, Strict, validate

BASELINE = "none"
"""The unit that stands for none: the twin that the others are compared with."""
STUDY_FILE = "study.yaml"
"""In a study's folder: the study as it was last run, with what its command changed."""
DECIDED = {
    "output",
    "seed",
    "train.batch_size",
    "train.max_steps",
    "train.checkpoint_every",
    "train.sample_every",
    "train.keep_last",
}
"""Recipe keys that are the study's own to choose."""


class Grid(Strict):
    """Runs: every unit at every batch size with every seed."""

    units: list[str] = Field(min_length=1)
    """Attention units, or names of the study's variants."""
    batch_sizes: list[Positive] = Field(min_length=1)
    """Images an optimizer step."""
    seeds: list[NonNegative] = Field(min_length=1)
    """Of first weights, order of images, flips, times and noise: runs that share a seed differ in the unit alone."""


class StudyConfig(Strict):
    """A study's keys."""

    output: str
    """The folder that holds the runs and what is drawn from them."""
    recipe: str
    """A shipped recipe or a YAML file; its unit, batch size, seed, steps and cadences are the study's to choose."""
    runs: list[Grid] = Field(min_length=1)
    """What to train, in this order."""
    protocol: str
    """The evaluation protocol of the curves: a shipped one or a YAML file."""
    final_protocol: str | None = None
    """Another one for the last checkpoint, such as the paper's; null is none."""
    reference: str | None = None
    """The images that distances are to; null is those that were trained on."""
    images: Positive | None = None
    """Images each run sees."""
    steps: dict[Positive, Positive] | Positive | None = None
    """Or optimizer steps: one number, or one a batch size."""
    points: Positive = 6
    """Points of a curve, evenly spaced and ending with the last step."""
    variants: dict[str, dict[str, Any]] = Field(default={})
    """Names for units with other settings: name -> recipe keys, as {wide: {model.attention: dia-lstm, ...}}."""
    overrides: dict[str, Any] = Field(default={})
    """Recipe keys that differ from the recipe in every run."""
    name: str | None = None
    """What it is called; null is the name of the file."""


@dataclass(frozen=True)
class StudyRun:
    """One run of a study."""

    unit: str
    """Attention unit or variant."""
    batch_size: int
    seed: int
    experiment: Experiment
    """The recipe as resolved for this run; its `output` is the run's folder."""

    @property
    def name(self) -> str:
        """The run's folder within the study's."""
        return run_name(self.unit, self.batch_size, self.seed)

    @property
    def folder(self) -> Path:
        return Path(self.experiment.output)

    @property
    def steps(self) -> list[int]:
        """Of the points of its curve, where training leaves a pipeline."""
        every, last = self.experiment.train.checkpoint_every, self.experiment.train.max_steps
        return [*range(every, last, every), last]


@dataclass(frozen=True)
class Study:
    """A study with every run's recipe resolved."""

    name: str
    config: StudyConfig
    runs: list[StudyRun]

    @property
    def folder(self) -> Path:
        """Where the runs and what is drawn from them lie."""
        return Path(self.config.output)

    @property
    def units(self) -> list[str]:
        """In order of first mention."""
        return list(dict.fromkeys(run.unit for run in self.runs))

    @property
    def batch_sizes(self) -> list[int]:
        """In ascending order."""
        return sorted({run.batch_size for run in self.runs})


def run_name(unit: str, batch_size: int, seed: int) -> str:
    """As "dia-lstm-b32-s0"."""
    return f"{unit}-b{batch_size}-s{seed}"


def study_path(name: str) -> Path:
    """A study's file: by path, by the folder of a study, or by the name of a shipped one, with or without .yaml."""
    path = Path(name)
    if path.is_file():
        return path
    if (path / STUDY_FILE).is_file():
        return path / STUDY_FILE
    shipped = shipped_folder("curves") / f"{path.name.removesuffix('.yaml')}.yaml"
    if shipped.is_file() and path.parent in (Path("."), Path("eval/curves")):
        return shipped
    accepted = f"a YAML file, the folder of a study, or one of {', '.join(shipped_names('curves'))}"
    raise InputError(f"a study must be {accepted}, got {name!r}")


def read_study(
    name: str,
    output: str | None = None,
    overrides: dict[str, Any] | None = None,
    changes: dict[str, Any] | None = None,
) -> Study:
    """A study from its file, or from its folder, which may have been moved.

    output: another folder than the file's.
    overrides: recipe keys for every run, over the file's own, such as {"data.source": "images.zip"}.
    changes: other keys of the study, such as {"final_protocol": None}.

    Raises:
        InputError: no such study, not YAML, an unknown key, or a run whose recipe is refused.
    """
    path = study_path(name)
    values = {**read_yaml(path, "study", "output, recipe, runs, protocol"), **(changes or {})}
    if path.name == STUDY_FILE:
        if values.get("name") is None:  # which `write_study` never leaves out
            raise InputError(f"{path}: {STUDY_FILE} is the file that a study's folder keeps; give yours another name")
        values["output"] = str(path.parent)
    if output is not None:
        values["output"] = output
    config = validate(StudyConfig, values, f"{path}: ")
    config = config.model_copy(update={"overrides": {**flatten(config.overrides), **(overrides or {})}})
    _check(config, path)
    experiments = {
        unit: _of_unit(config, unit) for unit in dict.fromkeys(u for grid in config.runs for u in grid.units)
    }
    runs: dict[str, StudyRun] = {}
    for grid in config.runs:
        for seed in grid.seeds:
            for batch_size in grid.batch_sizes:
                for unit in grid.units:
                    steps = _steps(config, batch_size, path)
                    run = _run(experiments[unit], unit, batch_size, seed, steps, config)
                    runs.setdefault(run.name, run)
    return Study(config.name or path.stem, config, list(runs.values()))


def write_study(study: Study) -> None:
    """Writes the study into its folder, from where `read_study` reads it; what is a file is named by its whole path."""
    config = study.config.model_dump() | {"name": study.name}
    for key in ("recipe", "protocol", "final_protocol", "reference"):
        if config[key] is not None and Path(config[key]).is_file():
            config[key] = str(Path(config[key]).resolve())
    write_text(study.folder / STUDY_FILE, yaml.safe_dump(config, sort_keys=False))


def _check(config: StudyConfig, path: Path) -> None:
    if (config.images is None) == (config.steps is None):
        raise InputError(f"{path}: either `images` or `steps` must be given")
    if config.images is not None and config.images < (size := _largest_batch(config)):
        raise InputError(f"{path}: `images` must be the largest batch size, {size}, or more, got {config.images}")
    for name in config.variants:
        if not re.fullmatch(r"[\w.+=-]+", name):
            raise InputError(f"{path}: variant {name!r} can't name a folder; accepted: letters, digits, _ . + = -")
        if name == BASELINE:
            raise InputError(f"{path}: variant {name!r} is what the others are compared with; give it another name")
    set_by = {"overrides": config.overrides} | {f"variant {name}": keys for name, keys in config.variants.items()}
    for what, keys in set_by.items():
        if taken := sorted(flatten(keys).keys() & DECIDED):
            raise InputError(f"{path}: {what} sets {taken[0]}, which is the study's own to choose")


def _largest_batch(config: StudyConfig) -> int:
    return max((size for grid in config.runs for size in grid.batch_sizes), default=1)


def _of_unit(config: StudyConfig, unit: str) -> Experiment:
    """A unit's recipe, with the recipe's own batch size, steps and seed."""
    keys = {**config.overrides, "model.attention": unit, **flatten(config.variants.get(unit, {}))}
    try:
        return read_experiment(config.recipe, keys=keys)
    except InputError as error:
        raise InputError(f"unit {unit}: {error}") from None


def _run(of_unit: Experiment, unit: str, batch_size: int, seed: int, steps: int, config: StudyConfig) -> StudyRun:
    every = math.ceil(steps / config.points)
    keys = {
        "output": str(Path(config.output) / run_name(unit, batch_size, seed)),
        "seed": seed,
        "train.batch_size": batch_size,
        "train.max_steps": steps,
        "train.checkpoint_every": every,
        "train.sample_every": every,
        "train.keep_last": 1,
    }
    return StudyRun(unit, batch_size, seed, override(of_unit, keys))


def _steps(config: StudyConfig, batch_size: int, path: Path) -> int:
    if config.images is not None:
        return max(1, config.images // batch_size)
    if isinstance(config.steps, dict):
        if batch_size not in config.steps:
            raise InputError(
                f"{path}: steps names no batch size {batch_size}; accepted: one number, or one a batch size"
            )
        return config.steps[batch_size]
    assert config.steps is not None
    return config.steps
