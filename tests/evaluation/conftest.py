"""Fixtures for the evaluation tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dia_diffusion.data import ImageSet, open_images
from dia_diffusion.evaluation.features import FeatureExtractor, build_features
from dia_diffusion.evaluation.record import EvaluationRecord, Origin, ResolvedProtocol, make_record


@pytest.fixture(scope="session")
def extractor() -> FeatureExtractor:
    return build_features("digits")


@pytest.fixture(scope="session")
def digits() -> ImageSet:
    return open_images("digits", split="test", channels=3)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIA_DIFFUSION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def protocol() -> Callable[..., ResolvedProtocol]:
    """Builds a protocol with some fields changed."""
    return _protocol


@pytest.fixture(scope="session")
def record() -> Callable[..., EvaluationRecord]:
    """Builds a record; further keyword arguments change its protocol."""
    return _record


def _protocol(**changes: object) -> ResolvedProtocol:
    fields: dict[str, Any] = {
        "features": "digits",
        "features_hash": "f" * 64,
        "reference": "digits",
        "reference_split": "test",
        "reference_shape": (3, 8, 8),
        "reference_count": 599,
        "reference_hash": "e" * 64,
        "num_samples": 500,
        "seeds": "0-499",
        "sampler": "dpmsolver++",
        "scheduler": {"timestep_spacing": "linspace", "clip_sample": False},
        "num_inference_steps": 50,
        "weights": "ema",
        "dtype": "float32",
    }
    return ResolvedProtocol(**fields | changes)


def _record(distance: float = 3.5, step: int = 100, batch_size: int = 32, **changes: object) -> EvaluationRecord:
    origin = Origin(
        source="runs/a",
        run="a",
        step=step,
        images_seen=step * batch_size,
        unit="dia-lstm",
        batch_size=batch_size,
        seed=0,
        weights_hash="d" * 64,
    )
    return make_record(distance, _protocol(**changes), origin, seconds=1.25)
