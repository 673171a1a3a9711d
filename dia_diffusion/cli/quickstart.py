"""`dia-diffusion quickstart`: the main job in miniature, on scikit-learn's handwritten digits.

A sweep of two runs with the same seed, one without attention unit and one with DIA-LSTM that starts as the identity:
trained and measured in parallel, sampled from, and drawn as one curve each, the miniature of arXiv 2210.16101, Fig. 8.
"""

import math
import time
from pathlib import Path

from dia_diffusion.cli.console import console
from dia_diffusion.validation import Strict

UNIT = "dia-lstm-identity"
TWINS = {"none": "digits_uvit_cpu", UNIT: "digits_uvit_cpu_dia_identity"}
LABELS = {"none": "UViT", UNIT: "UViT + DIA-LSTM (starts as the identity)"}
PROTOCOL = "fd-digits"
CHECKPOINTS = 6
STEPS = 4200
"""Takes four minutes on two cores without bfloat16 arithmetic."""


class Options(Strict):
    """The main job in miniature, on scikit-learn's handwritten digits."""

    out: Path = Path("quickstart")
    """The folder to work in."""
    seed: int = 0
    """Seed of both runs."""
    steps: int = STEPS
    """Training steps of each run."""


def run(options: Options) -> None:
    """Runs the quickstart; results that are already in the folder are not computed again."""
    from dia_diffusion.cli.study import SweepCounter
    from dia_diffusion.evaluation.curves import draw_curves
    from dia_diffusion.evaluation.protocol import EvalProtocol
    from dia_diffusion.sweeps.checks import check_runs
    from dia_diffusion.sweeps.collect import scan
    from dia_diffusion.sweeps.figures import draw_grids
    from dia_diffusion.sweeps.launcher import run_study
    from dia_diffusion.sweeps.results import floor_of
    from dia_diffusion.sweeps.sweep import Grid, Run, Study, StudyConfig
    from dia_diffusion.tables import Table
    from dia_diffusion.training.recipe import read_experiment
    from dia_diffusion.training.run_folder import RunFolder

    started = time.monotonic()
    every = max(1, math.ceil(options.steps / CHECKPOINTS))
    keys = {"seed": options.seed, "train.max_steps": options.steps}
    keys |= {"train.checkpoint_every": every, "train.sample_every": every}
    runs = [
        Run(unit, {"unit": unit}, read_experiment(recipe, keys={**keys, "output": str(options.out / unit)}))
        for unit, recipe in TWINS.items()
    ]
    grid = Grid(units=[*TWINS], batch_sizes=[runs[0].batch_size], seeds=[options.seed])
    config = StudyConfig(
        output=str(options.out), recipe=TWINS["none"], runs=[grid], protocol=PROTOCOL, reference="digits"
    )
    study = Study("quickstart", config, protocol := EvalProtocol.read(PROTOCOL), None, runs)
    inventory, num = scan(study), protocol.num_samples
    check_runs(inventory.states)
    options.out.mkdir(parents=True, exist_ok=True)
    console.print(
        "Training two UViTs with the same seed on handwritten digits, one without attention unit and one with\n"
        f"DIA-LSTM, {options.steps:,} steps each, side by side; then measuring both."
    )
    with SweepCounter("training and measuring", "passes") as counter:
        run_study(inventory, len(runs), counter, fid_options=["--batch-size", str(num)])

    measured = scan(study).curve
    floor = floor_of(study, measured[-1].record).distance
    records = {run.unit: [one.record for one in measured if one.run.name == run.name] for run in runs}
    curve, grids = options.out / "curve.png", options.out / "samples.png"
    draw_curves([(LABELS[unit], own) for unit, own in records.items()], curve, floor=floor)
    draw_grids({LABELS[run.unit]: max(RunFolder(run.folder).samples.iterdir()) for run in runs}, grids)
    distances = {(one.run.unit, one.step): f"{one.record.distance:.2f}" for one in measured}
    rows = [[f"{step:,}", *(distances[unit, step] for unit in TWINS)] for step in runs[0].steps]
    rows.append(["real digits", *(f"{floor:.2f}" for _ in TWINS)])
    console.print()
    title = f"FD(digits) of {num} samples to {measured[-1].record.protocol.reference_count} held-out digits"
    console.print(Table(["step", *LABELS.values()], rows, title, left=["step"]).to_rich())
    pipeline = max(RunFolder(runs[-1].folder).pipelines.iterdir())
    console.print(
        f"\nDone in {time.monotonic() - started:.0f} s. Look at\n"
        f"  {grids}   samples of both networks from seeds 0 to 63, not picked\n"
        f"  {curve}   distance to held-out digits over training; the dashed line is real digits\n"
        f"  {pipeline}   a diffusers pipeline folder\n"
        "Run next\n"
        f"  dia-diffusion sample {runs[-1].folder} --seeds 0-99 --grid mine.png\n"
        "  dia-diffusion train --config cifar10_uvit_cpu_dia_identity --data.source IMAGES  (a folder, zip or cifar10)"
    )
