"""What an attacker reads out of rebuilt pictures: the plate, the place, and which vehicle it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from pictures import Everybody, Pictures
from torch import Tensor

import patrol_prune as pp

OWN = "the attacker's own pictures"
_DRAWS = 20
Rebuilt = Mapping[str, tuple[Tensor, Tensor | None]]
"""Attack to what it rebuilt of the victims, and of the attacker's pictures if it can."""


class LeakChecks:
    """Readers that the attacker trained on his own pictures, and a search for the vehicle.

    Args:
        people: who owns what.
        seed: of the readers, and of chance.
        embed: pictures on [0, 1] or uint8 `[N, 3, S, S]` to the dense model's embeddings.
    """

    def __init__(
        self, people: Everybody, seed: int, *, embed: Callable[[Tensor], Tensor]
    ) -> None:
        self.people, self.seed, self.embed = people, seed, embed
        self.gallery = embed(people.gallery.images)

    def of(self, victims: Pictures, attacker: Pictures, rebuilt: Rebuilt) -> dict[str, Any]:
        """Every leak of one edge; the strongest attack and reader of each kind beside all rows."""
        named = [{"attack": attack, **self.identify(guess)}
                 for attack, (guess, _) in rebuilt.items()]
        found: dict[str, Any] = {
            "identification": {"rows": named, "strongest": max(named, key=lambda r: r["map"])}
        }
        return found

    def of_originals(self, victims: Pictures) -> dict[str, Any]:
        """The same of the victims' own pictures, which nobody had to rebuild."""
        found: dict[str, Any] = {
            "identification": {"strongest": self.identify(victims.pixels()),
                               "chance": self.chance()},
        }
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
