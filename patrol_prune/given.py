"""Easy mistakes with what a caller hands over, refused in words before any work."""

from __future__ import annotations

import contextlib
from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor, nn

from patrol_prune.errors import InputError

_HALVES = ("model", "edge", "cloud", "example_inputs")


def check_split(split: object, name: str = "split") -> None:
    """An InputError where it is no `Split`."""
    if not all(hasattr(split, part) for part in _HALVES):
        raise InputError(
            f"Expected {name} as a Split, came {type(split).__name__}. Cut the model first: "
            "Split(model, example_inputs, at=...)."
        )


def check_has_edge(half: object, name: str) -> None:
    """An InputError where it has no `edge` that is a module: what an audit attacks."""
    if not isinstance(getattr(half, "edge", None), nn.Module):
        raise InputError(
            f"Expected {name} as a Split, or another object whose attribute `edge` is the half on "
            f"the device, came {type(half).__name__}. Cut the model first: Split(model, "
            "example_inputs, at=...)."
        )


def check_factory(factory: object) -> None:
    """An InputError where it is a model, or nothing that can be called."""
    if isinstance(factory, nn.Module) or not callable(factory):
        raise InputError(
            "Expected model_factory as a function without arguments that builds the model as it "
            f"was before pruning, came {type(factory).__name__}. Write lambda: build_model()."
        )


def check_model(model: object, name: str) -> None:
    """An InputError where it is no module."""
    if not isinstance(model, nn.Module):
        hint = " Give split.model." if hasattr(model, "model") else ""
        raise InputError(f"Expected {name} as an nn.Module, came {type(model).__name__}.{hint}")


def check_normalization(normalization: object) -> None:
    """An InputError where it is something other than a `Normalization` or None."""
    if normalization is not None and not hasattr(normalization, "to_input"):
        raise InputError(
            f"Expected normalization as a patrol_prune.Normalization(mean, std), came "
            f"{type(normalization).__name__}."
        )


def check_rereadable(batches: object, name: str) -> None:
    """An InputError where batches have no length, as a generator's, which one epoch would use up.
    """
    count = None
    if isinstance(batches, Sized):
        with contextlib.suppress(TypeError):  # a loader of a stream has a length in name only
            count = len(batches)
    if count is None:
        raise InputError(
            f"Expected {name} that have a length and can be read again for every epoch (a "
            f"DataLoader, a list), came {type(batches).__name__}."
        )
    if count == 0:
        raise InputError(f"Expected at least one batch in {name}, came none.")


def input_and_target(batch: Any) -> tuple[Tensor, Any]:
    """The two parts `(x, y)` of a batch, `x` a tensor and not of bytes; else an InputError."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        if isinstance(batch, dict):
            came = f"a dict of {', '.join(map(str, batch))}"
        elif isinstance(batch, (tuple, list)):
            came = f"a {type(batch).__name__} of {len(batch)}"
        else:
            came = f"a {type(batch).__name__}"
        raise InputError(f"Expected batches (x, y) of model inputs and targets, came {came}.")
    x, y = batch
    if not isinstance(x, Tensor) or x.dtype == torch.uint8:
        came = f"{x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(
            "Expected batches (x, y) with x a tensor as the model takes it, came "
            f"{came}. Bytes become inputs by Normalization.to_input(pixels.float() / 255)."
        )
    return x, y


def share_outside(pixels: Tensor, slack: float = 0.02) -> float:
    """The share of values that lie outside of [-slack, 1 + slack]."""
    with torch.no_grad():
        return float(((pixels < -slack) | (pixels > 1.0 + slack)).float().mean())
