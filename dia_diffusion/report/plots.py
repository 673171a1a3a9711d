"""Figures on the page: their description, as the data and layout that plotly draws."""

import math
from collections.abc import Sequence
from typing import Any

from dia_diffusion.figures import DASHES, GRAY, LOG_DIGITS, MARKERS, Axis, Level, Panel, Series

# plotly's names of these markers and dashes.
SYMBOLS = dict(zip(MARKERS, ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x"), strict=True))
DASH_NAMES = dict(zip(DASHES, ("solid", "dash", "dot"), strict=True))

LAYOUT: dict[str, Any] = {
    "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "hoversubplots": "axis",
    "modebar": {"bgcolor": "rgba(0,0,0,0)"},
    "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "traceorder": "normal"},
}
"""The page's style sheet colors text and grid, for light and dark."""


def to_plotly(panels: Sequence[Panel], height: int, legend: bool = True) -> dict[str, Any]:
    """Data and layout of plotly for panels below each other over one x axis: their series, levels and notes.

    Args:
        panels: from the top.
        height: of all panels together, in pixels.
        legend: whether there is one, if there are two lines.
    """
    x = panels[-1].x
    layout: dict[str, Any] = LAYOUT | {
        "height": height,
        "hovermode": "x unified" if x.ticks is None else "closest",
        "xaxis": _axis(x) | {"anchor": _name(len(panels) - 1)},
    }
    layout["shapes"], layout["annotations"], traces = [], [], []
    between = 0.08 if len(panels) > 1 else 0
    share = (1 - between * (len(panels) - 1)) / len(panels)
    for index, panel in enumerate(panels):
        y, top = _name(index), 1 - index * (share + between)
        layout[y.replace("y", "yaxis")] = _axis(panel.y) | {"domain": [max(0.0, top - share), top]}
        for item in panel.items:
            match item:
                case Series():
                    drawn = [*(_band(item) if item.has_band else ()), _series(item, panel.x.step_images)]
                    traces += [trace | {"yaxis": y} for trace in drawn]
                case Level(value, label, "y"):
                    line = {"color": GRAY, "dash": "dash", "width": 1.2}
                    shape = {"type": "line", "x0": 0, "x1": 1, "y0": value, "y1": value, "line": line}
                    shape |= {"xref": "x domain", "yref": y, "name": _escape(label)}
                    layout["shapes"].append(shape | {"showlegend": True})
                case _:
                    raise TypeError(f"the page has no {type(item).__name__}")
        if panel.note:
            place = {"xref": "x domain", "yref": f"{y} domain", "x": 1, "y": 1, "align": "right"}
            layout["annotations"].append({"text": _escape(panel.note), "showarrow": False, **place})
    labels = [trace for trace in traces + layout["shapes"] if trace.get("showlegend", True)]
    layout["showlegend"] = legend and len(labels) > 1
    layout["margin"] = {"l": 64, "r": 12, "t": 34 if layout["showlegend"] else 12, "b": 48}
    # Bands first, so that no band covers a line.
    return {"data": sorted(traces, key=lambda trace: trace["line"]["width"] > 0), "layout": layout}


def _name(index: int) -> str:
    """plotly's name of a panel's y axis."""
    return f"y{index + 1}" if index else "y"


def _axis(axis: Axis) -> dict[str, Any]:
    position = math.log10 if axis.scale == "log" else float
    low, high = (None if end is None else position(end) for end in (axis.low, axis.high))
    described: dict[str, Any] = {
        "title": {"text": _escape(axis.label), "standoff": 8},
        "type": axis.scale,
        "range": [low, high],
        "tickformat": {"plain": "", "si": "~s", "percent": ".0%"}[axis.form],
        "hoverformat": "," if axis.form == "si" else "",
        "exponentformat": "power",
        "showgrid": axis.grid,
        "gridcolor": "#d9dcdf",
        "linecolor": "#59616a",
        "showline": axis.form == "si" or axis.ticks is not None,
        "zeroline": False,
    }
    ticks = axis.ticks
    if axis.scale == "log" and axis.low and axis.high:
        digits = LOG_DIGITS if axis.high < 1000 * axis.low else (1,)
        powers = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
        ticks = {digit * 10.0**power: f"{digit * 10.0**power:g}" for power in powers for digit in digits}
    if ticks is not None:
        described |= {"tickvals": list(ticks), "ticktext": [_escape(text) for text in ticks.values()]}
    return described


def _series(series: Series, step_images: int | None) -> dict[str, Any]:
    style = series.look
    hover = series.hover or [f"step {round(x / step_images):,}" for x in series.x if step_images]
    trace: dict[str, Any] = {
        "type": "scatter",
        "x": list(series.x),
        "y": list(series.y),
        "name": _escape(series.label),
        "mode": "+".join(["lines"] * series.lines + ["markers"] * series.markers),
        "line": {"color": style["color"], "dash": DASH_NAMES[style["linestyle"]], "width": 1.0 if series.pale else 1.8},
        "marker": {"symbol": SYMBOLS[style["marker"]], "size": 4 if series.pale else 7},
        "opacity": 0.35 if series.pale else 1,
        "hovertemplate": "%{y:.4g} (%{text})" if hover else "%{y:.4g}",
        "text": [_escape(text) for text in hover],
    }
    if series.pale:
        trace["showlegend"] = False
    if not series.label:
        trace |= {"showlegend": False, "hoverinfo": "skip", "hovertemplate": None}
    if (errors := series.errors) is not None:
        trace["error_y"] = {"type": "data", "symmetric": False, "arrayminus": errors[0], "array": errors[1]}
    return trace


def _band(series: Series) -> list[dict[str, Any]]:
    """The interval as an area behind the line."""
    red, green, blue = (int(series.look["color"][place : place + 2], 16) for place in (1, 3, 5))
    shared: dict[str, Any] = {"type": "scatter", "x": list(series.x), "mode": "lines", "line": {"width": 0}}
    shared |= {"showlegend": False, "hoverinfo": "skip"}
    area = {"fill": "tonexty", "fillcolor": f"rgba({red}, {green}, {blue}, 0.22)"}
    return [shared | {"y": list(series.low or ())}, shared | {"y": list(series.high or ())} | area]


def _escape(text: str) -> str:
    """plotly takes some tags for markup; it shows entities as the characters that they stand for."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\n", "<br>")
