"""Where the channels that cross a split lie in the transmitted feature."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patrol_prune._tp import output_channels
from patrol_prune.errors import UnsupportedModelError
from patrol_prune.group_table import GroupTable
from patrol_prune.groups import ChannelGroup

if TYPE_CHECKING:
    from patrol_prune.split import Split

Part = tuple[ChannelGroup, Tensor, Tensor]


def transmitted_channels(split: Split, table: GroupTable, groups: Iterable[str]) -> list[Part]:
    """Of each group that crosses: `(group, idxs [K], root_idxs [K])`.

    `idxs` number the feature's channels (the entries of a vector), `root_idxs` the group's.

    Args:
        split: the cut model.
        table: its group table, at the present widths.
        groups: names of groups; those that do not cross are passed over.

    Raises:
        UnsupportedModelError: a group that crosses does not show in the feature.
    """
    crossing = {n for n in groups if table.groups[n].crossing is not None}
    if not crossing:
        return []
    shape = tuple(split.feature_shape)
    parts: list[Part] = []
    for root, member in output_channels(split.edge, split.example_inputs):
        for name, own in table.members_of(root, "out"):
            to_group = dict(zip(own.idxs.tolist(), own.root_idxs.tolist(), strict=True))
            hits = [k for k, r in enumerate(member.root_idxs.tolist()) if r in to_group]
            if name in crossing and hits:
                roots = torch.tensor([to_group[int(member.root_idxs[k])] for k in hits])
                parts.append((table.groups[name], member.idxs[hits], roots))
    missed = crossing - {g.name for g, _, _ in parts}
    width = feature_width(shape)
    covered = 1 + max((int(idxs.max()) for _, idxs, _ in parts), default=-1)
    if missed or covered > width:
        raise UnsupportedModelError(
            f"The transmitted feature {shape} cannot be followed to the channels of "
            f"{sorted(missed) or 'its groups'}. Choose another split point, or boundary='keep'."
        )
    if len(shape) == 1 and covered < width and width % covered == 0:
        parts = [_flattened(part, width // covered) for part in parts]
    return parts


def feature_width(shape: tuple[int, ...]) -> int:
    """Channels of a feature: the first dimension, or the last of a sequence `[L, C]`."""
    return shape[0] if len(shape) != 2 else shape[-1]


def _flattened(part: Part, stride: int) -> Part:
    group, idxs, roots = part
    spread = (idxs[:, None] * stride + torch.arange(stride)).flatten()
    return group, spread, roots.repeat_interleave(stride)
