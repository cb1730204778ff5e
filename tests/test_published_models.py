"""The models of the benchmark that lie beside it are those that its rows tell of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import patrol_prune as pp
from patrol_prune.checkpoint import read_info
from patrol_prune.cost import feature_bytes
from patrol_prune.models import SmallResNet
from patrol_prune.storage import load_state

NAMES = {
    "taylor-layer3": "layer3", "patrol-layer3": "layer3", "with-none@longer-0-layer4": "layer4",
    "with-patrol@longer-whole-10-layer4": "layer4",
    "with-patrol-10-layer3": "layer3",
}


def rows(root: Path, name: str) -> list[dict[str, object]]:
    files = sorted((root / "benchmarks" / "models" / "rows").glob(f"{name}-*.json"))
    return [row for file in files for row in json.loads(file.read_text())]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_what_its_rows_say(
    root: Path, name: str, import_benchmark: Callable[[str], ModuleType]
) -> None:
    split = import_benchmark("frontier_models").published(name)
    told = rows(root, name)
    assert told and split.at == NAMES[name]
    for row in told:
        assert row["edge_macs"] == pp.edge_macs(split)
        assert row["edge_params"] == pp.count_params(split.edge)
        assert row["feature_bytes"] == feature_bytes(split.feature_shape)
    folder = root / "benchmarks" / "models" / "models" / name
    kept = load_state(folder)[1] if name.startswith("with-") else read_info(folder).extra
    assert kept["accuracy"] == told[0]["accuracy"]
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(split.cloud(split.edge(x)), split.model(x))


def test_all_begin_with_the_dense_model_beside_them(root: Path) -> None:
    tensors, meta = load_state(root / "benchmarks" / "models" / "baseline")
    model = SmallResNet(10, width=16)
    model.load_state_dict(tensors)
    for name in (*NAMES, "dense-layer3"):
        assert all(row["dense_accuracy"] == meta["accuracy"] for row in rows(root, name))
        assert len({row["base"] for row in rows(root, name)}) == 1
