"""All channel groups of a model, read once and kept as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from patrol_prune._tp import (
    bounded_enumeration,
    joined_to_the_input,
    leaves,
    pruning_group,
    traced,
    width_of,
)
from patrol_prune.errors import InputError, UnsupportedModelError
from patrol_prune.following import followed
from patrol_prune.groups import ChannelGroup, Halves, Member
from patrol_prune.local_groups import Parts
from patrol_prune.plain_groups import to_plain
from patrol_prune.prunable import as_forward_fn, check_prunable, follow_widths, preserved
from patrol_prune.shuffles import CutAtShuffles, reason_to_keep

__all__ = ["GroupTable", "build_graph", "rebuilt_graph", "remove_channels"]


@dataclass(eq=False)
class GroupTable:
    """All channel groups of one model at its present widths.

    Attributes:
        model: the model.
        groups: name of the root layer -> group, in Torch-Pruning's order.
        graph: Torch-Pruning's dependency graph the table was read from.
        raw: name -> Torch-Pruning's own full group, for its importances.
        left_out: layers in no group -> why; empty where the whole model can be followed.
    """

    model: nn.Module
    groups: dict[str, ChannelGroup]
    graph: Any
    raw: dict[str, Any] = field(default_factory=dict, repr=False)
    left_out: dict[str, str] = field(default_factory=dict, repr=False)
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
                not finite, or neither the model nor any part of it can be followed.
        """
        if graph is None:
            graph = build_graph(model, example_inputs, forward_fn=forward_fn)
        names: dict[Any, str] = {m: n for n, m in model.named_modules()}
        parts: Parts | None = getattr(graph, "parts", None)
        shuffled: bool = getattr(graph, "shuffled", False)
        changing: dict[str, str] = getattr(graph, "changing", {})
        groups: dict[str, ChannelGroup] = {}
        raw: dict[str, Any] = {}
        with bounded_enumeration(model):
            for full in graph.get_all_groups(ignored_layers=[]):
                group = to_plain(full, graph, names, split)
                if parts is not None or shuffled:
                    keep = reason_to_keep if parts is None else parts.reason_to_keep
                    why = keep(group, leaves(full))
                    group = dataclasses.replace(
                        group, blocked=why or group.blocked,
                        is_output=group.is_output and why is None,
                    )
                groups[group.name], raw[group.name] = group, full
        if parts is None:
            forward = forward_fn or as_forward_fn(example_inputs)
            _keep_what_joins_the_input(
                groups, model, example_inputs, CutAtShuffles(forward) if shuffled else forward)
        _keep_what_shares_its_weight(groups, model)
        for name in [n for n in changing if n in groups and groups[n].blocked is None]:
            groups[name] = dataclasses.replace(groups[name], blocked=changing[name])
        _keep_what_lies_beside_the_unseen(groups)
        if not groups:
            raise UnsupportedModelError(
                f"Expected a model with convolutions or linear layers on its forward path, came "
                f"{type(model).__name__} with none. Pass the network itself, not a wrapper that "
                "detaches its output."
            )
        left_out = parts.left_out(model, groups.values()) if parts is not None else {}
        table = cls(model, groups, graph, raw, left_out)
        for group in groups.values():
            for member in group.members:
                table._by_module.setdefault(id(member.module), []).append((group.name, member))
        return table

    def members_of(self, module: object, direction: str) -> list[tuple[str, Member]]:
        """The (group name, member) pairs of a layer and a direction ("out", "in", "parameter")."""
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


def _keep_what_shares_its_weight(groups: dict[str, ChannelGroup], model: nn.Module) -> None:
    """Block the groups of layers whose parameter is another layer's too; in place.

    Each would get a smaller parameter of its own: they would no longer be tied.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    if all(len(names) == 1 for names in owners.values()):
        return
    for name, group in groups.items():
        for member in group.members:
            if group.blocked is not None or not isinstance(member.module, nn.Module):
                continue
            others = [other for parameter in member.module.parameters(recurse=False)
                      for other in owners.get(id(parameter), ()) if other != member.layer_name]
            if others:
                why = f"{member.layer_name!r} shares its weight with {others[0]!r}"
                group = groups[name] = dataclasses.replace(group, blocked=why)


def _keep_what_joins_the_input(
    groups: dict[str, ChannelGroup], model: nn.Module, example_inputs: Any,
    forward_fn: Callable[..., Any] | None,
) -> None:
    """Block the groups whose channels are summed with the input's; in place.

    Looked at only where a group is as wide as the input: a second tracing, otherwise for nothing.
    """
    shapes = [x.shape[1:2] if x.dim() > 3 else x.shape[1:] for x in _tensors(example_inputs)]
    widths = {size for shape in shapes for size in shape}
    suspects = {n for n, g in groups.items() if g.blocked is None and g.channels in widths}
    if not suspects:
        return
    for name in suspects & joined_to_the_input(model, example_inputs, forward_fn):
        why = "its channels are added to those of the model's input"
        groups[name] = dataclasses.replace(groups[name], blocked=why)


def _keep_what_lies_beside_the_unseen(groups: dict[str, ChannelGroup]) -> None:
    """Block the groups of a layer of whose input channels some belong to no group; in place.

    They come from the input or from a constant, concatenated before the layer. Torch-Pruning does
    not see them, and counts the others' places as if they were not there.
    """
    seen: dict[int, torch.Tensor] = {}
    for group in groups.values():
        for m in (m for m in group.members if m.direction == "in"):
            here = seen.setdefault(id(m.module), torch.zeros(m.width, dtype=torch.bool))
            here[m.idxs[m.idxs < m.width]] = True
    for name, group in groups.items():
        beside = [m.layer_name for m in group.members
                  if m.direction == "in" and not bool(seen[id(m.module)].all())]
        if beside and group.blocked is None:
            why = f"{beside[0]!r} reads them beside channels that cannot be followed"
            groups[name] = dataclasses.replace(group, blocked=why)


def _tensors(inputs: Any) -> list[torch.Tensor]:
    if isinstance(inputs, torch.Tensor):
        return [inputs]
    if isinstance(inputs, Mapping):
        inputs = tuple(inputs.values())
    each = inputs if isinstance(inputs, (tuple, list)) else ()
    return [x for one in each for x in _tensors(one)]


def build_graph(
    model: nn.Module, example_inputs: Any, *, forward_fn: Callable[..., Any] | None = None,
    tried: bool = True,
) -> Any:
    """Torch-Pruning's dependency graph of the bare model, which is left as found.

    With `tried=False` nobody looks for groups whose removal changes more than their channels.

    Raises:
        UnsupportedModelError: see `GroupTable.build`.
    """
    check_prunable(model)

    def make(forward: Callable[..., Any]) -> Any:
        graph = traced(model, example_inputs, forward)
        with bounded_enumeration(model):
            for _ in graph.get_all_groups(ignored_layers=[]):
                pass
        return graph

    return followed(model, example_inputs, forward_fn, make, tried=tried)


def rebuilt_graph(
    model: nn.Module,
    example_inputs: Any,
    history: list[Any],
    *,
    forward_fn: Callable[..., Any] | None = None,
    **options: Any,
) -> Any:
    """The graph of a model that lost blocks, with the history of the graph before.

    `options` are those of Torch-Pruning's `build_dependency`.
    """

    def make(forward: Callable[..., Any]) -> Any:
        graph = traced(model, example_inputs, forward, **options)
        with bounded_enumeration(model):
            for _ in graph.get_all_groups(ignored_layers=[]):
                pass
        return graph

    graph = followed(model, example_inputs, forward_fn, make)
    graph._pruning_history = history
    return graph


def remove_channels(table: GroupTable, channels: Mapping[str, Any]) -> None:
    """Remove output channels from the model, each group once, through the table's graph.

    Training mode and `requires_grad` come back; parameters are new objects. The table is stale
    afterwards.

    Args:
        table: the table of the model in its present shape.
        channels: group name -> root channels to remove (numbers at the table's widths).

    Raises:
        InputError: an unknown group, a channel out of range, or a group or a layer that would be
            emptied.
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
    _refuse_emptied(table, channels)
    with preserved(table.model), torch.no_grad():
        for module, gone in todo:
            pruning_group(table.graph, module, gone).prune()
    follow_widths(table.model)


def _refuse_emptied(table: GroupTable, channels: Mapping[str, Any]) -> None:
    """A layer may hold but a part of a group (behind a concatenation), and lose all of it."""
    left: dict[tuple[int, str], int] = {}
    for name, idxs in channels.items():
        gone = torch.tensor(sorted({int(i) for i in idxs}), dtype=torch.long)
        for m in table.groups[name].members:
            key = (id(m.module), m.direction)
            lost = int(torch.isin(m.root_idxs, gone).sum())
            left[key] = left.get(key, m.width) - lost
            if left[key] < 1:
                raise InputError(
                    f"Layer {m.layer_name!r} would lose all of its {m.width} channels, which are "
                    f"a part of group {name!r}. Keep one of them."
                )
