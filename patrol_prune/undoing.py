"""All that an attacker undoes before he attacks, in its order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from patrol_prune.access import Draws, Repeated, fresh_twin
from patrol_prune.alone import one_at_a_time
from patrol_prune.arrangement import LAYOUT_GUESSED, ChannelsFirst, arranged, channels_last
from patrol_prune.attacks import Flag
from patrol_prune.attacks.checks import SEEN_ONCE
from patrol_prune.per_picture import (
    LEVELLED_PER_IMAGE,
    TURNED_PER_IMAGE,
    per_picture,
    same_way_round,
)
from patrol_prune.pixels import Normalization
from patrol_prune.received import UNEVEN_FEATURE, Prepared, Restored, Step, evened


@dataclass
class Undone:
    """A split as it is attacked.

    Attributes:
        edge: sends what the attacker has once he has undone what costs nothing.
        cloud: reads that.
        draws: whether the edge draws at random.
        uploads: how many of each picture are put together.
        flags: what was found.
        twin: `seed -> module`, the edge's architecture with fresh weights, which sends the like.
    """

    edge: nn.Module
    cloud: nn.Module | None
    draws: bool
    uploads: int
    flags: list[Flag]
    twin: Callable[[int], nn.Module]


def undone(
    edge: nn.Module, cloud: nn.Module | None, some: Tensor, known: Tensor,
    normalization: Normalization, uploads: int = 1,
) -> Undone:
    """What is left of a split's defence when all is undone that costs nothing.

    Args:
        edge: as it came.
        cloud: what reads its feature.
        some: images of both sides, which only tell how the edge answers.
        known: the attacker's images.
        normalization: of the edge's inputs.
        uploads: of each picture, where the edge draws.
    """
    bare, draws, flags = one_at_a_time(edge, some, normalization)
    uploads = uploads if draws else 1
    flags += [SEEN_ONCE] * (draws and uploads == 1)
    held = Draws(edge)
    with held.kept():  # before uploads are put together: signs that differ would cancel
        turned = same_way_round(bare, known, normalization)
    once = bare
    if turned is not None:
        once, cloud = Prepared(bare, turned), None if cloud is None else Restored(cloud, turned)
        flags.append(TURNED_PER_IMAGE)
    made = once if uploads == 1 else Repeated(once, uploads)
    free: list[Step] = []

    def add(step: Step, flag: Flag | None = None) -> None:
        nonlocal made, cloud
        made, cloud = Prepared(made, step), None if cloud is None else Restored(cloud, step)
        flags.extend([] if flag is None else [flag])

    with held.kept():
        own = per_picture(made, known, normalization, draws=draws)
        if own is not None:
            add(own, LEVELLED_PER_IMAGE)
            free.append(own)
        last = channels_last(made, known, normalization)
        if last:
            add(ChannelsFirst())
            free.append(ChannelsFirst())
        flags += [LAYOUT_GUESSED] * (last is None)
        level = evened(made, known, normalization, draws=draws)
        if level is not None:
            add(level, UNEVEN_FEATURE)
        order, scrambled = arranged(made, known, normalization)
        if order is not None:
            add(order)
            free.append(order)
        flags += [] if scrambled is None else [scrambled]

    def twin(seed: int) -> nn.Module:
        found = fresh_twin(bare, seed)
        own = None if turned is None else same_way_round(found, known, normalization)
        for step in ([] if own is None else [own]) + free:
            found = Prepared(found, step)
        return found

    return Undone(made, cloud, draws, uploads, flags, twin)
