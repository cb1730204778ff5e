"""Which black-box answer a white-box attack begins at."""

from __future__ import annotations

import torch
from torch import Tensor

from patrol_prune.attacks import Attack, Knowledge
from patrol_prune.metrics import mse

_IMAGES = 256


class WarmStarts:
    """The best trained attack of each seed, by how near it comes to the attacker's own images.

    Losses do not tell it, where one attack's is MSE and another's has SSIM in it. All are measured
    by the squared error on images that they did not learn from, divided by the mean image's on the
    same: each attack's held-out images, or evenly spaced ones of one that does not tell which.

    Args:
        known: what the attacker has.
        mean_image: of his images, `[C, H, W]`.
    """

    def __init__(self, known: Knowledge, mean_image: Tensor) -> None:
        self.known, self.mean_image = known, mean_image
        self._best: dict[int, tuple[float, Attack]] = {}

    def offer(self, seed: int, attack: Attack) -> None:
        """Keep the attack if it is the best of its seed."""
        error = self._error(attack)
        if seed not in self._best or error < self._best[seed][0]:
            self._best[seed] = error, attack

    def of(self, seed: int) -> Attack | None:
        """The best of that seed, so that seeds differ as attackers do; else the best of all."""
        if not self._best:
            return None
        return min([self._best[seed]] if seed in self._best else self._best.values(),
                   key=lambda pair: pair[0])[1]

    @torch.no_grad()
    def _error(self, attack: Attack) -> float:
        pixels = self.known.pixels
        held_out: Tensor | None = getattr(attack, "held_out", None)
        if held_out is None:
            held_out = torch.linspace(0, len(pixels) - 1, min(_IMAGES, len(pixels))).long()
        held_out = held_out[:_IMAGES].cpu()
        x = pixels[held_out]
        if self.known.z is None:
            assert self.known.edge is not None
            z = torch.cat([self.known.edge(part) for part in x.split(64)])
        else:
            z = self.known.z[held_out]
        floor = float(mse(x, self.mean_image.expand_as(x)).mean())
        return float(mse(x, attack.reconstruct(z).to(x)).mean()) / max(floor, 1e-12)
