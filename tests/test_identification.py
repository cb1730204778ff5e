"""Identification: ranks against a slow reference, the end points, and chance beside them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from patrol_prune.attacks.identification import (
    class_accuracy,
    identification_ranks,
    identify,
    pixel_embedding,
)
from patrol_prune.errors import InputError

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.rand(40, 3, 8, 8, generator=GENERATOR)


def slow_rank(query: list[float], gallery: list[list[float]], truth: int) -> int:
    def similarity(other: list[float]) -> float:
        return math.fsum(a * b for a, b in zip(query, other, strict=True))

    own = similarity(gallery[truth])
    others = [similarity(g) for i, g in enumerate(gallery) if i != truth]
    return sum(s > own for s in others) + sum(s == own for s in others) // 2


@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 4), st.integers(0, 99))
def test_ranks_are_those_of_a_loop(queries: int, candidates: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Whole numbers, so that ties are common and exact.
    q = torch.randint(-2, 3, (queries, size), generator=generator).float()
    g = torch.randint(-2, 3, (candidates, size), generator=generator).float()
    truth = torch.randint(candidates, (queries,), generator=generator)
    expected = [slow_rank(a, g.tolist(), t)
                for a, t in zip(q.tolist(), truth.tolist(), strict=True)]
    for chunk in (2, 1024):
        assert identification_ranks(q, g, truth, chunk=chunk).tolist() == expected


def test_a_hand_computed_rank() -> None:
    gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    query = torch.tensor([[0.8, 0.6]])  # similarities 0.8, 0.6, 0.96
    ranks = [int(identification_ranks(query, gallery, torch.tensor([t]))) for t in range(3)]
    assert ranks == [1, 2, 0]


def test_originals_are_found_and_other_images_are_found_by_chance() -> None:
    found = identify(IMAGES, IMAGES)
    assert (found.rank1, found.rank5) == (1.0, 1.0)
    assert (found.chance1, found.chance5, found.candidates) == (1 / 40, 5 / 40, 40)
    noise = torch.rand(IMAGES.shape, generator=torch.Generator().manual_seed(1))
    assert identify(IMAGES, noise).rank1 < 0.2
    # Shifted by one, every reconstruction is another image's: none is found.
    assert identify(IMAGES, IMAGES.roll(1, 0)).rank1 == 0.0


def test_one_answer_for_all_is_found_exactly_by_chance() -> None:
    same = IMAGES.mean(0, keepdim=True).expand_as(IMAGES)
    found = identify(IMAGES, same)
    assert (found.rank1, found.rank5) == (found.chance1, found.chance5)


def test_brightness_and_contrast_do_not_matter_to_the_default_embedding() -> None:
    faint = 0.45 + 0.05 * IMAGES
    assert torch.allclose(pixel_embedding(faint), pixel_embedding(IMAGES), atol=1e-4)
    assert torch.allclose(pixel_embedding(IMAGES).norm(dim=1), torch.ones(40))
    assert identify(IMAGES, faint).rank1 == 1.0
    # An embedding of one's own that sees nothing but the mean colour does not find them.
    mean = identify(IMAGES, faint, embed=lambda x: x.mean((2, 3)) - 0.4)
    assert mean.rank1 < 1.0


def test_fewer_candidates_are_the_next_images_around_the_end() -> None:
    noisy = (IMAGES + 1.2 * torch.randn(IMAGES.shape, generator=GENERATOR)).clamp(0, 1)
    q, g = pixel_embedding(noisy), pixel_embedding(IMAGES)
    expected = []
    for n in range(40):
        among = [(n + k) % 40 for k in range(7)]
        expected.append(slow_rank(q[n].tolist(), g[among].tolist(), 0))
    ranks = torch.tensor(expected)
    for chunk in (3, 1024):
        found = identify(IMAGES, noisy, candidates=7, chunk=chunk)
        assert found.rank1 == pytest.approx(float((ranks < 1).double().mean()))
        assert found.rank5 == pytest.approx(float((ranks < 5).double().mean()))
        assert (found.chance1, found.chance5) == (1 / 7, 5 / 7)
    assert 1 / 7 < found.rank1 < 1.0
    assert identify(IMAGES, noisy, candidates=40) == identify(IMAGES, noisy)
    assert identify(IMAGES, noisy, candidates=3).chance5 == 1.0


def test_class_accuracy_counts_and_leaves_the_classifier_as_it_was() -> None:
    classifier = nn.Sequential(nn.Dropout(0.9), nn.AvgPool2d(8), nn.Flatten())
    classifier[1].eval()
    images = torch.zeros(6, 3, 8, 8)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    images[torch.arange(6), torch.tensor([0, 1, 2, 0, 2, 1])] = 0.9  # four of six are right
    assert class_accuracy(classifier, images, labels, chunk=4) == pytest.approx(4 / 6)
    assert [m.training for m in classifier.modules()] == [True, True, False, True]
    assert class_accuracy(lambda x: x.mean((2, 3)), images, labels) == pytest.approx(4 / 6)


def test_a_classifier_that_says_nothing_is_right_by_chance() -> None:
    for label in range(4):
        labels = torch.full((40,), label)
        assert class_accuracy(lambda x: torch.zeros(len(x), 4), IMAGES, labels) == 0.25
    tied = torch.tensor([1.0, 2.0, 2.0, 0.0])
    labels = torch.tensor([0, 1, 2, 3]).repeat(10)
    assert class_accuracy(lambda x: tied.expand(len(x), 4), IMAGES, labels) == 0.25
    assert class_accuracy(lambda x: tied.expand(len(x), 4), IMAGES, torch.ones(40).long()) == 0.5


def test_embeddings_that_say_nothing_rank_in_the_middle_rounded_to_the_front() -> None:
    for count in (1, 2, 3, 4, 41):
        same = torch.ones(count, 3)
        ranks = identification_ranks(same, same, torch.arange(count))
        assert ranks.tolist() == [(count - 1) // 2] * count


def test_the_modes_come_back_after_an_error() -> None:
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(5, 2))
    with pytest.raises(RuntimeError):
        class_accuracy(classifier, IMAGES, torch.zeros(40, dtype=torch.long))
    assert all(m.training for m in classifier.modules())


@pytest.mark.parametrize(
    ("originals", "reconstructions", "options", "message"),
    [
        (IMAGES, IMAGES[:5], {}, "one shape"),
        (IMAGES[:1], IMAGES[:1], {}, "N >= 2"),
        (IMAGES, IMAGES * 2, {}, r"on \[0, 1\]"),
        (IMAGES, IMAGES, {"candidates": 41}, r"2\.\.40"),
        (IMAGES, IMAGES, {"candidates": 1}, r"2\.\.40"),
        (IMAGES, IMAGES, {"embed": lambda x: x}, "embedding"),
        (IMAGES, IMAGES, {"embed": lambda x: x.flatten(1) / 0}, "finite"),
    ],
)
def test_bad_images_are_refused(
    originals: Tensor, reconstructions: Tensor, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        identify(originals, reconstructions, **options)  # type: ignore[arg-type]


def test_bad_embeddings_and_labels_are_refused() -> None:
    one = torch.ones(2, 3)
    with pytest.raises(InputError, match=r"\[N, D\] and \[G, D\]"):
        identification_ranks(one, torch.ones(2, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(InputError, match="one true candidate"):
        identification_ranks(one, one, torch.zeros(3, dtype=torch.long))
    with pytest.raises(InputError, match=r"0\.\.1"):
        identification_ranks(one, one, torch.tensor([0, 2]))
    with pytest.raises(InputError, match="one label per"):
        class_accuracy(lambda x: x.mean((2, 3)), IMAGES, torch.zeros(3, dtype=torch.long))
    with pytest.raises(InputError, match="for every label"):
        class_accuracy(lambda x: x.mean((2, 3)), IMAGES, torch.full((40,), 3))


@pytest.mark.parametrize("candidates", [2, 10, 40])
def test_reconstructions_that_say_nothing_are_found_exactly_by_chance(candidates: int) -> None:
    found = identify(IMAGES, torch.full_like(IMAGES, 0.5), candidates=candidates)
    assert found.rank1 == pytest.approx(found.chance1)
    assert found.rank5 == pytest.approx(found.chance5)
