"""Training for re-identification: the loss, and batches of few identities with several images.

    loss = ReidLoss(model)
    objective = PatrolObjective(split, loss, beta=20.0)
    finetune(split, PKBatches(images, 16, 4, augment=True), objective=objective)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patrol_prune.data import ImageSet, flip_and_shift
from patrol_prune.errors import InputError
from patrol_prune.metric_learning import batch_hard_triplet, pk_order, require_metric_learning
from patrol_prune.pixels import Normalization
from patrol_prune.reid_model import neck_of


class _Tap:
    """Forward hook: keeps what its layer was last given, until it is taken."""

    def __init__(self) -> None:
        self.seen: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.seen = args[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Tap:
        return _Tap()  # a copied model is watched by nobody

    def __reduce__(self) -> tuple[Any, ...]:
        return _Tap, ()


class ReidLoss:
    """`cross-entropy(logits, y) + w * triplet(f, y)`, a task loss for `PatrolObjective`.

    The cross-entropy has smoothed labels; `f` is what the model's neck read in the forward pass
    that gave the logits, so the loss is called once after each pass. `triplet` is the mean over
    images of `max(0, d(farthest of its identity) - d(nearest other) + margin)` within the batch,
    `d` the Euclidean distance (Hermans et al. 2017). A soft mask on the group that the neck itself
    normalises stands behind the neck: the triplet term does not feel it.

    A hook stands on the neck until `close`, or the end of a `with` block.

    Args:
        model: has a `BNNeck`.
        smoothing: of the labels, in [0, 1).
        margin: of the triplets, in units of the distance.
        triplet_weight: `w`; 0 leaves the term out.

    Raises:
        InputError: a model without a `BNNeck`, or a setting out of its range.
        MissingPackageError: pytorch-metric-learning is not installed.
    """

    def __init__(
        self, model: nn.Module, *, smoothing: float = 0.1, margin: float = 0.3,
        triplet_weight: float = 1.0,
    ) -> None:
        if not 0 <= smoothing < 1 or margin < 0 or triplet_weight < 0:
            raise InputError(
                "Expected smoothing in [0, 1) and a margin and a triplet_weight of at least 0, "
                f"came {smoothing}, {margin} and {triplet_weight}."
            )
        require_metric_learning()
        self.smoothing, self.margin, self.triplet_weight = smoothing, margin, triplet_weight
        self._tap = _Tap()
        self._handle = neck_of(model).register_forward_hook(self._tap)

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            logits: `[N, K]`, the model's output.
            y: identities `[N]`, in `0 .. K - 1`.

        Raises:
            InputError: the model has not run since the last call, or on another batch.
        """
        features, self._tap.seen = self._tap.seen, None
        if features is None or len(features) != len(logits):
            came = "none" if features is None else str(len(features))
            raise InputError(
                f"Expected the features of these {len(logits)} images from the model's last "
                f"forward pass, came {came}. Call the loss once after each pass of the model it "
                "was made for."
            )
        loss = F.cross_entropy(logits, y, label_smoothing=self.smoothing)
        if self.triplet_weight:
            triplets = batch_hard_triplet(features.float(), y, margin=self.margin)
            loss = loss + self.triplet_weight * triplets
        return loss

    def close(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()
        self._tap.seen = None

    def __enter__(self) -> ReidLoss:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PKBatches:
    """Batches `(x, y)` of `identities` identities with `images_each` images each, for `ReidLoss`.

    As many batches an epoch as the images fill; an identity with fewer images repeats some. The
    same epoch of the same seed gives the same batches.

    Args:
        image_set: the classes are the identities.
        identities: P in a batch, at least 2, or there is no image of another identity.
        images_each: K of each identity, at least 2, or there is no second image; `x` is
            `[P K, 3, H, W]` and `y` `[P K]`.
        normalization: from pixels to the model's input.
        augment: random flips and shifts, as `Batches` does.
        seed: of order and augmentation.

    Raises:
        InputError: a number under 2, or fewer identities than a batch needs.
        MissingPackageError: pytorch-metric-learning is not installed.
    """

    def __init__(
        self,
        image_set: ImageSet,
        identities: int = 16,
        images_each: int = 4,
        *,
        normalization: Normalization | None = None,
        augment: bool = False,
        seed: int = 0,
    ) -> None:
        if identities < 2 or images_each < 2:
            raise InputError(
                "Expected at least 2 identities and 2 images of each in a batch, came "
                f"{identities} and {images_each}: a triplet needs them."
            )
        pk_order(image_set.labels, identities, images_each, 1, seed=0)  # refuses too few
        self.image_set, self.identities, self.images_each = image_set, identities, images_each
        self.normalization = normalization or Normalization()
        self.augment, self.seed, self.epoch = augment, seed, 0

    def __len__(self) -> int:
        return max(1, len(self.image_set) // (self.identities * self.images_each))

    def set_epoch(self, epoch: int) -> None:
        """The next iteration draws order and augmentation of this epoch."""
        self.epoch = epoch

    def chosen(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """The pictures of a batch, uint8 `[P K, 3, H, W]`, before augmentation. A subclass may
        change them; what it draws with `generator` is the same for the same epoch and seed.
        """
        return self.image_set.images[index]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        seed = (self.seed * 100_003 + self.epoch) % 2**32
        self.epoch += 1
        generator = torch.Generator().manual_seed(seed)
        labels = self.image_set.labels
        for index in pk_order(labels, self.identities, self.images_each, len(self), seed=seed):
            images = self.chosen(index, generator)
            if self.augment:
                images = flip_and_shift(images, generator)
            yield self.normalization.to_input(images.float() / 255.0), labels[index]
