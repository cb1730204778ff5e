"""What can go wrong, by whose move it is next.

Every error says what was expected, what came and what to do, and is raised before any work
starts. All of them are `ValueError`s, so that a caller who knows nothing of this package still
catches them.
"""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from collections.abc import Iterable, Mapping


class PatrolError(ValueError):
    """Base of every error this package raises on purpose; a `ValueError`."""


class InputError(PatrolError):
    """An argument or the data is wrong; the caller changes the call."""


class UnsupportedModelError(PatrolError):
    """The model cannot be traced, cut or pruned as it is; the caller changes the model."""


class BudgetError(PatrolError):
    """No choice of channels or blocks meets the budget, or the limits of `plan`.

    Attributes:
        smallest_edge_macs: the fewest multiply-adds that can be reached; None where no edge ran
            within a limit of latency.
        smallest: where `plan` raised it, the least of "edge_macs", "edge_params" and
            "feature_bytes" each, or the "latency_ms" of the fastest edge that was measured; empty
            elsewhere.
    """

    def __init__(
        self,
        message: str,
        *,
        smallest_edge_macs: int | None = None,
        smallest: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(message)
        self.smallest_edge_macs = smallest_edge_macs
        self.smallest = dict(smallest or {})


class TrainingError(PatrolError):
    """Training met a NaN or an infinity, or every attack of an audit broke off.

    Attributes:
        step: of the training, or of the attack; 0 where the whole audit is meant.
        term: of the loss, as "task" or "adversarial"; "gradient"; "reconstruction" of an attack.
    """

    def __init__(self, message: str, *, step: int, term: str) -> None:
        super().__init__(message)
        self.step = step
        self.term = term


class CheckpointError(PatrolError):
    """A file on disk is torn, tampered with, or of another kind than what was asked for.

    Attributes:
        path: the file or folder.
    """

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(message)
        self.path = path


class RunDirectoryError(PatrolError):
    """The folder of a run or of a search holds something else, as one with other settings."""


class UnmetLimitsError(PatrolError):
    """No trial of a search keeps to the limits; the message says which is the hardest to meet.

    Of the command `patrol-prune tune`; the function `tune` says it in `TuneResult.why_empty`.
    """


class MissingPackageError(PatrolError):
    """An optional package is not installed; the message says what to type."""


def nearest(name: str, names: Iterable[str], count: int = 5) -> str:
    """The sentence that offers the names closest to a misspelt one, or an empty string."""
    close = difflib.get_close_matches(name, list(names), n=count, cutoff=0.3)
    return f"Did you mean: {', '.join(close)}?" if close else ""


def warn_caller(message: str) -> None:
    """A warning that points at the line outside of this package which led to it."""
    inside, level = os.path.dirname(__file__) + os.sep, 2
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
