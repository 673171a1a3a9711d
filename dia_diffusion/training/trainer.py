"""The training loop, for any `Task`: set-up, one optimizer step, and the callbacks that are due after it.

A step depends only on the recipe, the step's number and the weights before it, not on ranks, micro-batches or history.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.tracking import GeneralTracker
from torch import Tensor, nn

from dia_diffusion.distributed import (
    StopSignal,
    broadcast_from_rank_zero,
    check_trackers,
    micro_batch_size,
    on_all_ranks,
    on_rank_zero,
    start_accelerator,
)
from dia_diffusion.environment import environment
from dia_diffusion.errors import DivergedError, InputError, Stopped, first_line
from dia_diffusion.io import write_json
from dia_diffusion.precision import in_precision, slow_warning, training_device, training_precision
from dia_diffusion.progress import Progress
from dia_diffusion.training.callbacks import Callback, LogMetrics, SaveCheckpoint, ShowProgress
from dia_diffusion.training.checkpoint import (
    Checkpoint,
    began_in,
    load_checkpoint,
    load_optimizer,
    load_weights,
    newest_intact_checkpoint,
    optimizer_tensors,
    save_checkpoint,
    set_aside,
)
from dia_diffusion.training.compilation import check_compile, compiled
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.diffusion import DiffusionTask
from dia_diffusion.training.ema import EMA, Average, further_averages
from dia_diffusion.training.finite import FiniteWatch, KeptBuffers, divergence
from dia_diffusion.training.optimizer import learning_rate
from dia_diffusion.training.randomness import RANDOMNESS, WEIGHTS, derive, dropout_seed
from dia_diffusion.training.run_folder import RunFolder, check_new_run, check_resumed_run, check_shared
from dia_diffusion.training.snapshots import SaveSnapshots
from dia_diffusion.training.task import DrawAhead, Draws, Task, describe_images


@dataclass(frozen=True)
class StepResult:
    """The results of a step; the tensors are on the device, and reading one waits for it."""

    loss: Tensor  # () float, mean over the global batch
    grad_norm: Tensor  # () float, before clipping
    skipped: Tensor  # () bool, whether loss or gradient was not finite and the update was skipped


class Trainer:
    """A run: trains, logs, saves and resumes.

    Args:
        trained: a recipe, or the task of another kind of training.
        progress: shows the run's progress.
        callbacks: called after the task's own, before or after a step's checkpoint depending on `after_checkpoint`.

    Raises:
        InputError: the recipe, the dataset, the checkpoint or the launch is unsuitable.
    """

    def __init__(
        self, trained: Experiment | Task, progress: Progress | None = None, callbacks: Sequence[Callback] = ()
    ):
        # Recipe: resolve the precision, so that configs, checkpoints and cards state the chosen one.
        self.task = DiffusionTask(trained) if isinstance(trained, Experiment) else trained
        self.progress = Progress() if progress is None else progress
        self.folder = RunFolder(self.task.experiment.output)
        asked, begun = self.task.experiment.train.mixed_precision, began_in(self.folder.checkpoints)
        self.precision = training_precision(asked, training_device(), begun)
        self.experiment = self.task.experiment = in_precision(self.task.experiment, self.precision)
        self.config = config = self.experiment.train

        # Ranks, and this one's share of a global batch.
        check_trackers(self.experiment.trackers)
        self.accelerator: Accelerator = start_accelerator(
            config.mixed_precision, log_with=self.experiment.trackers or None, project_dir=self.experiment.output
        )
        check_compile(config.compile, config.accumulation, self.accelerator.device)
        self.micro_batch = micro_batch_size(config.batch_size, self.accelerator.num_processes, config.accumulation)
        share = self.micro_batch * config.accumulation
        first = self.accelerator.process_index * share
        self.ahead = DrawAhead(self.task.draw, first, first + share)

        # Model: initial weights from the seed, or from init_from if the run is new.
        torch.manual_seed(derive(self.experiment.seed, WEIGHTS))
        self.model = self.task.build_model()
        self.names, self.parameters = map(list, zip(*self.model.named_parameters(), strict=True))
        self.dtype = self.parameters[0].dtype
        self.has_dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.model.modules())
        optimizer = self.task.build_optimizer(self.model)
        new_run = self.folder.newest_checkpoint() is None
        self.started_from = on_all_ranks(
            self.accelerator, lambda: self.task.init_weights(self.model) if new_run else None
        )

        # Images.
        self.images = self.task.open_images(self.accelerator, self.progress)

        ema = self.task.ema
        snapshots = [SaveSnapshots(ema)] if ema is not None and ema.snapshot_every else []
        own = [LogMetrics(config.log_every), ShowProgress(), *snapshots, *self.task.callbacks(), *callbacks]
        own.append(SaveCheckpoint(config))
        self.callbacks: list[Callback] = sorted(own, key=lambda callback: callback.after_checkpoint)
        self.seconds_in_callbacks = 0.0
        """Seconds spent in callbacks since the last logged metrics, without logging itself."""
        self.logged: dict[str, float] = {}
        """The last logged metrics."""
        self.failed_trackers: set[str] = set()

        # Run folder: lock it, then find the newest intact checkpoint, the same on all ranks.
        on_rank_zero(self.accelerator, self.folder.lock)
        try:
            check_shared(self.folder, self.accelerator, self.progress.message)
            name = broadcast_from_rank_zero(self.accelerator, self._find_checkpoint)
            checkpoint = on_all_ranks(self.accelerator, lambda: self._load_weights(name))
            self._prepare(optimizer, checkpoint)
        except BaseException:
            self.folder.unlock()
            raise

    def _find_checkpoint(self) -> str | None:
        place, self.damaged = newest_intact_checkpoint(self.folder.checkpoints)
        return None if place is None else place.name

    def _load_weights(self, name: str | None) -> Checkpoint | None:
        """Loads the weights of the checkpoint of this name into the model; returns None if the run is new."""
        if name is None:
            check_new_run(self.folder, self.experiment)
            return None
        place = self.folder.checkpoints / name
        checked = self.accelerator.is_main_process  # by newest_intact_checkpoint
        checkpoint = load_checkpoint(place, checked)
        check_resumed_run(self.folder.path, self.experiment, self.images.fingerprint, checkpoint.state)
        self.started_from = self.task.check_start(checkpoint.state.get("init_from"))
        load_weights(self.model, checkpoint.tensors["model"], place)
        return checkpoint

    def _prepare(self, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint | None) -> None:
        """Puts network, optimizer and averages on the device, with the checkpoint's state."""
        config, device, state = self.config, self.accelerator.device, {} if checkpoint is None else checkpoint.state
        self.step: int = state.get("step", 0)
        """Optimizer steps done."""
        self.saved_step = self.step
        pays_after = self.task.compiling_pays_after
        network = compiled(self.model, config.compile, config.max_steps, pays_after, device, self.message)
        self.optimizer: AcceleratedOptimizer
        self.network, self.optimizer = self.accelerator.prepare(network, optimizer)
        self.network.train()
        self.buffers = KeptBuffers(self.model)
        scaled = self.accelerator.scaler is not None
        self.finite: FiniteWatch = FiniteWatch(device, config.max_skipped_steps, state.get("skipped_steps", 0), scaled)
        self.ema = None
        self.averages: dict[str, Average] = {}
        """Averages other than the EMA, by name."""
        if self.task.ema is not None:
            self.ema = EMA(self.parameters, self.task.ema, self.task.reference_steps)
            self.averages = further_averages(self.parameters, self.task.ema, self.task.reference_steps)
        if checkpoint is not None:
            if self.ema is not None:
                self.ema.load([checkpoint.tensors["ema"][name] for name in self.names], self.step)
            for kept, average in self.averages.items():
                tensors = checkpoint.tensors["averages"]
                average.load([tensors[f"{kept}/{name}"] for name in self.names], self.step)
            load_optimizer(self.optimizer.optimizer, checkpoint.tensors["optimizer"], self.model)
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["grad_scaler"])

    def run(self) -> None:
        """Trains from the last checkpoint to max_steps.

        Raises:
            Stopped: after SIGINT or SIGTERM, once a checkpoint of the last finished step is written.
            DivergedError: too many consecutive steps without a finite loss and gradient; the last checkpoint is kept.
        """
        try:
            self._start()
            with StopSignal(self.accelerator) as self.stop:
                while self.step < self.config.max_steps:
                    result = self.train_step()
                    for callback in self.callbacks:
                        if callback.due(self.step):
                            self._call(callback, result)
                    if (signal := self.stop.agreed()) and self.step < self.config.max_steps:
                        self.save_checkpoint()
                        raise Stopped(signal, f"stopped after step {self.step:,}; the same command resumes from there")
            self._end(None)
        except (Stopped, DivergedError) as error:
            self._end(error)
            raise
        finally:
            self.folder.unlock()

    def _call(self, callback: Callback, result: StepResult) -> None:
        started = time.perf_counter()
        callback(self, result)
        if not isinstance(callback, LogMetrics):
            self.seconds_in_callbacks += time.perf_counter() - started

    def train_step(self) -> StepResult:
        """One optimizer step on the global batch; with a non-finite loss or gradient, only the step count changes."""
        # Draw this rank's images and noise, a function of the step's number.
        micro_batches = self._draw(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(self.step, group["peak_rate"])

        # Forward and backward, accumulated; ranks average their gradients during the last backward pass.
        self.buffers.keep()
        total = torch.zeros((), device=self.accelerator.device)
        for index, draws in enumerate(micro_batches, start=1):
            with nullcontext() if index == len(micro_batches) else self.accelerator.no_sync(self.network):
                loss = self.task.loss(self.network, draws, total.device, self.dtype) / len(micro_batches)
                self.accelerator.backward(loss)
            total += loss.detach()
        if self.config.clip_grad_norm is None:
            self.accelerator.unscale_gradients(self.optimizer)
            grad_norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        else:
            grad_norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.clip_grad_norm)
        loss = self.accelerator.reduce(total, "mean")

        # Skip the update on all ranks if any has inf or nan; decided on the device, without waiting for it.
        skip = self.finite.note(self.step, loss, grad_norm)

        # Optimizer.
        if self.accelerator.scaler is None:  # fp16's scaler sets it itself
            self.optimizer.optimizer.found_inf = skip.float()  # a fused optimizer then keeps weights and state
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.buffers.put_back(skip)

        # Averages.
        if self.ema is not None:
            self.ema.update(self.parameters, skip)
        for average in self.averages.values():
            average.update(self.parameters, skip)
        # This waits for a GPU, so there it is left to logging and saving. In fp16 the scaler has waited already, and
        # it would apply a finite step that follows a streak of non-finite losses.
        if skip.device.type == "cpu" or self.accelerator.scaler is not None:
            self.check_finite()
        self.step += 1
        return StepResult(loss, grad_norm, skip)

    def _draw(self, step: int) -> list[Draws]:
        """Draws the random numbers of this rank's micro-batches of a step, counted from 0, and seeds its dropout."""
        ahead = self.accelerator.device.type != "cpu" or self.task.reads_files
        draws = self.ahead.draw(step, then_next=ahead and step + 1 < self.config.max_steps)
        if self.has_dropout:  # masks depend on the step and the rank; they can't be slices of a global batch
            torch.manual_seed(dropout_seed(self.experiment.seed, step, self.accelerator.process_index))
        starts = range(0, self.micro_batch * self.config.accumulation, self.micro_batch)
        return [draws.slice(start, start + self.micro_batch) for start in starts]

    def _learning_rate(self, step: int, peak: float) -> float:
        return learning_rate(self.task.optimizer_config, step, self.config.max_steps, peak)

    def check_finite(self) -> None:
        """Raises DivergedError, on all ranks, if too many steps in a row were skipped; waits for the device."""
        streak = self.finite.streak()
        if streak is None:
            return

        def forward() -> None:  # the weights are unchanged since the streak began
            with self.accelerator.autocast():
                for draws in self._draw(streak.step):
                    self.task.loss(self.model, draws, self.accelerator.device, self.dtype)

        rate = self._learning_rate(streak.step, self.optimizer.param_groups[0]["peak_rate"])
        raise divergence(streak, rate, self.model, forward, self.accelerator)

    def _start(self) -> None:
        """Opens folder and trackers, and shows what is trained."""
        on_rank_zero(self.accelerator, self._open_folder)
        config = self.config
        self.message(
            f"{self.images.name}: {len(self.images):,} images; {self.task.description}, "
            f"{sum(p.numel() for p in self.parameters):,} parameters; batch {config.batch_size} = "
            f"{self.accelerator.num_processes} processes x {self.micro_batch} images x {config.accumulation} "
            f"accumulations on {self.accelerator.device}, {self.precision}"
        )
        if warning := slow_warning(self.precision, self.accelerator.device):
            self.message(warning)
        if self.step >= config.max_steps:
            self.message(f"trained to step {self.step:,} already")
        elif self.step:
            self.message(f"resuming from step {self.step:,}")
        elif self.started_from is not None:
            gained = (
                "; they have no unit, so the unit keeps its initial weights" if self.started_from["gained_unit"] else ""
            )
            self.message(f"starting from the weights of {self.started_from['path']}{gained}")
        if self.experiment.trackers:
            on_all_ranks(self.accelerator, self._start_trackers)
        for callback in reversed(self.callbacks):  # reversed, so that LogMetrics' clock starts last
            callback.start(self)

    def _start_trackers(self) -> None:
        try:
            self.accelerator.init_trackers("dia-diffusion")
        except Exception as error:  # of any kind, such as a missing API key
            names = ", ".join(self.experiment.trackers)
            raise InputError(f"`trackers` must be ones that can be started, got {names}: {first_line(error)}") from None

    def _open_folder(self) -> None:
        self.folder.truncate_metrics(self.step)  # first, since it raises if the file is damaged
        self.folder.drop_snapshots(self.step)
        for place, why in self.damaged.items():
            self.message(f"warning: {why}; renamed to {set_aside(place).name}, and the checkpoint before it is used")
        self.folder.write_config(self.experiment)
        if self.step < self.config.max_steps:  # otherwise keep the record of what trained it
            write_json(self.folder.environment, environment(self.accelerator.num_processes))

    def _end(self, error: Exception | None) -> None:
        for callback in self.callbacks:
            callback.end(self, error)
        self.track(lambda tracker: tracker.finish())
        self.accelerator.trackers = []
        self.accelerator.end_training()

    def message(self, line: str) -> None:
        """Shows a line, on rank 0."""
        if self.accelerator.is_main_process:
            self.progress.message(line)

    def log(self, values: Mapping[str, float | None]) -> None:
        """Adds a step's values to metrics.jsonl and the trackers, on all ranks; a non-finite value becomes null."""
        images = self.step * self.config.batch_size
        finite = {name: None if value is None or not math.isfinite(value) else value for name, value in values.items()}
        line = {"images": images, **finite}
        on_rank_zero(self.accelerator, lambda: self.folder.log_metrics({"step": self.step, **line}))
        self.track(lambda tracker: tracker.log(line, step=self.step))

    def track(self, send: Callable[[GeneralTracker], None]) -> None:
        """Sends something to each tracker; training continues if one fails, with a warning the first time."""
        for tracker in self.accelerator.trackers:
            try:
                send(tracker)
            except Exception as error:  # any kind, such as no network connection
                if tracker.name not in self.failed_trackers:
                    self.failed_trackers.add(tracker.name)
                    self.message(f"warning: tracker {tracker.name} failed ({first_line(error)}); training continues")

    def save_checkpoint(self) -> None:
        """Writes a checkpoint of this step, called on all ranks, unless there is one.

        A step that was interrupted before its checkpoint is repeated when the run resumes.
        """
        self.check_finite()
        if self.saved_step == self.step:
            return
        on_rank_zero(self.accelerator, self._save_checkpoint)
        self.saved_step = self.step

    def _save_checkpoint(self) -> None:
        scaler, average = self.accelerator.scaler, self.averaged_weights()
        further = {
            f"{kept}/{name}": tensor
            for kept, other in self.averages.items()
            for name, tensor in zip(self.names, other.parameters, strict=True)
        }
        checkpoint = Checkpoint(
            tensors={
                "model": self.model.state_dict(),
                **({} if average is None else {"ema": average}),
                **({"averages": further} if further else {}),
                "optimizer": optimizer_tensors(self.optimizer.optimizer, self.model),
            },
            state={
                **self.origin(),
                "skipped_steps": int(self.finite.skipped),
                "grad_scaler": None if scaler is None else scaler.state_dict(),
            },
        )
        place = save_checkpoint(self.folder.checkpoints, self.step, checkpoint, self.config.keep_last)
        self.message(f"step {self.step:,}: {place}")

    def averaged_weights(self) -> dict[str, Tensor] | None:
        """The model's state with averaged parameters; None if no average is kept."""
        return None if self.ema is None else self.state_with(self.ema)

    def state_with(self, average: Average) -> dict[str, Tensor]:
        """The model's state with the parameters of an average."""
        # Buffers, such as BatchNorm's running statistics, are already averages.
        return {**self.model.state_dict(), **dict(zip(self.names, average.parameters, strict=True))}

    def origin(self) -> dict[str, Any]:
        """The origin of this step's weights, as recorded in checkpoints and saved models."""
        return {
            "run": self.folder.path.name,
            "step": self.step,
            "images": self.step * self.config.batch_size,
            "weights": "raw" if self.ema is None else "ema",
            "randomness": RANDOMNESS,
            "recipe": self.experiment.to_dict(),
            "init_from": self.started_from,
            "data": describe_images(self.images),
        }
