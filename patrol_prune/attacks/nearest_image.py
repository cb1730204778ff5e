"""Answer with the attacker's own image whose feature is nearest: recognition, no reconstruction.

An attack that shows no more than this has only found out what kind of image it was. It costs one
query per image and cannot fail to train, which makes it a floor for every other attack.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patrol_prune.attacks.base import FitRecord, Knowledge, check_uploads_like
from patrol_prune.errors import InputError
from patrol_prune.metrics import check_pixels

_CHUNK = 256


@dataclass(frozen=True)
class NearestImageConfig:
    """Settings of `NearestImage`.

    Args:
        draws: queries per image where the edge is random; the mean of their features is kept.
        eps: floor of a coordinate's standard deviation, relative to the mean of all.
        seed: has no effect; nothing is drawn.
    """

    draws: int = 4
    eps: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.draws < 1 or not self.eps > 0.0:
            raise InputError(
                f"Expected at least one draw and a positive eps, came {self.draws}, {self.eps}."
            )


class NearestImage:
    """`x[argmin_i sum_d ((z_d - z_id) / std_d)^2]` over the attacker's images `i`.

    Each coordinate of the feature is divided by its standard deviation over the attacker's images,
    so that rescaling a channel changes nothing. Distances are computed in float64, as images of one
    kind may be far nearer to each other than to the mean of all.
    """

    def __init__(self, config: NearestImageConfig | None = None, *, device: str = "cpu") -> None:
        self.config = config or NearestImageConfig()
        self.device = torch.device(device)
        self._known: Knowledge | None = None
        self._mean = self._gain = torch.empty(0)

    def fit(self, known: Knowledge) -> FitRecord | None:
        """Remember the images and what the edge makes of them; nothing is trained.

        Features that `known.z` does not hold are queried again, part by part, when they are needed.

        Raises:
            InputError: no image, neither features nor an edge, or pixels outside [0, 1].
        """
        if len(known.pixels) == 0:
            raise InputError("Expected at least one image of the attacker's, came none.")
        check_pixels(known.pixels, "pixels")
        if known.edge is None:
            known.pairs()
        self._known = known
        total = squares = torch.zeros(())
        for part in self._index():
            z = self._features(part).double()
            total, squares = total + z.sum(0), squares + (z**2).sum(0)
        count = len(known.pixels)
        self._mean = total / count
        std = (squares / count - self._mean**2).clamp_min(0.0).sqrt()
        floor = self.config.eps * std.mean()
        gain = 1.0 / (std + floor)
        self._gain = torch.where(std > 0, gain, torch.zeros_like(gain)).float()
        self._mean = self._mean.float()
        return None

    @torch.no_grad()
    def reconstruct(self, z: Tensor) -> Tensor:
        """Features `[N, ...]` to images of the attacker's, `[N, C, H, W]`, on z's device."""
        if self._known is None:
            raise InputError("This attack has no images yet. Call fit(known) first.")
        check_uploads_like(z, self._mean.shape)
        wanted = z.to(self.device).float()
        best = torch.full((len(z),), torch.inf, dtype=torch.float64, device=self.device)
        choice = torch.zeros(len(z), dtype=torch.long, device=self.device)
        for part in self._index():
            own = self._scaled(self._features(part))
            distance, index = torch.cat([
                torch.cdist(self._scaled(some), own) for some in wanted.split(_CHUNK)
            ]).min(dim=1)
            closer = distance < best
            best = torch.where(closer, distance, best)
            choice = torch.where(closer, part.to(self.device)[index], choice)
        return self._known.pixels[choice.to(self._known.pixels.device)].float().to(z.device)

    def _index(self) -> tuple[Tensor, ...]:
        assert self._known is not None
        return torch.arange(len(self._known.pixels)).split(_CHUNK)

    def _scaled(self, z: Tensor) -> Tensor:
        return ((z.double() - self._mean) * self._gain).flatten(1)

    @torch.no_grad()
    def _features(self, part: Tensor) -> Tensor:
        known = self._known
        assert known is not None
        if known.edge is None or (known.z is not None and not known.random_edge):
            assert known.z is not None
            return known.z[part.to(known.z.device)].to(self.device).float()
        pixels = known.pixels[part.to(known.pixels.device)]
        draws = self.config.draws if known.random_edge else 1
        z = known.edge(pixels).float()
        for _ in range(draws - 1):
            z = z + known.edge(pixels).float()
        return (z / draws).to(self.device)
