"""Commands given hostile files print one line without a traceback, exit with code 2 and run nothing."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dia_diffusion.cli.main import COMMANDS
from tests.cli.one_line import error_of
from tests.security import hostile, readers
from tests.security.hostile import change_json, laughs, pickled_weights, put_json
from tests.security.watch import Sandbox


def gigantic(folder: Path) -> Path:
    place = readers.pipeline(folder)
    change_json(place / "unet" / "config.json", hidden_size=1 << 20, num_attention_heads=1)
    return place


def not_finite(folder: Path) -> Path:
    place = readers.pipeline(folder)
    file = place / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}, file, {"format": "pt"})
    return place


def pickled_pipeline(folder: Path) -> Path:
    place = readers.pipeline(folder)
    for file in (place / "unet").glob("*.safetensors"):
        file.write_bytes(pickled_weights(folder.parent / "outside" / "marker"))
    return place


def classes_of_os(folder: Path) -> Path:
    place = readers.pipeline(folder)
    change_json(place / "model_index.json", unet=["os", "system"])
    return place


def bomb(folder: Path) -> Path:
    return hostile.write_bomb(folder / "x.zip", "a.png", 1 << 26)


def objects(folder: Path) -> Path:
    np.savez(folder / "x.npz", mu=hostile.object_array(folder.parent / "outside" / "marker"), sigma=np.eye(2))
    return folder / "x.npz"


def text(name: str, content: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text(content)
        return folder / name

    return make


def hostile_run(file: str, kind: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        run = readers.run(folder)
        (run / file).parent.mkdir(parents=True, exist_ok=True)
        put_json(run / file, kind)
        return run

    return make


def classified(folder: Path) -> Path:
    reader = readers.result(folder)
    put_json(reader.file, "deep and whole")
    return reader.file.parent


def pickled_file(folder: Path) -> Path:
    (folder / "x.pth").write_bytes(pickled_weights(folder.parent / "outside" / "marker"))
    return folder / "x.pth"


def escapes(folder: Path) -> Path:
    return folder / "\x1b[2Jx\x07"


DIGITS = ["--reference", "digits", "--features", "digits"]
TAG = "data: !!python/object/apply:os.system ['touch marker']"
# name -> (function that makes the hostile file, command with {} for its path)
CASES: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "train by a tag": (text("x.yaml", TAG), ["train", "--config", "{}"]),
    "train by laughs": (text("x.yaml", laughs()), ["train", "--config", "{}"]),
    "train on a bomb": (bomb, ["train", "--config", "digits_uvit_cpu", "--output", "out", "--data.source", "{}"]),
    "train from numbers that are none": (
        not_finite,
        ["train", "--config", "digits_uvit_cpu", "--output", "out", "--init-from", "{}"],
    ),
    "train a gigantic network": (
        escapes,
        ["train", "--config", "digits_uvit_cpu", "--output", "out", "--model.hidden_size", "1000000000"],
    ),
    "train gigantic layers": (
        escapes,
        ["train", "--config", "digits_uvit_cpu", "--output", "out", "--model.num_layers", "1000000001"],
    ),
    "train on gigantic images": (
        escapes,
        ["train", "--config", "digits_uvit_cpu", "--output", "out", "--model.sample_size", "1000000000"],
    ),
    "classify by a tag": (text("x.yaml", TAG), ["classify", "--config", "{}"]),
    "sample gigantic": (gigantic, ["sample", "{}", "--grid", "g.png"]),
    "sample numbers that are none": (not_finite, ["sample", "{}", "--grid", "g.png"]),
    "sample a pickle": (pickled_pipeline, ["sample", "{}", "--grid", "g.png"]),
    "sample os.system": (classes_of_os, ["sample", "{}", "--grid", "g.png"]),
    "sample escapes": (escapes, ["sample", "{}", "--grid", "g.png"]),
    "fid of a bomb": (bomb, ["fid", "{}", *DIGITS]),
    "fid of a pickle": (pickled_pipeline, ["fid", "{}", *DIGITS]),
    "fid to objects": (objects, ["fid", "digits", "--features", "digits", "--reference", "{}"]),
    "fid by a tag": (text("x.yaml", TAG), ["fid", "digits", "--protocol", "{}", "--reference", "digits"]),
    "fid by a pickle": (
        pickled_file,
        ["fid", "digits", "--reference", "digits", "--features", "inception", "--inception-weights", "{}"],
    ),
    "stats of objects": (objects, ["stats", "show", "{}"]),
    "stats of escapes": (escapes, ["stats", "show", "{}"]),
    "stats of a bomb": (bomb, ["stats", "make", "{}", "x.safetensors"]),
    "curves by a tag": (text("x.yaml", TAG), ["curves", "{}"]),
    "curves of deep records": (hostile_run("evaluations.jsonl", "deep and whole"), ["curves", "{}"]),
    "report of deep records": (hostile_run("evaluations.jsonl", "deep and whole"), ["report", "{}"]),
    "report of laughs": (hostile_run("config.yaml", "YAML tag"), ["report", "{}"]),
    "analyze a tag": (hostile_run("config.yaml", "YAML tag"), ["analyze", "maps", "{}"]),
    "accuracies of deep results": (classified, ["accuracies", "{}"]),
    "gradcam of escapes": (escapes, ["gradcam", "{}", "--images", "digits"]),
    "convert a pickle": (pickled_file, ["convert", "{}", "out"]),
    "ema of a deep state": (
        hostile_run("snapshots/step-00000001/state.json", "deep and whole"),
        ["ema", "{}", "--width", "0.1"],
    ),
    "export gigantic": (gigantic, ["export", "{}", "out"]),
    "export os.system": (classes_of_os, ["export", "{}", "out"]),
    "push a pickle": (pickled_pipeline, ["push", "{}", "me/model", "--yes"]),
}


@pytest.mark.parametrize("name", CASES)
def test_commands_end_in_one_line(
    name: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, arguments = CASES[name]
    place = str(make(sandbox.folder))
    (sandbox.folder / "here").mkdir()
    monkeypatch.chdir(sandbox.folder / "here")
    error = sandbox.watch(lambda: error_of([argument.format(place) for argument in arguments], capsys))
    assert error.rstrip("\n").isprintable() and "no recipe" not in error and "Path" not in error
    assert not [path for path in sandbox.folder.glob("here/**/*") if path.is_file()]


def test_every_command_that_reads_files_is_tried() -> None:
    assert {arguments[0] for _, arguments in CASES.values()} | {"quickstart", "params", "env"} == {*COMMANDS}


@pytest.mark.long
def test_a_process_with_little_memory_refuses_in_one_line_too(tmp_path: Path) -> None:
    """Gigabytes are refused before they are allocated, so the 6 GB of address space that torch needs are enough."""
    (tmp_path / "given").mkdir()
    place = gigantic(tmp_path / "given")
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30)); "
        "from dia_diffusion.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", limited, "sample", str(place), "--grid", str(tmp_path / "g.png")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr
    assert "Traceback" not in ended.stderr and ended.stdout == ""
