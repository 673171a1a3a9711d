"""ADM's protocol against its evaluator's formulas in numpy and scipy, including float16."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import yaml
from torch_fidelity import FeatureExtractorBase

from dia_diffusion.cli.main import main
from dia_diffusion.evaluation.adm import inception_score, precision_recall
from dia_diffusion.evaluation.features import FEATURES
from dia_diffusion.evaluation.record import read_records
from dia_diffusion.io import shipped_folder

SIZE, FEATURES_OF, CLASSES, SPATIAL = 8, 24, 10, 12


def weights() -> list[np.ndarray]:
    """Random matrices: pixels -> features -> logits, and pixels -> spatial features."""
    rng = np.random.default_rng(0)
    shapes = ((SIZE * SIZE * 3, FEATURES_OF), (FEATURES_OF, CLASSES), (SIZE * SIZE * 3, SPATIAL))
    return [rng.normal(size=shape) for shape in shapes]


class RandomFeatures(FeatureExtractorBase):
    """Inception's layers, replaced by random matrices."""

    layer_names = ("features", "logits", "spatial")

    def __init__(self) -> None:
        super().__init__("random", ["features"])

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("features",)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pixels = images[:, :, :SIZE, :SIZE].double().flatten(1) / 255
        first, second, third = map(torch.from_numpy, weights())
        features = pixels @ first
        return features, features @ second / 5, pixels @ third


def layers(images: np.ndarray) -> tuple[np.ndarray, ...]:
    """The layers of RandomFeatures for images (N, H, W, C), in numpy."""
    pixels = images.transpose(0, 3, 1, 2).reshape(len(images), -1) / 255
    first, second, third = weights()
    features = pixels @ first
    return tuple(each.astype(np.float32) for each in (features, features @ second / 5, pixels @ third))


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features.mean(0), np.cov(features, rowvar=False)


def frechet(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
    root = scipy.linalg.sqrtm(a[1] @ b[1]).real
    return float(((a[0] - b[0]) ** 2).sum() + np.trace(a[1] + b[1] - 2 * root))


def score(logits: np.ndarray, split_size: int) -> float:
    p = scipy.special.softmax(logits.astype(np.float64), axis=1)
    parts = [p[start : start + split_size] for start in range(0, len(p), split_size)]
    return float(np.mean([np.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in parts]))


def prc(samples: np.ndarray, real: np.ndarray, dtype: type) -> tuple[float, float]:
    """From all squared distances at once, with each operation in numpy's `dtype`."""

    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = a.astype(dtype), b.astype(dtype)
        return np.maximum((a * a).sum(1)[:, None] - 2 * (a @ b.T) + (b * b).sum(1)[None], dtype(0))

    radii = [np.partition(distances(each, each), 3, axis=1)[:, 3] for each in (samples, real)]
    between = distances(real, samples)
    return float((between <= radii[1][:, None]).any(0).mean()), float((between <= radii[0]).any(1).mean())


def noise(count: int, seed: int, size: int = SIZE) -> np.ndarray:
    """Images (count, size, size, 3) of gray levels that differ from image to image."""
    rng = np.random.default_rng(seed)
    means = rng.uniform(60, 190, (count, 1, 1, 3))
    return (means + rng.normal(0, 25, (count, size, size, 3))).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(("count", "split_size"), [(12, 5), (10, 5), (7, 5000)])
def test_inception_score_of_consecutive_splits(count: int, split_size: int) -> None:
    logits = np.random.default_rng(1).normal(size=(count, 6), scale=3).astype(np.float32)
    assert inception_score(torch.from_numpy(logits), split_size) == pytest.approx(score(logits, split_size), rel=1e-9)


@pytest.mark.parametrize("mean", [0.0, 12.0])
def test_precision_and_recall_in_float16(mean: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far from zero, float16 rounding is as large as the differences of distances, so more rows are within a radius."""
    monkeypatch.setattr("dia_diffusion.evaluation.adm.ROWS", 128)
    rng = np.random.default_rng(3)
    samples, real = (rng.normal(mean + shift, 1, (count, 64)).astype("f") for count, shift in ((500, 0.1), (300, 0)))
    found = precision_recall(torch.from_numpy(samples), torch.from_numpy(real), 3)
    assert found == pytest.approx(prc(samples, real, np.float16), abs=0.005)
    rounding = np.subtract(found, prc(samples, real, np.float64))
    assert rounding.min() > 0.1 if mean else np.abs(rounding).max() < 0.01


def test_features_too_large_for_float16_are_compared_in_float32() -> None:
    rng = np.random.default_rng(3)
    samples, real = (rng.normal(50, 10, (count, 64)).astype("f") for count in (200, 150))
    found = precision_recall(torch.from_numpy(samples), torch.from_numpy(real), 3)
    assert found == pytest.approx(prc(samples, real, np.float64), abs=0.005)


@pytest.fixture
def fid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`fid` by protocol adm, but with 400 samples and random features in place of Inception's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(FEATURES._rows, "inception", lambda *_: ("inception", RandomFeatures(), "0" * 64))
    settings = yaml.safe_load((shipped_folder("protocols") / "adm.yaml").read_text())
    assert settings["num_samples"] == 50_000
    Path("adm.yaml").write_text(yaml.safe_dump(settings | {"num_samples": 400}))
    np.savez("samples.npz", arr_0=noise(400, 1), arr_1=np.arange(400) % 10)
    return ["fid", "samples.npz", "--protocol", "adm.yaml", "--reference"]


def batch(seed: int = 2, **changes: np.ndarray) -> dict[str, np.ndarray]:
    """ADM's reference batch: 200 images, and statistics of 1,000 others."""
    features, _, spatial = layers(noise(1000, 7))
    (mu, sigma), (mu_s, sigma_s) = moments(features), moments(spatial)
    statistics = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s}
    return {"arr_0": noise(200, seed), **statistics, **changes}


def test_the_whole_protocol(fid: list[str]) -> None:
    reference = batch()
    np.savez("reference.npz", **reference)
    np.savez("images.npz", arr_0=reference["arr_0"])
    features, logits, spatial = layers(noise(400, 1))
    real, _, real_spatial = layers(reference["arr_0"])
    assert main([*fid, "reference.npz"]) == main([*fid, "images.npz"]) == 0
    whole, alone = read_records("evaluations.jsonl")
    precision, recall = prc(features, real, np.float16)
    assert 0.1 < precision < 0.99 and 0.1 < recall < 0.99
    expected = {
        "IS-ADM": pytest.approx(score(logits, 5000), rel=1e-5),
        "precision-ADM(inception)": pytest.approx(precision, abs=0.01),
        "recall-ADM(inception)": pytest.approx(recall, abs=0.01),
    }
    for record, first, second in (
        (whole, (reference["mu"], reference["sigma"]), (reference["mu_s"], reference["sigma_s"])),
        (alone, moments(real), moments(real_spatial)),
    ):
        assert record.metric == "FID" and record.protocol_name == "adm"
        assert record.distance == pytest.approx(frechet(moments(features), first), rel=1e-5)
        assert record.metrics == {"sFID": pytest.approx(frechet(moments(spatial), second), rel=1e-5), **expected}
    settings = {"neighbors": 3, "squared_distances": "float16"}
    assert whole.metric_settings == {
        "sfid": {},
        "isc-adm": {"split_size": 5000},
        "prc-adm": settings | {"reference_images": 200},
    }
    assert (whole.protocol.reference_count, alone.protocol.reference_count) == (None, 200)
    assert alone.metric_settings["prc-adm"] == settings
    assert main([*fid, "reference.npz"]) == 0 and len(read_records("evaluations.jsonl")) == 2  # already on record


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arr_0": None}, "must be images for prc-adm, got r.npz, which holds statistics"),
        ({"mu_s": None}, "must be images or have mu_s and sigma_s of 12 features for sfid, got r.npz, which has none"),
        ({"mu_s": np.zeros(5), "sigma_s": np.eye(5)}, "of 12 features for sfid, got r.npz, which has 5"),
        ({"sigma_s": np.eye(3)}, "the arrays in r.npz must be (D,) and (D, D), got (12,) and (3, 3)"),
        ({"sigma_s": -np.eye(12)}, "negative numbers on its diagonal"),
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, "r.npz holds statistics of 5 features; inception has 24"),
        ({"mu_s": np.array([{}] * 12)}, "holds objects"),
        ({"arr_0": np.array([print, None])}, "r.npz can't be read as an .npz file"),
        ({"arr_0": np.zeros((9, 8, 8, 3))}, "r.npz must hold uint8 (N, H, W, C)"),
        ({"arr_0": noise(9, 0, 16)}, "must hold images of 8x8 with 3 channels, like the measured images, got r.npz"),
        ({"arr_0": noise(9, 0)[..., :1]}, "got r.npz with images of 8x8 with 1 channel"),
        ({"arr_0": noise(3, 0)}, "reference images for metric prc-adm must be 4 or more, got 3"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:24],
)
def test_reference_batches_that_are_refused(
    changes: dict[str, np.ndarray], said: str, fid: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez("r.npz", **{name: array for name, array in batch(**changes).items() if array is not None})
    assert main([*fid, "r.npz"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not Path("evaluations.jsonl").exists()
