"""What an attacker undoes for nothing is undone before he attacks."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import patrol_prune as pp
from patrol_prune.access import edge_function, real
from patrol_prune.alone import Alone, draws_mix_images, mixes_images, one_at_a_time
from patrol_prune.attacks.checks import smooth_images
from patrol_prune.attacks.white_box import drops_values
from patrol_prune.errors import InputError
from patrol_prune.pixels import Normalization
from patrol_prune.received import Level, Prepared, evened, level_of, not_outlying, worth_it

IMAGES = smooth_images(200, (3, 16, 16), seed=5)
KNOWN, VICTIM = IMAGES[:160], IMAGES[160:]
PLAIN = Normalization()


class Edge(nn.Module):
    """A strided convolution and ReLU, and what `change` makes of that."""

    def __init__(self, change=lambda z: z) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, 2, 1, bias=False).requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        self.conv.weight.copy_(torch.randn(self.conv.weight.shape, generator=generator))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.conv(x).relu())


class Cut:
    def __init__(self, edge: nn.Module) -> None:
        self.edge = edge


def audit(change) -> tuple[float, set[str]]:  # type: ignore[no-untyped-def]
    report = pp.audit(Cut(Edge(change)), KNOWN, VICTIM, attacks=("linear_inverse",), examples=0)
    return report.strongest()["ssim"], {flag["name"] for flag in report.flags}


def positions(low: float) -> Tensor:
    """A factor for each place, 1 at a few of them."""
    factors = torch.full((64,), low)
    factors[torch.randperm(64, generator=torch.Generator().manual_seed(1))[:10]] = 1.0
    return factors.view(8, 8)


UNDEFENDED = audit(lambda z: z)


def test_nothing_is_evened_out_of_a_usual_feature() -> None:
    ssim, flags = UNDEFENDED
    assert ssim > 0.6 and not flags & {"uneven_feature", "mixes_images", "outlying_features"}
    edge = Edge()
    assert level_of(edge_function(edge, PLAIN, wide=True), KNOWN) == (None, None)
    assert evened(edge, KNOWN, PLAIN) is None


@pytest.mark.parametrize("change", [
    lambda z: z * positions(1e-4),
    lambda z: z * positions(1e-2),
    lambda z: z + 1e3 * torch.randn(12, 8, 8, generator=torch.Generator().manual_seed(2)),
    lambda z: 1.0 + 1e-9 * z.double(),
])
def test_what_stands_far_from_its_channel_is_evened_out(change) -> None:  # type: ignore[no-untyped-def]
    ssim, flags = audit(change)
    assert ssim > 0.85 * UNDEFENDED[0] and "uneven_feature" in flags


@pytest.mark.parametrize("change", [
    lambda z: z + 9 * torch.randn(z.shape, generator=torch.Generator().manual_seed(0)),
    lambda z: z + z.roll(1, 0) + z.roll(2, 0),
    lambda z: z if len(z) == 1 else z.mean((1, 2, 3), keepdim=True).expand_as(z),
    lambda z: torch.complex(z, z + z.roll(1, 0)),
])
def test_an_edge_is_asked_for_one_picture_at_a_time_where_batches_matter(change) -> None:  # type: ignore[no-untyped-def]
    ssim, flags = audit(change)
    assert ssim > 0.85 * UNDEFENDED[0] and "mixes_images" in flags


def loud(z: Tensor) -> Tensor:
    odd = (z.flatten(1).sum(1) * 1e4).long() % 40 == 0
    return torch.where(odd.view(-1, 1, 1, 1), 1e5 * z, z)


def test_pictures_on_another_scale_are_left_out_of_the_attackers() -> None:
    ssim, flags = audit(loud)
    assert ssim > 0.7 * UNDEFENDED[0] and "outlying_features" in flags
    small = pp.InverseNetworkConfig(width=16, depth=1, epochs=8, batch_size=16, lr=5e-3,
                                    precision="fp32", max_extensions=0)
    found = [pp.audit(Cut(Edge(change)), KNOWN, VICTIM, attacks=("inverse_network",), config=small,
                      examples=0).strongest()["ssim"] for change in (lambda z: z, loud)]
    assert found[1] > 0.8 * found[0] > 0.3  # mirrored pictures were not looked at beforehand


def test_uploads_that_say_something_of_a_few_pictures_alone_are_kept() -> None:
    z = torch.zeros(200, 6)
    z[:30] = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    assert not_outlying(z) is None
    sparse = torch.randn(1_000, 40, generator=torch.Generator().manual_seed(1))
    assert not_outlying((sparse - 2.7).relu()) is None


def test_what_is_dropped_stays_zero() -> None:
    """A shift would move the zeros, by which a white box sees what was dropped."""
    class Drops(Edge):
        def forward(self, x: Tensor) -> Tensor:
            z = super().forward(x)
            return nn.functional.dropout(z, 0.5, True)

    for change in (lambda z: z * positions(1e-4), lambda z: z + 30.0 * (positions(0.0) - 0.5)):
        edge = Drops(change)
        level = evened(edge, KNOWN, PLAIN, draws=True)
        query = edge_function(edge if level is None else Prepared(edge, level), PLAIN)
        assert drops_values(pp.Knowledge(KNOWN, edge=query), torch.device("cpu"))


def test_an_edge_without_a_batch_of_one_is_audited_as_it_is() -> None:
    def strict(z: Tensor) -> Tensor:
        if len(z) == 1:
            raise ValueError("Expected more than 1 value per channel")
        return z

    assert audit(strict)[0] == pytest.approx(UNDEFENDED[0])
    one_more = pp.audit(Cut(Edge(strict)), KNOWN[:129], VICTIM[:1], attacks=("linear_inverse",),
                        examples=0)
    assert one_more.strongest()["ssim"] > 0.5
    pooled = audit(lambda z: z.mean((2, 3)))
    squeezed = audit(lambda z: z.mean((2, 3), keepdim=True).squeeze())
    assert squeezed[0] == pytest.approx(pooled[0]) and "mixes_images" not in squeezed[1]
    squeezed = pp.audit(Cut(Edge(lambda z: z.mean((2, 3)).squeeze())), KNOWN[:129], VICTIM[:1],
                        attacks=("linear_inverse",), examples=0)
    assert {r["victim_images"] for r in squeezed.records} == {1}
    assert Alone(Edge(lambda z: z.mean((2, 3)).squeeze()))(IMAGES[:3]).shape == (3, 12)


def test_images_far_out_are_found_and_neither_many_nor_none_are_left_out() -> None:
    z = torch.randn(100, 4, 3, 3, generator=torch.Generator().manual_seed(0)) + 1e3
    assert not_outlying(z) is None
    for gone, found in ((3, True), (40, False)):
        some = z.clone()
        some[:gone] *= 100
        near = not_outlying(some)
        assert (near is not None) == found
        if near is not None:
            assert near.tolist() == list(range(gone, 100))


def test_a_gain_is_used_only_where_a_linear_decoder_is_better_for_it() -> None:
    query = edge_function(Edge(), PLAIN, wide=True)
    useless = torch.ones(12, 8, 8, dtype=torch.double)
    useless[:6] = 1e6  # a whole channel: every attack has it on one scale
    none, one = torch.zeros_like(useless), torch.ones_like(useless)
    assert worth_it(Level(none, useless), None, query, KNOWN) is None
    shifted = Level(one, one)
    assert worth_it(Level(one, useless), shifted, query, KNOWN) is shifted
    assert worth_it(shifted, shifted, query, KNOWN) is shifted  # scales nothing


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.booleans())
def test_every_upload_becomes_real_numbers_of_one_to_three_dimensions(
    shape: list[int], complex_numbers: bool
) -> None:
    kind = torch.complex64 if complex_numbers else torch.float32
    z = torch.randn(3, *shape[1:], dtype=kind)
    found = real(z)
    assert not found.is_complex() and 2 <= found.dim() <= 4 and len(found) == 3
    numbers = torch.view_as_real(z) if complex_numbers else z
    assert sorted(found.flatten().tolist()) == sorted(numbers.flatten().tolist())


def test_what_is_no_tensor_is_refused() -> None:
    for z in ((torch.zeros(2, 3),), {"z": torch.zeros(2)}, torch.tensor(1.0)):
        with pytest.raises(InputError, match="one tensor"):
            real(z)  # type: ignore[arg-type]


def test_levels_are_undone_for_the_cloud() -> None:
    generator = torch.Generator().manual_seed(0)
    shift, gain = (torch.rand(5, generator=generator, dtype=torch.double) + 0.1 for _ in range(2))
    z = torch.randn(4, 5, generator=generator)
    torch.testing.assert_close(Level(shift, gain).undone(Level(shift, gain)(z)), z)


def test_alone_is_what_one_at_a_time_gives() -> None:
    edge = Edge(lambda z: z + z.flip(0))
    expected = torch.cat([edge(x[None]) for x in IMAGES[:5]])
    torch.testing.assert_close(Alone(edge)(IMAGES[:5]), expected)
    assert mixes_images(edge, IMAGES[:8]) and not mixes_images(Alone(edge), IMAGES[:8])


@pytest.mark.parametrize(("change", "mixes"), [
    (lambda z: z.roll(1, 0) + 1e-7 * torch.randn_like(z), True),
    (lambda z: z.roll(1, 0) + torch.randn_like(z), True),
    (lambda z: 0.5 * z + 0.5 * z[torch.randperm(len(z))], True),
    (lambda z: z - z.mean(0) + 0.1 * torch.randn_like(z), True),
    (lambda z: z + (z.roll(1, 0) - z) * torch.randn(1), True),  # alike on average
    (lambda z: z + 1e-7 * torch.randn_like(z), False),
    (lambda z: z + 20 * torch.randn_like(z), False),
    (lambda z: z + torch.randn(1), True),  # one number for all of the batch
    (lambda z: z * (torch.rand(z.shape[1], 1, 1) > 0.5), True),
    (lambda z: z + torch.randn(z.shape[1:]) + torch.randn_like(z), True),
    (lambda z: torch.cat([z[:, 1:] * (torch.rand(11, 1, 1) > 0.5), z[:, :1] + 99
                          * torch.randn_like(z[:, :1])], 1), True),
    (lambda z: z + torch.randn(2, *z.shape[1:])[torch.arange(len(z)) % 2], True),
    (lambda z: z + torch.randn(len(z), 1, 1, 1), False),
    (lambda z: z * (torch.rand(len(z), 1, 1, 1) > 0.5), False),  # all of an upload or nothing
    (lambda z: nn.functional.dropout(z, 0.5, True), False),
])
def test_noise_does_not_hide_that_images_are_mixed(change, mixes: bool) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    query = edge_function(Edge(change), PLAIN)
    assert [draws_mix_images(query, IMAGES[:24]) for _ in range(3)] == 3 * [mixes]


def test_asking_whether_images_are_mixed_costs_no_draws() -> None:
    edge = Edge(lambda z: z + torch.randn_like(z))
    torch.manual_seed(0)
    drawn = [edge(IMAGES[:4]) for _ in range(3)][2]
    torch.manual_seed(0)
    found, draws, flags = one_at_a_time(edge, IMAGES[:4], PLAIN)  # asks twice whether it draws
    assert found is edge and draws and flags == [] and torch.equal(edge(IMAGES[:4]), drawn)


def test_a_mask_for_the_whole_batch_is_met_as_one_for_each_picture() -> None:
    """A device draws for every picture, so the attacker has a draw for each of his."""
    torch.manual_seed(0)
    each, _ = audit(lambda z: z * (torch.rand(len(z), 12, 1, 1) > 0.5))
    shared, flags = audit(lambda z: z * (torch.rand(12, 1, 1) > 0.5))
    assert shared > 0.8 * each and "mixes_images" in flags


def test_noise_beside_mixed_images_is_still_noise() -> None:
    torch.manual_seed(0)
    ssim, flags = audit(lambda z: z.roll(1, 0) + 1e-7 * torch.randn_like(z))
    assert ssim > 0.85 * UNDEFENDED[0] and flags >= {"mixes_images", "seen_once"}


def test_an_attack_of_the_callers_may_change_what_it_gets() -> None:
    class Rude:
        def fit(self, known: pp.Knowledge) -> None:
            known.pixels.mul_(0.0)
            assert known.z is not None
            known.z.mul_(0.0)

        def reconstruct(self, z: Tensor) -> Tensor:
            z.mul_(0.0)
            return torch.zeros(len(z), 3, 16, 16)

    before = KNOWN.clone()
    report = pp.audit(Cut(Edge()), KNOWN, VICTIM, attacks=(Rude(), "linear_inverse"), examples=0)
    assert torch.equal(KNOWN, before)
    assert report.strongest()["ssim"] == pytest.approx(UNDEFENDED[0])
