"""What can go wrong, by whose move it is next.

Every error says what was expected, what came and what to do, and is raised before any work
starts. All of them are `ValueError`s, so that a caller who knows nothing of this package still
catches them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class PatrolError(ValueError):
    """Base of every error this package raises on purpose."""


class InputError(PatrolError):
    """An argument or the data is wrong; the caller changes the call."""


class UnsupportedModelError(PatrolError):
    """The model cannot be traced, cut or pruned as it is; the caller changes the model."""


class BudgetError(PatrolError):
    """No choice of channels meets the budget; `smallest_edge_macs` is what can be reached.

    `smallest` says the same of every limit that was given: name -> value.
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
    """Training met a NaN or an infinity; `step` and `term` say where."""

    def __init__(self, message: str, *, step: int, term: str) -> None:
        super().__init__(message)
        self.step = step
        self.term = term


class CheckpointError(PatrolError):
    """A file on disk is torn, tampered with, or of another kind; `path` names it."""

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(message)
        self.path = path


class RunDirectoryError(PatrolError):
    """The run directory holds something else than this run."""


class UnmetLimitsError(PatrolError):
    """No trial of a search keeps to the limits; the message says which is the hardest to meet."""


class MissingPackageError(PatrolError):
    """An optional package is not installed; the message says what to type."""


def nearest(name: str, names: Iterable[str], count: int = 5) -> str:
    """The sentence that offers the names closest to a misspelt one, or an empty string."""
    close = difflib.get_close_matches(name, list(names), n=count, cutoff=0.3)
    return f"Did you mean: {', '.join(close)}?" if close else ""
