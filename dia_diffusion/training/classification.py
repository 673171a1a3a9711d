"""Training of a classifier: its images, loss, optimizer settings and accuracies."""

import math
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from PIL import Image
from torch import Tensor, nn

from dia_diffusion.data import ImageSet
from dia_diffusion.data.decode import to_pixels
from dia_diffusion.data.encoded import EncodedSet, gather, open_encoded
from dia_diffusion.data.sources import open_images_together
from dia_diffusion.distributed import first_on_each_machine, on_all_ranks, on_rank_zero, sent
from dia_diffusion.errors import InputError
from dia_diffusion.io import step_folders, step_name, with_checksum, write_json
from dia_diffusion.models.classifiers import build_classifier, normalized, save_classifier
from dia_diffusion.models.factory import build_on_meta, check_memory
from dia_diffusion.training.augmentation import ImageDraws, cut_out, draw_images, mirrored, pad_cropped, resized_crop
from dia_diffusion.training.classify_config import ClassifyExperiment, ClassifyOptimizerConfig, LabelledDataConfig
from dia_diffusion.training.randomness import RANDOMNESS, WEIGHTS, derive
from dia_diffusion.training.run_folder import Reporter, RunFolder
from dia_diffusion.training.ssia import Guidance, without_heads
from dia_diffusion.training.task import Moment, Task

TEST_CROP = 0.875
"""The share of a test image's centre square that "resized-crop" is tested on, in height and width."""

AnySet = ImageSet | EncodedSet


def open_labelled(experiment: ClassifyExperiment, test: bool, accelerator: Accelerator, reporter: Reporter) -> AnySet:
    """The recipe's training or test images, on each process.

    Raises:
        InputError: no such images, or other classes than the model's; on all processes if on one.
    """
    data, model = experiment.data, experiment.model
    source, split = (data.source, data.split) if not test else _test_place(data)
    images: AnySet
    if data.augmentation == "resized-crop":
        images = first_on_each_machine(accelerator, lambda: open_encoded(source, split))
    else:
        options = {"size": model.sample_size, "channels": 3, "split": split}
        images = open_images_together(source, accelerator, reporter.reading, **options)
    if images.labels is None:
        raise InputError(f"{source} has no classes; accepted: class folders, or a data set with labels")
    present = int(images.labels.max()) + 1
    if images.class_names is not None:
        present = len(images.class_names)
    if present != model.num_classes:
        raise InputError(
            f"{source} has {present} classes and model.num_classes is {model.num_classes}; make them equal"
        )
    return images


def _test_place(data: LabelledDataConfig) -> tuple[str, str]:
    if data.test_source is None:
        return data.source, data.test_split or "test"
    return data.test_source, data.test_split or "train"


def check_apart(train: AnySet, test: AnySet) -> None:
    """Raises InputError where the test images are the training images, or their classes have other names."""
    if train.fingerprint == test.fingerprint:
        raise InputError(f"the test images are the training images ({train.name}); name others as data.test_source")
    if train.class_names and test.class_names and train.class_names != test.class_names:
        pair = next((a, b) for a, b in zip(train.class_names, test.class_names, strict=True) if a != b)
        raise InputError(f"the classes of {train.name} and {test.name} differ: {pair[0]!r} and {pair[1]!r}")


class Batches:
    """Augmented uint8 batches of one set, as steps draw them.

    Args:
        images: the set.
        experiment: the recipe.
        draws_of: the draws of a step's images start..stop; of files, those of the next step are decoded while the
            device computes.
    """

    def __init__(self, images: AnySet, experiment: ClassifyExperiment, draws_of: Callable[[int, int, int], ImageDraws]):
        self.images, self.draws_of = images, draws_of
        self.data, self.size = experiment.data, experiment.model.sample_size
        self.max_steps = experiment.train.max_steps
        self.ahead: dict[tuple[int, int], list[Future[np.ndarray]]] = {}

    def take(self, draws: ImageDraws, device: torch.device) -> tuple[Tensor, Tensor]:
        """The images (B, 3, H, W), uint8, and labels (B,) of a slice of a step's draws."""
        assert self.images.labels is not None
        labels = sent(torch.from_numpy(self.images.labels[draws.indices]), device)
        if isinstance(self.images, EncodedSet):
            pixels = mirrored(sent(torch.from_numpy(self._decoded(self.images, draws)), device), draws.uniform)
        else:
            pixels = sent(torch.from_numpy(self.images.images[draws.indices]), device)
            if self.data.augmentation == "pad-crop":
                reflected = self.data.border == "reflected"
                pixels = pad_cropped(mirrored(pixels, draws.uniform), draws.uniform, reflected)
        return cut_out(pixels, draws.uniform, self.data.cutout) if self.data.cutout else pixels, labels

    def _decoded(self, images: EncodedSet, draws: ImageDraws) -> np.ndarray:
        futures = self.ahead.pop((draws.step, draws.first), None) or self._start(images, draws)
        if draws.step + 1 < self.max_steps:
            following = self.draws_of(draws.step + 1, draws.first, draws.first + len(draws.indices))
            self.ahead[following.step, following.first] = self._start(images, following)
        return gather(futures)

    def _start(self, images: EncodedSet, draws: ImageDraws) -> "list[Future[np.ndarray]]":
        return images.start(draws.indices, lambda k, image: resized_crop(image, self.size, draws.uniform[k]))


def test_pixels(images: AnySet, indices: np.ndarray, size: int) -> Tensor:
    """Test images (B, 3, size, size), uint8, without augmentation."""
    if isinstance(images, ImageSet):
        return torch.from_numpy(images.images[indices])

    def centre(_: int, image: Image.Image) -> np.ndarray:
        whole = round(size / TEST_CROP)
        edge = (whole - size) // 2
        return to_pixels(image, whole, 3)[edge : edge + size, edge : edge + size].transpose(2, 0, 1)

    return torch.from_numpy(gather(images.start(indices, centre)))


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
        on_rank_zero(moment.accelerator, lambda: self._write(moment, tested))
        return tested

    def _test(self, moment: Moment) -> dict[str, float]:
        """Accuracy and loss on the test images, which the processes share out, of the classifier that rank 0 saves."""
        accelerator, model = moment.accelerator, moment.model
        # Each process has added its own images to BatchNorm's statistics. DDP would replace them by rank 0's at the
        # next step's forward.
        broadcast(list(model.buffers()))
        model.eval()
        with torch.no_grad():
            counts, loss = on_all_ranks(accelerator, partial(self._count, model, accelerator))
        model.train()
        if accelerator.num_processes > 1:
            counts, loss = (accelerator.reduce(total.to(accelerator.device), "sum") for total in (counts, loss))
        return self._summary(counts, float(loss))

    def _count(self, model: nn.Module, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
        """Of this process's share: images (2, num_classes) classified correctly, images in all; the summed loss ()."""
        classes, device = self.experiment.model.num_classes, accelerator.device
        mine = np.arange(accelerator.process_index, len(self.test_images), accelerator.num_processes)
        assert self.test_images.labels is not None
        dtype = next(model.parameters()).dtype
        losses = [torch.zeros((), dtype=dtype, device=device)]
        hits = [torch.zeros(0, dtype=torch.bool, device=device)]
        for start in range(0, len(mine), TEST_BATCH):
            chosen = mine[start : start + TEST_BATCH]
            pixels = test_pixels(self.test_images, chosen, self.experiment.model.sample_size).to(device)
            labels = torch.from_numpy(self.test_images.labels[chosen]).to(device)
            with accelerator.autocast():
                logits = model(self._prepared(pixels, dtype))
            losses.append(F.cross_entropy(logits.to(dtype), labels, reduction="sum"))
            hits.append(logits.argmax(1) == labels)
        # Summed on the CPU, since not every device has float64.
        shown, right = self.test_images.labels[mine], torch.cat(hits).cpu().numpy()
        counts = torch.from_numpy(np.stack([np.bincount(of, minlength=classes) for of in (shown[right], shown)]))
        return counts, torch.stack(losses).cpu().double().sum()

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
        write_json(folder.path / RESULT_FILE, with_checksum(record))


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
