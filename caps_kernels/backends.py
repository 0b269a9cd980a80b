"""Which backend runs an op, and why.

`available()` names the backends that can run here, `explain(op, *args)` says of every backend why it would or would
not take a call, and `use(name)` chooses one for a block of code. Without a choice the first backend of
`PREFERENCE[device]` that can run is taken; the choice is made on real tensors, before any kernel runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from caps_kernels import _extension, _trust

ENVIRONMENT_VARIABLE = "CAPS_KERNELS_BACKEND"


class BackendError(RuntimeError):
    """The backend asked for cannot run the call; the message gives the reason."""


class FallbackWarning(UserWarning):
    """Nobody chose a backend, and only the reference could run, or a GPU backend failed its self-check; warned once."""


@dataclass(frozen=True)
class Backend:
    """A way to run ops: the devices it serves and what it lacks on this machine."""

    name: str
    summary: str
    devices: tuple[str, ...] | None
    """Device types it runs on; None stands for all of them."""
    missing: Callable[[], str | None]
    """Why it cannot run anything here, or None where it can."""
    without_device: str = "no CUDA device"
    """What to say where this machine has none of its devices."""
    on_trial: bool = False
    """Taken unasked only after its self-check on the device: `_trust.py`."""


@dataclass(frozen=True)
class Implementation:
    """One op on one backend. All callables take the op's arguments in the order of its schema, without `backend`."""

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]
    why_not: Callable[..., str | None] = lambda *_: None
    """Why it cannot run these arguments (a dtype it lacks, say), or None."""
    regime: Callable[..., str] = lambda *_: "plain"
    """Which of its kernels or tilings would run these arguments."""
    slow: Callable[..., str | None] = lambda *_: None
    """Why it is no good choice for these arguments, by their shapes and dtypes alone, or None: a later backend of the
    device's preference is then taken unasked, but not the reference."""


@dataclass(frozen=True)
class Lazy:
    """An implementation that runs whatever the op takes, in a module that is imported when it is first needed: for
    backends whose language is slow to import.
    """

    module: str
    """It holds `IMPLEMENTATION`, an `Implementation` without a `why_not` and a `slow`."""

    def load(self) -> Implementation:
        """The implementation. Raises ImportError."""
        implementation: Implementation = importlib.import_module(self.module).IMPLEMENTATION
        return implementation


@dataclass(frozen=True)
class Verdict:
    """What `explain` says of one backend: `reason` is None exactly when it can run, and then `regime` says how."""

    backend: str
    reason: str | None
    regime: str | None
    chosen: bool
    distrust: str | None = None
    """Why it is not taken unasked although it can run: what its self-check found; or None."""
    slow: str | None = None
    """Why it is taken unasked only where none but the reference is left; or None."""

    def __str__(self) -> str:
        if self.reason is not None:
            return f"{self.backend}: cannot run: {self.reason}"
        if self.distrust is not None:
            asked = "runs, for it was asked for" if self.chosen else "would run only when asked for"
            return f"{self.backend}: {asked} ({self.regime}): {self.distrust}"
        slow = "" if self.slow is None else f": {self.slow}"
        return f"{self.backend}: {'runs' if self.chosen else 'would run'} ({self.regime}){slow}"


class Explanation(tuple[Verdict, ...]):
    """One `Verdict` a backend; prints as one line each."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self))


TRITON_INTERPRETS = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
"""Whether Triton interprets kernels instead of compiling them, in which case they run on the CPU; Triton, too, decides
it once, when it reads a kernel."""


def _triton_missing() -> str | None:
    return None if importlib.util.find_spec("triton") is not None else "triton is not installed"


_TRITON_MISSING = _triton_missing()

BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cuda", "CUDA C++, NVIDIA GPUs", ("cuda",), lambda: _extension.MISSING["cuda"], on_trial=True),
        Backend(
            "triton",
            "Triton, GPUs",
            ("cpu", "cuda") if TRITON_INTERPRETS else ("cuda",),
            lambda: _TRITON_MISSING,
            "no CUDA device (TRITON_INTERPRET=1 runs it on CPU tensors, slowly)",
            on_trial=True,
        ),
        Backend("cpp", "C++, CPU", ("cpu",), lambda: _extension.MISSING["cpp"]),
        Backend("reference", "eager PyTorch, any device: the specification", None, lambda: None),
    )
}
PREFERENCE = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}

_PREPARE: dict[str, Callable[..., tuple[Any, ...]]] = {}
_IMPLEMENTATIONS: dict[tuple[str, str], Implementation | Lazy] = {}
_WARNED: set[str] = set()
_CHOSEN: ContextVar[str | None] = ContextVar("caps_kernels_backend", default=None)
_CHOSEN_LAST: str | None = None
"""What `use()` was told last, in whatever thread: what torch.compile follows where it cannot read a ContextVar."""
_CONTEXTS_ARE_TRACED = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)


def register_op(op: str, prepare: Callable[..., tuple[Any, ...]]) -> None:
    """Make an op known. `prepare` turns the public function's arguments into the checked arguments of its schema."""
    _PREPARE[op] = prepare


def register(op: str, backend: str, implementation: Implementation | Lazy) -> None:
    """Let `backend` run `op`."""
    _IMPLEMENTATIONS[op, backend] = implementation


def ops() -> tuple[str, ...]:
    """Names of all ops."""
    return tuple(_PREPARE)


def implementation(op: str, backend: str) -> Implementation:
    """The implementation of `op` on `backend`. Raises `BackendError` where there is none."""
    found = _IMPLEMENTATIONS.get((op, backend))
    if found is None:
        raise BackendError(f"{op} has no implementation on backend {backend!r}")
    if isinstance(found, Lazy):
        found = _IMPLEMENTATIONS[op, backend] = found.load()
    return found


def available() -> tuple[str, ...]:
    """Names of the backends that can run at least one op on this machine, the preferred first."""
    return tuple(name for name in BACKENDS if any(lacking(op, name) is None for op in _PREPARE))


def lacking(op: str, backend: str) -> str | None:
    """Why `backend` cannot run `op` on this machine whatever the arguments, or None where it can."""
    missing = BACKENDS[backend].missing()
    if missing is not None:
        return missing
    if (op, backend) not in _IMPLEMENTATIONS:
        return f"{op} is not written for it yet"
    devices = BACKENDS[backend].devices
    if devices is not None and "cpu" not in devices and not torch.cuda.is_available():
        return BACKENDS[backend].without_device
    return None


def why_not(op: str, backend: str, args: Sequence[Any]) -> str | None:
    """Why `backend` cannot run `op` on `args` (the schema's arguments), or None where it can."""
    devices = BACKENDS[backend].devices
    device = args[0].device.type
    if devices is not None and device not in devices:
        return f"it runs on {' and '.join(devices)} tensors, these are on {device}"
    reason = lacking(op, backend)
    if reason is not None:
        return reason
    found = _IMPLEMENTATIONS[op, backend]
    return None if isinstance(found, Lazy) else found.why_not(*args)


def select(op: str, args: Sequence[Any], backend: str | None = None, *, warn: bool = True) -> str:
    """The backend that runs `op` on `args`: the one asked for, else that of `use()`, of CAPS_KERNELS_BACKEND, or
    the first of the device's preference that can and passes its self-check; one that is slow at it is passed over for
    another, though not for the reference. One that fails the check is warned of once, a fall to the reference once an
    op, unless not `warn`.

    Raises:
        ValueError: the name is none of `BACKENDS`.
        BackendError: the backend asked for cannot run the call.
    """
    asked = backend or _chosen() or os.environ.get(ENVIRONMENT_VARIABLE)
    if asked:
        _check_name(asked)
        reason = why_not(op, asked, args)
        if reason is not None:
            raise BackendError(f"backend {asked!r} cannot run {op}: {reason}")
        return asked
    reasons: list[str] = []
    failed: list[tuple[str, str]] = []
    slow: list[str] = []
    for name in PREFERENCE.get(args[0].device.type, ("reference",)):
        reason = why_not(op, name, args)
        if reason is None:
            reason = distrust(name, args[0].device)
            if reason is None:
                if name == "reference" or why_slow(op, name, args) is None:
                    break
                slow.append(name)
                continue
            failed.append((name, reason))
        reasons.append(f"{name}: {reason}")
    if slow and name == "reference":
        name = slow[0]
    if warn and reasons and name == "reference":
        _warn_of_fallback(op, "; ".join(reasons))
    elif warn:
        for failure in failed:
            _warn_of_distrust(*failure)
    return name


def why_slow(op: str, backend: str, args: Sequence[Any]) -> str | None:
    """Why `backend` is no good choice for `op` on `args`, which it can run, or None."""
    found = _IMPLEMENTATIONS[op, backend]
    return None if isinstance(found, Lazy) else found.slow(*args)


def _chosen() -> str | None:
    if not _CONTEXTS_ARE_TRACED and torch.compiler.is_compiling():
        return _CHOSEN_LAST
    return _CHOSEN.get()


def distrust(backend: str, device: torch.device, *, check: bool = True) -> str | None:
    """Why `backend`, although it can run, is not taken unasked on `device`, or None.

    Where nobody knows yet, its self-check is run; or, without `check`, nothing speaks against it.
    """
    if not BACKENDS[backend].on_trial or backend not in PREFERENCE.get(device.type, ()):
        return None
    if check:
        return _trust.distrust(backend, device.type, device.index)
    known = _trust.known(backend, device.type, device.index)
    return known.reason if known is not None else None


@_trust.constant_in_graphs
def _warn_of_distrust(backend: str, reason: str) -> None:
    _warn_once(
        reason,
        f"backend {backend!r} is passed over: {reason}. `python -m caps_kernels --check` checks it again; "
        f"backend={backend!r} runs it all the same.",
    )


@_trust.constant_in_graphs
def _warn_of_fallback(op: str, reasons: str) -> None:
    _warn_once(
        op,
        f"{op} runs on the reference backend, which is slow ({reasons}). "
        "Choose it explicitly (backend='reference', or CAPS_KERNELS_BACKEND=reference) to silence this.",
    )


def _warn_once(what: str, message: str) -> None:
    if what not in _WARNED:
        _WARNED.add(what)
        warnings.warn(message, FallbackWarning, stacklevel=5)


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, BACKENDS))}, got {name!r}")


def explain(op: str, *args: Any, **options: Any) -> Explanation:
    """Say of every backend why it would or would not run a call, and in which regime.

    Args:
        op: the public function's name, such as "dense_capsules".
        *args: the call's arguments, as given to that function.
        **options: the call's keyword arguments, `backend` among them.

    Returns:
        One `Verdict` for each backend; `print` it for one line each.

    Raises:
        ValueError: there is no such op, or an argument the op itself refuses.
        TypeError: an argument the op itself refuses.
    """
    if op not in _PREPARE:
        raise ValueError(f"op must be one of {', '.join(map(repr, _PREPARE))}, got {op!r}")
    requested = options.pop("backend", None)
    prepared = _PREPARE[op](*args, **options)
    reasons = {name: why_not(op, name, prepared) for name in BACKENDS}
    try:
        chosen = select(op, prepared, requested, warn=False)
    except BackendError:
        chosen = None
    return Explanation(
        Verdict(
            backend=name,
            reason=reason,
            regime=None if reason is not None else implementation(op, name).regime(*prepared),
            chosen=name == chosen,
            # Whatever comes before the chosen one was checked when that was selected.
            distrust=None if reason is not None else distrust(name, prepared[0].device, check=False),
            slow=None if reason is not None else why_slow(op, name, prepared),
        )
        for name, reason in reasons.items()
    )


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Run every op of a block on `backend`, unless a call names another; in this thread or task only, but before
    torch 2.14 compiled programs of all threads follow the latest choice of any.

    Raises:
        ValueError: the name is none of `BACKENDS`.
    """
    global _CHOSEN_LAST
    _check_name(backend)
    token, last = _CHOSEN.set(backend), _CHOSEN_LAST
    _CHOSEN_LAST = backend
    try:
        yield
    finally:
        _CHOSEN.reset(token)
        _CHOSEN_LAST = last
