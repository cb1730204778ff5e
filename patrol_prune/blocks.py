"""Residual blocks of an edge that can be removed whole.

A block is removable when its output is `shortcut + branch(x)` and the shortcut is `x` itself:

    y = act(x + m * branch(x)),    m = 1 at first,    m = 0:  y = act(x)

Where a module computes nothing but that, it gives way to its shortcut, behind the activation unless
`x` is known not to be negative and the activation is a ReLU. Where the addition stands in a forward
that does other things too, the branch's modules give way, and the addition adds zeros.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from patrol_prune._cuts import CutGraph
from patrol_prune._residuals import (
    Residual,
    called_once,
    is_inside,
    outermost_modules,
    prefixes,
    residuals,
    rest_of_branch,
    scaled_argument,
)
from patrol_prune._trace import Call
from patrol_prune.cost import as_single_tensor, count_macs, device_of
from patrol_prune.given import check_model

if TYPE_CHECKING:
    from patrol_prune.split import Split

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "relu_": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU,
    "hardswish": nn.Hardswish, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh,
}  # fmt: skip
_ACTIVATION_LAYERS = (*set(_ACTIVATIONS.values()), nn.GELU, nn.ELU, nn.LeakyReLU, nn.Mish)
_KEEP_SIGN = (nn.Identity, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


@dataclass(frozen=True, eq=False)
class ResidualBlock:
    """One residual addition and the branch that could go.

    Attributes:
        name: the module that adds, if it adds once; else the branch's last module with weights,
            or the addition's own name where that is taken.
        location: "edge", "cloud", or "crossing" the split; None without a split.
        edge_macs: multiply-adds at batch 1 that its removal saves on the edge (without a split:
            in the model); 0 if it is not there.
        layers: the branch's layers, by name.
        scaled: the layer whose output a soft mask on the block multiplies, or None.
        unscaled: why there is none.
        within: blocks whose branch holds this one.
        blocked: why the block cannot be removed, or None.
        substitutes: module name -> what takes its place on removal.
    """

    name: str
    location: str | None
    edge_macs: int
    layers: tuple[str, ...] = ()
    scaled: str | None = None
    unscaled: str | None = None
    within: tuple[str, ...] = ()
    blocked: str | None = None
    substitutes: dict[str, nn.Module] = field(default_factory=dict, repr=False)


class Removed(nn.Module):
    """Stands where a module of a removed branch stood, and computes nothing.

    Args:
        zero: return zeros in the shape of the first input, not that input itself.
        pair: return `(value, None)`, as attention does.
    """

    def __init__(self, *, zero: bool, pair: bool = False) -> None:
        super().__init__()
        self.zero, self.pair = zero, pair

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        value = torch.zeros_like(x) if self.zero else x
        return (value, None) if self.pair else value

    def extra_repr(self) -> str:
        """The arguments, for printing the model."""
        return f"zero={self.zero}, pair={self.pair}"


def residual_blocks(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    *,
    split: Split | None = None,
) -> dict[str, ResidualBlock]:
    """Every residual block of a model by name, shallow to deep; those that must stay say why.

    Args:
        model: takes one tensor; left as found.
        example_inputs: a batch, or a tuple with one batch.
        split: where edge and cloud are.

    Raises:
        InputError: the model cannot run on `example_inputs`.
        UnsupportedModelError: the model cannot be traced.
    """
    check_model(model, "model")
    x = as_single_tensor(example_inputs)[:1].detach().to(device_of(model, example_inputs))
    graph = CutGraph(model, x)
    cut = None if split is None else graph.find(split.at)
    stop = None if cut is None else cut.position
    counted = count_macs(graph.piece(None, cut, "Edge"), x).by_module
    found = [r for r in residuals(graph) if any(map(graph.bears_weights, r.region))]
    names = _names(graph, found)
    regions = [set(r.region) for r in found]
    blocks = {}
    for residual, name in zip(found, names, strict=True):
        within = [n for n, region in zip(names, regions, strict=True) if residual.add in region]
        here = [n for n in residual.region if stop is None or graph.index[n] <= stop]
        macs = sum(_macs_of(graph, node, counted) for node in here)
        blocks[name] = _block(graph, residual, stop, name, macs, tuple(within))
    return blocks


def _macs_of(graph: CutGraph, node: fx.Node, counted: Mapping[str, int]) -> int:
    is_layer = node.op == "call_module"
    return counted.get(str(node.target), 0) if is_layer else graph.facts[node].macs


def _names(graph: CutGraph, found: list[Residual]) -> list[str]:
    adds = Counter(graph.owner[r.add] for r in found)
    taken: set[str] = set()
    names = []
    for residual in found:
        owner = graph.owner[residual.add]
        name = owner if adds[owner] == 1 else ""
        if not name or name in taken:
            heavy = [path for path, _ in outermost_modules(graph, residual).items()
                     if _has_weights(graph, residual, path)]
            name = heavy[-1] if heavy else ""
        if not name or name in taken:
            name = graph.names[residual.add][0]
        taken.add(name)
        names.append(name)
    return names


def _has_weights(graph: CutGraph, residual: Residual, path: str) -> bool:
    inside = (n for n in residual.region if is_inside(graph.owner[n], path))
    return any(map(graph.bears_weights, inside))


def _block(
    graph: CutGraph,
    residual: Residual,
    stop: int | None,
    name: str,
    macs: int,
    within: tuple[str, ...],
) -> ResidualBlock:
    nodes = [graph.index[n] for n in (*residual.region, residual.add)]
    location = None
    if stop is not None:
        location = "edge" if max(nodes) <= stop else "cloud" if min(nodes) > stop else "crossing"
    blocked = _reason_to_stay(graph, residual, location)
    substitutes: dict[str, nn.Module] = {}
    if blocked is None:
        whole = _whole_module(graph, residual, graph.end if stop is None or location == "cloud"
                              else stop)
        if whole is None:
            substitutes, blocked = _parts(graph, residual)
        else:
            substitutes = dict([whole])
    scaled, unscaled = _scaled_layer(graph, residual) if blocked is None else (None, blocked)
    layers = [str(n.target) for n in residual.region if n.op == "call_module"]
    return ResidualBlock(
        name, location, macs, tuple(dict.fromkeys(layers)), scaled, unscaled, within, blocked,
        substitutes,
    )  # fmt: skip


def _reason_to_stay(graph: CutGraph, residual: Residual, location: str | None) -> str | None:
    region = set(residual.region)
    if not residual.identity:
        return "its shortcut is a projection, not the block's input"
    if location == "crossing":
        return "it crosses the split"
    if graph.writes_into(residual.source, residual.region):
        return "its branch writes into the block's input in place"
    users = {u for n in residual.region for u in n.users} - region
    if users != {residual.add}:
        return "values of its branch are used elsewhere"
    once = called_once(graph)
    for node in residual.region:
        path = str(node.target)
        if node.op == "call_module" and path not in once and graph.parameters(
            graph.index[node] - 1, graph.index[node]
        ):
            return f"its layer {path!r} is called more than once"
    return None


def _whole_module(
    graph: CutGraph, residual: Residual, stop: int
) -> tuple[str, nn.Module] | None:
    """(name, what takes its place) of a module that computes the block and nothing else."""
    once = called_once(graph)
    for path in prefixes(graph.owner[residual.add]):
        call = once.get(path)
        if call is None or len(call.inputs) != 1:
            continue
        given = call.inputs[0]
        body = [n for n in graph.order if is_inside(graph.owner[n], path) and n not in graph.free]
        rest = set(body) - set(residual.region) - residual.passed - {residual.add}
        covered = len(body) - len(rest) == len(set(body) & residual.passed) + 1 + len(
            residual.region
        )
        last = call.value
        if given is not residual.source or not covered or not isinstance(last, fx.Node):
            continue
        if graph.index[last] > stop or _written_later(graph, residual.source, last, set(body)):
            continue
        if last is residual.add and not rest:
            return path, nn.Identity()
        activation = _activation(graph, last) if rest == {last} else None
        if activation is None or last.all_input_nodes != [residual.add]:
            continue
        if isinstance(activation, nn.ReLU) and _not_negative(graph, residual.source):
            return path, nn.Identity()
        return path, nn.Sequential(activation)
    return None


def _written_later(graph: CutGraph, source: fx.Node, last: fx.Node, body: set[fx.Node]) -> bool:
    """Whether what comes later writes into the output while the input is still needed."""
    needed = source is graph.order[0] or bool(set(source.users) - body)
    return needed and graph.writes_into(last, graph.order[graph.index[last] + 1 :])


def _activation(graph: CutGraph, node: fx.Node) -> nn.Module | None:
    """A new layer for an elementwise activation that writes into nothing."""
    if node.op == "call_module":
        module = graph.attribute(node)
        if not isinstance(module, _ACTIVATION_LAYERS):
            return None
        layer: Any = copy.deepcopy(module)
        if getattr(layer, "inplace", False):
            layer.inplace = False
        assert isinstance(layer, nn.Module)
        return layer
    is_method = node.op == "call_method"
    name = str(node.target) if is_method else str(getattr(node.target, "__name__", ""))
    plain = len(node.args) <= 1 and set(node.kwargs) <= {"inplace", "input"}
    return _ACTIVATIONS[name]() if name in _ACTIVATIONS and plain else None


def _not_negative(graph: CutGraph, node: fx.Node) -> bool:
    """Whether the value is known to have no negative entry: a ReLU, and poolings behind it."""
    if node.op == "call_module":
        module = graph.attribute(node)
        if isinstance(module, _KEEP_SIGN) and node.all_input_nodes:
            return _not_negative(graph, node.all_input_nodes[0])
    return isinstance(_activation(graph, node), (nn.ReLU, nn.ReLU6, nn.Sigmoid))


def _parts(graph: CutGraph, residual: Residual) -> tuple[dict[str, nn.Module], str | None]:
    """What takes the place of the branch's modules; or why that cannot be."""
    gone = outermost_modules(graph, residual)
    made = {_value_node(call): path for path, call in gone.items()}
    node: fx.Node | None = residual.value
    while node is not None and node not in made:
        node = scaled_argument(graph, node)
    owner = graph.owner[residual.value] or "the model"
    if node is None:
        return {}, f"its branch ends in an operator of {owner}'s own forward"
    left = [n for n in residual.region
            if not any(is_inside(graph.owner[n], path) for path in gone)]
    if any(graph.facts[n].macs for n in left):
        return {}, f"matrix products of its branch are operators of {owner}'s own forward"
    try:
        remains = rest_of_branch(graph, residual, gone.values())
    except Exception as error:  # an operator that takes no tensor of the source's shape
        return {}, f"its branch has an operator that cannot pass its input on: {error}"
    expected = graph.facts[residual.source].tensor
    assert expected is not None
    if remains.shape != expected.shape:
        return {}, "its branch changes the shape outside its modules"
    return {
        path: Removed(zero=path == made[node], pair=_is_pair(graph, call))
        for path, call in gone.items()
    }, None


def _value_node(call: Call) -> Any:
    return call.value[0] if isinstance(call.value, (tuple, list)) else call.value


def _is_pair(graph: CutGraph, call: Call) -> bool:
    value = call.value
    return not isinstance(value, fx.Node) or graph.facts[value].tensor is None


def _scaled_layer(graph: CutGraph, residual: Residual) -> tuple[str | None, str | None]:
    """(the layer whose output the mask scales, None), or (None, why there is none)."""
    once = called_once(graph)
    node: fx.Node | None = residual.value
    last = None  # one without weights, as dropout, passes the mask on to the layer before it
    while node is not None and node in residual.region:
        if node.op == "call_module" and str(node.target) in once:
            if next(graph.attribute(node).parameters(), None) is not None:
                return str(node.target), None
            last = last or str(node.target)
        node = scaled_argument(graph, node)
    if last is not None:
        return last, None
    return None, "its branch's value is computed by an operator inside a forward, not by a layer"
