"""The imports of a command: nothing slow for its help, and nothing unneeded for sampling.

Imports can only be observed in a separate process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dia_diffusion.cli.analyze import PARTS as ANALYSES
from dia_diffusion.cli.main import COMMANDS
from dia_diffusion.cli.options import options_parser
from dia_diffusion.cli.sample import Options as SampleOptions
from dia_diffusion.cli.stats import PARTS as STATS
from dia_diffusion.sampling.samplers import DEFAULT_SAMPLER, SAMPLERS

DRAWING = {"matplotlib", "plotly", "sklearn", "pandas", "jinja2", "torch_fidelity"}
SLOW = DRAWING | {"torch", "torchvision", "diffusers", "accelerate", "scipy", "transformers", "datasets"}
MISTYPED = (
    ["sample", "runs/mine", "--gird", "x.png"],
    ["sample", "runs/mine", "--grid", "x.png", "--batch-size", "0"],
    ["fid", "digits", "--refrence", "digits"],
    ["analyze", "map", "runs/mine"],
    ["train", "--config", "digits_uvit_cpu", "--train.batchsize", "8"],
    ["none"],
)
# Runs each command that the argument lists, and prints the exit code and the imported modules after each.
PROGRAM = """
import json, sys
from dia_diffusion_command import main

for arguments in json.loads(sys.argv[1]):
    code = main(arguments)
    print("\\n" + json.dumps([code, sorted(sys.modules)]))
"""


def imported_by(*commands: list[str]) -> list[tuple[int, set[str]]]:
    """Runs the commands in one process; for each, the exit code and the modules imported by then."""
    call = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, capture_output=True, text=True, check=True, env=environment)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[") and line.endswith("]]")]
    return [(code, set(modules)) for code, modules in results]


def test_help_and_mistyped_options_import_nothing_slow() -> None:
    parts = [*(["stats", part] for part in STATS), *(["analyze", part] for part in ANALYSES)]
    helped = [["--version"], *([*command, "--help"] for command in [*([name] for name in COMMANDS), *parts])]
    results = imported_by(*helped, *MISTYPED)
    assert [code for code, _ in results] == [0] * len(helped) + [2] * len(MISTYPED)
    for command, (_, modules) in zip([*helped, *MISTYPED], results, strict=True):
        assert not modules & SLOW, command


@pytest.mark.long
def test_sampling_imports_the_package_but_nothing_to_draw_figures_or_measure_with(run: Path, tmp_path: Path) -> None:
    sample = ["sample", str(run), "--seeds", "0-1", "--steps", "1", "--grid", str(tmp_path / "grid.png")]
    ((code, modules),) = imported_by(sample)
    assert code == 0 and {"torch", "dia_diffusion.models.attached"} <= modules
    assert not modules & DRAWING
    assert not {"dia_diffusion.evaluation", "dia_diffusion.data"} & modules


def test_help_names_every_sampler() -> None:
    """The help can't read the sampler table, which takes seconds to import."""
    shown = " ".join(options_parser(SampleOptions, "sample").format_help().split())
    listed = shown.partition("--sampler SAMPLER ddpm")[2].partition("; own")[0]
    assert set(f"ddpm{listed}".replace(" or ", ", ").split(", ")) == set(SAMPLERS)
    assert SampleOptions.model_fields["sampler"].default == DEFAULT_SAMPLER
