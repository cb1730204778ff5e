"""Given the reconstruction: which image, or which class, is it?

A blurred picture may have a poor SSIM and still say who is on it. Both questions are answered with
their chance level beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from patrol_prune.errors import InputError
from patrol_prune.metrics import check_pixels

_GATHERED = 2**24

Embed = Callable[[Tensor], Tensor]
"""Pixels `[N, C, H, W]` on [0, 1] to embeddings `[N, D]`, compared by their cosine."""


@dataclass(frozen=True)
class Identification:
    """How often the reconstruction leads back to its original.

    Attributes:
        rank1: share of reconstructions, on [0, 1], whose original is the nearest candidate.
        rank5: share whose original is among the five nearest.
        chance1, chance5: the same for a guess, `1 / candidates` and `min(1, 5 / candidates)`.
        candidates: among how many images the original stands.
    """

    rank1: float
    rank5: float
    chance1: float
    chance5: float
    candidates: int

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON-safe plain data."""
        return asdict(self)


def identification_ranks(
    queries: Tensor, gallery: Tensor, truth: Tensor, *, chunk: int = 1024
) -> Tensor:
    """At which place of each query's list its true candidate stands, nearest first, from 0.

    `rank_n = #{g : s_ng > s_nt} + floor(#{g != t : s_ng = s_nt} / 2)` with the similarity
    `s = q . g`: among equals the truth stands in the middle, rounded to the front. Embeddings that
    say nothing (all alike) rank by chance but for that: of two candidates the truth comes first.
    `identify` counts equals by their probability instead.

    Args:
        queries: embeddings `[N, D]`.
        gallery: the candidates' embeddings `[G, D]`.
        truth: index of each query's true candidate, `[N]`.
        chunk: queries that are compared at once.

    Returns:
        `[N]`, int64, on `0 .. G - 1`.

    Raises:
        InputError: on shapes that do not fit, NaN or infinity, or truth outside the gallery.
    """
    _check_embeddings(queries, gallery, truth)
    ranks, wide = [], gallery.double()
    for part, true in zip(torch.split(queries, chunk), torch.split(truth, chunk), strict=True):
        similarity = part.double() @ wide.T
        own = similarity.gather(1, true.to(similarity.device)[:, None])
        nearer, equal = _places(similarity, own)
        ranks.append(nearer + equal // 2)
    return torch.cat(ranks)


def identify(
    originals: Tensor,
    reconstructions: Tensor,
    *,
    candidates: int | None = None,
    embed: Embed | None = None,
    chunk: int = 1024,
) -> Identification:
    """Which of the candidate images is the reconstruction of?

    The candidates of image `n` are itself and the `candidates - 1` images behind it in
    `originals`, around the end. Everything is compared by cosine similarity; among equally
    similar candidates the original is found with the probability of a guess between them.

    Args:
        originals: images `[N, C, H, W]` on [0, 1], N >= 2.
        reconstructions: of them, in their order, of the same shape.
        candidates: in `2 .. N`, by default N.
        embed: the embedding; by default the image's own pixels less their mean
            (`pixel_embedding`), which is indifferent to brightness and contrast.
        chunk: images that are embedded and compared at once.

    Raises:
        InputError: on shapes that differ, pixels outside [0, 1], `candidates` out of range, or an
            embedding that is not `[N, D]` and finite.
    """
    if originals.shape != reconstructions.shape or originals.dim() != 4 or len(originals) < 2:
        raise InputError(
            "Expected originals and reconstructions [N, C, H, W] of one shape with N >= 2, came "
            f"{tuple(originals.shape)} and {tuple(reconstructions.shape)}."
        )
    check_pixels(originals, "originals")
    check_pixels(reconstructions, "reconstructions")
    count = len(originals)
    among = count if candidates is None else candidates
    if not 2 <= among <= count:
        raise InputError(f"Expected candidates in 2..{count}, came {candidates}.")
    gallery = _embed(originals, embed, chunk)
    queries = _embed(reconstructions.to(originals.device), embed, chunk)
    nearer, equal = _windowed_places(queries, gallery, among, chunk)
    return Identification(
        rank1=_share_among(1, nearer, equal),
        rank5=_share_among(5, nearer, equal),
        chance1=1 / among,
        chance5=min(1.0, 5 / among),
        candidates=among,
    )


def pixel_embedding(pixels: Tensor) -> Tensor:
    """Images `[N, C, H, W]` to `[N, C * H * W]`: less each image's mean, of unit length.

    A uniform image becomes 0, which is equally far from every other.
    """
    flat = pixels.float().flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    # The mean of equal values is rounded; what is left of them is no picture.
    centred = torch.where(centred.abs().amax(1, keepdim=True) > 1e-6, centred, 0.0)
    return functional.normalize(centred, dim=1)


@torch.no_grad()
def class_accuracy(
    classifier: nn.Module | Embed, reconstructions: Tensor, labels: Tensor, *, chunk: int = 256
) -> float:
    """Share of reconstructions whose class the classifier names, on [0, 1].

    Of several largest logits each is named with the probability of a guess between them.

    Args:
        classifier: pixels `[N, C, H, W]` on [0, 1] to logits `[N, classes]`; bring the
            normalisation along. A module is run in evaluation mode and left as it was.
        reconstructions: images `[N, C, H, W]` on [0, 1].
        labels: classes of the originals, `[N]`.
        chunk: images that are classified at once.

    Raises:
        InputError: on lengths that differ, pixels outside [0, 1], or labels without a logit.
    """
    if reconstructions.dim() != 4 or len(reconstructions) != len(labels) or len(labels) == 0:
        raise InputError(
            "Expected one label per reconstruction [N, C, H, W], came "
            f"{tuple(labels.shape)} and {tuple(reconstructions.shape)}."
        )
    check_pixels(reconstructions, "reconstructions")
    modules = list(classifier.modules()) if isinstance(classifier, nn.Module) else []
    modes = [(module, module.training) for module in modules]
    try:
        for module in modules:
            module.training = False
        logits = torch.cat([classifier(part) for part in torch.split(reconstructions, chunk)])
    finally:
        for module, mode in modes:
            module.training = mode
    wanted = labels.to(logits.device)
    if logits.dim() != 2 or int(wanted.min()) < 0 or int(wanted.max()) >= logits.shape[1]:
        raise InputError(
            f"Expected logits [N, classes] with one for every label, came {tuple(logits.shape)} "
            f"and labels up to {int(wanted.max())}."
        )
    largest = logits == logits.amax(1, keepdim=True)
    named = largest.gather(1, wanted.long()[:, None])[:, 0]
    return float((named.double() / largest.sum(1).clamp_min(1)).mean())


def _embed(pixels: Tensor, embed: Embed | None, chunk: int) -> Tensor:
    with torch.no_grad():
        parts = [(embed or pixel_embedding)(part) for part in torch.split(pixels, chunk)]
    embedded = torch.cat(parts)
    if embedded.dim() != 2 or len(embedded) != len(pixels):
        raise InputError(
            f"Expected an embedding [N, D] of {len(pixels)} images, came {tuple(embedded.shape)}. "
            "Flatten what the embedding network returns."
        )
    return functional.normalize(embedded.float(), dim=1)


def _windowed_places(
    queries: Tensor, gallery: Tensor, among: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """`_places` where image `n` stands among `n, n + 1, ... n + among - 1`, modulo N."""
    _check_embeddings(queries, gallery, torch.arange(len(queries)))
    whole = among == len(gallery)
    offsets = torch.arange(among, device=gallery.device)
    size = chunk if whole else max(1, min(chunk, _GATHERED // (among * gallery.shape[1])))
    wide, parts = gallery.double(), []
    for rows in torch.split(torch.arange(len(queries), device=gallery.device), size):
        part = queries[rows].double()
        if whole:
            similarity = part @ wide.T
            own = similarity.gather(1, rows[:, None])
        else:
            near = wide[(rows[:, None] + offsets) % len(gallery)]
            similarity = torch.einsum("nd,ngd->ng", part, near)
            own = similarity[:, :1]
        parts.append(_places(similarity, own))
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _places(similarity: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """How many candidates of `[N, G]` are nearer than the own one `[N, 1]`, how many equally near.

    What differs by rounding alone is equal: identical candidates must tie.
    """
    slack = 1e-9 * similarity.abs().amax(1, keepdim=True)
    nearer = (similarity > own + slack).sum(1)
    equal = ((similarity - own).abs() <= slack).sum(1) - 1
    return nearer, equal


def _share_among(first: int, nearer: Tensor, equal: Tensor) -> float:
    """Probability of standing among the `first`, equals in random order, mean over queries."""
    return float(((first - nearer).double() / (equal + 1)).clamp(0.0, 1.0).mean())


def _check_embeddings(queries: Tensor, gallery: Tensor, truth: Tensor) -> None:
    if queries.dim() != 2 or gallery.dim() != 2 or queries.shape[1] != gallery.shape[1]:
        raise InputError(
            "Expected embeddings [N, D] and [G, D], came "
            f"{tuple(queries.shape)} and {tuple(gallery.shape)}."
        )
    if truth.shape != (len(queries),) or len(queries) == 0 or len(gallery) == 0:
        raise InputError(
            f"Expected one true candidate per query, came {tuple(truth.shape)} for {len(queries)}."
        )
    if int(truth.min()) < 0 or int(truth.max()) >= len(gallery):
        raise InputError(
            f"Expected true candidates in 0..{len(gallery) - 1}, came {int(truth.min())} to "
            f"{int(truth.max())}."
        )
    if not (bool(torch.isfinite(queries).all()) and bool(torch.isfinite(gallery).all())):
        raise InputError("Expected finite embeddings, came NaN or infinity. Look at embed=.")
