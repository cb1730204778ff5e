"""The white-box attack: the image whose feature is nearest to the upload, under a smoothness prior.

Regularised maximum likelihood estimation (He, Zhang and Lee, ACSAC 2019), for all images at once.
It differentiates through the edge and knows nothing of the images but the attacker's own ones.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from patrol_prune.attacks.base import Attack, FitRecord, Knowledge, check_uploads_like
from patrol_prune.attacks.pixel_descent import PixelDescent, RMLEConfig, Setting
from patrol_prune.attacks.white_box import (
    Comparison,
    PixelSpace,
    Spectrum,
    error_by,
    features_of,
    gradient_norm,
    subset,
    tuning_part,
)
from patrol_prune.errors import InputError, TrainingError
from patrol_prune.precision import autocast

__all__ = ["RMLE", "RMLEConfig", "Setting"]

logger = logging.getLogger(__name__)

_SEED_OFFSET = 3_915_241
_NEIGHBOURS = (10.0**-0.5, 10.0**0.5)
_SCALE_IMAGES = 64
_SPECTRUM_IMAGES = 2048
_NEGLIGIBLE = 1e-3


class RMLE:
    """Optimises images until their features are the uploaded ones; seeded and deterministic.

    For each image on its own, in the normalised space of the attacker's images,
    `min_v error(f(x), z) + lambda_tv TV(x) + lambda_2 P(v) + lambda_start mean((x - x_0)^2)`,
    where `v` are the coordinates of `x` (`RMLEConfig.spaces`): normalised pixels, with
    `P(v) = mean(v^2)`, or whitened ones, with `P(v) = mean(v^2) / (H W)`.

    Args:
        config: its settings.
        warm_start: an attack whose reconstructions are tried as starts `x_0` beside the mean
            image. The better start is chosen on the attacker's own images, so it should not have
            learnt from those: where it has an attribute `held_out` with the indices of images
            that it did not learn from, these choose.
        fit_warm_start: whether `fit` trains it first, on all but the images that choose.
        device: where it computes; the edge must be there.
    """

    def __init__(
        self,
        config: RMLEConfig | None = None,
        *,
        warm_start: Attack | None = None,
        fit_warm_start: bool = False,
        device: str = "cpu",
    ) -> None:
        self.config = config or RMLEConfig()
        self.warm_start, self.fit_warm_start = warm_start, fit_warm_start
        self.device = torch.device(device)
        autocast(self.device, self.config.precision)  # refuses a precision the device lacks
        self.setting: Setting | None = None
        self.steps = self.config.steps
        self._descent: PixelDescent | None = None
        self._own: Tensor | None = None
        self._shape: Sequence[int] = ()

    def fit(self, known: Knowledge) -> FitRecord:
        """Choose the setting on the attacker's own images.

        The record's `history` is their error by the criterion with each setting of
        `chosen["tried"]`, the last of them, the finalists, with all `steps`; `train_history` is
        what was minimised; `initial_loss` and `mean_image_loss` are the error of the mean image,
        `start_loss` that of the warm start where it was chosen.

        Raises:
            InputError: no edge, fewer than two images, pixels or features out of range.
            TrainingError: no setting led to finite images.
        """
        begin, config, edge = time.perf_counter(), self.config, known.white_box()
        generator = torch.Generator().manual_seed(config.seed + _SEED_OFFSET)
        among = None if self.fit_warm_start else getattr(self.warm_start, "held_out", None)
        chosen, others = tuning_part(known, config.tuning_images, generator, among)
        if self.warm_start is not None and self.fit_warm_start:
            self.warm_start.fit(subset(known, others))
        sample = torch.cat([chosen, others[: max(0, _SCALE_IMAGES - len(chosen))]])
        z = features_of(known, sample, self.device)
        originals = known.pixels[chosen.to(known.pixels.device)].to(self.device)
        space = PixelSpace.of(known.pixels).to(self.device)
        comparison = Comparison.of(known, z, relative=config.relative, draws=config.draws)
        some = known.pixels[:_SPECTRUM_IMAGES].to(self.device)
        spectrum = Spectrum.of(space.from_pixels(some) - space.from_pixels(space.mean_image))
        self._own = known.pixels
        self._descent = PixelDescent(config, edge, space, spectrum, comparison)
        z, self._shape = z[: len(chosen)], z.shape[1:]
        means = space.mean_image.expand_as(originals)
        norm = gradient_norm(edge, z, means, comparison.draws)
        floor = float(error_by(config.criterion, originals, means.clamp(0.0, 1.0)).mean())
        tuning = _Tuning(self, z, originals)
        best = tuning.run()
        self.setting, self.steps = tuning.tried[best]
        logger.info("rmle: chose %s with %d steps", self.setting, self.steps)
        return FitRecord(
            history=tuple(tuning.errors),
            train_history=tuple(tuning.objectives),
            initial_loss=floor,
            mean_image_loss=floor,
            best_epoch=best,
            plateau=tuning.plateau(best, floor),
            extensions=0,
            seconds=time.perf_counter() - begin,
            gradient_norm=norm,
            chosen={
                **asdict(self.setting),
                "steps": self.steps,
                "tried": [{**asdict(setting), "steps": steps} for setting, steps in tuning.tried],
            },
            start_loss=tuning.start_error() if self.setting.warm else None,
        )

    def reconstruct(self, z: Tensor) -> Tensor:
        """Uploads `[N, ...]` to pixels `[N, C, H, W]` on [0, 1], on z's device.

        How the images are divided into batches changes nothing but float rounding. Raises
        InputError before `fit`.
        """
        if self.setting is None or self._own is None:
            raise InputError("This attack has not been fit. Call fit(Knowledge(...)) first.")
        check_uploads_like(z, self._shape)
        config = self.config
        generator = torch.Generator().manual_seed(config.seed + _SEED_OFFSET + 1)
        picks = torch.randint(len(self._own), (len(z), config.restarts - 1), generator=generator)
        parts = []
        for rows, part in zip(picks.split(self.batch_size), z.split(self.batch_size), strict=True):
            guess = self._reconstruct(part.detach().to(self.device), rows, self.setting, self._own)
            parts.append(guess.to(z.device))
        return torch.cat(parts)

    @property
    def batch_size(self) -> int:
        """Images that are optimised at once."""
        return self.config.batch_size or (64 if self.device.type == "cpu" else 512)

    def _reconstruct(self, z: Tensor, picks: Tensor, setting: Setting, own: Tensor) -> Tensor:
        """The best of several runs for each image; `picks [N, restarts - 1]` are the starts."""
        anchor = self.start(z, setting.warm)
        best, least = self.optimise(z, anchor, anchor, [setting] * len(z), self.steps)
        for column in picks.unbind(dim=1):
            initial = own[column.to(own.device)].to(self.device)
            other, value = self.optimise(z, initial, anchor, [setting] * len(z), self.steps)
            best = torch.where((value < least).view(-1, 1, 1, 1), other, best)
            least = torch.minimum(value, least)
        return best

    def start(self, z: Tensor, warm: bool) -> Tensor:
        """Pixels to start from, what the warm start makes of `z` if `warm`, or the mean image."""
        if warm and self.warm_start is not None:
            return self.warm_start.reconstruct(z).to(self.device, torch.float32)
        return self._parts().space.mean_image.expand(len(z), -1, -1, -1)

    def optimise(
        self, z: Tensor, initial: Tensor, anchor: Tensor, settings: Sequence[Setting], steps: int
    ) -> tuple[Tensor, Tensor]:
        """The descent itself, from `initial` pixels, with one setting for each image.

        Args:
            z: uploads `[N, ...]`.
            initial: pixels `[N, C, H, W]` to begin at.
            anchor: pixels that `lambda_start` pulls to.
            settings: as `fit` left one in the attribute `setting`.
            steps: how many.

        Returns:
            pixels `[N, C, H, W]` on [0, 1], and what was minimised, `[N]`.
        """
        return self._parts().run(z, initial, anchor, settings, steps)

    def _parts(self) -> PixelDescent:
        if self._descent is None:
            raise InputError("This attack has not been fit. Call fit(Knowledge(...)) first.")
        return self._descent


class _Tuning:
    """Which settings were tried on the attacker's own images, and how well each did."""

    def __init__(self, attack: RMLE, z: Tensor, originals: Tensor) -> None:
        self.attack, self.config = attack, attack.config
        self.z, self.originals = z, originals
        kinds = (False,) if attack.warm_start is None else (False, True)
        self.starts = {kind: attack.start(z, kind) for kind in kinds}
        self.tried: list[tuple[Setting, int]] = []
        self.errors: list[float] = []
        self.objectives: list[float] = []

    def run(self) -> int:
        """Starts, spaces and losses; priors for the best; neighbours; finalists with all steps.

        Returns the index of the best.
        """
        config = self.config
        short = min(config.tuning_steps, config.steps)
        least = min(config.lambda_tv)
        grid = [Setting(loss, space, least, warm=warm) for warm in self.starts
                for space in config.spaces for loss in config.losses]  # fmt: skip
        if len(grid) == 1 and len(config.lambda_tv) == 1 and not config.lambda_2:
            return self._try(grid, config.steps)
        best, _ = self.tried[self._try(grid, short)]
        near = [replace(best, lambda_tv=weight) for weight in config.lambda_tv]
        near += [replace(best, lambda_tv=0.0, lambda_2=weight) for weight in config.lambda_2]
        if len(self.starts) == 2:
            warm = next(setting for setting in self._ranked() if setting.warm)
            near += [replace(warm, lambda_start=pull) for pull in config.lambda_start]
        best, _ = self.tried[self._try(near, short)]
        if config.refine:
            self._try([new for factor in _NEIGHBOURS for new in best.near(factor)], short)
        finalists = self._ranked()[: config.finalists]
        bare = replace(finalists[0], lambda_tv=least, lambda_2=0.0, lambda_start=0.0)
        return self._try([*finalists, bare], config.steps)

    def start_error(self) -> float:
        """Mean error of the warm start itself, before any step."""
        guesses = self.starts[True].clamp(0.0, 1.0)
        return float(error_by(self.config.criterion, self.originals, guesses).mean())

    def _ranked(self) -> list[Setting]:
        """The settings that were tried, the best first, each once."""
        order = sorted(range(len(self.tried)), key=self.errors.__getitem__)
        return list(dict.fromkeys(self.tried[i][0] for i in order))

    def plateau(self, best: int, floor: float) -> bool:
        """Whether all `steps` instead of `tuning_steps` helped little, or nothing is left to gain.

        An error below a thousandth of the mean image's counts as nothing; a setting that was
        tried with one number of steps alone does not count as a plateau.
        """
        setting, _ = self.tried[best]
        runs = {steps: error for error, (other, steps) in
                zip(self.errors, self.tried, strict=True) if other == setting}  # fmt: skip
        if self.errors[best] < _NEGLIGIBLE * floor:
            return True
        gain = runs[min(runs)] - runs[max(runs)]
        return len(runs) > 1 and gain <= self.config.plateau_tolerance * runs[min(runs)]

    def _try(self, settings: Sequence[Setting], steps: int) -> int:
        """Run the settings side by side and return the best of all that have been tried."""
        settings = [s for s in dict.fromkeys(settings) if (s, steps) not in self.tried]
        for space in sorted({s.space for s in settings}):
            group = [s for s in settings if s.space == space]
            errors, objectives = self._run(group, steps)
            self.tried += [(setting, steps) for setting in group]
            self.errors += errors
            self.objectives += objectives
        least = min(self.errors)
        if not math.isfinite(least):
            raise TrainingError(
                "No setting of the attack led to finite images. Lower lr, or look at the edge: "
                "its gradient may be broken.",
                step=steps,
                term="reconstruction",
            )
        return self.errors.index(least)

    def _run(self, settings: Sequence[Setting], steps: int) -> tuple[list[float], list[float]]:
        """Mean error and mean objective of each setting; all of one space, in batches."""
        runs = [(s, i) for s in settings for i in range(len(self.z))]
        errors, objectives = [], []
        for begin in range(0, len(runs), self.attack.batch_size):
            batch = runs[begin : begin + self.attack.batch_size]
            rows = torch.tensor([i for _, i in batch], device=self.z.device)
            first = torch.stack([self.starts[s.warm][i] for s, i in batch])
            chosen = [s for s, _ in batch]
            pixels, values = self.attack.optimise(self.z[rows], first, first, chosen, steps)
            error = error_by(self.config.criterion, self.originals[rows], pixels)
            errors.append(torch.where(torch.isinf(values), values, error))
            objectives.append(values)
        shape = (len(settings), len(self.z))
        means = [torch.cat(v).view(shape).mean(dim=1).tolist() for v in (errors, objectives)]
        return means[0], means[1]
