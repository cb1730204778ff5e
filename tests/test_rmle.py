"""The white-box attack inverts what can be inverted, image by image, and touches nothing."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from patrol_prune.attacks.base import Attack, EdgeFunction, FitRecord, Knowledge
from patrol_prune.attacks.checks import smooth_images
from patrol_prune.attacks.pixel_descent import PixelDescent, Setting
from patrol_prune.attacks.rmle import RMLE, RMLEConfig
from patrol_prune.attacks.white_box import (
    LOSSES,
    Comparison,
    PixelSpace,
    Spectrum,
    drops_values,
    expected_feature,
    feature_scale,
    kept_feature,
    total_variation,
)
from patrol_prune.errors import InputError, TrainingError
from patrol_prune.metrics import mse

IMAGES = smooth_images(48, (3, 16, 16), seed=3)
KNOWN, VICTIM = IMAGES[:40], IMAGES[40:]
FLOOR = float(mse(VICTIM, KNOWN.mean(0).expand_as(VICTIM)).mean())
WEIGHT = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0)) / 3
QUICK = RMLEConfig(steps=60, tuning_steps=20, tuning_images=4)
ONE = dataclasses.replace(QUICK, losses=("mse",), spaces=("pixels",), lambda_tv=(0.0,), lambda_2=())


def edge(pixels: Tensor) -> Tensor:
    return functional.conv2d((pixels - 0.5) / 0.25, WEIGHT, stride=2, padding=1)


def known(**changes: object) -> Knowledge:
    return dataclasses.replace(Knowledge(KNOWN, edge(KNOWN), edge), **changes)  # type: ignore[arg-type]


def fitted(config: RMLEConfig, **changes: object) -> tuple[RMLE, FitRecord]:
    attack = RMLE(config)
    return attack, attack.fit(known(**changes))


def test_one_convolution_is_inverted_and_the_record_says_how() -> None:
    attack, record = fitted(QUICK)
    guess = attack.reconstruct(edge(VICTIM))
    assert float(mse(VICTIM, guess).mean()) < 0.1 * FLOOR
    assert guess.shape == VICTIM.shape and guess.dtype == torch.float32
    assert record.chosen is not None and record.gradient_norm is not None
    assert record.best_loss == min(record.history) < 0.1 * record.mean_image_loss
    tried = record.chosen["tried"]
    assert len(tried) == len(record.history) == len(record.train_history)
    # Every loss, space and weight of four decades was tried, each once.
    for name, values in (("loss", QUICK.losses), ("space", QUICK.spaces),
                         ("lambda_tv", QUICK.lambda_tv), ("lambda_2", QUICK.lambda_2)):
        assert {*values} <= {entry[name] for entry in tried}, name
    assert len({tuple(entry.values()) for entry in tried}) == len(tried)
    chosen = {k: v for k, v in record.chosen.items() if k != "tried"}
    assert chosen == tried[record.best_epoch]


def test_an_invertible_linear_edge_is_inverted_exactly() -> None:
    matrix = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(1)))[0]

    def orthogonal(pixels: Tensor) -> Tensor:
        return functional.pixel_unshuffle(pixels, 4).flatten(2).transpose(1, 2) @ matrix

    attack = RMLE(dataclasses.replace(ONE, steps=300))
    record = attack.fit(Knowledge(KNOWN, edge=orthogonal))
    assert float(mse(VICTIM, attack.reconstruct(orthogonal(VICTIM))).max()) < 1e-5
    # |d mean((f - z)^2) / d x| = 2 |f - z| / D, and an orthogonal map keeps the length.
    rows = KNOWN[torch.randperm(40, generator=torch.Generator().manual_seed(3_915_241))[:4]]
    expected = 2 * (KNOWN.mean(0) - rows).flatten(1).norm(dim=1) / 768
    assert record.gradient_norm == pytest.approx(float(expected.mean()), rel=1e-4)


@pytest.mark.parametrize("space", ["pixels", "spectral"])
def test_images_optimised_together_do_not_influence_each_other(space: str) -> None:
    config = dataclasses.replace(
        QUICK, losses=("mse",), spaces=(space,), lambda_tv=(0.01,), lambda_2=(), steps=15,
        restarts=2, eps=1e-3,
    )
    attack, _ = fitted(config)
    z = edge(VICTIM)
    together = attack.reconstruct(z)
    pieces = RMLE(dataclasses.replace(config, batch_size=3))
    pieces.fit(known())
    assert torch.allclose(together, pieces.reconstruct(z), atol=1e-4)
    # Without restarts, which are drawn by position, one image alone gives the same as well.
    attack, _ = fitted(dataclasses.replace(config, restarts=1))
    together = attack.reconstruct(z)
    alone = torch.cat([attack.reconstruct(part) for part in z.split(1)])
    assert torch.allclose(together, alone, atol=1e-4)


def test_total_variation_and_feature_errors_by_hand() -> None:
    x = torch.tensor([[[[0.0, 1.0], [2.0, 5.0]]]])
    # Vertical differences 2 and 4, horizontal 1 and 3.
    assert total_variation(x).tolist() == [pytest.approx(10.0 + 5.0)]
    assert total_variation(torch.full((2, 3, 4, 4), 7.0)).tolist() == [0.0, 0.0]
    assert total_variation(x[..., :1]).tolist() == [4.0]
    f, z = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[6.0, 8.0], [0.0, 1.0]])
    plain = Comparison()
    assert plain.error(f, z, "mse").tolist() == [12.5, 1.0]
    assert plain.error(f, z, "cosine").tolist() == pytest.approx([0.0, 1.0], abs=1e-6)
    louder = Comparison(scale=9.0, gain=torch.tensor([[2.0, 1.0]]))
    assert louder.error(f, z, "standardised").tolist() == [26.0, 2.5]
    thinned = Comparison(thinned=True)  # of the second upload one value came through
    assert thinned.error(f, z, "mse").tolist() == [12.5, 1.0]
    assert thinned.error(f, torch.zeros(2, 2), "mse").tolist() == [0.0, 0.0]
    assert feature_scale(torch.tensor([[1.0, 5.0], [3.0, 5.0]])) == 0.5
    assert feature_scale(torch.ones(4, 2)) == 1.0


@pytest.mark.parametrize("thinned", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_slope_of_the_error_is_its_derivative(loss: str, thinned: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    f, z = (torch.randn(4, 3, 5, 2, generator=generator) for _ in range(2))
    if thinned:
        z = z * (torch.rand(z.shape, generator=generator) > 0.5)
    f.requires_grad_(True)
    compare = Comparison(0.3, torch.tensor([0.5, 2.0, 0.0]).view(1, 3, 1, 1), thinned)
    (expected,) = torch.autograd.grad(compare.error(f, z, loss).sum(), f)
    assert torch.allclose(compare.slope(f, z, loss), expected, atol=1e-6)
    dead = compare.slope(torch.zeros(2, 3, 2, 1), torch.ones(2, 3, 2, 1), loss)
    assert bool(torch.isfinite(dead).all())


@pytest.mark.parametrize("loudness", [1.0, 1000.0])
def test_a_loud_channel_hides_nothing(loudness: float) -> None:
    gain = torch.ones(8, 1, 1)
    gain[0] = loudness

    def loud(pixels: Tensor) -> Tensor:
        return edge(pixels) * gain

    attack = RMLE(dataclasses.replace(ONE, losses=("standardised",), steps=150))
    attack.fit(Knowledge(KNOWN, edge=loud))
    quiet = RMLE(dataclasses.replace(ONE, losses=("standardised",), steps=150))
    quiet.fit(known())
    assert torch.allclose(attack.reconstruct(loud(VICTIM)), quiet.reconstruct(edge(VICTIM)),
                          atol=1e-2)


def test_features_of_more_dimensions_are_compared_as_they_are() -> None:
    def windows(pixels: Tensor) -> Tensor:
        return edge(pixels).unflatten(1, (2, 4))

    attack = RMLE(dataclasses.replace(QUICK, losses=LOSSES))
    attack.fit(Knowledge(KNOWN, edge=windows))
    assert float(mse(VICTIM, attack.reconstruct(windows(VICTIM))).mean()) < 0.1 * FLOOR


class TestAnEdgeThatDropsValues:
    def wide(self, pixels: Tensor) -> Tensor:
        weight = torch.randn(48, 3, 3, 3, generator=torch.Generator().manual_seed(2)) / 3
        return functional.conv2d((pixels - 0.5) / 0.25, weight, stride=2, padding=1)

    def thinned(self, seed: int) -> EdgeFunction:
        generator = torch.Generator().manual_seed(seed)

        def drop(pixels: Tensor) -> Tensor:
            z = self.wide(pixels)
            return 2.0 * z * (torch.rand(z.shape, generator=generator) < 0.5)

        return drop

    def test_is_inverted_by_what_comes_through(self) -> None:
        errors = {}
        for name, random in (("masked", True), ("blind", False)):
            attack = RMLE(dataclasses.replace(ONE, steps=200))
            attack.fit(Knowledge(KNOWN, edge=self.thinned(0), random_edge=random))
            errors[name] = float(mse(VICTIM, attack.reconstruct(self.thinned(9)(VICTIM))).mean())
        assert errors["masked"] < 0.02 * FLOOR < 0.2 * errors["blind"]

    def test_is_told_from_one_that_adds_noise_or_rounds(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def noisy(pixels: Tensor) -> Tensor:
            z = self.wide(pixels)
            return z + torch.randn(z.shape, generator=generator)

        edges = {"drops": self.thinned(0), "noise": noisy, "rectified": lambda x: noisy(x).relu(),
                 "rounded": lambda x: noisy(x).round(), "silent": self.wide}
        found = {name: drops_values(Knowledge(KNOWN, edge=e), torch.device("cpu"))
                 for name, e in edges.items()}
        assert found == {name: name == "drops" for name in edges}

    def test_the_kept_feature_is_the_mean_of_what_is_not_zero(self) -> None:
        draws = iter([torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[2.0, 6.0, 0.0]])])
        assert kept_feature(lambda _: next(draws), VICTIM, 2).tolist() == [[2.0, 6.0, 0.0]]


@pytest.mark.parametrize("size", [(16, 16), (9, 14)])
def test_spectral_coordinates_whiten_and_are_inverted(size: tuple[int, int]) -> None:
    images = smooth_images(400, (3, *size), seed=1)
    images[:, 2] = 0.5 * images[:, 0] + 0.5 * images[:, 2]
    space = PixelSpace.of(images)
    x = space.from_pixels(images) - space.from_pixels(space.mean_image)
    assert torch.allclose(space.to_pixels(space.from_pixels(images)), images, atol=1e-6)
    spectrum = Spectrum.of(x)
    v = spectrum.encode(x)
    assert torch.allclose(spectrum.decode(v), x, atol=1e-3)
    # The variance that the floor does not hide is the number of pixels, in every component.
    power = torch.fft.rfft2(v, norm="ortho").abs().square().mean(0) / (size[0] * size[1])
    assert power[:, 0, 0].tolist() == pytest.approx([1.0] * 3, rel=0.05)
    assert float(power.max()) < 1.0 + 1e-3


def test_settings_run_side_by_side_equal_settings_run_alone() -> None:
    space = PixelSpace.of(KNOWN)
    spectrum = Spectrum.of(space.from_pixels(KNOWN) - space.from_pixels(space.mean_image))
    descent = PixelDescent(dataclasses.replace(ONE, eps=1e-3), edge, space, spectrum)
    settings = [
        Setting("mse", lambda_tv=0.5), Setting("cosine"), Setting("mse", lambda_2=0.3),
        Setting("cosine", lambda_start=0.7),
    ]  # fmt: skip
    z, first = edge(VICTIM[:4]), KNOWN[:4]
    together, values = descent.run(z, first, VICTIM[:4], settings, 10)
    for i, setting in enumerate(settings):
        part = slice(i, i + 1)
        alone, value = descent.run(z[part], first[part], VICTIM[part], [setting], 10)
        assert torch.allclose(together[part], alone, atol=1e-4), setting
        assert float(value) == pytest.approx(float(values[i]), rel=1e-3)


@pytest.mark.parametrize("kind", ["pixels", "spectral"])
def test_what_is_minimised_is_what_is_written_down(kind: str) -> None:
    space = PixelSpace.of(KNOWN)
    spectrum = Spectrum.of(space.from_pixels(KNOWN) - space.from_pixels(space.mean_image))
    descent = PixelDescent(dataclasses.replace(ONE, lr=0.0, spectral_lr=0.0), edge, space,
                           spectrum, Comparison(scale=2.0))
    first, anchor, z = KNOWN[:2], KNOWN[2:4], edge(VICTIM[:2])
    setting = Setting("mse", kind, lambda_tv=0.5, lambda_2=0.3, lambda_start=0.7)
    pixels, values = descent.run(z, first, anchor, [setting] * 2, 1)
    assert torch.allclose(pixels, first, atol=1e-5)
    x = (first - space.mean) / space.std
    power = x.square().mean((1, 2, 3))
    if kind == "spectral":
        v = spectrum.encode(space.from_pixels(first) - space.from_pixels(space.mean_image))
        power = v.square().mean((1, 2, 3)) / v[0, 0].numel()
    y = (anchor - space.mean) / space.std
    expected = [
        float(((edge(first)[i] - z[i]) ** 2).mean()) / 2.0
        + 0.5 * float(((x[i, :, 1:] - x[i, :, :-1]) ** 2).mean()
                      + ((x[i, :, :, 1:] - x[i, :, :, :-1]) ** 2).mean())
        + 0.3 * float(power[i]) + 0.7 * float(((x[i] - y[i]) ** 2).mean())
        for i in range(2)
    ]  # fmt: skip
    assert values.tolist() == pytest.approx(expected, rel=1e-4)


class Blurred:
    """An attack whose answers are the victims, blurred: a good start that is not the truth."""

    def __init__(self) -> None:
        self.learnt_from = 0

    def fit(self, known: Knowledge) -> FitRecord | None:
        self.learnt_from = len(known.pixels)
        return None

    def reconstruct(self, z: Tensor) -> Tensor:
        count = len(z)
        codes = torch.stack([(edge(IMAGES) - one).square().mean(dim=(1, 2, 3)) for one in z])
        pixels = IMAGES[codes.argmin(dim=1)]
        small = functional.avg_pool2d(pixels, 4)
        return functional.interpolate(small, size=16, mode="bilinear")[:count]


def test_a_warm_start_is_used_where_it_is_better_on_own_images() -> None:
    def lossy(pixels: Tensor) -> Tensor:  # a quarter of what is needed
        return edge(pixels)[:, :3]

    class Start(Blurred):
        def reconstruct(self, z: Tensor) -> Tensor:
            codes = torch.stack([(lossy(IMAGES) - one).square().mean(dim=(1, 2, 3)) for one in z])
            return functional.avg_pool2d(IMAGES[codes.argmin(dim=1)], 3, 1, 1)

    start = Start()
    assert isinstance(start, Attack)
    attack = RMLE(QUICK, warm_start=start, fit_warm_start=True)
    record = attack.fit(Knowledge(KNOWN, edge=lossy))
    assert start.learnt_from == 36
    assert record.chosen is not None and record.chosen["warm"]
    assert record.start_loss is not None and record.best_loss < record.start_loss
    own = mse(KNOWN, start.reconstruct(lossy(KNOWN)))
    assert float(own.min()) < record.start_loss < float(own.max())
    assert {entry["warm"] for entry in record.chosen["tried"]} == {False, True}
    assert {*QUICK.lambda_start} <= {entry["lambda_start"] for entry in record.chosen["tried"]}
    cold, _ = fitted(QUICK, z=None, edge=lossy)
    z = lossy(VICTIM)
    warm_error = float(mse(VICTIM, attack.reconstruct(z)).mean())
    assert warm_error < float(mse(VICTIM, cold.reconstruct(z)).mean())
    assert warm_error < float(mse(VICTIM, start.reconstruct(z)).mean())


def test_a_useless_warm_start_is_not_used_and_held_out_images_choose() -> None:
    class Useless(Blurred):
        held_out = torch.tensor([3, 5, 8])

        def reconstruct(self, z: Tensor) -> Tensor:
            assert len(z) in (3, 8)
            return torch.rand(len(z), 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def short_sighted(pixels: Tensor) -> Tensor:
        return edge(pixels)[:, :1]

    start = Useless()
    attack = RMLE(dataclasses.replace(QUICK, steps=20), warm_start=start)
    record = attack.fit(Knowledge(KNOWN, edge=short_sighted))
    assert start.learnt_from == 0
    assert record.chosen is not None and not record.chosen["warm"] and record.start_loss is None


def test_a_random_edge_is_averaged() -> None:
    noise = torch.Generator().manual_seed(0)
    calls = []

    def noisy(pixels: Tensor) -> Tensor:
        calls.append(len(pixels))
        z = edge(pixels)
        return z + 0.5 * torch.randn(z.shape, generator=noise)

    attack, _ = fitted(dataclasses.replace(ONE, draws=3), edge=noisy, random_edge=True, z=None)
    calls.clear()
    attack.reconstruct(noisy(VICTIM))
    assert len(calls) == 1 + 3 * (ONE.steps + 1)
    attack, _ = fitted(dataclasses.replace(ONE, draws=3), edge=noisy, z=None)
    calls.clear()
    attack.reconstruct(noisy(VICTIM))
    assert len(calls) == 1 + ONE.steps + 1


def test_the_expected_feature_is_the_mean_of_the_draws() -> None:
    draws = iter([1.0, 2.0, 6.0])
    mean = expected_feature(lambda pixels: pixels * next(draws), VICTIM, 3)
    assert torch.allclose(mean, 3.0 * VICTIM)


@pytest.mark.parametrize("how", ["detached", "inference"])
def test_an_edge_without_gradients_gives_the_mean_image_and_a_norm_of_zero(how: str) -> None:
    def closed(pixels: Tensor) -> Tensor:
        if how == "detached":
            return edge(pixels).detach()
        with torch.inference_mode():
            return edge(pixels)

    attack, record = fitted(ONE, edge=closed)
    assert record.gradient_norm == 0.0
    guess = attack.reconstruct(edge(VICTIM))
    assert torch.allclose(guess, KNOWN.mean(0).expand_as(VICTIM), atol=1e-5)
    assert record.best_loss == pytest.approx(record.initial_loss, rel=1e-3)


def test_a_learning_rate_of_zero_changes_nothing() -> None:
    _, record = fitted(dataclasses.replace(QUICK, lr=0.0, spectral_lr=0.0))
    assert record.best_loss == pytest.approx(record.initial_loss, rel=1e-3)
    assert not math.isclose(record.initial_loss, 0.0)


def test_the_model_and_the_global_generator_are_left_as_found() -> None:
    module = nn.Conv2d(3, 4, 3, stride=2, padding=1)
    module.weight.grad = torch.ones_like(module.weight)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    results = []
    for seed in (0, 0, 1):
        config = dataclasses.replace(ONE, steps=2, lr=1e-3, seed=seed, restarts=9)
        attack, _ = fitted(config, edge=module, z=None)
        with torch.no_grad():
            results.append(attack.reconstruct(module(KNOWN)))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert torch.equal(module.weight.grad, torch.ones_like(module.weight))
    assert module.bias is not None and module.bias.grad is None and module.weight.requires_grad


def test_restarts_keep_the_better_run_of_each_image() -> None:
    # Nothing moves, so that the runs are the starts, and the truth is among the attacker's images.
    still = dataclasses.replace(ONE, steps=1, lr=0.0)
    z = edge(KNOWN[:8])
    once, often = (fitted(dataclasses.replace(still, restarts=n))[0] for n in (1, 60))
    assert torch.allclose(once.reconstruct(z), KNOWN.mean(0).expand(8, -1, -1, -1), atol=1e-5)
    found = mse(KNOWN[:8], often.reconstruct(z)) < 1e-8
    assert int(found.sum()) >= 4 and not bool((mse(KNOWN[:8], once.reconstruct(z)) < 1e-3).any())
    error = [(edge(run.reconstruct(z)) - z).square().mean(dim=(1, 2, 3)) for run in (once, often)]
    assert bool((error[1] <= error[0] + 1e-6).all())


def test_published_settings_are_those_of_the_paper() -> None:
    config = RMLEConfig.published(10.0)
    assert (config.steps, config.lr, config.eps, config.amsgrad) == (5000, 1e-2, 1e-3, True)
    attack, record = fitted(dataclasses.replace(config, steps=200, tuning_steps=200))
    assert len(record.history) == 1 and attack.setting == Setting("mse", "pixels", 10.0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"losses": ("mse", "cosin")}, "Did you mean: cosine"),
        ({"losses": ()}, "losses"),
        ({"spaces": ("fourier",)}, "spectral"),
        ({"lambda_tv": (-1.0,)}, "lambda_tv"),
        ({"lambda_start": (math.nan,)}, "lambda_start"),
        ({"steps": 0}, "steps >= 1"),
        ({"lr": math.nan}, "lr >= 0"),
        ({"precision": "fp16"}, "bf16"),
        ({"criterion": "psnr"}, "ssim"),
    ],
)
def test_bad_settings_are_refused(setting: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RMLEConfig(**setting)  # type: ignore[arg-type]


def test_misuse_is_refused() -> None:
    with pytest.raises(InputError, match="fit"):
        RMLE(QUICK).reconstruct(VICTIM)
    with pytest.raises(InputError, match="white-box"):
        RMLE(QUICK).fit(Knowledge(KNOWN))
    with pytest.raises(InputError, match="at least two"):
        RMLE(QUICK).fit(Knowledge(KNOWN[:1], edge=edge))
    with pytest.raises(InputError, match="finite features"):
        RMLE(QUICK).fit(known(z=edge(KNOWN) * math.nan))
    with pytest.raises(InputError, match=r"on \[0, 1\]"):
        RMLE(QUICK).fit(Knowledge(KNOWN * 2, edge=edge))
    with pytest.raises(TrainingError, match="finite"):
        RMLE(ONE).fit(known(edge=lambda pixels: edge(pixels) * math.nan))
