"""Learned masks: they meet the budget, spare what the task needs, resume and harden exactly."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pruning_helpers import CifarResNet
from torch import Tensor, nn
from torch.nn import functional as F

import patrol_prune as pp
from patrol_prune.cost import count_macs
from patrol_prune.data import Batches, ImageSet
from patrol_prune.errors import BudgetError, CheckpointError, InputError, TrainingError
from patrol_prune.evaluation import accuracy
from patrol_prune.learned_masks import LearnedMasks, MaskConfig, learn_masks
from patrol_prune.masks import SoftMasks
from patrol_prune.objective import ObjectiveTerms, PatrolObjective
from patrol_prune.surrogate import SurrogateSpec

SPECS = (SurrogateSpec("residual", 8, 1), SurrogateSpec("transposed", 8))
CONFIG = MaskConfig(epochs=4, lr=0.02, surrogate_warmup_steps=3, precision="fp32",
                    distill_weight=0.5, refresh=3, max_pruning_ratio=0.75)


def images(count: int = 64) -> ImageSet:
    """Bright images against dark ones."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    noise = torch.randint(0, 100, (count, 3, 16, 16), generator=g)
    return ImageSet((noise + 120 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels, ("a", "b"))


def fresh(at: str = "layer2", depth: int = 1) -> pp.Split:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return pp.Split(CifarResNet(8, depth, classes=2), torch.zeros(1, 3, 16, 16), at=at)


def learn(split: pp.Split, config: MaskConfig = CONFIG, *, batches: Batches | None = None,
          edge_macs: float = 0.5, **more: object) -> LearnedMasks:
    objective = PatrolObjective(split, F.cross_entropy, alpha=0.01, beta=1.0, surrogates=SPECS,
                                precision="fp32")
    batches = batches or Batches(images(), 16, shuffle=True, augment=True, seed=1)
    return learn_masks(split, batches, objective, edge_macs=edge_macs, config=config,
                       teacher=copy.deepcopy(fresh().model), progress=False,
                       **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("boundary", ["keep", "prune"])
def test_masks_meet_the_budget_and_harden_exactly(boundary: str) -> None:
    split = fresh()
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    learned = learn(split, boundary=boundary, val_batches=Batches(images(), 32))
    assert torch.equal(state, torch.get_rng_state())
    assert learned.edge_macs <= learned.budget == learned.dense_edge_macs // 2
    assert all(float(m.min()) >= 0 for m in learned.channels.values())
    zeros = {n: int((m == 0).sum()) for n, m in learned.channels.items()}
    assert sum(zeros.values()) == learned.records[-1]["zero_channels"] > 0
    with learned.masks.attached():
        assert accuracy(split.model, Batches(images(), 32)) == learned.records[-1]["accuracy"]
    split.model.eval()
    with torch.no_grad():
        masked = learned.masks.split_forward(x)[1]
    result = learned.harden()
    assert result.edge_macs == learned.edge_macs
    assert result.edge_macs == count_macs(split.edge, split.example_inputs).total
    assert {n: total - kept for n, (kept, total) in result.kept.items()} == zeros
    with torch.no_grad():
        assert (split.model(x) - masked).abs().max() <= 1e-5 * max(1.0, masked.abs().max())
    assert not any(m._forward_pre_hooks for m in split.model.modules())


def test_the_macs_follow_the_schedule_and_the_floors_hold() -> None:
    learned = learn(fresh())
    steps, start = len(learned.edge_macs_history), round(0.1 * 4 * 4)
    assert steps == len(learned.gamma_history) == round(0.6 * 4 * 4)
    dense, budget = learned.dense_edge_macs, learned.budget
    for step, macs in enumerate(learned.edge_macs_history):
        done = max(0, step + 1 - start) / (steps - start)
        assert macs >= dense - (dense - budget) * done - 1
    assert learned.edge_macs_history[start - 1] == dense
    assert learned.edge_macs_history[-1] < 0.9 * dense
    for mask in learned.channels.values():
        assert int((mask > 0).sum()) >= 0.25 * len(mask)


class Wide(nn.Module):
    """Tells bright from dark by the last three of sixteen channels; the others hardly count."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 1)
        self.mid = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 2)
        with torch.no_grad():
            self.conv.weight.fill_(1 / 3)
            self.conv.bias.zero_()
            self.mid.weight.fill_(1e-3)
            self.mid.weight[:, -3:] = 4.0
            self.mid.bias.zero_()
            self.head.weight.copy_(torch.tensor([[-0.05], [0.05]]).expand(2, 8))
            self.head.bias.copy_(torch.tensor([2.0, -2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mid(self.conv(x).relu()).relu().mean((2, 3)))


def test_the_channels_that_the_task_reads_survive() -> None:
    split = pp.Split(Wide(), torch.zeros(1, 3, 16, 16), at="mid")
    objective = PatrolObjective(split, F.cross_entropy, precision="fp32")
    config = dataclasses.replace(CONFIG, epochs=8, lr=1e-4, max_pruning_ratio=0.85)
    learned = learn_masks(split, Batches(images(), 16, shuffle=True), objective, edge_macs=0.3,
                          config=config, progress=False)
    mask = learned.channels["conv"]
    assert (mask[-3:] > 0).all() and int((mask > 0).sum()) <= 5


class Killed(Exception):
    """Stands for a lost machine."""


class Dies(Batches):
    """Batches that end in the third epoch."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.epoch == self.dies_in:
            raise Killed
        return super().__iter__()

    dies_in = 0


@pytest.mark.parametrize(("epoch", "structures"), [
    pytest.param(1, "both", marks=pytest.mark.slow), (3, "channels")])
def test_a_resumed_run_ends_with_the_same_bits(
    tmp_path: Path, epoch: int, structures: str
) -> None:
    """Killed before and after the masks are settled."""
    whole = fresh()
    expected = learn(whole, structures=structures)
    batches = Dies(images(), 16, shuffle=True, augment=True, seed=1)
    batches.dies_in = epoch
    with pytest.raises(Killed):
        learn(fresh(), batches=batches, checkpoint_dir=tmp_path, structures=structures)
    resumed = fresh()
    learned = learn(resumed, checkpoint_dir=tmp_path, resume=True, structures=structures)
    assert learned.resumed_from == epoch and len(learned.records) == 4
    for (name, a), b in zip(whole.model.state_dict().items(),
                            resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for name, mask in expected.channels.items():
        assert torch.equal(mask, learned.channels[name]), name
    assert learned.blocks == expected.blocks and bool(learned.blocks) == (structures == "both")
    assert learned.gamma_history == expected.gamma_history
    assert learned.edge_macs_history == expected.edge_macs_history
    assert learned.projected == expected.projected


@pytest.mark.parametrize("structures", ["both", "blocks"])
def test_blocks_are_learned_and_harden_exactly(structures: str) -> None:
    """For less than half of the channels could reach; what was trained is what runs."""
    split = fresh(depth=2)
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    config = dataclasses.replace(CONFIG, epochs=3, max_pruning_ratio=0.5)
    budget = 0.2 if structures == "both" else 0.5
    learned = learn(split, config, edge_macs=budget, structures=structures)
    assert set(learned.blocks) == {"layer1.0", "layer1.1", "layer2.1"} and not learned.left_out
    gone = [n for n, mask in learned.blocks.items() if mask == 0]
    assert gone and len(gone) == learned.records[-1]["zero_blocks"]
    assert any(mask not in (0.0, 1.0) for mask in learned.blocks.values()) or len(gone) == 3
    assert bool(learned.channels) == (structures == "both")
    assert learned.edge_macs <= learned.budget
    split.model.eval()
    with torch.no_grad():
        masked = learned.masks.split_forward(x)[1]
    result = learned.harden()
    assert sorted(result.removed_blocks) == sorted(gone)
    assert result.edge_macs == learned.edge_macs
    assert result.edge_macs == count_macs(split.edge, split.example_inputs).total
    with torch.no_grad():
        assert (split.model(x) - masked).abs().max() <= 1e-5 * max(1.0, masked.abs().max())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in split.model.modules())


def test_a_block_that_cannot_take_its_mask_has_none() -> None:
    split = fresh(depth=2)
    split.model.layer1[1].bn2 = nn.Sequential(split.model.layer1[1].bn2, nn.Tanh())
    split.refresh()
    config = dataclasses.replace(CONFIG, epochs=1)
    learned = learn(split, config, edge_macs=0.5, structures="both")
    assert learned.left_out == {"layer1.1": "its branch ends in a Tanh"}
    assert set(learned.blocks) == {"layer1.0", "layer2.1"}
    assert float(learned.masks.blocks["layer1.1"]) == 1.0
    with pytest.raises(InputError, match="structures"):
        learn(split, config, structures="block")


def test_resume_refuses_another_budget(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, epochs=1)
    learn(fresh(), config, checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError, match="of other masks"):
        learn(fresh(), config, edge_macs=0.6, checkpoint_dir=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="mask_lr"):
        learn(fresh(), dataclasses.replace(config, mask_lr=0.3), checkpoint_dir=tmp_path,
              resume=True)


def test_a_gradient_of_the_masks_that_is_not_finite_stops_before_their_step() -> None:
    seen: list[SoftMasks] = []

    class RootOfNothing(PatrolObjective):
        def terms(self, x: Tensor, y: Tensor, *, masks: SoftMasks | None = None,
                  beta_scale: float = 1.0) -> ObjectiveTerms:
            assert masks is not None
            seen.append(masks)
            terms = super().terms(x, y, masks=masks, beta_scale=beta_scale)
            nothing = sum((0 * m).sum() for m in masks.parameters())
            return dataclasses.replace(terms, total=terms.total + nothing.sqrt())

    split = fresh()
    with pytest.raises(TrainingError, match="The masks' gradient became nan at step 0"):
        learn_masks(split, Batches(images(16), 16), RootOfNothing(split, F.cross_entropy),
                    edge_macs=0.5, config=CONFIG, progress=False)
    kept = [*split.model.parameters(), *seen[0].parameters()]
    assert all(bool(p.isfinite().all()) for p in kept)


@pytest.mark.parametrize("change", [{"mask_lr": 0.0}, {"gamma": -1.0}, {"schedule_share": 1.5},
                                    {"refresh": 0}, {"epochs": -1}])
def test_config_refuses(change: dict) -> None:
    with pytest.raises(InputError, match="MaskConfig.*" + next(iter(change))):
        MaskConfig(**change)


def test_bad_input() -> None:
    split = fresh()
    with pytest.raises(InputError, match="max_pruning_ratio"):
        MaskConfig(max_pruning_ratio=0.0)
    with pytest.raises(BudgetError, match="smallest reachable"):
        learn(split, dataclasses.replace(CONFIG, max_pruning_ratio=0.1))
    with pytest.raises(InputError, match="fraction"):
        learn(split, edge_macs=-1)
    other = PatrolObjective(fresh(), F.cross_entropy)
    with pytest.raises(InputError, match="another model"):
        learn_masks(split, Batches(images(), 16), other, edge_macs=0.5)
    own = PatrolObjective(split, F.cross_entropy)
    with pytest.raises(InputError, match="at least one batch"):
        learn_masks(split, [], own, edge_macs=0.5)  # type: ignore[arg-type]
