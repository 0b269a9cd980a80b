"""A GPU backend is taken unasked only after a self-check in a child process: its outcomes, and how they are kept."""

from __future__ import annotations

import json
import sys
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from caps_kernels import FallbackWarning, __main__, _selfcheck, _trust, backends, functional
from tests.fake_backend import KINDS, Fake, install

S = torch.ones(2, 3)
PASSES = 'print(\'{"op": "squash", "text": "ok", "passed": true, "detail": "", "out_of_memory": false}\', file=report)'


class Children:
    """How the self-check's child behaves, and how many there were."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: list[str] = []
        self.monkeypatch = monkeypatch
        self.kind("right")

    def kind(self, kind: str) -> None:
        """The real self-check, of a fake backend of `KINDS`."""
        self._command([sys.executable, "-m", "tests.fake_backend", kind])

    def script(self, script: str) -> None:
        """A program of its own, which finds the open file `report`."""
        start = "import os, sys, time, subprocess; report = open(sys.argv[-1], 'a');"
        self._command([sys.executable, "-c", f"{start} {script}"])

    def _command(self, command: list[str]) -> None:
        def record(backend: str, device: str, report: Path) -> list[str]:
            self.started.append(f"{backend} {device}")
            return [*command, backend, device, str(report)]

        self.monkeypatch.setattr(_trust, "command", record)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return install(monkeypatch, on_trial=True)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "caps_kernels"


@pytest.fixture
def children(fake: Fake, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Children:
    monkeypatch.setattr(_trust, "_TRIALS", {})
    return Children(monkeypatch)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new process knows: what is on the disk."""
    monkeypatch.setattr(_trust, "_TRIALS", {})


def chosen() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        return backends.select("squash", (S, -1))


def reason() -> str:
    return str(_trust.distrust("fake", "cpu", None))


def test_a_right_backend_is_taken_after_one_check(fake: Fake, children: Children) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            functional.squash(S)
    assert fake.calls == 3
    assert children.started == ["fake cpu"]


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("wrong", r"its self-check failed on squash: errors relative to the largest element: output 1\.0e-01"),
        ("raising", "its self-check failed on squash: OSError: the kernel is gone"),
        ("exiting", "its self-check ended with exit code 7 before its first result"),
        ("faulting", "its self-check died of SIGSEGV before its first result"),
    ],
)
def test_a_broken_backend_is_passed_over_with_one_warning_and_runs_when_asked_for(
    fake: Fake, children: Children, kind: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    children.kind(kind)
    backends.BACKENDS["next"] = replace(backends.BACKENDS["fake"], name="next", on_trial=False)
    backends.register("squash", "next", backends.implementation("squash", "reference"))
    monkeypatch.setattr(backends, "PREFERENCE", {"cpu": ("fake", "next", "reference")})
    with pytest.warns(FallbackWarning, match=f"backend 'fake' is passed over: {wanted}.*--check") as caught:
        functional.squash(S)
    assert [Path(w.filename) for w in caught] == [Path(__file__)]
    assert fake.calls == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        functional.squash(S)
        functional.squash(S, backend="fake")
        with backends.use("fake"):
            functional.squash(S)
    assert fake.calls == 2
    assert children.started == ["fake cpu"]
    verdict = next(v for v in backends.explain("squash", S) if v.backend == "fake")
    assert verdict.distrust is not None
    assert verdict.reason is None
    assert not verdict.chosen
    assert str(verdict).startswith("fake: would run only when asked for (tile of 3): its self-check")
    asked = str(backends.explain("squash", S, backend="fake")).splitlines()[0]
    assert asked.startswith("fake: runs, for it was asked for (tile of 3): its self-check")


def test_a_fall_to_the_reference_is_warned_of_alone_with_the_reason(children: Children) -> None:
    children.kind("wrong")
    with pytest.warns(FallbackWarning, match=r"squash runs on the reference .*fake: its self-check failed") as caught:
        functional.squash(S)
    assert len(caught) == 1


def test_a_hanging_check_is_ended_with_all_it_started(
    children: Children, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_trust, "SECONDS", 5.0)
    pids = tmp_path / "pids"
    children.script(
        "started = subprocess.Popen(['sleep', '1000']);"
        f"print(os.getpid(), started.pid, file=open({str(pids)!r}, 'w'), flush=True); time.sleep(1000)"
    )
    assert reason() == "its self-check did not end within 5 s; it stopped before its first result"
    for pid in pids.read_text().split():
        assert is_gone(int(pid)), pid


def is_gone(pid: int) -> bool:
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":  # Ended, and nobody has asked how.
            return True
        time.sleep(0.05)
    return False


def test_an_explicit_choice_and_an_explanation_of_one_check_nothing(fake: Fake, children: Children) -> None:
    functional.squash(S, backend="fake")
    with backends.use("reference"):
        functional.squash(S)
    assert str(backends.explain("squash", S, backend="fake")).startswith("fake: runs (tile of 3)")
    assert children.started == []


def test_a_backend_that_cannot_run_the_call_is_not_checked(fake: Fake, children: Children) -> None:
    fake.missing = "not here"
    assert chosen() == "reference"
    assert children.started == []


def test_the_first_call_of_an_explanation_checks_and_keeps_the_warning(children: Children) -> None:
    children.kind("wrong")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [v.backend for v in backends.explain("squash", S) if v.chosen] == ["reference"]
    with pytest.warns(FallbackWarning, match="its self-check failed"):
        functional.squash(S)
    assert children.started == ["fake cpu"]


@pytest.mark.parametrize("kind", ["right", "wrong"])
def test_a_compiled_program_checks_while_it_is_traced(fake: Fake, children: Children, kind: str) -> None:
    children.kind(kind)
    torch.compiler.reset()
    compiled = torch.compile(lambda s: functional.squash(s) + 1, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.equal(compiled(S), functional.squash(S, backend="reference") + 1)
    torch.compiler.reset()
    assert children.started == ["fake cpu"]
    assert fake.calls == (2 if kind == "right" else 0)
    failures = [str(w.message) for w in caught if "its self-check failed" in str(w.message)]
    assert len(failures) == (0 if kind == "right" else 1)


@pytest.mark.parametrize("kind", ["right", "wrong"])
def test_a_result_is_kept_for_the_next_process(children: Children, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    children.kind(kind)
    first = _trust.trial("fake", "cpu", None)
    forget(monkeypatch)
    assert _trust.trial("fake", "cpu", None) == first
    assert (first.reason is None) == (kind == "right")
    assert children.started == ["fake cpu"]


@pytest.mark.parametrize("what", ["backend", "device", "version", "kernels", "torch"])
def test_a_result_holds_for_its_own_build_and_device_alone(
    children: Children, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    children.script(PASSES)
    assert _trust.trial("fake", "cpu", None).reason is None
    forget(monkeypatch)
    if what == "device":
        monkeypatch.setattr(_trust, "_device", lambda *_: ["another"])
    elif what == "version":
        monkeypatch.setattr(_trust, "__version__", "another")
    elif what == "kernels":
        monkeypatch.setattr(_trust, "_digest", lambda: "another")
    elif what == "torch":
        monkeypatch.setattr(torch, "__version__", "another")
    _trust.trial("other" if what == "backend" else "fake", "cpu", None)
    assert len(children.started) == 2


DAMAGE = {
    "empty": "",
    "cut": '{"key": {"backend": "fa',
    "another type": "[1, 2]",
    "no reason": '{"key": {}, "ops": {}}',
    "deep": "[" * 100_000,
    "not text": "\udcff",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_ignored_and_replaced(
    children: Children, cache: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    children.script(PASSES)
    assert _trust.trial("fake", "cpu", None).reason is None
    (file,) = cache.glob("*.json")
    whole = file.read_text()
    file.write_bytes(DAMAGE[damage].encode(errors="surrogateescape"))
    forget(monkeypatch)
    assert _trust.trial("fake", "cpu", None).reason is None
    assert len(children.started) == 2
    assert file.read_text() == whole


@pytest.mark.parametrize(("field", "value"), [("key", {}), ("reason", 3), ("ops", {"squash": 1}), ("ops", ["squash"])])
def test_a_file_with_other_contents_is_ignored(
    children: Children, cache: Path, field: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    children.script(PASSES)
    assert _trust.trial("fake", "cpu", None).reason is None
    (file,) = cache.glob("*.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    forget(monkeypatch)
    _trust.trial("fake", "cpu", None)
    assert len(children.started) == 2


def test_without_a_place_to_keep_results_every_process_checks(
    children: Children, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children.script(PASSES)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for count in (1, 2):
        forget(monkeypatch)
        assert _trust.trial("fake", "cpu", None).reason is None
        assert len(children.started) == count


@pytest.mark.parametrize("value", ["", "relative"])
def test_the_cache_is_in_the_home_folder_unless_told_otherwise(
    tmp_path: Path, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _trust._folder() == tmp_path / ".cache" / "caps_kernels"


INCONCLUSIVE = {
    "a full device": ("full", "its self-check failed on squash: OutOfMemoryError: no memory left"),
    "no second process": ("print('busy', file=sys.stderr); sys.exit(2)", "its self-check could not run: busy"),
}


@pytest.mark.parametrize("what", INCONCLUSIVE)
def test_what_says_nothing_of_the_kernels_is_not_kept(
    children: Children, cache: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    child, wanted = INCONCLUSIVE[what]
    (children.kind if child in KINDS else children.script)(child)
    assert reason().startswith(wanted)
    assert list(cache.glob("*.json")) == []
    reason()
    assert len(children.started) == 1
    forget(monkeypatch)
    reason()
    assert len(children.started) == 2


def test_a_child_that_cannot_be_started_is_no_error(children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_trust, "command", lambda *_: ["/nowhere/python"])
    assert reason().startswith("its self-check could not be started: ")


def test_a_child_that_dies_while_it_writes_is_reported(children: Children) -> None:
    children.script(f'{PASSES}; report.write(\'{{"op": "pre\'); report.flush(); os.abort()')
    assert reason() == "its self-check died of SIGABRT after squash"


def test_a_device_that_is_not_there_is_no_fault_of_an_op(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    missing = f"cuda:{torch.cuda.device_count()}"
    assert _selfcheck.main(["reference", missing, str(tmp_path / "report")]) == 2
    assert f"{missing} cannot be used by a second process" in capfd.readouterr().err


def test_processes_that_ask_at_once_check_once_and_threads_too(children: Children, tmp_path: Path) -> None:
    children.script(f"time.sleep(0.5); {PASSES}")
    key = _trust._key("fake", "cpu", None)
    found = []

    def another_process() -> None:
        found.append(_trust._kept_or_new("fake", "cpu", None, again=False).reason)

    def another_thread() -> None:
        found.append(_trust.trial("fake", "cpu", None).reason)

    threads = [threading.Thread(target=target) for target in [another_process] * 3 + [another_thread] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [None] * 6
    assert len(children.started) == 1
    assert _trust._read(key) == _trust.Trial(None, {"squash": "ok"})


def test_writers_at_once_leave_one_whole_file(cache: Path) -> None:
    key = _trust._key("fake", "cpu", None)
    trials = [_trust.Trial(None if n % 2 else "x" * 100_000, {"squash": str(n)}) for n in range(8)]
    threads = [threading.Thread(target=_trust._write, args=(key, trial)) for trial in trials]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _trust._read(key) in trials
    assert [file.suffix for file in cache.iterdir()] == [".json"]


def test_the_command_checks_again_and_says_what_is_known(
    children: Children, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(*flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["caps_kernels", *flags])
        code = __main__.main()
        out, err = capsys.readouterr()
        return code, next(line for line in out.splitlines() if line.startswith("fake ")), err

    children.kind("wrong")
    assert command()[1].endswith("its self-check on this device comes with its first use")
    code, line, err = command("--check")
    assert code == 1
    assert "runs only when asked for: its self-check failed on squash" in line
    assert "fake: its self-check failed on squash" in err
    children.kind("right")
    assert "runs only when asked for" in command()[1]
    code, line, err = command("--check")
    assert (code, err) == (0, "")
    assert line.endswith("it passed its self-check")
    assert len(children.started) == 2
    assert chosen() == "fake"
