"""What is computed beside the distance from the same features: by torch-fidelity's functions."""

from collections.abc import Callable

import torch
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from dia_diffusion.evaluation.extras import ISC, KID, PRC, PRC_NAMES, RNG_SEED, Extras, named

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
