"""Metrics: rows of `METRICS`, each computed from the features of images and of a reference.

`fid`, the distance, is always computed; `sfid` is the distance in Inception's spatial features (Nash et al. 2021,
arXiv 2103.03841). `kid`, `isc` and `prc` are torch-fidelity's. `dc` is density and coverage (Naeem et al. 2020, arXiv
2002.09797), `mind` the Monge Inception Distance (Berthet et al. 2026, arXiv 2605.06797); for `fd-inf` and `fdr` see
`evaluation.jackknife`, for `isc-adm` and `prc-adm` `evaluation.adm`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, device
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from dia_diffusion.errors import InputError
from dia_diffusion.evaluation import adm
from dia_diffusion.evaluation.frechet import FeatureStatistics, Moments, frechet_distance
from dia_diffusion.evaluation.jackknife import extrapolated_distance, relative_distance
from dia_diffusion.evaluation.record import NUMBER_PARTS
from dia_diffusion.precision import exact_float32
from dia_diffusion.registry import Registry

DISTANCE = "fid"
Needs = Literal["features", "logits", "spatial", "reference features", "held-out features"]
LAYERS: tuple[Needs, ...] = ("logits", "spatial")
"""Layers of the extractor in addition to the features."""


@dataclass(frozen=True)
class MetricInputs:
    """The inputs of a metric. Tensors are float32 on the CPU, and None unless the metric needs them."""

    statistics: FeatureStatistics
    """Statistics of the images."""
    reference: Moments
    device: device
    """For heavy computations."""
    features: Tensor | None = None
    """(N, D)"""
    logits: Tensor | None = None
    """(N, K)"""
    reference_features: Tensor | None = None
    """(M, D)"""
    spatial: FeatureStatistics | None = None
    """Statistics of the images' spatial features."""
    reference_spatial: Moments | None = None
    held_out_features: Tensor | None = None
    """(N, D), of an equal number of real images outside the reference."""


@dataclass(frozen=True)
class Metric:
    """A metric. Settings that aren't in the resolved protocol are recorded with its numbers."""

    names: tuple[str, ...]
    """Names of its numbers, without the features: "KD" in the features `digits` is "KD(digits)" in a record."""
    compute: Callable[[MetricInputs, Mapping[str, Any]], Mapping[str, float]]
    """Inputs and settings -> its numbers by name; "KD std" is the standard deviation of "KD", "X low" and "X high" are
    the ends of an interval of "X"."""
    needs: tuple[Needs, ...] = ()
    """Inputs that it needs in addition to the statistics."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    """Fields of EvalProtocol that are also settings."""
    min_images: Callable[[Mapping[str, Any]], int] = lambda settings: 2
    """Settings -> the minimum number of images, and of reference images if it needs their features."""
    min_images_per_feature: int = 0
    """The number of images must be more than this times the number of features."""
    inception_names: tuple[str, ...] = ()
    """Names that papers reserve for the numbers in Inception's features."""

    def labels(self, features: str) -> dict[str, str]:
        """Name -> the number's name in records, for these features."""
        if features == "inception" and self.inception_names:
            return dict(zip(self.names, self.inception_names, strict=True))
        return {name: f"{name}({features})" for name in self.names}

    def check_count(
        self, name: str, count: int, settings: Mapping[str, Any], what: str = "images", num_features: int = 0
    ) -> None:
        """Raises InputError if there are too few images."""
        if count <= (most := self.min_images_per_feature * num_features):
            where = f"metric {name} in {num_features} features"
            raise InputError(f"{what} for {where} must be {most + 1} or more, got {count}")
        if count < (least := self.min_images(settings)):
            as_many = f", as many as `{self.options[0]}`" if self.options else ""
            raise InputError(f"{what} for metric {name} must be {least} or more{as_many}, got {count}")


METRICS: Registry[Metric] = Registry("metric")


def labeled(metric: Metric, numbers: Mapping[str, float], features: str) -> dict[str, float]:
    """A metric's numbers under their names in records."""
    labels = metric.labels(features)
    labels |= {f"{name} {part}": f"{label} {part}" for name, label in labels.items() for part in NUMBER_PARTS}
    return {labels[name]: value for name, value in numbers.items()}


def _distance(inputs: MetricInputs, settings: Mapping[str, Any]) -> dict[str, float]:
    return {"FD": frechet_distance(inputs.statistics, inputs.reference)}


def _fd_inf(inputs: MetricInputs, settings: Mapping[str, Any]) -> dict[str, float]:
    assert inputs.features is not None
    value, low, high = extrapolated_distance(inputs.features, inputs.reference, **settings)
    return {"FD-inf": value, "FD-inf low": low, "FD-inf high": high}


def _fdr(inputs: MetricInputs, settings: Mapping[str, Any]) -> dict[str, float]:
    assert inputs.features is not None and inputs.held_out_features is not None
    value, low, high = relative_distance(inputs.features, inputs.held_out_features, inputs.reference, **settings)
    return {"FDr": value, "FDr low": low, "FDr high": high}


def _spatial_distance(inputs: MetricInputs, settings: Mapping[str, Any]) -> dict[str, float]:
    assert inputs.spatial is not None and inputs.reference_spatial is not None
    return {"sFD": frechet_distance(inputs.spatial, inputs.reference_spatial)}


def _kid(inputs: MetricInputs, settings: Mapping[str, Any]) -> dict[str, float]:
    values = kid_features_to_metric(inputs.features, inputs.reference_features, **settings, verbose=False)
    return {"KD": values["kernel_inception_distance_mean"], "KD std": values["kernel_inception_distance_std"]}


def _isc(inputs: MetricInputs, settings: Mapping[str, Any]) -> dict[str, float]:
    values = isc_features_to_metric(inputs.logits, **settings)
    return {"IS": values["inception_score_mean"], "IS std": values["inception_score_std"]}


def _adm_isc(inputs: MetricInputs, settings: Mapping[str, Any]) -> dict[str, float]:
    assert inputs.logits is not None
    return {"IS-ADM": adm.inception_score(inputs.logits, settings["split_size"])}


PRC_NAMES = ("precision", "recall", "f_score")
ADM_PRC_NAMES = ("precision-ADM", "recall-ADM")


def _prc(inputs: MetricInputs, settings: Mapping[str, Any]) -> dict[str, float]:
    assert inputs.features is not None and inputs.reference_features is not None
    pair = (inputs.features.to(inputs.device), inputs.reference_features.to(inputs.device))
    batch = 1000  # rows of distances at once; affects memory, not results
    values = prc_features_to_metric(*pair, **settings, prc_batch_size=batch, save_cpu_ram=True, verbose=False)
    return {name: values[name] for name in PRC_NAMES}


def _adm_prc(inputs: MetricInputs, settings: Mapping[str, Any]) -> dict[str, float]:
    assert inputs.features is not None and inputs.reference_features is not None
    pair = (inputs.features.to(inputs.device), inputs.reference_features.to(inputs.device))
    return dict(zip(ADM_PRC_NAMES, adm.precision_recall(*pair, settings["neighbors"]), strict=True))


ROWS = 1000  # rows of pairwise distances held at once
DIRECTIONS = 50  # projections held at once


def _density_coverage(inputs: MetricInputs, settings: Mapping[str, Any]) -> dict[str, float]:
    """A real image's neighborhood reaches to its k-th nearest real image.

    density: how many neighborhoods an image is in, on average, divided by k. coverage: the fraction of real images with
    an image in their neighborhood.
    """
    assert inputs.features is not None and inputs.reference_features is not None
    features, reference = inputs.features.to(inputs.device), inputs.reference_features.to(inputs.device)
    k, inside, covered = settings["neighbors"], 0, 0
    with exact_float32():
        for rows in reference.split(ROWS):
            radii = torch.cdist(rows, reference).topk(k + 1, largest=False).values[:, -1]  # the nearest is itself
            within = torch.cdist(rows, features) < radii[:, None]  # (ROWS, N)
            inside += int(within.sum())
            covered += int(within.any(1).sum())
    return {"density": inside / (k * len(features)), "coverage": covered / len(reference)}


def _mind(inputs: MetricInputs, settings: Mapping[str, Any]) -> dict[str, float]:
    """3 D times the mean over random directions of the squared 2-Wasserstein distance of the projected features.

    Random numbers are drawn in torch-fidelity's order: the subset of the larger set's images, then the directions.
    """
    assert inputs.features is not None and inputs.reference_features is not None
    generator = torch.Generator().manual_seed(settings["rng_seed"])
    sets = [inputs.features, inputs.reference_features]
    count, width = min(map(len, sets)), sets[0].shape[1]
    sets = [
        each if len(each) == count else each[torch.randperm(len(each), generator=generator)[:count]] for each in sets
    ]
    directions = torch.randn(settings["projections"], width, generator=generator)
    directions = directions / directions.norm(dim=1, keepdim=True)
    samples, real = (each.to(inputs.device) for each in sets)
    total = 0.0
    with exact_float32():
        for block in directions.to(inputs.device).split(DIRECTIONS):
            first, second = ((block @ each.T).sort(dim=1).values for each in (samples, real))  # (DIRECTIONS, count)
            total += float((first - second).square().mean(1).sum())
    return {"MIND": 3 * width * total / len(directions)}


# The settings of torch-fidelity's metrics are its defaults, written out because they are recorded with each number.
METRICS.register(DISTANCE, Metric(("FD",), _distance, inception_names=("FID",)))
METRICS.register("sfid", Metric(("sFD",), _spatial_distance, needs=("spatial",), inception_names=("sFID",)))
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
METRICS.register(
    "isc-adm",
    Metric(
        ("IS-ADM",),
        _adm_isc,
        needs=("logits",),
        settings={"split_size": 5000},
        inception_names=("IS-ADM",),
    ),
)
METRICS.register(
    "prc-adm",
    Metric(
        ADM_PRC_NAMES,
        _adm_prc,
        needs=("features", "reference features"),
        settings={"neighbors": 3, "squared_distances": "float16"},
        min_images=lambda settings: int(settings["neighbors"]) + 1,
    ),
)
METRICS.register(
    "dc",
    Metric(
        ("density", "coverage"),
        _density_coverage,
        needs=("features", "reference features"),
        settings={"neighbors": 5},
        min_images=lambda settings: int(settings["neighbors"]) + 1,
    ),
)
METRICS.register(
    "mind",
    Metric(
        ("MIND",),
        _mind,
        needs=("features", "reference features"),
        settings={"projections": 1000, "rng_seed": 2020},
        inception_names=("MIND",),
    ),
)
METRICS.register(
    "fd-inf",
    Metric(
        ("FD-inf",),
        _fd_inf,
        needs=("features",),
        settings={"parts": [1, 2, 4], "groups": 20, "seed": 0},
        min_images=lambda settings: 2 * int(settings["groups"]),
        min_images_per_feature=4,  # so that no part's covariance is singular
        inception_names=("FID-inf",),
    ),
)
METRICS.register(
    "fdr",
    Metric(
        ("FDr",),
        _fdr,
        needs=("features", "held-out features"),
        settings={"groups": 20, "seed": 0},
        min_images=lambda settings: 2 * int(settings["groups"]),
    ),
)
