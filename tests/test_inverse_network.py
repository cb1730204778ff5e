"""The decoder attack inverts what can be inverted, and averages over the edge's randomness."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from patrol_prune.attacks.base import Attack, EdgeFunction, Knowledge
from patrol_prune.attacks.checks import NOT_CONVERGED, check_fit, smooth_images
from patrol_prune.attacks.inverse_network import InverseNetwork
from patrol_prune.attacks.inverse_network_config import LOSSES, SUITE, InverseNetworkConfig
from patrol_prune.attacks.registry import make_attack
from patrol_prune.attacks.training_pairs import TrainingPairs
from patrol_prune.decoders import FAMILIES, Decoder
from patrol_prune.errors import InputError, TrainingError
from patrol_prune.metrics import mse

SMALL = InverseNetworkConfig(width=16, depth=1, epochs=10, batch_size=16, precision="fp32")
QUICK = dataclasses.replace(SMALL, epochs=2, max_extensions=0, mirror=False)
IMAGES = smooth_images(320, (3, 16, 16), seed=3)
KNOWN, VICTIM = IMAGES[:256], IMAGES[256:]
FLOOR = float(mse(VICTIM, KNOWN.mean(0).expand_as(VICTIM)).mean())


def one_convolution(x: Tensor) -> Tensor:
    weight = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.conv2d(x, weight, stride=2, padding=1).relu()


def pairs(edge: EdgeFunction = one_convolution, pixels: Tensor = KNOWN) -> Knowledge:
    return Knowledge(pixels, edge(pixels))


def error(attack: InverseNetwork, z: Tensor) -> float:
    return float(mse(VICTIM, attack.reconstruct(z)).mean())


class NoisyEdge:
    """One convolution and Gaussian noise, drawn anew in every call; counts what it is asked."""

    def __init__(self, sigma: float) -> None:
        self.sigma, self.generator = sigma, torch.Generator().manual_seed(5)
        self.images, self.grad_enabled = 0, False
        self.first_answers: list[Tensor] = []

    def __call__(self, pixels: Tensor) -> Tensor:
        self.images += len(pixels)
        self.grad_enabled |= torch.is_grad_enabled()
        z = one_convolution(pixels)
        z = z + self.sigma * torch.randn(z.shape, generator=self.generator)
        same = (pixels == KNOWN[0]).flatten(1).all(1)
        self.first_answers += list(z[same])
        return z


def test_the_suite_is_every_family_with_every_loss_one_that_whitens_and_one_that_drops() -> None:
    plain = [(c.family, c.loss) for c in SUITE.values() if not (c.whiten or c.dropout)]
    assert sorted(plain) == sorted((family, loss) for family in FAMILIES for loss in LOSSES)
    assert [name for name, c in SUITE.items() if c.whiten] == ["whitened_ssim"]
    assert [name for name, c in SUITE.items() if c.dropout] == ["dropped_ssim"]
    assert SUITE["inverse_network"] == InverseNetworkConfig()
    assert isinstance(InverseNetwork(SUITE["unet_ssim"]), Attack)


def test_dropout_stands_before_the_decoder_while_it_learns_and_not_afterwards(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, float]] = []
    forward = Decoder.forward

    def watched(decoder: Decoder, z: Tensor) -> Tensor:
        seen.append((decoder.training, float((z == 0).float().mean())))
        return forward(decoder, z)

    monkeypatch.setattr(Decoder, "forward", watched)
    config = dataclasses.replace(SMALL, epochs=2, max_extensions=0)
    attack = make_attack("dropped_ssim", config)
    assert isinstance(attack, InverseNetwork) and attack.config.dropout == 0.5
    attack.fit(pairs())
    z = one_convolution(VICTIM)
    first = attack.reconstruct(z)
    shares = {mode: [share for training, share in seen if training is mode]
              for mode in (True, False)}
    assert all(0.45 < share < 0.55 for share in shares[True]) and max(shares[False]) < 0.01
    assert torch.equal(attack.reconstruct(z), first)
    again = make_attack("dropped_ssim", config)
    again.fit(pairs())
    assert torch.equal(again.reconstruct(z), first)
    with pytest.raises(InputError, match="0 <= dropout < 1"):
        dataclasses.replace(config, dropout=1.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edge_of_one_convolution_is_inverted_far_beyond_the_mean_image(family: str) -> None:
    attack = InverseNetwork(dataclasses.replace(SMALL, family=family, max_extensions=0))
    record = attack.fit(pairs())
    assert error(attack, one_convolution(VICTIM)) < 0.2 * FLOOR
    assert record.best_loss == min(record.history) < 0.2 * record.mean_image_loss
    assert record.mean_image_loss == pytest.approx(FLOOR, rel=0.2)


@pytest.mark.parametrize(("shape", "family"), [
    pytest.param("tokens", "unet", marks=pytest.mark.slow), ("vector", "residual")])
def test_tokens_and_vectors_are_inverted_too(shape: str, family: str) -> None:
    def edge(x: Tensor) -> Tensor:
        patches = torch.nn.functional.pixel_unshuffle(x, 4)  # [N, 48, 4, 4]
        return patches.flatten(2).transpose(1, 2) if shape == "tokens" else patches.flatten(1)

    attack = InverseNetwork(dataclasses.replace(SMALL, family=family, max_extensions=0))
    attack.fit(pairs(edge))
    assert error(attack, edge(VICTIM)) < 0.5 * FLOOR


def test_a_random_edge_is_asked_anew_in_every_epoch_and_a_fixed_one_never() -> None:
    edge = NoisyEdge(0.5)
    z = edge(KNOWN)
    edge.images, edge.grad_enabled = 0, False
    InverseNetwork(QUICK).fit(Knowledge(KNOWN, z, edge=edge))
    assert edge.images == 0
    InverseNetwork(QUICK).fit(Knowledge(KNOWN, z, edge=edge, random_edge=True))
    held = 26
    # The shape, the statistics, the held-out loss before training; then everything, every epoch.
    assert edge.images == 2 + 256 + held + QUICK.epochs * 256
    assert not edge.grad_enabled
    # No draw for the first image came twice.
    answers = torch.stack(edge.first_answers)
    assert len(answers) >= 3 + QUICK.epochs
    assert len(torch.unique(answers, dim=0)) == len(answers)


@pytest.mark.parametrize("stored", [True, False])
def test_mirrored_images_stand_behind_their_own_with_what_the_edge_uploads_for_them(
    stored: bool,
) -> None:
    z = one_convolution(KNOWN) if stored else None
    known = Knowledge(KNOWN, z, edge=one_convolution)
    found = TrainingPairs(known, torch.device("cpu"), mirror=True)
    assert (len(found), found.own, found.mirrored) == (512, 256, True)
    features, pixels = found.batch(torch.tensor([3, 259, 511]))
    expected = torch.stack([KNOWN[3], KNOWN[3].flip(-1), KNOWN[255].flip(-1)])
    assert torch.equal(pixels, expected)
    torch.testing.assert_close(features, one_convolution(expected))
    assert sum(len(z) for z in found.features()) == 256  # statistics are of his own alone
    alone = TrainingPairs(Knowledge(KNOWN, one_convolution(KNOWN)), torch.device("cpu"),
                          mirror=True)
    assert (len(alone), alone.mirrored) == (256, False)


def test_few_images_are_mirrored_and_none_of_them_is_held_out() -> None:
    def asked(config: InverseNetworkConfig, count: int) -> tuple[int, Tensor]:
        edge = NoisyEdge(0.0)
        attack = InverseNetwork(config)
        attack.fit(Knowledge(IMAGES[:count], one_convolution(IMAGES[:count]), edge=edge))
        assert attack.held_out is not None
        return edge.images, attack.held_out

    usual = dataclasses.replace(QUICK, mirror=None)
    images, held = asked(usual, 40)  # once, for both
    assert images == 40 and len(held) == 4 and int(held.max()) < 40
    assert torch.equal(held, asked(QUICK, 40)[1]) and asked(QUICK, 40)[0] == 0


@pytest.mark.slow
def test_mirrored_images_are_used_only_where_held_out_ones_are_rebuilt_better_for_it() -> None:
    """The same upload for a picture and its mirror image, and pictures that nobody mirrors."""
    def folded(x: Tensor) -> Tensor:
        return one_convolution(x + x.flip(-1)) + one_convolution(x + x.flip(-1)).flip(-1)

    lopsided = IMAGES[:80] * torch.linspace(1.0, 0.1, 16)
    for pixels, edge, epochs in ((lopsided, folded, 20), (IMAGES[:80], one_convolution, 4)):
        config = dataclasses.replace(SMALL, epochs=epochs, max_extensions=1)
        known = Knowledge(pixels, edge(pixels), edge=edge)
        tried, yes, no = (
            InverseNetwork(dataclasses.replace(config, mirror=mirror)).fit(known)
            for mirror in (None, True, False))
        first = {name: min(fit.history[:epochs]) for name, fit in (("yes", yes), ("no", no))}
        best = min(first, key=lambda name: first[name])
        assert tried.chosen == {"mirrored": best} and yes.chosen is None
        assert tried.history == (yes if best == "yes" else no).history
        assert tried.mean_image_loss == yes.mean_image_loss == no.mean_image_loss
        if edge is folded:
            assert best == "no"


def test_mirrored_features_that_would_be_too_large_are_asked_for(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    z = one_convolution(KNOWN)
    monkeypatch.setattr("patrol_prune.attacks.training_pairs._STORED_BYTES", 8 * z.numel() - 1)
    found = TrainingPairs(Knowledge(KNOWN, z, edge=one_convolution), torch.device("cpu"),
                          mirror=True)
    assert found.asks and len(found) == 512
    features, pixels = found.batch(torch.tensor([3, 259]))
    torch.testing.assert_close(features, one_convolution(pixels))


def test_many_images_are_not_mirrored_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patrol_prune.attacks.inverse_network._FEW", 40)
    for mirror, expected in ((None, 0), (True, 40)):
        edge = NoisyEdge(0.0)
        InverseNetwork(dataclasses.replace(QUICK, mirror=mirror)).fit(
            Knowledge(IMAGES[:40], one_convolution(IMAGES[:40]), edge=edge))
        assert edge.images == expected


def test_recomputed_features_of_a_fixed_edge_give_what_stored_ones_give() -> None:
    stored = InverseNetwork(QUICK)
    asked = InverseNetwork(dataclasses.replace(QUICK, recompute=True))
    one = stored.fit(pairs())
    two = asked.fit(Knowledge(KNOWN, one_convolution(KNOWN), edge=one_convolution))
    without = InverseNetwork(QUICK).fit(Knowledge(KNOWN, edge=one_convolution))
    assert two.history == without.history == pytest.approx(one.history, rel=1e-3)
    z = one_convolution(VICTIM)
    torch.testing.assert_close(asked.reconstruct(z), stored.reconstruct(z), atol=1e-2, rtol=0)


@pytest.mark.slow
def test_fresh_draws_reconstruct_better_than_one_fixed_draw() -> None:
    edge, few = NoisyEdge(2.0), KNOWN[:40]
    config = dataclasses.replace(SMALL, width=32, epochs=60, patience=60, max_extensions=0)
    z = edge(few)
    fixed, fresh = InverseNetwork(config), InverseNetwork(config)
    fixed.fit(Knowledge(few, z))
    fresh.fit(Knowledge(few, z, edge=edge, random_edge=True))
    victim = NoisyEdge(2.0)(VICTIM)
    assert error(fresh, victim) < 0.95 * error(fixed, victim)


def test_a_short_training_is_prolonged_and_says_that_it_did_not_converge() -> None:
    config = dataclasses.replace(SMALL, epochs=4, max_extensions=1)
    result = InverseNetwork(config).fit(pairs())
    assert (result.extensions, len(result.history), result.plateau) == (1, 6, False)
    # Everything counts as a plateau under a tolerance of 100%, but only once it was prolonged.
    tolerant = dataclasses.replace(config, plateau_tolerance=1.0, max_extensions=3)
    result = InverseNetwork(tolerant).fit(pairs())
    assert (result.extensions, len(result.history), result.plateau) == (1, 6, True)
    never = InverseNetwork(dataclasses.replace(tolerant, max_extensions=0)).fit(pairs())
    assert (never.extensions, len(never.history), never.plateau) == (0, 4, False)


def test_the_quiet_end_of_a_schedule_is_no_plateau() -> None:
    # The last epochs of six gain nothing, as the learning rate is next to zero; more epochs do.
    config = dataclasses.replace(SMALL, epochs=6, max_extensions=0)
    short = InverseNetwork(config).fit(pairs())
    longer = InverseNetwork(dataclasses.replace(config, max_extensions=2)).fit(pairs())
    assert short.history[-2] < 1.02 * short.history[-1]
    assert longer.best_loss < 0.9 * short.best_loss
    assert not short.plateau and longer.extensions == 2


@pytest.mark.parametrize("epochs", [1, 3])
def test_prolonging_by_a_few_steps_tells_of_no_plateau(epochs: int) -> None:
    config = InverseNetworkConfig(width=8, depth=0, epochs=epochs, mirror=False)
    record = InverseNetwork(config).fit(pairs(pixels=KNOWN[:60]))
    assert record.extensions == 2 and not record.plateau
    assert NOT_CONVERGED in check_fit(record)


def test_a_loss_that_rises_until_patience_runs_out_is_no_plateau() -> None:
    config = InverseNetworkConfig(width=8, depth=0, lr=1.0, patience=4, mirror=False)
    record = InverseNetwork(config).fit(pairs(pixels=KNOWN[:60]))
    assert len(record.history) == record.best_epoch + 5
    assert record.history[-1] > 2 * record.mean_image_loss
    assert not record.plateau


def test_features_that_say_nothing_stop_early_and_the_best_epoch_is_kept() -> None:
    noise = torch.randn(64, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    config = dataclasses.replace(SMALL, epochs=60, patience=4, max_extensions=0, width=32)
    attack = InverseNetwork(config)
    result = attack.fit(Knowledge(KNOWN[:64], noise))
    assert len(result.history) == result.best_epoch + 5 < 60 and result.plateau
    # The weights are those of the best epoch: their loss on the held-out images is its loss.
    generator = torch.Generator().manual_seed(config.seed + 7_368_787)
    held = torch.randperm(64, generator=generator)[:6]
    loss = float(mse(KNOWN[held], attack.reconstruct(noise[held])).mean())
    assert loss == pytest.approx(result.best_loss, rel=1e-4)


def test_same_seed_same_result_and_the_global_generator_is_untouched() -> None:
    known = pairs()
    torch.manual_seed(11)
    before = torch.get_rng_state()
    outputs, records = [], []
    for seed in (0, 0, 1):
        attack = InverseNetwork(dataclasses.replace(QUICK, seed=seed))
        records.append(attack.fit(known))
        outputs.append(attack.reconstruct(known.pairs()[0][:8]))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(outputs[0], outputs[1]) and records[0].history == records[1].history
    assert not torch.equal(outputs[0], outputs[2])


def test_uint8_pixels_and_both_losses() -> None:
    z = one_convolution(KNOWN)
    as_bytes = (KNOWN * 255).round().to(torch.uint8)
    one = InverseNetwork(QUICK).fit(Knowledge(as_bytes, z))
    two = InverseNetwork(QUICK).fit(Knowledge(as_bytes.float() / 255, z))
    assert one.history == two.history
    both = InverseNetwork(dataclasses.replace(QUICK, loss="mse+ssim")).fit(Knowledge(KNOWN, z))
    # The mean image's SSIM is low, so its loss is its MSE plus nearly the weight of 0.1.
    assert both.mean_image_loss > one.mean_image_loss + 0.02


def test_bf16_is_near_fp32() -> None:
    z = one_convolution(KNOWN)
    config = dataclasses.replace(SMALL, epochs=5, max_extensions=0)
    fp32 = InverseNetwork(config).fit(Knowledge(KNOWN, z))
    auto = InverseNetwork(dataclasses.replace(config, precision="auto")).fit(Knowledge(KNOWN, z))
    assert auto.best_loss == pytest.approx(fp32.best_loss, rel=0.25)


@pytest.mark.parametrize(
    ("z", "pixels", "message"),
    [
        (KNOWN[:30], KNOWN[:31], "one feature per image"),
        (KNOWN[:30], KNOWN[:30, 0], r"images \[N, C, H, W\]"),
        (KNOWN[:19], KNOWN[:19], "at least 20"),
        (KNOWN[:30] * math.nan, KNOWN[:30], "finite features"),
        (KNOWN[:30] * math.inf, KNOWN[:30], "finite features"),
        (KNOWN[:30], KNOWN[:30] * 2, r"on \[0, 1\]"),
    ],
)
def test_bad_pairs_are_refused(z: Tensor, pixels: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        InverseNetwork(QUICK).fit(Knowledge(pixels, z))


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
        InverseNetwork(dataclasses.replace(QUICK, lr=1e30)).fit(pairs())
    with pytest.raises(InputError, match="fit"):
        InverseNetwork(QUICK).reconstruct(KNOWN)
    with pytest.raises(InputError, match="learns from features"):
        InverseNetwork(QUICK).fit(Knowledge(KNOWN))
    with pytest.raises(InputError, match="can be queried"):
        InverseNetwork(dataclasses.replace(QUICK, recompute=True)).fit(pairs())
    with pytest.raises(InputError, match="at least 11"):
        small = KNOWN[:, :, :10, :10]
        InverseNetwork(dataclasses.replace(QUICK, loss="mse+ssim")).fit(Knowledge(small, small))
    with pytest.raises(InputError, match="one feature per image"):
        InverseNetwork(QUICK).fit(Knowledge(KNOWN, edge=lambda x: one_convolution(x).flatten(0, 1)))
    with pytest.raises(InputError, match="finite features"):
        InverseNetwork(QUICK).fit(Knowledge(KNOWN, edge=lambda x: x * math.nan))
