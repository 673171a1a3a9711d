"""Feature extractors: from images to the vectors that a distance compares.

Features are rows of `FEATURES`, or MODULE:CLASS, the user's own torch-fidelity extractor.
"""

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch_fidelity import FeatureExtractorBase

from dia_diffusion.errors import InputError, one_line
from dia_diffusion.io import sha256_of_file
from dia_diffusion.models.factory import unusable
from dia_diffusion.precision import exact_float32
from dia_diffusion.reading import Unreadable, read_json_object
from dia_diffusion.registry import Registry

Module = TypeVar("Module", bound=nn.Module)


DownloadProgress = Callable[[int, int], None]
"""Called with (bytes done, total)."""
BuildFeatures = Callable[[str | Path | None, DownloadProgress | None], tuple[str, FeatureExtractorBase, str]]
"""(weights, None: the usual ones; download progress) -> (name for records, extractor, hash of the weights)."""

FEATURES: Registry[BuildFeatures] = Registry("features")
OWN = "MODULE:CLASS, a torch-fidelity extractor of your own"


def check_features_name(name: str) -> str:
    """The name. Raises InputError unless features are a row of FEATURES or have the form MODULE:CLASS."""
    if name not in FEATURES and not all(name.partition(":")):
        raise InputError(f"`features` must be one of {', '.join(FEATURES)}, or {OWN}, got {name!r}")
    return name


def build_features(
    name: str,
    device: str | torch.device = "cpu",
    weights: str | Path | None = None,
    progress: DownloadProgress | None = None,
) -> "FeatureExtractor":
    """The extractor called `name` on `device`; Inception with other weights gets another name.

    Args:
        name: a row of FEATURES, or MODULE:CLASS.
        weights: a file instead of the usual one; MODULE:CLASS finds its own.
        progress: of a download.

    Raises:
        InputError: an unknown name, or weights that are missing, truncated or another network's.
        RunError: a failed download.
    """
    check_features_name(name)
    built = (name, *build_custom(name)) if name not in FEATURES else FEATURES[name](weights, progress)
    return FeatureExtractor(*built, device)


class FeatureExtractor:
    """A torch-fidelity extractor under a name, with the hash of its weights; made by `build_features`.

    Args:
        name: as in records.
        module: returns the features, followed by logits if it has any, or the layers listed in its `layer_names`.

    Raises:
        InputError: a module that fails on an image, or doesn't return finite features (B, D).
    """

    def __init__(self, name: str, module: FeatureExtractorBase, weights_hash: str, device: str | torch.device) -> None:
        self.name = name
        self.weights_hash = weights_hash
        self.device = torch.device(device)
        self._module = module.requires_grad_(False).eval().to(self.device)
        self.widths: dict[str, int] = {}
        """Widths of the layers that `layers` returns: features, and possibly logits and spatial features (for sFID)."""
        layers = self.layers(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
        self.widths = {name: layer.shape[1] for name, layer in layers.items()}
        self.num_features = self.widths["features"]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images (B, C, H, W) with 1 or 3 channels, on any device -> float32 features (B, num_features).

        Features don't depend on the caller's autocast or TF32 settings.

        Raises:
            InputError: images of another type or shape, a module that fails, or features that aren't finite (B, D).
        """
        return self.layers(images)["features"]

    @torch.no_grad()
    def layers(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """All layers (B, width) of the same images by name, from one pass.

        Raises InputError as `__call__` does.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise InputError(f"images must be uint8 images (B, 1 or 3, H, W), got {images.dtype} {tuple(images.shape)}")
        images = images.to(self.device, non_blocking=self.device.type == "cuda").expand(-1, 3, -1, -1)
        with torch.autocast(self.device.type, enabled=False), exact_float32():
            return self._layers_of_module(images)

    def _layers_of_module(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The module's layers, converted to float32 and checked, since a user's own module may return anything."""
        size = "x".join(map(str, images.shape[-2:]))
        try:
            names = getattr(self._module, "layer_names", ("features", "logits"))
            layers = [layer.float() for layer in self._module(images)][: len(names)]
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a user's own module can raise anything
            raise InputError(
                f"features {self.name} fail on images of {size} ({type(error).__name__}: {one_line(str(error))})"
            ) from error
        shapes = [tuple(layer.shape) for layer in layers]
        fits = shapes and all(len(shape) == 2 and shape[0] == len(images) for shape in shapes)
        if not fits or (self.widths and [width for _, width in shapes] != list(self.widths.values())):
            given = ", ".join(map(str, shapes)) or "nothing"
            widths = " and ".join(map(str, self.widths.values())) or "number of features"
            raise InputError(
                f"features {self.name} must be ({len(images)}, {widths}) for images of shape {tuple(images.shape)}, "
                f"got {given}"
            )
        if not layers[0].isfinite().all():
            raise InputError(f"features {self.name} give values that aren't finite for images of {size}")
        return dict(zip(names, layers, strict=False))


def fold_batch_norms(network: nn.Module) -> None:
    """Folds every BatchNorm2d into the preceding convolution, which saves a pass over each map.

    network: in evaluation mode; its state dict changes.
    """
    for module in network.modules():
        for (name, convolution), (next_name, norm) in pairwise(list(module.named_children())):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(convolution, norm))
                setattr(module, next_name, nn.Identity())


def state_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, types, shapes and values, in order of name: the same for all files of the same tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_weights(module: Module, path: str | Path) -> Module:
    """Loads a safetensors file of exactly this module's tensors; a JSON file next to it may give the expected sha256.

    Raises InputError naming the file.
    """
    path = Path(path)
    card = path.with_suffix(".json")
    if path.exists() and not path.is_file():  # opening a pipe would block
        raise InputError(f"weights must be a regular safetensors file, got {path}")
    try:
        if card.exists() and (expected := read_json_object(card)["sha256"]) != sha256_of_file(path):
            raise InputError(f"weights {path} are damaged or another network's: {card.name} says sha256 {expected}")
        tensors = load_file(path)
        if problem := unusable(tensors, module):
            raise InputError(f"weights {path} have {problem}")
        module.load_state_dict(tensors)
    except (Unreadable, KeyError) as error:
        raise InputError(f"{card} has no sha256 for its weights; without that file they load unchecked") from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"weights {path} are missing, truncated or not safetensors ({error})") from error
    except RuntimeError as error:
        raise InputError(f"weights {path} are another network's, not a {type(module).__name__}'s") from error
    return module


def build_custom(name: str) -> tuple[FeatureExtractorBase, str]:
    """The extractor called MODULE:CLASS and a hash of its state dict and of the file that defines its class.

    The module is imported from the working folder or from installed packages, which runs its code. The class is
    constructed as torch-fidelity does, (name, layers), with its default layers for "fid" and, if it has one, "isc".
    Raises InputError if it can't be imported or constructed, or the class is not an extractor.
    """
    module_name, _, class_name = name.partition(":")
    module = _import(module_name)
    extractor = getattr(module, class_name, None)
    if not (isinstance(extractor, type) and issubclass(extractor, FeatureExtractorBase)):
        what = f"{class_name} in {module_name} isn't one" if hasattr(module, class_name) else f"no {class_name} there"
        raise InputError(
            f"features {name}: {what}; a torch-fidelity extractor is needed, and {module_name} has: "
            f"{', '.join(_extractors(module)) or 'none'}"
        )
    try:
        built = extractor(name, _layers(extractor))
        return built, _hash(built)
    except Exception as error:  # a user's own code can raise anything
        raise InputError(
            f"features {name} can't be constructed as {class_name}(name, layers) ({_describe(error)})"
        ) from error


def _hash(extractor: FeatureExtractorBase) -> str:
    """sha256 over tensors and code, since the code defines the features if there are few or no tensors."""
    parts = state_hash(extractor.state_dict()), sha256_of_file(inspect.getfile(type(extractor)))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _import(name: str) -> ModuleType:
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise InputError(f"module {name} can't be imported ({_describe(error)})") from error
        raise InputError(f"no module {name!r} in {here} or installed; features are named MODULE:CLASS") from error
    except (Exception, SystemExit) as error:
        raise InputError(f"module {name} can't be imported ({_describe(error)})") from error


def _layers(extractor: type[FeatureExtractorBase]) -> list[str]:
    """The default layers for "fid" and, if there is one, for "isc"."""
    layers = [extractor.get_default_feature_layer_for_metric("fid")]
    try:
        logits = extractor.get_default_feature_layer_for_metric("isc")
    except Exception:  # KeyError, AssertionError or NotImplementedError, depending on the extractor
        logits = None
    return layers if logits is None or logits in layers else [*layers, logits]


def _extractors(module: ModuleType) -> list[str]:
    own = (value for value in vars(module).values() if isinstance(value, type))
    return [
        value.__name__ for value in own if issubclass(value, FeatureExtractorBase) and value is not FeatureExtractorBase
    ]


def _describe(error: BaseException) -> str:
    return one_line(f"{type(error).__name__}: {error}")
