"""How a backend is chosen, and what is said about the choice."""

from __future__ import annotations

import subprocess
import sys
import threading
import types
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from caps_kernels import BackendError, FallbackWarning, backends, functional
from caps_kernels.backends import Backend, Implementation
from tests.fake_backend import CPP_IS_MISSING, Fake, install


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return install(monkeypatch)


SHORT, LONG = torch.ones(2, 3), torch.ones(2, 17)


def ran_on(fake: Fake, s: Tensor = SHORT, **options: Any) -> str:
    before = fake.calls
    functional.squash(s, **options)
    return "fake" if fake.calls > before else "reference"


def test_the_first_of_the_preference_that_can_run_is_chosen(fake: Fake) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        assert ran_on(fake) == "fake"
    with pytest.warns(
        FallbackWarning, match=r"squash runs on the reference .*fake: vectors longer than 16; cpp: no comp"
    ):
        assert ran_on(fake, LONG) == "reference"


def test_a_backend_without_the_op_is_passed_over(fake: Fake) -> None:
    with pytest.warns(FallbackWarning, match="fake: predict_votes is not written for it yet"):
        functional.predict_votes(torch.ones(1, 2, 3), torch.ones(2, 1, 3, 4))
    with pytest.raises(BackendError, match="has no implementation on backend 'fake'"):
        backends.implementation("predict_votes", "fake")


def test_a_slow_backend_is_passed_over_but_not_for_the_reference(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = replace(fake.implementation, slow=lambda s, dim: "vectors longer than 2" if s.shape[dim] > 2 else None)
    backends.register("squash", "fake", slow)
    assert ran_on(fake) == "fake"
    assert str(backends.explain("squash", SHORT)).startswith("fake: runs (tile of 3): vectors longer than 2\n")
    another = Backend("another", "a fast one", ("cpu",), lambda: None)
    monkeypatch.setitem(backends.BACKENDS, "another", another)
    monkeypatch.setitem(backends.PREFERENCE, "cpu", ("fake", "another", "reference"))
    backends.register("squash", "another", fake.reference)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        assert ran_on(fake) == "reference"  # that is what "another" runs
        assert [v.backend for v in backends.explain("squash", SHORT) if v.chosen] == ["another"]
        assert ran_on(fake, torch.ones(3, 2)) == "fake"
    assert ran_on(fake, backend="fake") == "fake"


def test_the_warning_comes_once_an_op_and_names_the_caller(fake: Fake) -> None:
    fake.missing = "broken here"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            functional.squash(SHORT)
        for _ in range(2):
            functional.predict_votes(torch.ones(1, 2, 3), torch.ones(2, 1, 3, 4))
    assert [w.category for w in caught] == [FallbackWarning] * 2
    assert [str(w.message).split()[0] for w in caught] == ["squash", "predict_votes"]
    assert all(Path(w.filename) == Path(__file__) for w in caught)
    assert "fake: broken here" in str(caught[0].message)
    assert "CAPS_KERNELS_BACKEND=reference" in str(caught[0].message)


def test_an_explanation_does_not_use_up_the_warning(fake: Fake) -> None:
    fake.missing = "broken here"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.explain("squash", SHORT)
    with pytest.warns(FallbackWarning):
        functional.squash(SHORT)


@pytest.mark.parametrize("how", ["argument", "use", "environment"])
def test_whoever_chooses_the_reference_is_not_warned(fake: Fake, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.missing = "broken here"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if how == "argument":
            functional.squash(SHORT, backend="reference")
        elif how == "use":
            with backends.use("reference"):
                functional.squash(SHORT)
        else:
            monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
            functional.squash(SHORT)


def test_an_argument_overrides_use_which_overrides_the_environment(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    assert ran_on(fake) == "reference"
    with backends.use("fake"):
        assert ran_on(fake) == "fake"
        assert ran_on(fake, backend="reference") == "reference"
    assert ran_on(fake, backend="fake") == "fake"
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "")
    assert ran_on(fake) == "fake"


@pytest.mark.parametrize("how", ["argument", "use", "environment"])
@pytest.mark.parametrize(
    ("name", "s", "reason"),
    [
        ("cpp", SHORT, CPP_IS_MISSING),
        ("fake", LONG, "vectors longer than 16"),
        ("elsewhere", SHORT, "it runs on xpu tensors, these are on cpu"),
    ],
)
def test_an_impossible_choice_raises_with_the_reason(
    fake: Fake, how: str, name: str, s: Tensor, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call() -> None:
        if how == "use":
            with backends.use(name):
                functional.squash(s)
        else:
            functional.squash(s, backend=name if how == "argument" else None)

    if how == "environment":
        monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, name)
    with pytest.raises(BackendError, match=f"^backend '{name}' cannot run squash: {reason}$"):
        call()
    assert fake.calls == 0


def test_unknown_names_are_refused(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "backend must be None or one of 'fake', 'cpp', 'elsewhere', 'reference', got 'gpu'"
    with pytest.raises(ValueError, match=message):
        functional.squash(SHORT, backend="gpu")
    with pytest.raises(ValueError, match=message), backends.use("gpu"):
        pass
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "gpu")
    with pytest.raises(ValueError, match=message):
        functional.squash(SHORT)
    with pytest.raises(ValueError, match=r"op must be one of 'squash', .*, got 'squish'"):
        backends.explain("squish", SHORT)


def test_use_nests_and_ends_with_its_block(fake: Fake) -> None:
    with backends.use("reference"):
        with backends.use("fake"):
            assert ran_on(fake) == "fake"
        assert ran_on(fake) == "reference"
        with pytest.raises(KeyError), backends.use("fake"):
            raise KeyError
        assert ran_on(fake) == "reference"
    assert ran_on(fake) == "fake"


def test_use_holds_in_its_own_thread_alone(fake: Fake) -> None:
    seen: list[str] = []

    def elsewhere() -> None:
        with backends.use("fake"):
            chosen.set()
            assert done.wait(10)
            seen.append(ran_on(fake))

    chosen, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=elsewhere)
    with backends.use("reference"):
        thread.start()
        assert chosen.wait(10)
        here = ran_on(fake)
        done.set()
        thread.join()
        seen.append(ran_on(fake))
    assert here == "reference"
    assert seen == ["fake", "reference"]


def test_backward_runs_where_forward_ran(fake: Fake) -> None:
    ran: list[str] = []

    def backward(*args: Any) -> tuple[Tensor, ...]:
        ran.append("fake")
        return fake.reference.backward(*args)

    backends.register("squash", "fake", Implementation(fake.forward, backward))
    s = SHORT.clone().requires_grad_()
    with backends.use("fake"):
        v = functional.squash(s)
    with backends.use("reference"):
        v.sum().backward()
    assert ran == ["fake"]


def test_a_compiled_program_follows_a_later_choice(fake: Fake) -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda s: functional.squash(s) + 1, fullgraph=True, backend="aot_eager")
    for name, calls in (("fake", 1), ("reference", 0), ("fake", 1)):
        before = fake.calls
        with backends.use(name):
            result = compiled(SHORT)
        assert fake.calls - before == calls, name
        assert torch.equal(result, functional.squash(SHORT, backend="reference") + 1)
    torch.compiler.reset()


def test_explain_gives_every_backend_a_reason_or_a_regime(fake: Fake) -> None:
    explanation = backends.explain("squash", SHORT, dim=-1)
    assert [v.backend for v in explanation] == ["fake", "cpp", "elsewhere", "reference"]
    assert all((v.reason is None) != (v.regime is None) for v in explanation)
    assert [v.backend for v in explanation if v.chosen] == ["fake"]
    assert str(explanation).splitlines() == [
        "fake: runs (tile of 3)",
        f"cpp: cannot run: {CPP_IS_MISSING}",
        "elsewhere: cannot run: it runs on xpu tensors, these are on cpu",
        "reference: would run (plain)",
    ]
    assert fake.calls == 0


def test_explain_follows_every_way_to_choose(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(s: Tensor = SHORT, **options: Any) -> list[str]:
        return [v.backend for v in backends.explain("squash", s, **options) if v.chosen]

    assert chosen(LONG) == ["reference"]
    assert chosen(backend="reference") == ["reference"]
    assert chosen(backend="cpp") == []
    with backends.use("reference"):
        assert chosen() == ["reference"]
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "cpp")
    assert chosen() == []
    with pytest.raises(ValueError, match="got 'gpu'"):
        chosen(backend="gpu")


def test_explain_of_this_machine_agrees_with_what_runs() -> None:
    u, weight = torch.ones(1, 2, 3), torch.ones(2, 1, 3, 4)
    for verdict in backends.explain("dense_capsules", u, weight, iterations=2):
        if verdict.reason is None:
            assert functional.dense_capsules(u, weight, backend=verdict.backend).shape == (1, 1, 4)
        else:
            with pytest.raises(BackendError) as raised:
                functional.dense_capsules(u, weight, backend=verdict.backend)
            assert str(raised.value).endswith(verdict.reason)


def test_available_lists_what_runs_anything_here_in_order(fake: Fake) -> None:
    assert backends.available() == ("fake", "reference")
    fake.missing = "broken here"
    assert backends.available() == ("reference",)


def test_a_device_nobody_has_kernels_for_gets_the_reference_without_a_warning(fake: Fake) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select("squash", (torch.ones(2, 3, device="meta"), -1)) == "reference"


def test_a_lazy_implementation_is_imported_when_it_is_first_needed(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("a_slow_language")
    module.IMPLEMENTATION = fake.implementation  # type: ignore[attr-defined]
    backends.register("squash", "fake", backends.Lazy("a_slow_language"))
    assert backends.select("squash", (SHORT, -1)) == "fake"
    with pytest.raises(ImportError, match="a_slow_language"):
        functional.squash(SHORT)
    monkeypatch.setitem(sys.modules, "a_slow_language", module)
    assert ran_on(fake) == "fake"
    assert backends.implementation("squash", "fake") is fake.implementation


def test_importing_the_package_imports_no_triton() -> None:
    code = "import sys, caps_kernels; print([name for name in sys.modules if name.split('.')[0] == 'triton'])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_triton_says_what_it_lacks() -> None:
    if backends.BACKENDS["triton"].missing() is not None:
        assert backends.lacking("squash", "triton") == "triton is not installed"
    elif not torch.cuda.is_available() and not backends.TRITON_INTERPRETS:
        assert backends.lacking("squash", "triton") == (
            "no CUDA device (TRITON_INTERPRET=1 runs it on CPU tensors, slowly)"
        )
    else:
        assert backends.lacking("squash", "triton") is None


def test_triton_is_never_chosen_for_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    assert backends.select("squash", (SHORT, -1)) in ("cpp", "reference")
