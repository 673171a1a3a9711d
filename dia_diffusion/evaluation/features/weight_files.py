"""Files of published weights, read without running what is in them; downloads are checked by sha256."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from dia_diffusion.download import Download, fetch
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.features.extractor import DownloadProgress
from dia_diffusion.io import cache_folder, sha256_of_file
from dia_diffusion.reading import NotTensors, load_pickled_tensors


def read_tensors(path: Path, expected: str) -> dict[str, torch.Tensor]:
    """The tensors of a .pth or safetensors file; nothing in it is executed.

    expected: "expected: ...", the accepted files, for messages.

    Raises InputError for a file that is missing, truncated or holds something else.
    """
    if path.exists() and not path.is_file():  # opening a pipe would block
        raise InputError(f"weights {path} are no regular file; {expected}")
    try:
        with path.open("rb") as file:
            is_safetensors = file.read(9)[8:] == b"{"
    except OSError as error:
        raise InputError(f"weights {path} can't be read ({error.strerror}); {expected}") from error
    try:
        return load_file(path) if is_safetensors else load_pickled_tensors(path)
    except NotTensors as error:
        raise InputError(f"{path}, given as weights, {error}; {expected}") from error
    except Exception as error:  # unpickling an untrusted file can raise almost anything
        raise InputError(
            f"weights {path} are truncated, damaged or no file of tensors (sha256 {sha256_of_file(path)}); {expected}"
        ) from error


def released_file(download: Download, expected: str, option: str, progress: DownloadProgress | None) -> Path:
    """The release file in torch's hub folder, else in our cache, else downloaded to there.

    option: the option that takes a file fetched by other means.

    Raises InputError for another file of this name in torch's hub folder; RunError for a failed download.
    """
    in_hub = Path(torch.hub.get_dir()) / "checkpoints" / download.file
    if not in_hub.is_file():
        return fetch(download, cache_folder() / "downloads", progress, f"by {option}")
    if (sha256 := sha256_of_file(in_hub)) != download.sha256:
        raise InputError(f"{in_hub} is damaged, its sha256 is {sha256}; {expected}: remove it or give {option}")
    return in_hub
