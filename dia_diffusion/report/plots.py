"""Converts panels to plotly's data and layout."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dia_diffusion.figures import DASHES, GRAY, MARKERS, Axis, Level, Panel, Series

# plotly's names of these markers, dashes and forms of numbers.
SYMBOLS = dict(zip(MARKERS, ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x"), strict=True))
DASH_NAMES = dict(zip(DASHES, ("solid", "dash", "dot"), strict=True))
FORMATS = {"plain": "", "si": "~s", "percent": ".0%"}


@dataclass
class Plot:
    """A plot on the page."""

    title: str
    description: str
    """Text alternative for people who can't see it."""
    data: list[dict[str, Any]]
    layout: dict[str, Any]


def to_plotly(panels: Sequence[Panel], title: str = "", height: int = 400) -> Plot:
    """Panels stacked above a shared x axis: their series, levels and notes.

    Args:
        panels: from the top. All have the labels of the first, which the legend shows.
        title: above the plot.
        height: of all panels together, in pixels.
    """
    x, names = panels[-1].x, ["y", *(f"y{number}" for number in range(2, len(panels) + 1))]
    layout: dict[str, Any] = {
        "height": height,
        "font": {"family": "system-ui, sans-serif", "color": "#1c2024"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#a0a9b2", "activecolor": "#59616a"},
        "hovermode": "x unified" if x.ticks is None else "closest",
        "hoverlabel": {"bgcolor": "white"},
        "grid": {"rows": len(panels), "columns": 1, "subplots": [[f"x{name}"] for name in names]},
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
        "xaxis": _axis(x),
        "shapes": [],
        "annotations": [],
    }
    bands, lines, shown = [], [], []
    for name, panel in zip(names, panels, strict=True):
        layout[name.replace("y", "yaxis")] = _axis(panel.y)
        for item in panel.items:
            match item:
                case Series():
                    bands += [_band(item) | {"yaxis": name}] if item.has_band else []
                    lines.append(_line(item, panel.x.step_images) | {"yaxis": name})
                    lines[-1]["showlegend"] &= panel is panels[0]
                    values = [value for value in item.y if value is not None]
                    if item.label and values and not item.pale:
                        shown.append(f"{panel.y.label}, {item.label}: from {values[0]:.4g} to {values[-1]:.4g}")
                case Level(value, label, "y"):
                    line = {"type": "line", "line": {"color": GRAY, "dash": "dash", "width": 1.2}, "showlegend": True}
                    ends = {"x0": 0, "x1": 1, "xref": "x domain", "y0": value, "y1": value, "yref": name}
                    layout["shapes"].append({"name": _escape(label), **line, **ends})
                case _:
                    raise TypeError(f"the page has no {type(item).__name__}")
        if panel.note:
            corner = {"x": 1, "xref": "x domain", "y": 1, "yref": f"{name} domain", "align": "right"}
            layout["annotations"].append({"text": _escape(panel.note), "showarrow": False, **corner})
    layout["showlegend"] = sum(entry["showlegend"] for entry in lines + layout["shapes"]) > 1
    layout["hoversubplots"] = "overlaying" if layout["showlegend"] else "axis"  # hover shows all panels, if few
    layout["margin"] = {"l": 64, "r": 12, "t": 34 if layout["showlegend"] else 12, "b": 48}
    return Plot(title, f"Over {x.label}: {'; '.join(shown)}", bands + lines, layout)


def _axis(axis: Axis) -> dict[str, Any]:
    described: dict[str, Any] = {
        "title": {"text": _escape(axis.label), "standoff": 8},
        "type": axis.scale,
        "range": [axis.low, axis.high],
        "tickformat": FORMATS[axis.form],
        "hoverformat": "," if axis.form == "si" else "",
        "exponentformat": "power",
        "showgrid": axis.grid,
        "gridcolor": "#d9dcdf",
        "zeroline": axis.ticks is None,
        "zerolinecolor": "#59616a",
    }
    if axis.scale == "log":
        low, high = (None if end is None else math.log10(end) for end in (axis.low, axis.high))
        narrow = low is not None and high is not None and high - low < 3
        described |= {"range": [low, high], "tickformat": "~g", "dtick": "D2" if narrow else 1}  # D2: 1, 2, 5, 10, ...
    if axis.ticks is not None:
        described |= {"tickvals": list(axis.ticks), "ticktext": [_escape(text) for text in axis.ticks.values()]}
    return described


def _line(series: Series, step_images: int | None) -> dict[str, Any]:
    style, name = series.look, _escape(series.label)
    hover = series.hover or [f"step {round(x / step_images):,}" for x in series.x if step_images]
    trace: dict[str, Any] = {
        "x": list(series.x),
        "y": list(series.y),
        "name": name,
        "legendgroup": name,
        "showlegend": bool(name) and not series.pale,
        "mode": "+".join(["lines"] * series.lines + ["markers"] * series.markers),
        "line": {"color": style["color"], "dash": DASH_NAMES[style["linestyle"]], "width": 1.0 if series.pale else 1.8},
        "marker": {"symbol": SYMBOLS[style["marker"]], "size": 4 if series.pale else 7},
        "opacity": 0.35 if series.pale else 1,
        "hoverinfo": "all" if name else "skip",
        "hovertemplate": "%{y:.4g} (%{text})" if hover else "%{y:.4g}",
        "text": [_escape(text) for text in hover],
    }
    if (errors := series.errors) is not None:
        trace["error_y"] = {"type": "data", "symmetric": False, "arrayminus": errors[0], "array": errors[1]}
    return trace


def _band(series: Series) -> dict[str, Any]:
    """The interval as an area behind the line: forward along the lower end, back along the upper one."""
    x, low, high = list(series.x), list(series.low or ()), list(series.high or ())
    area = {"fill": "toself", "fillcolor": series.look["color"], "opacity": 0.22, "mode": "none", "hoverinfo": "skip"}
    return {"x": x + x[::-1], "y": low + high[::-1], "legendgroup": _escape(series.label), "showlegend": False, **area}


def _escape(text: str) -> str:
    """Escapes text, since plotly interprets some tags as markup; it decodes entities."""
    return html.escape(text, quote=False).replace("\n", "<br>")
