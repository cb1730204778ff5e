"""Residual additions in a traced model, `shortcut + branch(source)`, and what the branch does.

The *region* of a branch is every operator that its value needs and that the shortcut does not. The
branch is residual when its region reads one value alone, the source, and the shortcut is that
source: as it is, behind modules that pass it on, or as one of the terms of a sum.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from patrol_prune._cuts import CutGraph
from patrol_prune._trace import Call

_ADDS = {operator.add, operator.iadd, torch.add}
_ADD_METHODS = {"add", "add_"}
_MULTIPLIES = {operator.mul, operator.imul, torch.mul}
_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout}
_MOVES = {"reshape", "view", "permute", "transpose", "flatten", "unflatten", "contiguous"}
_DROPOUT_LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@dataclass(frozen=True, eq=False)
class Residual:
    """One addition with its branch.

    Attributes:
        add: the addition.
        source: the value that the branch reads.
        value: the branch's value, which is added.
        region: the branch's operators in order, `value` last.
        identity: whether the shortcut is the source.
        passed: modules between source and addition that change nothing.
    """

    add: fx.Node
    source: fx.Node
    value: fx.Node
    region: tuple[fx.Node, ...]
    identity: bool
    passed: frozenset[fx.Node]


def residuals(graph: CutGraph) -> list[Residual]:
    """Every residual addition, shallow to deep; those with a projection on the shortcut as well."""
    found = []
    for node in graph.order:
        terms = _terms(graph, node)
        if terms is None:
            continue
        both = [r for r in (_residual(graph, node, *terms), _residual(graph, node, *terms[::-1]))
                if r is not None]
        exact = [r for r in both if r.identity]
        if exact or len(both) == 2:
            found.append(max(exact or both, key=lambda r: len(r.region)))
    return found


def _terms(graph: CutGraph, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors of one shape that `node` adds, or None."""
    is_function = node.op == "call_function" and node.target in _ADDS
    if not is_function and not (node.op == "call_method" and node.target in _ADD_METHODS):
        return None
    if node.kwargs or len(node.args) != 2:
        return None
    a, b = node.args
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)) or a is b:
        return None
    one, two = graph.facts[a].tensor, graph.facts[b].tensor
    if one is None or two is None or one.shape != two.shape or {a, b} & graph.free:
        return None
    return a, b


def _residual(
    graph: CutGraph, add: fx.Node, value: fx.Node, shortcut: fx.Node
) -> Residual | None:
    outside = _ancestors(shortcut)
    if value in outside:
        return None
    region, inputs, pending = set(), set(), [value]
    while pending:
        node = pending.pop()
        region.add(node)
        for used in node.all_input_nodes:
            if used in outside:
                inputs |= {used} - graph.free
            elif used not in region and used not in graph.free:
                pending.append(used)
    if len(inputs) != 1 or graph.order[0] in region:
        return None
    source = inputs.pop()
    passed: set[fx.Node] = set()
    reached = set(_shortcuts(graph, shortcut, passed))
    order = tuple(sorted(region, key=graph.index.__getitem__))
    return Residual(add, source, value, order, source in reached, frozenset(passed))


def _ancestors(node: fx.Node) -> set[fx.Node]:
    seen, pending = {node}, [node]
    while pending:
        new = set(pending.pop().all_input_nodes) - seen
        seen |= new
        pending.extend(new)
    return seen


def _shortcuts(graph: CutGraph, node: fx.Node, passed: set[fx.Node]) -> Iterator[fx.Node]:
    """What reaches the addition unchanged: the node, what it passes on, the terms of its sum."""
    yield node
    if node.op == "call_module" and _passes_on(graph.attribute(node)):
        passed.add(node)
        yield from _shortcuts(graph, node.all_input_nodes[0], passed)
    for term in _terms(graph, node) or ():
        yield from _shortcuts(graph, term, set())


def _passes_on(module: Any) -> bool:
    return type(module) is nn.Identity or (type(module) is nn.Sequential and len(module) == 0)


def called_once(graph: CutGraph) -> dict[str, Call]:
    """Module name -> its call, of the modules that are called exactly once."""
    once: dict[str, Call | None] = {}
    for call in graph.calls:
        once[call.path] = None if call.path in once else call
    return {path: call for path, call in once.items() if call is not None}


def is_inside(path: str, module: str) -> bool:
    """Whether `path` is `module` or a part of it."""
    return path == module or path.startswith(module + ".")


def prefixes(path: str) -> Iterator[str]:
    """`a`, `a.b`, `a.b.c` for `a.b.c`."""
    parts = path.split(".") if path else []
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


def outermost_modules(graph: CutGraph, residual: Residual) -> dict[str, Call]:
    """The outermost modules, called once, whose work lies wholly in the branch; in order."""
    once, region = called_once(graph), set(residual.region)
    beyond = {p for n in graph.order if n not in region and n not in graph.free
              for p in prefixes(graph.owner[n])}
    found: dict[str, Call] = {}
    for node in residual.region:
        for path in prefixes(graph.owner[node]):
            if path in once and path not in beyond:
                found[path] = once[path]
                break
    return found


def scaled_argument(graph: CutGraph, node: fx.Node) -> fx.Node | None:
    """`x`, where the node computes `f(x)` with `f(m x) = m f(x)` for a number m; else None."""
    used = [n for n in node.all_input_nodes if n not in graph.free]
    if len(used) != 1:
        return None
    if node.op == "call_module":
        module = graph.attribute(node)
        name = type(module).__name__
        linear = isinstance(module, _DROPOUT_LAYERS) or name in ("StochasticDepth", "DropPath",
                                                                 "Permute")
        return used[0] if linear or _passes_on(module) else None
    is_method = node.op == "call_method"
    name = str(node.target) if is_method else str(getattr(node.target, "__name__", ""))
    if name in _MOVES or node.target in _MULTIPLIES or node.target in _DROPOUTS:
        return used[0]
    first_of_several = name == "getitem" and node.args[1] == 0 and not _is_tensor(graph, used[0])
    return used[0] if first_of_several else None


def _is_tensor(graph: CutGraph, node: fx.Node) -> bool:
    return graph.facts[node].tensor is not None


def rest_of_branch(
    graph: CutGraph, residual: Residual, gone: Iterable[Call]
) -> Tensor:
    """The branch's value on the meta device when the modules `gone` pass on their first input.

    Raises:
        Exception: whatever an operator says of an input that it does not expect.
    """
    env: dict[fx.Node, Any] = {residual.source: graph.facts[residual.source].tensor}
    first = {_first_node(call): call.inputs[0] for call in gone}
    paths = {call.path for call in gone}

    def value_of(node: fx.Node) -> Any:
        if node not in env:
            env[node] = _on_meta(_run(graph, node, value_of))
        return env[node]

    for node in residual.region:
        if node in first:
            given = value_of(first[node]) if isinstance(first[node], fx.Node) else first[node]
            env[node] = given if _is_tensor(graph, node) else (given, None)
        elif not any(is_inside(graph.owner[node], path) for path in paths):
            value_of(node)
    result = value_of(residual.value)
    assert isinstance(result, Tensor)
    return result


def _first_node(call: Call) -> fx.Node | None:
    """The node that carries a call's value, or the first of its values."""
    value = call.value[0] if isinstance(call.value, (tuple, list)) else call.value
    return value if isinstance(value, fx.Node) else None


def _run(graph: CutGraph, node: fx.Node, value_of: Any) -> Any:
    args = tree_map(lambda a: value_of(a) if isinstance(a, fx.Node) else a, tuple(node.args))
    kwargs = tree_map(lambda a: value_of(a) if isinstance(a, fx.Node) else a, dict(node.kwargs))
    if node.op == "get_attr":
        return graph.attribute(node)
    if node.op == "call_module":
        return graph.attribute(node)(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _on_meta(value: Any) -> Any:
    return tree_map(lambda v: v.detach().to("meta") if isinstance(v, Tensor) else v, value)
