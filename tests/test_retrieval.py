"""Retrieval figures against hand-computed values and a second implementation."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patrol_prune.errors import InputError, MissingPackageError
from patrol_prune.retrieval import Retrieval, retrieval


def on_a_circle(*similarities: float) -> torch.Tensor:
    """Features whose cosine to (1, 0) is what is asked for, on different scales."""
    rows = [[s, (1 - s * s) ** 0.5] for s in similarities]
    return torch.tensor(rows, dtype=torch.float64) * torch.arange(1, len(rows) + 1)[:, None]


ONE_QUERY = torch.tensor([[3.0, 0.0]])


def by_hand(
    query: np.ndarray, gallery: np.ndarray, q_ids: Sequence[int], g_ids: Sequence[int],
    q_cameras: Sequence[int], g_cameras: Sequence[int], junk: Sequence[Sequence[int]],
) -> Retrieval:
    """Slow and plain: walk down each ranking, precision at each match; distinct similarities."""
    aps, firsts, inps = [], [], []
    for i, feature in enumerate(query):
        kept = []
        for j, other in enumerate(gallery):
            same_camera = q_cameras[i] == g_cameras[j] and q_cameras[i] >= 0
            if j not in junk[i] and not (g_ids[j] == q_ids[i] and same_camera):
                cosine = feature @ other / (np.linalg.norm(feature) * np.linalg.norm(other))
                kept.append((-cosine, g_ids[j] == q_ids[i]))
        found, total, first, last = 0, 0.0, 0, 0
        for rank, (_, match) in enumerate(sorted(kept), 1):
            if match:
                found += 1
                total += found / rank
                first, last = first or rank, rank
        if found:
            aps.append(total / found)
            firsts.append(first)
            inps.append(found / last)
    share = [float(np.mean([first <= k for first in firsts])) for k in (1, 5, 10)]
    return Retrieval(float(np.mean(aps)), *share, float(np.mean(inps)), len(aps),
                     len(query) - len(aps))


def test_a_hand_computed_ranking() -> None:
    """Ranks: other, match, same camera (out), junk (out), match, other. AP = (1/2 + 2/3) / 2."""
    gallery = on_a_circle(0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
    result = retrieval(ONE_QUERY, gallery, [7], [1, 7, 7, 7, 7, 2], [0], [1, 1, 0, 2, 3, 0],
                       junk=[[3]])
    assert result.map == pytest.approx(7 / 12)
    assert (result.rank1, result.rank5, result.rank10) == (0.0, 1.0, 1.0)
    assert result.minp == pytest.approx(2 / 3)
    assert (result.queries, result.without_match) == (1, 0)


def test_similarities_below_zero_count_like_others() -> None:
    """Where an implementation keeps positive scores alone, the second match would be lost."""
    gallery = on_a_circle(0.5, -0.5, -0.9)
    result = retrieval(ONE_QUERY, gallery, [1], [1, 2, 1], [0], [1, 1, 1])
    assert result.map == pytest.approx((1 + 2 / 3) / 2)


def test_features_that_say_nothing_get_no_credit() -> None:
    """All equal: AP is the share of matches, and no match is ahead of the others."""
    ids = [1, 1, 2, 2, 2, 2, 2, 2]
    for features in (torch.ones(8, 3), torch.zeros(8, 3)):
        result = retrieval(features[:1], features, [1], ids, [-1], [-1] * 8)
        assert result.map == pytest.approx(0.25) and result.minp == pytest.approx(0.25)
        assert (result.rank1, result.rank5, result.rank10) == (0.0, 0.0, 1.0)


def test_a_camera_that_is_not_known_excludes_nothing() -> None:
    gallery = on_a_circle(0.9, 0.8)
    assert retrieval(ONE_QUERY, gallery, [1], [1, 2], [-1], [-1, -1]).map == 1.0
    with pytest.raises(InputError, match="another camera"):
        retrieval(ONE_QUERY, gallery, [1], [1, 2], [3], [3, 3])


def test_queries_without_a_match_are_left_out_and_counted() -> None:
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    result = retrieval(query, on_a_circle(0.9, 0.1), [1, 5, 2], [1, 2], [0, 0, 1], [1, 1])
    assert (result.queries, result.without_match) == (1, 2)
    assert result.map == 1.0


@given(st.integers(0, 10_000))
def test_agrees_with_the_second_implementation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    queries, size = int(rng.integers(1, 6)), int(rng.integers(4, 30))
    query, gallery = rng.normal(size=(queries, 6)), rng.normal(size=(size, 6))
    q_ids, g_ids = rng.integers(0, 3, queries), rng.integers(0, 3, size)
    q_cameras, g_cameras = rng.integers(-1, 3, queries), rng.integers(-1, 3, size)
    junk = [sorted(rng.choice(size, int(rng.integers(0, 3)), replace=False).tolist())
            for _ in range(queries)]
    arguments = (q_ids.tolist(), g_ids.tolist(), q_cameras.tolist(), g_cameras.tolist())
    with np.errstate(all="ignore"):
        try:
            result = retrieval(torch.tensor(query), torch.tensor(gallery), *arguments, junk=junk)
        except InputError:
            kept = [(g_ids == q_ids[i]) & ((g_cameras != q_cameras[i]) | (q_cameras[i] < 0))
                    & ~np.isin(np.arange(size), junk[i]) for i in range(queries)]
            assert not np.any(kept), "refused although a query has a match"
            return
    expected = by_hand(query, gallery, *arguments, junk)
    for field in ("map", "rank1", "rank5", "rank10", "minp", "queries", "without_match"):
        assert getattr(result, field) == pytest.approx(getattr(expected, field)), field
    shares = (result.minp, result.map, result.rank1, result.rank5, result.rank10)
    assert all(0.0 <= share <= 1.0 for share in shares)


@given(st.integers(0, 10_000))
def test_scale_and_order_do_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    query, gallery = torch.tensor(rng.normal(size=(3, 4))), torch.tensor(rng.normal(size=(300, 4)))
    ids, cameras = torch.tensor(rng.integers(0, 3, 300)), torch.tensor(rng.integers(0, 4, 300))
    first = retrieval(query, gallery, [0, 1, 2], ids, [0, 1, 2], cameras)
    order = torch.tensor(rng.permutation(300))
    scale = torch.tensor(rng.uniform(0.1, 9.0, (300, 1)))
    again = retrieval(7 * query, (scale * gallery)[order], [0, 1, 2], ids[order], [0, 1, 2],
                      cameras[order])
    assert again.map == pytest.approx(first.map) and again.minp == pytest.approx(first.minp)
    assert (again.rank1, again.rank10) == (first.rank1, first.rank10)


def test_more_queries_than_a_chunk() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(600, 8, generator=generator)
    ids, cameras = torch.arange(600) % 50, torch.arange(600) % 7
    whole = retrieval(features, features, ids, ids, cameras, cameras)
    parts = [retrieval(features[rows], features, ids[rows], ids, cameras[rows], cameras)
             for rows in (slice(0, 300), slice(300, 600))]
    assert whole.queries == 600
    assert whole.map == pytest.approx((parts[0].map + parts[1].map) / 2)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"query": torch.ones(2)}, "Flatten"),
        ({"query": torch.ones(1, 3)}, "same model"),
        ({"query": torch.tensor([[float("nan"), 1.0]])}, "position 0"),
        ({"gallery_ids": [1]}, "one identity for each"),
        ({"query_cameras": [1, 2]}, "one camera for each"),
        ({"junk": []}, "one row of junk"),
        ({"junk": [[2]]}, "Count from 0"),
    ],
)
def test_bad_input_is_refused(change: dict[str, object], match: str) -> None:
    arguments: dict[str, object] = {
        "query": ONE_QUERY, "gallery": on_a_circle(0.9, 0.1), "query_ids": [1],
        "gallery_ids": [1, 2], "query_cameras": [0], "gallery_cameras": [1, 1], **change,
    }
    with pytest.raises(InputError, match=match):
        retrieval(**arguments)  # type: ignore[arg-type]


def test_without_scikit_learn_the_error_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(MissingPackageError, match="pip install scikit-learn"):
        retrieval(ONE_QUERY, ONE_QUERY, [1], [1], [0], [1])
