import numpy as np
import pytest
from matplotlib.figure import Figure

from dia_diffusion.sweeps.collect import Point
from dia_diffusion.sweeps.figures import draw_curves_of_study, draw_final_distances

UNITS = ["none", "dia-lstm"]
BETTER = {"none": 0.0, "dia-lstm": 1.0}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, to look inside."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (figures.append(self), save(self, *args, **kwargs))
    )
    return figures


def points(sizes=(8, 32), seeds=(0, 1, 2), steps=(100, 200), units=UNITS):
    return [
        Point(unit, size, seed, step, step * size, 5 - step / 100 + seed / 2 - BETTER[unit], None, None, "run")
        for size in sizes
        for unit in units
        for seed in seeds
        for step in steps
    ]


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def test_a_panel_a_batch_size_with_mean_band_and_single_seeds(drawn, tmp_path):
    draw_curves_of_study(points(), UNITS, tmp_path / "a.png", metric="FD(digits), 596 samples", floor=0.5)
    left, right = drawn[0].axes
    assert [axes.get_title() for axes in (left, right)] == ["batch size 8", "batch size 32"]
    assert lines(right)["dia-lstm"].get_xydata().tolist() == [[3200, 3.5], [6400, 2.5]]
    assert lines(left)["none"].get_xydata().tolist() == [[800, 4.5], [1600, 3.5]]
    assert len(left.get_lines()) == 2 + 6 + 1  # means, seeds, floor
    assert list(lines(left)["floor: real images, 0.5"].get_ydata()) == [0.5, 0.5]
    # Three seeds 0.5 apart: 4.302653 x 0.5 / sqrt(3) on either side of the mean.
    band = left.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((3.5 - 1.242069, 4.5 + 1.242069), rel=1e-5)
    assert left.get_ylim() == right.get_ylim() == (0, pytest.approx(5 * 1.08))
    assert [text.get_text() for text in left.texts] == ["3 seeds"]
    assert left.child_axes[0].get_xlabel() == "steps of 8 images"
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == [*UNITS, "floor: real images, 0.5"]


def test_seeds_that_differ_are_counted_by_unit_and_one_has_no_band(drawn, tmp_path):
    chosen = [point for point in points(sizes=[8]) if point.unit == "none" or point.seed == 2]
    draw_curves_of_study(chosen, UNITS, tmp_path / "a.svg", metric="FID")
    (axes,) = drawn[0].axes
    assert axes.texts[0].get_text() == "none: 3 seeds\ndia-lstm: 1 seed"
    assert len(axes.collections) == 1


def test_two_seeds_are_drawn_without_a_band(drawn, tmp_path):
    draw_curves_of_study(points(seeds=(0, 1)), UNITS, tmp_path / "a.png", metric="FID")
    draw_final_distances(points(seeds=(0, 1), steps=[200]), UNITS, tmp_path / "b.png", metric="FID")
    assert all(not axes.collections and not axes.containers for figure in drawn for axes in figure.axes)


@pytest.mark.parametrize(("sizes", "panels"), [([32], 1), ([8, 16, 32], 3), ([4, 8, 32, 64, 128], 5)])
def test_any_number_of_batch_sizes(drawn, tmp_path, sizes, panels):
    draw_curves_of_study(points(sizes), UNITS, tmp_path / "a.png", metric="FID")
    draw_final_distances(points(sizes, steps=[200]), UNITS, tmp_path / "b.png", metric="FID")
    assert len(drawn[0].axes) == panels
    assert drawn[1].axes[0].get_ylabel() == "final FID"


def test_a_unit_keeps_its_colour_where_others_are_missing(drawn, tmp_path):
    draw_curves_of_study(points(), UNITS, tmp_path / "a.png", metric="FID")
    draw_curves_of_study(points(units=["dia-lstm"]), UNITS, tmp_path / "b.png", metric="FID")
    assert lines(drawn[0].axes[0])["dia-lstm"].get_color() == lines(drawn[1].axes[0])["dia-lstm"].get_color()


def test_final_distances_stand_at_their_batch_sizes(drawn, tmp_path):
    draw_final_distances(points([4, 8, 32], steps=[200]), UNITS, tmp_path / "a.png", metric="FID", floor=0.5)
    (axes,) = drawn[0].axes
    assert np.allclose(axes.get_xticks(), [2, 3, 5])
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["4\n0.8k images", "8\n1.6k images", "32\n6.4k images"]
    line = lines(axes)["dia-lstm"]
    assert np.allclose(line.get_ydata(), [2.5] * 3)
    assert np.allclose(line.get_xdata(), [2, 3, 5], atol=0.1)
    assert len(axes.containers) == 6  # error bars: a unit at a batch size
    ends = axes.containers[0].lines[1]
    assert [end.get_ydata()[0] for end in ends] == pytest.approx([3.5 - 1.242069, 3.5 + 1.242069], rel=1e-5)


def test_one_batch_size_puts_units_side_by_side(drawn, tmp_path):
    draw_final_distances(points([32], steps=[200]), UNITS, tmp_path / "a.png", metric="FID")
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == UNITS
    assert axes.get_xlabel() == "at batch size 32, 6.4k images"
