"""Which part of which old parameter a pruned one is, so that optimisers keep their momentum.

Torch-Pruning replaces every parameter it prunes; an optimiser made before holds none of the live
ones. Removal through this package records where each new parameter came from.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patrol_prune.given import check_kind, check_model
from patrol_prune.lineage import Kept, ancestors, earlier, taken_out

if TYPE_CHECKING:
    from patrol_prune.group_table import GroupTable

logger = logging.getLogger(__name__)


@contextmanager
def recording(table: GroupTable, channels: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, `channels` (group name -> root channels) are removed from the table's model."""
    before = dict(table.model.named_parameters())
    removed = _removed(table, channels)
    yield
    for name, new in table.model.named_parameters():
        old = before.get(name)
        if old is None or old is new:
            continue
        kept = _kept(old, new, removed.get(name, []))
        if kept is not None:
            before_it = [(ref, _compose(first, kept)) for ref, first in earlier(old)]
            ancestors[new] = [(weakref.ref(old), kept), *before_it]


def follow(tensor: Tensor, kept: Kept) -> Tensor:
    """The part of a tensor of the old parameter's shape that belongs to the new one."""
    for dim, index in kept.items():
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor.clone()


def rebuild_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> torch.optim.Optimizer:
    """A new optimiser of the same kind over the model's live parameters.

    Settings and parameter groups are taken over; moments (SGD's momentum, Adam's averages) are
    cut to the channels that were kept. Where a parameter's origin is not known, because something
    else pruned the model, its moments start anew, it goes into the first group, and a warning is
    logged. Parameters that the old optimiser did not hold are not added otherwise, except those
    that replaced ones it held.

    Args:
        optimizer: made before the removal.
        model: the pruned model.

    Returns:
        An optimiser of the same class. The old one is left as it was.

    Raises:
        InputError: no optimiser, or no module.
    """
    check_model(model, "model")
    check_kind(optimizer, "optimizer", torch.optim.Optimizer, "Give the one made before pruning.")
    successors: dict[int, tuple[nn.Parameter, Kept]] = {}
    unknown: list[str] = []
    held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    live = dict(model.named_parameters())
    for name, parameter in live.items():
        if id(parameter) in held:
            successors[id(parameter)] = (parameter, {})
            continue
        for reference, kept in earlier(parameter):
            old = reference()
            if old is not None and id(old) in held:
                successors[id(old)] = (parameter, kept)
                break
        else:
            unknown.append(name)
    groups = []
    for group in optimizer.param_groups:
        settings = {k: v for k, v in group.items() if k != "params"}
        alive = [successors[id(p)][0] for p in group["params"] if id(p) in successors]
        groups.append({**settings, "params": alive})
    lost = [p for key, p in held.items() if key not in successors and p not in taken_out]
    if lost and unknown:
        logger.warning("momentum of %d parameters starts anew, their origin is not known: %s",
                       len(unknown), ", ".join(unknown[:5]))
        groups[0]["params"] = groups[0]["params"] + [live[name] for name in unknown]
    accepted = inspect.signature(type(optimizer)).parameters
    fresh = type(optimizer)(
        groups, **{name: v for name, v in optimizer.defaults.items() if name in accepted}
    )
    for old in held.values():
        if id(old) in successors and old in optimizer.state:
            new, kept = successors[id(old)]
            fresh.state[new] = {
                name: follow(value, kept)
                if isinstance(value, Tensor) and value.shape == old.shape else value
                for name, value in optimizer.state[old].items()
            }
    return fresh


def _removed(table: GroupTable, channels: Mapping[str, Any]) -> dict[str, list[tuple[str, Tensor]]]:
    """Parameter name -> (direction, channel numbers that go)."""
    removed: dict[str, list[tuple[str, Tensor]]] = {}
    for name, gone in channels.items():
        roots = torch.as_tensor(gone, dtype=torch.long)
        for member in table.groups[name].members:
            indices = member.idxs[torch.isin(member.root_idxs, roots)]
            entry = (member.direction, indices)
            if member.direction == "parameter":
                removed.setdefault(member.layer_name, []).append(entry)
                continue
            if isinstance(member.module, nn.MultiheadAttention):
                for own, entries in _of_attention(member.module, indices).items():
                    removed.setdefault(f"{member.layer_name}.{own}", []).extend(entries)
                continue
            for own, _ in member.module.named_parameters(recurse=False):
                removed.setdefault(f"{member.layer_name}.{own}", []).append(entry)
    return removed


def _of_attention(
    layer: nn.MultiheadAttention, indices: Tensor
) -> dict[str, list[tuple[str, Tensor]]]:
    """Rows of q, k and v lie above each other; `layer` is as wide as before."""
    thrice = torch.cat([indices + i * layer.embed_dim for i in range(3)])
    return {
        "in_proj_weight": [("out", thrice), ("in", indices)],
        "in_proj_bias": [("out", thrice)],
        "out_proj.weight": [("out", indices), ("in", indices)],
        "out_proj.bias": [("out", indices)],
    }


def _kept(old: Tensor, new: Tensor, removed: list[tuple[str, Tensor]]) -> Kept | None:
    """Indices kept per dimension, or None where they do not reproduce the new values."""
    kept: Kept = {}
    for dim, (was, now) in enumerate(zip(old.shape, new.shape, strict=True)):
        if was == now:
            continue
        alive = torch.ones(was, dtype=torch.bool)
        for direction, indices in removed:
            if direction in ("in", "out") and (direction == "in") != (dim == 1):
                continue
            if len(indices) and int(indices.max()) < was:
                alive[indices] = False
        kept[dim] = alive.nonzero().flatten()
        if len(kept[dim]) != now:
            return None
    return kept if torch.equal(follow(old.detach(), kept), new.detach()) else None


def _compose(first: Kept, then: Kept) -> Kept:
    dims = {*first, *then}
    composed: Kept = {}
    for dim in dims:
        if dim in first and dim in then:
            composed[dim] = first[dim][then[dim]]
        else:
            composed[dim] = first[dim] if dim in first else then[dim]
    return composed
