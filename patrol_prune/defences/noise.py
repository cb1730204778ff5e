"""Additive noise on the uploaded feature, at inference as in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patrol_prune.defences.base import (
    Defence,
    calibration_features,
    check_at_least,
    sent_dtype,
    wrapped,
)
from patrol_prune.defences.randomness import RandomUpload
from patrol_prune.split import Split


class Noise(RandomUpload):
    """`z' = z + sigma * n`, with `n` independent per value, of mean 0 and variance 1.

    Args:
        kind: "gaussian" or "laplacian".
        seed: of the draws.

    Attributes:
        sigma: the standard deviation in units of `z`, a buffer; NaN until it is set.
    """

    sigma: Tensor

    def __init__(self, kind: str, seed: int) -> None:
        super().__init__(seed)
        self.kind = kind
        self.register_buffer("sigma", torch.tensor(float("nan")))

    def forward(self, z: Tensor) -> Tensor:
        """Features `[N, ...]` to noisy ones, of their type (`sent_dtype`)."""
        kind = sent_dtype(z)
        return (z if self.silent else z.float() + self._drawn(z)).to(kind)

    def _drawn(self, z: Tensor) -> Tensor:
        """Noise for features like `z`, float32."""
        generator, sigma = self.generator(z.device), self.sigma.float()
        if self.kind == "gaussian":
            return sigma * torch.randn(z.shape, generator=generator, device=z.device)
        # The difference of two exponentials is Laplacian, of variance 2.
        first, second = (torch.empty(z.shape, device=z.device).exponential_(generator=generator)
                         for _ in range(2))
        return sigma * 0.5**0.5 * (first - second)


def root_mean_square(z: Tensor) -> Tensor:
    """`sqrt(mean(z^2))` over all values, a scalar; the unit in which noise is given."""
    return z.double().square().mean().sqrt().to(z.dtype)


@dataclass(frozen=True)
class GaussianNoise(Defence):
    """Gaussian noise on `z`; with its sigma known, bounds on every attack exist (`bounds`).

    The absolute standard deviation is `sigma * root_mean_square(z)` with `z` the features of the
    calibration inputs, fixed at `apply` in the buffer `split.edge.upload.sigma`. Fine-tuning may
    scale the feature up against it; the strength that counts is what the audit meets.

    Source: the noise defence of He, Zhang and Lee, IEEE IoT-J 2020. Here it is relative to
    the feature, and on in training. It is not calibrated to a sensitivity: no differential privacy
    is claimed.

    Attributes:
        sigma: standard deviation relative to the feature's root mean square; more is stronger.
        seed: of the draws.
    """

    name: ClassVar[str] = "gaussian_noise"
    swept: ClassVar[str] = "sigma"
    kind: ClassVar[str] = "gaussian"

    sigma: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(self.sigma, 0.0, "sigma", type(self).__name__)

    def apply(self, split: Split, *, calibration: Tensor | None = None) -> Split:
        """See `Defence.apply`."""
        noise = Noise(self.kind, self.seed)
        if calibration is not None:
            noise.sigma.fill_(self.sigma * root_mean_square(
                calibration_features(split, calibration)).item())
        return wrapped(split, noise, by=self)


@dataclass(frozen=True)
class LaplacianNoise(GaussianNoise):
    """Laplacian noise on `z`, of the same standard deviation as `GaussianNoise` at that sigma.

    Its scale parameter is `b = sigma / sqrt(2)`. Source: Titcombe et al., Practical Defences
    Against Model Inversion Attacks for Split Neural Networks, ICLR DPML workshop 2021. The bounds
    of `bounds` are not for this noise.
    """

    name: ClassVar[str] = "laplacian_noise"
    kind: ClassVar[str] = "laplacian"
