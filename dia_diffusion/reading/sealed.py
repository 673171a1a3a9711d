"""JSON objects that carry a checksum of themselves, by which a flipped bit is found."""

import json
import zlib
from typing import Any

KEY = "crc32"


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """The object with its checksum, which is its last item."""
    return {**value, KEY: _checksum(json.loads(json.dumps(value)))}  # as it will be read: tuples are lists then


def unsealed(value: Any) -> dict[str, Any]:
    """The object without its checksum; one that was written without, as by an older version, is taken as it is.

    Raises:
        ValueError: it was altered since, or is no object.
    """
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    *items, (_, checksum) = [*value.items()] or [("", "")]
    rest = dict(items)
    if checksum == _checksum(rest):  # whatever its key, which may have had the flipped bit
        return rest
    if KEY in value:
        raise ValueError("its checksum differs")
    return value


def _checksum(value: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"
