"""Sweeps of many short trainings, compared by their loss on held-out images: stability and placement.

Stability asks which unit still trains, and at which learning rate, when a part of the network is removed (arXiv
2210.16101, VI-A2 and Fig. 14). The paper removes BatchNorm, augmentation and skip connections from classifiers; a UViT
has no BatchNorm, so its long skips, residual additions or LayerNorms are removed instead.

Placement asks which blocks need the unit: the first k, or all but the in, middle or out blocks. The paper's Fig. 10
puts the unit into more and more blocks of a classifier, and its Table XV removes it from one stage; a UViT has one
stage with three parts.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import count, product
from pathlib import Path
from typing import Any

from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.sweeps.checks import check_recipes, check_runs
from dia_diffusion.sweeps.collect import RunState, measured, origin_of
from dia_diffusion.sweeps.launcher import Job, Progress, run_jobs, write_config
from dia_diffusion.sweeps.outcome import NOT_FINITE, RESULT_FILE, TRAINED, HeldOut, Result, finished
from dia_diffusion.sweeps.stats import estimate_if_any
from dia_diffusion.sweeps.sweep import Run, resolve_precision
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.recipe import override, read_experiment
from dia_diffusion.training.run_folder import RunFolder, logged_step, refuse_other_randomness

LINES = 100
"""Most lines of a trial's metrics.jsonl."""
INDIVIDUAL = "-individual"
VARIANTS: dict[str, dict[str, Any]] = {
    "as-is": {},
    "no-long-skips": {"model.long_skips": False},
    "no-residuals": {"model.residual_skips": False},
    "no-layer-norm": {"model.layer_norm": False},
}
# The full rate from the first step to the last: warm-up or decay would hide divergence.
SCHEDULE = {"optimizer.schedule": "constant", "optimizer.warmup_steps": 0}


def base_recipe(name: str, config: str, keys: dict[str, Any]) -> Experiment:
    """The recipe of trials that differ only in folder, seed and rate; `name` is for the message of InputError."""
    try:
        experiment = read_experiment(config, keys=keys)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    steps = experiment.train.max_steps
    loop = {
        "log_every": max(1, steps // LINES),
        "checkpoint_every": steps,
        "sample_every": 0,
        "keep_last": 1,
        "max_skipped_steps": 1,  # the first skipped step decides the outcome
    }
    return override(experiment, {f"train.{key}": value for key, value in loop.items()})


def make_trial(
    name: str, label: dict[str, Any], folder: Path, base: Experiment, seed: int, rate: float | None = None
) -> Run:
    """A trial with this recipe, seed and learning rate (None: the recipe's), in folder / name."""
    keys = {"output": str(folder / name), "seed": seed}
    if rate is not None:
        keys["optimizer.learning_rate"] = rate
    return Run(name, label, override(base, keys))


def unit_keys(unit: str) -> dict[str, Any]:
    """The recipe keys of a unit by name; se-individual is the unit se with separate parameters in each block."""
    if unit.endswith(INDIVIDUAL):
        kwargs = {"sharing": "individual"}
        return {"model.attention": unit.removesuffix(INDIVIDUAL), "model.attention_kwargs": kwargs}
    return {"model.attention": unit}


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
) -> list[Run]:
    """Every unit in every variant at every rate, seed by seed, so that an interrupted sweep has complete comparisons.

    keys: further recipe keys, of all trials.

    Raises:
        InputError: an unknown variant or unit, or a value that the recipe refuses.
    """
    if unknown := [name for name in variants if name not in VARIANTS]:
        raise InputError(f"each of `--variants` must be one of {', '.join(VARIANTS)}, got {unknown[0]!r}")
    common = {"train.batch_size": batch_size, "train.max_steps": steps, **SCHEDULE, **keys}
    bases = {
        (variant, unit): base_recipe(f"{variant}-{unit}", config, {**common, **VARIANTS[variant], **unit_keys(unit)})
        for variant in variants
        for unit in units
    }
    trials = []
    for seed, rate, ((variant, unit), base) in product(seeds, rates, bases.items()):
        label = {"variant": variant, "unit": unit, "learning_rate": rate, "seed": seed}
        trials.append(make_trial(f"{variant}-{unit}-lr{rate:g}-s{seed}", label, folder, base, seed, rate))
    check_recipes(trials)
    return trials


def placements(num_layers: int) -> dict[str, list[int]]:
    """Name -> the blocks that carry the unit, counted from 0: the first 0 to L, then all but those of one part."""
    half, blocks = num_layers // 2, range(num_layers)
    parts = {"in": blocks[:half], "mid": blocks[half : half + 1], "out": blocks[half + 1 :]}
    first = {f"first-{count}": [*blocks[:count]] for count in range(num_layers + 1)}
    return first | {
        f"without-{name}": [block for block in blocks if block not in part] for name, part in parts.items() if part
    }


def placement_trials(
    folder: Path, config: str, *, unit: str, seeds: Sequence[int], steps: int, keys: dict[str, Any]
) -> list[Run]:
    """Every distinct placement, seed by seed, so that an interrupted sweep has complete comparisons.

    keys: further recipe keys, of all trials.

    Raises:
        InputError: an unknown unit, or a value that the recipe refuses.
    """
    common = {"train.max_steps": steps, **keys}
    bases: dict[str, tuple[list[int], Experiment]] = {}
    if unit == "none":
        raise InputError("`--unit` must be an attention unit, got none")
    model = read_experiment(config, keys=keys).to_dict()["model"]
    if "num_layers" not in model:
        raise InputError(f"`model.backbone` must be uvit for placements, got {model['backbone']!r}")
    for name, blocks in placements(model["num_layers"]).items():
        if blocks not in [others for others, _ in bases.values()]:  # "without-out" equals one of the first-k placements
            with_unit = {**unit_keys(unit), "model.attention_blocks": blocks} if blocks else unit_keys("none")
            bases[name] = blocks, base_recipe(name, config, {**common, **with_unit})
    trials = [
        make_trial(f"{name}-s{seed}", {"unit": unit, "blocks": blocks, "seed": seed}, folder, base, seed)
        for seed in seeds
        for name, (blocks, base) in bases.items()
    ]
    check_recipes(trials)
    return trials


def run_trials(trials: Sequence[Run], held_out: HeldOut, jobs: int, progress: Progress) -> list[Result]:
    """The results of all trials, in order; trials without a result are trained.

    Each of `jobs` child processes trains a share of them, one after the other, since starting a process takes as long
    as training one of these small networks.

    progress: in steps.

    Raises:
        InputError: a trial is refused, or its folder contains another; or some still have to be trained while others
            were trained with another version's randomness.
        InputError, RunError, Stopped: see `run_jobs`; the same call resumes.
    """
    results = [finished(trial, held_out) for trial in trials]
    origins = [result or origin_of(trial) for trial, result in zip(trials, results, strict=True)]
    for trial, origin in zip(trials, origins, strict=True):
        if origin and None in results:
            refuse_other_randomness(origin, trial.folder)
    trials, _ = resolve_precision(trials, origins)
    missing = [trial for trial, result in zip(trials, results, strict=True) if result is None]
    check_runs([RunState(trial, 0, [], False, {trial.max_steps}, trained=False) for trial in missing])
    for trial in missing:
        write_config(trial)
    options = ["--images", str(held_out.count), "--times", str(held_out.num_times)]
    options += [] if held_out.source is None else ["--held-out", held_out.source]
    shares = [[str(trial.folder) for trial in missing[start::jobs]] for start in range(min(jobs, len(missing)))]
    folder = trials[0].folder.parent
    children = [Job(folder, [["trials", *share, *options]], f"-{number}") for number, share in enumerate(shares)]
    run_jobs(children, jobs, lambda _: progress(*_steps_done(trials)))
    return [result for trial in trials if (result := finished(trial, held_out)) is not None]


def _steps_done(trials: Sequence[Run]) -> tuple[int, int, str]:
    """Steps done, total steps, and the trials being trained; a trial with a result counts as all its steps."""
    done, training = 0, []
    for trial in trials:
        if (trial.folder / RESULT_FILE).is_file():
            done += trial.max_steps
        elif step := logged_step(RunFolder(trial.folder).metrics):
            done += min(step, trial.max_steps - 1)
            training.append(trial.name)
    return done, sum(trial.max_steps for trial in trials), ", ".join(training)


def measure_trials(
    trials: Sequence[Run],
    results: Sequence[Result],
    protocol: EvalProtocol,
    name: str,
    jobs: int,
    progress: Callable[[int, int], None],
) -> str:
    """Adds a `distance` to the result of each trial that trained; recorded distances are not measured again.

    name: of the protocol or its file, as `fid --protocol` takes it.
    progress: called with the number of measured trials and the total.

    Returns:
        The name of the distance, such as "FD(digits), 596 samples".

    Raises:
        InputError, RunError, Stopped: see `run_jobs`.
    """
    trained = [trial for trial, result in zip(trials, results, strict=True) if result["outcome"] == TRAINED]
    on_record = {one.run.name for one in measured(trained, protocol) if one.is_last}
    missing = [trial.folder for trial in trained if trial.name not in on_record]
    done = count(len(on_record) + 1)
    fid = [Job(folder, [["fid", str(folder), "--protocol", name]]) for folder in missing]
    run_jobs(fid, jobs, check=lambda _: progress(next(done), len(trained)))
    records = {one.run.name: one.record for one in measured(trained, protocol) if one.is_last}
    for trial, result in zip(trials, results, strict=True):
        if record := records.get(trial.name):
            result["distance"] = record.distance
    last = next(reversed(records.values()), None)
    return f"distance by {protocol.name}" if last is None else f"{last.metric}, {last.protocol.num_samples:,} samples"


def summarize_stability(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row per variant, unit and rate: the seeds' outcomes, and the mean held-out loss of those that trained."""
    groups: dict[tuple[str, str, float], list[Result]] = defaultdict(list)
    for result in results:
        label = result["trial"]
        groups[label["variant"], label["unit"], label["learning_rate"]].append(result)
    rows = []
    for (variant, unit, rate), group in groups.items():
        loss = estimate_if_any(result["held_out_loss"] for result in group if result["outcome"] == TRAINED)
        rows.append(
            {
                "variant": variant,
                "unit": unit,
                "learning_rate": rate,
                "seeds": len(group),
                "outcomes": [result["outcome"] for result in group],
                "not_finite_at": sorted(r["not_finite_at"] for r in group if r["outcome"] == NOT_FINITE),
                "held_out_loss": loss and loss.mean,
                "half_width": loss and loss.half_width,
            }
        )
    return rows


def summarize_placement(results: Sequence[Result], num_layers: int) -> list[dict[str, Any]]:
    """A row per placement: mean and interval over seeds of the held-out loss, and of the distance if measured.

    A placement with two names has two rows. Diverged trials are counted and left out of the means.
    """
    rows = []
    for name, blocks in placements(num_layers).items():
        group = [result for result in results if result["trial"]["blocks"] == blocks]
        trained = [result for result in group if result["outcome"] == TRAINED]
        row = {"placement": name, "blocks": blocks, "seeds": len(group), "diverged": len(group) - len(trained)}
        for key in ("held_out_loss", "distance"):
            values = [result[key] for result in trained if result.get(key) is not None]
            row[key] = values
            mean = estimate_if_any(values)
            row |= {f"{key}_mean": mean and mean.mean, f"{key}_half_width": mean and mean.half_width}
        rows.append(row)
    return rows
