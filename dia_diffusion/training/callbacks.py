"""Callbacks after a step: metrics, progress and checkpoints here; grids, tests and saved models in each task.

Pass your own to the trainer: `Trainer(experiment, callbacks=[MyCallback()])`. To add a metric, register it in METRICS.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from dia_diffusion.distributed import peak_memory
from dia_diffusion.registry import Registry

if TYPE_CHECKING:
    from dia_diffusion.training.trainer import StepResult, Trainer


class Callback:
    """Called after steps, on all ranks, in order; before the step's checkpoint, if it has one.

    A resumed run repeats the steps since the last checkpoint, and calls their callbacks again.
    """

    after_checkpoint = False
    """Whether to call this after the step's checkpoint, for slow work. If the run is killed meanwhile, the call is not
    repeated; `start` has to compensate."""

    def start(self, trainer: "Trainer") -> None:
        """Called before the first step of this process; trainer.step steps are done."""

    def due(self, step: int) -> bool:
        """Whether to call this after this many steps."""
        return True

    def __call__(self, trainer: "Trainer", result: "StepResult") -> None:
        """Called after each step at which it is due."""

    def end(self, trainer: "Trainer", error: Exception | None) -> None:
        """Called at the end. error: Stopped (by a signal), DivergedError, or None for a finished run."""


METRICS: Registry[Callable[["Trainer", "StepResult"], float]] = Registry("training metric")
"""A step's values for metrics.jsonl and the trackers, every train.log_every steps; a non-finite value becomes null."""

METRICS.register("loss", lambda trainer, result: float(result.loss))
METRICS.register("grad_norm", lambda trainer, result: float(result.grad_norm))
METRICS.register("lr", lambda trainer, result: trainer.optimizer.param_groups[0]["lr"])
METRICS.register("skipped_steps", lambda trainer, result: int(trainer.finite.skipped))
METRICS.register("peak_memory_mib", lambda trainer, result: round(peak_memory(trainer.accelerator.device) / 2**20))


class LogMetrics(Callback):
    """Logs METRICS of the step, and images per second since the last line."""

    def __init__(self, every: int):
        self.every = every

    def start(self, trainer: "Trainer") -> None:
        self.skipped_steps = int(trainer.finite.skipped)
        self.time, self.step = time.perf_counter(), trainer.step

    def due(self, step: int) -> bool:
        return step % self.every == 0

    def __call__(self, trainer: "Trainer", result: "StepResult") -> None:
        trainer.check_finite()
        values = {name: metric(trainer, result) for name, metric in METRICS.items()}
        if (skipped_steps := int(trainer.finite.skipped)) > self.skipped_steps:
            self.skipped_steps = skipped_steps
            trainer.message(f"step {trainer.step:,}: {self.skipped_steps:,} non-finite steps skipped so far")
        now, images = time.perf_counter(), (trainer.step - self.step) * trainer.config.batch_size
        values["images_per_second"] = round(images / (now - self.time - trainer.seconds_in_callbacks), 3)
        self.time, self.step, trainer.seconds_in_callbacks = now, trainer.step, 0.0
        trainer.log(values)
        trainer.logged = values


def log_image(trainer: "Trainer", name: str, image: np.ndarray) -> None:
    """Sends an image (H, W, 3), uint8, to the trackers that support images; on rank 0."""

    def send(tracker: Any) -> None:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: image[None]}, step=trainer.step, **layout)

    trainer.track(send)


class ShowProgress(Callback):
    """Moves the progress bar."""

    def start(self, trainer: "Trainer") -> None:
        if trainer.accelerator.is_main_process:
            trainer.progress.resume("training", "steps", trainer.step, trainer.config.max_steps)

    def __call__(self, trainer: "Trainer", result: "StepResult") -> None:
        if trainer.accelerator.is_main_process:
            loss = trainer.logged.get("loss")
            note = "" if loss is None else f"loss {loss:.4f}"
            trainer.progress.update("training", "steps", trainer.step, trainer.config.max_steps, note)


class SaveCheckpoint(Callback):
    """Saves checkpoints."""

    def __init__(self, config: Any):
        self.config = config

    def due(self, step: int) -> bool:
        return checkpoint_due(self.config, step)

    def __call__(self, trainer: "Trainer", result: "StepResult") -> None:
        trainer.save_checkpoint()


def checkpoint_due(config: Any, step: int) -> bool:
    """Whether train.checkpoint_every or train.max_steps requires a checkpoint after this many steps."""
    return bool(step == config.max_steps or step % config.checkpoint_every == 0)
