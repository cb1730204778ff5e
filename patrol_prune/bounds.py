"""What can be proven about an edge whose upload carries Gaussian noise.

Two bounds on the mean squared error of whoever sees `z' = z + n`, `n ~ N(0, sigma^2 I)`, with `z`
the edge's output before the noise, of `k` values, for an image of `d` pixel values on [0, 1]:

    diagonal Fisher information:  MSE >= 1 / dFIL                       for unbiased attackers
    conditional entropy:          MSE >= exp(2 h(x|z') / d) / (2 pi e)  for every attacker

`docs/bounds.md` derives them and lists what each assumes and what it does not say. Entropies and
information are in nats, `log` is natural. What is done to `z'` later (rounding, the cloud) can only
help the device. `m` uploads of one image with fresh noise count as one with `sigma / sqrt(m)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from patrol_prune.covariance import gaussian_information, shrinkage_intensity
from patrol_prune.errors import InputError
from patrol_prune.given import check_count, check_number, is_number
from patrol_prune.jacobian import (
    blocked_outputs,
    checked_edge,
    differentiable,
    one_output,
    pull_back,
    signs,
)

_CHUNK_VALUES = 1 << 22
_SLOPE_IMAGES = 64
_SLOPE_BATCH = 16


@dataclass(frozen=True)
class FisherLeakage:
    """Diagonal Fisher information leakage of each image (see `diagonal_fisher_information`).

    Attributes:
        dfil: `[N]`, float64, in 1 / squared pixel units; from 0 upwards.
        standard_error: `[N]`, of `dfil` over the probes; 0 where it is exact.
        exact: whether every output was differentiated, instead of random combinations of them.
    """

    dfil: Tensor
    standard_error: Tensor
    exact: bool

    @property
    def mse_bounds(self) -> Tensor:
        """`1 / dFIL` of each image, `[N]`, for unbiased attackers; infinite where dFIL is 0.

        Estimated from probes it is too high by about `(standard_error / dfil)^2`, relatively.
        """
        return self.dfil.reciprocal()

    @property
    def mse_bound(self) -> float:
        """`1 / mean(dFIL)`: bounds an unbiased attacker's MSE averaged over images.

        It is at most `mean(1 / dFIL)` (Jensen), and one image with a dead gradient cannot lift it
        to infinity.
        """
        mean = float(self.dfil.mean())
        return 1.0 / mean if mean > 0 else math.inf

    @property
    def worst_mse_bound(self) -> float:
        """The bound of the image that is protected least, `1 / max(dFIL)`."""
        return float(self.mse_bounds.min())

    def any_attacker(self, prior_information: float) -> float:
        """Van Trees' bound, for biased attackers too: `1 / (mean(dFIL) + J / d)`.

        It bounds the MSE averaged over all images, and `mean(dFIL)` estimates theirs from those
        given: the images have to be drawn from the victim's distribution. The edge has to be
        continuous; where it jumps (rounding, a hard choice of channels), the bound does not hold.

        Args:
            prior_information: `J / d`, with `J = E ||grad log p(x)||^2` the Fisher information of
                the images' density `p`, which must be differentiable and vanish at its borders.
                `Tr(S^-1) / d` for a Gaussian of covariance `S`. It is infinite, and the bound 0,
                for images on a grid of grey levels or on a surface of fewer dimensions than `d`;
                what is fitted to smoothed images bounds the error on the smoothed images.
        """
        if not prior_information > 0:
            raise InputError(
                f"Expected prior_information above 0, came {prior_information}. Every density "
                "that van Trees' bound covers has some; give Tr(S^-1) / d for a Gaussian."
            )
        return 1.0 / (float(self.dfil.mean()) + prior_information)


def diagonal_fisher_information(
    edge: Callable[[Tensor], Tensor],
    pixels: Tensor,
    sigma: float,
    *,
    probes: int | None = 16,
    generator: torch.Generator | None = None,
) -> FisherLeakage:
    """How far Gaussian noise on an upload keeps unbiased attackers off, image by image.

    `dFIL(x) = Tr(J^T J) / (sigma^2 d)` with `J = dz/dx`, of `d` pixel values to `k` outputs, where
    `z + n`, `n ~ N(0, sigma^2 I)`, is uploaded. An attacker without bias (`E[x_hat | x] = x` around
    this x) errs by `MSE(x) >= 1 / dFIL(x)` (Cramer and Rao, then `Tr(F^-1) Tr(F) >= d^2`; Maeng et
    al., NeurIPS 2023). Real attackers are biased and may do better. `Tr(J^T J) = E ||J^T v||^2` for
    independent signs `v` (Hutchinson), by one vector-Jacobian product each. Where the edge jumps at
    x, `J` does not see it and nothing follows; kinks (ReLU, max-pooling) have probability zero and
    do no harm.

    Args:
        edge: pixels `[N, C, H, W]` to `z [N, ...]`, normalisation inside, **noise left out**, in
            evaluation mode; its gradient must be the true one (not straight-through).
        pixels: images `[N, C, H, W]` on [0, 1]; the bound is then in squared pixel units.
        sigma: standard deviation of the noise added to each value of `z`.
        probes: how many sign vectors; None or at least `k` differentiates all `k` outputs: exact.
        generator: draws the signs; None for a fresh one of seed 0.

    Returns:
        `dfil` and its `standard_error`, `[N]`, float64, in 1 / squared pixel units; `exact`; of
        them the bounds `mse_bounds` `[N]`, `mse_bound` (of the mean over images) and
        `worst_mse_bound`; and `any_attacker(prior_information)`, which holds for biased ones too.

    Raises:
        InputError: on `sigma` not positive, fewer than 2 `probes`, pixels that are no
            floating-point ones, an edge that is random, mixes images, cannot be differentiated or
            has a slope that is not finite.
    """
    _check_sigma(sigma)
    outputs = checked_edge(edge, pixels)
    exact = probes is None or probes >= outputs
    if probes is not None and probes < 2:
        raise InputError(f"Expected at least 2 probes (or None for all outputs), came {probes}.")
    rounds = outputs if probes is None else min(probes, outputs)
    generator = generator or torch.Generator().manual_seed(0)
    d = pixels[0].numel()
    size = max(1, _CHUNK_VALUES // max(outputs, d))
    means, errors = [], []
    for images in torch.split(pixels, size):
        x, z = differentiable(edge, images)
        squares = torch.empty(rounds, len(images), dtype=torch.float64)
        for row in range(rounds):
            v = one_output(z, row) if exact else signs(z, generator)
            g = pull_back(z, x, v)
            squares[row] = g.double().square().sum(1).cpu() / (sigma**2 * d)
        means.append(squares.sum(0) if exact else squares.mean(0))
        spread = torch.zeros_like(means[-1]) if exact else squares.std(0) / math.sqrt(rounds)
        errors.append(spread)
    dfil = torch.cat(means)
    _check_slope(edge, pixels, dfil)
    return FisherLeakage(dfil, torch.cat(errors), exact)


@dataclass(frozen=True)
class EntropyBound:
    """What `z'` can tell about `x` at most, and the error that follows.

    Computed from a finite sample of `z`, all of it is an estimate of a bound, not a bound
    (see `conditional_entropy_bound`).

    Attributes:
        information: upper bound on `I(x; z')` in nats, with the shrinkage in `shrinkage`.
        diagonal_information: the same from the variances alone (shrinkage 1); never less.
        shrinkage: share of the diagonal target in the covariance, mean over groups.
        images: N, how many images the covariance was estimated from.
        dimensions: k, values of `z` per image.
        groups: how many groups were told apart.
        smallest_group: images of the smallest of them.
        pixel_values: d, values of `x` per image.
        entropy: `h(x)` in nats as given, or None.
        levels: grey levels of the pixels, where `entropy` is of dithered pixels; or None.
    """

    information: float
    diagonal_information: float
    shrinkage: float
    images: int
    dimensions: int
    groups: int
    smallest_group: int
    pixel_values: int
    entropy: float | None
    levels: int | None

    @property
    def rank_deficient(self) -> bool:
        """Whether a group has too few images to see every direction of `z` vary within it."""
        return self.smallest_group - 1 < self.dimensions

    @property
    def mse_factor(self) -> float:
        """`exp(-2 I / d)` on (0, 1]: what is left of the entropy power of `x` for who sees `z'`.

        It scales the bound, not the attacker's error: it is no ratio to the mean image's MSE.
        """
        return math.exp(-2.0 * self.information / self.pixel_values)

    @property
    def mse_bound(self) -> float | None:
        """`exp(2 (h(x) - I) / d) / (2 pi e)`, for every attacker; None without `entropy`.

        With `levels`, less `1 / (12 (levels - 1)^2)`, the error that the dither itself makes.
        """
        if self.entropy is None:
            return None
        power = math.exp(2.0 * self.entropy / self.pixel_values) / (2.0 * math.pi * math.e)
        dither = 0.0 if self.levels is None else 1.0 / (12.0 * (self.levels - 1) ** 2)
        return max(0.0, power * self.mse_factor - dither)


def conditional_entropy_bound(
    z: Tensor,
    sigma: float,
    pixel_values: int,
    *,
    shrinkage: float | Literal["auto"] = 1.0,
    groups: Tensor | None = None,
    entropy: float | None = None,
    levels: int | None = None,
) -> EntropyBound:
    """How much an upload with Gaussian noise can tell of an image, and the error that follows.

    With `z' = z + n`, `n ~ N(0, sigma^2 I)`, `z` of `k` values and `log` natural, `I(x; z') <= 1/2
    log det(I + Sigma_z / sigma^2)`, and `MSE >= exp(2 (h(x) - I)/d)/(2 pi e)` for every attacker.
    The first holds for every distribution of `z`, as a Gaussian has the largest entropy of its
    covariance; with equality for a Gaussian `z`. It also holds where `z` is random before the
    noise. With `groups` c of share `p_c`: `I <= sum_c p_c (1/2 log det(I + Sigma_c/sigma^2) - log
    p_c)`, tighter where `z` clusters. (The step from `h(x|z')` to the MSE and the use of mixtures
    are also in Xia et al., "Conditional Entropy Maximization", CVPR 2025.)

    A covariance from N images **under-estimates** I on average, badly where N is not many times
    `k`: at most N - 1 directions vary. `shrinkage` mixes the covariance with its own diagonal,
    which can only raise I: 1 uses the variances alone (the default: looser, and hardly biased,
    by about `k / (2 N)` nats; with G groups by about `G k / (2 N)`, much where they are small), 0
    the sample covariance, "auto" the share of least expected squared error (Schafer and Strimmer
    2005), which is all of the diagonal for fewer than 10 images of a group.

    Args:
        z: features `[N, ...]` of images drawn from the victim's distribution, without noise.
        sigma: standard deviation of the noise added to each value of `z`.
        pixel_values: `d`, the values of one image, `C * H * W`.
        groups: `[N]`, integers, any labels; at least two images of each. None for one group.
        entropy: `h(x)` in nats of an image on [0, 1], **not more than it is**; that of a Gaussian
            or of a likelihood model is too high and gives no bound. None for the factor alone.
        levels: grey levels of the pixels (256), where `entropy` is that of dithered ones
            (`patrol_prune.bounds.dithered_entropy`).

    Returns:
        `information`, the bound on `I` in nats, and `diagonal_information`, that of the variances
        alone; `mse_factor`, `exp(-2 I/d)`; `mse_bound` in squared pixel units, None without
        `entropy`; `rank_deficient`, whether images are too few to see all of `z` vary; and what
        they come from: `shrinkage`, `images`, `dimensions` (`k`), `groups`, `smallest_group`. An
        estimate from a sample, of a bound.

    Raises:
        InputError: on arguments outside the above, or on NaN.
    """
    _check_sigma(sigma)
    check_count(levels, "levels, the grey levels (256 for 8 bits),", 2, optional=True)
    flat = _check_features(z, pixel_values, shrinkage)
    _check_entropy(entropy, pixel_values, levels)
    labels = _check_groups(groups, len(flat), flat.device)
    information = diagonal = used = 0.0
    names, counts = torch.unique(labels, return_counts=True)
    for name, count in zip(names.tolist(), counts.tolist(), strict=True):
        part = flat if len(names) == 1 else flat[labels == name]
        share = count / len(flat)
        rho = shrinkage_intensity(part) if shrinkage == "auto" else float(shrinkage)
        information += share * (gaussian_information(part, sigma, rho) - math.log(share))
        diagonal += share * (gaussian_information(part, sigma, 1.0) - math.log(share))
        used += share * rho
    return EntropyBound(information, diagonal, used, len(flat), flat.shape[1], len(names),
                        int(counts.min()), pixel_values, entropy, levels)


def capped_information(power: float, sigma: float, dimensions: int) -> float:
    """`k/2 log(1 + P / sigma^2)` nats: no `z` of mean squared value at most `P` tells more.

    The only one of these figures that needs no sample: where the device scales every `z` to
    `||z - c||^2 <= k P` for a fixed `c` before the noise, it holds for whatever images come.
    """
    _check_sigma(sigma)
    check_number(power, "power, the mean squared value,")
    check_count(dimensions, "dimensions", 1)
    return 0.5 * dimensions * math.log1p(power / sigma**2)


def dithered_entropy(bits: float, pixel_values: int, levels: int = 256) -> float:
    """`h(x + u)` in nats of pixels on [0, 1] from their discrete entropy in bits per value.

    `h = d (bits log 2 - log(levels - 1))`, with `u` uniform over one grey level. Pixels on a grid
    have no density (`h(x)` is minus infinity); dithered they have. The bits per value of a
    compressor or a likelihood model are an upper limit of the entropy, never a lower one.

    Raises:
        InputError: more bits than the grey levels can carry, or fewer than none.
    """
    check_count(levels, "levels, the grey levels (256 for 8 bits),", 2)
    check_count(pixel_values, "pixel_values", 1)
    if not is_number(bits) or not 0 <= bits <= math.log2(levels):
        raise InputError(f"Expected bits per value from 0 to {math.log2(levels):.4g}, what "
                         f"{levels} grey levels carry, came {bits}. Give the entropy of one value, "
                         "not of the image.")
    return pixel_values * (bits * math.log(2.0) - math.log(levels - 1))


def _check_sigma(sigma: float) -> None:
    if not is_number(sigma) or not 0.0 < float(sigma) < math.inf:
        raise InputError(
            f"Expected sigma, the standard deviation of the noise on z, above 0, came {sigma}. "
            "Without noise there is no such bound; jacobian_effective_rank is a diagnostic."
        )


def _check_entropy(entropy: float | None, pixel_values: int, levels: int | None) -> None:
    """Refuse an entropy that no image on [0, 1], dithered or not, can have."""
    if entropy is None:
        return
    most = 0.0 if levels is None else pixel_values * math.log(levels / (levels - 1))
    if math.isfinite(entropy) and entropy <= most + 1e-9 * pixel_values:
        return
    raise InputError(
        f"Expected entropy as h(x) in nats of an image on [0, 1], finite and at most {most:.6g} "
        f"({'uniform' if levels is None else 'uniform, dithered'} pixels), came {entropy}. Of "
        "pixels on a grid of grey levels give dithered_entropy(bits, pixel_values, levels=) and "
        "the same levels=."
    )


def _check_slope(edge: Callable[[Tensor], Tensor], pixels: Tensor, dfil: Tensor) -> None:
    """Refuse a slope that is no number, or zero at every image where outputs say otherwise.

    Each output counts: those whose gradient is blocked would add nothing to `dfil`, and the bound
    would be above what an attacker reaches who reads them.
    """
    if not bool(torch.isfinite(dfil).all()):
        raise InputError(
            "Expected an edge with a finite slope at every image, came NaN or infinity. Look for a "
            "root, a norm or a logarithm at 0 in the edge; there the bound is unknown, not large."
        )
    varying, blocked = blocked_outputs(edge, pixels[:_SLOPE_IMAGES], size=_SLOPE_BATCH)
    if not bool(varying.any()):  # one image, or the same again: as in `checked_edge`
        pair = torch.cat([pixels[:1], 1.0 - pixels[:1]])
        varying, blocked = blocked_outputs(edge, pair, size=_SLOPE_BATCH)
    if bool(blocked.any()):
        raise InputError(
            "Expected an edge whose gradient is its true slope, came one whose gradient is zero "
            f"at every image for {int(blocked.sum())} of the {int(varying.sum())} outputs that "
            "differ between images. A rounded or otherwise "
            "blocked gradient proves nothing; use conditional_entropy_bound, which takes none."
        )


def _check_features(z: Tensor, pixel_values: int, shrinkage: float | Literal["auto"]) -> Tensor:
    if not isinstance(z, Tensor) or z.dim() < 2 or len(z) < 2 or z[0].numel() == 0:
        came = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise InputError(
            f"Expected features [N, ...] of at least 2 images, came {came}. "
            "A spread needs several images."
        )
    check_count(pixel_values, "pixel_values, C * H * W of an image,", 1)
    if shrinkage != "auto" and not (is_number(shrinkage) and 0 <= float(shrinkage) <= 1):
        raise InputError(f'Expected shrinkage on [0, 1] or "auto", came {shrinkage!r}.')
    flat = z.detach().flatten(1)
    if not flat.is_floating_point() or not bool(torch.isfinite(flat).all()):
        raise InputError(
            f"Expected finite floating point features, came {flat.dtype} with "
            "values that are not. Dequantise integers first; look for NaN in the edge."
        )
    return flat


def _check_groups(groups: Tensor | None, images: int, device: torch.device) -> Tensor:
    if groups is None:
        return torch.zeros(images, dtype=torch.long, device=device)
    if not isinstance(groups, Tensor):
        groups = torch.as_tensor(groups)
    if groups.shape != (images,) or groups.is_floating_point():
        raise InputError(
            f"Expected one integer group for each of the {images} images, came "
            f"{groups.dtype} of shape {tuple(groups.shape)}. Give class or cluster labels [N]."
        )
    smallest = int(torch.unique(groups, return_counts=True)[1].min())
    if smallest < 2:
        raise InputError(
            "Expected at least 2 images of each group, came a group of 1, whose spread would "
            "count as none. Use fewer groups."
        )
    return groups.to(device)
