"""`dia-diffusion convert`: official U-ViT weights into a pipeline folder."""

from collections.abc import Sequence
from pathlib import Path

from dia_diffusion.cli.arguments import CommandParser
from dia_diffusion.cli.console import console


def run(arguments: Sequence[str]) -> None:
    """Converts what the arguments say."""
    parser = CommandParser("convert", "Turns official U-ViT weights into a pipeline folder; runs nothing in them.")
    parser.add_argument("source", metavar="IN.pth", type=Path, help="weights as U-ViT's own training saves them")
    parser.add_argument("out", metavar="OUT", type=Path, help="the pipeline folder to make")
    parser.add_argument("--heads", type=int, help="attention heads, where the width is none of the published ones")
    options = parser.parse_args(arguments)

    from dia_diffusion.sharing.convert import convert_to_pipeline

    convert_to_pipeline(options.source, options.out, options.heads)
    console.print(f"{options.out}: try `dia-diffusion sample {options.out} --grid grid.png`")
