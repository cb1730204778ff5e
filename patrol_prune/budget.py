"""Edge MACs in closed form, as a function of the kept channels.

Every convolution and linear layer of the edge costs

    macs = c_out * (c_in / groups) * kernel * positions,

and `c_in`, `c_out` are linear in the numbers of kept channels of the coupled groups
(concatenations add, flattening multiplies, depthwise convolutions follow). So the cost of any
choice is one small matrix product, and no copy of the model is ever pruned to find out.
`nn.MultiheadAttention` over L positions of width E costs `4 L E^2 + 2 L^2 E`: its projections, and
the two products of L by L by E; attention whose heads can go has its projections as layers, and
`2 L^2` for each of their channels. What is no such layer (products in a forward) enters as a
constant. A residual block that may go is one
more variable, 1 or 0, and a factor of all its layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from patrol_prune.attention_heads import HeadProduct
from patrol_prune.blocks import ResidualBlock
from patrol_prune.cost import count_macs
from patrol_prune.errors import InputError
from patrol_prune.group_table import GroupTable
from patrol_prune.groups import CONV

if TYPE_CHECKING:
    from patrol_prune.split import Split

Ints = NDArray[np.int64]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_THOUSANDS = re.compile(r"^[1-9][0-9]{0,2}(?:,[0-9]{3})+(?=$|\s*MACs$)")


class MacModel:
    """The edge's multiply-adds at batch 1, as a function of the kept channels.

    Args:
        split: the cut model.
        table: its group table, at the present widths.
        previous: a model of the same edge before it was pruned; where the split does not know its
            layers' positions, these are reused and nothing is counted again.
        blocks: residual blocks of the edge that may be removed; each is a cost variable.

    Attributes:
        dense: edge MACs with every channel kept; fvcore counts as many.
        constant: the part that is none of these layers.
        opaque: attention layers of the edge whose cost is another (cross-attention, say); they
            are in the constant.
    """

    def __init__(
        self,
        split: Split,
        table: GroupTable,
        *,
        previous: MacModel | None = None,
        blocks: Mapping[str, ResidualBlock] | None = None,
    ) -> None:
        self.table, self.blocks = table, dict(blocks or {})
        if split.positions is not None:
            self.positions = {n: at for n, at in split.positions.items() if at}
            self.constant, self.opaque = 0, frozenset[str]()
        elif previous is None:
            count = count_macs(split.edge, split.example_inputs)
            names = {id(m): n for n, m in split.edge.named_modules()}
            counted = {
                name: (m, count.by_module.get(names.get(id(m), "?"), 0))
                for name, m in split.edge_layers.items()
                if isinstance(m, (CONV, nn.Linear, nn.MultiheadAttention, HeadProduct))
            }
            self.positions = {
                name: _positions(name, m, macs) for name, (m, macs) in counted.items() if macs
            }
            self.opaque = frozenset(n for n, at in self.positions.items() if at == 0)
            known = {n: macs for n, (_, macs) in counted.items() if self.positions.get(n)}
            self.positions = {n: self.positions[n] for n in known}
            self.constant = count.total - sum(known.values())
        else:
            self.positions, self.constant = previous.positions, previous.constant
            self.opaque = previous.opaque
        self._segment_of, sizes = _segments(table)
        self._variable = {name: len(sizes) + i for i, name in enumerate(self.blocks)}
        self._sizes = np.concatenate([sizes, np.ones(len(self.blocks), np.int64)])
        self._build_matrices(split)
        self._build_gates()
        self.dense = int(self.macs_of_sizes(self._sizes))

    def has_other_positions(self, split: Split) -> bool:
        """Whether layers of the edge run at more or fewer positions than when it was counted."""
        now = split.positions or {}
        return any(now.get(name, at) != at for name, at in self.positions.items())

    def macs(
        self, kept: Mapping[str, int | Tensor], *, without: Iterable[str] = ()
    ) -> int:
        """Edge MACs when a group keeps so many channels, or these channels.

        Args:
            kept: group name -> number of kept channels, or their indices; a group that is not
                named keeps all. A number is enough unless layers hold only a part of the group's
                channels (a concatenation behind a shared residual stream): then give indices.
            without: blocks that are gone.

        Raises:
            InputError: an unknown group, or a number where indices are needed.
        """
        sizes = self.sizes_of(kept)
        sizes[[self.variable(block) for block in without]] = 0
        return int(self.macs_of_sizes(sizes))

    def sizes_of(self, kept: Mapping[str, int | Tensor]) -> Ints:
        """`[S]` the values of the cost variables for a choice of channels, see `macs`."""
        sizes = self._sizes.copy()
        for name, value in kept.items():
            if name not in self._segment_of:
                raise InputError(f"Expected one of the model's channel groups, came {name!r}.")
            segments = self._segment_of[name]
            first = segments[0]
            if isinstance(value, Tensor):
                counts = np.bincount(segments[value.numpy()], minlength=len(sizes))
                touched = np.unique(segments)
                sizes[touched] = counts[touched]
            elif (segments == first).all():
                sizes[first] = int(value)
            else:
                raise InputError(
                    f"Layers hold different parts of group {name!r}: give the indices of the "
                    "kept channels, not their number."
                )
        return sizes

    def widths_of_sizes(self, sizes: Ints) -> tuple[Ints, Ints]:
        """`[L]` output channels, and `[L]` input channels that each of them reads, by layer."""
        outs = sizes @ self._out.T + self._out_free
        ins = (sizes @ self._in.T + self._in_free) // self._groups
        count = len(self.positions)  # the rows after them are attention's products, without weights
        return outs[:count], ins[:count]

    def held(self, owner: str, idxs: Tensor) -> Ints:
        """`[S]` how many of these channels of a group one unit of each cost variable stands for."""
        segments = self._segment_of[owner][idxs.numpy()]
        held = np.bincount(segments, minlength=len(self._sizes))  # no block variable is a segment
        return held // np.maximum(self._sizes, 1)

    def segments(self, name: str) -> Ints:
        """`[C]` the cost variable each channel of a group counts in."""
        return self._segment_of[name]

    def variable(self, block: str) -> int:
        """The cost variable of a block: 1 while it is there, 0 without it."""
        return self._variable[block]

    @property
    def sizes(self) -> Ints:
        """`[S]` the value of every cost variable with all channels kept."""
        return self._sizes

    def macs_of_sizes(self, sizes: Ints) -> Any:
        """Edge MACs at values `[S]` of the cost variables; `[N]` of them for `[N, S]` values."""
        outs = sizes @ self._out.T + self._out_free
        ins = sizes @ self._in.T + self._in_free
        macs = outs * ins // self._groups * self._factor
        if not self.blocks:
            return macs.sum(-1) + self.constant
        here = sizes @ self._gates.T == self._gates.sum(1)
        fixed = self._fixed * (sizes @ self._fixed_gates.T == self._fixed_gates.sum(1))
        return (macs * here).sum(-1) + fixed.sum(-1) + self.constant - self._fixed.sum()

    def _build_matrices(self, split: Split) -> None:
        """A row of cost per layer: `outs * ins / groups * factor`; two for attention."""
        layers = [(n, split.edge_layers[n]) for n in self.positions]
        both = [(n, m) for n, m in layers if isinstance(m, nn.MultiheadAttention)]
        self._rows = [name for name, _ in (*layers, *both)]
        shape = (len(self._rows), len(self._sizes))
        self._out, self._in = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        self._groups, self._factor = (np.ones(len(self._rows), np.int64) for _ in range(2))
        dense_out, dense_in = (np.zeros(len(self._rows), np.int64) for _ in range(2))
        for row, (name, module) in enumerate((*layers, *both)):
            self._factor[row] = self.positions[name]
            c_out, c_in, groups = _widths(module)
            attends, products = isinstance(module, nn.MultiheadAttention), row >= len(layers)
            if attends:
                self._factor[row] *= 2 * self.positions[name] if products else 4
            heads = isinstance(module, HeadProduct)
            # One input channel each.
            alone = products or heads or (groups == c_out == c_in and groups > 1)
            self._groups[row] = 1 if alone else groups
            dense_out[row], dense_in[row] = c_out, 1 if alone else c_in
            holder, way = (module.head_of, "parameter") if heads else (module, "out")
            for owner, member in self.table.members_of(holder, way):
                self._out[row] += self.held(owner, member.root_idxs)
            if not alone:
                for owner, member in self.table.members_of(module, "in"):
                    self._in[row] += self.held(owner, member.root_idxs)
        self._out_free = dense_out - self._out @ self._sizes
        self._in_free = dense_in - self._in @ self._sizes

    def _build_gates(self) -> None:
        """Which blocks a layer needs to be there, and the blocks' parts that are no such layer."""
        self._gates = np.zeros((len(self._rows), len(self._sizes)), np.int64)
        self._fixed = np.zeros(len(self.blocks), np.int64)
        self._fixed_gates = np.zeros((len(self.blocks), len(self._sizes)), np.int64)
        outs = self._out @ self._sizes + self._out_free
        ins = self._in @ self._sizes + self._in_free
        of_row = outs * ins // self._groups * self._factor
        own = {}
        for name, block in self.blocks.items():
            rows = [i for i, layer in enumerate(self._rows) if layer in block.layers]
            self._gates[rows, self.variable(name)] = 1
            own[name] = block.edge_macs - int(of_row[rows].sum())
        for i, (name, block) in enumerate(self.blocks.items()):
            inner = [n for n, b in self.blocks.items() if name in b.within]
            nearest = [n for n in inner if not set(inner) & set(self.blocks[n].within)]
            self._fixed[i] = own[name] - sum(own[n] for n in nearest)
            needs = [self.variable(n) for n in (name, *block.within) if n in self.blocks]
            self._fixed_gates[i, needs] = 1


def check_budget(edge_macs: float | str) -> float:
    """The budget as a number; refuse what is neither a fraction in (0, 1] nor a count of MACs."""
    value = spelled(edge_macs) if isinstance(edge_macs, str) else edge_macs
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not 0 < number < math.inf or (number > 1 and number % 1):
        raise InputError(
            "Expected edge_macs as a fraction of the dense edge in (0, 1], or as a whole number of "
            f"MACs (9_900_000 or \"9.9M\", with a decimal point), came {edge_macs!r}."
        )
    return number


def spelled(text: str) -> int | float | None:
    """What "9,900,000", "9.9M" or "0.5" says: a count, or a float up to 1; None for other text."""
    plain = _THOUSANDS.sub(lambda found: found.group().replace(",", ""), text.strip())
    plain = plain.replace("_", "")
    match = re.fullmatch(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([kKMGT]?)(?:MACs)?", plain)
    if match is None or match.group(1).count(".") > 1 or match.group(1) == ".":
        return None
    number = float(match.group(1)) * _UNITS[match.group(2).upper()]
    fraction = match.group(2) == "" and not plain.isdigit() and number <= 1.0
    return number if fraction or math.isinf(number) else round(number)


def budget_as_count(edge_macs: float, dense: int) -> int:
    """A fraction of the dense edge, or a count, as a count of at most `dense`."""
    count = math.floor(edge_macs * dense) if edge_macs <= 1 else int(edge_macs)
    if count > dense:
        raise InputError(
            f"Expected a budget of at most the dense edge's {dense} MACs, came {count}: nothing "
            "needs to be pruned. Give a fraction in (0, 1], a smaller count, or choose a deeper "
            "split."
        )
    return count


def _widths(module: nn.Module) -> tuple[int, int, int]:
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features, 1
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim, module.embed_dim, 1
    if isinstance(module, HeadProduct):
        return module.head_of.numel(), 1, 1
    assert isinstance(module, CONV)
    return module.out_channels, module.in_channels, module.groups


def _positions(name: str, module: nn.Module, macs: int) -> int:
    """kernel * output positions, from the layer's counted MACs; 0 for attention that is opaque."""
    if isinstance(module, nn.MultiheadAttention):
        width = module.embed_dim
        length = round(math.sqrt(width * width + macs / (2 * width)) - width)
        return length if macs == 4 * length * width**2 + 2 * length**2 * width else 0
    c_out, c_in, groups = _widths(module)
    per_position = c_out * c_in // groups
    if macs % per_position:
        raise InputError(
            f"The counted MACs of {name!r}, {macs}, are no multiple of its {per_position} channel "
            "pairs: something besides the layer runs under its name."
        )
    return macs // per_position


def _segments(table: GroupTable) -> tuple[dict[str, Ints], Ints]:
    """Split every group's channels by the layers that hold them: one cost variable each."""
    segment_of: dict[str, Ints] = {}
    sizes: list[int] = []
    for group in table.groups.values():
        held = [m.root_idxs.numpy() for m in group.members if m.direction != "parameter"]
        counts = np.stack([np.bincount(r, minlength=group.channels) for r in held], axis=1)
        if (counts == counts[0]).all():
            inverse = np.zeros(group.channels, np.int64)
        else:
            inverse = np.unique(counts, axis=0, return_inverse=True)[1].reshape(-1)
        segment_of[group.name] = (inverse + len(sizes)).astype(np.int64)
        sizes.extend(np.bincount(inverse).tolist())
    return segment_of, np.array(sizes, np.int64)
