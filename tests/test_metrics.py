"""Image metrics against an independent library, by hand, and on bad input."""

import math

import piq
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from patrol_prune import metrics
from patrol_prune.errors import InputError


def images(seed: int, shape: tuple[int, ...] = (5, 3, 24, 20)) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_ssim_and_psnr_agree_with_piq() -> None:
    x = images(0)
    y = (x + 0.2 * (images(1) - 0.5)).clamp(0, 1)
    # piq leaves the border out; ours covers the whole image, mirrored at its border.
    mirrored = (torch.nn.functional.pad(i, (5, 5, 5, 5), mode="reflect") for i in (x, y))
    expected = piq.ssim(*mirrored, data_range=1.0, downsample=False, reduction="none")
    torch.testing.assert_close(metrics.ssim(x, y), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        metrics.psnr(x, y), piq.psnr(x, y, data_range=1.0, reduction="none"), atol=1e-3, rtol=0
    )


def test_ms_ssim_and_gmsd_agree_with_piq() -> None:
    x = images(0, (2, 3, 180, 177))
    y = (x + 0.4 * (images(1, (2, 3, 180, 177)) - 0.5)).clamp(0, 1)
    # piq leaves each scale's border out, which counts for a little here.
    expected = piq.multi_scale_ssim(y, x, data_range=1.0, reduction="none")
    torch.testing.assert_close(metrics.ms_ssim(x, y), expected, atol=3e-3, rtol=0)
    for shape in ((5, 3, 24, 20), (4, 3, 25, 33), (3, 1, 32, 32)):
        x = images(0, shape)
        y = (x + 0.4 * (images(1, shape) - 0.5)).clamp(0, 1)
        expected = piq.gmsd(x, y, data_range=1.0, reduction="none")
        torch.testing.assert_close(metrics.gmsd(x, y), expected, atol=1e-5, rtol=0)


def test_end_points_of_ms_ssim_and_gmsd() -> None:
    x = images(2, (2, 3, 176, 176))
    torch.testing.assert_close(metrics.ms_ssim(x, x), torch.ones(2))
    assert metrics.gmsd(x, x).tolist() == [0.0, 0.0]
    grey = torch.full_like(x, 0.5)
    assert metrics.ms_ssim(x, grey).max() < 0.2 and metrics.gmsd(x, grey).min() > 0.1
    with pytest.raises(InputError, match="at least 176x176"):
        metrics.ms_ssim(x[..., :175], x[..., :175])


@pytest.mark.parametrize("level", [0.3, 0.7, 0.95, 1.0])
def test_a_picture_is_like_itself_where_it_is_flat(level: float) -> None:
    """Variances as differences of squares would drown in float32's rounding."""
    x = torch.full((2, 3, 64, 64), level)
    x[1, :, 20:24, 10:50] = 0.1  # a line on paper
    assert metrics.ssim(x, x).tolist() == pytest.approx([1.0, 1.0], abs=1e-7)
    near = (x + 1e-3).clamp(0, 1)
    assert metrics.ssim(near, x).min() > 0.999 > metrics.ssim(x, 0.5 * x).max()


def test_the_narrow_form_is_the_same_on_ordinary_pictures() -> None:
    x, y = images(0), images(1)
    narrow = metrics.ssim(x, y, wide=False)
    torch.testing.assert_close(metrics.ssim(x, y), narrow, atol=1e-5, rtol=0)
    assert metrics.ssim(x, y).dtype == torch.float32


@settings(max_examples=25, deadline=None)
@given(st.integers(11, 40), st.integers(11, 40), st.integers(1, 4), st.integers(0, 2**16))
def test_the_loss_and_its_gradient_agree_with_torchmetrics(
    height: int, width: int, channels: int, seed: int
) -> None:
    shape = (3, channels, height, width)
    x, y = images(seed, shape), images(seed + 1, shape)
    values, gradients = [], []
    for measure in (metrics.ssim_values, of_torchmetrics):
        guess = y.clone().requires_grad_(True)
        values.append(measure(x, guess))
        gradients.append(torch.autograd.grad((values[-1] * torch.arange(1.0, 4.0)).sum(), guess)[0])
    torch.testing.assert_close(*values, atol=2e-6, rtol=0)
    torch.testing.assert_close(*gradients, atol=1e-5 * float(gradients[1].abs().max()), rtol=0)


def of_torchmetrics(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    from torchmetrics.functional.image import structural_similarity_index_measure

    values = structural_similarity_index_measure(y, x, data_range=1.0, reduction="none")
    assert isinstance(values, torch.Tensor)
    return values.reshape(-1)


@settings(deadline=None, max_examples=20)
@given(st.integers(11, 40), st.integers(11, 40), st.integers(1, 4), st.integers(0, 2**16),
       st.booleans())
@example(140, 17, 1, 0, False)  # by tiles
@example(13, 300, 2, 1, True)
def test_the_written_out_gradient_is_the_derivative(
    height: int, width: int, channels: int, seed: int, weighted: bool
) -> None:
    x, y = (images(seed + i, (3, channels, height, width)).double() for i in (0, 1))
    x[1], y[2] = 0.4, x[2]  # a flat picture, and one that is rebuilt exactly
    weights = torch.tensor([1.0, -2.0, 0.5]).double()
    of_pixels = images(seed + 3, (3, 1, height, width)).double() if weighted else None

    def value(guess: torch.Tensor) -> torch.Tensor:
        return (metrics.ssim_values(x, guess, of_pixels) * weights).sum()

    y.requires_grad_()
    (ours,) = torch.autograd.grad(value(y), y)
    original = x.clone().requires_grad_()  # then autograd does it
    (theirs,) = torch.autograd.grad(
        (metrics.ssim_values(original, y, of_pixels) * weights).sum(), y)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    direction, h = images(seed + 2, y.shape).double() - 0.5, 1e-6
    with torch.no_grad():
        slope = (value(y + h * direction) - value(y - h * direction)) / (2 * h)
    torch.testing.assert_close((ours * direction).sum(), slope, rtol=1e-6, atol=1e-9)


def test_the_written_out_gradient_is_there_only_where_it_is_asked_for() -> None:
    x, y = images(0), images(1)
    plain = metrics.ssim_values(x, y)
    assert not plain.requires_grad
    guess = y.clone().requires_grad_()
    told = metrics.ssim_values(x, guess)
    torch.testing.assert_close(told.detach(), plain, rtol=0, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(metrics.ssim_values(x, guess), plain)
    both = metrics.ssim_values(x.clone().requires_grad_(), guess)
    torch.testing.assert_close(both, told, rtol=0, atol=1e-6)
    seconds = []
    for original in (x.double(), x.double().requires_grad_()):  # of the latter, autograd's own
        guess = y.double().requires_grad_()
        value = metrics.ssim_values(original, guess).square().sum()
        (first,) = torch.autograd.grad(value, guess, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), guess)[0])
    torch.testing.assert_close(*seconds, rtol=1e-9, atol=1e-14)
    one = metrics.ssim_values(x[:1], y.clone().requires_grad_())
    torch.testing.assert_close(one, metrics.ssim_values(x[:1].expand_as(y), y), rtol=0, atol=1e-6)


def test_transforms_of_torch_func_follow_the_loss() -> None:
    x, y = images(0).double(), images(1).double()
    guess = y.clone().requires_grad_()
    (ours,) = torch.autograd.grad(metrics.ssim_loss(x, guess), guess)
    torch.testing.assert_close(torch.func.grad(metrics.ssim_loss, 1)(x, y), ours)
    one = torch.func.grad(lambda a, b: metrics.ssim_loss(a[None], b[None]), 1)
    torch.testing.assert_close(torch.func.vmap(one)(x, y), len(x) * ours)
    direction = images(2).double()
    _, slope = torch.func.jvp(lambda z: metrics.ssim_loss(x, z), (y,), (direction,))
    torch.testing.assert_close(slope, (ours * direction).sum())


def test_the_loss_stays_exact_under_autocast_and_after_inference() -> None:
    metrics._window_weights.cache_clear()
    x = images(0, (2, 3, 19, 19))
    smooth = 0.5 + 0.01 * x
    with torch.inference_mode():
        expected = metrics.ssim_values(smooth, 0.5 + 0.005 * x)
    guess = (0.5 + 0.005 * x).requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        came = metrics.ssim_values(smooth, guess)
    torch.testing.assert_close(came, expected)
    came.sum().backward()
    assert guess.grad is not None and guess.grad.isfinite().all()


@pytest.mark.parametrize("size", [(128, 129), (134, 11), (11, 400), (257, 140)])
def test_large_images_are_taken_tile_by_tile_and_come_to_the_same(size: tuple[int, int]) -> None:
    x, y = images(0, (2, 1, *size)), images(1, (2, 1, *size))
    guess, same = (y.clone().requires_grad_(True) for _ in range(2))
    came, expected = metrics.ssim_values(x, guess), of_torchmetrics(x, same)
    torch.testing.assert_close(came, expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(metrics.ssim(x, y), expected.detach(), atol=2e-6, rtol=0)
    came.sum().backward()
    expected.sum().backward()
    assert guess.grad is not None and same.grad is not None
    torch.testing.assert_close(guess.grad, same.grad, atol=1e-5 * float(same.grad.abs().max()),
                               rtol=0)


def test_the_cost_of_ssim_grows_with_the_pixels_alone() -> None:
    def products(side: int) -> int:
        x = images(0, (1, 1, side, side))
        with FlopCounterMode(display=False) as counter:
            metrics.ssim(x, x)
        return counter.get_total_flops()

    assert 4 * products(256) <= products(512) < 4.2 * products(256)


def test_nothing_of_the_mode_in_which_ssim_is_first_asked_is_kept() -> None:
    x = images(0, (1, 1, 23, 23))
    metrics._window_weights.cache_clear()
    with FakeTensorMode():  # as torch.export and torch.compile trace in
        metrics.ssim_values(torch.rand(1, 1, 23, 23), torch.rand(1, 1, 23, 23))
    assert float(metrics.ssim(x, x)) == 1.0
    metrics._window_weights.cache_clear()
    with torch.device("meta"):
        assert float(metrics.ssim(x, x)) == 1.0
    assert float(metrics.ssim(x, x)) == 1.0


def test_low_contrast_is_measured_against_the_true_range() -> None:
    # With data_range taken from the reconstruction, this would come out near 1.
    grey = 0.5 + 0.01 * (images(0) - 0.5)
    assert metrics.ssim(images(0), grey).max() < 0.2


def test_values_by_hand() -> None:
    black, white = torch.zeros(2, 3, 16, 16), torch.ones(2, 3, 16, 16)
    half = torch.full_like(black, 0.5)
    assert metrics.mse(black, white).tolist() == [1.0, 1.0]
    assert metrics.mse(black, half).tolist() == [0.25, 0.25]
    assert metrics.psnr(black, half)[0].item() == pytest.approx(20 * math.log10(2), abs=1e-5)
    assert metrics.psnr(black, black).isinf().all()
    torch.testing.assert_close(metrics.ssim(white, white), torch.ones(2))
    # Constant images have no variance: SSIM = C1 / (1 + C1), C1 = 1e-4.
    assert metrics.ssim(black, white)[0].item() == pytest.approx(1e-4 / 1.0001, rel=1e-3)


def test_each_image_gets_its_own_value_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = images(0), images(1)
    whole = {name: getattr(metrics, name)(x, y) for name in ("mse", "psnr", "ssim", "gmsd")}
    monkeypatch.setattr(metrics, "_CHUNK_PIXELS", 2 * x[0].numel())
    for name, expected in whole.items():
        measure = getattr(metrics, name)
        assert expected.shape == (5,)
        torch.testing.assert_close(measure(x, y), expected)
        torch.testing.assert_close(measure(x[3:4], y[3:4]), expected[3:4])


def test_ssim_loss_is_one_minus_the_mean_and_has_a_gradient() -> None:
    x, y = images(0), images(1).requires_grad_()
    loss = metrics.ssim_loss(x, y)
    assert loss.item() == pytest.approx(1 - metrics.ssim(x, y.detach()).mean().item(), abs=1e-6)
    loss.backward()
    assert y.grad is not None and y.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["mse", "psnr", "ssim", "ms_ssim", "gmsd"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x * float("nan"),
        lambda x: x.index_fill(0, torch.tensor([1]), float("nan")),
        lambda x: x * float("inf"),
        lambda x: x + 1,
        lambda x: x - 1,
        lambda x: (x * 255).to(torch.uint8),
        lambda x: x[:, :, 1:],
        lambda x: x[0],
        lambda x: x[:0],
    ],
)
def test_bad_images_are_refused(name: str, spoil: object) -> None:
    x = images(0)
    bad = spoil(x)  # type: ignore[operator]
    with pytest.raises(InputError, match="Expected"):
        getattr(metrics, name)(x, bad)
    if bad.shape == x.shape:
        with pytest.raises(InputError, match="Expected"):
            getattr(metrics, name)(bad, x)


def test_images_too_small_for_ssim_are_refused() -> None:
    x = images(0, (2, 3, 10, 16))
    with pytest.raises(InputError, match="at least 11x11"):
        metrics.ssim(x, x)


def test_a_thumbnail_of_one_pixel_is_the_mean_colour_and_of_all_the_image() -> None:
    x = torch.rand(2, 3, 12, 16)
    assert torch.allclose(metrics.thumbnail(x, 1), x.mean((2, 3), keepdim=True).expand_as(x))
    square = torch.rand(2, 1, 12, 12)
    assert torch.allclose(metrics.thumbnail(square, 12), square)
    assert metrics.thumbnail(x, 4).shape == x.shape
