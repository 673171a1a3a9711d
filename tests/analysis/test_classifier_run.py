"""The analyses on a classifier with three stages, against its own network called by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dia_diffusion.analysis import importance
from dia_diffusion.analysis.ablations import ablations_of_run
from dia_diffusion.analysis.attention_maps import maps_of_run
from dia_diffusion.analysis.correlation import correlations_of_run
from dia_diffusion.analysis.gradients import gradients_of_run
from dia_diffusion.analysis.run import Coverage, open_runs
from dia_diffusion.cli.main import main
from dia_diffusion.errors import InputError
from dia_diffusion.models.classifiers import load_classifier
from dia_diffusion.training.augmentation import mirrored, pad_cropped


def test_images_and_loss_are_those_of_training(tiny_classifier: Callable[[str], Path]) -> None:
    (run,) = open_runs([tiny_classifier("se")])
    draws = run.draw(1, 0, 5)
    pixels = torch.from_numpy(run.images.images[draws.indices])
    pixels = pad_cropped(mirrored(pixels, draws.uniform), draws.uniform)
    saved = load_classifier(run.folder.path)
    labels = torch.from_numpy(run.images.labels[draws.indices])
    expected = F.cross_entropy(saved.model(saved.prepare(pixels)), labels, reduction="none")
    with torch.no_grad():
        assert torch.allclose(run.training_losses(run.model(4), draws), expected, atol=1e-6)
        parts = torch.cat([batch.losses(run.model(4)) for batch in run.batches(draws, 1, 2)])
    assert torch.allclose(parts, expected, atol=1e-5)


def test_stages_are_correlated_apart(tiny_classifier: Callable[[str], Path]) -> None:
    (run,) = open_runs([tiny_classifier("se")])
    (step,) = correlations_of_run(run, [4], Coverage(6, 16, batch_size=4))["steps"]
    model, draws = run.model(4), run.draw(0, 0, 6)
    seen: dict[int, list[np.ndarray]] = {0: [], 1: [], 2: []}
    for index, unit in enumerate(model.attention_units):
        unit.register_forward_hook(lambda unit, _, out, kept=seen[index]: kept.append(unit.attention_map(out[1])))
    run.training_losses(model, draws)
    means = []
    for stage, maps in zip(step["stages"], seen.values(), strict=True):
        h = torch.stack(maps).double().numpy()
        assert len(h) == 3 and len(stage["blocks"]) == 3 and stage["channels"] == h.shape[2]
        pairs = [np.corrcoef(h[:, image])[np.triu_indices(3, 1)] for image in range(6)]
        assert stage["maps"]["mean"] == pytest.approx(np.mean(pairs), abs=1e-4)
        means.append(np.mean(pairs))
    assert step["mean"]["maps"] == pytest.approx(np.mean(means), abs=1e-4)  # as many pairs in each stage


def test_first_weights_of_batch_norm_are_looked_at_in_training_alone(tiny_classifier: Callable[[str], Path]) -> None:
    runs = open_runs([tiny_classifier("none"), tiny_classifier("se")])
    assert runs[1].with_first(None) == [2, 4] and runs[1].with_first([0, 2]) == [0, 2]
    records = [gradients_of_run(run, num_batches=2) for run in runs]
    for record in records:
        assert [step["step"] for step in record["steps"]] == [0, 2, 4]
        blocks = record["steps"][0]["blocks"]
        assert [block["block"] for block in blocks if block["ends_stage"]] == ["1.3", "2.3", "3.3"]
        assert all(block["mean"] > 0 for block in blocks)
    with pytest.raises(InputError, match="no classifier of step 3; accepted: 2, 4"):
        runs[0].model(3)


def test_maps_and_ablations_of_stages(tiny_classifier: Callable[[str], Path]) -> None:
    (run,) = open_runs([tiny_classifier("block-channels")])
    record = maps_of_run(run, [4], Coverage(30, 16))
    last = record["steps"][0]
    expected = [float(row.mean()) for unit in run.model(4).attention_units for row in unit.scale]
    assert last["mean_by_block"] == pytest.approx(expected, rel=1e-4) and len(expected) == 9
    assert last["shares"]["times"] == 0 and last["shares"]["images"] < 1e-6
    assert [len(stage["blocks"]) for stage in record["stages"]] == [3, 3, 3] and not record["has_times"]
    assert len(last["classes"]["names"]) <= 10
    (step,) = ablations_of_run(run, [4], Coverage(4, 16))["steps"]
    own = step["losses"]["own"]["loss"]
    assert abs(step["losses"]["h by block, channel"]["difference"]) < 1e-5 * own  # a control is its own mean
    assert abs(step["losses"]["h by block"]["difference"]) > 1e-6 * own


def test_the_commands_write_figures_and_numbers(
    tiny_classifier: Callable[[str], Path],
    tiny_run: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importance, "TREES", 5)
    run, few = str(tiny_classifier("se")), ["--out", str(tmp_path), "--images", "8", "--times", "2"]
    assert main(["analyze", "importance", run, *few, "--steps", "4", "--samples", "100"]) == 0
    stages = json.loads((tmp_path / "importance.json").read_text())["runs"][0]["steps"][0]["stages"]
    assert [stage["name"] for stage in stages] == ["stage 1", "stage 2", "stage 3"]
    # Runs of both kinds in one figure.
    for name in ("maps", "correlation"):
        assert main(["analyze", name, run, str(tiny_run("dia-lstm")), *few]) == 0
        assert Image.open(tmp_path / f"{name}.png").size[0] > 500
    assert main(["analyze", "linearity", run, *few]) == 2
