"""The model before its training, and where it is cut."""

from __future__ import annotations

import torch
from pictures import Everybody
from pruning import check_upload_channels
from settings import ReidRun
from torch import nn

import patrol_prune as pp
from patrol_prune.models import build_model, load_weights
from patrol_prune.reid_model import add_bnneck


def model_of(config: ReidRun, people: Everybody) -> nn.Module:
    """The model before its training; its weights from the file where one is named."""
    identities = len(people.defender.classes)
    if config.weights is None:
        return pp.build_reid_model(config.model, identities, image_size=config.image_size,
                                   seed=config.seed)
    model = build_model(config.model, identities, image_size=config.image_size, seed=config.seed)
    load_weights(model, config.weights)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return add_bnneck(model, identities)


def planned(config: ReidRun, people: Everybody) -> pp.Plan:
    """Where the model is cut and how far its edge is pruned.

    Raises:
        PatrolError: no such place, or a budget that cannot be met there.
    """
    model = model_of(config, people)
    made = pp.plan(
        model, people.example(), edge_macs=config.edge_macs, at=config.at,
        boundary="keep", max_pruning_ratio=config.score.max_pruning_ratio,
        min_channels=config.score.min_channels, round_to=config.score.round_to,
    )
    check_upload_channels(config, model, people.example(), made.recommended)
    return made
