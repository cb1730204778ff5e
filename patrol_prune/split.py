"""Where a model can be cut in two, and the two halves.

The edge computes the feature `z = edge(x)`, the cloud finishes, `cloud(z)`. A place to cut is one
that a single floating-point tensor crosses; everything that the cloud needs is then in `z`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from patrol_prune._cuts import Cut, CutGraph, Parts, childless, parts_of
from patrol_prune._halves import Composed, Follow, OnCopy
from patrol_prune._trace import Likeness, likeness, run_on
from patrol_prune.cost import (
    as_single_tensor,
    count_macs,
    counted_positions,
    device_of,
    draws_restored,
    evaluating,
    feature_bytes,
)
from patrol_prune.errors import InputError
from patrol_prune.given import check_readable


@dataclass(frozen=True)
class SplitPoint:
    """One place where a model can be cut.

    Args:
        name: the outermost module (or operator) whose output is uploaded, e.g. `layer2`.
        feature_shape: shape of the uploaded feature without the batch dimension.
        edge_macs: multiply-adds of the edge at batch 1, as `count_macs` counts.
        edge_params: number of parameters of the edge.
        feature_bytes: size of one uploaded feature in bytes, as float32.
        aliases: other names of the same place, e.g. `layer2.1`, `layer2.1.relu_1`.
    """

    name: str
    feature_shape: tuple[int, ...]
    edge_macs: int
    edge_params: int
    feature_bytes: int
    aliases: tuple[str, ...] = ()


def split_points(model: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> list[SplitPoint]:
    """Every place where exactly one tensor crosses, from shallow to deep.

    The model's input and its output are no such places. Costs are those of the first sample of
    `example_inputs`.

    Args:
        model: takes one tensor `[N, ...]`; left as found.
        example_inputs: a batch, or a tuple with one batch.

    Raises:
        InputError: the model cannot run on `example_inputs`.
        UnsupportedModelError: the model cannot be traced.
    """
    graph = CutGraph(model, _sample(model, example_inputs))
    return [
        SplitPoint(
            name=cut.names[0],
            feature_shape=cut.feature_shape,
            edge_macs=macs,
            edge_params=sum(p.numel() for p in graph.parameters(0, cut.position).values()),
            feature_bytes=feature_bytes(cut.feature_shape),
            aliases=cut.names[1:],
        )
        for cut, macs in zip(graph.cuts, _edge_macs(graph, example_inputs), strict=True)
    ]


def split_at_each(
    model: nn.Module, example_inputs: Tensor | Sequence[Tensor], places: Sequence[str]
) -> Iterator[Split]:
    """A `Split` at each of the places, one after the other; the model is traced once for all.

    Raises:
        InputError, UnsupportedModelError: as `Split`.
    """
    graph = CutGraph(model, _sample(model, example_inputs))
    for at in places:
        split = Split.__new__(Split)
        split._start(model, example_inputs, at)
        split._take(graph)
        yield split


class Split:
    """A model cut in two halves that share its parameters.

    `cloud(edge(x))` equals `model(x)` bit for bit. Neither half writes into the tensor it is
    given. Non-leaf modules' own forward hooks do not run in the halves; those of layers do.
    Control flow and functional dropout are those of evaluation mode; dropout modules follow
    `train()` and `eval()`.

    Args:
        model: takes one tensor; copied nowhere.
        example_inputs: a batch `[N, ...]`, or a tuple with one batch.
        at: a name or alias from `split_points`, e.g. `"layer2"`.

    Attributes:
        model: the whole model.
        at: the canonical name of the split point.
        edge: the half up to and including `at`, an `fx.GraphModule`.
        cloud: the other half.
        blocks: the edge as a chain `f_1 ... f_N`; a block ends where a single tensor crosses and
            a layer with weights follows.
        feature_shape: shape of `edge(x)` without the batch dimension.
        edge_layers: the layers that the edge uses, by their name in the model.
        cloud_layers: likewise for the cloud.

    Raises:
        InputError: `at` does not exist, more than one tensor crosses there, or the model cannot
            run on `example_inputs`.
        UnsupportedModelError: the model cannot be traced.
    """

    model: nn.Module
    at: str
    edge: nn.Module
    cloud: nn.Module
    blocks: tuple[nn.Module, ...]
    feature_shape: tuple[int, ...]
    edge_layers: dict[str, nn.Module]
    cloud_layers: dict[str, nn.Module]
    pruning_history: Sequence[Any] = ()
    """How `PatrolPruner` pruned the model since it was built, as Torch-Pruning's
    `DG.pruning_history()` tells it; `save` keeps it, and `load` puts it back."""
    positions: dict[str, int] | None = None
    """Edge layer -> kernel elements times output positions at batch 1, its multiply-adds for each
    pair of channels; None where other things than such layers multiply."""
    removed_blocks: Sequence[tuple[str, int]] = ()
    """The residual blocks that were removed, each with the length of `pruning_history` then."""
    undefended: Split | None = None
    """The split before a `Defence` put something behind its edge; it shares the layers."""
    defence: object | None = None
    """The `Defence` that did."""
    behind: Mapping[str, nn.Module] = MappingProxyType({})
    """What it put there: "upload" behind the edge, and "receive" before the cloud if need be."""

    def __init__(
        self, model: nn.Module, example_inputs: Tensor | Sequence[Tensor], at: str
    ) -> None:
        self._start(model, example_inputs, at)
        self.refresh()

    @classmethod
    def from_modules(
        cls, edge: nn.Module, cloud: nn.Module, example_inputs: Tensor | Sequence[Tensor]
    ) -> Split:
        """A split whose two halves are given, for models that cannot be traced.

        `model` is then a module with the attributes `edge` and `cloud`, and `at` is "edge";
        `blocks` has more than one entry only if the edge can be traced, but for a defence behind
        it.

        Args:
            edge: model input `[N, ...]` to the feature `[N, ...]`.
            cloud: the feature to the model's answers.
            example_inputs: a batch `[N, ...]`, or a tuple with one batch.

        Raises:
            InputError: the halves do not fit each other or `example_inputs`, or the edge returns
                anything but one floating-point tensor `[N, ...]`.
        """
        split = cls.__new__(cls)
        split._start(Composed(edge, cloud), example_inputs, "edge")
        split.refresh()
        return split

    def _start(self, model: nn.Module, inputs: Tensor | Sequence[Tensor], at: str) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"Expected an nn.Module to split, came {type(model).__name__}.")
        check_readable(model)
        if not isinstance(at, str):
            raise InputError(f"Expected at= as the name of a split point, came {at!r}.")
        self.model, self.at, self.blocks = model, at, ()
        self._inputs, self._type = as_single_tensor(inputs), _first_type(model)
        self._handles: list[RemovableHandle] = []
        self._likeness: Likeness | None = None

    @property
    def example_inputs(self) -> Tensor:
        """The example batch on the model's device, in its type where the model was cast since."""
        x = self._inputs.to(device_of(self.model, self._inputs))
        now = _first_type(self.model)
        if now in (None, self._type) or not x.is_floating_point():
            return x
        if self._takes(x):
            self._type = now
            return x
        return x.to(now)

    def _takes(self, x: Tensor) -> bool:
        """Whether a model of several types runs on `x`; one of a single type is not asked."""
        if len(_types(self.model)) == 1:
            return False
        with evaluating(self.model), draws_restored(self.model), torch.no_grad():
            try:
                run_on(self.model, x[:1])
            except InputError:
                return False
        return True

    def protected_layers(self) -> list[nn.Module]:
        """The cloud's layers, to pass as Torch-Pruning's `ignored_layers`."""
        return list(self.cloud_layers.values())

    def refresh(self) -> None:
        """Read the model again, after pruning or after a layer was replaced.

        `edge` and `cloud` stay the same objects (so do `blocks`, if their number is the same).
        Where only widths have changed, the halves are the same too, and the model runs once.

        Raises:
            InputError: the place `at` is gone, or the model does not run any more.
            UnsupportedModelError: the model cannot be traced any more.
        """
        if self._likeness is not None and self._has_other_widths_only():
            return
        self._likeness = None
        if isinstance(self.model, Composed):
            self._refresh_composed(self.model)
            return
        self._take(CutGraph(self.model, _sample(self.model, self.example_inputs)))

    def _take(self, graph: CutGraph) -> None:
        cut = graph.find(self.at)
        for handle in self._handles:
            handle.remove()
        self._handles, self.positions = [], graph.positions(cut.position)
        self.at, self.feature_shape = cut.names[0], cut.feature_shape
        self.edge_layers = graph.layers(0, cut.position)
        self.cloud_layers = graph.layers(cut.position, graph.end)
        self.edge = self._adopt(getattr(self, "edge", None), graph, None, cut, "Edge")
        self.cloud = self._adopt(getattr(self, "cloud", None), graph, cut, None, "Cloud")
        self.blocks = self._chain([(self.edge, graph)], cut)
        self._likeness = graph.likeness

    def _has_other_widths_only(self) -> bool:
        """Whether the trace is the one that was checked; then the sizes are read again."""
        if likeness(self.model) != self._likeness:
            return False
        x = _sample(self.model, self.example_inputs)
        plain = {name: self.edge_layers[name] for name in self.positions or ()}
        with evaluating(self.model), draws_restored(self.model), torch.no_grad():
            try:
                with counted_positions(plain) as positions:
                    z = run_on(self.edge, x)
                _check_feature(z, x)
                run_on(self.cloud, z)
            except InputError:  # tracing anew says what is wrong
                return False
        self.feature_shape = tuple(z.shape[1:])
        self.positions = None if self.positions is None else positions
        for half in (self.edge, self.cloud, *self.blocks):
            half.training = self.model.training
        return True

    def _refresh_composed(self, model: Composed) -> None:
        x = _sample(model, self.example_inputs)
        with evaluating(model), draws_restored(model), torch.no_grad():
            z = run_on(model.edge, x.clone())
            _check_feature(z, x)
            before = z._version
            run_on(model.cloud, z)
        self.feature_shape = tuple(z.shape[1:])
        self.edge = model.edge
        if z._version == before:
            self.cloud = model.cloud
        elif not isinstance(getattr(self, "cloud", None), OnCopy):
            self.cloud = OnCopy(model.cloud)
        self.edge_layers = childless("edge", model.edge)
        self.cloud_layers = childless("cloud", model.cloud)
        self.blocks = self._chain(parts_of(model.edge, x), None)

    def _chain(self, parts: Parts, stop: Cut | None) -> tuple[nn.Module, ...]:
        """The blocks of an edge's parts; one that has no graph, or no end inside, is a block."""
        pieces: list[tuple[nn.Module, CutGraph | None, Cut | None, Cut | None]] = []
        for part, graph in parts:
            end = None if graph is None else graph.end if stop is None else stop.position
            ends = [] if graph is None or end is None else graph.chain(end)
            bounds: list[Cut | None] = [None, *ends, stop]
            pieces += [(part, graph if ends else None, a, b) for a, b in pairwise(bounds)]
        old = self.blocks if len(self.blocks) == len(pieces) else (None,) * len(pieces)
        return tuple(part if graph is None else self._adopt(block, graph, a, b, "Block")
                     for block, (part, graph, a, b) in zip(old, pieces, strict=True))

    def _adopt(
        self, old: nn.Module | None, graph: CutGraph, start: Cut | None, stop: Cut | None, name: str
    ) -> nn.Module:
        """The piece from `start` to `stop`, put into the module object `old` if there is one."""
        piece = graph.piece(start, stop, name)
        if isinstance(old, fx.GraphModule):
            for table in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
                old.__dict__[table] = piece.__dict__[table]
            old.graph = piece.graph
            piece = old
        follow = Follow(graph.model, piece.graph, graph.constants)
        if follow.seen or follow.constants:
            self._handles.append(piece.register_forward_pre_hook(follow))
        return piece

    def __repr__(self) -> str:
        """Where it is cut, and what crosses."""
        shape = "x".join(map(str, self.feature_shape))
        return f"Split({type(self.model).__name__}, at={self.at!r}, feature {shape})"

    def __reduce__(self) -> tuple[Any, ...]:
        if isinstance(self.model, Composed):
            made: tuple[Any, ...] = Split.from_modules, (
                self.model.edge, self.model.cloud, self.example_inputs
            )
        else:
            made = Split, (self.model, self.example_inputs, self.at)
        known: dict[str, Any] = {"pruning_history": list(self.pruning_history),
                                 "removed_blocks": list(self.removed_blocks)}
        if self.undefended is not None:
            known |= {"undefended": self.undefended, "defence": self.defence,
                      "behind": dict(self.behind)}
        return *made, known


def _sample(model: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> Tensor:
    """One sample `[1, ...]` on the model's device."""
    if not isinstance(model, nn.Module):
        raise InputError(f"Expected an nn.Module to split, came {type(model).__name__}.")
    check_readable(model)
    x = as_single_tensor(example_inputs)
    return x[:1].detach().to(device_of(model, x))


def _first_type(model: nn.Module) -> torch.dtype | None:
    """The type of the model's first real numbers, parameters before buffers."""
    return next(iter(_types(model)), None)


def _types(model: nn.Module) -> dict[torch.dtype, None]:
    """Of its real numbers, each once."""
    values = chain(model.parameters(), model.buffers())
    return dict.fromkeys(v.dtype for v in values if v.is_floating_point())


def _check_feature(z: Any, x: Tensor) -> None:
    if isinstance(z, Tensor) and z.is_floating_point() and z.dim() > 1 and len(z) == len(x):
        return
    came = f"{z.dtype} {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
    raise InputError(
        "Expected an edge that returns one floating-point tensor [N, ...], came "
        f"{came} for an input of shape {tuple(x.shape)}. Cut where a single tensor crosses."
    )


def _edge_macs(graph: CutGraph, example_inputs: Tensor | Sequence[Tensor]) -> list[int]:
    """MACs up to each cut.

    A running sum over the nodes, if it agrees with `count_macs` for the whole model; else one over
    the stretches between two cuts; where that does not agree either, every edge by itself.
    """
    whole = count_macs(graph.model, example_inputs).total
    totals = list(accumulate(graph.facts[node].macs for node in graph.order))
    if totals[-1] == whole:
        return [totals[cut.position] for cut in graph.cuts]
    sums = list(accumulate(_stretches(graph, example_inputs)))
    if sums[-1] == whole:
        return sums[:-1]
    pieces = (graph.piece(None, cut, "Edge") for cut in graph.cuts)
    return [count_macs(piece, example_inputs).total for piece in pieces]


def _stretches(graph: CutGraph, example_inputs: Tensor | Sequence[Tensor]) -> list[int]:
    """MACs from the input to the first cut, from each cut to the next, and to the output."""
    x = _sample(graph.model, example_inputs)
    found = []
    for start, stop in pairwise((None, *graph.cuts, None)):
        piece = graph.piece(start, stop, "Stretch")
        found.append(count_macs(piece, x).total)
        if stop is not None:
            x = run_on(piece, x)
    return found
