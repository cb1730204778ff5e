"""The whole path on a handful of tiny images: resumed to the same result, refused in time."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from patrol_prune import commands, pipeline
from patrol_prune._tp import GroupMagnitudeImportance
from patrol_prune.attacks import InverseNetworkConfig
from patrol_prune.checkpoint import load, read_info
from patrol_prune.cli import main
from patrol_prune.cost import edge_macs
from patrol_prune.defences import FeatureDropout, Quantisation
from patrol_prune.errors import (
    BudgetError,
    InputError,
    PatrolError,
    RunDirectoryError,
    UnsupportedModelError,
)
from patrol_prune.finetune import FinetuneConfig
from patrol_prune.models import build_model
from patrol_prune.pipeline import RunResult, run
from patrol_prune.preparation import (
    fresh_model,
    normalization_kind,
    read_images,
    rounding_notes,
    with_dropout,
)
from patrol_prune.pruner import PatrolPruner
from patrol_prune.reaudit import audit_again
from patrol_prune.run_summary import audit_notes, read_summary, rewrite_report
from patrol_prune.rundir import RunDirectory, read_config
from patrol_prune.settings import AuditConfig, PrivacyConfig, RunConfig, ScoreConfig
from patrol_prune.split import Split
from patrol_prune.training_state import draws_for

Writer = Callable[..., Path]


def tiny(folder: Path, runs: Path, name: str = "a") -> RunConfig:
    return RunConfig(
        data=str(folder), edge_macs="0.5", at="layer2", model="small_resnet", image_size=16,
        name=name, runs=str(runs), batch_size=8, device="cpu",
        train=FinetuneConfig(epochs=1, distill_weight=0.0),
        score=ScoreConfig(batches=1, surrogate_steps=1),
        finetune=FinetuneConfig(epochs=2, surrogate_warmup_steps=1, inner_steps=1),
        audit=AuditConfig(attacks=("inverse_network",), victims=8, attacker_share=0.5,
                          examples=2),
        attacker=InverseNetworkConfig(width=4, depth=0, epochs=1, max_extensions=0),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_folder: Writer) -> Path:
    return write_folder(tmp_path_factory.mktemp("images"), parts=("train", "val"), count=18)


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run(tiny(folder, tmp_path_factory.mktemp("runs")))


def weights(result: RunResult) -> dict[str, torch.Tensor]:
    split = load(
        result.directory / "edge.patrol", lambda: build_model("small_resnet", 3, image_size=16)
    )
    return split.model.state_dict()


def test_what_a_run_leaves(finished: RunResult) -> None:
    there = {p.name for p in finished.directory.iterdir()}
    assert {
        "config.yaml", "plan.json", "events.jsonl", "checkpoints", "edge.patrol", "audit.json",
        "figures", "report.html", "manifest.json",
    } <= there
    assert finished.report.read_text(encoding="utf-8").startswith("<!doctype html>".upper()[:2])
    assert json.loads((finished.directory / "plan.json").read_text())["recommended"] == "layer2"
    stages = [json.loads(line) for line in (finished.directory / "events.jsonl").open()]
    assert [s["stage"] for s in stages if s["event"] == "stage done"] == list(pipeline.STAGES)


def test_the_edge_meets_the_budget_and_is_the_one_that_was_saved(finished: RunResult) -> None:
    summary = finished.summary
    budget = summary.plan["budget"]
    assert 0.98 * budget <= summary.pruned["edge_macs"] <= budget
    assert budget == summary.dense["edge_macs"] // 2
    split = load(
        finished.directory / "edge.patrol", lambda: build_model("small_resnet", 3, image_size=16)
    )
    assert edge_macs(split) == summary.pruned["edge_macs"]
    info = read_info(finished.directory / "edge.patrol")
    assert info.extra["classes"] == ["blue", "green", "red"]
    assert info.normalization is not None and info.normalization.mean[0] > 0.2


def test_a_run_leaves_as_many_channels_of_the_upload_as_it_was_told(
    folder: Path, tmp_path: Path
) -> None:
    config = replace(tiny(folder, tmp_path / "runs"), boundary="prune", feature_channels=9)
    result = run(config)
    assert result.summary.pruned["feature_bytes"] == 4 * 9 * 8 * 8
    assert result.summary.pruned["edge_macs"] <= result.summary.plan["budget"]
    split = load(
        result.directory / "edge.patrol", lambda: build_model("small_resnet", 3, image_size=16)
    )
    assert split.feature_shape == (9, 8, 8)


def test_a_number_of_channels_that_cannot_stay_costs_no_run(folder: Path, tmp_path: Path) -> None:
    config = replace(tiny(folder, tmp_path / "runs"), boundary="prune", feature_channels=7)
    with pytest.raises(InputError, match="may keep, came 7; .* are 8 and 9.* max_pruning_ratio"):
        run(config)
    model = fresh_model(config, 3)
    split = Split(model, torch.zeros(1, 3, 16, 16), at="layer2")
    floors = [PatrolPruner(model, split.example_inputs, GroupMagnitudeImportance(), split=split,
                           edge_macs=1.0, boundary="prune", feature_channels=channels,
                           max_pruning_ratio=config.score.max_pruning_ratio).smallest_edge_macs()
              for channels in (None, split.feature_shape[0])]
    assert floors[0] < floors[1]
    tight = replace(config, feature_channels=split.feature_shape[0], edge_macs=sum(floors) // 2)
    with pytest.raises(BudgetError, match="give fewer feature_channels"):
        run(tight)
    assert not (tmp_path / "runs").exists()


def test_floor_and_ceiling_stand_beside_the_edge(finished: RunResult) -> None:
    assert finished.audit.subjects == ("floor", "edge", "undefended")
    assert set(finished.audit.examples) == {"originals", "floor", "edge", "undefended"}


def test_a_test_part_that_is_none_is_told(
    tmp_path: Path, write_folder: Callable[..., Path]
) -> None:
    data = write_folder(tmp_path / "images", count=24)
    assert read_images(tiny(data, tmp_path)).notes == ()
    shutil.rmtree(data / "test")
    shutil.copytree(data / "train", data / "test")
    shutil.rmtree(data / "test" / "red")
    images = read_images(tiny(data, tmp_path))
    both = sum(int(label) != images.test.classes.index("red") for label in images.defender.labels)
    notes = " ".join(images.notes)
    assert f"{both} of the 48 test images are also among those that the model is" in notes
    assert "no image of red: the accuracy" in notes


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["heads", "dimensions"])
def test_a_vision_transformer_loses_heads(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: str
) -> None:
    """Its MLPs alone could not meet this budget."""
    (tmp_path / "tiny_vit.py").write_text(
        "from torchvision.models import VisionTransformer\n"
        "def build(num_classes):\n"
        "    return VisionTransformer(16, 8, 2, 4, 16, 16, num_classes=num_classes)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = replace(tiny(folder, tmp_path), model="tiny_vit:build", edge_macs="0.6",
                     at="encoder.layers.encoder_layer_1")  # fmt: skip
    result = run(replace(config, score=replace(config.score, head_unit=unit)))
    assert result.summary.pruned["edge_macs"] <= result.summary.plan["budget"]
    split = load(result.directory / "edge.patrol",
                 lambda: build_model("tiny_vit:build", 3, image_size=16))  # fmt: skip
    attention = [layer.self_attention for layer in split.model.encoder.layers]
    sizes = [[a.num_heads for a in attention], [a.core.head_dim for a in attention]]
    gone, kept = sizes if unit == "heads" else reversed(sizes)
    assert min(gone) < 4 and set(kept) == {4}
    with pytest.raises(BudgetError):
        run(replace(config, name="b", score=replace(config.score, heads=False)))


def test_the_same_settings_do_nothing_again(
    finished: RunResult, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "finetune", None)
    monkeypatch.setattr(pipeline, "audit", None)
    again = run(tiny(folder, finished.directory.parent))
    assert again.summary == finished.summary


def test_a_run_of_an_earlier_release_is_resumed_with_the_newer_defaults(
    finished: RunResult, folder: Path, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(finished.directory, tmp_path / "a"))
    settings = yaml.safe_load((copied / "config.yaml").read_text())
    del settings["privacy"]["dropout"], settings["audit"]["uploads"]
    (copied / "config.yaml").write_text(yaml.safe_dump(settings))
    assert run(tiny(folder, tmp_path)).audit.per_image == finished.audit.per_image
    other = replace(tiny(folder, tmp_path), privacy=PrivacyConfig(dropout=0.5))
    with pytest.raises(RunDirectoryError, match=r"privacy\.dropout: 0\.0 there, 0\.5 now"):
        run(other)


def test_other_settings_are_refused_by_name(finished: RunResult, folder: Path) -> None:
    other = replace(tiny(folder, finished.directory.parent), seed=5, edge_macs="0.6")
    with pytest.raises(RunDirectoryError, match=r"edge_macs: '0\.5' there, '0\.6' now") as error:
        run(other)
    assert "seed: 0 there, 5 now" in str(error.value)


@pytest.mark.parametrize(("stage", "call"), [
    pytest.param("model", 2, marks=pytest.mark.slow), ("finetune", 3),
    pytest.param("audit", 2, marks=pytest.mark.slow)])
def test_interrupted_and_resumed_gives_the_same(
    finished: RunResult, folder: Path, tmp_path: Path, stage: str, call: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped by Ctrl-C inside a stage: the second call goes on and ends at the same bits."""
    module = sys.modules["patrol_prune.finetune"]

    saves = []
    real = module.save_state

    def stopping(*arguments: object, **more: object) -> None:
        real(*arguments, **more)  # type: ignore[arg-type]
        saves.append(1)
        if stage in ("model", "finetune") and len(saves) == call - 1:
            raise KeyboardInterrupt

    def progress(now: str, sentence: str) -> None:
        if now == stage == "audit" and "Attacking" in sentence:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_state", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tiny(folder, tmp_path), progress=progress)
    monkeypatch.undo()
    result = run(tiny(folder, tmp_path))
    ours, theirs = weights(result), weights(finished)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert result.audit.per_image == finished.audit.per_image
    assert result.summary.pruned == finished.summary.pruned


@pytest.mark.slow
def test_dropout_on_the_upload_is_trained_measured_and_attacked(
    finished: RunResult, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in between too: what draws goes on where it was."""
    module = sys.modules["patrol_prune.finetune"]
    config = replace(tiny(folder, tmp_path / "one"), privacy=PrivacyConfig(dropout=0.5))
    result = run(config)
    rows = [r for r in result.audit.records if r["subject"] == "edge"]
    assert all(r["random_edge"] and r["uploads"] == 1 for r in rows)
    assert "50% of its upload dropped at random" in result.report.read_text(encoding="utf-8")
    saved = load(
        result.directory / "edge.patrol", lambda: build_model("small_resnet", 3, image_size=16)
    )
    assert saved.defence == FeatureDropout(0.5, config.seed)
    assert saved.undefended is not None and saved.undefended.at == "layer2"
    assert read_info(result.directory / "edge.patrol").extra["dropout"] == 0.5
    ours, theirs = weights(result), weights(finished)
    plain = saved.undefended.model.state_dict()
    assert not all(torch.equal(plain[name], theirs[name]) for name in theirs)

    real, saves = module.save_state, []

    def stopping(*arguments: object, **more: object) -> None:
        real(*arguments, **more)  # type: ignore[arg-type]
        saves.append(1)
        if len(saves) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_state", stopping)
    halted = replace(config, runs=str(tmp_path / "two"))
    with pytest.raises(KeyboardInterrupt):
        run(halted)
    monkeypatch.undo()
    resumed = run(halted)
    again = weights(resumed)
    assert all(torch.equal(again[name], ours[name]) for name in ours)
    assert resumed.audit.per_image == result.audit.per_image
    often = audit_again(resumed.directory, attacks=("linear_inverse",), uploads=4)
    found = {(r["subject"], r["attack"]): r["uploads"] for r in often.audit.records}
    assert found["edge", "linear_inverse"] == 4 and found["undefended", "linear_inverse"] == 1
    assert "4 uploads of every picture" in often.report.read_text(encoding="utf-8")


def rounded_run(folder: Path, runs: Path) -> RunConfig:
    return replace(tiny(folder, runs), bits=2, rounded=FinetuneConfig(
        epochs=2, surrogate_warmup_steps=1, inner_steps=1, precision="fp32"))


@pytest.mark.slow
def test_an_upload_of_few_bits_is_trained_measured_saved_attacked_and_exported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacked, audit = [], pipeline.audit

    def watched(split: Split, *rest: object, **more: object) -> object:
        attacked.append(split.defence)
        return audit(split, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "audit", watched)
    result = run(rounded_run(folder, tmp_path))
    assert attacked == [Quantisation(2)]
    saved = load(
        result.directory / "edge.patrol", lambda: build_model("small_resnet", 3, image_size=16))
    assert saved.defence == Quantisation(2) and saved.undefended is not None
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    z, plain = saved.edge(x), saved.undefended.edge(x)
    assert max(len(channel.unique()) for channel in z.transpose(0, 1).flatten(1)) <= 4
    assert torch.equal(saved.edge.upload(plain), z) and not torch.equal(plain, z)
    dense, pruned = result.summary.dense["feature_bytes"], result.summary.pruned["feature_bytes"]
    assert dense == 16 * pruned == 4 * plain[0].numel()
    assert "rounds every value that it uploads to 2 bits" in result.report.read_text("utf-8")
    assert [record["epoch"] for record in result.summary.history] == [1, 2, 3, 4]
    notes = json.loads((result.directory / "manifest.json").read_text())["stages"]["finetune"]
    assert [len(notes["notes"][k]) for k in ("history", "history_rounded")] == [2, 2]
    assert main(["export", str(result.directory), "--formats", "pt2"]) == 0
    exported = torch.export.load(result.directory / "export" / "edge.pt2").module()
    normal = read_info(result.directory / "edge.patrol").normalization
    assert normal is not None
    with torch.no_grad():
        torch.testing.assert_close(exported(x[:1]), saved.edge(normal.to_input(x[:1])))


def test_what_is_said_of_an_edge_that_rounds_and_drops_is_so() -> None:
    """The numbers that the note says are to be sent are those of the steps."""
    split = Split(build_model("small_resnet", 3, image_size=16).eval(),
                  torch.zeros(1, 3, 16, 16), at="layer2")
    x = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    privacy = PrivacyConfig(dropout=0.25)
    rounds = Quantisation(3).apply(split, calibration=x)
    (plain,), (dropped,) = rounding_notes(3, 0.0), rounding_notes(3, 0.25)
    assert rounding_notes(None, 0.25) == []
    for note, sending in ((plain, rounds), (dropped, with_dropout(privacy, rounds, 0))):
        assert note.count("3 bits") == 1
        told = re.search(r"of each is (round\(.*\) \+ zero_point), .*split's (\S+)\.$", note)
        assert told is not None
        part = sending
        for name in told[2].split("."):
            part = getattr(part, name)
        names = {"round": torch.round, "value": sending.edge(x),
                 "scale": part.scale.view(1, -1, 1, 1), "zero_point": part.zero_point.view(
                     1, -1, 1, 1)}
        codes = eval(told[1], names)
        assert sorted(codes.unique().tolist()) == list(range(8))


@pytest.mark.slow
@pytest.mark.parametrize("saves", [2, 3])
def test_rounding_that_was_stopped_ends_at_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: int
) -> None:
    """Stopped behind the first training, and inside of the second one."""
    whole = weights(run(rounded_run(folder, tmp_path / "one")))
    module = sys.modules["patrol_prune.finetune"]
    real, done = module.save_state, []

    def stopping(*arguments: object, **more: object) -> None:
        real(*arguments, **more)  # type: ignore[arg-type]
        done.append(1)
        if len(done) == 1 + saves:  # one of the dense model's
            raise KeyboardInterrupt

    halted = rounded_run(folder, tmp_path / "two")
    monkeypatch.setattr(module, "save_state", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(halted)
    monkeypatch.undo()
    again = weights(run(halted))
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert again.keys() == whole.keys()


def test_a_harmed_stage_and_all_after_it_are_done_again(
    finished: RunResult, folder: Path, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(finished.directory, tmp_path / "a"))
    (copied / "edge.patrol" / "split.json").write_text("{}")
    told: list[str] = []
    again = run(tiny(folder, tmp_path), progress=lambda stage, _: told.append(stage))
    assert {"finetune", "audit", "report"} == set(told)
    assert again.audit.per_image == finished.audit.per_image


@pytest.mark.slow
def test_epoch_checkpoints_of_another_upstream_model_are_not_gone_on_from(
    finished: RunResult, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a stage whose upstream is as it was resumes; one after a stage done again begins."""
    resumed: list[int] = []
    real = pipeline.finetune

    def spy(*args, **more):  # type: ignore[no-untyped-def]
        result = real(*args, **more)
        resumed.append(result.resumed_from)
        return result

    monkeypatch.setattr(pipeline, "finetune", spy)
    for name, harmed, expected in (
        ("edge", "edge.patrol", [2]), ("pruned", pipeline.PRUNED, [0]),
        ("dense", pipeline.DENSE, [1, 0]),
    ):
        shutil.copytree(finished.directory, tmp_path / name / "a")
        shutil.rmtree(tmp_path / name / "a" / harmed)
        again = run(tiny(folder, tmp_path / name))
        assert (name, resumed) == (name, expected)
        assert again.audit.per_image == finished.audit.per_image
        resumed.clear()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*")
            if p.is_file() and p.name not in (".lock", "events.jsonl")}


@pytest.mark.parametrize("gone", ["checkpoints", "checkpoints/dense", "plan.json"])
def test_an_audit_of_a_run_trains_nothing(
    finished: RunResult, tmp_path: Path, gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "finetune", None)
    copied = Path(shutil.copytree(finished.directory, tmp_path / "a"))
    shutil.rmtree(copied / gone) if (copied / gone).is_dir() else (copied / gone).unlink()
    before = files_of(copied)
    with pytest.raises(RunDirectoryError, match="dense model|no finished edge"):
        audit_again(copied)
    assert files_of(copied) == before
    if gone != "plan.json":  # without the ceiling, the dense model is not needed
        settings = yaml.safe_load((copied / "config.yaml").read_text())
        settings["audit"]["undefended"] = False
        (copied / "config.yaml").write_text(yaml.safe_dump(settings))
        edge = files_of(copied / "edge.patrol")
        assert audit_again(copied).audit.subjects == ("floor", "edge")
        assert files_of(copied / "edge.patrol") == edge


@pytest.mark.parametrize("how", ["refused", "interrupted"])
def test_an_audit_that_does_not_end_leaves_the_earlier_one(
    finished: RunResult, folder: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = Path(shutil.copytree(finished.directory, tmp_path / "a"))
    before = files_of(copied)

    def progress(stage: str, sentence: str) -> None:
        if how == "interrupted" and "Attacking" in sentence:
            raise KeyboardInterrupt

    with pytest.raises(InputError if how == "refused" else KeyboardInterrupt):
        audit_again(copied, attacker_images=(28,) if how == "refused" else None,
                    progress=progress)
    assert files_of(copied) == before
    monkeypatch.setattr(pipeline, "audit", None)
    assert run(tiny(folder, tmp_path)).audit.per_image == finished.audit.per_image


def test_attacked_again_with_other_seeds(finished: RunResult, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(finished.directory, tmp_path / "a"))
    again = audit_again(copied, seeds=(3, 4))
    assert any(f"audit {copied} --attacks" in note and "--seeds 3 4" in note
               for note in again.summary.notes)
    seeds = [r["attack_seed"] for r in again.audit.records if r["subject"] == "edge"]
    assert seeds == [3, 4]
    assert again.summary.pruned == finished.summary.pruned
    assert read_summary(copied).config["audit"]["seeds"] == [3, 4]
    page = again.report.read_bytes()
    again.report.unlink()
    assert rewrite_report(copied).read_bytes() == page


def test_a_run_ends_with_what_to_type_next(
    finished: RunResult, capsys: pytest.CaptureFixture[str]
) -> None:
    commands._conclude(finished)
    shown = capsys.readouterr().out.splitlines()
    assert shown[-2:] == [f"Report: {finished.report.resolve()}",
                          f"To deploy it: patrol-prune export {finished.directory}"]
    typed = shlex.split(shown[-1].partition("patrol-prune ")[2])
    assert main([*typed, "--formats", "pt2"]) == 0
    assert (finished.directory / pipeline.EXPORT / "edge.pt2").is_file()
    own = replace(finished, summary=replace(finished.summary, model="mine:build"))
    commands._conclude(own)
    assert capsys.readouterr().out.rstrip().endswith(" --model mine:build")


def test_code_that_a_run_s_folder_names_runs_only_where_it_is_named_again(
    finished: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copied = Path(shutil.copytree(finished.directory, tmp_path / "a"))
    settings = yaml.safe_load((copied / "config.yaml").read_text())
    settings["model"] = name = "a.theirs_for_test:build"
    (copied / "config.yaml").write_text(yaml.safe_dump(settings))
    (copied / "theirs_for_test.py").write_text(
        "from pathlib import Path\nfrom patrol_prune.models import build_model\n"
        "Path('ran').touch()\n"
        "def build(num_classes):\n"
        "    return build_model('small_resnet', num_classes, image_size=16)\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"came 'resnet18'. Give --model {name} "):
        audit_again("a", model="resnet18")
    with pytest.raises(InputError, match="which is 'small_resnet', came 'resnet18'. Leave it out"):
        audit_again(finished.directory, model="resnet18")
    assert main(["audit", "a"]) == 2
    assert f"--model {name} (in Python, model='{name}')" in capsys.readouterr().err
    assert not Path("ran").exists()
    seen: list[tuple[str, ...]] = []
    monkeypatch.setattr(commands, "_conclude", seen.append)
    monkeypatch.setattr(pipeline.Work, "attack_again",
                        lambda work: (fresh_model(work.config, 3), work.notes)[1])
    assert main(["audit", "a", "--model", name, "--attacks", "linear_inverse"]) == 0
    assert Path("ran").exists()
    assert f"audit a --model {name} --attacks linear_inverse" in seen[0][0]


def test_a_page_made_anew_is_of_the_audit_that_it_shows(
    finished: RunResult, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `report` after an audit that was stopped before its page, and by the run itself."""
    copied = Path(shutil.copytree(finished.directory, tmp_path / "a"))

    def stop(work: pipeline.Work) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Work, "do_report", stop)
        with pytest.raises(KeyboardInterrupt):
            audit_again(copied, attacks=("linear_inverse",), seeds=(3,), uploads=8)
    page = rewrite_report(copied).read_bytes()
    assert (copied / "checkpoints/audit").exists()  # the same command does not attack again
    (copied / "report.html").unlink()
    assert run(tiny(folder, tmp_path)).report.read_bytes() == page
    assert not (copied / "checkpoints/audit").exists()
    summary = read_summary(copied)
    who = summary.config["audit"]
    assert (who["attacks"], who["seeds"], who["uploads"]) == (["linear_inverse"], [3], 8)
    assert "attacked again" in summary.notes[0] and "--seeds 3 --uploads 8" in summary.notes[0]
    assert summary.versions == finished.summary.versions


def test_what_is_kept_with_an_audit_tells_its_own_uploads(folder: Path, tmp_path: Path) -> None:
    config = replace(tiny(folder, tmp_path), privacy=PrivacyConfig(dropout=0.5))
    config = replace(config, audit=replace(config.audit, uploads=8))
    notes = " ".join(audit_notes(config, device="cpu", notes=["First."])["notes"])
    assert notes.startswith("First.") and "had 8 uploads of every" in notes
    assert "one upload" not in notes


def test_no_page_is_made_while_another_process_works_there(
    finished: RunResult, tmp_path: Path
) -> None:
    pytest.importorskip("fcntl")
    copied = Path(shutil.copytree(finished.directory, tmp_path / "a"))
    before = files_of(copied)
    with RunDirectory(copied, read_config(copied / "config.yaml")):
        with pytest.raises(RunDirectoryError, match="Another process"):
            rewrite_report(copied)
    assert files_of(copied) == before


def test_an_audit_that_was_stopped_goes_on_after_the_attacks_that_had_ended(
    finished: RunResult, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(finished.directory, tmp_path / "a"))
    told: list[str] = []

    def progress(stage: str, sentence: str) -> None:
        told.append(sentence)
        if "Attacking the undefended" in sentence and len(told) < 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit_again(copied, attacks=("linear_inverse",), progress=progress)
    assert not any("had ended before" in sentence for sentence in told)
    told += ["again"] * 8
    audit_again(copied, attacks=("linear_inverse",), progress=progress)
    assert sum("had ended before" in sentence for sentence in told) == 1
    assert not (copied / "checkpoints/audit").exists()


@pytest.mark.parametrize("seed", [0, 1])
def test_what_a_stage_draws_hangs_on_the_seed_and_the_stage_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Not on the stages that this process did before, nor on what it drew."""
    config = replace(tiny(tmp_path, tmp_path), seed=seed)
    drawn: dict[tuple[str, int], list[float]] = {}
    with RunDirectory(tmp_path / "a", {}) as there:
        for first in (1, 2):
            work = pipeline.Work(config, there, None, torch.device("cpu"), None, False)  # type: ignore[arg-type]
            torch.manual_seed(first)
            before = torch.get_rng_state()
            for stage in ("model", "prune")[first - 1:]:
                monkeypatch.setattr(work, f"do_{stage}", lambda key=(stage, first):  # type: ignore[misc]
                                    drawn.update({key: torch.rand(2).tolist()}), raising=True)
                work.begin(stage)
            assert torch.equal(torch.get_rng_state(), before)
    assert drawn["prune", 1] == drawn["prune", 2] != drawn["model", 1]
    with draws_for(torch.device("cpu"), 1 - seed, "prune"):
        assert torch.rand(2).tolist() != drawn["prune", 1]


@pytest.mark.slow
def test_a_model_with_dropout_ends_at_the_same_wherever_its_run_is_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dropping_for_test.py").write_text(
        "from patrol_prune.models import build_model\nfrom torch import nn\n"
        "def build(num_classes):\n"
        "    model = build_model('small_resnet', num_classes, image_size=16)\n"
        "    model.fc = nn.Sequential(nn.Dropout(0.5), model.fc)\n    return model\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = replace(tiny(folder, tmp_path), model="dropping_for_test:build")
    torch.manual_seed(1)
    whole = run(config)
    for stage in ("prune", "finetune", "audit"):
        def progress(now: str, sentence: str, stage: str = stage) -> None:
            if now == stage:
                raise KeyboardInterrupt

        torch.manual_seed(2)
        other = replace(config, name=stage)
        with pytest.raises(KeyboardInterrupt):
            run(other, progress=progress)
        torch.manual_seed(3)
        assert run(other).audit.per_image == whole.audit.per_image


@pytest.mark.slow
def test_a_renamed_run_goes_by_its_new_name(
    finished: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that its report tells resumes it where it is, with nothing left to do."""
    copied = Path(shutil.copytree(finished.directory, tmp_path / "of mine"))
    rewrite_report(copied)
    again = audit_again(copied, seeds=(3,))
    assert (again.summary.name, again.summary.config["runs"]) == ("of mine", str(tmp_path))
    page = again.report.read_text(encoding="utf-8")
    assert rewrite_report(copied).read_text(encoding="utf-8") == page
    monkeypatch.setattr(pipeline, "finetune", None)
    monkeypatch.setattr(pipeline, "audit", None)
    assert main(shlex.split(again.summary.command)[1:]) == 0
    assert read_summary(copied) == again.summary


@pytest.mark.slow
def test_attacked_again_with_other_attacks_and_fewer_images(
    finished: RunResult, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(finished.directory, tmp_path / "a"))
    settings = yaml.safe_load((copied / "config.yaml").read_text())
    del settings["rmle"], settings["audit"]["check_attacks"]  # as an earlier release wrote it
    (copied / "config.yaml").write_text(yaml.safe_dump(settings))
    again = audit_again(copied, attacks=("linear_inverse", "query_free_match"),
                        attacker_images=(25,))
    rows = [(r["attack"], r["box"], r["attacker_images"]) for r in again.audit.records
            if r["subject"] == "edge"]
    assert rows == [("linear_inverse", "black", 27), ("query_free_match", "none", 27),
                    ("linear_inverse", "black", 25), ("query_free_match", "none", 25)]
    assert "query_free_match" in again.report.read_text(encoding="utf-8")


def test_what_is_no_finished_run_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="holds no run"):
        audit_again(tmp_path)
    with pytest.raises(RunDirectoryError, match="has no config.yaml"):
        rewrite_report(tmp_path)
    stop = KeyboardInterrupt()

    def progress(stage: str, _: str) -> None:
        if stage == "plan":
            raise stop

    with pytest.raises(KeyboardInterrupt):
        run(tiny(folder, tmp_path), progress=progress)
    with pytest.raises(RunDirectoryError, match="no finished edge"):
        audit_again(tmp_path / "a")
    with pytest.raises(RunDirectoryError, match="Expected a finished run"):
        rewrite_report(tmp_path / "a")


def test_images_may_lie_elsewhere_if_they_are_the_same(
    finished: RunResult, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = Path(shutil.copytree(finished.directory, tmp_path / "a"))
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    monkeypatch.setattr(pipeline, "finetune", None)
    monkeypatch.setattr(pipeline, "audit", None)
    monkeypatch.setattr(pipeline.Work, "attack_again", lambda work: work.config.data)
    config = replace(tiny(moved, tmp_path))
    assert run(config).summary.pruned == finished.summary.pruned
    assert audit_again(copied, data=moved) == str(moved)
    assert yaml.safe_load((copied / "config.yaml").read_text())["data"] == str(moved)
    Image.new("RGB", (16, 16), "white").save(moved / "train" / "red" / "000.png")
    for call in (lambda: run(config), lambda: audit_again(copied, data=moved)):
        with pytest.raises(RunDirectoryError, match="not those that the run.*with --data"):
            call()
    shutil.rmtree(moved)
    settings = yaml.safe_load((copied / "config.yaml").read_text())
    (copied / "config.yaml").write_text(yaml.safe_dump({**settings, "data": str(moved)}))
    for call in (lambda: run(config), lambda: audit_again(copied)):
        with pytest.raises(RunDirectoryError, match="Put them back, or say .*--data FOLDER"):
            call()


def test_weights_are_not_asked_for_once_the_dense_model_is_kept(
    finished: RunResult, folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine.safetensors"
    config = replace(tiny(folder, tmp_path), weights=str(file), normalization="dataset")

    def open_again(done: bool) -> None:
        with pipeline._opened(config, False, None, False) as work:
            assert work.folder.done("model") is done
            work.check_incoming()

    for stage, done in (("model", False), ("prune", True)):
        shutil.copyfile(finished.directory / pipeline.DENSE / "weights.safetensors", file)

        def progress(now: str, sentence: str, stage: str = stage) -> None:
            if now == stage:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(config, progress=progress)
        file.unlink()
        if not done:
            with pytest.raises(InputError, match="no file of weights"):
                open_again(done)
        else:
            open_again(done)


def test_changed_images_are_noticed(tmp_path: Path, write_folder: Writer) -> None:
    images = write_folder(tmp_path / "images", count=18)
    config = tiny(images, tmp_path / "runs")

    def stop(stage: str, _: str) -> None:
        if stage == "model":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, progress=stop)
    Image.new("RGB", (16, 16), "white").save(images / "train" / "red" / "000.png")
    with pytest.raises(RunDirectoryError, match="not those that the run"):
        run(config)


def test_changed_weights_are_noticed(
    finished: RunResult, folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine.safetensors"
    shutil.copyfile(finished.directory / pipeline.DENSE / "weights.safetensors", file)
    config = replace(tiny(folder, tmp_path), weights=str(file))

    def stop(stage: str, _: str) -> None:
        if stage == "plan":
            raise KeyboardInterrupt

    for _ in range(2):  # the same weights resume
        with pytest.raises(KeyboardInterrupt):
            run(config, progress=stop)
    save_file(build_model("small_resnet", 3, image_size=16, seed=9).state_dict(), file)
    with pytest.raises(RunDirectoryError, match=r"weights in .*mine\.safetensors are not those"):
        run(config)


def test_statistics_of_imagenet_are_for_torchvision_models_alone(tmp_path: Path) -> None:
    for model, kind in (("small_resnet", "dataset"), ("resnet18", "imagenet"), ("a:b", "dataset")):
        config = RunConfig("photos", "0.5", model=model, weights="w.safetensors")
        assert normalization_kind(config) == kind


def test_images_are_divided_without_overlap(folder: Path, tmp_path: Path) -> None:
    images = read_images(tiny(folder, tmp_path))
    assert (len(images.defender), len(images.attacker)) == (27, 27)
    assert images.attacker_labels.shape == (27,)
    # The folder's images have one hue per class: the brightest channel tells the label.
    hues = images.attacker.float().mean(dim=(2, 3)).argmax(1)
    assert torch.equal(hues, images.attacker_labels)
    # In no order: sorted, the first so many would be of the first classes alone.
    assert not torch.equal(hues, hues.sort().values)
    assert torch.equal(images.defender.labels, images.defender.labels.sort().values)
    keys = [{i.numpy().tobytes() for i in part} for part in
            (images.defender.images, images.attacker, images.victims)]
    assert not keys[0] & keys[1] and not keys[1] & keys[2]


def test_victims_among_the_attacker_s_images_are_taken_from_him(
    tmp_path: Path, write_folder: Writer
) -> None:
    images = write_folder(tmp_path / "images", count=24)
    for name in ("red", "blue"):
        for i in range(8):
            source = images / "train" / name / f"{i:03d}.png"
            (images / "test" / name / f"copy{i}.png").write_bytes(source.read_bytes())
    divided = read_images(replace(tiny(images, tmp_path), audit=AuditConfig(
        victims=200, attacker_share=0.5)))
    assert 20 <= len(divided.attacker) < 36
    assert "byte for byte" in divided.notes[0]


BAD: list[tuple[dict[str, object], type[PatrolError], str]] = [
    ({"data": "no/such/folder"}, InputError, "does not exist"),
    ({"model": "small_resne"}, InputError, "Did you mean: small_resnet"),
    ({"model": "alexnet"}, InputError, "alexnet cannot take images of 16x16"),
    ({"at": "layr2"}, InputError, "Did you mean: layer2"),
    ({"edge_macs": "10"}, BudgetError, "smallest reachable is"),
    ({"edge_macs": "1G"}, InputError, "above the dense edge at layer2"),
    ({"edge_macs": "0.5", "at": None}, InputError, "fraction of a dense edge, but no split"),
    ({"device": "cuda:99"}, InputError, "is not there"),
    ({"weights": "none.safetensors"}, InputError, "no file of weights"),
    ({"batch_size": 64}, InputError, "Add images"),
    ({"audit": AuditConfig(victims=8, attacker_share=0.5, attacker_images=(27,))}, InputError,
     "below the 27 images that the attacker owns"),
    ({"edge_macs": "0.2", "score": ScoreConfig(round_to=16)}, BudgetError, "smallest"),
    ({"edge_macs": "0.1", "score": ScoreConfig(structures="blocks")}, BudgetError, "of blocks"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda v: str(v)[:40])
def test_bad_input_is_refused_before_any_training(
    folder: Path, tmp_path: Path, change: dict[str, object], error: type[PatrolError],
    message: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline, "finetune", None)
    with pytest.raises(error, match=message):
        run(replace(tiny(folder, tmp_path), **change))  # type: ignore[arg-type]


def harm_no_image(root: Path) -> None:
    for path in root.rglob("*.png"):
        path.unlink()


def harm_one_class(root: Path) -> None:
    for part in ("train", "test"):
        for name in ("red", "green"):
            for path in (root / part / name).iterdir():
                path.unlink()
            (root / part / name).rmdir()


def harm_unreadable(root: Path) -> None:
    (root / "train" / "red" / "003.png").write_bytes(b"no picture")


def harm_other_classes(root: Path) -> None:
    (root / "test" / "red").rename(root / "test" / "rad")


def harm_no_test(root: Path) -> None:
    (root / "test").rename(root / "trial")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (harm_no_image, "images in each"),
        (harm_one_class, "at least two classes"),
        (harm_unreadable, r"red/003\.png cannot be read"),
        (harm_other_classes, "that the training part does not"),
        (harm_no_test, "val/ or test/"),
    ],
)
def test_bad_folders(
    tmp_path: Path, write_folder: Writer, harm: Callable[[Path], None], message: str
) -> None:
    root = write_folder(tmp_path / "images", count=4)
    harm(root)
    with pytest.raises(InputError, match=message):
        run(tiny(root, tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_a_directory_that_holds_something_else(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("mine")
    with pytest.raises(RunDirectoryError, match=r"thesis\.tex"):
        run(tiny(folder, tmp_path), overwrite=True)


@pytest.mark.parametrize("slip", [{"at": "layer9"}, {"edge_macs": "100M"}, {"edge_macs": "10"}])
def test_what_cannot_be_planned_costs_no_run_and_leaves_none(
    folder: Path, tmp_path: Path, slip: dict[str, str]
) -> None:
    wrong = replace(tiny(folder, tmp_path), **slip)
    with pytest.raises(PatrolError):
        run(wrong)
    assert list(tmp_path.iterdir()) == []  # so that the corrected settings meet no other run
    (tmp_path / "a").mkdir()
    for name in ("config.yaml", "summary.json"):
        (tmp_path / "a" / name).write_text("earlier: run")
    with pytest.raises(PatrolError):
        run(wrong, overwrite=True)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.yaml", "summary.json"]


def test_labels_outside_the_classes_of_the_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "two_outputs_for_test.py").write_text(
        "from patrol_prune.models import SmallResNet\ndef model(): return SmallResNet(2)\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"logits of shape \(1, 3\).*came \(1, 2\)"):
        run(replace(tiny(folder, tmp_path), model="two_outputs_for_test:model"))


def test_given_weights_are_not_trained_again(
    finished: RunResult, folder: Path, tmp_path: Path
) -> None:
    dense = finished.directory / "checkpoints" / "dense" / "weights.safetensors"
    told: list[str] = []
    config = replace(tiny(folder, tmp_path), weights=str(dense), normalization="dataset")
    result = run(config, progress=lambda stage, sentence: told.append(sentence))
    assert not any("Training small_resnet" in sentence for sentence in told)
    assert result.summary.dense == finished.summary.dense


def test_an_edge_without_a_spectral_bound_is_refused_before_training(
    folder: Path, tmp_path: Path
) -> None:
    config = replace(
        tiny(folder, tmp_path), model="mobilenet_v3_small", image_size=32, at="features.4",
        edge_macs="0.9", privacy=PrivacyConfig(alpha=0.1, lipschitz_form="spectral"),
    )
    with pytest.raises(UnsupportedModelError, match="spectral.*mul"):
        run(config)
    assert not (tmp_path / "a" / "checkpoints").exists()


@pytest.mark.slow
def test_the_model_is_trained_between_two_pruning_steps(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[int, int]] = []
    finetune = pipeline.finetune

    def spy(split, *args, **more):  # type: ignore[no-untyped-def]
        if hasattr(split, "edge"):
            trained.append((more["config"].epochs, edge_macs(split)))
        return finetune(split, *args, **more)

    monkeypatch.setattr(pipeline, "finetune", spy)
    config = tiny(folder, tmp_path)
    config = replace(config, score=replace(config.score, steps=2, between_epochs=1))
    result = run(config)
    (between, halfway), (after, final) = trained
    assert (between, after) == (1, config.finetune.epochs)
    dense, budget = result.summary.dense["edge_macs"], result.summary.plan["budget"]
    assert final == result.summary.pruned["edge_macs"] <= budget
    assert budget < halfway < dense
    assert abs(halfway - (dense + budget) / 2) < 0.05 * dense


@pytest.mark.slow
@pytest.mark.parametrize("structures", ["blocks", "both"])
def test_blocks_go_under_the_budget_and_the_page_names_them(
    finished: RunResult, folder: Path, tmp_path: Path, structures: str
) -> None:
    """Blocks alone in one step; blocks and channels in two, for less than channels can reach with
    all blocks (0.141) or without any one of them (0.076)."""
    config = tiny(folder, tmp_path)
    dense = finished.directory / "checkpoints" / "dense" / "weights.safetensors"
    alone = structures == "blocks"
    result = run(replace(
        config, edge_macs="0.6" if alone else "0.07", weights=str(dense), normalization="dataset",
        score=replace(config.score, structures=structures, steps=1 if alone else 2),
        finetune=replace(config.finetune, epochs=1),
        audit=replace(config.audit, undefended=False),
    ))
    summary, gone = result.summary, result.summary.removed_blocks
    assert len(gone) >= 2 and set(gone) <= {"layer1.0", "layer1.1", "layer2.1"}
    split = load(
        result.directory / "edge.patrol", lambda: build_model("small_resnet", 3, image_size=16)
    )
    assert [name for name, _ in split.removed_blocks] == gone
    assert not any(name.startswith(tuple(f"{g}." for g in gone)) for name in summary.prune)
    assert edge_macs(split) == summary.pruned["edge_macs"] <= summary.plan["budget"]
    assert bool(summary.prune) != alone
    widths = {name: m.out_channels for name, m in split.model.named_modules()
              if isinstance(m, torch.nn.Conv2d)}
    whole = {name: m.out_channels for name, m in
             build_model("small_resnet", 3, image_size=16).named_modules()
             if isinstance(m, torch.nn.Conv2d)}
    for name, (now, before) in summary.prune.items():
        if name in widths:  # not so where the group goes on under the name of a layer that is gone
            assert (now, before) == (widths[name], whole[name])
    page = result.report.read_text(encoding="utf-8")
    assert "Residual blocks removed" in page and all(f"<code>{g}</code>" in page for g in gone)
    assert read_summary(result.directory) == summary
