"""Where plates are: a small detector, for the defence of them and for attackers after them."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from settings import ReidRun
from torch import Tensor, nn
from torch.nn import functional as F

import patrol_prune as pp
from patrol_prune.data import flip_and_shift
from patrol_prune.errors import InputError
from patrol_prune.leaks import square_of
from patrol_prune.storage import read_tensors, write_tensors
from patrol_prune.vehicle_truth import VehicleTruth

_MARGIN = 0.15
_STEPS, _BATCH, _LR, _WIDTH = 216, 48, 4e-3, 16
_LEAST = 0.5
_HALF = 0.5


def notes(config: ReidRun) -> list[str]:
    """What whoever reads the result has to know."""
    share = config.private_plates
    return [f"{share:.0%} of an error was counted on plates, which a detector finds that was "
            "trained on the defender's pictures: in PATROL's scores and fine-tuning, and in the "
            "loss of the attack aimed_ssim, which every model met."] * (share > 0.0)


class PlateFinder(nn.Module):
    """Pixels `[B, 3, S, S]` on [0, 1] to 1 where a plate is and 0 elsewhere, `[B, 1, S, S]`.

    A convolutional network on three scales from half of the picture's size down.

    Args:
        seed: of the initial weights.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.fine = nn.Sequential(_layer(3, _WIDTH, stride=2), _layer(_WIDTH, _WIDTH))
            self.middle = nn.Sequential(_layer(_WIDTH, 2 * _WIDTH, stride=2),
                                         _layer(2 * _WIDTH, 2 * _WIDTH))
            self.coarse = nn.Sequential(
                _layer(2 * _WIDTH, 2 * _WIDTH, stride=2),
                *(_layer(2 * _WIDTH, 2 * _WIDTH, dilation=d) for d in (2, 4)))
            self.up = _layer(4 * _WIDTH, _WIDTH)
            self.last = nn.Conv2d(2 * _WIDTH, 4, 3, padding=1)

    def logits(self, pixels: Tensor) -> Tensor:
        """`[B, 1, S', S']`, with `S'` the least multiple of 8 from `S` on."""
        side = 8 * math.ceil(pixels.shape[-1] / 8)
        x = F.pad(2.0 * pixels - 1.0, (0, side - pixels.shape[-1], 0, side - pixels.shape[-2]))
        fine = self.fine(x)
        middle = self.middle(fine)
        wide = F.interpolate(self.coarse(middle), scale_factor=2.0, mode="bilinear")
        near = F.interpolate(self.up(torch.cat([middle, wide], 1)), scale_factor=2.0,
                             mode="bilinear")
        return F.pixel_shuffle(self.last(torch.cat([fine, near], 1)), 2)

    def forward(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[2:]
        return (self.logits(pixels)[..., :height, :width] > 0.0).float()


def regions(
    config: ReidRun, pictures: Tensor, truth: VehicleTruth | None, file: Path,
    device: torch.device,
) -> pp.PrivateRegions | None:
    """Plates as private regions; None where `private_plates` is 0.

    Args:
        config: the settings.
        pictures: the defender's, uint8 `[N, 3, S, S]`.
        truth: where their plates are.
        file: where the detector is kept; the next call takes it from there.
        device: where it works.

    Raises:
        InputError: what the detector marks and the plates that it has learnt from overlap by
            less than half of both together.
    """
    if not config.private_plates:
        return None
    assert truth is not None  # `everybody` has refused other sets
    finder = PlateFinder(config.seed)
    if file.is_file():
        finder.load_state_dict(read_tensors(file.read_bytes(), file))
    else:
        masks = plate_masks(truth.boxes, pictures.shape[-1])
        learn(finder.to(device), pictures, masks, seed=config.seed)
        common = overlap(finder.eval(), pictures, masks)
        if common < _LEAST:
            raise InputError(
                f"Expected a detector whose marks overlap plates by {_LEAST:.0%} or more, came "
                f"{common:.0%} on the {len(pictures)} pictures that it learnt from. Give more "
                "pictures, or leave --private-plates out.")
        write_tensors(file, {k: v.cpu() for k, v in finder.state_dict().items()})
    return pp.PrivateRegions(finder.to(device).eval().requires_grad_(False),
                             config.private_plates)


@torch.no_grad()
def overlap(finder: PlateFinder, pictures: Tensor, masks: Tensor) -> float:
    """Pixels that it marks and `masks` mark, as a share of those that either marks."""
    device = next(finder.parameters()).device
    marks = torch.cat([finder(part.to(device).float() / 255.0).cpu() > 0
                       for part in pictures.split(_BATCH)])
    return int((marks & masks).sum()) / max(1, int((marks | masks).sum()))


def learn(finder: PlateFinder, pictures: Tensor, masks: Tensor, *, seed: int) -> None:
    """Train it on uint8 pictures `[N, 3, S, S]` and their masks `[N, 1, S, S]`, bool."""
    device = next(finder.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    batches = max(1, len(pictures) // _BATCH)
    epochs = -(-_STEPS // batches)
    optimizer = torch.optim.AdamW(finder.parameters(), _LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=epochs * batches)
    for _ in range(epochs):
        order = torch.randperm(len(pictures), generator=generator)
        for part in order.tensor_split(batches):
            both = torch.cat([pictures[part], 255 * masks[part].to(torch.uint8)], 1)
            both = (flip_and_shift(both, generator).float() / 255.0).to(device)
            logits = finder.logits(both[:, :3])[..., : both.shape[2], : both.shape[3]]
            loss = F.binary_cross_entropy_with_logits(logits, (both[:, 3:] > _HALF).float())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()


def plate_masks(boxes: Tensor, side: int) -> Tensor:
    """Where plates of these corners `[N, 4, 2]` are, a little beyond them: bool `[N, 1, S, S]`."""
    down, along = torch.meshgrid(*2 * (torch.arange(side) + 0.5,), indexing="ij")
    plane = square_of(boxes.double(), torch.stack([along, down], -1).reshape(-1, 2).double())
    inside = (plane >= -_MARGIN) & (plane <= 1.0 + _MARGIN)
    return inside.all(2).view(-1, 1, side, side)


def _layer(channels: int, out: int, *, stride: int = 1, dilation: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, stride, padding=dilation, dilation=dilation, bias=False),
        nn.BatchNorm2d(out), nn.ReLU())
