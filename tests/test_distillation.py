"""Distances to the teacher, and that nothing of them stays behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import patrol_prune as pp
from patrol_prune.distillation import Distiller, feature_distance, logit_distance
from patrol_prune.errors import InputError
from patrol_prune.lipschitz import LipschitzForm


def _net(width: int = 5) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(width)
        return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


def test_logit_distance_is_the_divergence_written_out() -> None:
    own, target = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[0.0, 2.0, 0.5]])
    p, q = (target / 2).softmax(1), (own / 2).softmax(1)
    expected = 4 * (p * (p / q).log()).sum()
    torch.testing.assert_close(logit_distance(own, target, 2.0), expected)
    assert float(logit_distance(own, own, 2.0)) == pytest.approx(0.0, abs=1e-6)


def test_feature_distance_ends() -> None:
    t = torch.tensor([[3.0, 4.0]])
    assert float(feature_distance(t, t)) == 0.0
    assert float(feature_distance(torch.zeros_like(t), t)) == 1.0


def test_features_are_what_the_last_layers_read() -> None:
    model, teacher, x = _net(), _net(), torch.randn(6, 4)
    with torch.no_grad():
        teacher[0].weight.add_(0.1)
    distiller = Distiller(model, teacher, 4.0, features=True)
    assert not model[2]._forward_pre_hooks and not teacher[2]._forward_pre_hooks
    distiller.attach()
    logits = model(x)
    distance, features = distiller(x, logits)
    own, theirs = F.relu(model[0](x)), F.relu(teacher[0](x)).detach()
    torch.testing.assert_close(features, feature_distance(own, theirs))
    torch.testing.assert_close(distance, logit_distance(logits, teacher(x), 4.0))
    features.backward()
    assert model[0].weight.grad is not None and teacher[0].weight.grad is None
    distiller.close()
    assert not model[2]._forward_pre_hooks and not teacher[2]._forward_pre_hooks


def test_other_widths_and_models_without_a_linear_layer_are_refused() -> None:
    model, other = _net(5), _net(6)
    distiller = Distiller(model, other, 4.0, features=True)
    distiller.attach()
    x = torch.randn(2, 4)
    with pytest.raises(InputError, match=r"came \(2, 5\) and the teacher's \(2, 6\)"):
        distiller(x, model(x))
    distiller.close()
    with pytest.raises(InputError, match="with none"):
        Distiller(nn.Conv2d(3, 3, 1), _net(5), 4.0, features=True)
    assert not _net(5)[2]._forward_pre_hooks


@pytest.mark.parametrize("form", ["scale_free", "spectral"])
@pytest.mark.parametrize("images", [3, 6])
@pytest.mark.parametrize("halves", [False, True])
def test_a_lipschitz_term_that_runs_the_edge_again_leaves_the_features(
    form: LipschitzForm, images: int, halves: bool
) -> None:
    """A model that equals its teacher is at no distance, on more images than the term takes too."""
    layers = [nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 6), nn.Tanh(), nn.Linear(6, 6),
              nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)]
    x = torch.randn(images, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    if halves:
        split = pp.Split.from_modules(nn.Sequential(*layers[:7]), nn.Sequential(*layers[7:]), x)
    else:
        split = pp.Split(nn.Sequential(*layers), x, at="6")
    objective = pp.PatrolObjective(split, F.cross_entropy, alpha=0.1, lipschitz_form=form,
                                   lipschitz_images=4)
    teacher = copy.deepcopy(split.model)
    result = pp.finetune(split, [(x, torch.arange(images) % 3)], objective=objective,
                         config=pp.FinetuneConfig(epochs=1, feature_weight=1.0, precision="fp32"),
                         teacher=teacher, progress=False)
    assert result.history[0]["lipschitz"] > 0
    # rounding alone: some processors sum a larger batch in another order
    assert result.history[0]["features"] < 1e-12
    hooked = [*split.model.modules(), *teacher.modules(), split.cloud]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hooked)
