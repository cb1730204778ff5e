"""Whitened features: uncorrelated, whatever invertible mix they come in, and never blown up."""

from __future__ import annotations

import math
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from patrol_prune.attacks import Knowledge, make_attack
from patrol_prune.attacks.inverse_network import InverseNetwork, InverseNetworkConfig
from patrol_prune.errors import InputError
from patrol_prune.whitening import MOST_CHANNELS, FeatureWhitener


def mixed(z: Tensor, spread: float) -> Tensor:
    """`z [..., C]` under an invertible mix of its channels with that condition number."""
    generator = torch.Generator().manual_seed(0)
    channels = z.shape[-1]
    left, right = (torch.linalg.qr(torch.randn(channels, channels, generator=generator,
                                               dtype=torch.double))[0] for _ in range(2))
    scales = torch.logspace(0, -math.log10(spread), channels, dtype=torch.double)
    return z @ (left * scales @ right).to(z)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.one_of(st.tuples(st.integers(1, 9)), st.tuples(st.integers(1, 6), st.integers(1, 9)),
                    st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 5))),
    last=st.booleans(),
)
def test_channels_are_uncorrelated_in_every_layout(shape: tuple[int, ...], last: bool) -> None:
    dim = len(shape) if last or len(shape) < 3 else 1
    channels = shape[dim - 1]
    z = mixed(torch.randn(1_000, *shape).movedim(dim, -1), 50.0) + torch.arange(channels)
    z = z.movedim(-1, dim)
    rows = FeatureWhitener(shape, dim=dim).fit(z)(z).movedim(dim, -1).flatten(0, -2)
    torch.testing.assert_close(rows.T @ rows / len(rows), torch.eye(channels), atol=0.02, rtol=0)


def test_an_invertible_mix_of_the_channels_only_turns_them() -> None:
    z = torch.randn(500, 6, 4, 4) * torch.logspace(0, -1, 6).view(-1, 1, 1)
    other = mixed(z.movedim(1, -1), 30.0).movedim(-1, 1) + 3.0
    one, two = (FeatureWhitener((6, 4, 4)).fit(f)(f)[:9].movedim(1, -1).flatten(0, 2)
                for f in (z, other))
    torch.testing.assert_close(one @ one.T, two @ two.T, atol=0.02, rtol=0)


def test_parts_give_what_the_whole_gives_and_constants_nothing() -> None:
    z = torch.randn(700, 5, 2, 2) + 1e3
    z[:, 2] = 7.0
    whole, parts = FeatureWhitener((5, 2, 2)).fit(z), FeatureWhitener((5, 2, 2))
    parts.fit(part for part in z.split([1, 299, 400]))
    torch.testing.assert_close(whole.matrix, parts.matrix)
    torch.testing.assert_close(whole(z), parts(z))
    torch.testing.assert_close(whole(z.double()).float(), whole(z), atol=1e-3, rtol=0)
    with pytest.raises(InputError, match="FeatureWhitener.fit"):
        whole.update(z)
    assert not whole(z)[:, 2].any()
    with pytest.raises(InputError, match="at least one part"):
        FeatureWhitener((5, 2, 2)).fit([])


def test_directions_that_few_samples_cannot_know_are_not_blown_up() -> None:
    few, fresh = torch.randn(30, 64), torch.randn(1_000, 64)
    whitened = FeatureWhitener((64,)).fit(few)(fresh)
    assert 0.5 < whitened.square().mean() < 2.0, "of samples that it has not seen"
    wide = FeatureWhitener((512,)).fit(torch.randn(60, 512))(torch.randn(60, 512))
    assert 0.5 < wide.square().mean() < 2.0, "neither blown up nor drowned"
    assert torch.isfinite(FeatureWhitener((64,)).fit(torch.ones(30, 64))(fresh)).all()


def test_very_many_channels_are_standardised_alone() -> None:
    z = torch.randn(20, MOST_CHANNELS + 1)
    whitener = FeatureWhitener((MOST_CHANNELS + 1,)).fit(z)
    assert whitener.matrix.numel() == 0
    assert whitener(z).std(0, correction=0) == pytest.approx(torch.ones(MOST_CHANNELS + 1))


def test_a_mix_of_the_channels_does_not_starve_the_attack_that_whitens() -> None:
    """The picture itself, mixed so that what is strong in it is faint in its upload."""
    coarse = torch.rand(400, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    pixels = torch.nn.functional.interpolate(coarse, 16, mode="bicubic").clamp(0, 1)
    folded = torch.nn.functional.pixel_unshuffle(pixels, 2).movedim(1, -1)
    strength, directions = torch.linalg.eigh(torch.cov(folded.flatten(0, 2).T))
    z = (folded @ (directions / strength @ directions.T)).movedim(-1, 1)
    config = InverseNetworkConfig(width=8, depth=0, epochs=3, batch_size=16, lr=5e-3,
                                  max_extensions=0, mirror=False)
    starved, fed = (
        min(InverseNetwork(replace(config, whiten=whiten)).fit(Knowledge(pixels, z)).history)
        for whiten in (False, True)
    )
    assert fed < 0.5 * starved


def test_the_name_says_that_it_whitens_whatever_the_settings() -> None:
    attack = make_attack("whitened_ssim", InverseNetworkConfig(width=8))
    assert isinstance(attack, InverseNetwork)
    assert (attack.config.whiten, attack.config.loss, attack.config.width) == (True, "mse+ssim", 8)
    plain = make_attack("unet_ssim", InverseNetworkConfig(width=8))
    assert isinstance(plain, InverseNetwork) and not plain.config.whiten
