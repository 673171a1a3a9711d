"""Figures of studies: means over seeds with Student's t intervals, one color per unit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dia_diffusion.figures import Figure, Panel, Series
from dia_diffusion.plotting import render
from dia_diffusion.sweeps.collect import Point
from dia_diffusion.sweeps.figures import (
    curve_panels,
    draw_curves_of_study,
    draw_final_distances,
    draw_grids,
    final_panel,
)

UNITS = ["none", "dia-lstm"]
BETTER = {"none": 0.0, "dia-lstm": 1.0}
HALF = 1.242069  # for three seeds 0.5 apart: 4.302653 x 0.5 / sqrt(3)


def points(sizes=(8, 32), seeds=(0, 1, 2), steps=(100, 200), units=UNITS) -> list[Point]:
    return [
        Point(unit, size, seed, step, step * size, 5 - step / 100 + seed / 2 - BETTER[unit], None, None, "run")
        for size in sizes
        for unit in units
        for seed in seeds
        for step in steps
    ]


def means(panel: Panel) -> dict[str, Series]:
    return {item.label: item for item in panel.items if isinstance(item, Series) and not item.pale}


def seeds_of(panel: Panel) -> list[Series]:
    return [item for item in panel.items if isinstance(item, Series) and item.pale]


def test_a_panel_per_batch_size_with_mean_band_and_single_seeds() -> None:
    left, right = curve_panels(points(), UNITS, "FD(digits), 596 samples", floor=0.5)
    assert [panel.title for panel in (left, right)] == ["batch size 8", "batch size 32"]
    assert (means(right)["dia-lstm"].x, means(right)["dia-lstm"].y) == ([3200, 6400], [3.5, 2.5])
    none = means(left)["none"]
    assert (none.x, none.y) == ([800, 1600], [4.5, 3.5])
    assert none.low == pytest.approx([4.5 - HALF, 3.5 - HALF], rel=1e-5)
    assert none.high == pytest.approx([4.5 + HALF, 3.5 + HALF], rel=1e-5)
    assert [seed.y for seed in seeds_of(left)][:3] == [[4 + seed / 2, 3 + seed / 2] for seed in range(3)]
    assert left.y == right.y and (left.y.low, left.y.high) == (0, pytest.approx(5 * 1.08))
    assert (left.note, left.x.step_images, left.items[-1].label) == ("3 seeds", 8, "floor: real images, 0.5")


def test_seeds_that_differ_are_counted_by_unit_and_few_have_no_interval() -> None:
    chosen = [point for point in points(sizes=[8]) if point.unit == "none" or point.seed == 2]
    (panel,) = curve_panels(chosen, UNITS, "FID")
    assert panel.note == "none: 3 seeds\ndia-lstm: 1 seed"
    two = points(seeds=(0, 1))
    final = final_panel([point for point in two if point.step == 200], UNITS, "FID")
    for panel in (*curve_panels(two, UNITS, "FID"), final):
        assert not any(item.has_band or item.errors for item in panel.items if isinstance(item, Series))


def test_a_unit_keeps_its_color_where_others_are_missing() -> None:
    for units in (UNITS, ["dia-lstm"]):
        panel, *_ = curve_panels(points(units=units), UNITS, "FID")
        final = final_panel(points(units=units, steps=[200]), UNITS, "FID")
        assert means(panel)["dia-lstm"].style == means(final)["dia-lstm"].style == 1


def test_final_distances_are_at_their_batch_sizes() -> None:
    panel = final_panel(points([4, 8, 32], steps=[200]), UNITS, "FID", floor=0.5)
    assert panel.x.ticks == {2: "4\n0.8k images", 3: "8\n1.6k images", 5: "32\n6.4k images"}
    unit, none = means(panel)["dia-lstm"], means(panel)["none"]
    assert unit.y == [2.5] * 3 and np.allclose(unit.x, [2, 3, 5], atol=0.1) and not np.allclose(unit.x, none.x)
    assert none.high == pytest.approx([3.5 + HALF] * 3, rel=1e-5) and none.bars
    assert seeds_of(panel)[0].y == [3, 3.5, 4] * 3
    assert seeds_of(panel)[0].hover[4] == "batch size 8, seed 1"
    assert panel.y.label == "final FID" and panel.y.high is not None and panel.y.high > 3.5 + HALF
    (axes,) = render(Figure([[panel]])).axes
    assert len(axes.containers) == 6  # error bars: one per unit and batch size


def test_one_batch_size_puts_units_side_by_side() -> None:
    panel = final_panel(points([32], steps=[200]), UNITS, "FID")
    assert panel.x.ticks == dict(enumerate(UNITS))
    assert [series.x for series in means(panel).values()] == [[0], [1]]
    assert panel.x.label == "at batch size 32, 6.4k images"


@pytest.mark.parametrize(("sizes", "inches"), [([32], 6.4), ([4, 8, 32, 64, 128], 1 + 3 * 3.4)])
def test_any_number_of_batch_sizes_is_drawn(tmp_path: Path, sizes: list[int], inches: float) -> None:
    how: dict[str, Any] = {"metric": "FID", "floor": 0.5}
    draw_curves_of_study(points(sizes), UNITS, tmp_path / "curves.png", **how)
    draw_final_distances(points(sizes, steps=[200]), UNITS, tmp_path / "final.png", **how)
    assert Image.open(tmp_path / "curves.png").width == round(200 * inches)
    assert Image.open(tmp_path / "final.png").width == 1280


@pytest.mark.parametrize("count", [1, 3])
def test_nothing_of_grids_is_cut_off_at_the_edges(count: int, tmp_path: Path) -> None:
    Image.new("RGB", (578, 578)).save(tmp_path / "grid.png")
    draw_grids({f"UViT {index}, jÉ": tmp_path / "grid.png" for index in range(count)}, tmp_path / "drawn.png")
    drawn = np.asarray(Image.open(tmp_path / "drawn.png").convert("L"))
    for edge in (drawn[:3], drawn[-3:], drawn[:, :3], drawn[:, -3:]):
        assert edge.min() == 255
