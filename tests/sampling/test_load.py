import json
import pickle
import shutil

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from dia_diffusion import UViTPipeline
from dia_diffusion.errors import InputError
from dia_diffusion.files import sha256_of_file
from dia_diffusion.sampling.generate import generate
from dia_diffusion.sampling.load import find_pipeline, load_pipeline, weights_hash

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_pipeline, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.fixture
def run_folder(folder, tmp_path):
    pipelines = tmp_path / "run" / "pipelines"
    for step in ("00000900", "00001000", "00010000"):
        shutil.copytree(folder, pipelines / f"step-{step}")
    (pipelines / ".step-00020000.17.partial").mkdir()  # being written
    (pipelines / "step-00030000").mkdir()  # not a pipeline
    return tmp_path / "run"


def refusal(path, **kwargs):
    with pytest.raises(InputError) as error:
        load_pipeline(path, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_loads_what_was_saved(folder, tiny_pipeline, capfd):
    capfd.readouterr()
    loaded = load_pipeline(folder, dtype=torch.float64)
    assert capfd.readouterr() == ("", "")
    assert isinstance(loaded, UViTPipeline)
    assert loaded.unet.dtype == torch.float64
    assert not loaded.unet.training
    for name, tensor in tiny_pipeline().unet.state_dict().items():
        torch.testing.assert_close(loaded.unet.state_dict()[name], tensor.double(), rtol=0, atol=0)
    assert weights_hash(folder) == sha256_of_file(folder / WEIGHTS)


def test_loads_diffusers_pipelines(tmp_path):
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(tmp_path / "theirs")
    batches = list(generate(load_pipeline(tmp_path / "theirs"), [0], batch_size=1, num_inference_steps=2))
    assert batches[0][1].shape == (1, 3, 8, 8)


def test_a_run_gives_its_newest_whole_pipeline(run_folder):
    assert find_pipeline(run_folder).name == "step-00010000"
    assert find_pipeline(run_folder, step=900).name == "step-00000900"
    assert isinstance(load_pipeline(run_folder, step=1000), UViTPipeline)
    assert refusal(run_folder, step=5).endswith("accepted: 900, 1000, 10000")


def test_paths_that_hold_no_pipeline(folder, tmp_path):
    assert "nowhere does not exist" in refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "neither a pipeline folder" in refusal(tmp_path / "empty")
    assert "has no step 3" in refusal(folder, step=3)


@pytest.mark.parametrize("index", ["{", "[]", "{}"])
def test_index_of_nothing(index, folder):
    (folder / "model_index.json").write_text(index)
    assert "is not the index of a diffusers pipeline" in refusal(folder)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", ["pipeline_x", "UViTPipeline"]])
def test_pipelines_of_other_classes_are_named(name, folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
    assert str(name) in refusal(folder)


def test_weights_missing_cut_short_or_pickled(folder):
    whole = (folder / WEIGHTS).read_bytes()
    for cut in (whole[: len(whole) // 2], whole[:-1], b""):
        (folder / WEIGHTS).write_bytes(cut)
        assert "cut short or not safetensors" in refusal(folder)
    (folder / WEIGHTS).write_bytes(pickle.dumps({"weight": 1}))
    assert "cut short or not safetensors" in refusal(folder)
    (folder / WEIGHTS).unlink()
    assert refusal(folder).startswith(f"{folder / WEIGHTS} is missing; accepted")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"weight": 1}))
    assert "diffusion_pytorch_model.bin beside it is a pickle" in refusal(folder)


@pytest.mark.parametrize(
    "change",
    [{"attention": None}, {"attention": "lstm"}, {"num_layers": 5}, {"hidden_size": 64}, {"num_layers": 4}],
    ids=str,
)
def test_weights_of_another_model(change, folder):
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, **change}))
    refusal(folder)


def test_scheduler_missing(folder):
    shutil.rmtree(folder / "scheduler")
    refusal(folder)
