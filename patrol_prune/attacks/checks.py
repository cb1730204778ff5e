"""An evaluation that inspects itself: signs that an attack was too weak to judge a defence.

A flag does not say that the edge leaks, it says that a good-looking number may not be one (in the
manner of AutoAttack's checks, Croce and Hein 2020).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patrol_prune.attacks.base import Attack, FitRecord
from patrol_prune.metrics import mse

_FELL = 0.99
_BEATS = 0.98
_CONTRAST = 0.25
_INVERTS = 0.2


@dataclass(frozen=True)
class Flag:
    """One warning: its name, what it means and what to do."""

    name: str
    meaning: str
    advice: str


LOSS_DID_NOT_FALL = Flag(
    "loss_did_not_fall",
    "The attack's held-out loss stayed within 1% of its value before training: it learnt nothing.",
    "Check the learning rate and the pairing of features and images; ignore this attack's score.",
)
NOT_CONVERGED = Flag(
    "not_converged",
    "The attack was still improving when its training ended: a longer one reconstructs better.",
    "Raise epochs or max_extensions until this flag goes; the score so far flatters the defence.",
)
NOT_BETTER_THAN_MEAN_IMAGE = Flag(
    "not_better_than_mean_image",
    "The reconstructions are no closer to the images than the attacker's mean image is.",
    "Either nothing leaks or the attack failed: see whether the same attack succeeds on the "
    "undefended split and on an identity edge (self_test), and try another family and seed.",
)
CONTRAST_COLLAPSED = Flag(
    "contrast_collapsed",
    "The reconstructions have less than a quarter of the originals' contrast.",
    "Look at the images: the attack answers with near-uniform ones. Try another loss and seed.",
)
CONSTANT_FEATURES = Flag(
    "constant_features",
    "The edge sends the same feature for every image: neither an attack nor the task can use it.",
    "Check the accuracy: the edge is probably dead, not private.",
)
CANNOT_INVERT_IDENTITY = Flag(
    "cannot_invert_identity",
    "The attack cannot reconstruct images that are sent as they are.",
    "The attack or its settings are broken; no score that it gives says anything of a defence.",
)


def check_features(z: Tensor) -> list[Flag]:
    """Flag features `[N, ...]` that do not differ between images, up to float32 rounding."""
    spread = (z - z[:1]).abs().max()
    return [CONSTANT_FEATURES] if bool(spread <= 1e-6 * z[:1].abs().max()) else []


def check_fit(record: FitRecord) -> list[Flag]:
    """Flag a training whose loss did not fall, or was still falling at its end."""
    flags = []
    if not record.best_loss < _FELL * record.initial_loss:
        flags.append(LOSS_DID_NOT_FALL)
    if not record.plateau:
        flags.append(NOT_CONVERGED)
    return flags


def check_reconstructions(
    originals: Tensor, reconstructions: Tensor, mean_image: Tensor
) -> list[Flag]:
    """Flag reconstructions `[N, C, H, W]` that the mean image `[C, H, W]` matches, or flat ones."""
    flags = []
    floor = mse(originals, mean_image.expand_as(originals)).mean()
    if not bool(mse(originals, reconstructions).mean() < _BEATS * floor):
        flags.append(NOT_BETTER_THAN_MEAN_IMAGE)
    contrast = reconstructions.flatten(1).std(dim=1).mean()
    if bool(contrast < _CONTRAST * originals.flatten(1).std(dim=1).mean()):
        flags.append(CONTRAST_COLLAPSED)
    return flags


def self_test(
    attack: Attack,
    *,
    image_shape: tuple[int, int, int] = (3, 16, 16),
    images: int = 256,
    seed: int = 0,
) -> list[Flag]:
    """Can this attack invert an edge that sends the image itself?

    It is trained on smooth random images and must reach a fifth of the mean image's error on
    fresh ones. Give a small, short configuration: the answer is about the code and the settings,
    and comes in seconds.

    Returns:
        An empty list if it can, else `CANNOT_INVERT_IDENTITY`.
    """
    pixels = smooth_images(images + 64, image_shape, seed=seed)
    known, fresh = pixels[:images], pixels[images:]
    attack.fit(known, known)
    error = mse(fresh, attack.reconstruct(fresh).to(fresh)).mean()
    floor = mse(fresh, known.mean(0).expand_as(fresh)).mean()
    return [] if bool(error < _INVERTS * floor) else [CANNOT_INVERT_IDENTITY]


def smooth_images(count: int, image_shape: tuple[int, int, int], *, seed: int = 0) -> Tensor:
    """Random images `[count, *image_shape]` on [0, 1]: enlarged coarse noise, seeded."""
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = image_shape
    coarse = torch.rand(count, channels, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(
        coarse, size=(height, width), mode="bilinear", align_corners=False
    ).clamp(0.0, 1.0)
