"""Files fetched by name: checked by sha256, kept in a cache, there whole or not at all."""

import http.client
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dia_diffusion.errors import RunError, one_line
from dia_diffusion.io import atomic_file, sha256_of_file


@dataclass(frozen=True)
class Download:
    url: str
    sha256: str
    num_bytes: int

    @property
    def file(self) -> str:
        return self.url.rsplit("/", 1)[-1]


class _SecureRedirects(urllib.request.HTTPRedirectHandler):
    """Follows an answer that sends elsewhere only where that is as secure."""

    def redirect_request(self, *arguments: Any) -> urllib.request.Request | None:
        request = super().redirect_request(*arguments)
        if request is not None:
            _check_secure(request.full_url)
        return request


def _check_secure(url: str) -> None:
    """Raises OSError for an address that anybody on the way could answer for."""
    address = urlsplit(url)
    if address.scheme != "https" and (address.scheme, address.hostname) != ("http", "127.0.0.1"):
        raise OSError(f"{address.scheme}://{address.hostname} is not secure; accepted: https")


def fetch(
    download: Download,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
    instead: str = "instead of the name",
) -> Path:
    """The path of the file in `folder`, downloaded unless it is there already; `progress(bytes, of how many)`.

    `instead` says where a person gives the file's own path, in the message that ends a download that failed.
    Raises RunError where it can't be had, or isn't what it should be.
    """
    path = folder / download.file
    if path.is_file() and sha256_of_file(path) == download.sha256:
        return path
    opener = urllib.request.build_opener(_SecureRedirects)
    try:
        _check_secure(download.url)
        with atomic_file(path) as temporary:
            with opener.open(download.url, timeout=30) as response, temporary.open("wb") as file:
                done = 0
                # A byte more than expected is enough to know that it is another file.
                while done <= download.num_bytes and (chunk := response.read(1 << 20)):
                    file.write(chunk)
                    done += len(chunk)
                    if progress is not None:
                        progress(min(done, download.num_bytes), download.num_bytes)
            if (sha256 := sha256_of_file(temporary)) != download.sha256:
                raise OSError(
                    f"{done} bytes with sha256 {sha256} instead of {download.num_bytes} with {download.sha256}"
                )
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise RunError(
            f"{download.url} can't be downloaded to {path} ({one_line(str(error))}): "
            f"give the path of {download.file}, fetched by other means, {instead}"
        ) from error
    return path
