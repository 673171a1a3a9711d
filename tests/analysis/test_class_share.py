"""What classes explain of maps, against closed forms and plain numpy."""

import numpy as np
import pytest

from dia_diffusion.analysis.attention_maps import ClassMeans, MapMoments


def record_of(stages: list[np.ndarray], labels: np.ndarray, batch: int = 7) -> dict:
    """The record of maps (L, T, I, N) of each stage and the classes (I,), added batch after batch."""
    classes = [ClassMeans(h.shape[0], h.shape[1], h.shape[3]) for h in stages]
    for each, h in zip(classes, stages, strict=True):
        for start in range(0, len(labels), batch):
            for time in range(h.shape[1]):
                each.add(h[:, time, start : start + batch], time, labels[start : start + batch])
    moments = [MapMoments(h.mean(axis=2), h.var(axis=2)) for h in stages]
    return ClassMeans.summary(classes, moments, ["a", "b", "c", "d"])


def test_a_map_that_knows_only_the_class_is_explained_whole() -> None:
    labels = np.array([0, 1, 3, 1, 0, 3, 3, 0])
    h = np.random.default_rng(0).random((2, 3, 4, 5))[:, :, labels]
    record = record_of([h], labels)
    assert record["share"] == pytest.approx(1) and record["adjusted"] == pytest.approx(1)
    assert record["names"] == ["a", "b", "d"] and record["counts"] == [3, 2, 3]
    deviation = h[1][:, labels == 3].mean() - h[1].mean()
    assert record["deviation_by_class_and_block"][2][1] == pytest.approx(deviation)


def test_a_known_share() -> None:
    """Class means -1 and 1 with deviation 2 within: 1 / (1 + 4) of the variance."""
    within = np.array([-2.0, 2.0, -2.0, 2.0])
    h = np.concatenate([within - 1, within + 1])[None, None, :, None]
    record = record_of([h], np.repeat([0, 1], 4))
    assert record["share"] == pytest.approx(0.2) and record["share_by_chance"] == pytest.approx(1 / 7)
    assert record["adjusted"] == pytest.approx(1 - 0.8 * 7 / 6)
    assert record["share_by_block"] == pytest.approx([0.2])


def test_classes_of_chance_reach_their_share_by_chance() -> None:
    random = np.random.default_rng(2)
    stages = [random.normal(size=(2, 2, 40, 50)), random.normal(size=(1, 2, 40, 100))]
    record = record_of(stages, np.arange(40) % 4)
    assert record["share"] == pytest.approx(3 / 39, rel=0.05) and abs(record["adjusted"]) < 0.01
    assert len(record["share_by_block"]) == 3
    assert np.mean(record["share_by_block"]) == pytest.approx(record["share"], rel=0.02)


def test_no_variance_has_no_adjusted_share() -> None:
    record = record_of([np.ones((1, 1, 3, 2))], np.array([0, 1, 2]))
    assert record["share"] == 0 and record["adjusted"] is None
