"""What a model needs before its channel groups are read, and what it gets back afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from patrol_prune.errors import UnsupportedModelError
from patrol_prune.given import check_changeable
from patrol_prune.groups import CONV

WIDTHS = (
    "in_channels", "out_channels", "groups", "in_features", "out_features", "num_features",
    "num_channels", "num_groups", "num_parameters", "normalized_shape", "embed_dim", "kdim", "vdim",
    "num_heads", "head_dim", "hidden_dim",
)
"""The attributes in which torch's and torchvision's layers keep their widths."""


def as_forward_fn(example_inputs: Any) -> Callable[[nn.Module, Any], Any]:
    """A forward that calls the model once, as the type of the inputs says.

    Torch-Pruning's default tries `model(*tensor)` first, hides the user's own error, and counts
    the layers before the failure as reused.
    """
    if isinstance(example_inputs, Mapping):
        return _call_named
    return _call_all if isinstance(example_inputs, (tuple, list)) else _call_one


def _call_one(model: nn.Module, inputs: Any) -> Any:
    return model(inputs)


def _call_all(model: nn.Module, inputs: Any) -> Any:
    return model(*inputs)


def _call_named(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs)


def in_training(forward_fn: Callable[[nn.Module, Any], Any]) -> Callable[[nn.Module, Any], Any]:
    """The same call with `training` set on everything that holds other modules, but on no layer.

    Auxiliary heads then run, while normalisation and dropout stay as they are in evaluation.
    """

    def forward(model: nn.Module, inputs: Any) -> Any:
        for module in model.modules():
            module.training = next(module.children(), None) is not None
        return forward_fn(model, inputs)

    return forward


def check_prunable(model: nn.Module) -> None:
    """Refuse by name what Torch-Pruning would break on late.

    Raises:
        UnsupportedModelError: see `GroupTable.build`.
    """
    check_changeable(model)
    seen = False
    for name, module in model.named_modules():
        if isinstance(module, (CONV, nn.Linear)):
            seen = True
            if not isinstance(module._parameters.get("weight"), nn.Parameter):
                raise UnsupportedModelError(
                    f"Expected plain weights, came {name!r} ({type(module).__name__}) whose "
                    "weight is computed (weight_norm, spectral_norm, a parametrization or a "
                    "pruning mask). Remove it first, e.g. with "
                    "torch.nn.utils.parametrize.remove_parametrizations."
                )
            if isinstance(module.weight, nn.parameter.UninitializedParameter):
                raise UnsupportedModelError(
                    f"Layer {name!r} is lazy and has no weight yet. Run the model once first."
                )
        elif type(module).__name__.startswith("FrozenBatchNorm"):
            raise UnsupportedModelError(
                f"Layer {name!r} is a {type(module).__name__}: its statistics are buffers that "
                "cannot be pruned. Replace it by nn.BatchNorm2d with requires_grad_(False)."
            )
    if not seen:
        raise UnsupportedModelError(
            f"Expected a model with convolutions or linear layers, came {type(model).__name__} "
            "with none: there is nothing to prune."
        )
    for name, p in model.named_parameters():
        if p.is_floating_point() and not _all_finite(p.detach()):
            raise UnsupportedModelError(
                f"Parameter {name!r} holds NaN or infinite values. Load a sane checkpoint."
            )


def _all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; a finite sum tells it without a tensor of flags."""
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


@contextmanager
def preserved(model: nn.Module, *, trainable: bool = False) -> Iterator[None]:
    """Give back every module's `training` and, by name, every parameter's `requires_grad`.

    Args:
        model: parameters may be replaced inside the block (pruning does it).
        trainable: set `requires_grad` on every floating parameter inside the block.
    """
    modes = [(m, m.training) for m in model.modules()]
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    try:
        if trainable:
            for p in model.parameters():
                p.requires_grad_(p.is_floating_point())
        yield
    finally:
        for module, training in modes:
            module.training = training
        for name, p in model.named_parameters():
            p.requires_grad_(flags.get(name, p.requires_grad))


@contextmanager
def in_mode(model: nn.Module, training: bool, turn: int = 0) -> Iterator[None]:
    """The model in one mode; each module's own mode, every buffer and what dropout draws from stand
    afterwards as they stood before. It draws otherwise in each turn."""
    buffers = [(b, b.clone()) for b in model.buffers()] if training else []
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with preserved(model), torch.random.fork_rng(devices=devices):
        try:
            model.train(training)
            if training:
                for generator in (torch.default_generator,
                                  *(torch.cuda.default_generators[d] for d in devices)):
                    generator.manual_seed(torch.initial_seed() + turn)
            yield
        finally:
            with torch.no_grad():
                for buffer, was in buffers:
                    buffer.copy_(was)


@contextmanager
def whole_or_not_at_all(split: Any) -> Iterator[None]:
    """Where pruning fails inside, the split's model comes back as it was, and the split with it.

    Raises:
        UnsupportedModelError: in the place of whatever error came, running out of memory aside.
    """
    tables = ("_parameters", "_buffers", "_modules")
    modules = [(m, {name: dict(getattr(m, name)) for name in tables}, {
        name: value for name, value in vars(m).items() if isinstance(value, (int, tuple, list))
    }) for m in split.model.modules()]
    tensors = [(t, t.data, t.grad)
               for t in (*split.model.parameters(), *split.model.buffers())]
    history, removed = split.pruning_history, split.removed_blocks
    try:
        yield
    except Exception as error:
        for module, held, plain in modules:
            for name, entries in held.items():
                getattr(module, name).update(entries)
            vars(module).update(plain)
        for tensor, data, grad in tensors:
            tensor.data, tensor.grad = data, grad
        split.refresh()
        split.pruning_history, split.removed_blocks = history, removed
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            raise
        raise UnsupportedModelError(
            f"The model is as it was before: without what was to go it does not run ({error}). "
            "Torch-Pruning does not see what ties them to others; leave the layers out with "
            "ignored_layers=, or say which dimension of a parameter of its own holds channels "
            "with unwrapped_parameters=. Make a new pruner."
        ) from error


def follow_widths(model: nn.Module) -> None:
    """Where a forward reads a width that Torch-Pruning leaves as it was, set it.

    torchvision's VisionTransformer reshapes to its `hidden_dim`, the width of its class token.
    """
    for module in model.modules():
        token, width = getattr(module, "class_token", None), getattr(module, "hidden_dim", None)
        if isinstance(token, nn.Parameter) and isinstance(width, int):
            setattr(module, "hidden_dim", token.shape[-1])  # noqa: B010
