"""What a term is predicted to change by when a structure is removed, from gradients."""

from __future__ import annotations

from torch import Tensor

IGNORED = -100
"""The label that PyTorch's losses leave out."""


def first_order_change(gradient: Tensor, mask: Tensor) -> Tensor:
    """`L(m_s = 0) - L(m_s)` to first order: `-dL/dm_s * m_s`, for every s."""
    return -gradient * mask


def second_order_change(shares: Tensor, mask: Tensor, counted: int | None = None) -> Tensor:
    """`-g m + mean_i (g_i m)^2 / 2`, for every structure.

    Args:
        shares: of each image in the gradient of a mean over images, `g_i / B`, `[B, ...]`.
        mask: at which it was taken, `[...]`.
        counted: of how many images it is the mean, where some have no part in it; else all, B.

    Source:
        the diagonal of the empirical Fisher information for the Hessian, as in Theis et al.,
        Faster gaze prediction with dense networks and Fisher pruning, 2018 (arXiv 1801.05787).
    """
    curvature = (len(shares) if counted is None else counted) * shares.square().sum(0)
    return first_order_change(shares.sum(0), mask) + curvature * mask.square() / 2


def are_classes(y: Tensor) -> bool:
    """Whether targets are one class number for each image."""
    return not y.is_floating_point() and y.dim() == 1


def counted_labels(y: Tensor) -> int:
    """The images whose label counts in a mean over them."""
    return int((y != IGNORED).sum()) if are_classes(y) else len(y)
