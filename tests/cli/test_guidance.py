"""`sample` and `fid` with a guidance interval and a guide, from folders to records."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import ScoreSdeVePipeline, ScoreSdeVeScheduler

from dia_diffusion import UViT, UViTPipeline
from dia_diffusion.cli.main import main
from dia_diffusion.evaluation.record import read_records
from dia_diffusion.noise import NoiseProcess
from dia_diffusion.pipelines.folder import model_hash, weights_hash
from dia_diffusion.sampling.samplers import build_scheduler
from tests.cli.one_line import error_of
from tests.sampling.tiny_models import small_unet

OPTIONS = ["--sampler", "ddim", "--steps", "4", "--guidance-scale", "3", "--guidance-interval", "0.3,8"]


def save_uvit(folder: Path, seed: int, schedule: str = "vp-continuous", hidden_size: int = 32) -> UViTPipeline:
    torch.manual_seed(seed)
    unet = UViT(
        sample_size=8, patch_size=4, hidden_size=hidden_size, num_layers=3, num_attention_heads=2, num_classes=3
    ).eval()
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pipeline = UViTPipeline(unet, NoiseProcess(schedule).build_scheduler())
    pipeline.save_pretrained(folder)
    return pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pipelines "ours"; "other" with steps 5 and 10; "cosine", of another noise process; "sde", with its own loop."""
    folder = tmp_path_factory.mktemp("guidance")
    save_uvit(folder / "ours", 0)
    for step in (5, 10):
        save_uvit(folder / "other" / "pipelines" / f"step-{step:08d}", step, hidden_size=16)
    save_uvit(folder / "cosine", 1, "cosine")
    ScoreSdeVePipeline(unet=small_unet(), scheduler=ScoreSdeVeScheduler()).save_pretrained(folder / "sde")
    return folder


def test_sample_by_a_guide(folders: Path, tmp_path: Path) -> None:
    """Same images as from the pipeline itself; the guide is step 5 of a run with a smaller network."""
    guide = folders / "other" / "pipelines" / "step-00000005"
    arguments = ["sample", str(folders / "ours"), "--seeds", "3-5", *OPTIONS, "--out", str(tmp_path / "out")]
    assert main([*arguments, "--guide", f"{folders / 'other'}:5"]) == 0
    ours, theirs = (UViTPipeline.from_pretrained(path) for path in (folders / "ours", guide))
    ours.scheduler = build_scheduler("ddim", ours.scheduler)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4, 5)]
    guidance = {"guidance_scale": 3.0, "guidance_interval": (0.3, 8.0), "guide": theirs}
    labels = {"class_labels": [0, 1, 2], "num_inference_steps": 4, "output_type": "np"}
    expected = ours(generator=generators, **labels, **guidance).images * 255
    assert main([*arguments[:-1], str(tmp_path / "out.npz"), "--guide", str(guide)]) == 0
    drawn = np.load(tmp_path / "out.npz")["images"]
    assert drawn.shape == expected.shape and np.abs(drawn - expected).max() <= 1.5

    manifest = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert manifest["guidance_interval"] == [0.3, 8.0]
    assert manifest["guide"] == {"weights_hash": weights_hash(guide), "model_hash": model_hash(guide)}
    assert main([*arguments, "--guide", str(folders / "other")]) == 2  # another guide gives other images
    plain = ["sample", str(folders / "ours"), "--seeds", "3", "--out", str(tmp_path / "plain")]
    assert main(plain) == 0
    assert not {"guide", "guidance_interval"} & json.loads((tmp_path / "plain" / "samples.json").read_text()).keys()


def test_fid_records_the_guide(folders: Path, tmp_path: Path, sampled: list[int]) -> None:
    """Options and protocol keys give the same measurement; another guide, or none, gives a different one."""
    guide, file = f"{folders / 'other'}:5", tmp_path / "records.jsonl"
    base = ["fid", str(folders / "ours"), "--reference", "digits", "--record", str(file)]
    common = [*base, "--num", "20"]
    assert main([*common, *OPTIONS, "--guide", guide]) == 0
    settings = {"features": "digits", "num_samples": 20, "sampler": "ddim", "steps": 4, "guidance_scale": 3}
    protocol = settings | {"guidance_interval": [0.3, 8], "guide": guide}
    (tmp_path / "guided.yaml").write_text(yaml.safe_dump(protocol))
    assert main([*base, "--protocol", str(tmp_path / "guided.yaml")]) == 0
    assert len(sampled) == 20
    assert main([*common, *OPTIONS, "--guide", str(folders / "other")]) == 0
    assert main([*common, *OPTIONS]) == 0
    assert main([*common, "--sampler", "ddim", "--steps", "4"]) == 0
    by_options, by_protocol, newer, by_label, plain = read_records(file)
    step = folders / "other" / "pipelines" / "step-00000005"
    assert by_options.protocol.guide == {"weights_hash": weights_hash(step), "model_hash": model_hash(step)}
    assert by_options.protocol.guidance_interval == [0.3, 8.0] and by_options.protocol_name is None
    assert (by_options.protocol, "guided") == (by_protocol.protocol, by_protocol.protocol_name)
    assert list(newer.protocol.differences(by_options.protocol)) == ["guide"]
    assert list(by_label.protocol.differences(by_options.protocol)) == ["guide"]
    assert len({each.protocol_hash() for each in (by_options, newer, by_label, plain)}) == 4
    written = [json.loads(line)["protocol"].keys() for line in file.read_text().splitlines()]
    assert [("guide" in keys, "guidance_interval" in keys) for keys in written] == [
        *[(True, True)] * 3,
        (False, True),
        (False, False),
    ]


def test_training_is_measured_with_a_guide(run: Path, tmp_path: Path, sampled: list[int]) -> None:
    settings = {"features": "digits", "num_samples": 20, "sampler": "ddim", "steps": 2, "reference_split": "test"}
    protocol = tmp_path / "guided.yaml"
    protocol.write_text(yaml.safe_dump({**settings, "guidance_scale": 2, "guide": f"{run}:3"}))
    train = ["train", "--config", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "new"), "--seed", "1"]
    assert main([*train, "--train.max_steps", "3", "--evaluate", str(protocol)]) == 0
    (record,) = read_records(tmp_path / "new" / "evaluations.jsonl")
    assert record.protocol.guide is not None
    assert record.protocol.guide["weights_hash"] == weights_hash(run / "pipelines" / "step-00000003")
    assert main(["fid", str(tmp_path / "new"), "--protocol", str(protocol)]) == 0
    assert len(sampled) == 20
    for refused in (
        ["--model.in_channels", "3", "--evaluate", str(protocol)],  # not the guide's shape
        ["--samples.guidance_interval", "[0.3, 5]"],  # without guidance
    ):
        assert main([*train[:3], "--output", str(tmp_path / "refused"), *refused]) == 2
    assert not (tmp_path / "refused" / "pipelines").exists()


def test_what_is_refused(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folders)
    for command, said in (
        ("ours --guidance-scale 2 --guidance-interval 5", "must be two noise levels low < high"),
        ("ours --guidance-scale 2 --guidance-interval a,b", "`--guidance-interval` must be a number"),
        ("ours --guide other", "`guidance_scale` must be above 1 with a guide, got 1.0"),
        (
            "ours --guide nowhere --guidance-scale 2",
            "`guide`: nowhere does not exist; it must be a pipeline folder",
        ),
        ("ours --guide other:7 --guidance-scale 2", "`guide`: the step of a pipeline in "),
        ("ours --guide= --guidance-scale 2", "`guide`: a pipeline must have a name, got none"),
        ("ours --guide ours:7 --guidance-scale 2", "it has no step 7 to choose"),
        ("ours --guide cosine --guidance-scale 2", "got another process"),
        ("ours --guide sde --guidance-scale 2", "must be one of UViTPipeline"),
        ("sde --guide ours --guidance-scale 2 --sampler own", "which has its own loop"),
    ):
        assert said in error_of(["sample", *command.split(), "--grid", tmp_path / "grid.png"], capsys)
        fid = ["fid", *command.split(), "--reference", "digits", "--record", tmp_path / "r.jsonl"]
        assert said in error_of(fid, capsys)
