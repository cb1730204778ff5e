"""Losses against the arithmetic written out, batches of identities, and training with both."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import patrol_prune as pp
from patrol_prune.data import ImageSet
from patrol_prune.errors import InputError
from patrol_prune.metric_learning import batch_hard_triplet, pk_order
from patrol_prune.models import SmallResNet
from patrol_prune.reid_model import add_bnneck, neck_of
from patrol_prune.reid_training import PKBatches, ReidLoss
from patrol_prune.surrogate import SurrogateSpec


def _model(identities: int = 4) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return add_bnneck(SmallResNet(3, width=4), identities)


def _images(identities: int = 4, each: int = 6, size: int = 16) -> ImageSet:
    """One shade per identity, with noise."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(identities).repeat_interleave(each)
    noise = torch.randint(0, 60, (len(labels), 3, size, size), generator=g)
    shade = (labels * 180 // identities).view(-1, 1, 1, 1)
    return ImageSet((noise + shade).to(torch.uint8), labels, tuple("abcdefgh"[:identities]))


def test_triplet_loss_of_points_on_a_line() -> None:
    f = torch.tensor([[0.0], [1.0], [3.0], [7.0]]).requires_grad_()
    y = torch.tensor([0, 0, 1, 1])
    # anchor 0: far 1, near 3; 1: far 1, near 2; 2: far 4, near 2; 3: far 4, near 6
    margin = 1.5
    expected = (0.0 + 0.5 + 3.5 + 0.0) / 4
    found = batch_hard_triplet(f, y, margin=margin)
    assert found.item() == pytest.approx(expected)
    found.backward()
    # d/df: anchor 1 adds (f1 - f0) - (f2 - f1), anchor 2 adds (f3 - f2) - (f2 - f1), over 4
    torch.testing.assert_close(f.grad.flatten(), torch.tensor([-1.0, 3.0, -3.0, 1.0]) / 4)


def test_triplet_loss_is_the_slow_double_loop() -> None:
    g = torch.Generator().manual_seed(5)
    f, y = torch.randn(12, 5, generator=g), torch.arange(12) % 3
    losses = []
    for a in range(12):
        d = (f - f[a]).square().sum(1).sqrt()
        same = (y == y[a]) & (torch.arange(12) != a)
        losses.append(max(0.0, float(d[same].max() - d[y != y[a]].min()) + 0.3))
    found = float(batch_hard_triplet(f, y, margin=0.3))
    assert found == pytest.approx(float(np.mean(losses)), rel=1e-5)


def test_triplet_loss_far_from_the_origin_is_that_at_it() -> None:
    f = 0.01 * torch.randn(64, 32, generator=torch.Generator().manual_seed(5))
    y = torch.arange(64) // 4
    near, far = f.clone().requires_grad_(), (f + 100.0).requires_grad_()
    losses = [batch_hard_triplet(features, y) for features in (near, far)]
    assert losses[1].item() == pytest.approx(losses[0].item(), abs=1e-4)
    slopes = [torch.autograd.grad(loss, at)[0]
              for loss, at in zip(losses, (near, far), strict=True)]
    assert float((slopes[1] - slopes[0]).abs().median()) < 1e-4


def test_a_batch_without_a_triplet_costs_nothing() -> None:
    f = torch.randn(3, 2)
    assert float(batch_hard_triplet(f, torch.tensor([0, 1, 2]))) == 0.0
    assert float(batch_hard_triplet(f, torch.tensor([0, 0, 0]))) == 0.0


def test_the_loss_is_smoothed_cross_entropy_and_triplets_before_the_neck() -> None:
    model = _model().train()
    x, y = torch.randn(8, 3, 16, 16), torch.arange(8) // 2
    headless = copy.deepcopy(model)
    headless.fc = nn.Identity()
    with ReidLoss(model, margin=0.4, triplet_weight=0.5) as loss:
        logits = model(x)
        found = loss(logits, y)
    log_p = logits.log_softmax(1)
    own = log_p[torch.arange(8), y]
    entropy = -(0.9 * own + 0.1 * log_p.mean(1)).mean()
    expected = entropy + 0.5 * batch_hard_triplet(headless(x), y, margin=0.4)
    torch.testing.assert_close(found, expected)
    assert not neck_of(model)._forward_hooks


def test_the_loss_wants_a_fresh_pass_of_its_model() -> None:
    model = _model().train()
    x, y = torch.randn(4, 3, 16, 16), torch.arange(4) // 2
    loss = ReidLoss(model)
    logits = model(x)
    loss(logits, y)
    with pytest.raises(InputError, match="came none"):
        loss(logits, y)
    model(x[:2])
    with pytest.raises(InputError, match="came 2"):
        loss(logits, y)
    model(x)  # a graph hangs on the tap: copies and pickles leave it behind
    assert copy.deepcopy(model)(x).shape == logits.shape
    assert pickle.loads(pickle.dumps(model)).eval()(x).shape == logits.shape
    loss.close()
    with pytest.raises(InputError, match="smoothing"):
        ReidLoss(model, smoothing=1.0)
    assert not neck_of(model)._forward_hooks


def test_batches_hold_p_identities_with_k_images_each() -> None:
    images = _images(6, 5)
    batches = PKBatches(images, 3, 4, seed=2)
    assert len(batches) == 30 // 12
    seen = list(batches)
    assert len(seen) == len(batches)
    for x, y in seen:
        assert x.shape == (12, 3, 16, 16)
        _, counts = y.unique(return_counts=True)
        assert counts.tolist() == [4, 4, 4]
    order = pk_order(images.labels, 3, 4, 50, seed=0)
    assert all(len(set(row.tolist())) == 12 for row in order)  # five images for four places


def test_an_identity_with_few_images_repeats_them_and_too_few_identities_are_refused() -> None:
    images = _images(3, 2)
    _, y = next(iter(PKBatches(images, 2, 4)))
    assert sorted(y.unique(return_counts=True)[1].tolist()) == [4, 4]
    with pytest.raises(InputError, match="at least 4 identities"):
        PKBatches(images, 4, 2)
    with pytest.raises(InputError, match="at least 2 identities and 2 images"):
        PKBatches(images, 2, 1)


def test_an_epoch_is_repeatable_and_the_global_generators_stay() -> None:
    images = _images()
    batches = PKBatches(images, 2, 3, augment=True, seed=1)
    np.random.seed(3)  # noqa: NPY002
    numpy_before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    batches.set_epoch(4)
    first = list(batches)
    second = list(batches)
    batches.set_epoch(4)
    for (x, y), (x2, y2) in zip(first, batches, strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)
    assert any(not torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_before)


def test_it_learns_with_the_privacy_term_and_is_scored() -> None:
    model, images = _model(), _images()
    teacher = copy.deepcopy(model)
    split = pp.Split(model, torch.zeros(1, 3, 16, 16), at="layer2")
    with ReidLoss(model, margin=3.0) as loss:
        objective = pp.PatrolObjective(split, loss, beta=1.0, surrogates=(
            SurrogateSpec("residual", 8, 1),), precision="fp32")
        batches = PKBatches(images, 3, 4)
        importance = pp.PatrolImportance(objective)
        for x, y in batches:
            terms = importance.accumulate(x, y)
        assert (terms.task - F.cross_entropy(terms.logits, y, label_smoothing=0.1)).item() > 0.1
        config = pp.FinetuneConfig(epochs=6, lr=0.05, surrogate_warmup_steps=2, inner_steps=1,
                                   precision="fp32", distill_weight=0.1)
        history = pp.finetune(split, batches, objective=objective, config=config, teacher=teacher,
                              progress=False).history
    assert history[-1]["task"] < 0.8 * history[0]["task"]
    assert set(importance.scores) and not neck_of(model)._forward_hooks
