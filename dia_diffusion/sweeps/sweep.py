"""Sweeps: labeled experiments that are trained, measured and collected. A study is a sweep from a YAML file."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.io import shipped_folder, shipped_names, write_text
from dia_diffusion.precision import Precision, in_precision, training_device, training_precision
from dia_diffusion.reading import read_yaml
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.recipe import AUTO, flatten, override, read_experiment
from dia_diffusion.validation import NonNegative, Positive, Strict, validate

BASELINE = "none"
"""The unit that the others are compared with: no unit."""
STUDY_FILE = "study.yaml"
"""In a study's folder: the study as last run, with the changes from the command line."""
DECIDED = {
    "output",
    "seed",
    "train.batch_size",
    "train.max_steps",
    "train.checkpoint_every",
    "train.sample_every",
    "train.keep_last",
}
"""Recipe keys that only the study sets."""


class Grid(Strict):
    """Runs: every unit at every batch size with every seed."""

    units: list[str] = Field(min_length=1)
    """Attention units, or names of the study's variants."""
    batch_sizes: list[Positive] = Field(min_length=1)
    """Images per optimizer step."""
    seeds: list[NonNegative] = Field(min_length=1)
    """Seeds of initial weights, image order, flips, times and noise: runs that share a seed differ only in the unit."""


class StudyConfig(Strict):
    """A study's keys."""

    output: str
    """The folder for the runs and their results."""
    recipe: str
    """A shipped recipe or a YAML file; the study sets its unit, batch size, seed, steps and intervals."""
    runs: list[Grid] = Field(min_length=1)
    """What to train, in this order."""
    protocol: str
    """The evaluation protocol of the curves: a shipped one or a YAML file."""
    final_protocol: str | None = None
    """Another protocol for the last checkpoint, such as the paper's; null is none."""
    reference: str | None = None
    """The images that distances are measured to; null is the training images."""
    images: Positive | None = None
    """Images seen by each run."""
    steps: dict[Positive, Positive] | Positive | None = None
    """Instead of images, optimizer steps: one number, or one per batch size."""
    points: Positive = 6
    """Points of a curve, evenly spaced, ending at the last step."""
    variants: dict[str, dict[str, Any]] = Field(default={})
    """Names for other settings: name -> recipe keys, such as {slow: {model.attention: dia-lstm, ...}}; a variant
    without model.attention has the recipe's unit."""
    overrides: dict[str, Any] = Field(default={})
    """Recipe keys to change in every run."""
    name: str | None = None
    """The study's name; null is the name of the file."""


@dataclass(frozen=True)
class Run:
    """A labeled experiment of a sweep."""

    name: str
    """Its folder, relative to the sweep's."""
    label: dict[str, Any]
    """Values that distinguish it from other runs; `unit` is an attention unit or a variant of the study."""
    experiment: Experiment
    """Its resolved recipe; `output` is the run's folder."""

    @property
    def unit(self) -> str:
        return str(self.label["unit"])

    @property
    def batch_size(self) -> int:
        return self.experiment.train.batch_size

    @property
    def seed(self) -> int:
        return self.experiment.seed

    @property
    def max_steps(self) -> int:
        return self.experiment.train.max_steps

    @property
    def folder(self) -> Path:
        return Path(self.experiment.output)

    @property
    def steps(self) -> list[int]:
        """The steps of its curve's points, at which training saves a pipeline."""
        every = self.experiment.train.checkpoint_every
        return [*range(every, self.max_steps, every), self.max_steps]


@dataclass(frozen=True)
class Study:
    """Runs and their evaluation protocols, each read once."""

    name: str
    config: StudyConfig
    protocol: EvalProtocol
    """Protocol of the curves."""
    final_protocol: EvalProtocol | None
    """Protocol of the last checkpoints."""
    runs: list[Run]

    @property
    def folder(self) -> Path:
        """The folder for the runs and their results."""
        return Path(self.config.output)

    @property
    def protocols(self) -> list[EvalProtocol]:
        return [protocol for protocol in (self.protocol, self.final_protocol) if protocol is not None]

    @property
    def sampler_steps(self) -> tuple[int, int]:
        """Sampler steps of a measurement, over all its images, by each protocol; 0 without a final protocol."""
        counts = [protocol.num_samples * protocol.steps for protocol in self.protocols]
        return counts[0], sum(counts[1:])

    @property
    def units(self) -> list[str]:
        """In order of first mention."""
        return list(dict.fromkeys(run.unit for run in self.runs))

    @property
    def batch_sizes(self) -> list[int]:
        """In ascending order."""
        return sorted({run.batch_size for run in self.runs})


def resolve_precision(
    runs: Sequence[Run], origins: Iterable[dict[str, Any] | None]
) -> tuple[list[Run], Precision | None]:
    """The runs with `mixed_precision: auto` resolved to one precision, and that precision (None if none says auto).

    origins: the training record of each run, if any, with its `recipe`. The first one decides, else the device.
    """
    auto = [run.experiment.train.mixed_precision == AUTO for run in runs]
    if not any(auto):
        return [*runs], None
    recipes = (origin["recipe"] for origin, is_auto in zip(origins, auto, strict=True) if is_auto and origin)
    began_in = next((recipe["train"]["mixed_precision"] for recipe in recipes), None)
    precision = training_precision("auto", training_device(), began_in)
    return [
        replace(run, experiment=in_precision(run.experiment, precision)) if is_auto else run
        for run, is_auto in zip(runs, auto, strict=True)
    ], precision


def study_path(name: str) -> Path:
    """A study's file, given its path, the study's folder, or the name of a shipped one, with or without .yaml."""
    path = Path(name)
    if path.is_file():
        return path
    if (path / STUDY_FILE).is_file():
        return path / STUDY_FILE
    shipped = shipped_folder("curves") / f"{path.name.removesuffix('.yaml')}.yaml"
    if shipped.is_file() and path.parent in (Path("."), Path("eval/curves")):
        return shipped
    names = ", ".join(shipped_names("curves"))
    raise InputError(f"a study must be a YAML file, the folder of a study, or one of {names}, got {name!r}")


def read_study(
    name: str,
    output: str | None = None,
    overrides: dict[str, Any] | None = None,
    changes: dict[str, Any] | None = None,
) -> Study:
    """A study from its file, or from its folder, which may have been moved.

    output: replaces the file's folder.
    overrides: recipe keys for every run, over the file's own, such as {"data.source": "images.zip"}.
    changes: other keys of the study, such as {"final_protocol": None}.

    Raises:
        InputError: no such study or protocol, not YAML, an unknown key, or a run whose recipe is refused.
    """
    path = study_path(name)
    values = {**read_yaml(path, "study", "output, recipe, runs, protocol"), **(changes or {})}
    if path.name == STUDY_FILE:
        if values.get("name") is None:  # `write_study` always writes it
            raise InputError(f"{path}: {STUDY_FILE} is reserved for the folders of studies; rename your file")
        values["output"] = str(path.parent)
    if output is not None:
        values["output"] = output
    config = validate(StudyConfig, values, f"{path}: ")
    config = config.model_copy(update={"overrides": {**flatten(config.overrides), **(overrides or {})}})
    try:
        _check(config)
        runs = _runs(config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    protocol = EvalProtocol.read(config.protocol)
    final = None if config.final_protocol is None else EvalProtocol.read(config.final_protocol)
    if final is not None and final.name == protocol.name and final.hash() != protocol.hash():
        raise InputError(f"protocol and final_protocol are both called {protocol.name} and differ; rename one")
    return Study(config.name or path.stem, config, protocol, final, runs)


def write_study(study: Study) -> None:
    """Writes the study into its folder, where `read_study` finds it; files are named by absolute paths."""
    config = study.config.model_dump() | {"name": study.name}
    for key in ("recipe", "protocol", "final_protocol", "reference"):
        if config[key] is not None and Path(config[key]).is_file():
            config[key] = str(Path(config[key]).resolve())
    write_text(study.folder / STUDY_FILE, yaml.safe_dump(config, sort_keys=False))


def _check(config: StudyConfig) -> None:
    if (config.images is None) == (config.steps is None):
        raise InputError("either `images` or `steps` must be given")
    sizes = {size for grid in config.runs for size in grid.batch_sizes}
    if config.images is not None and config.images < max(sizes):
        raise InputError(f"`images` must be the largest batch size, {max(sizes)}, or more, got {config.images}")
    if isinstance(config.steps, dict) and (missing := sizes - config.steps.keys()):
        raise InputError(f"`steps` must be one number, or one per batch size; got none for batch size {min(missing)}")
    for name in config.variants:
        if not re.fullmatch(r"[\w.+=-]+", name):
            raise InputError(f"a name in `variants` must be of letters, digits and _ . + = -, got {name!r}")
        if name == BASELINE:
            raise InputError(f"a name in `variants` must not be {BASELINE}, which the others are compared with")
    set_by = {"overrides": config.overrides} | {f"variant {name}": keys for name, keys in config.variants.items()}
    for what, keys in set_by.items():
        if taken := sorted(flatten(keys).keys() & DECIDED):
            raise InputError(f"{what} sets {taken[0]}, which is the study's to choose")


def _runs(config: StudyConfig) -> list[Run]:
    """The runs in the order of the grids, by seed, batch size and unit; a run in several grids counts once."""
    recipes: dict[str, Experiment] = {}
    runs: dict[str, Run] = {}
    for grid in config.runs:
        for seed in grid.seeds:
            for batch_size in grid.batch_sizes:
                for unit in grid.units:
                    if unit not in recipes:
                        recipes[unit] = _recipe(config, unit)
                    run = _run(config, recipes[unit], unit, batch_size, seed)
                    runs.setdefault(run.name, run)
    return list(runs.values())


def _recipe(config: StudyConfig, unit: str) -> Experiment:
    """A unit's recipe, with the recipe's own batch size, steps and seed."""
    own = flatten(config.variants[unit]) if unit in config.variants else {"model.attention": unit}
    keys = {**config.overrides, **own}
    try:
        return read_experiment(config.recipe, keys=keys)
    except InputError as error:
        raise InputError(f"unit {unit}: {error}") from None


def _run(config: StudyConfig, recipe: Experiment, unit: str, batch_size: int, seed: int) -> Run:
    steps = config.steps[batch_size] if isinstance(config.steps, dict) else config.steps
    if config.images is not None:
        steps = max(1, config.images // batch_size)
    assert steps is not None
    every = math.ceil(steps / config.points)
    name = f"{unit}-b{batch_size}-s{seed}"
    keys = {
        "output": str(Path(config.output) / name),
        "seed": seed,
        "train.batch_size": batch_size,
        "train.max_steps": steps,
        "train.checkpoint_every": every,
        "train.sample_every": every,
        "train.keep_last": 1,
    }
    return Run(name, {"unit": unit, "batch_size": batch_size, "seed": seed}, override(recipe, keys))
