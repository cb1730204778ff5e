"""The budget benchmark: processes that end late or badly, rows that are kept, and a small turn."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def budget(import_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return import_benchmark("budget")


def test_a_process_gives_what_it_yields(budget: ModuleType) -> None:
    assert budget.within(60, lambda: iter([{"a": 1}, 2])) == ([{"a": 1}, 2], "")


def test_a_process_that_takes_too_long_keeps_what_it_had(budget: ModuleType) -> None:
    def slow() -> Iterator[int]:
        yield 1
        time.sleep(600)
        yield 2

    assert budget.within(1.0, slow) == ([1], "stopped after 1 s")


def test_a_process_that_fails_or_dies_says_so(budget: ModuleType) -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise ValueError("no\nnever")

    def dying() -> Iterator[int]:
        yield 1
        os._exit(3)

    assert budget.within(60, failing) == ([1], "ValueError: no")
    assert budget.within(60, dying) == ([1], "its process died")


def test_rows_that_exist_are_kept(budget: ModuleType) -> None:
    config = budget.Budget(models=("a:x", "b:y"))
    old = budget.row(config, "a", "x", [], "stopped")
    assert budget.wanted(config, []) == [("a", "x"), ("b", "y")]
    assert budget.wanted(config, [old]) == [("b", "y")]
    finer = budget.Budget(models=("a:x", "b:y"), only=("a",), loop_steps=400)
    assert budget.wanted(finer, [old]) == [("a", "x")]
    with pytest.raises(SystemExit, match="in none of --models"):
        budget.wanted(budget.Budget(only=("alexnet",)), [])


def turn(ours: float, theirs: float | None) -> dict[str, Any]:
    def seconds(cpu: float) -> dict[str, float]:
        return {"wall": 2 * cpu, "cpu": cpu}

    return {"graph": seconds(0.5), "make": seconds(ours / 4), "step": seconds(3 * ours / 4),
            "budget": 100, "dense": 200, "edge_macs": 99, "loop_make": seconds(1.0),
            "loop": seconds((theirs or 0.0) - 1.0), "loop_steps_taken": 7,
            "loop_edge_macs": None if theirs is None else 90,
            "loop_status": "ValueError: x (step 2)" if theirs is None else ""}


def test_ratios_are_medians_within_a_turn(budget: ModuleType) -> None:
    turns = [turn(1.0, 6.0), turn(2.0, 20.0), turn(4.0, 12.0)]
    row = budget.row(budget.Budget(), "a", "x", turns, "")
    assert row["times_faster_cpu"] == 6.0  # of 6, 10 and 3; the ratio of the medians is another
    assert row["times_faster_wall"] == 6.0
    assert row["step_over_graph_cpu"] == pytest.approx(2 * 3 / 4 * 2)
    assert (row["of_budget"], row["loop_of_budget"], row["repeats"]) == (0.99, 0.9, 3)
    assert row["status"] == row["loop_status"] == "ok"
    failed = budget.row(budget.Budget(), "a", "x", [turn(1.0, None)], "stopped after 9 s")
    assert failed["loop_status"] == "ValueError: x (step 2)" and failed["status"].startswith("stop")
    assert "times_faster_cpu" not in failed and failed["of_budget"] == 0.99


@pytest.mark.slow
def test_both_ways_reach_the_budget_from_the_same_model(budget: ModuleType) -> None:
    config = budget.Budget(image_size=32, loop_steps=10, repeats=2, batch=2)
    first, second = budget.turns(config, "resnet18", "layer2")
    for found in (first, second):
        assert 0.98 * found["budget"] <= found["edge_macs"] <= found["budget"]
        assert found["loop_edge_macs"] <= found["budget"] and not found["loop_status"]
        assert 1 <= found["loop_steps_taken"] <= 10
    assert first["edge_macs"] == second["edge_macs"]
