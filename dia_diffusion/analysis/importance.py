"""Which earlier blocks predict a block's attention map (Fig. 11, VI-A1): Gini importance in a random forest.

The paper takes the maps h_1..h_{t-1} as input variables and h_t as output, and doesn't say what one sample is. Here
it is one channel of one image at one time: its t - 1 values in the earlier blocks of the stage predict its value in
block t. Each block's forest (scikit-learn's) is fitted on some images and scored on others (R^2, held out). Gini
importance adds up to 1 even if a forest predicts nothing, so it means something only together with R^2.

If channels have different levels that are the same for every image, a forest mostly learns those. So the analysis is
repeated after subtracting each channel's mean over the fitted images at the same time ("centred"). Correlated
predictors share their importance.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.ensemble import RandomForestRegressor
from sklearn.metrics import r2_score
from torch import nn

from dia_diffusion.analysis.analysis import Analysis, Record
from dia_diffusion.analysis.attention_maps import MapMoments, map_stream, measure_maps
from dia_diffusion.analysis.correlation import CONSTANT, VARIANTS
from dia_diffusion.analysis.run import Coverage, TrainedRun
from dia_diffusion.analysis.stages import attended_stages
from dia_diffusion.figures import block_axis

TREES = 100
MIN_LEAF = 5  # samples; smaller leaves fit the noise
MIN_R2 = 0.2  # importances are not a finding below it

Samples = npt.NDArray[np.float64]


def importances(fit: Samples, score: Samples, scale: float, seed: int = 0) -> list[Record]:
    """For each block but the first: importance of the earlier blocks, and R^2, from samples (S, L) to fit and score.

    scale: the magnitude of the maps; a block that varies by less than CONSTANT * scale can't be predicted: R^2 is None.
    """
    rows: list[Record] = []
    for block in range(1, fit.shape[1]):
        if min(fit[:, block].std(), score[:, block].std()) <= CONSTANT * scale:
            rows.append({"importance": [0.0] * block, "r2": None})
            continue
        forest = RandomForestRegressor(TREES, min_samples_leaf=MIN_LEAF, random_state=seed, n_jobs=-1)
        forest.fit(fit[:, :block], fit[:, block])
        forest.set_params(n_jobs=1)  # threads would sum the trees' predictions in any order, with different rounding
        r2 = float(r2_score(score[:, block], forest.predict(score[:, :block])))
        rows.append({"importance": forest.feature_importances_.tolist(), "r2": r2})
    return rows


def draw_samples(
    run: TrainedRun, model: nn.Module, coverage: Coverage, number: int, moments: Sequence[MapMoments]
) -> list[dict[str, Samples]]:
    """For each stage, variant -> about num_samples samples (S, L): channels drawn by the seed for each image and time.

    number: of the draws of images.
    """
    random = np.random.default_rng([coverage.seed, number])
    samples: list[dict[str, list[Samples]]] = [{variant: [] for variant in VARIANTS} for _ in moments]
    for batch, maps in map_stream(run, model, coverage, number):
        for h, whole, kept in zip(maps, moments, samples, strict=True):
            _, images, channels = h.shape
            each = min(channels, -(-coverage.num_samples // coverage.work(run)))
            chosen = random.random((images, channels)).argsort(axis=1)[:, :each]  # without replacement
            for variant, values in (("maps", h), ("centred", whole.center(h, batch.time))):
                picked = np.take_along_axis(values, np.broadcast_to(chosen, (len(h), *chosen.shape)), axis=2)
                kept[variant].append(picked.reshape(len(h), -1).T)
    return [{variant: np.concatenate(parts) for variant, parts in kept.items()} for kept in samples]


def _measure(run: TrainedRun, model: nn.Module, coverage: Coverage) -> Record:
    """A record per stage with a unit: its blocks, and for each variant the rows of `importances`."""
    moments = measure_maps(run, model, coverage)
    drawn = [draw_samples(run, model, coverage, number, moments) for number in (0, 1)]
    records = []
    for stage, fit, score in zip(attended_stages(model), *drawn, strict=True):
        record: Record = {"name": stage.name, "blocks": stage.attended_blocks, "samples": len(fit["maps"])}
        scale = float(np.sqrt(np.square(fit["maps"]).mean()))
        for variant in VARIANTS:
            record[variant] = importances(fit[variant], score[variant], scale, coverage.seed)
        records.append(record)
    return {"stages": records}


def _last_step(run: TrainedRun, steps: Sequence[int] | None, weights: str) -> list[int]:
    return run.choose_steps(None, weights)[-1:] if steps is None else run.with_first(steps, weights)


def describe(record: Record) -> Iterator[str]:
    """The most important block for each block at the last step."""
    last = record["steps"][-1]
    for stage in last["stages"]:
        named = f", {stage['name']}" if stage["name"] else ""
        yield f"{record['run']}{named}, step {last['step']:,}, {stage['samples']:,} samples"
        for variant in VARIANTS:
            rows = zip(stage["blocks"][1:], stage[variant], strict=True)
            text = ", ".join(_most_important(name, row, stage["blocks"], record["least_r2"]) for name, row in rows)
            yield f"  {TITLES[variant]}: {text}"


def _most_important(name: str, row: Record, blocks: Sequence[str], least_r2: float) -> str:
    if row["r2"] is None:
        return f"{name} constant"
    if row["r2"] < least_r2:
        return f"{name} not predicted (R² {row['r2']:.2f})"
    first = max(range(len(row["importance"])), key=row["importance"].__getitem__)
    return f"{name} by {blocks[first]} {row['importance'][first]:.0%} (R² {row['r2']:.2f})"


# ---- figure

TITLES = {"maps": "the maps", "centred": "minus each channel's mean over images"}


def draw(runs: Sequence[Record]) -> Figure:
    """A row per run and stage at the last step; a triangle's rows are hatched if their forest doesn't predict."""
    rows = [(run, stage) for run in runs for stage in run["steps"][-1]["stages"] if len(stage["blocks"]) > 1]
    figure = Figure(figsize=(11.2, 3.5 * max(1, len(rows)) + 0.3), layout="constrained")
    grid = figure.subplots(max(1, len(rows)), 2, squeeze=False)
    for (run, stage), axes in zip(rows, grid, strict=False):
        for variant, triangle in zip(VARIANTS, axes, strict=True):
            image = _draw_triangle(triangle, stage["blocks"], stage[variant], run["least_r2"])
            triangle.set_title(TITLES[variant], fontsize="medium")
        figure.colorbar(image, ax=axes[1], pad=0.16, fraction=0.05, label="Gini importance")
        named = f"{run['run']}, {stage['name']}" if stage["name"] else run["run"]
        axes[0].set_ylabel(f"{named}, step {run['steps'][-1]['step']:,}\nblock whose map is predicted")
    if not rows:
        grid[0, 0].set_title("no stage has two blocks")
    return figure


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
        score = "constant" if row["r2"] is None else f"$R^2$ {row['r2']:.2f}"
        axes.text(count - 0.4, index, score, va="center", fontsize="small", color="black" if believed else "0.5")
        for place, value in enumerate(row["importance"] if believed and count <= 8 else []):
            color = "black" if value > 0.6 else "white"
            axes.text(place, index, f"{value:.2f}", ha="center", va="center", fontsize="small", color=color)
    _name_blocks(axes.xaxis, blocks[:-1])
    _name_blocks(axes.yaxis, blocks[1:])
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel(f"earlier block (hatched: held-out $R^2$ below {least_r2:g})")
    return image


def _name_blocks(axis: XAxis | YAxis, names: Sequence[str]) -> None:
    """Names the blocks at 0, 1, ...; if there are more than 12, only every second, third, ... one."""
    ticks = block_axis(names).ticks or {}
    every, labels = [*ticks], [*ticks.values()]
    turned = axis.axis_name == "x" and len(labels) > 5 and max(map(len, labels)) > 3
    axis.set_ticks(every, labels, rotation=90 if turned else 0)


ANALYSIS = Analysis(
    _measure,
    draw,
    describe,
    about=lambda run, over: {"least_r2": MIN_R2},
    choose_steps=_last_step,
    passes=3,  # the means, the samples to fit, the samples to score
    held_out=True,
)
