"""What every attack offers, what it may have, and what it reports about its own training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from patrol_prune.errors import InputError

EdgeFunction = Callable[[Tensor], Tensor]
"""Pixels `[N, C, H, W]` on [0, 1] to what is uploaded for them, `[N, ...]`.

It is the real edge: the model's normalisation, noise and quantisation are inside, and every call
of a random edge draws anew. It can be differentiated with respect to the pixels where the edge
can.
"""


@dataclass(frozen=True)
class Knowledge:
    """What an attacker may have; an attack reads only what its threat model grants.

    An `audit` fills in all that there is, for every attack.

    Attributes:
        pixels: the attacker's own images `[N, C, H, W]`, float32 on [0, 1].
        z: what the edge uploads for them, `[N, ...]`, one draw where the edge is random; None for
            an attacker who cannot query it, and where an audit finds them too large to keep: then
            ask `edge`.
        edge: the real edge, pixels `[N, C, H, W]` on [0, 1] to uploads `[N, ...]`, with its
            normalisation and noise inside. A black-box attacker only queries it, a white-box
            attacker differentiates through it; None where he can do neither.
        cloud: the frozen second half, `z [N, ...]` to logits; None where it cannot be reached.
        labels: classes of the attacker's images, `[N]`; None without.
        observed: uploads of the victim that were overheard, `[M, ...]`, without their images;
            None without. A victim's image is never among what an attacker gets.
        shadow_edge: `seed -> module`, the edge's architecture with fresh weights, model input to
            `z`, without noise; None where the architecture is unknown.
        random_edge: whether two queries with the same image differ.
    """

    pixels: Tensor
    z: Tensor | None = None
    edge: EdgeFunction | None = None
    cloud: nn.Module | None = None
    labels: Tensor | None = None
    observed: Tensor | None = None
    shadow_edge: Callable[[int], nn.Module] | None = None
    random_edge: bool = False

    def pairs(self) -> tuple[Tensor, Tensor]:
        """`(z, pixels)`, for attacks that learn from pairs; an InputError without `z`."""
        if self.z is None:
            raise InputError(
                "This attack learns from features of the attacker's own images, and got none. "
                "Give Knowledge(z=...), or use an attack that needs no query."
            )
        return self.z, self.pixels

    def white_box(self) -> EdgeFunction:
        """The edge, for attacks that differentiate through it; an InputError without."""
        if self.edge is None:
            raise InputError(
                "A white-box attack needs the edge itself and got none. Give Knowledge(edge=...), "
                "or use inverse_network, which learns from pairs."
            )
        return self.edge

    def copied(self) -> Knowledge:
        """The same with tensors of its own, for who changes them."""
        own: dict[str, Any] = {name: value.clone() for name, value in vars(self).items()
                               if isinstance(value, Tensor)}
        return replace(self, **own)

    def first(self, count: int) -> Knowledge:
        """The same with only `count` of the attacker's images, always the same random ones."""
        index = some_of(len(self.pixels), count)
        if index is None:
            return self
        pixels, z, labels = (None if value is None else value[index.to(value.device)]
                             for value in (self.pixels, self.z, self.labels))
        assert pixels is not None
        return replace(self, pixels=pixels, z=z, labels=labels)


def some_of(total: int, count: int) -> Tensor | None:
    """Indices of `count` out of `total` images, or None for all of them, in their own order.

    They are the first of one fixed permutation, so that more images hold the fewer ones, and images
    that come sorted by class are not all of one class.
    """
    if count >= total:
        return None
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count]


@dataclass(frozen=True)
class FitRecord:
    """How an attack's training went.

    Attributes:
        history: the loss on the attacker's held-out images after each epoch.
        train_history: the mean training loss of each epoch.
        initial_loss: the held-out loss before the first step.
        mean_image_loss: the held-out loss of the attacker's mean image, in the same unit.
        best_epoch: index into `history` of the weights that were kept.
        plateau: whether the held-out loss had stopped improving (see the attack for the rule).
        extensions: how many times the schedule was extended to get there.
        seconds: wall-clock time of the fit.
        gradient_norm: for attacks that differentiate through the edge, the mean norm of the
            feature loss's gradient with respect to the pixels at the start; None for others.
        chosen: the setting that the attack chose on the attacker's own images, as plain data.
        start_loss: for an attack that chose to begin at another attack's answer, what that answer
            scores, in the unit of `history`; None for others.
    """

    history: tuple[float, ...]
    train_history: tuple[float, ...]
    initial_loss: float
    mean_image_loss: float
    best_epoch: int
    plateau: bool
    extensions: int
    seconds: float
    gradient_norm: float | None = None
    chosen: dict[str, Any] | None = None
    start_loss: float | None = None

    @property
    def best_loss(self) -> float:
        """The loss of the weights, or the setting, that were kept."""
        return self.history[self.best_epoch]

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON-safe plain data."""
        return asdict(self)


@runtime_checkable
class Attack(Protocol):
    """An attack that learns what it can and then reconstructs; bring your own with these two.

    No base class is needed. An attribute `box` ("black", "white", "none") may say what the attack
    does to the edge, and `held_out` which of its images it did not learn from.
    """

    def fit(self, known: Knowledge) -> FitRecord | None:
        """Learn from what the attacker may have.

        Args:
            known: his images and what he can do with the edge.

        Returns:
            how that went, or None where there is nothing to record.
        """

    def reconstruct(self, z: Tensor) -> Tensor:
        """Uploads `[N, ...]` to pixels `[N, C, H, W]` on [0, 1]."""


def check_uploads_like(z: Tensor, shape: Sequence[int]) -> None:
    """An InputError unless these are uploads `[N, *shape]`, as an attack was fitted on."""
    if not isinstance(z, Tensor) or tuple(z.shape[1:]) != tuple(shape) or z.dim() <= len(shape):
        came = tuple(z.shape) if isinstance(z, Tensor) else f"a {type(z).__name__}"
        raise InputError(
            f"Expected uploads [N, {', '.join(map(str, shape))}], as this attack was fitted on, "
            f"came {came}. Give what the same edge uploads, a single one as z[None], or fit anew."
        )


def draws_differ(edge: EdgeFunction, pixels: Tensor) -> bool:
    """Whether two queries of the edge with the same images `[N, C, H, W]` give other features."""
    with torch.no_grad():
        return not torch.equal(edge(pixels), edge(pixels))
