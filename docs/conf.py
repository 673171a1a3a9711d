"""Settings of Sphinx: `sphinx-build -W docs OUT` builds the site, with warnings as errors and without a network.

Two directives write the reference from the code: `command` gives the help of a command, `recipe-keys` a table of the
keys of a recipe.
"""

import contextlib
import importlib
import io
import os
from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.application import Sphinx

from dia_diffusion import __version__
from dia_diffusion.cli.main import COMMANDS, main, usage
from dia_diffusion.validation import fields_of

project = "dia-diffusion"
author = "The dia-diffusion authors"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_heading_anchors = 4
exclude_patterns = ["_*"]

html_theme = "furo"
html_title = "dia-diffusion"
html_show_copyright = False

default_role = "code"  # docstrings write `name`
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True


class Command(Directive):
    """```{command} fid``` shows the help of `dia-diffusion fid`; without a name, the list of commands."""

    optional_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        if not self.arguments:
            return [_literal(usage())]
        os.environ["COLUMNS"] = "110"  # argparse wraps at it
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            if main([*self.arguments[0].split(), "--help"]) != 0:
                raise self.error(f"dia-diffusion {self.arguments[0]} --help failed")
        return [_literal(printed.getvalue())]


class RecipeKeys(Directive):
    """```{recipe-keys} MODULE:MODEL``` makes a table of the model's keys, their defaults and docstrings."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        module, name = self.arguments[0].split(":")
        rows = ["| key | default | meaning |", "| --- | --- | --- |"]
        for path, field in fields_of(getattr(importlib.import_module(module), name)):
            default = "required" if field.is_required() else f"`{_yaml(field.get_default(call_default_factory=True))}`"
            meaning = " ".join((field.description or "").split()).replace("|", "\\|")
            rows.append(f"| `{'.'.join(path)}` | {default} | {meaning} |")
        section = nodes.section()
        self.state.nested_parse(StringList(rows), 0, section)
        return section.children


def _literal(text: str) -> nodes.Node:
    return nodes.literal_block(text, text.rstrip(), language="text")


def _yaml(value: Any) -> str:
    """A default as a recipe writes it, on one line."""
    if isinstance(value, tuple):
        value = list(value)
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


def setup(app: Sphinx) -> None:
    undocumented = [name for name in COMMANDS if name not in _headings("reference/commands.md")]
    if undocumented:
        raise ValueError(f"docs/reference/commands.md must have a heading for {', '.join(undocumented)}")
    app.add_directive("command", Command)
    app.add_directive("recipe-keys", RecipeKeys)


def _headings(page: str) -> list[str]:
    lines = (Path(__file__).parent / page).read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("## ") for line in lines if line.startswith("## ")]
