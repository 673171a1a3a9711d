"""`dia-diffusion analyze` on runs of all kinds: figures, records, printed lines and refusals."""

import json
from pathlib import Path

import pytest
from PIL import Image

from dia_diffusion.analysis import importance
from dia_diffusion.cli.main import main
from tests.analysis.conftest import MakeRun

pytestmark = pytest.mark.usefixtures("coarse_figures")
IMAGES = {"--images": "3", "--times": "2"}
COMMANDS = [
    ("maps", "dia-lstm block-channels", IMAGES, [0, 3, 6], "variance: blocks"),
    ("correlation", "dia-lstm block-scale", IMAGES | {"--steps": "0,6"}, [0, 6], "mean correlation undefined"),
    ("importance", "dia-lstm", IMAGES | {"--samples": "100"}, [6], "the maps: mid"),
    ("ablations", "dia-lstm block-channels", IMAGES, [3, 6], "h by block, time"),
    ("linearity", "dia-lstm none", IMAGES | {"--steps": "6"}, [6], "by block: lines explain"),
    ("gradients", "dia-lstm none", {"--batches": "2", "--steps": "0,6"}, [0, 6], "|gradient|, mean"),
    ("gradient-noise", "dia-lstm none", {"--batches": "2"}, [3, 6], "noise scale in images: all"),
    ("gradient-noise", "dia-lstm", {"--batches": "2", "--weights": "raw", "--steps": "6"}, [6], "noise scale in"),
]


@pytest.mark.parametrize(("name", "units", "options", "steps", "printed"), COMMANDS)
def test_figure_record_and_lines(
    name: str,
    units: str,
    options: dict[str, str],
    steps: list[int],
    printed: str,
    tiny_run: MakeRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = [str(tiny_run(unit)) for unit in units.split()]
    words = [word for pair in options.items() for word in pair]
    assert main(["analyze", name, *runs, "--out", str(tmp_path), "--seed", "1", *words]) == 0
    record = json.loads((tmp_path / f"{name}.json").read_text())
    own = {key.removeprefix("--"): int(value) for key, value in options.items() if key not in ("--steps", "--weights")}
    protocol = {**own, "weights": options.get("--weights", "ema"), "seed": 1, "randomness": 2}
    assert record["analysis"] == name and record["protocol"] == protocol
    assert [run["unit"] for run in record["runs"]] == units.split()
    assert [step["step"] for step in record["runs"][0]["steps"]] == steps
    assert Image.open(tmp_path / f"{name}.png").size[0] > 100
    assert printed in capsys.readouterr().out


def test_runs_of_networks_with_stages(
    tiny_run: MakeRun, tiny_unet: MakeRun, tiny_classifier: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importance, "TREES", 5)
    classifier, few = str(tiny_classifier("se")), ["--out", str(tmp_path), "--images", "8", "--times", "2"]
    assert main(["analyze", "importance", classifier, *few, "--steps", "4", "--samples", "100"]) == 0
    stages = json.loads((tmp_path / "importance.json").read_text())["runs"][0]["steps"][0]["stages"]
    assert [stage["name"] for stage in stages] == ["stage 1", "stage 2", "stage 3"]
    # Runs of all kinds in one figure.
    few = ["--out", str(tmp_path), "--images", "2", "--times", "2"]
    unet, uvit = str(tiny_unet("dia-lstm")), str(tiny_run("dia-lstm"))
    figures = {"maps": [classifier, unet, uvit], "correlation": [unet, uvit], "ablations": [classifier, uvit]}
    for name, runs in figures.items():
        assert main(["analyze", name, *runs, *few]) == 0
        assert Image.open(tmp_path / f"{name}.png").size[0] > 100
    assert main(["analyze", "linearity", classifier, *few]) == 2


def test_a_run_that_does_not_fit_is_refused_before_the_first_is_measured(
    tiny_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(tiny_run("dia-lstm")), str(tiny_run("none"))]
    for name in ("maps", "correlation", "ablations"):
        assert main(["analyze", name, *runs, "--out", str(tmp_path), "--images", "3"]) == 2
        output = capsys.readouterr()
        assert "was trained without attention unit" in output.err and "measuring" not in output.out
    assert main(["analyze", "importance", runs[0], "--out", str(tmp_path), "--samples", "5"]) == 2
