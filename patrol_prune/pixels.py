"""Between pixels on [0, 1] and the input a model was trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patrol_prune.errors import InputError


@dataclass(frozen=True)
class Normalization:
    """Per-channel standardisation of images, `x = (pixels - mean) / std`.

    Attacks and the adversarial term measure reconstructions on [0, 1] pixels, whatever the model
    eats; this is the map between the two.

    Without arguments nothing is changed, whatever the number of channels.

    Args:
        mean: one value per image channel, in pixel units.
        std: one positive value per image channel, in pixel units.

    Raises:
        InputError: `mean` and `std` of other lengths, or a `std` that is not positive.
    """

    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or min(self.std, default=0.0) <= 0.0:
            raise InputError(
                "A Normalization takes one mean and one positive std per channel, came "
                f"mean={self.mean}, std={self.std}. Give both with the same length."
            )

    @classmethod
    def imagenet(cls) -> Normalization:
        """The statistics that torchvision's pretrained weights expect."""
        return cls((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def to_input(self, pixels: Tensor) -> Tensor:
        """Pixels `[N, C, H, W]` on [0, 1] to model input of the same shape.

        Raises:
            InputError: images of another number of channels, or without a batch dimension.
        """
        mean, std = self._stats(pixels)
        return (pixels - mean) / std

    def to_pixels(self, x: Tensor, *, clamp: bool = True) -> Tensor:
        """Model input `[N, C, H, W]` to pixels, clamped to [0, 1] where `clamp`; raises as
        `to_input`."""
        mean, std = self._stats(x)
        pixels = x * std + mean
        return pixels.clamp(0.0, 1.0) if clamp else pixels

    def _stats(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self.mean, self.std
        if images.dim() == 4 and self == Normalization():
            mean, std = mean[:1], std[:1]
        elif images.dim() != 4 or images.shape[1] != len(self.mean):
            raise InputError(
                f"Expected images [N, {len(self.mean)}, H, W] for this Normalization, came "
                f"{tuple(images.shape)}. Add the batch dimension, or give one mean per channel."
            )
        shape = (1, -1, 1, 1)
        return (
            torch.tensor(mean, dtype=images.dtype, device=images.device).view(shape),
            torch.tensor(std, dtype=images.dtype, device=images.device).view(shape),
        )
