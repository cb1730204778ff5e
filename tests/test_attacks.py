"""The decoder attack inverts what can be inverted, fails where nothing is sent, and says so."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from patrol_prune.attacks import (
    Attack,
    FitRecord,
    InverseNetwork,
    InverseNetworkConfig,
    check_features,
    check_fit,
    check_reconstructions,
    make_attack,
    self_test,
)
from patrol_prune.attacks.checks import smooth_images
from patrol_prune.errors import InputError, TrainingError
from patrol_prune.metrics import mse

SMALL = InverseNetworkConfig(width=16, depth=1, epochs=10, batch_size=16, precision="fp32")
QUICK = dataclasses.replace(SMALL, epochs=2, max_extensions=0)
IMAGES = smooth_images(320, (3, 16, 16), seed=3)
KNOWN, VICTIM = IMAGES[:256], IMAGES[256:]
FLOOR = float(mse(VICTIM, KNOWN.mean(0).expand_as(VICTIM)).mean())


def one_convolution(x: Tensor) -> Tensor:
    weight = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.conv2d(x, weight, stride=2, padding=1).relu()


def error(attack: InverseNetwork, z: Tensor) -> float:
    return float(mse(VICTIM, attack.reconstruct(z)).mean())


@pytest.mark.parametrize("family", ["residual", "transposed"])
def test_an_edge_of_one_convolution_is_inverted_far_beyond_the_mean_image(family: str) -> None:
    attack = InverseNetwork(dataclasses.replace(SMALL, family=family))
    record = attack.fit(one_convolution(KNOWN), KNOWN)
    assert error(attack, one_convolution(VICTIM)) < 0.2 * FLOOR
    assert record.best_loss == min(record.history) < 0.2 * record.mean_image_loss
    assert record.mean_image_loss == pytest.approx(FLOOR, rel=0.2)
    guess = attack.reconstruct(one_convolution(VICTIM))
    assert check_reconstructions(VICTIM, guess, KNOWN.mean(0)) == []
    assert "loss_did_not_fall" not in [f.name for f in check_fit(record)]


@pytest.mark.parametrize("shape", ["tokens", "vector"])
def test_tokens_and_vectors_are_inverted_too(shape: str) -> None:
    def edge(x: Tensor) -> Tensor:
        patches = torch.nn.functional.pixel_unshuffle(x, 4)  # [N, 48, 4, 4]
        return patches.flatten(2).transpose(1, 2) if shape == "tokens" else patches.flatten(1)

    attack = InverseNetwork(dataclasses.replace(SMALL, max_extensions=0))
    attack.fit(edge(KNOWN), KNOWN)
    assert error(attack, edge(VICTIM)) < 0.5 * FLOOR


def test_self_test_passes_a_working_attack_and_flags_a_broken_one() -> None:
    assert isinstance(InverseNetwork(SMALL), Attack)
    assert self_test(InverseNetwork(SMALL)) == []
    broken = InverseNetwork(dataclasses.replace(QUICK, lr=0.0, weight_decay=0.0))
    assert [f.name for f in self_test(broken)] == ["cannot_invert_identity"]


def test_a_constant_edge_gives_the_mean_image_and_flags() -> None:
    z = torch.full((len(KNOWN), 4, 4, 4), 0.3)
    attack = InverseNetwork(dataclasses.replace(SMALL, epochs=6))
    attack.fit(z, KNOWN)
    guess = attack.reconstruct(z[: len(VICTIM)])
    assert 0.97 * FLOOR < float(mse(VICTIM, guess).mean()) < 1.3 * FLOOR
    assert [f.name for f in check_features(z)] == ["constant_features"]
    assert check_features(one_convolution(KNOWN)) == []
    names = [f.name for f in check_reconstructions(VICTIM, guess, KNOWN.mean(0))]
    assert names == ["not_better_than_mean_image", "contrast_collapsed"]


def test_a_learning_rate_of_zero_is_flagged() -> None:
    attack = InverseNetwork(dataclasses.replace(QUICK, lr=0.0, weight_decay=0.0))
    flags = check_fit(attack.fit(one_convolution(KNOWN), KNOWN))
    assert "loss_did_not_fall" in [f.name for f in flags]
    assert all(f.meaning and f.advice for f in flags)


def record(history: list[float], plateau: bool = True) -> FitRecord:
    return FitRecord(tuple(history), tuple(history), 1.0, 1.0, len(history) - 1, plateau, 0, 0.0)


def test_check_fit_end_points() -> None:
    assert check_fit(record([0.5])) == []
    assert [f.name for f in check_fit(record([0.995]))] == ["loss_did_not_fall"]
    assert [f.name for f in check_fit(record([0.5], plateau=False))] == ["not_converged"]


def test_a_short_training_is_prolonged_and_says_that_it_did_not_converge() -> None:
    config = dataclasses.replace(SMALL, epochs=4, max_extensions=1)
    result = InverseNetwork(config).fit(one_convolution(KNOWN), KNOWN)
    assert (result.extensions, len(result.history), result.plateau) == (1, 6, False)
    # Everything counts as a plateau under a tolerance of 100%.
    tolerant = dataclasses.replace(config, plateau_tolerance=1.0)
    result = InverseNetwork(tolerant).fit(one_convolution(KNOWN), KNOWN)
    assert (result.extensions, len(result.history), result.plateau) == (0, 4, True)


def test_features_that_say_nothing_stop_early_and_the_best_epoch_is_kept() -> None:
    noise = torch.randn(64, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    config = dataclasses.replace(SMALL, epochs=60, patience=4, max_extensions=0, width=32)
    attack = InverseNetwork(config)
    result = attack.fit(noise, KNOWN[:64])
    assert len(result.history) == result.best_epoch + 5 < 60 and result.plateau
    # The weights are those of the best epoch: their loss on the held-out images is its loss.
    generator = torch.Generator().manual_seed(config.seed + 7_368_787)
    held = torch.randperm(64, generator=generator)[:6]
    loss = float(mse(KNOWN[held], attack.reconstruct(noise[held])).mean())
    assert loss == pytest.approx(result.best_loss, rel=1e-4)


def test_same_seed_same_result_and_the_global_generator_is_untouched() -> None:
    z = one_convolution(KNOWN)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    outputs, records = [], []
    for seed in (0, 0, 1):
        attack = InverseNetwork(dataclasses.replace(QUICK, seed=seed))
        records.append(attack.fit(z, KNOWN))
        outputs.append(attack.reconstruct(z[:8]))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(outputs[0], outputs[1]) and records[0].history == records[1].history
    assert not torch.equal(outputs[0], outputs[2])


def test_uint8_pixels_and_both_losses() -> None:
    z = one_convolution(KNOWN)
    as_bytes = (KNOWN * 255).round().to(torch.uint8)
    one = InverseNetwork(QUICK).fit(z, as_bytes)
    two = InverseNetwork(QUICK).fit(z, as_bytes.float() / 255)
    assert one.history == two.history
    both = InverseNetwork(dataclasses.replace(QUICK, loss="mse+ssim")).fit(z, KNOWN)
    # The mean image's SSIM is low, so its loss is its MSE plus nearly the weight of 0.1.
    assert both.mean_image_loss > one.mean_image_loss + 0.02


def test_bf16_is_near_fp32() -> None:
    z = one_convolution(KNOWN)
    config = dataclasses.replace(SMALL, epochs=5, max_extensions=0)
    fp32 = InverseNetwork(config).fit(z, KNOWN)
    auto = InverseNetwork(dataclasses.replace(config, precision="auto")).fit(z, KNOWN)
    assert auto.best_loss == pytest.approx(fp32.best_loss, rel=0.25)


@pytest.mark.parametrize(
    ("z", "pixels", "message"),
    [
        (KNOWN[:30], KNOWN[:31], "one feature per image"),
        (KNOWN[:30], KNOWN[:30, 0], "one feature per image"),
        (KNOWN[:19], KNOWN[:19], "at least 20"),
        (KNOWN[:30] * math.nan, KNOWN[:30], "finite features"),
        (KNOWN[:30] * math.inf, KNOWN[:30], "finite features"),
        (KNOWN[:30], KNOWN[:30] * 2, r"on \[0, 1\]"),
    ],
)
def test_bad_pairs_are_refused(z: Tensor, pixels: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        InverseNetwork(QUICK).fit(z, pixels)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"family": "resdual"}, "Did you mean: residual"),
        ({"loss": "ssim"}, "mse"),
        ({"precision": "fp16"}, "bf16"),
        ({"epochs": 0}, "epochs >= 1"),
        ({"lr": -1.0}, "lr >= 0"),
        ({"lr": math.nan}, "lr >= 0"),
        ({"holdout": 1.0}, "holdout"),
    ],
)
def test_bad_settings_are_refused(setting: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        InverseNetworkConfig(**setting)  # type: ignore[arg-type]


def test_divergence_and_misuse() -> None:
    with pytest.raises(TrainingError, match="not finite"):
        InverseNetwork(dataclasses.replace(QUICK, lr=1e30)).fit(one_convolution(KNOWN), KNOWN)
    with pytest.raises(InputError, match="fit"):
        InverseNetwork(QUICK).reconstruct(KNOWN)
    with pytest.raises(InputError, match="Did you mean: inverse_network"):
        make_attack("inverse_net", QUICK)
