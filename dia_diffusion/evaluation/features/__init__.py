"""Feature extractors by name: rows of `FEATURES`, all of them torch-fidelity extractors."""

from dia_diffusion.evaluation.features.extractor import FEATURES, FeatureExtractor, build_features
from dia_diffusion.evaluation.features.inception import build_inception
from dia_diffusion.evaluation.features.packaged import PACKAGED, build_packaged

__all__ = ["FEATURES", "PACKAGED", "FeatureExtractor", "build_features"]

for _name in PACKAGED:
    FEATURES.register(_name, build_packaged(_name))
FEATURES.register("inception", build_inception)
