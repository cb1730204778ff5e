"""A graph whose channel groups can be enumerated: of a model, between shuffles, or of its parts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from patrol_prune.errors import UnsupportedModelError
from patrol_prune.given import does_not_run
from patrol_prune.groups import CONV
from patrol_prune.local_groups import failed, find_parts
from patrol_prune.operators import doubtful, has_shuffle
from patrol_prune.prunable import as_forward_fn, in_training, preserved
from patrol_prune.shuffles import CutAtShuffles, shuffles
from patrol_prune.trial import Forward, changing_more

__all__ = ["followed"]

logger = logging.getLogger(__name__)

_THEIRS = {
    nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.BatchNorm2d, nn.Conv2d, nn.Dropout, nn.Flatten, nn.GELU,
    nn.Hardsigmoid, nn.Hardswish, nn.Identity, nn.LayerNorm, nn.Linear, nn.MaxPool2d, nn.ModuleList,
    nn.MultiheadAttention, nn.ReLU, nn.ReLU6, nn.Sequential, nn.SiLU, nn.Sigmoid, nn.Tanh,
    nn.modules.linear.NonDynamicallyQuantizableLinear,
}
"""What torchvision's classifiers use of PyTorch's layers."""


def followed(
    model: nn.Module,
    example_inputs: Any,
    forward_fn: Callable[..., Any] | None,
    make: Callable[[Callable[..., Any]], Any],
    *,
    tried: bool = True,
) -> Any:
    """A graph whose groups can be enumerated: of the whole model, or else of its parts.

    Layers that run in training mode only (auxiliary heads) are followed too.

    Args:
        model: left as found.
        example_inputs: what it takes.
        forward_fn: as in Torch-Pruning.
        make: builds the graph from a `forward_fn` and enumerates its groups.
        tried: look for groups whose removal changes more than their channels.

    Returns:
        The last graph that `make` made. Its attribute `parts` is None, or tells the parts;
        `shuffled` says whether it ends at channel shuffles, and `changing` which groups stay
        because their removal changes more than their channels.
    """
    forward = forward_fn or as_forward_fn(example_inputs)
    try:
        graph, used = _made(model, example_inputs, forward, make)
        if has_shuffle(graph):
            raise UnsupportedModelError("it shuffles channels")
        graph.parts, graph.shuffled = None, False
        graph.changing = _changing(graph, model, example_inputs, used, used) if tried else {}
    except Exception as error:  # a graph that was read wrongly fails in many ways
        return _followed_in_pieces(model, example_inputs, forward, make, error, tried)
    return graph


def _made(
    model: nn.Module, example_inputs: Any, forward: Callable[..., Any],
    make: Callable[[Callable[..., Any]], Any],
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda forward: forward,
) -> tuple[Any, Callable[..., Any]]:
    """The graph of a forward, or of that in training where more layers with weights run then; and
    which forward it is of."""
    graph = make(wrap(forward))
    asleep = [m for m in _weighted(model) if m not in graph.module2node]
    if asleep and _run_in_training(model, example_inputs, forward, asleep):
        forward = in_training(forward)
        graph = make(wrap(forward))
    return graph, forward


def _followed_in_pieces(
    model: nn.Module, example_inputs: Any, forward: Callable[..., Any],
    make: Callable[[Callable[..., Any]], Any], error: Exception, tried: bool,
) -> Any:
    """The graph that ends at channel shuffles, or else that of the parts; see `followed`."""
    _check_runs(model, example_inputs, forward)
    try:
        if shuffles(model, example_inputs, forward):
            graph, used = _made(model, example_inputs, forward, make, CutAtShuffles)
            if has_shuffle(graph):
                raise UnsupportedModelError("it shuffles channels out of sight")
            graph.parts, graph.shuffled = None, True
            graph.changing = {} if not tried else _changing(
                graph, model, example_inputs, used, CutAtShuffles(used))
            return graph
    except Exception as second:  # something else in it cannot be followed either
        error = second
    unsupported = isinstance(error, UnsupportedModelError)
    why = str(error) if unsupported else failed(error)
    parts, runner = find_parts(model, lambda m: forward(m, example_inputs), why)
    if not parts.names:
        raise UnsupportedModelError(
            f"Expected a model whose channels Torch-Pruning can follow, came "
            f"{type(model).__name__}: {why}, and it is so in each of its parts. Hand over a "
            "model whose layers stand between operators that keep channels apart."
        ) from error
    graph = make(runner)
    graph.parts, graph.shuffled, graph.changing = parts, False, {}
    return graph


def _check_runs(
    model: nn.Module, example_inputs: Any, forward: Callable[..., Any]
) -> None:
    try:
        with preserved(model), torch.no_grad():
            model.eval()
            forward(model, example_inputs)
    except Exception as error:
        raise does_not_run(model, example_inputs, error) from error


def _changing(
    graph: Any, model: nn.Module, example_inputs: Any, forward: Forward, traced_by: Forward
) -> dict[str, str]:
    """The groups whose removal changes more than their channels -> why they stay, where operators
    make that likely."""
    operators = () if _is_torchvisions(model) else doubtful(graph)
    if not operators:
        return {}
    try:
        return changing_more(model, example_inputs, forward, traced_by)
    except Exception as error:  # a model that cannot be copied, or not run in float32
        logger.warning("Whether %s keeps the channels of %s apart could not be tried (%s: %s); its "
                       "channels are pruned as if it did.", ", ".join(operators),
                       type(model).__name__, type(error).__name__, error)
        return {}


def _is_torchvisions(model: nn.Module) -> bool:
    """Whether a model is torchvision's and holds no other layers and forwards than such models do:
    `benchmarks/backbones.py` tries each of these."""
    return type(model).__module__.startswith("torchvision.models.") and all(
        type(m).__module__.startswith(("torchvision.", "patrol_prune.")) or type(m) in _THEIRS
        for m in model.modules()) and all("forward" not in vars(m) for m in model.modules())


def _weighted(model: nn.Module) -> list[nn.Module]:
    inside = {id(c) for m in model.modules() if isinstance(m, nn.MultiheadAttention)
              for c in m.children()}
    return [m for m in model.modules()
            if isinstance(m, (CONV, nn.Linear)) and id(m) not in inside]


def _run_in_training(
    model: nn.Module, example_inputs: Any, forward: Callable[..., Any], layers: list[nn.Module]
) -> bool:
    """Whether one of these layers runs when the model, but none of its layers, is training."""
    ran: list[nn.Module] = []
    handles = [m.register_forward_hook(lambda m, *_: ran.append(m)) for m in layers]
    try:
        with preserved(model), torch.no_grad():
            model.eval()
            in_training(forward)(model, example_inputs)
    except Exception:  # the model may want more than its input, or a larger one, in training
        return False
    finally:
        for handle in handles:
            handle.remove()
    return bool(ran)
