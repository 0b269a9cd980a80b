"""Errors that end `train.py` with a message instead of a traceback."""

from __future__ import annotations


class TrainingError(Exception):
    """Training cannot start or go on; the message says what is wrong and what to try."""

    exit_code = 2


class NonFiniteLossError(TrainingError):
    """The loss became inf or NaN."""

    exit_code = 1
