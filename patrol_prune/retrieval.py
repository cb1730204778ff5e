"""How well features find the same identity again: mAP, CMC and mINP under the cameras' rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from patrol_prune.errors import InputError, MissingPackageError

_CHUNK = 256
_DECIMALS = 10


@dataclass(frozen=True)
class Retrieval:
    """Means over the queries that have something to find; shares from 0 to 1, higher is better.

    Attributes:
        map: mean average precision.
        rank1: share of queries whose most similar gallery picture is a match.
        rank5: share with a match among the first 5.
        rank10: share with a match among the first 10.
        minp: mean inverse negative penalty, matches over the rank of the last of them.
        queries: over how many queries.
        without_match: queries left out, because the gallery has nothing to find for them.
    """

    map: float
    rank1: float
    rank5: float
    rank10: float
    minp: float
    queries: int
    without_match: int = 0


def retrieval(
    query: Tensor,
    gallery: Tensor,
    query_ids: Sequence[int] | Tensor,
    gallery_ids: Sequence[int] | Tensor,
    query_cameras: Sequence[int] | Tensor,
    gallery_cameras: Sequence[int] | Tensor,
    *,
    junk: Sequence[Sequence[int]] | None = None,
) -> Retrieval:
    """Rank the gallery by cosine similarity to each query and score the ranking.

    Out of a query's ranking go its junk and every picture of its identity by its own camera
    (Zheng et al., ICCV 2015), the latter not where the camera is negative, that is, not known. With
    G matches among the rest, `AP = (1/G) sum over matches of precision at the match`, computed by
    scikit-learn, and `INP = G / R`, R the rank of the last match (Ye et al., TPAMI 2021).

    What is equally similar is found at the same moment: a match counts at the worst rank it may
    have among equals, so that features that say nothing get no credit. Similarities are rounded
    to 10 decimals first, and a feature of zeros is equally similar to everything.

    Args:
        query: features `[Q, D]`, on any scale: each is divided by its length.
        gallery: features `[G, D]`.
        query_ids, gallery_ids: identity of each, `[Q]` and `[G]`.
        query_cameras, gallery_cameras: camera of each, likewise; negative where it is not known.
        junk: for each query, positions in the gallery, from 0, that count neither way.

    Raises:
        InputError: lengths that do not fit, features that are not finite, no query with a match.
        MissingPackageError: scikit-learn is not installed.
    """
    average_precision = _average_precision()
    q_ids, q_cameras = _labels(query, query_ids, query_cameras, "query")
    g_ids, g_cameras = _labels(gallery, gallery_ids, gallery_cameras, "gallery")
    _check(query, gallery, junk)
    q, g = (F.normalize(x.detach().cpu().double(), dim=1) for x in (query, gallery))
    scores = []
    for start in range(0, len(q), _CHUNK):
        similarity = (q[start : start + _CHUNK] @ g.T).numpy().round(_DECIMALS)
        for i, row in enumerate(similarity, start):
            same = g_ids == q_ids[i]
            counts = ~(same & (g_cameras == q_cameras[i]) & (q_cameras[i] >= 0))
            if junk is not None:
                counts[list(junk[i])] = False
            if (same & counts).any():
                scores.append(_score(same[counts], row[counts], average_precision))
    if not scores:
        raise InputError(
            "Expected at least one query with a match in the gallery: the same identity, by "
            f"another camera, not junk. None of {len(q)} queries has one; check the identities "
            "and the cameras."
        )
    table = np.array(scores)
    first = table[:, 1]
    return Retrieval(
        map=float(table[:, 0].mean()),
        rank1=float((first <= 1).mean()),
        rank5=float((first <= 5).mean()),
        rank10=float((first <= 10).mean()),
        minp=float(table[:, 2].mean()),
        queries=len(scores),
        without_match=len(q) - len(scores),
    )


def _score(
    same: np.ndarray, similarity: np.ndarray, average_precision: Callable[..., float]
) -> tuple[float, float, float]:
    """AP, the rank of the first match, INP; among equals, others come before a match."""
    matches = similarity[same]
    first = 1 + int((similarity[~same] >= matches.max()).sum())
    last = int((similarity >= matches.min()).sum())
    return float(average_precision(same, similarity)), float(first), len(matches) / last


def _average_precision() -> Any:
    try:
        from sklearn.metrics import average_precision_score
    except ImportError as error:
        raise MissingPackageError(
            "Average precision needs scikit-learn, which is not installed here. Type: "
            "pip install scikit-learn"
        ) from error
    return average_precision_score


def _labels(
    features: Tensor, ids: Sequence[int] | Tensor, cameras: Sequence[int] | Tensor, name: str
) -> tuple[np.ndarray, np.ndarray]:
    if features.dim() != 2 or len(features) == 0:
        raise InputError(
            f"Expected {name} features [N, D] with at least one row, came "
            f"{tuple(features.shape)}. Flatten each picture's features to one row."
        )
    arrays = tuple(torch.as_tensor(labels).cpu().numpy() for labels in (ids, cameras))
    for what, array in zip(("identity", "camera"), arrays, strict=True):
        if array.shape != (len(features),):
            raise InputError(
                f"Expected one {what} for each of the {len(features)} {name} features, came "
                f"{array.shape}. Give them in the order of the features."
            )
    return arrays[0], arrays[1]


def _check(query: Tensor, gallery: Tensor, junk: Sequence[Sequence[int]] | None) -> None:
    if query.shape[1] != gallery.shape[1]:
        raise InputError(
            f"Expected features of one length, came {query.shape[1]} for queries and "
            f"{gallery.shape[1]} for the gallery. Take both from the same model."
        )
    for name, features in (("query", query), ("gallery", gallery)):
        bad = (~torch.isfinite(features)).any(dim=1).nonzero()
        if len(bad):
            raise InputError(
                f"Expected finite features, {len(bad)} of the {name} have a NaN or an infinity, "
                f"the first at position {int(bad[0])}. Check the model and its input."
            )
    if junk is None:
        return
    if len(junk) != len(query):
        raise InputError(
            f"Expected one row of junk for each of the {len(query)} queries, came {len(junk)}. An "
            "empty row stands for none."
        )
    outside = [p for row in junk for p in row if not 0 <= p < len(gallery)]
    if outside:
        raise InputError(
            f"Expected junk as positions from 0 to {len(gallery) - 1} in the gallery, came "
            f"{outside[0]}. Count from 0."
        )
