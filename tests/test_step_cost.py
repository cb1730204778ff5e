"""The prediction that the step-cost benchmark compares its clock with."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

FEW = dict(batch=10, lipschitz_images=4)


@pytest.fixture(scope="module")
def step_cost(import_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return import_benchmark("step_cost")


@pytest.mark.parametrize(("terms", "added"), [
    (dict(), 0),
    (dict(adversarial=True, inner_steps=0), 10 * 7 * 2),
    (dict(adversarial=True, inner_steps=2), 10 * 7 * (2 + 6)),
    (dict(adversarial=True, inner_steps=1, images=5), 5 * 7 * (2 + 3)),
    (dict(lipschitz="paper"), 4 * 2 * 3 * 5),
    (dict(lipschitz="scale_free"), 4 * 2 * 3 * 5),
    (dict(lipschitz="spectral"), 4 * 5),
    (dict(adversarial=True, inner_steps=1, lipschitz="paper"), 10 * 7 * 5 + 4 * 2 * 3 * 5),
])  # fmt: skip
def test_the_prediction_by_hand(
    step_cost: ModuleType, terms: dict[str, Any], added: int
) -> None:
    macs = step_cost.Macs(edge=5, cloud=3, teacher=11, surrogates=7)
    plain = 10 * (15 + 9 + 11)
    ratio = step_cost.predicted_ratio(macs, step_cost.Terms(**terms), **FEW)
    assert ratio == pytest.approx((plain + added) / plain)


def test_a_batch_smaller_than_the_terms_shares(step_cost: ModuleType) -> None:
    macs = step_cost.Macs(edge=5, cloud=3, teacher=11, surrogates=7)
    terms = step_cost.Terms(adversarial=True, inner_steps=1, images=64, lipschitz="paper")
    ratio = step_cost.predicted_ratio(macs, terms, batch=2, lipschitz_images=32)
    assert ratio == pytest.approx(1 + (2 * 7 * 5 + 2 * 2 * 3 * 5) / (2 * 35))


def test_every_row_is_there_once(step_cost: ModuleType) -> None:
    rows = list(step_cost.measured_terms(step_cost.StepCost()))
    assert len(rows) == len(set(rows)) == 4 + 3 + 4
    only = step_cost.StepCost(only=("spectral", "adversarial"))
    assert {r.name for r in step_cost.measured_terms(only)} == {"spectral", "adversarial"}


def test_both_sides_start_from_the_same_pruned_model_and_step(step_cost: ModuleType) -> None:
    config = step_cost.StepCost(image_size=16, batch=4, turns=1)
    split, teacher = step_cost.pruned_split(config)
    counts = step_cost.counts(split, teacher)
    assert counts.teacher > counts.edge + counts.cloud and counts.surrogates > 0
    before = [p.clone() for p in split.model.parameters()]
    terms = step_cost.Terms(True, "spectral", 1, 2)
    row = step_cost.row(config, split, teacher, terms, torch.get_num_threads(), "fp32")
    assert row["adversarial_images"] == 2 and row["patrol_ms"] > row["plain_ms"] > 0
    assert all(torch.equal(a, b) for a, b in zip(before, split.model.parameters(), strict=True))


def test_each_part_has_its_pace_beside_the_plain_step(step_cost: ModuleType) -> None:
    config = step_cost.StepCost(image_size=16, batch=4, turns=1)
    split, teacher = step_cost.pruned_split(config)
    pace = step_cost.pace(config, split, teacher, "fp32")
    assert pace.pop("plain step") == 1.0 and all(value > 0 for value in pace.values())
    assert {"edge", "cloud", "teacher", "surrogates"} <= set(pace)
