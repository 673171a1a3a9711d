"""Named feature extractors: images in, the vectors that a distance compares out. All are torch-fidelity extractors."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch_fidelity import FeatureExtractorBase, register_feature_extractor

from dia_diffusion.errors import InputError
from dia_diffusion.files import sha256_of_file

PACKAGED_WEIGHTS = Path(__file__).parent / "weights"


class DigitsClassifier(nn.Module):
    """A small classifier of 8x8 grey images in [0, 1]; the layer before its last gives 64 features.

    GELU instead of ReLU and strides instead of maxima: a feature that is flat over half its range or jumps between
    pixels makes a poor ruler.
    """

    image_size = 8

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.GELU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 64),
            nn.GELU(),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 1, 8, 8) in [0, 1] -> features (B, 64), logits (B, 10)."""
        features = self.trunk(2 * images - 1)
        return features, self.head(features)


class DigitsExtractor(FeatureExtractorBase):
    """The classifier as a torch-fidelity extractor with the layers "64" and "logits", for uint8 images (B, 3, H, W).

    The mean of the three channels is resized to 8x8. `feature_extractor_weights_path` replaces the packaged weights.
    """

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: str | Path | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(name, features_list)
        self.classifier = load_weights(DigitsClassifier(), feature_extractor_weights_path or DIGITS.weights)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("64", "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "64"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        grey = images.float().mean(1, keepdim=True) / 255  # (B, 1, H, W)
        size = (DigitsClassifier.image_size, DigitsClassifier.image_size)
        if grey.shape[-2:] != size:
            grey = F.interpolate(grey, size, mode="bilinear", antialias=True)
        layers = dict(zip(self.get_provided_features_list(), self.classifier(grey), strict=True))
        return tuple(layers[name] for name in self.features_list)


@dataclass(frozen=True)
class _Row:
    """What the table knows about one set of features."""

    extractor: Callable[..., FeatureExtractorBase]
    layer: str
    num_features: int
    weights: Path


DIGITS = _Row(DigitsExtractor, layer="64", num_features=64, weights=PACKAGED_WEIGHTS / "digits.safetensors")
FEATURES = {"digits": DIGITS}

register_feature_extractor("digits", DigitsExtractor)


class FeatureExtractor:
    """One layer of a named extractor with the hash of its weights; made by `build_features`."""

    def __init__(self, name: str, row: _Row, weights: Path, device: str | torch.device) -> None:
        self.name = name
        self.num_features = row.num_features
        module = row.extractor(name, [row.layer], feature_extractor_weights_path=weights)
        self.weights_hash = sha256_of_file(weights)
        self.device = torch.device(device)
        self._module = module.requires_grad_(False).eval().to(self.device)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images (B, C, H, W) with 1 or 3 channels, on any device -> float32 features (B, num_features).

        In float32 whatever autocast is around, convolutions without TF32: a ruler doesn't change with its surroundings.
        Raises InputError for other types and shapes.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise InputError(
                f"features are taken from uint8 images (B, 1 or 3, H, W), got {images.dtype} {tuple(images.shape)}"
            )
        images = images.to(self.device).expand(-1, 3, -1, -1)
        with (
            torch.autocast(self.device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
        ):
            return self._module(images)[0].float()


def build_features(
    name: str, device: str | torch.device = "cpu", weights: str | Path | None = None
) -> FeatureExtractor:
    """The extractor called `name` (a key of FEATURES) on `device`; `weights` replaces the packaged file.

    Raises InputError for an unknown name, and for weights that are cut short or another network's.
    """
    if name not in FEATURES:
        raise InputError(f"unknown features {name!r}; there are: {', '.join(FEATURES)}")
    row = FEATURES[name]
    return FeatureExtractor(name, row, Path(weights or row.weights), device)


def load_weights(module: nn.Module, path: str | Path) -> nn.Module:
    """Loads a safetensors file of exactly this module's tensors; a JSON beside it says what its sha256 must be.

    Raises InputError naming the file.
    """
    path = Path(path)
    card = path.with_suffix(".json")
    try:
        if card.exists() and (expected := json.loads(card.read_text())["sha256"]) != sha256_of_file(path):
            raise InputError(f"weights {path} are damaged or another network's: {card.name} says sha256 {expected}")
        module.load_state_dict(load_file(path))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(
            f"{card} says no sha256 for the weights beside it; without that file they load unchecked"
        ) from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"weights {path} are missing, cut short or not safetensors ({error})") from error
    except RuntimeError as error:
        raise InputError(f"weights {path} are another network's, not a {type(module).__name__}'s") from error
    return module
