"""Published networks as features: their weights from a file or a checked download, images resized and normalized."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch_fidelity import FeatureExtractorBase

from dia_diffusion.download import Download
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.features.extractor import DownloadProgress, state_hash
from dia_diffusion.evaluation.features.weight_files import read_tensors, released_file
from dia_diffusion.models.factory import unusable

Tensors = dict[str, torch.Tensor]

IMAGE_SIZE = 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU_BATCH, BATCH = 16, 64
"""Images per forward pass on a CPU and on a GPU, for any input size: VGG-16's activations are 26 MB per image."""


def resize_bicubic(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) -> (B, 3, 224, 224), antialiased and not rounded, as EDM2 does; dgm-eval rounds to 8 bits."""
    return F.interpolate(images, (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True)


@dataclass(frozen=True)
class PretrainedNetwork:
    """A published network and its preprocessing.

    build: the network with the parameters of the released file, called on the meta device.
    rename: the file's tensors -> the tensors under the network's names, without those that features don't need.
    finish: the network with its weights -> a network from (B, 3, 224, 224) to features (B, D).
    files: the files that `--weights` takes, for messages and documentation.
    release: the released file; None if there is none to download.
    resize: (B, 3, H, W) of any size, in [0, 255] -> (B, 3, 224, 224).
    """

    build: Callable[[], nn.Module]
    rename: Callable[[Mapping[str, torch.Tensor]], Tensors]
    finish: Callable[[nn.Module], nn.Module]
    files: str
    release: Download | None = None
    resize: Callable[[torch.Tensor], torch.Tensor] = resize_bicubic
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def load(
        self, name: str, weights: str | Path | None, progress: DownloadProgress | None
    ) -> tuple[str, "PretrainedExtractor", str]:
        """The features' name, the extractor, and the hash of its weights. A row of FEATURES, except for `name`.

        The hash is of the released tensors in float32, the same for each format of the file.

        Raises InputError for a file that is missing, truncated or another network's, or where `weights` is needed;
        RunError for a failed download.
        """
        expected = f"expected: {self.files}"
        with torch.device("meta"):
            network = self.build().eval()
        if weights is not None:
            path = Path(weights)
        elif self.release is not None:
            path = released_file(self.release, expected, "--weights", progress)
        else:
            raise InputError(f"`--weights` must be given for features {name}; {expected}")
        try:
            tensors = self.rename(read_tensors(path, expected))
        except (RuntimeError, IndexError) as error:  # tensors of other shapes can't be concatenated
            raise InputError(f"weights {path} aren't those of {name}; {expected}") from error
        if problem := unusable(tensors, network) or _difference(tensors, network):
            raise InputError(f"weights {path} have {problem}, so they aren't those of {name}; {expected}")
        tensors = {key: tensor.float() for key, tensor in tensors.items()}
        network.load_state_dict(tensors, assign=True)
        extractor = PretrainedExtractor(name, self.finish(network), self.resize, self.mean, self.std)
        return name, extractor, state_hash(tensors)


class PretrainedExtractor(FeatureExtractorBase):
    """Features of a network for uint8 images (B, 3, H, W) of any size."""

    def __init__(
        self,
        name: str,
        network: nn.Module,
        resize: Callable[[torch.Tensor], torch.Tensor],
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> None:
        super().__init__(name, ["features"])
        self.network, self.resize = network, resize
        self.register_buffer("mean", 255 * torch.tensor(mean).reshape(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).reshape(3, 1, 1))

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("features",)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts = images.split(CPU_BATCH if images.device.type == "cpu" else BATCH)
        return (torch.cat([self.network((self.resize(part.float()) - self.mean) / self.std) for part in parts]),)


def _difference(tensors: Tensors, network: nn.Module) -> str | None:
    """The first tensor that is missing, unknown to the network, or of another shape; None if there is none."""
    own = network.state_dict()
    for name in own:
        if name not in tensors:
            return f"no tensor {name}"
    for name, tensor in tensors.items():
        if name not in own:
            return f"an unknown tensor {name}"
        if tensor.shape != own[name].shape:
            return f"tensor {name} of shape {tuple(tensor.shape)} instead of {tuple(own[name].shape)}"
    return None
