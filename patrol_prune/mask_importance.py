"""The size of a learned mask as a Torch-Pruning importance."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from patrol_prune._tp import Importance
from patrol_prune.errors import InputError
from patrol_prune.given import check_kind
from patrol_prune.masks import SoftMasks
from patrol_prune.survivors import SurvivorTracker


class MaskImportance(Importance):  # type: ignore[misc]
    """Scores by the size of the masks as they are now, `I_s = |m_s|` (docs/method.md, choice 13).

    A channel whose mask is zero scores exactly 0 and goes first; after `fold_masks` its removal
    changes no output, and neither does leaving it where the budget has room. The scores are a
    copy: fold the masks afterwards. Groups that a layer normalises over (`SoftMasks.normalised`)
    are neither learned nor folded, and have no score.

    Args:
        masks: of the model at its present widths.

    Attributes:
        scores: group name -> `[C]`.
        block_scores: block name -> the size of its mask, for `PatrolPruner(..., structures=...)`.

    Example::

        importance = MaskImportance(learned.masks)
        fold_masks(learned.masks)
        PatrolPruner(model, x, importance, split=split, edge_macs=learned.edge_macs).step()
    """

    def __init__(self, masks: SoftMasks) -> None:
        check_kind(masks, "masks", SoftMasks, "Give SoftMasks, of learned masks their .masks.")
        self.scores: dict[str, Tensor] = {
            name: mask.detach().abs().clone()
            for name, mask in masks.channels.items()
            if name not in masks.normalised
        }
        self.block_scores: dict[str, float] = {
            name: float(mask.detach().abs()) for name, mask in masks.blocks.items()
        }
        self.blocks = bool(self.block_scores)
        self._tracker = SurvivorTracker(masks.table)
        self._stale: str | None = None

    def mark_stale(self, reason: str) -> None:
        """Refuse to score from here on; a pruner says so after its last step."""
        self._stale = reason

    def __call__(self, group: Any) -> Tensor | None:
        """One score per channel of the group's root, or None for a group without a mask.

        Raises:
            InputError: the model was changed by something that the group's graph does not know.
        """
        if self._stale is not None:
            raise InputError(f"The masks are stale: {self._stale}. Learn new ones.")
        located = self._tracker.locate(group)
        if located is None or located[0] not in self.scores:
            return None
        name, roots = located
        return self.scores[name][roots.to(self.scores[name].device)]
