"""Downloads into a cache, checked by sha256 and written atomically."""

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
    """Follows redirects only to https addresses."""

    def redirect_request(self, *arguments: Any) -> urllib.request.Request | None:
        request = super().redirect_request(*arguments)
        if request is not None:
            _check_secure(request.full_url)
        return request


def _check_secure(url: str) -> None:
    """Raises OSError for an address without https."""
    address = urlsplit(url)
    if address.scheme != "https" and (address.scheme, address.hostname) != ("http", "127.0.0.1"):
        raise OSError(f"the address must be https, got {address.scheme}://{address.hostname}")


def fetch(
    download: Download,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
    instead: str = "instead of the name",
) -> Path:
    """The path of the file in `folder`, downloaded if missing.

    Args:
        progress: called with (bytes done, total).
        instead: for the message of a failed download: where to pass the path of a file fetched by other means.

    Raises:
        RunError: the download failed, or the file has another sha256.
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
                # One byte more than expected is enough to know that it is another file.
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
