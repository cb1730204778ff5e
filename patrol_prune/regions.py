"""Where a picture is private: errors count more there, in what hides it and in what attacks it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patrol_prune.errors import InputError


@dataclass(frozen=True)
class PrivateRegions:
    """Which pixels of a picture are private, and how much of its error is counted there.

    A number plate or a face fills a small part of a picture, so that an error over all pixels
    hardly looks at it. With `m` what `find` gives, and `s` the share, pixel `p` of a picture of
    `P` pixels weighs::

        w_p = (1 - s) + s P m_p / sum_q m_q

    Weights have the mean 1 over each picture. A picture in which nothing is private (`sum m < 1`,
    less than one pixel) weighs the same everywhere.

    Args:
        find: pixels `[B, C, H, W]` on [0, 1] to `m`, `[B, 1, H, W]` or `[B, H, W]`: 1 where the
            picture is private, 0 elsewhere. A module, in evaluation mode, gets them where it is, a
            function where they are. Cut probabilities off: small ones add up over a whole picture.
        share: `s`, of the weight that lies within the regions, above 0 and up to 1.

    Raises:
        InputError: `find` cannot be called, or a share out of its range.
    """

    find: Callable[[Tensor], Tensor]
    share: float = 0.5

    def __post_init__(self) -> None:
        if not callable(self.find):
            raise InputError(
                "Expected find as a function from pixels [B, C, H, W] to a mask [B, 1, H, W], came "
                f"{type(self.find).__name__}. Give a detector, or a function around one.")
        check_share(self.share)

    @torch.no_grad()
    def masks(self, pixels: Tensor) -> Tensor:
        """`m` of these pictures, `[B, 1, H, W]`, float32.

        Raises:
            InputError: `find` gives something else than one finite number >= 0 for every pixel, or
                is a module in training mode.
        """
        found: Any = self.find(self._at_home(pixels))
        batch, _, height, width = pixels.shape
        if isinstance(found, Tensor) and found.dim() == 3:
            found = found.unsqueeze(1)
        if not isinstance(found, Tensor) or found.shape != (batch, 1, height, width):
            came = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(
                f"Expected find to give a mask [{batch}, 1, {height}, {width}] for these pictures, "
                f"came {came}. Give one number for each pixel: 1 where it is private, 0 elsewhere.")
        found = found.to(pixels.device, torch.float32)
        low, high = (float(v) for v in found.aminmax())
        if not (low >= 0.0 and math.isfinite(high)):
            raise InputError(
                f"Expected find to give finite numbers of at least 0, came {low:g} to {high:g}. "
                "Give 1 where a pixel is private and 0 elsewhere, no logits.")
        return found

    def _at_home(self, pixels: Tensor) -> Tensor:
        """The pixels where the detector is, if that is a module."""
        if not isinstance(self.find, nn.Module):
            return pixels
        if self.find.training:
            raise InputError("Expected a detector in evaluation mode, came one in training mode: "
                             "what it finds would hang on the batch. Call eval() on it.")
        home = next(itertools.chain(self.find.parameters(), self.find.buffers()), pixels)
        return pixels.to(home.device)

    def weights(self, pixels: Tensor) -> Tensor:
        """`w` of these pictures, `[B, 1, H, W]`, float32; errors as in `masks`."""
        masks = self.masks(pixels)
        total = masks.sum((1, 2, 3), keepdim=True)
        inside = masks / total.clamp(min=1.0) * (pixels.shape[2] * pixels.shape[3])
        return torch.where(total < 1.0, 1.0, (1.0 - self.share) + self.share * inside)


def check_share(share: object) -> None:
    """An InputError where this is no share of an error above 0."""
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0.0 < share <= 1.0:
        raise InputError(f"Expected share as a number above 0 and up to 1, came {share!r}."
                         " Leave private regions out where no pixel counts more than others.")


def check_regions(private: object) -> None:
    """An InputError where this is neither None nor `PrivateRegions`."""
    if private is not None and not isinstance(private, PrivateRegions):
        raise InputError(
            f"Expected private as PrivateRegions(find, share), came {type(private).__name__}. "
            "Wrap a detector: PrivateRegions(detector).")
