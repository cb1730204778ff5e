"""What a pruner needs to know of residual blocks beside its channel groups."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from patrol_prune.blocks import ResidualBlock, residual_blocks
from patrol_prune.errors import InputError
from patrol_prune.group_table import GroupTable

if TYPE_CHECKING:
    from patrol_prune.split import Split

STRUCTURES = {"channels": "channels", "blocks": "blocks", "both": "channels and blocks"}
"""What may go -> what that is called in a sentence."""


def check_structures(structures: str) -> None:
    """Refuse an unknown choice."""
    if structures not in STRUCTURES:
        raise InputError(
            f"Expected structures to be one of {', '.join(STRUCTURES)}, came {structures!r}."
        )


def check_scored(structures: str, importance: Any) -> None:
    """Refuse an unknown choice, and blocks without scores."""
    check_structures(structures)
    has_scores = hasattr(type(importance), "block_scores") or "block_scores" in vars(importance)
    if structures != "channels" and not (has_scores and getattr(importance, "blocks", True)):
        raise InputError(
            f"Expected an importance that scores blocks for structures={structures!r}, came "
            f"{type(importance).__name__}. Make it with PatrolImportance(objective, blocks=True)."
        )


def prunable_blocks(
    split: Split, structures: str, ignored_layers: Iterable[nn.Module]
) -> dict[str, ResidualBlock]:
    """The edge's blocks that may go; none if only channels may."""
    if structures == "channels":
        return {}
    ids = {id(m) for m in ignored_layers}
    ignored = {name for name, m in split.model.named_modules() if id(m) in ids}
    found = residual_blocks(split.model, split.example_inputs, split=split)
    return {
        name: block for name, block in found.items()
        if block.blocked is None and block.location == "edge"
        and not ignored & {name, *block.layers}
    }  # fmt: skip


def initial_widths(
    before: GroupTable, after: GroupTable, initial: Mapping[str, int]
) -> dict[str, int]:
    """The widths at the start of groups that have a new name because their root is gone."""
    found = {}
    for name, group in after.groups.items():
        owners = [owner for m in group.members if m.direction in ("out", "through")
                  for owner, _ in before.members_of(m.module, m.direction)]
        if name not in initial and owners and owners[0] in initial:
            found[name] = initial[owners[0]]
    return found


def tie_named(
    table: GroupTable, in_groups: Mapping[nn.Module, int], out_groups: Mapping[nn.Module, int]
) -> None:
    """Channel groups the caller names tie channels like those of grouped convolutions; in place."""
    for name, group in table.groups.items():
        tie = group.tie
        for m in group.members:
            named = in_groups if m.direction == "in" else out_groups
            if isinstance(m.module, nn.Module):
                tie = math.lcm(tie, int(named.get(m.module, 1)))
        if tie == group.tie:
            continue
        blocked = group.blocked
        if group.channels % tie or group.channels // tie < 2:
            blocked = f"its {group.channels} channels cannot be divided by {tie}"
            tie = group.tie
        table.groups[name] = dataclasses.replace(group, tie=tie, blocked=blocked)
