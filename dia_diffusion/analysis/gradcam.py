"""Where a classifier looks: Grad-CAM (Selvaraju et al. 2017) of its last block, from the grad-cam library (Fig. 9)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.models.vision_transformer import EncoderBlock

from dia_diffusion.attention.insertion_points import insertion_points
from dia_diffusion.errors import InputError
from dia_diffusion.models.classifiers import SavedClassifier
from dia_diffusion.plotting import save_figure


@dataclass(frozen=True)
class HeatMaps:
    """One classifier's heat maps of some images."""

    name: str
    maps: npt.NDArray[np.float32]
    """(B, H, W), each from 0 to 1, at the images' size."""
    scores: npt.NDArray[np.float64]
    """(B,), softmax scores of the explained class."""
    predicted: npt.NDArray[np.int64]
    """(B,), the predicted class."""


def heat_maps(name: str, classifier: SavedClassifier, images: Tensor, classes: Sequence[int] | None) -> HeatMaps:
    """Grad-CAM of uint8 images (B, 3, H, W) for one class per image; None explains the predicted class.

    Raises:
        InputError: the library is missing, or the classifier doesn't have one of the classes.
    """
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError:
        raise InputError("Grad-CAM needs the package grad-cam: pip install 'dia-diffusion[gradcam]'") from None
    known = classifier.config.num_classes
    if classes is not None and not all(0 <= number < known for number in classes):
        raise InputError(f"`--class` must be 0 to {known - 1} for {name}, got {max(classes)}")
    device = next(classifier.model.parameters()).device
    inputs = classifier.prepare(images.to(device))
    with torch.no_grad():
        probabilities = classifier.model(inputs).cpu().double().softmax(dim=1).numpy()
    predicted = probabilities.argmax(axis=1)
    asked = predicted if classes is None else np.array(classes)
    layer, is_tokens = last_block(classifier.model)
    # The weights are frozen, so the images must require gradients.
    with GradCAM(classifier.model, [layer], reshape_transform=token_grid if is_tokens else None) as cam:
        maps = cam(inputs.requires_grad_(), [ClassifierOutputTarget(int(number)) for number in asked])
    return HeatMaps(name, maps, probabilities[np.arange(len(asked)), asked], predicted)


def last_block(model: nn.Module) -> tuple[nn.Module, bool]:
    """The layer to explain, and whether its output is tokens (B, 1 + L, N) instead of maps (B, N, H, W).

    For a ResNet, the last block; for a ViT, the first norm of the last block, after which only the class token matters.

    Raises:
        InputError: the network's blocks aren't known.
    """
    block = model.get_submodule(insertion_points(model)[-1].module.rpartition(".")[0])
    return (block.ln_1, True) if isinstance(block, EncoderBlock) else (block, False)


def token_grid(tokens: Tensor) -> Tensor:
    """A ViT's tokens (B, 1 + L, N), the class token first, as square maps (B, N, sqrt L, sqrt L)."""
    side = round((tokens.shape[1] - 1) ** 0.5)
    return rearrange(tokens[:, 1:], "B (h w) N -> B N h w", h=side)


def draw_heat_maps(
    images: npt.NDArray[np.uint8],
    asked: Sequence[str],
    heat_maps: Sequence[HeatMaps],
    path: str | Path,
    class_names: Sequence[str] | None = None,
) -> None:
    """Draws a row per image (B, 3, H, W): the image with its explained class, then a heat map per classifier.

    Above each heat map is the softmax score, and the predicted class if it is a different one.
    """
    rows, columns = len(images), 1 + len(heat_maps)
    figure = Figure(figsize=(1.75 * columns, 1.9 * rows + 0.35), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for row in range(rows):
        picture = images[row].transpose(1, 2, 0)
        grid[row, 0].imshow(picture)
        grid[row, 0].set_title(asked[row], fontsize="small")
        for axes, one in zip(grid[row, 1:], heat_maps, strict=True):
            axes.imshow(picture)
            axes.imshow(one.maps[row], cmap="jet", alpha=0.45, vmin=0, vmax=1)
            chosen = class_names[one.predicted[row]] if class_names else str(one.predicted[row])
            wrong = "" if chosen == asked[row] else f" ({chosen})"
            axes.set_title(f"{one.scores[row]:.3f}{wrong}", fontsize="small")
    for axes, name in zip(grid[-1], ["image", *(one.name for one in heat_maps)], strict=True):
        axes.set_xlabel(name)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    save_figure(figure, path)
