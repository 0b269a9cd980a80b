"""Ctrl-C and SIGTERM: the first stops a run in good order, a second Ctrl-C ends it at once."""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType, TracebackType

# Wrappers such as `timeout` or `uv run` pass on a signal that the terminal has sent already.
SAME_PRESS_SECONDS = 0.5


class Interrupts:
    """A context within which a signal only sets `signal` to its number, 0 before."""

    def __init__(self) -> None:
        self.signal = 0
        self._came = 0.0
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.signal:
            self.signal, self._came = number, now
            # A print here could meet a half-done print of the main program.
            os.write(
                sys.stderr.fileno(),
                b"\nStopping after this step and saving; Ctrl-C again quits at once.\n",
            )
        elif number == signal.SIGINT and now - self._came > SAME_PRESS_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
