"""What a page is made of, and how it becomes one HTML file that loads nothing from elsewhere."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

from dia_diffusion.environment import __version__
from dia_diffusion.io import write_text


@dataclass
class Text:
    """A paragraph, such as what is missing and which command makes it."""

    text: str
    kind: str = "text"


@dataclass
class Code:
    """A file shown as it is."""

    text: str
    kind: str = "code"


@dataclass
class Plot:
    """A plotly figure."""

    figure: Figure
    description: str
    """What it shows, for those who can't see it."""
    title: str = ""

    @property
    def data(self) -> dict[str, Any]:
        """Traces and layout as plain values."""
        return self.figure.to_plotly_json()

    @property
    def height(self) -> int:
        """In pixels, kept free until it is drawn."""
        return self.figure.layout.height


@dataclass
class Plots:
    """Plots side by side where there is room."""

    plots: list[Plot]
    caption: str = ""
    kind: str = "plots"


@dataclass
class Table:
    """Cells are text; those of the columns named in `numbers` are set flush right."""

    columns: list[str]
    rows: list[list[str]]
    caption: str
    numbers: set[str] = field(default_factory=set)
    folded: bool = False
    """Whether a long one begins folded, its caption to be clicked at."""
    kind: str = "table"


@dataclass
class Picture:
    """A picture that is part of the page."""

    uri: str
    """data:image/png;base64,..."""
    size: tuple[int, int]
    """Width and height in pixels."""
    alternative: str
    """What it shows, in words."""
    caption: str = ""


@dataclass
class Frames:
    """Pictures over time, one moment shown at a time: moment -> the pictures side by side."""

    title: str
    moments: dict[str, list[Picture]]
    caption: str = ""
    kind: str = "frames"


Block = Text | Code | Plots | Table | Frames


@dataclass
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: list[Block]

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-")


@dataclass
class Page:
    """A whole page."""

    title: str
    subtitle: str
    facts: dict[str, str]
    """What a reader wants first, as name -> value."""
    sections: list[Section]


def render(page: Page) -> str:
    """The page as HTML. Whatever is in it is shown as text, never run: names and paths come from outside."""
    templates = Environment(
        loader=PackageLoader("dia_diffusion", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template("page.html.jinja").render(page=page, plotly=get_plotlyjs(), version=__version__)


def write_page(page: Page, path: Path) -> None:
    """Renders into a file, which takes the place of an older one once it is whole."""
    write_text(path, render(page))
