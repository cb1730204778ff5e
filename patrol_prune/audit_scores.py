"""One attack's reconstructions in numbers: per image, their means, and the worst 5%."""

from __future__ import annotations

from torch import Tensor

from patrol_prune.attacks.identification import identify
from patrol_prune.metrics import MS_SSIM_SIDE, gmsd, ms_ssim, mse, psnr, ssim

WORST_SHARE = 0.05
LARGEST_PSNR = 100.0


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
    worst = max(1, round(WORST_SHARE * len(originals)))
    numbers["ssim_worst5"] = _mean(per_image["ssim"].topk(worst).values)
    numbers["mse_worst5"] = _mean(per_image["mse"].topk(worst, largest=False).values)
    found = identify(originals, guess) if len(originals) > 1 else None
    for name in ("rank1", "rank5", "chance1", "chance5"):
        numbers[name] = None if found is None else getattr(found, name)
    return numbers, per_image


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
