"""The search as a whole: with trials out of thin air, and once for real on tiny images."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torchvision.models import VisionTransformer
from tune_helpers import made

from patrol_prune._tune_command import conclude
from patrol_prune.attacks import InverseNetworkConfig
from patrol_prune.cli import main
from patrol_prune.errors import InputError, RunDirectoryError, TrainingError
from patrol_prune.finetune import FinetuneConfig
from patrol_prune.open_attention import open_attention
from patrol_prune.plan import plan
from patrol_prune.settings import AuditConfig, PrivacyConfig, RunConfig, ScoreConfig
from patrol_prune.tune import _digest, tune
from patrol_prune.tune_result import CAUTION, UNMEASURED, TuneResult
from patrol_prune.tune_settings import FREE_IN_A_TUNE, TuneConfig
from patrol_prune.tune_space import Candidate, Space, search_space

module = sys.modules["patrol_prune.tune"]
Writer = Callable[..., Path]


def tiny(folder: Path, runs: Path, **more: Any) -> TuneConfig:
    values: dict[str, Any] = dict(
        data=str(folder), edge_macs="layer1", model="small_resnet", image_size=16,
        runs=str(runs), batch_size=8, device="cpu", trials=3, trial_epochs=1,
        trial_attack_epochs=1, trial_victims=8, splits=("layer1", "layer2"),
        train=FinetuneConfig(epochs=1, distill_weight=0.0),
        score=ScoreConfig(batches=1, surrogate_steps=1, max_pruning_ratio=0.9),
        finetune=FinetuneConfig(epochs=2, surrogate_warmup_steps=1, inner_steps=1),
        audit=AuditConfig(attacks=("inverse_network",), victims=12, attacker_share=0.5,
                          examples=2),
        attacker=InverseNetworkConfig(width=4, depth=0, epochs=2, max_extensions=0),
    )
    return TuneConfig(**{**values, **more})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_folder: Writer) -> Path:
    return write_folder(tmp_path_factory.mktemp("images"), parts=("train", "val"), count=18)


class Pretended:
    """Stands in for the pipeline: figures that follow from beta, at once."""

    def __init__(self) -> None:
        self.configs: list[RunConfig] = []
        self.dense = 0

    def run(self, config: RunConfig, overwrite: bool, notes: tuple[str, ...]) -> Any:
        assert overwrite and notes == (CAUTION,)
        self.configs.append(config)
        beta = config.privacy.beta
        pruned = {"accuracy": 0.9 - beta / 1000, "edge_macs": int(config.edge_macs),
                  "feature_bytes": 64}
        row = {"ssim": 1 / (1 + beta / 50), "attack": "inverse_network_ssim"}
        return SimpleNamespace(
            summary=SimpleNamespace(pruned=pruned, dense={"accuracy": 0.9}),
            audit=SimpleNamespace(
                strongest=lambda subject: row, flags=[{"subject": "edge", "name": "not_converged"}],
                records=[{"subject": "floor", "attack": "mean_image", "ssim": 0.123}],
            ),
        )

    def train_dense(self, config: RunConfig, **more: Any) -> Path:
        self.dense += 1
        return Path("dense.safetensors")


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    pretends = Pretended()
    monkeypatch.setattr(module, "run", pretends.run)
    monkeypatch.setattr(module, "train_dense", pretends.train_dense)
    places = (Candidate("layer1", 400, 1000), Candidate("layer2", 600, 1000))
    monkeypatch.setattr(module, "search_space", lambda *_: Space(places, 1000))
    return pretends


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["heads", "dimensions"])
def test_heads_may_go_where_they_may_in_a_run(unit: str) -> None:
    """What can be reached is what the plan of the opened model says; MLPs alone reach less."""
    torch.manual_seed(0)
    net = VisionTransformer(16, 8, 2, 4, 16, 16, num_classes=3).eval()
    example, at = torch.rand(1, 3, 16, 16), "encoder.layers.encoder_layer_1"
    least = {}
    for heads in (False, True):
        score = ScoreConfig(heads=heads, head_unit=unit)
        config = TuneConfig("photos", "0.9", at=at, score=score)
        found = search_space(config, copy.deepcopy(net), example)
        opened = copy.deepcopy(net)
        if heads:
            open_attention(opened, example, unit=unit)
        made = plan(opened, example, edge_macs="0.9", at=at, min_channels=score.min_channels,
                    max_pruning_ratio=score.max_pruning_ratio)
        least[heads] = found.candidates[0].least_edge_macs
        assert least[heads] == made[made.recommended].smallest_edge_macs
    assert least[True] < least[False]


def test_a_search_is_resumed_and_counts_the_whole_study(
    folder: Path, tmp_path: Path, pretended: Pretended
) -> None:
    first = tune(tiny(folder, tmp_path))
    assert len(first.trials) == len(pretended.configs) == 3
    more = tune(tiny(folder, tmp_path, trials=5))
    assert len(more.trials) == len(pretended.configs) == 5
    dense = pretended.dense
    again = tune(tiny(folder, tmp_path, trials=5))
    assert again.trials == more.trials and pretended.dense == dense
    # More beta is less accurate and less like here, so that every trial is on the front.
    assert len(again.front) == 5 and again.why_empty is None
    content = json.loads((tmp_path / "tune" / "tune.json").read_text())
    assert len(content["trials"]) == 5
    chosen = RunConfig.from_yaml(again.files[f"trial {again.front[0].number}"])
    assert chosen.privacy.beta == again.front[0].beta


def test_trials_stay_within_the_ranges_and_the_budget(
    folder: Path, tmp_path: Path, pretended: Pretended, caplog: pytest.LogCaptureFixture
) -> None:
    result = tune(tiny(folder, tmp_path, trials=8, beta_range=(2.0, 4.0), alpha_choices=(0.5,),
                       privacy=PrivacyConfig(beta=40.0)))
    assert "privacy.beta 40 is not used" in caplog.text
    for trial in result.trials:
        assert 2.0 <= trial.beta <= 4.0 and trial.alpha == 0.5
        assert trial.split in ("layer1", "layer2")
        assert 0 < trial.edge_macs_asked <= trial.limits.edge_macs
    assert len({c.edge_macs for c in pretended.configs}) > 1
    assert len({c.name for c in pretended.configs}) == 8


def test_what_is_uploaded_is_searched_too(
    folder: Path, tmp_path: Path, pretended: Pretended, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = (Candidate("layer1", 400, 1000), Candidate("layer2", 600, 1000))
    narrowed = {("layer1", 8): 900, ("layer2", 8): 950}
    monkeypatch.setattr(module, "search_space", lambda *_: Space(places, 1000, narrowed))
    config = tiny(folder, tmp_path, trials=8, boundary="prune", alpha_choices=(0.0,),
                  bits_choices=(None, 2), feature_channels_choices=(None, 8))
    result = tune(config)
    tried = [(t.bits, t.feature_channels) for t in result.trials]
    assert set(tried) == {(None, None), (2, None), (None, 8), (2, 8)}
    assert tried == [(c.bits, c.feature_channels) for c in pretended.configs]
    for trial in result.trials:
        if trial.feature_channels == 8:
            assert trial.edge_macs_asked >= narrowed[trial.split, 8]
        full = RunConfig.from_yaml(result.files[f"trial {trial.number}"])
        assert (full.bits, full.feature_channels) == (trial.bits, trial.feature_channels)
    conclude(result, Console(width=140))
    table = capsys.readouterr().out
    assert "Channels" in table and "Bits" in table
    conclude(tune(tiny(folder, tmp_path, name="without")), Console(width=140))
    assert "Bits" not in capsys.readouterr().out


def test_a_floor_below_the_dense_model(folder: Path, tmp_path: Path, pretended: Pretended) -> None:
    result = tune(tiny(folder, tmp_path, trials=6, max_accuracy_drop=0.05))
    assert all(t.limits.accuracy == pytest.approx(0.85) for t in result.trials)
    assert {t.number for t in result.front} == {t.number for t in result.trials if t.beta <= 50}


def test_other_settings_or_images_are_refused(
    folder: Path, tmp_path: Path, pretended: Pretended, write_folder: Writer
) -> None:
    tune(tiny(folder, tmp_path))
    with pytest.raises(RunDirectoryError, match="trial_epochs: 1 there, 2 now"):
        tune(tiny(folder, tmp_path, trial_epochs=2))
    other = write_folder(tmp_path / "other", parts=("train", "val"), count=19)
    with pytest.raises(RunDirectoryError, match="images: "):
        tune(tiny(other, tmp_path))
    folders = [tmp_path / "one", tmp_path / "two", tmp_path / "three"]
    for place, weights in zip(folders, (b"a", b"a", b"b"), strict=True):
        place.mkdir()
        (place / "w.safetensors").write_bytes(weights)
    same, moved, other_weights = (_digest(str(place / "w.safetensors")) for place in folders)
    assert same == moved != other_weights and _digest(None) is None
    assert "weights" in FREE_IN_A_TUNE
    (tmp_path / "tune" / "config.yaml").touch()
    with pytest.raises(InputError, match="holds a run"):
        tune(tiny(folder, tmp_path))


def test_a_failing_trial_is_passed_over_but_not_for_ever(
    folder: Path, tmp_path: Path, pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: list[str] = []

    def failing(config: RunConfig, **more: Any) -> Any:
        if config.name == "0001" or broken:
            raise TrainingError("the loss is NaN", step=1, term="task")
        return pretended.run(config, **more)

    monkeypatch.setattr(module, "run", failing)
    told: list[str] = []
    result = tune(tiny(folder, tmp_path), progress=lambda _, sentence: told.append(sentence))
    assert result.failures == {1: "the loss is NaN"} and len(result.trials) == 2
    assert "1 failed: the loss is NaN" in told
    broken.append("the GPU")
    # A study with successes is not used up either, and what it has is written.
    for name, times in (("tune", 5), ("from the first", 3)):
        with pytest.raises(InputError, match=rf"^{times} trials in a row.*loss is NaN\. Once"):
            tune(tiny(folder, tmp_path, name=name, trials=9))
        content = json.loads((tmp_path / name / "tune.json").read_text())
        assert len(content["trials"]) == (2 if name == "tune" else 0)
    broken.clear()
    mended = tune(tiny(folder, tmp_path, name="from the first", trials=9))
    assert len(mended.trials) == 6 and sorted(mended.failures) == [0, 1, 2]


def test_figures_that_are_none_fail_their_trial(
    folder: Path, tmp_path: Path, pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(config: RunConfig, **more: Any) -> Any:
        result = pretended.run(config, **more)
        result.summary.pruned["accuracy"] = float("nan")
        return result

    monkeypatch.setattr(module, "run", unknown)
    told: list[str] = []
    with pytest.raises(InputError, match="3 trials in a row.*accuracy nan"):
        tune(tiny(folder, tmp_path, trials=9), progress=lambda _, said: told.append(said))
    assert sum("failed: It came to accuracy nan" in said for said in told) == 3


@pytest.mark.parametrize(("flags", "sound"), [
    ([("unet_ssim", "attack_failed")], False),
    ([("unet_ssim", "loss_did_not_fall")], True),
    ([("unet_ssim", "loss_did_not_fall"), ("inverse_network_ssim", "loss_did_not_fall")], False),
    ([("unet_ssim", "not_converged")], True),
])
def test_a_trial_whose_attacks_measured_nothing_is_on_no_front(
    folder: Path, tmp_path: Path, pretended: Pretended, monkeypatch: pytest.MonkeyPatch,
    flags: list[tuple[str, str]], sound: bool,
) -> None:
    def flagged(config: RunConfig, **more: Any) -> Any:
        result = pretended.run(config, **more)
        result.audit.flags = [{"subject": "edge", "attack": attack, "name": name}
                              for attack, name in flags]
        return result

    monkeypatch.setattr(module, "run", flagged)
    attacks = ("inverse_network_ssim", "unet_ssim")
    told: list[str] = []
    result = tune(tiny(folder, tmp_path, trials=2, trial_attacks=attacks),
                  progress=lambda _, sentence: told.append(sentence))
    assert any(UNMEASURED in sentence for sentence in told) != sound
    assert [trial.sound for trial in result.trials] == [sound] * 2
    assert bool(result.front) == sound == (result.why_empty is None)
    assert sound or "the attacks measure anything" in str(result.why_empty)
    assert set(result.trials[0].flags) == {name for _, name in flags}


def test_the_settings_beside_the_study_are_those_of_the_first_start_but_for_the_trials(
    folder: Path, tmp_path: Path, pretended: Pretended
) -> None:
    for trials, timeout in ((2, 900.0), (4, 50.0)):
        tune(tiny(folder, tmp_path, trials=trials, timeout=timeout))
        kept = TuneConfig.from_yaml(tmp_path / "tune" / "tune.yaml")
        assert (kept.trials, kept.timeout) == (trials, 900.0)


def test_time_is_up(folder: Path, tmp_path: Path, pretended: Pretended) -> None:
    told: list[str] = []
    result = tune(tiny(folder, tmp_path, trials=1000, timeout=0.05),
                  progress=lambda _, sentence: told.append(sentence))
    assert 1 <= len(result.trials) < 1000
    assert f"Time is up with {len(result.trials)} of 1000 trials." in told


def call(config: TuneConfig, tmp_path: Path) -> list[str]:
    config.to_yaml(tmp_path / "c.yaml")
    return ["tune", "--config", str(tmp_path / "c.yaml")]


def test_the_command_shows_the_front_and_how_to_go_on(
    folder: Path, tmp_path: Path, pretended: Pretended, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(call(tiny(folder, tmp_path), tmp_path)) == 0
    shown = capsys.readouterr().out
    assert "The front: 3 of 3 finished trials" in " ".join(shown.split())
    assert "trained and attacked only briefly" in " ".join(shown.split())
    assert f"patrol-prune run --config {tmp_path / 'tune' / 'front' / 'trial-0000.yaml'}" in shown
    assert main(call(tiny(folder, tmp_path, name="of mine"), tmp_path)) == 0
    file = tmp_path / "of mine" / "front" / "trial-0000.yaml"
    assert f"patrol-prune run --config '{file}'" in capsys.readouterr().out
    assert "not_converged in 3" in shown and "SSIM 0.123" in " ".join(shown.split())
    assert "front.png" in shown and "tune.json" in shown


def test_a_trial_that_is_left_out_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = TuneResult(tmp_path, (made(0), made(7, 0.9, 0.1, sound=False)),
                        files={"trial 0": tmp_path / "0.yaml"})
    conclude(result, Console())
    assert f"On no front and not in the plot, as {UNMEASURED}: trials 7." in capsys.readouterr().out
    conclude(replace(result, trials=result.trials[:1]), Console())
    assert UNMEASURED not in capsys.readouterr().out


def test_limits_that_nothing_meets_exit_with_2(
    folder: Path, tmp_path: Path, pretended: Pretended, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*call(tiny(folder, tmp_path), tmp_path), "--min-accuracy", "0.95"]) == 2
    told = capsys.readouterr()
    assert "Hardest to meet is the accuracy: at least 95.0% is asked" in told.err
    assert "front.png" in told.out and (tmp_path / "tune" / "tune.json").is_file()


@pytest.mark.slow
def test_for_real(folder: Path, tmp_path: Path) -> None:
    """Two trials through the whole pipeline, then the chosen point trained by `run`."""
    told: list[tuple[str, str]] = []
    config = tiny(folder, tmp_path, trials=2, trial_attacks=("linear_inverse",))
    result = tune(config, progress=lambda *now: told.append(now))
    assert len(result.trials) == 2 and not result.failures
    for trial in result.trials:
        page = tmp_path / "tune" / "trials" / f"{trial.number:04d}"
        assert (page / "report.html").is_file() and not (page / "checkpoints").exists()
        assert trial.edge_macs <= trial.limits.edge_macs and -1 <= trial.ssim <= 1
    assert sum("Training small_resnet" in sentence for _, sentence in told) == 1
    first = result.front[0]
    assert main(["run", "--config", str(result.files[f"trial {first.number}"])]) == 0
    full = json.loads((tmp_path / f"tune-{first.number:04d}" / "summary.json").read_text())
    assert full["dense"]["accuracy"] == first.dense_accuracy
    assert full["config"]["finetune"]["epochs"] == 2
    trial = json.loads((tmp_path / "tune" / "trials" / f"{first.number:04d}" / "summary.json")
                       .read_text())
    assert CAUTION in trial["notes"] and CAUTION not in full["notes"]


@pytest.mark.slow
def test_narrow_and_rounded_uploads_for_real(folder: Path, tmp_path: Path) -> None:
    config = tiny(folder, tmp_path, trials=4, trial_attacks=("linear_inverse",), boundary="prune",
                  alpha_choices=(0.0,), bits_choices=(2, 4), feature_channels=8,
                  splits=("layer2",), max_feature_bytes=8 * 8 * 8 // 4)
    result = tune(config)
    assert len(result.trials) == 4 and not result.failures
    assert {t.bits for t in result.trials} == {2, 4}
    for trial in result.trials:
        assert trial.feature_bytes == 8 * 8 * 8 * trial.bits // 8
        assert (trial.excess["feature_bytes"] <= 0) == (trial.bits == 2)
        kept = json.loads((tmp_path / "tune" / "trials" / f"{trial.number:04d}" / "summary.json")
                          .read_text())["config"]
        assert kept["rounded"]["epochs"] == 1
    first = result.front[0]
    assert main(["run", "--config", str(result.files[f"trial {first.number}"])]) == 0
    full = json.loads((tmp_path / f"tune-{first.number:04d}" / "summary.json").read_text())
    assert full["pruned"]["feature_bytes"] == first.feature_bytes == 128
