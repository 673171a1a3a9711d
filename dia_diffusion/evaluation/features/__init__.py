"""Named feature extractors, all of them torch-fidelity extractors."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch_fidelity import register_feature_extractor

from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.features.extractor import FeatureExtractor, build_custom
from dia_diffusion.evaluation.features.inception import build_inception
from dia_diffusion.evaluation.features.packaged import Cifar10Extractor, ClassifierExtractor, DigitsExtractor
from dia_diffusion.io import sha256_of_file

__all__ = ["FEATURES", "FeatureExtractor", "build_features"]

FEATURES: dict[str, type[ClassifierExtractor]] = {"digits": DigitsExtractor, "cifar10": Cifar10Extractor}
"""This project's own, their weights packaged."""
ACCEPTED = f"{', '.join(FEATURES)}, inception, or MODULE:CLASS, a torch-fidelity extractor of your own"

for _name, _extractor in FEATURES.items():
    register_feature_extractor(_name, _extractor)


def build_features(
    name: str,
    device: str | torch.device = "cpu",
    weights: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FeatureExtractor:
    """The extractor called `name`, one of ACCEPTED, on `device`; Inception of other weights gets another name.

    weights: a file instead of the packaged or usual one; MODULE:CLASS finds its own.
    progress: of Inception's download, called with bytes and of how many.

    Raises InputError for an unknown name, and for weights that are missing, truncated or another network's; RunError
    for a failed download.
    """
    if name == "inception":
        return FeatureExtractor(*build_inception(weights, progress=progress), device)
    if ":" in name:
        return FeatureExtractor(name, *build_custom(name), device)
    if name not in FEATURES:
        raise InputError(f"`features` must be one of {ACCEPTED}, got {name!r}")
    extractor = FEATURES[name]
    weights = Path(weights or extractor.weights)
    layers = [extractor.get_default_feature_layer_for_metric(metric) for metric in ("fid", "isc")]
    module = extractor(name, layers, feature_extractor_weights_path=weights)
    return FeatureExtractor(name, module, sha256_of_file(weights), device)
