"""Attacks on an edge that can be neither queried nor looked into.

The attacker trains shadow edges and reconstructs what he overheard as if it came from them: by a
decoder trained on a shadow's features, a linear one in closed form, or optimisation through the
shadow (He, Zhang and Lee, ACSAC 2019).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from patrol_prune.attacks.base import (
    Attack,
    EdgeFunction,
    FitRecord,
    Knowledge,
    check_uploads_like,
)
from patrol_prune.attacks.inverse_network import InverseNetwork
from patrol_prune.attacks.inverse_network_config import InverseNetworkConfig
from patrol_prune.attacks.linear_inverse import LinearInverse, LinearInverseConfig
from patrol_prune.attacks.query_free_config import LEAST_HELD_OUT, QueryFreeConfig, check_knowledge
from patrol_prune.attacks.rmle import RMLE, RMLEConfig
from patrol_prune.attacks.shadow_training import ShadowTrainer
from patrol_prune.attacks.training_pairs import SMALLEST_TRAINING_SET
from patrol_prune.decoders import channel_dim
from patrol_prune.errors import InputError
from patrol_prune.precision import autocast

logger = logging.getLogger(__name__)

_SEED_OFFSET = 4_194_301
_TUNING_IMAGES = 64
_RANGE_IMAGES = 512
_MEAN_IMAGES = 2048
_COMPARABLE = 0.05
_HELD_OUT_IMAGES = 256
_PUBLISHED_RMLE = RMLEConfig(
    losses=("mse",), spaces=("pixels",), lambda_2=(), finalists=1, lambda_tv=(2.0,),
    relative=False, steps=500, lr=0.1, tuning_images=8, tuning_steps=500, refine=False,
)


class QueryFree:
    """Reconstruction without a single query: of `Knowledge`, neither `z` nor `edge` is read.

    A shadow is not the edge, and what is sure on its features may be wrong on the edge's. How far
    to go is measured with another shadow in the edge's place: uploads are clipped to the range that
    each channel has in the shadow, and the answer is `mean image + share * (answer - mean image)`
    with the `share` on [0, 1] of least squared error on features of a shadow that was not used (1
    without such a one, or where its loss is far above the best one's: it found something else).

    Args:
        config: its settings.
        device: where it computes.

    Attributes:
        shadows: after `fit`, the shadow edges that were kept.
        share: after `fit`, the `share` above.
    """

    def __init__(self, config: QueryFreeConfig | None = None, *, device: str = "cpu") -> None:
        self.config = config or QueryFreeConfig()
        self.device = torch.device(device)
        autocast(self.device, self.config.precision)  # refuses a precision the device lacks
        self.shadows: list[nn.Module] = []
        self.reconstructors: list[Attack] = []
        self.share = 1.0
        self._ranges: list[_Range] = []
        self._mean_image: Tensor | None = None

    def fit(self, known: Knowledge) -> FitRecord:
        """Train the shadows, then what reconstructs from them.

        Returns:
            The best shadow's training: `history` is its loss on the attacker's held-out images,
            `mean_image_loss` that loss with the mean image in place of each. `plateau` also asks
            the chosen reconstruction's. `chosen` holds the mode, the held-out loss of every shadow,
            the reconstruction that was chosen, the mean squared error of each on held-out images,
            and the history of the chosen one's own fits.

        Raises:
            InputError: on fewer than 22 images, or where something is missing that the mode needs:
                `"shadow_same"` the cloud, labels and `shadow_edge`, `"shadow_other"` the cloud,
                labels and `observed`, `"match"` `observed`.
            TrainingError: a shadow's loss was not finite.
        """
        check_knowledge(known, self.config)
        start = time.perf_counter()
        config, pixels = self.config, known.pixels
        generator = torch.Generator().manual_seed(config.seed + _SEED_OFFSET)
        order = torch.randperm(len(pixels), generator=generator)
        held = max(LEAST_HELD_OUT, round(config.holdout * len(pixels)))
        held = min(len(pixels) - SMALLEST_TRAINING_SET, held)
        trainer = ShadowTrainer(config, known, self.device, train=order[held:],
                                held_out=order[:held][:_HELD_OUT_IMAGES])
        trained = [trainer.train(config.seed + _SEED_OFFSET + n) for n in range(config.attempts)]
        losses = [history["held_out"][-1] for _, history in trained]
        trained = sorted(trained, key=lambda pair: pair[1]["held_out"][-1])
        least, worst = trained[0][1]["held_out"][-1], trained[0][1]["mean_image"][0]
        trained = [
            pair for n, pair in enumerate(trained[: config.shadows + 1]) if n < config.shadows
            or pair[1]["held_out"][-1] - least <= _COMPARABLE * max(0.0, worst - least)
        ]
        self.shadows = [shadow for shadow, _ in trained[: config.shadows]]
        functions = [trainer.function(shadow) for shadow, _ in trained]
        own, tuning = pixels[order[held:]], _as_float(pixels[order[:held][:_TUNING_IMAGES]])
        self._mean_image = _as_float(own[:_MEAN_IMAGES]).mean(0)
        some = _as_float(own[:_RANGE_IMAGES])
        self._ranges = [_Range(function, some) for function in functions[: config.shadows]]
        chosen, scores, records = self._choose(own, tuning, functions)
        history = trained[0][1]
        return FitRecord(
            history=tuple(history["held_out"]),
            train_history=tuple(history["train"]),
            initial_loss=history["initial"][0],
            mean_image_loss=history["mean_image"][0],
            best_epoch=len(history["held_out"]) - 1,
            plateau=_flat(history["held_out"], config.plateau_tolerance)
            and all(record.plateau for record in records),
            extensions=sum(record.extensions for record in records),
            seconds=time.perf_counter() - start,
            chosen={"mode": config.mode, "shadow_losses": losses, "reconstruct": chosen,
                    "held_out_mse": scores, "share": self.share,
                    "histories": [list(record.history) for record in records]},
        )

    @torch.no_grad()
    def reconstruct(self, z: Tensor) -> Tensor:
        """Uploads `[N, ...]` to pixels `[N, C, H, W]` on [0, 1], the mean over the shadows.

        Raises InputError before `fit`, and on features of another shape.
        """
        if not self.reconstructors:
            raise InputError("This attack has not been trained. Call fit(known) first.")
        check_uploads_like(z, self._ranges[0].shape)
        return self._answer(z, self.reconstructors, range(len(self.reconstructors)), self.share)

    def _answer(
        self, z: Tensor, attacks: list[Attack], numbers: Iterable[int], share: float
    ) -> Tensor:
        """The mean of what the numbered attacks make of `z`, between the mean image and itself."""
        assert self._mean_image is not None
        guesses = [attacks[n].reconstruct(self._ranges[n].clip(z)) for n in numbers]
        mean_image = self._mean_image.to(z.device)
        return torch.lerp(mean_image, torch.stack(guesses).mean(0).to(z.device), share)

    def _choose(
        self, own: Tensor, tuning: Tensor, functions: list[EdgeFunction]
    ) -> tuple[str, dict[str, float], list[FitRecord]]:
        """Fit the reconstructions that are asked for; the best on held-out images is kept."""
        fitted: dict[str, list[Attack]] = {}
        results: dict[str, tuple[float, float]] = {}
        records: dict[str, list[FitRecord]] = {}
        for name in self.config.reconstruct:
            attacks = [self._reconstructor(name, number) for number in range(len(self.shadows))]
            pixels = own if name == "decoder" else _as_float(own)
            made = [attack.fit(Knowledge(pixels, edge=function))
                    for attack, function in zip(attacks, functions, strict=False)]
            records[name] = [record for record in made if record is not None]
            fitted[name] = attacks
            results[name] = self._measure(attacks, functions, tuning)
        chosen = min(results, key=lambda name: results[name][0])
        self.reconstructors, self.share = fitted[chosen], results[chosen][1]
        logger.info("query-free: %s out of %s", chosen, results)
        return chosen, {name: error for name, (error, _) in results.items()}, records[chosen]

    @torch.no_grad()
    def _measure(
        self, attacks: list[Attack], functions: list[EdgeFunction], pixels: Tensor
    ) -> tuple[float, float]:
        """Squared error and best share, on features of each shadow answered with the others."""
        assert self._mean_image is not None
        guesses, truths = [], []
        for number, function in enumerate(functions):
            others = [n for n in range(len(attacks)) if n != number]
            if others or len(functions) == 1:
                z = function(pixels)
                guesses.append(self._answer(z, attacks, others or [0], 1.0).to(pixels))
                truths.append(pixels)
        guess, truth = torch.cat(guesses), torch.cat(truths)
        away = guess - self._mean_image.to(pixels)
        share = 1.0
        if len(functions) > 1:
            wanted = (away * (truth - self._mean_image.to(pixels))).sum()
            share = float((wanted / away.square().sum().clamp_min(1e-12)).clamp(0.0, 1.0))
        return float((truth - self._mean_image.to(pixels) - share * away).square().mean()), share

    def _reconstructor(self, name: str, number: int) -> Attack:
        config = self.config
        seed = config.seed + _SEED_OFFSET + number
        if name == "rmle":
            return RMLE(replace(config.rmle or _PUBLISHED_RMLE, seed=seed), device=str(self.device))
        if name == "linear":
            return LinearInverse(LinearInverseConfig(seed=seed), device=str(self.device))
        decoder = config.decoder or InverseNetworkConfig(
            width=32, depth=2, epochs=5, max_extensions=1, seed=seed
        )
        return InverseNetwork(decoder, device=str(self.device))


def _flat(history: list[float], tolerance: float) -> bool:
    """Whether the last fifth of the epochs improved the best loss by less than the tolerance."""
    earlier = history[: -max(1, len(history) // 5)]
    return bool(earlier) and min(earlier) - min(history) <= tolerance * abs(min(earlier))


class _Range:
    """Least and largest value of each channel of a shadow's features."""

    @torch.no_grad()
    def __init__(self, function: EdgeFunction, pixels: Tensor) -> None:
        z = torch.cat([function(part) for part in torch.split(pixels, 64)])
        self.shape = z.shape[1:]
        dim = channel_dim(tuple(z.shape[1:]), tuple(pixels.shape[1:]))
        others = [d for d in range(z.dim()) if d != dim]
        self.low, self.high = (f(z, dim=others, keepdim=True) for f in (torch.amin, torch.amax))

    def clip(self, z: Tensor) -> Tensor:
        """`z [N, ...]` within the range."""
        return z.clamp(self.low.to(z.device), self.high.to(z.device))


def _as_float(pixels: Tensor) -> Tensor:
    return pixels.float() / 255.0 if pixels.dtype == torch.uint8 else pixels.float()
