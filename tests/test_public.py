"""The names of the package, and what importing it does for diffusers."""

import subprocess
import sys

import dia_diffusion


def test_every_public_name_is_there() -> None:
    for name in dia_diffusion.__all__:
        assert getattr(dia_diffusion, name).__name__ == name


def test_importing_the_package_is_all_that_diffusers_needs() -> None:
    """In a process of its own, where nothing else is imported."""
    program = (
        "import sys, dia_diffusion, diffusers\n"
        "assert diffusers.UViTPipeline is dia_diffusion.UViTPipeline\n"
        "assert {'dia_diffusion.models.uvit', 'dia_diffusion.models.attached'} <= sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
