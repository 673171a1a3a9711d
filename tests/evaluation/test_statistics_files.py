import json
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.features import PACKAGED, build_features
from dia_diffusion.evaluation.reference import open_reference, reference_statistics
from dia_diffusion.evaluation.statistics_file import (
    is_statistics_file,
    read_statistics,
    refuse_incomparable,
    write_statistics,
)


@pytest.fixture
def reference(extractor, digits):
    return reference_statistics(digits, extractor)


@pytest.fixture
def path(reference, extractor, tmp_path):
    path = tmp_path / "digits.safetensors"
    write_statistics(path, reference, extractor)
    return path


def refused(path, said, call=read_statistics):
    with pytest.raises(InputError, match=said) as caught:
        call(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_is_the_reference_it_was_made_of(path, reference, extractor):
    again = open_reference(path, extractor, (3, 8, 8))
    assert (again.name, again.split, again.shape, again.hash) == ("digits", "test", (3, 8, 8), reference.hash)
    assert again.statistics.count == 596
    assert torch.equal(again.statistics.outer, reference.statistics.outer)


def test_provenance_is_complete(path, reference, extractor):
    known = read_statistics(path).provenance
    assert known["shape"] == [3, 8, 8] and known["count"] == 596
    assert (known["features"], known["features_hash"]) == ("digits", extractor.weights_hash)
    assert known["images_hash"] == reference.hash
    assert known["versions"]["torch"] == metadata.version("torch") and known["created_by"].startswith("dia-diffusion")


def test_moments_of_pytorch_fid(path, reference, extractor, tmp_path):
    """pytorch-fid's files hold mu and sigma; some other programs' are in float32 or have further keys."""
    mean, covariance = reference.statistics.mean, reference.statistics.covariance
    np.savez(tmp_path / "a.npz", mu=mean, sigma=covariance)
    np.savez_compressed(tmp_path / "b.npz", mu=mean.astype("f"), sigma=covariance.astype("f"), arr_0=np.zeros(3))
    for name, tolerance in (("a.npz", 1e-14), ("b.npz", 1e-5)):
        found = open_reference(tmp_path / name, extractor, (3, 16, 16))
        assert (found.name, found.split, found.shape, found.statistics.count) == (name, None, None, None)
        np.testing.assert_allclose(found.statistics.mean, mean, rtol=tolerance)
        np.testing.assert_allclose(found.statistics.covariance, covariance, atol=tolerance * np.abs(covariance).max())
    refuse_incomparable(read_statistics(path), read_statistics(tmp_path / "a.npz"))


def test_npz_files_that_are_not_moments(tmp_path):
    zero, eye = np.zeros(4), np.eye(4)
    indefinite = eye + 2 * (np.eye(4, k=2) + np.eye(4, k=-2))
    for arrays, said in (
        ({"mean": zero, "cov": eye}, "must be mu and sigma .* or pool_3 .*got mean, cov"),
        ({"mu": zero}, "must be mu and sigma .*got mu"),
        ({"mu": zero, "sigma": eye + np.eye(4, k=1)}, "isn't symmetric"),
        ({"mu": zero, "sigma": -eye}, "negative numbers on its diagonal"),
        ({"mu": zero, "sigma": indefinite}, "got -1 to 3"),
        ({"mu": np.zeros(5), "sigma": eye}, r"got \(5,\) and \(4, 4\)"),
        ({"mu": eye, "sigma": eye}, r"got \(4, 4\) and \(4, 4\)"),
        ({"pool_3": np.zeros((1, 4))}, r"got \(1, 4\)"),
        ({"pool_3": np.zeros((8, 4, 1, 1))}, r"got \(8, 4, 1, 1\)"),
    ):
        np.savez(tmp_path / "a.npz", **arrays)
        refused(tmp_path / "a.npz", said)


def test_damaged_and_other_files(path, tmp_path):
    np.savez(tmp_path / "whole.npz", mu=np.zeros(64), sigma=np.eye(64))
    flipped = bytearray((tmp_path / "whole.npz").read_bytes())
    flipped[-5000] ^= 255
    (tmp_path / "flipped.npz").write_bytes(flipped)
    refused(tmp_path / "flipped.npz", "CRC")
    for kept in (0, 3, 100, len(flipped) // 2, len(flipped) - 1):
        (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:kept])
        refused(tmp_path / "cut.npz", "truncated")
    path.write_bytes(path.read_bytes()[:-1])
    refused(path, "truncated, corrupted or not a file of feature statistics")
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, np.eye(3))
    refused(tmp_path / "array.npz", "no npz")
    refused(tmp_path / "none.npz", "no such file")


@pytest.mark.parametrize(
    ("changes", "tensors", "said"),
    [
        ({"shape": [8, 8]}, {}, "three numbers"),
        ({"features": None}, {}, "doesn't say what it was made from"),
        ({"statistics_version": 0}, {}, "must be 1, got 0; make it again with `dia-diffusion stats make`"),
        ({}, {"count": torch.tensor(1)}, "of 2 images or more, got 1"),
        ({}, {"sum": torch.zeros(3)}, r"got \(3,\) and \(64, 64\)"),
    ],
)
def test_our_own_files_are_checked(path, changes, tensors, said):
    provenance = read_statistics(path).provenance | changes
    save_file(load_file(path) | tensors, path, metadata={"provenance": json.dumps(provenance)})
    refused(path, said)


def test_a_reference_of_other_features_weights_and_images_is_refused(path, extractor, tmp_path):
    refused(
        path,
        "images of 8x8 with 3 channels, but those measured are 16x16 with 3",
        lambda p: open_reference(p, extractor, (3, 16, 16)),
    )
    weights = load_file(PACKAGED["digits"].weights)
    weights["head.bias"] += 1
    save_file(weights, tmp_path / "weights.safetensors")
    other = build_features("digits", weights=tmp_path / "weights.safetensors")
    refused(path, "of other weights", lambda p: open_reference(p, other, (3, 8, 8)))
    inception = SimpleNamespace(name="inception", weights_hash="0" * 64, num_features=2048)
    refused(path, "in features digits; measured: inception", lambda p: open_reference(p, inception, (3, 8, 8)))
    np.savez(tmp_path / "cifar.npz", mu=np.zeros(256), sigma=np.eye(256))
    refused(tmp_path / "cifar.npz", "256 features; digits has 64", lambda p: open_reference(p, extractor, (3, 8, 8)))
    np.savez(tmp_path / "three.npz", mu=np.zeros(3), sigma=np.eye(3))
    three = read_statistics(tmp_path / "three.npz")
    refused(path, "64 features, .*three.npz of 3", lambda p: refuse_incomparable(read_statistics(p), three))


def test_statistics_files_are_distinguished_from_images(tmp_path):
    (tmp_path / "folder.npz").mkdir()
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 8, 8), dtype=np.uint8), seeds=np.arange(2))
    np.savez(tmp_path / "both.npz", arr_0=np.zeros((2, 8, 8), dtype=np.uint8), mu=np.zeros(4), sigma=np.eye(4))
    np.savez(tmp_path / "other.npz", mean=np.zeros(4))
    images = ("digits", "images.zip", "images.npy", tmp_path / "folder.npz", tmp_path / "images.npz")
    assert not any(map(is_statistics_file, images))
    assert all(map(is_statistics_file, ("none.npz", "b.safetensors", tmp_path / "both.npz", tmp_path / "other.npz")))
