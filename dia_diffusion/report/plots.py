"""The page's plots, in plotly: lines over images seen, with the colours that units have in every figure."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

from plotly.graph_objects import Figure, Scatter
from plotly.subplots import make_subplots

from dia_diffusion.evaluation.curves import LOG_FROM, style
from dia_diffusion.sweeps.figure import DODGE

RATE = "learning rate"

# What plotly calls the markers and dashes of `evaluation.curves.style`.
SYMBOLS = {
    "o": "circle",
    "s": "square",
    "^": "triangle-up",
    "D": "diamond",
    "v": "triangle-down",
    "P": "cross",
    "X": "x",
}
DASHES = {"-": "solid", "--": "dash", ":": "dot"}


@dataclass
class Line:
    """A line over images seen."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    index: int = 0
    """Of its colour, marker and dashes, see `evaluation.curves.style`."""
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    """The ends of each point's interval; None where a point has none."""
    hover: Sequence[str] = field(default_factory=list)
    """What each point says besides its value; its step if none."""
    pale: bool = False
    """Behind another one: values behind their mean, a seed's curve behind that of all."""


def plain(text: str) -> str:
    """Text for a plot, where plotly would take what looks like markup as such."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def training_figure(panels: Mapping[str, Sequence[Line]], step_images: int | None) -> Figure:
    """One panel a quantity below each other over the same images seen; a panel's title is its name."""
    figure = make_subplots(rows=len(panels), cols=1, shared_xaxes=True, vertical_spacing=0.08)
    for row, (name, lines) in enumerate(panels.items(), start=1):
        for line in lines:
            figure.add_trace(_scatter(line, step_images, width=1.2, markers=False), row=row, col=1)
        values = [value for line in lines for value in line.y]
        log_from = math.inf if name == RATE else LOG_FROM  # a cosine's end is many powers of ten below the rest
        figure.update_yaxes(title_text=name, row=row, col=1, **_range(values, log_from))
    _style(figure, height=60 + 190 * len(panels), legend=False)
    figure.update_xaxes(title_text="images seen", row=len(panels), col=1)
    return figure


def curves_figure(
    lines: Sequence[Line],
    title: str,
    *,
    step_images: int | None = None,
    floor: float | None = None,
    values: Sequence[float | None] = (),
    markers: bool = True,
) -> Figure:
    """Lines over images seen with their bands, or with bars where only some points have an interval.

    Args:
        lines: at least one; pale ones are thin and in no legend.
        title: the y axis's.
        step_images: images a step: points then tell their step.
        floor: a dashed line.
        values: those that the y axis must have room for, such as all panels'; the lines' own and their intervals if
            none.
        markers: whether points are marked.
    """
    figure = Figure()
    for line in lines:
        if _is_band(line):
            figure.add_traces(_band(line))
    for line in lines:
        trace = _scatter(line, step_images, width=1.8, markers=markers and not line.pale)
        if line.pale:
            trace.update(showlegend=False, hoverinfo="skip", hovertemplate=None, line={"width": 0.8})
        figure.add_trace(trace)
    if floor is not None:
        _add_floor(figure, [0, max(x for line in lines for x in line.x)], floor)
    shown = list(values) or [v for line in lines for ends in (line.y, line.low, line.high) for v in ends or ()]
    figure.update_yaxes(title_text=plain(title), **_range([*shown, floor]))
    _style(figure, height=400, legend=len(lines) > 1 or floor is not None)
    figure.update_xaxes(title_text="images seen")
    return figure


def ends_figure(lines: Sequence[Line], singles: Sequence[Line], title: str, *, floor: float | None = None) -> Figure:
    """Means with their bars over batch size, an octave of which is 1 along the axis; units stand beside each other.

    Args:
        lines: a unit's means each, `x` its batch sizes.
        singles: a unit's values each, one a seed, drawn pale.
        title: the y axis's.
        floor: a dashed line.
    """
    figure = Figure()
    sizes = sorted({size for line in lines for size in line.x})
    apart = DODGE * (math.log2(sizes[-1] / sizes[0]) or 1)
    places = {line.name: (place - (len(lines) - 1) / 2) * apart for place, line in enumerate(lines)}
    for line in [*singles, *lines]:
        x = [math.log2(size) + places[line.name] for size in line.x]
        told = [
            ", ".join(filter(None, (f"batch size {size:g}", text))) for size, text in zip_longest(line.x, line.hover)
        ]
        trace = _scatter(replace(line, x=x, hover=told), None, width=1.4, markers=True, bars=True)
        if line.pale:
            trace.update(mode="markers", showlegend=False, marker={"size": 4})
        figure.add_trace(trace)
    if floor is not None:
        _add_floor(figure, [math.log2(sizes[0]) - 0.3, math.log2(sizes[-1]) + 0.3], floor)
    values = [value for line in [*singles, *lines] for value in line.y]
    figure.update_yaxes(title_text=plain(title), **_range([*values, floor]))
    _style(figure, height=400, legend=True)
    ticks = {"tickvals": [math.log2(size) for size in sizes], "ticktext": [f"{size:g}" for size in sizes]}
    figure.update_xaxes(title_text="batch size", rangemode="normal", showgrid=False, **ticks)
    figure.update_layout(hovermode="closest")
    return figure


def _add_floor(figure: Figure, x: list[float], floor: float) -> None:
    grey = {"color": "#888888", "dash": "dash", "width": 1.2}
    figure.add_scatter(x=x, y=[floor] * 2, name=f"floor: real images, {floor:.3g}", mode="lines", line=grey)


def _scatter(line: Line, step_images: int | None, width: float, markers: bool, bars: bool = False) -> Scatter:
    told = line.hover
    if step_images and not told:
        told = [f"step {round(x / step_images):,}" for x in line.x]
    error = None
    if (bars or not _is_band(line)) and line.low is not None and line.high is not None:
        error = {
            "type": "data",
            "symmetric": False,
            "array": [_distance(end, y) for end, y in zip(line.high, line.y, strict=True)],
            "arrayminus": [_distance(y, end) for end, y in zip(line.low, line.y, strict=True)],
            "thickness": 1.2,
        }
    own = style(line.index)
    return Scatter(
        x=list(line.x),
        y=list(line.y),
        name=plain(line.name),
        mode="lines+markers" if markers else "lines",
        line={"color": own["color"], "dash": DASHES[own["linestyle"]], "width": width},
        marker={"symbol": SYMBOLS[own["marker"]], "size": 7},
        error_y=error,
        opacity=0.35 if line.pale else 1,
        text=[plain(text) for text in told] or None,
        hovertemplate="%{y:.4g}" + (" (%{text})" if told else ""),
    )


def _band(line: Line) -> list[Scatter]:
    """The interval as an area behind the line."""
    red, green, blue = (int(style(line.index)["color"][i : i + 2], 16) for i in (1, 3, 5))
    shared: dict[str, Any] = {"mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
    fill = f"rgba({red}, {green}, {blue}, 0.22)"
    assert line.low is not None and line.high is not None
    return [
        Scatter(x=list(line.x), y=list(line.low), **shared),
        Scatter(x=list(line.x), y=list(line.high), fill="tonexty", fillcolor=fill, **shared),
    ]


def _is_band(line: Line) -> bool:
    ends = (line.low, line.high)
    return len(line.x) > 1 and all(end is not None and all(value is not None for value in end) for end in ends)


def _range(values: Iterable[float | None], log_from: float = LOG_FROM) -> dict[str, Any]:
    """Logarithmic for a wide range, else from zero, so that a small difference looks small."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if known and min(known) > 0 and max(known) / min(known) >= log_from:
        low, high = math.log10(min(known)), math.log10(max(known))
        room = 0.05 * (high - low)
        digits = (1, 2, 5) if high - low < 3 else (1,)
        ticks = [digit * 10**power for power in range(math.floor(low), math.ceil(high) + 1) for digit in digits]
        labels = [f"{tick:g}" for tick in ticks]
        return {"type": "log", "range": [low - room, high + room], "tickvals": ticks, "ticktext": labels}
    if known and min(known) >= 0:
        return {"range": [0, 1.06 * max(known) or 1]}
    return {}


def _style(figure: Figure, height: int, legend: bool) -> None:
    """Light lines on the page's own ground; the page's style sheet colours text and grid for light and dark."""
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 64, "r": 12, "t": 34 if legend else 12, "b": 48},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12},
        hovermode="x unified",
        modebar={"bgcolor": "rgba(0,0,0,0)"},
        showlegend=legend,
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "traceorder": "normal"},
    )
    figure.update_xaxes(
        rangemode="tozero",
        tickformat="~s",
        hoverformat=",",
        gridcolor="#d9dcdf",
        zeroline=False,
        showline=True,
        linecolor="#59616a",
    )
    figure.update_yaxes(gridcolor="#d9dcdf", zeroline=False, exponentformat="power", title_standoff=8)


def _distance(larger: float | None, smaller: float | None) -> float:
    return 0.0 if larger is None or smaller is None else larger - smaller
