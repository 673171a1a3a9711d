"""The training loop: comparison with brute force, and refused settings."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dia_diffusion import UViT, UViTPipeline
from dia_diffusion.data import open_images
from dia_diffusion.errors import InputError
from dia_diffusion.training.diffusion import DiffusionTask
from dia_diffusion.training.randomness import WEIGHTS, StepDraws, derive, draw_step
from dia_diffusion.training.task import DrawAhead
from dia_diffusion.training.trainer import Trainer
from tests.training.conftest import FLOW, Recorder
from tests.training.run_files import assert_same_run, assert_same_tensors, metrics, weights


def test_losses_and_weights_equal_a_plain_loop(finished) -> None:
    """Six steps written out with only the draws of the trainer: loss, AdamW, warm-up, average."""
    run = finished("run")
    torch.manual_seed(derive(0, WEIGHTS))
    model = UViT(sample_size=8, in_channels=1, patch_size=4, hidden_size=16, num_layers=3, num_attention_heads=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.99, 0.999), weight_decay=0.03)
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.from_numpy(np.array(open_images("digits", size=8, channels=1).images))
    losses = []
    for step in range(6):
        draws = draw_step(0, step, 8, len(images), (1, 8, 8))
        x = images[draws.indices].float() / 127.5 - 1
        x[draws.flips] = x[draws.flips].flip(-1)
        integral = 0.1 * draws.uniform + 19.9 * draws.uniform**2 / 2
        alpha = torch.exp(-integral / 2)[:, None, None, None]
        sigma = (1 - alpha**2).sqrt()
        loss = (model(alpha * x + sigma * draws.noise, 999 * draws.uniform).sample - draws.noise).square().mean()
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for name, tensor in model.state_dict().items():
            average[name] = 0.9999 * average[name] + 0.0001 * tensor
    assert [line["loss"] for line in metrics(run)] == pytest.approx(losses, rel=1e-4)
    trained, averaged = weights(run, 6), weights(run, 6, "ema")
    assert all(torch.allclose(trained[name], tensor, atol=1e-5) for name, tensor in model.state_dict().items())
    assert all(torch.allclose(averaged[name], tensor, atol=1e-6) for name, tensor in average.items())


SPLITS = {
    "DIA-LSTM": ((), ("2", "4", "8")),
    "block-channels, flow, dropped branches": (
        (*FLOW, "--model.attention", "block-channels", "--model.drop_path", "0.5"),
        ("4",),
    ),
}


@pytest.mark.parametrize(("options", "splits"), SPLITS.values(), ids=SPLITS)
def test_accumulation_trains_the_same_in_float64(
    options: tuple[str, ...], splits: tuple[str, ...], in_float64, tiny, train, tmp_path: Path
) -> None:
    for accumulation in ("1", *splits):
        train(tiny(accumulation, "--train.accumulation", accumulation, *options))
    losses = [line["loss"] for line in metrics(tmp_path / "1")]
    for name in ("model", "ema"):
        expected = weights(tmp_path / "1", 6, name)
        assert next(iter(expected.values())).dtype == torch.float64
        for accumulation in splits:
            split = weights(tmp_path / accumulation, 6, name)
            assert max(float((expected[key] - split[key]).abs().max()) for key in expected) < 1e-9
            found = [line["loss"] for line in metrics(tmp_path / accumulation)]
            assert found == pytest.approx(losses, rel=1e-9)


def test_the_unit_has_its_own_rate(tiny, train, tmp_path: Path) -> None:
    """The first AdamW step moves a parameter by about its learning rate, whatever the gradient."""
    own = ("--optimizer.unit_learning_rate", "1e-5", "--optimizer.weight_decay", "0")
    # All 4 neurons of a narrower bottleneck can be dead, and their weights then get no gradient.
    own += ("--model.attention_kwargs.reduction", "1")
    train(tiny("run", *own, "--train.max_steps", "1", "--optimizer.warmup_steps", "2"))
    torch.manual_seed(derive(0, WEIGHTS))
    sizes = {"sample_size": 8, "in_channels": 1, "patch_size": 4, "hidden_size": 16, "num_layers": 3}
    first = UViT(**sizes, num_attention_heads=2, attention_kwargs={"reduction": 1})
    trained = weights(tmp_path / "run", 1)
    moved = {name: float((trained[name] - tensor).abs().max()) for name, tensor in first.state_dict().items()}
    assert moved.pop("decoder.weight") == pytest.approx(0.5e-3, rel=0.05)
    of_unit = [distance for name, distance in moved.items() if name.startswith("unit.")]
    assert len(of_unit) == 8 and all(distance == pytest.approx(0.5e-5, rel=0.05) for distance in of_unit)


def test_a_unit_rate_equal_to_the_common_rate_changes_nothing(finished) -> None:
    assert_same_run(finished("common"), finished("own", "--optimizer.unit_learning_rate", "1e-3"))


def test_a_rate_for_a_unit_without_parameters_is_refused(tiny) -> None:
    with pytest.raises(InputError, match="must be null for the unit 'fixed-scale'"):
        Trainer(tiny("run", "--model.attention", "fixed-scale", "--optimizer.unit_learning_rate", "1e-3"), Recorder())


def test_average_warm_up(tiny, tmp_path: Path) -> None:
    trainer = Trainer(tiny("run", "--ema.warmup", "true", "--ema.decay", "0.25"), Recorder())
    kept = []
    trainer.progress.at_step = lambda step: kept.append(trainer.model.state_dict()["pos_embed"].clone())
    first = trainer.model.state_dict()["pos_embed"].clone()
    trainer.run()
    average = first
    for n, tensor in enumerate(kept, start=1):
        decay = min(0.25, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * tensor
    assert torch.allclose(weights(tmp_path / "run", 6, "ema")["pos_embed"], average, atol=1e-6)


def test_run_folder_holds_what_it_should(finished) -> None:
    grids = ("--train.sample_every", "3", "--samples.count", "4", "--samples.steps", "3")
    run = finished("run", *grids, "--train.keep_last", "1")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000006"]
    assert sorted(path.name for path in (run / "pipelines").iterdir()) == ["step-00000003", "step-00000006"]
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step-00000003.png", "step-00000006.png"]
    assert metrics(run)[-1].keys() == {"step", "images", "loss", "grad_norm", "lr", "skipped_steps"}
    folder = run / "pipelines" / "step-00000006"
    average, saved = weights(run, 6, "ema"), UViTPipeline.from_pretrained(folder).unet.state_dict()
    assert all(torch.equal(average[key], saved[key]) for key in average)
    card = (folder / "README.md").read_text()
    assert "dia-lstm" in card and "samples.png" in card and "learning_rate: 0.001" in card
    assert (folder / "samples.png").is_file()


def test_a_process_draws_only_its_own_share_and_the_next_step_ahead(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, real = [], DiffusionTask.draw

    def draw(self: DiffusionTask, step: int, start: int, stop: int) -> StepDraws:
        drawn.append((step, start, stop, threading.current_thread() is threading.main_thread()))
        return real(self, step, start, stop)

    monkeypatch.setattr(DiffusionTask, "draw", draw)
    trainer = Trainer(tiny("run", "--train.accumulation", "2"), Recorder())
    trainer.folder.unlock()
    for step in range(6):
        trainer._draw(step)
    assert drawn == [(step, 0, 8, True) for step in range(6)], "on a CPU"

    drawn.clear()
    second = DrawAhead(trainer.task.draw, 4, 8)  # the second of two processes, each with a GPU
    for step in (0, 1, 2, 4, 5):
        draws = second.draw(step, then_next=step < 5)
        expected = draw_step(0, step, 8, len(trainer.images), (1, 8, 8)).slice(4, 8)
        assert torch.equal(draws.noise, expected.noise) and np.array_equal(draws.indices, expected.indices)
    second.thread.shutdown()
    here = [(0, 4, 8, True), (4, 4, 8, True)]  # the first step, and one that is not the next
    assert sorted(drawn) == sorted([*here, *((step, 4, 8, False) for step in (1, 2, 3, 5))])


def test_only_networks_with_stochastic_depth_draw_for_it(tiny) -> None:
    for options, expected in (((), None), (("--model.drop_path", "0.5"), (3, 3, 2))):
        task = DiffusionTask(tiny("run", *options))
        task.images = type("Images", (), {"shape": (1, 8, 8), "__len__": lambda self: 100})()
        draws, plain = task.draw(2, 1, 4), draw_step(0, 2, 8, 100, (1, 8, 8), 1, 4)
        assert torch.equal(draws.noise, plain.noise) and torch.equal(draws.uniform, plain.uniform)
        assert (None if draws.depth is None else draws.depth.shape) == expected


def test_class_conditional_training_drops_labels(tiny) -> None:
    """The label embedding receives the images' labels, some of them replaced by the null label."""
    options = ("--model.num_classes", "10", "--data.label_dropout", "0.25", "--train.batch_size", "64")
    digits = open_images("digits", size=8, channels=1)
    expected = []
    for step in range(6):
        draws = draw_step(0, step, 64, len(digits), (1, 8, 8))
        labels = digits.labels[draws.indices].tolist()
        expected.append([10 if u < 0.25 else k for u, k in zip(draws.drop_label.tolist(), labels, strict=True)])
    trainer = Trainer(tiny("run", *options), Recorder())
    seen: list[list[int]] = []
    trainer.model.label_embed.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].tolist()))
    trainer.run()
    assert seen == expected
    assert 0.2 < np.mean(np.array(expected) == 10) < 0.3 and set(np.unique(expected)) == set(range(11))


def test_grids_of_classes(finished) -> None:
    """Each column is one class, drawn with guidance like the pipeline's own call for that seed and class."""
    by_class = ("--model.num_classes", "10", "--data.label_dropout", "0.1", "--optimizer.learning_rate", "0.01")
    grids = ("--train.sample_every", "6", "--samples.count", "20", "--samples.steps", "3")
    guidance = ["--samples.guidance_scale", "4", "--samples.guidance_interval", "[0.3, 50]"]
    run = finished("run", *by_class, *grids, *guidance)
    folder = run / "pipelines" / "step-00000006"
    pipeline = UViTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    grid = np.asarray(Image.open(run / "samples" / "step-00000006.png"))
    scale = gap = 6  # 512 / (10 * 8)
    for seed in (0, 3, 9, 10, 17):
        row, column = divmod(seed, 10)
        cell = grid[row * (8 * scale + gap) :: scale, column * (8 * scale + gap) :: scale][:8, :8]
        options = {"num_inference_steps": 3, "guidance_scale": 4, "guidance_interval": (0.3, 50), "output_type": "np"}
        image = pipeline(generator=torch.Generator().manual_seed(seed), class_labels=seed % 10, **options).images[0]
        assert np.abs(cell - 255 * image[:, :, 0]).max() <= 1
    assert json.loads((folder / "training.json").read_text())["data"]["class_names"] == list("0123456789")
    card = (folder / "README.md").read_text()
    assert "A 10-class UViT" in card and "in their order: 0 0, 1 1, 2 2" in card


def test_bf16_trains_and_keeps_float32_weights(tiny, train, tmp_path: Path) -> None:
    train(tiny("run", "--train.mixed_precision", "bf16"))
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "run", 6).values())
    assert all(np.isfinite(line["loss"]) for line in metrics(tmp_path / "run"))


def test_a_grid_that_can_not_be_drawn_costs_neither_pipeline_nor_checkpoint(
    tiny, train, finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = finished("whole")
    monkeypatch.setattr(UViTPipeline, "_to_images", lambda self, sample: sample * float("nan"))
    trainer = train(tiny("run", "--train.sample_every", "3", "--samples.steps", "2"))
    said = [message for message in trainer.progress.messages if "no grid" in message]
    assert [message[:6] for message in said] == ["step 3", "step 6"] and "is not finite" in said[0]
    assert (tmp_path / "run" / "pipelines" / "step-00000006").is_dir()
    assert not list((tmp_path / "run" / "samples").glob("*"))
    assert_same_tensors(whole, tmp_path / "run")


def test_datasets_without_classes_are_refused(tiny, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((10, 8, 8), dtype=np.uint8))
    with pytest.raises(InputError, match="has no classes"):
        Trainer(tiny("run", "--model.num_classes", "10", "--data.source", str(tmp_path / "images.npy")), Recorder())
    with pytest.raises(InputError, match="has 10 classes"):
        Trainer(tiny("run2", "--model.num_classes", "3"), Recorder())
