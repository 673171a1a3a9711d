"""`open_images`: one function for every place that images can come from."""

import warnings
from pathlib import Path

from dia_diffusion.data.arrays import digits, numpy_archive, numpy_file
from dia_diffusion.data.cifar import FOLDERS, cifar_archive, cifar_folder
from dia_diffusion.data.hf_datasets import PREFIX, hub_dataset, is_saved_dataset, saved_dataset
from dia_diffusion.data.image_files import SUFFIXES, files_of_folder, files_of_zip, of_split
from dia_diffusion.data.image_set import ImageSet, fingerprint
from dia_diffusion.data.store import Progress, decode_all
from dia_diffusion.data.undecoded import Undecoded
from dia_diffusion.download import Download, fetch
from dia_diffusion.errors import InputError
from dia_diffusion.files import cache_folder

SPLITS = ("train", "test")
DOWNLOADS = {
    "cifar10": Download(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        170_052_171,
    ),
    "cifar100": Download(
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        168_513_733,
    ),
}
ACCEPTED = (
    f"digits, {', '.join(DOWNLOADS)}, hf:NAME of a Hugging Face dataset, or the path of a folder of images or of class "
    f"folders, of a zip of either, of a CIFAR archive ({', '.join(FOLDERS)}; extracted or tar.gz), of a uint8 .npy or "
    ".npz file, or of a folder that a dataset's save_to_disk wrote"
)
MEMORY_LIMIT = 4 << 30


def open_images(
    source: str | Path,
    *,
    size: int | None = None,
    channels: int = 3,
    split: str = "train",
    cache: Path | None = None,
    memory_limit: int = MEMORY_LIMIT,
    progress: Progress | None = None,
    download_progress: Progress | None = None,
) -> ImageSet:
    """Opens any image source as uint8 images (N, C, H, W), 0..255, with their labels.

    source: a name or a path, see ACCEPTED. A name wins over a file that is called the same (./digits is the file).
    size: images are cropped to the centre square and resized to size x size; None: all have one size already.
    channels: 3 for RGB, 1 for grey.
    split: "train" or "test". Digits and CIFAR have both; other sources only if their first level is train/, test/.
        What has no parts is opened as "train".
    cache: folder for downloads and memory maps; None: `files.cache_folder()`.
    memory_limit: bytes of decoded images above which they are memory-mapped instead of kept in memory.
    progress, download_progress: called with (images done, of how many) and (bytes done, of how many).

    Files are ordered by name. Raises InputError, in one line, for what can't be used: of files that can't be read the
    first is named and all are counted. Raises RunError for a failed download or a disk that can't be written.
    """
    if size is not None and size < 1:
        raise InputError(f"size {size} isn't accepted: a positive number of pixels, or none")
    if channels not in (1, 3):
        raise InputError(f"channels {channels} isn't accepted: 3 (RGB) or 1 (grey)")
    cache = cache_folder() if cache is None else cache
    name, found = find_images(source, split=split, cache=cache, download_progress=download_progress)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # remarks on odd metadata; what matters is raised
        images, pixels_sha256 = decode_all(
            found, size=size, channels=channels, cache=cache / "images", memory_limit=memory_limit, progress=progress
        )
    own = fingerprint(pixels_sha256, found.labels)
    return ImageSet(name, found.split, images, found.labels, found.class_names, own)


def find_images(
    source: str | Path, *, split: str = "train", cache: Path | None = None, download_progress: Progress | None = None
) -> tuple[str, Undecoded]:
    """The name for records, and the images of a source before they are decoded; arguments and errors as above."""
    if split not in SPLITS:
        raise InputError(f"split {split!r} isn't accepted: {' or '.join(SPLITS)}")
    cache = cache_folder() if cache is None else cache
    name = str(source)
    if name == "digits":
        found = digits(split)
    elif name in DOWNLOADS:
        found = cifar_archive(fetch(DOWNLOADS[name], cache / "downloads", download_progress), split)
    elif name.startswith(PREFIX):
        found = hub_dataset(name, split, show_progress=download_progress is not None)
        folder = Path(name.removeprefix(PREFIX).partition(":")[0])
        name = folder.resolve().name if folder.is_dir() else name
    else:
        found = _open_path(name, split)
        name = Path(name).resolve().name
    return name, found


def _open_path(source: str, split: str) -> Undecoded:
    path = Path(source)
    if path.is_dir():
        if (cifar := cifar_folder(path, split)) is not None:
            return cifar
        if is_saved_dataset(path):
            return saved_dataset(path, split)
        files = files_of_folder(path)
    else:
        start = _first_bytes(path)
        if start.startswith(b"\x93NUMPY"):
            _refuse_parts(path, split)
            return numpy_file(path)
        if start.startswith(b"\x1f\x8b"):
            return cifar_archive(path, split)
        if not start.startswith(b"PK"):
            raise InputError(f"{source!r} is a file of another kind; accepted: {ACCEPTED}")
        if path.suffix.lower() == ".npz":
            _refuse_parts(path, split)
            return numpy_archive(path)
        files = files_of_zip(path)
    if not files.names:
        raise InputError(f"{source!r} holds no image files ({' '.join(SUFFIXES)}); accepted: {ACCEPTED}")
    return of_split(files, split)


def _refuse_parts(path: Path, split: str) -> None:
    if split != "train":
        raise InputError(f"{path} has no split {split!r}, it is one set of images: give the path of the others")


def _first_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise InputError(f"{str(path)!r} is no file or folder here; accepted: {ACCEPTED}")
    try:
        with path.open("rb") as file:
            return file.read(8)
    except OSError as error:
        raise InputError(f"{str(path)!r} can't be read ({error.strerror})") from error
