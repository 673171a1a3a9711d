"""Precision settings of torch, its old and its new ones, inside and after the feature extractor's context."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from dia_diffusion.evaluation.features import exact_float32 as module
from dia_diffusion.evaluation.features.exact_float32 import exact_float32

backends: Any = torch.backends
new_settings = pytest.mark.skipif(not module.NEW_SETTINGS, reason="torch has no fp32_precision before 2.9")
PLACES = ["cudnn.conv", "cudnn.rnn", "cuda.matmul", "mkldnn.conv", "mkldnn.matmul"]


def place(name: str) -> Any:
    found = backends
    for part in name.split("."):
        found = getattr(found, part)
    return found


def seen() -> dict[str, Any]:
    """Every setting; those that torch refuses to read after a mix of both kinds by the refusal."""
    settings = {f"{name}.allow_tf32": (place(name), "allow_tf32") for name in ("cudnn", "cuda.matmul")}
    settings |= {f"cudnn.{name}": (backends.cudnn, name) for name in ("enabled", "deterministic", "benchmark")}
    if module.NEW_SETTINGS:
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
    if module.NEW_SETTINGS:
        backends.fp32_precision = "none"
        for there in (backends.cudnn, backends.mkldnn, backends.mkldnn.conv, backends.mkldnn.matmul):
            there.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = True
    backends.cudnn.benchmark = backends.cudnn.deterministic = False


def put(name: str, value: str) -> Callable[[], None]:
    return lambda: setattr(place(name) if name else backends, "fp32_precision", value)


def old_tf32(on: bool) -> Callable[[], None]:
    def switch() -> None:
        backends.cudnn.allow_tf32 = backends.cuda.matmul.allow_tf32 = on
        backends.cudnn.benchmark = on

    return switch


NEW = {
    "tf32 everywhere": [put("", "tf32")],
    "bf16 on the CPU": [put("mkldnn", "bf16")],
    "tf32 in cuDNN": [put("cudnn", "tf32")],
    "tf32 in convolutions": [put("cudnn.conv", "tf32")],
    "ieee everywhere, tf32 in products": [put("", "ieee"), put("cuda.matmul", "tf32")],
    "old, then new": [old_tf32(True), put("", "tf32"), put("cudnn.conv", "ieee")],
    "new, then old": [put("", "tf32"), old_tf32(False)],
}
OLD = {
    "default": [],
    "old, on": [old_tf32(True)],
    "old, off": [old_tf32(False)],
    "old, products": [lambda: torch.set_float32_matmul_precision("medium")],
}


@pytest.mark.parametrize("changes", [*OLD.values(), *(pytest.param(c, marks=new_settings) for c in NEW.values())])
@pytest.mark.parametrize("fails", [False, True])
def test_float32_is_exact_inside_and_settings_are_as_before_afterwards(
    changes: list[Callable[[], None]], fails: bool
) -> None:
    for change in changes:
        change()
    before = seen()
    try:
        with exact_float32():
            inside = seen()
            if fails:
                raise OSError
    except OSError:
        pass
    if module.NEW_SETTINGS:
        assert {inside[name] for name in PLACES} == {"ieee"}
    else:
        assert not inside["cudnn.allow_tf32"] and not inside["cuda.matmul.allow_tf32"]
    assert inside["cudnn.deterministic"] and not inside["cudnn.benchmark"]
    assert seen() == before


@new_settings
def test_a_precision_for_all_still_reaches_what_has_none_of_its_own() -> None:
    """An operator that read as its backend's before must not have a precision of its own afterwards."""
    for name in PLACES:
        place(name).fp32_precision = "none"
    backends.fp32_precision = "tf32"
    with exact_float32():
        pass
    backends.fp32_precision = "ieee"
    assert {place(name).fp32_precision for name in PLACES} == {"ieee"}


@pytest.mark.parametrize("changes", OLD.values())
def test_torch_before_the_new_settings(changes: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NEW_SETTINGS", False)
    for change in changes:
        change()
    before = seen()
    with exact_float32():
        assert not backends.cudnn.allow_tf32 and not backends.cuda.matmul.allow_tf32
    assert seen() == before
