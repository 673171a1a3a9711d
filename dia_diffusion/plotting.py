"""Renders figures to files with matplotlib."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.colors import Normalize
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator, PercentFormatter

from dia_diffusion.errors import InputError
from dia_diffusion.figures import (
    GRAY,
    LOG_DIGITS,
    Area,
    Axis,
    Bars,
    Figure,
    HeatMap,
    Item,
    Level,
    Panel,
    Picture,
    Series,
    Text,
    style_of,
)
from dia_diffusion.io import atomic_file


def check_format(path: str | Path) -> str:
    """The format that a figure file's suffix names.

    Raises:
        InputError: there is no such format.
    """
    file_format, formats = Path(path).suffix.removeprefix("."), FigureCanvasBase.get_supported_filetypes()
    if file_format not in formats:
        raise InputError(f"{path} must have the suffix of a figure format, one of {', '.join(formats)}")
    return file_format


def save_figure(figure: Figure | matplotlib.figure.Figure, path: str | Path, dpi: int = 200) -> None:
    """Writes a figure atomically, in the format that its suffix names."""
    rendered = render(figure) if isinstance(figure, Figure) else figure
    file_format = check_format(path)
    with atomic_file(path) as temporary:
        rendered.savefig(temporary, format=file_format, dpi=dpi)


def render(figure: Figure) -> matplotlib.figure.Figure:
    """The figure as a matplotlib figure."""
    rendered = matplotlib.figure.Figure(figsize=figure.size, layout="constrained")
    columns = max(len(row) for row in figure.rows)
    grid = rendered.subplots(
        len(figure.rows),
        columns,
        squeeze=False,
        sharex=figure.share_x,
        sharey=figure.share_y,
        width_ratios=figure.widths,
        height_ratios=figure.heights,
    )
    panels: list[tuple[Axes, Panel]] = []
    for row, places in zip(figure.rows, grid, strict=True):
        for axes, panel in zip_longest(places, row):
            if panel is None:
                axes.remove()
            else:
                panels.append((axes, panel))
                _draw_panel(axes, panel)
    for axes, panel in panels:  # set limits once everything is drawn, since they may be shared
        labeled = figure.share_y == "none" or axes.get_subplotspec().is_first_col()  # type: ignore[union-attr]
        _scale(axes, panel.x, "x", narrow=figure.size[0] / columns < 4.2)
        _scale(axes, panel.y, "y", labeled=labeled)
    if figure.legend == "panel":
        for axes, _ in panels:
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, fontsize="medium" if len(panels) == 1 else "small")
    elif figure.legend == "below":
        _draw_legend(rendered, panels, figure.legend_title)
    return rendered


def _draw_panel(axes: Axes, panel: Panel) -> None:
    axes.set_title(_plain(panel.title), fontsize="large" if len(panel.title) <= 40 else "medium")
    if panel.note:
        axes.text(0.97, 0.96, _plain(panel.note), transform=axes.transAxes, ha="right", va="top", fontsize="small")
    if not panel.frame:
        axes.axis("off")
    for item in panel.items:
        _draw(axes, item)


def _draw(axes: Axes, item: Item) -> None:
    match item:
        case Series():
            _draw_series(axes, item)
        case Level(value, label, axis):
            draw = axes.axhline if axis == "y" else axes.axvline
            draw(value, color=GRAY, linestyle="--", linewidth=1.2, label=_plain(label) or None)
        case Bars():
            color = style_of(item.style)["color"]
            axes.bar(item.x, item.heights, item.width, item.bottom, color=color, label=_plain(item.label) or None)
        case Area():
            color = style_of(item.style)["color"]
            edge = {"edgecolor": (color, 1.0), "linewidth": 1} if item.outline else {"linewidth": 0}
            axes.fill(item.x, item.y, facecolor=(color, item.opacity), label=_plain(item.label) or None, **edge)
        case HeatMap():
            _draw_heat_map(axes, item)
        case Text():
            axes.text(item.x, item.y, _plain(item.text), color=item.color, ha="center", va="center", fontsize="small")
        case Picture():
            axes.imshow(item.pixels)


def _draw_series(axes: Axes, series: Series) -> None:
    style = series.look
    y = [math.nan if value is None else value for value in series.y]
    if series.has_band:
        axes.fill_between(series.x, series.low, series.high, color=style["color"], alpha=0.2, linewidth=0)  # type: ignore[arg-type]
    if (errors := series.errors) is not None:
        for x, value, *lengths in zip(series.x, y, *errors, strict=True):
            if any(lengths):
                ends = [[length] for length in lengths]
                axes.errorbar(x, value, ends, color=style["color"], elinewidth=1.2, capsize=3, linestyle="")
    style |= {"markersize": 4, "linewidth": 1.6, "label": _plain(series.label) or None}
    if series.pale:
        style |= {"markersize": 3, "linewidth": 0.7, "alpha": 0.35, "label": None}
    style |= ({} if series.markers else {"marker": ""}) | ({} if series.lines else {"linestyle": ""})
    axes.plot(series.x, y, **style)


def _draw_heat_map(axes: Axes, heat_map: HeatMap) -> None:
    values = np.array(heat_map.values, dtype=float)
    axes.set_facecolor("0.9")
    norm = Normalize(heat_map.low, heat_map.high)
    image = axes.imshow(values, heat_map.colors, norm, aspect="auto", interpolation="nearest")
    if heat_map.bar is not None:
        axes.figure.colorbar(image, ax=axes, pad=0.02, fraction=0.06).set_label(heat_map.bar, fontsize="small")
    for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True) if heat_map.numbers else ():
        value = values[row, column]
        red, green, blue, _ = image.cmap(image.norm(value))
        color = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
        axes.text(column, row, format(value, heat_map.numbers), color=color, ha="center", va="center", fontsize="small")


def _scale(axes: Axes, axis: Axis, which: Literal["x", "y"], *, labeled: bool = True, narrow: bool = False) -> None:
    own = axes.xaxis if which == "x" else axes.yaxis
    if axis.scale != "linear":
        axes.set(**{f"{which}scale": axis.scale})
        if axis.scale == "log":
            own.set_major_locator(LogLocator(subs=(1,) if narrow else LOG_DIGITS))
        own.set_major_formatter("{x:g}")
        own.set_minor_formatter(NullFormatter())
    if labeled:
        own.set_label_text(_plain(axis.label))
    if axis.low is not None or axis.high is not None:
        axes.set_xlim(axis.low, axis.high) if which == "x" else axes.set_ylim(axis.low, axis.high)
    if axis.ticks is not None:
        longest = max((len(line) for text in axis.ticks.values() for line in text.split("\n")), default=0)
        crowded = which == "x" and longest > 3 and longest * len(axis.ticks) > 50
        turned: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
        own.set_ticks(list(axis.ticks), [_plain(text) for text in axis.ticks.values()], **turned)
        own.set_minor_locator(NullLocator())
    elif narrow and axis.scale == "linear":
        own.set_major_locator(MaxNLocator(5))
    if axis.form != "plain":
        own.set_major_formatter(EngFormatter(sep="") if axis.form == "si" else PercentFormatter(1.0, decimals=0))
    if axis.grid:
        axes.grid(axis=which, alpha=0.25, linewidth=0.6)
    if axis.step_images:
        to_steps, to_images = partial(np.multiply, 1 / axis.step_images), partial(np.multiply, axis.step_images)
        steps = axes.secondary_xaxis("top", functions=(to_steps, to_images))
        steps.set_xlabel(f"steps of {axis.step_images} images")
        steps.xaxis.set_major_formatter(EngFormatter(sep=""))
        if narrow:
            steps.xaxis.set_major_locator(MaxNLocator(5))


def _draw_legend(figure: matplotlib.figure.Figure, panels: Sequence[tuple[Axes, Panel]], title: str) -> None:
    """Draws one legend for all panels, below them; levels come last."""
    drawn = [pair for axes, _ in panels for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    levels = {_plain(item.label) for _, panel in panels for item in panel.items if isinstance(item, Level)}
    entries = {label: handle for handle, label in sorted(drawn, key=lambda pair: pair[1] in levels)}
    widths, width = [0.75 + 0.065 * len(label) for label in entries], figure.get_figwidth()  # in inches
    columns = len(entries) if sum(widths) <= width else max(1, int(width // max(widths)))
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "frameon": False}
    if entries:
        figure.legend(entries.values(), entries.keys(), title=_plain(title) or None, title_fontsize="medium", **place)


def _plain(text: str) -> str:
    return text.replace("$", r"\$")
