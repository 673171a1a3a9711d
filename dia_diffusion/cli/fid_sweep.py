"""`dia-diffusion fid --sweep`: the distance at each point of a grid of settings, as a table, a figure and JSON.

Each point is a record, so a stopped sweep continues with the same command.
"""

import os
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dia_diffusion.cli import fid
from dia_diffusion.cli.console import console
from dia_diffusion.cli.ema import check_measuring, make_averages
from dia_diffusion.cli.fid_options import Options
from dia_diffusion.cli.options import parse_text, spell
from dia_diffusion.errors import InputError
from dia_diffusion.io import sha256_of_json, write_json
from dia_diffusion.tables import Table

if TYPE_CHECKING:
    from dia_diffusion.evaluation.record import EvaluationRecord
    from dia_diffusion.figures import Panel

Grid = dict[str, list[Any]]
"""Setting -> its values."""

SAMPLING = ("sampler", "steps", "guidance_scale", "guidance_interval", "guide", "precision")
"""Fields of EvalProtocol."""
PIPELINES: dict[str, type] = {"step": int, "width": float, "decay": float}
"""Settings that choose a run's pipeline or average."""


def run_sweep(options: Options) -> None:
    """Measures the grid and prints a table and the best point; writes JSON, and a figure for up to two settings.

    Raises InputError for an invalid setting or value, before anything is sampled.
    """
    grid = read_grid(options)
    sampling = [name for name in grid if name in SAMPLING]
    swept = [dict(zip(sampling, values, strict=True)) for values in product(*(grid[name] for name in sampling))]
    no_guidance = {"guidance_interval": None, "guide": None}  # at scale 1 neither applies
    settings = [each | no_guidance if each.get("guidance_scale") == 1 else each for each in swept]
    if "width" in grid or "decay" in grid:
        for step in grid.get("step", [options.step]):
            check_measuring(options, options.source, "snapshot" if "width" in grid else "checkpoint", step, settings)
    pipelines = _pipelines(options, grid)
    by_features = fid.measure_points(options, list(pipelines.values()), settings, lambda *_: None)
    if os.environ.get("RANK", "0") != "0":
        return
    chosen = [dict(zip(PIPELINES, place, strict=True)) for place in pipelines]
    points = [{name: (place | each)[name] for name in grid} for place, each in product(chosen, swept)]
    best = [min(zip(points, records, strict=True), key=lambda pair: pair[1].distance) for records in by_features]
    for records, (point, record) in zip(by_features, best, strict=True):
        console.print(sweep_table(points, records).to_rich())
        console.print(_best(point, record, records))
    measured = sha256_of_json([[record.weights_hash, record.protocol_hash()] for record in chain(*by_features)])
    figure = _folder(options, list(pipelines.values())) / f"sweep-{'-'.join(grid)}-{measured[:8]}.png"
    _write(options.source, grid, points, by_features, best, figure)


# The grid.


def read_grid(options: Options) -> Grid:
    """The settings of `--sweep` and their values. Raises InputError for a setting or value that can't be swept."""
    grid: Grid = {}
    for text in options.sweep:
        name, equals, values = text.partition("=")
        name = name.replace("-", "_")
        if not equals or not values:
            raise InputError(f"`--sweep` must be KEY=VALUE,VALUE,..., got {text}")
        if name not in (*SAMPLING, *PIPELINES):
            raise InputError(f"`--sweep` must set one of {', '.join((*SAMPLING, *PIPELINES))}, got {name!r}")
        if name in grid:
            raise InputError(f"`--sweep` must set each setting once, got {name} twice")
        if name in options.model_fields_set:
            raise InputError(f"{spell(options, name)}: --sweep {text} sets it; leave it out")
        grid[name] = [_value(name, each.strip()) for each in values.split(",")]
        if repeated := [each for place, each in enumerate(grid[name]) if each in grid[name][:place]]:
            raise InputError(f"`--sweep {name}` must have each value once, got {_text(repeated[0])} twice")
    if "width" in grid and "decay" in grid:
        raise InputError("`--sweep decay` must be left out when `--sweep width` is given")
    return grid


def _value(name: str, text: str) -> Any:
    if name in PIPELINES:
        try:
            return PIPELINES[name](text)
        except ValueError:
            numbers = "whole numbers" if PIPELINES[name] is int else "numbers"
            raise InputError(f"`--sweep {name}` must have {numbers}, got {text!r}") from None
    if name in ("guidance_interval", "guide") and text == "none":
        return None
    if name == "guidance_interval":
        return [parse_text(end, float) for end in text.split(":")]
    return parse_text(text, Options.model_fields[name].annotation)


def _pipelines(options: Options, grid: Grid) -> dict[tuple[Any, Any, Any], Path]:
    """Values of the PIPELINES settings (None if not swept) -> folder; missing averages are made."""
    from dia_diffusion.pipelines.folder import find_pipeline

    widths, decays = grid.get("width"), grid.get("decay")
    found: dict[tuple[Any, Any, Any], Path] = {}
    for step in grid.get("step", [options.step]):
        if widths or decays:
            places = make_averages(options.source, step, widths, decays)
            averages = zip(product(widths or [None], decays or [None]), places, strict=True)
            found |= {(step, width, decay): place for (width, decay), place in averages}
        else:
            found[step, None, None] = find_pipeline(options.source, step)
    return found


# Output.


def sweep_table(points: list[dict[str, Any]], records: "list[EvaluationRecord]") -> Table:
    """One row per point: settings, distance with its interval, other metrics."""
    from dia_diffusion.evaluation.curves import distance_label
    from dia_diffusion.evaluation.record import describe_number, numbers_of

    names = list(dict.fromkeys(name for record in records for name in numbers_of(record)))
    rows = [
        [*map(_text, point.values()), _distance(record), *(describe_number(record, name) for name in names)]
        for point, record in zip(points, records, strict=True)
    ]
    return Table((*points[0], distance_label(records[0]), *names), rows, left=())


def _best(point: dict[str, Any], best: "EvaluationRecord", records: "list[EvaluationRecord]") -> str:
    text = f"best {best.metric}: {_distance(best)} at {_described(point)}"
    if best.high is None:
        return f"{text}; --bootstrap N gives intervals"
    if others := sum(record.distance <= best.high for record in records) - 1:
        text += f"; {others} other point{'s' * (others > 1)} within this interval"
    return text


def _write(
    source: str,
    grid: Grid,
    points: list[dict[str, Any]],
    by_features: "list[list[EvaluationRecord]]",
    best: "list[tuple[dict[str, Any], EvaluationRecord]]",
    figure: Path,
) -> None:
    """The figure of one or two settings, and the points as JSON next to it."""
    from dia_diffusion.figures import Figure
    from dia_diffusion.plotting import save_figure

    fields = ("metric", "distance", "low", "high", "metrics", "step", "weights_hash", "protocol_name")
    described = [
        {"settings": point, **{name: getattr(record, name) for name in fields}, "protocol_hash": record.protocol_hash()}
        for records in by_features
        for point, record in zip(points, records, strict=True)
    ]
    chosen = [{"settings": point, "metric": record.metric, "distance": record.distance} for point, record in best]
    numbers = figure.with_suffix(".json")
    write_json(numbers, {"source": source, "sweep": grid, "points": described, "best": chosen})
    if len(grid) > 2:
        console.print(f"numbers in {numbers}; a figure takes one or two settings, not {len(grid)}")
        return
    panels = [sweep_panel(grid, points, records) for records in by_features]
    save_figure(Figure([panels], size=(6.4 * len(panels), 4.2), legend="none"), figure)
    console.print(f"{figure}, numbers in {numbers}")


def sweep_panel(grid: Grid, points: list[dict[str, Any]], records: "list[EvaluationRecord]") -> "Panel":
    """A curve over one setting, or a heat map over two, with the first from top to bottom."""
    from dia_diffusion.evaluation.curves import distance_label
    from dia_diffusion.figures import Axis, HeatMap, Panel, Series, block_axis, value_axis

    label = distance_label(records[0])
    first, *rest = grid
    if rest:
        cells = {
            tuple(map(_text, point.values())): record.distance for point, record in zip(points, records, strict=True)
        }
        rows, columns = ([_text(value) for value in grid[name]] for name in grid)
        values = [[cells[row, column] for column in columns] for row in rows]
        distances = list(cells.values())
        heat_map = HeatMap(values, min(distances), max(distances), "viridis_r", ".4g", label)
        return Panel([heat_map], x=block_axis(columns, rest[0]), y=block_axis(rows, first))
    pairs = list(zip(grid[first], records, strict=True))
    x_axis = block_axis([_text(value) for value in grid[first]], first)
    x: list[float] = list(range(len(pairs)))
    if all(isinstance(value, int | float) for value in grid[first]):
        pairs.sort(key=lambda pair: pair[0])
        x = [value for value, _ in pairs]
        x_axis = value_axis(first, x) if min(x) > 0 and max(x) / min(x) >= 10 else Axis(first)
    y, low, high = ([getattr(record, name) for _, record in pairs] for name in ("distance", "low", "high"))
    series = Series(x, y, low=low, high=high, bars=True, lines=x_axis.ticks is None)
    return Panel([series], x=x_axis, y=value_axis(label, y, [*low, *high]))


def _folder(options: Options, pipelines: list[Path]) -> Path:
    """The folder of the records, or the common parent if the pipelines keep their records in several folders."""
    from dia_diffusion.pipelines.folder import records_file

    folders = {options.record.parent} if options.record else {records_file(place).parent for place in pipelines}
    return folders.pop() if len(folders) == 1 else Path(os.path.commonpath(folders))


def _distance(record: "EvaluationRecord") -> str:
    interval = "" if record.low is None else f" [{record.low:.3f}, {record.high:.3f}]"
    return f"{record.distance:.3f}{interval}"


def _described(point: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_text(value)}" for name, value in point.items())


def _text(value: Any) -> str:
    """A value as typed in `--sweep`."""
    if value is None:
        return "none"
    if isinstance(value, list):
        return ":".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
