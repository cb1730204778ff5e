"""What is taken out of the dense model: channels of the upload where asked, then of the edge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch_pruning as tp
from settings import ReidRun
from torch import nn

import patrol_prune as pp


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
        kept = narrowing(config, split, score(split)).step().kept
        sent = {name: widths for name, widths in kept.items() if widths[0] < widths[1]}
    pruner = pp.PatrolPruner(
        split.model, split.example_inputs, score(split), split=split,
        edge_macs=min(budget, pp.edge_macs(split)),
        max_pruning_ratio=config.score.max_pruning_ratio,
        min_channels=config.score.min_channels, round_to=config.score.round_to,
    )
    return {**sent, **pruner.step().kept}, list(split.pruning_history)


def narrowing(config: ReidRun, split: pp.Split, importance: Any) -> pp.PatrolPruner:
    """What leaves `upload_channels` of the channels that are sent, and all others."""
    return pp.PatrolPruner(
        split.model, split.example_inputs, importance, split=split, edge_macs=1.0,
        boundary="prune", feature_channels=config.upload_channels)


def notes(config: ReidRun) -> list[str]:
    """What the plan, which leaves the upload whole, does not tell."""
    return [] if config.upload_channels is None else [
        f"Of what is sent the pruned models keep {config.upload_channels} channels (all, where "
        "they are no more), those of the highest scores; the rest of the edge is pruned to the "
        "budget afterwards."]


def check_upload_channels(
    config: ReidRun, model: nn.Module, example: torch.Tensor, at: str
) -> None:
    """Refuse, before any training, a cut where the upload cannot be narrowed so.

    Raises:
        InputError: no channel that crosses there can go.
    """
    if config.upload_channels is not None:
        narrowing(config, pp.Split(model, example, at=at),
                  tp.importance.GroupMagnitudeImportance()).choose()
