"""Edges as they are deployed: exported, sending whole numbers, run by something else than torch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import patrol_prune as pp
from patrol_prune.access import Repeated
from patrol_prune.errors import InputError

X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def exported(name: str, strength: float, tmp_path: Path) -> Any:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(),
                        nn.Linear(32, 2)).eval()
    split = pp.make_defence(name, strength).apply(pp.Split(net, X, at="1"), calibration=X)
    with pytest.warns(UserWarning, match=r"torch.seed\(\)"):
        program = torch.export.export(split.edge.eval(), (X[:1],))
    torch.export.save(program, tmp_path / "edge.pt2")
    return lambda: torch.export.load(tmp_path / "edge.pt2").module()(X[:1])


@pytest.mark.parametrize(("name", "strength"), [
    ("gaussian_noise", 1.0), ("laplacian_noise", 1.0), ("feature_dropout", 0.5)])
def test_an_exported_edge_draws_as_the_device_is_seeded(
    name: str, strength: float, tmp_path: Path
) -> None:
    upload = exported(name, strength, tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = upload()
        assert not torch.equal(upload(), first)  # another device, or after a start
        torch.manual_seed(1)
        assert torch.equal(upload(), first)


class Whole(nn.Module):
    """Noise around 100, as whole numbers."""

    def __init__(self, kind: torch.dtype) -> None:
        super().__init__()
        self.kind, self.generator = kind, torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        noise = 20 * torch.randn(x.shape, generator=self.generator)
        return (100 + noise).round().clamp(1, 127).to(self.kind)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int16])
def test_sums_of_whole_uploads_do_not_run_over(kind: torch.dtype) -> None:
    got = Repeated(Whole(kind), 8)(X)
    assert torch.equal(got, Repeated(Whole(torch.float32), 8)(X))
    assert float(got.mean()) == pytest.approx(99, abs=3)


def test_an_edge_without_gradients_is_refused_before_the_other_attacks() -> None:
    class Outside(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(x.numpy()[:, :1] * 2.0)

    said: list[str] = []
    images = torch.rand(24, 3, 16, 16)
    half = SimpleNamespace(edge=Outside())
    with pytest.raises(InputError, match=r"detach\(\)"):
        pp.audit(half, images[:20], images[20:], attacks=("linear_inverse", "rmle"),
                 progress=said.append)
    assert not said
    report = pp.audit(half, images[:20], images[20:], attacks=("linear_inverse",))
    assert report.strongest()["attack"] == "linear_inverse"


def test_a_function_as_an_edge_is_told_to_be_wrapped() -> None:
    images = torch.rand(24, 3, 16, 16)
    with pytest.raises(InputError, match=r"nn\.Module, came a function"):
        pp.audit(SimpleNamespace(edge=lambda x: x), images[:20], images[20:])


def test_a_shadow_of_integers_is_refused() -> None:
    """It would keep the packed weights of the original."""
    edge = nn.Sequential(nn.Flatten(), nn.Linear(432, 4), nn.LayerNorm(4)).eval()
    whole = torch.ao.quantization.quantize_dynamic(edge, {nn.Linear}, dtype=torch.qint8)
    images = torch.rand(40, 3, 12, 12)
    with pytest.raises(InputError, match="trained anew"):
        pp.audit(SimpleNamespace(edge=whole, cloud=nn.Linear(4, 2)), images[:30], images[30:],
                 attacks=("query_free_same",), attacker_labels=torch.arange(30) % 2)
