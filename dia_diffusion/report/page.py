"""A page of sections and blocks, rendered into one self-contained HTML file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from dia_diffusion.environment import __version__

# Everything is escaped, since names and paths are untrusted.
_templates = Environment(
    loader=PackageLoader("dia_diffusion", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)
blocks: Any = _templates.get_template("blocks.html").module
"""The macros of blocks.html; each returns a block of a section."""


@dataclass
class Page:
    """A page."""

    title: str
    subtitle: str
    facts: Mapping[str, str]
    """Key facts for the top of the page, as name -> value; those without a value are left out."""
    sections: Mapping[str, Sequence[Markup]]
    """Heading -> the blocks below it."""


def render(page: Page) -> str:
    """The page as HTML."""
    return _templates.get_template("page.html").render(page=page, plotly=get_plotlyjs(), version=__version__)
