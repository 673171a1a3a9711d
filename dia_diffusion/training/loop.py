"""The training engine, for any `Task`: data, randomness, checkpoints, averages, processes, metrics and signals.

Every optimizer step depends on the recipe, the step's number and the weights before it alone.
"""

import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dia_diffusion.distributed import (
    StopSignal,
    broadcast_from_rank_zero,
    check_trackers,
    micro_batch_size,
    on_all_ranks,
    on_rank_zero,
    peak_memory,
    start_accelerator,
)
from dia_diffusion.environment import environment
from dia_diffusion.errors import DivergedError, InputError, Stopped
from dia_diffusion.io import write_json
from dia_diffusion.precision import Precision, in_precision, slow_warning, training_device, training_precision
from dia_diffusion.training.checkpoint import (
    Checkpoint,
    began_in,
    load_checkpoint,
    load_optimizer,
    load_weights,
    optimizer_tensors,
    save_checkpoint,
    set_aside,
    whole_checkpoint,
)
from dia_diffusion.training.compilation import check_compile, compiled
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.diffusion import DiffusionTask
from dia_diffusion.training.ema import MovingAverage
from dia_diffusion.training.finite import FiniteWatch, KeptBuffers, first_not_finite
from dia_diffusion.training.randomness import RANDOMNESS, WEIGHTS, derive, dropout_seed
from dia_diffusion.training.run_folder import (
    Reporter,
    RunFolder,
    check_shared,
    refuse_changes,
    refuse_other_randomness,
    refuse_rewriting,
)
from dia_diffusion.training.task import DrawAhead, Draws, Moment, Task, about_images


class Trainer:
    """A run: everything that a step needs, and where it is kept.

    Raises:
        InputError: the recipe, the dataset, the checkpoint or the launch doesn't fit.
    """

    def __init__(self, trained: Experiment | Task, reporter: Reporter):
        self.task = DiffusionTask(trained) if isinstance(trained, Experiment) else trained
        self.folder = RunFolder(self.task.experiment.output)
        self.precision = self._choose_precision()
        experiment, self.reporter = self.task.experiment, reporter
        self.experiment, self.config = experiment, experiment.train
        config = self.config
        check_trackers(experiment.trackers)
        self.task.check()
        self.accelerator = start_accelerator(
            config.mixed_precision, log_with=experiment.trackers or None, project_dir=experiment.output
        )
        check_compile(config.compile, config.accumulation, self.accelerator.device)
        self.micro_batch = micro_batch_size(config.batch_size, self.accelerator.num_processes, config.accumulation)
        share = self.micro_batch * config.accumulation
        first = self.accelerator.process_index * share
        self.ahead = DrawAhead(self.task, first, first + share)
        torch.manual_seed(derive(experiment.seed, WEIGHTS))
        self.model = self.task.build_model()
        self.names, self.parameters = map(list, zip(*self.model.named_parameters(), strict=True))
        self.groups = self.task.parameter_groups(self.model)
        self.dtype = self.parameters[0].dtype
        self.has_dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.model.modules())

        self.started_from = on_all_ranks(self.accelerator, self._first_weights)
        self.images = self.task.open_images(self.accelerator, reporter)
        on_rank_zero(self.accelerator, self.folder.lock)
        try:
            check_shared(self.folder, self.accelerator, reporter.message)
            place = broadcast_from_rank_zero(self.accelerator, self._whole_checkpoint)
            self._build(on_all_ranks(self.accelerator, lambda: self._load(place)))
        except BaseException:
            self.folder.unlock()
            raise

    def _choose_precision(self) -> Precision:
        """Resolves the recipe's precision, so that configs, checkpoints and cards say what was chosen."""
        asked, begun = self.task.experiment.train.mixed_precision, began_in(self.folder.checkpoints)
        precision = training_precision(asked, training_device(), begun)
        self.task.experiment = in_precision(self.task.experiment, precision)
        return precision

    def _tell(self, line: str) -> None:
        if self.accelerator.is_main_process:
            self.reporter.message(line)

    def _first_weights(self) -> dict[str, Any] | None:
        """Where those of a new run are from; the model's own where from nowhere."""
        return None if self.folder.newest_checkpoint() is not None else self.task.first_weights(self.model)

    def _whole_checkpoint(self) -> str | None:
        """The name of the checkpoint that all processes go on from; None where the run is new."""
        place, self.damaged = whole_checkpoint(self.folder.checkpoints)
        return None if place is None else place.name

    def _load(self, name: str | None) -> Checkpoint | None:
        """The checkpoint of this name, its weights in the model."""
        if name is None:
            refuse_rewriting(self.folder, self.experiment)
            return None
        place = self.folder.checkpoints / name
        checkpoint = load_checkpoint(place, checked=self.accelerator.is_main_process)  # by whole_checkpoint
        refuse_changes(checkpoint.state["recipe"], self.experiment, self.folder.path)
        if checkpoint.state["step"] < self.config.max_steps:
            refuse_other_randomness(checkpoint.state, self.folder.path)
        self.started_from = self.task.same_start(checkpoint.state.get("init_from"))
        if checkpoint.state["data"]["fingerprint"] != self.images.fingerprint:
            raise InputError(f"data.source {self.experiment.data.source} has other images than {place} was trained on")
        load_weights(self.model, checkpoint.tensors["model"], place)
        return checkpoint

    def _build(self, checkpoint: Checkpoint | None) -> None:
        """Network, optimizer and average, as the checkpoint left them."""
        config = self.config
        self.step = 0 if checkpoint is None else checkpoint.state["step"]
        optimizer = self.task.build_optimizer(self.groups)
        pays_after, device = self.task.compiling_pays_after, self.accelerator.device
        network = compiled(self.model, config.compile, config.max_steps, pays_after, device, self._tell)
        self.network, self.optimizer = self.accelerator.prepare(network, optimizer)
        self.network.train()
        self.buffers = KeptBuffers(self.model)
        skipped = 0 if checkpoint is None else checkpoint.state.get("skipped_steps", 0)
        self.finite = FiniteWatch(device, config.max_skipped_steps, skipped, self.accelerator.scaler is not None)
        self.ema = None
        if self.task.ema is not None:
            self.ema = MovingAverage(self.parameters, self.task.ema, self.task.reference_steps)
        if checkpoint is not None:
            if self.ema is not None:
                self.ema.load([checkpoint.tensors["ema"][name] for name in self.names], self.step)
            load_optimizer(self.optimizer.optimizer, checkpoint.tensors["optimizer"], self.names)
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(checkpoint.state["grad_scaler"])

    def run(self) -> None:
        """Trains from the last checkpoint to max_steps.

        Raises:
            Stopped: after SIGINT or SIGTERM, with a checkpoint of the last finished step written.
            DivergedError: too many steps in a row without a finite loss and gradient; the last checkpoint stays.
        """
        try:
            self._start()
            self._loop()
            self.accelerator.end_training()
        except Stopped:
            self.accelerator.end_training()
            raise
        except DivergedError as error:
            step = error.step
            on_rank_zero(self.accelerator, lambda: self.task.diverged(self.folder, step))
            raise
        finally:
            self.folder.unlock()

    def _loop(self) -> None:
        with StopSignal(self.accelerator) as signal:
            while self.step < self.config.max_steps:
                loss, gradient_norm = self.advance()
                if self._due(self.config.log_every):
                    self._log(loss, gradient_norm)
                if self.accelerator.is_main_process:
                    self.reporter.progress(self.step, self.config.max_steps, self.logged)
                finished = self.step == self.config.max_steps
                checkpoint_due = finished or self._due(self.config.checkpoint_every)
                if checkpoint_due or self.task.shows_at(self.step):
                    self._show(checkpoint_due)
                stopped = signal.agreed()
                if checkpoint_due or stopped:
                    self._save()
                if stopped and not finished:
                    raise Stopped(stopped, f"stopped after step {self.step:,}; the same command goes on from there")

    def _start(self) -> None:
        config = self.config
        on_rank_zero(self.accelerator, self._open_folder)
        if self.accelerator.is_main_process:
            self.reporter.message(
                f"{self.images.name}: {len(self.images):,} images; {self.task.about()}, "
                f"{sum(p.numel() for p in self.parameters):,} parameters; batch {config.batch_size} = "
                f"{self.accelerator.num_processes} processes x {self.micro_batch} images x {config.accumulation} "
                f"accumulations on {self.accelerator.device}, {self.precision}"
            )
            if warning := slow_warning(self.precision, self.accelerator.device):
                self.reporter.message(warning)
            if self.step:
                self.reporter.message(f"going on from step {self.step:,}")
            elif self.started_from is not None:
                gained = ", which have no unit: it keeps its own first ones" if self.started_from["gained_unit"] else ""
                self.reporter.message(f"starting from the weights of {self.started_from['path']}{gained}")
        if self.experiment.trackers:
            self.accelerator.init_trackers("dia-diffusion")
        self.logged: dict[str, Any] = {"skipped_steps": int(self.finite.skipped)}
        self.clock = time.perf_counter(), self.step

    def _open_folder(self) -> None:
        self.folder.truncate_metrics(self.step)  # first, for it may refuse them
        for place, why in self.damaged.items():
            self.reporter.message(
                f"warning: {why}; it is kept as {set_aside(place).name}, and the one before it is used"
            )
        self.folder.write_config(self.experiment)
        if self.step < self.config.max_steps:  # else what trained it stays on record
            write_json(self.folder.environment, environment(self.accelerator.num_processes))

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def advance(self) -> tuple[Tensor, Tensor]:
        """One step of optimizer and average; the mean loss and the gradient norm, still on the device.

        A step whose loss or gradient is not finite changes nothing but its number.
        """
        loss, gradient_norm = self._gradients(self.step)
        skip = self.finite.note(self.step, loss, gradient_norm)
        if self.accelerator.scaler is None:  # fp16's scaler looks for itself
            # What fused optimizers leave weights and state alone for, without asking the device.
            self.optimizer.optimizer.found_inf = skip.float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.buffers.put_back(skip)
        if self.ema is not None:
            self.ema.step(self.parameters, skip)
        if skip.device.type == "cpu":  # where asking costs nothing; a GPU is asked where a number is logged
            self._check_finite()
        self.step += 1
        return loss, gradient_norm

    def _gradients(self, step: int) -> tuple[Tensor, Tensor]:
        """Fills in the gradients of a step, counted from 0; its mean loss over the global batch, its gradient norm."""
        draws = self._draw(step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.task.learning_rate(step, group["peak_rate"])
        self.buffers.keep()
        total = torch.zeros((), device=self.accelerator.device)
        for part, mine in enumerate(draws):
            last = part == self.config.accumulation - 1
            with nullcontext() if last else self.accelerator.no_sync(self.network):
                loss = self.task.loss(self.network, mine, total.device, self.dtype) / self.config.accumulation
                self.accelerator.backward(loss)
            total += loss.detach()
        if self.config.clip_grad_norm is None:
            self.accelerator.unscale_gradients(self.optimizer)
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        else:
            norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.clip_grad_norm)
        return self.accelerator.reduce(total, "mean"), norm

    def _draw(self, step: int) -> list[Draws]:
        """What is random in this process's micro-batches of a step, and in its network."""
        on_gpu = self.accelerator.device.type != "cpu"
        draws = self.ahead.draw(step, then_next=on_gpu and step + 1 < self.config.max_steps)
        if self.has_dropout:  # its masks belong to the step and the process; no slice of a global batch can give them
            torch.manual_seed(dropout_seed(self.experiment.seed, step, self.accelerator.process_index))
        starts = range(0, self.micro_batch * self.config.accumulation, self.micro_batch)
        return [draws.slice(start, start + self.micro_batch) for start in starts]

    def _check_finite(self) -> None:
        """Raises DivergedError, on all processes, where too many steps in a row were skipped."""
        streak = self.finite.streak()
        if streak is None:
            return
        device, rate = self.accelerator.device, self.task.learning_rate(streak.step, self.groups[0]["peak_rate"])

        def forward() -> None:  # the weights are still those that the streak began with
            with torch.no_grad(), self.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
                for mine in self._draw(streak.step):
                    self.task.loss(self.model, mine, device, self.dtype)

        try:
            where = first_not_finite(self.model, forward)
        except Exception:  # as too little memory without compilation: what is to be told is the divergence
            where = None
        modules = [name for name, _ in self.model.named_modules()]
        found = torch.tensor([-1 if where is None else modules.index(where)], device=device)
        numbers = [number for number in self.accelerator.gather(found).tolist() if number >= 0]
        error = streak.error(rate, modules[numbers[0]] if numbers else None)
        error.told = not self.accelerator.is_main_process
        raise error

    def _log(self, loss: Tensor, gradient_norm: Tensor) -> None:
        """This step's own loss over the global batch, and the rate since the last line."""
        self._check_finite()
        skipped = int(self.finite.skipped)
        if skipped > self.logged["skipped_steps"] and self.accelerator.is_main_process:
            self.reporter.message(
                f"step {self.step:,}: steps skipped so far, whose loss or gradient was not finite: {skipped:,}"
            )
        since, step = self.clock
        self.clock = time.perf_counter(), self.step
        images = (self.step - step) * self.config.batch_size
        self.logged = {
            "step": self.step,
            "images": self.step * self.config.batch_size,
            # JSON has no other numbers than finite ones.
            "loss": float(loss) if loss.isfinite() else None,
            "grad_norm": float(gradient_norm) if gradient_norm.isfinite() else None,
            "lr": self.optimizer.param_groups[0]["lr"],
            "skipped_steps": skipped,
            "images_per_second": round(images / (self.clock[0] - since), 3),
            "peak_memory_mib": round(peak_memory(self.accelerator.device) / 2**20),
        }
        self._write_metrics(self.logged)

    def _write_metrics(self, line: dict[str, Any]) -> None:
        on_rank_zero(self.accelerator, lambda: self.folder.log_metrics(line))
        if self.experiment.trackers:
            self.accelerator.log({key: value for key, value in line.items() if key != "step"}, step=self.step)

    def _show(self, checkpoint: bool) -> None:
        """Lets the task show the run, and keeps the numbers that it gives."""
        self._check_finite()
        moment = Moment(
            self.step,
            checkpoint,
            self.step == self.config.max_steps,
            self.model,
            self._averaged_weights(),
            self._origin(),
            self.folder,
            self.accelerator,
            self.reporter,
        )
        values = self.task.show(moment)
        if values:
            self._write_metrics({"step": self.step, "images": self.step * self.config.batch_size, **values})

    def _save(self) -> None:
        """Writes a checkpoint: the last act of a step, so that a step cut short is done again whole."""
        self._check_finite()

        def save() -> None:
            scaler, average = self.accelerator.scaler, self._averaged_weights()
            checkpoint = Checkpoint(
                tensors={
                    "model": self.model.state_dict(),
                    **({} if average is None else {"ema": average}),
                    "optimizer": optimizer_tensors(self.optimizer.optimizer, self.names),
                },
                state={
                    **self._origin(),
                    "skipped_steps": int(self.finite.skipped),
                    "grad_scaler": None if scaler is None else scaler.state_dict(),
                },
            )
            place = save_checkpoint(self.folder.checkpoints, self.step, checkpoint, self.config.keep_last)
            self.reporter.message(f"step {self.step:,}: {place}")

        on_rank_zero(self.accelerator, save)

    def _averaged_weights(self) -> dict[str, Tensor] | None:
        if self.ema is None:
            return None
        # Buffers too, such as a BatchNorm's running statistics, which are averages already.
        return {**self.model.state_dict(), **dict(zip(self.names, self.ema.parameters, strict=True))}

    def _origin(self) -> dict[str, Any]:
        """Where the weights of this step come from."""
        return {
            "run": self.folder.path.name,
            "step": self.step,
            "images": self.step * self.config.batch_size,
            "weights": "raw" if self.ema is None else "ema",
            "randomness": RANDOMNESS,
            "recipe": self.experiment.to_dict(),
            "init_from": self.started_from,
            "data": about_images(self.images),
        }
