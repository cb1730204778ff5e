"""One attack's reconstructions in numbers: per image, their means, and the worst 5%."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from patrol_prune.attacks.identification import identify
from patrol_prune.errors import InputError
from patrol_prune.metrics import (
    MS_SSIM_SIDE,
    check_pixels,
    gmsd,
    ms_ssim,
    mse,
    psnr,
    ssim,
    ssim_values,
    thumbnail,
)
from patrol_prune.regions import PrivateRegions

WORST_SHARE = 0.05
LARGEST_PSNR = 100.0
_SAME = 1e-6
_CHUNK = 128
SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128)
"""Of the thumbnails that reconstructions are held against, in pixels."""


def score(originals: Tensor, guess: Tensor) -> tuple[dict[str, float | None], dict[str, Tensor]]:
    """`(numbers, per_image)` of reconstructions `[N, C, H, W]` of `originals`, both on [0, 1].

    `numbers` are means over the images; `ssim_worst5` and `mse_worst5` those over the 5% that were
    reconstructed best, `rank1` and `rank5` the shares of images that their reconstruction is most
    like (or among the five it is most like) out of all originals, `chance1` and `chance5` what
    guessing gives.
    What cannot be measured is None: `ms_ssim` on images too small for it, ranks of one image.
    `per_image` holds `[N]` for each measure.
    """
    per_image = {
        "ssim": ssim(originals, guess),
        "psnr": psnr(originals, guess).clamp(max=LARGEST_PSNR),
        "mse": mse(originals, guess),
        "gmsd": gmsd(originals, guess),
    }
    if min(originals.shape[2:]) >= MS_SSIM_SIDE:
        per_image["ms_ssim"] = ms_ssim(originals, guess)
    numbers: dict[str, float | None] = {"ms_ssim": None}
    numbers |= {name: _mean(values) for name, values in per_image.items()}
    numbers["ssim_worst5"] = _worst(per_image["ssim"])
    numbers["mse_worst5"] = -_worst(-per_image["mse"])
    found = identify(originals, guess) if len(originals) > 1 else None
    for name in ("rank1", "rank5", "chance1", "chance5"):
        numbers[name] = None if found is None else getattr(found, name)
    return numbers, per_image


class RegionScore:
    """How close reconstructions come to their originals within private regions alone.

    Args:
        originals: `[N, C, H, W]` on [0, 1].
        private: where they are private.

    Raises:
        InputError: a detector that gives no mask, or finds nothing in any of them.
    """

    def __init__(self, originals: Tensor, private: PrivateRegions) -> None:
        masks = torch.cat([private.masks(part) for part in originals.split(_CHUNK)])
        self.seen = (masks.sum((1, 2, 3)) >= 1.0).nonzero().flatten()
        if not len(self.seen):
            raise InputError(
                f"Expected private regions in some of the {len(originals)} victims' images, came "
                "none. Look at what find gives for them: 1 where a pixel is private.")
        inside = masks[self.seen]
        self.originals = originals[self.seen]
        self.weights = inside / inside.mean((1, 2, 3), keepdim=True)

    def of(self, guess: Tensor) -> dict[str, float]:
        """`private_ssim` and `private_mse`, means over the `private_images` that have regions; each
        is a mean over the pixels of the regions.
        """
        guess = guess[self.seen]
        squares = (guess - self.originals).square() * self.weights
        likeness = ssim_values(self.originals.double(), guess.double(), self.weights.double())
        return {"private_ssim": _mean(likeness), "private_mse": _mean(squares.flatten(1).mean(1)),
                "private_images": len(self.seen)}


def check_guess(guess: Tensor, originals: Tensor, name: str) -> None:
    """An InputError where an attack's reconstructions are no images like the originals."""
    if guess.shape != originals.shape:
        raise InputError(
            f"Expected the attack {name} to reconstruct {tuple(originals.shape)}, came "
            f"{tuple(guess.shape)}."
        )
    check_pixels(guess, f"what the attack {name} reconstructs")


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _worst(values: Tensor) -> float:
    """The mean of the largest 5%."""
    return _mean(values.topk(max(1, round(WORST_SHARE * len(values)))).values)


def thumbnails(originals: Tensor, up_to: float) -> list[dict[str, Any]]:
    """What thumbnails of the originals show: one row per side, smallest first.

    Args:
        originals: `[N, C, H, W]` on [0, 1].
        up_to: stop behind the first whose mean SSIM is above this one.

    Returns:
        rows with `side` (pixels), the means `ssim`, `ssim_worst5` and `mse`, and `images`. The
        last that there can be is the picture itself, with its shorter side.
    """
    rows: list[dict[str, Any]] = []
    whole = min(originals.shape[2:])
    for side in (*(s for s in SIDES if s < whole), whole):
        shown = originals if side == whole else thumbnail(originals, side).clamp(0.0, 1.0)
        values = ssim(originals, shown)
        rows.append({"side": side, "ssim": _mean(values), "ssim_worst5": _worst(values),
                     "mse": _mean(mse(originals, shown)), "images": len(originals)})
        if rows[-1]["ssim"] > up_to:
            break
    return rows


def thumbnail_side(rows: list[dict[str, Any]], seen: float) -> float | None:
    """The side of the thumbnail whose mean SSIM is `seen`, in pixels, between rows by a line.

    That of the picture, the last row's, where everything is seen. None where one pixel, the mean
    colour, shows more, or no row as much.
    """
    if rows and shows_all(rows, seen):
        return float(rows[-1]["side"])
    for small, large in pairwise(rows):
        if small["ssim"] <= seen <= large["ssim"] and large["ssim"] > small["ssim"]:
            share = (seen - small["ssim"]) / (large["ssim"] - small["ssim"])
            return float(small["side"] + share * (large["side"] - small["side"]))
    return None


def shows_all(rows: list[dict[str, Any]], seen: float) -> bool:
    """Whether the last row is the picture itself and `seen` is as good."""
    return bool(rows[-1]["ssim"] >= 1.0 - _SAME and seen >= rows[-1]["ssim"] - _SAME)
