"""`dia-diffusion push`: a pipeline folder to the Hugging Face Hub, after showing what will be sent."""

import sys
from typing import TYPE_CHECKING, Annotated

from dia_diffusion.cli.console import console
from dia_diffusion.cli.export import print_left_out
from dia_diffusion.cli.options import Metavar, Positional
from dia_diffusion.errors import InputError
from dia_diffusion.validation import Strict

if TYPE_CHECKING:
    from dia_diffusion.sharing.push import Shipment


class Options(Strict):
    """Sends a pipeline folder to the Hugging Face Hub; shows what will be sent, and asks first."""

    source: Annotated[str, Positional("FOLDER")]
    """A pipeline folder, or a run folder."""
    repo_id: Annotated[str, Positional("OWNER/NAME")]
    """The repository; created if it doesn't exist."""
    step: int | None = None
    """Step of a run's pipeline; the newest if not given."""
    private: bool = False
    """Create a private repository."""
    revision: Annotated[str | None, Metavar("BRANCH")] = None
    """The branch, created if it doesn't exist; the main one if not given."""
    yes: bool = False
    """Don't ask."""


def run(options: Options) -> None:
    """Sends the folder."""
    from huggingface_hub.utils import disable_progress_bars

    from dia_diffusion.pipelines.folder import find_pipeline
    from dia_diffusion.sharing.push import find_token, prepare, send

    folder = find_pipeline(options.source, options.step)
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
    print_left_out(shipment.left_out)
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
