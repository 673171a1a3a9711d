import json
import shutil

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    LDMPipeline,
    PNDMPipeline,
    PNDMScheduler,
    ScoreSdeVePipeline,
    ScoreSdeVeScheduler,
)
from safetensors.torch import save_file

from dia_diffusion import UViTPipeline
from dia_diffusion.errors import InputError
from dia_diffusion.io import sha256_of_file
from dia_diffusion.noise import NoiseProcess
from dia_diffusion.pipelines.folder import find_pipeline, model_hash, weights_hash
from dia_diffusion.sampling.euler_maruyama import EulerMaruyamaScheduler
from dia_diffusion.sampling.generate import adapt_pipeline
from dia_diffusion.sampling.load import load_pipeline
from dia_diffusion.sampling.samplers import OWN_SAMPLER, SamplingSettings
from tests.sampling.tiny_models import small_dit, small_unet, small_vae, small_vqvae

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


def saved(pipeline, folder, **kwargs):
    pipeline.save_pretrained(folder, **kwargs)
    return folder


def dit_folder(folder, **kwargs):
    pipeline = DiTPipeline(transformer=small_dit(num_classes=3), vae=small_vae(), scheduler=DDIMScheduler())
    return saved(pipeline, folder, **kwargs)


def rewritten(file, change):
    """Changes a JSON file."""
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def image_of(folder, **settings):
    settings = SamplingSettings(OWN_SAMPLER, 3, **settings)
    return adapt_pipeline(load_pipeline(folder), settings).draw([0])


def test_loads_diffusers_pipelines(tmp_path, capfd):
    theirs = [
        DDPMPipeline(unet=small_unet(), scheduler=DDPMScheduler()),
        PNDMPipeline(unet=small_unet(), scheduler=PNDMScheduler()),
        LDMPipeline(unet=small_unet(), vqvae=small_vqvae(), scheduler=DDIMScheduler()),
        DiTPipeline(small_dit(), small_vae(), DDIMScheduler()),
        ConsistencyModelPipeline(unet=small_unet(), scheduler=CMStochasticIterativeScheduler()),
        ScoreSdeVePipeline(unet=small_unet(), scheduler=ScoreSdeVeScheduler()),
    ]
    capfd.readouterr()
    for index, pipeline in enumerate(theirs):
        loaded = load_pipeline(saved(pipeline, tmp_path / str(index)), dtype=torch.float64)
        assert type(loaded) is type(pipeline)
        assert type(loaded.scheduler) is type(pipeline.scheduler)
        for name, part in pipeline.components.items():
            if name == "scheduler":
                continue
            ours = getattr(loaded, name)
            assert ours.dtype == (torch.float64 if name in ("unet", "transformer") else torch.float32)
            for key, tensor in part.state_dict().items():
                assert torch.equal(ours.state_dict()[key], tensor.to(ours.dtype))
    out, err = capfd.readouterr()
    assert (out, "it/s" in err) == ("", False)


def test_loads_early_pipelines_without_subfolders_and_with_old_tensor_names(tmp_path):
    unet = small_unet(add_attention=True)
    folder = saved(DDPMPipeline(unet=unet, scheduler=DDPMScheduler()), tmp_path / "new")
    expected = image_of(folder)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in unet.state_dict().items():
        for new, former in old.items():
            name = name.replace(f".{new}.", f".{former}.")
        state[name] = tensor.contiguous()
    assert "mid_block.attentions.0.query.weight" in state
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    for part in ("unet", "scheduler"):
        for file in (folder / part).iterdir():
            file.rename(folder / file.name)
        (folder / part).rmdir()
    torch.testing.assert_close(image_of(folder), expected)
    assert weights_hash(folder) == sha256_of_file(folder / "diffusion_pytorch_model.safetensors")


def test_loads_a_dit_as_the_published_one_is(tmp_path):
    folder = dit_folder(tmp_path / "dit")
    expected = image_of(folder, guidance_scale=2.0)
    published = {"transformer": ["diffusers", "Transformer2DModel"], "id2label": {"0": "tench, Tinca tinca"}}
    rewritten(folder / "model_index.json", lambda index: index.update(published))
    rewritten(
        folder / "transformer" / "config.json",
        lambda config: config.update(_class_name="Transformer2DModel", norm_type="ada_norm_zero"),
    )
    torch.testing.assert_close(image_of(folder, guidance_scale=2.0), expected)
    assert load_pipeline(folder).labels == {"tench": 0, "Tinca tinca": 0}


def test_shards_are_one_model(tmp_path):
    whole, sharded = dit_folder(tmp_path / "whole"), dit_folder(tmp_path / "sharded", max_shard_size="20KB")
    shards = sorted((sharded / "transformer").glob("*.safetensors"))
    assert len(shards) > 1
    torch.testing.assert_close(image_of(sharded), image_of(whole))
    before = weights_hash(sharded)
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    assert before != weights_hash(sharded)
    assert "truncated or not safetensors" in refusal(sharded)
    shards[0].unlink()
    assert refusal(sharded) == f"weights must be safetensors: {shards[0]} is missing"


def test_the_hash_is_over_all_weights(tmp_path):
    hashes = {weights_hash(dit_folder(tmp_path / "a")), weights_hash(dit_folder(tmp_path / "b"))}
    assert len(hashes) == 1
    other = small_vae()
    other.decoder.conv_out.bias.data += 1
    other.save_pretrained(tmp_path / "b" / "vae")
    assert weights_hash(tmp_path / "b") not in hashes
    (tmp_path / "b" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert "vae/diffusion_pytorch_model.safetensors is missing" in refusal(tmp_path / "b")


def test_the_model_hash_also_covers_configurations(tmp_path):
    a, b = dit_folder(tmp_path / "a"), dit_folder(tmp_path / "b")
    first, weights = model_hash(a), weights_hash(a)
    rewritten(b / "vae" / "config.json", lambda config: config.update(_diffusers_version="0", _name_or_path="x"))
    assert model_hash(b) == first
    seen = {first}
    for file, changes in (
        ("vae/config.json", {"scaling_factor": 0.5}),
        ("scheduler/scheduler_config.json", {"beta_end": 0.03}),
        ("transformer/config.json", {"num_attention_heads": 9}),
        ("model_index.json", {"_class_name": "OtherPipeline"}),
    ):
        rewritten(b / file, lambda config, changes=changes: config.update(changes))
        seen.add(model_hash(b))
    assert len(seen) == 5 and weights_hash(b) == weights
    (b / "vae" / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"vae/config\.json can't be read"):
        model_hash(b)


def test_a_folder_that_carries_this_projects_code_runs_the_package_instead(folder, tiny_pipeline):
    (folder / "pipeline_x.py").write_text("raise SystemExit('run')")
    (folder / "unet" / "model_x.py").write_text("raise SystemExit('run')")
    (folder / "scheduler" / "scheduler_x.py").write_text("raise SystemExit('run')")
    scheduler = EulerMaruyamaScheduler(**NoiseProcess(prediction_type="sample").scheduler_config())
    scheduler.save_pretrained(folder / "scheduler")

    def with_code(index):
        index["_class_name"] = ["pipeline_x", "UViTPipeline"]
        index["unet"] = ["model_x", "UViT"]
        index["scheduler"] = ["scheduler_x", "EulerMaruyamaScheduler"]

    rewritten(folder / "model_index.json", with_code)
    loaded = load_pipeline(folder)
    assert type(loaded) is UViTPipeline and type(loaded.scheduler) is EulerMaruyamaScheduler
    settings = SamplingSettings(steps=3)
    original = adapt_pipeline(tiny_pipeline(), settings)
    torch.testing.assert_close(adapt_pipeline(loaded, settings).draw([0]), original.draw([0]))


def test_a_run_gives_its_newest_whole_pipeline(run_folder):
    assert find_pipeline(run_folder).name == "step-00010000"
    assert find_pipeline(run_folder, step=900).name == "step-00000900"
    assert isinstance(load_pipeline(run_folder, step=1000), UViTPipeline)
    assert refusal(run_folder, step=5).endswith("must be one of 900, 1000, 10000, got 5")


def test_paths_that_hold_no_pipeline(folder, tmp_path):
    assert "nowhere does not exist" in refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "neither a pipeline folder" in refusal(tmp_path / "empty")
    assert "has no step 3" in refusal(folder, step=3)


DIFFUSERS = ["diffusers", "UNet2DModel"]


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (
            {"_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"]},
            "a StableDiffusionPipeline, which needs a prompt",
        ),
        (
            {"_class_name": "StableVideoDiffusionPipeline", "image_encoder": ["transformers", "CLIPVisionModel"]},
            "which needs an input image",
        ),
        ({"_class_name": "RePaintPipeline", "unet": DIFFUSERS}, "which needs image and mask_image"),
        ({"_class_name": "DanceDiffusionPipeline", "unet": DIFFUSERS}, "which draws no images"),
        ({"_class_name": "UNet2DModel"}, "which draws no images"),
        ({"_class_name": "GANPipeline"}, "a GANPipeline, which is not a class of diffusers"),
        ({"_class_name": 3}, "a 3, which is not a class of diffusers"),
        ({"_class_name": ["my_pipeline", "MyPipeline"]}, "a MyPipeline, custom code, which is never run"),
        ({"_class_name": "DDPMPipeline", "unet": ["os", "system"]}, "the unet of"),
        ({"_class_name": "DDPMPipeline", "unet": ["diffusers", "DDPMPipeline"]}, "got a diffusers.DDPMPipeline"),
        ({"_class_name": "DDPMPipeline", "unet": ["my_unet", "MyUNet"]}, "must be a model or scheduler of diffusers"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value.get("_class_name")),
)
def test_refusals_of_other_pipelines_say_what_they_need(index, said, folder):
    (folder / "model_index.json").write_text(json.dumps(index))
    assert said in refusal(folder)


def test_a_part_that_is_missing(tmp_path, tiny_pipeline):
    folder = dit_folder(tmp_path / "dit")
    rewritten(folder / "model_index.json", lambda index: index.pop("vae"))
    assert "can't be loaded" in refusal(folder)
    rewritten(folder / "model_index.json", lambda index: index.update(vae=["diffusers", "UNet2DModel"]))
    refusal(folder)
    folder = saved(DDPMPipeline(unet=small_unet(), scheduler=DDPMScheduler()), tmp_path / "ddpm")
    rewritten(folder / "model_index.json", lambda index: index.update(scheduler=[None, None]))
    with pytest.raises(InputError, match="must have a scheduler, got a DDPMPipeline without one"):
        adapt_pipeline(load_pipeline(folder), SamplingSettings())
    shutil.rmtree(folder / "scheduler")
    rewritten(folder / "model_index.json", lambda index: index.update(scheduler=["diffusers", "DDPMScheduler"]))
    refusal(folder)
    folder = saved(tiny_pipeline(), tmp_path / "uvit")
    rewritten(folder / "model_index.json", lambda index: index.update(unet=[None, None]))
    with pytest.raises(InputError, match=r"unet of a UViTPipeline must be a UViT or .*, got a NoneType"):
        adapt_pipeline(load_pipeline(folder), SamplingSettings())


@pytest.mark.parametrize(
    "change",
    [
        *({"attention": None}, {"attention": "lstm"}, {"num_layers": 5}, {"hidden_size": 64}, {"num_layers": 4}),
        {"attention_kwargs": {"num_cells": 10**9}},  # would be built one by one
    ],
    ids=str,
)
def test_weights_of_another_model(change, folder):
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, **change}))
    refusal(folder)


def test_other_tensor_shapes_and_quantization_are_refused_in_one_line(tmp_path):
    folder = saved(DDPMPipeline(unet=small_unet(), scheduler=DDPMScheduler()), tmp_path / "ddpm")
    config = folder / "unet" / "config.json"
    kept = config.read_text()
    rewritten(config, lambda config: config.update(block_out_channels=[8, 8]))
    assert "its tensors have other shapes" in refusal(folder)
    config.write_text(kept)
    rewritten(config, lambda config: config.update(quantization_config={"quant_method": "quanto"}))
    assert "must have no quantization_config" in refusal(folder)
