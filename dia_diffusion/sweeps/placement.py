"""Where the unit has to be: in the first k blocks, and in all but the in, middle or out blocks.

The paper's Fig. 10 lets the unit into more and more blocks of a classifier, its Table XV takes it from one stage. A
UViT is one stage; its three parts stand for stages here.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dia_diffusion.errors import InputError
from dia_diffusion.sweeps.statistics import estimate
from dia_diffusion.sweeps.trials import TRAINED, Trial, base_recipe, check_trials, make_trial, unit_keys
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.recipe import read_experiment


def placements(num_layers: int) -> dict[str, list[int]]:
    """Name -> the blocks that carry the unit, counted from 0: the first 0 to L, then all but those of one part."""
    half = num_layers // 2
    parts = {"in": range(half), "mid": range(half, half + 1), "out": range(half + 1, num_layers)}
    first = {f"first-{count}": list(range(count)) for count in range(num_layers + 1)}
    without = {
        f"without-{part}": [block for block in range(num_layers) if block not in blocks]
        for part, blocks in parts.items()
        if len(blocks)
    }
    return first | without


def placement_trials(
    folder: Path,
    config: str,
    *,
    unit: str,
    seeds: Sequence[int],
    steps: int,
    keys: dict[str, Any],
) -> list[Trial]:
    """Every placement that is unlike the others, seed by seed, so that an early end leaves whole comparisons.

    keys: further recipe keys, of all trials.

    Raises:
        InputError: an unknown unit, or a value that the recipe refuses.
    """
    common = {"train.max_steps": steps, **keys}
    bases: dict[str, tuple[list[int], Experiment]] = {}
    model = read_experiment(config, keys=keys).to_dict()["model"]
    if "num_layers" not in model:
        raise InputError(f"`model.backbone` must be uvit for placements, got {model['backbone']!r}")
    for name, blocks in placements(model["num_layers"]).items():
        if blocks in [others for others, _ in bases.values()]:  # all but the out blocks are the first ones
            continue
        with_unit = {**unit_keys(unit), "model.attention_blocks": blocks} if blocks else unit_keys("none")
        bases[name] = blocks, base_recipe(name, config, {**common, **with_unit})
    trials = [
        make_trial(f"{name}-s{seed}", {"unit": unit, "blocks": blocks, "seed": seed}, folder, base, seed)
        for seed in seeds
        for name, (blocks, base) in bases.items()
    ]
    check_trials(trials)
    return trials


def summarise_placement(results: Sequence[dict[str, Any]], num_layers: int) -> list[dict[str, Any]]:
    """A row for each placement: mean and interval over seeds of the held-out loss, and of the distance where measured.

    A placement that is two at once has two rows. Diverged trials are counted and left out of the means.
    """
    groups: dict[tuple[int, ...], list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        groups[tuple(result["trial"]["blocks"])].append(result)
    rows = []
    for name, blocks in placements(num_layers).items():
        found = groups.get(tuple(blocks), [])
        trained = [result for result in found if result["outcome"] == TRAINED]
        row: dict[str, Any] = {"placement": name, "blocks": blocks, "seeds": len(found)}
        row["diverged"] = len(found) - len(trained)
        for key in ("held_out_loss", "distance"):
            values = [result[key] for result in trained if result.get(key) is not None]
            row[key] = values
            row[f"{key}_mean"] = estimate(values).mean if values else None
            row[f"{key}_half_width"] = estimate(values).half_width if values else None
        rows.append(row)
    return rows
