"""`dia-diffusion report`: one HTML file about a run or a study, whole in itself."""

from collections.abc import Sequence
from pathlib import Path

from dia_diffusion.cli.arguments import CommandParser
from dia_diffusion.cli.console import console
from dia_diffusion.cli.imports import imports
from dia_diffusion.errors import InputError


def run(arguments: Sequence[str]) -> None:
    """Writes the page that the arguments ask for."""
    parser = CommandParser("report", "Writes an HTML page about a run or a study, which opens without a network.")
    parser.add_argument("subject", metavar="RUN_OR_STUDY", help="a run's folder; a study's folder, YAML file or name")
    parser.add_argument("--out", type=Path, help="the page; report.html in the run's or the study's folder if none")
    options = parser.parse_args(arguments)
    if options.out is not None and (options.out.suffix != ".html" or options.out.is_dir()):
        raise InputError(f"--out {options.out} is no name of a page; accepted: a file ending in .html")
    with imports():
        from dia_diffusion.report.page import write_page
        from dia_diffusion.report.subject import page_of
    page, folder = page_of(options.subject)
    out = options.out or folder / "report.html"
    write_page(page, out)
    console.print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB, opens in a browser without a network")
