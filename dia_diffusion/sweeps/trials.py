"""Trials: many short trainings that are compared by their loss on held-out images, each a run folder with its result.

How a trial ends, its outcome:

    trained       the held-out loss of its averaged weights is below that of the best constant
    no better     it is not: predicting one image, the same for all samples of a time, would do as well
    not finite    its loss or gradient was not, and it ended at that step

The last two are what is called diverged.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dia_diffusion.data import ImageSet, open_images
from dia_diffusion.errors import DivergedError, InputError
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.evaluation.record import EvaluationRecord, read_records
from dia_diffusion.io import verify_checksum, with_checksum, write_json
from dia_diffusion.noise import NoiseProcess
from dia_diffusion.precision import in_precision, training_device, training_precision
from dia_diffusion.reading import read_json_object
from dia_diffusion.sampling.load import load_pipeline
from dia_diffusion.sweeps.launcher import Job, run_jobs
from dia_diffusion.sweeps.stats import estimate
from dia_diffusion.training.callbacks import Callback
from dia_diffusion.training.checkpoint import newest_state
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.diffusion import check_samples, image_losses, training_batch
from dia_diffusion.training.randomness import RANDOMNESS, StepDraws, draw_step
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


@dataclass(frozen=True)
class HeldOut:
    """Held-out images, each with one noise at the same times, alike for all trials."""

    images: ImageSet
    count: int
    """Images; the first that seed 0 draws, flipped as in training."""
    num_times: int
    """The middles of so many equally likely parts of time."""

    def described(self) -> dict[str, Any]:
        """For records: which images, and how many times."""
        return {"images_fingerprint": self.images.fingerprint, "images": self.count, "times": self.num_times}

    def losses(self, experiment: Experiment) -> tuple[float, float]:
        """The mean loss of the averaged weights that a training has left, and that of the best constant."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        draws = draw_step(0, 0, self.count, len(self.images), self.images.shape)
        images, labels = training_batch(self.images, experiment, draws, device, torch.float32)
        process, model = experiment.noise_process(), load_pipeline(experiment.output, device).unet
        of_model, of_constant = [], []
        for number in range(self.num_times):
            time = torch.full((self.count,), (number + 0.5) / self.num_times)
            at_time = replace(draws, uniform=time)
            of_model.append(_model_loss(model, process, images, at_time, labels))
            of_constant.append(constant_loss(process, images, at_time))
        return float(torch.stack(of_model).mean()), float(torch.stack(of_constant).mean())


@torch.no_grad()
def _model_loss(
    model: nn.Module, process: NoiseProcess, images: Tensor, draws: StepDraws, labels: Tensor | None
) -> Tensor:
    parts = []
    for start in range(0, len(images), 64):
        part = slice(start, start + 64)
        own = None if labels is None else labels[part]
        parts.append(image_losses(model, process, images[part], draws.slice(start, start + 64), own))
    return torch.cat(parts).cpu().double().mean()


def constant_loss(process: NoiseProcess, images: Tensor, draws: StepDraws) -> Tensor:
    """The least mean loss of whoever doesn't look at the sample: the target's variance over images, weighted.

    draws: with one and the same time for all images.
    """
    timestep = process.timestep(draws.uniform)
    _, target = process.mix(images, draws.noise.to(images), timestep)  # (B, C, H, W)
    return target.cpu().double().var(dim=0, correction=1).mean() * process.loss_weight(timestep)[0].to(images.dtype)


def open_held_out(experiment: Experiment, source: str | None, count: int, num_times: int) -> HeldOut:
    """The held-out images: those of `source`, or the test part of what is trained on; `count` of them at most.

    Raises:
        InputError: no such images, or the classes of a class-conditional model are missing.
    """
    model = experiment.model
    place, split = source or experiment.data.source, "train" if source else "test"
    try:
        images = open_images(place, size=model.sample_size, channels=model.in_channels, split=split)
    except InputError as error:
        hint = "; --held-out SOURCE gives others" if source is None else ""
        raise InputError(f"held-out images: {error}{hint}") from None
    if model.num_classes is not None and images.labels is None:
        raise InputError(f"held-out images {images.name} have no classes, which model.num_classes needs")
    return HeldOut(images, min(count, len(images)), num_times)


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


def measure_trials(
    trials: Sequence[Trial],
    results: Sequence[dict[str, Any]],
    protocol: EvalProtocol,
    given: str,
    watch: Callable[[int, int], None],
) -> str:
    """Puts the distance of each trial that trained into its result; those on record are not measured again.

    protocol, given: the protocol and how it was named.
    watch: called with trials measured, of how many.

    Returns:
        What the distance is, as "FD(digits), 596 samples".

    Raises:
        InputError, RunError, Stopped: see `run_jobs`.
    """
    trained = [(t, result) for t, result in zip(trials, results, strict=True) if result["outcome"] == TRAINED]
    missing = [trial for trial, _ in trained if _record(trial, protocol) is None]
    jobs = [Job(trial.folder, [["fid", str(trial.folder), "--protocol", given]]) for trial in missing]
    done = len(trained) - len(missing)

    def check(job: Job) -> None:
        nonlocal done
        done += 1
        watch(done, len(trained))

    run_jobs(jobs, 1, lambda running: None, check)
    name = f"distance by {protocol.name}"
    for trial, result in trained:
        record = _record(trial, protocol)
        if record is not None:
            result["distance"] = record.distance
            name = f"{record.metric}, {record.protocol.num_samples:,} samples"
    return name


def _record(trial: Trial, protocol: EvalProtocol) -> EvaluationRecord | None:
    """The newest record of a trial's last step."""
    file = RunFolder(trial.folder).evaluations
    records = read_records(file) if file.is_file() else []
    protocol.refuse_changed(records, file)
    own = [r for r in records if protocol.named_in(r) and r.step == trial.experiment.train.max_steps]
    return own[-1] if own else None


VARIANTS: dict[str, dict[str, Any]] = {
    "as-is": {},
    "no-long-skips": {"model.long_skips": False},
    "no-residuals": {"model.residual_skips": False},
    "no-layer-norm": {"model.layer_norm": False},
}
UNITS = ("none", "dia-lstm", "dia-lstm-light", "se-individual")
# The whole rate from the first step to the last: a warm-up or a falling rate would hide what is asked.
SCHEDULE = {"optimizer.schedule": "constant", "optimizer.warmup_steps": 0}


def stability_trials(
    folder: Path,
    config: str,
    *,
    variants: Sequence[str],
    units: Sequence[str],
    rates: Sequence[float],
    seeds: Sequence[int],
    batch_size: int,
    steps: int,
    keys: dict[str, Any],
) -> list[Trial]:
    """Every unit in every variant at every rate, seed by seed, so that an early end leaves whole comparisons.

    keys: further recipe keys, of all trials.

    Raises:
        InputError: an unknown variant or unit, or a value that the recipe refuses.
    """
    if unknown := [name for name in variants if name not in VARIANTS]:
        raise InputError(f"unknown variant {unknown[0]!r}; accepted: {', '.join(VARIANTS)}")
    common = {"train.batch_size": batch_size, "train.max_steps": steps, **SCHEDULE, **keys}
    bases = {
        (variant, unit): base_recipe(f"{variant}-{unit}", config, {**common, **VARIANTS[variant], **unit_keys(unit)})
        for variant in variants
        for unit in units
    }
    trials = []
    for seed in seeds:
        for rate in rates:
            for (variant, unit), base in bases.items():
                about = {"variant": variant, "unit": unit, "learning_rate": rate, "seed": seed}
                trials.append(make_trial(f"{variant}-{unit}-lr{rate:g}-s{seed}", about, folder, base, seed, rate))
    check_trials(trials)
    return trials


def summarise_stability(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each variant, unit and rate: the seeds' outcomes, and the mean held-out loss of those that trained."""
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        about = result["trial"]
        groups[about["variant"], about["unit"], about["learning_rate"]].append(result)
    rows = []
    for (variant, unit, rate), found in groups.items():
        trained = [result["held_out_loss"] for result in found if result["outcome"] == TRAINED]
        rows.append(
            {
                "variant": variant,
                "unit": unit,
                "learning_rate": rate,
                "seeds": len(found),
                "outcomes": [result["outcome"] for result in found],
                "not_finite_at": sorted(r["not_finite_at"] for r in found if r["outcome"] == NOT_FINITE),
                "held_out_loss": estimate(trained).mean if trained else None,
                "half_width": estimate(trained).half_width if trained else None,
            }
        )
    return rows


def placements(num_layers: int) -> dict[str, list[int]]:
    """Name -> the blocks that carry the unit, counted from 0: the first 0 to L, then all but those of one part."""
    half = num_layers // 2
    parts = {"in": range(half), "mid": range(half, half + 1), "out": range(half + 1, num_layers)}
    first = {f"first-{count}": list(range(count)) for count in range(num_layers + 1)}
    without = {
        f"without-{part}": [block for block in range(num_layers) if block not in blocks]
        for part, blocks in parts.items()
        if len(blocks)
    }
    return first | without


def placement_trials(
    folder: Path,
    config: str,
    *,
    unit: str,
    seeds: Sequence[int],
    steps: int,
    keys: dict[str, Any],
) -> list[Trial]:
    """Every placement that is unlike the others, seed by seed, so that an early end leaves whole comparisons.

    keys: further recipe keys, of all trials.

    Raises:
        InputError: an unknown unit, or a value that the recipe refuses.
    """
    common = {"train.max_steps": steps, **keys}
    bases: dict[str, tuple[list[int], Experiment]] = {}
    model = read_experiment(config, keys=keys).to_dict()["model"]
    if "num_layers" not in model:
        raise InputError(f"`model.backbone` must be uvit for placements, got {model['backbone']!r}")
    for name, blocks in placements(model["num_layers"]).items():
        if blocks in [others for others, _ in bases.values()]:  # all but the out blocks are the first ones
            continue
        with_unit = {**unit_keys(unit), "model.attention_blocks": blocks} if blocks else unit_keys("none")
        bases[name] = blocks, base_recipe(name, config, {**common, **with_unit})
    trials = [
        make_trial(f"{name}-s{seed}", {"unit": unit, "blocks": blocks, "seed": seed}, folder, base, seed)
        for seed in seeds
        for name, (blocks, base) in bases.items()
    ]
    check_trials(trials)
    return trials


def summarise_placement(results: Sequence[dict[str, Any]], num_layers: int) -> list[dict[str, Any]]:
    """A row for each placement: mean and interval over seeds of the held-out loss, and of the distance where measured.

    A placement that is two at once has two rows. Diverged trials are counted and left out of the means.
    """
    groups: dict[tuple[int, ...], list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        groups[tuple(result["trial"]["blocks"])].append(result)
    rows = []
    for name, blocks in placements(num_layers).items():
        found = groups.get(tuple(blocks), [])
        trained = [result for result in found if result["outcome"] == TRAINED]
        row: dict[str, Any] = {"placement": name, "blocks": blocks, "seeds": len(found)}
        row["diverged"] = len(found) - len(trained)
        for key in ("held_out_loss", "distance"):
            values = [result[key] for result in trained if result.get(key) is not None]
            row[key] = values
            row[f"{key}_mean"] = estimate(values).mean if values else None
            row[f"{key}_half_width"] = estimate(values).half_width if values else None
        rows.append(row)
    return rows
