from collections.abc import Callable
from pathlib import Path

import pytest

from dia_diffusion.errors import InputError, RunError
from dia_diffusion.sharing.export import export_pipeline
from dia_diffusion.sharing.push import find_token, prepare, send
from tests.pipelines.conftest import add_training, contents
from tests.pipelines.hub import COMMIT, TOKEN, Hub, asked_private

STRANGE = (".env", ".git/config", "optimizer.safetensors", "optimizer.bin", "state.json", "notes.txt", "code.py")
STRANGE_INSIDE = ("unet/ema.pt", "unet/optimizer.safetensors", "checkpoints/step-00000006/model.safetensors")


def fill(folder: Path) -> None:
    """Puts beside the pipeline what must never be sent."""
    for name in STRANGE + STRANGE_INSIDE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("secret")
    (folder / "link.md").symlink_to("/etc/hostname")
    (folder / "scheduler" / "linked").symlink_to(folder.parent)


def refusal(*arguments: object) -> str:
    with pytest.raises(InputError) as error:
        prepare(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("with_code", [True, False])
def test_exactly_the_listed_files_arrive(with_code: bool, save: Callable[..., Path], hub: Hub, tmp_path: Path) -> None:
    add_training(save("source"))
    folder = tmp_path / "out"
    export_pipeline(tmp_path / "source", folder, with_code)
    mine = contents(folder)
    fill(folder)
    shipment = prepare(folder, "me/model")
    assert not hub.requests, "nothing is asked of the Hub before a person has agreed"
    assert shipment.sizes == {Path(name): len(content) for name, content in mine.items()}
    assert shipment.carries_code == with_code == ("unet/dia_diffusion_uvit.py" in mine)
    outside = {"link.md", "scheduler/linked", ".git", "checkpoints", "unet/ema.pt", "unet/optimizer.safetensors"}
    assert {str(path) for path in shipment.left_out} == outside | {name for name in STRANGE if "/" not in name}
    assert send(shipment, TOKEN) == f"{hub.address}/me/model/commit/{COMMIT}"
    assert hub.files == {f"me/model@main/{name}": content for name, content in mine.items()}
    sent_large = {content for name, content in mine.items() if name.endswith((".safetensors", ".png"))}
    assert set(hub.uploads.values()) == sent_large
    assert hub.created == [{"name": "model", "organization": "me"}]


def test_branch_and_privacy(save: Callable[..., Path], hub: Hub) -> None:
    shipment = prepare(save("source"), "me/model")
    send(shipment, TOKEN, private=True, revision="better")
    assert asked_private(hub.created[0])
    assert "POST /api/models/me/model/branch/better" in hub.requests
    assert hub.files and all(name.startswith("me/model@better/") for name in hub.files)
    sent = dict(hub.files)
    hub.public.add("me/public")
    with pytest.raises(InputError, match="me/public exists and is public"):
        send(prepare(shipment.folder, "me/public"), TOKEN, private=True)
    assert hub.files == sent


def test_paths_of_this_machine_are_not_sent(save: Callable[..., Path], tmp_path: Path) -> None:
    folder = save("source")
    add_training(folder)
    assert "training.json names /home/someone/runs/secret" in refusal(folder, "me/model")
    assert "dia-diffusion export" in refusal(folder, "me/model")
    export_pipeline(folder, tmp_path / "out", with_code=False)
    prepare(tmp_path / "out", "me/model")
    with (tmp_path / "out" / "README.md").open("a") as card:
        card.write("```yaml\noutput: /home/someone/runs/secret\n```\n")
    assert "README.md names /home/someone" in refusal(tmp_path / "out", "me/model")


def test_datasets_in_folders_of_this_machine_are_not_sent(save: Callable[..., Path], tmp_path: Path) -> None:
    folder = save("source")
    add_training(folder)
    text = (folder / "training.json").read_text().replace("/home/someone/photos.zip", "hf:/home/someone/photos")
    (folder / "training.json").write_text(text.replace("/home/someone/runs/secret", "secret"))
    assert "training.json names hf:/home/someone/photos" in refusal(folder, "me/model")
    export_pipeline(folder, tmp_path / "out", with_code=False)
    assert not [name for name, content in contents(tmp_path / "out").items() if b"/home/" in content]
    with (tmp_path / "out" / "README.md").open("a") as card:
        card.write("```yaml\nsource: hf:/home/someone/photos\n```\n")
    assert "README.md names hf:/home/someone/photos" in refusal(tmp_path / "out", "me/model")


def test_altered_code_is_not_sent(save: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export_pipeline(save("source"), folder)
    prepare(folder, "me/model")
    code, index = folder / "unet" / "dia_diffusion_uvit.py", folder / "model_index.json"
    generated, names = code.read_text(), index.read_text()
    code.write_text(generated + "print('altered')\n")
    assert f"{code} is not the code" in refusal(folder, "me/model")
    code.unlink()
    assert f"{code} is not the code" in refusal(folder, "me/model")
    code.write_text(generated)
    (folder / "more.py").write_text(generated)
    assert f"{folder / 'more.py'} is not the code" in refusal(folder, "me/model")
    (folder / "more.py").unlink()
    index.write_text(names.replace('"dia_diffusion_uvit"', '"someone/else--code"'))
    assert "names other code" in refusal(folder, "me/model")


@pytest.mark.parametrize("repo_id", ["model", "a/b/c", "me/mo del", "me/..x", "", "me/model.git"])
def test_repo_ids_of_other_forms(repo_id: str, save: Callable[..., Path]) -> None:
    assert repo_id in refusal(save("source"), repo_id)


def test_ways_to_fail(save: Callable[..., Path], hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shipment = prepare(save("source"), "me/model")
    with pytest.raises(InputError, match=r"refuses the token for me/model \(401\)") as refused:
        send(shipment, "hf_wrong_token")
    assert "hf_wrong_token" not in str(refused.value)
    for part in ("/upload/", "/commit/", "/api/repos"):
        hub.broken = part
        # The client tries again with growing pauses, which a test needn't sit through.
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
        with pytest.raises(RunError) as failed:
            send(shipment, TOKEN)
        assert "\n" not in str(failed.value) and "500" in str(failed.value)
    assert not hub.files
    with pytest.raises(RunError, match="can't be reached"):
        send(prepare(shipment.folder, "me/model", endpoint="http://127.0.0.1:9"), TOKEN)
    assert find_token() == TOKEN
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(InputError, match="hf auth login"):
        find_token()
