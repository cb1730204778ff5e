"""What an upload gives away by itself: which vehicle, which plate, which place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from pictures import Pictures
from torch import Tensor
from torch.nn import functional as F

from patrol_prune.upload_reader import UploadReader, as_map

DIRECT = "the upload itself"
READERS = {"network": "a network on the attacker's own uploads",
           "linear": "ridge regression on the attacker's own uploads"}
_POOL = 4
_CHUNK = 200
_KNOWN = 4_000
"""So many of the attacker's pictures are enough to learn what tells vehicles apart."""
_AXES = 1_024
"""Of larger summaries, those along which the attacker's own vary most are compared."""

Edge = Callable[[Tensor], Tensor]
"""Pictures on [0, 1] or uint8 to what the device uploads for them, on the CPU."""


@dataclass(frozen=True)
class Owned:
    """Pictures of one owner, with what the device uploads for them."""

    pictures: Pictures
    edge: Edge

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.pictures.images.shape[1:]
        return channels, height, width

    def of(self, index: Tensor) -> Owned:
        """The owner of these pictures alone."""
        return Owned(self.pictures.subset(index), self.edge)

    def summaries(self, count: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """`[N, D]` pooled to at most 4x4 positions, `[N, C]` to one, and the identities; of so
        many pictures, spread evenly, where a number is given.
        """
        whole = self if count is None or count >= len(self.pictures) else self.of(
            torch.linspace(0, len(self.pictures) - 1, count).round().long())
        parts = [pooled(z, self.image_shape) for z in whole.uploads()]
        large, small = (torch.cat(each) for each in zip(*parts, strict=True))
        return large, small, whole.pictures.identities

    def uploads(self) -> Iterator[Tensor]:
        """All of them, some at a time: whole they may be larger than memory."""
        for part in self.pictures.images.split(_CHUNK):
            yield self.edge(part).float()


def pooled(z: Tensor, image_shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """A feature of any shape as `[N, D]`, its map pooled to at most 4x4; and its mean `[N, C]`."""
    grid = as_map(z, image_shape)
    if grid is None:
        flat = z.flatten(1)
        return flat, z.mean(1) if z.dim() == 3 else flat
    sides = (min(_POOL, grid.shape[2]), min(_POOL, grid.shape[3]))
    return F.adaptive_avg_pool2d(grid, sides).flatten(1), grid.mean((2, 3))


def embeddings(victims: Owned, gallery: Owned, known: Owned) -> dict[str, tuple[Tensor, Tensor]]:
    """Ways to compare uploads -> `(victims [V, D], gallery [G, D])`, for cosine similarity.

    Pooled and standardised by the attacker's own uploads; and projected on what tells his own
    vehicles apart (linear discriminants with the covariance shrunk, Ledoit and Wolf 2004).
    """
    query, others, own = victims.summaries(), gallery.summaries(), known.summaries(_KNOWN)
    found = {}
    for name, q, g, mine in (("pooled", query[0], others[0], own[0]),
                             ("averaged", query[1], others[1], own[1])):
        mean, gain = mine.mean(0), 1 / (mine.std(0) + 1e-3 * mine.std() + 1e-12)
        q, g, mine = ((part - mean) * gain for part in (q, g, mine))
        found[f"{DIRECT}, {name}"] = q, g
        project = discriminants(mine, own[2])
        if project is not None:
            found[f"{DIRECT}, {name}, discriminants"] = project(q), project(g)
    return found


def discriminants(x: Tensor, identities: Tensor) -> Callable[[Tensor], Tensor] | None:
    """A linear map onto what tells these identities apart; None where there are too few."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    counts = identities.unique(return_counts=True)[1]
    if len(counts) < 3 or int(counts.max()) < 2:
        return None
    basis = principal_axes(x, _AXES)
    model = LinearDiscriminantAnalysis(solver="eigen", shrinkage="auto")
    model.fit((x.double() @ basis).numpy(), identities.numpy())
    return lambda z: torch.from_numpy(model.transform((z.double() @ basis).numpy()))


def principal_axes(x: Tensor, most: int) -> Tensor:
    """`[D, K]`, orthonormal: all axes, or the `most` along which `x` varies most."""
    count, width = x.shape
    if width <= most:
        return torch.eye(width, dtype=torch.double)
    centred = x.double() - x.double().mean(0)
    values, vectors = torch.linalg.eigh(centred @ centred.T if count < width
                                        else centred.T @ centred)
    kept = min(most, int((values > 1e-10 * values[-1]).sum()))
    if count >= width:
        return vectors[:, -kept:]
    return centred.T @ (vectors[:, -kept:] / values[-kept:].sqrt())


def read_uploads(victims: Owned, known: Owned, *, seed: int = 0, device: str = "cpu"
                 ) -> dict[str, dict[str, Any]]:
    """Plates, characters and places that are read out of uploads alone: a row of each."""
    truth, asked = known.pictures.truth, victims.pictures.truth
    assert truth is not None and asked is not None
    config = replace(UploadReader(known.image_shape).config, seed=seed, device=device)
    found = {}
    scene = UploadReader(known.image_shape, config).fit(
        known.uploads(), [(s,) for s in truth.scenes])
    leak = scene.accuracy(victims.uploads(), [(s,) for s in asked.scenes])[0]
    found["scenes"] = scene, leak
    seen, shown = ((~t.hidden).nonzero().flatten() for t in (truth, asked))
    if len(shown) and len(seen) > 1:
        plates = UploadReader(known.image_shape, config).fit(
            known.of(seen).uploads(), [truth.plates[i] for i in seen.tolist()], truth.boxes[seen])
        single, whole = plates.accuracy(
            victims.of(shown).uploads(), [asked.plates[i] for i in shown.tolist()],
            asked.boxes[shown])
        found["characters"], found["plates"] = (plates, single), (plates, whole)
    return {kind: {"attack": DIRECT, "reader": READERS[str(reader.chosen)], **asdict(leak)}
            for kind, (reader, leak) in found.items()}
