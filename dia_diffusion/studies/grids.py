"""Grids of samples side by side: what several runs draw from the same seeds."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from dia_diffusion.files import step_name, whole_file
from dia_diffusion.studies.study import Study, StudyRun
from dia_diffusion.training.run_folder import RunFolder


def draw_grids(grids: Mapping[str, Path], path: Path) -> None:
    """Draws grids (title -> its file) in a row into a PNG."""
    figure = Figure(figsize=(4 * len(grids), 4.2), layout="constrained")
    for axes, (title, grid) in zip(figure.subplots(1, len(grids), squeeze=False)[0], grids.items(), strict=True):
        with Image.open(grid) as image:
            axes.imshow(image, cmap="gray")
        axes.set_title(title)
        axes.axis("off")
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160, bbox_inches="tight")


def draw_grids_of_study(study: Study) -> list[Path]:
    """For each batch size the last grids of its units, of one seed of training: the first that the most units have.

    Returns the files, `grids-bN.png` in the study's folder; batch sizes without grids have none.
    """
    drawn = []
    for batch_size in study.batch_sizes:
        by_seed: dict[int, dict[str, Path]] = {}
        for run in study.runs:
            if run.batch_size == batch_size and (grid := _last_grid(run)):
                by_seed.setdefault(run.seed, {})[run.unit] = grid
        if by_seed:
            drawn.append(study.folder / f"grids-b{batch_size}.png")
            draw_grids(max(by_seed.values(), key=len), drawn[-1])
    return drawn


def _last_grid(run: StudyRun) -> Path | None:
    """Of the end of training."""
    grid = RunFolder(run.folder).samples / f"{step_name(run.experiment.train.max_steps)}.png"
    return grid if grid.is_file() else None
