"""Which earlier blocks tell a block's attention map (Fig. 11, VI-A1): Gini importance in a random forest.

The paper takes the maps h_1..h_{t-1} as input variables and h_t as output. A map is a vector of N channels, and it
leaves open what one sample is. Here a sample is one channel of one image at one time: t - 1 numbers, that channel's
values in the earlier blocks of the stage, tell one number, its value in block t. A forest (scikit-learn's) a block is
fitted on some images and scored on others (R^2, held out): an importance of a forest that predicts nothing says
nothing, and Gini importance always adds up to 1.

Samples of one channel are alike for every image where channels have levels of their own, and then the forest learns
those. So all is done again with the maps less each channel's mean over the fitted images at the same time ("centred").
Predictors that are correlated share their importance among them.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.ensemble import RandomForestRegressor
from sklearn.metrics import r2_score
from torch import nn

from dia_diffusion.analysis.attention_maps import MapMoments, centred, map_stream, measure_maps
from dia_diffusion.analysis.correlation import CONSTANT
from dia_diffusion.analysis.drawing import block_ticks, save
from dia_diffusion.analysis.run import DEFAULT_COVERAGE, Coverage, TrainedRun
from dia_diffusion.analysis.stages import attended_stages

VARIANTS = ("maps", "centred")
TREES = 100
MIN_LEAF = 5  # samples: a leaf of fewer learns the noise
LEAST_R2 = 0.2  # below which an importance is not a finding
PASSES = 3  # over the images: the means, the samples to fit, and as many others to score

Samples = npt.NDArray[np.float64]


def importances(
    fit: Samples, score: Samples, scale: float, seed: int = 0, fitted: Callable[[int], None] = lambda forests: None
) -> list[dict[str, Any]]:
    """For each block but the first, from samples (S, L): importance of those before it, and R^2 on the others' samples.

    scale: the size of the maps; a block whose values vary by less than CONSTANT of it has nothing to be told, R^2 None.
    """
    rows: list[dict[str, Any]] = []
    for block in range(1, fit.shape[1]):
        if min(fit[:, block].std(), score[:, block].std()) <= CONSTANT * scale:
            rows.append({"importance": [0.0] * block, "r2": None})
            continue
        forest = RandomForestRegressor(TREES, min_samples_leaf=MIN_LEAF, random_state=seed, n_jobs=-1)
        forest.fit(fit[:, :block], fit[:, block])
        forest.set_params(n_jobs=1)  # threads would add the trees' answers up in any order, and round differently
        r2 = float(r2_score(score[:, block], forest.predict(score[:, :block])))
        rows.append({"importance": forest.feature_importances_.tolist(), "r2": r2})
        fitted(1)
    return rows


def samples(
    run: TrainedRun,
    model: nn.Module,
    coverage: Coverage,
    number: int,
    moments: Sequence[MapMoments],
    num_samples: int,
) -> list[dict[str, Samples]]:
    """variant -> about num_samples samples (S, L) of each stage: channels drawn by the seed for each image and time.

    number: of the draws of images.
    """
    random = np.random.default_rng([coverage.seed, number])
    seen = coverage.num_images * run.num_times(coverage.num_times)
    found: list[dict[str, list[Samples]]] = [{variant: [] for variant in VARIANTS} for _ in moments]
    for time, maps in map_stream(run, model, coverage, number):
        for h, whole, kept in zip(maps, moments, found, strict=True):
            _, images, channels = h.shape
            each = min(channels, -(-num_samples // seen))
            chosen = random.random((images, channels)).argsort(axis=1)[:, :each]  # without one twice
            for variant, values in (("maps", h), ("centred", centred(h, whole, time))):
                picked = np.take_along_axis(values, np.broadcast_to(chosen, (len(h), *chosen.shape)), axis=2)
                kept[variant].append(picked.reshape(len(h), -1).T)
    return [{variant: np.concatenate(parts) for variant, parts in kept.items()} for kept in found]


def importances_of_model(
    run: TrainedRun,
    model: nn.Module,
    coverage: Coverage,
    num_samples: int,
    fitted: Callable[[int], None] = lambda forests: None,
) -> list[dict[str, Any]]:
    """A record a stage with a unit: its blocks, and for each variant the rows of `importances`."""
    moments = measure_maps(run, model, coverage)
    drawn = [samples(run, model, coverage, number, moments, num_samples) for number in (0, 1)]
    records = []
    for stage, fit, score in zip(attended_stages(model), *drawn, strict=True):
        record: dict[str, Any] = {"name": stage.name, "blocks": stage.attended_blocks, "samples": len(fit["maps"])}
        for variant in VARIANTS:
            scale = float(np.sqrt(np.square(fit["maps"]).mean()))
            record[variant] = importances(fit[variant], score[variant], scale, coverage.seed, fitted)
        records.append(record)
    return records


def importances_of_run(
    run: TrainedRun,
    steps: Sequence[int] | None = None,
    coverage: Coverage = DEFAULT_COVERAGE,
    num_samples: int = 20_000,
    fitted: Callable[[int], None] = lambda forests: None,
) -> dict[str, Any]:
    """A run's record: the importances with each step's averaged weights, the last step's alone if none is asked for.

    Raises:
        InputError: the run has no unit, too few images, or no weights of a step.
    """
    run.require_unit()
    run.draw_others(coverage.seed, coverage.num_images)  # refused before hours of forests
    measured = []
    for step in last_step(run, steps):
        stages = importances_of_model(run, run.model(step), coverage, num_samples, fitted)
        measured.append({**run.measured(step), "stages": stages})
    return {**run.described(), "least_r2": LEAST_R2, "steps": measured}


def last_step(run: TrainedRun, steps: Sequence[int] | None) -> list[int]:
    """The steps asked for, or the last that is kept."""
    return run.choose_steps(steps)[-1:] if steps is None else run.with_first(steps)


TITLES = {"maps": "the maps", "centred": "less each channel's mean over images"}


def draw_importances(runs: Sequence[dict[str, Any]], path: str | Path) -> None:
    """A row a run and stage of its last step; rows of a triangle whose forest predicts nothing are hatched."""
    rows = [(run, stage) for run in runs for stage in run["steps"][-1]["stages"] if len(stage["blocks"]) > 1]
    figure = Figure(figsize=(11.2, 3.5 * max(1, len(rows)) + 0.3), layout="constrained")
    grid = figure.subplots(max(1, len(rows)), 2, squeeze=False)
    for (run, stage), axes in zip(rows, grid, strict=False):
        for variant, triangle in zip(VARIANTS, axes, strict=True):
            image = _draw_triangle(triangle, stage["blocks"], stage[variant], run["least_r2"])
            triangle.set_title(TITLES[variant], fontsize="medium")
        figure.colorbar(image, ax=axes[1], pad=0.16, fraction=0.05, label="Gini importance")
        named = f"{run['run']}, {stage['name']}" if stage["name"] else run["run"]
        axes[0].set_ylabel(f"{named}, step {run['steps'][-1]['step']:,}\nblock whose map is told")
    if not rows:
        grid[0, 0].set_title("no stage has two blocks")
    save(figure, path, dpi=120)


def _draw_triangle(axes: Axes, blocks: Sequence[str], rows: Sequence[dict[str, Any]], least_r2: float) -> Any:
    count = len(blocks) - 1
    matrix = np.full((count, count), np.nan)
    for index, row in enumerate(rows):
        matrix[index, : index + 1] = row["importance"]
    image = axes.imshow(matrix, cmap="viridis", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    for index, row in enumerate(rows):
        believed = row["r2"] is not None and row["r2"] >= least_r2
        if not believed:
            hatched: dict[str, Any] = {"facecolor": "0.85", "edgecolor": "0.55", "hatch": "////", "linewidth": 0}
            axes.add_patch(Rectangle((-0.5, index - 0.5), index + 1, 1, **hatched))
        told = "constant" if row["r2"] is None else f"$R^2$ {row['r2']:.2f}"
        axes.text(count - 0.4, index, told, va="center", fontsize="small", color="black" if believed else "0.5")
        for place, value in enumerate(row["importance"] if believed and count <= 8 else []):
            colour = "black" if value > 0.6 else "white"
            axes.text(place, index, f"{value:.2f}", ha="center", va="center", fontsize="small", color=colour)
    block_ticks(axes, blocks[:-1])
    block_ticks(axes, blocks[1:], along="y")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel(f"earlier block (hatched: held-out $R^2$ below {least_r2:g})")
    return image
