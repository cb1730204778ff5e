"""Which parameter came from which, where pruning puts new ones in the place of old ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

Kept = dict[int, Tensor]
"""Dimension -> the indices that stayed."""

ancestors: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Parameter -> `(weak reference to an earlier one, what stayed of it)`, the latest first."""
taken_out: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Parameters that went with their block, and what these came from: nothing follows them."""


def earlier(parameter: nn.Parameter) -> list[tuple[weakref.ref[nn.Parameter], Kept]]:
    """What is known of a parameter's origin."""
    return ancestors.get(parameter, [])


def take_out(parameters: Iterable[nn.Parameter]) -> None:
    """Remember that these have left the model."""
    for parameter in parameters:
        taken_out[parameter] = True
        for reference, _ in earlier(parameter):
            old = reference()
            if old is not None:
                taken_out[old] = True
