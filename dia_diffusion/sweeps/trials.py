"""Sweeps of many short trainings, compared by their loss on held-out images: stability and placement.

Stability asks which unit still trains in a network with a part taken out, at which learning rate (arXiv 2210.16101,
VI-A2 and Fig. 14). The paper takes BatchNorm, augmentation and skip connections from classifiers; a UViT has no
BatchNorm, so it loses its long skips, its residual additions or its LayerNorms.

Placement asks which blocks need the unit: the first k, or all but the in, middle or out blocks. The paper's Fig. 10
puts the unit into more and more blocks of a classifier, its Table XV removes it from one stage; a UViT has one stage
with three parts.

The outcome of a trial:

    trained       the held-out loss of its averaged weights is below that of the best constant
    no better     it is not: predicting one image, the same for all samples of a time, would do as well
    not finite    its loss or gradient was not, and it ended at that step

The last two count as diverged.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dia_diffusion.data import ImageSet, open_images
from dia_diffusion.errors import DivergedError, InputError
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.io import verify_checksum, with_checksum, write_json
from dia_diffusion.noise import NoiseProcess
from dia_diffusion.reading import read_json_object
from dia_diffusion.sampling.load import load_pipeline
from dia_diffusion.sweeps.collect import measured
from dia_diffusion.sweeps.launcher import Job, Progress, run_jobs
from dia_diffusion.sweeps.stats import estimate_if_any
from dia_diffusion.sweeps.sweep import Run, resolve_precision
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
"""Of the steps; their mean loss is a trial's training loss."""
LINES = 100
"""Of a trial's metrics.jsonl."""
INDIVIDUAL = "-individual"
VARIANTS: dict[str, dict[str, Any]] = {
    "as-is": {},
    "no-long-skips": {"model.long_skips": False},
    "no-residuals": {"model.residual_skips": False},
    "no-layer-norm": {"model.layer_norm": False},
}
# The whole rate from the first step to the last: a warm-up or a falling rate would hide the divergence.
SCHEDULE = {"optimizer.schedule": "constant", "optimizer.warmup_steps": 0}

Result = dict[str, Any]


@dataclass(frozen=True)
class HeldOut:
    """Held-out images, each with one noise at the same times, alike for all trials."""

    images: ImageSet
    count: int
    """Images; the first that seed 0 draws, flipped as in training."""
    num_times: int
    """The middles of this many equally likely parts of time."""

    def described(self) -> dict[str, Any]:
        """For records: which images, and how many times."""
        return {"images_fingerprint": self.images.fingerprint, "images": self.count, "times": self.num_times}

    def losses(self, experiment: Experiment) -> tuple[float, float]:
        """The mean loss of the averaged weights of a finished training, and that of the best constant."""
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


def open_held_out(experiment: Experiment, source: str | None, count: int, num_times: int) -> HeldOut:
    """The held-out images: those of `source`, or the test split of the training data; at most `count` of them.

    Raises:
        InputError: no such images, or the classes of a class-conditional model are missing.
    """
    model = experiment.model
    data, split = source or experiment.data.source, "train" if source else "test"
    try:
        images = open_images(data, size=model.sample_size, channels=model.in_channels, split=split)
    except InputError as error:
        hint = "; --held-out SOURCE gives others" if source is None else ""
        raise InputError(f"held-out images: {error}{hint}") from None
    if model.num_classes is not None and images.labels is None:
        raise InputError(f"held-out images {images.name} have no classes, which model.num_classes needs")
    return HeldOut(images, min(count, len(images)), num_times)


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
    """Loss of the best constant predictor: the target's variance over images, weighted.

    draws: with the same time for all images.
    """
    timestep = process.timestep(draws.uniform)
    _, target = process.mix(images, draws.noise.to(images), timestep)  # (B, C, H, W)
    return target.cpu().double().var(dim=0, correction=1).mean() * process.loss_weight(timestep)[0].to(images.dtype)


def base_recipe(name: str, config: str, keys: dict[str, Any]) -> Experiment:
    """The recipe of trials that differ in folder, seed and rate alone; raises InputError with the name."""
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
        "max_skipped_steps": 1,  # the first one is the outcome
    }
    return override(experiment, {f"train.{key}": value for key, value in loop.items()})


def make_trial(
    name: str, label: dict[str, Any], folder: Path, base: Experiment, seed: int, rate: float | None = None
) -> Run:
    """A trial of this recipe, seed and learning rate (None: the recipe's), in a folder `name`."""
    keys = {"output": str(folder / name), "seed": seed}
    if rate is not None:
        keys["optimizer.learning_rate"] = rate
    return Run(name, label, override(base, keys))


def unit_keys(unit: str) -> dict[str, Any]:
    """The recipe keys of a unit by name; se-individual is the unit se with its own parameters in each block."""
    if unit.endswith(INDIVIDUAL):
        kwargs = {"sharing": "individual"}
        return {"model.attention": unit.removesuffix(INDIVIDUAL), "model.attention_kwargs": kwargs}
    return {"model.attention": unit}


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
) -> list[Run]:
    """Every unit in every variant at every rate, seed by seed, so that an interrupted sweep has whole comparisons.

    keys: further recipe keys, of all trials.

    Raises:
        InputError: an unknown variant or unit, or a value that the recipe refuses.
    """
    if unknown := [name for name in variants if name not in VARIANTS]:
        raise InputError(f"each of `--variants` must be one of {', '.join(VARIANTS)}, got {unknown[0]!r}")
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
                label = {"variant": variant, "unit": unit, "learning_rate": rate, "seed": seed}
                trials.append(make_trial(f"{variant}-{unit}-lr{rate:g}-s{seed}", label, folder, base, seed, rate))
    return _buildable(trials)


def placements(num_layers: int) -> dict[str, list[int]]:
    """Name -> the blocks that carry the unit, counted from 0: the first 0 to L, then all but those of one part."""
    half, blocks = num_layers // 2, range(num_layers)
    parts = {"in": blocks[:half], "mid": blocks[half : half + 1], "out": blocks[half + 1 :]}
    first = {f"first-{count}": [*blocks[:count]] for count in range(num_layers + 1)}
    return first | {
        f"without-{name}": [block for block in blocks if block not in part] for name, part in parts.items() if part
    }


def placement_trials(
    folder: Path, config: str, *, unit: str, seeds: Sequence[int], steps: int, keys: dict[str, Any]
) -> list[Run]:
    """Every distinct placement, seed by seed, so that an interrupted sweep has whole comparisons.

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
        if blocks not in [others for others, _ in bases.values()]:  # all but the out blocks are the first ones
            with_unit = {**unit_keys(unit), "model.attention_blocks": blocks} if blocks else unit_keys("none")
            bases[name] = blocks, base_recipe(name, config, {**common, **with_unit})
    return _buildable(
        make_trial(f"{name}-s{seed}", {"unit": unit, "blocks": blocks, "seed": seed}, folder, base, seed)
        for seed in seeds
        for name, (blocks, base) in bases.items()
    )


def _buildable(trials: Iterable[Run]) -> list[Run]:
    """The trials; raises InputError, with the trial's name, for a network that can't be built."""
    trials, checked = list(trials), []
    for trial in trials:
        if trial.experiment.model not in checked:
            checked.append(trial.experiment.model)
            try:
                check_samples(trial.experiment)
            except InputError as error:
                raise InputError(f"{trial.name}: {error}") from None
    return trials


def finished(trial: Run, held_out: HeldOut | None = None) -> Result | None:
    """A trial's result; None if it has none yet.

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


def run_trials(trials: Sequence[Run], held_out: HeldOut, progress: Progress) -> list[Result]:
    """The results of all trials, in their order; those without one are trained, one after the other in this process.

    progress: in steps.

    Raises:
        InputError: a trial is refused, or its folder holds another; or some are to be trained beside others of another
            version's randomness.
        RunError: a training fails otherwise than by diverging.
        Stopped: after SIGINT or SIGTERM; the same call resumes from there.
    """
    results = [finished(trial, held_out) for trial in trials]
    origins = [r or newest_state(RunFolder(t.folder).checkpoints) for t, r in zip(trials, results, strict=True)]
    if None in results:
        for trial, origin in zip(trials, origins, strict=True):
            if origin is not None:
                refuse_other_randomness(origin, trial.folder)
    trials, _ = resolve_precision(trials, origins)
    total = sum(trial.max_steps for trial in trials)
    done = sum(trial.max_steps for trial, result in zip(trials, results, strict=True) if result is not None)
    progress(done, total, "")
    for index, trial in enumerate(trials):
        if results[index] is None:
            results[index] = _run(trial, held_out, _Steps(trial.name, done, total, progress))
            done += trial.max_steps
            progress(done, total, trial.name)
    return [result for result in results if result is not None]


class _Steps(Callback):
    """Reports the steps of a trial."""

    def __init__(self, name: str, before: int, total: int, progress: Progress):
        self.name, self.before, self.total, self.progress = name, before, total, progress

    def __call__(self, trainer: Trainer, result: StepResult) -> None:
        self.progress(self.before + min(trainer.step, trainer.config.max_steps - 1), self.total, self.name)


def _run(trial: Run, held_out: HeldOut, steps: _Steps) -> Result:
    """Trains a trial and writes its result."""
    result: Result = {"trial": trial.label, "recipe": trial.experiment.to_dict(), "randomness": RANDOMNESS}
    result["held_out"] = held_out.described()
    try:
        Trainer(trial.experiment, callbacks=[steps]).run()
    except DivergedError as error:
        result |= {"outcome": NOT_FINITE, "not_finite_at": error.step, "held_out_loss": None, "constant_loss": None}
    else:
        loss, constant = held_out.losses(trial.experiment)
        outcome = TRAINED if loss < constant else NO_BETTER  # a loss that is not finite isn't below either
        finite = loss if math.isfinite(loss) else None
        result |= {"outcome": outcome, "not_finite_at": None, "held_out_loss": finite, "constant_loss": constant}
    result["training_loss"] = _last_loss(trial)
    write_json(trial.folder / RESULT_FILE, with_checksum(result))
    return result


def _last_loss(trial: Run) -> float | None:
    """The mean training loss over the last tenth of the steps; None if the training ended before them."""
    metrics = RunFolder(trial.folder).metrics
    lines = read_metrics(metrics) if metrics.is_file() else []
    lines = [line for line in lines if line["step"] > trial.max_steps * (1 - LAST_PART)]
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    return sum(losses) / len(losses) if losses else None


def measure_trials(
    trials: Sequence[Run],
    results: Sequence[Result],
    protocol: EvalProtocol,
    name: str,
    progress: Callable[[int, int], None],
) -> str:
    """Adds its `distance` to the result of each trial that trained; those on record are not measured again.

    name: of the protocol or its file, as `fid --protocol` takes it.
    progress: called with trials measured, of how many.

    Returns:
        What the distance is, as "FD(digits), 596 samples".

    Raises:
        InputError, RunError, Stopped: see `run_jobs`.
    """
    trained = [trial for trial, result in zip(trials, results, strict=True) if result["outcome"] == TRAINED]
    on_record = {one.run.name for one in measured(trained, protocol) if one.is_last}
    missing = [trial for trial in trained if trial.name not in on_record]
    done = len(on_record)

    def check(job: Job) -> None:
        nonlocal done
        done += 1
        progress(done, len(trained))

    jobs = [Job(trial.folder, [["fid", str(trial.folder), "--protocol", name]]) for trial in missing]
    run_jobs(jobs, 1, check=check)
    records = {one.run.name: one.record for one in measured(trained, protocol) if one.is_last}
    for trial, result in zip(trials, results, strict=True):
        if record := records.get(trial.name):
            result["distance"] = record.distance
    last = next(reversed(records.values()), None)
    return f"distance by {protocol.name}" if last is None else f"{last.metric}, {last.protocol.num_samples:,} samples"


def summarize_stability(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row for each variant, unit and rate: the seeds' outcomes, and the mean held-out loss of those that trained."""
    groups: dict[tuple[str, str, float], list[Result]] = defaultdict(list)
    for result in results:
        label = result["trial"]
        groups[label["variant"], label["unit"], label["learning_rate"]].append(result)
    rows = []
    for (variant, unit, rate), group in groups.items():
        losses = [result["held_out_loss"] for result in group if result["outcome"] == TRAINED]
        found = estimate_if_any(losses)
        rows.append(
            {
                "variant": variant,
                "unit": unit,
                "learning_rate": rate,
                "seeds": len(group),
                "outcomes": [result["outcome"] for result in group],
                "not_finite_at": sorted(r["not_finite_at"] for r in group if r["outcome"] == NOT_FINITE),
                "held_out_loss": found.mean if found else None,
                "half_width": found.half_width if found else None,
            }
        )
    return rows


def summarize_placement(results: Sequence[Result], num_layers: int) -> list[dict[str, Any]]:
    """A row for each placement: mean and interval over seeds of the held-out loss, and of the distance if measured.

    A placement with two names has two rows. Diverged trials are counted and left out of the means.
    """
    rows = []
    for name, blocks in placements(num_layers).items():
        group = [result for result in results if result["trial"]["blocks"] == blocks]
        trained = [result for result in group if result["outcome"] == TRAINED]
        row = {"placement": name, "blocks": blocks, "seeds": len(group), "diverged": len(group) - len(trained)}
        for key in ("held_out_loss", "distance"):
            values = [result[key] for result in trained if result.get(key) is not None]
            row[key] = values
            found = estimate_if_any(values)
            row |= {f"{key}_mean": found and found.mean, f"{key}_half_width": found and found.half_width}
        rows.append(row)
    return rows
