"""What an attacker reads: the plate, the place, and which vehicle it is.

Out of rebuilt pictures, and out of the uploads themselves, of which a rebuilt picture is but one
view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from pictures import Everybody, Pictures
from torch import Tensor
from uploads import Edge, Owned, embeddings, read_uploads

import patrol_prune as pp
from patrol_prune.leaks import Leak, PlateReader, ReaderConfig, SceneReader

OWN = "the attacker's own pictures"
_DRAWS = 20
Readers = tuple[PlateReader, SceneReader]
Rebuilt = Mapping[str, tuple[Tensor, Tensor | None]]
"""Attack to what it rebuilt of the victims, and of the attacker's pictures if it can."""


class LeakChecks:
    """Readers that the attacker trains on his own pictures, and a search for the vehicle.

    Plates are read where nothing stands in front of them, with their corners given.

    Args:
        people: who owns what.
        attacker: all of the attacker's pictures.
        seed: of the readers, and of chance.
        device: where readers compute.
        embed: pictures on [0, 1] or uint8 `[N, 3, S, S]` to the dense model's embeddings.
    """

    def __init__(
        self, people: Everybody, attacker: Pictures, *, seed: int, device: str,
        embed: Callable[[Tensor], Tensor],
    ) -> None:
        self.people, self.attacker, self.seed, self.embed = people, attacker, seed, embed
        self.config = ReaderConfig(seed=seed, device=device)
        self.gallery = embed(people.gallery.images)
        self._own = self.readers(attacker.pixels()) if attacker.truth is not None else None

    def readers(self, pixels: Tensor) -> Readers:
        """Readers of plates and of places, trained on versions of the attacker's first pictures."""
        truth = self.attacker.subset(torch.arange(len(pixels))).truth
        assert truth is not None
        seen = (~truth.hidden).nonzero().flatten()
        plates = PlateReader(self.config).fit(
            pixels[seen], truth.boxes[seen], [truth.plates[i] for i in seen.tolist()]
        )
        return plates, SceneReader(self.config).fit(pixels, truth.scenes)

    def of(self, victims: Pictures, rebuilt: Rebuilt, edge: Edge) -> dict[str, Any]:
        """Every leak of one edge: all rows of each kind, and the strongest of them.

        A reader is trained on what an attack rebuilt of all the attacker's pictures, and another on
        what it rebuilt of those alone that it had not learnt from, which look as a victim's do.

        Args:
            victims: whose uploads were inverted.
            rebuilt: by attack.
            edge: what the device uploads for pictures, on the CPU.
        """
        asked, known = Owned(victims, edge), Owned(self.attacker, edge)
        named = [{"attack": attack, **self.identify(guess)}
                 for attack, (guess, _) in rebuilt.items()]
        gallery = Owned(self.people.gallery, edge)
        named += [{"attack": attack, **self._rank(q, g)}
                  for attack, (q, g) in embeddings(asked, gallery, known).items()]
        found = {"identification": named}
        if self._own is not None:
            for kind, row in read_uploads(asked, known, seed=self.seed,
                                          device=self.config.device).items():
                found.setdefault(kind, []).append(row)
            readers = {OWN: self._own}
            unseen = len(self.people.reader)
            for attack, (_, theirs) in rebuilt.items():
                if theirs is not None:
                    readers[f"what {attack} rebuilt of them"] = self.readers(theirs)
                    readers[f"what {attack} rebuilt of those new to it"] = self.readers(
                        theirs[:unseen])
            for attack, (guess, _) in rebuilt.items():
                for trained_on, pair in readers.items():
                    for kind, leak in read(pair, victims, guess).items():
                        found.setdefault(kind, []).append(
                            {"attack": attack, "reader": trained_on, **asdict(leak)}
                        )
        return {kind: {"rows": rows, "strongest": max(rows, key=_strength)}
                for kind, rows in found.items()}

    def of_originals(self, victims: Pictures) -> dict[str, Any]:
        """The same of the victims' own pictures, which nobody had to rebuild."""
        found: dict[str, Any] = {
            "identification": {"strongest": self.identify(victims.pixels()),
                               "chance": self.chance()},
        }
        if self._own is not None:
            for kind, leak in read(self._own, victims, victims.pixels()).items():
                found[kind] = {"strongest": {"reader": OWN, **asdict(leak)}}
        return found

    def identify(self, pixels: Tensor) -> dict[str, Any]:
        """How well the dense model finds the victims' vehicles in the gallery by these pictures."""
        return self._rank(self.embed(pixels), self.gallery)

    def chance(self) -> dict[str, Any]:
        """The same with random embeddings, the mean over some draws."""
        generator = torch.Generator().manual_seed(self.seed)
        draws = []
        for _ in range(_DRAWS):
            q, g = (torch.randn(count, 16, generator=generator)
                    for count in (len(self.people.victims), len(self.gallery)))
            draws.append(self._rank(q, g))
        return {key: sum(d[key] for d in draws) / _DRAWS for key in draws[0]}

    def _rank(self, query: Tensor, gallery: Tensor) -> dict[str, Any]:
        people = self.people
        victims = people.query.subset(people.victims)
        junk = [people.junk[i] for i in people.victims.tolist()]
        return asdict(pp.retrieval(query, gallery, victims.identities, people.gallery.identities,
                                   victims.cameras, people.gallery.cameras, junk=junk))


def row_name(attack: str, seed: int, seeds: Sequence[int]) -> str:
    """How rows call an attack of this seed: its name, and the seed where it is not the first."""
    return attack if seed == seeds[0] else f"{attack}, seed {seed}"


def _strength(row: Mapping[str, Any]) -> float:
    return float(row["map"] if "map" in row else row["rate"])


def read(readers: Readers, victims: Pictures, pixels: Tensor) -> dict[str, Leak]:
    """Whole plates, single characters and places that are read right in `pixels` of the victims.

    The chance of a whole plate is that of its most frequent characters all being right.
    """
    plates, scenes = readers
    truth = victims.truth
    assert truth is not None
    seen = (~truth.hidden).nonzero().flatten()
    texts = [truth.plates[i] for i in seen.tolist()]
    found = {"scenes": scenes.accuracy(pixels, truth.scenes)}
    if texts:
        boxes = truth.boxes[seen]
        found["characters"] = plates.accuracy(pixels[seen], boxes, texts)
        right = sum(a == b for a, b in zip(plates.read(pixels[seen], boxes), texts, strict=True))
        chance = found["characters"].chance ** len(texts[0])
        found["plates"] = Leak(right / len(texts), chance, len(texts))
    return found
