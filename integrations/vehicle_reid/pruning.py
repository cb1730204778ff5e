"""What is taken out of the dense model: channels of the upload where asked, then of the edge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from settings import ReidRun

import patrol_prune as pp
from patrol_prune.errors import InputError
from patrol_prune.group_table import GroupTable, remove_channels


def pruned(
    config: ReidRun, split: pp.Split, budget: int, score: Callable[[pp.Split], Any]
) -> tuple[dict[str, tuple[int, int]], list[Any]]:
    """Prune the split; with `upload_channels` what it sends first, by scores of the whole model,
    then its edge to the budget by scores of what is left.

    Args:
        config: the settings.
        split: the dense model's.
        budget: multiply-adds of the edge, at most.
        score: gives an importance for the split as it is.

    Returns:
        Group -> (channels now, before), and Torch-Pruning's history of both.
    """
    sent: dict[str, tuple[int, int]] = {}
    if config.upload_channels is not None:
        whole = pruner_of(config, split, budget, score(split), boundary="prune")
        sent = narrow(split, whole, config.upload_channels)
        history = whole.table.graph.pruning_history()
        split.pruning_history = list(history)
    pruner = pruner_of(config, split, budget, score(split), boundary="keep")
    outcome = pruner.step()
    return {**sent, **outcome.kept}, list(split.pruning_history)


def notes(config: ReidRun) -> list[str]:
    """What the plan, which leaves the upload whole, does not tell."""
    return [] if config.upload_channels is None else [
        f"Of what is sent the pruned models keep {config.upload_channels} channels, those of the "
        "highest scores; the rest of the edge is pruned to the budget afterwards."]


def pruner_of(
    config: ReidRun, split: pp.Split, budget: int, importance: Any, *, boundary: str
) -> pp.PatrolPruner:
    return pp.PatrolPruner(
        split.model, split.example_inputs, importance, split=split, edge_macs=budget,
        boundary=boundary, max_pruning_ratio=config.score.max_pruning_ratio,
        min_channels=config.score.min_channels, round_to=config.score.round_to,
    )


def narrow(split: pp.Split, pruner: pp.PatrolPruner, channels: int) -> dict[str, tuple[int, int]]:
    """Leave so many channels of every group that crosses the split, those of the highest scores.

    Raises:
        InputError: nothing that crosses the split may shrink.
    """
    table, (scores, whole) = pruner.table, pruner.scores()
    sent = crossing(table, channels)
    kept_whole = {name: whole[name] for name in sent if name not in scores}
    if kept_whole:
        raise InputError("Expected channels of the upload that can be removed, came " + "; ".join(
            f"{name}: {why}" for name, why in kept_whole.items()) + ". Leave out upload_channels.")
    remove_channels(table, {name: scores[name].argsort(descending=True)[channels:]
                            for name in sent})
    split.refresh()
    return {name: (channels, before) for name, before in sent.items()}


def crossing(table: GroupTable, channels: int) -> dict[str, int]:
    """Channels of every group that crosses the split, where they are more than so many."""
    return {name: group.channels for name, group in table.groups.items()
            if group.crossing is not None and group.channels > channels}


def check_upload_channels(config: ReidRun, model: torch.nn.Module, example: torch.Tensor,
                          at: str) -> None:
    """Refuse, before any training, a number that leaves every channel of the upload.

    Raises:
        InputError: so many channels as there are, or more; or none that pruning can follow.
    """
    if config.upload_channels is None:
        return
    split = pp.Split(model, example, at=at)
    table = GroupTable.build(model, example, split=split)
    widths = [g.channels for g in table.groups.values() if g.crossing is not None]
    if not widths:
        raise InputError(f"Expected a cut where pruning can narrow the upload, came {at}: no "
                         "channel that crosses there can be followed. Leave out upload_channels.")
    if max(widths) <= config.upload_channels:
        raise InputError(
            f"Expected fewer upload_channels than the {max(widths)} that are sent after {at}, came "
            f"{config.upload_channels}. Give fewer, or leave it out to send all of them.")
