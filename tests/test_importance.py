"""Scores: the right sign, the right size, and the right channel after the model has shrunk."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch_pruning as tp
from pruning_helpers import CifarResNet, HandMadeObjective, cifar_resnet
from torch import Tensor, nn
from torch.nn import functional

from patrol_prune.errors import InputError
from patrol_prune.importance import PatrolImportance, combine_terms
from patrol_prune.masks import SoftMasks
from patrol_prune.objective import PatrolObjective
from patrol_prune.predicted_change import first_order_change, second_order_change
from patrol_prune.split import Split


def batch(n: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 16, 16, generator=g), torch.randint(0, 10, (n,), generator=g)


def scored(
    at: str = "layer2", batches: int = 1, **kwargs: object
) -> tuple[CifarResNet, Split, PatrolImportance]:
    model = cifar_resnet(width=8)
    split = Split(model, torch.randn(1, 3, 16, 16), at=at)
    importance = PatrolImportance(HandMadeObjective(split), **kwargs)
    for i in range(batches):
        importance.accumulate(*batch(seed=i))
    return model, split, importance


def real_changes(split: Split, masks: SoftMasks, name: str, low: float) -> dict[str, Tensor]:
    """Term -> `[C]` change when each channel's mask goes from 1 to `low`, one after the other."""
    objective = HandMadeObjective(split)
    x, y = batch()

    def terms() -> dict[str, float]:
        with torch.no_grad():
            t = objective.terms(x, y, masks=masks)
        return {k: float(getattr(t, k)) for k in ("task", "lipschitz", "adversarial")}

    before = terms()
    changes: dict[str, list[float]] = {k: [] for k in before}
    for c in range(len(masks.channels[name])):
        values = torch.ones(len(masks.channels[name]))
        values[c] = low
        masks.set(name, values)
        for k, v in terms().items():
            changes[k].append(v - before[k])
    masks.set(name, 1.0)
    return {k: torch.tensor(v) for k, v in changes.items()}


def test_formula() -> None:
    task, lip, adv = torch.tensor([-2.0]), torch.tensor([3.0]), torch.tensor([5.0])
    score = combine_terms(task, lip, adv, task_weight=1.0, lip_weight=10.0, adv_weight=100.0)
    assert score.item() == -2.0 + 30.0 - 500.0
    assert first_order_change(torch.tensor([4.0]), torch.tensor([0.5])).item() == -2.0


@pytest.mark.parametrize("name", ["layer1.0.conv1", "layer2.0.conv1"])
def test_first_order_terms_are_the_derivative(name: str) -> None:
    """Against central differences around 1, scaled up to a removal.

    A float32 loss has steps of about 2e-7: a small eps drowns the difference in them.
    """
    _, split, importance = scored(normalizer=None, task_change="absolute")
    eps = 5e-2
    lower = real_changes(split, importance.masks, name, 1.0 - eps)
    upper = real_changes(split, importance.masks, name, 1.0 + eps)
    for term, values in importance.raw.items():
        expected = (lower[term] - upper[term]) / (2 * eps)
        expected = expected.abs() if term == "task" else expected
        assert torch.allclose(values[name], expected, rtol=0.2, atol=2e-2 * expected.abs().max())


def test_every_image_has_its_own_gradient() -> None:
    """One backward pass for the whole batch against one for each image alone."""
    model, split, importance = scored()
    masks = importance.masks
    x, y = batch()
    with masks.attached(), masks.per_image(len(x)) as copies:
        loss = functional.cross_entropy(model(x), y)
        shares = torch.autograd.grad(loss, copies)
    for i in range(len(x)):
        with masks.attached():
            loss = functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
            alone = torch.autograd.grad(loss, masks.parameters())
        for share, whole in zip(shares, alone, strict=True):
            assert torch.allclose(share[i] * len(x), whole, atol=1e-5 * float(whole.abs().max()))


def test_masks_per_image_change_no_bit_and_end_with_their_block() -> None:
    model, _, importance = scored()
    masks, (x, _) = importance.masks, batch()
    bare = model(x)
    with masks.attached(), masks.per_image(len(x)) as copies:
        assert torch.equal(model(x), bare)
        copies[0].data[3] = 0.0  # a mask of one image touches no other
        changed = (model(x) != bare).any(1)
    assert changed.tolist() == [i == 3 for i in range(len(x))]
    with masks.attached():
        assert torch.equal(model(x), bare)


class Rows(nn.Module):
    """Two rows per image, then none that belongs to one image alone."""

    def __init__(self, is_mixed: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)
        self.is_mixed = is_mixed

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(torch.relu(self.a(x.flatten(0, 1)))).relu()
        h = h.view(len(x), 2, -1).mean(1)
        return self.c(h.sum(0, keepdim=True) if self.is_mixed else h)


@pytest.mark.parametrize("is_mixed", [False, True])
def test_shares_add_up_to_the_gradient_whatever_the_rows(is_mixed: bool) -> None:
    torch.manual_seed(0)
    model, x = Rows(is_mixed), torch.randn(3, 2, 4)
    masks = SoftMasks(model, x[:1])
    with masks.attached():
        whole = torch.autograd.grad(model(x).square().sum(), masks.parameters())
        with masks.per_image(3) as copies:
            shares = torch.autograd.grad(model(x).square().sum(), copies)
    assert len(whole) == 2
    for share, gradient in zip(shares, whole, strict=True):
        assert torch.allclose(share.sum(0), gradient, rtol=1e-4, atol=1e-6)


def test_second_order_change_is_exact_where_it_can_be() -> None:
    """Of the mean of `(a_i m - 1)^2 / 2` at m, with g_i^2 equal to the curvature: a parabola."""
    mask = torch.tensor([0.8])
    shares = torch.tensor([[0.3], [-0.1]]) / 2  # g_1 = 0.3, g_2 = -0.1, g = 0.1
    expected = -0.1 * 0.8 + (0.3**2 + 0.1**2) / 2 * 0.8**2 / 2
    assert second_order_change(shares, mask).item() == pytest.approx(expected)
    assert second_order_change(shares.repeat(4, 1) / 4, mask).item() == pytest.approx(expected)


def test_the_curvature_ranks_channels_that_the_gradient_cannot() -> None:
    """At the minimum of the task loss the mean gradient is nothing, and every image's is not."""
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    scale = torch.linspace(0.2, 3.0, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(8))
        model[0].bias.zero_()
        model[1].weight.copy_(torch.stack([scale, -scale]) / 2)
        model[1].bias.zero_()
    with torch.no_grad():  # labels drawn from the model: it is the minimum of their cross-entropy
        y = torch.distributions.Categorical(logits=model(x)).sample()
    masks = SoftMasks(model, x[:1])
    (mask,) = masks.channels.values()
    real = []
    with torch.no_grad(), masks.attached():
        whole = functional.cross_entropy(model(x), y)
        for c in range(8):
            masks.zero({"0": [c]})
            real.append(float(functional.cross_entropy(model(x), y) - whole))
            masks.set("0", 1.0)
    with masks.attached(), masks.per_image(len(x)) as copies:
        (shares,) = torch.autograd.grad(functional.cross_entropy(model(x), y), copies)
    ranks = [torch.as_tensor(v).argsort().argsort().float() for v in
             (second_order_change(shares, mask.detach()), real,
              first_order_change(shares.sum(0), mask.detach()).abs())]
    agreement = torch.corrcoef(torch.stack(ranks))[1]
    assert agreement[0] > 0.9 > agreement[2]


def test_the_objectives_own_weights() -> None:
    model = cifar_resnet(width=8)
    split = Split(model, torch.randn(1, 3, 16, 16), at="layer2")
    objective = HandMadeObjective(split)
    objective.beta = 7.0
    importance = PatrolImportance(objective, normalizer="objective")
    importance.accumulate(*batch())
    raw = importance.raw
    for name, score in importance.scores.items():
        expected = raw["task"][name] + raw["lipschitz"][name] - 7.0 * raw["adversarial"][name]
        assert torch.allclose(score, expected, atol=1e-6)


def test_scores_rank_like_real_removal() -> None:
    """The slow oracle: zero each channel for real; same sign where it matters, same order."""
    _, split, importance = scored()
    crossing = [n for n, g in importance.masks.table.groups.items() if g.crossing]
    real = real_changes(split, importance.masks, crossing[0], 0.0)
    predicted = importance.raw["lipschitz"][crossing[0]]
    big = real["lipschitz"].abs() > 0.3 * real["lipschitz"].abs().max()
    assert (predicted[big].sign() == real["lipschitz"][big].sign()).all()
    ranks = [v.argsort().argsort().float() for v in (predicted, real["lipschitz"])]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.8


class Two(nn.Module):
    """Channel 0 carries the picture to the cloud, channel 1 a constant; the task reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.head = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([1.0, 0.0]).view(2, 1, 1, 1))
            self.conv.bias.copy_(torch.tensor([0.0, 1.0]))
            self.head.weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3)))


class Attacker:
    """Guesses the picture as channel 0: exact, so removing channel 0 costs him everything."""

    def __init__(self, split: Split, gain: float) -> None:
        self.split, self.gain = split, gain

    def terms(self, x: Tensor, y: Tensor, *, masks: SoftMasks) -> object:
        z, logits = masks.split_forward(x)
        task = functional.cross_entropy(logits, y)
        adversarial = (x - self.gain * z[:, :1]).square().mean()
        names = {"task": task, "lipschitz": None, "adversarial": adversarial}
        return type("Terms", (), names)()


def test_a_channel_that_helps_the_attacker_loses_score() -> None:
    model = Two()
    x, y = torch.rand(16, 1, 4, 4), torch.zeros(16, dtype=torch.long)
    split = Split(model, x[:1], at="conv")
    with_attack, without = (
        PatrolImportance(Attacker(split, 0.5), adv_weight=w) for w in (1.0, 0.0)
    )
    for importance in (with_attack, without):
        importance.accumulate(x, y)
    name = next(iter(with_attack.scores))
    change = with_attack.raw["adversarial"][name]
    assert change[0] > 0 and change[1] == 0
    gain = with_attack.scores[name] - without.scores[name]
    assert gain[0] < 0 and gain[1] == 0
    harmful = PatrolImportance(Attacker(split, 2.0))  # he overshoots: removal would help him
    harmful.accumulate(x, y)
    assert harmful.raw["adversarial"][name][0] < 0
    assert harmful.scores[name][0] > without.scores[name][0]


def test_terms_are_normalised_over_the_edge() -> None:
    _, _, importance = scored()
    edge = [n for n, g in importance.masks.table.groups.items() if g.location == "edge"]
    for values in importance.terms.values():
        assert torch.cat([values[n] for n in edge]).abs().mean().item() == pytest.approx(1.0)
    assert importance.terms["adversarial"]["layer3.0.conv1"].abs().max() == 0
    weighted = {n: importance.terms["task"][n] for n in edge}
    for n in edge:
        total = weighted[n] + importance.terms["lipschitz"][n] - importance.terms["adversarial"][n]
        assert torch.allclose(importance.scores[n], total)


def test_batches_are_averaged_and_the_task_term_is_not_cancelled() -> None:
    _, split, both = scored(batches=2, normalizer=None, task_change="absolute")
    each = []
    for i in range(2):
        one = PatrolImportance(both.objective, normalizer=None, task_change="absolute")
        one.accumulate(*batch(seed=i))
        each.append(one.raw)
    for term in both.raw:
        for name, values in both.raw[term].items():
            mean = (each[0][term][name] + each[1][term][name]) / 2
            assert torch.allclose(values, mean, atol=1e-6)
    assert all((v >= 0).all() for v in both.raw["task"].values())


def test_terms_that_are_off_are_zero() -> None:
    model = cifar_resnet(width=8)
    split = Split(model, torch.randn(1, 3, 16, 16), at="layer2")
    objective = HandMadeObjective(split, lipschitz=False, adversarial=False)
    importance = PatrolImportance(objective)
    importance.accumulate(*batch())
    for name, score in importance.scores.items():
        assert torch.equal(score, importance.terms["task"][name])


def test_accumulate_leaves_the_model_as_found() -> None:
    model = cifar_resnet(width=8)
    split = Split(model, torch.randn(1, 3, 16, 16), at="layer2")
    model.train()
    model.layer2.eval()
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    for training in (False, True):
        importance = PatrolImportance(HandMadeObjective(split), training=training)
        with torch.no_grad():
            importance.accumulate(*batch())
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(grads) == {"fc.weight"} and (grads["fc.weight"] == 1).all()
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("order", ["before", "after"])
def test_scores_follow_the_channels_that_survive(order: str) -> None:
    """Prune in two steps through Torch-Pruning; every survivor keeps its score."""
    if order == "before":
        model, split, importance = scored()
        x = split.example_inputs
        graph = tp.DependencyGraph().build_dependency(model, x)
    else:  # the graph has a history from before the calibration
        model = cifar_resnet(width=8)
        graph = tp.DependencyGraph().build_dependency(model, torch.randn(1, 3, 16, 16))
        graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, [7, 2]).prune()
        split = Split(model, torch.randn(1, 3, 16, 16), at="layer2")
        importance = PatrolImportance(HandMadeObjective(split))
        importance.accumulate(*batch())
    original = {n: s.clone() for n, s in importance.scores.items()}
    name = importance.masks.table.members_of(model.conv1, "out")[0][0]
    alive = list(range(len(original[name])))
    for gone in ([0, 3], [1]):
        graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, gone).prune()
        alive = [c for i, c in enumerate(alive) if i not in gone]
        for group in graph.get_all_groups(ignored_layers=[model.fc]):
            root = group[0].dep.target.module
            score = importance(group)
            assert score is not None and len(score) == root.weight.shape[0]
            if any(item.dep.target.module is model.conv1 for item in group):
                assert torch.equal(score, original[name][alive])
    partial = graph.get_pruning_group(model.layer1[0].conv1, tp.prune_conv_out_channels, [5, 2])
    assert torch.equal(importance(partial), original["layer1.0.conv1"][[5, 2]])


def test_a_model_pruned_behind_its_back_is_refused() -> None:
    model, split, importance = scored()
    x = split.example_inputs
    other = tp.DependencyGraph().build_dependency(model, x)
    other.get_pruning_group(model.conv1, tp.prune_conv_out_channels, [0]).prune()
    fresh = tp.DependencyGraph().build_dependency(model, x)
    group = next(iter(fresh.get_all_groups(ignored_layers=[model.fc])))
    with pytest.raises(InputError, match="accumulate"):
        importance(group)
    split.refresh()
    importance.accumulate(*batch())
    score = importance(group)
    assert score is not None and len(score) == group[0].dep.target.module.weight.shape[0]


def test_groups_without_a_score() -> None:
    model, split, importance = scored()
    graph = tp.DependencyGraph().build_dependency(model, split.example_inputs)
    group = graph.get_pruning_group(model.fc, tp.prune_linear_out_channels, list(range(10)))
    assert importance(group) is None


def test_bad_input() -> None:
    model = cifar_resnet(width=8)
    split = Split(model, torch.randn(1, 3, 16, 16), at="layer2")
    objective = HandMadeObjective(split)
    importance = PatrolImportance(objective)
    x, y = batch()
    with pytest.raises(InputError, match="calibration data"):
        _ = importance.scores
    with pytest.raises(InputError, match="at least one"):
        importance.accumulate(x[:0], y[:0])
    with pytest.raises(InputError, match="one label per input"):
        importance.accumulate(x, y[:3])
    with pytest.raises(InputError, match="from 0 to 9, came"):
        importance.accumulate(x, y + 10)
    with pytest.raises(InputError, match="task term is nan"):
        importance.accumulate(x * float("nan"), y)
    with pytest.raises(InputError, match="calibration data"):
        _ = importance.scores
    with pytest.raises(InputError, match="normalizer"):
        PatrolImportance(objective, normalizer="means")
    with pytest.raises(InputError, match="at least 0"):
        PatrolImportance(objective, adv_weight=-1.0)
    with pytest.raises(InputError, match="second_order"):
        PatrolImportance(objective, task_change="third_order")


def test_with_the_real_objective() -> None:
    model = cifar_resnet(width=8)
    split = Split(model, torch.randn(1, 3, 16, 16), at="layer2")
    objective = PatrolObjective(split, functional.cross_entropy, alpha=0.01, beta=1.0)
    importance = PatrolImportance(objective)
    x, y = batch(4)
    importance.accumulate(x, y)
    for values in importance.terms.values():
        assert torch.cat(list(values.values())).abs().max() > 0


@pytest.mark.parametrize(("loss", "message"), [
    (lambda a, y: functional.cross_entropy(a, y).detach(), "a task loss with a gradient"),
    (lambda a, y: functional.cross_entropy(a, y, reduction="none"), "one number as a tensor"),
    (lambda a, y: 1.0, "one number as a tensor, came float"),
])  # fmt: skip
def test_a_task_loss_that_scores_nothing(loss: Any, message: str) -> None:
    split = Split(cifar_resnet(width=8), torch.randn(1, 3, 16, 16), at="layer2")
    importance = PatrolImportance(PatrolObjective(split, loss, beta=0.0), adv_weight=0.0)
    with pytest.raises(InputError, match=message):
        importance.accumulate(*batch())


@pytest.mark.parametrize("change", [Tensor.double, lambda x: x[:, :1], lambda x: x[0]])
def test_a_batch_unlike_the_example(change: Any) -> None:
    split = Split(cifar_resnet(width=8), torch.randn(1, 3, 16, 16), at="layer2")
    importance = PatrolImportance(PatrolObjective(split, functional.cross_entropy, beta=0.0))
    x, y = batch()
    with pytest.raises(InputError, match="a batch like the split's example inputs"):
        importance.accumulate(change(x), y[: len(change(x))])


def test_scoring_in_training_mode_leaves_the_global_generator() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 4, 3),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    split = Split(model, torch.randn(1, 3, 16, 16), at="3")
    importance = PatrolImportance(PatrolObjective(split, functional.cross_entropy, beta=0.0),
                                  training=True)
    dropped: list[Tensor] = []
    model[2].register_forward_hook(lambda m, args, out: dropped.append(out == 0))
    before = torch.get_rng_state()
    for _ in range(2):
        importance.accumulate(*batch())
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(dropped[-2], dropped[-1])


def task_changes(split: Split, *batches: tuple[Tensor, Tensor]) -> Tensor:
    objective = PatrolObjective(split, functional.cross_entropy, precision="fp32")
    importance = PatrolImportance(objective, adv_weight=0, lip_weight=0, normalizer=None)
    for x, y in batches:
        importance.accumulate(x, y)
    return torch.cat([*importance.raw["task"].values()])


def test_every_image_counts_alike_in_batches_of_any_size() -> None:
    split = Split(cifar_resnet(width=8), torch.randn(1, 3, 16, 16), at="layer2")
    x, y = batch(8)
    whole = task_changes(split, (x, y))
    parts = task_changes(split, (x[:7], y[:7]), (x[7:], y[7:]))
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-5 * float(whole.abs().max()))


def test_images_without_a_label_change_nothing() -> None:
    split = Split(cifar_resnet(width=8), torch.randn(1, 3, 16, 16), at="layer2")
    x, y = batch(8)
    few = task_changes(split, (x[:3], y[:3]))
    y = torch.where(torch.arange(8) < 3, y, -100)
    torch.testing.assert_close(
        task_changes(split, (x, y)), few, rtol=1e-3, atol=1e-5 * float(few.abs().max()))
