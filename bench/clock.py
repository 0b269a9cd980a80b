"""Time of the processor, or of the work queued on a GPU."""

from __future__ import annotations

import time
from typing import Any

import torch


class Clock:
    """Points in time: of the processor, or of the work queued on a GPU (events)."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def mark(self) -> Any:
        """Now."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, began: Any, ended: Any) -> float:
        """Between two marks; waits for the GPU."""
        if not self.cuda:
            return float(ended - began)
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 1e3

    @property
    def what(self) -> str:
        """What is measured, in words."""
        if self.cuda:
            return "CUDA events around each call: time on the GPU's stream, gaps between launches included"
        return "wall-clock seconds on the CPU (time.perf_counter)"
