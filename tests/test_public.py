"""The names of the package, and what importing it does for diffusers, in this process and where it is a command."""

import subprocess
import sys

import pytest

import dia_diffusion

# As in any program, and as in `dia-diffusion NAME`, where torch is imported only for a name that needs it.
PROGRAMS = ["", "import sys; sys.argv = ['dia-diffusion']\n"]


def test_every_public_name_is_there() -> None:
    assert set(dia_diffusion.__all__) <= set(dir(dia_diffusion))
    for name in dia_diffusion.__all__:
        assert getattr(dia_diffusion, name).__name__ == name


@pytest.mark.parametrize("program", PROGRAMS)
def test_names_resolve_and_others_do_not(program: str) -> None:
    checks = (
        "import dia_diffusion\n"
        "assert set(dia_diffusion.__all__) <= set(dir(dia_diffusion))\n"
        "from dia_diffusion import *\n"
        "assert UViT is dia_diffusion.UViT and UViT.__name__ == 'UViT'\n"
        "assert not hasattr(dia_diffusion, 'nothing')\n"
        "import diffusers\n"
        "assert diffusers.UViTPipeline is UViTPipeline\n"
    )
    subprocess.run([sys.executable, "-c", program + checks], check=True)


def test_importing_the_package_is_all_that_diffusers_needs() -> None:
    checks = (
        "import sys, dia_diffusion, diffusers\n"
        "assert diffusers.UViTPipeline.__name__ == 'UViTPipeline'\n"
        "assert {'dia_diffusion.models.uvit', 'dia_diffusion.models.attached'} <= sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", checks], check=True)
