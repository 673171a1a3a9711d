"""Every reference image's features, for the metrics that compare images one by one; cached on disk."""

import hashlib
import json
from collections.abc import Callable

import torch
from accelerate import Accelerator

from dia_diffusion.data import ImageSet
from dia_diffusion.evaluation.feature_pass import SILENT, Reporter, batches_of, fill, open_on_main, widths_of
from dia_diffusion.evaluation.features import FeatureExtractor
from dia_diffusion.evaluation.reference import STATISTICS_VERSION
from dia_diffusion.io import cache_folder


def reference_features(
    images: ImageSet,
    extractor: FeatureExtractor,
    accelerator: Accelerator,
    progress: Callable[[float], None] | None = None,
    reporter: Reporter = SILENT,
) -> torch.Tensor | None:
    """The features (N, D) of the images, a memory map of a file in the cache; None where this isn't the main process.

    All processes share the work where it isn't in the cache, and it goes on where it was stopped. A cache that can't be
    written is done without.
    """
    depends = [images.fingerprint, extractor.name, extractor.weights_hash, STATISTICS_VERSION]
    folder = cache_folder() / "features" / hashlib.sha256(json.dumps(depends).encode()).hexdigest()
    widths = widths_of(extractor, logits=False)
    with open_on_main(accelerator, folder, widths, len(images), cache=True) as file:
        fill(file, len(images), batches_of(images, progress), extractor, accelerator, widths, images.name, reporter)
        return None if file is None else file.read("features")
