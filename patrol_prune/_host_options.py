"""The arguments of Torch-Pruning's pruner that a budget leaves open."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from patrol_prune._tp import BasePruner
from patrol_prune.errors import InputError
from patrol_prune.given import check_among, check_count, check_model, check_number, check_split

_DECIDED_BY_THE_BUDGET = ("pruning_ratio", "ch_sparsity", "isomorphic", "global_pruning")
_NOT_SUPPORTED = (
    "pruning_ratio_dict",
    "ch_sparsity_dict",
    "prune_num_heads",
    "head_pruning_ratio",
    "head_pruning_ratio_dict",
)


def check_pruner(
    model: object, split: object, importance: object, boundary: object, steps: object, reg: object
) -> None:
    """Refuse a pruner's arguments that are something else.

    Raises:
        InputError: see `PatrolPruner`.
    """
    check_split(split)
    check_model(model, "model")
    if getattr(split, "model", None) is not model:
        raise InputError(
            "Expected a split of this model, came one of another model. Give split.model, which is "
            "the model without a wrapper such as DataParallel."
        )
    check_among(boundary, "boundary", ("keep", "prune"))
    if isinstance(importance, type) or not callable(importance):
        raise InputError(
            f"Expected importance as an object that scores groups, came {importance!r}. Make one: "
            "PatrolImportance(objective), or torch_pruning.importance.GroupTaylorImportance()."
        )
    check_count(steps, "iterative_steps", 1)
    check_number(reg, "reg")


def with_owners(layers: Sequence[nn.Module | nn.Parameter], model: nn.Module) -> set[int]:
    """The ids of the layers, and of those that hold one of the parameters: pruning makes new ones.
    """
    ids = {id(layer) for layer in layers}
    return ids | {id(m) for m in model.modules() for p in m.parameters(recurse=False)
                  if id(p) in ids}


def layers_to_keep(layers: Iterable[object] | None) -> list[nn.Module | nn.Parameter]:
    """`ignored_layers` as a list.

    Raises:
        InputError: something in it is neither a module nor a parameter.
    """
    found = [layers] if isinstance(layers, str) else list(layers or [])
    kept: list[nn.Module | nn.Parameter] = []
    for layer in found:
        if not isinstance(layer, (nn.Module, nn.Parameter)):
            named = f" Give model.get_submodule({layer!r})." * isinstance(layer, str)
            raise InputError(
                f"Expected modules or parameters in ignored_layers, came {layer!r}.{named}")
        kept.append(layer)
    return kept


def host_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`BasePruner`'s arguments, with copies of the dictionaries it would write into."""
    known = [*inspect.signature(BasePruner.__init__).parameters, *_DECIDED_BY_THE_BUDGET,
             *_NOT_SUPPORTED]
    for name in kwargs:
        check_among(name, "further arguments", known)
    for name in _NOT_SUPPORTED:
        if kwargs.get(name):
            raise InputError(
                f"{name} has no meaning beside a budget of edge MACs. Leave it out, or name layers "
                "to keep in ignored_layers."
            )
    for name in _DECIDED_BY_THE_BUDGET:
        is_given = kwargs.get(name) is False if name == "global_pruning" else kwargs.get(name)
        if is_given:
            warnings.warn(f"{name} is not used: edge_macs decides.", stacklevel=3)
    dropped = (*_DECIDED_BY_THE_BUDGET, *_NOT_SUPPORTED)
    options = {k: v for k, v in kwargs.items() if k not in dropped}
    for name in ("in_channel_groups", "out_channel_groups", "num_heads", "channel_groups"):
        options[name] = dict(options.get(name) or {})
    return {"forward_fn": None, **options}
