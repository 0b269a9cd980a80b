"""Define an op once for all backends: schemas, implementations that dispatch on the backend's name, and fakes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from caps_kernels import backends

_LIBRARY = torch.library.Library("caps_kernels", "DEF")
_PLAIN = (Tensor, torch.nn.Parameter)

Call = Callable[..., tuple[Tensor, ...]]


def define(op: str, direction: str, schema: str, fake: Call) -> Call:
    """Define `caps_kernels::<op>_fwd` or `_bwd` and return a callable for it.

    Args:
        op: the public function's name.
        direction: "fwd" or "bwd": which callable of the backend's `Implementation` it runs.
        schema: arguments and results, ending in `str backend) -> (Tensor …)`.
        fake: empty results for the schema's arguments; results of every backend are contiguous.
    """
    name = f"{op}_{direction}"

    def run(*args: Any) -> tuple[Tensor, ...] | Tensor:
        *arguments, backend = args
        implementation = backends.implementation(op, backend)
        function = implementation.forward if direction == "fwd" else implementation.backward
        device = args[0].device.type
        if not (torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device)):
            return _unwrap(tuple([result.contiguous() for result in function(*arguments)]))
        # Autocast was applied to the arguments already; inside, it would round the accumulators.
        with torch.autocast(device, enabled=False):
            return _unwrap(tuple(result.contiguous() for result in function(*arguments)))

    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"caps_kernels::{name}", lambda *args: _unwrap(fake(*args[:-1])), lib=_LIBRARY)
    overload = _overload(name)

    def call(*args: Any) -> tuple[Tensor, ...]:
        return _wrap((run if _only_the_backend_sees(args) else overload)(*args))

    return call


def _only_the_backend_sees(args: Sequence[Any]) -> bool:
    """Whether going through torch's dispatcher would lead nowhere but to the backend, at the price of a small call.

    Not so where a program is traced, where a mode or a tensor's class wants to see every op, for tensors that hold
    nothing, and where a transform or forward-mode gradients take part; reverse-mode gradients are the caller's matter.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return False
    return not any(isinstance(arg, Tensor) and (type(arg) not in _PLAIN or arg.is_meta) for arg in args)


def register_autograd(op: str, direction: str, function: Call) -> None:
    """Make the op itself, called on tensors that require gradients, run through `function`.

    The public functions do so before they reach the op; compiled and exported programs hold the op alone. torch.func's
    transforms do not reach through the dispatcher to an autograd Function, and refusing them there is what keeps them
    from treating the op as a constant.
    """
    name = f"{op}_{direction}"
    overload = _overload(name)

    def run(keyset: Any, *args: Any) -> tuple[Tensor, ...] | Tensor:
        reverse = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        forward = forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()
        if not (reverse or forward):
            result: tuple[Tensor, ...] | Tensor = overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)
            return result
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                f"torch.func's transforms cannot differentiate torch.ops.caps_kernels.{name} itself, nor a "
                f"torch.compile'd function around it; call caps_kernels.functional.{op} in eager mode"
            )
        return _unwrap(function(*args))

    _LIBRARY.impl(name, run, "Autograd", with_keyset=True)


def _overload(name: str) -> Any:
    return getattr(torch.ops.caps_kernels, name).default


def _wrap(results: tuple[Tensor, ...] | Tensor) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _unwrap(results: tuple[Tensor, ...]) -> tuple[Tensor, ...] | Tensor:
    """A schema with one result returns the tensor itself."""
    return results if len(results) > 1 else results[0]
