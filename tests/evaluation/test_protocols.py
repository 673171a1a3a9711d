"""Named protocols: the shipped ones, equality of two protocols, and refused input."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from diffusers import DDPMScheduler

from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.protocol import EvalProtocol, renamed
from dia_diffusion.evaluation.record import EvaluationRecord
from dia_diffusion.io import shipped_folder, shipped_names
from dia_diffusion.noise import NoiseProcess
from dia_diffusion.sampling.samplers import build_scheduler, check_steps

PLAIN = {"features": "digits", "num_samples": 80, "sampler": "ddim", "steps": 2}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """write("name", steps=3) returns the path of a new protocol file; settings of None are left out."""

    def written(stem: str = "mine", /, **changes: object) -> str:
        path = tmp_path / f"{stem}.yaml"
        path.write_text(
            yaml.safe_dump({key: value for key, value in {**PLAIN, **changes}.items() if value is not None})
        )
        return str(path)

    return written


@pytest.mark.parametrize("name", shipped_names("protocols"))
def test_a_shipped_protocol_can_be_followed(name: str) -> None:
    protocol = EvalProtocol.read(name)
    assert protocol.name == name
    values = yaml.safe_load((shipped_folder("protocols") / f"{name}.yaml").read_text())
    assert {key: getattr(protocol, key) for key in values} == values
    scheduler = build_scheduler(protocol.sampler, DDPMScheduler(**NoiseProcess().scheduler_config()))
    check_steps(scheduler, protocol.steps)
    assert len(scheduler.timesteps) == protocol.steps


def test_the_paper_protocol_matches_u_vit() -> None:
    """50,000 images, 1,000 Euler-Maruyama steps, averaged weights, Inception, against the 50,000 training images."""
    paper = EvalProtocol.read("paper-cifar10")
    assert (paper.num_samples, paper.sampler, paper.steps) == (50_000, "euler-maruyama", 1000)
    assert (paper.features, paper.weights) == ("inception", "ema")
    assert (paper.reference_split, paper.reference_count) == ("train", 50_000)
    half = EvalProtocol.read("paper-cifar10-fp16")
    assert half.precision == "float16" and half.model_copy(update={"name": paper.name, "precision": "float32"}) == paper
    # Existing records have this hash.
    assert paper.hash() == "acdb55a70b86eed82bcded4476f0e2773d68494f8eec1c0292960eaa36832f05"


def test_the_hash_is_over_the_settings_alone(write: Callable[..., str], tmp_path: Path) -> None:
    """The hashed text is written out here, so that no later version changes the hash of old records."""
    settings = '{"features": "digits", "num_samples": 80, "sampler": "ddim", "steps": 2}'
    protocol = EvalProtocol.read(write())
    assert protocol.hash() == hashlib.sha256(settings.encode()).hexdigest()
    (tmp_path / "other.yaml").write_text(
        "# why\nsteps: 2\nsampler: ddim\nweights: ema\nnum_samples: 80\nfeatures: digits"
    )
    assert EvalProtocol.read(str(tmp_path / "other.yaml")).hash() == protocol.hash()
    written_out = write(precision="float32", weights="ema", guidance_scale=1)
    assert EvalProtocol.read(written_out).hash() == protocol.hash()


@pytest.mark.parametrize(
    "change",
    [
        {"features": "cifar10"},
        {"num_samples": 81},
        {"sampler": "ddpm"},
        {"steps": 3},
        {"precision": "bfloat16"},
        {"reference_split": "test"},
        {"reference_count": 596},
        {"classes": [0, 3]},
        {"guidance_scale": 1.5},
        {"guidance_scale": 1.5, "guidance_interval": [0.3, 5]},
        {"guidance_scale": 1.5, "guide": "runs/small:2000"},
    ],
)
def test_every_setting_is_in_the_hash(change: dict[str, object], write: Callable[..., str]) -> None:
    assert EvalProtocol.read(write(**change)).hash() != EvalProtocol.read(write()).hash()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": 2}, "unknown key `step`; did you mean `steps`?"),
        ({"name": "mine"}, "unknown key `name`"),
        ({"steps": None}, "`steps` is missing"),
        ({"num_samples": "many"}, "many"),
        ({"num_samples": 2.5}, "2.5"),
        ({"num_samples": 1}, "`num_samples` must be 2 or more, got 1"),
        ({"steps": 0}, "`steps` must be 1 or more, got 0"),
        ({"sampler": "plms"}, "`sampler` must be one of ddpm"),
        ({"features": "vgg"}, "`features` must be one of digits"),
        ({"features": "my:"}, "`features` must be one of digits"),
        ({"precision": "fp16"}, "`precision` must be one of float32, bfloat16, float16, got 'fp16'"),
        ({"weights": "raw"}, "`weights` must be one of ema, got 'raw'"),
        ({"reference_split": "validation"}, "`reference_split` must be one of train, test, got 'validation'"),
        ({"reference_count": 0}, "`reference_count` must be 2 or more, got 0"),
        ({"classes": []}, "`classes` must be a list of 1 or more, got []"),
        ({"classes": "0,1"}, "0,1"),
        ({"guidance_scale": 0.5}, "`guidance_scale` must be 1 or more, got 0.5"),
        ({"guidance_interval": [0.3, 5]}, "`guidance_interval` must be left out for guidance_scale 1"),
        ({"guidance_scale": 2, "guidance_interval": [5, 0.3]}, "must be two noise levels low < high"),
        ({"guidance_scale": 2, "guidance_interval": 5}, "`guidance_interval` must be a list, got 5"),
        ({"guide": "runs/small"}, "`guidance_scale` must be above 1 with a guide, got 1.0"),
    ],
)
def test_what_is_refused(change: dict[str, object], said: str, write: Callable[..., str]) -> None:
    path = write(**change)
    with pytest.raises(InputError) as caught:
        EvalProtocol.read(path)
    assert said in str(caught.value) and path in str(caught.value) and "\n" not in str(caught.value)


def test_no_such_protocol_and_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"a protocol must be a YAML file or one of adm, fd-digits, .*paper-cifar10.*, got 'fd1'"
    ):
        EvalProtocol.read("fd1")
    (tmp_path / "torn.yaml").write_text("features: [")
    with pytest.raises(InputError, match="not a YAML protocol"):
        EvalProtocol.read(str(tmp_path / "torn.yaml"))


def test_a_record_under_a_name(write: Callable[..., str], record: Callable[..., EvaluationRecord]) -> None:
    protocol, plain = EvalProtocol.read(write()), record()
    unnamed = protocol.model_copy(update={"name": ""})
    assert renamed(plain, unnamed) is plain
    named = renamed(plain, protocol)
    assert protocol.made(named) and not protocol.made(plain)
    assert replace(named, protocol_name=None, protocol_file_hash=None) == plain
    assert renamed(named, protocol) is named


def test_a_changed_protocol_needs_another_name(
    write: Callable[..., str], record: Callable[..., EvaluationRecord]
) -> None:
    protocol = EvalProtocol.read(write())
    records = [record(), renamed(record(), protocol)]
    protocol.refuse_changed(records, "e.jsonl")
    changed = EvalProtocol.read(write(steps=3))
    with pytest.raises(InputError) as caught:
        changed.refuse_changed(records, "e.jsonl")
    message = str(caught.value)
    assert all(text in message for text in ("e.jsonl", "mine", protocol.hash()[:8], changed.hash()[:8], "another name"))
    EvalProtocol.read(write("another", steps=3)).refuse_changed(records, "e.jsonl")
