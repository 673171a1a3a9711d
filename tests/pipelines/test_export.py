import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file

from dia_diffusion import UViTPipeline
from dia_diffusion.attention.sams import SqueezeExcitation
from dia_diffusion.attention.units import UNITS, sam_unit
from dia_diffusion.errors import InputError
from dia_diffusion.io import sha256_of_file, verify_checksum
from dia_diffusion.noise import NoiseProcess
from dia_diffusion.sampling.euler_maruyama import EulerMaruyamaScheduler
from dia_diffusion.sharing.code import HEADER, NETWORKS, SCHEDULERS, bundle
from dia_diffusion.sharing.export import export_pipeline
from dia_diffusion.sharing.push import prepare, send
from tests.models.test_attached import ARGUMENTS, tiny
from tests.pipelines.conftest import add_training, contents
from tests.pipelines.hub import TOKEN, Hub

WEIGHTS = Path("unet", "diffusion_pytorch_model.safetensors")
# Loads exported folders while importing the package fails, and saves images from each; then imports the package, which
# is all that a folder without code needs.
WITHOUT_PACKAGE = """
import importlib.abc, json, sys

class Refusal(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "dia_diffusion":
            raise ModuleNotFoundError(f"refused {name}")

sys.meta_path.insert(0, Refusal())
try:
    import dia_diffusion
except ModuleNotFoundError as error:
    print(error)

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

torch.set_num_threads(1)
for folder, arguments, out in json.loads(sys.argv[1]):
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    images = pipe(batch_size=2, generator=generator, output_type="pt", **arguments).images
    save_file({"images": images}, out)
assert not any(name.partition(".")[0] == "dia_diffusion" for name in sys.modules)

sys.meta_path.pop(0)
import dia_diffusion
for folder in sys.argv[2:]:
    assert type(DiffusionPipeline.from_pretrained(folder)) is dia_diffusion.UViTPipeline
"""
GUIDED = {"class_labels": [2, 0], "guidance_scale": 3.0, "guidance_interval": [0.3, 5.0]}
CBAM = {"attention": "cbam", "attention_kwargs": {"sharing": "individual"}}
FLOW = {"attention": "srm", "prediction_type": "sample"}
KINDS = {
    "none": ({"attention": None}, {}),
    "dia-lstm-light": ({"attention": "dia-lstm-light", "pool_tokens": "patch"}, {}),
    "block-channels": ({"attention": "block-channels"}, {}),
    "blocks": ({"attention": "dia-lstm", "skip_scaling": "learned", "qk_norm": True, "drop_path": 0.5}, {}),
    "lstm by class": ({"attention": "lstm", "num_classes": 3}, GUIDED),
    "euler-maruyama": ({**CBAM, "scheduler": lambda: EulerMaruyamaScheduler(**NoiseProcess().scheduler_config())}, {}),
    "flow": ({**FLOW, "scheduler": NoiseProcess("flow", "sample").build_scheduler}, {}),
}


def without_package(environment: dict[str, str], jobs: list[tuple[str, dict, str]], *plain: Path) -> None:
    """Samples from folders in an interpreter that can't import the package; then imports it and loads `plain`."""
    command = [sys.executable, "-c", WITHOUT_PACKAGE, json.dumps(jobs), *map(str, plain)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "refused dia_diffusion"


def drawn(folder: Path, arguments: dict) -> torch.Tensor:
    pipe = UViTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    return pipe(batch_size=2, generator=generator, output_type="pt", **arguments).images


def test_same_images_without_the_package(save: Callable[..., Path], hub: Hub, tmp_path: Path) -> None:
    jobs, expected = [], []
    for number, (config, arguments) in enumerate(KINDS.values()):
        if "scheduler" in config:
            config = {**config, "scheduler": config["scheduler"]()}
        source, out = save(f"source{number}", **config), tmp_path / f"out{number}"
        export_pipeline(source, out)
        arguments = {"num_inference_steps": 4, **arguments}
        jobs.append((str(out), arguments, str(tmp_path / f"images{number}.safetensors")))
        expected.append(drawn(source, arguments))
    for backbone in ARGUMENTS:  # diffusers networks with an attached unit
        source, out = tmp_path / backbone, tmp_path / f"{backbone}-export"
        UViTPipeline(tiny(backbone), DDPMScheduler()).save_pretrained(source)
        export_pipeline(source, out)
        jobs.append((str(out), {"num_inference_steps": 2}, str(tmp_path / f"{backbone}.safetensors")))
        expected.append(drawn(source, {"num_inference_steps": 2}))
    # Once more by the repository's name alone.
    send(prepare(jobs[1][0], "me/model"), TOKEN)
    jobs.append(("me/model", jobs[1][1], str(tmp_path / "by_name.safetensors")))
    expected.append(expected[1])
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.address, "no_proxy": "*"}
    without_package(environment, jobs, tmp_path / "source0", tmp_path / "unet2d")
    for name, (_, _, file), images in zip([*KINDS, *ARGUMENTS, "by name"], jobs, expected, strict=True):
        assert torch.equal(load_file(file)["images"], images), name
        assert (images[0] - images[1]).abs().max() > 0.1, name
        assert name in ("none", *ARGUMENTS) or (images - expected[0]).abs().max() > 0.01, name


def test_what_is_copied(save: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "pipelines").mkdir(parents=True)
    (run / "config.yaml").touch()
    source = save("saved").rename(run / "pipelines" / "step-00000006")
    add_training(source)
    (source / ".secret").write_text("secret")
    record = {
        "source": "/home/someone/runs/secret",
        "weights_hash": sha256_of_file(source / WEIGHTS),
        "metric": "FD(digits)",
        "distance": 3.25,
        "protocol_hash": "a",
        "protocol": {"num_samples": 100, "reference": "digits", "reference_split": "test"}
        | {"sampler": "ddim", "num_inference_steps": 7},
    }
    of_others = {**record, "weights_hash": "0", "distance": 1.0}
    bound = {**record, "protocol": {**record["protocol"], "reference": "/home/someone/x.zip"}}
    lines = [json.dumps(each) + "\n" for each in (record, of_others, bound)]
    (run / "evaluations.jsonl").write_text("".join(lines))
    before = contents(run)
    for with_code in (False, True):
        out = tmp_path / f"out{with_code}"
        assert export_pipeline(source, out, with_code) == {Path(".secret"): "a dotfile"}
        copied, code = contents(out), {"pipeline_dia_diffusion.py", "unet/dia_diffusion_uvit.py"}
        expected = contents(source).keys() - {".secret"} | {"README.md", "evaluations.jsonl"}
        assert copied.keys() == expected | (code if with_code else set())
        same = {name for name, content in contents(source).items() if copied.get(name) == content}
        changed = {"training.json", ".secret"} | ({"model_index.json"} if with_code else set())
        assert same == contents(source).keys() - changed
        assert not [name for name, content in copied.items() if b"/home/" in content]
        training = json.loads(copied["training.json"])
        assert training["recipe"]["output"] == "secret" and training["recipe"]["data"]["source"] == "photos.zip"
        assert [verify_checksum(json.loads(line)) for line in copied["evaluations.jsonl"].splitlines()] == [
            {**record, "source": "secret"}
        ]
        card = copied["README.md"].decode()
        assert "| FD(digits) | 3.250 | 100 | digits (test) | ddim | 7 |" in card and "samples.png" in card
        assert ("carries code" in card) == ("trust_remote_code=True" in card) == with_code
        export_pipeline(out, tmp_path / f"again{with_code}", with_code)
        assert contents(tmp_path / f"again{with_code}") == copied
    assert contents(run) == before


def test_paths_that_components_were_loaded_from_are_not_exported(save: Callable[..., Path], tmp_path: Path) -> None:
    UViTPipeline.from_pretrained(save("source")).save_pretrained(tmp_path / "loaded")
    assert str(tmp_path) in (tmp_path / "loaded" / "model_index.json").read_text()
    export_pipeline(tmp_path / "loaded", tmp_path / "out")
    assert not [name for name, content in contents(tmp_path / "out").items() if str(tmp_path).encode() in content]


def refusal(source: Path, out: Path) -> str:
    with pytest.raises(InputError) as error:
        export_pipeline(source, out)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_input(save: Callable[..., Path], tmp_path: Path) -> None:
    source, out = save("source"), tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    assert "exists" in refusal(source, out) and (out / "mine").read_text() == "mine"
    out = tmp_path / "new"
    assert "missing" in refusal(tmp_path, out)
    unet = UNet2DModel(8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, **{
        f"{way}_block_types": (f"{way.capitalize()}Block2D",) for way in ("down", "up")
    })  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    assert "got a DDPMPipeline" in refusal(tmp_path / "ddpm", out)

    def altered(name: str, change: Callable[[bytes], bytes]) -> str:
        before = (source / name).read_bytes()
        (source / name).write_bytes(change(before))
        said = refusal(source, out)
        (source / name).write_bytes(before)
        return said

    assert "truncated" in altered(str(WEIGHTS), lambda content: content[:-1])
    assert "truncated" in altered("model_index.json", lambda content: content[:-10])
    assert "tensor decoder.bias" in altered(
        "unet/config.json", lambda c: c.replace(b'"in_channels": 3', b'"in_channels": 1')
    )
    assert "MyScheduler of mine" in altered(
        "model_index.json",
        lambda c: c.replace(b'"diffusers",', b'"mine",').replace(b"DPMSolverMultistepScheduler", b"MyScheduler"),
    )
    (source / "evaluations.jsonl").write_text('{"metric": "FD(dig')
    assert "evaluations.jsonl, line 1" in refusal(source, out)
    (source / "evaluations.jsonl").unlink()
    (source / WEIGHTS).rename(tmp_path / "weights")
    assert "missing" in refusal(source, out)
    (source / WEIGHTS).symlink_to(tmp_path / "weights")
    assert "a link" in refusal(source, out)
    (source / WEIGHTS).unlink()
    (tmp_path / "weights").rename(source / WEIGHTS)
    for part in ("unet", "scheduler"):
        (source / part).rename(tmp_path / part)
        assert f"{part}/" in refusal(source, out) and "missing" in refusal(source, out)
        (source / part).symlink_to(tmp_path / part)
        assert f"{part}/" in refusal(source, out) and "a link" in refusal(source, out)
        (source / part).unlink()
        (tmp_path / part).rename(source / part)
    assert not out.exists()


def test_export_without_code_writes_no_code(save: Callable[..., Path], tmp_path: Path) -> None:
    source = save("source", EulerMaruyamaScheduler(**NoiseProcess().scheduler_config()))
    export_pipeline(source, tmp_path / "code")
    plain = tmp_path / "plain"
    for code in (tmp_path / "code").rglob("*.py"):
        code.write_text(code.read_text() + "print('altered')\n")
    export_pipeline(tmp_path / "code", plain, with_code=False)
    assert not list(plain.rglob("*.py")) and "carries code" not in (plain / "README.md").read_text()
    assert (plain / "model_index.json").read_bytes() == (source / "model_index.json").read_bytes()
    assert type(UViTPipeline.from_pretrained(plain).scheduler) is EulerMaruyamaScheduler


@pytest.mark.parametrize(
    ("dropout", "num_classes", "labels"), [(0.0, 3, "[0, 1, 2]"), (0.1, 3, "[0, 1, 2]"), (0.1, 9, "[0, 1, 2, 3]")]
)
def test_card_of_classes(
    dropout: float, num_classes: int, labels: str, save: Callable[..., Path], tmp_path: Path
) -> None:
    source = save("source", num_classes=num_classes)
    index = (source / "model_index.json").read_text()
    (source / "model_index.json").write_text(index.replace('"unet"', '"net"', 1))
    with pytest.raises(InputError, match="must name a unet"):
        export_pipeline(source, tmp_path / "untrained")
    (source / "model_index.json").write_text(index)
    export_pipeline(source, tmp_path / "untrained")
    card = (tmp_path / "untrained" / "README.md").read_text()
    assert f"A {num_classes}-class UViT (16 wide, 3 blocks, 8x8 images)" in card
    assert "trained with" not in card and "## Recipe" not in card
    add_training(source)
    training = json.loads((source / "training.json").read_text())
    training["data"]["class_names"] = [str(number) for number in range(num_classes)]
    training["recipe"]["data"]["label_dropout"] = dropout
    (source / "training.json").write_text(json.dumps(training))
    export_pipeline(source, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"class_labels={labels}, " in card and ("guidance_scale" in card) == (dropout > 0)
    assert ("the columns of the grid" in card) == (num_classes <= training["recipe"]["samples"]["count"])


@pytest.mark.parametrize("module", ["pipelines.pipeline_uvit", *NETWORKS.values(), *SCHEDULERS.values()])
def test_bundled_code_needs_no_package_and_has_no_name_clashes(module: str) -> None:
    """Modules bundled into one file share a namespace: of a name that two modules define, both would see the second."""
    source = bundle(module)
    assert source.startswith(HEADER) and "Apache-2.0" in source and f"#   dia_diffusion.{module}\n" in source
    meanings: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            assert not any(f"{origin}{alias.name}".startswith("dia_diffusion") for alias in node.names)
            for alias in node.names:
                meanings.setdefault(alias.asname or alias.name, set()).add(f"{origin}{alias.name}")
    for node in ast.parse(source).body:
        names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        for name in names:
            meanings.setdefault(name, set()).add(f"line {node.lineno}")
    assert {name: where for name, where in meanings.items() if len(where) > 1} == {}


def test_a_unit_of_ones_own_is_not_exported_with_code(save: Callable[..., Path], tmp_path: Path) -> None:
    UNITS.register("test-own", sam_unit(type("Own", (SqueezeExcitation,), {})))
    source = save("source", attention="test-own")
    assert "must be one of dia_diffusion for --with-code, got 'test-own'" in refusal(source, tmp_path / "out")
    export_pipeline(source, tmp_path / "out", with_code=False)
