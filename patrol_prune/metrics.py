"""How close a reconstruction comes to its original, per image, on [0, 1] pixels.

The peak is always 1, the range of true pixels, never the range of the reconstruction: a low
contrast would flatter the defence. A high SSIM, MS-SSIM or PSNR and a low MSE or GMSD are bad for
privacy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from patrol_prune.errors import InputError

_CHUNK_PIXELS = 4_000_000
SSIM_SIDE = 11
"""The fewest pixels a side for `ssim`: its window."""
_SSIM_SIGMA = 1.5
_TILE = 128
_C1, _C2 = 0.01**2, 0.03**2
MS_SSIM_SIDE = 176
"""The fewest pixels a side for `ms_ssim`: four halvings must leave the window's 11."""

_GMSD_CONSTANT = 170.0 / 255.0**2
_LUMA = (0.299, 0.587, 0.114)


def mse(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of each image, `mean((x - y)^2)` over its pixels and channels.

    Args:
        x: images `[N, C, H, W]` on [0, 1].
        y: their reconstructions, of the same shape and range.

    Returns:
        `[N]`, on [0, 1]; 0 for identical images.

    Raises:
        InputError: on shapes that differ or are not `[N, C, H, W]`, on NaN, or outside [0, 1].
    """
    _check_pair(x, y)
    return _in_chunks(_mse, x, y)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, `-10 log10(mse(x, y))` (peak 1).

    Arguments and errors as in `mse`. Returns `[N]`, from 0 upwards; infinite for identical images.
    """
    return -10.0 * torch.log10(mse(x, y))


def ssim(x: Tensor, y: Tensor, *, wide: bool = True) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004).

    `SSIM = mean over pixels of (2 mu_x mu_y + C1)(2 cov_xy + C2) /
    ((mu_x^2 + mu_y^2 + C1)(var_x + var_y + C2))`, with Gaussian windows of 11x11 and sigma 1.5,
    `C1 = 0.01^2`, `C2 = 0.03^2`, mean over channels. Every pixel counts: the image is mirrored at
    its border, where other libraries leave a border of 5 pixels out. A plain grey image already
    scores about 0.13 to 0.18 on natural images.

    Arguments and errors as in `mse`; images must have at least 11 pixels a side. Computed in
    float64, on the CPU; `wide=False` is faster, in float32 where the images are, and coarser on
    flat ones. Returns `[N]`, float32, on [-1, 1]; 1 for identical images.
    """
    _check_pair(x, y)
    if min(x.shape[2:]) < SSIM_SIDE:
        raise InputError(
            f"SSIM takes images of at least {SSIM_SIDE}x{SSIM_SIDE} pixels, came "
            f"{tuple(x.shape[2:])}. Use mse or psnr, or larger images."
        )
    return _in_chunks(_ssim_wide if wide else _ssim, x, y)


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """Multi-scale structural similarity of each image (Wang, Simoncelli and Bovik 2003).

    The contrast and structure terms of `ssim` at five scales, each half as large as the one
    before, and the luminance term at the last, multiplied with the exponents 0.0448, 0.2856,
    0.3001, 0.2363, 0.1333. Negative terms count as 0.

    Arguments and errors as in `mse`; images must have at least `MS_SSIM_SIDE` pixels a side.
    Returns `[N]`, on [0, 1]; 1 for identical images.
    """
    _check_pair(x, y)
    if min(x.shape[2:]) < MS_SSIM_SIDE:
        raise InputError(
            f"MS-SSIM takes images of at least {MS_SSIM_SIDE}x{MS_SSIM_SIDE} pixels, came "
            f"{tuple(x.shape[2:])}. Use ssim, or larger images."
        )
    return _in_chunks(_ms_ssim, x, y)


def gmsd(x: Tensor, y: Tensor) -> Tensor:
    """Gradient magnitude similarity deviation of each image (Xue, Zhang, Mou and Bovik 2014).

    A perceptual distance that needs no trained network. On the luma, halved by averaging, with
    gradient magnitudes `g` by Prewitt's filters, it is the standard deviation over pixels of
    `(2 g_x g_y + c) / (g_x^2 + g_y^2 + c)`, `c = 170 / 255^2`.

    Arguments and errors as in `mse`; images of three channels are taken as RGB, of others the mean
    channel counts. Returns `[N]`, from 0 for identical images to about 0.35 for unlike ones.
    """
    _check_pair(x, y)
    return _in_chunks(_gmsd, x, y)


def thumbnail(images: Tensor, side: int) -> Tensor:
    """Images `[N, C, H, W]` as a thumbnail of `side` by `side` pixels shows them at full size.

    Averaged over areas, then enlarged bilinearly: a measure of what an SSIM means. One pixel is the
    image's own mean colour.
    """
    small = functional.adaptive_avg_pool2d(images, side)
    height, width = images.shape[2:]
    return functional.interpolate(small, size=(height, width), mode="bilinear", align_corners=False)


def ssim_loss(x: Tensor, y: Tensor) -> Tensor:
    """`1 - mean SSIM` of `y` against `x`, a differentiable scalar; not validated, not chunked."""
    return 1.0 - _ssim(x, y).mean()


def ssim_values(x: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    """SSIM of each image `y` against `x`, shape `[N]`, differentiable; not validated.

    With `weights` `[N, 1, H, W]`, of mean 1 over each image, pixels count so much in the mean.
    """
    return _ssim(x, y, weights)


def _mse(x: Tensor, y: Tensor) -> Tensor:
    return ((x.float() - y.float()) ** 2).mean(dim=(1, 2, 3))


def _ssim_wide(x: Tensor, y: Tensor) -> Tensor:
    """As `_ssim`, in float64: variances are differences of squares, which float32 rounds by more
    than they are where an image is flat. On the CPU, as not every accelerator has float64.
    """
    return _ssim(x.cpu().double(), y.cpu().double()).to(x.device, torch.float32)


def _ssim(x: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    x, y = (images if images.dtype == torch.float64 else images.float() for images in (x, y))
    # Half-precision products would round away the variances of smooth images.
    with torch.autocast(x.device.type, enabled=False):
        if (torch.is_grad_enabled() and y.requires_grad and not x.requires_grad
                and x.shape == y.shape and len(x)
                and not torch._C._are_functorch_transforms_active()):  # of torch.func
            values: Tensor = _SSIMOfGuess.apply(x, y, weights)
            return values
        return _likeness(x, y, weights)


def _likeness(x: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    mean_x, mean_y = _windowed(x), _windowed(y)
    both_squared, product = mean_x**2 + mean_y**2, mean_x * mean_y
    variances = _windowed(x**2 + y**2) - both_squared  # only their sum is needed
    cov = _windowed(x * y) - product
    likeness = ((2.0 * product + _C1) * (2.0 * cov + _C2)
                / ((both_squared + _C1) * (variances + _C2)))
    if weights is not None:
        likeness = likeness * weights
    return likeness.mean(dim=(1, 2, 3))


class _SSIMOfGuess(torch.autograd.Function):
    """SSIM of each `y` against a fixed `x`, with its gradient written out: as autograd's up to
    rounding, in two thirds of the time.

    With `S` the likeness at a pixel, `S = A B / (D E)`, `A = 2 mu_x mu_y + C1`, `B = 2 cov + C2`,
    `D = mu_x^2 + mu_y^2 + C1`, `E = var_x + var_y + C2`, and `W'` the transpose of the window:

        dS/dy = 2 W'[(mu_x (B - A) + mu_y S (D - E)) / (D E)] + 2 x W'[A / (D E)] - 2 y W'[S / E]

    Weights of pixels stand within each `W'[...]`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weights: Tensor | None) -> Tensor:
        mean_x, mean_y = _windowed(x), _windowed(y)
        product = mean_x * mean_y
        squares = mean_x.square().addcmul_(mean_y, mean_y)
        e = _windowed(x.square().addcmul_(y, y)).sub_(squares).add_(_C2)
        b = _windowed(x * y).sub_(product).mul_(2.0).add_(_C2)
        a, d = product.mul_(2.0).add_(_C1), squares.add_(_C1)
        share = (d * e).reciprocal_()
        s = (a * b).mul_(share)
        values = (s if weights is None else s * weights).mean(dim=(1, 2, 3))
        of_guess = s / e
        if weights is not None:
            share.mul_(weights)
            of_guess.mul_(weights)
        of_product = a * share
        of_mean = b.sub_(a).mul_(mean_x).addcmul_(d.sub_(e).mul_(s), mean_y).mul_(share)
        gradient = _spread(of_mean).addcmul_(_spread(of_product), x)
        gradient.addcmul_(_spread(of_guess), y, value=-1.0)
        ctx.save_for_backward(x, y, weights, gradient.mul_(2.0 / x[0].numel()))
        return values

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor, None]:
        x, y, weights, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated in its turn
            with torch.autocast(x.device.type, enabled=False):
                (again,) = torch.autograd.grad(_likeness(x, y, weights), y, upstream,
                                               create_graph=True)
            return None, again, None
        return None, gradient * upstream.view(-1, 1, 1, 1), None


def _windowed(values: Tensor) -> Tensor:
    """Gaussian means around every pixel, the image mirrored at its border, `[N, C, H, W]`.

    The window is a product, so that two matrices do it, faster than any convolution does here. They
    grow with the square of the side, and large images are taken tile by tile.
    """
    if max(values.shape[2:]) > _TILE:
        return _in_tiles(_in_tiles(values).mT).mT
    height, width = (_window_matrix(side, values) for side in values.shape[2:])
    return height @ functional.linear(values, width)


def _spread(values: Tensor) -> Tensor:
    """The transpose of `_windowed`: what every pixel has of the windows that it is in."""
    if max(values.shape[2:]) > _TILE:
        return _out_of_tiles(_out_of_tiles(values).mT).mT
    height, width = (_window_matrix(side, values) for side in values.shape[2:])
    return height.mT @ (values @ width)


def _in_tiles(values: Tensor) -> Tensor:
    """Gaussian means along the last dimension; what lies outside of a tile's window is left out."""
    return torch.cat([functional.linear(values[..., low:high], rows)
                      for _, low, high, rows in _tiles(values)], 3)


def _out_of_tiles(values: Tensor) -> Tensor:
    """The transpose of `_in_tiles`."""
    spread = torch.zeros_like(values)
    for start, low, high, rows in _tiles(values):
        spread[..., low:high] += values[..., start : start + _TILE] @ rows
    return spread


def _tiles(values: Tensor) -> Iterator[tuple[int, int, int, Tensor]]:
    """Along the last dimension: start of a tile, the stretch that enters its means, the weights."""
    side = values.shape[3]
    for start in range(0, side, _TILE):
        low, high = max(0, start - SSIM_SIDE // 2), min(side, start + _TILE + SSIM_SIDE // 2)
        yield start, low, high, _window_matrix(high - low, values)[start - low :][:_TILE]


def _window_matrix(side: int, like: Tensor) -> Tensor:
    """Row i holds the weights with which `side` pixels enter the mean around pixel i."""
    return torch.from_numpy(_window_weights(side)).to(like)


@lru_cache(maxsize=64)
def _window_weights(side: int) -> NDArray[np.float64]:
    """The same in NumPy: what is kept for later calls must not be a tensor of this one's mode."""
    places = np.arange(SSIM_SIDE) - SSIM_SIDE // 2
    weights = np.exp(-((places / _SSIM_SIGMA) ** 2) / 2.0)
    pixels = np.arange(side)[:, None] + places
    mirrored = (side - 1) - np.abs((side - 1) - np.abs(pixels))
    matrix = np.zeros((side, side))
    np.add.at(matrix, (np.arange(side)[:, None], mirrored), weights / weights.sum())
    return matrix


def _ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    values = multiscale_structural_similarity_index_measure(
        y.float(), x.float(), sigma=_SSIM_SIGMA, data_range=1.0, reduction="none", normalize="relu"
    )
    assert isinstance(values, Tensor)
    return values.reshape(-1)


def _gmsd(x: Tensor, y: Tensor) -> Tensor:
    a, b = (_gradient_magnitude(_luma(images.float())) for images in (x, y))
    similarity = (2.0 * a * b + _GMSD_CONSTANT) / (a**2 + b**2 + _GMSD_CONSTANT)
    return similarity.flatten(1).std(dim=1, correction=0)


def _luma(images: Tensor) -> Tensor:
    """`[N, C, H, W]` to luma `[N, 1, H/2, W/2]`, odd sizes padded with zeros at the end."""
    if images.shape[1] == 3:
        weights = images.new_tensor(_LUMA).view(1, 3, 1, 1)
        images = (images * weights).sum(dim=1, keepdim=True)
    else:
        images = images.mean(dim=1, keepdim=True)
    odd = (images.shape[3] % 2, images.shape[2] % 2)
    return functional.avg_pool2d(functional.pad(images, (0, odd[0], 0, odd[1])), 2)


def _gradient_magnitude(grey: Tensor) -> Tensor:
    """Prewitt's, `[N, 1, H, W]`."""
    across = grey.new_tensor([[-1.0, 0.0, 1.0]] * 3) / 3.0
    kernels = torch.stack([across, across.T])[:, None]
    return functional.conv2d(grey, kernels, padding=1).square().sum(1, keepdim=True).sqrt()


def _in_chunks(measure: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    size = max(1, _CHUNK_PIXELS // max(1, x[0].numel()))
    with torch.no_grad():
        pairs = zip(torch.split(x, size), torch.split(y, size), strict=True)
        return torch.cat([measure(a, b) for a, b in pairs])


def _check_pair(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape or x.dim() != 4 or x.numel() == 0:
        raise InputError(
            "Expected two tensors [N, C, H, W] of one shape with N >= 1, came "
            f"{tuple(x.shape)} and {tuple(y.shape)}. Reconstruct at the size of the originals."
        )
    for name, images in (("x", x), ("y", y)):
        check_pixels(images, name)


def check_pixels(images: Tensor, name: str) -> None:
    """Refuse images that are not floating point, hold NaN, or leave [0, 1] (InputError)."""
    if not images.is_floating_point():
        raise InputError(
            f"Expected {name} as floating point on [0, 1], came {images.dtype}. "
            "Divide uint8 images by 255."
        )
    low, high = (float(v) for v in torch.aminmax(images.detach()))
    # A NaN makes both ends NaN, and every comparison with it false.
    if not (low >= 0.0 and high <= 1.0):
        raise InputError(
            f"Expected {name} on [0, 1] without NaN, came values from {low:.4g} to {high:.4g}. "
            "Undo the normalisation and clamp first (Normalization.to_pixels)."
        )
