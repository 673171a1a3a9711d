"""Old and new precision settings of torch, inside and after the feature extractor's context."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from dia_diffusion.precision import exact_float32

backends: Any = torch.backends
PLACES = ["cudnn.conv", "cudnn.rnn", "cuda.matmul", "mkldnn.conv", "mkldnn.matmul"]


def place(name: str) -> Any:
    found = backends
    for part in name.split("."):
        found = getattr(found, part)
    return found


def seen() -> dict[str, Any]:
    """Every setting; "refused" if torch refuses to read it after old and new settings were mixed."""
    settings = {f"{name}.allow_tf32": (place(name), "allow_tf32") for name in ("cudnn", "cuda.matmul")}
    settings |= {f"cudnn.{name}": (backends.cudnn, name) for name in ("enabled", "deterministic", "benchmark")}
    places = {"all": backends, "cudnn": backends.cudnn, "mkldnn": backends.mkldnn}
    places |= {name: place(name) for name in PLACES}
    settings |= {name: (there, "fp32_precision") for name, there in places.items()}
    values = {}
    for name, (there, attribute) in settings.items():
        try:
            values[name] = getattr(there, attribute)
        except RuntimeError:
            values[name] = "refused"
    return values


@pytest.fixture(autouse=True)
def default_settings() -> Iterator[None]:
    yield
    for there in (backends, backends.cudnn, backends.mkldnn, backends.mkldnn.conv, backends.mkldnn.matmul):
        there.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = True
    backends.cudnn.benchmark = backends.cudnn.deterministic = False


def put(name: str, value: str) -> Callable[[], None]:
    return lambda: setattr(place(name) if name else backends, "fp32_precision", value)


def old_tf32(on: bool) -> None:
    backends.cudnn.allow_tf32 = backends.cuda.matmul.allow_tf32 = on
    backends.cudnn.benchmark = on


SETTINGS: dict[str, list[Callable[[], None]]] = {
    "default": [],
    "old, on": [partial(old_tf32, True)],
    "old, off": [partial(old_tf32, False)],
    "old, products": [lambda: torch.set_float32_matmul_precision("medium")],
    "tf32 everywhere": [put("", "tf32")],
    "bf16 on the CPU": [put("mkldnn", "bf16")],
    "tf32 in cuDNN": [put("cudnn", "tf32")],
    "tf32 in convolutions": [put("cudnn.conv", "tf32")],
    "ieee everywhere, tf32 in products": [put("", "ieee"), put("cuda.matmul", "tf32")],
    "old, then new": [partial(old_tf32, True), put("", "tf32"), put("cudnn.conv", "ieee")],
    "new, then old": [put("", "tf32"), partial(old_tf32, False)],
}


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_float32_is_exact_inside_and_settings_are_as_before_afterwards(changes: list[Callable[[], None]]) -> None:
    for change in changes:
        change()
    before = seen()
    with contextlib.suppress(OSError), exact_float32():
        assert {seen()[name] for name in PLACES} == {"ieee"}
        assert backends.cudnn.deterministic and not backends.cudnn.benchmark
        raise OSError
    assert seen() == before


def test_a_global_precision_still_reaches_operators_without_their_own() -> None:
    """An operator that inherited its backend's precision before must still inherit it afterwards."""
    for name in PLACES:
        place(name).fp32_precision = "none"
    backends.fp32_precision = "tf32"
    with exact_float32():
        pass
    backends.fp32_precision = "ieee"
    assert {place(name).fp32_precision for name in PLACES} == {"ieee"}
