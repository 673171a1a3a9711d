"""`dia-diffusion quickstart`: the main job in miniature, on scikit-learn's handwritten digits.

Twins of one seed, without attention unit and with DIA-LSTM that starts as the identity, are trained side by side,
sampled from, measured along the way and drawn as one curve each: the miniature of arXiv 2210.16101, Fig. 8.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from dia_diffusion.cli.console import Counter, console
from dia_diffusion.cli.curves import records
from dia_diffusion.validation import Strict

if TYPE_CHECKING:
    from dia_diffusion.evaluation.record import EvaluationRecord

UNIT = "dia-lstm-identity"
TWINS = {"none": "digits_uvit_cpu", UNIT: "digits_uvit_cpu_dia_identity"}
LABELS = {"none": "UViT", UNIT: "UViT + DIA-LSTM (starts as the identity)"}
SAMPLER_STEPS = 25
CHECKPOINTS = 6
STEPS = 4200
"""In four minutes on two cores without bfloat16 arithmetic."""


class Options(Strict):
    """The main job in miniature, on scikit-learn's handwritten digits."""

    out: Path = Path("quickstart")
    """The folder to work in."""
    seed: int = 0
    """Of the twins."""
    steps: int = STEPS
    """Of each twin's training."""


def run(options: Options) -> None:
    """Runs the quickstart; what the folder has already is not computed again."""
    from dia_diffusion.data import open_images
    from dia_diffusion.evaluation.curves import draw_curves
    from dia_diffusion.evaluation.features import build_features
    from dia_diffusion.evaluation.record import count_records
    from dia_diffusion.evaluation.reference import floor_distance, reference_statistics
    from dia_diffusion.sweeps.figures import draw_grids
    from dia_diffusion.training.recipe import read_experiment
    from dia_diffusion.training.run_folder import RunFolder, logged_step

    started = time.monotonic()
    runs = {unit: options.out / unit for unit in TWINS}
    every = str(max(1, math.ceil(options.steps / CHECKPOINTS)))
    overrides = ["--seed", str(options.seed), "--train.max_steps", str(options.steps)]
    overrides += ["--train.checkpoint_every", every, "--train.sample_every", every]
    for recipe in TWINS.values():
        read_experiment(recipe, overrides)  # refuses here what the two would be refused for
    console.print(
        "Training two UViTs with the same seed on handwritten digits, one without attention unit and one with\n"
        f"DIA-LSTM, {options.steps:,} steps each, side by side; then measuring both."
    )
    train = {
        unit: ["train", "--config", recipe, "--output", str(runs[unit]), *overrides] for unit, recipe in TWINS.items()
    }
    _run_in_parallel(
        "training",
        "steps",
        train,
        runs,
        lambda run: logged_step(RunFolder(run).metrics),
        dict.fromkeys(TWINS, options.steps),
    )

    held_out = open_images("digits", size=8, channels=1, split="test")
    num = len(held_out)
    fid = ["--every-step", "--reference", "digits", "--reference-split", "test", "--num", str(num)]
    fid += ["--steps", str(SAMPLER_STEPS), "--batch-size", str(num)]
    measure = {unit: ["fid", str(path), *fid] for unit, path in runs.items()}
    checkpoints = {unit: len(list(RunFolder(path).pipelines.iterdir())) for unit, path in runs.items()}
    _run_in_parallel(
        "measuring", "checkpoints", measure, runs, lambda run: count_records(RunFolder(run).evaluations), checkpoints
    )

    extractor = build_features("digits")
    reference = reference_statistics(held_out, extractor)
    training_images = open_images("digits", size=8, channels=1, split="train")
    floor = floor_distance(reference, training_images, extractor, count=num)
    measured = {unit: [r for r in records(str(path)) if _of_quickstart(r, num)] for unit, path in runs.items()}
    curve, grids = options.out / "curve.png", options.out / "samples.png"
    draw_curves([(LABELS[unit], found) for unit, found in measured.items()], curve, floor=floor)
    draw_grids({LABELS[unit]: max(RunFolder(path).samples.iterdir()) for unit, path in runs.items()}, grids)
    _print_table(measured, floor, num)
    pipeline = max(RunFolder(runs[UNIT]).pipelines.iterdir())
    console.print(
        f"\nDone in {time.monotonic() - started:.0f} s. Look at\n"
        f"  {grids}   what both draw from the seeds 0 to 63, not picked\n"
        f"  {curve}   distance to held-out digits over training; the dashed line is real digits\n"
        f"  {pipeline}   a diffusers pipeline folder\n"
        "Run next\n"
        f"  dia-diffusion sample {runs[UNIT]} --seeds 0-99 --grid mine.png\n"
        "  dia-diffusion train --config cifar10_uvit_cpu_dia_identity --data.source IMAGES  (a folder, zip or cifar10)"
    )


def _run_in_parallel(
    doing: str,
    unit_name: str,
    commands: dict[str, list[str]],
    runs: dict[str, Path],
    count_done: Callable[[Path], int],
    totals: dict[str, int],
) -> None:
    """Runs one command a twin at the same time, with a bar over their progress."""
    from dia_diffusion.sweeps.launcher import Job, run_jobs

    total = sum(totals.values())

    def done() -> int:
        return min(sum(map(count_done, runs.values())), total)

    jobs = [Job(runs[unit], [command]) for unit, command in commands.items()]
    with Counter(doing, unit_name) as counter:
        counter.start_at(done(), total)
        run_jobs(jobs, len(jobs), lambda _: counter(done(), total))


def _of_quickstart(record: "EvaluationRecord", num: int) -> bool:
    """Whether it was measured as the quickstart measures; a person may have measured the twins otherwise since."""
    from dia_diffusion.sampling.samplers import DEFAULT_SAMPLER

    protocol = record.protocol
    return (protocol.reference_split, protocol.num_samples, protocol.sampler, protocol.num_inference_steps) == (
        "test",
        num,
        DEFAULT_SAMPLER,
        SAMPLER_STEPS,
    )


def _print_table(measured: "dict[str, list[EvaluationRecord]]", floor: float, num: int) -> None:
    table = Table(
        box=None, pad_edge=False, title=f"FD(digits) of {num} samples to {num} held-out digits", title_justify="left"
    )
    table.add_column("step")
    for unit in measured:
        table.add_column(LABELS[unit], justify="right")
    by_step = {unit: {record.step or 0: record for record in found} for unit, found in measured.items()}
    for step in sorted(set.intersection(*(set(found) for found in by_step.values()))):
        table.add_row(f"{step:,}", *(f"{by_step[unit][step].distance:.2f}" for unit in measured))
    table.add_row("real digits", *(f"{floor:.2f}" for _ in measured))
    console.print()
    console.print(table)
