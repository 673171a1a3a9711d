"""Training by flow matching: runs, their pipeline folders, and runs that start from them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from dia_diffusion import UViTPipeline
from dia_diffusion.data import open_images
from dia_diffusion.errors import InputError
from dia_diffusion.pipelines.folder import model_hash
from dia_diffusion.sampling.generate import adapt_pipeline, generate
from dia_diffusion.sampling.load import load_pipeline
from dia_diffusion.sampling.samplers import SamplingSettings
from dia_diffusion.training.trainer import Trainer
from tests.training.run_files import assert_same_run, metrics

FLOW = ("--noise.schedule", "flow", "--noise.prediction_type", "sample", "--noise.times", "logit-normal")
FLOW += ("--noise.times_kwargs.mean", "-0.5", "--noise.shift", "2")


def test_a_run_resumes_bit_for_bit(tiny, train, tmp_path: Path) -> None:
    train(tiny("whole", *FLOW))
    cut = shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(cut / "checkpoints" / "step-00000006")
    train(tiny("cut", *FLOW))
    assert_same_run(cut, tmp_path / "whole")
    with pytest.raises(InputError, match=r"noise\.shift: 2.0 -> 1.0"):
        Trainer(tiny("cut", *FLOW, "--noise.shift", "1"))


def test_losses_do_not_depend_on_the_split(in_float64, tiny, train, tmp_path: Path) -> None:
    for accumulation in ("1", "4"):
        train(tiny(accumulation, *FLOW, "--train.accumulation", accumulation))
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("1", "4")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


@pytest.mark.parametrize("prediction_type", ["velocity", "sample"])
def test_a_pipeline_folder_is_diffusers(prediction_type: str, tiny, train, tmp_path: Path) -> None:
    train(tiny("run", *FLOW, "--noise.prediction_type", prediction_type))
    folder = tmp_path / "run" / "pipelines" / "step-00000006"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    assert FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler").config.shift == 2

    def drawn(pipeline: DiffusionPipeline) -> torch.Tensor:
        pipeline.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return pipeline(generator=generators, num_inference_steps=5, output_type="pt").images

    loaded = [kind.from_pretrained(folder) for kind in (DiffusionPipeline, UViTPipeline)]
    loaded.append(load_pipeline(folder))
    assert all(type(pipeline) is UViTPipeline for pipeline in loaded)
    images = drawn(loaded[0])
    assert all(torch.equal(drawn(pipeline), images) for pipeline in loaded[1:])
    for sampler in ("own", "euler"):
        ((_, ours),) = generate(adapt_pipeline(loaded[0], SamplingSettings(sampler, 5)), [1, 2])
        np.testing.assert_allclose(ours.float(), 255 * images, atol=1)
    loaded[0].save_pretrained(tmp_path / "again")
    assert model_hash(tmp_path / "again") == model_hash(folder)


def test_a_hash_of_a_model_tells_prediction_types_apart(tiny, train, tmp_path: Path) -> None:
    train(tiny("run", *FLOW))
    folder = tmp_path / "run" / "pipelines" / "step-00000006"
    before, file = model_hash(folder), folder / "model_index.json"
    file.write_text(file.read_text().replace('"sample"', '"velocity"'))
    assert model_hash(folder) != before


def test_digits_are_learned(tiny, train, tmp_path: Path) -> None:
    """The loss falls below that of the best constant velocity."""
    longer = ("--train.max_steps", "150", "--train.batch_size", "32", "--optimizer.learning_rate", "3e-3")
    every = ("--train.checkpoint_every", "150", "--model.hidden_size", "32")
    train(tiny("run", *FLOW[:2], "--noise.prediction_type", "velocity", *longer, *every))
    images = torch.from_numpy(open_images("digits", size=8, channels=1).read(range(1201))) / 127.5 - 1
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert np.mean(losses[-20:]) < 1 + float(images.var(dim=0).mean())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--noise.prediction_type", "velocity"), r"`noise\.prediction_type` must be 'sample', .* got 'velocity'"),
        (("--noise.schedule", "cosine"), r"`noise\.schedule` must be 'flow', .* got 'cosine'"),
    ],
)
def test_a_start_from_another_process_is_refused(
    changed: tuple[str, str], message: str, tiny: Callable, train: Callable, tmp_path: Path
) -> None:
    train(tiny("source", *FLOW))
    start = ("--init_from", str(tmp_path / "source"))
    Trainer(tiny("same", *FLOW, *start))
    times = ("--noise.times", "uniform", "--noise.shift", "1", "--noise.times_kwargs", "null")
    with pytest.raises(InputError, match=message):
        Trainer(tiny("other", *FLOW, *times, *start, *changed))
