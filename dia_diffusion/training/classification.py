"""Training a classifier: its images, loss, optimizer settings and accuracies."""

import math
import shutil
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from PIL import Image
from torch import Tensor, nn

from dia_diffusion.data import ImageSet
from dia_diffusion.data.decode import to_pixels
from dia_diffusion.data.sources import open_images_on_ranks
from dia_diffusion.distributed import on_all_ranks, on_rank_zero, sent
from dia_diffusion.errors import DivergedError, InputError
from dia_diffusion.io import step_folders, step_name, with_checksum, write_json
from dia_diffusion.models.classifiers import build_classifier, normalized, save_classifier
from dia_diffusion.models.factory import build_on_meta, check_memory
from dia_diffusion.progress import Progress
from dia_diffusion.training.augmentation import ImageDraws, cut_out, draw_images, mirrored, pad_cropped, resized_crop
from dia_diffusion.training.callbacks import Callback, checkpoint_due
from dia_diffusion.training.config import ClassifyExperiment, LabelledDataConfig
from dia_diffusion.training.optimizer import parameter_groups
from dia_diffusion.training.randomness import RANDOMNESS, WEIGHTS, derive
from dia_diffusion.training.ssia import Guidance, without_heads
from dia_diffusion.training.task import Task

if TYPE_CHECKING:
    from dia_diffusion.training.trainer import StepResult, Trainer

TEST_CROP = 0.875
"""Fraction, in height and width, of a test image's center square that is used with "resized-crop"."""


def open_labelled(experiment: ClassifyExperiment, test: bool, accelerator: Accelerator, progress: Progress) -> ImageSet:
    """The recipe's training or test images, on each process.

    Raises:
        InputError: no such images, or classes that differ from the model's; raised on all processes if on one.
    """
    data, model = experiment.data, experiment.model
    source, split = (data.source, data.split) if not test else _test_place(data)
    decode = data.augmentation != "resized-crop"  # it crops each image differently at each step
    options = {"size": model.sample_size, "channels": 3, "split": split, "decode": decode}
    images = open_images_on_ranks(source, accelerator, progress, **options)
    if images.labels is None:
        raise InputError(f"`data.source` must be class folders or a data set with labels, got {source}")
    present = int(images.labels.max()) + 1
    if images.class_names is not None:
        present = len(images.class_names)
    if present != model.num_classes:
        raise InputError(
            f"`model.num_classes` must be {present}, the number of classes of {source}, got {model.num_classes}"
        )
    return images


def _test_place(data: LabelledDataConfig) -> tuple[str, str]:
    if data.test_source is None:
        return data.source, data.test_split or "test"
    return data.test_source, data.test_split or "train"


def check_apart(train: ImageSet, test: ImageSet) -> None:
    """Raises InputError if the test images are the training images, or their classes have different names."""
    if train.fingerprint == test.fingerprint:
        raise InputError(f"the test images are the training images ({train.name}); name others as data.test_source")
    if train.class_names and test.class_names and train.class_names != test.class_names:
        pair = next((a, b) for a, b in zip(train.class_names, test.class_names, strict=True) if a != b)
        raise InputError(f"the classes of {train.name} and {test.name} differ: {pair[0]!r} and {pair[1]!r}")


def with_files(images: ImageSet, experiment: ClassifyExperiment, draws: ImageDraws) -> ImageDraws:
    """The draws with the pixels that "resized-crop" reads from files; unchanged for other augmentations."""
    if experiment.data.augmentation != "resized-crop":
        return draws

    def crop(k: int, image: Image.Image) -> np.ndarray:
        return resized_crop(image, experiment.model.sample_size, draws.uniform[k])

    return replace(draws, pixels=images.read(draws.indices, crop))


def labelled_batch(
    images: ImageSet, experiment: ClassifyExperiment, draws: ImageDraws, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The augmented images (B, 3, H, W), uint8, that a step draws, and their labels (B,)."""
    data = experiment.data
    assert images.labels is not None
    labels = sent(torch.from_numpy(images.labels[draws.indices]), device)
    pixels = sent(torch.from_numpy(images.read(draws.indices) if draws.pixels is None else draws.pixels), device)
    if data.augmentation != "none":
        pixels = mirrored(pixels, draws.uniform)
    if data.augmentation == "pad-crop":
        pixels = pad_cropped(pixels, draws.uniform, data.border == "reflected")
    return cut_out(pixels, draws.uniform, data.cutout) if data.cutout else pixels, labels


def test_pixels(images: ImageSet, indices: np.ndarray, size: int) -> Tensor:
    """Test images (B, 3, size, size), uint8, without augmentation."""
    if images.source is None:
        return torch.from_numpy(images.read(indices))

    def center(_: int, image: Image.Image) -> np.ndarray:
        whole = round(size / TEST_CROP)
        edge = (whole - size) // 2
        return to_pixels(image, whole, 3)[edge : edge + size, edge : edge + size].transpose(2, 0, 1)

    return torch.from_numpy(images.read(indices, center))


RESULT_FILE = "result.json"
"""File in a run's folder: how the run ended, and its last test."""
FEW_CLASSES = 20
"""With more classes, accuracies per class are not logged."""
TEST_BATCH = 250


class ClassificationTask(Task):
    """A recipe's images, cross entropy, tests and classifier folders."""

    def __init__(self, experiment: ClassifyExperiment):
        check_memory(build_on_meta(lambda: build_classifier(experiment.model)))
        if experiment.train.sync_batchnorm and not torch.cuda.is_available():
            raise InputError("`train.sync_batchnorm` must be false without CUDA GPUs, got true")
        self.experiment = experiment
        self.description = f"{experiment.model.backbone}, attention {experiment.model.attention}"
        self.optimizer_config = experiment.optimizer
        self.reads_files = experiment.data.augmentation == "resized-crop"
        self.train_images: ImageSet
        self.test_images: ImageSet
        self.num_parameters = 0
        self.guidance: Guidance | None = None

    def build_model(self) -> nn.Module:
        model = build_classifier(self.experiment.model, self.experiment.train.sync_batchnorm)
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        if self.experiment.ssia.weight:
            seed = derive(self.experiment.seed, WEIGHTS, 1)  # number 0 is for the model
            self.guidance = Guidance(model, self.experiment.ssia.reduction, seed)
        return model.to(memory_format=torch.channels_last) if self.experiment.train.channels_last else model

    def build_optimizer(self, model: Any) -> torch.optim.Optimizer:
        config = self.experiment.optimizer
        rate, decay = config.learning_rate, config.weight_decay
        groups = parameter_groups(model, rate)
        if config.name == "adamw":
            betas = (config.betas[0], config.betas[1])
            return torch.optim.AdamW(groups, lr=rate, betas=betas, weight_decay=decay, fused=True)
        momentum, nesterov = config.momentum, config.nesterov
        sgd = torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=nesterov, weight_decay=decay, fused=True)
        for group in groups if momentum else ():
            for parameter in group["params"]:  # its first step creates them, even if it is skipped
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd

    def open_images(self, accelerator: Accelerator, progress: Progress) -> ImageSet:
        self.train_images = open_labelled(self.experiment, False, accelerator, progress)
        self.test_images = open_labelled(self.experiment, True, accelerator, progress)
        check_apart(self.train_images, self.test_images)
        return self.train_images

    def draw(self, step: int, start: int, stop: int) -> ImageDraws:
        seed, batch_size = self.experiment.seed, self.experiment.train.batch_size
        draws = draw_images(seed, step, batch_size, len(self.train_images), start, stop)
        return with_files(self.train_images, self.experiment, draws)

    def loss(self, network: nn.Module, draws: ImageDraws, device: torch.device, dtype: torch.dtype) -> Tensor:
        pixels, labels = labelled_batch(self.train_images, self.experiment, draws, device)
        logits = network(self.prepare(pixels, dtype))
        smoothing = self.experiment.train.label_smoothing
        loss = F.cross_entropy(logits.to(dtype), labels, label_smoothing=smoothing)
        return loss if self.guidance is None else loss + self.experiment.ssia.weight * self.guidance.take()

    def prepare(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """The network's input from uint8 images (B, 3, H, W)."""
        images = normalized(pixels, self.experiment.data.mean, self.experiment.data.std, dtype)
        last = self.experiment.train.channels_last
        return images.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    def callbacks(self) -> list[Callback]:
        return [TestClassifier(self)]


class TestClassifier(Callback):
    """Tests the classifier, saves it as a folder with each checkpoint, and writes result.json at the end."""

    __test__ = False  # not a pytest class

    def __init__(self, task: ClassificationTask):
        self.task, self.experiment, self.config = task, task.experiment, task.experiment.train

    def due(self, step: int) -> bool:
        return self._test_due(step) or checkpoint_due(self.config, step)

    def _test_due(self, step: int) -> bool:
        every = self.config.evaluate_every
        return step == self.config.max_steps or (every > 0 and step % every == 0)

    def __call__(self, trainer: "Trainer", result: "StepResult") -> None:
        trainer.check_finite()
        values = self._test(trainer) if self._test_due(trainer.step) else {}
        on_rank_zero(trainer.accelerator, lambda: self._save(trainer, values))
        if values:
            trainer.log(values)

    def end(self, trainer: "Trainer", error: Exception | None) -> None:
        if isinstance(error, DivergedError):
            step = error.step
            on_rank_zero(trainer.accelerator, lambda: self._write_result(trainer, step, step, {}))

    def _test(self, trainer: "Trainer") -> dict[str, float]:
        """Accuracy and loss of the classifier that rank 0 saves, on the test images, sharded over the ranks."""
        accelerator, model = trainer.accelerator, trainer.model
        # Each rank has its own BatchNorm statistics; DDP would replace them by rank 0's only in the next forward pass.
        broadcast(list(model.buffers()))
        model.eval()
        with torch.no_grad():
            counts, loss = on_all_ranks(accelerator, partial(self._count, model, accelerator))
        model.train()
        if accelerator.num_processes > 1:
            counts, loss = (accelerator.reduce(total.to(accelerator.device), "sum") for total in (counts, loss))
        return self._summary(counts, float(loss))

    def _count(self, model: nn.Module, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
        """For this rank's shard: counts of correct and of all images per class (2, num_classes), and summed loss ()."""
        images, classes, device = self.task.test_images, self.experiment.model.num_classes, accelerator.device
        mine = np.arange(accelerator.process_index, len(images), accelerator.num_processes)
        assert images.labels is not None
        dtype = next(model.parameters()).dtype
        losses = [torch.zeros((), dtype=dtype, device=device)]
        hits = [torch.zeros(0, dtype=torch.bool, device=device)]
        for start in range(0, len(mine), TEST_BATCH):
            chosen = mine[start : start + TEST_BATCH]
            pixels = test_pixels(images, chosen, self.experiment.model.sample_size).to(device)
            labels = torch.from_numpy(images.labels[chosen]).to(device)
            with accelerator.autocast():
                logits = model(self.task.prepare(pixels, dtype))
            losses.append(F.cross_entropy(logits.to(dtype), labels, reduction="sum"))
            hits.append(logits.argmax(1) == labels)
        # Sum on the CPU, since not every device has float64.
        shown, right = images.labels[mine], torch.cat(hits).cpu().numpy()
        counts = torch.from_numpy(np.stack([np.bincount(of, minlength=classes) for of in (shown[right], shown)]))
        return counts, torch.stack(losses).cpu().double().sum()

    def _summary(self, counts: Tensor, loss: float) -> dict[str, float]:
        right, every = counts.tolist()
        values = {"test_accuracy": sum(right) / sum(every)}
        if math.isfinite(loss):  # JSON has no inf or nan
            values["test_loss"] = loss / sum(every)
        names = self.task.test_images.class_names or tuple(str(number) for number in range(len(every)))
        if len(names) <= FEW_CLASSES:
            values |= {f"test_accuracy/{name}": a / b for name, a, b in zip(names, right, every, strict=True) if b}
        return values

    def _save(self, trainer: "Trainer", values: dict[str, float]) -> None:
        experiment, step = self.experiment, trainer.step
        if values:
            trainer.message(f"step {step:,}: test accuracy {values['test_accuracy']:.2%}")
        if checkpoint_due(self.config, step):
            data, names = experiment.data, self.task.train_images.class_names
            place = trainer.folder.classifiers / step_name(step)
            if not place.exists():
                weights = without_heads(trainer.model.state_dict())
                save_classifier(place, weights, experiment.model, data.mean, data.std, names, trainer.origin())
            for old in list(step_folders(trainer.folder.classifiers).values())[: -self.config.keep_last]:
                shutil.rmtree(old)
        if step == self.config.max_steps:
            self._write_result(trainer, step, None, values)

    def _write_result(self, trainer: "Trainer", step: int, diverged_at: int | None, values: dict[str, float]) -> None:
        """Writes how the run ended to result.json."""
        train, test = self.task.train_images, self.task.test_images
        record = {
            "step": step,
            "diverged_at": diverged_at,
            **values,
            "parameters": self.task.num_parameters,
            "randomness": RANDOMNESS,
            "train_data": {"name": train.name, "count": len(train), "fingerprint": train.fingerprint},
            "test_data": {"name": test.name, "count": len(test), "fingerprint": test.fingerprint},
            "recipe": self.experiment.to_dict(),
        }
        write_json(trainer.folder.path / RESULT_FILE, with_checksum(record))
