"""The hooks that put masks onto a model. All are picklable, for `deepcopy` and for saving."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class ChannelGather:
    """The mask vector `[C]` of one tensor's channels, gathered from its groups' parameters.

    `index` points into `cat([1, m_1, m_2, ...])`; None says that it is the one parameter as it is.
    """

    def __init__(self, masks: Sequence[nn.Parameter], index: Tensor | None) -> None:
        self.masks = tuple(masks)
        self.index = index

    def scale(self, x: Tensor, dim: int) -> Tensor:
        """`x` times the mask along `dim`."""
        if self.index is None:
            vector: Tensor = self.masks[0]
        else:
            one = torch.ones(1, dtype=self.masks[0].dtype, device=self.masks[0].device)
            vector = torch.cat([one, *self.masks])[self.index]
        shape = [1] * x.dim()
        shape[dim] = -1
        return x * vector.to(x.dtype).view(shape)

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
