"""Make an op differentiable once for all: gradients, second derivatives, vmap.

Every op follows one pattern. Forward takes tensors, options and the backend's name, and returns the output, then what
is saved for backward, then extras that carry no gradient. Backward takes the output's gradient, the same tensors, the
saved ones and the same options, and returns one gradient a tensor.

Backward runs through a second autograd Function, so that second derivatives cannot be silently wrong: they are taken
by differentiating the reference's own backward, which is written in plain differentiable PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from caps_kernels._library import Call, register_autograd
from caps_kernels.backends import Implementation


@dataclass(frozen=True)
class Signature:
    """How an op's arguments and results are laid out."""

    name: str
    tensors: int
    """How many tensor arguments come first; some may be None."""
    saved: int
    """How many results after the first are saved for backward."""
    batch_dims: tuple[int, ...] = ()
    """For each result, the dimension that holds the batch of the first argument (where that is dimension 0)."""
    any_rank: bool = False
    """The op takes any number of leading dimensions and treats them alike."""


SIGNATURES: dict[str, Signature] = {}
"""Of every op, by name."""


def differentiable(signature: Signature, forward: Call, backward: Call, reference: Implementation) -> Call:
    """The op as a function of its schema's arguments that autograd, torch.func and torch.compile understand.

    Args:
        signature: the layout of arguments and results.
        forward: the forward op.
        backward: the backward op.
        reference: the op in plain differentiable PyTorch, from which second derivatives come.
    """
    SIGNATURES[signature.name] = signature
    count, saved_count = signature.tensors, signature.saved

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return backward(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            ctx.save_for_backward(*inputs[: 1 + count])
            ctx.options = inputs[1 + count + saved_count :]

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            second = _second_order(signature, reference, ctx.saved_tensors, ctx.options[:-1], gradients)
            return (*second, *[None] * (saved_count + len(ctx.options)))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise _no_forward_mode(signature.name)

        @staticmethod
        def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
            if signature.any_rank:
                return _vmap_leading(Backward.apply, info.batch_size, in_dims, args)
            return _vmap_loop(Backward.apply, info.batch_size, in_dims, args)

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return forward(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            ctx.save_for_backward(*inputs[:count], *output[1 : 1 + saved_count])
            ctx.options = inputs[count:]
            ctx.mark_non_differentiable(*output[1:])
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
            if grad is None:
                return (None,) * (count + len(ctx.options))
            tensors = ctx.saved_tensors[:count]
            arguments = (grad, *ctx.saved_tensors, *ctx.options)
            gradients = (Backward.apply if _is_transformed(arguments) else backward)(*arguments)
            wanted = [g if t is not None else None for g, t in zip(gradients, tensors, strict=True)]
            return (*wanted, *[None] * len(ctx.options))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise _no_forward_mode(signature.name)

        @staticmethod
        def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
            if signature.any_rank:
                return _vmap_leading(Forward.apply, info.batch_size, in_dims, args)
            if in_dims[0] is not None and all(dim is None for dim in in_dims[1:]):
                return _vmap_fold(Forward.apply, info.batch_size, in_dims[0], args, signature.batch_dims)
            return _vmap_loop(Forward.apply, info.batch_size, in_dims, args)

    class Eager(torch.autograd.Function):
        """`Forward` for no transform but autograd: it spares the binding of arguments that torch.func asks for."""

        @staticmethod
        def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
            output = forward(*args)
            Forward.setup_context(ctx, args, output)
            return output

        backward = Forward.backward
        jvp = Forward.jvp

    register_autograd(signature.name, "fwd", Forward.apply)
    register_autograd(signature.name, "bwd", Backward.apply)

    def call(*args: Any) -> tuple[Tensor, ...]:
        # A traced program holds the op itself, which knows its own gradient; and where nothing asks for a gradient, an
        # autograd Function costs more time than a small call.
        function = forward
        if not torch.compiler.is_compiling() and _is_transformed(args):
            function = Forward.apply if torch._C._are_functorch_transforms_active() else Eager.apply
        results: tuple[Tensor, ...] = function(*args)
        return results

    return call


def _is_transformed(args: Sequence[Any]) -> bool:
    """Whether autograd or a transform of torch.func takes part in a call."""
    if torch._C._are_functorch_transforms_active():
        return True
    return torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)


def _no_forward_mode(name: str) -> Exception:
    return NotImplementedError(
        f"caps_kernels.{name} has no forward-mode derivative, which func.jvp, jacfwd and hessian ask for; "
        "use reverse mode: func.vjp, jacrev, or jacrev(jacrev(f)) for a Hessian"
    )


def _second_order(
    signature: Signature,
    reference: Implementation,
    tensors: Sequence[Tensor | None],
    options: Sequence[Any],
    gradients: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of <gradients, backward(tensors)>, the saved results taken as functions of the tensors."""
    present = [index for index, tensor in enumerate(tensors) if tensor is not None]

    def first_order(*arguments: Tensor) -> tuple[Tensor, ...]:
        full: list[Tensor | None] = [None] * len(tensors)
        for index, argument in zip(present, arguments, strict=True):
            full[index] = argument
        grad, *inputs = full
        saved = reference.forward(*inputs, *options)[1 : 1 + signature.saved]
        return reference.backward(grad, *inputs, *saved, *options)

    pullback: Callable[..., Any] = torch.func.vjp(first_order, *(tensors[index] for index in present))[1]
    results: list[Tensor | None] = [None] * len(tensors)
    for index, result in zip(present, pullback(tuple(gradients)), strict=True):
        results[index] = result
    return results


def _vmap_leading(function: Call, size: int, in_dims: Sequence[int | None], args: Sequence[Any]) -> Any:
    """vmap of an op that takes any number of leading dimensions: one call."""
    leading = [
        arg if not isinstance(arg, Tensor) else arg.expand(size, *arg.shape) if dim is None else arg.movedim(dim, 0)
        for arg, dim in zip(args, in_dims, strict=True)
    ]
    results = function(*leading)
    return results, (0,) * len(results)


def _vmap_fold(function: Call, size: int, in_dim: int, args: Sequence[Any], batch_dims: Sequence[int]) -> Any:
    """vmap over the first argument alone: its batch grows by the factor `size`, still one call."""
    first = args[0].movedim(in_dim, 0)
    results = function(first.flatten(0, 1), *args[1:])
    batch = first.shape[1]
    return tuple(r.unflatten(d, (size, batch)) for r, d in zip(results, batch_dims, strict=True)), tuple(batch_dims)


def _vmap_loop(function: Call, size: int, in_dims: Sequence[int | None], args: Sequence[Any]) -> Any:
    """vmap over weights or gradients of weights, each of which is a problem of its own: one call an element."""
    calls = [
        function(*(a if dim is None else a.select(dim, n) for a, dim in zip(args, in_dims, strict=True)))
        for n in range(size)
    ]
    results = tuple(torch.stack(column) for column in zip(*calls, strict=True))
    return results, (0,) * len(results)
