"""An evaluation that inspects itself: signs that an attack was too weak to judge a defence.

A flag does not say that the edge leaks, it says that a good-looking number may not be one (in the
manner of AutoAttack's checks, Croce and Hein 2020).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch
from torch import Tensor
from torch.nn import functional

from patrol_prune.attacks.base import Attack, EdgeFunction, FitRecord, Knowledge
from patrol_prune.errors import InputError, TrainingError, nearest
from patrol_prune.metrics import SSIM_SIDE, mse, ssim

logger = logging.getLogger(__name__)

_FELL = 0.99
_BEATS = 0.98
_CONTRAST = 0.25
_INVERTS = 0.2
_WEAKER = 0.02
_MORE_HELPS = 0.05
_CHANCE = 1e-3
_NEGLIGIBLE = 1e-3
_BLOCKED = 0.01
_NAMED = 10


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
ATTACK_FAILED = Flag(
    "attack_failed",
    "The attack broke off: its loss became NaN or infinite. It has no score.",
    "Lower its learning rate or use fp32. If it differentiates through the edge, look for a "
    "gradient that is NaN: a defence may hide behind it.",
)
NEAR_DUPLICATES = Flag(
    "near_duplicates",
    "Some of the victim's pictures are nearly the attacker's own, or mirror images of them.",
    "Look at them, and leave them out of one of the two: an attacker who has the picture proves "
    "nothing, and the worst 5% of the pictures may be these.",
)
OBSERVER_FAILED = Flag(
    "observer_failed",
    "The observer raised when it was shown this attack.",
    "The score stands, and what the observer measures is missing: mend the observer, or the attack "
    "that it looks at.",
)
CHANGED_MODEL = Flag(
    "changed_model",
    "While the attack ran, the split that it attacked changed. That was put back before the next.",
    "Its own score may be of a split that it changed: let it work on copy.deepcopy(known.cloud), "
    "in evaluation mode. Where the split itself counts what it is asked, all is well.",
)
SEEN_ONCE = Flag(
    "seen_once",
    "The edge draws anew for every upload, and every picture was sent once. Whoever sees several "
    "uploads of one picture, or of frames that hardly differ, puts them together.",
    "Audit again with uploads=8, say, unless the device never sends a picture twice, and keep the "
    "larger score: what draws signs or order is lost in a mean of uploads.",
)
NOT_CONVERGED = Flag(
    "not_converged",
    "The attack was still improving when its training ended: a longer one reconstructs better.",
    "Raise epochs or max_extensions until this flag goes, or lower lr where the loss rose instead; "
    "the score so far flatters the defence.",
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
CANNOT_INVERT_ONE_CONVOLUTION = Flag(
    "cannot_invert_one_convolution",
    "The attack cannot reconstruct images behind a single random 3x3 convolution.",
    "The attack or its settings are too weak for any real edge: raise its steps or epochs, or "
    "ignore its scores.",
)
WHITE_BOX_WEAKER = Flag(
    "white_box_weaker_than_black_box",
    "The attack that knows the device's weights reconstructs worse than one that only queries it.",
    "Its gradients may be obfuscated, or its prior too weak: judge by the black-box attack, give "
    "the white-box one a warm start, more restarts and steps, or a smooth stand-in for the part "
    "that has no gradient.",
)
NO_BETTER_THAN_WARM_START = Flag(
    "no_better_than_warm_start",
    "The white-box attack began at a black-box attack's answer and did not improve it by 1%: its "
    "gradients were of no use, and what it scores it owes to that attack.",
    "They may be obfuscated: run it without a black-box attack to start from, and compare; give "
    "it more restarts and steps.",
)
NO_GRADIENT = Flag(
    "no_gradient",
    "The edge passes no gradient to its input, or one that is not finite: the white-box attack "
    "had nothing to follow.",
    "Its score says nothing. Look for detach(), rounding or an argmax in the edge, and pass the "
    "gradient straight through it for the audit.",
)
MORE_DATA_HELPS = Flag(
    "more_data_helps",
    "With more images the attack's error still fell by over 5%: one who owns more sees more.",
    "Give the attacker more images before the score is believed, or name their number beside it.",
)
NOISE_ONLY = Flag(
    "noise_only",
    "What the edge sends differs between images no more than between two sendings of one image.",
    "Check the accuracy: nothing of the image is left in it, for the task neither.",
)


def check_features(z: Tensor) -> list[Flag]:
    """Flag features `[N, ...]` of which no value differs between images, up to float32 rounding."""
    differ = (z - z[:1]).abs().amax(0) > 1e-6 * z.abs().amax(0)
    return [] if bool(differ.any()) else [CONSTANT_FEATURES]


def check_fit(record: FitRecord) -> list[Flag]:
    """Flag a training whose loss did not fall, or was still falling, or had no gradient.

    One that began at another attack's answer has to improve that, or else leave less than a
    thousandth of the mean image's error.
    """
    flags = []
    if record.gradient_norm is not None and not 0.0 < record.gradient_norm < math.inf:
        flags.append(NO_GRADIENT)
    if not record.best_loss < _FELL * record.initial_loss:
        flags.append(LOSS_DID_NOT_FALL)
    if record.start_loss is not None and not record.best_loss < max(
        _FELL * record.start_loss, _NEGLIGIBLE * record.mean_image_loss
    ):
        flags.append(NO_BETTER_THAN_WARM_START)
    if not record.plateau:
        flags.append(NOT_CONVERGED)
    return flags


def check_reconstructions(
    originals: Tensor, reconstructions: Tensor, mean_image: Tensor
) -> list[Flag]:
    """Flag reconstructions `[N, C, H, W]` that the mean image `[C, H, W]` matches, or flat ones.

    It matches those whose squared error is not 2% below its own, and those whose SSIM is not above
    its own, by however little.
    """
    flags = []
    mean = mean_image.expand_as(originals)
    if not bool(mse(originals, reconstructions).mean() < _BEATS * mse(originals, mean).mean()):
        flags.append(NOT_BETTER_THAN_MEAN_IMAGE)
    elif min(originals.shape[2:]) >= SSIM_SIDE and not bool(
        ssim(originals, reconstructions).double().mean() > ssim(originals, mean).double().mean()
    ):
        flags.append(replace(NOT_BETTER_THAN_MEAN_IMAGE, meaning=(
            "The reconstructions are no more like the images, in SSIM, than the attacker's mean "
            "image is, though their squared error is smaller.")))
    contrast = reconstructions.flatten(1).std(dim=1).mean()
    if bool(contrast < _CONTRAST * originals.flatten(1).std(dim=1).mean()):
        flags.append(CONTRAST_COLLAPSED)
    return flags


def check_slopes(varying: Tensor, blocked: Tensor) -> list[Flag]:
    """Flag an edge of whose outputs that vary over images, `[k]`, over 1% have no gradient `[k]`.

    A white box then follows the rest alone, and its score may flatter what was blocked.
    """
    share = float(blocked.sum()) / max(1.0, float(varying.sum()))
    if share <= _BLOCKED:
        return []
    return [replace(NO_GRADIENT, meaning=(
        f"Of the values that the edge sends and that differ between images, {100 * share:.0f}% "
        "pass no gradient to its input: the white-box attack had only the others to follow."))]


def check_boxes(white: Sequence[float], black: Sequence[float]) -> list[Flag]:
    """Flag white-box attacks whose best SSIM is under the black-box ones' by more than 0.02.

    Either may be empty; then nothing can be compared and nothing is flagged.
    """
    if not white or not black:
        return []
    return [WHITE_BOX_WEAKER] if max(white) < max(black) - _WEAKER else []


def check_more_data(fewer: float, more: float) -> list[Flag]:
    """Flag an attack whose mean squared error `more` images lowered by over 5% from `fewer`."""
    return [MORE_DATA_HELPS] if more < (1.0 - _MORE_HELPS) * fewer else []


def check_owned(near: Sequence[int], images: int) -> list[Flag]:
    """Flag those of so many victims' pictures, by their places, that the attacker nearly owns."""
    if not near:
        return []
    named = ", ".join([*map(str, near[:_NAMED]), *["..."] * (len(near) > _NAMED)])
    return [replace(NEAR_DUPLICATES, meaning=(
        f"{len(near)} of the victim's {images} pictures are nearly the attacker's own, or mirror "
        f"images of them (victim_data[i] with i {named})."))]


@torch.no_grad()
def check_draws(edge: EdgeFunction, pixels: Tensor, *, draws: int = 16) -> list[Flag]:
    """Flag a random edge whose features do not depend on the image.

    Each of the `N` images `[N, C, H, W]` is sent `draws` times, and two things are looked at. One
    coordinate: with `B` its variance between the images' means and `W` that within an image,
    `F = draws * B / W` is 1 on average where the image plays no part, and `F (N - 1)` nearly
    follows a chi-squared distribution. All coordinates, divided by their `sqrt(W)`: the images'
    means over one half of the draws against those over the other, `sum_i <a_i, b_i>`, as large as
    for no random pairing of the images. The flag is raised unless one of them is beyond what
    chance gives once in 1,000 checks; so too of the features' sizes, and of these in their own
    order, which signs and orders that are drawn leave as they are.

    Raises:
        InputError: fewer than 8 images or 2 draws.
    """
    if len(pixels) < 8 or draws < 2:
        raise InputError(
            f"Expected at least 8 images and 2 draws to tell noise from images, came "
            f"{len(pixels)} and {draws}."
        )
    views: tuple[EdgeFunction, ...] = (
        edge, lambda x: edge(x).abs(), lambda x: edge(x).abs().flatten(1).sort(dim=1).values)
    found = all(_only_noise(view, pixels, draws, if_constant=view is not edge) for view in views)
    return [NOISE_ONLY] if found else []


def _only_noise(edge: EdgeFunction, pixels: Tensor, draws: int, *, if_constant: bool) -> bool:
    """Whether what `edge` gives depends on the image by no more than chance (`check_draws`).

    Where it gives the same for every image and draw, `if_constant` is returned.
    """
    centre = edge(pixels).double().flatten(1).mean(0)  # against cancellation in the squares
    halves, squares = [torch.zeros(()), torch.zeros(())], torch.zeros(())
    for number in range(draws):
        z = edge(pixels).double().flatten(1) - centre
        halves[number % 2], squares = halves[number % 2] + z, squares + z**2
    means = (halves[0] + halves[1]) / draws
    within = ((squares - draws * means**2) / (draws - 1)).mean(0)
    between = means.var(dim=0)
    live = within > 1e-12 * (within + between).max()
    if not bool(((within + between) > 1e-20 * centre**2).any()):
        return if_constant
    if not bool(live.any()) or bool((between[~live] > 1e-12 * between.max()).any()):
        return False
    strongest = float((draws * between[live] / within[live]).max())
    if strongest > _critical(len(pixels) - 1, int(live.sum())):
        return False
    a, b = ((half - half.mean(0))[:, live] / within[live].sqrt() for half in halves)
    return _paired_by_chance(a @ b.T)


def _paired_by_chance(products: Tensor) -> bool:
    """Whether the trace of `[N, N]` is no larger than under any of 1,000 random pairings."""
    generator = torch.Generator().manual_seed(0)
    count = len(products)
    orders = torch.rand(round(1 / _CHANCE), count, generator=generator).argsort(dim=1)
    sums = products[torch.arange(count), orders.to(products.device)].sum(dim=1)
    return bool(products.trace() <= sums.max())


def _critical(freedom: int, coordinates: int) -> float:
    """What the largest of so many `chi2 / freedom` exceeds by chance once in 1,000 times.

    Wilson and Hilferty's cube-root approximation, with Bonferroni's correction.
    """
    z = NormalDist().inv_cdf(1.0 - _CHANCE / coordinates)
    share = 2.0 / (9.0 * freedom)
    return float((1.0 - share + z * math.sqrt(share)) ** 3)


def _convolve(pixels: Tensor) -> Tensor:
    """One fixed random 3x3 convolution to 16 channels, of unit gain."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, pixels.shape[1], 3, 3, generator=generator).to(pixels)
    return functional.conv2d(pixels, weight / math.sqrt(9 * pixels.shape[1]), padding=1)


SELF_TESTS: dict[str, tuple[Callable[[Tensor], Tensor], Flag]] = {
    "identity": (torch.Tensor.clone, CANNOT_INVERT_IDENTITY),
    "one_convolution": (_convolve, CANNOT_INVERT_ONE_CONVOLUTION),
}
"""Edges that every attack with access to them has to invert, and the flag if it cannot."""


@torch.enable_grad()
def self_test(
    attack: Attack,
    *,
    image_shape: tuple[int, int, int] = (3, 16, 16),
    images: int = 256,
    seed: int = 0,
    edges: Sequence[str] = tuple(SELF_TESTS),
) -> list[Flag]:
    """Can this attack invert an edge that sends the image itself, and one convolution?

    It is trained on smooth random images and must reach a fifth of the mean image's error on
    fresh ones. Give a small, short configuration: the answer is about the code and the settings,
    and comes in seconds. The attack is trained anew for each edge; it gets features, and the edge.

    Args:
        attack: left trained on the last edge.
        image_shape: `(channels, height, width)`.
        images: how many to train on.
        seed: of the images.
        edges: names out of `SELF_TESTS`.

    Returns:
        One flag for each edge that it cannot invert, also where it breaks off (TrainingError).
    """
    pixels = smooth_images(images + 64, image_shape, seed=seed)
    known, fresh = pixels[:images], pixels[images:]
    floor = mse(fresh, known.mean(0).expand_as(fresh)).mean()
    flags = []
    for name in edges:
        if name not in SELF_TESTS:
            raise InputError(
                f"Expected edges out of {', '.join(SELF_TESTS)}, came {name!r}. "
                f"{nearest(name, SELF_TESTS)}"
            )
        edge, flag = SELF_TESTS[name]
        try:
            attack.fit(Knowledge(known, edge(known), edge=edge))
            error = mse(fresh, attack.reconstruct(edge(fresh)).to(fresh)).mean()
        except TrainingError as broken:
            logger.warning("The self-test with %s broke off: %s", name, broken)
            flags.append(flag)
            continue
        if not bool(error < _INVERTS * floor):
            flags.append(flag)
    return flags


def smooth_images(count: int, image_shape: tuple[int, int, int], *, seed: int = 0) -> Tensor:
    """Random images `[count, *image_shape]` on [0, 1]: enlarged coarse noise, seeded."""
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = image_shape
    coarse = torch.rand(count, channels, 4, 4, generator=generator)
    return functional.interpolate(
        coarse, size=(height, width), mode="bilinear", align_corners=False
    ).clamp(0.0, 1.0)
