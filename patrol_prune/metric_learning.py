"""The one module that knows pytorch-metric-learning: batches of identities and the triplet loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from patrol_prune.errors import InputError, MissingPackageError


def require_metric_learning() -> Any:
    """The module `pytorch_metric_learning`.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import pytorch_metric_learning
    except ImportError as error:
        raise MissingPackageError(
            "Re-identification is trained with pytorch-metric-learning, which is not installed "
            "here. Type: pip install 'pytorch-metric-learning>=2.9'"
        ) from error
    return pytorch_metric_learning


def batch_hard_triplet(features: Tensor, identities: Tensor, *, margin: float = 0.3) -> Tensor:
    """The mean over anchors of `max(0, d(a, p) - d(a, n) + margin)`, differentiable.

    `d` is the Euclidean distance, `p` the farthest image of the anchor's identity in the batch and
    `n` the nearest image of another one. Anchors without either are left out; a batch without any
    triplet gives 0. The features are not scaled to length 1.

    Args:
        features: `[N, D]`.
        identities: `[N]` integers.
        margin: in units of the distance.

    Source: Hermans, Beyer and Leibe, In Defense of the Triplet Loss, 2017.

    Raises:
        MissingPackageError: pytorch-metric-learning is not installed.
    """
    require_metric_learning()
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.miners import BatchHardMiner
    from pytorch_metric_learning.reducers import MeanReducer

    distance = LpDistance(normalize_embeddings=False)
    # Distances come of products, which lose them far from the origin.
    features = features - features.mean(0).detach()
    triplets = BatchHardMiner(distance=distance)(features, identities)
    loss = TripletMarginLoss(margin=margin, distance=distance, reducer=MeanReducer())
    value: Tensor = loss(features, identities, triplets)
    return value


def pk_order(
    identities: Tensor, per_batch: int, images_each: int, batches: int, *, seed: int
) -> Tensor:
    """Image numbers `[batches, per_batch * images_each]`: each row holds so many identities.

    The identities of a batch are drawn without replacement, and so are the images of an identity
    that has enough of them. The global generators stay untouched.

    Args:
        identities: `[N]` integers.
        per_batch: identities in a batch.
        images_each: images of each.
        batches: rows.
        seed: of everything.

    Raises:
        InputError: fewer identities than a batch asks for.
        MissingPackageError: pytorch-metric-learning is not installed.
    """
    require_metric_learning()
    from pytorch_metric_learning.samplers import MPerClassSampler
    from pytorch_metric_learning.utils import common_functions

    there = len(identities.unique())
    if there < per_batch:
        raise InputError(
            f"Expected at least {per_batch} identities for a batch, came {there}. Ask for fewer "
            "per batch, or give more identities to train on."
        )
    size = per_batch * images_each
    sampler = MPerClassSampler(
        identities, m=images_each, batch_size=size, length_before_new_iter=batches * size
    )
    before = common_functions.NUMPY_RANDOM
    common_functions.NUMPY_RANDOM = np.random.RandomState(seed)
    try:
        order = [int(i) for i in sampler]
    finally:
        common_functions.NUMPY_RANDOM = before
    return torch.tensor(order, dtype=torch.long).reshape(batches, size)
