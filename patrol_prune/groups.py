"""What a channel group is: plain data, no walk over anybody's graph.

A *channel group* is a set of channels that can only be removed together: the output channels of
its root layer, and everything that residual adds, concatenations, depthwise convolutions, gates
and flattening tie to them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from patrol_prune.attention_heads import HeadLinear

CHANNEL_NORMS = (nn.LayerNorm, nn.GroupNorm)
CONV = nn.modules.conv._ConvNd


class Halves(Protocol):
    """What the table needs of a split: which leaf layers run on which side."""

    edge_layers: dict[str, nn.Module]
    cloud_layers: dict[str, nn.Module]


@dataclass(frozen=True, eq=False)
class Member:
    """One layer's channels inside a group.

    Attributes:
        layer_name: name in the model (of the parameter, for a bare `nn.Parameter`).
        module: the layer, or the bare parameter.
        direction: "out" (rows of a convolution or linear layer), "in" (a consumer's input
            channels), "through" (batch normalisation, depthwise convolution, attention: in and
            out are one), or "parameter".
        width: channels of that layer in that direction when the table was built.
        idxs: `[K]` channel numbers in the layer.
        root_idxs: `[K]` the group channel each of them belongs to.
    """

    layer_name: str
    module: Any
    direction: str
    width: int
    idxs: Tensor
    root_idxs: Tensor


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that are removed together.

    Attributes:
        name: the root layer's name.
        channels: C, the number of channels of the root layer's output.
        members: the root first, then every layer that follows it.
        tie: g, the channels `{i + k*C/g}` go together (grouped convolutions, attention heads).
        location: "edge", "cloud", or None when no split was given. A group that crosses counts
            as "edge".
        crossing: None, "consumed" (the cloud only reads these channels) or "coupled" (cloud
            layers produce them too: a residual stream runs on behind the split).
        is_output: the channels are the model's own output.
        blocked: why the group cannot be pruned, or None.
        normalised: layers whose result depends on how many of the channels are there: those that
            normalise over them, and attention, which divides by the root of its heads' width or
            by the length of q and k.
        inexact: those of them under which a zero mask only approximates the removal.
    """

    name: str
    channels: int
    members: tuple[Member, ...]
    tie: int = 1
    location: str | None = None
    crossing: str | None = None
    is_output: bool = False
    blocked: str | None = None
    normalised: tuple[str, ...] = ()
    inexact: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether a zero mask equals the removal."""
        return not self.inexact

    @property
    def consumers(self) -> Iterator[Member]:
        """The layers whose input carries the group's mask."""
        return (m for m in self.members if m.direction == "in")

    @property
    def fewest_units(self) -> int:
        """Tied units that have to stay: two, as a grouped convolution with one channel left per
        group would be read as a depthwise one; of attention's heads or their dimensions, one."""
        return 1 if self.tie == 1 or isinstance(self.members[0].module, HeadLinear) else 2

    def units(self, channels: Tensor) -> Tensor:
        """`channels` completed to whole tied units, sorted."""
        size = self.channels // self.tie
        first = torch.unique(channels.long() % size)
        return (first[:, None] + torch.arange(self.tie) * size).flatten().sort().values


def tie_of(members: list[Member]) -> int:
    """The number of channel groups whose pruning pattern must agree."""
    tie = 1
    for m in members:
        tie = math.lcm(tie, _groups_of(m))
    return tie


def normalises(m: Member) -> bool:
    """Whether what a layer gives depends on how many of these channels are there."""
    if isinstance(m.module, HeadLinear):  # q and k of unit length
        return m.direction == "out" and 0 < m.module.mask_power < 1
    return isinstance(m.module, (*CHANNEL_NORMS, nn.MultiheadAttention))


def _groups_of(m: Member) -> int:
    """In how many groups a layer divides its channels."""
    if isinstance(m.module, CONV) and m.direction != "through":
        return m.module.groups
    if isinstance(m.module, HeadLinear) and m.direction == "out":
        return m.module.tied
    if isinstance(m.module, nn.GroupNorm):
        return m.module.num_groups
    return m.module.num_heads if isinstance(m.module, nn.MultiheadAttention) else 1


def _is_whole(m: Member, channels: int) -> bool:
    """Whether channel i of the layer is channel i of the group, for all of both.

    Only then are the ties of the layer's own groups those of the group's channels; a concatenation
    before a grouped convolution moves them.
    """
    whole = len(m.idxs) == m.width == channels
    return whole and bool((m.idxs == m.root_idxs).all())


def blocked_by(members: list[Member], is_output: bool, tie: int) -> str | None:
    """Why the group must stay whole, or None."""
    channels = members[0].width
    if is_output:
        return "these channels are the model's output"
    if channels % tie or channels // tie < 2:
        return f"its {channels} channels cannot be divided by {tie} channel groups"
    for m in members:
        if m.idxs.numel() and int(m.idxs.max()) >= m.width:
            return f"a reshape before {m.layer_name!r} mixes its channels"
        if isinstance(m.module, nn.LayerNorm) and len(m.module.normalized_shape) > 1:
            over = len(m.module.normalized_shape)
            return f"{m.layer_name!r} is a LayerNorm over {over} dimensions"
        if isinstance(m.module, nn.LSTM):
            return f"{m.layer_name!r} is an LSTM"
        if isinstance(m.module, nn.MultiheadAttention) and (why := _uncut(m, channels // tie)):
            return f"{m.layer_name!r} is a MultiheadAttention {why}"
        if m.direction == "parameter" and (why := _elsewhere(m, channels)):
            return f"{m.layer_name!r} is a parameter {why}"
        if _groups_of(m) > 1 and not _is_whole(m, channels):
            return f"{m.layer_name!r} puts a part of these channels into groups"
        if (isinstance(m.module, CONV) and m.module.transposed
                and m.direction != "through" and m.module.groups > 1):
            return f"{m.layer_name!r} is a transposed convolution in groups"
        depthwise = isinstance(m.module, CONV) and m.direction == "through"
        if depthwise and m.module.in_channels != m.module.out_channels:
            return f"{m.layer_name!r} merges channels depthwise"
    return None


def _elsewhere(member: Member, channels: int) -> str | None:
    """Why a bare parameter's channels may lie along another of its dimensions."""
    if len(member.idxs) == channels != member.width:
        return f"with {member.width} numbers where it would have to have {channels}"
    shape = tuple(member.module.shape)
    mapped = len(shape) == 4 or (len(shape) == 3 and shape[0] != 1)  # not [1, L, C] of tokens
    if mapped and sum(size == member.width for size in shape) > 1:
        return f"of shape {shape}, in which nobody can tell the channels"
    return None


def _uncut(member: Member, units: int) -> str | None:
    """Why attention cannot lose the same channels of its input, its heads and its output."""
    layer = member.module
    if not layer._qkv_same_embed_dim:
        return "with keys or values of another width"
    if layer.bias_k is not None or layer.bias_v is not None or layer.add_zero_attn:
        return "that adds keys and values of its own"
    if not takes_evenly(member, units, layer.num_heads):
        return "whose heads would lose different numbers of channels"
    return None


def takes_evenly(member: Member, units: int, parts: int) -> bool:
    """Whether every unit takes as many channels from each of a layer's `parts` equal parts.

    Channels whose `root_idxs` agree modulo `units` go together. Only then do heads, or the groups
    of a GroupNorm, stay of one size and hold what they held.
    """
    taken = torch.zeros(units, parts, dtype=torch.long)
    where = (member.root_idxs % units, member.idxs // (member.width // parts))
    taken.index_put_(where, torch.ones_like(member.idxs), accumulate=True)
    return bool((taken == taken[:, :1]).all())


def place(members: list[Member], split: Halves | None) -> tuple[str | None, str | None]:
    """(location, crossing) of a group relative to a split."""
    if split is None:
        return None, None
    edge = {id(m) for m in split.edge_layers.values()}
    cloud = {id(m) for m in split.cloud_layers.values()}
    if not any(id(m.module) in edge for m in members):
        return "cloud", None
    beyond = [m for m in members if id(m.module) in cloud]
    if not beyond:
        return "edge", None
    return "edge", "coupled" if any(m.direction == "out" for m in beyond) else "consumed"
