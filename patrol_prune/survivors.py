"""Scores outlive a pruning step: which channels of then are the channels of now."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patrol_prune._tp import width_of
from patrol_prune.errors import InputError
from patrol_prune.group_table import GroupTable


class SurvivorTracker:
    """Which of a table's channels the present channels of a pruned model are.

    Every Torch-Pruning group knows its graph, and the graph the history of what it removed. The
    tracker replays the tail of that history that leads from the table's widths to the present
    ones.
    """

    def __init__(self, table: GroupTable) -> None:
        self.table = table
        members = [m for group in table.groups.values() for m in group.members]
        self._modules = {m.layer_name: m.module for m in members if m.direction != "parameter"}
        self._cache: tuple[int, int, dict[str, Tensor]] | None = None

    def locate(self, group: Any) -> tuple[str, Tensor] | None:
        """(group name, `[K]` table channels) of a Torch-Pruning group's root indices.

        Returns None for a group that is not in the table.

        Raises:
            InputError: the model was pruned by something the group's graph knows nothing of.
        """
        dep, idxs = group[0].dep, group[0].idxs
        direction = "in" if group._DG.is_in_channel_pruning_fn(dep.handler) else "out"
        owners = self.table.members_of(dep.target.module, direction)
        if not owners:
            return None
        alive = self._alive(group._DG)
        roots = torch.full((owners[0][1].width,), -1)
        for name, member in owners:
            present = alive[name][member.root_idxs]
            roots[member.idxs] = torch.where(present, member.root_idxs, torch.tensor(-2))
        roots = roots[roots != -2][torch.as_tensor(idxs, dtype=torch.long)]
        if len(owners) > 1 or (roots < 0).any():
            return None
        return owners[0][0], roots

    def _alive(self, graph: Any) -> dict[str, Tensor]:
        """Group name -> `[C]` bool, by replaying the tail of the graph's history."""
        history = graph.pruning_history()
        if self._cache is not None and self._cache[:2] == (id(graph), len(history)):
            return self._cache[2]
        missing = {}
        for name, group in self.table.groups.items():
            root = group.members[0]
            missing[name] = root.width - width_of(root.module, root.direction, graph)
        start = len(history)
        while any(missing.values()) and start > 0:
            start -= 1
            for name, gone in self._entry(history[start], None).items():
                missing[name] -= len(gone)
        if any(missing.values()):
            raise InputError(
                "Expected a model pruned only by the pruner that asks for scores, came one that "
                "something else pruned since the calibration. Call accumulate() again."
            )
        alive = {n: torch.ones(g.channels, dtype=torch.bool) for n, g in self.table.groups.items()}
        for entry in history[start:]:
            for name, gone in self._entry(entry, alive).items():
                alive[name][gone] = False
        self._cache = (id(graph), len(history), alive)
        return alive

    def _entry(
        self, entry: Any, alive: dict[str, Tensor] | None
    ) -> dict[str, Tensor]:
        """Group name -> table channels one history entry removed (their number, if not `alive`)."""
        layer, is_out, idxs = entry
        module = self._modules.get(layer)  # by then it may be gone, with its block
        if module is None:
            return {}
        gone: dict[str, Tensor] = {}
        owners = self.table.members_of(module, "out" if is_out else "in")
        if alive is None:
            return {owners[0][0]: torch.tensor(idxs, dtype=torch.long)} if owners else {}
        width = owners[0][1].width if owners else 0
        present = torch.ones(width, dtype=torch.bool)
        for name, member in owners:
            present[member.idxs] = alive[name][member.root_idxs]
        removed = torch.zeros(width, dtype=torch.bool)
        if width:
            removed[present.nonzero().flatten()[torch.tensor(idxs, dtype=torch.long)]] = True
        for name, member in owners:
            gone[name] = member.root_idxs[removed[member.idxs]]
        return gone
