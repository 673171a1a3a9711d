import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dia_diffusion.data import decode, open_images
from dia_diffusion.errors import InputError
from tests.data.conftest import png, write_folder
from tests.security.hostile import write_zip


def as_sets(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 2, 3, 1)


def refusal(source: Path, **options) -> str:
    """The error message for a refused source: one line that names it."""
    with pytest.raises(InputError) as error:
        open_images(source, **options)
    message = str(error.value)
    assert "\n" not in message and source.name in message
    return message


def test_images_are_sorted_by_name_and_unlabelled(write, pixels):
    source = write({"b.png": png(pixels[1]), "a.PNG": png(pixels[0]), "c/d.png": png(pixels[2]), "notes.txt": b"-"})
    found = open_images(source)
    np.testing.assert_array_equal(as_sets(found.images), pixels[:3])
    assert found.images.dtype == np.uint8 and len(found) == 3
    assert found.labels is None and found.class_names is None
    assert found.name == source.name and found.split is None


def test_folders_on_the_first_level_are_the_classes(write, pixels):
    names = ["cat/1.png", "cat/2.png", "dog/1.png", "dog/old/2.png", "eel/1.png"]
    found = open_images(write({name: png(image) for name, image in zip(names, pixels, strict=False)}))
    np.testing.assert_array_equal(as_sets(found.images), pixels[:5])
    assert found.class_names == ("cat", "dog", "eel")
    assert found.labels is not None and found.labels.dtype == np.int64
    assert found.labels.tolist() == [0, 0, 1, 1, 2]


def test_a_folder_around_everything_is_looked_through(write, pixels):
    found = open_images(write({"all/x/cat/1.png": png(pixels[0]), "all/x/dog/1.png": png(pixels[1])}))
    assert found.class_names == ("cat", "dog")


def test_train_and_test_folders_are_splits(write, pixels):
    names = ["test/cat/1.png", "test/dog/1.png", "train/cat/1.png", "train/dog/1.png", "train/dog/2.png"]
    source = write({name: png(image) for name, image in zip(names, pixels, strict=False)})
    test, train = open_images(source, split="test"), open_images(source)
    np.testing.assert_array_equal(as_sets(test.images), pixels[:2])
    np.testing.assert_array_equal(as_sets(train.images), pixels[2:5])
    assert (train.split, test.split) == ("train", "test")
    assert train.labels is not None and train.labels.tolist() == [0, 1, 1] and train.class_names == ("cat", "dog")


def test_a_split_that_is_not_there_is_refused(write, pixels):
    assert "which has no splits, got 'test'" in refusal(write({"1.png": png(pixels[0])}), split="test")


def test_train_and_val_have_no_test(write, pixels):
    source = write({"train/1.png": png(pixels[0]), "val/1.png": png(pixels[1])})
    assert "`split` must be one of train, val for" in refusal(source, split="test")
    assert len(open_images(source)) == 1


def test_hidden_files_are_left_out(write, pixels):
    source = write({"1.png": png(pixels[0]), ".2.png": b"", "__MACOSX/3.png": b"", ".git/4.png": b""})
    assert len(open_images(source)) == 1


def test_a_folder_and_its_zip_are_the_same(tmp_path, pixels):
    files = {f"{'ab'[i % 2]}/{i}.png": png(image) for i, image in enumerate(pixels)}
    folder, archive = write_folder(tmp_path / "x", files), write_zip(tmp_path / "x.zip", files)
    assert open_images(folder).fingerprint == open_images(archive).fingerprint
    assert open_images(folder, size=4).fingerprint != open_images(folder).fingerprint


def test_unreadable_images_are_counted_and_the_first_named(write, pixels):
    files = {f"{i}.png": png(image) for i, image in enumerate(pixels)}
    files |= {"4.png": b"nothing", "2.png": files["2.png"][:60]}
    source = write(files)
    for options in ({}, {"size": 4}):
        message = refusal(source, **options)
        assert message.startswith(f"2 of 6 images can't be read, first: {source}/2.png (")


def test_sizes_must_agree_unless_one_is_chosen(write, pixels):
    source = write({"1.png": png(pixels[0]), "2.png": png(pixels[1, :6]), "3.png": png(pixels[2])})
    assert "1 of 3 images can't be read" in (message := refusal(source))
    assert "2.png (size must be 8 x 8 as of the first, got 8 x 6)" in message
    assert open_images(source, size=6).images.shape == (3, 3, 6, 6)


def test_images_of_one_size_need_not_be_square(write, pixels):
    assert open_images(write({"1.png": png(pixels[0, :6])})).images.shape == (1, 3, 6, 8)


def test_gray(write, pixels):
    source = write({"1.png": png(pixels[0, :, :, 0])})
    np.testing.assert_array_equal(open_images(source, channels=1).images[0, 0], pixels[0, :, :, 0])
    assert open_images(source).images.shape == (1, 3, 8, 8)


@pytest.mark.parametrize("files", [{}, {"readme.txt": b"-"}])
def test_no_images(write, tmp_path, files):
    (tmp_path / "images").mkdir()
    assert "holds no image files" in refusal(write(files))


def test_many_threads_keep_the_order(monkeypatch, tmp_path):
    images = np.random.default_rng(2).integers(0, 256, (50, 4, 4, 3), dtype=np.uint8)
    folder = write_folder(tmp_path / "x", {f"{i:02}.png": png(image) for i, image in enumerate(images)})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(5)), raising=False)
    monkeypatch.setattr("dia_diffusion.data.image_set._BLOCK", 7 * 4 * 4 * 3)
    calls: list[tuple[int, int]] = []
    found = open_images(folder, progress=lambda done, total: calls.append((done, total)))
    np.testing.assert_array_equal(as_sets(found.images), images)
    assert calls[-1] == (50, 50) and calls == sorted(calls) and len(calls) == 8


def test_links_are_followed_without_cycles(tmp_path, pixels):
    folder = write_folder(tmp_path / "x", {"a/1.png": png(pixels[0])})
    (folder / "a" / "up").symlink_to(folder)
    (folder / "b").symlink_to(write_folder(tmp_path / "y", {"2.png": png(pixels[1])}))
    assert open_images(folder).class_names == ("a", "b")


def test_backslashes_separate_folders_in_a_zip(tmp_path, pixels):
    source = write_zip(tmp_path / "windows.zip", {"b\\1.png": png(pixels[0]), "a\\1.png": png(pixels[1])})
    assert open_images(source).class_names == ("a", "b")


def test_no_more_is_unpacked_than_was_declared(tmp_path):
    with zipfile.ZipFile(tmp_path / "liar.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.png", b"\0" * 3_000_000)
    data = (tmp_path / "liar.zip").read_bytes()
    declared = (3_000_000).to_bytes(4, "little")
    assert data.count(declared) == 2
    (tmp_path / "liar.zip").write_bytes(data.replace(declared, (100).to_bytes(4, "little")))
    assert refusal(tmp_path / "liar.zip").startswith("1 of 1 images can't be read")


def test_large_files_are_not_read(tmp_path, monkeypatch, pixels):
    monkeypatch.setattr(decode, "FILE_LIMIT", 100)
    for write, name in ((write_folder, "x"), (write_zip, "x.zip")):
        assert "must have at most" in refusal(write(tmp_path / name, {"1.png": png(pixels[0])}))


def test_encrypted_entries_are_named(tmp_path, pixels):
    source = write_zip(tmp_path / "locked.zip", {"1.png": png(pixels[0])})
    data = bytearray(source.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    source.write_bytes(data)
    assert "encrypted" in refusal(source)


def test_a_damaged_entry_is_named(tmp_path, pixels):
    source = write_zip(tmp_path / "worn.zip", {"1.png": png(pixels[0]), "2.png": png(pixels[1])})
    data = bytearray(source.read_bytes())
    data[80] ^= 255
    source.write_bytes(data)
    assert "1 of 2 images can't be read, first:" in (message := refusal(source)) and "1.png (Bad CRC" in message


@pytest.mark.parametrize("keep", [4, 200, -3])
def test_a_zip_cut_short_is_refused(tmp_path, pixels, keep):
    source = write_zip(tmp_path / "cut.zip", {"1.png": png(pixels[0])})
    source.write_bytes(source.read_bytes()[:keep])
    assert "can't be read as a zip" in refusal(source)
