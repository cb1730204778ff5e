"""Soft masks on channel groups and residual blocks, placed where a zero is exactly a removal.

The mask `m` of a group multiplies the *input* of every layer that consumes the group's channels,
and the transmitted feature where the group crosses the split:

    x_consumer <- x_consumer * m[root_idxs]          (docs/method.md, choice 1)

`m = 1` changes no bit; `m_c = 0` equals the removal of channel c, in evaluation and in training
mode. A layer that normalises over the group's channels (LayerNorm, GroupNorm) takes its statistics
over the live ones, with the weights `m` (`channel_norms.py`), and so does attention
(`live_attention.py`). Dimensions of attention's heads are masked in q besides
(`attention_heads.py`). Exception: a layer that normalises in a way of its own, whose statistics
still count a masked channel (`SoftMasks.inexact`).

The mask of a residual block is one number; it multiplies the output of the layer that gives the
branch's value (docs/method.md, choice 11). 1 changes no bit, 0 equals `remove_blocks`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patrol_prune._mask_hooks import (
    AttentionMask,
    BranchMask,
    ChannelGather,
    ConsumerMask,
    EnterEdge,
    NormMask,
    OutputMask,
    PerImage,
    ProjectionMask,
    Switch,
)
from patrol_prune.attention_heads import HeadLinear
from patrol_prune.blocks import ResidualBlock, residual_blocks
from patrol_prune.channel_norms import channel_norm
from patrol_prune.errors import InputError, nearest
from patrol_prune.given import check_model
from patrol_prune.group_table import GroupTable
from patrol_prune.groups import CHANNEL_NORMS, CONV, ChannelGroup, Member
from patrol_prune.transmitted import channel_axis, transmitted_channels

if TYPE_CHECKING:
    from patrol_prune.split import Split

BOUNDARIES = ("keep", "prune")


class SoftMasks:
    """One trainable mask per channel group, and one per residual block where asked for.

    A group's mask multiplies the input of every layer that reads the group's channels, and what is
    uploaded of them; a block's the output of its branch. 1 changes nothing, 0 is the removal (but
    for groups in `inexact`).

    Args:
        model: the model, traced bare; it is changed only inside `attached()`.
        example_inputs: what the model takes.
        split: restricts the masks to groups with a layer on the edge.
        boundary: "keep" leaves the groups that cross the split without a mask, "prune" masks
            them at their consumers and at the transmitted feature.
        scope: "edge", or "model" for the cloud's groups as well; without a split always "model".
        table: that of other masks or of a pruner of this very model and split, to save the
            tracing.
        blocks: mask the removable blocks too, those of the edge or, likewise, of the model.

    Attributes:
        channels: group name -> `nn.Parameter` `[C]`, ones at first.
        blocks: block name -> `nn.Parameter`, a scalar; empty unless asked for.
        unmaskable: removable block -> why it carries no mask.
        table: the model's channel groups; `table.groups` has them by name, with their `channels`,
            `location` ("edge" or "cloud"), `crossing`, `members` and why they are `blocked`.

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
        check_model(model, "model")
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
        self._per_image = PerImage()
        self._consumers = [
            (module, ConsumerMask(gather, _channels_of_input(module)))
            for module, gather in self._gathers("in", (nn.Module,))
        ]
        self._projections = [
            (module, ProjectionMask(gather))
            for module, gather in self._gathers("out", (HeadLinear,))
            if isinstance(module, HeadLinear) and module.mask_power
        ]
        self._counting: list[tuple[nn.Module, NormMask | AttentionMask]] = [
            (module, NormMask(gather, norm))
            for module, gather in self._gathers("through", CHANNEL_NORMS)
            if (norm := channel_norm(module)) is not None
        ]
        self._counting += [
            (module, AttentionMask(gather))
            for module, gather in self._gathers("through", (nn.MultiheadAttention,))
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
    def normalised(self) -> dict[str, tuple[str, ...]]:
        """Masked groups that layers normalise over, attention among them -> these layers.

        Such a mask is in what the layers divide by, so that no weight can take it up
        (`fold_masks`).
        """
        groups = self.table.groups
        return {n: groups[n].normalised for n in self.channels if groups[n].normalised}

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
        """Set the masks of these channels and blocks to 0: what the model does without them.

        Args:
            channels: group name -> numbers of its channels.
            blocks: names of blocks.

        Raises:
            InputError: no such group, channel or masked block.
        """
        for name in blocks:
            if name not in self.blocks:
                why = self.unmaskable.get(name) or nearest(name, self.blocks) or (
                    "these masks are of channels alone; make them with SoftMasks(blocks=True)")
                raise InputError(f"Expected a masked block, came {name!r}: {why}")
            self.blocks[name].data.zero_()
        for name, idxs in channels.items():
            width = self.channels[name].numel() if name in self.channels else None
            wrong = [int(i) for i in idxs if width is not None and not -width <= int(i) < width]
            if wrong:
                raise InputError(f"Expected channels of {name!r} below {width}, came {wrong[0]}.")
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

    @contextmanager
    def per_image(self, images: int) -> Iterator[list[Tensor]]:
        """Inside, each of a batch's images meets masks of its own, equal to the present ones.

        One backward pass then gives every image's share of the gradient, whose sum over images is
        the gradient in the mask. Layers are taken to keep a batch in order, all rows of an image
        side by side, as torchvision's models do; the sum is right even where one does not.

        Args:
            images: of the batch, B.

        Yields:
            the masks `[B, C]` of the channels, then `[B]` of the blocks, in the order of
            `parameters()`; leaves that require gradients.
        """
        self._follow(_device_of(self.model))
        copies = self._per_image.begin(self.parameters(), images)
        try:
            yield copies
        finally:
            self._per_image.end()

    def split_forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(z_seen, logits)`: the feature on the wire, and the cloud's answer.

        `z_raw = edge(x)`, `z_seen = z_raw * m` over the crossing groups, `logits = cloud(z_raw)`,
        whose consumers carry `m` once each.

        Raises:
            InputError: the masks were made without a split.
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
        for module, counting in self._counting:
            self._handles.append(module.register_forward_hook(counting, with_kwargs=True))
        for projection, after in self._projections:
            self._handles.append(projection.register_forward_hook(after))
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
        hooks: list[tuple[nn.Module, ConsumerMask | ProjectionMask | NormMask | AttentionMask]]
        hooks = [*self._consumers, *self._projections, *self._counting]
        for _, hook in hooks:
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
            self._branches[name] = layer, BranchMask(self.blocks[name], self._per_image)

    def _gathers(
        self, direction: str, kinds: tuple[type, ...]
    ) -> Iterator[tuple[nn.Module, ChannelGather]]:
        """Every layer of these kinds that the masked channels reach in a direction."""
        fed: dict[int, list[tuple[ChannelGroup, Member]]] = {}
        for name in self.channels:
            group = self.table.groups[name]
            for m in group.members:
                if m.direction == direction and isinstance(m.module, kinds):
                    fed.setdefault(id(m.module), []).append((group, m))
        for feeders in fed.values():
            parts = [(g, m.idxs, m.root_idxs) for g, m in feeders]
            yield feeders[0][1].module, self._gather(parts, feeders[0][1].width)

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
            return ChannelGather(masks, None, self._per_image)
        return ChannelGather(masks, index.to(masks[0].device), self._per_image)

    def _transmitted_gather(self) -> tuple[ChannelGather, int] | None:
        """The gather of the feature's channels and their dimension, counted from the end."""
        if self.split is None:
            return None
        parts = transmitted_channels(self.split, self.table, self.channels)
        if not parts:
            return None
        shape = tuple(self.split.feature_shape)
        axis = channel_axis(self.split, parts)
        return self._gather(parts, shape[axis]), axis - len(shape)


def _channels_of_input(module: nn.Module) -> int:
    return -1 - len(module.kernel_size) if isinstance(module, CONV) else -1


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _one_of(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"Expected {what} to be one of {', '.join(allowed)}, came {value!r}.")
