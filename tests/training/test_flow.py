"""Training by flow matching: runs, their pipeline folders, and runs that start from them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from dia_diffusion import UViTPipeline
from dia_diffusion.errors import InputError
from dia_diffusion.pipelines.folder import model_hash
from dia_diffusion.sampling.generate import adapt_pipeline, generate
from dia_diffusion.sampling.load import load_pipeline
from dia_diffusion.sampling.samplers import SamplingSettings
from dia_diffusion.training.randomness import draw_step
from dia_diffusion.training.trainer import Trainer
from tests.training.conftest import FLOW
from tests.training.run_files import metrics


@pytest.mark.parametrize("prediction_type", ["velocity", "sample"])
def test_a_pipeline_folder_is_diffusers(prediction_type: str, finished, tmp_path: Path) -> None:
    folder = finished("run", *FLOW, "--noise.prediction_type", prediction_type) / "pipelines" / "step-00000006"
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


def test_the_model_hash_depends_on_the_prediction_type(finished) -> None:
    folder = finished("run", *FLOW) / "pipelines" / "step-00000006"
    before, file = model_hash(folder), folder / "model_index.json"
    file.write_text(file.read_text().replace('"sample"', '"velocity"'))
    assert model_hash(folder) != before


def test_the_loss_is_the_velocitys_mean_squared_error(tiny, tmp_path: Path) -> None:
    """The first step's loss, for x_t = (1 - t) x + t noise at shifted logit-normal times."""
    trainer = Trainer(tiny("run", *FLOW, "--noise.prediction_type", "velocity"))
    draws = draw_step(0, 0, 8, len(trainer.images), (1, 8, 8))
    x = torch.from_numpy(trainer.images.read(draws.indices)).float() / 127.5 - 1
    x[draws.flips] = x[draws.flips].flip(-1)
    drawn = (torch.special.ndtri(draws.uniform.double()) - 0.5).sigmoid()
    time = (2 * drawn / (1 + drawn)).float()
    t = time[:, None, None, None]
    velocity = trainer.model((1 - t) * x + t * draws.noise, 1000 * time).sample
    expected = (velocity - (draws.noise - x)).square().mean().item()
    trainer.run()
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_start_from_another_process_is_refused(finished, tiny: Callable) -> None:
    start = ("--init_from", str(finished("source", *FLOW)))
    Trainer(tiny("same", *FLOW, *start))
    times = ("--noise.times", "uniform", "--noise.shift", "1", "--noise.times_kwargs", "null")
    for key, there, here in (("prediction_type", "sample", "velocity"), ("schedule", "flow", "cosine")):
        with pytest.raises(InputError, match=rf"`noise\.{key}` must be '{there}' to match .*, got '{here}'"):
            Trainer(tiny("other", *FLOW, *times, *start, f"--noise.{key}", here))
