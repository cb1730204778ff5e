"""Edge parameters and uploaded bytes in closed form, as a function of the kept channels.

A convolution or linear layer holds `c_out * (c_in / groups) * kernel` weights and `c_out` biases;
normalisations, and parameters that stand alone, hold a fixed number per channel. The feature holds
a fixed number of values per channel that reaches it. With `MacModel`'s variables all of it is a
matrix product, and no copy is pruned to find out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from patrol_prune.budget import Ints, MacModel
from patrol_prune.cost import count_params
from patrol_prune.groups import CONV
from patrol_prune.transmitted import channel_axis, transmitted_channels

if TYPE_CHECKING:
    from patrol_prune.split import Split


class EdgeSizes:
    """What the edge holds and uploads, as a function of the kept channels.

    Args:
        split: the cut model.
        costs: its multiply-adds, without blocks.
        narrows: whether groups that cross the split may shrink; else the upload is constant.
    """

    def __init__(self, split: Split, costs: MacModel, *, narrows: bool) -> None:
        self._costs = costs
        layers: list[Any] = [split.edge_layers[name] for name in costs.positions]
        outs, ins = costs.widths_of_sizes(costs.sizes)
        weights, biases = np.array([_weights(m) for m in layers], np.int64).reshape(-1, 2).T
        self._kernel, self._bias = weights // (outs * ins), biases // outs
        self._per_channel = self._elsewhere(split, {id(m) for m in layers})
        self._free = 0
        self._free = count_params(split.edge) - self._params(costs.sizes)
        self._values = np.zeros(len(costs.sizes), np.int64)
        if narrows:
            self._values = self._transmitted(split)
        total = math.prod(split.feature_shape)
        self._values_free = total - int(self._values @ costs.sizes)

    def params(self, kept: Mapping[str, int | Tensor]) -> int:
        """Parameters of the edge for a choice of channels, as `MacModel.macs` takes it."""
        return self._params(self._costs.sizes_of(kept))

    def feature_bytes(
        self, kept: Mapping[str, int | Tensor], dtype: torch.dtype = torch.float32
    ) -> int:
        """Bytes of one uploaded feature for a choice of channels."""
        values = int(self._values @ self._costs.sizes_of(kept)) + self._values_free
        return values * dtype.itemsize

    def _params(self, sizes: Ints) -> int:
        outs, ins = self._costs.widths_of_sizes(sizes)
        weights = (outs * (ins * self._kernel + self._bias)).sum()
        return int(weights + self._per_channel @ sizes) + self._free

    def _elsewhere(self, split: Split, counted: set[int]) -> Ints:
        """`[S]` parameters per unit of each variable, outside of the layers `counted`."""
        here = {id(m) for m in split.edge_layers.values()} | {
            id(p) for p in split.edge.parameters()
        }
        found = np.zeros(len(self._costs.sizes), np.int64)
        for name, group in self._costs.table.groups.items():
            for member in group.members:
                module = member.module
                follows = member.direction in ("out", "through", "parameter")
                if not follows or id(module) in counted or id(module) not in here:
                    continue
                own = _per_channel(module, member.width)
                found += own * self._costs.held(name, member.root_idxs)
        return found

    def _transmitted(self, split: Split) -> Ints:
        """`[S]` values in the feature per unit of each variable."""
        shape, table = tuple(split.feature_shape), self._costs.table
        pruned = [n for n, g in table.groups.items() if g.blocked is None]
        found = np.zeros(len(self._costs.sizes), np.int64)
        parts = transmitted_channels(split, table, pruned)
        each = math.prod(shape) // shape[channel_axis(split, parts)] if parts else 0
        for group, _, roots in parts:
            found += each * self._costs.held(group.name, roots)
        return found


def _weights(layer: Any) -> tuple[int, int]:
    """Numbers in a layer's weights, and in its biases; attention's four projections together."""
    own = [(name, p.numel()) for name, p in layer.named_parameters()]
    weights = sum(count for name, count in own if "bias" not in name)
    return weights, sum(count for _, count in own) - weights


def _per_channel(module: Any, width: int) -> int:
    """Parameters that go with one of a layer's channels; 0 if they are shared by all."""
    if isinstance(module, nn.Parameter):
        return module.numel() // width
    if not isinstance(module, nn.Module) or isinstance(module, nn.MultiheadAttention):
        return 0
    own = [p.numel() for p in module.parameters(recurse=False)]
    assert not isinstance(module, CONV) or all(n % width == 0 for n in own)
    return sum(n // width for n in own if n % width == 0)
