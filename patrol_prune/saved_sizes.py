"""The widths of a pruned model's layers, as a file records them and a fresh model takes them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from patrol_prune._trace import run_on
from patrol_prune.cost import draws_restored, evaluating
from patrol_prune.prunable import WIDTHS

if TYPE_CHECKING:
    from patrol_prune.split import Split

logger = logging.getLogger(__name__)
_ANSWERS = 16


def modes(model: nn.Module, runs_in: nn.Module | None = None) -> dict[str, Any]:
    """Which modules are training, and which parameters do not learn.

    Args:
        model: of whose modules it is told.
        runs_in: holds the layers and is what runs, where it is not `model`: modules that it does
            not hold, which merely hold others, are in its mode.
    """
    whole = model if runs_in is None else runs_in
    run = {id(module) for module in whole.modules()}
    return {
        "training": whole.training,
        "other_mode": [n for n, m in model.named_modules()
                       if id(m) in run and m.training != whole.training],
        "frozen": [n for n, p in model.named_parameters() if not p.requires_grad],
    }


def put_modes(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """What `modes` told; a file of an earlier version told the whole model's mode alone."""
    training, others = bool(saved["training"]), set(saved.get("other_mode", ()))
    frozen = set(saved.get("frozen", ()))
    for name, module in model.named_modules():
        module.training = training != (name in others)
    for name, parameter in model.named_parameters():
        if "frozen" in saved and parameter.is_floating_point():
            parameter.requires_grad_(name not in frozen)


def layer_sizes(model: nn.Module) -> dict[str, dict[str, int | list[int]]]:
    """Every layer's widths, by the names of its attributes."""
    found: dict[str, dict[str, int | list[int]]] = {}
    for name, module in model.named_modules():
        values = {key: vars(module)[key] for key in WIDTHS if key in vars(module)}
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        found[name] = {k: v for k, v in plain.items() if isinstance(v, int) or are_ints(v)}
    return {name: sizes for name, sizes in found.items() if sizes}


def are_ints(value: object) -> bool:
    """Whether it is a list of whole numbers."""
    return isinstance(value, list) and all(isinstance(v, int) for v in value)


def resize(
    model: nn.Module, layers: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor]
) -> None:
    """Give layers the recorded widths, and their tensors room for what is in the file."""
    modules = dict(model.named_modules())
    for name in layers.keys() & modules.keys():
        for key, value in layers[name].items():
            if key in vars(modules[name]) and (isinstance(value, int) or are_ints(value)):
                setattr(modules[name], key, tuple(value) if isinstance(value, list) else value)
    new: dict[int, Tensor] = {}
    for name, old in live_tensors(model).items():
        tensor = tensors.get(name)
        if tensor is None or tensor.shape == old.shape or tensor.dim() != old.dim():
            continue
        if any(there > here for there, here in zip(tensor.shape, old.shape, strict=True)):
            continue  # pruning makes nothing wider: it is another model
        if id(old) not in new:
            room = torch.empty_like(tensor)
            new[id(old)] = nn.Parameter(room, old.requires_grad) if isinstance(
                old, nn.Parameter) else room
        owner, _, leaf = name.rpartition(".")
        setattr(modules[owner], leaf, new[id(old)])
    if new:
        logger.info("%d tensors took the sizes in the file.", len(new))


def fits(model: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the model's state has the names and shapes of these tensors."""
    own = model.state_dict()
    return own.keys() == tensors.keys() and all(
        own[name].shape == tensor.shape for name, tensor in tensors.items())


def first_answers(split: Split) -> list[float] | None:
    """Some of the model's answers to one drawn input, which tell it from others of its shapes.

    None where it has no finite ones.
    """
    x = split.example_inputs[:1]
    if x.is_floating_point():
        x = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    try:
        with evaluating(split.model), draws_restored(split.model), torch.no_grad():
            leaves = tree_leaves(run_on(split.model, x))
    except Exception:  # of a forward that takes no such numbers; the file is written all the same
        return None
    values = [v.detach().flatten().double().cpu() for v in leaves
              if isinstance(v, Tensor) and v.is_floating_point()]
    flat = torch.cat(values) if values else torch.empty(0)
    some = flat[:: max(1, len(flat) // _ANSWERS)][:_ANSWERS]
    return some.tolist() if len(some) and bool(some.isfinite().all()) else None


def same_answers(split: Split, recorded: Sequence[float] | None) -> bool:
    """Whether the model gives the answers that were recorded; False where none were."""
    now = first_answers(split)
    if now is None or recorded is None or len(now) != len(recorded):
        return False
    told, here = torch.tensor(recorded), torch.tensor(now)
    return bool((told - here).abs().max() <= 1e-3 * told.abs().max() + 1e-6)


def live_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by each of its names."""
    return {**dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False))}


def unusual_strides(model: nn.Module) -> dict[str, list[int]]:
    """Strides of the tensors that do not lie row by row (channels last); kernels follow them."""
    state = {k: v for k, v in model.state_dict().items() if v.layout == torch.strided}
    return {
        name: list(tensor.stride()) for name, tensor in state.items()
        if tensor.stride() != torch.empty(tensor.shape, device="meta").stride()
        and 0 not in tensor.stride()
    }


def cast(model: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
    """Give every parameter and buffer the dtype it has in the file."""
    for name, value in live_tensors(model).items():
        tensor = tensors.get(prefix + name)
        if tensor is not None and tensor.dtype != value.dtype:
            value.data = value.data.to(tensor.dtype)
