"""Files and folders are written completely or not at all."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dia_diffusion.errors import InputError
from dia_diffusion.io import append_json_line, atomic_dir, atomic_file, naming, verify_checksum


def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    with atomic_file(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    place = tmp_path / "step"
    with atomic_dir(place) as temporary:
        (temporary / "old").write_text("1")
    with pytest.raises(RuntimeError), atomic_dir(place) as temporary:
        (temporary / "new").write_text("1")
        raise RuntimeError
    assert [p.name for p in place.iterdir()] == ["old"] and [p.name for p in tmp_path.iterdir()] == ["step"]
    with atomic_dir(place) as temporary:
        (temporary / "new").write_text("1")
    assert [p.name for p in place.iterdir()] == ["new"]


def test_a_new_folder_replaces_nothing(tmp_path: Path) -> None:
    place = tmp_path / "out"
    with pytest.raises(InputError, match="out exists"), atomic_dir(place, replace=False):
        place.mkdir()
        (place / "mine").write_text("1")
    assert [p.name for p in place.iterdir()] == ["mine"] and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_weights_are_readable_by_others(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    with atomic_file(tmp_path / "a.safetensors") as temporary:
        save_file({"a": torch.zeros(1)}, temporary)
    assert os.stat(tmp_path / "a.safetensors").st_mode == os.stat(tmp_path / "usual").st_mode


def test_a_torn_line_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append_json_line(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2')
    append_json_line(path, {"a": 3})
    lines = path.read_text().splitlines()
    assert len(lines) == 3
    assert verify_checksum(json.loads(lines[0])) == {"a": 1} and verify_checksum(json.loads(lines[-1])) == {"a": 3}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EDQUOT])
def test_a_safetensors_error_of_the_system_is_an_os_error(number: int, tmp_path: Path) -> None:
    """Which commands report in one line, and the caches ignore."""
    path = tmp_path / "file.safetensors"
    with pytest.raises(OSError, match=os.strerror(number)) as caught, naming(path):
        raise SafetensorError(f"I/O error: {os.strerror(number)} (os error {number})")
    assert caught.value.filename == str(path)
    with pytest.raises(SafetensorError), naming(path):
        raise SafetensorError("Error while serializing: invalid header")
