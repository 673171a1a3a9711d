import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from dia_diffusion.data import FORMATS, DataFormat, ImageSource, Request, array_source, open_images
from dia_diffusion.errors import InputError
from dia_diffusion.sampling.writers import save_npz
from tests.data.conftest import png, write_folder


def test_digits_are_split_by_class_and_scaled():
    train, test = open_images("digits", channels=1), open_images("digits", channels=1, split="test")
    assert train.images.shape == (1201, 1, 8, 8) and test.images.shape == (596, 1, 8, 8)
    assert train.name == "digits" and test.split == "test" and train.class_names == tuple("0123456789")
    assert train.images.min() == 0 and train.images.max() == 255
    assert train.labels is not None and test.labels is not None
    all_counts = np.bincount(load_digits().target)
    np.testing.assert_array_equal(np.bincount(train.labels) + np.bincount(test.labels), all_counts)
    np.testing.assert_array_equal(np.bincount(test.labels), all_counts // 3)
    both = np.concatenate([train.images, test.images]).reshape(-1, 64) * (16 / 255)
    known = zip(load_digits().data.astype(int).tolist(), load_digits().target.tolist(), strict=True)
    found = zip(np.rint(both).astype(int).tolist(), [*train.labels.tolist(), *test.labels.tolist()], strict=True)
    assert sorted(known) == sorted(found)


def test_digits_in_color_and_larger():
    found = open_images("digits", size=16)
    assert found.images.shape == (1201, 3, 16, 16)
    assert np.array_equal(found.images[:, 0], found.images[:, 2])


@pytest.mark.parametrize("shape", [(5, 8, 8), (5, 8, 8, 1), (5, 8, 6, 3)])
def test_numpy_files(tmp_path, shape):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.save(tmp_path / "x.npy", images)
    channels = 3 if shape[-1] == 3 else 1
    found = open_images(tmp_path / "x.npy", channels=channels)
    np.testing.assert_array_equal(found.images.transpose(0, 2, 3, 1), images.reshape(*shape[:3], channels))
    assert not isinstance(found.images, np.memmap) and found.images.flags.c_contiguous
    assert found.name == "x.npy" and found.labels is None and found.split is None
    with pytest.raises(InputError, match=r"`split` must be train for .*x.npy, which has no splits, got 'test'"):
        open_images(tmp_path / "x.npy", split="test")
    mapped = open_images(tmp_path / "x.npy", channels=channels, memory_limit=10)
    assert isinstance(mapped.images, np.memmap) and mapped.fingerprint == found.fingerprint
    np.testing.assert_array_equal(mapped.images[[3, 1]], found.images[[3, 1]])
    assert open_images(tmp_path / "x.npy", channels=4 - channels).images.shape == (5, 4 - channels, *shape[1:3])


def test_numpy_files_with_transparency(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((1, 4, 4, 4), np.uint8))
    assert open_images(tmp_path / "x.npy").images.min() == 255


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 3, 4, 4, 3), np.uint8),
        np.zeros((2, 3, 8, 8), np.uint8),
        np.zeros((8, 8), np.uint8),
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((0, 8, 8, 3), np.uint8),
        np.zeros((2, 0, 8, 3), np.uint8),
    ],
)
def test_other_numpy_files_are_refused(tmp_path, array):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(InputError, match=r"x.npy must hold uint8 \(N, H, W, C\) .*, got .* \("):
        open_images(tmp_path / "x.npy")


def test_pickled_and_broken_numpy_files_are_refused(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([print, None]), allow_pickle=True)
    np.save(tmp_path / "cut.npy", np.zeros((2, 8, 8, 3), np.uint8))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-1])
    (tmp_path / "head.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr': (")
    for name in ("objects", "cut", "head"):
        with pytest.raises(InputError, match=f"{name}.npy can't be read as a numpy file") as error:
            open_images(tmp_path / f"{name}.npy")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["cifra10", "", "/nowhere/at/all", "x\0y"])
def test_an_unknown_source_is_refused_with_the_accepted_ones(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="an image source must be digits, cifar10, cifar100, hf:NAME") as error:
        open_images(source)
    assert "\n" not in str(error.value) and repr(source) in str(error.value)


def test_other_files_are_refused(tmp_path, pixels):
    for name, data in {"x.png": png(pixels[0]), "empty.zip": b"", "x.yaml": b"a: 1\n"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=f"must be digits, .*, got .*{name}', which is a file of another kind"):
            open_images(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "val"}, "`split` must be train or test, got 'val'"),
        ({"channels": 4}, "`channels` must be 3 .* or 1 .*, got 4"),
        ({"size": 0}, "`size` must be a positive number of pixels or none, got 0"),
        ({"size": -8}, "`size` must be a positive number of pixels or none, got -8"),
    ],
)
def test_other_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        open_images("digits", **options)


def test_a_file_named_like_a_source_needs_a_path(tmp_path, monkeypatch, pixels):
    write_folder(tmp_path / "digits", {"1.png": png(pixels[0])})
    monkeypatch.chdir(tmp_path)
    assert len(open_images("digits")) == 1201 and len(open_images("./digits")) == 1
    assert open_images(Path("digits").resolve()).name == "digits"


def test_a_fingerprint_is_of_shape_pixels_and_labels(tmp_path, pixels):
    labelled = open_images(write_folder(tmp_path / "x", {f"{i}/x.png": png(pixels[i]) for i in range(6)}))
    other_labels = open_images(write_folder(tmp_path / "y", {f"{i // 2}/{i}.png": png(pixels[i]) for i in range(6)}))
    np.save(tmp_path / "x.npy", pixels)
    np.save(tmp_path / "y.npy", pixels.reshape(6, 4, 16, 3))
    unlabelled, reshaped = open_images(tmp_path / "x.npy"), open_images(tmp_path / "y.npy")
    np.testing.assert_array_equal(labelled.images, unlabelled.images)
    assert len({s.fingerprint for s in (labelled, other_labels, unlabelled, reshaped)}) == 4
    inner = hashlib.sha256(b"uint8 (6, 3, 8, 8)\n" + pixels.transpose(0, 3, 1, 2).tobytes()).hexdigest()
    assert unlabelled.fingerprint == hashlib.sha256(f"{inner} unlabelled\n".encode()).hexdigest()


def test_subsets():
    digits = open_images("digits")
    part = digits.subset([7, 3, 3])
    np.testing.assert_array_equal(part.images, digits.images[[7, 3, 3]])
    assert part.labels is not None and digits.labels is not None
    assert part.labels.tolist() == digits.labels[[7, 3, 3]].tolist()
    assert len(part) == 3 and part.name == "digits" and part.class_names == digits.class_names
    assert digits.subset(range(len(digits))).fingerprint == digits.fingerprint != part.fingerprint
    assert len(digits.subset([])) == 0
    with pytest.raises(IndexError):
        digits.subset([1201])


def test_a_format_registered_from_outside_is_opened(tmp_path, pixels, monkeypatch):
    """A folder of headerless images, which no built-in format recognizes."""

    def raw_images(request: Request) -> ImageSource:
        images = [np.fromfile(path, np.uint8).reshape(8, 8, 3) for path in sorted(request.path.glob("*.raw"))]
        return array_source(str(request.path), np.stack(images), np.arange(len(images)), split=request.split)

    folder = write_folder(tmp_path / "mine", {f"{i}.raw": image.tobytes() for i, image in enumerate(pixels)})
    with pytest.raises(InputError, match="which holds no image files"):
        open_images(folder)
    monkeypatch.setattr(FORMATS, "_rows", dict(FORMATS))  # undone after the test
    row = DataFormat("a folder of raw images", lambda source: any(Path(source).glob("*.raw")), raw_images)
    FORMATS.register("raw", row)
    found = open_images(folder, split="test")
    np.testing.assert_array_equal(found.read([5, 0]), pixels[[5, 0]].transpose(0, 3, 1, 2))
    assert found.name == "mine" and found.split == "test" and found.shape == (3, 8, 8)
    with pytest.raises(InputError, match="class folders, or a folder of raw images, got 'nowhere'"):
        open_images("nowhere")


@pytest.mark.parametrize("decode", [True, False])
def test_reading_keeps_the_order_of_the_indices(decode, tmp_path, pixels):
    folder = write_folder(tmp_path / "x", {f"{i}.png": png(image) for i, image in enumerate(pixels)})
    found = open_images(folder, decode=decode)

    def shifted(k: int, image: Image.Image) -> np.ndarray:
        return np.asarray(image).transpose(2, 0, 1) + np.uint8(k)

    expected = pixels[[5, 0, 5]].transpose(0, 3, 1, 2)
    if decode:
        np.testing.assert_array_equal(found.read([5, 0, 5]), expected)
    else:
        np.testing.assert_array_equal(
            found.read([5, 0, 5], shifted), expected + np.arange(3, dtype=np.uint8)[:, None, None, None]
        )
    with pytest.raises(IndexError):
        found.read([6], None if decode else shifted)


@pytest.mark.parametrize(("images", "labels"), [("images", "labels"), ("arr_0", "arr_1")])
def test_npz_files(tmp_path, pixels, images, labels):
    np.savez(tmp_path / "x.npz", **{images: pixels, "seeds": np.arange(6)})
    np.save(tmp_path / "x.npy", pixels)
    found = open_images(tmp_path / "x.npz")
    assert found.fingerprint == open_images(tmp_path / "x.npy").fingerprint and found.labels is None
    np.savez_compressed(tmp_path / "y.npz", **{images: pixels, labels: np.array([0, 3, 1, 1, 0, 2], dtype=np.int32)})
    found = open_images(tmp_path / "y.npz", size=4)
    assert found.images.shape == (6, 3, 4, 4) and found.class_names == tuple("0123")
    assert found.labels is not None and found.labels.tolist() == [0, 3, 1, 1, 0, 2]


def test_npz_files_that_hold_their_statistics_too(tmp_path, pixels):
    """ADM's reference batches have this format."""
    np.savez(tmp_path / "x.npz", arr_0=pixels, mu=np.zeros(4), sigma=np.eye(4))
    np.testing.assert_array_equal(open_images(tmp_path / "x.npz").images, pixels.transpose(0, 3, 1, 2))


def test_npz_files_that_sample_writes(tmp_path):
    images = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4).to(torch.uint8)
    save_npz(tmp_path / "x.npz", [7, 3], images)
    np.testing.assert_array_equal(open_images(tmp_path / "x.npz").images, images.flip(0).numpy())


def test_other_npz_files_are_refused(tmp_path, pixels):
    refused = {
        "got statistics": {"mu": np.zeros(4), "sigma": np.zeros((4, 4))},
        "must hold images or arr_0, got weights, bias": {"weights": pixels, "bias": pixels},
        "got nothing": {},
        r"x.npz must hold uint8 .*, got float32 \(6, 8, 8, 3\)": {"images": pixels.astype(np.float32)},
        r"`arr_1` of .* must be a class number per image, got int64 \(5,\)": {"arr_0": pixels, "arr_1": np.arange(5)},
        r"`arr_1` of .*, got float64 \(6,\)": {"arr_0": pixels, "arr_1": np.zeros(6)},
        r"`arr_1` of .* must be below 65,536, got 65536": {"arr_0": pixels, "arr_1": np.full(6, 1 << 16)},
        "got 18446744073709551615": {"arr_0": pixels, "arr_1": np.full(6, 2**64 - 1, dtype=np.uint64)},
        r"`arr_1` of .*, got int64 \(6,\)": {"arr_0": pixels, "arr_1": np.full(6, -1)},
        "can't be read as an .npz file .*allow_pickle": {"arr_0": np.array([print, None])},
        "can't be read as an .npz file .*more than 200 times": {"arr_0": np.zeros((1000, 64, 64, 3), np.uint8)},
    }
    for message, arrays in refused.items():
        np.savez_compressed(tmp_path / "x.npz", **arrays)
        with pytest.raises(InputError, match=message) as error:
            open_images(tmp_path / "x.npz")
        assert "\n" not in str(error.value)
    np.savez(tmp_path / "x.npz", arr_0=pixels)
    (tmp_path / "x.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:-200])
    with pytest.raises(InputError, match=r"can't be read as an \.npz file"):
        open_images(tmp_path / "x.npz")
