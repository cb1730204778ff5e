"""NoPeek: training that makes features say little about distances between images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from patrol_prune.defences.base import Defence, check_at_least
from patrol_prune.errors import InputError
from patrol_prune.objective import ObjectiveTerms, PatrolObjective, TaskLoss
from patrol_prune.pixels import Normalization
from patrol_prune.split import Split

if TYPE_CHECKING:
    from patrol_prune.masks import SoftMasks

_TINY = 1e-12
_CANCELLED = 1e-6  # of the sum of two squared norms; what is left of it is rounding


def distance_correlation(x: Tensor, z: Tensor) -> Tensor:
    """Distance correlation of two samples, a scalar in [0, 1].

        dCor = sqrt( dCov^2(x, z) / sqrt( dCov^2(x, x) dCov^2(z, z) ) ),
        dCov^2(x, z) = mean_jk A_jk B_jk,

    with `A` and `B` the matrices of Euclidean distances, centred by rows and columns. 1 for
    isometric samples. This V-statistic is biased upward for few samples of many dimensions; 0 is
    returned where one of the samples is constant.

    Args:
        x: `[B, ...]`.
        z: `[B, ...]`.

    Source: Szekely, Rizzo and Bakirov, Annals of Statistics 35(6), 2007.
    """
    if len(x) != len(z) or len(x) < 2:
        raise InputError(
            f"Expected two samples of equal size, at least 2, came {len(x)} and {len(z)}."
        )
    a, b = _centred_distances(x), _centred_distances(z)
    variances = (a.square().mean() * b.square().mean()).clamp(min=_TINY**2).sqrt()
    return ((a * b).mean() / variances).clamp(min=_TINY).sqrt()


def _centred_distances(values: Tensor) -> Tensor:
    flat = values.flatten(1).float()
    with torch.autocast(flat.device.type, enabled=False):
        # Neither a shift nor a scale changes the result; both keep the arithmetic well-conditioned.
        flat = flat - flat.mean(0).detach()
        flat = flat / flat.detach().square().mean().sqrt().clamp(min=_TINY)
        norms = flat.square().sum(1)
        both = norms[:, None] + norms[None, :]
        squared = both - 2.0 * flat @ flat.T
    apart = squared > _CANCELLED * both.detach()  # the diagonal and equal rows are not
    # sqrt has no gradient at 0: those entries are replaced before it and taken out behind it.
    distances = squared.where(apart, torch.ones_like(squared)).sqrt() * apart
    return (distances - distances.mean(0, keepdim=True) - distances.mean(1, keepdim=True)
            + distances.mean())


@dataclass
class PenalisedTerms(ObjectiveTerms):
    """An objective's terms with one more, `penalty`, unweighted; `total` holds it weighted."""

    penalty: Tensor


class NoPeekObjective(PatrolObjective):
    """`L_task + weight * dCor(pixels, z)`.

    Args:
        split: the cut model.
        task_loss: `task_loss(logits, y) -> scalar`.
        weight: of the distance correlation.
        **settings: `PatrolObjective`'s.
    """

    def __init__(self, split: Split, task_loss: TaskLoss, weight: float, **settings: Any) -> None:
        super().__init__(split, task_loss, **settings)
        self.weight = float(weight)

    def settings(self) -> dict[str, Any]:
        """See `PatrolObjective.settings`."""
        return {**super().settings(), "weight": self.weight}

    def terms(
        self, x: Tensor, y: Tensor, *, masks: SoftMasks | None = None, beta_scale: float = 1.0
    ) -> PenalisedTerms:
        """See `PatrolObjective.terms`."""
        terms = super().terms(x, y, masks=masks, beta_scale=beta_scale)
        if len(x) < 2:  # a last batch of one image: no distances
            return PenalisedTerms(**vars(terms), penalty=terms.total.detach() * 0.0)
        penalty = distance_correlation(self.normalization.to_pixels(x), terms.z)
        total = terms.total + self.weight * penalty
        return PenalisedTerms(**{**vars(terms), "total": total}, penalty=penalty)


@dataclass(frozen=True)
class NoPeek(Defence):
    """Distance correlation between images and features is trained down beside the task.

    Source: Vepakomma et al., NoPeek: Information leakage reduction to share activations in
    distributed deep learning, ICDM workshops 2020.

    Attributes:
        weight: of the distance correlation beside the task loss of weight 1; more is stronger.
        precision: "auto", "fp32" or "bf16" arithmetic of edge and cloud.
    """

    name: ClassVar[str] = "nopeek"
    swept: ClassVar[str] = "weight"

    weight: float = 1.0
    precision: str = "auto"

    def __post_init__(self) -> None:
        check_at_least(self.weight, 0.0, "weight", "NoPeek")

    def objective(
        self,
        split: Split,
        *,
        normalization: Normalization | None = None,
        seed: int = 0,
        task_loss: TaskLoss = F.cross_entropy,
    ) -> NoPeekObjective:
        """See `Defence.objective`."""
        return NoPeekObjective(split, task_loss, self.weight, normalization=normalization,
                               precision=self.precision, seed=seed)
