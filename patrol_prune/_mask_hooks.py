"""The hooks that put masks onto a model. All are picklable, for `deepcopy` and for saving."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patrol_prune.channel_norms import ChannelNorm, Normalises, over_live_channels
from patrol_prune.live_attention import attention_over_live_channels


class ChannelGather:
    """The mask vector `[C]` of one tensor's channels, gathered from its groups' parameters.

    `index` points into `cat([1, m_1, m_2, ...])`; None says that it is the one parameter as it is.
    """

    def __init__(self, masks: Sequence[nn.Parameter], index: Tensor | None) -> None:
        self.masks = tuple(masks)
        self.index = index

    def vector(self) -> Tensor:
        """The mask `[C]` itself."""
        if self.index is None:
            return self.masks[0]
        one = torch.ones(1, dtype=self.masks[0].dtype, device=self.masks[0].device)
        return torch.cat([one, *self.masks])[self.index]

    def scale(self, x: Tensor, dim: int) -> Tensor:
        """`x` times the mask along `dim`."""
        shape = [1] * x.dim()
        shape[dim] = -1
        return x * self.vector().to(x.dtype).view(shape)

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


class NormMask:
    """Forward hook: a layer that normalises over channels counts the live ones only.

    At a mask of ones the layer's own output stays, bit for bit, with the formula's gradients.
    """

    def __init__(self, gather: ChannelGather, norm: ChannelNorm) -> None:
        self.gather, self.norm = gather, norm

    def __call__(
        self, module: Normalises, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        mask = self.gather.vector()
        ones = bool((mask == 1).all())
        if ones and not (torch.is_grad_enabled() and mask.requires_grad):
            return output
        x = args[0] if args else kwargs["input"]
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
        mask = self.gather.vector()
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

    def __init__(self, mask: nn.Parameter) -> None:
        self.mask = mask

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] * self.mask.to(output[0].dtype), *output[1:])
        return output * self.mask.to(output.dtype)
