"""Statistics files with invalid arrays, arrays that decompress to gigabytes, or ones that need their size squared."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dia_diffusion.data import open_images
from dia_diffusion.evaluation.features import FeatureExtractor
from dia_diffusion.evaluation.reference import reference_statistics
from dia_diffusion.evaluation.statistics_file import is_statistics_file, read_statistics, write_statistics
from tests.security import hostile
from tests.security.hostile import npy_of, put_json, write_bomb, write_zip
from tests.security.hostile_weights import LYING_WEIGHTS, put_weights
from tests.security.watch import Sandbox


@pytest.fixture
def stored(extractor: FeatureExtractor, sandbox: Sandbox) -> Path:
    images = open_images("digits", split="test", channels=3)
    write_statistics(sandbox.folder / "x.safetensors", reference_statistics(images, extractor), extractor)
    return sandbox.folder / "x.safetensors"


@pytest.mark.parametrize("kind", LYING_WEIGHTS)
def test_statistics_that_are_no_tensors(kind: str, sandbox: Sandbox) -> None:
    file = sandbox.folder / "x.safetensors"
    put_weights(file, kind, sandbox.marker)
    sandbox.refused(lambda: read_statistics(file), file)
    assert is_statistics_file(file) is (kind != "folder")


ARRAYS: dict[str, Callable[[Path], bytes]] = {
    **hostile.ARRAYS,
    "shape of gigabytes": lambda _: npy_of(f"({1 << 40},)", "'<f8'"),
    "shape of 2^70": lambda _: npy_of(f"({1 << 70},)", "'<f8'"),
    "shape overflows": lambda _: npy_of(f"({1 << 33}, {1 << 33})", "'<f8'"),
    "negative shape": lambda _: npy_of("(-4,)", "'<f8'"),
    "half of it": lambda _: npy_of("(4000,)", "'<f8'"),
    "dates": lambda _: hostile.npy(np.zeros(4, "M8[s]")),
    "records": lambda _: hostile.npy(np.zeros(4, [("a", "f8")])),
    "complex vector": lambda _: hostile.npy(np.zeros(4, complex)),
    "whole numbers": lambda _: hostile.npy(np.zeros(4, np.int64)),
    "not a number": lambda _: hostile.npy(np.full(4, np.nan)),
    "infinite": lambda _: hostile.npy(np.full(4, np.inf)),
    "largest": lambda _: hostile.npy(np.full((4, 4), 1e308)),
    "none": lambda _: hostile.npy(np.zeros(0)),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("key", ["mu", "sigma", "pool_3"])
def test_hostile_arrays(key: str, kind: str, sandbox: Sandbox) -> None:
    entries = {"mu.npy": hostile.npy(np.zeros(4)), "sigma.npy": hostile.npy(np.eye(4))} if key != "pool_3" else {}
    file = write_zip(sandbox.folder / "x.npz", entries | {f"{key}.npy": ARRAYS[kind](sandbox.marker)})
    assert sandbox.watch(lambda: is_statistics_file(file))
    if (key, kind) == ("sigma", "largest"):  # valid values for a covariance
        sandbox.survived(lambda: read_statistics(file))
    else:
        sandbox.refused(lambda: read_statistics(file), file)


@pytest.mark.parametrize("key", ["mu", "sigma", "pool_3"])
@pytest.mark.parametrize("lie", [None, 1 << 23])
def test_bombs(key: str, lie: int | None, sandbox: Sandbox) -> None:
    start = npy_of(f"({1 << 10}, {1 << 11})", "'<f8'", b"")
    file = write_bomb(sandbox.folder / "x.npz", f"{key}.npy", 1 << 24, start, lie)
    sandbox.refused(lambda: read_statistics(file), file)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "gigabytes"])
@pytest.mark.parametrize("name", ["x.npz", "x.safetensors"])
def test_statistics_that_are_no_files(name: str, kind: str, sandbox: Sandbox) -> None:
    put_json(sandbox.folder / name, kind)
    sandbox.watch(lambda: is_statistics_file(sandbox.folder / name))
    sandbox.refused(lambda: read_statistics(sandbox.folder / name), name)


def test_a_name_within_an_npz_reaches_no_terminal(sandbox: Sandbox) -> None:
    with zipfile.ZipFile(sandbox.folder / "x.npz", "w") as archive:
        archive.writestr("\x1b[2J\n.npy", hostile.npy(np.zeros(2)))
    sandbox.refused(lambda: read_statistics(sandbox.folder / "x.npz"), "x.npz")


TENSORS: dict[str, dict[str, Any]] = {
    "a long sum": {"sum": torch.zeros(1 << 20, dtype=torch.float64)},
    "no sum": {"sum": torch.zeros(0), "outer": torch.zeros(0, 0)},
    "a sum of one": {"sum": torch.tensor(1.0)},
    "negative count": {"count": torch.tensor(-5)},
    "count of many": {"count": torch.zeros(4)},
    "count not a number": {"count": torch.tensor(torch.nan)},
    "infinite count": {"count": torch.tensor(torch.inf)},
    "complex count": {"count": torch.tensor(1j)},
    "largest count": {"count": torch.tensor(2**63 - 1)},
    "complex sum": {"sum": torch.zeros(64, dtype=torch.complex64)},
    "truth values": {"sum": torch.ones(64, dtype=torch.bool)},
    "not finite": {"outer": torch.full((64, 64), torch.nan)},
    "not symmetric": {"outer": torch.ones(64, 64).triu()},
}
LEGAL = ("largest count", "truth values")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_of_other_kinds(kind: str, stored: Path, sandbox: Sandbox) -> None:
    provenance = json.dumps(read_statistics(stored).provenance)
    save_file(load_file(stored) | TENSORS[kind], stored, metadata={"provenance": provenance})
    (sandbox.survived if kind in LEGAL else sandbox.refused)(lambda: read_statistics(stored))


@pytest.mark.parametrize("kind", [kind for kind, text in hostile.JSON_TEXTS.items() if b"\xff" not in text])
def test_hostile_provenance_is_refused(kind: str, stored: Path, sandbox: Sandbox) -> None:
    provenance = hostile.JSON_TEXTS[kind].decode()
    save_file(load_file(stored), stored, metadata={"provenance": provenance})
    sandbox.refused(lambda: read_statistics(stored), stored)


def test_provenance_of_other_types(stored: Path, sandbox: Sandbox) -> None:
    tensors, provenance = load_file(stored), read_statistics(stored).provenance
    for value in hostile.wrong_values(provenance).values():
        save_file(tensors, stored, metadata={"provenance": json.dumps(value)})
        try:
            found = read_statistics(stored)
        except ValueError:
            continue
        assert found.features == provenance["features"] or isinstance(found.features, str)
