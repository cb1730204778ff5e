"""What the attacks that differentiate through the edge share: errors, priors and pixel space.

Everything is computed per image, so that images which are optimised together do not influence
each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from patrol_prune.attacks.base import EdgeFunction, Knowledge
from patrol_prune.decoders import FeatureStandardizer, channel_dim
from patrol_prune.errors import InputError
from patrol_prune.metrics import check_pixels, mse, ssim

LOSSES: tuple[str, ...] = ("mse", "standardised", "cosine")
CRITERIA: tuple[str, ...] = ("mse", "ssim")

_LEAST_STD = 1.0 / 255.0
_LEAST_POWER = 1e-3
_SPECTRUM_IMAGES = 2048
_LEAST_NORM = 1e-8
_DRAWN = 32
_DROPPED = 0.01


@dataclass(frozen=True)
class PixelSpace:
    """The attacker's normalised space, `x = (pixels - mean) / std`, by his own images.

    Attributes:
        mean: of each channel over the attacker's images, `[1, C, 1, 1]`.
        std: likewise, at least one grey level of 255.
        mean_image: mean of the attacker's images, `[1, C, H, W]`, in pixels.
    """

    mean: Tensor
    std: Tensor
    mean_image: Tensor

    @classmethod
    def of(cls, pixels: Tensor) -> PixelSpace:
        """The space of the images `[N, C, H, W]`."""
        std, mean = torch.std_mean(pixels, dim=(0, 2, 3), keepdim=True, correction=0)
        return cls(mean, std.clamp(min=_LEAST_STD), pixels.mean(0, keepdim=True))

    def to(self, device: torch.device) -> PixelSpace:
        """The same on another device."""
        return PixelSpace(self.mean.to(device), self.std.to(device), self.mean_image.to(device))

    def to_pixels(self, x: Tensor) -> Tensor:
        """Normalised images to pixels, not clamped."""
        return torch.addcmul(self.mean, x, self.std)

    def from_pixels(self, pixels: Tensor) -> Tensor:
        """Pixels to normalised images."""
        return (pixels - self.mean) / self.std

    def clamp_(self, x: Tensor) -> None:
        """Move normalised images, in place, to where pixels are on [0, 1]."""
        x.clamp_(-self.mean / self.std, (1.0 - self.mean) / self.std)


@dataclass(frozen=True)
class Spectrum:
    """Coordinates in which the attacker's images are near white noise.

    Natural images have far more power in low than in high frequencies and in brightness than in
    colour. Descent in coordinates `v` that undo this, `x = colours . irfft2(amplitude . rfft2(v))`,
    reaches in a few hundred steps what takes thousands in pixels, and `mean(v^2)` is the negative
    log-density of a stationary Gaussian up to constants.

    Attributes:
        colours: orthogonal, `[C, C]`: components to channels.
        amplitude: of each component and frequency, `[C, H, W // 2 + 1]`, positive; in standard
            deviations of one pixel, so that a step means the same for every image size.
    """

    colours: Tensor
    amplitude: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Spectrum:
        """That of the images `x [N, C, H, W]`, normalised, with their mean image taken off."""
        x = x[:_SPECTRUM_IMAGES]
        flat = x.transpose(0, 1).flatten(1)
        _, colours = torch.linalg.eigh(flat @ flat.t() / flat.shape[1])
        components = torch.einsum("ck,nchw->nkhw", colours, x)
        power = torch.fft.rfft2(components, norm="ortho").abs().square().mean(0)
        return cls(colours, ((power + _LEAST_POWER) / (x.shape[2] * x.shape[3])).sqrt())

    def decode(self, v: Tensor) -> Tensor:
        """Coordinates `[N, C, H, W]` to images of the same shape."""
        filtered = torch.fft.irfft2(torch.fft.rfft2(v) * self.amplitude, s=v.shape[2:])
        return torch.einsum("ck,nkhw->nchw", self.colours, filtered)

    def encode(self, x: Tensor) -> Tensor:
        """The coordinates of the images; inverse of `decode`."""
        components = torch.einsum("ck,nchw->nkhw", self.colours, x)
        return torch.fft.irfft2(torch.fft.rfft2(components) / self.amplitude, s=x.shape[2:])

    def to(self, device: torch.device) -> Spectrum:
        """The same on another device."""
        return Spectrum(self.colours.to(device), self.amplitude.to(device))


def total_variation(x: Tensor) -> Tensor:
    """`TV(x) = mean((x_{h+1,w} - x_{h,w})^2) + mean((x_{h,w+1} - x_{h,w})^2)` of each image.

    Args:
        x: `[N, C, H, W]`, in the attacker's normalised space.

    Returns:
        `[N]`; 0 for an image of one colour per channel. A direction of one pixel counts nothing.
    """
    total = x.new_zeros(len(x))
    for dim in (2, 3):
        if x.shape[dim] > 1:
            total = total + x.diff(dim=dim).square().mean(dim=(1, 2, 3))
    return total


@dataclass(frozen=True)
class Comparison:
    """How the features of a guess are set beside an upload.

    Attributes:
        scale: what the squared error of `"mse"` is divided by.
        gain: of each channel for `"standardised"`, broadcast over `[N, ...]`; None is 1.
        thinned: the edge drops values at random. What is 0 in the upload then says nothing, and
            the rest is set beside what the guess gives where it is not dropped.
        draws: queries of the edge that are put together for one guess.
    """

    scale: float = 1.0
    gain: Tensor | None = None
    thinned: bool = False
    draws: int = 1

    @classmethod
    def of(cls, known: Knowledge, z: Tensor, *, relative: bool = True, draws: int = 1
           ) -> Comparison:
        """By the features `z` of some of the attacker's own images."""
        shape = tuple(z.shape[1:])
        gain: Tensor | None = None
        if 1 <= len(shape) <= 3:  # which channels there are is not known of others
            dim = channel_dim(shape, tuple(known.pixels.shape[1:]))
            view = [1] * z.dim()
            view[dim] = -1
            gain = FeatureStandardizer(shape, dim=dim).to(z.device).fit(z).gain().view(view)
        draws = draws if known.random_edge else 1
        return cls(feature_scale(z) if relative else 1.0, gain,
                   known.random_edge and drops_values(known, z.device), draws)

    def feature(self, edge: EdgeFunction, pixels: Tensor) -> Tensor:
        """What `edge` is expected to send for `pixels [N, C, H, W]`, of what comes through."""
        if self.thinned:
            return kept_feature(edge, pixels, self.draws)
        return expected_feature(edge, pixels, self.draws)

    def error(self, f: Tensor, z: Tensor, loss: str) -> Tensor:
        """How far the features `f` of a guess are from the upload `z`, of each image.

        `"mse"` is `mean((f - z)^2) / scale`; `"standardised"` is `mean((g f - g z)^2)` with the
        channels' gains `g`, so that a loud channel drowns no other; `"cosine"` is
        `1 - <f, z> / (|f| |z|)` on [0, 2], which ignores any scale. Of a thinned upload only what
        is not 0 counts.

        Args:
            f: `[N, ...]`, floating point.
            z: of the same shape.
            loss: one of `LOSSES`.

        Returns:
            `[N]`, float32.
        """
        weight, count, scale = self._weights(z, loss)
        f, z = f.float(), z.float()
        if weight is not None:
            f, z = f * weight, z * weight
        f, z = f.flatten(1), z.flatten(1)
        if loss == "cosine":
            return 1.0 - functional.cosine_similarity(f, z, dim=1)
        return (f - z).square().sum(dim=1) / (count * scale)

    def slope(self, f: Tensor, z: Tensor, loss: str) -> Tensor:
        """`d error(f, z, loss) / d f` in closed form, of the shape of `f`.

        It spares the passes over the features that differentiating the error takes; at shallow
        edges these cost as much as the convolutions.
        """
        weight, count, scale = self._weights(z, loss)
        f, z = f.detach().float(), z.float()
        shape = [-1] + [1] * (f.dim() - 1)
        if loss != "cosine":
            factor = 2.0 / (scale * count)
            slope = (f - z).mul_(factor.view(shape) if isinstance(factor, Tensor) else factor)
            return slope if weight is None else slope.mul_(weight.square())
        if weight is not None:
            f, z = f * weight, z * weight
        flat_f, flat_z = f.flatten(1), z.flatten(1)
        norm_f = torch.linalg.vector_norm(flat_f, dim=1).clamp(min=_LEAST_NORM)
        norm_z = torch.linalg.vector_norm(flat_z, dim=1).clamp(min=_LEAST_NORM)
        cosine = (flat_f * flat_z).sum(dim=1) / (norm_f * norm_z)
        slope = f * (cosine / norm_f**2).view(shape) - z * (1.0 / (norm_f * norm_z)).view(shape)
        return slope if weight is None else slope.mul_(weight)

    def _weights(self, z: Tensor, loss: str) -> tuple[Tensor | None, Tensor | int, float]:
        """Factors of the features, how many of each image count, what the error is divided by."""
        weight = self.gain if loss == "standardised" else None
        scale = 1.0 if loss == "standardised" else self.scale
        if not self.thinned:
            return weight, max(1, z[0].numel()), scale
        seen = (z != 0).float()
        count = seen.flatten(1).sum(dim=1).clamp(min=1.0)
        return seen if weight is None else seen * weight, count, scale


def drops_values(known: Knowledge, device: torch.device) -> bool:
    """Whether the edge drops values at random and changes nothing else.

    Two uploads of the same pictures: some values are 0 in one and not in the other, and those that
    are not 0 in both are the same.
    """
    edge, some = known.white_box(), known.pixels[:_DRAWN].to(device)
    with torch.no_grad():
        a, b = edge(some), edge(some)
    both, one = (a != 0) & (b != 0), (a != 0) ^ (b != 0)
    if not bool(both.any()) or float(one.float().mean()) < _DROPPED:
        return False
    return float(torch.isclose(a[both], b[both], rtol=1e-4).float().mean()) > 0.99


def kept_feature(edge: EdgeFunction, pixels: Tensor, draws: int) -> Tensor:
    """The mean of `draws` queries over those in which a value is not 0, `[N, ...]`."""
    total = edge(pixels)
    seen = (total != 0).to(total.dtype)
    for _ in range(draws - 1):
        f = edge(pixels)
        total, seen = total + f, seen + (f != 0)
    total = total / seen.clamp(min=1.0)
    return total.clone() if total.is_inference() else total


def expected_feature(edge: EdgeFunction, pixels: Tensor, draws: int) -> Tensor:
    """`E[edge(pixels)]`, `[N, ...]`: the mean of `draws` queries with `pixels [N, C, H, W]`.

    An edge that computes in inference mode gives features without a gradient, not an error.
    """
    total = edge(pixels)
    for _ in range(draws - 1):
        total = total + edge(pixels)
    total = total if draws == 1 else total / draws
    return total.clone() if total.is_inference() else total


def feature_scale(z: Tensor) -> float:
    """Mean over the entries of `z [N, ...]` of their variance over images; 1 where that is 0.

    It is the squared error that a guess without information has: dividing by it makes the weights
    of priors comparable between edges.
    """
    scale = float(z.float().var(dim=0, correction=0).mean())
    return scale if scale > 0.0 else 1.0


def gradient(outputs: Sequence[Tensor], slopes: Sequence[Tensor], x: Tensor) -> Tensor:
    """`d sum_i <slopes_i, outputs_i> / d x`; zeros where the edge does not pass gradients on.

    Only `x` is differentiated: the edge's weights get no gradients and cost no time for them.
    """
    pairs = [(y, slope.to(y.dtype)) for y, slope in zip(outputs, slopes, strict=True)
             if y.requires_grad]  # fmt: skip
    if not pairs:
        return torch.zeros_like(x)
    (slope,) = torch.autograd.grad(
        [y for y, _ in pairs], [x], [slope for _, slope in pairs], allow_unused=True
    )
    return torch.zeros_like(x) if slope is None else slope


def gradient_norm(edge: EdgeFunction, z: Tensor, start: Tensor, draws: int) -> float:
    """Mean over images of `|d mean((edge(x) - z)^2) / d x|` at the pixels `start [N, C, H, W]`."""
    with torch.enable_grad():
        pixels = start.detach().clone().requires_grad_(True)
        f = expected_feature(edge, pixels, draws)
        slope = gradient([f], [Comparison().slope(f, z, "mse")], pixels)
        return float(slope.flatten(1).norm(dim=1).mean())


def error_by(criterion: str, originals: Tensor, guesses: Tensor) -> Tensor:
    """Each image's error by a criterion, `[N]`: MSE, or `1 - SSIM`; smaller is closer."""
    if criterion == "mse":
        return mse(originals, guesses)
    return 1.0 - ssim(originals, guesses, wide=False)


def tuning_part(
    known: Knowledge, count: int, generator: torch.Generator, among: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Indices of `count` of the attacker's images that choose settings, and of the others.

    At most half of the images are taken, out of `among` where that is given.
    """
    pixels = known.pixels
    if pixels.dim() != 4 or len(pixels) < 2:
        raise InputError(
            "A white-box attack chooses its settings on images of the attacker's own, at least "
            f"two [N, C, H, W]; came {tuple(pixels.shape)}. Give Knowledge(pixels=...)."
        )
    check_pixels(pixels, "pixels")
    pool = torch.arange(len(pixels)) if among is None else among.cpu()
    order = pool[torch.randperm(len(pool), generator=generator)]
    chosen = order[: min(count, len(pixels) // 2)]
    others = torch.ones(len(pixels), dtype=torch.bool)
    others[chosen] = False
    return chosen, others.nonzero().flatten()


def features_of(known: Knowledge, chosen: Tensor, device: torch.device) -> Tensor:
    """Features of the attacker's images `chosen`, from `known.z` or else by asking the edge."""
    if known.z is not None:
        z = known.z[chosen.to(known.z.device)].to(device)
    else:
        with torch.no_grad():
            z = known.white_box()(known.pixels[chosen.to(known.pixels.device)].to(device))
    if not bool(torch.isfinite(z).all()):
        raise InputError(
            "Expected finite features, came NaN or infinity. Look at the edge: its weights or "
            "normalisation are broken, and an attack on it would say nothing."
        )
    return z.detach()


def subset(known: Knowledge, indices: Tensor) -> Knowledge:
    """The same with only the attacker's images `indices [M]`."""
    pixels, z, labels = (
        None if v is None else v[indices.to(v.device)]
        for v in (known.pixels, known.z, known.labels)
    )
    assert pixels is not None
    return replace(known, pixels=pixels, z=z, labels=labels)
