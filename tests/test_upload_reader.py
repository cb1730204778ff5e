"""Attributes inferred from features: what is there is found, what is not is near chance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from patrol_prune.errors import InputError
from patrol_prune.leaks import ReaderConfig
from patrol_prune.ridge import linear_scores
from patrol_prune.upload_reader import UploadReader, as_map, texture

LETTERS = "ABCD"
CONFIG = ReaderConfig(epochs=30, lr=5e-3, width=64)
IMAGE = (3, 32, 32)


def texts(count: int, seed: int, length: int = 3) -> list[str]:
    g = torch.Generator().manual_seed(seed)
    return ["".join(LETTERS[i] for i in row)
            for row in torch.randint(0, 4, (count, length), generator=g).tolist()]


def codes(found: list[str]) -> Tensor:
    """`[N, characters * 4]`, one-hot."""
    index = torch.tensor([[LETTERS.index(c) for c in text] for text in found])
    return torch.nn.functional.one_hot(index, 4).flatten(1).float()


@pytest.mark.parametrize("shape", [(40,), (40, 1, 1), (10, 2, 2)])
def test_what_a_vector_says_of_the_characters_is_read(shape: tuple[int, ...]) -> None:
    known, asked = texts(400, 0), texts(100, 1)
    mixing = torch.randn(12, 40, generator=torch.Generator().manual_seed(2))
    z, other = ((codes(t) @ mixing).view(-1, *shape) for t in (known, asked))
    reader = UploadReader(IMAGE, CONFIG).fit(1e3 * z, known)
    single, whole = reader.accuracy(1e3 * other, asked)
    assert single.rate > 0.95 and single.count == 300
    assert single.chance == pytest.approx(0.25, abs=0.1)
    assert whole.rate > 0.85 and whole.count == 100 and whole.chance < 0.05


def test_an_answer_that_hardly_shows_is_found_by_regression() -> None:
    """Beside a strong nuisance of many directions; whole and in parts the same."""
    g = torch.Generator().manual_seed(0)
    nuisance, mixing = torch.randn(60, 96, generator=g), 0.05 * torch.randn(12, 96, generator=g)
    known, asked = texts(400, 0), texts(200, 1)
    z, other = (torch.randn(len(t), 60, generator=g) @ nuisance + codes(t) @ mixing
                for t in (known, asked))
    reader = UploadReader(IMAGE, CONFIG).fit(z, known)
    assert reader.chosen == "linear" and reader.accuracy(other, asked)[0].rate > 0.95
    parts = UploadReader(IMAGE, CONFIG).fit(iter(z.split(90)), known)
    assert parts.read(other.split(70)) == reader.read(other)


def patterned(seed: int, kind: str, count: int = 240) -> tuple[Tensor, list[tuple[str]]]:
    """Smooth maps with a fine pattern on top whose mean over every cell is 0, and what it says."""
    g = torch.Generator().manual_seed(seed)
    answers = torch.randint(0, 2, (count,), generator=g)
    side = torch.arange(16) % 2 * 2.0 - 1.0
    smooth = torch.nn.functional.interpolate(torch.rand(count, 2, 4, 4, generator=g), size=(16, 16),
                                             mode="bilinear")
    if kind == "sign":
        pattern = (2.0 * answers - 1.0).view(-1, 1, 1) * side[:, None] * side
    else:
        sign = torch.randint(0, 2, (count, 1, 1), generator=g) * 2.0 - 1.0
        down, across = side[:, None].expand(16, 16), side.expand(16, 16)
        pattern = sign * torch.where(answers.view(-1, 1, 1) > 0, down, across)
    return smooth + 0.3 * pattern[:, None], [(str(a),) for a in answers.tolist()]


@pytest.mark.parametrize(("kind", "read"), [("sign", "whole"), ("stripes", "texture")])
def test_what_has_no_mean_in_a_cell_is_read_too(
    kind: str, read: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (z, known), (other, asked) = patterned(0, kind), patterned(1, kind)
    config = ReaderConfig(epochs=3, lr=5e-3, width=16)
    reader = UploadReader(IMAGE, config).fit(iter(z.split(100)), known)
    assert reader.reads == read and reader.accuracy(other, asked)[0].rate > 0.98
    monkeypatch.setattr("patrol_prune.upload_reader._WHOLE_VALUES", z.numel() - 1)
    few = UploadReader(IMAGE, config).fit(z, known)
    assert few.reads != "whole", "more values than are kept"
    assert (few.accuracy(other, asked)[0].rate > 0.98) == (read == "texture")


def test_textures_by_hand() -> None:
    """One cell of two rows and two columns, and one that is flat."""
    grid = torch.tensor([[[[1.0, 3.0, 7.0, 7.0], [1.0, 7.0, 7.0, 7.0]]]]) + 1e5
    deviation, down, across = texture(grid, (1, 2)).view(3, 2)
    assert deviation.tolist() == pytest.approx([6.0**0.5, 0.0], abs=1e-4)
    # the last row and column have no neighbour, which counts as no difference
    assert down.tolist() == pytest.approx([(0 + 4) / 4, 0.0])
    assert across.tolist() == pytest.approx([(2 + 4 + 6 + 0) / 4, 0.0])


def test_a_small_map_is_read_as_it_was() -> None:
    z = torch.randn(60, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    reader = UploadReader(IMAGE, CONFIG).fit(z, texts(60, 0))
    assert reader.reads == "pooled"


def test_more_inputs_than_examples_and_fewer_give_the_same_regression() -> None:
    """The two systems of equations, on inputs that say the same."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 20, generator=g).double(), torch.randn(30, 3, generator=g).double()
    wide = torch.cat([x, x], 1) / 2**0.5
    for one, two in zip(linear_scores(x, y), linear_scores(wide, y), strict=True):
        # twice the same inputs share the weight, which doubles their variance
        assert one(x).shape == two(wide).shape
    exact = list(linear_scores(x, y, [-12]))[0](x) - y.mean(0)
    solution = torch.linalg.lstsq(x - x.mean(0), y - y.mean(0)).solution
    torch.testing.assert_close(exact, (x - x.mean(0)) @ solution, atol=1e-6, rtol=0)
    few, target = x[:12], y[:12]
    torch.testing.assert_close(list(linear_scores(few, target, [-12]))[0](few), target,
                               atol=1e-6, rtol=0)


def test_complex_uploads_constants_and_gradients_change_nothing() -> None:
    known, asked = texts(300, 0), texts(100, 1)
    mixing = torch.randn(12, 20, generator=torch.Generator().manual_seed(2))
    z, other = codes(known) @ mixing, codes(asked) @ mixing
    plain = UploadReader(IMAGE, CONFIG).fit(z, known).accuracy(other, asked)[0].rate
    for made in (lambda z: torch.complex(torch.zeros_like(z), z),
                 lambda z: torch.cat([torch.full((len(z), 1), 1e8), z], 1),
                 lambda z: z.clone().requires_grad_()):
        reader = UploadReader(IMAGE, CONFIG).fit(made(z), known)
        assert reader.accuracy(made(other), asked)[0].rate > plain - 0.05


def test_noise_is_read_no_better_than_by_chance() -> None:
    g = torch.Generator().manual_seed(0)
    reader = UploadReader(IMAGE, CONFIG).fit(torch.randn(300, 20, generator=g), texts(300, 0))
    single, whole = reader.accuracy(torch.randn(300, 20, generator=g), texts(300, 1))
    assert abs(single.rate - 0.25) < 0.07 and whole.rate < 0.06


def plate_maps(found: list[str], seed: int) -> tuple[Tensor, Tensor]:
    """Maps of 16x16 with each character's code at its place in a quadrangle that moves."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(len(found), 4, 16, 16, generator=g)
    corners = torch.zeros(len(found), 4, 2)
    for row, text in enumerate(found):
        x, y = torch.randint(0, 9, (2,), generator=g).tolist()
        for i, c in enumerate(text):
            z[row, :, y : y + 2, x + 2 * i : x + 2 * i + 2] = 4 * codes([c]).view(4, 1, 1)
        left, top, right, low = 2 * x, 2 * y, 2 * x + 4 * len(text), 2 * y + 4
        corners[row] = torch.tensor([[left, top], [right, top], [right, low], [left, low]])
    return z, corners


def test_a_plate_is_read_where_its_corners_are() -> None:
    known, asked = texts(500, 0), texts(100, 1)
    z, corners = plate_maps(known, 3)
    others, theirs = plate_maps(asked, 4)
    blind = UploadReader(IMAGE, CONFIG).fit(z, known).accuracy(others, asked)[0]
    seen = UploadReader(IMAGE, CONFIG).fit(z, known, corners).accuracy(others, asked, theirs)[0]
    assert seen.rate > 0.9 > blind.rate
    tokens = UploadReader(IMAGE, CONFIG).fit(z.flatten(2).transpose(1, 2), known, corners)
    assert tokens.read(others.flatten(2).transpose(1, 2), theirs) == UploadReader(
        IMAGE, CONFIG).fit(z, known, corners).read(others, theirs)


def test_every_layout_becomes_the_same_map() -> None:
    z = torch.randn(2, 9, 4, 4)
    tokens = z.flatten(2).transpose(1, 2)
    with_class = torch.cat([torch.zeros(2, 1, 9), tokens], 1)
    for other in (z, z.permute(0, 2, 3, 1), tokens, with_class):
        assert torch.equal(as_map(other, IMAGE), z)
    assert as_map(torch.randn(2, 7, 5), IMAGE) is None and as_map(torch.randn(2, 7), IMAGE) is None


def test_a_class_token_is_read_too() -> None:
    known, asked = texts(400, 0), texts(100, 1)
    z, other = (torch.cat([codes(t)[:, None], torch.zeros(len(t), 16, 12)], 1)
                for t in (known, asked))
    assert UploadReader(IMAGE, CONFIG).fit(z, known).accuracy(other, asked)[0].rate > 0.95


def test_what_cannot_be_read_is_refused() -> None:
    z = torch.randn(10, 6)
    reader = UploadReader(IMAGE, CONFIG)
    with pytest.raises(InputError, match="not fitted"):
        reader.read(z)
    with pytest.raises(InputError, match="came 9 for 10"):
        reader.fit(z, texts(9, 0))
    with pytest.raises(InputError, match="came 'AB'"):
        reader.fit(z, [*texts(9, 0), "AB"])
    with pytest.raises(InputError, match="nothing to learn"):
        reader.fit(z, ["AAA"] * 10)
    with pytest.raises(InputError, match="NaN"):
        reader.fit(z * float("nan"), texts(10, 0))
    with pytest.raises(InputError, match="corners"):
        reader.fit(z, texts(10, 0), torch.zeros(10, 2))
    reader.fit(z, texts(10, 0))
    with pytest.raises(InputError, match="corners of each picture, came 10"):
        UploadReader(IMAGE, CONFIG).fit(torch.randn(12, 6), texts(10, 0), torch.zeros(10, 4, 2))
    with pytest.raises(InputError, match="in neither"):
        reader.read(z, torch.zeros(10, 4, 2))
    with pytest.raises(InputError, match="3 answers"):
        reader.accuracy(z, texts(10, 0, length=2))
