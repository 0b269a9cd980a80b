"""Refuse bad arguments before any kernel runs: each error names the argument, what was expected and what came."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from caps_kernels import backends
from caps_kernels._trust import constant_in_graphs

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
ROUTING_GRADS = ("full", "last")


def tensors(required: Mapping[str, Tensor], optional: Mapping[str, Tensor | None] | None = None) -> None:
    """Check that all are tensors of one supported floating dtype on one device.

    Raises:
        TypeError: not a tensor, an unsupported dtype, or a mixture of dtypes.
        ValueError: tensors on different devices.
    """
    given = list(required.items())
    if optional is not None:
        given += [(name, tensor) for name, tensor in optional.items() if tensor is not None]
    first_name, first = given[0]
    for name, tensor in given:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {tensor.dtype}")
        if tensor.is_nested:
            raise TypeError(f"{name} must be a dense (strided) tensor, got a nested tensor")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense (strided) tensor, got layout {tensor.layout}")
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name} must have the dtype of {first_name}, {first.dtype}, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{name} must be on the device of {first_name}, {first.device}, got {tensor.device}")


def shape(name: str, tensor: Tensor, expected: Sequence[str | int], *, may_be_empty: str = "") -> None:
    """Check a tensor's shape against sizes: an int must match, a symbol's name stands for any size of at least 1.

    Args:
        name: the argument's name.
        tensor: the argument.
        expected: one entry a dimension, such as ("B", "I", 8).
        may_be_empty: a symbol whose size may be 0.

    Raises:
        ValueError: the shape differs.
    """
    sizes = tensor.shape
    if len(sizes) == len(expected):
        for size, wanted in zip(sizes, expected, strict=True):
            if not (size >= 1 or wanted == may_be_empty if isinstance(wanted, str) else size == wanted):
                break
        else:
            return
    symbols = ", ".join(s for s in expected if isinstance(s, str) and s != may_be_empty)
    raise ValueError(
        f"{name} must have shape [{', '.join(map(str, expected))}]"
        f"{f' with {symbols} at least 1' if symbols else ''}, got {list(tensor.shape)}"
    )


def positive_int(name: str, value: Any) -> int:
    """`value` as an int of at least 1. Raises TypeError or ValueError."""
    number = integer(name, value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number


def integer(name: str, value: Any) -> int:
    """`value` as an int (anything with `__index__` but a bool). Raises TypeError."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got bool")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}") from None


def flag(name: str, value: Any) -> bool:
    """`value`, which must be a bool. Raises TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return value


def routing_grad(value: Any) -> str:
    """`value`, which must be "full" or "last". Raises ValueError."""
    if value not in ROUTING_GRADS:
        raise ValueError(f"routing_grad must be 'full' or 'last', got {value!r}")
    return str(value)


def autocast(*given: Tensor | None) -> tuple[Any, ...]:
    """Under `torch.autocast`, the tensors in its dtype (float64 stays, as in PyTorch's own ops); else as they are."""
    first = given[0]
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return given
    if not isinstance(first, Tensor) or not autocast_is_on(first.device.type):
        return given
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in given
    )


def autocast_is_on(device: str) -> bool:
    """Whether `torch.autocast` is on for a device type; there are some it does not know, such as "meta"."""
    return _knows_autocast(device) and torch.is_autocast_enabled(device)


@constant_in_graphs  # which torch.compile of 2.11 cannot trace
def _knows_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def backend(value: Any) -> str | None:
    """`value`, which must be None or the name of a backend. Raises ValueError."""
    if value is not None and value not in backends.BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, backends.BACKENDS))}, got {value!r}")
    return value  # type: ignore[no-any-return]
