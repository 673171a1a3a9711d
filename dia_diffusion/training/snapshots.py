"""Snapshots of a run's power-function averages, and pipelines of averages made after training (EDM2, arXiv 2312.02696).

snapshots/step-00001000/width-0.05.safetensors   the average with that relative width after that step
                        width-0.1.safetensors
                        state.json               step, recipe, data, sha256 of the other files, own checksum
"""

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from dia_diffusion.distributed import on_rank_zero
from dia_diffusion.errors import InputError
from dia_diffusion.io import refuse_existing, step_folders, step_name
from dia_diffusion.pipelines.folder import TRAINING_FILE, read_record
from dia_diffusion.training.callbacks import Callback
from dia_diffusion.training.checkpoint import (
    Checkpoint,
    check_files,
    load_checkpoint,
    load_weights,
    read_folder_state,
    read_tensors,
    write_checkpoint,
)
from dia_diffusion.training.config import MAX_POWER_WIDTH, EmaConfig
from dia_diffusion.training.diffusion import build_model, build_pipeline, save_pipeline
from dia_diffusion.training.ema import Array, average_name, gamma_of, reconstruction
from dia_diffusion.training.recipe import read_experiment
from dia_diffusion.training.run_folder import RunFolder
from dia_diffusion.training.ssia import without_heads

if TYPE_CHECKING:
    from dia_diffusion.training.trainer import StepResult, Trainer

MAX_RESIDUAL = 0.05
"""Largest norm of the difference between a reconstructed profile and the requested one, relative to the latter's."""
MAX_AMPLIFICATION = 1000
"""Largest amplification of the float32 averages' rounding errors: the sum of their absolute coefficients."""
MIN_WIDTH = 0.001
NOT_OF_PIPELINES = ("sha256", "skipped_steps", "grad_scaler")
"""Keys of a state.json that a pipeline's training.json doesn't have."""


class SaveSnapshots(Callback):
    """Writes snapshots, before the step's checkpoint."""

    def __init__(self, config: EmaConfig):
        self.config = config

    def due(self, step: int) -> bool:
        return step % self.config.snapshot_every == 0

    def __call__(self, trainer: "Trainer", result: "StepResult") -> None:
        on_rank_zero(trainer.accelerator, lambda: self._save(trainer))

    def _save(self, trainer: "Trainer") -> None:
        names = [average_name(width=width) for width in self.config.power_widths]
        tensors = {name: trainer.state_with(trainer.averages[name]) for name in names}
        place = trainer.folder.snapshots / step_name(trainer.step)
        write_checkpoint(place, trainer.step, Checkpoint(tensors, trainer.origin()))


class Snapshots:
    """The snapshots of a run up to a step; all files are compared with their checksums.

    Args:
        run: its folder.
        step: the step of a snapshot; None is the newest.

    Raises:
        InputError: no snapshots, none at that step, or a damaged one.
    """

    def __init__(self, run: str | Path, step: int | None = None):
        self.run, self.folder = run, RunFolder(run).snapshots
        self.step = choose_step(run, "snapshot", step)
        self.states: dict[Path, dict[str, Any]] = {}
        """Folder -> its state.json."""
        for place in (place for number, place in step_folders(self.folder).items() if number <= self.step):
            self.states[place] = state = read_folder_state(place, "snapshot", lambda names: all(map(_width, names)))
            check_files(place, state, "snapshot")
        self.files = [place / name for place, state in self.states.items() for name in state["sha256"]]
        """One file per average."""
        self.steps = np.array([state["step"] for state in self.states.values() for _ in state["sha256"]], float)
        """The step after which each average was taken."""
        self.widths = np.array([_width(file.name) for file in self.files])
        """The relative width of each average."""
        self._solved: dict[float, tuple[Array, float]] = {}

    def solve(self, widths: Sequence[float] | Array) -> tuple[Array, Array]:
        """The coefficient of each average for each width (averages, widths), and the residuals (widths,)."""
        gammas, wanted = (np.array([gamma_of(width) for width in each]) for each in (self.widths, widths))
        return reconstruction(self.steps, gammas, self.step, wanted)

    def weights(self, width: float) -> tuple[Array, float]:
        """The coefficient of each average for a width (averages,), and the residual; solved once per width."""
        if width not in self._solved:
            weights, residuals = self.solve([width])
            self._solved[width] = weights[:, 0], float(residuals[0])
        return self._solved[width]

    def check_width(self, width: float) -> None:
        """Raises InputError for a width that can't be reconstructed from the snapshots; the message says which can."""
        why = ""
        if MIN_WIDTH <= width <= MAX_POWER_WIDTH:
            weights, residual = self.weights(width)
            amplification = np.abs(weights).sum()
            if residual > MAX_RESIDUAL:
                why = f", with residual {residual:.2%}, above {MAX_RESIDUAL:.0%}"
            elif amplification > MAX_AMPLIFICATION:
                why = f", with absolute weights of sum {amplification:,.0f}, above {MAX_AMPLIFICATION:,}"
            else:
                return
        known = np.unique([*np.geomspace(MIN_WIDTH, MAX_POWER_WIDTH, 200), *self.widths])
        every, residuals = self.solve(known)
        possible = (residuals <= MAX_RESIDUAL) & (np.abs(every).sum(axis=0) <= MAX_AMPLIFICATION)
        groups = [list(group) for good, group in groupby(zip(possible, known, strict=True), lambda p: p[0]) if good]
        ranges = " or ".join(f"from {group[0][1]:.3g} to {group[-1][1]:.3g}" for group in groups)
        raise InputError(
            f"`--width` must be {ranges}, which the {len(self.states)} snapshots in {self.folder} up to step "
            f"{self.step} can give, got {width:g}{why}"
        )

    def average(self, width: float, parameters: Collection[str]) -> dict[str, Tensor]:
        """The model's state with the parameters' average for a relative width, summed in float64.

        Tensors that aren't parameters, such as BatchNorm's statistics, come from the newest snapshot.
        """
        weights, _ = self.weights(width)
        total: dict[str, Tensor] = {}
        for file, weight in zip(self.files, weights, strict=True):
            state = read_tensors(file, "snapshot")
            own = {name: tensor.double() for name, tensor in state.items() if name in parameters}
            total = total or {name: torch.zeros_like(tensor) for name, tensor in own.items()}
            if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in total.items()}:
                raise InputError(f"snapshot file {file} is of another model than those before it")
            for name, tensor in own.items():
                total[name].add_(tensor, alpha=float(weight))
        return state | {name: tensor.to(state[name].dtype) for name, tensor in total.items()}

    def describe(self, width: float) -> dict[str, Any]:
        """An entry for training.json: the width, the residual of the profile, and the snapshots and coefficients."""
        weights, residual = self.weights(width)
        by_average: dict[str, dict[str, float]] = {}
        for file, step, weight in zip(self.files, self.steps, weights, strict=True):
            by_average.setdefault(file.stem, {})[f"{step:.0f}"] = float(weight)
        hashes = json.dumps([state["sha256"] for state in self.states.values()])
        return {
            "width": width,
            "residual": residual,
            "snapshots_sha256": hashlib.sha256(hashes.encode()).hexdigest(),
            "weights": by_average,
        }

    def save(self, width: float, place: Path) -> float:
        """Writes the pipeline for a relative width, unless it exists, and returns the residual of its profile.

        Raises InputError if something else is there.
        """
        state, described = self.states[self.folder / step_name(self.step)], self.describe(width)
        _save(self.run, state, described, partial(self.average, width), place)
        return float(described["residual"])


def save_decay(run: str | Path, decay: float, step: int, place: Path) -> None:
    """Writes the pipeline of one of a run's further EMAs, from the checkpoint of a step, unless it exists.

    Raises:
        InputError: a damaged checkpoint, one without this EMA, or something else is there.
    """
    checkpoint = load_checkpoint(RunFolder(run).checkpoints / step_name(step))
    ema = checkpoint.state["recipe"].get("ema", {})
    if decay not in ema.get("further_decays", []):
        kept = ", ".join(map(str, ema.get("further_decays", []))) or "none"
        raise InputError(f"`--decay` must be among ema.further_decays of {run}, {kept}, got {decay}")
    prefix = f"{average_name(decay=decay)}/"
    own = {
        name.removeprefix(prefix): t for name, t in checkpoint.tensors["averages"].items() if name.startswith(prefix)
    }
    _save(run, checkpoint.state, {"decay": decay}, lambda parameters: checkpoint.tensors["model"] | own, place)


def choose_step(run: str | Path, what: Literal["snapshot", "checkpoint"], step: int | None) -> int:
    """The given step, or the newest. Raises InputError: no run, or no snapshot or checkpoint at that step."""
    folder = RunFolder(run)
    if not folder.config.is_file():
        got = "a folder without one" if folder.path.is_dir() else "no such folder"
        raise InputError(f"`RUN` must be a run's folder, which has a config.yaml, got {run}, {got}")
    places = step_folders(getattr(folder, f"{what}s"))
    if not places and what == "snapshot":
        trained = "a run trained with `ema.power_widths` and `ema.snapshot_every`"
        raise InputError(f"`RUN` must be {trained}, got {run}, which has no snapshots")
    if not places:
        raise InputError(f"`RUN` must be a run with checkpoints, got {run}, which has none")
    if step is not None and step not in places:
        steps = f"the {len(places)} from {min(places)} to {max(places)}"
        raise InputError(f"`--step` must be a step with a {what} in {run}, one of {steps}, got {step}")
    return max(places) if step is None else step


def _width(name: str) -> float:
    """The relative width of the average in a file of this name. Raises ValueError for other files."""
    width = float(name.removeprefix("width-").removesuffix(".safetensors"))
    if name != f"width-{width}.safetensors" or not 0 < width <= MAX_POWER_WIDTH:
        raise ValueError(name)
    return width


def _save(
    run: str | Path,
    state: dict[str, Any],
    average: dict[str, Any],
    weights: Callable[[Collection[str]], dict[str, Tensor]],
    place: Path,
) -> None:
    """Writes a pipeline with the weights that `weights` returns for the names of the model's parameters."""
    training = {key: value for key, value in state.items() if key not in NOT_OF_PIPELINES} | {"average": average}
    if (place / TRAINING_FILE).is_file() and read_record(place / TRAINING_FILE, {}) == training:
        return
    refuse_existing(place)
    experiment = read_experiment(str(RunFolder(run).config))
    model = build_model(experiment.model)
    load_weights(model, without_heads(weights(dict(model.named_parameters()))), Path(run))
    save_pipeline(build_pipeline(experiment, model.state_dict(), torch.device("cpu")), place, training, None)
