"""Decoders fit every feature and image shape, are seeded, and eat standardised features."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from patrol_prune.cost import count_macs
from patrol_prune.decoder_blocks import Fold, UTrunk, spreading
from patrol_prune.decoders import (
    FAMILIES,
    FeatureStandardizer,
    channel_dim,
    make_decoder,
    token_grid,
)
from patrol_prune.errors import InputError

side = st.integers(1, 20)
feature_shapes = st.one_of(
    st.tuples(st.integers(1, 40)),
    st.tuples(st.integers(1, 30), st.integers(1, 9)),
    st.tuples(st.integers(1, 9), side, side),
)


@pytest.mark.parametrize(
    ("shape", "side"), [((64, 1, 1), 32), ((32, 2, 2), 32), ((16, 4, 4), 32), ((16, 8, 8), 64)]
)
def test_a_small_map_of_many_channels_keeps_its_values_as_a_vector_does(
    shape: tuple[int, int, int], side: int
) -> None:
    """The stem's rank is that of the feature, where a narrow trunk holds so many values."""
    decoder = make_decoder("residual", shape, (3, side, side), width=8, depth=0).double()
    z = torch.zeros(1, *shape, dtype=torch.double)
    stem = torch.autograd.functional.jacobian(
        lambda v: decoder.trunk(decoder.fold(decoder.to_map(v))).flatten(), z, vectorize=True)
    rank = torch.linalg.matrix_rank(stem.flatten(1))
    assert int(rank) == z.numel()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(FAMILIES),
    feature_shapes,
    st.tuples(st.sampled_from([1, 3]), st.integers(2, 40), st.integers(2, 40)),
)
def test_every_shape_fits(
    family: str, feature_shape: tuple[int, ...], image_shape: tuple[int, int, int]
) -> None:
    decoder = make_decoder(family, feature_shape, image_shape, width=4, depth=1)
    pixels = decoder(torch.randn(2, *feature_shape))
    assert pixels.shape == (2, *image_shape)
    assert pixels.min() >= 0 and pixels.max() <= 1
    halves = [-(-s // 2) for s in image_shape[1:]]
    assert all(t <= h for t, h in zip(decoder.trunk_size, halves, strict=True))


@given(st.integers(1, 600), st.integers(1, 12), st.integers(1, 12), st.integers(16, 96))
def test_a_grey_image_is_read_through_no_smaller_a_trunk(
    channels: int, height: int, width: int, side: int
) -> None:
    shape = (channels, height, width)
    assert spreading(shape, (1, side, side), 64) == spreading(shape, (3, side, side), 64)
    assert spreading((512, 4, 4), (1, 32, 32), 64) == 2



@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("feature_shape", "trunk"),
    [
        ((16, 8, 8), (8, 8)),
        ((3, 32, 32), (16, 16)),
        ((5, 31, 31), (16, 16)),
        ((17, 12), (8, 8)),  # a class token and a 4x4 grid: 24 channels
        ((64, 12), (8, 8)),
        ((21, 3), (8, 8)),  # a class token and four registers before a 4x4 grid: 18 channels
        ((8, 8, 96), (8, 8)),  # channels last
        ((7, 5), (8, 8)),  # no grid: a linear layer
        ((2048,), (8, 8)),
        ((2048, 1, 1), (8, 8)),  # a vector
        ((32, 2, 2), (8, 8)),
        ((8, 4, 4), (4, 4)),
        ((9, 4, 4), (8, 8)),  # more than the trunk's eight channels
        ((512, 4, 4), (8, 8)),
        ((9, 3, 3), (6, 6)),
    ],
)
def test_the_trunk_stands_at_the_features_resolution_and_every_value_is_used(
    family: str, feature_shape: tuple[int, ...], trunk: tuple[int, int]
) -> None:
    decoder = make_decoder(family, feature_shape, (3, 32, 32), width=8, depth=1)
    assert decoder.trunk_size == trunk
    z = torch.randn(2, *feature_shape, requires_grad=True)
    decoder(z).square().sum().backward()
    assert z.grad is not None and bool((z.grad != 0).all())


@pytest.mark.parametrize(
    ("shape", "image", "trunk"),
    [((128, 8, 8), (3, 32, 32), 8),  # a larger trunk would cost too much
     ((64, 8, 8), (3, 64, 64), 8), ((65, 8, 8), (3, 64, 64), 16), ((512, 8, 8), (1, 64, 64), 16),
     ((512, 7, 7), (3, 224, 224), 14), ((2048, 4, 4), (3, 128, 128), 16),
     ((256, 16, 16), (3, 224, 224), 16), ((768, 14, 14), (3, 224, 224), 14)],
)
def test_a_larger_image_lets_a_small_map_spread_further(
    shape: tuple[int, int, int], image: tuple[int, int, int], trunk: int
) -> None:
    assert make_decoder("transposed", shape, image).trunk_size == (trunk, trunk)


@pytest.mark.parametrize(("shape", "image"), [((4, 8, 8), 32), ((3, 33, 33), 33), ((65, 4), 32)])
def test_a_pixel_of_the_feature_reaches_its_own_place_in_the_image(
    shape: tuple[int, ...], image: int
) -> None:
    decoder = make_decoder("residual", shape, (1, image, image), width=8, depth=1).eval()
    z = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    moved = z.clone()
    if len(shape) == 3:
        moved[:, :, -1, 0] += 10
    else:
        moved[:, 1 + 56] += 10  # the first patch of the last row of 8
    change = (decoder(moved) - decoder(z)).abs()[0, 0]
    weight = change / change.sum()
    places = torch.arange(image).float()
    assert (weight.sum(1) * places).sum() > 0.6 * image
    assert (weight.sum(0) * places).sum() < 0.4 * image


@pytest.mark.parametrize("size", [(33, 31), (32, 30), (31, 10)])
def test_folding_a_large_map_loses_and_moves_nothing(size: tuple[int, int]) -> None:
    z = torch.randn(2, 3, *size)
    fold = Fold((3, *size), (3, 32, 32))
    folded = fold(z)
    assert folded.shape[1:] == fold.folded_shape
    assert torch.equal(fold.crop(torch.nn.functional.pixel_shuffle(folded, fold.factor)), z)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_seed_same_weights_and_the_global_generator_is_untouched(family: str) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = (make_decoder(family, (4, 8, 8), (3, 16, 16), seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(one.head.weight, other.head.weight)


@pytest.mark.parametrize(("size", "levels"), [((8, 8), 2), ((9, 7), 2), ((3, 9), 0)])
def test_the_u_lets_opposite_corners_meet_and_keeps_the_size(
    size: tuple[int, int], levels: int
) -> None:
    trunk = UTrunk(16, 2 * levels + 1, size).eval()
    assert len(trunk.down) == len(trunk.up) == levels
    assert len(trunk.stages) == 2 * levels + 1
    for module in trunk.modules():  # the branches start at 0, which would hide them
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    x = torch.randn(2, 16, *size, requires_grad=True)
    y = trunk(x)
    assert y.shape == x.shape
    (gradient,) = torch.autograd.grad(y[0, :, 0, 0].sum(), x)
    assert bool(gradient[0, :, -1, -1].any()) == (levels > 0)
    assert not gradient[1].any()


def test_the_families_cost_about_the_same_on_a_middle_feature() -> None:
    macs = {
        family: count_macs(
            make_decoder(family, (64, 8, 8), (3, 32, 32)).eval(), torch.zeros(1, 64, 8, 8)
        ).total
        for family in ("residual", "unet")
    }
    assert macs["residual"] == pytest.approx(50e6, rel=0.05)
    assert macs["unet"] == pytest.approx(macs["residual"], rel=0.15)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="Did you mean: residual"):
        make_decoder("resdiual", (4, 8, 8), (3, 16, 16))
    for shape in ((), (1, 2, 3, 4), (0, 8, 8)):
        with pytest.raises(InputError, match="feature_shape"):
            make_decoder("residual", shape, (3, 16, 16))
    with pytest.raises(InputError, match="image_shape"):
        make_decoder("residual", (4, 8, 8), (16, 16))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="width"):
        make_decoder("residual", (4, 8, 8), (3, 16, 16), width=0)
    with pytest.raises(InputError, match="came"):
        make_decoder("residual", (4, 8, 8), (3, 16, 16))(torch.randn(2, 4, 8, 9))


def test_parts_give_the_statistics_of_the_whole() -> None:
    z = 1000 + features((4, 3, 3))
    whole = FeatureStandardizer((4, 3, 3)).fit(z)
    parts = FeatureStandardizer((4, 3, 3)).fit(part for part in z.split([7, 593]))
    for one in (whole, parts):
        torch.testing.assert_close(one.mean, z.double().mean((0, 2, 3)).float())
        expected = z.double().var((0, 2, 3), correction=0).float()
        torch.testing.assert_close(one.var, expected, atol=0, rtol=1e-6)
    with pytest.raises(InputError, match="came none"):
        FeatureStandardizer((4, 3, 3)).fit([])


def features(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 + 2 * torch.randn(600, *shape, generator=generator)


@pytest.mark.parametrize(("shape", "channels"), [((4, 3, 3), 4), ((5, 7), 7), ((6,), 6)])
def test_fit_gives_every_channel_mean_0_and_variance_1(
    shape: tuple[int, ...], channels: int
) -> None:
    scales = torch.arange(1, channels + 1)
    z = features(shape) * (scales.view(-1, 1, 1) if len(shape) == 3 else scales)
    standardizer = FeatureStandardizer(shape).fit(z)
    assert standardizer.mean.shape == (channels,)
    dim = 1 if len(shape) == 3 else len(shape)
    others = [d for d in range(z.dim()) if d != dim]
    y = standardizer(z)
    torch.testing.assert_close(y.mean(others), torch.zeros(channels), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        y.var(others, correction=0), torch.ones(channels), atol=1e-4, rtol=0
    )


def test_tokens_before_a_grid_are_counted_where_no_other_grid_would_do() -> None:
    counts = {t: token_grid(t, (3, 224, 224)) for t in (196, 197, 201, 200, 199, 260, 205, 7, 30)}
    assert counts == {196: (0, (14, 14)), 197: (1, (14, 14)), 201: (5, (14, 14)),
                      200: (4, (14, 14)), 199: (3, (14, 14)), 260: (4, (16, 16)),
                      205: (0, None), 7: (0, None), 30: (0, None)}
    assert token_grid(36, (3, 64, 128)) == (0, (6, 6))  # a square, as ever
    assert token_grid(37, (3, 64, 128)) == (1, (6, 6)) and token_grid(38, (3, 64, 128))[0] == 6


def test_channels_last_maps_are_recognised_and_standardised_by_their_last_dimension() -> None:
    assert channel_dim((8, 8, 96), (3, 32, 32)) == 3
    assert channel_dim((8, 8, 8), (3, 32, 32)) == 1
    assert channel_dim((96, 8, 8), (3, 32, 32)) == 1
    assert channel_dim((5, 96), (3, 32, 32)) == 2
    assert FeatureStandardizer((8, 8, 96), dim=3).mean.shape == (96,)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scaling_the_feature_hides_nothing(scale: float) -> None:
    z = features((4, 3, 3))
    expected = FeatureStandardizer((4, 3, 3)).fit(z)(z)
    torch.testing.assert_close(
        FeatureStandardizer((4, 3, 3)).fit(scale * z)(scale * z), expected, atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6])
def test_constant_channels_become_zero(constant: float) -> None:
    z = features((4, 3, 3))
    z[:, 2] = constant
    y = FeatureStandardizer((4, 3, 3)).fit(z)(z)
    assert bool(y.isfinite().all()) and bool((y[:, 2] == 0).all())
    assert y[:, 1].std() > 0.9
    all_constant = torch.full((20, 4, 3, 3), constant)
    y = FeatureStandardizer((4, 3, 3)).fit(all_constant)(all_constant)
    assert bool((y == 0).all())


def test_running_statistics_start_at_the_first_batch_and_then_follow() -> None:
    first, second = features((4, 3, 3), 0), 5 * features((4, 3, 3), 1)
    running = FeatureStandardizer((4, 3, 3)).update(first, momentum=0.25)
    exact = FeatureStandardizer((4, 3, 3)).fit(first)
    assert torch.equal(running.mean, exact.mean) and torch.equal(running.var, exact.var)
    running.update(second, momentum=0.25)
    other = FeatureStandardizer((4, 3, 3)).fit(second)
    torch.testing.assert_close(running.mean, 0.75 * exact.mean + 0.25 * other.mean)
    torch.testing.assert_close(running.var, 0.75 * exact.var + 0.25 * other.var)
    restored = FeatureStandardizer((4, 3, 3))
    restored.load_state_dict(running.state_dict())
    assert torch.equal(restored(first), running(first))


def test_a_smaller_batch_counts_in_proportion_to_its_images() -> None:
    z = features((6,))
    own = FeatureStandardizer((6,)).update(z[:64], momentum=0.25)
    before = [own.mean.clone(), own.var.clone()]
    resumed = FeatureStandardizer((6,))
    resumed.load_state_dict(own.state_dict())
    for one in (own, resumed):
        one.update(z[64:80], momentum=0.25)
        last = FeatureStandardizer((6,)).fit(z[64:80])
        torch.testing.assert_close(one.mean, torch.lerp(before[0], last.mean, 0.25 / 4))
        torch.testing.assert_close(one.var, torch.lerp(before[1], last.var, 0.25 / 4))
    # A state of before, which does not know how large batches are, learns it from the next one.
    older = own.state_dict()
    del older["largest"]
    resumed.load_state_dict(older)
    assert torch.equal(resumed.mean, own.mean) and int(resumed.largest) == 0
    resumed.update(z[80:90], momentum=0.25)
    torch.testing.assert_close(
        resumed.mean, torch.lerp(own.mean, FeatureStandardizer((6,)).fit(z[80:90]).mean, 0.25))
    # A single image at the end of each epoch has no spread, and takes hardly any.
    for batch in [*z.split(64)[:9], z[576:577]] * 8:
        own.update(batch)
    torch.testing.assert_close(own.gain(), torch.full((6,), 0.5), atol=0.05, rtol=0)


def test_the_gradient_reaches_the_feature() -> None:
    z = features((4, 3, 3))
    standardizer = FeatureStandardizer((4, 3, 3)).fit(z)
    z.requires_grad_()
    standardizer(z).sum().backward()
    expected = standardizer.var.rsqrt().view(1, 4, 1, 1).expand_as(z)
    assert z.grad is not None
    torch.testing.assert_close(z.grad, expected, atol=1e-4, rtol=1e-4)


def test_features_of_another_shape_are_refused() -> None:
    for z in (torch.randn(2, 4, 3, 4), torch.randn(0, 4, 3, 3)):
        with pytest.raises(InputError, match="Expected features"):
            FeatureStandardizer((4, 3, 3)).fit(z)
