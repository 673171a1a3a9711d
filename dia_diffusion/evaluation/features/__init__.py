"""Feature extractors by name: rows of `FEATURES`, all of them torch-fidelity extractors."""

from functools import partial

from dia_diffusion.evaluation.features.clip import CLIP
from dia_diffusion.evaluation.features.dinov2 import DINOV2
from dia_diffusion.evaluation.features.extractor import FEATURES, FeatureExtractor, build_features
from dia_diffusion.evaluation.features.inception import build_inception
from dia_diffusion.evaluation.features.packaged import PACKAGED, build_packaged
from dia_diffusion.evaluation.features.vgg16 import VGG16

__all__ = ["FEATURES", "PACKAGED", "FeatureExtractor", "build_features"]

for _name in PACKAGED:
    FEATURES.register(_name, build_packaged(_name))
FEATURES.register("inception", build_inception)
for _name, _network in {**DINOV2, **CLIP, "vgg16": VGG16}.items():
    FEATURES.register(_name, partial(_network.load, _name))
