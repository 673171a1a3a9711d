"""`sample` and `fid` with pipelines saved by diffusers."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiTPipeline, ScoreSdeVePipeline, ScoreSdeVeScheduler

from dia_diffusion import UViT, UViTPipeline
from dia_diffusion.cli.main import main
from dia_diffusion.evaluation.record import read_records
from dia_diffusion.pipelines.folder import model_hash, weights_hash
from dia_diffusion.training.config import DataConfig, Experiment, ModelConfig
from dia_diffusion.training.recipe import resolve
from tests.cli.one_line import error_of
from tests.sampling.tiny_models import small_dit, small_unet, small_vae


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines")
    made = {
        "pixels": DDPMPipeline(unet=small_unet(), scheduler=DDPMScheduler()),
        "wide": DDPMPipeline(unet=small_unet(sample_size=(8, 16)), scheduler=DDPMScheduler()),
        "classes": DDPMPipeline(unet=small_unet(num_class_embeds=4), scheduler=DDPMScheduler()),
        "latents": DiTPipeline(small_dit(num_classes=3), small_vae(), DDIMScheduler()),
        "sde": ScoreSdeVePipeline(unet=small_unet(), scheduler=ScoreSdeVeScheduler()),
    }
    for name, pipeline in made.items():
        pipeline.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize(
    ("name", "options", "recorded"),
    [
        ("pixels", [], ("dpmsolver++", {"use_lu_lambdas": True, "solver_order": 2}, None, 1.0)),
        ("classes", ["--classes", "2,0"], ("dpmsolver++", {"use_lu_lambdas": True, "solver_order": 2}, "2,0", 1.0)),
        (
            "latents",
            ["--sampler", "ddpm", "--guidance-scale", "2"],
            ("ddpm", {"timestep_spacing": "trailing", "clip_sample": False}, "0,1,2", 2.0),
        ),
        ("sde", ["--sampler", "own"], ("own", {"class": "ScoreSdeVeScheduler"}, None, 1.0)),
    ],
)
def test_fid_measures_the_images_that_sample_writes(
    name: str, options: list[str], recorded: tuple[object, ...], pipelines: Path, tmp_path: Path
) -> None:
    options = [*options, "--steps", "2"]
    out, file = tmp_path / "images", tmp_path / "records.jsonl"
    measured = ["--reference", "digits", "--record", str(file)]
    assert main(["fid", str(pipelines / name), *options, "--num", "8", *measured]) == 0
    assert main(["sample", str(pipelines / name), *options, "--seeds", "0-7", "--out", str(out)]) == 0
    manifest = json.loads((out / "samples.json").read_text())
    assert manifest["weights"] == weights_hash(pipelines / name) and manifest["model"] == model_hash(pipelines / name)
    assert main(["fid", str(out), *measured]) == 0
    stream, files = read_records(file)
    assert stream.distance == pytest.approx(files.distance, rel=1e-3)
    assert stream.protocol.reference_shape == (3, 8, 8)
    sampler, scheduler, labels, scale = recorded
    assert isinstance(scheduler, dict) and stream.protocol.scheduler is not None
    assert stream.protocol.sampler == sampler and scheduler.items() <= stream.protocol.scheduler.items()
    assert (stream.protocol.class_labels, stream.protocol.guidance_scale) == (labels, scale)
    assert (stream.source, stream.run, stream.protocol.weights) == (name, None, None)


def test_one_protocol_for_this_projects_pipelines_and_others(pipelines: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = UViT(sample_size=8, patch_size=4, hidden_size=32, num_layers=3, num_attention_heads=2)
    UViTPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(tmp_path / "ours")
    file = tmp_path / "records.jsonl"
    common = ["--steps", "2", "--reference", "digits", "--num", "8", "--record", str(file)]
    for folder in (tmp_path / "ours", pipelines / "pixels", pipelines / "pixels"):
        assert main(["fid", str(folder), *common]) == 0
    ours, theirs = read_records(file)  # the second "pixels" was already on record
    assert ours.protocol == theirs.protocol and ours.weights_hash != theirs.weights_hash


def test_guidance_needs_a_null_label_that_was_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unet = UViT(sample_size=8, patch_size=4, hidden_size=32, num_layers=3, num_attention_heads=2, num_classes=3)
    UViTPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(tmp_path / "ours")
    arguments = ["sample", str(tmp_path / "ours"), "--seeds", "0", "--steps", "2", "--guidance-scale", "3"]
    for dropout, code in ((0.0, 2), (0.1, 0)):
        recipe = resolve(Experiment(data=DataConfig(label_dropout=dropout), model=ModelConfig(num_classes=3))).to_dict()
        training = {"run": "r", "step": 1, "images": 8, "weights": "ema", "recipe": recipe, "init_from": None}
        data = {"name": "digits", "split": "train", "count": 9, "fingerprint": "0", "class_names": None}
        (tmp_path / "ours" / "training.json").write_text(json.dumps({**training, "data": data}))
        assert main([*arguments, "--grid", str(tmp_path / "grid.png")]) == code
        assert ("and so without a null label" in capsys.readouterr().err) is (code == 2)


def test_what_does_not_fit_is_one_line(pipelines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompted = tmp_path / "prompted"
    prompted.mkdir()
    index = {"_class_name": "StableDiffusionPipeline", "tokenizer": ["transformers", "CLIPTokenizer"]}
    (prompted / "model_index.json").write_text(json.dumps(index))
    grid = ["--grid", tmp_path / "grid.png"]
    for arguments, said in (
        (["sample", prompted, *grid], "a StableDiffusionPipeline, which needs a prompt"),
        (["fid", prompted, "--reference", "digits"], "which needs a prompt"),
        (["sample", pipelines / "latents", "--classes", "3", *grid], "`classes` must be one or more of 0 to 2"),
        (["sample", pipelines / "classes", "--guidance-scale", "2", *grid], "without a null label"),
        (["sample", pipelines / "sde", *grid], "`sampler` must be own"),
        (["fid", pipelines / "wide", "--reference", "digits"], "must have square images, got 8x16"),
    ):
        assert said in error_of(arguments, capsys)
    assert not (tmp_path / "grid.png").exists()
