"""What a page is made of, and how it becomes one HTML file that loads nothing from elsewhere."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from dia_diffusion.data.decode import read_file
from dia_diffusion.environment import __version__
from dia_diffusion.figures import Panel
from dia_diffusion.io import write_text
from dia_diffusion.report.plots import to_plotly
from dia_diffusion.tables import Table


@dataclass
class Code:
    """A file shown as it is."""

    text: str


@dataclass
class Plot:
    """Panels below each other over one x axis, drawn by plotly."""

    panels: Sequence[Panel]
    description: str
    """What it shows, for those who can't see it."""
    title: str = ""
    height: int = 400
    """In pixels."""
    legend: bool = True

    @property
    def data(self) -> dict[str, Any]:
        """For plotly."""
        return to_plotly(self.panels, self.height, self.legend)


@dataclass
class Plots:
    """Plots side by side if there is room."""

    plots: Sequence[Plot]
    caption: str = ""


@dataclass
class Picture:
    """A PNG that is part of the page."""

    content: bytes
    size: tuple[int, int]
    """Width and height in pixels."""
    description: str
    title: str = ""

    @property
    def uri(self) -> str:
        """For the page, which loads nothing."""
        return f"data:image/png;base64,{base64.b64encode(self.content).decode()}"


@dataclass
class Frames:
    """Pictures over time, one moment shown at a time: moment -> the pictures side by side."""

    title: str
    moments: dict[str, list[Picture]]
    caption: str = ""


Block = str | Code | Plots | Table | Frames
"""A str is a paragraph; what is between backticks in it is code."""


@dataclass
class Page:
    """A whole page."""

    title: str
    subtitle: str
    facts: dict[str, str]
    """What a reader wants first, as name -> value."""
    sections: dict[str, list[Block]]
    """Heading -> what is below it."""


def read_picture(file: Path, description: str, title: str = "") -> Picture | None:
    """A PNG; None if the file is no whole one."""
    try:
        content = read_file(file)
        with PIL.Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            size = picture.size
            picture.verify()
    except Exception:  # a corrupt file can raise almost anything inside a decoder
        return None
    return Picture(content, size, description, title)


def render(page: Page) -> str:
    """The page as HTML. Everything in it is shown as text, never run: names and paths come from outside."""
    templates = Environment(
        loader=PackageLoader("dia_diffusion", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = templates.get_template("page.html")
    kind = {"kind": lambda block: type(block).__name__}
    return template.render(page=page, plotly=get_plotlyjs(), version=__version__, **kind)


def write_page(page: Page, path: Path) -> None:
    """Renders into a file, which replaces an older one once it is whole."""
    write_text(path, render(page))
