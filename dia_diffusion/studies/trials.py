"""Trials: many short trainings that are compared by their loss on held-out images, each a run folder with its result.

How a trial ends, its outcome:

    trained       the held-out loss of its averaged weights is below that of the best constant
    no better     it is not: predicting one image, the same for all samples of a time, would do as well
    not finite    its loss or gradient was not, and it ended at that step

The last two are what is called diverged.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dia_diffusion.errors import DivergedError, InputError
from dia_diffusion.io import verify_checksum, with_checksum, write_json
from dia_diffusion.precision import in_precision, training_device, training_precision
from dia_diffusion.reading import read_json_object
from dia_diffusion.studies.held_out import HeldOut
from dia_diffusion.training.callbacks import Callback
from dia_diffusion.training.checkpoint import newest_state
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.diffusion import check_samples
from dia_diffusion.training.randomness import RANDOMNESS
from dia_diffusion.training.recipe import changed_keys, override, read_experiment
from dia_diffusion.training.run_folder import RunFolder, read_metrics, refuse_other_randomness
from dia_diffusion.training.trainer import StepResult, Trainer

TRAINED, NO_BETTER, NOT_FINITE = "trained", "no better", "not finite"
RESULT_FILE = "trial.json"
LAST_PART = 0.1
"""Of the steps, whose mean loss is a trial's training loss."""
LINES = 100
"""Of a trial's metrics.jsonl."""
INDIVIDUAL = "-individual"

Watch = Callable[[int, int, str], None]
"""Called with steps done, of how many, and the trial under way."""


@dataclass(frozen=True)
class Trial:
    """One training."""

    name: str
    """Its folder among the others."""
    about: dict[str, Any]
    """What tells it from the others, for records and figures."""
    experiment: Experiment
    """Its recipe; `output` is the run's folder."""

    @property
    def folder(self) -> Path:
        return Path(self.experiment.output)


def base_recipe(name: str, config: str, keys: dict[str, Any]) -> Experiment:
    """The recipe of trials that differ in folder, seed and rate alone: keys over a recipe, and no output but a result.

    Raises:
        InputError: the recipe or a key is refused; told with the name.
    """
    try:
        experiment = read_experiment(config, keys=keys)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    steps = experiment.train.max_steps
    loop = {
        "log_every": max(1, steps // LINES),
        "checkpoint_every": steps,
        "sample_every": 0,
        "keep_last": 1,
        "max_skipped_steps": 1,  # the first is what is asked for
    }
    return override(experiment, {f"train.{key}": value for key, value in loop.items()})


def make_trial(
    name: str, about: dict[str, Any], folder: Path, base: Experiment, seed: int, rate: float | None = None
) -> Trial:
    """A trial of this recipe, seed and learning rate; None is the recipe's.

    Raises:
        InputError: a seed or rate that isn't accepted.
    """
    keys = {"output": str(folder / name), "seed": seed}
    if rate is not None:
        keys["optimizer.learning_rate"] = rate
    return Trial(name, about, override(base, keys))


def check_trials(trials: Sequence[Trial]) -> None:
    """Raises InputError, with the trial's name, for a network that can't be built, before any is trained."""
    checked = []
    for trial in trials:
        if trial.experiment.model not in checked:
            checked.append(trial.experiment.model)
            try:
                check_samples(trial.experiment)
            except InputError as error:
                raise InputError(f"{trial.name}: {error}") from None


def unit_keys(unit: str) -> dict[str, Any]:
    """The recipe keys of a unit by name; se-individual is the unit se with parameters of its own for each block."""
    if unit.endswith(INDIVIDUAL):
        kwargs = {"sharing": "individual"}
        return {"model.attention": unit.removesuffix(INDIVIDUAL), "model.attention_kwargs": kwargs}
    return {"model.attention": unit}


def finished(trial: Trial, held_out: HeldOut | None = None) -> dict[str, Any] | None:
    """A trial's result, None where it has none yet.

    Raises:
        InputError: it is another recipe's or of other held-out images, or can't be read.
    """
    file = trial.folder / RESULT_FILE
    if not file.is_file():
        return None
    try:
        result = verify_checksum(read_json_object(file))
        before, now = result["recipe"], trial.experiment.to_dict()
        changed = changed_keys(before, trial.experiment)
        if before["train"]["max_steps"] != now["train"]["max_steps"]:
            changed.append(f"train.max_steps: {before['train']['max_steps']} -> {now['train']['max_steps']}")
        if held_out is not None and result["held_out"] != held_out.described():
            changed.append("other --images, --times or --held-out")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{file} is truncated or corrupted; remove it, and the trial is measured again") from None
    if changed:
        raise InputError(f"{trial.folder} holds another trial ({'; '.join(changed)}); choose another --out")
    return dict(result)


def run_trials(trials: Sequence[Trial], held_out: HeldOut, watch: Watch) -> list[dict[str, Any]]:
    """The results of all trials, in their order; those without one are trained, one after the other.

    Raises:
        InputError: a trial is refused, or its folder holds another; or some are to be trained beside others of another
            version's randomness.
        RunError: a training fails otherwise than by diverging.
        Stopped: after SIGINT or SIGTERM; the same call goes on from there.
    """
    results = [finished(trial, held_out) for trial in trials]
    if None in results:
        for trial, result in zip(trials, results, strict=True):
            origin = result or newest_state(RunFolder(trial.folder).checkpoints)
            if origin is not None:
                refuse_other_randomness(origin, trial.folder)
    trials = _in_one_precision(trials, results)
    total = sum(trial.experiment.train.max_steps for trial in trials)
    done = sum(t.experiment.train.max_steps for t, result in zip(trials, results, strict=True) if result is not None)
    for index, trial in enumerate(trials):
        if results[index] is None:
            results[index] = _run(trial, held_out, _Steps(trial.name, done, total, watch))
            done += trial.experiment.train.max_steps
            watch(done, total, trial.name)
    return [result for result in results if result is not None]


def _in_one_precision(trials: Sequence[Trial], results: Sequence[dict[str, Any] | None]) -> list[Trial]:
    """The trials with the precision auto resolved: to that of the results there are, else to the best one here."""
    began_in = next((result["recipe"]["train"]["mixed_precision"] for result in results if result is not None), None)

    def resolved(trial: Trial) -> Trial:
        precision = training_precision(trial.experiment.train.mixed_precision, training_device(), began_in)
        return replace(trial, experiment=in_precision(trial.experiment, precision))

    return [resolved(trial) for trial in trials]


class _Steps(Callback):
    """Reports the steps of a trial."""

    def __init__(self, name: str, before: int, total: int, watch: Watch):
        self.name, self.before, self.total, self.watch = name, before, total, watch

    def __call__(self, trainer: Trainer, result: StepResult) -> None:
        self.watch(self.before + min(trainer.step, trainer.config.max_steps - 1), self.total, self.name)


def _run(trial: Trial, held_out: HeldOut, steps: _Steps) -> dict[str, Any]:
    """Trains a trial and writes its result."""
    recipe = trial.experiment.to_dict()
    result: dict[str, Any] = {"trial": trial.about, "recipe": recipe, "randomness": RANDOMNESS}
    result["held_out"] = held_out.described()
    try:
        Trainer(trial.experiment, callbacks=[steps]).run()
    except DivergedError as error:
        result |= {"outcome": NOT_FINITE, "not_finite_at": error.step, "held_out_loss": None, "constant_loss": None}
    else:
        measured, constant = held_out.losses(trial.experiment)
        outcome = TRAINED if measured < constant else NO_BETTER  # which a loss that is not finite isn't either
        finite = measured if math.isfinite(measured) else None
        result |= {"outcome": outcome, "not_finite_at": None, "held_out_loss": finite, "constant_loss": constant}
    result["training_loss"] = last_loss(RunFolder(trial.folder).metrics, trial.experiment.train.max_steps)
    write_json(trial.folder / RESULT_FILE, with_checksum(result))
    return result


def last_loss(metrics: Path, max_steps: int) -> float | None:
    """The mean training loss over the last tenth of the steps; None where a training ended before them."""
    lines = read_metrics(metrics) if metrics.is_file() else []
    values = [
        line["loss"] for line in lines if line["step"] > max_steps * (1 - LAST_PART) and line.get("loss") is not None
    ]
    return sum(values) / len(values) if values else None
