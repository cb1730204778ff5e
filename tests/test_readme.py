"""The first snippet of the README runs as it stands, but for how long it trains and attacks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import patrol_prune as pp
from patrol_prune.models import SmallResNet

README = Path(__file__).resolve().parent.parent / "README.md"


def build() -> torch.nn.Module:
    return SmallResNet(5, width=8)


def test_the_first_snippet_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = re.search(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert found is not None
    snippet = found.group(1).replace("steps=300", "steps=2").replace("epochs=10", "epochs=1")
    audit, finetune = pp.audit, pp.finetune

    def quick_audit(*args: Any, **more: Any) -> Any:
        return audit(*args, attacks=("linear_inverse",), **more)

    def quick_finetune(*args: Any, **more: Any) -> Any:
        assert more["config"].epochs == 1
        return finetune(*args, progress=False, **more)

    monkeypatch.setattr(pp, "audit", quick_audit)
    monkeypatch.setattr(pp, "finetune", quick_finetune)
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(48, 3, 16, 16, generator=generator)
    batches = [(images[:16], torch.arange(16) % 5)] * 2
    names: dict[str, Any] = {
        "model": build(), "example_inputs": images[:4], "batches": batches,
        "calibration": batches, "attacker_images": images[:40], "victim_images": images[40:],
    }
    exec(snippet, names)
    split = names["split"]
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
