"""Whitened features: uncorrelated channels, so that what a feature says faintly counts too."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from patrol_prune.decoders import FeatureStandardizer
from patrol_prune.errors import InputError

MOST_CHANNELS = 2_048
"""With more of them, features are standardised alone: the matrix has the square of it."""
_FLOOR = 1e-8


class FeatureWhitener(FeatureStandardizer):
    """Standardised channels made uncorrelated, `W (z - mean) / std`: ZCA whitening.

        W = V diag(((lambda + eps mean(lambda)) / (1 + eps)) ** -1/2) V^T,    R = V diag(lambda) V^T

    with `R` the correlation matrix of the channels over images and places. A network's features
    have a few strong directions; what else they say of the picture lies in faint ones, which a
    decoder of standardised channels learns last. An invertible mix of the channels changes the
    whitened ones by a rotation alone, but for `eps`.

    `eps = max(1e-8, (channels / samples)^4)`, a sample being one place of one image: directions
    that so few samples cannot tell from nothing are left faint. A feature of more than
    `MOST_CHANNELS` channels is standardised alone.

    Args:
        feature_shape: the feature's shape without the batch.
        dim: as of `FeatureStandardizer`.

    Attributes:
        matrix: `W`, `[C, C]`.
    """

    matrix: Tensor

    def __init__(self, feature_shape: tuple[int, ...], *, dim: int | None = None) -> None:
        super().__init__(feature_shape, dim=dim)
        channels = len(self.mean)
        self.whitens = channels <= MOST_CHANNELS
        self.register_buffer("matrix", torch.eye(channels if self.whitens else 0))

    @torch.no_grad()
    def fit(self, z: Tensor | Iterable[Tensor]) -> FeatureWhitener:
        """Take the exact statistics of `z [N, *feature_shape]`, or of parts, each read once."""
        parts = [z] if isinstance(z, Tensor) else z
        if not self.whitens:
            super().fit(parts)
            return self
        count, mean, scatter = self._moments(parts)
        self._set(mean, scatter.diagonal() / count)
        gain = self.gain().to(scatter)  # features may lie on another device
        eigenvalues, vectors = torch.linalg.eigh(scatter / count * gain * gain.unsqueeze(1))
        eigenvalues = eigenvalues.clamp_min(0.0)
        eps = max(_FLOOR, (len(gain) / count) ** 4)
        floor = (eps * eigenvalues.mean()).clamp_min(torch.finfo(torch.float32).tiny)
        gains = torch.rsqrt((eigenvalues + floor) / (1.0 + eps))
        whitening = (vectors * gains) @ vectors.T
        self.matrix.copy_(whitening * (gain > 0))
        return self

    def update(self, z: Tensor, momentum: float = 0.1) -> FeatureWhitener:
        """Refused: running statistics of one batch say little of faint directions. Use `fit`."""
        raise InputError("Expected FeatureWhitener.fit with all features, came update. A batch "
                         "alone does not tell how faint directions vary.")

    def _within(self, values: Tensor, centre: Tensor) -> Tensor:
        """Of one part, the scatter matrix of its channels about their means, `[C, C]`."""
        if not self.whitens:
            return super()._within(values, centre)
        rows = values.movedim(self.dim, -1).flatten(0, -2) - centre
        return rows.T @ rows

    def _square(self, step: Tensor) -> Tensor:
        return torch.outer(step, step) if self.whitens else super()._square(step)

    def forward(self, z: Tensor) -> Tensor:
        """`z [N, *feature_shape]` whitened; gradients flow to `z`, not to the statistics."""
        standard = super().forward(z)
        if not self.whitens:
            return standard
        turned = standard.movedim(self.dim, -1) @ self.matrix.to(standard.dtype)
        return turned.movedim(-1, self.dim)
