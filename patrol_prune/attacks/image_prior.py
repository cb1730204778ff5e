"""A white-box attack whose prior is the shape of an untrained convolutional generator.

Deep image prior (Ulyanov, Vedaldi and Lempitsky, CVPR 2018), through the edge: each image is the
output of a generator of its own, whose weights are optimised until the features fit. What such a
generator draws first is smooth and image-like, so the fit is stopped early.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from patrol_prune.attacks.base import EdgeFunction, FitRecord, Knowledge, check_uploads_like
from patrol_prune.attacks.white_box import (
    CRITERIA,
    LOSSES,
    Comparison,
    PixelSpace,
    error_by,
    features_of,
    gradient_norm,
    tuning_part,
)
from patrol_prune.errors import InputError, TrainingError, nearest
from patrol_prune.precision import PRECISIONS, autocast

logger = logging.getLogger(__name__)

_SEED_OFFSET = 5_318_008
_SCALE_IMAGES = 64


@dataclass(frozen=True)
class ImagePriorConfig:
    """Settings of `ImagePrior`; of several `losses` and `lrs` the attacker's own images choose.

    Args:
        losses: feature losses to try, out of `"mse"`, `"standardised"` and `"cosine"`, as in
            `RMLEConfig`.
        lrs: learning rates of Adam to try.
        steps: the most that are made; the attacker's own images choose how many are best.
        check_every: steps between two looks at the attacker's own images.
        width: channels of the generator.
        scales: how often its map is doubled; the input is `2^scales` times smaller than the image.
        averaging: the reconstruction is the running mean of the generator's outputs with this
            weight on the past.
        draws: queries that are put together in each step where the edge is random.
        tuning_images: of the attacker's own images that choose loss, lr and steps.
        criterion: by which they choose, `"mse"` or `"ssim"`.
        batch_size: images that are optimised at once.
        seed: of the initial weights, the generator's input and the choice of tuning images.
        precision: of the edge: `"fp32"`, `"bf16"` or `"auto"`; the generators are float32.

    Raises:
        InputError: a value out of its range.
    """

    losses: tuple[str, ...] = LOSSES
    lrs: tuple[float, ...] = (0.01, 0.03)
    steps: int = 400
    check_every: int = 25
    width: int = 32
    scales: int = 3
    averaging: float = 0.9
    draws: int = 4
    tuning_images: int = 8
    criterion: str = "mse"
    batch_size: int = 128
    seed: int = 0
    precision: str = "fp32"

    def __post_init__(self) -> None:
        known = {"losses": LOSSES, "criterion": CRITERIA, "precision": PRECISIONS}
        for name, choices in known.items():
            value = getattr(self, name)
            for came in (value,) if isinstance(value, str) else value:
                if came not in choices:
                    raise InputError(
                        f"Expected {name} out of {', '.join(choices)}, came {came!r}. "
                        f"{nearest(str(came), choices)}"
                    )
        least = {"steps": 1, "check_every": 1, "width": 1, "scales": 0, "draws": 1}
        least |= {"tuning_images": 1, "batch_size": 1}
        for name, smallest in least.items():
            if not getattr(self, name) >= smallest:
                raise InputError(f"Expected {name} >= {smallest}, came {getattr(self, name)}.")
        if not self.losses or not self.lrs or not all(0 <= lr < math.inf for lr in self.lrs):
            raise InputError(
                f"Expected losses and rates of at least 0 to try, came {self.losses}, {self.lrs}."
            )
        if not 0.0 <= self.averaging < 1.0:
            raise InputError(f"Expected 0 <= averaging < 1, came {self.averaging}.")


class Generators:
    """One small convolutional generator per image, all of them computed by grouped convolutions.

    They start from the same weights, so that an image does not depend on those beside it. Each
    doubles a fixed random map bilinearly, with two 3x3 convolutions, normalisation over the
    image and leaky ReLU at each size; a sigmoid around `mean_image` makes pixels.

    Args:
        count: how many.
        mean_image: `[1, C, H, W]` in pixels, what an output of zero means.
        width, scales: see `ImagePriorConfig`.
        generator: draws the input and the weights.

    Attributes:
        weights: `[count, ...]` each; leaves that require gradients.
    """

    def __init__(
        self, count: int, mean_image: Tensor, width: int, scales: int, generator: torch.Generator
    ) -> None:
        _, channels, height, across = mean_image.shape
        self.sizes = [(math.ceil(height / 2**s), math.ceil(across / 2**s))
                      for s in range(scales, -1, -1)]  # fmt: skip
        self.bias = torch.logit(mean_image.clamp(0.02, 0.98))
        self.input = torch.randn(1, width, *self.sizes[0], generator=generator).to(mean_image)
        self.weights: list[Tensor] = []
        shapes = [(width, width, 3)] * (2 * len(self.sizes)) + [(channels, width, 1)]
        for outputs, inputs, kernel in shapes:
            std = math.sqrt(2.0 / (inputs * kernel**2))
            drawn = torch.randn(outputs, inputs, kernel, kernel, generator=generator) * std
            self._add(count, drawn.to(mean_image))
            self._add(count, torch.zeros(outputs).to(mean_image))
        self.weights[-2].data.mul_(0.1)  # the first outputs are near the mean image

    def _add(self, count: int, weight: Tensor) -> None:
        each = weight.expand(count, *weight.shape).clone()
        self.weights.append(each.requires_grad_(True))

    def __call__(self) -> Tensor:
        """Pixels `[count, C, H, W]` on [0, 1]."""
        layers = zip(self.weights[::2], self.weights[1::2], strict=True)
        h = self.input.expand(len(self.weights[0]), -1, -1, -1)
        for size in self.sizes:
            if tuple(h.shape[2:]) != size:
                h = functional.interpolate(h, size=size, mode="bilinear", align_corners=False)
            for _ in range(2):
                h = convolve_each(h, *next(layers))
                if min(size) > 1:
                    h = functional.instance_norm(h)
                h = functional.leaky_relu(h, 0.1)
        return torch.sigmoid(convolve_each(h, *next(layers)) + self.bias)


def convolve_each(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Each image convolved with weights of its own, as one grouped convolution.

    Args:
        x: `[N, C, H, W]`.
        weight: `[N, outputs, C, k, k]`, k odd; the image is padded with zeros.
        bias: `[N, outputs]`.
    """
    count, outputs, inputs, kernel, _ = weight.shape
    y = functional.conv2d(
        x.reshape(1, count * inputs, *x.shape[2:]), weight.flatten(0, 1), bias.flatten(),
        padding=kernel // 2, groups=count,
    )  # fmt: skip
    return y.view(count, outputs, *x.shape[2:])


class ImagePrior:
    """Fits a generator per image through the edge; stops where the attacker's own images say.

    Args:
        config: its settings.
        device: where it computes; the edge must be there.
    """

    def __init__(self, config: ImagePriorConfig | None = None, *, device: str = "cpu") -> None:
        self.config = config or ImagePriorConfig()
        self.device = torch.device(device)
        autocast(self.device, self.config.precision)  # refuses a precision the device lacks
        self.loss, self.lr, self.steps = self.config.losses[0], self.config.lrs[0], 0
        self._edge: EdgeFunction | None = None
        self._mean_image: Tensor | None = None
        self._shape: Sequence[int] = ()
        self._comparison = Comparison()

    def fit(self, known: Knowledge) -> FitRecord:
        """Choose loss, learning rate and number of steps on the attacker's own images.

        The record's `history` is the error on these after every `check_every` steps of the chosen
        loss and rate, and `train_history` the feature error; the plateau is reached when the last
        look was not the best one, or less than 1% better than the one before.

        Raises:
            InputError: no edge, fewer than two images, pixels or features out of range.
            TrainingError: no setting led to finite images.
        """
        begin, config, edge = time.perf_counter(), self.config, known.white_box()
        generator = torch.Generator().manual_seed(config.seed + _SEED_OFFSET)
        chosen, others = tuning_part(known, config.tuning_images, generator)
        z = features_of(known, torch.cat([chosen, others[:_SCALE_IMAGES]]), self.device)
        self._edge, self._comparison = edge, Comparison.of(known, z, draws=config.draws)
        z, self._shape = z[: len(chosen)], z.shape[1:]
        originals = known.pixels[chosen.to(known.pixels.device)].to(self.device)
        self._mean_image = PixelSpace.of(known.pixels).mean_image.to(self.device)
        means = self._mean_image.expand_as(originals).clamp(0.0, 1.0)
        curves = {
            (loss, lr): self._curve(z, originals, loss, lr)
            for loss in config.losses for lr in config.lrs
        }  # fmt: skip
        errors = {key: [error for error, _ in curve] for key, curve in curves.items()}
        self.loss, self.lr = min(errors, key=lambda key: min(errors[key]))
        history = errors[self.loss, self.lr]
        best = history.index(min(history))
        if not math.isfinite(history[best]):
            raise TrainingError(
                "No setting of the attack led to finite images. Lower lrs, or look at the edge: "
                "its gradient may be broken.",
                step=config.steps,
                term="reconstruction",
            )
        self.steps = min((best + 1) * config.check_every, config.steps)
        floor = float(error_by(config.criterion, originals, means).mean())
        last = best == len(history) - 1
        logger.info("image_prior: %s, lr %g, %d steps", self.loss, self.lr, self.steps)
        return FitRecord(
            history=tuple(history),
            train_history=tuple(value for _, value in curves[self.loss, self.lr]),
            initial_loss=floor,
            mean_image_loss=floor,
            best_epoch=best,
            plateau=not last or (len(history) > 1 and history[-1] > 0.99 * history[-2]),
            extensions=0,
            seconds=time.perf_counter() - begin,
            gradient_norm=gradient_norm(edge, z, means, self._comparison.draws),
            chosen={
                "loss": self.loss, "lr": self.lr, "steps": self.steps,
                "tried": [{"loss": loss, "lr": lr, "error": min(errors[loss, lr])}
                          for loss, lr in errors],
            },
        )  # fmt: skip

    def reconstruct(self, z: Tensor) -> Tensor:
        """Uploads `[N, ...]` to pixels `[N, C, H, W]` on [0, 1], on z's device.

        How the images are divided into batches changes nothing but float rounding. Raises
        InputError before `fit`.
        """
        if self._mean_image is None or self.steps == 0:
            raise InputError("This attack has not been fit. Call fit(Knowledge(...)) first.")
        check_uploads_like(z, self._shape)
        parts = []
        for part in z.split(self.config.batch_size):
            descent = _Descent(self, part.detach().to(self.device), self.loss, self.lr)
            descent.advance(self.steps)
            parts.append(descent.pixels().to(z.device))
        return torch.cat(parts)

    def _curve(
        self, z: Tensor, originals: Tensor, loss: str, lr: float
    ) -> list[tuple[float, float]]:
        """The error on own images, and the feature error, after every `check_every` steps."""
        config = self.config
        descents = [_Descent(self, part, loss, lr) for part in z.split(config.batch_size)]
        curve = []
        for done in range(0, config.steps, config.check_every):
            for descent in descents:
                descent.advance(min(config.check_every, config.steps - done))
            guesses = torch.cat([descent.pixels() for descent in descents])
            value = torch.cat([descent.last for descent in descents]).mean()
            error = error_by(config.criterion, originals, guesses).mean()
            finite = bool(torch.isfinite(value))
            curve.append((float(error) if finite else math.inf, float(value)))
        return curve


class _Descent:
    """The generators of one batch of images, on their way."""

    def __init__(self, attack: ImagePrior, z: Tensor, loss: str, lr: float) -> None:
        assert attack._edge is not None and attack._mean_image is not None
        config = attack.config
        self.attack, self.edge, self.z, self.loss = attack, attack._edge, z, loss
        generator = torch.Generator().manual_seed(config.seed + _SEED_OFFSET + 1)
        self.mean_image = attack._mean_image
        self.generators = Generators(
            len(z), self.mean_image, config.width, config.scales, generator
        )
        self.optimizer = torch.optim.Adam(self.generators.weights, lr=lr, fused=True)
        self.done = 0
        self.average = torch.zeros_like(self.mean_image.expand(len(z), -1, -1, -1))
        self.last = torch.full((len(z),), math.inf)

    def advance(self, steps: int) -> None:
        """That many more steps."""
        config = self.attack.config
        with torch.enable_grad():
            for _ in range(steps):
                pixels = self.generators()
                with autocast(self.z.device, config.precision):
                    f = self.attack._comparison.feature(self.edge, pixels)
                error = self.attack._comparison.error(f, self.z, self.loss)
                self._step(error)
                self.average.lerp_(pixels.detach(), 1.0 - config.averaging)
                self.done += 1
        self.last = error.detach()

    def _step(self, error: Tensor) -> None:
        weights = self.generators.weights
        if not error.requires_grad:
            return
        slopes = torch.autograd.grad(error.sum(), weights, allow_unused=True)
        for weight, slope in zip(weights, slopes, strict=True):
            weight.grad = slope
        self.optimizer.step()

    def pixels(self) -> Tensor:
        """The running mean of the outputs, unbiased; the mean image where it is not finite."""
        mean = self.average / (1.0 - self.attack.config.averaging**self.done)
        finite = torch.isfinite(mean).flatten(1).all(dim=1).view(-1, 1, 1, 1)
        return torch.where(finite, mean, self.mean_image).clamp(0.0, 1.0)
