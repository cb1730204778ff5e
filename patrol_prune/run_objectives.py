"""The objectives of a run: the one that channels are scored by, and the one it trains with; and
that training."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from patrol_prune.finetune import FinetuneConfig, finetune
from patrol_prune.objective import PatrolObjective
from patrol_prune.pixels import Normalization
from patrol_prune.preparation import Images, private_regions, training_batches
from patrol_prune.settings import RunConfig
from patrol_prune.split import Split


def scoring_objective(
    config: RunConfig, split: Split, normalization: Normalization
) -> PatrolObjective:
    """The objective with every term on that is scored; the score normalises each by itself."""
    score, privacy = config.score, config.privacy
    return PatrolObjective(
        split, F.cross_entropy,
        alpha=(privacy.alpha or 1.0) if score.lip_weight else 0.0,
        beta=(privacy.beta or 1.0) if score.adv_weight else 0.0,
        noise_std=privacy.noise_std, lipschitz_form=privacy.lipschitz_form,
        surrogates=privacy.surrogates, surrogate_loss=privacy.surrogate_loss,
        private=private_regions(config), normalization=normalization, seed=config.seed,
    )


def training_objective(
    config: RunConfig, split: Split, normalization: Normalization, precision: str
) -> PatrolObjective:
    """The objective that the model is fine-tuned with, in that precision."""
    privacy = config.privacy
    return PatrolObjective(
        split, F.cross_entropy, alpha=privacy.alpha, beta=privacy.beta,
        noise_std=privacy.noise_std, lipschitz_form=privacy.lipschitz_form,
        surrogates=privacy.surrogates, surrogate_loss=privacy.surrogate_loss,
        private=private_regions(config), normalization=normalization, seed=config.seed + 1,
        precision=precision,
    )


def fine_tuned(
    config: RunConfig, images: Images, split: Split, how: FinetuneConfig, *, teacher: nn.Module,
    offset: int, kept: Path | None, bars: bool, device: torch.device,
) -> list[dict[str, float]]:
    """Fine-tune with the privacy terms on, resumed from the epochs that are `kept`; its history.

    Args:
        config: of the run.
        images: of the run.
        split: as it uploads.
        how: the training.
        teacher: the dense model.
        offset: of the seed by which batches are drawn.
        kept: the folder of epochs; None keeps none.
        bars: show progress bars.
        device: where to train.
    """
    return finetune(
        split, training_batches(config, images, augment=True, offset=offset),
        objective=training_objective(config, split, images.normalization, how.precision),
        config=how, teacher=teacher, checkpoint_dir=kept, resume=kept is not None, progress=bars,
        device=device,
    ).history
