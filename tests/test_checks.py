"""What the public functions refuse: the right exception, a message that helps, and no kernel run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from caps_kernels import backends, functional

pytestmark = pytest.mark.filterwarnings("ignore::caps_kernels.backends.FallbackWarning")

SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "squash": {"s": (3, 4)},
    "predict_votes": {"u": (2, 6, 3), "weight": (6, 2, 3, 4)},
    "dynamic_routing": {"votes": (2, 6, 2, 4), "bias": (2, 4)},
    "dense_capsules": {"u": (2, 6, 3), "weight": (6, 2, 3, 4), "bias": (2, 4)},
}
"""A good call of every public function."""
TENSORS = [(op, name) for op, shapes in SHAPES.items() for name in shapes]
FOLLOWERS = [(op, name) for op, shapes in SHAPES.items() for name in list(shapes)[1:]]
ROUTING = ["dynamic_routing", "dense_capsules"]
each_tensor = pytest.mark.parametrize(("op", "name"), TENSORS)
each_later_tensor = pytest.mark.parametrize(("op", "name"), FOLLOWERS)


class KernelRanError(AssertionError):
    """An implementation was reached."""


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every implementation of every backend fail the test that reaches it."""

    def fail(*_: Any) -> Any:
        raise KernelRanError

    broken = dict.fromkeys(backends._IMPLEMENTATIONS, backends.Implementation(fail, fail))
    monkeypatch.setattr(backends, "_IMPLEMENTATIONS", broken)


def arguments(op: str) -> dict[str, Any]:
    return {name: torch.zeros(shape) for name, shape in SHAPES[op].items()}


def assert_refused(op: str, changes: Mapping[str, Any], exception: type[Exception], *words: str) -> None:
    """The call and `explain` of it raise exactly `exception`, and all words stand in the message."""
    calls: tuple[Callable[..., Any], ...] = (
        getattr(functional, op),
        lambda **named: backends.explain(op, **named),
    )
    for call in calls:
        with pytest.raises(exception) as raised:
            call(**{**arguments(op), **changes})
        assert raised.type is exception
        missing = [word for word in words if word not in str(raised.value)]
        assert not missing, f"{missing} not in {str(raised.value)!r}"


@pytest.mark.parametrize("op", SHAPES)
def test_the_good_call_reaches_a_kernel(op: str, no_kernel: None) -> None:
    with pytest.raises(KernelRanError):
        getattr(functional, op)(**arguments(op))


@each_tensor
@pytest.mark.parametrize("value", [[[1.0, 2.0]], np.zeros((3, 4), np.float32), 1.0], ids=["list", "array", "number"])
def test_what_is_no_tensor(op: str, name: str, value: Any, no_kernel: None) -> None:
    words = (f"{name} must be a torch.Tensor", type(value).__name__)
    assert_refused(op, {name: value}, TypeError, *words)


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in TENSORS if name != "bias"])
def test_a_missing_tensor(op: str, name: str, no_kernel: None) -> None:
    assert_refused(op, {name: None}, TypeError, f"{name} must be a torch.Tensor", "NoneType")


@each_tensor
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_dtypes_without_kernels(op: str, name: str, dtype: torch.dtype, no_kernel: None) -> None:
    value = torch.zeros(SHAPES[op][name]).to(dtype)
    assert_refused(op, {name: value}, TypeError, f"{name} must be float32, float64, float16 or bfloat16", str(dtype))


@each_later_tensor
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_mixed_dtypes(op: str, name: str, dtype: torch.dtype, no_kernel: None) -> None:
    first = next(iter(SHAPES[op]))
    value = torch.zeros(SHAPES[op][name], dtype=dtype)
    words = (f"{name} must have the dtype of {first}", "torch.float32", str(dtype))
    assert_refused(op, {name: value}, TypeError, *words)


@each_later_tensor
@pytest.mark.parametrize("first_on_meta", [False, True], ids=["first on cpu", "first on meta"])
def test_mixed_devices(op: str, name: str, first_on_meta: bool, no_kernel: None) -> None:
    first = next(iter(SHAPES[op]))
    moved = {n: torch.zeros(s, device="meta") for n, s in SHAPES[op].items() if (n == name) != first_on_meta}
    if first_on_meta:
        moved[name] = torch.zeros(SHAPES[op][name])
    words = (f"{name} must be on the device of {first}", "cpu", "meta")
    assert_refused(op, moved, ValueError, *words)


@each_tensor
@pytest.mark.parametrize("make", [Tensor.to_sparse, Tensor.to_mkldnn], ids=["sparse", "mkldnn"])
def test_other_layouts(op: str, name: str, make: Callable[[Tensor], Tensor], no_kernel: None) -> None:
    value = make(torch.ones(SHAPES[op][name]))
    words = (f"{name} must be a dense (strided) tensor", str(value.layout))
    assert_refused(op, {name: value}, TypeError, *words)


@each_tensor
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors(op: str, name: str, no_kernel: None) -> None:
    value = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(1, 3)])
    assert_refused(op, {name: value}, TypeError, f"{name} must be a dense (strided) tensor", "nested")


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in TENSORS if op != "squash"])
@pytest.mark.parametrize("change", [-1, 1], ids=["one less", "one more"])
def test_wrong_ranks(op: str, name: str, change: int, no_kernel: None) -> None:
    shape = SHAPES[op][name]
    shape = shape[1:] if change < 0 else (1, *shape)
    assert_refused(op, {name: torch.zeros(shape)}, ValueError, f"{name} must have shape [", f"got {list(shape)}")


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in TENSORS if op != "squash"])
def test_every_size_but_the_batch_must_be_at_least_1(op: str, name: str, no_kernel: None) -> None:
    batch_dims = 1 if name in ("u", "votes") else 0
    for dim in range(batch_dims, len(SHAPES[op][name])):
        shape = [*SHAPES[op][name]]
        shape[dim] = 0
        assert_refused(op, {name: torch.zeros(shape)}, ValueError, f"{name} must have shape [", f"got {shape}")


def test_an_empty_vector_has_no_length(no_kernel: None) -> None:
    assert_refused("squash", {"s": torch.zeros(3, 0)}, ValueError, "s must have at least 1 element", "[3, 0]")
    assert_refused("squash", {"s": torch.zeros(3, 0), "dim": 1}, ValueError, "dim 1", "[3, 0]")


@pytest.mark.parametrize("op", ["predict_votes", "dense_capsules"])
def test_weights_that_do_not_fit(op: str, no_kernel: None) -> None:
    assert_refused(
        op, {"weight": torch.zeros(6, 2, 5, 4)}, ValueError, "weight must have shape [T, J, 3, E]", "[6, 2, 5, 4]"
    )
    assert_refused(op, {"weight": torch.zeros(5, 2, 3, 4)}, ValueError, "u must have I = T·positions = 5·1 = 5", "6")
    assert_refused(op, {"positions": 2}, ValueError, "u must have I = T·positions = 6·2 = 12", "got 6")
    shared = {"weight": torch.zeros(2, 2, 3, 4), "positions": 4}
    assert_refused(op, shared, ValueError, "u must have I = T·positions = 2·4 = 8", "got 6")


@pytest.mark.parametrize("op", ROUTING)
@pytest.mark.parametrize("shape", [(2, 5), (3, 4), (4, 2)], ids=str)
def test_a_bias_of_the_wrong_size(op: str, shape: tuple[int, int], no_kernel: None) -> None:
    assert_refused(op, {"bias": torch.zeros(shape)}, ValueError, "bias must have shape [2, 4]", str(list(shape)))


INTEGERS = [
    *((op, "iterations") for op in ROUTING),
    ("predict_votes", "positions"),
    ("dense_capsules", "positions"),
]


@pytest.mark.parametrize(("op", "name"), INTEGERS)
def test_integers(op: str, name: str, no_kernel: None) -> None:
    for value in (0, -3):
        assert_refused(op, {name: value}, ValueError, f"{name} must be at least 1", f"got {value}")
    for wrong in (True, 1.5, "3", None, torch.tensor(2.0)):
        assert_refused(op, {name: wrong}, TypeError, f"{name} must be an int", f"got {type(wrong).__name__}")
    with pytest.raises(KernelRanError):
        getattr(functional, op)(**{**arguments(op), name: np.int64(1)})


@pytest.mark.parametrize("op", ROUTING)
@pytest.mark.parametrize("name", ["leaky", "return_coupling"])
def test_flags(op: str, name: str, no_kernel: None) -> None:
    for wrong in (1, 0, None, "yes"):
        assert_refused(op, {name: wrong}, TypeError, f"{name} must be a bool", f"got {type(wrong).__name__}")


@pytest.mark.parametrize("op", ROUTING)
def test_routing_grad(op: str, no_kernel: None) -> None:
    for wrong in ("none", "FULL", None, True, ["full"]):
        assert_refused(op, {"routing_grad": wrong}, ValueError, "routing_grad must be 'full' or 'last'", repr(wrong))


def test_dim_of_squash(no_kernel: None) -> None:
    for wrong in (2, -3):
        assert_refused(
            "squash", {"dim": wrong}, ValueError, "dim must be a dimension of s, which has 2", f"got {wrong}"
        )
    assert_refused("squash", {"s": torch.tensor(1.0)}, ValueError, "dim must be a dimension of s, which has 0")
    for other in (True, 0.0, None):
        assert_refused("squash", {"dim": other}, TypeError, "dim must be an int", f"got {type(other).__name__}")


@pytest.mark.parametrize("op", SHAPES)
def test_backends_of_unknown_name(op: str, no_kernel: None) -> None:
    for wrong in ("gpu", "Reference", 3):
        assert_refused(op, {"backend": wrong}, ValueError, "backend must be None or one of", "'cpp'", repr(wrong))


@pytest.mark.parametrize("op", ["predict_votes", "dense_capsules"])
def test_autocast_unites_dtypes_but_float64_stays(op: str) -> None:
    mixed = {**arguments(op), "weight": torch.zeros(SHAPES[op]["weight"], dtype=torch.float16)}
    with torch.autocast("cpu", torch.bfloat16):
        assert getattr(functional, op)(**mixed).dtype == torch.bfloat16
        double = {"weight": torch.zeros(SHAPES[op]["weight"], dtype=torch.float64)}
        assert_refused(op, double, TypeError, "weight must have the dtype of u", "torch.bfloat16", "torch.float64")


@pytest.mark.parametrize("op", SHAPES)
def test_meta_tensors_give_the_shape_alone(op: str) -> None:
    real = getattr(functional, op)(**arguments(op))
    meta = getattr(functional, op)(**{name: torch.zeros(s, device="meta") for name, s in SHAPES[op].items()})
    assert meta.device.type == "meta"
    assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())
