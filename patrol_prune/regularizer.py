"""Weight decay on the channels that the budget would remove, for sparse training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from patrol_prune.group_table import GroupTable


class ChannelDecay:
    """Adds `strength_c * w` to the gradient of every weight that produces channel c.

    That is the gradient of `sum_c strength_c / 2 * |w_c|^2` over the rows of convolutions and
    linear layers and the scales and shifts of batch normalisation.

    Args:
        table: the model's group table.
        strengths: group name -> `[C]` decay per channel, 0 = none.
    """

    def __init__(self, table: GroupTable, strengths: Mapping[str, Tensor]) -> None:
        per_layer: dict[int, tuple[nn.Module, Tensor]] = {}
        for name, strength in strengths.items():
            for member in table.groups[name].members:
                if member.direction not in ("out", "through"):
                    continue
                if isinstance(member.module, nn.MultiheadAttention):
                    continue
                fresh = (member.module, torch.zeros(member.width))
                _, rows = per_layer.setdefault(id(member.module), fresh)
                rows[member.idxs] = strength.cpu().float()[member.root_idxs]
        self._layers = [(m, s) for m, s in per_layer.values() if bool(s.any())]

    def __call__(self) -> None:
        """Add the decay to the gradients that exist."""
        with torch.no_grad():
            for i, (module, strength) in enumerate(self._layers):
                for name in ("weight", "bias"):
                    parameter = getattr(module, name, None)
                    if parameter is None or parameter.grad is None:
                        continue
                    if strength.device != parameter.device:
                        strength = strength.to(parameter.device)
                        self._layers[i] = (module, strength)
                    rows = as_weight(strength, module) if name == "weight" else strength
                    shape = (*rows.shape, *[1] * (parameter.dim() - rows.dim()))
                    parameter.grad.add_(parameter * rows.to(parameter.dtype).view(shape))


def as_weight(strength: Tensor, module: nn.Module) -> Tensor:
    """`[out]` as the first dimensions of the weight: `[in, out / groups]` where it is transposed.
    """
    if not getattr(module, "transposed", False):
        return strength
    groups, width = int(module.groups), int(module.in_channels)  # type: ignore[arg-type]
    return strength.view(groups, -1).repeat_interleave(width // groups, dim=0)
