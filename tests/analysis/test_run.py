"""The images, losses and weights of diffusion and classification runs, against networks called directly."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dia_diffusion.analysis.ablations import losses
from dia_diffusion.analysis.attention_maps import ANALYSIS as MAPS
from dia_diffusion.analysis.gradient_noise import ANALYSIS as GRADIENT_NOISE
from dia_diffusion.analysis.gradients import ANALYSIS as GRADIENTS
from dia_diffusion.analysis.run import Coverage, GradientBatches, open_runs
from dia_diffusion.errors import InputError
from dia_diffusion.models.classifiers import load_classifier
from dia_diffusion.training.augmentation import mirrored, pad_cropped
from dia_diffusion.training.randomness import image_order
from tests.analysis.conftest import MakeRun, noisy


def test_diffusion_losses_are_per_image(tiny_run: MakeRun) -> None:
    """With vp-continuous noise, uniform weights and noise prediction, the loss is the noise's mean squared error."""
    (run,) = open_runs([tiny_run("dia-lstm")])
    model = run.model(6)
    draws = run.draw(2, 1, 5)
    seen: list[int] = []
    measured = losses(run, model, draws, Coverage(5, 3, batch_size=2, progress=seen.append))
    assert measured.shape == (3, 5) and sum(seen) == 15
    order = image_order(2, 0, 10, len(run.images))
    assert np.array_equal(draws.indices, order[5:]) and len(set(order)) == 10
    for time, image in np.ndindex(3, 5):
        with torch.no_grad():
            predicted = model(*noisy(run, draws, image, (time + 0.5) / 3)).sample[0]
        assert float(measured[time, image]) == pytest.approx(float((predicted - draws.noise[image]).square().mean()))


def test_classifier_losses_use_augmented_images(tiny_classifier: MakeRun) -> None:
    (run,) = open_runs([tiny_classifier("se")])
    draws = run.draw(1, 0, 5)
    pixels = torch.from_numpy(run.images.images[draws.indices])
    pixels = pad_cropped(mirrored(pixels, draws.uniform), draws.uniform)
    saved = load_classifier(run.folder.path)
    labels = torch.from_numpy(run.images.labels[draws.indices])
    expected = F.cross_entropy(saved.model(saved.prepare(pixels)), labels, reduction="none")
    with torch.no_grad():
        assert torch.allclose(run.training_losses(run.model(4), draws), expected, atol=1e-6)
    parts = losses(run, run.model(4), draws, Coverage(5, 16, batch_size=2))
    assert parts.shape == (1, 5) and torch.allclose(parts[0].float(), expected, atol=1e-5)  # a classifier has no times


def test_raw_weights_come_from_checkpoints(tiny_run: MakeRun, tmp_path: Path) -> None:
    (run,) = open_runs([tiny_run("block-channels")])
    averaged, raw = run.model(6).state_dict(), run.model(6, "raw").state_dict()
    assert averaged.keys() == raw.keys() and not torch.equal(averaged["unit.scale"], raw["unit.scale"])
    with pytest.raises(InputError, match=r"`--steps` must be among 3, 6, the checkpoints of .*, got 4"):
        run.model(4, "raw")
    folder = shutil.copytree(run.folder.path, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "step-00000003")
    shutil.rmtree(folder / "pipelines" / "step-00000006")
    (run,) = open_runs([folder])
    assert [run.choose_steps(None), run.choose_steps(None, "raw")] == [[3], [6]]
    measured = GRADIENT_NOISE.of_run(run, over=GradientBatches(2), weights="raw")
    assert [step["step"] for step in measured["steps"]] == [6]
    shutil.rmtree(folder / "checkpoints")
    (run,) = open_runs([folder])
    with pytest.raises(InputError, match="has no checkpoints"):
        run.choose_steps(None, "raw")


def test_initial_weights_with_batch_norm_are_measured_only_in_training_mode(tiny_classifier: MakeRun) -> None:
    runs = open_runs([tiny_classifier("none"), tiny_classifier("se")])
    assert runs[1].with_first(None) == [2, 4] and runs[1].with_first([0, 2]) == [0, 2]
    for record in [GRADIENTS.of_run(run, over=GradientBatches(2)) for run in runs]:
        assert [step["step"] for step in record["steps"]] == [0, 2, 4]
        blocks = record["steps"][0]["blocks"]
        assert [block["block"] for block in blocks if block["ends_stage"]] == ["1.3", "2.3", "3.3"]
        assert all(block["mean"] > 0 for block in blocks)
    with pytest.raises(InputError, match=r"`--steps` must be among 2, 4, the classifiers of .*, got 3"):
        runs[0].model(3)


def test_options_that_do_not_fit_a_run_are_refused(tiny_run: MakeRun, tmp_path: Path) -> None:
    plain, with_unit = open_runs([tiny_run("none"), tiny_run("block-scale")])
    with pytest.raises(InputError, match="without attention unit"):
        MAPS.of_run(plain, over=Coverage(2, 2))
    with pytest.raises(InputError, match=f"`--images` must be {len(plain.images):,} or fewer"):
        MAPS.of_run(with_unit, over=Coverage(len(plain.images) + 1, 2))
    np.save(tmp_path / "images.npy", np.zeros((10, 8, 8), dtype=np.uint8))
    with pytest.raises(InputError, match=r"other images than .* was trained on; give those as --data"):
        open_runs([tiny_run("block-scale")], str(tmp_path / "images.npy"))
