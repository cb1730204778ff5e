"""Latency: what is asked of the timer, and what comes of its figures. No wall clock is asserted."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image
from pruning_helpers import ThreeLayers
from rich.console import Console
from torch import nn
from torch.utils.benchmark import Measurement, TaskSpec

from patrol_prune import _plan_command, latency, plan_choice
from patrol_prune.choice import Limits
from patrol_prune.cost import count_macs
from patrol_prune.errors import BudgetError, InputError
from patrol_prune.latency import LatencyConfig, measure_latency
from patrol_prune.plan import Plan, PlanLimits, plan

X = torch.zeros(1, 3, 16, 16)
MACS_PER_MS = 1e5


class MacTimer:
    """A timer on a device whose time is exactly the module's MACs: 100,000 in a millisecond."""

    made: list[dict[str, Any]]

    def __init__(self, stmt: str, *, globals: dict[str, Any], num_threads: int) -> None:
        self.module, self.x, self.threads = globals["module"], globals["x"], num_threads
        MacTimer.made.append({
            "stmt": stmt, "batch": len(self.x), "threads": num_threads,
            "training": self.module.training, "gradients": torch.is_grad_enabled(),
        })

    def measurement(self, *times: float) -> Measurement:
        seconds = count_macs(self.module, self.x).total / MACS_PER_MS / 1e3
        spec = TaskSpec("module(x)", "", num_threads=self.threads)
        return Measurement(1, [seconds * t for t in times], spec)

    def blocked_autorange(self, *, min_run_time: float) -> Measurement:
        return self.measurement(0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 5.0)

    def timeit(self, number: int) -> Measurement:
        raise AssertionError("nine runs are there already")


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    monkeypatch.setattr(latency, "Timer", MacTimer)
    MacTimer.made = []
    yield MacTimer.made


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return ThreeLayers()


@pytest.fixture
def timed(model: nn.Module, timer: list[dict[str, Any]]) -> Plan:
    config = LatencyConfig(batch=2, threads=1, roundings=(None, 8))
    return plan(model, X, edge_macs="250K", measure_latency=config)


def test_a_module_is_timed_in_evaluation_mode_without_gradients(
    timer: list[dict[str, Any]]
) -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).train()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    found = measure_latency(module, torch.zeros(5, 3, 10, 10), LatencyConfig(batch=4, threads=3))
    assert timer == [{"stmt": "module(x)", "batch": 4, "threads": 3, "training": False,
                      "gradients": False}]
    assert module.training and module[1].training
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert (found.batch, found.threads, found.device) == (4, 3, "cpu")
    assert found.circumstances == "batch 4, 3 threads, cpu"


def test_median_and_quartiles_are_those_of_the_runs(timer: list[dict[str, Any]]) -> None:
    module = nn.Conv2d(1, 1, 1, bias=False)  # 100 MACs on 10 x 10 pixels
    found = measure_latency(module, torch.zeros(1, 1, 10, 10))
    assert found.median_ms == pytest.approx(100 / MACS_PER_MS)
    assert found.iqr_ms == pytest.approx(0.0) and found.runs == 9


def test_a_real_timer_gives_at_least_nine_runs() -> None:
    found = measure_latency(nn.Conv2d(3, 4, 3), X, LatencyConfig(min_run_time=1e-6, threads=1))
    assert found.runs >= 9 and found.passes >= 1
    assert found.median_ms > 0 and found.iqr_ms >= 0


@pytest.mark.parametrize("bad", [
    dict(batch=0), dict(threads=0), dict(min_run_time=0.0), dict(roundings=()),
    dict(roundings=(0,)), dict(batch=1.5), dict(roundings=(8.5,)), dict(roundings=8),
])
def test_settings_that_are_none(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        LatencyConfig(**bad)


def test_nothing_is_timed_unless_asked(model: nn.Module, timer: list[dict[str, Any]]) -> None:
    made = plan(model, X, edge_macs="layer1", limits=PlanLimits(feature_bytes=10**6))
    assert timer == [] and made.pruned == ()
    assert all(row.latency is None for row in made.rows)
    assert "Measured" not in made.text


def test_every_row_has_the_dense_edges_time(timed: Plan) -> None:
    for row in timed.rows:
        assert row.latency is not None
        assert row.latency.median_ms == pytest.approx(row.edge_macs / MACS_PER_MS)
        assert (row.latency.batch, row.latency.threads) == (2, 1)


def test_the_recommended_edge_is_pruned_and_timed_for_each_rounding(timed: Plan) -> None:
    """On a device whose time is its MACs, half the MACs must be half the time."""
    assert [edge.round_to for edge in timed.pruned] == [None, 8]
    for edge in timed.pruned:
        assert edge.cost is not None and edge.latency is not None
        assert edge.cost.edge_macs <= timed.budget_edge_macs
        assert edge.latency.median_ms == pytest.approx(edge.cost.edge_macs / MACS_PER_MS)
    loose, rounded = timed.pruned
    assert loose.cost and rounded.cost and loose.cost.edge_macs >= 0.9 * timed.budget_edge_macs
    assert rounded.cost != loose.cost
    share = loose.cost.edge_macs / timed[timed.recommended].edge_macs
    assert f"Pruned to {share:.0%} of its MACs, it takes {share:.0%} of the time" in timed.text
    assert "batch 2, 1 thread, cpu" in timed.text


def test_a_plan_that_rounds_times_its_own_multiples_alone(
    model: nn.Module, timer: list[dict[str, Any]]
) -> None:
    made = plan(model, X, edge_macs=0.6, at="layer2", round_to=4, measure_latency=True)
    assert [edge.round_to for edge in made.pruned] == [4, 8, 16]


def test_a_module_that_cannot_run_is_refused_in_words() -> None:
    with pytest.raises(InputError, match=r"cannot run on a batch of shape \(1, 3, 16, 16\)"):
        measure_latency(nn.Conv2d(4, 1, 1), X)
    with pytest.raises(InputError, match="LatencyConfig"):
        measure_latency(nn.Conv2d(3, 1, 1), X, {"batch": 1})  # type: ignore[arg-type]


def test_a_rounding_that_cannot_meet_the_budget_says_so(
    model: nn.Module, timer: list[dict[str, Any]]
) -> None:
    config = LatencyConfig(roundings=(64, None), threads=1)
    made = plan(model, X, edge_macs=0.2, at="layer2", measure_latency=config)
    too_coarse, loose = made.pruned
    assert too_coarse.latency is None and too_coarse.cost is None
    assert "the smallest edge takes" in too_coarse.reason and too_coarse.reason in made.text
    assert loose.latency is not None


def test_no_pruned_edge_where_nothing_has_to_go(
    model: nn.Module, timer: list[dict[str, Any]]
) -> None:
    made = plan(model, X, edge_macs="layer2", at="layer2", measure_latency=True)
    assert made["layer2"].channel_ratio == 0 and made.pruned == ()
    assert made["layer2"].latency is not None


def test_a_limit_of_latency_is_measured_and_kept(
    model: nn.Module, timer: list[dict[str, Any]], timed: Plan
) -> None:
    """Time is MACs here: a limit above the budget changes nothing, one below leaves the splits
    that are dense under it."""
    budget_ms = timed.budget_edge_macs / MACS_PER_MS
    made = plan(model, X, edge_macs="250K", limits=PlanLimits(latency_ms=1.001 * budget_ms))
    assert made.recommended == timed.recommended and made.pruned
    tight = PlanLimits(latency_ms=0.5 * budget_ms)
    shallow = plan(model, X, edge_macs="250K", limits=tight)
    row = shallow[shallow.recommended]
    assert row.latency is not None and row.latency.median_ms <= 0.5 * budget_ms
    deeper = [r for r in shallow.rows if r.edge_macs > row.edge_macs and r.latency is not None]
    assert all(r.latency and r.latency.median_ms > 0.5 * budget_ms for r in deeper)


def test_a_latency_nothing_reaches_tells_the_fastest(
    model: nn.Module, timer: list[dict[str, Any]]
) -> None:
    with pytest.raises(BudgetError, match=r"ran in 1e-06 ms.*the fastest took") as error:
        plan(model, X, edge_macs="layer1", at="layer2", limits=PlanLimits(latency_ms=1e-6))
    fastest = error.value.smallest["latency_ms"]
    kept = plan(model, X, edge_macs="layer1", at="layer2",
                limits=PlanLimits(latency_ms=1.0001 * fastest))
    assert kept.recommended == "layer2"


def test_no_more_edges_are_measured_than_needed(timed: Plan) -> None:
    row, asked = timed[timed.recommended], []

    def measured(r: Any) -> Iterator[Any]:
        for edge in timed.pruned:
            asked.append((r.name, edge.round_to))
            yield edge

    limits = PlanLimits(latency_ms=1e9)
    wanted = plan_choice.Wanted(timed.budget_edge_macs, limits, "keep", Limits())
    assert plan_choice.fastest_enough([row, *timed.rows], wanted, measured) == row.name
    assert asked == [(row.name, None)]


def test_the_model_is_left_as_found(model: nn.Module, timed: Plan) -> None:
    assert model.training
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in ThreeLayers().parameters()
    )
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_the_commands_tables_and_figure_show_what_was_measured(timed: Plan) -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(_plan_command.plan_table(timed))
    console.print(_plan_command.pruned_table(timed))
    told = console.export_text()
    row = timed[timed.recommended]
    assert row.latency is not None and "batch 2, 1 thread, cpu" in told
    took = [f"{r.latency.median_ms:.3g}" for r in timed.rows if r.latency is not None]
    shown = f" {row.latency.median_ms:.3g} (0)"
    assert told.count(shown) == took.count(f"{row.latency.median_ms:.3g}") + 1  # dense once more
    for edge in timed.pruned:
        assert edge.cost is not None
        share = f"{edge.cost.edge_macs / row.edge_macs:.0%}"
        line = next(line for line in told.splitlines() if edge.name in line)
        assert line.count(share) == 2  # of the MACs, and on this device of the time
    picture = Image.open(io.BytesIO(_plan_command.plan_figure(timed)))
    untimed = dataclasses.replace(
        timed, pruned=(), rows=tuple(dataclasses.replace(r, latency=None) for r in timed.rows)
    )
    assert Image.open(io.BytesIO(_plan_command.plan_figure(untimed))).width < picture.width
    assert len(_plan_command.plan_table(untimed).columns) == 8
    long = dataclasses.replace(untimed.rows[0], name="encoder.layers.encoder_layer_6")
    narrow = _plan_command.plan_table(dataclasses.replace(untimed, rows=(long,)), width=80)
    console = Console(width=80, file=io.StringIO())
    console.print(narrow)
    assert "…der_layer_6 " in console.file.getvalue()


def test_plain_data(timed: Plan) -> None:
    data = json.loads(json.dumps(timed.to_json()))
    assert [edge["round_to"] for edge in data["pruned"]] == [None, 8]
    assert data["rows"][0]["latency"]["threads"] == 1
    assert data["limits"] == {"edge_params": None, "feature_bytes": None, "latency_ms": None}
