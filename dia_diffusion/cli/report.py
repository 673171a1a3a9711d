"""`dia-diffusion report`: one self-contained HTML file about a run or a study."""

from pathlib import Path
from typing import Annotated

from dia_diffusion.cli.console import console
from dia_diffusion.cli.options import Positional
from dia_diffusion.errors import InputError
from dia_diffusion.validation import Strict


class Options(Strict):
    """Writes an HTML page about a run or a study, which opens without a network."""

    subject: Annotated[str, Positional("RUN_OR_STUDY")]
    """A run's folder; a study's folder, YAML file or name."""
    out: Path | None = None
    """The page; if not given, report.html in the run's or the study's folder."""


def run(options: Options) -> None:
    """Writes the page."""
    from dia_diffusion.io import write_text
    from dia_diffusion.report.page import render
    from dia_diffusion.report.subjects import page_of

    if options.out is not None and (options.out.suffix != ".html" or options.out.is_dir()):
        raise InputError(f"`--out` must be a file ending in .html, got {options.out}")
    page, folder = page_of(options.subject)
    out = options.out or folder / "report.html"
    write_text(out, render(page))
    console.print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB, opens in a browser without a network")
