"""Defences that are training alone: nothing is put behind the edge."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch.nn import functional as F

from patrol_prune.defences.base import Adversary, Defence, check_at_least
from patrol_prune.lipschitz import LipschitzForm
from patrol_prune.objective import PatrolObjective, TaskLoss
from patrol_prune.pixels import Normalization
from patrol_prune.split import Split


@dataclass(frozen=True)
class Trained(Defence):
    """No defence: the split is fine-tuned for its task, as all others are; a sweep's baseline."""

    name: ClassVar[str] = "none"


@dataclass(frozen=True)
class Patrol(Defence):
    """PATROL's fine-tuning, `L_task + sum_i alpha k_i - beta L_adv`, on a split already pruned.

    Its other half is which channels were pruned, which is not the business of `apply`. Source:
    Ding et al., PATROL, WACV 2024.

    Attributes:
        alpha: weight of each block's Lipschitz constant; it hid nothing wherever it was measured.
        beta: weight of the adversarial error; more is stronger.
        lipschitz_form: "paper", "scale_free" or "spectral", see `PatrolObjective`.
        adversary: the attackers inside.
    """

    name: ClassVar[str] = "patrol"
    swept: ClassVar[str] = "beta"

    alpha: float = 0.0
    beta: float = 10.0
    lipschitz_form: LipschitzForm = "scale_free"
    adversary: Adversary = field(default_factory=Adversary)

    def __post_init__(self) -> None:
        check_at_least(self.alpha, 0.0, "alpha", "Patrol")
        check_at_least(self.beta, 0.0, "beta", "Patrol")

    def objective(
        self,
        split: Split,
        *,
        normalization: Normalization | None = None,
        seed: int = 0,
        task_loss: TaskLoss = F.cross_entropy,
    ) -> PatrolObjective:
        """See `Defence.objective`."""
        return self.adversary.objective(split, task_loss, alpha=self.alpha, beta=self.beta,
                                        lipschitz_form=self.lipschitz_form,
                                        normalization=normalization, seed=seed)


@dataclass(frozen=True)
class AdversarialOnly(Defence):
    """Adversarial training alone, `L_task - beta L_adv`, with the surrogates of this package.

    Source: Xiao et al., Adversarial Learning of Privacy-Preserving and Task-Oriented
    Representations, AAAI 2020; the attackers inside are stronger here (several, and the best of
    them per image counts, on standardised features).

    Attributes:
        beta: weight of the adversarial error; more is stronger.
        adversary: the attackers inside.
    """

    name: ClassVar[str] = "adversarial_only"
    swept: ClassVar[str] = "beta"

    beta: float = 10.0
    adversary: Adversary = field(default_factory=Adversary)

    def __post_init__(self) -> None:
        check_at_least(self.beta, 0.0, "beta", type(self).__name__)

    def objective(
        self,
        split: Split,
        *,
        normalization: Normalization | None = None,
        seed: int = 0,
        task_loss: TaskLoss = F.cross_entropy,
    ) -> PatrolObjective:
        """See `Defence.objective`."""
        return self.adversary.objective(split, task_loss, beta=self.beta,
                                        normalization=normalization, seed=seed)
