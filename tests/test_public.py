"""The names of the package, and what importing it does for diffusers, in this process and where it is a command."""

import subprocess
import sys

import pytest

import dia_diffusion

# What a program does before it uses a name: in any program the package's import is all that diffusers needs; in
# `dia-diffusion NAME` torch is imported only for a name that needs it.
PROGRAMS = {
    "any": (
        "import sys, dia_diffusion, diffusers\n"
        "assert diffusers.UViTPipeline.__name__ == 'UViTPipeline'\n"
        "assert {'dia_diffusion.models.uvit', 'dia_diffusion.models.attached'} <= sys.modules.keys()\n"
    ),
    "command": "import sys; sys.argv = ['dia-diffusion']\n",
}


def test_every_public_name_is_there() -> None:
    assert set(dia_diffusion.__all__) <= set(dir(dia_diffusion))
    for name in dia_diffusion.__all__:
        assert getattr(dia_diffusion, name).__name__ == name


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
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
