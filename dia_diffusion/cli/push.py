"""`dia-diffusion push`: a pipeline folder to the Hugging Face Hub, after showing what will be sent."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dia_diffusion.cli.arguments import CommandParser
from dia_diffusion.cli.console import console
from dia_diffusion.cli.export import tell_left_out
from dia_diffusion.cli.imports import imports
from dia_diffusion.errors import InputError
from dia_diffusion.pipelines.folder import find_pipeline

if TYPE_CHECKING:
    from dia_diffusion.sharing.push import Shipment


def run(arguments: Sequence[str]) -> None:
    """Sends what the arguments say."""
    parser = CommandParser("push", "Sends a pipeline folder to the Hugging Face Hub; shows what, and asks first.")
    parser.add_argument("source", metavar="FOLDER", help="a pipeline folder, or a run folder")
    parser.add_argument("repo_id", metavar="OWNER/NAME", help="the repository; made where there is none")
    parser.add_argument("--step", type=int, help="which of a run's pipelines; the newest if none")
    parser.add_argument("--private", action="store_true", help="a repository that only its owners see")
    parser.add_argument("--revision", metavar="BRANCH", help="made where there is none; the main one if not given")
    parser.add_argument("--yes", action="store_true", help="don't ask")
    options = parser.parse_args(arguments)
    folder = find_pipeline(options.source, options.step)
    with imports():
        from huggingface_hub.utils import disable_progress_bars

        from dia_diffusion.sharing.push import find_token, prepare, send
    shipment = prepare(folder, options.repo_id)
    token = find_token()
    if not options.yes and not sys.stdin.isatty():
        raise InputError("there is no terminal to ask at; --yes sends without asking")
    _show(shipment, options.private, options.revision)
    if not options.yes and not _confirmed():
        console.print("nothing was sent")
        return
    if not console.is_terminal:
        disable_progress_bars()
    console.print(f"sent: {send(shipment, token, options.private, options.revision)}")


def _show(shipment: "Shipment", private: bool, revision: str | None) -> None:
    notes = ("" if revision is None else f", branch {revision}") + (" (private)" if private else "")
    console.print(f"{shipment.folder} to {shipment.endpoint}/{shipment.repo_id}{notes}")
    total = sum(shipment.sizes.values())
    width = len(f"{total:,}")
    for path, size in shipment.sizes.items():
        console.print(f"{size:>{width},}  {path}")
    console.print(f"{total:>{width},}  bytes in {len(shipment.sizes)} files")
    tell_left_out(shipment.left_out)
    if not shipment.carries_code:
        console.print(
            "it carries no code: from the Hub it loads once downloaded, and with this package installed; "
            "`dia-diffusion export --with-code` makes a folder that diffusers loads by the repository's name"
        )


def _confirmed() -> bool:
    try:
        return input("send? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False
