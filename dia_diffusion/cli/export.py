"""`dia-diffusion export`: a pipeline folder to share; with --with-code, it loads without this package."""

from pathlib import Path
from typing import Annotated

from dia_diffusion.cli.console import console
from dia_diffusion.cli.options import Positional
from dia_diffusion.validation import Strict


class Options(Strict):
    """Copies a pipeline with its card and evaluations, without paths of this machine."""

    source: Annotated[str, Positional("PIPELINE_OR_RUN")]
    """A pipeline folder, or a run folder."""
    out: Annotated[Path, Positional("OUT")]
    """The folder to make; it must not exist."""
    step: int | None = None
    """Step of a run's pipeline; the newest if not given."""
    with_code: bool = False
    """Add generated code, so that diffusers alone loads the folder."""


def run(options: Options) -> None:
    """Exports the pipeline."""
    from dia_diffusion.pipelines.folder import find_pipeline
    from dia_diffusion.sharing.export import export_pipeline, shared_files

    source = find_pipeline(options.source, options.step)
    print_left_out(export_pipeline(source, options.out, options.with_code))
    files, _ = shared_files(options.out)
    console.print(f"{options.out}: {len(files)} files of {source}")
    if options.with_code:
        call = f'DiffusionPipeline.from_pretrained("{options.out}", trust_remote_code=True)'
        console.print(f"it carries code, and loads by diffusers alone: {call}")


def print_left_out(left_out: dict[Path, str]) -> None:
    """Prints which files of a folder are left out, and why."""
    if left_out:
        console.print("left out: " + ", ".join(f"{path} ({reason})" for path, reason in left_out.items()))
