"""Gradient descent on pixels through an edge, for many images and settings at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from patrol_prune.attacks.base import EdgeFunction
from patrol_prune.attacks.white_box import (
    CRITERIA,
    LOSSES,
    Comparison,
    PixelSpace,
    Spectrum,
    gradient,
    total_variation,
)
from patrol_prune.errors import InputError, nearest
from patrol_prune.precision import PRECISIONS, autocast

SPACES: tuple[str, ...] = ("spectral", "pixels")

_LAST_LR = 0.02


@dataclass(frozen=True)
class RMLEConfig:
    """Settings of `RMLE`. Where there are several weights, they are tried on the attacker's images.

    The default is stronger and quicker than the published attack, which is `RMLEConfig.published`.

    Args:
        losses: feature losses to try: `"mse"`; `"standardised"`, the same with each channel over
            its standard deviation; `"cosine"`, one less the cosine similarity.
        lambda_tv: weights of the total variation to try.
        lambda_start: weights of `mean((x - x_0)^2)` to try behind a warm start `x_0`: between
            trusting the decoder (large) and the features (0).
        lambda_2: weights of the coordinates' power to try instead: of `mean(x^2)` in `"pixels"`, of
            `mean(v^2) / (H W)` in `"spectral"`.
        spaces: to try: `"spectral"` descends in coordinates in which the attacker's images are
            near white noise (better for deep edges), `"pixels"` in normalised pixels (better
            for shallow ones).
        relative: divide the squared feature error by the features' variance over images, so that
            the weights mean the same for every edge; False takes it as it is.
        steps: of the optimisation.
        lr: of Adam in `"pixels"`, the most that a pixel moves per step, in standard deviations of
            the attacker's pixels.
        spectral_lr: of Adam in `"spectral"`, the most that a component of the image moves per
            step, in its standard deviations.
        schedule: `"cosine"` lowers lr to 2% of itself, `"constant"` does not.
        eps: of Adam. Above the gradients (1e-3 as published) it makes plain gradient descent with
            momentum of it.
        amsgrad: Adam with the largest second moment so far.
        box: keep pixels on [0, 1] in every step, not only in the end; in `"pixels"` only.
        restarts: runs per image; the first from the mean image or the warm start, the others from
            images of the attacker's, kept where feature error and priors are smaller.
        draws: queries that are put together in each step where the edge is random.
        tuning_images: of the attacker's own images that choose the setting.
        tuning_steps: of the optimisation while settings are compared.
        finalists: settings that are compared with all `steps` in the end, beside the best one's
            without priors, which need many steps to be dispensable.
        criterion: by which they are compared, `"mse"` or `"ssim"`.
        refine: try neighbours of the best setting, too.
        plateau_tolerance: longer runs help no more when `steps` instead of `tuning_steps` improve
            the error on the attacker's own images by less than this share.
        batch_size: images that are optimised at once; None is 64 on a CPU, whose caches then hold
            a layer's features, and 512 elsewhere.
        seed: of the choice of tuning images and of restarts.
        precision: `"bf16"` runs the edge under autocast, `"fp32"` does not, `"auto"` takes bf16
            where the device computes it natively; losses are float32. bfloat16 is too coarse for
            shallow edges.

    Raises:
        InputError: a value out of its range.
    """

    losses: tuple[str, ...] = LOSSES
    lambda_tv: tuple[float, ...] = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    lambda_start: tuple[float, ...] = (0.0, 1e-2, 1e-1, 1.0)
    lambda_2: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    spaces: tuple[str, ...] = SPACES
    relative: bool = True
    steps: int = 400
    lr: float = 0.1
    spectral_lr: float = 1.0
    schedule: str = "cosine"
    eps: float = 1e-8
    amsgrad: bool = False
    box: bool = True
    restarts: int = 1
    draws: int = 4
    tuning_images: int = 16
    tuning_steps: int = 100
    finalists: int = 3
    criterion: str = "mse"
    refine: bool = True
    plateau_tolerance: float = 0.05
    batch_size: int | None = None
    seed: int = 0
    precision: str = "fp32"

    def __post_init__(self) -> None:
        known = {"losses": LOSSES, "spaces": SPACES, "schedule": ("cosine", "constant")}
        known |= {"criterion": CRITERIA, "precision": PRECISIONS}
        for name, choices in known.items():
            value = getattr(self, name)
            for came in (value,) if isinstance(value, str) else value:
                if came not in choices:
                    raise InputError(
                        f"Expected {name} out of {', '.join(choices)}, came {came!r}. "
                        f"{nearest(str(came), choices)}"
                    )
        least = {"steps": 1, "restarts": 1, "draws": 1, "tuning_images": 1, "tuning_steps": 1}
        least |= {"finalists": 1, "lr": 0, "spectral_lr": 0, "eps": 0}
        least |= {"plateau_tolerance": 0} | ({} if self.batch_size is None else {"batch_size": 1})
        for name, smallest in least.items():
            if not getattr(self, name) >= smallest:
                raise InputError(f"Expected {name} >= {smallest}, came {getattr(self, name)}.")
        for name in ("losses", "spaces", "lambda_tv"):
            if not getattr(self, name):
                raise InputError(f"Expected at least one of {name} to try, came none.")
        for name in ("lambda_tv", "lambda_2", "lambda_start"):
            if not all(0 <= weight < math.inf for weight in getattr(self, name)):
                raise InputError(f"Expected {name} of at least 0, came {getattr(self, name)}.")

    @classmethod
    def published(cls, lambda_tv: float = 0.0) -> RMLEConfig:
        """As it was published, 5,000 steps of 0.01, MSE, no box; `lambda_tv` was 0, 10 or 1000 by
        depth."""
        return cls(
            losses=("mse",), lambda_tv=(lambda_tv,), lambda_2=(), spaces=("pixels",),
            relative=False, steps=5000, lr=1e-2, schedule="constant",
            eps=1e-3, amsgrad=True, box=False, tuning_steps=5000, tuning_images=1, refine=False,
            finalists=1,
        )  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What is chosen on the attacker's own images; `warm` starts from the decoder's answer."""

    loss: str
    space: str = "pixels"
    lambda_tv: float = 0.0
    lambda_2: float = 0.0
    lambda_start: float = 0.0
    warm: bool = False

    def near(self, factor: float) -> list[Setting]:
        """The same with one of its positive weights times `factor`, each in turn."""
        changed = [
            replace(self, lambda_tv=self.lambda_tv * factor),
            replace(self, lambda_2=self.lambda_2 * factor),
            replace(self, lambda_start=self.lambda_start * factor),
        ]
        return [setting for setting in changed if setting != self]


@dataclass(frozen=True)
class PixelDescent:
    """The optimisation of one attack on one edge: what does not change from batch to batch.

    Args:
        config: its settings.
        edge: differentiated with respect to the pixels only.
        space: the attacker's normalised space.
        spectrum: the coordinates of the settings in `"spectral"`.
        comparison: how features are set beside an upload.
    """

    config: RMLEConfig
    edge: EdgeFunction
    space: PixelSpace
    spectrum: Spectrum
    comparison: Comparison = field(default_factory=Comparison)

    def run(
        self, z: Tensor, initial: Tensor, anchor: Tensor, settings: Sequence[Setting], steps: int
    ) -> tuple[Tensor, Tensor]:
        """Images whose features come near `z [N, ...]`, and what was minimised for each.

        Args:
            z: the uploads, on the edge's device.
            initial: the pixels to start from, `[N, C, H, W]`.
            anchor: the pixels that `lambda_start` pulls to, likewise.
            settings: one per image, all of one space.
            steps: how many.

        Returns:
            Pixels `[N, C, H, W]` on [0, 1] and `[N]`; where an image became NaN or infinite, it
            is the initial one, with infinity.
        """
        config, space = self.config, settings[0].space
        lr = config.lr if space == "pixels" else config.spectral_lr
        objective = _Objective(self, z, self.space.from_pixels(anchor), settings)
        v = self.encode(initial, space).contiguous().requires_grad_(True)
        optimizer = torch.optim.Adam(
            [v], lr=lr, eps=config.eps, amsgrad=config.amsgrad, fused=True
        )
        with torch.enable_grad():
            for step in range(steps):
                v.grad = objective.slope(v).contiguous()
                optimizer.param_groups[0]["lr"] = lr * self._pace(step / steps)
                optimizer.step()
                if config.box and space == "pixels":
                    self.space.clamp_(v.data)
        with torch.no_grad():
            values = objective.value(v)
            pixels = self.space.to_pixels(self.decode(v.detach(), space)).contiguous()
            finite = torch.isfinite(pixels).flatten(1).all(dim=1) & torch.isfinite(values)
            pixels = torch.where(finite.view(-1, 1, 1, 1), pixels, initial).clamp(0.0, 1.0)
            return pixels, torch.where(finite, values, torch.full_like(values, math.inf))

    def decode(self, v: Tensor, space: str) -> Tensor:
        """Coordinates to normalised images, both `[N, C, H, W]`."""
        if space == "pixels":
            return v
        return self.spectrum.decode(v) + self.space.from_pixels(self.space.mean_image)

    def encode(self, pixels: Tensor, space: str) -> Tensor:
        """The coordinates of pixels."""
        x = self.space.from_pixels(pixels)
        if space == "pixels":
            return x
        return self.spectrum.encode(x - self.space.from_pixels(self.space.mean_image))

    def _pace(self, progress: float) -> float:
        if self.config.schedule == "constant":
            return 1.0
        return _LAST_LR + (1 - _LAST_LR) * 0.5 * (1 + math.cos(math.pi * progress))


class _Objective:
    """Feature error and priors of each image, with a setting per image."""

    def __init__(
        self, descent: PixelDescent, z: Tensor, anchor: Tensor, settings: Sequence[Setting]
    ) -> None:
        self.descent, self.z, self.anchor = descent, z, anchor
        self.space = settings[0].space
        self.losses = sorted({s.loss for s in settings})
        self.which = torch.tensor([self.losses.index(s.loss) for s in settings], device=z.device)
        self.tv, self.power, self.pull = (
            torch.tensor(weights, dtype=torch.float32, device=z.device) if any(weights) else None
            for weights in (
                [s.lambda_tv for s in settings],
                [s.lambda_2 for s in settings],
                [s.lambda_start for s in settings],
            )
        )

    def value(self, v: Tensor) -> Tensor:
        """What is minimised, `[N]`."""
        x, f = self._feature(v)
        priors = self._priors(v, x)
        error = self._mixed(f, self.descent.comparison.error)
        return error if priors is None else error + priors

    def slope(self, v: Tensor) -> Tensor:
        """Its gradient, of the shape of `v`."""
        x, f = self._feature(v)
        outputs, slopes = [f], [self._mixed(f, self.descent.comparison.slope)]
        priors = self._priors(v, x)
        if priors is not None:
            outputs.append(priors)
            slopes.append(torch.ones_like(priors))
        return gradient(outputs, slopes, v)

    def _feature(self, v: Tensor) -> tuple[Tensor, Tensor]:
        descent = self.descent
        x = descent.decode(v, self.space)
        with autocast(v.device, descent.config.precision):
            return x, descent.comparison.feature(descent.edge, descent.space.to_pixels(x))

    def _mixed(self, f: Tensor, measure: Callable[..., Tensor]) -> Tensor:
        """The measure by the loss of each image."""
        mixed = measure(f, self.z, self.losses[0])
        which = self.which.view([-1] + [1] * (mixed.dim() - 1))
        for number, name in enumerate(self.losses[1:], start=1):
            mixed = torch.where(which == number, measure(f, self.z, name), mixed)
        return mixed

    def _priors(self, v: Tensor, x: Tensor) -> Tensor | None:
        terms = []
        if self.tv is not None:
            terms.append(self.tv * total_variation(x))
        if self.power is not None:
            pixels = 1 if self.space == "pixels" else v.shape[2] * v.shape[3]
            terms.append(self.power / pixels * v.square().mean(dim=(1, 2, 3)))
        if self.pull is not None:
            terms.append(self.pull * (x - self.anchor).square().mean(dim=(1, 2, 3)))
        return sum(terms[1:], start=terms[0]) if terms else None
