"""The attackers inside training: several decoders side by side, the strongest counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patrol_prune.decoders import FeatureStandardizer, channel_dim, make_decoder
from patrol_prune.errors import InputError
from patrol_prune.precision import autocast


@dataclass(frozen=True)
class SurrogateSpec:
    """One surrogate's architecture: the arguments of `make_decoder`."""

    family: str
    width: int
    depth: int = 2


DEFAULT_SURROGATES = (
    SurrogateSpec("residual", width=32, depth=2),
    SurrogateSpec("transposed", width=48),
)


class SurrogateEnsemble(nn.Module):
    """Decoders of different shape, trained to reconstruct `x` from what the edge uploads.

    They see standardised features, so that scaling `z` hides nothing. What counts is the error of
    the best of them per image, at most that of the mean image: beyond it nothing is more private.

        L_adv(x) = min( min_s ||x - d_s(z)||^2 / n,  ||x - mean image||^2 / n )

    with `n` the number of pixel values, pixels on [0, 1].

    Args:
        feature_shape: of `z`, without the batch.
        image_shape: `(channels, height, width)`.
        specs: at least two of different shape are worth their cost; one is allowed.
        lr: of Adam, which trains every surrogate.
        seed: of the initial weights.
    """

    mean_image: Tensor
    seen: Tensor

    def __init__(
        self,
        feature_shape: tuple[int, ...],
        image_shape: tuple[int, int, int],
        specs: Sequence[SurrogateSpec] = DEFAULT_SURROGATES,
        *,
        lr: float = 2e-3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not specs:
            raise InputError("Expected at least one surrogate, came none. Leave beta at 0 instead.")
        self.feature_shape, self.image_shape = tuple(feature_shape), image_shape
        self.specs, self.lr, self.seed = tuple(specs), lr, seed
        self.decoders = nn.ModuleList(
            make_decoder(
                spec.family, feature_shape, image_shape,
                width=spec.width, depth=spec.depth, seed=seed + index,
            )
            for index, spec in enumerate(specs)
        )
        dim = channel_dim(tuple(feature_shape), image_shape)
        self.standardizer = FeatureStandardizer(tuple(feature_shape), dim=dim)
        self.register_buffer("mean_image", torch.full(image_shape, 0.5))
        self.register_buffer("seen", torch.tensor(0.0))
        self.optimizer = torch.optim.Adam(self.decoders.parameters(), lr=lr)

    def errors(self, z: Tensor, pixels: Tensor, *, precision: str = "auto") -> Tensor:
        """Squared error per surrogate and image, shape `[S, B]`, in squared pixel units."""
        if z.dim() == 4:  # one layout whatever came: faster, and the same bits after a resume
            z = z.contiguous(memory_format=torch.channels_last)
        with autocast(z.device, precision):
            standard = self.standardizer(z)
            guesses = [decoder(standard) for decoder in self.decoders]
        return torch.stack(
            [(guess.float() - pixels).square().flatten(1).mean(1) for guess in guesses]
        )

    def strongest(self, z: Tensor, pixels: Tensor, *, precision: str = "auto") -> Tensor:
        """`L_adv` per image, shape `[B]`; gradients flow to `z`, never to the decoders."""
        trainable = [p for p in self.decoders.parameters() if p.requires_grad]
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            errors = self.errors(z, pixels, precision=precision)
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)
        ceiling = (self.mean_image - pixels).square().flatten(1).mean(1)
        return torch.minimum(errors.min(0).values, ceiling)

    def observe(self, z: Tensor, pixels: Tensor) -> None:
        """Move the feature statistics and the mean image towards this batch."""
        self.standardizer.update(z.detach())
        weight = max(len(pixels) / (float(self.seen) + len(pixels)), 0.001)
        self.mean_image.lerp_(pixels.mean(0), weight)
        self.seen += len(pixels)

    def step(self, z: Tensor, pixels: Tensor, *, precision: str = "auto") -> Tensor:
        """One training step of every surrogate; returns the mean error of each, shape `[S]`."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            errors = self.errors(z.detach(), pixels, precision=precision).mean(1)
            errors.sum().backward()
        self.optimizer.step()
        return errors.detach()
