"""The features `inception`: torch-fidelity's inception-v3-compat, the network that defines FID."""

import io
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from dia_diffusion.download import Download
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.features.extractor import DownloadProgress, fold_batch_norms, state_hash
from dia_diffusion.evaluation.features.weight_files import read_tensors, released_file
from dia_diffusion.io import atomic_file, cache_folder, sha256_of_file

RELEASED = Download(
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    95_628_359,
)
"""torch-fidelity's port of the TensorFlow network of 2015 (Apache-2.0); pytorch-fid ships the same bytes."""
SPATIAL = "spatial"
"""The layer of sFID: `mixed_6/conv` of the TensorFlow graph, after its ReLU, 17x17, flattened as by ADM's evaluator."""
SPATIAL_CHANNELS = 7
"""The first channels of 192, so that there are about as many features as in FID: 2,023."""
LAYERS = ["2048", "logits_unbiased", SPATIAL]
NAME = "inception"
CPU_BATCH = 16
"""Images per batch on a CPU: their maps of 147x147 take 90 MB; with 64, an image takes a seventh more time."""
EXPECTED = f"expected: {RELEASED.file} with sha256 {RELEASED.sha256}, or a safetensors file of its tensors"

Tensors = dict[str, torch.Tensor]


class InceptionExtractor(FeatureExtractorInceptionV3):
    """torch-fidelity's extractor, given its weights: on its own it would unpickle a file or download one.

    features_list: any of "64", "192", "768", "2048", "logits_unbiased", "logits"; "spatial" may come last, after "2048"
        or a later one.
    Raises RuntimeError for tensors of another network.
    """

    layer_names = ("features", "logits", SPATIAL)

    def __init__(self, features_list: list[str], weights: Mapping[str, torch.Tensor]) -> None:
        nothing = io.BytesIO()
        torch.save({}, nothing)
        nothing.seek(0)
        super().__init__("inception", [name for name in features_list if name != SPATIAL], nothing)
        self.load_state_dict(weights)
        self.to(memory_format=torch.channels_last)  # nearly halves the time of convolutions on a CPU
        self._spatial: torch.Tensor | None = None
        if SPATIAL in features_list:
            self.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self._spatial = rearrange(output[:, :SPATIAL_CHANNELS], "b c h w -> b (h w c)").float()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if images.device.type != "cpu":
            return self._forward(images)
        parts = map(self._forward, images.split(CPU_BATCH))
        return tuple(torch.cat(layer) for layer in zip(*parts, strict=True))

    def _forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        layers, spatial = super().forward(images), self._spatial
        self._spatial = None
        return layers if spatial is None else (*layers, spatial)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state_dict, strict=strict and bool(state_dict), assign=assign)


def build_inception(
    weights: str | Path | None = None, progress: DownloadProgress | None = None, features_list: list[str] = LAYERS
) -> tuple[str, InceptionExtractor, str]:
    """The features' name, the extractor, and the `state_hash` of its weights, the same for a .pth and its safetensors.

    Only the released weights (the release file, or our cached copy of it) get the name `inception`, for which a
    distance is called FID. The name of other weights has the start of their hash, such as `inception-1a2b3c4d`.

    weights: a .pth or .safetensors file. None: the file that torch-fidelity has downloaded to torch's hub folder, else
        its release file, downloaded now (`progress` gets bytes done and total) and checked by sha256; either is
        converted to safetensors in our cache once, and read from there afterwards.

    Raises InputError for a file that is missing, truncated or another network's; RunError for a failed download.
    """
    name, extractor, weights_hash = _find(weights, features_list, progress)
    fold_batch_norms(extractor)  # after the tensors are hashed
    return name, extractor, weights_hash


def _find(
    weights: str | Path | None, features_list: list[str], progress: DownloadProgress | None
) -> tuple[str, InceptionExtractor, str]:
    """As `build_inception`, but with the tensors as they are in the file."""
    cached = cache_folder() / "inception" / f"{RELEASED.sha256}.safetensors"
    if weights is not None:
        extractor, weights_hash = _build(read_tensors(Path(weights), EXPECTED), Path(weights), features_list)
        released = sha256_of_file(weights) == RELEASED.sha256 or weights_hash == _metadata(cached).get("weights_hash")
        return NAME if released else f"{NAME}-{weights_hash[:8]}", extractor, weights_hash
    if (tensors := _read_cached(cached)) is not None:
        return NAME, *_build(tensors, cached, features_list)
    path = released_file(RELEASED, EXPECTED, "--inception-weights", progress)
    extractor, weights_hash = _build(read_tensors(path, EXPECTED), path, features_list)
    tensors = {name: tensor.contiguous() for name, tensor in extractor.state_dict().items()}
    with suppress(OSError), atomic_file(cached) as temporary:  # without a cache if it can't be written
        save_file(tensors, temporary, metadata={"weights_hash": weights_hash, "sha256": RELEASED.sha256})
    return NAME, extractor, weights_hash


def unreleased(name: str, weights: str | Path) -> str | None:
    """A warning about features that `build_inception` named `name`; None for the released weights."""
    if name == NAME:
        return None
    return (
        f"{weights} isn't the released Inception (its sha256 is {sha256_of_file(weights)}, the release's "
        f"{RELEASED.sha256}): the features are called {name}, and the distance isn't called FID"
    )


def _build(tensors: Tensors, path: Path, features_list: list[str]) -> tuple[InceptionExtractor, str]:
    try:
        extractor = InceptionExtractor(features_list, tensors)
    except RuntimeError as error:
        raise InputError(f"weights {path} are another network's, not torch-fidelity's Inception; {EXPECTED}") from error
    return extractor, state_hash(extractor.state_dict())


def _read_cached(path: Path) -> Tensors | None:
    """The tensors that an earlier run converted from the release file; None if they are missing or altered."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError):
        return None
    return tensors if state_hash(tensors) == _metadata(path).get("weights_hash") else None


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}
