"""The command line: what it prints, what it refuses, and with which exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import save_file

from patrol_prune import commands
from patrol_prune.audit_model import ModelAudit, audit_model
from patrol_prune.audit_report import AuditReport
from patrol_prune.cli import main
from patrol_prune.errors import InputError
from patrol_prune.models import build_model
from patrol_prune.pipeline import run
from patrol_prune.settings import RunConfig

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("command", ["plan", "run", "tune", "audit", "export", "report", "demo"])
def test_help_teaches_with_an_example(command: str, capsys: Capture) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"  patrol-prune {command}" in text
    assert "_" not in "".join(w for w in text.split() if w.startswith("--"))
    assert re.findall(r"^  (--\S+ \S+)\n +\(type:", text, re.MULTILINE) == [], "without a word"


def test_no_command_shows_the_help(capsys: Capture) -> None:
    assert main([]) == 0
    assert "patrol-prune demo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune"], "prune"),
        (["run", "--data", "x"], "--edge-macs"),
        (["run", "--data", "x", "--edge-macs", "1M", "--image-sise", "3"], "--image-sise"),
        (["run", "--data", "x", "--edge-macs", "1M", "--seed", "one"], "seed"),
        (["run", "--data", "x", "--edge-macs", "1M", "--boundary", "cut"], "boundary"),
        (["run", "--data", "x", "--edge-macs", "1M", "--image-size", "4"], "at least 16 pixels"),
        (["run", "--data", "no/such", "--edge-macs", "1M"], "does not exist"),
        (["run", "--data", "x", "--edge-macs", "1M", "--device", "banana"], "is not there"),
        (["run", "--data", "x", "--edge-macs", "1M", "--finetune.lr", "0"], "lr"),
        (["run", "--data", "x", "--edge-macs", "1M", "--score.batches", "0"], "calibration batch"),
        (["run", "--config", "none.yaml"], "none.yaml"),
        (["plan", "--edge-macs", "1M", "--model", "resnt18"], "Did you mean: resnet18"),
        (["plan", "--edge-macs", "lots", "--model", "small_resnet", "--image-size", "16"], "lots"),
        (["plan", "--edge-macs", "1M", "--classes", "1"], "at least 2 classes"),
        (["plan", "--edge-macs", "1M", "--plot", "no/such/plan.png"], "a folder that exists"),
        (["plan", "--edge-macs", "1M", "--max-latency-ms", "0"], "positive limit of latency_ms"),
        (["plan", "--edge-macs", "1M", "--latency", "--threads", "0"], "threads as a whole number"),
        (["plan", "--edge-macs", "1M", "--max-pruning-ratio", "2"], "max_pruning_ratio"),
        (["plan", "--edge-macs", "1M", "--threads", "3"], "without --latency"),
        (["tune", "--data", "x"], "--edge-macs"),
        (["tune", "--data", "x", "--edge-macs", "1M", "--trails", "3"], "--trails"),
        (["tune", "--data", "x", "--edge-macs", "1M", "--trials", "0"], "at least one trial"),
        (["tune", "--data", "x", "--edge-macs", "1M", "--min-accuracy", "80"], "0.8 is 80%"),
        (["tune", "--data", "x", "--edge-macs", "1M", "--beta-range", "[9,1]"],
         "beta_range as 0 < least <= largest"),
        (["tune", "--data", "x", "--edge-macs", "1M", "--beta-range", "5"], "--beta-range"),
        (["tune", "--data", "x", "--edge-macs", "1M", "--trial-attacks", "[rmel]"],
         "Did you mean: rmle"),
        (["tune", "--data", "no/such", "--edge-macs", "1M"], "does not exist"),
        (["tune", "--config", "none.yaml"], "none.yaml"),
        (["audit", "nowhere"], "holds no run"),
        (["audit"], "either a run's folder or --model"),
        (["audit", "nowhere", "--model", "m:f"], "holds no run"),
        (["audit", "nowhere", "--model", "m:f", "--at", "x"], "--model without the run"),
        (["audit", "nowhere", "--victims", "3"], "--victims of a run cannot be changed"),
        (["audit", "--model", "m:f", "--at", "x"], "Expected --data"),
        (["audit", "--model", "resnet18", "--at", "x", "--data", "y"], "Give --weights"),
        (["audit", "--model", "m:f", "--at", "x", "--data", "no/such"], "does not exist"),
        (["audit", "--model", "m:f", "--at", "x", "--data", "y", "--attacks", "rmel"],
         "Did you mean: rmle"),
        (["audit", "--model", "m:f", "--at", "x", "--data", "y", "--out", "a.txt"], ".json"),
        (["report", "nowhere"], "finished run"),
        (["report"], "RUN, a run's folder\nSee: patrol-prune report --help"),
        (["audit", "nowhere", "--data", "photos"], "holds no run"),
        (["run", "--data", "x", "--edge-macs", "1M", "--attacker.batch-size", "0"],
         "attacker.batch_size: Expected"),
    ],
)
def test_bad_calls_exit_with_2_and_one_message(
    arguments: list[str], message: str, capsys: Capture
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert error.count("error:") == 1


def test_plan(tmp_path: Path, capsys: Capture) -> None:
    call = ["plan", "--model", "small_resnet", "--image-size", "16", "--edge-macs", "layer1"]
    assert main(call) == 0
    text = capsys.readouterr().out
    assert "→" in text and "layer3" in text and "Cut after" in text
    figure = tmp_path / "plan.png"
    assert main([*call, "--at", "layer2", "--json", "--plot", str(figure)]) == 0
    assert json.loads(capsys.readouterr().out)["recommended"] == "layer2"
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert main([*call, "--at", "layer2", "--json", "--structures", "blocks"]) == 0
    made = json.loads(capsys.readouterr().out)
    row = next(r for r in made["rows"] if r["name"] == "layer2")
    assert made["structures"] == "blocks" and row["blocks"] == ["layer1.0", "layer1.1", "layer2.1"]


@pytest.mark.parametrize(("written", "read"), [("0.5", "0.5"), ("9900000", "9900000"),
                                               ("'9.9M'", "9.9M")])
def test_a_budget_in_a_file_may_be_a_number(
    written: str, read: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"data: photos\nedge_macs: {written}\n")
    seen: list[RunConfig] = []
    monkeypatch.setattr(commands, "_whole_path", lambda config, overwrite: seen.append(config))
    assert main(["run", "--config", str(file)]) == 0
    assert main(["run", "--data", "photos", "--edge-macs", read]) == 0
    assert seen[0] == seen[1] and seen[0].edge_macs == read


def test_options_of_a_group_keep_their_name_and_lists_are_explained(capsys: Capture) -> None:
    call = ["run", "--data", "photos", "--edge-macs", "0.5"]
    for option in ("--audit.attacks", "--audit.seeds"):
        assert main([*call, option, "rmle"]) == 2
        told = capsys.readouterr().err
        assert option in told and "Write a list as [a,b]" in told


def test_names_of_files_are_left_as_they_are(capsys: Capture) -> None:
    assert main(["run", "--config", "w/missing/run.yaml"]) == 2
    assert "w/missing/run.yaml" in capsys.readouterr().err
    assert main(["run", "--data", "a", "--edge-macs", "0.5", "--seed", "run.py"]) == 2
    assert "run.py" in capsys.readouterr().err


def test_a_disk_that_cannot_be_written_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def full(config: RunConfig, overwrite: bool) -> None:
        raise OSError(28, "No space left on device", "runs/a/plan.json")

    monkeypatch.setattr(commands, "_whole_path", full)
    assert main(["run", "--data", "photos", "--edge-macs", "0.5"]) == 2
    told = capsys.readouterr().err
    assert "No space left on device" in told and "is kept" in told and "Traceback" not in told


def test_a_printed_configuration_is_read_back(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ["run", "--data", "photos", "--edge-macs", "0.5", "--at", "layer2",
            "--finetune.epochs", "3", "--audit.seeds", "[0,1]", "--score.round-to", "8",
            "--score.structures", "both"]
    assert main([*call, "--print-config"]) == 0
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    seen: list[RunConfig] = []
    monkeypatch.setattr(commands, "_whole_path", lambda config, overwrite: seen.append(config))
    assert main(call) == 0
    assert main(["run", "--config", str(tmp_path / "c.yaml")]) == 0
    assert seen[0] == seen[1] and seen[0].score.structures == "both"
    assert (seen[0].finetune.epochs, seen[0].audit.seeds) == (3, (0, 1))
    assert main(["run", "--config", str(tmp_path / "c.yaml"), "--seed", "7"]) == 0
    assert seen[2].seed == 7 and seen[2].at == "layer2"
    seen[0].to_yaml(tmp_path / "run.yaml")  # as a run directory keeps it
    assert main(["run", "--config", str(tmp_path / "run.yaml")]) == 0
    assert seen[3] == seen[0]


def test_any_model_is_audited_where_one_says(
    tmp_path: Path, write_folder: Callable[..., Path], capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = write_folder(tmp_path / "images", count=24)
    other = write_folder(tmp_path / "other", parts=("all",), count=8)
    (tmp_path / "anybodys_for_test.py").write_text(
        "from torch import nn\n"
        "def model():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(),\n"
        "                         nn.Linear(8 * 16 * 16, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    call = ["audit", "--model", "anybodys_for_test:model", "--at", "0", "--data", str(folder),
            "--image-size", "16", "--attacks", "linear_inverse", "transposed", "--epochs", "1",
            "--victims", "6", "--attacker-images", "25", "--shifted", str(other / "all"),
            "--out", "found/audit.json", "--device", "cpu"]
    assert main(call) == 0
    shown = capsys.readouterr().out
    assert "What each attack rebuilds" in shown and "linear_inverse" in shown
    assert "more_data_helps" in shown, shown
    found = AuditReport.from_json(tmp_path / "found" / "audit.json")
    rows = {(r["attack"], r["attacker_data"], r["attacker_images"]) for r in found.records
            if r["subject"] == "edge"}
    assert rows == {(attack, *own) for attack in ("linear_inverse", "transposed")
                    for own in (("same", 36), ("same", 25), ("shifted", 24))}
    assert found.records[0]["victim_images"] == 6 and "edge" in found.examples
    # One convolution is inverted nearly exactly by least squares.
    assert found.strongest()["attack"] == "linear_inverse" and found.strongest()["ssim"] > 0.9


def test_an_audit_of_what_is_private(
    tmp_path: Path, write_folder: Callable[..., Path], capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = write_folder(tmp_path / "images", count=24)
    (tmp_path / "private_for_test.py").write_text(
        "from torch import nn\n"
        "def model():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(),\n"
        "                         nn.Linear(8 * 16 * 16, 3))\n"
        "def corner(pixels):\n"
        "    mask = 0 * pixels[:, 0]\n"
        "    mask[:, :4, :4] = 1\n"
        "    return mask\n"
    )
    monkeypatch.chdir(tmp_path)
    call = ["audit", "--model", "private_for_test:model", "--at", "0", "--data", str(folder),
            "--image-size", "16", "--attacks", "linear_inverse", "--epochs", "1",
            "--victims", "6", "--device", "cpu", "--private-share", "0.75"]
    assert main(call) == 2
    assert "--private beside --private-share" in capsys.readouterr().err
    assert main([*call, "--private", "private_for_test:corners"]) == 2
    assert "no function 'corners'. Did you mean: corner" in capsys.readouterr().err
    assert main([*call, "--private", "private_for_test:corner"]) == 0
    shown = capsys.readouterr().out
    assert "priva" in shown and "aimed_ssim" in shown
    found = AuditReport.from_json(tmp_path / "audit.json")
    assert found.setup["private_share"] == 0.75
    assert found.strongest()["private_ssim"] > 0.9


@pytest.mark.parametrize("place", ["file/audit.json", "folder.json", "a.json"])
def test_a_report_that_cannot_be_written_is_refused_before_the_attacks(
    tmp_path: Path, write_folder: Callable[..., Path], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patrol_prune.audit_model.audit", None)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "a_examples").write_text("mine")
    weights = tmp_path / "w.safetensors"
    save_file(build_model("small_resnet", 3, image_size=16).state_dict(), weights)
    config = ModelAudit(
        model="small_resnet", at="layer1", weights=str(weights), image_size=16, device="cpu",
        data=str(write_folder(tmp_path / "images", count=24)), out=str(tmp_path / place),
    )
    with pytest.raises(InputError, match="--out as a file that can be written"):
        audit_model(config)


def test_a_file_of_settings_in_another_encoding_is_named(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "c.yaml").write_bytes("data: pho\u00f6tos\n".encode("latin-1"))
    for arguments in (["--config", str(tmp_path / "c.yaml")], [f"--config={tmp_path / 'c.yaml'}"]):
        assert main(["run", *arguments]) == 2
        error = capsys.readouterr().err
        assert "c.yaml" in error and "UTF-8" in error and "Traceback" not in error


def test_a_file_in_the_place_of_the_runs(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "runs").write_text("mine")
    assert main(["demo", "--runs", str(tmp_path / "runs")]) == 2
    assert "runs is a file" in capsys.readouterr().err


def test_unknown_key_in_a_file(tmp_path: Path, capsys: Capture) -> None:
    values = {"data": "x", "edge_macs": "1M", "modle": "resnet18"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    assert main(["run", "--config", str(tmp_path / "c.yaml")]) == 2
    assert "modle" in capsys.readouterr().err


def test_demo_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[RunConfig] = []
    monkeypatch.setattr(commands, "_whole_path", lambda config, overwrite: seen.append(config))
    monkeypatch.setattr(commands, "write_vehicles", lambda *a, **k: tmp_path)
    assert main(["demo", "--runs", str(tmp_path), "--seed", "4"]) == 0
    assert seen[0].seed == 4 and seen[0].runs == str(tmp_path)


def test_a_demo_s_vehicles_are_those_of_its_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[RunConfig] = []
    monkeypatch.setattr(commands, "_whole_path", lambda config, overwrite: seen.append(config))
    drawn: list[str] = []
    monkeypatch.setattr(commands, "write_vehicles", lambda folder, **_: drawn.append(str(folder)))
    monkeypatch.setenv("HOME", str(tmp_path))
    for seed in "01":
        assert main(["demo", "--runs=~/runs", "--seed", seed, "--overwrite"]) == 0
    assert drawn == [config.data for config in seen] and len(set(drawn)) == 2
    assert drawn[0].startswith(f"{tmp_path}/runs/")


@pytest.mark.parametrize(("arguments", "message"), [
    (["runs/a"], "are kept; the same command goes on"),
    (["--model", "m:f", "--at", "x", "--data", "y"], "the same command begins anew"),
])
def test_an_interrupted_audit_says_what_is_true_of_it(
    arguments: list[str], message: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "attack", stop)
    assert main(["audit", *arguments]) == 130
    assert message in capsys.readouterr().err


def test_interrupted_says_how_to_go_on(
    tmp_path: Path, write_folder: Callable[..., Path], capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = write_folder(tmp_path / "images", count=24)

    def stopping(config: RunConfig, **more: object) -> None:
        def stop(stage: str, _: str) -> None:
            if stage == "model":
                raise KeyboardInterrupt

        run(config, progress=stop)

    monkeypatch.setattr(commands, "run", stopping)
    call = ["run", "--data", str(folder), "--edge-macs", "layer1", "--model", "small_resnet",
            "--image-size", "16", "--batch-size", "8", "--runs", str(tmp_path / "runs")]
    assert main(call) == 130
    error = capsys.readouterr().err
    file = tmp_path / "runs" / "run" / "config.yaml"
    assert f"patrol-prune run --config {file}" in error and file.is_file()
    assert main([*call, "--name", "of mine"]) == 130
    file = tmp_path / "runs" / "of mine" / "config.yaml"
    assert f"patrol-prune run --config '{file}'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("ends", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_or_a_scheduler_ends_a_real_process(
    tmp_path: Path, write_folder: Callable[..., Path], root: Path, ends: signal.Signals
) -> None:
    folder = write_folder(tmp_path / "images", count=24)
    process = subprocess.Popen(
        [sys.executable, "-m", "patrol_prune", "run", "--data", str(folder), "--edge-macs",
         "layer1", "--model", "small_resnet", "--image-size", "16", "--batch-size", "4",
         "--runs", str(tmp_path / "runs"), "--train.epochs", "10000"],
        cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # A shell's background jobs ignore the signal, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    first = tmp_path / "runs" / "run" / "checkpoints" / "train" / "epoch-0001"
    deadline = time.monotonic() + 120
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(ends)
    try:
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert "Interrupted" in error and "Traceback" not in error
