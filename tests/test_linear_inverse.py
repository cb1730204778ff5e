"""The linear decoder is exact where the edge is linear, and the least-squares answer elsewhere."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from patrol_prune.attacks.base import Knowledge
from patrol_prune.attacks.checks import smooth_images
from patrol_prune.attacks.feature_layout import Layout
from patrol_prune.attacks.linear_inverse import LinearInverse, LinearInverseConfig
from patrol_prune.decoder_blocks import ToMap
from patrol_prune.errors import InputError
from patrol_prune.metrics import mse, psnr

IMAGES = (smooth_images(160, (3, 16, 16), seed=3)
          + 0.2 * torch.rand(160, 3, 16, 16, generator=torch.Generator().manual_seed(1))).div(1.2)
KNOWN, VICTIM = IMAGES[:120], IMAGES[120:]


def convolution(x: Tensor, *, channels: int = 40, stride: int = 1) -> Tensor:
    weight = torch.randn(channels, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    return functional.conv2d(x, weight, stride=stride, padding=1)


def test_one_wide_convolution_is_undone_to_the_last_digits() -> None:
    attack = LinearInverse()
    attack.fit(Knowledge(KNOWN, z=convolution(KNOWN)))
    assert float(psnr(VICTIM, attack.reconstruct(convolution(VICTIM))).min()) > 80


@pytest.mark.parametrize(("size", "options"), [
    ((13, 12), {"stride": 2, "padding": 1}),  # the last block hangs out below
    ((13, 11), {"stride": 2, "padding": 1}),  # and to the right
    ((12, 12), {}),  # without padding: a pixel around all positions
    ((13, 13), {"stride": 2}),  # one below and to the right
    ((13, 12), {"stride": (2, 1), "padding": (1, 0)}),  # both
])
def test_it_is_undone_where_positions_and_image_do_not_match(
    size: tuple[int, int], options: dict[str, int]
) -> None:
    """No pixel that nobody saw, and no feature between two others, is learnt from."""
    weight = torch.randn(30, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    images = IMAGES[:80, :, : size[0], : size[1]]
    z = functional.conv2d(images, weight, **options)
    attack = LinearInverse(LinearInverseConfig(whole=False, decades=(-12.0, -6.0)))
    attack.fit(Knowledge(images[:60], z=z[:60]))
    assert float(psnr(images[60:], attack.reconstruct(z[60:])).min()) > 80


@pytest.mark.parametrize("stretch", [True, False])
@pytest.mark.parametrize("side", [5, 6, 7, 8, 14])
def test_pixels_come_back_from_targets_and_parts_tell_which_are_pixels(
    side: int, stretch: bool
) -> None:
    image = torch.rand(2, 3, 16, 15, generator=torch.Generator().manual_seed(0))
    layout = Layout.of((4, side, 6), (3, 16, 15), 3, stretch=stretch)
    rows = layout.targets(image)
    assert torch.equal(layout.images(rows, 2), image.double())
    assert rows.shape == (2 * layout.positions, layout.outputs)
    # Whatever hangs out of the image repeats a pixel: of many all different, each is there once.
    numbers = torch.arange(16 * 15 * 3.0).view(1, 3, 16, 15)
    known = torch.zeros(layout.positions, layout.outputs, dtype=torch.bool)
    for positions, outputs in layout.parts():
        assert not known[:, outputs].any()
        known |= positions[:, None] & outputs
    seen = layout.targets(numbers)[known]
    assert len(seen.unique()) == numbers.numel()
    if layout.margin == (0, 0):
        assert len(seen) == numbers.numel()


@pytest.mark.parametrize("shape", ["map", "odd map", "large map", "tokens", "vector"])
def test_every_shape_of_feature_is_inverted_when_it_is_the_image_itself(shape: str) -> None:
    def edge(x: Tensor) -> Tensor:
        if shape == "map":
            return functional.pixel_unshuffle(x, 4)
        if shape == "odd map":
            return functional.interpolate(x, size=(15, 15), mode="bilinear")
        if shape == "large map":
            return functional.interpolate(x, size=(32, 32))
        if shape == "tokens":
            return functional.pixel_unshuffle(x, 8).flatten(2).transpose(1, 2)
        return functional.avg_pool2d(x, 2).flatten(1)

    known = smooth_images(600, (3, 16, 16), seed=4)
    victim = smooth_images(40, (3, 16, 16), seed=5)
    attack = LinearInverse()
    attack.fit(Knowledge(known, z=edge(known)))
    floor = mse(victim, known.mean(0).expand_as(victim)).mean()
    assert mse(victim, attack.reconstruct(edge(victim))).mean() < 0.02 * floor


def test_it_is_the_ridge_solution_that_scikit_learn_finds() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    z = functional.pixel_unshuffle(KNOWN, 8).mean(1).flatten(1)
    config = LinearInverseConfig(decades=(-1.0,), holdout=0.1)
    attack = LinearInverse(config)
    attack.fit(Knowledge(KNOWN, z=z))
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))[12:]
    std, mean = torch.std_mean(z[order].double(), dim=0, correction=0)
    inputs = ((z.double() - mean) / std).numpy()
    targets = KNOWN[order].flatten(1).double().numpy()
    oracle = linear_model.Ridge(alpha=108 * 0.1).fit(inputs[order.numpy()], targets)
    expected = torch.from_numpy(oracle.predict(inputs[:5])).clamp(0, 1)
    torch.testing.assert_close(attack.reconstruct(z[:5]).flatten(1).double(), expected,
                               rtol=0, atol=1e-5)


def test_more_inputs_than_examples_are_solved_in_what_these_span() -> None:
    """The same as the dual form, `K (K + n lambda I)^-1 y`; no matrix of inputs by inputs."""
    z = torch.cat([KNOWN.flatten(1), KNOWN.flatten(1).square()], dim=1)  # 1,536 inputs, 108 rows
    attack = LinearInverse(LinearInverseConfig(decades=(-3.0,)))
    attack.fit(Knowledge(KNOWN, z=z))
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))[12:]
    std, mean = torch.std_mean(z[order].double(), dim=0, correction=0)
    rows, targets = (z.double() - mean) / std, KNOWN[order].flatten(1).double()
    kernel = rows[order] @ rows[order].T + 108 * 1e-3 * torch.eye(108, dtype=torch.float64)
    weights = torch.linalg.solve(kernel, targets - targets.mean(0))
    expected = (rows[:12] @ rows[order].T @ weights + targets.mean(0)).clamp(0, 1)
    torch.testing.assert_close(attack.reconstruct(z[:12]).flatten(1).double(), expected,
                               rtol=0, atol=1e-5)
    assert [tuple(t.shape) for t in _tensors(attack)] == [(108, 768), (1536, 108)]


def _tensors(attack: LinearInverse) -> list[Tensor]:
    solution = attack._solution
    assert solution is not None and solution.projection is not None
    return [solution.weight, solution.projection.basis]


def test_a_basis_of_some_examples_does_where_all_are_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    z = torch.cat([KNOWN.flatten(1), KNOWN.flatten(1).square()], dim=1)
    plain = LinearInverse()
    expected = plain.fit(Knowledge(KNOWN, z=z)).best_loss
    monkeypatch.setattr("patrol_prune.attacks.linear_inverse._MOST_INPUTS", 80)
    attack = LinearInverse()
    found = attack.fit(Knowledge(KNOWN, z=z))
    assert [t.shape[0] for t in _tensors(attack)] == [80, 1536]
    assert expected < found.best_loss < 0.5 * found.mean_image_loss


@pytest.mark.parametrize("shape", ["channels last", "tokens", "class token and tokens"])
def test_a_map_in_another_order_is_a_map(shape: str) -> None:
    def other(z: Tensor) -> Tensor:
        z = z.movedim(1, 3)
        if shape == "channels last":
            return z
        tokens = z.flatten(1, 2)
        # A class token that never changes tells nothing.
        return tokens if shape == "tokens" else torch.cat([torch.ones_like(tokens[:, :1]), tokens],
                                                          dim=1)

    z, unseen = (convolution(x, stride=2) for x in (KNOWN, VICTIM))
    plain, attack = LinearInverse(), LinearInverse()
    assert plain.fit(Knowledge(KNOWN, z=z)).chosen == attack.fit(
        Knowledge(KNOWN, z=other(z))).chosen
    torch.testing.assert_close(attack.reconstruct(other(unseen)), plain.reconstruct(unseen),
                               rtol=0, atol=1e-5)


def test_a_class_token_is_read_at_every_position() -> None:
    """It alone says how bright the picture is."""
    level = KNOWN.mean(dim=(1, 2, 3))

    def tokens(x: Tensor) -> Tensor:
        level = x.mean(dim=(1, 2, 3), keepdim=True)
        z = functional.pixel_unshuffle(x - level, 4).flatten(2).transpose(1, 2)
        first = torch.zeros(len(x), 1, z.shape[2])
        first[:, :, 3] = level[:, :, 0, 0]
        return torch.cat([first, z], dim=1)

    attack = LinearInverse()
    attack.fit(Knowledge(KNOWN, z=tokens(KNOWN)))
    assert level.std() > 0.02
    assert float(psnr(VICTIM, attack.reconstruct(tokens(VICTIM))).min()) > 80


@pytest.mark.parametrize("leading", [4, 5])
def test_register_tokens_before_the_grid_are_read_at_every_position(leading: int) -> None:
    """One of them says how bright the picture is; the grid behind them is a map."""
    def tokens(x: Tensor) -> Tensor:
        level = x.mean(dim=(1, 2, 3), keepdim=True)
        z = functional.pixel_unshuffle(x - level, 4).flatten(2).transpose(1, 2)
        registers = torch.zeros(len(x), leading, z.shape[2])
        registers[:, 2, 7] = level[:, 0, 0, 0]
        return torch.cat([registers, z], dim=1)

    attack = LinearInverse()
    found = attack.fit(Knowledge(KNOWN, z=tokens(KNOWN))).chosen
    assert found is not None and found["inputs"] == "a neighbourhood"
    assert float(psnr(VICTIM, attack.reconstruct(tokens(VICTIM))).min()) > 80


@pytest.mark.parametrize("tokens", [16, 17, 9, 10, 7, 32, 33, 2, 1, 20, 21, 40])
@pytest.mark.parametrize("image", [(3, 48, 48), (3, 48, 96)])
def test_tokens_lie_as_they_do_for_decoders(tokens: int, image: tuple[int, int, int]) -> None:
    layout, laid = Layout.of((tokens, 5), image, 1), ToMap((tokens, 5), image, 8)
    assert layout.is_map is (laid.kind != "linear")
    if layout.is_map:
        z = torch.randn(2, tokens, 5, generator=torch.Generator().manual_seed(0))
        expected = laid(z).flatten(2).transpose(1, 2).flatten(0, 1).double()
        torch.testing.assert_close(layout.inputs(z), expected)


@pytest.mark.parametrize("shape", ["map", "vector"])
def test_rescaling_a_channel_changes_nothing(shape: str) -> None:
    def edge(x: Tensor) -> Tensor:
        z = convolution(x, channels=6, stride=4)
        return z if shape == "map" else z.flatten(1)

    generator = torch.Generator().manual_seed(2)
    noise = 0.3 * torch.randn(edge(IMAGES).shape, generator=generator)
    z = edge(IMAGES) + noise
    scaled = z.clone()
    scaled[:, 2] *= 1e7
    plain, attack = LinearInverse(), LinearInverse()
    first = plain.fit(Knowledge(KNOWN, z=z[:120]))
    second = attack.fit(Knowledge(KNOWN, z=scaled[:120]))
    assert second.history == pytest.approx(first.history, rel=1e-3)
    torch.testing.assert_close(attack.reconstruct(scaled[120:]), plain.reconstruct(z[120:]),
                               rtol=0, atol=1e-4)


def test_a_transformers_upload_of_a_large_picture_is_inverted_in_bounded_memory() -> None:
    """[197, 768] of 224x224: as one vector it would take 151,296^2 numbers, 183 GB."""
    layout = Layout.of((197, 768), (3, 224, 224), 3)
    assert (layout.grid, layout.block, layout.kernel, layout.width) == ((14, 14), (16, 16), 1, 1536)
    # On no grid it is taken whole; what is solved for is as large as the examples are many.
    attack = LinearInverse(LinearInverseConfig(decades=(-3.0, -1.0)))
    images = functional.interpolate(KNOWN[:30], size=(64, 64))
    z = torch.randn(30, 200, 96, generator=torch.Generator().manual_seed(0))
    attack.fit(Knowledge(images, z=z))
    assert [tuple(t.shape) for t in _tensors(attack)] == [(27, 12288), (19200, 27)]


def test_noise_on_the_features_is_answered_with_more_regularisation() -> None:
    generator = torch.Generator().manual_seed(2)

    def noisy(x: Tensor) -> Tensor:
        z = convolution(x)
        return z + 3.0 * z.std() * torch.randn(z.shape, generator=generator)

    attack = LinearInverse()
    known = Knowledge(KNOWN, edge=noisy, random_edge=True)
    record = attack.fit(known)
    assert record.best_loss < record.mean_image_loss
    assert record.best_loss == min(record.history)
    clean = LinearInverse().fit(Knowledge(KNOWN, z=convolution(KNOWN)))
    assert record.chosen is not None and clean.chosen is not None
    assert record.chosen["ridge_decade"] > clean.chosen["ridge_decade"]


@pytest.mark.parametrize("shape", ["vector", "map of one position"])
def test_inputs_that_never_change_leave_it_as_it_is(shape: str) -> None:
    """Dead channels, and the padding around a map of one position."""
    def edge(x: Tensor) -> Tensor:
        return functional.avg_pool2d(x, 4).flatten(1)

    def with_dead(x: Tensor) -> Tensor:
        z = torch.cat([torch.full((len(x), 2), 0.1), edge(x), torch.zeros(len(x), 3)], 1)
        return z if shape == "vector" else z[:, :, None, None]

    plain, other = LinearInverse(), LinearInverse()
    plain.fit(Knowledge(KNOWN, z=edge(KNOWN)))
    other.fit(Knowledge(KNOWN, z=with_dead(KNOWN)))
    torch.testing.assert_close(other.reconstruct(with_dead(VICTIM)),
                               plain.reconstruct(edge(VICTIM)), rtol=0, atol=1e-5)


def test_a_constant_feature_gives_the_mean_image() -> None:
    z = torch.ones(len(KNOWN), 4)
    attack = LinearInverse(LinearInverseConfig(holdout=0.1))
    attack.fit(Knowledge(KNOWN, z=z))
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))[12:]
    expected = KNOWN[order].mean(0).expand(2, 3, 16, 16)
    torch.testing.assert_close(attack.reconstruct(z[:2]), expected, rtol=0, atol=1e-5)


def test_a_factorisation_that_fails_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """LAPACK gives up on some matrices of many like eigenvalues."""
    expected = LinearInverse()
    first = expected.fit(Knowledge(KNOWN, z=convolution(KNOWN, stride=4)))

    def fails(matrix: Tensor) -> None:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    attack = LinearInverse()
    second = attack.fit(Knowledge(KNOWN, z=convolution(KNOWN, stride=4)))
    assert second.history == pytest.approx(first.history, rel=1e-3)
    z = convolution(VICTIM, stride=4)
    torch.testing.assert_close(attack.reconstruct(z), expected.reconstruct(z), rtol=0, atol=1e-4)


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="odd kernel"):
        LinearInverseConfig(kernel=2)
    with pytest.raises(InputError, match="at least 20"):
        LinearInverse().fit(Knowledge(KNOWN[:5], z=KNOWN[:5]))
    with pytest.raises(InputError, match="finite features"):
        LinearInverse().fit(Knowledge(KNOWN, z=torch.full((len(KNOWN), 4), float("nan"))))
    with pytest.raises(InputError, match="got none"):
        LinearInverse().fit(Knowledge(KNOWN))
    with pytest.raises(InputError, match="not been trained"):
        LinearInverse().reconstruct(KNOWN)


def test_pixels_are_found_wherever_the_edge_sent_them() -> None:
    """Behind a fixed order of all values neighbourhoods say nothing, and the whole says the same.
    """
    def edge(x: Tensor) -> Tensor:
        return convolution(x, channels=16, stride=2).relu()

    def shuffled(x: Tensor) -> Tensor:
        order = torch.randperm(16 * 8 * 8, generator=torch.Generator().manual_seed(2))
        return edge(x).flatten(1)[:, order].view(-1, 16, 8, 8)

    known, victim = smooth_images(600, (3, 16, 16), seed=4), smooth_images(40, (3, 16, 16), seed=5)
    found = {}
    for name, made in (("plain", edge), ("shuffled", shuffled)):
        attack = LinearInverse()
        record = attack.fit(Knowledge(known, z=made(known)))
        assert record.chosen is not None
        found[name] = (float(mse(victim, attack.reconstruct(made(victim))).mean()),
                       record.chosen["inputs"])
    assert found["shuffled"][1] == "the whole feature"
    floor = float(mse(victim, known.mean(0).expand_as(victim)).mean())
    assert found["plain"][0] <= found["shuffled"][0] < 0.1 * floor
