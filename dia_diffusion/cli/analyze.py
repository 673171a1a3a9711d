"""`dia-diffusion analyze`: what the attention unit of trained runs does, as figures and the numbers they show."""

import importlib
from collections.abc import Sequence
from functools import partial

from dia_diffusion.cli.arguments import run_part
from dia_diffusion.cli.imports import imports

# name -> its module in dia_diffusion.cli.analyses, which has a function of that name; all of them need torch
ANALYSES = {
    "maps": "maps",
    "correlation": "relations",
    "importance": "relations",
    "gradients": "gradients",
    "ablations": "losses",
    "linearity": "losses",
    "gradient-noise": "gradients",
    "stability": "trials",
    "placement": "trials",
}


def run(arguments: Sequence[str]) -> None:
    """Does the analysis that the first argument names with the others."""
    parts = {name: partial(_analyze, name) for name in ANALYSES}
    run_part("analyze", "Measures what the attention unit of trained runs does.", "analysis", parts, arguments)


def _analyze(name: str, arguments: Sequence[str]) -> None:
    with imports():
        module = importlib.import_module(f"dia_diffusion.cli.analyses.{ANALYSES[name]}")
    getattr(module, name.replace("-", "_"))(arguments)
