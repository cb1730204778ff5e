"""What the documents show runs as it stands, but for how long it trains and what it is given."""

from __future__ import annotations

import re
import shlex
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
import torch_pruning as tp
from torch import nn

import patrol_prune as pp
from patrol_prune import (
    _audit_command,
    _export_command,
    _plan_command,
    _tune_command,
    commands,
)
from patrol_prune.attacks import InverseNetworkConfig, QueryFreeConfig
from patrol_prune.attacks.rmle import RMLEConfig
from patrol_prune.data import ImageSet
from patrol_prune.settings import RunConfig
from patrol_prune.tune_space import Candidate, Space

ROOT = Path(__file__).resolve().parent.parent
VEHICLES = "integrations/vehicle_reid/README.md"
SNIPPETS = {"README.md": 3, "docs/audit.md": 11, "docs/bounds.md": 1, "docs/plan.md": 1,
            "docs/tune.md": 1, VEHICLES: 1}
"""Blocks of Python on each page; a test below runs each of them."""

DECODER = InverseNetworkConfig(width=4, depth=0, epochs=1, max_extensions=0)
DESCENT = RMLEConfig(losses=("mse",), lambda_tv=(0.0,), lambda_start=(0.0,), spaces=("pixels",),
                     steps=2, tuning_images=2, tuning_steps=1, refine=False)
SHADOW = QueryFreeConfig(epochs=1, starts=1, reconstruct=("linear",))
QUICK = {"rmle": DESCENT, "query_free_same": SHADOW}


@dataclass(frozen=True)
class Block:
    """What stands between two fences."""

    page: str
    line: int
    language: str
    text: str

    def run(self, names: dict[str, Any], changes: dict[str, str] | None = None) -> None:
        """Execute it, with some of its text replaced; a traceback names the line of the page."""
        text = self.text
        for old, new in (changes or {}).items():
            assert text.count(old) == 1, f"{self.page} has no {old!r} to replace any more"
            text = text.replace(old, new)
        exec(compile("\n" * (self.line - 1) + text, str(ROOT / self.page), "exec"), names)


def blocks(page: str, language: str) -> list[Block]:
    found, opened = [], None
    for number, line in enumerate((ROOT / page).read_text("utf-8").splitlines(keepends=True), 1):
        fence = re.match(r"\s*(?:```+|~~~+)\s*(\S*)", line)
        if fence is None:
            if opened is not None:
                opened = replace(opened, text=opened.text + line)
        elif opened is None:
            opened = Block(page, number + 1, fence[1], "")
        else:
            found.append(opened)
            opened = None
    assert opened is None and {b.language for b in found} <= {"python", "bash", ""}
    return [block for block in found if block.language == language]


def snippets(page: str) -> list[Block]:
    return blocks(page, "python")


def build() -> nn.Module:
    """Layers with the names that the documents cut at."""
    layers = OrderedDict[str, nn.Module]()
    for i, (inputs, outputs) in enumerate(pairwise((3, 8, 16, 16, 32)), 1):
        layers[f"layer{i}"] = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, min(i, 2), 1), nn.BatchNorm2d(outputs), nn.ReLU())
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "fc": nn.Linear(32, 5)}
    return nn.Sequential(layers)


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What a page takes as given, in an empty folder; audits and trainings are short."""
    audit, finetune = pp.audit, pp.finetune

    def quick_audit(*args: Any, **more: Any) -> Any:
        more.setdefault("attacks", ("linear_inverse",))
        settings = {name: one for name, one in QUICK.items() if name in more["attacks"]}
        return audit(*args, config=DECODER, settings=settings, **more)

    def quick_finetune(*args: Any, **more: Any) -> Any:
        config = replace(more.pop("config", pp.FinetuneConfig()), epochs=1, inner_steps=1,
                         surrogate_warmup_steps=1)
        return finetune(*args, config=config, progress=False, **more)

    monkeypatch.setattr(pp, "audit", quick_audit)
    monkeypatch.setattr(pp, "finetune", quick_finetune)
    monkeypatch.chdir(tmp_path)
    images, labels = pictures(48), torch.arange(48) % 5
    batches = [(images[:16], labels[:16])] * 2
    return {
        "__name__": "snippet", "model": build(), "example_inputs": images[:4], "batches": batches,
        "calibration": batches, "attacker_images": images[:40], "victim_images": images[40:],
    }


def test_no_snippet_is_without_a_test() -> None:
    assert {page: len(snippets(page)) for page in SNIPPETS} == SNIPPETS


def test_the_readmes(names: dict[str, Any]) -> None:
    first, second, packed = snippets("README.md")
    first.run(names, {"steps=300": "steps=2"})
    split, images = names["split"], names["example_inputs"]
    assert pp.edge_macs(split) <= 0.4 * pp.edge_macs(pp.Split(names["dense"], images[:1], "layer3"))
    assert set(names["report"].subjects) == {"edge", "undefended", "floor"}
    split.model.eval()
    with torch.no_grad():
        z = split.edge(images[:1])
        again = pp.load("split.patrol", build)
        again.model.eval()  # it was saved as it was, in training mode
        assert torch.equal(again.edge(images[:1]), z)
        device = torch.export.load("deploy/edge.pt2")
        assert torch.equal(device.module()(images[:1]), z)
    edge = sum(p.numel() for p in split.edge.parameters())
    assert sum(p.numel() for p in device.parameters()) == edge < sum(
        p.numel() for p in split.model.parameters())
    second.run(names)
    assert {r["attack"] for r in names["report"].records if r["subject"] == "edge"} == {
        "linear_inverse", "inverse_network", "unet_ssim", "rmle"}
    rounded = pp.make_defence("quantisation", 2).apply(split, calibration=images)
    pp.export(rounded, "runs/shop/export", formats=("pt2",))
    with torch.no_grad():
        z = rounded.edge(images)
    found = {**names, "z": z}
    packed.run(found)
    assert torch.equal(found["z"], z)
    assert {len(upload) for upload in found["uploads"]} == {z[0].numel() // 4}


def test_those_of_the_audit(
    names: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    write_folder: Callable[..., Path], import_benchmark: Callable[[str], ModuleType],
) -> None:
    (whole, comparing, own, published, attributes, regions, defence, own_defence, kept,
     deployed, pairs) = snippets("docs/audit.md")
    known, images = names["attacker_images"], names["victim_images"]
    split = pp.Split(names["model"], known[:1], at="layer3")
    names |= {"split": split, "attacker_labels": torch.arange(len(known)) % 5,
              "dense_split": pp.Split(build(), known[:1], at="layer3")}
    whole.run(names)
    assert set(names["report"].subjects) == {"edge", "undefended", "floor"}
    comparing.run({**names, "torch": torch, "one": split, "other": names["dense_split"],
                   "names": ("linear_inverse", "inverse_network")})
    own.run(names)

    write_folder(tmp_path / "cifar10", count=10, size=32)
    methods = import_benchmark("frontier_methods")
    monkeypatch.setattr(methods, "Frontier", partial(
        methods.Frontier, work=tmp_path / "work", train_images=4, attacker_images=24,
        test_images=6))
    monkeypatch.setattr(sys, "path", [*sys.path])
    benchmark = dict(names)
    published.run(benchmark)
    assert [r["attack"] for r in benchmark["report"].records if r["subject"] == "edge"] == ["mine"]
    for name in re.findall(r"(?:taylor|patrol)-layer\d", published.text):
        assert (ROOT / "benchmarks/models/models" / name).is_dir()

    names |= {"attacker_inputs": known, "victim_inputs": images,
              "victim_labels": torch.arange(len(images)) % 5}
    attributes.run(names)
    assert names["single"].chance == pytest.approx(1 / 5, abs=0.1)

    names |= {"find": lambda pixels: (pixels.mean(1) > 0.5).float(),
              "task_loss": torch.nn.functional.cross_entropy}
    regions.run(names)
    assert {row["attack"] for row in names["report"].records} >= {"aimed_ssim", "linear_inverse"}
    assert names["objective"].private is names["private"]

    names |= {"x": known[:8], "dense": names["dense_split"].model, "build_model": build}
    defence.run(names)
    instead = re.search(r"# or (Combined.*)", defence.text)
    assert instead is not None and isinstance(eval(instead[1], names), pp.Defence)
    defended = names["split"]
    names |= {"torch": torch}
    own_defence.run(names)
    mine = names["mine"]
    kept.run(names)
    for now, before in ((names["split"], defended), (names["mine"], mine)):
        assert now is not before
        assert torch.equal(now.edge(known[:2]), before.edge(known[:2]))
    with torch.no_grad():
        assert not torch.equal(names["plain"].edge(known[:2]), names["split"].edge(known[:2]))

    plain = pp.Split(build().eval(), known[:1], at="layer3")
    pp.export(plain, "deploy", formats=("pt2",))
    deployed.run(names)
    edge = plain.edge
    with torch.no_grad():
        assert torch.allclose(names["deployed"].edge(known[:3]), edge(known[:3]), atol=1e-6)
        names |= {"attacker_uploads": edge(known), "victim_uploads": edge(images)}
    pairs.run(names)


def test_that_of_the_bounds(names: dict[str, Any]) -> None:
    pixels = pictures(8)
    names |= {"pixels": pixels, "split": pp.Split(names["model"].eval(), pixels[:1], at="layer4")}
    snippets("docs/bounds.md")[0].run(names)
    assert names["leak"].worst_mse_bound <= names["leak"].mse_bound


def test_that_of_the_plan(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plan, timing = pp.plan, pp.LatencyConfig(min_run_time=1e-3, roundings=(None,))

    def quick_plan(*args: Any, measure_latency: bool, **more: Any) -> Any:
        return plan(*args, measure_latency=measure_latency and timing, **more)

    monkeypatch.setattr(pp, "plan", quick_plan)
    names["importance"] = tp.importance.MagnitudeImportance()
    snippets("docs/plan.md")[0].run(names, {'"200M"': '"0.1M"'})
    names["pruner"].step()
    assert pp.edge_macs(names["split"]) <= names["row"].prune_to
    assert names["row"].latency is not None


def test_that_of_the_search(
    names: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    write_folder: Callable[..., Path],
) -> None:
    """With one trial whose training and attack are made up."""
    module = sys.modules["patrol_prune.tune"]
    row = {"ssim": 0.4, "attack": "inverse_network_ssim"}
    outcome = SimpleNamespace(
        summary=SimpleNamespace(dense={"accuracy": 0.9}, pruned={
            "accuracy": 0.89, "edge_macs": 100, "feature_bytes": 64}),
        audit=SimpleNamespace(strongest=lambda subject: row, flags=[], records=[]))
    monkeypatch.setattr(module, "run", lambda *_, **__: outcome)
    monkeypatch.setattr(module, "train_dense", lambda *_, **__: Path("dense.safetensors"))
    monkeypatch.setattr(module, "search_space",
                        lambda *_: Space((Candidate("layer1", 100, 200),), 200))
    monkeypatch.setattr(pp, "TuneConfig", partial(
        pp.TuneConfig, model="small_resnet", image_size=16, batch_size=8, trials=1))
    write_folder(tmp_path / "photos", count=22)
    snippets("docs/tune.md")[0].run(names)
    assert [names["trial"]] == list(names["result"].front)


def test_that_of_the_vehicles(names: dict[str, Any]) -> None:
    identities, images = torch.arange(64) // 4, (255 * pictures(64)).to(torch.uint8)
    names |= {
        "images": ImageSet(images, identities, tuple(map(str, range(16)))),
        "query": [pictures(4, seed=1)], "gallery": [pictures(4, seed=2)] * 2,
        "query_ids": range(4), "gallery_ids": [*range(4), *range(4)],
        "query_cameras": [0] * 4, "gallery_cameras": [1] * 8,
    }
    snippets(VEHICLES)[0].run(names, {
        '"resnet18"': '"small_resnet"', "identities=576": "identities=16",
        "image_size=128": "image_size=16"})
    assert names["found"].queries == 4 and 0 < names["found"].map <= 1


class Reached(Exception):
    """The command line was understood, and the work would begin."""


def command_lines() -> Iterator[list[str]]:
    for block in [block for page in SNIPPETS for block in blocks(page, "bash")]:
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[:2] != ["pip", "install"]:
                yield words


OURS = [words[1:] for words in command_lines() if words[0] == "patrol-prune"]
OTHERS = [words for words in command_lines() if words[0] != "patrol-prune"]


@pytest.mark.parametrize("arguments", OURS, ids=" ".join)
def test_the_commands_are_understood(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each as typed, with the file of settings that it names, up to where its work begins."""
    works = {"plan": (_plan_command, "plan"), "run": (commands, "run"),
             "tune": (_tune_command, "tune"), "audit": (_audit_command, "audit_model"),
             "audit of a run": (_audit_command, "audit_again"),
             "export": (_export_command, "export_run"),
             "report": (commands, "rewrite_report"), "demo": (commands, "write_vehicles")}
    for name, (module, work) in works.items():
        monkeypatch.setattr(module, work, create_autospec(
            getattr(module, work), side_effect=Reached(name)))
    monkeypatch.setattr(_plan_command, "build_model", lambda name, classes, *, image_size: build())
    monkeypatch.setattr(commands, "_log", lambda verbose: None)
    monkeypatch.chdir(tmp_path)
    if "--config" in arguments:
        file = Path(arguments[arguments.index("--config") + 1])
        file.parent.mkdir(parents=True)
        RunConfig("photos", "200M").to_yaml(file)
    with pytest.raises(Reached, match=f"^{arguments[0]}"):
        commands.execute(arguments)


def test_the_vehicles_commands_are_understood(
    monkeypatch: pytest.MonkeyPatch, import_vehicles: Callable[[str], ModuleType]
) -> None:
    script = import_vehicles("run")
    monkeypatch.setattr(script, "run", create_autospec(script.run, side_effect=Reached))
    assert OTHERS
    for python, name, *arguments in OTHERS:
        assert (python, name) == ("python", "integrations/vehicle_reid/run.py")
        with pytest.raises(Reached):
            script.main(arguments)
