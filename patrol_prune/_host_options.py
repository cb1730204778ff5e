"""The arguments of Torch-Pruning's pruner that a budget leaves open."""

from __future__ import annotations

import warnings
from typing import Any

from patrol_prune.errors import InputError

_DECIDED_BY_THE_BUDGET = ("pruning_ratio", "ch_sparsity", "isomorphic", "global_pruning")
_NOT_SUPPORTED = (
    "pruning_ratio_dict",
    "ch_sparsity_dict",
    "prune_num_heads",
    "head_pruning_ratio",
    "head_pruning_ratio_dict",
)


def host_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`BasePruner`'s arguments, with copies of the dictionaries it would write into."""
    for name in _NOT_SUPPORTED:
        if kwargs.get(name):
            raise InputError(
                f"{name} has no meaning beside a budget of edge MACs. Leave it out, or name layers "
                "to keep in ignored_layers."
            )
    for name in _DECIDED_BY_THE_BUDGET:
        if kwargs.get(name) and name != "global_pruning":
            warnings.warn(f"{name} is not used: edge_macs decides.", stacklevel=3)
    dropped = (*_DECIDED_BY_THE_BUDGET, *_NOT_SUPPORTED)
    options = {k: v for k, v in kwargs.items() if k not in dropped}
    for name in ("in_channel_groups", "out_channel_groups", "num_heads", "channel_groups"):
        options[name] = dict(options.get(name) or {})
    return {"forward_fn": None, **options}
