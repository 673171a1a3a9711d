"""`dia-diffusion export`: a pipeline folder for others, on demand with the code that loads it without this package."""

from collections.abc import Sequence
from pathlib import Path

from dia_diffusion.cli.arguments import CommandParser
from dia_diffusion.cli.console import console
from dia_diffusion.cli.imports import imports
from dia_diffusion.pipelines.folder import find_pipeline


def run(arguments: Sequence[str]) -> None:
    """Exports what the arguments say."""
    parser = CommandParser("export", "Copies a pipeline with its card and evaluations, without paths of this machine.")
    parser.add_argument("source", metavar="PIPELINE_OR_RUN", help="a pipeline folder, or a run folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to make, where there is nothing yet")
    parser.add_argument("--step", type=int, help="which of a run's pipelines; the newest if none")
    parser.add_argument(
        "--with-code", action="store_true", help="add generated code, so that diffusers alone loads the folder"
    )
    options = parser.parse_args(arguments)
    source = find_pipeline(options.source, options.step)
    with imports():
        from dia_diffusion.sharing.export import export_pipeline, shared_files
    left_out = export_pipeline(source, options.out, options.with_code)
    tell_left_out(left_out)
    files, _ = shared_files(options.out)
    console.print(f"{options.out}: {len(files)} files of {source}")
    if options.with_code:
        call = f'DiffusionPipeline.from_pretrained("{options.out}", trust_remote_code=True)'
        console.print(f"it carries code, and loads by diffusers alone: {call}")


def tell_left_out(left_out: dict[Path, str]) -> None:
    """Says what of a folder stays where it is, and why."""
    if left_out:
        console.print("left out: " + ", ".join(f"{path} ({reason})" for path, reason in left_out.items()))
