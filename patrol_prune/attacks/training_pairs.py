"""The (feature, image) pairs that a decoder learns from: kept, or asked of the edge each time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from patrol_prune.attacks.base import EdgeFunction, Knowledge
from patrol_prune.errors import InputError
from patrol_prune.metrics import check_pixels

SMALLEST_TRAINING_SET = 20
_RESIDENT_BYTES = 4 << 30
_STORED_BYTES = 2 << 30
_CHUNK = 64


class TrainingPairs:
    """Batches of the attacker's own images with what the edge uploads for them.

    A random edge is asked anew for every batch, so that an epoch never sees a draw twice and what
    is learnt is the mean over draws. The same is done where there are no stored features, or where
    they should not be stored: 10,000 features of 64x32x32 are 2.6 GB. Otherwise the stored ones are
    used.

    Args:
        known: what the attacker has; `pixels` may be uint8.
        device: where batches go.
        recompute: ask the edge although stored features would do.
        mirror: every image stands there mirrored as well, `N` places behind itself, with what the
            edge uploads for that; without an edge to ask this does nothing.

    Attributes:
        asks: whether features come from the edge, batch by batch.
        own: how many images the attacker has, without mirrored ones.
        feature_shape: without the batch.
        image_shape: `(channels, height, width)`.

    Raises:
        InputError: too few images, features that do not belong to them, NaN or infinity, pixels
            outside [0, 1], neither features nor an edge.
    """

    def __init__(
        self, known: Knowledge, device: torch.device, *, recompute: bool = False,
        mirror: bool = False,
    ) -> None:
        self.device = device
        pixels = known.pixels
        _check_pixels(pixels)
        edge = known.edge
        if recompute and edge is None:
            raise InputError(
                "Features can be recomputed only where the edge can be queried, and it was not "
                "given. Give Knowledge(edge=...), or set recompute=False."
            )
        self._edge: EdgeFunction | None = None
        self._z: Tensor | None = None
        if edge is not None and (recompute or known.random_edge or known.z is None):
            self._edge = edge
            shape = self._ask(pixels[:2]).shape
        else:
            self._z = z = known.pairs()[0].detach()
            if len(z) != len(pixels):
                raise InputError(
                    f"Expected one feature per image, came {len(z)} features for {len(pixels)} "
                    "images. Give the features of these images, in their order."
                )
            shape = z.shape
        self.feature_shape: tuple[int, ...] = tuple(shape[1:])
        channels, height, width = pixels.shape[1:]
        self.image_shape: tuple[int, int, int] = (channels, height, width)
        numbers = pixels.numel() + (0 if self._z is None else self._z.numel())
        self._pixels = pixels.detach()
        self.own = len(pixels)
        self.mirrored = mirror and edge is not None
        if self.mirrored and self._z is not None:
            if 8 * self._z.numel() > _STORED_BYTES:
                self._edge, self._z = edge, None
            else:
                both = self._with_mirrored(self._z, edge)
                self.mirrored = bool(torch.isfinite(both).all())
                self._z = both if self.mirrored else self._z
                numbers += self._z.numel() - len(pixels) * self._z[0].numel()
        home = device if 4 * numbers <= _RESIDENT_BYTES else torch.device("cpu")
        self._pixels = self._pixels.to(home)
        self._z = None if self._z is None else self._z.to(home)

    def _with_mirrored(self, z: Tensor, edge: EdgeFunction | None) -> Tensor:
        """`[2N, ...]`: `z`, and behind it what the edge uploads for the mirrored images."""
        self._edge = edge
        both = z.new_empty(2 * self.own, *z.shape[1:])
        both[: self.own] = z
        for start in range(0, self.own, _CHUNK):
            part = self._ask(self._pixels[start : start + _CHUNK].flip(-1))
            both[self.own + start : self.own + start + len(part)] = part.to(both)
        self._edge = None
        return both

    def __len__(self) -> int:
        return self.own * (1 + self.mirrored)

    @property
    def asks(self) -> bool:
        """Whether features come from the edge, batch by batch."""
        return self._edge is not None

    def images(self, index: Tensor) -> Tensor:
        """The images at `index`, float32 on [0, 1], on the device."""
        index = index.to(self._pixels.device)
        pixels = self._pixels[index % self.own]
        turned = index >= self.own
        if bool(turned.any()):
            pixels = torch.where(turned.view(-1, 1, 1, 1), pixels.flip(-1), pixels)
        pixels = pixels.to(self.device)
        return pixels.float() / 255.0 if pixels.dtype == torch.uint8 else pixels.float()

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """`(z, pixels)` at `index`, on the device; `z` of a random edge is a fresh draw."""
        pixels = self.images(index)
        if self._z is None:
            return self._ask(pixels), pixels
        return self._z[index.to(self._z.device)].to(self.device), pixels

    def features(self) -> Iterator[Tensor]:
        """The feature of every image as it is, in chunks on the device; NaN or infinity is refused.
        """
        for index in torch.split(torch.arange(self.own), _CHUNK):
            z = self.batch(index)[0]
            if not bool(torch.isfinite(z).all()):
                raise InputError(
                    "Expected finite features, came NaN or infinity. Look at the edge: its "
                    "weights or normalisation are broken, and an attack on it would say nothing."
                )
            yield z

    @torch.no_grad()
    def _ask(self, pixels: Tensor) -> Tensor:
        assert self._edge is not None
        if pixels.dtype == torch.uint8:
            pixels = pixels.float() / 255.0
        z = self._edge(pixels.to(self.device)).to(self.device)
        if len(z) != len(pixels):
            raise InputError(
                f"Expected one feature per image, came {len(z)} features for {len(pixels)} "
                "images. An edge function maps [N, C, H, W] to [N, ...]."
            )
        return z


def _check_pixels(pixels: Tensor) -> None:
    if pixels.dim() != 4:
        raise InputError(
            f"Expected images [N, C, H, W], came {tuple(pixels.shape)}. One image has a batch "
            "dimension too."
        )
    if len(pixels) < SMALLEST_TRAINING_SET:
        raise InputError(
            f"An attack learns from at least {SMALLEST_TRAINING_SET} images, came {len(pixels)}. "
            "Give the attacker more data."
        )
    if pixels.dtype != torch.uint8:
        check_pixels(pixels, "pixels")
