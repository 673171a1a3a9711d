"""The output of `push`: a list, a question, and one line for every outcome."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from dia_diffusion.cli.main import main
from dia_diffusion.sharing.export import export_pipeline
from tests.cli.one_line import error_of
from tests.pipelines.conftest import contents
from tests.pipelines.hub import Hub, asked_private


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def folder(save: Callable[..., Path], tmp_path: Path) -> Path:
    export_pipeline(save("source"), tmp_path / "out")
    (tmp_path / "out" / "optimizer.pt").write_text("secret")
    return tmp_path / "out"


def test_nothing_is_sent_without_a_yes(
    folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for answer in ("n\n", "\n", "", "no\n", "yse\n"):
        monkeypatch.setattr("sys.stdin", Terminal(answer))
        assert main(["push", str(folder), "me/model"]) == 0
        assert "nothing was sent" in capsys.readouterr().out
    assert not hub.requests


def test_shows_and_sends_after_a_yes(
    folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    assert main(["push", str(folder), "me/model", "--private"]) == 0
    shown = capsys.readouterr().out
    sent = {name: content for name, content in contents(folder).items() if name != "optimizer.pt"}
    assert {name.removeprefix("me/model@main/"): content for name, content in hub.files.items()} == sent
    for name, content in sent.items():
        assert f"{len(content):,}  {name}" in shown
    assert f"{sum(map(len, sent.values())):,}  bytes in {len(sent)} files" in shown
    assert "left out: optimizer.pt (may hold a pickle)" in shown and "(private)" in shown
    assert f"{hub.address}/me/model" in shown and shown.index("send?") < shown.index("sent: ")
    assert asked_private(hub.created[0])


def test_push_of_a_run_sends_the_newest_pipeline(folder: Path, hub: Hub, tmp_path: Path) -> None:
    pipelines = tmp_path / "run" / "pipelines"
    for step in (3, 6):
        export_pipeline(folder, pipelines / f"step-{step:08d}", with_code=False)
    (pipelines / "step-00000006" / "marked.md").write_text("newest")
    assert main(["push", str(tmp_path / "run"), "me/model", "--yes"]) == 0
    assert hub.files["me/model@main/marked.md"] == b"newest"
    assert main(["push", str(tmp_path / "run"), "me/older", "--step", "3", "--yes"]) == 0
    assert "me/older@main/model_index.json" in hub.files and "me/older@main/marked.md" not in hub.files


def test_ends_in_one_line(
    folder: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end_of(*arguments: str, code: int) -> str:
        return error_of(["push", folder, *arguments], capsys, code)

    assert "--yes sends without asking" in end_of("me/model", code=2)
    assert not hub.requests
    # The client retries with growing pauses, which the test skips.
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    for hub.broken in ("/upload/", "/commit/", "/api/repos"):
        assert "500" in end_of("me/model", "--yes", code=1)
    hub.broken = None
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_token")
    refused = end_of("me/model", "--yes", code=2)
    assert "refuses the token for me/model (401)" in refused and "hf_wrong_token" not in refused
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "can't be reached" in end_of("me/model", "--yes", code=1)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "can't be reached" in end_of("me/model", "--yes", code=1)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "no token" in end_of("me/model", "--yes", code=2)
    assert not hub.files
