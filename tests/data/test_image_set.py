import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from dia_diffusion.data import ImageSet, open_images
from dia_diffusion.errors import InputError, RunError
from tests.data.conftest import png, write_folder
from tests.processes import PATIENCE
from tests.security.hostile import write_zip


@pytest.fixture
def folder(tmp_path, pixels) -> Path:
    return write_folder(tmp_path / "x", {f"{'ab'[i % 2]}/{i}.png": png(image) for i, image in enumerate(pixels)})


def files_in(cache: Path) -> list[str]:
    return sorted(path.suffix for path in (cache / "images").iterdir())


def opened(source: Path, cache: Path, **options) -> tuple[ImageSet, bool]:
    """The images as a memory map, and whether this call decoded them."""
    calls: list[int] = []
    found = open_images(source, cache=cache, memory_limit=0, progress=lambda done, _: calls.append(done), **options)
    assert isinstance(found.images, np.memmap) and not found.images.flags.writeable
    return found, bool(calls)


def test_a_memory_map_equals_memory(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("dia_diffusion.data.image_set._BLOCK", 2 * 8 * 8 * 3)
    for options in ({}, {"size": 4}, {"channels": 1}):
        mapped, was_decoded = opened(folder, tmp_path / "cache", **options)
        expected = open_images(folder, **options)
        assert was_decoded
        np.testing.assert_array_equal(mapped.images, expected.images)
        assert mapped.fingerprint == expected.fingerprint and mapped.class_names == ("a", "b")
        np.testing.assert_array_equal(mapped.images[[5, 0, 5]], expected.images[[5, 0, 5]])
    assert files_in(tmp_path / "cache") == [".json"] * 3 + [".npy"] * 3


def test_a_memory_map_is_used_again_until_a_file_changes(folder, tmp_path, pixels):
    first, _ = opened(folder, tmp_path / "cache")
    again, was_decoded = opened(folder, tmp_path / "cache")
    assert not was_decoded and again.fingerprint == first.fingerprint
    (folder / "a" / "0.png").write_bytes(png(255 - pixels[0]))
    os.utime(folder / "a" / "0.png", ns=(1, 1))
    changed, was_decoded = opened(folder, tmp_path / "cache")
    assert was_decoded and changed.fingerprint != first.fingerprint


def test_a_changed_zip_is_decoded_again(tmp_path, pixels):
    source = write_zip(tmp_path / "x.zip", {"1.png": png(pixels[0])})
    opened(source, tmp_path / "cache")
    write_zip(source, {"1.png": png(pixels[1])})
    found, _ = opened(source, tmp_path / "cache")
    np.testing.assert_array_equal(found.images[0].transpose(1, 2, 0), pixels[1])


def test_arrays_that_need_a_change_are_mapped(tmp_path, pixels):
    np.save(tmp_path / "x.npy", pixels)
    found, _ = opened(tmp_path / "x.npy", tmp_path / "cache", size=16)
    assert found.fingerprint == open_images(tmp_path / "x.npy", size=16).fingerprint
    np.save(tmp_path / "x.npy", 255 - pixels)
    assert opened(tmp_path / "x.npy", tmp_path / "cache", size=16)[1]


def test_failures_leave_nothing_in_the_cache(folder, tmp_path):
    (folder / "b" / "3.png").write_bytes(b"")
    with pytest.raises(InputError, match="1 of 6 images"):
        open_images(folder, cache=tmp_path / "cache", memory_limit=0)
    assert files_in(tmp_path / "cache") == []


def test_an_odd_first_image_fills_no_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("dia_diffusion.data.image_set._BLOCK", 1)
    files = {f"{i}.png": png(np.zeros((8 if i else 2000,) * 2, np.uint8)) for i in range(40)}
    written: list[int] = []
    folder = write_folder(tmp_path / "x", files)
    with pytest.raises(InputError, match="39 of 40 images can't be read"):
        open_images(
            folder, cache=tmp_path / "c", memory_limit=0, progress=lambda *_: written.append(bytes_in(tmp_path / "c"))
        )
    assert max(written) <= 2 * 3 * 2000**2


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_cache_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"the decoded images can't be written to .* \(") as error:
        open_images(folder, cache=tmp_path / "file", memory_limit=0)
    assert "\n" not in str(error.value)


def test_a_full_disk_is_an_error_in_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("dia_diffusion.data.image_set.atomic_file", lambda _: open_full_device())
    with pytest.raises(RunError, match="No space left on device"):
        open_images(folder, cache=tmp_path, memory_limit=0)


class open_full_device:
    def __enter__(self) -> Path:
        return Path("/dev/full")

    def __exit__(self, *_) -> None:
        pass


def test_an_interruption_stops_the_decoding(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("dia_diffusion.data.image_set._BLOCK", 1)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_images(folder, cache=tmp_path / "cache", memory_limit=0, progress=interrupt)
    assert files_in(tmp_path / "cache") == []


def test_two_processes_at_once(folder, tmp_path):
    """Both start before either finishes, and both get the right images."""
    context = multiprocessing.get_context("fork")
    begun, results = context.Barrier(2, timeout=PATIENCE), context.Queue()

    def work() -> None:
        found = open_images(folder, cache=tmp_path / "cache", memory_limit=0, progress=lambda *_: begun.wait())
        results.put((found.fingerprint, found.images.tobytes()))

    processes = [context.Process(target=work) for _ in range(2)]
    for process in processes:
        process.start()
    expected = open_images(folder)
    assert [results.get(timeout=PATIENCE) for _ in processes] == [(expected.fingerprint, expected.images.tobytes())] * 2
    for process in processes:
        process.join()
    assert files_in(tmp_path / "cache") == [".json", ".npy"]
