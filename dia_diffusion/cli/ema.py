"""`dia-diffusion ema`: pipelines of other averages of a run's weights, and their distances."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dia_diffusion.cli import fid
from dia_diffusion.cli.console import console
from dia_diffusion.cli.fid_options import MeasureOptions, per_features, resolve_protocol, with_precision
from dia_diffusion.cli.options import Positional, flag, refuse_both
from dia_diffusion.errors import InputError
from dia_diffusion.io import check_writable, step_name, write_json
from dia_diffusion.validation import Strict


class AverageOptions(Strict):
    """Which averages are made, and where."""

    source: Annotated[str, Positional("RUN")]
    """A run folder."""
    width: list[float] | None = Field(None, min_length=1)
    """Relative widths, such as 0.05 or 0.02,0.05,0.1: power-function averages (EDM2), from the run's snapshots."""
    decay: list[float] | None = Field(None, min_length=1)
    """Decays in ema.further_decays, such as 0.999: averages from a checkpoint of the run."""
    step: int | None = None
    """Step of a snapshot, or of a checkpoint for --decay; the newest if not given."""
    out: Path | None = None
    """The pipeline's folder, or a folder for several pipelines; if not given, in RUN/averages."""


class Options(MeasureOptions, AverageOptions):  # --help lists the last base first
    """Makes pipelines of other averages of a run's weights, and measures them if --protocol or --reference is given.

    The other options are those of fid.
    """

    @model_validator(mode="after")
    def _check_averages(self) -> "Options":
        refuse_both(self, "width", "decay")
        if not self.width and not self.decay:
            raise InputError("`--width` is missing, or `--decay`")
        values = self.width or self.decay or []
        if len({*values}) < len(values):
            name = flag(["width" if self.width else "decay"])
            raise InputError(f"`{name}` must be different numbers, got {','.join(map(str, values))}")
        asked = self.model_fields_set & MeasureOptions.model_fields.keys()
        if asked and not self.measures:
            raise InputError(f"`{flag([min(asked)])}` must be left out without `--protocol` or `--reference`")
        return self

    @property
    def measures(self) -> bool:
        """Whether the pipelines are measured."""
        return self.protocol is not None or self.reference is not None


def run(options: Options) -> None:
    """Writes the missing pipelines and measures all of them; draws a figure if there are several widths."""
    if options.measures:
        options = with_precision(options)
        check_measuring(options, options.source, "snapshot" if options.width else "checkpoint", options.step)
    places = make_averages(options.source, options.step, options.width, options.decay, options.out)
    if not options.measures:
        return
    records = fid.measure(options, places)[0]
    if options.width is not None and len(places) > 1 and os.environ.get("RANK", "0") == "0":
        from dia_diffusion.evaluation.curves import draw_widths

        figure = places[0].with_name("widths.png")
        points = draw_widths(options.width, records, figure)
        write_json(figure.with_suffix(".json"), points)
        console.print(f"{len(points)} widths: {figure}, numbers in {figure.with_suffix('.json')}")


def check_measuring(
    options: MeasureOptions,
    run: str,
    kind: Literal["snapshot", "checkpoint"],
    step: int | None,
    settings: Sequence[Mapping[str, Any]] = ({},),
) -> None:
    """Raises InputError, before averages are written, if pipelines of the run's recipe can't be measured this way.

    Args:
        kind: what the averages are made from.
        settings: fields of EvalProtocol to measure with, which replace those of the options or the named protocol.
    """
    from dia_diffusion.data.sources import find_format
    from dia_diffusion.sampling.load import load_guide
    from dia_diffusion.training.diffusion import check_samples
    from dia_diffusion.training.recipe import read_experiment
    from dia_diffusion.training.run_folder import RunFolder
    from dia_diffusion.training.snapshots import choose_step

    choose_step(run, kind, step)
    experiment = read_experiment(str(RunFolder(run).config))
    reference = options.reference or str(experiment.data.source)
    if find_format(reference) is None and not Path(reference).exists():
        raise InputError(f"`--reference` must be images or a file of statistics, got {reference}, which isn't here")
    if options.record is not None:
        check_writable(options.record, "`--record`")
    for one, changed in product(per_features(options), settings):
        protocol = resolve_protocol(one, True, reference, changed)
        protocol.check_count(protocol.num_samples)
        check_samples(experiment, protocol.sampling, load_guide(protocol.guide))


def make_averages(
    run: str, step: int | None, widths: list[float] | None, decays: list[float] | None, out: Path | None = None
) -> list[Path]:
    """Writes the missing pipelines and returns the folders of all of them; arguments as for the options."""
    from dia_diffusion.distributed import broadcast_from_rank_zero, start_accelerator

    make = partial(_make, run, step, widths or [], decays or [], out)
    return [Path(place) for place in broadcast_from_rank_zero(start_accelerator(), make)]


def _make(run: str, step: int | None, widths: list[float], decays: list[float], out: Path | None) -> list[str]:
    from dia_diffusion.training.ema import average_name
    from dia_diffusion.training.run_folder import RunFolder
    from dia_diffusion.training.snapshots import Snapshots, choose_step, save_decay

    step = choose_step(run, "snapshot" if widths else "checkpoint", step)
    folder = out or RunFolder(run).averages / step_name(step)
    names = [average_name(width=width) for width in widths] or [average_name(decay=decay) for decay in decays]
    places = [out] if out and len(names) == 1 else [folder / name for name in names]
    if widths:
        snapshots = Snapshots(run, step)
        for width in widths:
            snapshots.check_width(width)
        for width, place in zip(widths, places, strict=True):
            residual = snapshots.save(width, place)
            console.print(f"width {width} after step {step:,}, residual {residual:.2%}: {place}")
    else:
        for decay, place in zip(decays, places, strict=True):
            save_decay(run, decay, step, place)
            console.print(f"decay {decay} after step {step:,}: {place}")
    return [str(place) for place in places]
