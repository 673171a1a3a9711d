"""`dia-diffusion analyze`: what the attention unit of trained runs does, as figures and the numbers they show."""

from collections.abc import Callable, Sequence

from dia_diffusion.cli.analyses.gradients import gradient_noise, gradients
from dia_diffusion.cli.analyses.losses import ablations, linearity
from dia_diffusion.cli.analyses.maps import maps
from dia_diffusion.cli.analyses.relations import correlation, importance
from dia_diffusion.cli.analyses.trials import placement, stability
from dia_diffusion.cli.arguments import run_part

ANALYSES: dict[str, Callable[[Sequence[str]], None]] = {
    "maps": maps,
    "correlation": correlation,
    "importance": importance,
    "gradients": gradients,
    "ablations": ablations,
    "linearity": linearity,
    "gradient-noise": gradient_noise,
    "stability": stability,
    "placement": placement,
}


def run(arguments: Sequence[str]) -> None:
    """Does the analysis that the first argument names with the others."""
    run_part("analyze", "Measures what the attention unit of trained runs does.", "analysis", ANALYSES, arguments)
