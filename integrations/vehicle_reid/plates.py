"""Training pictures on which every vehicle carries another one's plate.

A plate names its vehicle: whoever learns to tell vehicles apart learns to read plates. Where the
defender knows where they are on his training pictures, he can take that incentive away.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pictures import Everybody
from settings import ReidRun
from torch import Tensor
from torch.nn import functional as F

import patrol_prune as pp
from patrol_prune.errors import InputError
from patrol_prune.leaks import map_square, square_of
from patrol_prune.vehicle_truth import VehicleTruth


def notes(swapped: bool) -> list[str]:
    """What whoever reads the result has to know."""
    return ["The pruned models were pruned and trained on pictures that carry other vehicles' "
            "plates, the dense one on the pictures as they are; all are measured and attacked on "
            "the pictures as they are."] * swapped


def training_batches(
    config: ReidRun, people: Everybody, offset: int, *, augment: bool, swapped: bool
) -> pp.PKBatches:
    """The defender's pictures in batches, with their own plates or others'."""
    batch = config.batch
    kind: Callable[..., pp.PKBatches] = pp.PKBatches
    if swapped:
        kind = partial(SwappedPlates, truth=people.truth)
    return kind(people.defender, batch.identities, batch.images_each, augment=augment,
                normalization=people.normalization, seed=config.seed + offset)


class SwappedPlates(pp.PKBatches):
    """Batches as `PKBatches` gives them, each picture with the plate of another vehicle, drawn anew
    each time from all those that nothing hides. What stood before the own plate goes with it.

    Args:
        image_set: as there.
        truth: of its pictures.
        options: as there.
    """

    def __init__(
        self, image_set: pp.ImageSet, *options: int, truth: VehicleTruth, **more: Any
    ) -> None:
        super().__init__(image_set, *options, **more)
        self.boxes = truth.boxes.double()
        self.seen = (~truth.hidden).nonzero().flatten()
        if len(image_set.labels[self.seen].unique()) < 2:
            raise InputError("Expected plates of at least 2 vehicles that nothing hides, came "
                             f"{len(self.seen)} plates. Leave --swap-plates out.")

    def chosen(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """See `PKBatches.chosen`; flips and shifts stay those of the same batch without it."""
        generator = generator.clone_state()
        images, labels = self.image_set.images, self.image_set.labels
        donors = index
        while bool((same := labels[donors] == labels[index]).any()):
            drawn = torch.randint(len(self.seen), (len(index),), generator=generator)
            donors = torch.where(same, self.seen[drawn], donors)
        return paste_plates(images[index], self.boxes[index], images[donors], self.boxes[donors])


def paste_plates(images: Tensor, boxes: Tensor, donors: Tensor, theirs: Tensor) -> Tensor:
    """The pictures with the donors' plates where their own were, seen as their own were.

    Args:
        images: uint8 `[N, 3, H, W]`.
        boxes: the corners of their plates in pixels, `[N, 4, 2]`, as in `VehicleTruth`.
        donors: uint8, as many and as large.
        theirs: the corners of the donors' plates.
    """
    height, width = images.shape[2:]
    down, along = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5,
                                 indexing="ij")
    centres = torch.stack([along, down], -1).reshape(-1, 2).double()
    plane = square_of(boxes, centres)  # [N, H W, 2], on [0, 1] within the plate
    inside = ((plane >= 0) & (plane <= 1)).all(2).view(-1, 1, height, width)
    points = map_square(theirs, plane.clamp(0, 1))
    grid = 2 * points / points.new_tensor([width, height]) - 1
    seen = F.grid_sample(donors.double(), grid.view(-1, height, width, 2), padding_mode="border",
                         align_corners=False)
    return torch.where(inside, seen.round().to(images.dtype), images)
