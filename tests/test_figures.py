"""One description drawn by matplotlib and by plotly: both have the same data and show text literally."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from plotly import graph_objects

from dia_diffusion import plotting
from dia_diffusion.errors import InputError
from dia_diffusion.figures import (
    Area,
    Axis,
    Bars,
    Figure,
    HeatMap,
    Level,
    Panel,
    Picture,
    Series,
    Text,
    block_axis,
    images_axis,
    style_of,
    value_axis,
)
from dia_diffusion.plotting import render, save_figure
from dia_diffusion.report.plots import to_plotly

X, Y = [800, 1600, 2400], [9.0, 5.0, 4.0]
LOW, HIGH = [8.0, 4.5, 3.0], [10.0, 5.5, 5.0]


def on_page(*panels: Panel) -> dict[str, Any]:
    """The plot on a page, checked with plotly's own schema."""
    plot = to_plotly(panels)
    drawn = {"data": plot.data, "layout": plot.layout}
    graph_objects.Figure(drawn)
    return drawn


def test_both_draw_the_same_lines_bands_and_levels() -> None:
    seed, mean = (
        Series(X, [9.5, 5.1, None], style=1, pale=True, markers=False),
        Series(X, Y, "dia", 1, low=LOW, high=HIGH),
    )
    panel = Panel(
        [seed, mean, Level(1.5, "floor")], "batch size 8", images_axis([8]), value_axis("FD", Y, [1.5]), "3 seeds"
    )
    (axes,) = render(Figure([[panel]])).axes
    behind, line, floor = axes.get_lines()
    assert np.array_equal(behind.get_ydata(), [9.5, 5.1, np.nan], equal_nan=True)
    assert line.get_xydata().tolist() == [list(point) for point in zip(X, Y, strict=True)]
    assert list(floor.get_ydata()) == [1.5, 1.5]
    band = axes.collections[0].get_paths()[0].vertices
    assert {tuple(corner) for corner in band} == {*zip(X, LOW, strict=True), *zip(X, HIGH, strict=True)}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["dia", "floor"]
    assert (axes.get_ylabel(), axes.get_title(), axes.texts[0].get_text()) == ("FD", "batch size 8", "3 seeds")
    assert axes.get_xlim()[0] == 0 and axes.child_axes[0].get_xlabel() == "steps of 8 images"

    page = on_page(panel)
    area, behind, line = page["data"]
    assert (area["x"], area["y"], area["fill"]) == ([*X, *X[::-1]], [*LOW, *HIGH[::-1]], "toself")
    assert (line["x"], line["y"], line["name"]) == (X, Y, "dia")
    assert line["text"] == ["step 100", "step 200", "step 300"]
    assert (behind["y"], behind["hoverinfo"]) == ([9.5, 5.1, None], "skip")
    assert [(shape["y0"], shape["y1"], shape["name"]) for shape in page["layout"]["shapes"]] == [(1.5, 1.5, "floor")]
    assert page["layout"]["yaxis"]["range"] == list(axes.get_ylim())
    assert page["layout"]["annotations"][0]["text"] == "3 seeds"
    assert axes.get_lines()[1].get_color() == line["line"]["color"] == style_of(1)["color"]


@pytest.mark.parametrize("bars", [False, True])
def test_intervals_are_bars_where_points_have_none_or_bars_are_asked_for(bars: bool) -> None:
    low, high = (LOW, HIGH) if bars else ([None, *LOW[1:]], [None, *HIGH[1:]])
    panel = Panel([Series(X, Y, low=low, high=high, bars=bars)])
    (axes,) = render(Figure([[panel]])).axes
    ends = [bar.lines[1][n].get_ydata()[0] for bar in axes.containers for n in (0, 1)]
    assert ends == [end for pair in zip(low, high, strict=True) for end in pair if end is not None]
    (trace,) = on_page(panel)["data"]
    assert trace["error_y"]["arrayminus"] == [y - end if end else 0 for y, end in zip(Y, low, strict=True)]
    assert trace["error_y"]["array"] == [end - y if end else 0 for y, end in zip(Y, high, strict=True)]


def test_a_wide_range_is_logarithmic_and_has_room_for_all() -> None:
    assert value_axis("", [9, 5], [0.5]) == Axis("", low=0, high=pytest.approx(9 * 1.08))
    assert value_axis("", [-1.0, 2.0]).low == pytest.approx(-1.08)
    wide = value_axis("FD", [30, None, 3], [2, float("nan")])
    assert (
        wide.scale == "log" and wide.low is not None and 1.5 < wide.low < 2 and wide.high is not None and wide.high > 30
    )
    panel = Panel([Series(X, [30, 9, 3])], y=wide)
    (axes,) = render(Figure([[panel]])).axes
    page = on_page(panel)["layout"]["yaxis"]
    assert 10 ** np.array(page["range"]) == pytest.approx(axes.get_ylim())
    assert [tick for tick in axes.get_yticks() if wide.low <= tick <= wide.high] == [2, 5, 10, 20]
    assert page["dtick"] == "D2", "plotly's name of ticks at 1, 2 and 5"
    assert not [value for value in (value_axis("", []).low, value_axis("", []).high) if value]


def test_panels_share_one_axis_on_the_page() -> None:
    panels = [
        Panel([Series(X, Y, "a"), Series(X, Y, "b")], x=images_axis([8]), y=value_axis(name, Y))
        for name in ("loss", "norm", "rate")
    ]
    page = on_page(*panels)
    assert [trace["yaxis"] for trace in page["data"]] == ["y", "y", "y2", "y2", "y3", "y3"]
    assert page["layout"]["grid"]["subplots"] == [["xy"], ["xy2"], ["xy3"]]
    assert [page["layout"][axis]["title"]["text"] for axis in ("yaxis", "yaxis3")] == ["loss", "rate"]
    assert page["layout"]["showlegend"] and not on_page(Panel([Series(X, Y, "a")]))["layout"]["showlegend"]
    assert [trace["showlegend"] for trace in page["data"]] == [True, True, False, False, False, False]


def test_text_is_no_markup(tmp_path: Path) -> None:
    hostile = "a $x_{$ <b>b</b>\n&amp;"
    series = Series([0, 1], [1, 2], hostile, hover=[hostile, ""])
    panel = Panel([series, Level(1, hostile)], hostile, Axis(hostile, ticks={0: hostile}), Axis(hostile), hostile)
    save_figure(
        Figure([[panel], [Panel([Text(0, 0, hostile)])]], legend="below", legend_title=hostile), tmp_path / "a.svg"
    )
    assert "<b>b" not in str(on_page(panel)) and "&lt;b&gt;b" in str(on_page(panel))


def test_other_items_are_drawn_where_they_are() -> None:
    matrix = [[0.0, 1.0], [np.nan, 0.25]]
    first = [Bars([0, 1], [0.5, 0.4], "a"), Bars([0, 1], [0.5, 0.6], "b", 1, bottom=[0.5, 0.4])]
    heat = Panel(
        [HeatMap(matrix, 0, 1, numbers=".2f", bar="r")], "", block_axis(["in", "out"]), block_axis(["in", "out"])
    )
    area = Panel([Area([0, 1, 1], [0, 0, 2], "c"), Text(0.5, 0.5, "here"), Level(0.2, axis="x")])
    picture = Panel([Picture(np.zeros((4, 6, 3), np.uint8))], frame=False)
    figure = render(Figure([[Panel(first), heat], [area, None], [picture]], legend="below"))
    bars, heat_axes, area_axes, picture_axes, color_bar = figure.axes
    assert [patch.get_y() + patch.get_height() for patch in bars.patches] == [0.5, 0.4, 1.0, 1.0]
    assert np.array_equal(heat_axes.images[0].get_array().filled(np.nan), matrix, equal_nan=True)
    written = {text.get_position(): text.get_text() for text in heat_axes.texts}
    assert written == {(0, 0): "0.00", (1, 0): "1.00", (1, 1): "0.25"}
    assert color_bar.get_ylabel() == "r"
    assert area_axes.patches[0].get_xy()[:3].tolist() == [[0, 0], [1, 0], [1, 2]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c"]
    assert picture_axes.images[0].get_array().shape == (4, 6, 3) and not picture_axes.axison
    with pytest.raises(TypeError, match="HeatMap"):
        to_plotly([heat])


def test_many_blocks_are_not_all_named() -> None:
    ticks = block_axis([str(block) for block in range(30)]).ticks
    assert ticks == {block: str(block) for block in range(0, 30, 3)}


def test_panels_with_one_axis_have_the_same_limits() -> None:
    panels = [Panel([Series([0, 1], [0, top])], y=Axis("FD", low=0)) for top in (1, 9)]
    first, second = render(Figure([panels], share_y="all")).axes
    assert first.get_ylim() == second.get_ylim() and first.get_ylim()[1] >= 9
    assert (first.get_ylabel(), second.get_ylabel()) == ("FD", "")


def test_files_have_the_format_of_their_suffix_and_appear_whole(tmp_path: Path, monkeypatch) -> None:
    figure = Figure([[Panel([Series(X, Y)])]])
    for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")):
        save_figure(figure, tmp_path / name, dpi=50)
        assert (tmp_path / name).read_bytes().startswith(start)
    assert Image.open(tmp_path / "a.png").size == (320, 210)
    with pytest.raises(InputError, match=r"a\.xyz must have the suffix of a figure format, one of .*png"):
        save_figure(figure, tmp_path / "a.xyz")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space")

    before = (tmp_path / "a.png").read_bytes()
    monkeypatch.setattr(plotting.matplotlib.figure.Figure, "savefig", fail)
    with pytest.raises(OSError, match="no space"):
        save_figure(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 3


def test_no_two_of_many_lines_look_alike() -> None:
    assert len({tuple(style_of(index).values()) for index in range(21)}) == 21
    assert len({style_of(index)["color"] for index in range(7)}) == 7
