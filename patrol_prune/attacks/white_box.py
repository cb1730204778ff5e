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
from patrol_prune.errors import InputError
from patrol_prune.metrics import check_pixels, mse, ssim

LOSSES: tuple[str, ...] = ("mse", "cosine")
CRITERIA: tuple[str, ...] = ("mse", "ssim")

_LEAST_STD = 1.0 / 255.0
_LEAST_POWER = 1e-3
_SPECTRUM_IMAGES = 2048
_LEAST_NORM = 1e-8


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


def feature_error(f: Tensor, z: Tensor, loss: str, scale: float = 1.0) -> Tensor:
    """How far the features `f` of a guess are from the upload `z`, of each image.

    `"mse"` is `mean((f - z)^2) / scale`; `"cosine"` is `1 - <f, z> / (|f| |z|)` on [0, 2], which
    ignores any scale.

    Args:
        f: `[N, ...]`, floating point.
        z: of the same shape.
        loss: one of `LOSSES`.
        scale: see `feature_scale`.

    Returns:
        `[N]`, float32.
    """
    f, z = f.float().flatten(1), z.float().flatten(1)
    if loss == "cosine":
        return 1.0 - functional.cosine_similarity(f, z, dim=1)
    return (f - z).square().mean(dim=1) / scale


def feature_slope(f: Tensor, z: Tensor, loss: str, scale: float = 1.0) -> Tensor:
    """`d feature_error(f, z, loss, scale) / d f` in closed form, of the shape of `f`.

    It spares the passes over the features that differentiating the error takes; at shallow edges
    these cost as much as the convolutions.
    """
    f, z = f.detach().float(), z.float()
    if loss == "mse":
        return (f - z).mul_(2.0 / (scale * max(1, f[0].numel())))
    shape = [-1] + [1] * (f.dim() - 1)
    flat_f, flat_z = f.flatten(1), z.flatten(1)
    norm_f = torch.linalg.vector_norm(flat_f, dim=1).clamp(min=_LEAST_NORM)
    norm_z = torch.linalg.vector_norm(flat_z, dim=1).clamp(min=_LEAST_NORM)
    cosine = (flat_f * flat_z).sum(dim=1) / (norm_f * norm_z)
    return f * (cosine / norm_f**2).view(shape) - z * (1.0 / (norm_f * norm_z)).view(shape)


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
        slope = gradient([f], [feature_slope(f, z, "mse")], pixels)
        return float(slope.flatten(1).norm(dim=1).mean())


def error_by(criterion: str, originals: Tensor, guesses: Tensor) -> Tensor:
    """Each image's error by a criterion, `[N]`: MSE, or `1 - SSIM`; smaller is closer."""
    return mse(originals, guesses) if criterion == "mse" else 1.0 - ssim(originals, guesses)


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
