"""Bounded reading of untrusted files: text, JSON, YAML, zip archives, safetensors headers, pickled weights.

A named pipe would block, a device never ends, and a few kilobytes can expand to gigabytes or to deeper recursion than
Python allows. Every reader here refuses that, and nothing in a file is executed.
"""

import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZipFile, ZipInfo

import yaml
from safetensors import SafetensorError, safe_open

from dia_diffusion.errors import InputError, one_line

if TYPE_CHECKING:
    from torch import Tensor

TEXT_LIMIT = 1 << 24
"""Most bytes of a file that is read as one value; a recipe or a card has a few thousand."""
LINES_LIMIT = 1 << 28
"""Most bytes of a file of records: 100,000 evaluations."""
LINE_LIMIT = 1 << 20
"""Most bytes of a line in a file that is read line by line."""
DEPTH_LIMIT = 64
"""Most levels of nested lists and mappings, since they are traversed recursively; a recipe has four."""
YAML_LIMIT = 1 << 20
"""Most characters of a YAML file's values, with all aliases expanded."""
DIGITS_LIMIT = 40
"""Most digits of a whole number in YAML; parsing and printing take quadratic time."""
RATIO_LIMIT = 200
"""Highest compression ratio of a zip entry of more than a megabyte."""
EXPANDED_LIMIT = 1 << 20
"""Most bytes by which tensors may exceed their file's size: one number can expand to a tensor of any shape."""
PICKLE_START = b"\x80"
"""First byte of each pickle protocol that torch has written."""


class Unreadable(ValueError):
    """Why a file is refused; the caller adds which file and what it should be."""


def read_text(path: Path, limit: int = TEXT_LIMIT) -> str:
    """A regular file's text, UTF-8.

    Raises:
        Unreadable: a pipe, a device, a folder, more bytes than the limit, or another encoding.
        OSError: the file is missing or not readable.
    """
    _refuse_irregular(path)
    if (size := path.stat().st_size) > limit:
        raise Unreadable(f"it must hold at most {limit:,} bytes, got {size:,}")
    return _decoded(path.read_bytes()).replace("\r\n", "\n")


def complete_lines(path: Path) -> Iterator[str]:
    """A regular file's lines, one at a time; skips a last line without a newline, which a crash may leave.

    Raises:
        Unreadable: a pipe, a device, a folder, or a line longer than LINE_LIMIT bytes.
        OSError: the file is missing or not readable.
    """
    _refuse_irregular(path)
    with path.open("rb") as file:
        while (line := file.readline(LINE_LIMIT)).endswith(b"\n"):
            yield line[:-1].decode(errors="replace")  # the caller reports which line is wrong
    if len(line) == LINE_LIMIT:
        raise Unreadable(f"a line of more than {LINE_LIMIT:,} bytes")


def _refuse_irregular(path: Path) -> None:
    """Raises OSError for a missing file, and Unreadable for anything but a regular file."""
    path.stat()
    if not path.is_file():  # opening a pipe would block
        raise Unreadable("not a regular file")


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Unreadable(f"not UTF-8: {error.reason} at byte {error.start}") from None


def parse_json(text: str) -> Any:
    """A JSON value. Raises Unreadable for invalid JSON, nesting beyond DEPTH_LIMIT or numbers beyond Python's limit."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"not JSON: {error}") from None
    if text.count("[") + text.count("{") > DEPTH_LIMIT:  # fewer brackets can't nest deeper
        _refuse_depth(value)
    return value


def read_json(path: Path) -> Any:
    """A file's JSON value. Raises Unreadable or OSError; see `read_text` and `parse_json`."""
    return parse_json(read_text(path))


def read_json_object(path: Path) -> dict[str, Any]:
    """A file's JSON object. Raises the errors of `read_json`, and Unreadable for any other value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise Unreadable("not a JSON object")
    return value


def read_lines(path: Path) -> list[str]:
    """A file's lines. Raises Unreadable or OSError; see `read_text`."""
    return read_text(path, LINES_LIMIT).splitlines()


def read_yaml(path: Path, what: str, keys: str) -> dict[str, Any]:
    """A YAML mapping without tags, since tags could create objects.

    Args:
        what: the kind of file, for error messages.
        keys: some of its keys, for error messages.

    Raises:
        InputError: anything else.
    """
    try:
        values = parse_yaml(read_text(path))
    except (OSError, Unreadable) as error:
        raise InputError(f"{path} is not a YAML {what}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must be a {what} with keys such as {keys}, got {type(values).__name__}")
    return values


def parse_yaml(text: str) -> Any:
    """A YAML document as plain values.

    Raises:
        Unreadable: invalid YAML, tags, aliases that expand too far, or nesting beyond DEPTH_LIMIT.
    """
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _refuse_growth(node)  # before constructing values, which expands merged keys
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except Unreadable:
        raise
    # PyYAML raises the last few of these for a tag that doesn't fit its text, such as `!!bool maybe`.
    except (yaml.YAMLError, RecursionError, ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
        raise Unreadable(str(error) or type(error).__name__) from None


def _refuse_growth(root: yaml.Node) -> None:
    """Raises Unreadable for a document that expands to more than YAML_LIMIT characters, or is nested too deep."""
    waiting, size = [(root, 1)], 0
    while waiting:
        node, depth = waiting.pop()
        size += 1 + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
        if size > YAML_LIMIT:
            raise Unreadable(f"it expands to more than {YAML_LIMIT:,} characters")
        if node.tag == "tag:yaml.org,2002:int" and len(node.value) > DIGITS_LIMIT:
            raise Unreadable(f"it has a number of {len(node.value):,} digits")
        if depth > DEPTH_LIMIT:  # for example a list that contains itself
            raise Unreadable(f"it is nested more than {DEPTH_LIMIT} deep")
        if isinstance(node, yaml.SequenceNode):
            waiting += [(part, depth + 1) for part in node.value]
        elif isinstance(node, yaml.MappingNode):
            waiting += [(part, depth + 1) for pair in node.value for part in pair]


def _refuse_depth(value: Any) -> None:
    """Raises Unreadable for a JSON value nested too deep."""
    level = [value]
    for _ in range(DEPTH_LIMIT):
        nested = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = [part for parts in nested for part in parts]
    if any(isinstance(part, dict | list) for part in level):
        raise Unreadable(f"it is nested more than {DEPTH_LIMIT} deep")


def refuse_bomb(archive: ZipFile, path: Path, only: Callable[[ZipInfo], bool] = lambda entry: True) -> None:
    """Raises ValueError for an archive that would unpack to far more than its own size; nothing is unpacked.

    Args:
        only: which entries will be read.
    """
    entries = [entry for entry in archive.infolist() if only(entry)]
    for entry in entries:
        if entry.file_size > max(1 << 20, RATIO_LIMIT * entry.compress_size):
            raise ValueError(f"its entry {one_line(entry.filename)} is compressed more than {RATIO_LIMIT} times")
    held, declared = path.stat().st_size, sum(entry.compress_size for entry in entries)
    if declared > held:  # entries overlap, or a false compressed size hides the ratio
        raise ValueError(f"its entries declare {declared:,} bytes and the file holds {held:,}")


def stored_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """tensor name -> shape. Raises InputError; see `read_header`."""
    return {name: shape for name, (shape, _) in read_header(file).items()}


def read_header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """tensor name -> shape and safetensors' dtype name (F32, I64, C64), read from the header alone.

    Raises:
        InputError: the file is missing, truncated or not safetensors.
    """
    try:
        if not file.is_file():  # opening a pipe would block
            raise OSError("not a regular file")
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is truncated or not safetensors: {error}") from None


class NotTensors(ValueError):
    """A pickle doesn't hold a mapping of names to plain tensors."""


def load_pickled_tensors(path: Path) -> "dict[str, Tensor]":
    """The tensors of a state dict (.pth) that torch.save wrote, on the CPU.

    Raises:
        NotTensors: anything but a mapping of names to tensors, or tensors that are larger than the file.
        Exception: of almost any type, if unpickling fails or the file refers to code.
    """
    import torch  # slow to import, and needed only here

    if zipfile.is_zipfile(path):
        with ZipFile(path) as archive:
            refuse_bomb(archive, path)
    else:
        with path.open("rb") as file:
            if file.read(1) != PICKLE_START:  # torch would unpack anything else as a tar
                raise ValueError("neither a zip nor a pickle")
    state = torch.load(path, map_location="cpu", weights_only=True)

    def is_plain(value: object) -> bool:
        return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"

    if not isinstance(state, dict) or not all(isinstance(name, str) and is_plain(t) for name, t in state.items()):
        raise NotTensors("must hold tensors by name")
    held, size = path.stat().st_size, sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if size > held + EXPANDED_LIMIT:
        raise NotTensors(f"has tensors of {size:,} bytes in a file of {held:,}")
    return dict(state)
