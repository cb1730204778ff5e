"""The one door to Torch-Pruning: its dependency graph, and what it has to be told of it.

`plain_groups.py` reads its groups as plain data, and `group_table.py` keeps these.

Source: G. Fang et al., DepGraph (arXiv 2301.12900), Torch-Pruning 1.6.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate, count
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.dependency import DependencyGraph, Group
from torch_pruning.dependency import index_mapping as _index_mapping
from torch_pruning.dependency import shape_infer as _shape_infer
from torch_pruning.pruner.algorithms.base_pruner import BasePruner
from torch_pruning.pruner.function import PrunerBox
from torch_pruning.pruner.importance import (
    GroupMagnitudeImportance,
    GroupTaylorImportance,
    Importance,
)

from patrol_prune.attention_heads import channels_followed
from patrol_prune.errors import UnsupportedModelError
from patrol_prune.groups import Member
from patrol_prune.prunable import as_forward_fn, preserved

__all__ = [
    "BasePruner", "DependencyGraph", "ExplodingGroupsError", "Group", "GroupMagnitudeImportance",
    "GroupTaylorImportance", "Importance", "bounded_enumeration",
    "joined_to_the_input", "leaves", "linear_scheduler", "output_channels", "pruning_group",
    "replay", "run_part", "signed", "traced", "width_of",
]  # fmt: skip

_layernorm = PrunerBox[tp.ops.OPTYPE.LN]
_cut = _layernorm._prune_parameter_and_grad


def _cut_in_order(weight: nn.Parameter, keep: Tensor, dim: int) -> nn.Parameter:
    """Torch-Pruning's LayerNorm takes the kept channels in the order of a Python set, which is not
    their own once about a quarter is left; weight and bias then belong to other channels."""
    cut: nn.Parameter = _cut(weight, keep.sort().values, dim)
    return cut


_layernorm._prune_parameter_and_grad = _cut_in_order

_trace = DependencyGraph._trace


def _trace_heads(
    self: Any, model: nn.Module, inputs: Any, forward_fn: Any, output_transform: Any
) -> Any:
    """Torch-Pruning follows no matrix product, and attention's heads would not meet q, k and v.
    A forward that gives more than the model's output says what becomes of the transform."""
    if output_transform is not None and hasattr(forward_fn, "transformed"):
        output_transform = forward_fn.transformed(output_transform)
    with channels_followed(model):
        return _trace(self, model, inputs, forward_fn, output_transform)


DependencyGraph._trace = _trace_heads

linear_scheduler = tp.pruner.algorithms.scheduler.linear_scheduler

_MAX_INDICES = 4_000_000
_MAX_SECONDS = 20.0
_PER_CLOCK = 32  # lists of indices for each look at the clock
_SLACK = 4
_PRODUCT = "MulBackward0"
_map_concat = _index_mapping.update_concat_index_mapping


class ExplodingGroupsError(UnsupportedModelError):
    """Following a model's channels would take longer, and more memory, than anyone has."""


@contextmanager
def _flattened_concatenations() -> Iterator[None]:
    """Inside, Torch-Pruning follows a concatenation that is flattened before the next layer.

    It compares the concatenation's width with what the next layer reads, channels times positions
    behind a flattening, and then takes it for one over another dimension: all its parts seem to
    lie at channel 0, and the wrong channels are tied.
    """
    before = _index_mapping.update_concat_index_mapping, _shape_infer.infer_in_channels_recursively

    def mapped(graph: Any, node: Any) -> None:
        if _is_mapped(node.module):
            return
        _map_concat(graph, node)
        sizes = node.module.concat_sizes
        if not hasattr(node.module, "flattened"):
            whole = sizes is not None and None not in sizes
            node.module.flattened = whole and _is_flattened(node, sum(sizes))
        if node.module.flattened:  # once more, without the comparison
            _shape_infer.infer_in_channels_recursively = lambda *_, **__: None
            try:
                _map_concat(graph, node)
            finally:
                _shape_infer.infer_in_channels_recursively = before[1]

    _index_mapping.update_concat_index_mapping = mapped
    try:
        yield
    finally:
        _index_mapping.update_concat_index_mapping = before[0]


def _is_mapped(concat: Any) -> bool:
    """Whether a concatenation was mapped at the present widths of what it joins."""
    sizes, offsets = concat.concat_sizes, concat.offsets
    return None not in (sizes, offsets) and list(accumulate(sizes, initial=0)) == offsets


def _is_flattened(concat: Any, channels: int) -> bool:
    """Whether a reshape of `[N, channels, H, W]`, or of more behind a further concatenation, stands
    behind operators without weights."""
    nodes, seen = [(node, False) for node in concat.outputs], set()
    while nodes:
        node, joined = nodes.pop()
        if (id(node), joined) in seen:
            continue
        seen.add((id(node), joined))
        if node.type == tp.ops.OPTYPE.RESHAPE:
            size = list(getattr(node.grad_fn, "_saved_self_sym_sizes", ()))
            if len(size) == 4 and (size[1] > channels if joined else size[1] == channels):
                return True
        elif node.type in (tp.ops.OPTYPE.ELEMENTWISE, tp.ops.OPTYPE.CONCAT):
            behind = joined or node.type == tp.ops.OPTYPE.CONCAT
            nodes += [(further, behind) for further in node.outputs]
    return False


def traced(
    model: nn.Module,
    example_inputs: Any,
    forward_fn: Callable[..., Any] | None = None,
    **options: Any,
) -> Any:
    """Torch-Pruning's dependency graph of the bare model, which is left as found.

    `options` are further arguments of its `build_dependency`.
    """
    with (
        preserved(model, trainable=True), torch.enable_grad(), warnings.catch_warnings(),
        _flattened_concatenations(),
    ):  # fmt: skip
        warnings.simplefilter("ignore")
        graph = DependencyGraph().build_dependency(
            model,
            example_inputs,
            forward_fn=forward_fn or as_forward_fn(example_inputs),
            verbose=False,
            **options,
        )
    for node in graph.module2node.values():
        if node.type == tp.ops.OPTYPE.SLICE:
            size = node.grad_fn._saved_self_sym_sizes[signed(node.module.dim)]
            node.module.start = _from_the_front(node.module.start, size)
            node.module.end = _from_the_front(node.module.end, size)
    return graph


def _from_the_front(place: int, size: int) -> int:
    """A slice's end, which may be counted from the back, of `size` values."""
    place = signed(place)
    return max(0, place + size) if place < 0 else place


def signed(number: int) -> int:
    """Autograd keeps -1 as the largest number of 64 bits."""
    return number - 2**64 if number >= 2**63 else number


def output_channels(module: nn.Module, x: Any, widest: int) -> list[tuple[nn.Module, Member]]:
    """Which root layer's channels reach a module's output tensor, of `widest` values, and where.

    Returns:
        one pair per group that reaches the output: its root layer, and a member "output" whose
        `idxs` number the output's channels and whose `root_idxs` number the root layer's.
    """
    graph = traced(module, x, output_transform=_new_tensor)
    found = []
    with bounded_enumeration(module, widest):
        for raw in graph.get_all_groups(ignored_layers=[]):
            for item in raw.items:
                if item.dep.target.type == graph.ops.OPTYPE.OUTPUT:
                    idxs = torch.tensor(item.idxs, dtype=torch.long)
                    roots = torch.tensor(item.root_idxs, dtype=torch.long)
                    member = Member("", None, "output", len(idxs), idxs, roots)
                    found.append((raw[0].dep.target.module, member))
    return found


def _new_tensor(output: Any) -> Any:
    """An operation behind the last layer, or Torch-Pruning has no node for the output."""
    return output * 1.0


@contextmanager
def bounded_enumeration(model: nn.Module, widest: int = 1) -> Iterator[None]:
    """Inside, enumerating the model's groups is fast and refuses to explode.

    Torch-Pruning refreshes every index mapping for every group, although nothing has changed in
    between: here each graph is refreshed once, so nothing may be pruned inside. On some networks
    (window attention, detection heads) the index lists grow without end: lists much longer than
    any layer is wide, too many of them, or too much processor time end in an error.

    Raises:
        ExplodingGroupsError: the groups of the model explode.
    """
    flatten = _index_mapping._FlattenIndexMapping
    add_dep, refresh, spread = Group.add_dep, _index_mapping.update_index_mapping, flatten.__call__
    start, fresh, calls = time.thread_time(), set(), count()
    longest = max(widest, 1, *(_SLACK * max(p.shape, default=1) for p in model.parameters()))

    def check(length: int, total: int, where: str) -> None:
        slow = not next(calls) % _PER_CLOCK and time.thread_time() - start > _MAX_SECONDS
        if length > longest or total > _MAX_INDICES or slow:
            raise ExplodingGroupsError(
                f"its channel groups explode at {where}, which Torch-Pruning cannot follow"
            )

    def guarded(self: Any, dep: Any, idxs: Any) -> None:
        self.total = getattr(self, "total", 0) + len(idxs)
        check(len(idxs), self.total, _kind(dep.target.name))
        add_dep(self, dep, idxs)

    def guarded_spread(self: Any, idxs: Any) -> Any:
        length = len(idxs) * (1 if self.reverse else self._stride)
        check(length, length, "a flattening")
        return spread(self, idxs)

    def once(graph: Any) -> None:
        if id(graph) not in fresh:
            fresh.add(id(graph))
            refresh(graph)

    Group.add_dep, _index_mapping.update_index_mapping = guarded, once
    flatten.__call__ = guarded_spread
    try:
        with _flattened_concatenations():
            yield
    finally:
        Group.add_dep, _index_mapping.update_index_mapping = add_dep, refresh
        flatten.__call__ = spread


def _kind(name: str) -> str:
    """`'features.0'` for a layer, `Reshape` for an operator, which Torch-Pruning numbers."""
    operator = re.match(r"_([A-Za-z]+)_\d+\(", name)
    return operator[1] if operator else repr(name.split(" ")[0])


def leaves(raw: Any) -> bool:
    """Whether a group reaches the input or the output of what was traced between products."""
    return any(_is_end(item.dep.target) for item in raw.items)


def joined_to_the_input(
    model: nn.Module, example_inputs: Any, forward_fn: Callable[..., Any] | None = None
) -> set[str]:
    """Groups that a sum or a concatenation ties to the channels of the model's own input.

    Torch-Pruning sees layers and operators only, so that a shortcut from the input is nothing to
    it. Here the input passes a product first, which is a node of the graph.
    """
    call = forward_fn or as_forward_fn(example_inputs)
    graph = traced(model, example_inputs, lambda m, inputs: call(m, _multiplied(inputs)))
    names = {m: n for n, m in model.named_modules()}
    found: set[str] = set()
    with bounded_enumeration(model):
        for group in graph.get_all_groups(ignored_layers=[]):
            if any(_is_start(item.dep.target) for item in group.items):
                modules = (item.dep.target.module for item in group.items)
                found.add(next(names[m] for m in modules if m in names))
    return found


def _multiplied(inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return {key: _multiplied(value) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(_multiplied(value) for value in inputs)
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        return inputs.detach().requires_grad_() * 1.0
    return inputs


def _is_end(node: Any) -> bool:
    return node.type == tp.ops.OPTYPE.OUTPUT or _is_start(node)


def _is_start(node: Any) -> bool:
    origin = getattr(node.grad_fn, "name", str)()
    return not node.inputs and not isinstance(node.module, nn.Parameter) and origin == _PRODUCT


def run_part(part: nn.Module, x: Tensor) -> Tensor:
    """The part between two products, so that its input and its output are nodes of the graph."""
    output: Tensor = part(x.detach().requires_grad_() * 1.0) * 1.0
    return output


def pruning_group(graph: Any, module: nn.Module, channels: list[int]) -> Any:
    """Torch-Pruning's group that removes these output channels of `module`, at present widths."""
    fn = graph.get_pruner_of_module(module).prune_out_channels
    with _flattened_concatenations():
        return graph.get_pruning_group(module, fn, channels)


def replay(graph: Any, history: list[Any]) -> None:
    """Prune as a recorded history tells."""
    with _flattened_concatenations():
        graph.load_pruning_history(history)


def width_of(module: Any, direction: str, graph: Any) -> int:
    """Present channels of a layer in a direction; 0 where they cannot be pruned."""
    pruner = graph.get_pruner_of_module(module)
    if direction == "in":
        return int(pruner.get_in_channels(module) or 0)
    return int(pruner.get_out_channels(module) or 0)
