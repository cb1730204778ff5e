"""The one door to Torch-Pruning: its dependency graph, read once and kept as plain data.

`GroupTable` enumerates the channel groups (`groups.py`) of a model once and stores index tensors;
nothing outside this module walks Torch-Pruning's graph.

Source: G. Fang et al., DepGraph (arXiv 2301.12900), Torch-Pruning 1.6.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from torch_pruning.dependency import DependencyGraph, Group
from torch_pruning.dependency import index_mapping as _index_mapping
from torch_pruning.pruner.algorithms.base_pruner import BasePruner
from torch_pruning.pruner.importance import (
    GroupMagnitudeImportance,
    GroupTaylorImportance,
    Importance,
)

from patrol_prune.errors import InputError, UnsupportedModelError
from patrol_prune.groups import (
    CHANNEL_NORMS,
    CONV,
    ChannelGroup,
    Halves,
    Member,
    blocked_by,
    place,
    tie_of,
)

__all__ = [
    "BasePruner", "ChannelGroup", "DependencyGraph", "Group", "GroupMagnitudeImportance",
    "GroupTable", "GroupTaylorImportance", "Importance", "Member", "as_forward_fn",
    "bounded_enumeration", "build_graph", "check_prunable", "linear_scheduler",
    "output_channels", "preserved", "pruning_group", "rebuilt_graph", "remove_channels",
    "width_of",
]  # fmt: skip

linear_scheduler = tp.pruner.algorithms.scheduler.linear_scheduler

_MAX_INDICES = 2_000_000
_MAX_SECONDS = 20.0


@dataclass(eq=False)
class GroupTable:
    """All channel groups of one model at its present widths.

    Attributes:
        model: the model.
        groups: name of the root layer -> group, in Torch-Pruning's order.
        graph: Torch-Pruning's dependency graph the table was read from.
        raw: name -> Torch-Pruning's own full group, for its importances.
    """

    model: nn.Module
    groups: dict[str, ChannelGroup]
    graph: Any
    raw: dict[str, Any] = field(default_factory=dict, repr=False)
    _by_module: dict[int, list[tuple[str, Member]]] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        model: nn.Module,
        example_inputs: Any,
        *,
        split: Halves | None = None,
        graph: Any | None = None,
        forward_fn: Callable[..., Any] | None = None,
    ) -> GroupTable:
        """Trace the bare model and enumerate its groups.

        Args:
            model: the model; its mode and `requires_grad` are left as found.
            example_inputs: a tensor, a tuple of positional inputs, or a dict of named ones.
            split: where edge and cloud are; without it `location` and `crossing` are None.
            graph: a dependency graph of the model in its present shape, to save the tracing.
            forward_fn: `forward_fn(model, example_inputs)`, as in Torch-Pruning.

        Raises:
            UnsupportedModelError: a layer is parametrised or frozen into buffers, a weight is
                not finite, nothing can be pruned, or the groups explode.
        """
        if graph is None:
            graph = build_graph(model, example_inputs, forward_fn=forward_fn)
        names: dict[Any, str] = {m: n for n, m in model.named_modules()}
        groups: dict[str, ChannelGroup] = {}
        raw: dict[str, Any] = {}
        with bounded_enumeration():
            for full in graph.get_all_groups(ignored_layers=[]):
                group = _to_plain(full, graph, names, split)
                groups[group.name], raw[group.name] = group, full
        if not groups:
            raise UnsupportedModelError(
                f"Expected a model with convolutions or linear layers on its forward path, came "
                f"{type(model).__name__} with none. Pass the network itself, not a wrapper that "
                "detaches its output."
            )
        table = cls(model, groups, graph, raw)
        for group in groups.values():
            for member in group.members:
                table._by_module.setdefault(id(member.module), []).append((group.name, member))
        return table

    def members_of(self, module: nn.Module, direction: str) -> list[tuple[str, Member]]:
        """The (group name, member) pairs of one layer and direction ("out" or "in")."""
        wanted = (direction, "through")
        found = self._by_module.get(id(module), [])
        return [(name, m) for name, m in found if m.direction in wanted]

    def is_current(self) -> bool:
        """Whether every layer is still there, with the width the table was built with."""
        present = {id(m) for m in self.model.modules()}
        return all(
            id(m.module) in present and width_of(m.module, m.direction, self.graph) == m.width
            for g in self.groups.values()
            for m in g.members
            if m.direction != "parameter"
        )

    def inexact(self) -> dict[str, tuple[str, ...]]:
        """Groups where a zero mask only approximates removal -> the layers that cause it."""
        return {g.name: g.inexact for g in self.groups.values() if g.inexact}


def build_graph(
    model: nn.Module, example_inputs: Any, *, forward_fn: Callable[..., Any] | None = None,
    **options: Any,
) -> Any:  # fmt: skip
    """Torch-Pruning's dependency graph of the bare model, which is left as found."""
    check_prunable(model)
    with preserved(model, trainable=True), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DependencyGraph().build_dependency(
            model,
            example_inputs,
            forward_fn=forward_fn or as_forward_fn(example_inputs),
            verbose=False,
            **options,
        )


def rebuilt_graph(model: nn.Module, example_inputs: Any, history: list[Any], **options: Any) -> Any:
    """The graph of a model that lost blocks, with the history of the graph before."""
    graph = build_graph(model, example_inputs, **options)
    graph._pruning_history = history
    return graph


def output_channels(module: nn.Module, example_inputs: Any) -> list[tuple[nn.Module, Member]]:
    """Which root layer's channels reach a module's output tensor, and where.

    Returns:
        one pair per group that reaches the output: its root layer, and a member "output" whose
        `idxs` number the output's channels and whose `root_idxs` number the root layer's.
    """
    with preserved(module, trainable=True), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = DependencyGraph().build_dependency(
            module,
            example_inputs,
            forward_fn=as_forward_fn(example_inputs),
            output_transform=_new_tensor,
            verbose=False,
        )
    found = []
    with bounded_enumeration():
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


def as_forward_fn(example_inputs: Any) -> Callable[[nn.Module, Any], Any]:
    """A forward that calls the model once, as the type of the inputs says.

    Torch-Pruning's default tries `model(*tensor)` first, hides the user's own error, and counts
    the layers before the failure as reused.
    """
    if isinstance(example_inputs, Mapping):
        return _call_named
    return _call_all if isinstance(example_inputs, (tuple, list)) else _call_one


def _call_one(model: nn.Module, inputs: Any) -> Any:
    return model(inputs)


def _call_all(model: nn.Module, inputs: Any) -> Any:
    return model(*inputs)


def _call_named(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs)


def check_prunable(model: nn.Module) -> None:
    """Refuse by name what Torch-Pruning would break on late.

    Raises:
        UnsupportedModelError: see `GroupTable.build`.
    """
    seen = False
    for name, module in model.named_modules():
        if isinstance(module, (CONV, nn.Linear)):
            seen = True
            if not isinstance(module._parameters.get("weight"), nn.Parameter):
                raise UnsupportedModelError(
                    f"Expected plain weights, came {name!r} ({type(module).__name__}) whose "
                    "weight is computed (weight_norm, spectral_norm, a parametrization or a "
                    "pruning mask). Remove it first, e.g. with "
                    "torch.nn.utils.parametrize.remove_parametrizations."
                )
            if isinstance(module.weight, nn.parameter.UninitializedParameter):
                raise UnsupportedModelError(
                    f"Layer {name!r} is lazy and has no weight yet. Run the model once first."
                )
        elif type(module).__name__.startswith("FrozenBatchNorm"):
            raise UnsupportedModelError(
                f"Layer {name!r} is a {type(module).__name__}: its statistics are buffers that "
                "cannot be pruned. Replace it by nn.BatchNorm2d with requires_grad_(False)."
            )
    if not seen:
        raise UnsupportedModelError(
            f"Expected a model with convolutions or linear layers, came {type(model).__name__} "
            "with none: there is nothing to prune."
        )
    for name, p in model.named_parameters():
        if p.is_floating_point() and not torch.isfinite(p).all():
            raise UnsupportedModelError(
                f"Parameter {name!r} holds NaN or infinite values. Load a sane checkpoint."
            )


@contextmanager
def preserved(model: nn.Module, *, trainable: bool = False) -> Iterator[None]:
    """Give back every module's `training` and, by name, every parameter's `requires_grad`.

    Args:
        model: parameters may be replaced inside the block (pruning does it).
        trainable: set `requires_grad` on every floating parameter inside the block.
    """
    modes = [(m, m.training) for m in model.modules()]
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    try:
        if trainable:
            for p in model.parameters():
                p.requires_grad_(p.is_floating_point())
        yield
    finally:
        for module, training in modes:
            module.training = training
        for name, p in model.named_parameters():
            p.requires_grad_(flags.get(name, p.requires_grad))


@contextmanager
def bounded_enumeration() -> Iterator[None]:
    """Inside, enumerating groups is fast and refuses to explode.

    Torch-Pruning refreshes every index mapping for every group, although nothing has changed in
    between: here each graph is refreshed once, so nothing may be pruned inside. On some networks
    (window attention, detection heads) the index lists grow without end: a limit on their length
    and on the time turns the hang into an error.

    Raises:
        UnsupportedModelError: the groups of the model explode.
    """
    add_dep, refresh = Group.add_dep, _index_mapping.update_index_mapping
    start, fresh = time.monotonic(), set()

    def guarded(self: Any, dep: Any, idxs: Any) -> None:
        if len(idxs) > _MAX_INDICES or time.monotonic() - start > _MAX_SECONDS:
            raise UnsupportedModelError(
                f"The channel groups of this model explode at {dep.target.name.split(' ')[0]!r} "
                f"({len(idxs)} indices, {time.monotonic() - start:.0f} s): Torch-Pruning cannot "
                "follow its reshapes. Choose a backbone without window attention or channel "
                "shuffles, or hand over the part before them as the model."
            )
        add_dep(self, dep, idxs)

    def once(graph: Any) -> None:
        if id(graph) not in fresh:
            fresh.add(id(graph))
            refresh(graph)

    Group.add_dep, _index_mapping.update_index_mapping = guarded, once
    try:
        yield
    finally:
        Group.add_dep, _index_mapping.update_index_mapping = add_dep, refresh


def pruning_group(graph: Any, module: nn.Module, channels: list[int]) -> Any:
    """Torch-Pruning's group that removes these output channels of `module`, at present widths."""
    fn = graph.get_pruner_of_module(module).prune_out_channels
    return graph.get_pruning_group(module, fn, channels)


def remove_channels(table: GroupTable, channels: Mapping[str, Any]) -> None:
    """Remove output channels from the model, each group once, through the table's graph.

    Training mode and `requires_grad` come back; parameters are new objects. The table is stale
    afterwards.

    Args:
        table: the table of the model in its present shape.
        channels: group name -> root channels to remove (numbers at the table's widths).

    Raises:
        InputError: an unknown group, a channel out of range, or a group that would be emptied.
    """
    todo: list[tuple[nn.Module, list[int]]] = []
    for name, idxs in channels.items():
        group = table.groups.get(name)
        gone = sorted({int(i) for i in idxs})
        if group is None:
            raise InputError(f"Expected one of the model's channel groups, came {name!r}.")
        if gone and not 0 <= gone[0] <= gone[-1] < group.channels:
            raise InputError(f"Channels of {name!r} run from 0 to {group.channels - 1}.")
        if len(gone) >= group.channels:
            raise InputError(f"Group {name!r} would lose all of its {group.channels} channels.")
        if gone:
            todo.append((group.members[0].module, gone))
    with preserved(table.model), torch.no_grad():
        for module, gone in todo:
            pruning_group(table.graph, module, gone).prune()


def width_of(module: Any, direction: str, graph: Any) -> int:
    """Present channels of a layer in a direction; 0 where they cannot be pruned."""
    pruner = graph.get_pruner_of_module(module)
    if direction == "in":
        return int(pruner.get_in_channels(module) or 0)
    return int(pruner.get_out_channels(module) or 0)


def _to_plain(raw: Any, graph: Any, names: dict[Any, str], split: Halves | None) -> ChannelGroup:
    """One Torch-Pruning group as plain data."""
    members: list[Member] = []
    is_output = False
    for item in raw.items:
        node, handler = item.dep.target, item.dep.handler
        module = node.module
        is_in = graph.is_in_channel_pruning_fn(handler)
        is_out = graph.is_out_channel_pruning_fn(handler)
        is_output = is_output or (is_out and not node.outputs)
        if isinstance(module, nn.Parameter):
            name, direction = graph._param_to_name[module], "parameter"
            width = module.shape[node.pruning_dim]
        elif module in names:
            name = names[module]
            direction = "through" if is_in and is_out else ("in" if is_in else "out")
            width = width_of(module, direction, graph)
            if direction == "through" and width == 0:
                continue
        else:
            continue
        if any(r is None for r in item.root_idxs):
            continue
        idxs = torch.tensor(item.idxs, dtype=torch.long)
        roots = torch.tensor(item.root_idxs, dtype=torch.long)
        members.append(Member(name, module, direction, width, idxs, roots))
    root = members[0]
    tie = tie_of(members)
    location, crossing = place(members, split)
    return ChannelGroup(
        name=root.layer_name,
        channels=root.width,
        members=tuple(members),
        tie=tie if root.width % tie == 0 else root.width,
        location=location,
        crossing=crossing,
        is_output=is_output,
        blocked=blocked_by(members, is_output, tie),
        inexact=tuple(m.layer_name for m in members if isinstance(m.module, CHANNEL_NORMS)),
    )
