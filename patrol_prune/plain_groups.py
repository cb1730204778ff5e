"""Torch-Pruning's groups as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from patrol_prune._tp import width_of
from patrol_prune.channel_norms import is_removal
from patrol_prune.groups import (
    CHANNEL_NORMS,
    ChannelGroup,
    Halves,
    Member,
    blocked_by,
    normalises,
    place,
    tie_of,
)

__all__ = ["to_plain"]


def to_plain(
    raw: Any, graph: Any, names: dict[Any, str], split: Halves | None = None
) -> ChannelGroup:
    """One Torch-Pruning group as plain data."""
    members: list[Member] = []
    is_output = False
    for item in raw.items:
        node, handler = item.dep.target, item.dep.handler
        module = node.module
        is_in = graph.is_in_channel_pruning_fn(handler)
        is_out = graph.is_out_channel_pruning_fn(handler)
        is_output = is_output or (is_out and not node.outputs)
        if isinstance(module, nn.Parameter):
            name, direction = graph._param_to_name[module], "parameter"
            width = module.shape[node.pruning_dim]
        elif module in names:
            name = names[module]
            direction = "through" if is_in and is_out else ("in" if is_in else "out")
            width = width_of(module, direction, graph)
            if direction == "through" and width == 0:
                continue
        else:
            continue
        if any(r is None for r in item.root_idxs):
            continue
        idxs = torch.tensor(item.idxs, dtype=torch.long)
        roots = torch.tensor(item.root_idxs, dtype=torch.long)
        members.append(Member(name, module, direction, width, idxs, roots))
    root = members[0]
    tie = tie_of(members)
    units = root.width // tie if root.width % tie == 0 else 1
    norms = [m for m in members if isinstance(m.module, CHANNEL_NORMS)]
    blocked = (
        blocked_by(members, is_output, tie)
        or _repeated(raw, names, members, graph.ops.OPTYPE.CONCAT)
    )
    location, crossing = place(members, split)
    return ChannelGroup(
        name=root.layer_name,
        channels=root.width,
        members=tuple(members),
        tie=root.width // units,
        location=location,
        crossing=crossing,
        is_output=is_output,
        blocked=blocked,
        normalised=tuple(m.layer_name for m in members if normalises(m)),
        inexact=tuple(m.layer_name for m in norms if not is_removal(m, units)),
    )


def _repeated(
    raw: Any, names: Mapping[Any, str], members: list[Member], concat: Any
) -> str | None:
    """Why a group that holds one layer's channels side by side, twice, must stay whole.

    Torch-Pruning follows a layer once; from a root as wide as the concatenation it misses that the
    channels of the second place are those of the first.
    """
    widths = {id(m.module): m.width for m in members if m.direction in ("out", "through")}
    for item in raw.items:
        node = item.dep.target
        if node.type != concat:
            continue
        origins = [origin for part in node.inputs for origin in _origins(part, names)]
        for origin in origins:
            twice = sum(other is origin for other in origins) > 1
            if twice and 0 < widths.get(id(origin), 0) < members[0].width:
                return f"the channels of {names[origin]!r} are concatenated twice"
    return None


def _origins(node: Any, names: Mapping[Any, str]) -> list[nn.Module]:
    """The layers whose channels a node of the graph holds, each once."""
    nodes, seen, found = [node], set(), []
    while nodes:
        node = nodes.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if node.module in names:
            found.append(node.module)
        else:
            nodes += node.inputs
    return found
