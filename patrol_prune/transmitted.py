"""Where the channels that cross a split lie in the transmitted feature."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patrol_prune._tp import output_channels
from patrol_prune.cost import draws_restored, evaluating, hooks_restored
from patrol_prune.errors import UnsupportedModelError
from patrol_prune.group_table import GroupTable
from patrol_prune.groups import CONV, ChannelGroup, Member

if TYPE_CHECKING:
    from patrol_prune.split import Split

Part = tuple[ChannelGroup, Tensor, Tensor]
_TRIALS = 3


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
    for root, member in output_channels(split.edge, split.example_inputs, math.prod(shape)):
        for name, own in table.members_of(root, "out"):
            to_group = dict(zip(own.idxs.tolist(), own.root_idxs.tolist(), strict=True))
            hits = [k for k, r in enumerate(member.root_idxs.tolist()) if r in to_group]
            if name in crossing and hits:
                roots = torch.tensor([to_group[int(member.root_idxs[k])] for k in hits])
                parts.append((table.groups[name], member.idxs[hits], roots))
    missed = crossing - {g.name for g, _, _ in parts}
    covered = _covered(parts)
    if missed or covered > max(shape):
        raise UnsupportedModelError(
            f"The transmitted feature {shape} cannot be followed to the channels of "
            f"{sorted(missed) or 'its groups'}. Choose another split point, or boundary='keep'."
        )
    if len(shape) == 1 and covered < shape[0] and shape[0] % covered == 0:
        parts = [_flattened(part, shape[0] // covered) for part in parts]
    return parts


def channel_axis(split: Split, parts: Sequence[Part]) -> int:
    """Which axis of the feature, without the batch, holds the channels that `parts` number.

    Usually the first, and the last of a sequence `[L, C]`. Where sizes allow another one, as in
    `[H, W, C]` or `[C, L]`, channels are changed where they are made, and it shows along one axis.

    Raises:
        UnsupportedModelError: it shows along none.
    """
    shape, covered = tuple(split.feature_shape), _covered(parts)
    usual = len(shape) - 1 if len(shape) == 2 else 0
    able = [a for a, size in enumerate(shape) if size >= covered]
    if len(able) == 1:
        return able[0]
    seen = _probed(split, parts)
    found = [a for a in able if seen.get(a, 0) == max(seen.values(), default=0) > 0]
    if len(found) != 1 and shape[usual] == covered and shape.count(covered) == 1:
        return usual
    if len(found) != 1:
        raise UnsupportedModelError(
            f"Nobody can tell which axis of the transmitted feature {shape} holds its channels. "
            "Choose another split point, or boundary='keep'."
        )
    return found[0]


def _covered(parts: Sequence[Part]) -> int:
    return 1 + max((int(idxs.max()) for _, idxs, _ in parts), default=-1)


def _probed(split: Split, parts: Sequence[Part]) -> dict[int, int]:
    """Axis -> in how many of some trials a changed channel shows there at its own numbers most."""
    group, idxs, roots = max(parts, key=lambda part: len(part[1]))
    edge = {id(m) for m in split.edge.modules()}
    makers = {id(m.module): m for m in group.members if m.direction == "out"
              and isinstance(m.module, (CONV, nn.Linear)) and id(m.module) in edge}
    order: list[Member] = []
    change: list[tuple[Member, int, float]] = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        order.append(makers[id(module)])
        if not change or change[0][0].module is not module:
            return output
        member, root, sign = change[0]
        at = member.idxs[member.root_idxs == root].to(output.device)
        size = 10.0 * float(output.abs().max()) + 1.0
        dim = 1 if isinstance(module, CONV) else output.dim() - 1
        return output.index_add(dim, at, torch.full_like(
            output.index_select(dim, at), sign * size))

    seen: dict[int, int] = {}
    with (hooks_restored(split.edge), evaluating(split.edge), draws_restored(split.edge),
          torch.no_grad()):
        for member in makers.values():
            member.module.register_forward_hook(hook)
        plain = split.edge(split.example_inputs)
        for root, sign in itertools.product(roots.unique()[:_TRIALS].tolist(), (1.0, -1.0)):
            change[:] = [(order[-1], root, sign)] if order else []
            moved = (split.edge(split.example_inputs) - plain).abs().mean(0)
            if not change or not bool((moved > 0).any()):
                continue
            expected = set(idxs[roots == root].tolist())
            for axis in range(moved.dim()):
                if len(expected) >= moved.shape[axis]:
                    continue
                along = moved.movedim(axis, 0).flatten(1).mean(1)
                top = along.topk(len(expected)).indices.tolist()
                seen[axis] = seen.get(axis, 0) + (set(top) == expected)
    return seen


def _flattened(part: Part, stride: int) -> Part:
    group, idxs, roots = part
    spread = (idxs[:, None] * stride + torch.arange(stride)).flatten()
    return group, spread, roots.repeat_interleave(stride)
