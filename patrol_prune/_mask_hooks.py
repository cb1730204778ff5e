"""The hooks that put masks onto a model. All are picklable, for `deepcopy` and for saving."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patrol_prune.attention_heads import HeadLinear
from patrol_prune.channel_norms import ChannelNorm, Normalises, over_live_channels
from patrol_prune.live_attention import attention_over_live_channels

_LEAST_WEIGHT = 1e-12


class PerImage:
    """What stands in for the masks while every image has its own: `[B, C]`, or `[B]` of a block."""

    def __init__(self) -> None:
        self.images = 0
        self._of: dict[int, Tensor] = {}

    def begin(self, masks: Sequence[nn.Parameter], images: int) -> list[Tensor]:
        """Copies of the masks, one per image; leaves of their own."""
        self.images = images
        copies = [m.detach().expand(images, *m.shape).clone().requires_grad_() for m in masks]
        self._of = {id(m): copy for m, copy in zip(masks, copies, strict=True)}
        return copies

    def end(self) -> None:
        """One mask for all images again."""
        self.images, self._of = 0, {}

    def of(self, mask: nn.Parameter) -> Tensor:
        """The mask, or its copies."""
        return self._of.get(id(mask), mask)


def multiplied(x: Tensor, mask: Tensor, dim: int | None, images: int) -> Tensor:
    """`x` times a mask along `dim`, or times a number where `dim` is None.

    With masks per image, `x` holds an equal number of rows for each image, one image after the
    other; where it does not, it takes the mean of the copies, whose gradients then share alike.
    """
    shape = [1] * x.dim()
    if dim is not None:
        shape[dim] = -1
    if not images:
        return x * mask.to(x.dtype).view(shape)
    if len(x) % images:
        return x * mask.mean(0).to(x.dtype).view(shape)
    if len(x) == images:  # no detour: a reshape would lose the layout channels_last
        return x * mask.to(x.dtype).view(images, *shape[1:])
    rows = x.unflatten(0, (images, -1))
    return (rows * mask.to(x.dtype).view(images, *shape)).flatten(0, 1)


class ChannelGather:
    """The mask vector of one tensor's channels, `[C]` or `[B, C]`, gathered from its groups'.

    `index` points into `cat([1, m_1, m_2, ...])`; None says that it is the one mask as it is.
    """

    def __init__(
        self, masks: Sequence[nn.Parameter], index: Tensor | None, per_image: PerImage
    ) -> None:
        self.masks = tuple(masks)
        self.index = index
        self.per_image = per_image

    def vector(self) -> Tensor:
        """The factors of the channels."""
        masks = [self.per_image.of(m) for m in self.masks]
        if self.index is None:
            return masks[0]
        one = masks[0].new_ones(*masks[0].shape[:-1], 1)
        return torch.cat([one, *masks], dim=-1)[..., self.index]

    def shared(self) -> Tensor:
        """The factors `[C]` that hold for all images; with one per image, the mean of these."""
        return self.vector().mean(0) if self.per_image.images else self.vector()

    def scale(self, x: Tensor, dim: int) -> Tensor:
        """`x` times the mask along `dim`."""
        return multiplied(x, self.vector(), dim, self.per_image.images)

    def to(self, device: torch.device) -> None:
        """Follow the model to `device`."""
        if self.index is not None:
            self.index = self.index.to(device)


class ConsumerMask:
    """Forward pre-hook: masks the input of one consumer."""

    def __init__(self, gather: ChannelGather, dim: int) -> None:
        self.gather = gather
        self.dim = dim

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self.gather.scale(args[0], self.dim), *args[1:]), kwargs
        return args, {**kwargs, "input": self.gather.scale(kwargs["input"], self.dim)}


class ProjectionMask:
    """Forward hook: masks what a projection to attention's heads gives, by a power of the mask."""

    def __init__(self, gather: ChannelGather) -> None:
        self.gather = gather

    def __call__(self, module: HeadLinear, args: tuple[Any, ...], output: Tensor) -> Tensor:
        mask = self.gather.vector()
        if module.mask_power != 1:  # without the infinite slope of a root at 0
            root = mask.clamp_min(_LEAST_WEIGHT) ** module.mask_power
            mask = torch.where(mask > 0, root, torch.zeros_like(root))
        return multiplied(output, mask, -1, self.gather.per_image.images)


class NormMask:
    """Forward hook: a layer that normalises over channels counts the live ones only.

    At a mask of ones the layer's own output stays, bit for bit, with the formula's gradients.
    """

    def __init__(self, gather: ChannelGather, norm: ChannelNorm) -> None:
        self.gather, self.norm = gather, norm

    def __call__(
        self, module: Normalises, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        x = args[0] if args else kwargs["input"]
        is_one_each = len(x) == self.gather.per_image.images
        mask = self.gather.vector() if is_one_each else self.gather.shared()
        ones = bool((mask == 1).all())
        if ones and not (torch.is_grad_enabled() and mask.requires_grad):
            return output
        live = over_live_channels(module, self.norm, x, mask).to(output.dtype)
        return _with_gradients_of(live, output) if ones else live


class AttentionMask:
    """Forward hook: attention over the live channels only; at ones as `NormMask`."""

    def __init__(self, gather: ChannelGather) -> None:
        self.gather = gather

    def __call__(
        self, module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any],
        output: tuple[Tensor, Tensor | None],
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        mask = self.gather.shared()
        ones = bool((mask == 1).all())
        if ones and not (torch.is_grad_enabled() and mask.requires_grad):
            return output
        value, weights = attention_over_live_channels(module, args, kwargs, mask)
        value = value.to(output[0].dtype)
        return (_with_gradients_of(value, output[0]), output[1]) if ones else (value, weights)


def _with_gradients_of(live: Tensor, value: Tensor) -> Tensor:
    """`value`, bit for bit, with the derivatives of `live`."""
    return value.detach() + (live - live.detach())


@dataclass
class Switch:
    """Whether the edge's output is wanted as it is, and how deep in the edge we are."""

    raw: bool = False
    inside_edge: int = 0


class EnterEdge:
    """Forward pre-hook of the edge: from here on, its last block is not the last to be masked."""

    def __init__(self, switch: Switch) -> None:
        self.switch = switch

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.switch.inside_edge += 1


class OutputMask:
    """Forward hook: masks the feature where it leaves the edge, or the edge's last block."""

    def __init__(self, gather: ChannelGather, dim: int, switch: Switch, is_edge: bool) -> None:
        self.gather, self.dim = gather, dim
        self.switch, self.is_edge = switch, is_edge

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor | None) -> Any:
        if self.is_edge:
            self.switch.inside_edge = 0
        if output is None or self.switch.raw or self.switch.inside_edge:
            return output
        return self.gather.scale(output, self.dim)


class BranchMask:
    """Forward hook: scales what a residual branch adds, at the layer that gives it."""

    def __init__(self, mask: nn.Parameter, per_image: PerImage) -> None:
        self.mask = mask
        self.per_image = per_image

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (self.scale(output[0]), *output[1:])
        return self.scale(output)

    def scale(self, x: Tensor) -> Tensor:
        """`x` times the block's mask."""
        return multiplied(x, self.per_image.of(self.mask), None, self.per_image.images)
