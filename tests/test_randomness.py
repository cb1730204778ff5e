"""The random streams behind an upload: what they follow from, and what they never repeat."""

from __future__ import annotations

import pytest
import torch

from patrol_prune.defences.dropout import Dropper
from patrol_prune.defences.noise import Noise
from patrol_prune.defences.randomness import seeded
from patrol_prune.errors import InputError


def drawn(generator: torch.Generator, count: int = 8) -> torch.Tensor:
    return torch.randn(count, generator=generator)


def test_short_seeds_are_torchs_own() -> None:
    for seed in (0, 7, 2**32 - 1):
        assert torch.equal(drawn(seeded(seed)), drawn(torch.Generator().manual_seed(seed)))


def test_every_bit_of_a_long_seed_counts() -> None:
    seeds = [5, 5 + 2**32, 5 + 3 * 2**32, 5 + 2**200, -5]
    first = [tuple(drawn(seeded(seed)).tolist()) for seed in seeds]
    assert len(set(first)) == len(seeds)
    assert torch.equal(drawn(seeded(5 + 2**200)), drawn(seeded(5 + 2**200)))


def test_a_filled_stream_is_as_random_as_another() -> None:
    values = drawn(seeded(2**80 + 1), 100_000)
    assert abs(float(values.mean())) < 0.02 and abs(float(values.std()) - 1.0) < 0.02
    assert abs(float((values[1:] * values[:-1]).mean())) < 0.02


def test_reseeding_takes_more_than_a_seed_of_32_bits() -> None:
    """Of all seeds that `manual_seed` tells apart, the chance that one gives this state is nil: the
    words of its state follow from the first by one rule, which filled ones do not keep to.
    """
    module = Noise("gaussian", 0)
    module.reseed()
    words = module.get_extra_state()[24 : 24 + 624 * 8].view(torch.int64).tolist()
    follow = [(1812433253 * (a ^ (a >> 30)) + i) % 2**32 for i, a in enumerate(words[:-1], 1)]
    assert sum(a == b for a, b in zip(words[1:], follow, strict=True)) < 5
    torchs = torch.Generator().manual_seed(9).get_state()[24 : 24 + 624 * 8]
    own = torchs.view(torch.int64).tolist()
    rule = [(1812433253 * (a ^ (a >> 30)) + i) % 2**32 for i, a in enumerate(own[:-1], 1)]
    assert rule == own[1:], "the rule is that of torch's seeds"


def test_a_reseeded_module_goes_on_from_its_saved_state() -> None:
    one, other = Dropper(0.5, 0), Dropper(0.5, 1)
    one.reseed(2**100)
    z = torch.ones(2, 50)
    one(z)
    other.set_extra_state(one.get_extra_state())
    assert torch.equal(one(z), other(z))
    again = Dropper(0.5, 2**100)
    one.reseed(2**100)
    assert torch.equal(one(z), again(z))


def test_a_seed_that_is_no_whole_number_is_refused() -> None:
    with pytest.raises(InputError, match="seed as a whole number"):
        Noise("gaussian", "7")  # type: ignore[arg-type]
