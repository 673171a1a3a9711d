"""Tokens and passwords in the environment or in addresses appear in no record, card, page, message or upload."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dia_diffusion.cli.main import main
from dia_diffusion.errors import InputError
from dia_diffusion.sharing.export import export_pipeline
from dia_diffusion.sharing.push import prepare, send
from dia_diffusion.training.config import ClassifyExperiment
from dia_diffusion.training.recipe import read_experiment
from tests.pipelines.conftest import hub
from tests.pipelines.hub import TOKEN, Hub
from tests.training.conftest import TINY

__all__ = ["hub"]

SECRETS = {
    "HF_TOKEN": TOKEN,
    "HUGGING_FACE_HUB_TOKEN": "hf_secretOfTheHub",
    "WANDB_API_KEY": "wandb0secret1",
    "AWS_SECRET_ACCESS_KEY": "aws0secret1",
    "GITHUB_TOKEN": "ghp_secret1",
    "http_proxy": "http://me:proxy0secret1@127.0.0.1:9",
}


def test_no_secret_of_the_surroundings_is_kept_or_sent(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DIA_DIFFUSION_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tiny.yaml").write_text(TINY)
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["train", "--config", str(tmp_path / "tiny.yaml"), "--output", str(run)]) == 0
    measured = ["--reference", "digits", "--features", "digits", "--num", "8", "--steps", "2"]
    assert main(["fid", str(run), *measured]) == 0
    assert main(["report", str(run)]) == 0
    export_pipeline(run / "pipelines" / "step-00000006", out)
    send(prepare(out, "me/model"), TOKEN)
    written = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(written) > 15 and len(hub.files) > 5
    printed = {"output": "".join(capfd.readouterr()).encode()}
    for place, content in (written | hub.files | printed).items():
        for secret in [*SECRETS.values(), "proxy0secret1"]:
            assert secret.encode() not in content, place


ADDRESSES = [
    "https://me:hunter2@example.com/images.zip",
    "https://example.com/images.zip?token=hunter2",
    "https://example.com/a?x=1&X-Amz-Signature=hunter2&y=2",
    "s3://key:hunter2@bucket/images",
    "hf://me:hunter2@datasets/x",
]


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("key", ["output", "data.source", "init_from"])
def test_addresses_are_refused_as_paths_in_recipes(key: str, address: str, tmp_path: Path) -> None:
    for kind in (read_experiment, lambda *a, **k: read_experiment(*a, **k, kind=ClassifyExperiment)):
        with pytest.raises(InputError) as error:
            kind(None, keys={key if kind is read_experiment or key != "init_from" else "data.test_source": address})
        assert "hunter2" not in str(error.value) and "must be a path or a name" in str(error.value)


COMMANDS: dict[str, Callable[[str], list[str]]] = {
    "train": lambda address: ["train", "--config", "digits_uvit_cpu", "--data.source", address],
    "output": lambda address: ["train", "--config", "digits_uvit_cpu", "--output", address],
    "config": lambda address: ["train", "--config", address],
    "sample": lambda address: ["sample", address, "--grid", "g.png"],
    "fid": lambda address: ["fid", address, "--reference", "digits"],
    "reference": lambda address: ["fid", "digits", "--features", "digits", "--reference", address],
    "stats": lambda address: ["stats", "show", address],
    "make": lambda address: ["stats", "make", address, "x.safetensors"],
    "curves": lambda address: ["curves", address],
    "report": lambda address: ["report", address],
    "convert": lambda address: ["convert", address, "out"],
    "export": lambda address: ["export", address, "out"],
    "push": lambda address: ["push", address, "me/model", "--yes"],
    "analyze": lambda address: ["analyze", "maps", address],
    "classify": lambda address: ["classify", "--config", "cifar100_resnet", "--data.source", address],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_message_shows_the_secret_in_an_address(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for address in ADDRESSES[:3]:
        assert main(COMMANDS[name](address)) == 2
        out, err = capfd.readouterr()
        assert err.count("\n") == 1 and "hunter2" not in out + err, err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
