"""The attackers inside: their loss, what they believe, and starting anew."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from patrol_prune import metrics
from patrol_prune.errors import InputError
from patrol_prune.surrogate import (
    SSIM_WEIGHT,
    SurrogateEnsemble,
    SurrogateSpec,
    reconstruction_error,
)

SPECS = (SurrogateSpec("residual", 8, 1), SurrogateSpec("transposed", 8))


def _pair(count: int = 6, side: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    pixels = torch.rand(count, 3, side, side, generator=g)
    return torch.randn(count, 4, side // 4, side // 4, generator=g), pixels


def _ensemble(**settings: object) -> SurrogateEnsemble:
    made = SurrogateEnsemble((4, 3, 3), (3, 12, 12), SPECS, **settings)
    made.observe(*_pair())
    return made


def test_the_error_is_made_of_the_metrics_that_judge() -> None:
    _, x = _pair()
    y = (0.7 * x + 0.1).clamp(0, 1)
    torch.testing.assert_close(reconstruction_error(x, y), metrics.mse(x, y))
    expected = metrics.mse(x, y) + SSIM_WEIGHT * (1 - metrics.ssim(x, y))
    torch.testing.assert_close(reconstruction_error(x, y, "mse+ssim"), expected)
    assert float(reconstruction_error(x, x, "mse+ssim").abs().max()) < 1e-5


def test_auto_takes_ssim_where_images_are_large_enough() -> None:
    assert _ensemble().loss == "mse+ssim"
    assert SurrogateEnsemble((4, 2, 2), (3, 8, 8), SPECS).loss == "mse"
    with pytest.raises(InputError, match="at least 11 pixels"):
        SurrogateEnsemble((4, 2, 2), (3, 8, 8), SPECS, loss="mse+ssim")
    with pytest.raises(InputError, match="out of auto, mse, mse.ssim, came 'msee'"):
        SurrogateEnsemble((4, 3, 3), (3, 12, 12), SPECS, loss="msee")


@settings(max_examples=20, deadline=None)
@given(loss=st.sampled_from(["mse", "mse+ssim"]), shift=st.floats(0.0, 0.5))
def test_nothing_counts_beyond_the_mean_image(loss: str, shift: float) -> None:
    z, pixels = _pair()
    ensemble = _ensemble(loss=loss)
    ensemble.mean_image.fill_(shift)
    counted = ensemble.strongest(z, pixels, precision="fp32")
    own = ensemble.errors(z, pixels, precision="fp32").min(0).values
    mean = torch.full_like(pixels, shift)
    expected = torch.minimum(own, reconstruction_error(pixels, mean, loss))
    torch.testing.assert_close(counted, expected)


def test_belief_is_the_figure_of_the_best_surrogate_on_each_image() -> None:
    z, pixels = _pair()
    ensemble = _ensemble().train()
    for _ in range(5):
        ensemble.step(z, pixels, precision="fp32")
    before = {k: v.clone() for k, v in ensemble.state_dict().items()}
    mse, ssim = ensemble.believed(z, pixels)
    assert ensemble.decoders[0].training
    assert all(torch.equal(v, before[k]) for k, v in ensemble.state_dict().items())
    guesses = [g.detach() for g in ensemble.eval().guesses(z, precision="fp32")]
    for image in range(len(z)):
        one = slice(image, image + 1)
        errors = [float(reconstruction_error(pixels[one], g[one], "mse+ssim")) for g in guesses]
        best = guesses[errors.index(min(errors))][one]
        torch.testing.assert_close(mse[one], metrics.mse(pixels[one], best))
        torch.testing.assert_close(ssim[one], metrics.ssim(pixels[one], best))


def test_the_strongest_is_asked_without_a_trace_in_the_decoders() -> None:
    """Its value and slope are those of training mode; what `step` learnt is left as it is."""
    z, pixels = _pair()
    ensemble = _ensemble().train()
    for _ in range(3):
        ensemble.step(z, pixels, precision="fp32")
    before = {k: v.clone() for k, v in ensemble.state_dict().items()}
    other = (3.0 * z).requires_grad_()
    found = ensemble.strongest(other, pixels, precision="fp32")
    (slope,) = torch.autograd.grad(found.sum(), other)
    assert all(torch.equal(v, before[k]) for k, v in ensemble.state_dict().items())
    assert all(m.momentum == 0.1 for m in ensemble.modules() if isinstance(m, nn.BatchNorm2d))
    own = ensemble.errors(other, pixels, precision="fp32").min(0).values
    mean = reconstruction_error(pixels, ensemble.mean_image.expand_as(pixels), ensemble.loss)
    assert torch.equal(found, torch.minimum(own, mean))
    assert torch.equal(slope, torch.autograd.grad(torch.minimum(own, mean).sum(), other)[0])
    ensemble.step(z, pixels, precision="fp32")
    moved = ensemble.state_dict()
    assert any(not torch.equal(moved[k], v) for k, v in before.items() if "running_mean" in k)


def test_a_state_without_the_size_of_batches_is_taken() -> None:
    ensemble, other = _ensemble(), _ensemble(seed=1)
    state = ensemble.state_dict()
    assert int(state.pop("standardizer.largest")) == 6
    other.load_state_dict(state)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in state.items())


def test_the_weakest_starts_anew_and_the_other_goes_on() -> None:
    z, pixels = _pair()
    ensemble = _ensemble()
    for _ in range(3):
        ensemble.step(z, pixels, precision="fp32")
    ensemble.running.copy_(torch.tensor([0.1, 0.2]))
    first, second = ({k: v.clone() for k, v in d.state_dict().items()} for d in ensemble.decoders)
    assert ensemble.renew_weakest() == 1
    now = ensemble.decoders[1].state_dict()
    assert all(torch.equal(v, first[k]) for k, v in ensemble.decoders[0].state_dict().items())
    weight = "head.weight"
    assert not torch.equal(now[weight], second[weight])
    assert not torch.equal(now[weight], _ensemble().decoders[1].state_dict()[weight])
    assert all(p not in ensemble.optimizer.state for p in ensemble.decoders[1].parameters())
    assert all(p in ensemble.optimizer.state for p in ensemble.decoders[0].parameters())
    ensemble.step(z, pixels, precision="fp32")
    assert torch.isfinite(ensemble.running).all()


def test_a_surrogate_that_never_trained_is_not_the_weakest() -> None:
    ensemble = _ensemble()
    ensemble.running.copy_(torch.tensor([0.1, float("inf")]))
    assert ensemble.renew_weakest() == 0
