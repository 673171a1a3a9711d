"""Grids of samples side by side: what several runs draw from the same seeds."""

from collections.abc import Callable, Mapping
from pathlib import Path

from matplotlib.figure import Figure

from dia_diffusion.data import read_image
from dia_diffusion.io import atomic_file, step_name
from dia_diffusion.sweeps.sweep import Run, Study
from dia_diffusion.training.run_folder import RunFolder


def draw_grids(grids: Mapping[str, Path], path: Path) -> None:
    """Draws grids (title -> its file) in a row into a PNG."""
    figure = Figure(figsize=(4 * len(grids), 4.2), layout="constrained")
    for axes, (title, grid) in zip(figure.subplots(1, len(grids), squeeze=False)[0], grids.items(), strict=True):
        axes.imshow(read_image(grid, str(grid)))
        axes.set_title(title)
        axes.axis("off")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160, bbox_inches="tight")


def twins(study: Study, batch_size: int, has_grids: Callable[[Run], bool]) -> list[Run]:
    """One run a unit, with grids and of one seed of training: the first seed that the most units have."""
    by_seed: dict[int, list[Run]] = {}
    for run in study.runs:
        if run.batch_size == batch_size and has_grids(run):
            by_seed.setdefault(run.seed, []).append(run)
    return max(by_seed.values(), key=len, default=[])


def draw_grids_of_study(study: Study) -> list[Path]:
    """For each batch size the last grids of its units, of one seed of training.

    Returns the files, `grids-bN.png` in the study's folder; batch sizes without grids have none.
    """
    drawn = []
    for batch_size in study.batch_sizes:
        if runs := twins(study, batch_size, lambda run: _last_grid(run).is_file()):
            drawn.append(study.folder / f"grids-b{batch_size}.png")
            draw_grids({run.unit: _last_grid(run) for run in runs}, drawn[-1])
    return drawn


def _last_grid(run: Run) -> Path:
    """Of the end of training."""
    return RunFolder(run.folder).samples / f"{step_name(run.experiment.train.max_steps)}.png"
