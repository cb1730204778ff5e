"""The block-wise local Lipschitz term of PATROL, `L_lip = sum_i alpha_i k_i`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from patrol_prune.cost import generators_of
from patrol_prune.errors import InputError

LipschitzForm = Literal["scale_free", "paper", "spectral"]
SampledForm = Literal["paper", "scale_free"]
Reduction = Literal["max", "mean"]
TINY = 1e-12
NEXT_TO_NOTHING = 1e-3


def block_lipschitz(
    blocks: Sequence[nn.Module],
    x: Tensor,
    delta: Tensor,
    *,
    form: SampledForm = "paper",
    reduction: Reduction = "max",
) -> Tensor:
    """Local Lipschitz constant of every block of a chain, estimated with one perturbation.

    With `h_0 = x`, `h_i = f_i(h_{i-1})` and `D_i = h_i(x + delta) - h_i(x)`::

        paper:       k_i = sup_x ||D_i|| / ||D_{i-1}||
        scale_free:  k_i = sup_x (||D_i|| / ||h_i||) / (||D_{i-1}|| / ||h_{i-1}||)

    The norm is Euclidean over everything but the batch, `D_0 = delta`. An image whose `h_i` has
    less than a thousandth of the batch's usual norm has no size to be relative to, and does not
    count in the scale-free form, neither before nor behind a block. The paper's `k_N` halves
    when the last layer is scaled by one half and the next one by two, though nothing leaks less;
    the scale-free form does not move. Per image, the paper's ratios multiply to the ratio of the
    whole chain.

    A block that draws, as dropout in training mode does, draws the same for both inputs: two
    functions that differ by their draws alone would have no constant.

    Args:
        blocks: the chain `f_1 .. f_N`; each takes the output of the one before.
        x: model input, `[B, ...]`.
        delta: the perturbation, of the shape of `x`.
        form: which ratio.
        reduction: "max" over the batch stands for the supremum; "mean" is smoother.

    Returns:
        `k`, shape `[N]`, non-negative; 0 for a constant block, 1 for a rotation.

    Raises:
        InputError: another form or reduction, or a perturbation of another shape.

    Source:
        Ding et al., PATROL, WACV 2024; the scale-free form is ours.
    """
    if form not in ("paper", "scale_free") or reduction not in ("max", "mean"):
        raise InputError(
            'Expected form "paper" or "scale_free" and reduction "max" or "mean", came '
            f"{form!r} and {reduction!r}."
        )
    if delta.shape != x.shape:
        raise InputError(
            f"Expected a perturbation of the input's shape {tuple(x.shape)}, came "
            f"{tuple(delta.shape)}."
        )
    clean, noisy = x, x + delta
    before, sized_before = _size(noisy - clean, clean, form), _has_size(clean)
    constants = []
    for block in blocks:
        draw_again = _same_draws(block, x.device)
        clean = block(clean)
        draw_again()
        noisy = block(noisy)
        after = _size(noisy - clean, clean, form)
        ratio = after / before.clamp_min(TINY)
        if form == "scale_free":
            sized_after = _has_size(clean)
            sized, sized_before = sized_before & sized_after, sized_after
            ratio = torch.where(sized, ratio, 0.0) * (
                1.0 if reduction == "max" else len(sized) / sized.sum().clamp_min(1))
        constants.append(ratio.max() if reduction == "max" else ratio.mean())
        before = after
    return torch.stack(constants)


def lipschitz_loss(k: Tensor, alpha: float | Sequence[float] | Tensor) -> Tensor:
    """`L_lip = sum_i alpha_i k_i`, a scalar.

    Args:
        k: the blocks' constants `[N]`, as `block_lipschitz` gives them.
        alpha: one for all blocks, or one for each.

    Raises:
        InputError: as many as neither.
    """
    weights = torch.as_tensor(alpha, dtype=k.dtype, device=k.device)
    if weights.dim() and weights.shape != k.shape:
        raise InputError(
            f"Expected one alpha, or one for each of the {len(k)} blocks, came {len(weights)}."
        )
    return (weights * k).sum()


@contextlib.contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Norms of batches and instances normalise as their mode says, but their running statistics
    stay as they are.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, _NormBase)]
    before = [(layer.momentum, layer.num_batches_tracked) for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked = layer.num_batches_tracked.clone()
    try:
        yield
    finally:
        for layer, (momentum, tracked) in zip(layers, before, strict=True):
            layer.momentum = momentum
            layer.num_batches_tracked = tracked


def _same_draws(block: nn.Module, device: torch.device) -> Callable[[], None]:
    """A function that puts every generator that the block may draw from back to where it is."""
    own = [(g, g.get_state()) for g in generators_of(block)]
    on_cpu = torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def draw_again() -> None:
        for generator, state in own:
            generator.set_state(state)
        torch.set_rng_state(on_cpu)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu, device)

    return draw_again


def _has_size(h: Tensor) -> Tensor:
    """Whether each image's `h` is not next to nothing beside the batch's. Shape `[B]`, bool."""
    norms = torch.linalg.vector_norm(h.detach().flatten(1), dim=1)
    return norms > NEXT_TO_NOTHING * norms.square().mean().sqrt()


def _size(difference: Tensor, reference: Tensor, form: SampledForm) -> Tensor:
    """`||D||` per image, over `||h||` where the form is scale-free. Shape `[B]`."""
    size = torch.linalg.vector_norm(difference.flatten(1), dim=1)
    if form == "paper":
        return size
    return size / torch.linalg.vector_norm(reference.flatten(1), dim=1).clamp_min(TINY)
