"""Pipelines and classifiers that refer to files or code elsewhere, or to networks too large for any machine."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDPMPipeline, DDPMScheduler

from dia_diffusion.models.classifiers import load_classifier
from dia_diffusion.pipelines.folder import weights_hash
from dia_diffusion.sampling.load import load_pipeline
from dia_diffusion.sharing.export import check_pipeline, export_pipeline
from dia_diffusion.sharing.push import prepare
from tests.sampling.tiny_models import small_unet
from tests.security import hostile
from tests.security.hostile import change_json
from tests.security.readers import classifier, pipeline
from tests.security.watch import Sandbox

WEIGHTS = "diffusion_pytorch_model.safetensors"


SHARD_MAPS = {
    "up": {"a": "../../../outside/secret.png"},
    "absolute": {"a": "/etc/passwd"},
    "up to weights": {"a": f"../unet/{WEIGHTS}"},
    "pickle": {"a": "diffusion_pytorch_model.bin"},
    "number": {"a": 3},
    "null": {"a": None},
    "list": {"a": [WEIGHTS]},
    "NUL": {"a": "a\0.safetensors"},
    "escapes": {"a": "\x1b[2J.safetensors"},
    "nothing": {},
    "no mapping": [WEIGHTS],
}


@pytest.mark.parametrize("kind", SHARD_MAPS)
@pytest.mark.parametrize("read", [load_pipeline, weights_hash, check_pipeline])
def test_shards_that_point_elsewhere(kind: str, read: Callable[[Path], Any], sandbox: Sandbox) -> None:
    place = pipeline(sandbox.folder)
    (place / "unet" / "diffusion_pytorch_model.bin").write_bytes(hostile.pickled_weights(sandbox.marker))
    index = place / "unet" / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": SHARD_MAPS[kind]}))
    if kind == "nothing" and read is weights_hash:
        sandbox.survived(lambda: read(place))
    else:
        sandbox.refused(lambda: read(place), place)


GIGANTIC: dict[str, dict[str, Any]] = {
    "width": {"hidden_size": 1 << 30, "num_attention_heads": 1},
    "width of 20 GB": {"hidden_size": 20_000, "num_attention_heads": 1},
    "width of digits": {"hidden_size": 10**30, "num_attention_heads": 1},
    "layers": {"num_layers": 10**9 + 1},
    "layers of digits": {"num_layers": 10**30 + 1},
    "image": {"sample_size": 4 * 10**8},
    "image of 6 GB": {"sample_size": 40_000},
    "channels": {"in_channels": 10**9},
    "classes": {"num_classes": 10**9},
    "classes of 6 GB": {"num_classes": 10**8},
    "MLP": {"mlp_ratio": 1e9},
    "MLP of 1e300": {"mlp_ratio": 1e300},
    "unit": {"attention_kwargs": {"reduction": 10**9}},
    "blocks": {"attention_blocks": list(range(100_000))},
}


@pytest.mark.parametrize("kind", GIGANTIC)
@pytest.mark.parametrize("read", [load_pipeline, check_pipeline])
def test_gigantic_networks_are_refused_before_they_are_made(
    kind: str, read: Callable[[Path], Any], sandbox: Sandbox
) -> None:
    place = pipeline(sandbox.folder)
    change_json(place / "unet" / "config.json", **GIGANTIC[kind])
    sandbox.refused(lambda: read(place), place)


@pytest.mark.parametrize(
    "changes",
    [
        {"block_out_channels": [1 << 20, 1 << 20]},
        {"layers_per_block": 10**9},
        {"block_out_channels": [8] * 10_000},
        {"down_block_types": ["os.system", "DownBlock2D"]},
        {"norm_num_groups": 0},
        {"act_fn": "__import__('os').system('x')"},
    ],
    ids=str,
)
def test_gigantic_and_odd_networks_of_diffusers(changes: dict[str, Any], sandbox: Sandbox) -> None:
    place = sandbox.folder / "ddpm"
    DDPMPipeline(unet=small_unet(), scheduler=DDPMScheduler()).save_pretrained(place)
    change_json(place / "unet" / "config.json", **changes)
    sandbox.refused(lambda: load_pipeline(place), place)


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone": "cifar-resnet9998-basic"},
        {"backbone": "cifar-resnet99999999-basic"},
        {"backbone": "cifar-wrn52-9999"},
        {"backbone": f"cifar-resnet{'9' * 5000}-basic"},
        {"backbone": "../../etc/passwd"},
        {"num_classes": 10**9},
        {"num_classes": 10**30},
        {"attention": "os.system"},
        {"attention_kwargs": {"reduction": 0}},
        {"attention_stages": [10**9]},
        {"attention": "dia-lstm", "attention_kwargs": {"num_cells": 10**9}},  # would be built one by one
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_gigantic_and_odd_classifiers(changes: dict[str, Any], sandbox: Sandbox) -> None:
    place = classifier(sandbox.folder)
    model = json.loads((place / "config.json").read_text())["model"]
    change_json(place / "config.json", model={**model, **changes})
    sandbox.refused(lambda: load_classifier(place))


def test_class_names_that_do_not_match_the_number_of_classes(sandbox: Sandbox) -> None:
    place = classifier(sandbox.folder)
    change_json(place / "config.json", class_names=["cat"])
    sandbox.refused(lambda: load_classifier(place))


CLASSES: dict[str, Any] = {
    "os.system": ["os", "system"],
    "Popen": ["subprocess", "Popen"],
    "eval": ["builtins", "eval"],
    "own code": ["model", "UViT2"],
    "code up": ["../../outside/code", "Model"],
    "code elsewhere": ["someone/else--code", "Model"],
    "absolute": ["/tmp/code", "Model"],
    "module of diffusers": ["diffusers", "utils"],
    "function of diffusers": ["diffusers", "load_image"],
    "dunder": ["diffusers", "__class__"],
    "pipeline": ["diffusers", "DiffusionPipeline"],
    "transformers": ["transformers", "pipeline"],
    "escapes": ["diffusers", "\x1b[2J"],
}


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("part", ["unet", "scheduler", "_class_name"])
def test_classes_that_are_none_of_a_pipelines(kind: str, part: str, sandbox: Sandbox) -> None:
    place = pipeline(sandbox.folder)
    code = f"import os\nos.system('touch {sandbox.marker}')\n"
    for name in ("model.py", "pipeline.py", "unet/model.py", "scheduler/model.py"):
        (place / name).write_text(code)
    (sandbox.outside / "code.py").write_text(code)
    change_json(place / "model_index.json", **{part: CLASSES[kind]})
    sandbox.refused(lambda: load_pipeline(place), place)
    sandbox.survived(lambda: check_pipeline(place))
    change_json(place / "model_index.json", **{part: CLASSES[kind][1]})
    sandbox.survived(lambda: load_pipeline(place))


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoModel": "code.Model"}},
        {"_class_name": "os.system"},
        {"_class_name": ["os", "system"]},
        {"_name_or_path": "/etc/passwd"},
        {"custom_pipeline": "code"},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"trust_remote_code": True},
        {"_diffusers_version": "99"},
    ],
    ids=str,
)
def test_keys_that_ask_for_code(changes: dict[str, Any], sandbox: Sandbox, capfd: pytest.CaptureFixture[str]) -> None:
    place = pipeline(sandbox.folder)
    for name in ("code.py", "unet/code.py", "pipeline.py"):
        (place / name).write_text(f"import os\nos.system('touch {sandbox.marker}')\n")
    change_json(place / "unet" / "config.json", **changes)
    if "_class_name" not in changes:
        change_json(place / "model_index.json", **changes)
    sandbox.survived(lambda: load_pipeline(place))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sandbox.survived(lambda: check_pipeline(place))


def test_code_runs_by_diffusers_own_flag_alone(sandbox: Sandbox) -> None:
    """The library has no flag to run a folder's code; diffusers has one, which is off by default."""
    from diffusers import DiffusionPipeline

    place = pipeline(sandbox.folder)
    (place / "pipeline_x.py").write_text(f"import os\nos.system('touch {sandbox.marker}')\n")
    change_json(place / "model_index.json", _class_name=["pipeline_x", "UViTPipeline"])
    assert type(sandbox.watch(lambda: load_pipeline(place))).__name__ == "UViTPipeline"
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(place)
    assert not sandbox.marker.exists()
    package = Path(__file__).parents[2] / "dia_diffusion"
    flags = [
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if "trust_remote_code" in path.read_text() or "custom_pipeline" in path.read_text()
    ]
    assert sorted(flags) == ["cli/export.py", "sharing/card.py", "sharing/export.py"]  # these only inform the user


@pytest.mark.parametrize("name", ["unet/config.json", "model_index.json", f"unet/{WEIGHTS}", "unet", "scheduler"])
def test_links_out_of_a_pipeline_are_not_exported(name: str, sandbox: Sandbox) -> None:
    place = pipeline(sandbox.folder)
    elsewhere = sandbox.folder / "elsewhere"
    shutil.move(place / name, elsewhere)
    (place / name).symlink_to(elsewhere)
    sandbox.refused(lambda: export_pipeline(place, sandbox.folder / "out"), "link")
    sandbox.refused(lambda: prepare(place, "me/model"), "link")
