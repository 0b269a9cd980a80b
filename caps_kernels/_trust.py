"""Whether a GPU backend may be taken unasked: what its self-check found on this device and build.

The check (`_selfcheck.py`) runs in a child process, so that a kernel that hangs or faults cannot take the user's
program with it, once for each device model, driver, build of the kernels and version of torch and Triton: what it found
is kept in $XDG_CACHE_HOME/caps_kernels, or ~/.cache/caps_kernels. Nothing is checked at import.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import torch

from caps_kernels._version import __version__

SECONDS = 180.0
"""How long a check may take; it takes seconds, most of them to compile."""
Function = TypeVar("Function", bound=Callable[..., object])
PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Trial:
    """What a self-check found."""

    reason: str | None
    """Why the backend is not to be taken unasked; None where every op passed."""
    ops: Mapping[str, str]
    """A few words on each op that was run."""
    conclusive: bool = True
    """Whether it says something of the kernels, so that it is worth keeping; a full device, say, does not."""


_TRIALS: dict[tuple[str, str, int | None], Trial] = {}
_LOCK = threading.Lock()


def constant_in_graphs(function: Function) -> Function:
    """Let torch.compile call a function while it traces, as plain Python, and take its result as a constant."""
    # What torch.compiler.assume_constant_result does, which would import the whole compiler with this package.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs
def distrust(backend: str, device_type: str, index: int | None) -> str | None:
    """Why `backend` is not to be taken unasked on a device, or None; checks it where nobody has yet."""
    return trial(backend, device_type, index).reason


def trial(backend: str, device_type: str, index: int | None, *, again: bool = False) -> Trial:
    """What the self-check of `backend` found on a device.

    Args:
        backend: a name of `backends.BACKENDS`.
        device_type: such as "cuda".
        index: of the device; None where its type has but one.
        again: run the check whatever is known already.
    """
    known = _TRIALS.get((backend, device_type, index))
    if known is not None and not again:
        return known
    with _LOCK:
        if again or (backend, device_type, index) not in _TRIALS:
            _TRIALS[backend, device_type, index] = _kept_or_new(backend, device_type, index, again)
        return _TRIALS[backend, device_type, index]


def known(backend: str, device_type: str, index: int | None) -> Trial | None:
    """What an earlier self-check found, in this process or before; None where there was none."""
    return _TRIALS.get((backend, device_type, index)) or _read(_key(backend, device_type, index))


def _kept_or_new(backend: str, device_type: str, index: int | None, again: bool) -> Trial:
    """The kept result, or that of a new check, of which one at a time runs on a machine for one key."""
    key = _key(backend, device_type, index)
    found = None if again else _read(key)
    if found is None:
        with _alone(key):
            found = None if again else _read(key)
            if found is None:
                found = _run(backend, device_type if index is None else f"{device_type}:{index}")
                _write(key, found)
    return found


def _key(backend: str, device_type: str, index: int | None) -> dict[str, Any]:
    """All that a result may depend on."""
    return {
        "backend": backend,
        "device": _device(device_type, index),
        "caps_kernels": __version__,
        "kernels": _digest(),
        "torch": torch.__version__,
        "triton": _triton_version() if backend == "triton" else None,
        "interpreted": os.environ.get("TRITON_INTERPRET") if backend == "triton" else None,
    }


def _device(device_type: str, index: int | None) -> list[str]:
    """The model of a device and its driver."""
    if device_type != "cuda":
        return [device_type]
    properties = torch.cuda.get_device_properties(index or 0)
    versions = [f"{properties.major}.{properties.minor}", getattr(properties, "gcnArchName", "")]
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        with suppress(OSError):
            versions.append(Path(path).read_text(encoding="utf-8").partition("\n")[0])
    return [properties.name, *versions, str(torch.version.cuda or torch.version.hip)]


@functools.cache
def _digest() -> str:
    """A hash of the package's code and of its compiled CUDA library."""
    digest = hashlib.sha256()
    for path in sorted([*PACKAGE.rglob("*.py"), *PACKAGE.glob("_cuda*.so")]):
        digest.update(f"{path.relative_to(PACKAGE)} ".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def _folder() -> Path | None:
    """Where results are kept; None where there is no such place."""
    asked = Path(os.environ.get("XDG_CACHE_HOME", ""))
    with suppress(RuntimeError, OSError):
        folder = (asked if asked.is_absolute() else Path.home() / ".cache") / "caps_kernels"
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    return None


def _file(key: Mapping[str, Any]) -> Path | None:
    folder = _folder()
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return folder and folder / f"selfcheck-{name}.json"


def _read(key: Mapping[str, Any]) -> Trial | None:
    """The kept result for a key; None where there is none, or none that can be read."""
    file = _file(key)
    if file is None:
        return None
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        reason, ops = kept["reason"], kept["ops"]
        texts = [*ops, *ops.values(), *([] if reason is None else [reason])]
        if kept["key"] != key or not all(isinstance(text, str) for text in texts):
            return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return Trial(reason, ops)


def _write(key: Mapping[str, Any], found: Trial) -> None:
    """Keep a result, whole or not at all; where that is impossible the next program checks again."""
    file = _file(key)
    if file is None or not found.conclusive:
        return
    with suppress(OSError):
        descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f"{file.stem}-")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as temporary:
                json.dump({"key": key, "reason": found.reason, "ops": found.ops}, temporary, indent=2)
            os.replace(name, file)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name)


@contextmanager
def _alone(key: Mapping[str, Any]) -> Iterator[None]:
    """Keep other processes with the same key waiting, as the ranks of a distributed program; not for ever."""
    file = _file(key)
    with ExitStack() as stack:
        if file is not None:
            with suppress(OSError):  # Without a lock, two may check at once: a waste, no more.
                _take(stack.enter_context(open(file.with_suffix(".lock"), "w")))
        yield


def _take(lock: IO[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not _taken(lock) and time.monotonic() < deadline:
        time.sleep(0.05)


def _taken(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def command(backend: str, device: str, report: Path) -> list[str]:
    """The child process that checks a backend; it writes what it finds to the file `report`."""
    return [sys.executable, "-m", "caps_kernels._selfcheck", backend, device, str(report)]


def _run(backend: str, device: str) -> Trial:
    """Run a check in a child process and read what it found."""
    # The child finds the modules that this program finds, in the same order, wherever it was started.
    path = os.pathsep.join(dict.fromkeys(os.path.abspath(entry) for entry in sys.path))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        report, errors = Path(folder, "report"), Path(folder, "errors")
        try:
            with open(errors, "w") as stderr:
                process = subprocess.Popen(
                    command(backend, device, report),
                    stdin=subprocess.DEVNULL,
                    stdout=stderr,
                    stderr=stderr,
                    cwd=folder,
                    env={**os.environ, "PYTHONPATH": path},
                    start_new_session=True,
                )
        except OSError as error:
            return Trial(f"its self-check could not be started: {error}", {}, conclusive=False)
        code = _wait(process)
        return _judge(code, report, errors)


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    """The exit code, or None where the process had to be ended."""
    try:
        return process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # With the compilers it may have started.
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)  # A process that waits for a driver may not die.


def _judge(code: int | None, report: Path, errors: Path) -> Trial:
    """What is to be made of a child's exit code, report, and last words."""
    lines = report.read_text(encoding="utf-8").splitlines() if report.exists() else []
    try:
        results = [json.loads(line) for line in lines]
    except ValueError:  # It died while it wrote.
        results = [json.loads(line) for line in lines[:-1]]
    ops = {result["op"]: result["text"] for result in results}
    said = errors.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
    if code == 2:
        return Trial(f"its self-check could not run: {said}", ops, conclusive=False)
    for result in results:
        if not result["passed"]:
            reason = f"its self-check failed on {result['op']}: {result['detail']}"
            return Trial(reason, ops, conclusive=not result["out_of_memory"])
    if code == 0:
        return Trial(None, ops)
    after = f"after {results[-1]['op']}" if results else "before its first result"
    if code is None:
        return Trial(f"its self-check did not end within {SECONDS:.0f} s; it stopped {after}", ops)
    if code < 0:
        with suppress(ValueError):
            return Trial(f"its self-check died of {signal.Signals(-code).name} {after}", ops)
    return Trial(f"its self-check ended with exit code {code} {after}: {said}", ops)
