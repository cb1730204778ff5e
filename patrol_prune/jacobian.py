"""Derivatives of an edge with respect to the pixels, and how many directions they span."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from patrol_prune.errors import InputError
from patrol_prune.symmetric import positive_eigenvalues

_COPIES = 64
_SAME = 1e-3
_ASKED = 64
_SUSPECTS = 8
_STEPS = 32


def checked_edge(edge: Callable[[Tensor], Tensor], pixels: Tensor) -> int:
    """Number of outputs `k` per image of an edge that has a Jacobian for each image.

    Raises:
        InputError: no images, or an edge that is random or mixes the images of a batch.
    """
    if pixels.dim() < 2 or pixels.numel() == 0 or not pixels.is_floating_point():
        raise InputError(
            f"Expected floating point images [N, C, H, W], came {pixels.dtype} of shape "
            f"{tuple(pixels.shape)}. Give at least one image on [0, 1]."
        )
    pair = pixels[:2] if len(pixels) > 1 else torch.cat([pixels, 1.0 - pixels])
    with torch.no_grad():
        first, again, alone = edge(pair), edge(pair), edge(pair[:1])
    if _differ(first, again):
        raise InputError(
            "Expected an edge without noise, came one whose outputs differ between two calls. "
            "Give the part before the noise, and the noise's standard deviation as sigma."
        )
    if _differ(first[:1], alone):
        raise InputError(
            "Expected an edge that treats each image by itself, came one whose output for an "
            "image depends on the others. Put the module into evaluation mode."
        )
    return first[0].numel()


def differentiable(edge: Callable[[Tensor], Tensor], pixels: Tensor) -> tuple[Tensor, Tensor]:
    """`(x, z)` with `x` a fresh leaf of `pixels` and `z = edge(x)` flattened to `[N, k]`.

    Raises:
        InputError: gradients do not reach the pixels.
    """
    x = pixels.detach().clone().requires_grad_()
    with torch.enable_grad():
        z = edge(x).flatten(1)
    if not _reaches(z, x):
        raise InputError(
            "Expected an edge that can be differentiated with respect to the pixels, came one "
            "that is detached from them. Take no_grad or detach out of it."
        )
    return x, z


def pull_back(z: Tensor, x: Tensor, v: Tensor) -> Tensor:
    """`J^T v` of each image, `[N, d]`; parameters' gradients are left alone, the graph kept."""
    (g,) = torch.autograd.grad(z, x, v, retain_graph=True)
    return g.flatten(1)


def one_output(z: Tensor, index: int) -> Tensor:
    """The unit vector of output `index`, for every image of `z [N, k]`."""
    v = torch.zeros_like(z)
    v[:, index] = 1.0
    return v


def signs(z: Tensor, generator: torch.Generator) -> Tensor:
    """Independent fair signs in the shape of `z`, drawn on the generator's device."""
    drawn = torch.randint(0, 2, z.shape, generator=generator, device=generator.device)
    return (2 * drawn - 1).to(z)


def blocked_outputs(
    edge: Callable[[Tensor], Tensor],
    pixels: Tensor,
    *,
    size: int = 1,
    prepare: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs that differ between images, and those among them without a gradient: `[k]` each.

    Of an edge without second derivatives, only the outputs that were asked are in either.

    One product `J v` with a random `v` tells the outputs whose gradient is zero at every image. An
    output may be flat at all of them and yet have its true slope, one that a clamp holds at either
    end; so some that look blocked are followed from the image with their least value to that with
    their largest, and only the share of them that has no gradient on the way counts.

    Args:
        edge: as in `diagonal_fisher_information`.
        pixels: images `[N, C, H, W]`.
        size: images in one call of the edge.
        prepare: called before each call, to set a random edge's draws.
    """
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(pixels[0].shape, generator=generator).to(pixels)
    first = low = high = torch.empty(0)
    at: list[Tensor] = []
    alive = torch.zeros(())
    squares, start = torch.zeros((), dtype=torch.float64), 0
    for images in torch.split(pixels, size):
        if prepare is not None:
            prepare()
        z, slope = _with_slope(edge, images, v)
        if start == 0:
            first = low = high = z[0]
            at = [torch.zeros_like(low, dtype=torch.long) for _ in range(2)]
            alive, asked = (torch.zeros_like(low, dtype=torch.bool) for _ in range(2))
        for row, value in enumerate(z):
            at[0] = torch.where(value < low, start + row, at[0])
            at[1] = torch.where(value > high, start + row, at[1])
            low, high = torch.minimum(low, value), torch.maximum(high, value)
        alive = alive | (slope.nan_to_num() != 0).any(0)
        asked = asked | ~slope.isnan().any(0)
        squares = squares + (z - first).double().square().sum()
        start += len(images)
    scale = float((squares / (start * len(first))).sqrt())
    varying = high - low > 1e-5 * torch.maximum(low.abs(), high.abs()) + 1e-6 * scale
    varying = varying & asked
    blocked = varying & ~alive
    suspects = blocked.nonzero().flatten()
    if len(suspects):
        some = suspects[torch.linspace(0, len(suspects) - 1, min(_SUSPECTS, len(suspects))).long()]
        kept = [index for index in some.tolist() if not _slopes_between(
            edge, pixels[at[0][index]], pixels[at[1][index]], index, size, prepare)]
        blocked[suspects[round(len(suspects) * len(kept) / len(some)) :]] = False
    return varying, blocked


def _with_slope(
    edge: Callable[[Tensor], Tensor], images: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """`z [N, k]` and `J v` of each image, by differentiating `J^T u` with respect to `u`.

    Where an operator has no second derivative, some outputs are differentiated one by one, and NaN
    stands for the others, which are not judged.
    """
    x = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        z = edge(x).flatten(1)
        flat = z.detach()
        if not z.requires_grad:
            return flat, torch.zeros_like(flat)
        u = torch.zeros_like(z, requires_grad=True)
        slope = None
        try:
            (g,) = torch.autograd.grad(z, x, u, create_graph=True, allow_unused=True)
            if g is None:
                return flat, torch.zeros_like(flat)
            if g.requires_grad:
                (slope,) = torch.autograd.grad(g, u, v.expand_as(g), allow_unused=True)
        except RuntimeError:
            pass
        if slope is not None:
            return flat, slope.detach()
        slope, z = torch.full_like(flat, float("nan")), edge(x).flatten(1)
        for index in torch.linspace(0, z.shape[1] - 1, min(_ASKED, z.shape[1])).long():
            (g,) = torch.autograd.grad(z[:, index].sum(), x, retain_graph=True, allow_unused=True)
            slope[:, index] = 0.0 if g is None else (g * v).flatten(1).sum(1)
        return flat, slope


def _slopes_between(
    edge: Callable[[Tensor], Tensor], a: Tensor, b: Tensor, index: int, size: int,
    prepare: Callable[[], None] | None,
) -> bool:
    """Whether output `index` has a gradient somewhere between two images."""
    for share in torch.linspace(0.0, 1.0, _STEPS).split(size):
        if prepare is not None:
            prepare()
        x = torch.lerp(a, b, share.view(-1, *[1] * a.dim()).to(a)).requires_grad_()
        with torch.enable_grad():
            z = edge(x).flatten(1)[:, index].sum()
        if z.requires_grad:
            (g,) = torch.autograd.grad(z, x, allow_unused=True)
            if g is not None and bool((g != 0).any()):
                return True
    return False


@dataclass(frozen=True)
class JacobianRank:
    """How many directions of `x` the edge answers to, locally: a diagnostic, not a guarantee.

    Attributes:
        effective_rank: `[N]`, `exp(-sum p log p)` of the shares `p_i = s_i^2 / sum s^2` of the
            squared singular values; from 1 to `min(k, d)`, 0 for a zero Jacobian. None where
            it was not computed exactly.
        participation_ratio: `[N]`, `(sum s^2)^2 / sum s^4`; never above `effective_rank`.
        exact: whether the whole Jacobian was computed.
    """

    effective_rank: Tensor | None
    participation_ratio: Tensor
    exact: bool


def jacobian_effective_rank(
    edge: Callable[[Tensor], Tensor],
    pixels: Tensor,
    *,
    exact_limit: int = 2048,
    probes: int = 64,
    generator: torch.Generator | None = None,
) -> JacobianRank:
    """Effective rank of `dz/dx` at each image (Roy and Vetterli 2007); a diagnostic only.

    It says how many directions carry the local response, not how small a response can be read:
    without noise even a tiny one can be inverted. Exact up to `exact_limit` outputs. Beyond,
    `probes` sign vectors `v_i` estimate the participation ratio from `b_i = J^T v_i`:
    `E ||b||^2 = sum s^2`, `E (b_i . b_j)^2 = sum s^4`.

    Args:
        edge, pixels, generator: as in `diagonal_fisher_information`, without its bound.
        exact_limit: the most outputs `k` for the whole Jacobian (k backward passes an image).
        probes: sign vectors beyond that, at least 2; the relative error is about `2 / probes`.

    Returns:
        `effective_rank` `[N]`, `exp(-sum p log p)` of the shares `p_i = s_i^2 / sum s^2` of the
        squared singular values, from 1 to `min(k, d)`, 0 for a zero Jacobian, and None beyond
        `exact_limit`; `participation_ratio` `[N]`, `(sum s^2)^2 / sum s^4`, never above it; and
        `exact`.

    Raises:
        InputError: pixels that are no floating-point ones, fewer than 2 probes where they are used,
            an edge that is random, mixes images, cannot be differentiated or has a slope that is
            not finite.
    """
    outputs = checked_edge(edge, pixels)
    generator = generator or torch.Generator().manual_seed(0)
    if outputs <= exact_limit:
        spectra = [_squared_singular_values(edge, image, outputs) for image in pixels]
        shares = [s / s.sum().clamp_min(torch.finfo(s.dtype).tiny) for s in spectra]
        ranks = [p.sum().round() * torch.special.entr(p).sum().exp() for p in shares]
        ratios = [p.sum().round() / p.square().sum().clamp_min(1e-300) for p in shares]
        return JacobianRank(torch.stack(ranks), torch.stack(ratios), True)
    if probes < 2:
        raise InputError(f"Expected at least 2 probes, came {probes}. Give 16 or more.")
    limit = min(outputs, pixels[0].numel())
    ratios = [_sketched_ratio(edge, image, probes, generator).clamp(max=limit) for image in pixels]
    return JacobianRank(None, torch.stack(ratios), False)


def _squared_singular_values(
    edge: Callable[[Tensor], Tensor], image: Tensor, outputs: int
) -> Tensor:
    """Squared singular values of one image's Jacobian, float64 `[min(k, d)]`, on the CPU.

    Copies of the image differentiate one output each: one backward pass gives many rows.
    """
    d = image.numel()
    x, z = differentiable(edge, image.expand(min(_COPIES, outputs), *image.shape))
    narrow = d < outputs
    total = torch.zeros(d * narrow, d * narrow, dtype=torch.float64, device=x.device)
    kept = []
    for start in range(0, outputs, len(x)):
        index = torch.arange(start, min(start + len(x), outputs), device=z.device)
        v = torch.zeros_like(z)
        v[torch.arange(len(index), device=z.device), index] = 1.0
        rows = pull_back(z, x, v)[: len(index)].double()
        if not bool(torch.isfinite(rows).all()):
            raise InputError(
                "Expected an edge with a finite slope at every image, came NaN or infinity. Look "
                "for a root, a norm or a logarithm at 0 in the edge."
            )
        if narrow:
            total += rows.T @ rows
        else:
            kept.append(rows)
    if kept:
        jacobian = torch.cat(kept)
        total = jacobian @ jacobian.T
    return positive_eigenvalues(total).cpu()


def _sketched_ratio(
    edge: Callable[[Tensor], Tensor], image: Tensor, probes: int, generator: torch.Generator
) -> Tensor:
    """`(sum s^2)^2 / sum s^4` of one image's Jacobian, from `probes` sign vectors."""
    x, z = differentiable(edge, image[None])
    b = torch.cat([pull_back(z, x, signs(z, generator)) for _ in range(probes)]).double()
    products = b @ b.T
    norms = products.diagonal()
    pairs = probes * (probes - 1)
    first = (norms.sum() ** 2 - norms.square().sum()) / pairs
    second = (products.square().sum() - norms.square().sum()) / pairs
    if float(second) == 0.0:
        return torch.zeros((), dtype=torch.float64)
    return (first / second).clamp_min(1.0).cpu()


def _reaches(z: Tensor, x: Tensor) -> bool:
    """Whether `z` depends on `x` in autograd's graph; parameters of the edge do not count."""
    if not z.requires_grad:
        return False
    (g,) = torch.autograd.grad(
        z, x, torch.zeros_like(z), retain_graph=True, allow_unused=True
    )
    return g is not None


def _differ(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs differ by more than arithmetic can."""
    scale = a.double().square().mean().sqrt()
    return bool((a.double() - b.double()).square().mean().sqrt() > _SAME * scale)
