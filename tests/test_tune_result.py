"""The front, the limits, and what is said when no trial keeps to them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tune_helpers import made

from patrol_prune.settings import RunConfig
from patrol_prune.tune_report import write_results
from patrol_prune.tune_result import ANEW, Limits, TuneResult, TuneTrial, pareto_front
from patrol_prune.tune_settings import TuneConfig

SHARES = st.integers(0, 6).map(lambda n: n / 6)  # few values, so that ties are frequent
TRIALS = st.lists(st.tuples(SHARES, SHARES, st.booleans()), max_size=20)


@given(TRIALS)
def test_the_front_is_what_comparing_every_pair_leaves(
    values: list[tuple[float, float, bool]]
) -> None:
    trials = [made(i, accuracy, ssim, edge_macs=100 if met else 101)
              for i, (accuracy, ssim, met) in enumerate(values)]

    def beats(a: TuneTrial, b: TuneTrial) -> bool:
        better = a.accuracy > b.accuracy or a.ssim < b.ssim
        return better and a.accuracy >= b.accuracy and a.ssim <= b.ssim

    able = [t for t in trials if t.edge_macs <= 100]
    oracle = {t.number for t in able if not any(beats(other, t) for other in able)}
    front = pareto_front(trials)
    assert {t.number for t in front} == oracle
    assert [t.accuracy for t in front] == sorted((t.accuracy for t in front), reverse=True)


def test_no_trial_gains_by_an_attack_that_broke() -> None:
    """Below the average picture nothing is hidden, and who learnt nothing measured nothing."""
    sound = made(0, 0.80, 0.30, floor_ssim=0.2)
    broken = made(1, 0.95, 0.01, floor_ssim=0.2, sound=False)
    below, at = made(2, 0.75, 0.10, floor_ssim=0.2), made(3, 0.76, 0.20, floor_ssim=0.2)
    assert [t.likeness for t in (sound, broken, below, at)] == [0.30, 1.0, 0.2, 0.2]
    assert [t.number for t in pareto_front((sound, broken, below, at))] == [0, 3]


def test_excess_has_the_limits_unit_and_its_direction() -> None:
    limits = Limits(edge_macs=100, accuracy=0.85 - 0.02, feature_bytes=64)
    assert limits.excess({"edge_macs": 90, "accuracy": 0.83, "feature_bytes": 80}) == {
        "edge_macs": -10, "accuracy": 0.0, "feature_bytes": 16,
    }
    assert made(accuracy=0.83, limits=limits).feasible
    assert not made(accuracy=0.82, limits=limits).feasible
    assert Limits(100).bounds() == {"edge_macs": 100}


def result(*trials: TuneTrial, failures: dict[int, str] | None = None) -> TuneResult:
    return TuneResult(Path("runs/tune"), trials, failures or {}, wanted=9)


def test_the_limit_that_nobody_meets_is_named_with_what_is_missing() -> None:
    limits = Limits(edge_macs=100, accuracy=0.8, feature_bytes=60)
    told = result(made(3, 0.74, limits=limits), made(4, 0.7, limits=limits)).why_empty
    assert told is not None
    # 0.06 of 0.8 is a harder miss than 4 of 60 bytes.
    assert "None of 2 finished trials" in told and "Hardest to meet is the accuracy" in told
    assert "at least 80.0% is asked, the best is 74.0% (trial 3)" in told
    assert "misses it by 6.0 points" in told


def test_limits_that_are_met_alone_but_never_together() -> None:
    limits = Limits(edge_macs=100, accuracy=0.8, feature_bytes=64)
    told = result(made(0, 0.9, limits=limits, feature_bytes=128),
                  made(1, 0.76, limits=limits)).why_empty
    assert told is not None and "at once, though each alone is met" in told
    assert "the accuracy" in told and "(trial 1)" in told and "4.0 points" in told


@pytest.mark.parametrize("trials", [
    (made(0, 0.7, limits=Limits(100, 0.8)),),
    (made(0, 0.9, feature_bytes=128, limits=Limits(100, 0.8, 64)),
     made(1, 0.7, limits=Limits(100, 0.8, 64))),
    (made(0, sound=False),),
])
def test_settings_that_the_study_refuses_are_advised_under_another_name(
    trials: tuple[TuneTrial, ...],
) -> None:
    told = str(result(*trials).why_empty)
    assert told.endswith(f", {ANEW}.") and "another --name" in ANEW


def test_without_a_trial_the_last_failure_is_told() -> None:
    assert "the last, 5: too small" in str(result(failures={2: "x", 5: "too small"}).why_empty)
    assert "more time" in str(result().why_empty)
    assert result(made()).why_empty is None


def test_json_holds_every_trial_and_the_caution(tmp_path: Path) -> None:
    found = result(made(0, 0.8, 0.5), made(2, 0.7, 0.6), failures={1: "broke"})
    text = found.to_json(tmp_path / "tune.json")
    content = json.loads((tmp_path / "tune.json").read_text())
    assert json.loads(text) == content
    assert content["front"] == [0] and [t["number"] for t in content["trials"]] == [0, 2]
    assert content["failures"] == [{"number": 1, "reason": "broke"}]
    assert "briefly" in content["caution"]


def test_a_trial_survives_plain_data() -> None:
    trial = made(4, limits=Limits(1.0, 0.5), flags=("not_converged",), floor_ssim=0.1)
    assert TuneTrial.from_dict(json.loads(json.dumps(asdict(trial)))) == trial


def test_settings_stand_ready_for_each_point_of_the_front_and_no_other(tmp_path: Path) -> None:
    config = TuneConfig("photos", "9.9M", name="mine", max_accuracy_drop=0.1)
    stale = tmp_path / "front" / "trial-0007.yaml"
    stale.parent.mkdir()
    stale.write_text("")
    found = TuneResult(tmp_path, (
        made(0, 0.9, 0.6, limits=Limits(100, 0.8)), made(1, 0.85, 0.4, beta=7.0, alpha=0.01),
        made(2, 0.8, 0.7), made(3, 0.7, 0.3, limits=Limits(100, 0.8)),
    ))
    written = write_results(config, found, Path("dense.safetensors"))
    assert sorted(p.name for p in stale.parent.iterdir()) == ["trial-0000.yaml", "trial-0001.yaml"]
    chosen = RunConfig.from_yaml(written.files["trial 1"])
    assert (chosen.at, chosen.edge_macs, chosen.name) == ("layer2", "100", "mine-0001")
    assert (chosen.privacy.beta, chosen.privacy.alpha) == (7.0, 0.01)
    assert (chosen.weights, chosen.normalization) == ("dense.safetensors", "dataset")
    assert chosen.finetune == config.finetune and chosen.audit == config.audit
    assert Image.open(written.files["plot"]).size[0] > 800
    assert json.loads(written.files["json"].read_text())["front"] == [0, 1]


@pytest.mark.parametrize("trials", [(), (made(accuracy=0.1, limits=Limits(100, 0.8)),)])
def test_without_a_front_the_records_are_written_all_the_same(
    tmp_path: Path, trials: tuple[TuneTrial, ...]
) -> None:
    written = write_results(TuneConfig("photos", "9.9M"), TuneResult(tmp_path, trials), tmp_path)
    assert set(written.files) == ({"json", "plot"} if trials else {"json"})
    assert written.why_empty is not None
