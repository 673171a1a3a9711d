from collections.abc import Callable
from pathlib import Path

import pytest

from dia_diffusion.errors import InputError
from dia_diffusion.sharing.export import export_pipeline
from dia_diffusion.sharing.push import prepare, send
from tests.pipelines.conftest import add_training, contents
from tests.pipelines.hub import COMMIT, TOKEN, Hub, asked_private

STRANGE = (".env", ".git/config", "optimizer.safetensors", "optimizer.bin", "state.json", "notes.txt", "code.py")
STRANGE_INSIDE = ("unet/ema.pt", "unet/optimizer.safetensors", "checkpoints/step-00000006/model.safetensors")


def fill(folder: Path) -> None:
    """Adds files to the pipeline's folder that must never be sent."""
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


@pytest.mark.parametrize(
    ("own", "key"), [("/home/someone/runs/secret", "output"), ("hf:/home/someone/photos", "source")]
)
def test_paths_of_this_machine_are_not_sent(own: str, key: str, save: Callable[..., Path], tmp_path: Path) -> None:
    folder = save("source")
    add_training(folder)
    if own.startswith("hf:"):
        text = (folder / "training.json").read_text().replace("/home/someone/photos.zip", own)
        (folder / "training.json").write_text(text.replace("/home/someone/runs/secret", "secret"))
    said = refusal(folder, "me/model")
    assert f"training.json names {own}" in said and "dia-diffusion export" in said
    export_pipeline(folder, tmp_path / "out", with_code=False)
    assert not [name for name, content in contents(tmp_path / "out").items() if b"/home/" in content]
    prepare(tmp_path / "out", "me/model")
    with (tmp_path / "out" / "README.md").open("a") as card:
        card.write(f"```yaml\n{key}: {own}\n```\n")
    assert f"README.md names {own.removesuffix('/runs/secret')}" in refusal(tmp_path / "out", "me/model")


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
