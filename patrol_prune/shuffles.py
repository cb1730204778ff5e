"""Channel shuffles, where following channels ends.

    shuffle(x)[:, i g + j] = x[:, j C/g + i],       g groups, 0 <= j < g, 0 <= i < C/g

Torch-Pruning has no index mapping for it, and takes PyTorch's own for an element-wise operator.
Here a model is run for tracing in pieces: what goes into a shuffle is one more output of the model,
and what comes out of it one more input. Everything before, between and behind the shuffles is
followed as ever, and the channels that are shuffled are those that reach such an end, which can be
told (`_tp.leaves`); they stay whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from patrol_prune.groups import ChannelGroup
from patrol_prune.prunable import preserved

__all__ = ["CutAtShuffles", "reason_to_keep", "shuffles"]

SHUFFLE = "channel_shuffle"
"""A function that a module's forward calls by this name is taken for one, torch's or its own."""


def shuffles(
    model: nn.Module, example_inputs: Any, forward_fn: Callable[[nn.Module, Any], Any]
) -> bool:
    """Whether the model calls a channel shuffle; it runs once and is left as found."""
    found: list[Tensor] = []
    with preserved(model), torch.no_grad(), _intercepted(model, found):
        model.eval()
        forward_fn(model, example_inputs)
    return bool(found)


class CutAtShuffles:
    """Torch-Pruning's `forward_fn`: the same call, with every shuffle an output and an input."""

    def __init__(self, forward_fn: Callable[[nn.Module, Any], Any]) -> None:
        self.forward_fn = forward_fn

    def __call__(self, model: nn.Module, inputs: Any) -> list[Any]:
        before: list[Tensor] = []
        with _intercepted(model, before):
            output = self.forward_fn(model, inputs)
        return [output, *before]

    def transformed(self, transform: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Torch-Pruning's `output_transform`, of the model's own output alone."""
        return lambda outputs: [transform(outputs[0]), *outputs[1:]]


def reason_to_keep(group: ChannelGroup, reaches_an_end: bool) -> str | None:
    """Why a group of a model with shuffles stays whole, or None."""
    if reaches_an_end:
        return "a channel shuffle interleaves its channels"
    if group.crossing is not None:
        return "it crosses the split of a model that shuffles channels"
    return None


@contextmanager
def _intercepted(model: nn.Module, before: list[Tensor]) -> Iterator[None]:
    """Inside, a shuffle gives a tensor without a past; what it was given joins `before`.

    Products stand on both sides, as they do around the parts that are followed alone, so that the
    ends are nodes of Torch-Pruning's graph. What is called by the name but is not of one tensor to
    one stays as it is. The names are replaced for the whole process: nothing else should run the
    model meanwhile.
    """
    places = [vars(functional), vars(torch)]
    for module in model.modules():
        forward = getattr(type(module), "forward", None)
        places.append(getattr(forward, "__globals__", {}))
    own = {id(place): place for place in places if callable(place.get(SHUFFLE))}
    kept = [(place, place[SHUFFLE]) for place in own.values()]

    def cut(shuffle: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any, **kwargs: Any) -> Any:
            given = [v for v in (*args, *kwargs.values()) if _is_feature(v)]
            if len(given) != 1:
                return shuffle(*args, **kwargs)

            def parted(value: Any) -> Any:
                return value.detach() if value is given[0] else value

            after = shuffle(*map(parted, args), **{k: parted(v) for k, v in kwargs.items()})
            if not _is_feature(after):
                return shuffle(*args, **kwargs)
            before.append(given[0] * 1.0)
            return after.requires_grad_() * 1.0

        return inner

    for place, shuffle in kept:
        place[SHUFFLE] = cut(shuffle)
    try:
        yield
    finally:
        for place, shuffle in kept:
            place[SHUFFLE] = shuffle


def _is_feature(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
