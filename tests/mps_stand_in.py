"""A stand-in for the device "mps", Apple's GPU: it computes on the CPU and refuses float64 like MPS.

It shows which code asks the device for float64, not whether MPS has every operation. Inside torch the device is
"meta:7", which no other code uses, because a torch built without MPS refuses "mps".
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

MPS, INNER = torch.device("mps"), torch.device("meta:7")


class _OnMps(torch.Tensor):
    """A tensor that claims to be on MPS; its `values` are on the CPU."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> "_OnMps":
        if values.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=INNER,
        )
        tensor.values = values
        return tensor

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return MPS

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self) -> str:  # type: ignore[override]
        return f"on mps: {self.values}"


class _Names(TorchFunctionMode):
    """Calls torch with the inner name of the device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not torch.device and "autocast" not in function.__name__:  # these accept "mps"
            args, kwargs = tree_map(lambda leaf: INNER if _is_mps(leaf) else leaf, (args, kwargs))
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") == INNER:  # not dispatched
            return function(*args, **{**kwargs, "device": "cpu"}).to(INNER)
        return function(*args, **kwargs)


def _is_mps(value: object) -> bool:
    return isinstance(value, str | torch.device) and str(value).partition(":")[0] == "mps"


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs the operation on the CPU; its result is on MPS if an argument or the requested `device` is."""
    asked = kwargs.get("device")
    on_mps = any(isinstance(leaf, _OnMps) for leaf in tree_leaves((args, kwargs)))
    if asked is not None:
        on_mps = torch.device(asked) == INNER
        kwargs = {**kwargs, "device": torch.device("cpu")}
    bare_args, bare_kwargs = tree_map_only(_OnMps, lambda tensor: tensor.values, (args, kwargs))
    result = function(*bare_args, **bare_kwargs)
    if not on_mps:
        return result
    result = tree_map_only(torch.Tensor, _OnMps, result)
    return return_and_correct_aliasing(function, args, kwargs, result)


@contextmanager
def stand_in() -> Iterator[None]:
    """Within the block, torch has the device and Accelerate chooses it."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # moved modules keep their parameter objects
    with pytest.MonkeyPatch.context() as patch, _Names(), _Dispatch():
        patch.setattr(PartialState, "default_device", property(lambda _: MPS))
        yield
    torch.__future__.set_swap_module_params_on_conversion(before)
