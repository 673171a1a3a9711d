"""One trial: its training, its loss on held-out images, and the outcome, which is stored in its folder.

The outcome of a trial:

    trained       the held-out loss of its averaged weights is below that of the best constant prediction
    no better     it is not: predicting a single image for all samples at a time would do as well
    not finite    its loss or gradient was not finite, and it ended at that step

The last two count as diverged.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dia_diffusion.data import ImageSet, open_images
from dia_diffusion.errors import DivergedError, InputError, Stopped
from dia_diffusion.io import verify_checksum, with_checksum, write_json
from dia_diffusion.noise import NoiseProcess
from dia_diffusion.progress import Progress
from dia_diffusion.reading import read_json_object
from dia_diffusion.sampling.load import load_pipeline
from dia_diffusion.sweeps.sweep import Run
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.diffusion import image_losses, training_batch
from dia_diffusion.training.randomness import RANDOMNESS, StepDraws, draw_step
from dia_diffusion.training.recipe import changed_keys
from dia_diffusion.training.run_folder import RunFolder, read_metrics
from dia_diffusion.training.trainer import Trainer

TRAINED, NO_BETTER, NOT_FINITE = "trained", "no better", "not finite"
RESULT_FILE = "trial.json"
LAST_PART = 0.1
"""A trial's training loss is the mean loss over this last fraction of its steps."""

Result = dict[str, Any]


@dataclass(frozen=True)
class HeldOut:
    """Held-out images, each with one noise at the same times; identical for all trials."""

    source: str | None
    """Source of the images; None is the test split of the training data."""
    images: ImageSet
    count: int
    """Number of images: the first ones that seed 0 draws, flipped as in training."""
    num_times: int
    """Number of times: the midpoints of this many equally likely intervals."""

    def described(self) -> dict[str, Any]:
        """The images and the number of times, for records."""
        return {"images_fingerprint": self.images.fingerprint, "images": self.count, "times": self.num_times}

    def losses(self, experiment: Experiment) -> tuple[float, float]:
        """The mean loss of a finished training's averaged weights, and that of the best constant prediction."""
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
    """At most `count` held-out images, from `source` or from the test split of the training data.

    Raises:
        InputError: no such images, or a class-conditional model's classes are missing.
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
    return HeldOut(source, images, min(count, len(images)), num_times)


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


def train_trials(experiments: Sequence[Experiment], held_out: HeldOut, progress: Progress) -> None:
    """Trains recipes one after the other in this process, and writes each result into the recipe's folder.

    Raises:
        InputError: a recipe is refused, or its folder contains another run.
        RunError: a training fails for a reason other than divergence.
        Stopped: after SIGINT or SIGTERM; the same call resumes from there.
    """
    for experiment in experiments:
        result: Result = {"recipe": experiment.to_dict(), "randomness": RANDOMNESS, "held_out": held_out.described()}
        trainer = Trainer(experiment, progress)
        try:
            trainer.run()
        except DivergedError as error:
            result |= {"outcome": NOT_FINITE, "not_finite_at": error.step, "held_out_loss": None, "constant_loss": None}
        else:
            loss, constant = held_out.losses(experiment)
            outcome = TRAINED if loss < constant else NO_BETTER  # false for a non-finite loss, too
            finite = loss if math.isfinite(loss) else None
            result |= {"outcome": outcome, "not_finite_at": None, "held_out_loss": finite, "constant_loss": constant}
        result["training_loss"] = _last_loss(trainer.folder, experiment.train.max_steps)
        write_json(trainer.folder.path / RESULT_FILE, with_checksum(result))
        progress.message(f"{trainer.folder.path}: {result['outcome']}")
        if trainer.stop.received:  # during the last step, which still completed
            raise Stopped(trainer.stop.received, "stopped after a trial; the same command resumes from there")


def _last_loss(folder: RunFolder, max_steps: int) -> float | None:
    """The mean training loss over the last tenth of the steps; None if the training ended earlier."""
    lines = read_metrics(folder.metrics) if folder.metrics.is_file() else []
    lines = [line for line in lines if line["step"] > max_steps * (1 - LAST_PART)]
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    return sum(losses) / len(losses) if losses else None


def finished(trial: Run, held_out: HeldOut | None = None) -> Result | None:
    """A trial's result with its label under `trial`; None if it has none yet.

    Raises:
        InputError: the result has another recipe or other held-out images, or can't be read.
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
    return {"trial": trial.label, **result}
