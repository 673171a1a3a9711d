"""What a command imports: nothing slow for its help, and for sampling nothing that sampling has no use for.

What is imported shows only in a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dia_diffusion.cli.main import COMMANDS

DRAWING = {"matplotlib", "plotly", "sklearn", "pandas", "jinja2", "torch_fidelity"}
SLOW = DRAWING | {"torch", "torchvision", "diffusers", "accelerate", "scipy", "transformers", "datasets"}
# Says on its last line which modules a command has imported, begun as the installed script begins it.
IMPORTED = """
import json, sys

sys.argv = ["dia-diffusion", *sys.argv[1:]]
from dia_diffusion.cli.main import main

try:
    code = main()
except SystemExit as ended:
    code = ended.code
print()
print(json.dumps([code, sorted(sys.modules)]))
"""


def imported_by(*arguments: object) -> tuple[int, set[str]]:
    """Exit code of a command, and the modules and packages that it has imported."""
    command = [sys.executable, "-c", IMPORTED, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    code, modules = json.loads(done.stdout.splitlines()[-1])
    return code, set(modules)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_imports_nothing_slow(name: str) -> None:
    code, modules = imported_by(name, "--help")
    assert code == 0 and not modules & SLOW


def test_the_module_is_started_as_the_script_is() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "dia_diffusion", "sample", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "dia_diffusion.sampling.samplers" in imported and not imported & SLOW


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "nowhere", "--grid", "x.png"],
        ["sample", "nowhere", "--grid", "x.png", "--sampler", "none"],
        ["sample", "nowhere", "--gird", "x.png"],
        ["fid", "digits"],
        ["train", "--config", "none"],
        ["none"],
    ],
)
def test_wrong_arguments_are_refused_without_anything_slow(arguments: list[str]) -> None:
    code, modules = imported_by(*arguments)
    assert code == 2 and not modules & SLOW


def test_sampling_imports_nothing_to_draw_figures_or_measure_with(run: Path, tmp_path: Path) -> None:
    code, modules = imported_by("sample", run, "--seeds", "0-1", "--steps", "1", "--grid", tmp_path / "grid.png")
    assert code == 0 and "dia_diffusion.sampling.generate" in modules
    assert not modules & DRAWING
    assert not {"dia_diffusion.training", "dia_diffusion.evaluation", "dia_diffusion.data"} & modules
