"""Channels and residual blocks compete for one budget of edge MACs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pruning_helpers import HandMadeObjective, backbone, cifar_resnet
from torch import Tensor, nn

from patrol_prune._tp import GroupMagnitudeImportance
from patrol_prune.blocks import residual_blocks
from patrol_prune.budget import MacModel
from patrol_prune.checkpoint import load, save
from patrol_prune.choice import choose_structures
from patrol_prune.cost import count_macs
from patrol_prune.errors import BudgetError, InputError
from patrol_prune.importance import PatrolImportance
from patrol_prune.pruner import PatrolPruner
from patrol_prune.split import Split


def batch(n: int = 8, size: int = 16) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, size, size, generator=g), torch.randint(0, 10, (n,), generator=g)


def deep() -> nn.Module:
    return cifar_resnet(width=8, depth=3)


def prepared(model: nn.Module | None = None, at: str = "layer2") -> tuple[Split, PatrolImportance]:
    split = Split(model or deep(), batch()[0][:1], at=at)
    importance = PatrolImportance(HandMadeObjective(split), blocks=True)
    importance.accumulate(*batch())
    return split, importance


def pruner_of(split: Split, importance: object, budget: float, **options: object) -> PatrolPruner:
    return PatrolPruner(split.model, split.example_inputs, importance, split=split,
                        edge_macs=budget, **options)  # type: ignore[arg-type]


def test_block_scores_are_the_first_order_change() -> None:
    """Each term against a finite difference of the block's mask, over the channels' scale."""
    split, _ = prepared()
    importance = PatrolImportance(HandMadeObjective(split), blocks=True, task_change="absolute")
    importance.accumulate(*batch())
    masks, objective = importance.masks, importance.objective
    name, eps = "layer2.1", 1e-3
    values = []
    for m in (1.0, 1.0 - eps):
        masks.blocks[name].data.fill_(m)
        with torch.no_grad():
            values.append(objective.terms(*batch(), masks=masks))
    masks.blocks[name].data.fill_(1.0)
    high, low = values
    expected = 0.0
    edge = [n for n in masks.channels if masks.table.groups[n].location == "edge"]
    for term, sign in (("task", 0.0), ("lipschitz", 1.0), ("adversarial", -1.0)):
        change = float(getattr(low, term) - getattr(high, term)) / eps
        scale = float(torch.cat([importance.raw[term][n] for n in edge]).abs().mean())
        expected += (abs(change) if term == "task" else sign * change) / scale
    assert importance.block_scores[name] == pytest.approx(expected, rel=2e-2)
    plain = PatrolImportance(importance.objective, task_change="absolute")
    plain.accumulate(*batch())
    assert all(torch.equal(s, importance.scores[n]) for n, s in plain.scores.items())


@pytest.mark.parametrize("structures", ["both", "blocks"])
def test_budget_is_met_from_below(structures: str) -> None:
    split, importance = prepared()
    x, dense = batch()[0], count_macs(split.edge, split.example_inputs).total
    cloud = [p.detach().clone() for m in split.cloud_layers.values() for p in m.parameters()]
    pruner = pruner_of(split, importance, 0.5, structures=structures)
    result = pruner.step()
    macs = count_macs(split.edge, split.example_inputs).total
    assert result.edge_macs == macs <= result.budget and result.removed_blocks
    assert [n for n, _ in split.removed_blocks] == list(result.removed_blocks)
    if structures == "both":
        assert macs >= 0.99 * result.budget and result.removed_channels > 0
        inner = {f"{block}.conv1" for block in result.removed_blocks}
        assert not inner & set(result.kept)
    else:
        assert result.removed_channels == 0
        per_block = dense // 6  # all blocks of this net cost nearly the same
        assert macs > result.budget - 1.2 * per_block
    with torch.no_grad():
        assert torch.equal(split.cloud(split.edge(x)), split.model(x))
    after = [p for m in split.cloud_layers.values() for p in m.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(after, cloud, strict=True))
    assert pruner.costs.dense == macs


def test_worthless_blocks_go_and_precious_ones_stay() -> None:
    """The first to go are blocks that score 0; a block of infinite worth per MAC never goes."""
    split, importance = prepared()
    pruner = pruner_of(split, importance, 0.6, structures="both")
    blocks = dict(pruner.block_scores())
    assert set(blocks) == {"layer1.0", "layer1.1", "layer1.2", "layer2.1", "layer2.2"}
    scores = {n: s.abs() + 1e-3 for n, s in pruner.scores()[0].items()}
    worthless = {n: 0.0 if n in ("layer1.1", "layer2.2") else 1e9 for n in blocks}
    kept, gone = choose_structures(pruner.costs, scores, worthless, pruner.budget)
    assert set(gone) == {"layer1.1", "layer2.2"}
    assert pruner.costs.macs(kept, without=gone) <= pruner.budget
    precious = dict.fromkeys(blocks, 1e9)
    assert choose_structures(pruner.costs, scores, precious, pruner.budget)[1] == ()


def test_blocks_alone_go_by_their_score_and_not_by_how_well_they_fill_the_budget() -> None:
    split, importance = prepared()
    pruner = pruner_of(split, importance, 0.7, structures="blocks")
    scores = dict(zip(pruner.block_scores(), [-1.0, 9.0, 8.0, 2.0, 7.0], strict=True))
    kept, gone = choose_structures(pruner.costs, {}, scores, pruner.budget)
    assert kept == {} and set(gone) == {"layer1.0", "layer2.1"}


def test_closed_form_agrees_with_fvcore_for_any_choice() -> None:
    """Blocks with attention, nested ones and channels: what is foretold is what is counted."""
    from test_blocks import several, vit

    from patrol_prune.group_table import GroupTable, remove_channels
    from patrol_prune.removal import remove_blocks

    for model, x, at, gone in [
        (several(["nested", "gated", "wrapped"], 6, 0), batch(1, 6)[0], "end",
         ["blocks.0", "blocks.0.inner.0", "blocks.2"]),
        (several(["nested"], 6, 0), batch(1, 6)[0], "end", ["blocks.0.inner.0"]),
        (vit(), batch(1, 32)[0], "encoder.layers.encoder_layer_1",
         ["encoder.layers.encoder_layer_0.self_attention", "encoder.layers.encoder_layer_1.mlp"]),
    ]:
        split = Split(model, x, at=at)
        blocks = {n: b for n, b in residual_blocks(model, x, split=split).items()
                  if b.blocked is None and b.location == "edge"}
        table = GroupTable.build(model, x, split=split)
        costs = MacModel(split, table, blocks=blocks)
        assert costs.dense == count_macs(split.edge, x).total
        some = {n: torch.arange(g.channels // 2) for n, g in table.groups.items()
                if g.location == "edge" and g.blocked is None and not g.crossing and g.tie == 1
                and not g.inexact}
        foretold = costs.macs(some, without=gone)
        removed = {n: range(g.channels // 2, g.channels) for n, g in table.groups.items()
                   if n in some}
        remove_channels(table, removed)
        split.refresh()
        remove_blocks(split, gone)
        assert count_macs(split.edge, x).total == foretold


def test_steps_use_the_first_scores_and_can_be_saved(tmp_path: Path) -> None:
    """Scores outlive channels and blocks that went; the history replays in order."""
    split, importance = prepared()
    pruner = pruner_of(split, importance, 0.35, structures="both", iterative_steps=3)
    results = [pruner.step() for _ in range(3)]
    assert all(0.98 * r.budget <= r.edge_macs <= r.budget for r in results)
    assert sum(len(r.removed_blocks) > 0 for r in results) >= 1
    assert split.removed_blocks and split.pruning_history
    save(split, tmp_path / "edge.patrol")
    loaded = load(tmp_path / "edge.patrol", deep)
    x = batch()[0]
    with torch.no_grad():
        assert torch.equal(loaded.edge(x), split.edge(x))
        assert torch.equal(loaded.model(x), split.model(x))
    again = PatrolImportance(HandMadeObjective(loaded), blocks=True)
    again.accumulate(*batch())
    assert pruner_of(loaded, again, 0.8, structures="both").step().edge_macs


def test_accumulating_after_removal_starts_over() -> None:
    split, importance = prepared()
    result = pruner_of(split, importance, 0.7, structures="blocks").step()
    with pytest.raises(InputError, match="stale"):
        _ = importance.block_scores
    importance.accumulate(*batch())
    assert not set(importance.block_scores) & set(result.removed_blocks)


def test_ignored_layers_keep_their_block() -> None:
    split, importance = prepared()
    model = split.model
    pruner = pruner_of(split, importance, 0.9, structures="blocks",
                       ignored_layers=[model.layer1, model.layer2[1].conv2])
    assert set(pruner.block_scores()) == {"layer2.2"}


def test_a_backbone_loses_channels_and_blocks() -> None:
    split, importance = prepared(backbone("mobilenet_v2"), at="features.10")
    result = pruner_of(split, importance, 0.4, structures="both").step()
    assert 0.99 * result.budget <= result.edge_macs <= result.budget
    assert result.edge_macs == count_macs(split.edge, split.example_inputs).total


def test_refusals() -> None:
    split, importance = prepared()
    with pytest.raises(InputError, match="structures"):
        pruner_of(split, importance, 0.5, structures="layers")
    for other in (GroupMagnitudeImportance(), PatrolImportance(importance.objective)):
        with pytest.raises(InputError, match="blocks=True"):
            pruner_of(split, other, 0.5, structures="both")
    with pytest.raises(InputError, match="blocks=True"):
        _ = PatrolImportance(importance.objective).block_scores
    with pytest.raises(BudgetError):
        pruner_of(split, importance, 0.05, structures="blocks")


def test_default_is_channels_alone() -> None:
    one, two = prepared(), prepared()
    a = pruner_of(*one, 0.5).step()
    b = pruner_of(two[0], two[1], 0.5, structures="channels").step()
    assert a.kept == b.kept and a.removed_blocks == () and not one[0].removed_blocks
