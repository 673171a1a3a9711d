"""The metrics: what is computed from features, and how records call it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from dia_diffusion.errors import InputError

METRICS = ("fid", "kid", "isc", "prc")
MIN_RESAMPLES = 10

# torch-fidelity's defaults, written out because they are recorded with each number.
RNG_SEED = 2020
KID = {"kid_subsets": 100, "kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_coef0": 1}
KID_SUBSET_SIZE = 1000
ISC = {"splits": 10, "shuffle": True}
PRC = {"prc_neighborhood": 3}
PRC_NAMES = ("precision", "recall", "f_score")

# Of the bootstrap's interval.
SEED = 0
LEVEL = 0.95


@dataclass(frozen=True)
class Extras:
    """What is asked for beside the distance."""

    metrics: tuple[str, ...] = ()
    """Of METRICS; the distance, `fid`, is always there."""
    kid_subset_size: int = KID_SUBSET_SIZE
    bootstrap: int = 0
    """Resamples for the distance's interval; 0: no interval."""

    def __post_init__(self) -> None:
        """Raises InputError for unknown metrics and numbers that can't be."""
        for name in self.metrics:
            if name not in METRICS:
                raise InputError(f"unknown metric {name!r}; accepted: {', '.join(METRICS)}")
        if self.kid_subset_size < 2:
            raise InputError(f"a KID subset of {self.kid_subset_size} images; accepted: 2 or more")
        if self.bootstrap != 0 and self.bootstrap < MIN_RESAMPLES:
            raise InputError(
                f"a bootstrap of {self.bootstrap} resamples; accepted: {MIN_RESAMPLES} or more, 0 for none"
            )

    @property
    def logits(self) -> bool:
        """Whether the features' file needs the classifier's logits too."""
        return "isc" in self.metrics

    @property
    def reference_features(self) -> bool:
        """Whether every reference image's features are needed, not their statistics alone."""
        return "kid" in self.metrics or "prc" in self.metrics

    def settings(self) -> dict[str, dict[str, Any]]:
        """All that the extra numbers depend on besides the protocol, for the record."""
        all_settings: dict[str, dict[str, Any]] = {
            "kid": KID | {"kid_subset_size": self.kid_subset_size, "rng_seed": RNG_SEED},
            "isc": ISC | {"rng_seed": RNG_SEED},
            "prc": PRC,
        }
        chosen = {name: values for name, values in all_settings.items() if name in self.metrics}
        if self.bootstrap:
            chosen["bootstrap"] = {"resamples": self.bootstrap, "level": LEVEL, "seed": SEED}
        return chosen

    def names(self, features: str) -> list[str]:
        """What the metrics beside the distance are called in these features, deviations left out."""
        single = [named(name, features) for name in ("kid", "isc") if name in self.metrics]
        return single + ([f"{name}({features})" for name in PRC_NAMES] if "prc" in self.metrics else [])

    def check_samples(self, count: int) -> None:
        """Raises InputError where so many images are too few for what is asked for."""
        self._check(count, "images", ("kid", "isc", "prc"))

    def check_reference(self, count: int) -> None:
        """The same for reference images."""
        self._check(count, "reference images", ("kid", "prc"))

    def _check(self, count: int, what: str, concerned: tuple[str, ...]) -> None:
        least = {"kid": self.kid_subset_size, "isc": ISC["splits"], "prc": PRC["prc_neighborhood"] + 1}
        for name in concerned:
            if name in self.metrics and count < least[name]:
                smaller = ", or a smaller --kid-subset-size" if name == "kid" else ""
                raise InputError(f"{name} of {count} {what}; accepted: {least[name]} or more{smaller}")


DISTANCE_ALONE = Extras()


def named(metric: str, features: str) -> str:
    """What KID or the Inception score is called: as in papers for Inception's features and for no others."""
    usual, other = {"kid": ("KID", "KD"), "isc": ("IS", "IS")}[metric]
    return usual if features == "inception" else f"{other}({features})"


PRC_BATCH_SIZE = 1000  # rows of distances at once: memory, not meaning


def compute_metrics(
    extras: Extras,
    features_name: str,
    features: torch.Tensor,
    logits: torch.Tensor | None,
    reference: torch.Tensor | None,
    device: torch.device,
    computing: Callable[[str], None] = lambda name: None,
) -> dict[str, float]:
    """The metrics that `extras` names, under the names that records give them, see `named`.

    features (N, D), logits (N, K) and reference (M, D) are float32 on the CPU and may be memory maps; distances between
    features are taken on `device`. `computing` is told each name before its work.
    """
    found: dict[str, float] = {}
    if "kid" in extras.metrics:
        computing("kid")
        values = kid_features_to_metric(
            features, reference, **KID, kid_subset_size=extras.kid_subset_size, rng_seed=RNG_SEED, verbose=False
        )
        name = named("kid", features_name)
        found[name] = values["kernel_inception_distance_mean"]
        found[f"{name} std"] = values["kernel_inception_distance_std"]
    if "isc" in extras.metrics:
        computing("isc")
        values = isc_features_to_metric(logits, **ISC, rng_seed=RNG_SEED)
        name = named("isc", features_name)
        found[name], found[f"{name} std"] = values["inception_score_mean"], values["inception_score_std"]
    if "prc" in extras.metrics:
        computing("prc")
        assert reference is not None
        pair = (features.to(device), reference.to(device))
        values = prc_features_to_metric(*pair, **PRC, prc_batch_size=PRC_BATCH_SIZE, save_cpu_ram=True, verbose=False)
        for name in PRC_NAMES:
            found[f"{name}({features_name})"] = values[name]
    return found
