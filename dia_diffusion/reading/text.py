"""Text, JSON and YAML files that anybody may have written, read with bounds on their size, depth and growth.

A pipe would be waited for, a device read for ever, and a few kilobytes can ask for gigabytes, or for more calls within
each other than Python admits: all of that is refused here, in one place, for every reader.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dia_diffusion.errors import InputError

TEXT_LIMIT = 1 << 24
"""A file that is read as one value may hold this many bytes; a recipe or a card holds a few thousand."""
LINES_LIMIT = 1 << 28
"""A file of records may hold this many bytes: 100,000 evaluations."""
LINE_LIMIT = 1 << 20
"""A line of a file that is read line by line may hold this many."""
DEPTH_LIMIT = 64
"""Lists and mappings may lie within each other so deep, as what walks through them calls itself; a recipe has four."""
YAML_LIMIT = 1 << 20
"""What a YAML file's values come to, in characters, once each alias is replaced by what it stands for."""
DIGITS_LIMIT = 40
"""Of a whole number in YAML; Python takes time without end for some, and refuses to print others."""


class Unreadable(ValueError):
    """A file is none that is accepted, for the reason it tells; which file, and what it should be, is for a caller."""


def read_text(path: Path, limit: int = TEXT_LIMIT) -> str:
    """A regular file's text, UTF-8.

    Raises:
        Unreadable: a pipe, a device, a folder, more bytes than the limit, or another encoding.
        OSError: there is none, or it may not be read.
    """
    _refuse_irregular(path)
    if (size := path.stat().st_size) > limit:
        raise Unreadable(f"{size:,} bytes; accepted: {limit:,} or fewer")
    return _decoded(path.read_bytes()).replace("\r\n", "\n")


def whole_lines(path: Path) -> Iterator[str]:
    """A regular file's lines, one at a time; a last one without its end, as a crash leaves it, is left out.

    Raises:
        Unreadable: a pipe, a device, a folder, or a line of more bytes than LINE_LIMIT.
        OSError: there is none, or it may not be read.
    """
    _refuse_irregular(path)
    with path.open("rb") as file:
        while (line := file.readline(LINE_LIMIT)).endswith(b"\n"):
            yield line[:-1].decode(errors="replace")  # so that whoever reads it can tell which line it is
    if len(line) == LINE_LIMIT:
        raise Unreadable(f"a line of more than {LINE_LIMIT:,} bytes")


def _refuse_irregular(path: Path) -> None:
    """Raises OSError where there is nothing, and Unreadable for what is no file."""
    path.stat()
    if not path.is_file():  # opening a pipe would wait for ever
        raise Unreadable("not a regular file")


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Unreadable(f"not UTF-8: {error.reason} at byte {error.start}") from None


def parse_json(text: str) -> Any:
    """A JSON value. Raises Unreadable for other text, for endless nesting and for numbers of thousands of digits."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"not JSON: {error}") from None
    if text.count("[") + text.count("{") > DEPTH_LIMIT:  # fewer can't be nested deeper
        _refuse_depth(value)
    return value


def read_json(path: Path) -> Any:
    """A file's JSON value. Raises Unreadable or OSError, as `read_text` and `parse_json`."""
    return parse_json(read_text(path))


def read_json_object(path: Path) -> dict[str, Any]:
    """The same, where only an object is accepted."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise Unreadable("no JSON object")
    return value


def read_lines(path: Path) -> list[str]:
    """A file's lines. Raises Unreadable or OSError, as `read_text`."""
    return read_text(path, LINES_LIMIT).splitlines()


def read_yaml(path: Path, what: str, keys: str) -> dict[str, Any]:
    """A YAML file of keys; no tags, which could make objects.

    Raises InputError for another file, naming `what` it should be and some of its keys.
    """
    try:
        values = parse_yaml(read_text(path))
    except (OSError, Unreadable) as error:
        raise InputError(f"{path} is not a YAML {what}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} is not a {what}; accepted: keys such as {keys}")
    return values


def parse_yaml(text: str) -> Any:
    """A YAML document as plain values.

    Raises:
        Unreadable: other text, tags, aliases that stand for each other without end, or endless nesting.
    """
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _refuse_growth(node)  # before values are made of it: merged keys grow while they are
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except Unreadable:
        raise
    # The last are PyYAML's for a tag of its own before text of another kind, as `!!bool maybe`.
    except (yaml.YAMLError, RecursionError, ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
        raise Unreadable(str(error) or type(error).__name__) from None


def _refuse_growth(root: yaml.Node) -> None:
    """Raises Unreadable for a document that stands for more than YAML_LIMIT characters, or is nested too deep."""
    waiting, size = [(root, 1)], 0
    while waiting:
        node, depth = waiting.pop()
        size += 1 + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
        if size > YAML_LIMIT:
            raise Unreadable(f"it stands for more than {YAML_LIMIT:,} characters")
        if node.tag == "tag:yaml.org,2002:int" and len(node.value) > DIGITS_LIMIT:
            raise Unreadable(f"it has a number of {len(node.value):,} digits")
        if depth > DEPTH_LIMIT:  # as of a list within itself
            raise Unreadable(f"it is nested more than {DEPTH_LIMIT} deep")
        if isinstance(node, yaml.SequenceNode):
            waiting += [(part, depth + 1) for part in node.value]
        elif isinstance(node, yaml.MappingNode):
            waiting += [(part, depth + 1) for pair in node.value for part in pair]


def _refuse_depth(value: Any) -> None:
    """Raises Unreadable for what is nested too deep."""
    level = [value]
    for _ in range(DEPTH_LIMIT):
        nested = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = [part for parts in nested for part in parts]
    if any(isinstance(part, dict | list) for part in level):
        raise Unreadable(f"not JSON that is accepted: nested more than {DEPTH_LIMIT} deep")
