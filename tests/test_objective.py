"""Surrogates and the objective: signs, caps, and who gets which gradient."""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F

import patrol_prune as pp
from patrol_prune.errors import InputError, UnsupportedModelError
from patrol_prune.objective import PatrolObjective
from patrol_prune.pixels import Normalization
from patrol_prune.spectral import SpectralBounds
from patrol_prune.surrogate import SURROGATE_SETS, SurrogateEnsemble, SurrogateSpec

SPECS = (SurrogateSpec("residual", 8, 1), SurrogateSpec("transposed", 8))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 4, 3, 2, 1)
        self.fc = nn.Linear(4 * 16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(h, 1))


def _split(seed: int = 0) -> pp.Split:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return pp.Split(Net(), torch.zeros(1, 3, 8, 8), at="conv2")


def _batch(count: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, 8, 8, generator=g), torch.arange(count) % 3


def _objective(split: pp.Split, **settings: object) -> PatrolObjective:
    defaults: dict = dict(alpha=0.1, beta=2.0, surrogates=SPECS, precision="fp32")
    return PatrolObjective(split, F.cross_entropy, **{**defaults, **settings})


def test_the_total_has_the_signs_of_the_method() -> None:
    split = _split()
    split.model.eval()
    x, y = _batch()
    terms = _objective(split).terms(x, y)
    assert terms.lipschitz is not None and terms.adversarial is not None
    assert float(terms.lipschitz) > 0 and float(terms.adversarial) > 0
    expected = F.cross_entropy(split.model(x), y) + terms.lipschitz - 2.0 * terms.adversarial
    torch.testing.assert_close(terms.total, expected)
    halved = _objective(split).terms(x, y, beta_scale=0.5)
    assert halved.adversarial is not None and halved.lipschitz is not None
    torch.testing.assert_close(halved.total,
                               halved.task + halved.lipschitz - halved.adversarial)


def test_a_step_down_the_total_hurts_the_attacker() -> None:
    split = _split()
    x, y = _batch()
    objective = _objective(split, alpha=0.0, beta=1e4)
    objective.fit_surrogates([(x, y)], 60)
    before = objective.terms(x, y)
    before.total.backward()
    with torch.no_grad():
        for p in split.edge.parameters():
            if p.grad is not None:
                p -= 1e-3 * p.grad / p.grad.norm().clamp_min(1e-9)
    after = objective.terms(x, y)
    assert before.adversarial is not None and after.adversarial is not None
    assert float(after.adversarial) > float(before.adversarial.detach())


def test_a_named_set_of_surrogates_is_the_specs_it_stands_for() -> None:
    named = _objective(_split(), surrogates="large", beta=1.0)
    given = _objective(_split(), surrogates=SURROGATE_SETS["large"], beta=1.0)
    assert [d.trunk_size for d in named.surrogates.decoders] == [
        d.trunk_size for d in given.surrogates.decoders]
    own, other = (o.surrogates.state_dict() for o in (named, given))
    assert all(torch.equal(own[k], other[k]) for k in own)
    assert len(named.surrogates.decoders) == 3 and named.specs == given.specs
    with pytest.raises(InputError, match="one of usual, large, .* Did you mean: large"):
        _objective(_split(), surrogates="lagre")


def test_terms_of_weight_zero_are_left_out() -> None:
    split = _split()
    x, y = _batch()
    terms = _objective(split, alpha=0.0, beta=0.0).terms(x, y)
    assert terms.lipschitz is None and terms.adversarial is None
    assert terms.total is terms.task


def test_the_outer_step_never_trains_the_attackers() -> None:
    split = _split()
    x, y = _batch()
    objective = _objective(split)
    objective.terms(x, y).total.backward()
    assert all(p.grad is None for p in objective.surrogates.decoders.parameters())
    assert all(p.requires_grad for p in objective.surrogates.decoders.parameters())
    assert all(p.grad is not None for p in split.edge.parameters())
    edge = {n: p.detach().clone() for n, p in split.edge.named_parameters()}
    decoder = objective.surrogates.decoders[0]
    weight = next(decoder.parameters()).detach().clone()
    z = split.edge(x)
    objective.update_surrogates(z, x)
    assert not torch.equal(weight, next(decoder.parameters()))
    assert all(torch.equal(edge[n], p) for n, p in split.edge.named_parameters())


def test_the_error_of_the_best_surrogate_counts_per_image_up_to_the_mean_image() -> None:
    ensemble = SurrogateEnsemble((4, 4, 4), (3, 8, 8), SPECS).eval()
    g = torch.Generator().manual_seed(2)
    z, pixels = torch.randn(10, 4, 4, 4, generator=g), torch.rand(10, 3, 8, 8, generator=g)
    ensemble.observe(z, pixels)
    torch.testing.assert_close(ensemble.mean_image, pixels.mean(0))
    errors = ensemble.errors(z, pixels, precision="fp32")
    ceiling = (pixels - pixels.mean(0)).square().flatten(1).mean(1)
    strongest = ensemble.strongest(z, pixels, precision="fp32")
    for image in range(10):
        expected = min(float(errors[0, image]), float(errors[1, image]), float(ceiling[image]))
        assert float(strongest[image]) == pytest.approx(expected, rel=1e-5)


def test_scaling_the_feature_hides_nothing() -> None:
    ensemble = SurrogateEnsemble((4, 4, 4), (3, 8, 8), SPECS).eval()
    other = SurrogateEnsemble((4, 4, 4), (3, 8, 8), SPECS).eval()
    g = torch.Generator().manual_seed(2)
    z, pixels = torch.randn(10, 4, 4, 4, generator=g), torch.rand(10, 3, 8, 8, generator=g)
    ensemble.observe(z, pixels)
    other.observe(1000.0 * z, pixels)
    torch.testing.assert_close(ensemble.errors(z, pixels, precision="fp32"),
                               other.errors(1000.0 * z, pixels, precision="fp32"),
                               rtol=1e-3, atol=1e-4)


def test_surrogates_learn_to_invert_an_undefended_edge() -> None:
    split = _split()
    x, y = _batch(32)
    objective = _objective(split)
    first = objective.fit_surrogates([(x, y)], 1)
    last = objective.fit_surrogates([(x, y)], 150)
    assert last < 0.5 * first
    floor = float((x - x.mean(0)).square().mean())
    assert last < floor


def test_fitting_leaves_modes_statistics_and_global_generator() -> None:
    split = _split()
    split.model.train()
    split.model.bn1.eval()
    running = split.model.bn1.running_mean.clone()
    state = torch.get_rng_state()
    objective = _objective(split)
    objective.fit_surrogates([_batch()], 2)
    objective.terms(*_batch())
    assert split.model.conv1.training and not split.model.bn1.training
    assert torch.equal(running, split.model.bn1.running_mean)
    assert torch.equal(state, torch.get_rng_state())


def test_belief_is_the_mean_over_all_images_and_nothing_learns() -> None:
    split = _split()
    objective = _objective(split)
    x, _ = _batch()
    objective.fit_surrogates([(x, _)], 3)
    before = {k: v.clone() for k, v in objective.surrogates.state_dict().items()}
    belief = objective.belief([(x[:5], _[:5]), (x[5:], _[5:])])
    split.model.eval()
    mse = objective.surrogates.believed(split.edge(x), x)[0]
    assert belief.mse == pytest.approx(float(mse.mean()), rel=1e-4)
    assert belief.ssim != belief.ssim  # images of 8 pixels have none
    after = objective.surrogates.state_dict()
    assert all(torch.equal(v, before[k]) for k, v in after.items())
    with pytest.raises(InputError, match="came none"):
        objective.belief([])


def test_pixels_are_compared_whatever_the_model_eats() -> None:
    split = _split()
    normal = Normalization((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    pixels, y = _batch()
    objective = _objective(split, alpha=0.0, normalization=normal)
    terms = objective.terms(normal.to_input(pixels), y)
    z = split.edge(normal.to_input(pixels))
    expected = objective.surrogates.strongest(z, pixels, precision="fp32").mean()
    torch.testing.assert_close(terms.adversarial, expected, rtol=1e-4, atol=1e-6)


def test_bad_settings_are_refused() -> None:
    split = _split()
    with pytest.raises(InputError, match="beta as a number of at least 0"):
        _objective(split, beta=-1.0)
    with pytest.raises(InputError, match="lipschitz_form out of scale_free, paper, spectral"):
        _objective(split, lipschitz_form="papr")
    with pytest.raises(InputError, match="at least one surrogate"):
        SurrogateEnsemble((4, 4, 4), (3, 8, 8), ())
    with pytest.raises(InputError, match="came none"):
        _objective(split).fit_surrogates([], 3)


def test_the_spectral_form_is_the_bound_of_every_block() -> None:
    split = _split()
    x, y = _batch()
    objective = _objective(split, beta=0.0, lipschitz_form="spectral", seed=5)
    before = objective.generator.get_state()
    terms = objective.terms(x, y)
    bounds = SpectralBounds(split.blocks, x, seed=5)
    assert terms.block_lipschitz is not None and terms.lipschitz is not None
    torch.testing.assert_close(terms.block_lipschitz, bounds(), rtol=1e-2, atol=0.0)
    torch.testing.assert_close(terms.lipschitz, 0.1 * terms.block_lipschitz.sum())
    assert torch.equal(objective.generator.get_state(), before)
    terms.total.backward()
    assert all(p.grad is not None for p in (split.model.conv1.weight, split.model.bn1.weight))


def test_the_spectral_form_follows_a_pruned_edge() -> None:
    split = _split()
    split.model.eval()
    x, y = _batch()
    objective = _objective(split, beta=0.0, lipschitz_form="spectral")
    wide, scores = objective.spectral, tp.importance.GroupMagnitudeImportance()
    pp.PatrolPruner(split.model, x, scores, split=split, edge_macs=0.6).step()
    assert objective.spectral is not wide and objective.spectral is objective.spectral
    terms = objective.terms(x, y)
    fresh = _objective(split, beta=0.0, lipschitz_form="spectral").terms(x, y)
    assert terms.block_lipschitz is not None and fresh.block_lipschitz is not None
    assert torch.equal(terms.block_lipschitz, fresh.block_lipschitz)


def test_the_spectral_form_scores_channels() -> None:
    split = _split()
    split.model.eval()
    importance = pp.PatrolImportance(_objective(split, beta=0.0, lipschitz_form="spectral"))
    importance.accumulate(*_batch())
    changes = importance.raw["lipschitz"]
    assert any(bool(v.any()) for v in changes.values())
    assert all(bool((v <= 0).all()) for v in changes.values())  # a removal never raises a norm


def test_an_edge_the_spectral_form_cannot_read_is_refused_at_once() -> None:
    split = _split()
    split.model.bn1 = nn.GroupNorm(2, 6)
    split.refresh()
    with pytest.raises(UnsupportedModelError, match=r"GroupNorm \(bn1\)"):
        _objective(split, lipschitz_form="spectral")
    _objective(split, lipschitz_form="spectral", alpha=0.0)
