"""Soft masks on channel groups and residual blocks, placed where a zero is exactly a removal.

The mask `m` of a group multiplies the *input* of every layer that consumes the group's channels,
and the transmitted feature where the group crosses the split:

    x_consumer <- x_consumer * m[root_idxs]          (METHOD.md 2.1)

`m = 1` changes no bit; `m_c = 0` equals the removal of channel c, in evaluation and in training
mode. Exception: groups with a layer that normalises over channels (`SoftMasks.inexact`), whose
statistics still count a masked channel.

The mask of a residual block is one number; it multiplies the output of the layer that gives the
branch's value (METHOD.md 2.2). 1 changes no bit, 0 equals `remove_blocks`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patrol_prune._mask_hooks import (
    BranchMask,
    ChannelGather,
    ConsumerMask,
    EnterEdge,
    OutputMask,
    Switch,
)
from patrol_prune._tp import output_channels
from patrol_prune.blocks import ResidualBlock, residual_blocks
from patrol_prune.errors import InputError, UnsupportedModelError, nearest
from patrol_prune.group_table import GroupTable
from patrol_prune.groups import ChannelGroup

if TYPE_CHECKING:
    from patrol_prune.split import Split

BOUNDARIES = ("keep", "prune")


class SoftMasks:
    """One trainable mask per channel group, and one per residual block where asked for.

    Args:
        model: the model, traced bare; it is changed only inside `attached()`.
        example_inputs: what the model takes.
        split: restricts the masks to groups with a layer on the edge.
        boundary: "keep" leaves the groups that cross the split without a mask, "prune" masks
            them at their consumers and at the transmitted feature.
        scope: "edge", or "model" for the cloud's groups as well; without a split always "model".
        table: the model's group table, built with this split, to save the tracing.
        blocks: mask the removable blocks too, those of the edge or, likewise, of the model.

    Attributes:
        channels: group name -> `nn.Parameter` `[C]`, ones at first.
        blocks: block name -> `nn.Parameter`, a scalar; empty unless asked for.
        unmaskable: removable block -> why it carries no mask.
        table: the group table.

    Raises:
        InputError: an unknown boundary or scope.
        UnsupportedModelError: the model cannot be traced, or the transmitted channels cannot be
            followed to their groups.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> masks = SoftMasks(net, torch.zeros(1, 2))
        >>> {name: tuple(m.shape) for name, m in masks.channels.items()}
        {'0': (4,)}
        >>> with masks.attached():
        ...     out = net(torch.ones(1, 2))
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        split: Split | None = None,
        boundary: str = "keep",
        scope: str = "edge",
        table: GroupTable | None = None,
        blocks: bool = False,
    ) -> None:
        _one_of("boundary", boundary, BOUNDARIES)
        _one_of("scope", scope, ("edge", "model"))
        self.model, self.split, self.boundary = model, split, boundary
        self.table = table or GroupTable.build(model, example_inputs, split=split)
        device = _device_of(model)
        self.channels: dict[str, nn.Parameter] = {
            g.name: nn.Parameter(torch.ones(g.channels, device=device))
            for g in self.table.groups.values()
            if g.blocked is None
            and (split is None or scope == "model" or g.location == "edge")
            and (boundary == "prune" or g.crossing is None)
        }
        self._consumers = [
            (module, ConsumerMask(gather, dim)) for module, gather, dim in self._consumer_gathers()
        ]
        self.blocks: dict[str, nn.Parameter] = {}
        self.unmaskable: dict[str, str] = {}
        self._branches: dict[str, tuple[nn.Module, BranchMask]] = {}
        if blocks:
            found = residual_blocks(model, example_inputs, split=split)
            self._add_blocks(found, None if scope == "model" else split)
        self._switch = Switch()
        self._transmitted = self._transmitted_gather()
        self._depth = 0
        self._handles: list[Any] = []

    @property
    def inexact(self) -> dict[str, tuple[str, ...]]:
        """Masked groups where zero only approximates removal -> the layers that cause it."""
        return {n: layers for n, layers in self.table.inexact().items() if n in self.channels}

    def scaled_layer(self, block: str) -> nn.Module:
        """The layer whose output a block's mask multiplies: the last of its branch."""
        return self._branches[block][0]

    @property
    def is_attached(self) -> bool:
        """Whether the model runs masked at present."""
        return self._depth > 0

    def parameters(self) -> list[nn.Parameter]:
        """The masks: the channels' in the table's order, then the blocks'."""
        return [*self.channels.values(), *self.blocks.values()]

    def set(self, name: str, values: Tensor | Sequence[float] | float) -> None:
        """Write a group's mask: `[C]` values, or one for all.

        Raises:
            InputError: no such group, or values of another length.
        """
        if name not in self.channels:
            raise InputError(
                f"Expected a masked group, came {name!r}. {nearest(name, self.channels)}"
            )
        mask = self.channels[name]
        new = torch.as_tensor(values, dtype=mask.dtype, device=mask.device)
        if new.dim() and new.shape != mask.shape:
            raise InputError(
                f"Expected {len(mask)} values for group {name!r}, came shape {tuple(new.shape)}."
            )
        with torch.no_grad():
            mask.copy_(new)

    def zero(
        self, channels: Mapping[str, Tensor | Sequence[int]], blocks: Iterable[str] = ()
    ) -> None:
        """Set the masks of these channels and blocks to 0: what the model does without them."""
        for name in blocks:
            if name not in self.blocks:
                why = self.unmaskable.get(name) or nearest(name, self.blocks)
                raise InputError(f"Expected a masked block, came {name!r}: {why}")
            self.blocks[name].data.zero_()
        for name, idxs in channels.items():
            values = self.channels[name].detach().clone() if name in self.channels else 1.0
            if isinstance(values, Tensor):
                values[torch.as_tensor(idxs, dtype=torch.long, device=values.device)] = 0.0
            self.set(name, values)

    @contextmanager
    def attached(self) -> Iterator[SoftMasks]:
        """Inside, the model, `split.edge` and `split.cloud` run masked; nests.

        `split.edge(x)` gives the masked feature, which is what crosses the wire. The cloud's
        consumers carry the mask of a crossing group too, so that `cloud(edge(x))` applies it
        twice: equal for masks of 0 and 1, and `split_forward` applies it once for any mask.

        Raises:
            InputError: the model was pruned since these masks were made.
        """
        if self._depth == 0:
            self._attach()
        self._depth += 1
        try:
            yield self
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._detach()

    def split_forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(z_seen, logits)`: the feature on the wire, and the cloud's answer.

        `z_raw = edge(x)`, `z_seen = z_raw * m` over the crossing groups, `logits = cloud(z_raw)`,
        whose consumers carry `m` once each.
        """
        if self.split is None:
            raise InputError("Expected masks made with split=, came none. Call the model instead.")
        with self.attached():
            self._switch.raw = True
            try:
                z_raw = self.split.edge(x)
            finally:
                self._switch.raw = False
            return self.transmitted(z_raw), self.split.cloud(z_raw)

    def transmitted(self, z: Tensor) -> Tensor:
        """A raw feature times the masks of the groups that cross; `z` itself if none does."""
        if self._transmitted is None:
            return z
        gather, dim = self._transmitted
        return gather.scale(z, dim)

    def _attach(self) -> None:
        if not self.table.is_current():
            raise InputError(
                "Expected the model these masks were made for, came one that was pruned since. "
                "Make new masks."
            )
        self._follow(_device_of(self.model))
        for module, hook in self._consumers:
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        for layer, branch in self._branches.values():
            self._handles.append(layer.register_forward_hook(branch))
        if self._transmitted is None or self.split is None:
            return
        gather, dim = self._transmitted
        edge, last = self.split.edge, self.split.blocks[-1]
        self._handles.append(edge.register_forward_pre_hook(EnterEdge(self._switch)))
        leave = OutputMask(gather, dim, self._switch, is_edge=True)
        self._handles.append(edge.register_forward_hook(leave, always_call=True))
        if last is not edge:
            end = OutputMask(gather, dim, self._switch, is_edge=False)
            self._handles.append(last.register_forward_hook(end))

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._switch.inside_edge = 0

    def _follow(self, device: torch.device) -> None:
        for mask in self.parameters():
            if mask.device != device:
                mask.data = mask.data.to(device)
        for _, hook in self._consumers:
            hook.gather.to(device)
        if self._transmitted is not None:
            self._transmitted[0].to(device)

    def _add_blocks(self, found: Mapping[str, ResidualBlock], split: Split | None) -> None:
        """One scalar per removable block; of the edge, if there is a split."""
        device = _device_of(self.model)
        for name, block in found.items():
            if block.blocked is not None or (split is not None and block.location != "edge"):
                continue
            if block.scaled is None:
                self.unmaskable[name] = block.unscaled or ""
                continue
            self.blocks[name] = nn.Parameter(torch.ones((), device=device))
            layer = self.model.get_submodule(block.scaled)
            self._branches[name] = layer, BranchMask(self.blocks[name])

    def _consumer_gathers(self) -> Iterator[tuple[nn.Module, ChannelGather, int]]:
        fed: dict[int, list[tuple[ChannelGroup, Any]]] = {}
        for name in self.channels:
            group = self.table.groups[name]
            for member in group.consumers:
                fed.setdefault(id(member.module), []).append((group, member))
        for feeders in fed.values():
            module, width = feeders[0][1].module, feeders[0][1].width
            parts = [(g, m.idxs, m.root_idxs) for g, m in feeders]
            dim = -1 if isinstance(module, nn.Linear) else -1 - len(module.kernel_size)
            yield module, self._gather(parts, width), dim

    def _gather(
        self, parts: Sequence[tuple[ChannelGroup, Tensor, Tensor]], width: int
    ) -> ChannelGather:
        index = torch.zeros(width, dtype=torch.long)
        offset = 1
        for group, idxs, roots in parts:
            index[idxs] = offset + roots
            offset += group.channels
        masks = [self.channels[g.name] for g, _, _ in parts]
        if len(masks) == 1 and torch.equal(index, 1 + torch.arange(masks[0].numel())):
            return ChannelGather(masks, None)
        return ChannelGather(masks, index.to(masks[0].device))

    def _transmitted_gather(self) -> tuple[ChannelGather, int] | None:
        """The gather of the feature's channels and their dimension, counted from the end."""
        crossing = {n for n in self.channels if self.table.groups[n].crossing is not None}
        if self.split is None or not crossing:
            return None
        shape = tuple(self.split.feature_shape)
        parts = []
        for root, member in output_channels(self.split.edge, self.split.example_inputs):
            for name, own in self.table.members_of(root, "out"):
                to_group = dict(zip(own.idxs.tolist(), own.root_idxs.tolist(), strict=True))
                hits = [k for k, r in enumerate(member.root_idxs.tolist()) if r in to_group]
                if name in crossing and hits:
                    roots = torch.tensor([to_group[int(member.root_idxs[k])] for k in hits])
                    parts.append((self.table.groups[name], member.idxs[hits], roots))
        missed = crossing - {g.name for g, _, _ in parts}
        width = shape[0] if len(shape) != 2 else shape[-1]
        covered = 1 + max((int(idxs.max()) for _, idxs, _ in parts), default=-1)
        if missed or covered > width:
            raise UnsupportedModelError(
                f"The transmitted feature {shape} cannot be followed to the channels of "
                f"{sorted(missed) or 'its groups'}. Choose another split point, or boundary='keep'."
            )
        if len(shape) == 1 and covered < width and width % covered == 0:
            parts = [_flattened(part, width // covered) for part in parts]
        return self._gather(parts, width), {1: -1, 2: -1}.get(len(shape), -len(shape))


def _flattened(
    part: tuple[ChannelGroup, Tensor, Tensor], stride: int
) -> tuple[ChannelGroup, Tensor, Tensor]:
    group, idxs, roots = part
    spread = (idxs[:, None] * stride + torch.arange(stride)).flatten()
    return group, spread, roots.repeat_interleave(stride)


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _one_of(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"Expected {what} to be one of {', '.join(allowed)}, came {value!r}.")
