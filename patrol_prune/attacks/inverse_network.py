"""The learned attack: a decoder trained from scratch on the attacker's own (feature, image) pairs.

He, Zhang and Lee (ACSAC 2019) train a transposed-convolution decoder; residual decoders on
standardised features are stronger. The attacker needs images and what the edge makes of them,
nothing of the edge's inside. A random edge he queries anew in every epoch: what he learns is the
mean over its draws.
"""

from __future__ import annotations

import copy
import logging
import math
import time

import torch
from torch import Tensor, nn
from torch.nn import functional

from patrol_prune.attacks.base import FitRecord, Knowledge, check_uploads_like
from patrol_prune.attacks.inverse_network_config import InverseNetworkConfig
from patrol_prune.attacks.training_pairs import TrainingPairs
from patrol_prune.decoders import FeatureStandardizer, channel_dim, make_decoder
from patrol_prune.errors import InputError, TrainingError
from patrol_prune.metrics import ssim_values
from patrol_prune.precision import autocast
from patrol_prune.regions import PrivateRegions, check_regions
from patrol_prune.whitening import FeatureWhitener

logger = logging.getLogger(__name__)

SSIM_WEIGHT = 0.1
"""`"mse+ssim"` is `MSE + SSIM_WEIGHT * (1 - SSIM)`."""

_WARM_UP = 0.1
_NEGLIGIBLE = 1e-3
_LAST_LR = 0.01
_SMALLEST_SSIM_SIDE = 11
_FEW = 5_000
_TELLING_STEPS = 10
_ROSE = 1.5
_SEED_OFFSET = 7_368_787  # so that no surrogate of the same seed starts from the same weights


class InverseNetwork:
    """A decoder that learns to invert features; seeded, and the same seed gives the same result.

    Args:
        config: its settings.
        device: where it trains; data may live elsewhere and is moved batch by batch.
        private: where its loss counts more: an attacker who is after number plates or faces, and
            finds them on pictures of his own.

    Attributes:
        held_out: after `fit`, indices of the attacker's images that no weight was learnt from.
    """

    def __init__(
        self, config: InverseNetworkConfig | None = None, *, device: str = "cpu",
        private: PrivateRegions | None = None,
    ) -> None:
        check_regions(private)
        self.config, self.private = config or InverseNetworkConfig(), private
        self.device = torch.device(device)
        autocast(self.device, self.config.precision)  # refuses a precision the device lacks
        self.held_out: Tensor | None = None
        self.standardizer: FeatureStandardizer | None = None
        self.decoder: nn.Module | None = None

    def fit(self, known: Knowledge) -> FitRecord:
        """Train a fresh decoder to a plateau, and keep the weights of the best held-out epoch.

        A feature does not follow its image when that is mirrored: the edge is asked anew.

        Args:
            known: `pixels` (at least 20 images, float on [0, 1] or uint8) and `z` or `edge`. A
                random edge is queried anew for every batch, for the held-out loss too.

        Raises:
            InputError: on neither `z` nor `edge`, on too few images, on lengths that differ, on
                NaN or infinity in the features, on pixels outside [0, 1], or under 11 of them a
                side with SSIM.
            TrainingError: the loss was not finite before the first epoch ended.
        """
        start = time.perf_counter()
        config = self.config
        few = len(known.pixels) < _FEW
        pairs = TrainingPairs(known, self.device, recompute=config.recompute,
                              mirror=few if config.mirror is None else config.mirror)
        if "ssim" in config.loss and min(pairs.image_shape[1:]) < _SMALLEST_SSIM_SIDE:
            raise InputError(
                f"SSIM takes images of at least {_SMALLEST_SSIM_SIDE} pixels a side, came "
                f'{pairs.image_shape[1:]}. Use loss="mse".'
            )
        generator = torch.Generator().manual_seed(config.seed + _SEED_OFFSET)
        order = torch.randperm(pairs.own, generator=generator)
        held = min(pairs.own - 2, max(2, round(config.holdout * pairs.own)))
        self.held_out = order[:held]
        own = order[held:]
        trains = {True: torch.cat([own, own + pairs.own])} if pairs.mirrored else {}
        if not pairs.mirrored or config.mirror is None:
            trains[False] = own
        dim = channel_dim(pairs.feature_shape, pairs.image_shape)
        reader = FeatureWhitener if config.whiten else FeatureStandardizer
        self.standardizer = reader(pairs.feature_shape, dim=dim).to(self.device)
        self.standardizer.fit(pairs.features())
        floor = self._mean_image_loss(pairs, own, self.held_out)
        initial, runs = math.inf, dict[bool, _Run]()
        for mirrored, train in trains.items():
            self._new_decoder(pairs.feature_shape, pairs.image_shape)
            runs[mirrored] = run = _Run(self, pairs, train, self.held_out,
                                        generator.clone_state())
            initial = run.held_out_loss()
            try:
                run.segment(config.epochs, config.lr)
            except TrainingError:
                if not mirrored or len(trains) == 1:
                    raise
                del runs[mirrored]
        mirrored = min(runs, key=lambda name: runs[name].best_loss)
        run = runs[mirrored]
        self.decoder = run.decoder
        extensions = 0
        while not run.plateau(floor) and not run.diverged and extensions < config.max_extensions:
            extensions += 1
            logger.info("prolonging after %d epochs, to see whether it helps", len(run.history))
            run.segment(max(1, config.epochs // 2), config.lr / 2)
        run.restore_best()
        return FitRecord(
            history=tuple(run.history),
            train_history=tuple(run.train_history),
            initial_loss=initial,
            mean_image_loss=floor,
            best_epoch=run.best_epoch,
            plateau=run.plateau(floor) and not run.diverged,
            extensions=extensions,
            seconds=time.perf_counter() - start,
            chosen={"mirrored": "yes" if mirrored else "no"} if len(trains) > 1 else None,
        )

    @torch.no_grad()
    def _mean_image_loss(self, pairs: TrainingPairs, own: Tensor, held_out: Tensor) -> float:
        """The held-out loss of the mean of the attacker's own training images."""
        mean = torch.stack([pairs.images(part).sum(0) for part in own.split(512)]).sum(0) / len(own)
        pixels = pairs.images(held_out)
        return float(self._loss(pixels, mean.expand_as(pixels)))

    def _loss(self, pixels: Tensor, reconstructed: Tensor) -> Tensor:
        if self.private is None:
            weights, loss = None, functional.mse_loss(reconstructed, pixels)
        else:
            weights = self.private.weights(pixels)
            loss = ((reconstructed - pixels).square() * weights).mean()
        if self.config.loss == "mse+ssim":
            loss = loss + SSIM_WEIGHT * (1.0 - ssim_values(pixels, reconstructed, weights).mean())
        return loss

    @torch.no_grad()
    def reconstruct(self, z: Tensor) -> Tensor:
        """Features `[N, *feature_shape]` to float32 pixels `[N, C, H, W]` on [0, 1], on z's device.

        Raises InputError before `fit`, and on features of another shape.
        """
        standardizer, decoder = self._parts()
        check_uploads_like(z, standardizer.feature_shape)
        decoder.eval()
        parts = [
            self._forward(part.to(self.device)).clamp(0.0, 1.0).to(z.device)
            for part in torch.split(z, max(64, self.config.batch_size))
        ]
        return torch.cat(parts)

    def _forward(
        self, z: Tensor, *, precision: str = "fp32", dropping: torch.Generator | None = None
    ) -> Tensor:
        standardizer, decoder = self._parts()
        z = standardizer(z.float())
        if dropping is not None and (p := self.config.dropout):
            z = z * (torch.rand(z.shape, generator=dropping) >= p).to(z.device) / (1.0 - p)
        if z.dim() == 4:
            z = z.contiguous(memory_format=torch.channels_last)
        with autocast(self.device, precision):
            pixels: Tensor = decoder(z)
        return pixels.float()

    def _new_decoder(self, feature_shape: tuple[int, ...], image_shape: tuple[int, ...]) -> None:
        config = self.config
        channels, height, width = image_shape
        decoder = make_decoder(
            config.family,
            feature_shape,
            (channels, height, width),
            width=config.width,
            depth=config.depth,
            seed=config.seed + _SEED_OFFSET,
        )
        self.decoder = decoder.to(self.device).to(memory_format=torch.channels_last)

    def _parts(self) -> tuple[FeatureStandardizer, nn.Module]:
        if self.standardizer is None or self.decoder is None:
            raise InputError("This attack has not been trained. Call fit(Knowledge(...)) first.")
        return self.standardizer, self.decoder


class _Run:
    """The state of one fit: what was reached, and the best weights so far."""

    def __init__(
        self,
        attack: InverseNetwork,
        pairs: TrainingPairs,
        train: Tensor,
        held_out: Tensor,
        generator: torch.Generator,
    ) -> None:
        self.attack, self.config, self.generator = attack, attack.config, generator
        self.pairs, self.train, self.held_out = pairs, train, held_out
        self.decoder = attack._parts()[1]
        self.history: list[float] = []
        self.train_history: list[float] = []
        self.best_epoch, self.best_loss = -1, math.inf
        self.best_state: dict[str, Tensor] = {}
        self.marks: list[float] = []
        self.steps = 0
        self.diverged = self.done = False

    def segment(self, epochs: int, peak_lr: float) -> None:
        """Train for `epochs` with one warm-up and one cosine; stops early on patience or NaN."""
        config = self.config
        optimizer = torch.optim.AdamW(self.decoder.parameters(), weight_decay=config.weight_decay)
        per_epoch = math.ceil(len(self.train) / config.batch_size)
        self.steps = epochs * per_epoch
        for epoch in range(epochs):
            self.decoder.train()
            losses: list[Tensor] = []
            order = self.train[torch.randperm(len(self.train), generator=self.generator)]
            for batch in torch.tensor_split(order, per_epoch):
                progress = (epoch * per_epoch + len(losses)) / (epochs * per_epoch)
                optimizer.param_groups[0]["lr"] = _schedule(progress, peak_lr)
                losses.append(self._step(batch, optimizer))
            self._end_epoch(float(torch.stack(losses).mean()))
            if self.done:
                break
        self.marks.append(self.best_loss)

    def _step(self, batch: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        z, pixels = self.pairs.batch(batch)
        optimizer.zero_grad(set_to_none=True)
        loss = self.attack._loss(pixels, self.attack._forward(
            z, precision=self.config.precision, dropping=self.generator))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.decoder.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    def _end_epoch(self, train_loss: float) -> None:
        loss = self.held_out_loss()
        epoch = len(self.history)
        if not (math.isfinite(loss) and math.isfinite(train_loss)):
            if not self.history:
                raise TrainingError(
                    "The attack's loss was not finite in its first epoch. Lower lr, or use "
                    'precision="fp32".',
                    step=epoch,
                    term="reconstruction",
                )
            logger.warning("the attack diverged in epoch %d; the best weights are kept", epoch)
            self.diverged = self.done = True
            return
        self.history.append(loss)
        self.train_history.append(train_loss)
        logger.info("epoch %d: loss %.5f, held out %.5f", epoch + 1, train_loss, loss)
        if loss < self.best_loss:
            self.best_epoch, self.best_loss = epoch, loss
            self.best_state = copy.deepcopy(self.decoder.state_dict())
        self.done = epoch - self.best_epoch >= self.config.patience
        if self.done and train_loss > _ROSE * self.train_history[self.best_epoch]:
            logger.warning("the attack's loss rose after epoch %d, whose weights are kept",
                           self.best_epoch + 1)
            self.diverged = True

    def restore_best(self) -> None:
        """Put the best held-out epoch's weights back, for evaluation."""
        self.decoder.load_state_dict(self.best_state)
        self.decoder.eval()

    def plateau(self, floor: float) -> bool:
        """Whether more training helps no more; `floor` is the mean image's held-out loss."""
        if self.done or self.best_loss < _NEGLIGIBLE * floor:
            return True
        if len(self.marks) < 2 or self.steps < _TELLING_STEPS:
            return False
        before, now = self.marks[-2:]
        return before - now <= self.config.plateau_tolerance * before

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The loss on the held-out images, in float32 and evaluation mode."""
        self.decoder.eval()
        total = 0.0
        for batch in torch.split(self.held_out, max(64, self.config.batch_size)):
            z, pixels = self.pairs.batch(batch)
            total += len(batch) * float(self.attack._loss(pixels, self.attack._forward(z)))
        return total / len(self.held_out)


def _schedule(progress: float, peak: float) -> float:
    """Learning rate at `progress` in [0, 1): linear warm-up, then cosine to 1% of the peak."""
    if progress < _WARM_UP:
        return peak * (_LAST_LR + (1 - _LAST_LR) * progress / _WARM_UP)
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - _WARM_UP) / (1 - _WARM_UP)))
    return peak * (_LAST_LR + (1 - _LAST_LR) * cosine)
