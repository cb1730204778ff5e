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


@pytest.mark.parametrize("bf16", [True, False])
def test_the_table_tells_precision_and_pace(
    step_cost: ModuleType, import_benchmark: Callable[[str], ModuleType], bf16: bool
) -> None:
    row = {"threads": 1, "terms": "adversarial+scale_free", "inner_steps": 1, "turns": 7,
           "adversarial_images": 64, "measured": 1.2, "measured_cpu": 1.2, "predicted": 1.1}
    pace = dict.fromkeys(import_benchmark("time_figures").PARTS, 1.5)
    told = import_benchmark("time_figures").step_cost({
        "model": "a model", "split": "layer3", "image_size": 32, "batch": 128, "bf16": bf16,
        "macs": dict.fromkeys(("edge", "cloud", "teacher", "surrogates"), 10**7),
        "pace": {"auto": pace, "fp32": pace},
        "rows": [{**row, "precision": precision, "measured_over_predicted": ratio}
                 for precision, ratio in (("auto", 1.2), ("fp32", 1.1))],
    }, "measured here")
    first = "bfloat16" if bf16 else "float32"
    assert f"1 thread, {first}, 7 turns; 0 of 1 rows within" in told
    assert "1 thread, float32, 7 turns; 1 of 1 rows within" in told
    assert f"plain step, in {first}: edge 1.5" in told and told.endswith("measured here")
