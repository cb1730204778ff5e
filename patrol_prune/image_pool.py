"""Where training takes its batches from, and the surrogates theirs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from patrol_prune.given import check_rereadable, input_and_target

_PASSES = 1000  # per epoch, before orders would repeat


class TrainBatches(Protocol):
    """Anything with a length that yields `(x, y)`; `set_epoch` is called where it exists."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


def start_epoch(batches: TrainBatches, epoch: int) -> None:
    """Tell batches that want to know it which epoch begins: their order follows from it."""
    set_epoch = getattr(batches, "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch)


class ImagePool:
    """Images for the surrogates' inner steps, gone through again and again.

    What comes in an epoch follows from the epoch alone, so that a resumed run goes on with the
    same images.

    Raises InputError without a batch.
    """

    def __init__(self, batches: TrainBatches) -> None:
        check_rereadable(batches, "surrogate_batches")
        self.batches = batches
        self.restart(0)

    def restart(self, epoch: int) -> None:
        """Begin an epoch of the model's."""
        self.passes = _PASSES * epoch
        self.iterator: Iterator[tuple[Tensor, Tensor]] = iter(())

    def next_images(self) -> Tensor:
        """The images of the next batch."""
        for batch in self.iterator:
            return input_and_target(batch)[0]
        start_epoch(self.batches, self.passes)
        self.passes += 1
        self.iterator = iter(self.batches)
        return input_and_target(next(self.iterator))[0]
