"""Who still trains: units x a network with a part taken out x learning rates (arXiv 2210.16101, VI-A2 and Fig. 14).

The paper takes BatchNorm, augmentation and skip connections from classifiers. A UViT has no BatchNorm; what it has to
lose are its long skips, its residual additions and its LayerNorms.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dia_diffusion.errors import InputError
from dia_diffusion.sweeps.statistics import estimate
from dia_diffusion.sweeps.trials import NOT_FINITE, TRAINED, Trial, base_recipe, check_trials, make_trial, unit_keys

VARIANTS: dict[str, dict[str, Any]] = {
    "as-is": {},
    "no-long-skips": {"model.long_skips": False},
    "no-residuals": {"model.residual_skips": False},
    "no-layer-norm": {"model.layer_norm": False},
}
UNITS = ("none", "dia-lstm", "dia-lstm-light", "se-individual")
# The whole rate from the first step to the last: a warm-up or a falling rate would hide what is asked.
SCHEDULE = {"optimizer.schedule": "constant", "optimizer.warmup_steps": 0}


def stability_trials(
    folder: Path,
    config: str,
    *,
    variants: Sequence[str],
    units: Sequence[str],
    rates: Sequence[float],
    seeds: Sequence[int],
    batch_size: int,
    steps: int,
    keys: dict[str, Any],
) -> list[Trial]:
    """Every unit in every variant at every rate, seed by seed, so that an early end leaves whole comparisons.

    keys: further recipe keys, of all trials.

    Raises:
        InputError: an unknown variant or unit, or a value that the recipe refuses.
    """
    if unknown := [name for name in variants if name not in VARIANTS]:
        raise InputError(f"unknown variant {unknown[0]!r}; accepted: {', '.join(VARIANTS)}")
    common = {"train.batch_size": batch_size, "train.max_steps": steps, **SCHEDULE, **keys}
    bases = {
        (variant, unit): base_recipe(f"{variant}-{unit}", config, {**common, **VARIANTS[variant], **unit_keys(unit)})
        for variant in variants
        for unit in units
    }
    trials = []
    for seed in seeds:
        for rate in rates:
            for (variant, unit), base in bases.items():
                about = {"variant": variant, "unit": unit, "learning_rate": rate, "seed": seed}
                trials.append(make_trial(f"{variant}-{unit}-lr{rate:g}-s{seed}", about, folder, base, seed, rate))
    check_trials(trials)
    return trials


def summarise_stability(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each variant, unit and rate: the seeds' outcomes, and the mean held-out loss of those that trained."""
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        about = result["trial"]
        groups[about["variant"], about["unit"], about["learning_rate"]].append(result)
    rows = []
    for (variant, unit, rate), found in groups.items():
        trained = [result["held_out_loss"] for result in found if result["outcome"] == TRAINED]
        rows.append(
            {
                "variant": variant,
                "unit": unit,
                "learning_rate": rate,
                "seeds": len(found),
                "outcomes": [result["outcome"] for result in found],
                "not_finite_at": sorted(r["not_finite_at"] for r in found if r["outcome"] == NOT_FINITE),
                "held_out_loss": estimate(trained).mean if trained else None,
                "half_width": estimate(trained).half_width if trained else None,
            }
        )
    return rows
