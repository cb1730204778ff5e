"""An untrained generator per image: independent of its neighbours, stopped early, inverting."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from patrol_prune.attacks.base import Attack, FitRecord, Knowledge
from patrol_prune.attacks.checks import smooth_images
from patrol_prune.attacks.image_prior import (
    Generators,
    ImagePrior,
    ImagePriorConfig,
    convolve_each,
)
from patrol_prune.errors import InputError, TrainingError
from patrol_prune.metrics import mse

IMAGES = smooth_images(36, (3, 16, 16), seed=3)
KNOWN, VICTIM = IMAGES[:30], IMAGES[30:]
FLOOR = float(mse(VICTIM, KNOWN.mean(0).expand_as(VICTIM)).mean())
WEIGHT = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0)) / 3
QUICK = ImagePriorConfig(
    losses=("mse",), lrs=(0.02,), steps=30, check_every=10, width=8, scales=2, tuning_images=3
)


def edge(pixels: Tensor) -> Tensor:
    return functional.conv2d((pixels - 0.5) / 0.25, WEIGHT, stride=2, padding=1).relu()


def fitted(config: ImagePriorConfig, **changes: object) -> tuple[ImagePrior, FitRecord]:
    attack = ImagePrior(config)
    known = Knowledge(KNOWN, edge(KNOWN), edge)
    return attack, attack.fit(dataclasses.replace(known, **changes))  # type: ignore[arg-type]


def test_one_convolution_is_inverted_and_the_record_says_how() -> None:
    config = dataclasses.replace(
        QUICK, losses=("mse", "cosine"), lrs=(0.003, 0.03), steps=120, check_every=20, width=16
    )
    attack, record = fitted(config)
    assert isinstance(attack, Attack)
    guess = attack.reconstruct(edge(VICTIM))
    assert guess.shape == VICTIM.shape and float(mse(VICTIM, guess).mean()) < 0.3 * FLOOR
    assert len(record.history) == len(record.train_history) == 6
    assert record.train_history[-1] < record.train_history[0]
    assert record.best_loss == min(record.history) < 0.3 * record.mean_image_loss
    assert record.chosen is not None and record.gradient_norm is not None
    assert len(record.chosen["tried"]) == 4 and record.gradient_norm > 0
    least = min(record.chosen["tried"], key=lambda entry: entry["error"])
    assert (least["loss"], least["lr"]) == (record.chosen["loss"], record.chosen["lr"])
    assert attack.steps == record.chosen["steps"] == 20 * (record.best_epoch + 1)


def test_the_attack_stops_where_its_own_images_were_best() -> None:
    # The edge adds the same large error to every later query: fitting it exactly is too much.
    calls = torch.zeros(())

    def drifting(pixels: Tensor) -> Tensor:
        calls.add_(1)
        return edge(pixels) + 0.02 * calls

    attack, record = fitted(dataclasses.replace(QUICK, steps=95), edge=drifting)
    assert len(record.history) == 10
    assert record.best_epoch < 9 and record.plateau
    assert attack.steps == 10 * (record.best_epoch + 1)
    calls.zero_()
    attack.reconstruct(edge(VICTIM))
    assert int(calls) == attack.steps


def test_images_optimised_together_do_not_influence_each_other() -> None:
    attack, _ = fitted(dataclasses.replace(QUICK, steps=10))
    z = edge(VICTIM)
    together = attack.reconstruct(z)
    alone = torch.cat([attack.reconstruct(part) for part in z.split(1)])
    assert torch.allclose(together, alone, atol=2e-3)
    swapped = attack.reconstruct(z.flip(0)).flip(0)
    assert torch.allclose(together, swapped, atol=2e-3)
    assert not torch.allclose(together[0], together[1], atol=2e-2)


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_grouped_convolution_is_one_convolution_per_image(kernel: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 7, 5, generator=generator)
    weight = torch.randn(4, 6, 3, kernel, kernel, generator=generator)
    bias = torch.randn(4, 6, generator=generator)
    slow = torch.cat([
        functional.conv2d(x[i : i + 1], weight[i], bias[i], padding=kernel // 2) for i in range(4)
    ])  # fmt: skip
    assert torch.allclose(convolve_each(x, weight, bias), slow, atol=1e-5)


@pytest.mark.parametrize("size", [(16, 16), (9, 14), (1, 5)])
def test_generators_begin_alike_near_the_mean_image(size: tuple[int, int]) -> None:
    mean = torch.full((1, 3, *size), 0.3)
    made = Generators(4, mean, 8, 3, torch.Generator().manual_seed(0))
    pixels = made().detach()
    assert pixels.shape == (4, 3, *size)
    assert torch.allclose(pixels, pixels[:1].expand_as(pixels), atol=1e-6)
    assert float((pixels - mean).abs().mean()) < 0.1
    assert all(weight.requires_grad and weight.is_leaf for weight in made.weights)


@pytest.mark.parametrize("steps", [1, 7])
def test_generators_that_do_not_move_are_their_own_average(steps: int) -> None:
    attack, _ = fitted(dataclasses.replace(QUICK, lrs=(0.0,), steps=steps, check_every=steps))
    draws = torch.Generator().manual_seed(5_318_009)
    still = Generators(6, KNOWN.mean(0, keepdim=True), 8, 2, draws)().detach()
    assert torch.allclose(attack.reconstruct(edge(VICTIM)), still, atol=1e-5)


def test_a_random_edge_is_averaged_and_nothing_of_the_user_is_touched() -> None:
    noise, calls = torch.Generator().manual_seed(0), []
    module = nn.Conv2d(3, 4, 3, stride=2, padding=1)

    def noisy(pixels: Tensor) -> Tensor:
        calls.append(len(pixels))
        z = module(pixels)
        return z + 0.1 * torch.randn(z.shape, generator=noise)

    torch.manual_seed(11)
    before = torch.get_rng_state()
    config = dataclasses.replace(QUICK, draws=3)
    attack, _ = fitted(config, z=None, edge=noisy, random_edge=True)
    with torch.no_grad():
        z = noisy(VICTIM)
        calls.clear()
        one = attack.reconstruct(z)
    assert len(calls) == 3 * attack.steps
    assert torch.equal(torch.get_rng_state(), before)
    assert module.weight.grad is None and module.weight.requires_grad
    assert not one.requires_grad


def test_same_seed_same_result() -> None:
    z = edge(VICTIM)
    results = [fitted(dataclasses.replace(QUICK, seed=s))[0].reconstruct(z) for s in (0, 0, 1)]
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_an_edge_without_gradients_leaves_the_start_and_a_norm_of_zero() -> None:
    attack, record = fitted(QUICK, edge=lambda pixels: edge(pixels).detach())
    assert record.gradient_norm == 0.0
    guess = attack.reconstruct(edge(VICTIM))
    assert torch.allclose(guess, guess[:1].expand_as(guess), atol=1e-6)
    assert float((guess - KNOWN.mean(0)).abs().mean()) < 0.1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"losses": ("mse", "cosin")}, "Did you mean: cosine"),
        ({"losses": ()}, "losses"),
        ({"lrs": (math.nan,)}, "rates"),
        ({"steps": 0}, "steps >= 1"),
        ({"scales": -1}, "scales >= 0"),
        ({"averaging": 1.0}, "averaging"),
        ({"precision": "fp16"}, "bf16"),
    ],
)
def test_bad_settings_are_refused(setting: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ImagePriorConfig(**setting)  # type: ignore[arg-type]


def test_misuse_is_refused() -> None:
    with pytest.raises(InputError, match="fit"):
        ImagePrior(QUICK).reconstruct(VICTIM)
    with pytest.raises(InputError, match="white-box"):
        ImagePrior(QUICK).fit(Knowledge(KNOWN))
    with pytest.raises(TrainingError, match="finite"):
        ImagePrior(QUICK).fit(Knowledge(KNOWN, edge(KNOWN), lambda x: edge(x) * math.nan))
