"""Trained classifiers as folders: weights as safetensors, a unit's once, and what builds the network again."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dia_diffusion.errors import InputError
from dia_diffusion.files import step_folders, whole_folder, write_json
from dia_diffusion.models.classifier_config import BackboneConfig
from dia_diffusion.models.classifiers import build_classifier
from dia_diffusion.models.stored import check_size, unusable
from dia_diffusion.reading.safetensors_header import stored_shapes
from dia_diffusion.reading.text import read_json_object
from dia_diffusion.reading.typed import fits, from_json
from dia_diffusion.transfer import sent

WEIGHTS_FILE, CONFIG_FILE, TRAINING_FILE = "model.safetensors", "config.json", "training.json"


@dataclass(frozen=True)
class SavedClassifier:
    """A trained classifier, and how it wants its images."""

    model: nn.Module
    """Prepared images (B, 3, H, W) -> logits (B, num_classes); in evaluation mode, without gradients of its weights."""
    config: BackboneConfig
    mean: list[float]
    std: list[float]
    class_names: list[str] | None
    training: dict[str, Any] | None
    """Where the weights come from: run, step, recipe, data; None where nothing says."""

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, H, W) -> what the network takes, float32."""
        return normalized(images, self.mean, self.std)


def normalized(images: Tensor, mean: list[float], std: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 images (B, 3, H, W) -> each channel over 255, less its mean, over its deviation."""
    shift, scale = (sent(torch.tensor(values, dtype=dtype), images.device)[:, None, None] for values in (mean, std))
    return (images.to(dtype) / 255 - shift) / scale


def save_classifier(
    place: Path,
    weights: dict[str, Tensor],
    config: BackboneConfig,
    mean: list[float],
    std: list[float],
    class_names: tuple[str, ...] | None,
    training: dict[str, Any],
) -> None:
    """Writes a classifier folder, whole or not at all."""
    with whole_folder(place) as temporary:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        save_file(tensors, temporary / WEIGHTS_FILE)
        names = None if class_names is None else list(class_names)
        about = {"model": asdict(config), "mean": mean, "std": std, "class_names": names}
        write_json(temporary / CONFIG_FILE, about)
        write_json(temporary / TRAINING_FILE, training)


def load_classifier(place: str | Path, device: str | torch.device = "cpu") -> SavedClassifier:
    """Loads a classifier folder, or the newest of a run of `dia-diffusion classify`.

    Raises:
        InputError: there is none, or its files are cut short, altered, or don't fit each other.
    """
    folder = Path(place)
    if not (folder / CONFIG_FILE).is_file():
        newest = next(reversed(step_folders(folder / "classifiers").values()), None)
        if newest is None:
            raise InputError(
                f"{place} is no classifier folder and no run with one; accepted: what classify has written"
            )
        folder = newest
    try:
        about = read_json_object(folder / CONFIG_FILE)
        config = from_json(BackboneConfig, about["model"])
        mean, std, class_names = about["mean"], about["std"], about["class_names"]
        if not all(fits(values, list[float]) and len(values) == 3 for values in (mean, std)):
            raise ValueError("mean and std of three channels")
        if not fits(class_names, list[str] | None):
            raise ValueError("class_names")
        training_file = folder / TRAINING_FILE
        training = read_json_object(training_file) if training_file.is_file() else None
    except (OSError, ValueError, KeyError):
        raise InputError(f"{folder / CONFIG_FILE} or {TRAINING_FILE} is cut short or altered") from None
    weights = folder / WEIGHTS_FILE
    check_size(lambda: build_classifier(config), stored_shapes(weights))
    try:
        model, tensors = build_classifier(config), load_file(weights)
        if problem := unusable(tensors, model):
            raise InputError(f"{weights} has {problem}")
        model.load_state_dict(tensors)
    except (OSError, SafetensorError, RuntimeError):
        raise InputError(f"{weights} is missing, cut short, or of another network than {CONFIG_FILE} says") from None
    return SavedClassifier(model.eval().requires_grad_(False).to(device), config, mean, std, class_names, training)
