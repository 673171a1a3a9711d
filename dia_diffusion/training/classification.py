"""Training of a classifier: what the engine leaves to classification."""

import math
import shutil
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from dia_diffusion.distributed import on_main
from dia_diffusion.errors import InputError
from dia_diffusion.files import step_folders, step_name, write_json
from dia_diffusion.models.classifiers import build_classifier
from dia_diffusion.models.saved_classifier import normalized, save_classifier
from dia_diffusion.models.stored import build_on_meta, check_memory
from dia_diffusion.reading.sealed import sealed
from dia_diffusion.training.augmentation import ImageDraws, draw_images
from dia_diffusion.training.classify_config import ClassifyExperiment, ClassifyOptimizerConfig
from dia_diffusion.training.classify_images import AnySet, Batches, check_apart, open_labelled, test_pixels
from dia_diffusion.training.randomness import RANDOMNESS, WEIGHTS, derive
from dia_diffusion.training.reporter import Reporter
from dia_diffusion.training.run_folder import RunFolder
from dia_diffusion.training.ssia import Guidance, without_heads
from dia_diffusion.training.task import Moment, Task

RESULT_FILE = "result.json"
"""In a run's folder: how it ended, and its last test."""
FEW_CLASSES = 20
"""So many classes, at most, have an accuracy each."""
TEST_BATCH = 250


class ClassificationTask(Task):
    """A recipe's images, cross entropy, tests and classifier folders."""

    ema = None

    def __init__(self, experiment: ClassifyExperiment):
        self.experiment = experiment
        self.train_images: AnySet
        self.test_images: AnySet
        self.batches: Batches
        self.num_parameters = 0
        self.guidance: Guidance | None = None

    def check(self) -> None:
        check_memory(build_on_meta(lambda: build_classifier(self.experiment.model)))
        if self.experiment.train.sync_batchnorm and not torch.cuda.is_available():
            raise InputError("train.sync_batchnorm is true, which needs CUDA GPUs; accepted here: false")

    def about(self) -> str:
        return f"{self.experiment.model.backbone}, attention {self.experiment.model.attention}"

    def build_model(self) -> nn.Module:
        model = build_classifier(self.experiment.model, self.experiment.train.sync_batchnorm)
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        if self.experiment.ssia.weight:
            seed = derive(self.experiment.seed, WEIGHTS, 1)  # WEIGHTS, 0 is the model's
            self.guidance = Guidance(model, self.experiment.ssia.reduction, seed)
        return model.to(memory_format=torch.channels_last) if self.experiment.train.channels_last else model

    def parameter_groups(self, model: Any) -> list[dict[str, Any]]:
        return [{"params": list(model.parameters()), "peak_rate": self.experiment.optimizer.learning_rate}]

    def build_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        config = self.experiment.optimizer
        rate, decay = config.learning_rate, config.weight_decay
        if config.name == "adamw":
            betas = (config.betas[0], config.betas[1])
            return torch.optim.AdamW(groups, lr=rate, betas=betas, weight_decay=decay, fused=True)
        momentum, nesterov = config.momentum, config.nesterov
        sgd = torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=nesterov, weight_decay=decay, fused=True)
        for group in groups if momentum else ():
            for parameter in group["params"]:  # its first step would leave them as they come, were it skipped
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd

    def learning_rate(self, step: int, peak: float) -> float:
        return scheduled_rate(self.experiment.optimizer, step, self.experiment.train.max_steps, peak)

    def open_images(self, accelerator: Accelerator, reporter: Reporter) -> AnySet:
        self.train_images = open_labelled(self.experiment, False, accelerator, reporter)
        self.test_images = open_labelled(self.experiment, True, accelerator, reporter)
        check_apart(self.train_images, self.test_images)
        self.batches = Batches(self.train_images, self.experiment, self.draw)
        return self.train_images

    def draw(self, step: int, start: int, stop: int) -> ImageDraws:
        seed, batch_size = self.experiment.seed, self.experiment.train.batch_size
        return draw_images(seed, step, batch_size, len(self.train_images), start, stop)

    def loss(self, network: nn.Module, draws: ImageDraws, device: torch.device, dtype: torch.dtype) -> Tensor:
        pixels, labels = self.batches.take(draws, device)
        logits = network(self._prepared(pixels, dtype))
        smoothing = self.experiment.train.label_smoothing
        loss = F.cross_entropy(logits.to(dtype), labels, label_smoothing=smoothing)
        return loss if self.guidance is None else loss + self.experiment.ssia.weight * self.guidance.take()

    def _prepared(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        images = normalized(pixels, self.experiment.data.mean, self.experiment.data.std, dtype)
        last = self.experiment.train.channels_last
        return images.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    def shows_at(self, step: int) -> bool:
        every = self.experiment.train.evaluate_every
        return every > 0 and step % every == 0

    def show(self, moment: Moment) -> dict[str, float]:
        """Tests the classifier where that is due, and leaves it as a folder where a checkpoint is written."""
        tested = self._test(moment) if moment.last or self.shows_at(moment.step) else {}
        on_main(moment.accelerator, lambda: self._write(moment, tested))
        return tested

    def _test(self, moment: Moment) -> dict[str, float]:
        """Accuracy and loss on the test images, which the processes share out."""
        accelerator, model = moment.accelerator, moment.model
        classes, device = self.experiment.model.num_classes, accelerator.device
        mine = np.arange(accelerator.process_index, len(self.test_images), accelerator.num_processes)
        assert self.test_images.labels is not None
        dtype = next(model.parameters()).dtype
        losses = [torch.zeros((), dtype=dtype, device=device)]
        hits = [torch.zeros(0, dtype=torch.bool, device=device)]
        model.eval()
        with torch.no_grad():
            for start in range(0, len(mine), TEST_BATCH):
                chosen = mine[start : start + TEST_BATCH]
                pixels = test_pixels(self.test_images, chosen, self.experiment.model.sample_size).to(device)
                labels = torch.from_numpy(self.test_images.labels[chosen]).to(device)
                with accelerator.autocast():
                    logits = model(self._prepared(pixels, dtype))
                losses.append(F.cross_entropy(logits.to(dtype), labels, reduction="sum"))
                hits.append(logits.argmax(1) == labels)
        model.train()
        # Summed on the CPU, since not every device has float64.
        shown, right = self.test_images.labels[mine], torch.cat(hits).cpu().numpy()
        counts = torch.from_numpy(np.stack([np.bincount(of, minlength=classes) for of in (shown[right], shown)]))
        loss = torch.stack(losses).cpu().double().sum()
        if accelerator.num_processes > 1:
            counts, loss = (accelerator.reduce(total.to(device), "sum") for total in (counts, loss))
        return self._summary(counts, float(loss))

    def _summary(self, counts: Tensor, loss: float) -> dict[str, float]:
        right, every = counts.tolist()
        values = {"test_accuracy": sum(right) / sum(every)}
        if math.isfinite(loss):  # JSON has no other numbers
            values["test_loss"] = loss / sum(every)
        names = self.test_images.class_names or tuple(str(number) for number in range(len(every)))
        if len(names) <= FEW_CLASSES:
            values |= {f"test_accuracy/{name}": a / b for name, a, b in zip(names, right, every, strict=True) if b}
        return values

    def _write(self, moment: Moment, tested: dict[str, float]) -> None:
        experiment, folder = self.experiment, moment.folder
        if tested:
            moment.reporter.message(f"step {moment.step:,}: test accuracy {tested['test_accuracy']:.2%}")
        if moment.checkpoint:
            data, names = experiment.data, self.train_images.class_names
            place = folder.classifiers / step_name(moment.step)
            if not place.exists():
                weights = without_heads(moment.model.state_dict())
                save_classifier(place, weights, experiment.model, data.mean, data.std, names, moment.origin)
            for old in list(step_folders(folder.classifiers).values())[: -experiment.train.keep_last]:
                shutil.rmtree(old)
        if moment.last:
            self._record(folder, moment.step, None, tested)

    def diverged(self, folder: RunFolder, step: int) -> None:
        self._record(folder, step, step, {})

    def _record(self, folder: RunFolder, step: int, diverged_at: int | None, tested: dict[str, float]) -> None:
        """Writes how the run ended."""
        train, test = self.train_images, self.test_images
        record = {
            "step": step,
            "diverged_at": diverged_at,
            **tested,
            "parameters": self.num_parameters,
            "randomness": RANDOMNESS,
            "train_data": {"name": train.name, "count": len(train), "fingerprint": train.fingerprint},
            "test_data": {"name": test.name, "count": len(test), "fingerprint": test.fingerprint},
            "recipe": self.experiment.to_dict(),
        }
        write_json(folder.path / RESULT_FILE, sealed(record))


def scheduled_rate(config: ClassifyOptimizerConfig, step: int, max_steps: int, peak: float) -> float:
    """The rate of a step, counted from 0: linear warm-up to `peak`, then as the schedule says."""
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    progress = min((step - config.warmup_steps) / max(1, max_steps - config.warmup_steps), 1.0)
    if config.schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "linear":
        return peak * (1 - progress)
    return peak * config.gamma ** sum(step >= milestone for milestone in config.milestones)
