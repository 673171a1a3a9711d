"""A page: sections of blocks, rendered into one HTML file that loads nothing from elsewhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from dia_diffusion.environment import __version__
from dia_diffusion.io import write_text

# Everything is shown as text, never run: names and paths come from outside.
_templates = Environment(
    loader=PackageLoader("dia_diffusion", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)
blocks: Any = _templates.get_template("blocks.html").module
"""The macros of blocks.html; each returns a block of a section."""


@dataclass
class Page:
    """A whole page."""

    title: str
    subtitle: str
    facts: Mapping[str, str]
    """What a reader wants first, as name -> value; those without a value are left out."""
    sections: Mapping[str, Sequence[Markup]]
    """Heading -> what is below it."""


def render(page: Page) -> str:
    """The page as HTML."""
    return _templates.get_template("page.html").render(page=page, plotly=get_plotlyjs(), version=__version__)


def write_page(page: Page, path: Path) -> None:
    """Renders into a file, which replaces an older one once it is whole."""
    write_text(path, render(page))
