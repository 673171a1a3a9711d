import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dia_diffusion.data import open_images, sources
from dia_diffusion.download import Download, fetch
from dia_diffusion.errors import RunError
from tests.data.test_cifar import binary, write_tar

CONTENT = bytes(range(256)) * 10_000


@dataclass
class Server:
    address: str = ""
    content: bytes = CONTENT
    declared: int | None = None
    requests: list[str] = field(default_factory=list)
    redirect: str | None = None
    """Where requests are redirected, except those for /moved/data.bin."""

    def download(self, **changes) -> Download:
        values = {"url": f"{self.address}/data.bin", "sha256": hashlib.sha256(CONTENT).hexdigest()}
        return Download(**{**values, "num_bytes": len(CONTENT), **changes})


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.requests.append(self.path)
            if state.redirect is not None and self.path != "/moved/data.bin":
                self.send_response(302)
                self.send_header("Location", state.redirect)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(404 if "missing" in self.path else 200)
            self.send_header("Content-Length", str(state.declared or len(state.content)))
            self.end_headers()
            self.wfile.write(state.content)

        def log_message(self, *_) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state.address = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield state
        http.shutdown()
        thread.join()


def refused(download: Download, folder: Path, message: str) -> None:
    with pytest.raises(RunError, match=message) as error:
        fetch(download, folder)
    assert "\n" not in str(error.value)
    assert download.url in str(error.value) and f"give the path of {download.file}" in str(error.value)
    assert not folder.exists() or not list(folder.iterdir())


def test_a_download_arrives_once(server, tmp_path):
    calls: list[tuple[int, int]] = []
    path = fetch(server.download(), tmp_path / "new", lambda done, total: calls.append((done, total)))
    assert path.read_bytes() == CONTENT and [p.name for p in path.parent.iterdir()] == ["data.bin"]
    assert calls[-1] == (len(CONTENT), len(CONTENT)) and calls == sorted(calls)
    assert fetch(server.download(), tmp_path / "new") == path and len(server.requests) == 1


def test_a_damaged_copy_is_fetched_again(server, tmp_path):
    (tmp_path / "data.bin").write_bytes(CONTENT[:-1])
    assert fetch(server.download(), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT[:-1] + b"x", CONTENT + b"x", CONTENT * 20, b""])
def test_another_file_is_refused(server, tmp_path, content):
    server.content = content
    refused(server.download(), tmp_path, "with sha256 .* instead of 2560000 with")


def test_failures_leave_nothing(server, tmp_path):
    refused(server.download(url=f"{server.address}/missing.bin"), tmp_path, "404")
    server.content, server.declared = CONTENT[:-1], len(CONTENT)
    refused(server.download(), tmp_path, "2559999 bytes with sha256")
    refused(server.download(url="http://127.0.0.1:1/x.bin"), tmp_path, "refused")


def test_a_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="can't be downloaded to"):
        fetch(server.download(), tmp_path / "file" / "downloads")


def test_cifar10_by_name(server, tmp_path, monkeypatch):
    archive = write_tar(tmp_path / "cifar-10-binary.tar.gz", binary(10)).read_bytes()
    server.content = archive
    sha256 = hashlib.sha256(archive).hexdigest()
    url = f"{server.address}/cifar-10-binary.tar.gz"
    monkeypatch.setitem(sources.DOWNLOADS, "cifar10", Download(url, sha256, len(archive)))
    by_name = open_images("cifar10", cache=tmp_path / "cache")
    assert by_name.name == "cifar10" and by_name.images.shape == (10, 3, 32, 32)
    assert by_name.fingerprint == open_images(tmp_path / "cifar-10-binary.tar.gz").fingerprint
    open_images("cifar10", cache=tmp_path / "cache", split="test")
    assert len(server.requests) == 1


def test_the_pinned_downloads_are_secure_and_whole():
    for download in sources.DOWNLOADS.values():
        assert download.url.startswith("https://") and download.file.endswith("-binary.tar.gz")
        assert len(bytes.fromhex(download.sha256)) == 32


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/data.bin",
        "ftp://example.com/data.bin",
        "file:///etc/passwd",
        "data:text/plain,x",
        "http://127.0.0.1.example.com/data.bin",
        "http://127.0.0.1@example.com/data.bin",
        "//example.com/data.bin",
    ],
)
def test_only_secure_addresses_are_requested(tmp_path, url, monkeypatch):
    def connected(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr("socket.create_connection", connected)
    with pytest.raises(RunError, match="the address must be https") as error:
        fetch(Download(url, "0" * 64, 10), tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["http://example.com/x", "ftp://example.com/x", "file:///etc/passwd"])
def test_a_redirect_to_a_less_secure_address_is_not_followed(server, tmp_path, target):
    server.redirect = target
    refused(server.download(), tmp_path, r"must be https|not allowed")
    assert server.requests == ["/data.bin"]


def test_redirects_are_followed_and_loops_are_refused(server, tmp_path):
    server.redirect = f"{server.address}/moved/data.bin"
    assert fetch(server.download(), tmp_path).read_bytes() == CONTENT
    server.content, server.redirect = CONTENT, f"{server.address}/data.bin"
    (tmp_path / "data.bin").unlink()
    refused(server.download(), tmp_path, "redirect")


def test_no_more_is_fetched_than_was_expected(server, tmp_path):
    """A server that never stops sending fills neither memory nor disk."""
    server.content, server.declared = CONTENT, 1 << 40
    calls: list[int] = []
    with pytest.raises(RunError, match="bytes with sha256"):
        fetch(server.download(num_bytes=1000, sha256="0" * 64), tmp_path, lambda done, _: calls.append(done))
    assert len(calls) == 1 and not list(tmp_path.iterdir())
