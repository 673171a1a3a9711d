"""`dia-diffusion convert`: turns official U-ViT weights into a pipeline folder."""

from pathlib import Path
from typing import Annotated

from dia_diffusion.cli.console import console
from dia_diffusion.cli.options import Positional
from dia_diffusion.validation import Strict


class Options(Strict):
    """Turns official U-ViT weights into a pipeline folder, without running code in them."""

    source: Annotated[Path, Positional("IN.pth")]
    """Weights as U-ViT's own training saves them."""
    out: Annotated[Path, Positional("OUT")]
    """The pipeline folder to make."""
    heads: int | None = None
    """Attention heads, if the width isn't a published one."""


def run(options: Options) -> None:
    """Converts the weights."""
    from dia_diffusion.sharing.convert import convert_to_pipeline

    convert_to_pipeline(options.source, options.out, options.heads)
    console.print(f"{options.out}: try `dia-diffusion sample {options.out} --grid grid.png`")
