"""Private regions: weights of pixels, and who counts by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import patrol_prune as pp
from patrol_prune import metrics
from patrol_prune.attacks.base import Knowledge
from patrol_prune.errors import InputError
from patrol_prune.surrogate import (
    SSIM_WEIGHT,
    SurrogateEnsemble,
    SurrogateSpec,
    reconstruction_error,
)

SPECS = (SurrogateSpec("residual", 8, 1), SurrogateSpec("transposed", 8))


def left_half(pixels: Tensor) -> Tensor:
    """1 on the left half of every picture."""
    mask = torch.zeros_like(pixels[:, :1])
    mask[..., : pixels.shape[-1] // 2] = 1.0
    return mask


def images(seed: int, count: int = 4, side: int = 16) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=30)
@given(share=st.floats(0.01, 1.0), height=st.integers(2, 20), width=st.integers(2, 20),
       seed=st.integers(0, 2**16))
def test_so_much_of_the_weight_is_in_the_region(
    share: float, height: int, width: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = (torch.rand(3, 1, height, width, generator=generator) < 0.4).float()
    masks[0] = 0.0
    pixels = torch.rand(3, 3, height, width, generator=generator)
    found = pp.PrivateRegions(lambda _: masks[:, 0], share).weights(pixels)
    assert found.shape == masks.shape and found.min() >= 0
    torch.testing.assert_close(found.mean((1, 2, 3)), torch.ones(3))
    assert torch.equal(found[0], torch.ones_like(found[0])), "nothing is private there"
    for mask, weights in zip(masks[1:], found[1:], strict=True):
        area = float(mask.mean())
        if area > 0:
            inside = float((weights * mask).sum() / weights.sum())
            assert inside == pytest.approx(share + (1 - share) * area, abs=1e-5)


def test_a_share_of_all_is_the_error_of_the_region_alone() -> None:
    x, y = images(0), images(1)
    weights = pp.PrivateRegions(left_half, 1.0).weights(x)
    alone = metrics.mse(x[..., :8], y[..., :8])
    torch.testing.assert_close(reconstruction_error(x, y, "mse", weights), alone)
    # the likeness of a pixel reaches 5 beyond it: the same left of there, whatever lies right
    z = torch.cat([y[..., :13], images(2)[..., 13:]], 3)
    assert not torch.allclose(metrics.ssim_values(x, y), metrics.ssim_values(x, z))
    likeness = metrics.ssim_values(x, y, weights)
    torch.testing.assert_close(likeness, metrics.ssim_values(x, z, weights))
    torch.testing.assert_close(reconstruction_error(x, y, "mse+ssim", weights),
                               alone + SSIM_WEIGHT * (1 - likeness))


def test_halves_that_count_in_turn_make_up_the_whole() -> None:
    x, y = images(0), images(1)
    left, right = left_half(x) * 2, (1 - left_half(x)) * 2
    both = (metrics.ssim_values(x, y, left) + metrics.ssim_values(x, y, right)) / 2
    torch.testing.assert_close(both, metrics.ssim_values(x, y))
    assert not torch.allclose(metrics.ssim_values(x, y, left), metrics.ssim_values(x, y, right))


@pytest.mark.parametrize(("find", "told"), [
    (lambda x: x, r"a mask \[4, 1, 16, 16\] for these pictures, came \(4, 3, 16, 16\)"),
    (lambda x: [0], "came list"),
    (lambda x: left_half(x) - 0.5, "at least 0, came -0.5 to 0.5"),
    (lambda x: left_half(x) / 0, "finite numbers"),
    (lambda x: left_half(x) * float("nan"), "finite numbers"),
    ("plates", "find as a function from pixels"),
])
def test_a_detector_that_gives_something_else_is_refused(find: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        pp.PrivateRegions(find).weights(images(0))


@pytest.mark.parametrize("share", [0, -0.1, 1.5, float("nan"), True, "half"])
def test_a_share_out_of_its_range_is_refused(share: Any) -> None:
    with pytest.raises(InputError, match="share as a number above 0 and up to 1"):
        pp.PrivateRegions(left_half, share)


def _z(count: int = 4) -> Tensor:
    return torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("loss", ["mse", "mse+ssim"])
def test_the_attackers_inside_and_the_model_count_alike(loss: str) -> None:
    private = pp.PrivateRegions(left_half, 0.7)
    plain, aimed = (SurrogateEnsemble((4, 4, 4), (3, 16, 16), SPECS, loss=loss, private=p)
                    for p in (None, private))
    z, pixels = _z(), images(3)
    weights = private.weights(pixels)
    for ensemble in (plain, aimed):
        ensemble.observe(z, pixels)
    errors = aimed.errors(z, pixels, precision="fp32")
    expected = torch.stack([reconstruction_error(pixels, guess, loss, weights)
                            for guess in plain.guesses(z, precision="fp32")])
    torch.testing.assert_close(errors, expected)
    mean = aimed.mean_image.expand_as(pixels)
    most = reconstruction_error(pixels, mean, loss, weights)
    torch.testing.assert_close(aimed.strongest(z, pixels, precision="fp32"),
                               torch.minimum(errors.min(0).values, most))
    torch.testing.assert_close(aimed.step(z, pixels, precision="fp32"), errors.mean(1))
    assert not torch.allclose(plain.step(z, pixels, precision="fp32"), errors.mean(1))


def test_the_attackers_inside_learn_the_region_first() -> None:
    """Everything counts on the left: the right is not learnt at all."""
    pixels = torch.rand(32, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    pixels = F.interpolate(pixels, size=(16, 16))
    z = pixels[:, :, ::4, ::4]
    errors: dict[bool, Tensor] = {}
    for aimed in (False, True):
        private = pp.PrivateRegions(left_half, 1.0) if aimed else None
        ensemble = SurrogateEnsemble((3, 4, 4), (3, 16, 16), SPECS, loss="mse", private=private)
        ensemble.observe(z, pixels)
        for _ in range(60):
            ensemble.step(z, pixels, precision="fp32")
        guess = ensemble.guesses(z, precision="fp32")[0]
        errors[aimed] = (guess - pixels).square().mean((0, 1, 2)).detach()
    plain, learned = errors[False], errors[True]
    assert learned[:8].mean() < 0.5 * learned[8:].mean()
    assert plain[8:].mean() < 0.5 * learned[8:].mean()


def _objective(private: Any) -> pp.PatrolObjective:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, 4, 1), torch.nn.ReLU(),
                                    torch.nn.Flatten(), torch.nn.Linear(64, 3))
    split = pp.Split(model, torch.zeros(1, 3, 16, 16), at="1")
    return pp.PatrolObjective(split, F.cross_entropy, beta=2.0, surrogates=SPECS,
                              precision="fp32", private=private)


def test_the_objective_hands_them_on_and_tells_the_share() -> None:
    private = pp.PrivateRegions(left_half, 0.7)
    plain, aimed = _objective(None), _objective(private)
    x, y = images(4, 6), torch.arange(6) % 3
    found = [objective.terms(x, y).adversarial for objective in (plain, aimed)]
    assert found[0] is not None and found[1] is not None
    expected = aimed.surrogates.strongest(aimed.split.edge(x), x, precision="fp32").mean()
    torch.testing.assert_close(found[1], expected)
    assert float(found[0]) != pytest.approx(float(found[1]), rel=1e-4)
    assert "private_share" not in plain.settings()  # what earlier releases saved goes on
    assert aimed.settings()["private_share"] == 0.7
    for other in (left_half, 0.5, pp.PrivateRegions):
        with pytest.raises(InputError, match="private as PrivateRegions"):
            _objective(other)


def test_a_detector_that_is_a_module() -> None:
    class Detector(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return left_half(x)

    detector = Detector().eval()
    private = pp.PrivateRegions(detector)
    assert torch.equal(private.weights(images(0)),
                       pp.PrivateRegions(left_half).weights(images(0)))
    with pytest.raises(InputError, match="in evaluation mode"):
        pp.PrivateRegions(detector.train()).masks(images(0))


def test_an_attack_that_is_after_regions() -> None:
    """What it is judged by on the way is weighted, and it is one an audit takes."""
    config = pp.InverseNetworkConfig(width=8, depth=1, epochs=2, batch_size=8, loss="mse+ssim",
                                     mirror=False, max_extensions=0, precision="fp32")
    private = pp.PrivateRegions(left_half, 1.0)
    pixels = images(6, 24)
    attack = pp.InverseNetwork(config, private=private)
    x, y = images(7), images(8)
    expected = reconstruction_error(x, y, "mse+ssim", private.weights(x)).mean()
    torch.testing.assert_close(attack._loss(x, y), expected)
    edge: Callable[[Tensor], Tensor] = lambda x: F.avg_pool2d(x, 4)  # noqa: E731
    record = attack.fit(Knowledge(pixels=pixels, z=edge(pixels), edge=edge))
    assert record.history[-1] < record.initial_loss
    with pytest.raises(InputError, match="private as PrivateRegions"):
        pp.InverseNetwork(config, private=left_half)  # type: ignore[arg-type]


def _audit(private: pp.PrivateRegions, **more: Any) -> pp.AuditReport:
    class Half(torch.nn.Module):
        edge = torch.nn.AvgPool2d(2)

    config = pp.InverseNetworkConfig(width=8, depth=1, epochs=2, batch_size=16, mirror=False,
                                     max_extensions=0, precision="fp32", family="transposed")
    seen: dict[str, Tensor] = {}
    more = {"attacks": ["linear_inverse"], **more}
    found = pp.audit(Half(), images(1, 48), images(2, 6), config=config, private=private,
                     observer=lambda subject, name, attack, guess: seen.update({name: guess}),
                     **more)
    found.seen = seen  # type: ignore[attr-defined]
    return found


def test_an_audit_tells_what_is_seen_of_regions_and_aims_at_them() -> None:
    x = images(2, 6)

    def find(pixels: Tensor) -> Tensor:  # in one of the victims' pictures nothing is private
        masks = left_half(pixels)
        return torch.where((pixels == x[3]).flatten(1).all(1).view(-1, 1, 1, 1), 0.0, masks)

    found = _audit(pp.PrivateRegions(find, 0.8))
    rows = {row["attack"]: row for row in found.records if row["subject"] == "edge"}
    assert list(rows) == ["linear_inverse", "aimed_ssim"]
    assert rows["aimed_ssim"]["box"] == "black"
    some = torch.tensor([0, 1, 2, 4, 5])
    for name, guess in found.seen.items():  # type: ignore[attr-defined]
        row = rows[name]
        alone = metrics.mse(x[some, ..., :8], guess[some, ..., :8]).mean()
        assert row["private_images"] == 5
        assert row["private_mse"] == pytest.approx(float(alone), rel=1e-4)
        weights = 2.0 * left_half(x[some])
        likeness = metrics.ssim_values(x[some], guess[some], weights).mean()
        assert row["private_ssim"] == pytest.approx(float(likeness), abs=1e-4)
    floor = [row for row in found.records if row["subject"] == "floor"]
    assert floor and all("private_ssim" in row for row in floor)
    assert {row["attack"]: row["private_mse"] for row in found.summary()}["linear_inverse"] == (
        rows["linear_inverse"]["private_mse"])
    aimed = found.setup["attacks"]["aimed_ssim"]["settings"]
    assert (aimed["family"], aimed["loss"], aimed["width"]) == ("residual", "mse+ssim", 8)
    assert found.setup["private_share"] == 0.8


def test_an_audit_that_was_told_of_no_regions_says_nothing_of_them() -> None:
    found = _audit(None)  # type: ignore[arg-type]
    assert [r["attack"] for r in found.records if r["subject"] == "edge"] == ["linear_inverse"]
    assert not any("private" in name for row in (*found.records, *found.summary()) for name in row)
    assert "private_share" not in found.setup


def test_an_audit_refuses_regions_before_any_work() -> None:
    with pytest.raises(InputError, match="private regions in some of the 6 victims' images"):
        _audit(pp.PrivateRegions(lambda x: torch.zeros_like(x[:, 0])))
    with pytest.raises(InputError, match="attacks of other names than aimed_ssim"):
        _audit(pp.PrivateRegions(left_half), attacks={"aimed_ssim": "linear_inverse"})
    with pytest.raises(InputError, match="private as PrivateRegions"):
        _audit(left_half)  # type: ignore[arg-type]
