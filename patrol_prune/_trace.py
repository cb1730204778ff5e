"""A model as a graph of operators: names, shapes and costs of its values, from one run."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from patrol_prune.cost import draws_restored, evaluating, no_fused_attention
from patrol_prune.errors import UnsupportedModelError
from patrol_prune.given import check_uncompiled, does_not_run
from patrol_prune.prunable import WIDTHS

logger = logging.getLogger(__name__)

_ASSERTS = {"_assert", "_assert_async", "_assert_is_none"}
_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, torch.dropout}

Likeness = tuple[tuple[Any, ...], ...]
"""See `likeness`."""


@dataclass
class Facts:
    """What one run on the example told about a node."""

    tensor: Tensor | None = None  # on the meta device: shape and dtype, no memory
    macs: int = 0
    aliases: set[fx.Node] = field(default_factory=set)  # inputs whose memory the value shares
    mutates: set[fx.Node] = field(default_factory=set)  # inputs that the node writes into


@dataclass(frozen=True)
class Call:
    """One call of a module while tracing.

    Args:
        path: the module's name.
        inputs: positional, then keyword arguments; values of the graph as nodes.
        value: what it returned, with nodes likewise.
    """

    path: str
    inputs: tuple[Any, ...]
    value: Any


@dataclass(frozen=True)
class Traced:
    """What tracing found.

    Args:
        graph: the cleaned graph; it refers to the model's layers by name.
        facts: per node, from one run.
        names: per node, the canonical name first, then the aliases.
        free: nodes whose value does not depend on the input.
        constants: tensors that the trace found and that are no attribute of the model.
        likeness: see `likeness`, of the graph as it was traced.
        owner: per node, the innermost module it was made in; a layer for its own call.
        calls: every call of a module, inner ones first.
    """

    graph: fx.Graph
    facts: dict[fx.Node, Facts]
    names: dict[fx.Node, tuple[str, ...]]
    free: set[fx.Node]
    constants: dict[str, Tensor]
    likeness: Likeness | None
    owner: dict[fx.Node, str]
    calls: tuple[Call, ...]


def trace(model: nn.Module, x: Tensor) -> Traced:
    """Trace `model`, run it once on `x` and check that the graph computes what the model does.

    Args:
        model: takes one tensor; left as found.
        x: one sample `[1, ...]` on the model's device.

    Raises:
        InputError: the model cannot run on `x`.
        UnsupportedModelError: the model cannot be traced, or the trace computes something else.
    """
    tracer = _Tracer()
    with (evaluating(model), draws_restored(model), torch.inference_mode(False), torch.no_grad(),
          no_fused_attention()):
        expected = run_on(model, x.clone())
        own = set(model.__dict__) | set(model._buffers)
        try:
            graph = _trace_graph(tracer, model)
            alike = _likeness(model, graph)
            probe = _Probe(model, graph)
            got = probe.probe(x.clone())
        finally:
            constants = {name: _take(model, name) for name in _new_constants(model, own)}
    if not _same(expected, got):
        raise UnsupportedModelError(
            f"Traced {type(model).__name__} computes something else than the model itself, so "
            "cutting it would change it (randomness in evaluation mode, or arithmetic in place "
            f"on a tensor that is used again, does this). {_BY_HAND}"
        )
    _refuse_written_constants(graph, probe.facts, constants)
    _erase_dead(graph, probe.facts)
    free = _free_nodes(list(graph.nodes), probe.facts)
    return Traced(graph, probe.facts, _names(graph, tracer), free, constants,
                  None if constants else alike, tracer.owner, tuple(tracer.calls))


def likeness(model: nn.Module) -> Likeness | None:
    """What tracing the model gives, to compare with `==`; the model does not run.

    Equal ones are the same operators in the same order on the same layer objects with the same
    settings and types of number, whatever the layers' widths are. None where that cannot be told:
    the trace makes tensors of its own, a layer keeps more than plain settings, or the model cannot
    be traced.
    """
    own = set(model.__dict__) | set(model._buffers)
    with evaluating(model), draws_restored(model), torch.no_grad(), no_fused_attention():
        try:
            alike = _likeness(model, _trace_graph(_Tracer(), model))
        except UnsupportedModelError:
            return None
        finally:
            constants = [_take(model, name) for name in _new_constants(model, own)]
    return None if constants else alike


def _likeness(model: nn.Module, graph: fx.Graph) -> Likeness | None:
    numbers = {node: f"%{i}" for i, node in enumerate(graph.nodes)}
    found: list[tuple[Any, ...]] = [tuple(t.dtype for t in (*model.parameters(), *model.buffers()))]
    for node in graph.nodes:
        arguments = fx.node.map_arg((node.args, node.kwargs), numbers.__getitem__)
        holder: nn.Module | None = None
        settings: dict[str, Any] | None = {}
        if node.op == "call_module":
            holder = model.get_submodule(str(node.target))
            settings = _settings(holder)
        elif node.op == "get_attr":
            holder = model.get_submodule(str(node.target).rpartition(".")[0])
        if settings is None:
            return None
        found.append((node.op, node.target, arguments, holder, settings))
    return tuple(found)


def _settings(layer: nn.Module) -> dict[str, Any] | None:
    """A layer's own attributes but its widths; None where one is more than numbers and names."""
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(layer).items()
              if not k.startswith("_") and k not in WIDTHS and k != "training"}
    return values if all(map(_is_plain, values.values())) else None


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


def run_on(model: nn.Module, x: Tensor) -> Any:
    """`model(x)`; a failure is an `InputError` that tells the shape."""
    try:
        return model(x)
    except Exception as error:
        raise does_not_run(model, x, error) from error


def attribute_of(module: nn.Module, path: str) -> Any:
    """The attribute of `module` at a dotted `path`."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


_BY_HAND = (
    "Hand the two halves over yourself: Split.from_modules(edge, cloud, example_inputs), with "
    "edge and cloud as two modules whose composition is the model."
)


class _Tracer(fx.Tracer):
    """Remembers which module made each node and which node each module returned."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = [""]
        self.owner: dict[fx.Node, str] = {}
        self.made: dict[fx.Node, int] = {}
        self.returned: list[tuple[str, fx.Node, bool]] = []  # path, node, made inside that call
        self.calls: list[Call] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        childless = next(m.children(), None) is None
        return childless or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        self.owner[node] = self.stack[-1]
        self.made[node] = len(self.made)
        return node

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        path = self.path_of_module(m)
        earlier = len(self.made)
        self.stack.append(path)
        try:
            value = super().call_module(m, forward, args, kwargs)
        finally:
            self.stack.pop()
        self.calls.append(
            Call(path, tuple(map(_as_nodes, (*args, *kwargs.values()))), _as_nodes(value))
        )
        if isinstance(value, fx.Proxy):
            self.returned.append((path, value.node, self.made[value.node] >= earlier))
        return value


def _as_nodes(value: Any) -> Any:
    return tree_map(lambda v: v.node if isinstance(v, fx.Proxy) else v, value)


def _trace_graph(tracer: _Tracer, model: nn.Module) -> fx.Graph:
    parameters = list(signature(model.forward).parameters.values())
    positional = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    fixed = {p.name: p.default for p in parameters[1:] if p.default is not Parameter.empty}
    if any(p.default is Parameter.empty and p.kind in positional for p in parameters[1:]):
        raise UnsupportedModelError(
            f"{type(model).__name__}.forward takes several inputs "
            f"({', '.join(p.name for p in parameters)}); expected one tensor. Fix the others "
            "inside a wrapper module."
        )
    try:
        graph = tracer.trace(model, concrete_args=fixed or None)
    except Exception as error:
        check_uncompiled(model)
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be traced: {error} (control flow that depends on the "
            f"values of a tensor does this). {_BY_HAND}"
        ) from error
    for node in reversed(list(graph.nodes)):
        name = getattr(node.target, "__name__", "")
        unused = not node.users
        is_assert = node.op == "call_function" and name in _ASSERTS
        if unused and (is_assert or (node.op == "placeholder" and node.prev.op != "root")):
            graph.erase_node(node)
        elif node.target in _DROPOUTS and _rate(node) > 0:
            logger.warning("A functional dropout in %s stays off.", tracer.owner[node] or "forward")
    return graph


def _rate(node: fx.Node) -> float:
    rate = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
    return float(rate) if isinstance(rate, (int, float)) else 0.5


class _Probe(fx.Interpreter):
    """Runs the graph once and fills in the `Facts` of every node."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.facts: dict[fx.Node, Facts] = {}
        self.counter = FlopCounterMode(display=False)

    def probe(self, x: Tensor) -> Any:
        with self.counter:
            return self.run(x)

    def run_node(self, n: fx.Node) -> Any:
        used = {node: _tensors(self.env[node]) for node in n.all_input_nodes}
        versions = {node: [t._version for t in ts] for node, ts in used.items()}
        before = self.counter.get_total_flops()
        value = super().run_node(n)
        facts = self.facts[n] = Facts(macs=(self.counter.get_total_flops() - before) // 2)
        if isinstance(value, Tensor):
            facts.tensor = torch.empty_like(value, device="meta")
        mine = {_memory(t) for t in _tensors(value)}
        facts.aliases = {n for n, ts in used.items() if mine & {_memory(t) for t in ts}}
        facts.mutates = {n for n, ts in used.items() if [t._version for t in ts] != versions[n]}
        if n.op == "call_module" and getattr(self.fetch_attr(str(n.target)), "inplace", False):
            facts.mutates |= set(n.all_input_nodes)  # dropout writes in training mode only
            facts.aliases |= set(n.all_input_nodes)
        return value


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _same(expected: Any, got: Any) -> bool:
    first, second = _tensors(expected), _tensors(got)
    return len(first) == len(second) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True)
        for a, b in zip(first, second, strict=True)
    )


def _new_constants(model: nn.Module, own: set[str]) -> list[str]:
    return [name for name in (*model.__dict__, *model._buffers) if name not in own]


def _take(model: nn.Module, name: str) -> Any:
    value = getattr(model, name)
    delattr(model, name)
    return value


def _erase_dead(graph: fx.Graph, facts: dict[fx.Node, Facts]) -> None:
    """Remove unused nodes that have no effect, so that they keep nothing alive."""
    for node in reversed(list(graph.nodes)):
        effect = node.op in ("placeholder", "output", "call_module") or node.is_impure()
        if not node.users and not effect and not facts[node].mutates:
            graph.erase_node(node)


def _written(order: Sequence[fx.Node], facts: dict[fx.Node, Facts]) -> set[fx.Node]:
    """Nodes whose value something writes into later, also through a view."""
    written: set[fx.Node] = set()
    for node in reversed(order):
        written |= facts[node].mutates
        if node in written:
            written |= facts[node].aliases
    return written


def _refuse_written_constants(
    graph: fx.Graph, facts: dict[fx.Node, Facts], constants: dict[str, Tensor]
) -> None:
    """A tensor that `forward` makes anew and writes into would keep what was written."""
    if any(
        n.op == "get_attr" and n.target in constants for n in _written(list(graph.nodes), facts)
    ):
        raise UnsupportedModelError(
            "Expected a forward pass without memory, came one that makes a tensor and then writes "
            "values computed from the input into it; the trace would keep them from one call to "
            f"the next. Make it from the input (x.new_zeros). {_BY_HAND}"
        )


def _free_nodes(order: Sequence[fx.Node], facts: dict[fx.Node, Facts]) -> set[fx.Node]:
    """Nodes that do not depend on the input, and that nothing writes into."""
    written = _written(order, facts)
    free: set[fx.Node] = set()
    for node in order:
        constant = node.op in ("get_attr", "call_function", "call_method") and all(
            used in free for used in node.all_input_nodes
        )
        is_written = node in written or facts[node].mutates
        if constant and not is_written and not node.is_impure():
            free.add(node)
    return free


def _names(graph: fx.Graph, tracer: _Tracer) -> dict[fx.Node, tuple[str, ...]]:
    """Names per node: the outermost module it is the output of first, then the others.

    The second call of a module is `path_1`. Operators are `<module that calls them>.<operator>`.
    """
    taken: Counter[str] = Counter()
    own: dict[fx.Node, list[str]] = {node: [] for node in graph.nodes}
    passed: dict[fx.Node, list[str]] = {node: [] for node in graph.nodes}
    for path, node, inside in tracer.returned:
        name = _unique(path, taken)
        if node in own:
            (own if inside else passed)[node].append(name)
    for node in graph.nodes:
        if node.op in ("call_function", "call_method"):
            operator = str(getattr(node.target, "__name__", node.target))
            owner = tracer.owner[node]
            own[node].append(_unique(f"{owner}.{operator}" if owner else operator, taken))
    for found in own.values():
        found.sort(key=lambda name: name.count("."))
    return {node: (*own[node], *passed[node]) for node in graph.nodes}


def _unique(base: str, taken: Counter[str]) -> str:
    name = base if not taken[base] else f"{base}_{taken[base]}"
    taken[base] += 1
    return name if name == base or not taken[name] else _unique(base, taken)
