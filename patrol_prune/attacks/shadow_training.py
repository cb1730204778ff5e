"""How a shadow edge is trained with what an attacker without queries has."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from patrol_prune.attacks.base import EdgeFunction, Knowledge
from patrol_prune.attacks.query_free_config import QueryFreeConfig
from patrol_prune.attacks.shadow import FeatureMoments, OtherEdge
from patrol_prune.errors import InputError, TrainingError
from patrol_prune.precision import autocast, channels_last_is_safe

logger = logging.getLogger(__name__)

_WARM_UP = 0.05
_CHUNK = 128


class ShadowTrainer:
    """Trains shadows of one kind on one attacker's knowledge."""

    def __init__(
        self, config: QueryFreeConfig, known: Knowledge, device: torch.device,
        *, train: Tensor, held_out: Tensor,
    ) -> None:
        self.config, self.device = config, device
        self.make, self.pixels, self.labels = known.shadow_edge, known.pixels, known.labels
        self.train_index, self.held_out = train, held_out
        self.image_shape = tuple(known.pixels.shape[1:])
        self.mean, self.std = self._input_statistics()
        self.cloud: nn.Module | None = None
        if known.cloud is not None:
            self.cloud = copy.deepcopy(known.cloud).to(device).eval().requires_grad_(False)
        self.moments: FeatureMoments | None = None
        self.outputs: FeatureMoments | None = None
        self.positive = False
        self.feature_shape: tuple[int, ...] = ()
        if known.observed is not None:
            self._observe(known.observed)

    def train(self, seed: int) -> tuple[nn.Module, dict[str, list[float]]]:
        """A shadow in evaluation mode, and its losses: train, held_out, initial, mean_image."""
        config = self.config
        generator = torch.Generator().manual_seed(seed)
        with _seeded(seed, self.device):
            shadow = self._fresh(seed)
            parameters = [p for p in shadow.parameters() if p.requires_grad]
            optimizer = torch.optim.Adam(parameters, lr=config.lr)
            losses: dict[str, list[float]] = {"train": [], "held_out": []}
            losses["initial"] = [self.held_out_loss(shadow)]
            per_epoch = max(1, len(self.train_index) // config.batch_size)
            epochs = config.moment_epochs + config.epochs
            for epoch in range(epochs):
                shadow.train()
                total = torch.zeros((), device=self.device)
                order = self.train_index[torch.randperm(len(self.train_index), generator=generator)]
                for number, batch in enumerate(torch.tensor_split(order, per_epoch)):
                    rate = _schedule((epoch * per_epoch + number) / (epochs * per_epoch))
                    optimizer.param_groups[0]["lr"] = config.lr * rate
                    with_cloud = epoch >= config.moment_epochs
                    total = total + self._step(shadow, parameters, optimizer, batch, with_cloud)
                losses["train"].append(float(total) / per_epoch)
                losses["held_out"].append(self.held_out_loss(shadow))
                self._check(losses, epoch)
            losses["mean_image"] = [self.held_out_loss(shadow, mean_image=True)]
        return shadow.eval(), losses

    def function(self, shadow: nn.Module) -> EdgeFunction:
        """The shadow as a function from pixels to features, differentiable, as `Knowledge.edge`."""
        frozen = shadow.requires_grad_(False)

        def edge(pixels: Tensor) -> Tensor:
            z: Tensor = frozen(self._to_input(pixels.to(self.device)))
            return z

        return edge

    @torch.no_grad()
    def held_out_loss(self, shadow: nn.Module, *, mean_image: bool = False) -> float:
        """The whole loss on the held-out images, in evaluation mode."""
        shadow.eval()
        pixels = self._pixels(self.held_out)
        if mean_image:
            pixels = pixels.mean(0, keepdim=True).expand_as(pixels)
        x = self._to_input(pixels)
        with autocast(self.device, self.config.precision):
            z = torch.cat([shadow(part) for part in torch.split(x, _CHUNK)])
        return float(self._loss(z.float(), self.held_out, with_cloud=True))

    def _step(
        self, shadow: nn.Module, parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer, batch: Tensor, with_cloud: bool,
    ) -> Tensor:
        x = self._to_input(self._pixels(batch)).contiguous(memory_format=layout_of(shadow))
        with autocast(self.device, self.config.precision):
            z = shadow(x)
        loss = self._loss(z.float(), batch, with_cloud=with_cloud)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.detach()

    def _loss(self, z: Tensor, batch: Tensor, *, with_cloud: bool) -> Tensor:
        config = self.config
        loss = z.new_zeros(())
        if self.moments is not None and config.moment_weight:
            loss = loss + config.moment_weight * self.moments.loss(z)
        if self.cloud is None or not with_cloud:
            return loss
        with autocast(self.device, config.precision):
            logits = self.cloud(z)
        logits = logits.float()
        if self.outputs is not None and config.output_weight:
            loss = loss + config.output_weight * self.outputs.loss(logits)
        if config.mode == "match":
            log_p = functional.log_softmax(logits, dim=1)
            return loss - config.entropy_weight * (log_p.exp() * log_p).sum(1).mean()
        assert self.labels is not None
        labels = self.labels[batch].to(self.device)
        return loss + config.task_weight * functional.cross_entropy(logits, labels)

    def _fresh(self, seed: int) -> nn.Module:
        if self.make is not None and self.config.mode != "shadow_other":
            shadow = self.make(seed)
        else:
            shadow = OtherEdge(self.image_shape, self.feature_shape, width=self.config.width,
                               positive=self.positive, seed=seed)
        shadow = shadow.requires_grad_(True).to(self.device)
        return shadow.to(memory_format=layout_of(shadow))

    def _observe(self, observed: Tensor) -> None:
        observed = observed.detach().to(self.device).float()
        self.positive = bool(observed.min() >= 0)
        self.feature_shape = tuple(observed.shape[1:])
        self.moments = FeatureMoments(observed, self.image_shape, seed=self.config.seed)
        if self.cloud is not None:
            with torch.no_grad(), autocast(self.device, self.config.precision):
                parts = [self.cloud(part).float() for part in torch.split(observed, _CHUNK)]
            self.outputs = FeatureMoments(torch.cat(parts), self.image_shape)

    def _check(self, losses: dict[str, list[float]], epoch: int) -> None:
        logger.info("shadow epoch %d: loss %.4f, held out %.4f", epoch + 1, losses["train"][-1],
                    losses["held_out"][-1])
        if not (math.isfinite(losses["train"][-1]) and math.isfinite(losses["held_out"][-1])):
            raise TrainingError(
                'The shadow\'s loss was not finite. Lower lr, or use precision="fp32".',
                step=epoch, term="shadow",
            )

    def _input_statistics(self) -> tuple[Tensor, Tensor]:
        mean, std = self.config.mean, self.config.std
        if mean is not None and std is not None:
            if len(mean) != self.image_shape[0]:
                raise InputError(
                    f"Expected one mean per image channel ({self.image_shape[0]}), came {mean}."
                )
            values = torch.tensor(mean), torch.tensor(std)
        else:
            some = self._pixels(self.train_index[:2048])
            values = some.mean((0, 2, 3)), some.std((0, 2, 3)).clamp_min(1e-3)
        return tuple(v.to(self.device).view(1, -1, 1, 1) for v in values)  # type: ignore[return-value]

    def _to_input(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.std

    def _pixels(self, index: Tensor) -> Tensor:
        pixels = self.pixels[index.to(self.pixels.device)].to(self.device)
        return pixels.float() / 255.0 if pixels.dtype == torch.uint8 else pixels.float()


def _schedule(progress: float) -> float:
    """Share of the peak learning rate at `progress` in [0, 1): linear warm-up, then cosine."""
    return min(1.0, progress / _WARM_UP + 1e-2) * 0.5 * (1 + math.cos(math.pi * progress))


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Global generators seeded inside and as before afterwards, for layers that draw (dropout)."""
    cuda = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed(seed)
        yield


def layout_of(shadow: nn.Module) -> torch.memory_format:
    """The faster layout, where it computes within its own memory."""
    safe = channels_last_is_safe(shadow)
    return torch.channels_last if safe else torch.contiguous_format
