"""The attackers inside training: several decoders side by side, the strongest counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patrol_prune.decoders import FAMILIES, FeatureStandardizer, channel_dim, make_decoder
from patrol_prune.errors import InputError, nearest
from patrol_prune.given import check_among, check_count, check_number, share_outside
from patrol_prune.lipschitz import frozen_statistics
from patrol_prune.metrics import SSIM_SIDE, ssim_values
from patrol_prune.precision import autocast
from patrol_prune.regions import PrivateRegions, check_regions

SURROGATE_LOSSES = ("auto", "mse", "mse+ssim")
SSIM_WEIGHT = 0.1
"""`"mse+ssim"` is `MSE + SSIM_WEIGHT * (1 - SSIM)`; the mean image's is about 0.06 + 0.08."""

FEW_OUTSIDE = 0.05
"""The share of pixels outside of [0, 1] beyond which they are taken for something else."""
_MEMORY = 0.98


@dataclass(frozen=True)
class SurrogateSpec:
    """One surrogate's architecture, as `make_decoder` takes it.

    Attributes:
        family: "residual", "transposed" or "unet".
        width: channels of the decoder's trunk.
        depth: its residual blocks; "transposed" has none.

    Raises:
        InputError: an unknown family, or a size that is no whole number in its range.
    """

    family: str
    width: int
    depth: int = 2

    def __post_init__(self) -> None:
        check_among(self.family, "a surrogate's family", FAMILIES)
        check_count(self.width, "a surrogate's width", 1)
        check_count(self.depth, "a surrogate's depth", 0)


DEFAULT_SURROGATES = (
    SurrogateSpec("residual", width=32, depth=2),
    SurrogateSpec("transposed", width=48),
)

SURROGATE_SETS: dict[str, tuple[SurrogateSpec, ...]] = {
    "usual": DEFAULT_SURROGATES,
    "large": (
        SurrogateSpec("residual", width=48, depth=4),
        SurrogateSpec("unet", width=32, depth=4),
        SurrogateSpec("transposed", width=48),
    ),
}
"""Ensembles by name. The large one costs several times as much."""


def reconstruction_error(
    pixels: Tensor, guess: Tensor, loss: str = "mse", weights: Tensor | None = None
) -> Tensor:
    """How far `guess` is from `pixels`, per image, shape `[B]`, differentiable.

    `"mse"`: `||x - g||^2 / n`, with `n` the number of pixel values. `"mse+ssim"`: that, and
    `SSIM_WEIGHT * (1 - SSIM(x, g))`: near the mean image MSE alone teaches a decoder little.
    Both are means over pixels, which count as much as their weights say.

    Args:
        pixels: images `[B, C, H, W]` on [0, 1]; at least 11 pixels a side for SSIM.
        guess: their reconstructions.
        loss: which of the two.
        weights: `[B, 1, H, W]`, of mean 1 over each image, as `PrivateRegions.weights` gives them.
    """
    squares = (guess - pixels).square()
    error = (squares if weights is None else squares * weights).flatten(1).mean(1)
    if loss == "mse":
        return error
    return error + SSIM_WEIGHT * (1.0 - ssim_values(pixels, guess, weights))


class SurrogateEnsemble(nn.Module):
    """Decoders of different shape, trained to reconstruct `x` from what the edge uploads.

    They see standardised features, so that scaling `z` hides nothing. What counts is the error of
    the best of them per image, at most that of the mean image: beyond it nothing is more private::

        L_adv(x) = min( min_s e(x, d_s(z)),  e(x, mean image) )

    with `e` the mean squared error of pixels on [0, 1], plus `0.1 (1 - SSIM)` for "mse+ssim". Where
    `private` is given, `e` is weighted as it says, for the model and for the decoders.

    Args:
        feature_shape: of `z`, without the batch.
        image_shape: `(channels, height, width)`.
        specs: at least two of different shape are worth their cost; one is allowed.
        lr: of Adam, which trains every surrogate.
        loss: "mse", the paper's; "mse+ssim", whose decoders see more; "auto" takes the latter
            for images of at least 11 pixels a side.
        seed: of the initial weights.
        private: where errors count more.

    Attributes:
        running: `[S]`, each surrogate's recent training error; infinite before its first step.

    Raises:
        InputError: no surrogate, an unknown family or loss, or SSIM on smaller images.
    """

    mean_image: Tensor
    seen: Tensor
    running: Tensor
    renewals: Tensor

    def __init__(
        self,
        feature_shape: tuple[int, ...],
        image_shape: tuple[int, int, int],
        specs: Sequence[SurrogateSpec] = DEFAULT_SURROGATES,
        *,
        lr: float = 2e-3,
        loss: str = "auto",
        seed: int = 0,
        private: PrivateRegions | None = None,
    ) -> None:
        super().__init__()
        check_regions(private)
        self.private = private
        specs = checked_specs(specs, lr, loss)
        self.loss = _chosen_loss(loss, image_shape)
        self.feature_shape, self.image_shape = tuple(feature_shape), image_shape
        self.specs, self.lr, self.seed = specs, lr, seed
        self.decoders = nn.ModuleList(
            self._fresh(index, seed + index) for index in range(len(self.specs))
        )
        dim = channel_dim(tuple(feature_shape), image_shape)
        self.standardizer = FeatureStandardizer(tuple(feature_shape), dim=dim)
        self.register_buffer("mean_image", torch.full(image_shape, 0.5))
        self.register_buffer("seen", torch.tensor(0.0))
        self.register_buffer("running", torch.full((len(self.specs),), float("inf")))
        self.register_buffer("renewals", torch.tensor(0))
        self.optimizer = torch.optim.Adam(self.decoders.parameters(), lr=lr)

    @property
    def is_fitted(self) -> bool:
        """Whether they have taken a step, or hold the weights of such that have."""
        return bool(self.optimizer.state) or bool(self.seen > 0)

    def move(self, device: torch.device) -> None:
        """Put the decoders and their optimiser's moments there."""
        if self.mean_image.device == device:
            return
        self.to(device)
        for moments in self.optimizer.state.values():
            for name, value in moments.items():
                if isinstance(value, Tensor) and name != "step":
                    moments[name] = value.to(device)

    def guesses(self, z: Tensor, *, precision: str = "auto") -> list[Tensor]:
        """What each surrogate makes of `z`: S tensors `[B, C, H, W]`, float32 on (0, 1)."""
        if z.dim() == 4:  # one layout whatever came: faster, and the same bits after a resume
            z = z.contiguous(memory_format=torch.channels_last)
        with autocast(z.device, precision):
            standard = self.standardizer(z)
            return [decoder(standard).float() for decoder in self.decoders]

    def errors(self, z: Tensor, pixels: Tensor, *, precision: str = "auto") -> Tensor:
        """`e` per surrogate and image, shape `[S, B]`; `pixels` are `[B, C, H, W]` on [0, 1]."""
        return self._errors(z, pixels, self._weights(pixels), precision)

    def _errors(
        self, z: Tensor, pixels: Tensor, weights: Tensor | None, precision: str
    ) -> Tensor:
        return torch.stack([
            reconstruction_error(pixels, guess, self.loss, weights)
            for guess in self.guesses(z, precision=precision)
        ])

    def _weights(self, pixels: Tensor) -> Tensor | None:
        return None if self.private is None else self.private.weights(pixels)

    def strongest(self, z: Tensor, pixels: Tensor, *, precision: str = "auto") -> Tensor:
        """`L_adv` per image, shape `[B]`; gradients flow to `z`, never to the decoders.

        As in `step`, a batch is normalised together, so that an image's value depends on the others
        (in training mode). The decoders' running statistics stay as they are.
        """
        weights = self._weights(pixels)
        trainable = [p for p in self.decoders.parameters() if p.requires_grad]
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            with frozen_statistics(self.decoders):
                errors = self._errors(z, pixels, weights, precision)
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)
        mean = self.mean_image.expand_as(pixels)
        ceiling = reconstruction_error(pixels, mean, self.loss, weights)
        return torch.minimum(errors.min(0).values, ceiling)

    @torch.no_grad()
    def believed(self, z: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """`(mse [B], ssim [B])`: what the surrogate with the smallest `e` on an image gets there.

        Both are of the whole image, whatever is private. In float32 and in evaluation mode, as an
        attacker would use the decoders. SSIM is NaN for images of under 11 pixels a side.
        """
        modes = [decoder.training for decoder in self.decoders]
        self.decoders.eval()
        try:
            guesses = self.guesses(z, precision="fp32")
        finally:
            for decoder, mode in zip(self.decoders, modes, strict=True):
                decoder.train(mode)
        weights = self._weights(pixels)
        errors = torch.stack([reconstruction_error(pixels, g, self.loss, weights)
                              for g in guesses])
        best = errors.argmin(0)
        guess = torch.stack(guesses)[best, torch.arange(len(z), device=z.device)]
        mse = reconstruction_error(pixels, guess)
        small = min(self.image_shape[1:]) < SSIM_SIDE
        return mse, torch.full_like(mse, float("nan")) if small else ssim_values(pixels, guess)

    def observe(self, z: Tensor, pixels: Tensor) -> None:
        """Move the feature statistics and the mean image towards this batch."""
        self.standardizer.update(z.detach())
        weight = max(len(pixels) / (float(self.seen) + len(pixels)), 0.001)
        self.mean_image.lerp_(pixels.mean(0), weight)
        self.seen += len(pixels)

    def step(self, z: Tensor, pixels: Tensor, *, precision: str = "auto") -> Tensor:
        """One training step of every surrogate; returns the mean error of each, shape `[S]`.

        Raises:
            InputError: at the first step, pixels of which many lie outside of [0, 1].
        """
        if not self.optimizer.state and (share := share_outside(pixels)) > FEW_OUTSIDE:
            raise InputError(
                f"Expected pixels on [0, 1], came {100 * share:.0f}% outside. Divide bytes by 255; "
                "take the normalisation off model inputs by Normalization.to_pixels(x)."
            )
        self.optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            errors = self.errors(z.detach(), pixels, precision=precision).mean(1)
            errors.sum().backward()
        self.optimizer.step()
        errors = errors.detach()
        known = torch.isfinite(self.running)
        self.running.copy_(torch.where(known, torch.lerp(errors, self.running, _MEMORY), errors))
        return errors

    def renew_weakest(self) -> int:
        """Start the surrogate with the largest running error anew; returns its number.

        A model that has learnt to hide from these very decoders has not hidden from a fresh one.
        Its weights are new, its optimiser's moments and its running error forgotten; the others
        guard the image meanwhile, as the best of all counts.
        """
        index = int(torch.where(torch.isfinite(self.running), self.running, -1.0).argmax())
        self.renewals += 1
        fresh = self._fresh(index, self.seed + index + 1000 * int(self.renewals))
        own = self.decoders[index]
        own.load_state_dict(fresh.state_dict())
        for parameter in own.parameters():
            self.optimizer.state.pop(parameter, None)
        self.running[index] = float("inf")
        return index

    def _fresh(self, index: int, seed: int) -> nn.Module:
        spec = self.specs[index]
        return make_decoder(
            spec.family, self.feature_shape, self.image_shape,
            width=spec.width, depth=spec.depth, seed=seed,
        )


def checked_specs(
    surrogates: Sequence[SurrogateSpec] | str, lr: float, loss: str
) -> tuple[SurrogateSpec, ...]:
    """The ensemble that `surrogates` gives or names; settings that are something else are refused.

    Raises:
        InputError: no specs, something else among them, an unknown name, a rate that is not
            positive, an unknown loss.
    """
    specs: tuple[SurrogateSpec, ...] | None = None
    if isinstance(surrogates, str):
        specs = SURROGATE_SETS.get(surrogates)
    elif isinstance(surrogates, Iterable):
        specs = tuple(surrogates)
    if specs is None or any(not isinstance(spec, SurrogateSpec) for spec in specs):
        is_module = isinstance(surrogates, nn.Module)
        raise InputError(
            f"Expected surrogates as one of {', '.join(SURROGATE_SETS)}, or as a sequence of "
            "SurrogateSpec(family, width, depth), came "
            f"{type(surrogates).__name__ if is_module else repr(surrogates)}. "
            f"{nearest(str(surrogates), tuple(SURROGATE_SETS))}")
    if not specs:
        raise InputError("Expected at least one surrogate, came none. Leave beta at 0 instead.")
    check_number(lr, "surrogate_lr")
    if not lr > 0:
        raise InputError(f"Expected surrogate_lr > 0, came {lr}.")
    check_among(loss, "surrogate_loss", SURROGATE_LOSSES)
    return specs


def _chosen_loss(loss: str, image_shape: tuple[int, int, int]) -> str:
    large = min(image_shape[1:]) >= SSIM_SIDE
    if loss == "mse+ssim" and not large:
        raise InputError(
            f"SSIM takes images of at least {SSIM_SIDE} pixels a side, came {image_shape[1:]}. "
            'Use surrogate_loss="mse".'
        )
    return ("mse+ssim" if large else "mse") if loss == "auto" else loss
