"""Metrics: rows of `METRICS`, each computed from the features of images and of a reference.

`fid`, the distance, is computed in any case. The others are torch-fidelity's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, device
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.frechet import FeatureStatistics, Moments, frechet_distance
from dia_diffusion.registry import Registry

DISTANCE = "fid"
Needs = Literal["features", "logits", "reference features"]


@dataclass(frozen=True)
class MetricInputs:
    """What a metric is computed from. Tensors are float32 on the CPU, and None unless the metric needs them."""

    statistics: FeatureStatistics
    """Of the images."""
    reference: Moments
    device: device
    """For heavy computations."""
    features: Tensor | None = None
    """(N, D)"""
    logits: Tensor | None = None
    """(N, K)"""
    reference_features: Tensor | None = None
    """(M, D)"""


@dataclass(frozen=True)
class Metric:
    """A metric. What it depends on besides the protocol is recorded with its numbers."""

    names: tuple[str, ...]
    """Of its numbers, without the features: a record calls "KD" in the features digits "KD(digits)"."""
    compute: Callable[[MetricInputs, Mapping[str, Any]], Mapping[str, float]]
    """Inputs and settings -> its numbers by name; "KD std" is the standard deviation of "KD"."""
    needs: tuple[Needs, ...] = ()
    """Besides the statistics."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    """Fields of EvalProtocol that are settings too."""
    min_images: Callable[[Mapping[str, Any]], int] = lambda settings: 2
    """Settings -> the least number of images, and of reference images if it needs their features."""
    inception_names: tuple[str, ...] = ()
    """As papers call the numbers in Inception's features, and nothing else."""

    def labels(self, features: str) -> dict[str, str]:
        """Name -> what a record calls the number in these features."""
        if features == "inception" and self.inception_names:
            return dict(zip(self.names, self.inception_names, strict=True))
        return {name: f"{name}({features})" for name in self.names}

    def check_count(self, name: str, count: int, settings: Mapping[str, Any], what: str = "images") -> None:
        """Raises InputError if these are too few images."""
        if count < (least := self.min_images(settings)):
            options = f", or change {', '.join(f'`{option}`' for option in self.options)}" if self.options else ""
            raise InputError(f"{what} for metric {name} must be {least} or more, got {count}{options}")


METRICS: Registry[Metric] = Registry("metric")


def labelled(metric: Metric, numbers: Mapping[str, float], features: str) -> dict[str, float]:
    """A metric's numbers as a record calls them."""
    labels = metric.labels(features)
    labels |= {f"{name} std": f"{label} std" for name, label in labels.items()}
    return {labels[name]: value for name, value in numbers.items()}


def _distance(inputs: MetricInputs, settings: Mapping[str, Any]) -> dict[str, float]:
    return {"FD": frechet_distance(inputs.statistics, inputs.reference)}


def _kid(inputs: MetricInputs, settings: Mapping[str, Any]) -> dict[str, float]:
    values = kid_features_to_metric(inputs.features, inputs.reference_features, **settings, verbose=False)
    return {"KD": values["kernel_inception_distance_mean"], "KD std": values["kernel_inception_distance_std"]}


def _isc(inputs: MetricInputs, settings: Mapping[str, Any]) -> dict[str, float]:
    values = isc_features_to_metric(inputs.logits, **settings)
    return {"IS": values["inception_score_mean"], "IS std": values["inception_score_std"]}


PRC_NAMES = ("precision", "recall", "f_score")


def _prc(inputs: MetricInputs, settings: Mapping[str, Any]) -> dict[str, float]:
    assert inputs.features is not None and inputs.reference_features is not None
    pair = (inputs.features.to(inputs.device), inputs.reference_features.to(inputs.device))
    batch = 1000  # rows of distances at once: memory, not meaning
    values = prc_features_to_metric(*pair, **settings, prc_batch_size=batch, save_cpu_ram=True, verbose=False)
    return {name: values[name] for name in PRC_NAMES}


# Settings are torch-fidelity's defaults, written out because they are recorded with each number.
METRICS.register(DISTANCE, Metric(("FD",), _distance, inception_names=("FID",)))
METRICS.register(
    "kid",
    Metric(
        ("KD",),
        _kid,
        needs=("features", "reference features"),
        settings={
            "kid_subsets": 100,
            "kid_kernel": "poly",
            "kid_kernel_poly_degree": 3,
            "kid_kernel_poly_coef0": 1,
            "rng_seed": 2020,
        },
        options=("kid_subset_size",),
        min_images=lambda settings: int(settings["kid_subset_size"]),
        inception_names=("KID",),
    ),
)
METRICS.register(
    "isc",
    Metric(
        ("IS",),
        _isc,
        needs=("logits",),
        settings={"splits": 10, "shuffle": True, "rng_seed": 2020},
        min_images=lambda settings: int(settings["splits"]),
        inception_names=("IS",),
    ),
)
METRICS.register(
    "prc",
    Metric(
        PRC_NAMES,
        _prc,
        needs=("features", "reference features"),
        settings={"prc_neighborhood": 3},
        min_images=lambda settings: int(settings["prc_neighborhood"]) + 1,
    ),
)
