"""The audit end to end on a tiny edge, its report on disk, and what it refuses."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from patrol_prune.attacks import InverseNetworkConfig
from patrol_prune.attacks.checks import smooth_images
from patrol_prune.audit import audit, compute_features
from patrol_prune.audit_report import AuditReport, mean_and_std
from patrol_prune.errors import CheckpointError, InputError
from patrol_prune.metrics import mse, ssim
from patrol_prune.pixels import Normalization

IMAGES = smooth_images(240, (3, 16, 16), seed=9)
KNOWN, VICTIM = IMAGES[:200], IMAGES[200:]
CONFIG = InverseNetworkConfig(width=16, depth=1, epochs=6, batch_size=16, max_extensions=0)
NORMALIZATION = Normalization((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def edge_of(*layers: nn.Module) -> SimpleNamespace:
    return SimpleNamespace(edge=nn.Sequential(*layers))


def open_edge() -> SimpleNamespace:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return edge_of(nn.Conv2d(3, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU())


def closed_edge() -> SimpleNamespace:
    """Sends three numbers per image."""
    return edge_of(nn.AdaptiveAvgPool2d(1), nn.Dropout(0.5), nn.Flatten())


class Oracle:
    """Knows the victim's images; stands for a perfect attack."""

    def fit(self, z: Tensor, pixels: Tensor) -> None:
        self.fitted = True

    def reconstruct(self, z: Tensor) -> Tensor:
        return VICTIM.clone()


@pytest.fixture(scope="module")
def report() -> AuditReport:
    return audit(
        closed_edge(), KNOWN, VICTIM, seeds=(0, 1), undefended=open_edge(), config=CONFIG,
        normalization=NORMALIZATION, examples=5,
    )


def test_the_edge_stands_between_floor_and_ceiling(report: AuditReport) -> None:
    assert [(r["subject"], r["attack"], r["attack_seed"]) for r in report.records] == [
        ("floor", "mean_image", None),
        ("edge", "inverse_network", 0),
        ("edge", "inverse_network", 1),
        ("undefended", "inverse_network", 0),
        ("undefended", "inverse_network", 1),
    ]
    rows = {row["subject"]: row for row in report.summary()}
    assert rows["floor"]["mse"] > rows["edge"]["mse"] > 2 * rows["undefended"]["mse"]
    assert rows["edge"]["ssim"] < rows["undefended"]["ssim"] - 0.2
    for r in report.records:
        assert (r["attacker_images"], r["victim_images"]) == (200, 40)
        assert r["ssim_worst5"] >= r["ssim"]


def test_the_floor_is_the_mean_of_the_attackers_images(report: AuditReport) -> None:
    guess = KNOWN.mean(0).expand_as(VICTIM)
    floor = report.strongest("floor")
    assert floor["mse"] == pytest.approx(float(mse(VICTIM, guess).mean()))
    values = ssim(VICTIM, guess)
    assert floor["ssim"] == pytest.approx(float(values.mean()))
    # The 5% that were reconstructed best are 2 of 40.
    assert floor["ssim_worst5"] == pytest.approx(float(values.sort().values[-2:].mean()))
    assert report.per_image["floor/mean_image/None"]["ssim"] == pytest.approx(values.tolist())


def test_summary_and_strongest(report: AuditReport) -> None:
    row = next(r for r in report.summary() if r["subject"] == "edge")
    values = [r["ssim"] for r in report.records if r["subject"] == "edge"]
    assert row["seeds"] == 2 and values[0] != values[1]
    assert row["ssim"] == pytest.approx(np.mean(values))
    assert row["ssim_std"] == pytest.approx(np.std(values, ddof=1))
    assert report.strongest("edge")["ssim"] == max(values)
    assert mean_and_std([2.0]) == (2.0, None)
    with pytest.raises(InputError, match="Did you mean: undefended"):
        report.strongest("undefend")


def test_the_report_comes_back_from_disk(report: AuditReport, tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    text = report.to_json(path)
    assert json.loads(text) == json.loads(path.read_text())
    assert (tmp_path / "audit_examples" / "originals.png").is_file()
    back = AuditReport.from_json(path)
    for name in ("records", "flags", "per_image", "example_indices"):
        assert getattr(back, name) == getattr(report, name)
    assert set(back.examples) == {"originals", "floor", "edge", "undefended"}
    for name, images in report.examples.items():
        assert images.shape == (5, 16, 16, 3) and images.dtype == np.uint8
        assert np.array_equal(back.examples[name], images), name
    assert AuditReport.from_json(report.to_json()).records == report.records
    shown = (VICTIM[report.example_indices] * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert np.array_equal(report.examples["originals"], shown.numpy())


def test_a_torn_report_is_refused_by_name(report: AuditReport, tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    with pytest.raises(CheckpointError, match="Run the audit"):
        AuditReport.from_json(path)
    report.to_json(path)
    (tmp_path / "audit_examples" / "edge.png").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"edge\.png"):
        AuditReport.from_json(path)
    path.write_text(path.read_text()[:500])
    with pytest.raises(CheckpointError, match=r"audit\.json"):
        AuditReport.from_json(path)


def test_the_edge_is_left_as_it_was_and_attacked_in_evaluation_mode() -> None:
    split = open_edge()
    split.edge.train()
    split.edge[1].eval()
    before = {k: v.clone() for k, v in split.edge.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    audit(split, KNOWN, VICTIM, attacks=(Oracle(),), normalization=NORMALIZATION)
    assert torch.equal(torch.get_rng_state(), state)
    assert split.edge.training and split.edge[0].training and not split.edge[1].training
    for name, value in split.edge.state_dict().items():
        assert torch.equal(value, before[name]), name
    z = compute_features(closed_edge().edge, VICTIM, NORMALIZATION, batch_size=7)
    torch.testing.assert_close(z, NORMALIZATION.to_input(VICTIM).mean(dim=(2, 3)))


def test_the_same_seed_gives_the_same_records() -> None:
    config = InverseNetworkConfig(width=8, depth=0, epochs=1, max_extensions=0)
    one, two = (audit(open_edge(), KNOWN, VICTIM, config=config, seeds=(4,)) for _ in range(2))
    for a, b in zip(one.records, two.records, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {
            k: v for k, v in b.items() if k != "seconds"
        }


def test_ones_own_attack_and_uint8_images() -> None:
    known, victim = ((i * 255).round().to(torch.uint8) for i in (KNOWN, VICTIM))
    said: list[str] = []
    oracle = Oracle()
    found = audit(
        open_edge(), known, victim, seeds=(0, 1), examples=0, progress=said.append,
        attacks={"instance": oracle, "factory": lambda seed: Oracle()},
    )
    assert [(r["attack"], r["attack_seed"]) for r in found.records[1:]] == [
        ("instance", 0), ("factory", 0), ("factory", 1)
    ]
    assert not hasattr(oracle, "fitted")
    best = found.strongest("edge")
    assert best["ssim"] > 0.999 and best["psnr"] <= 100 and best["plateau"] is None
    assert found.examples == {} and any("instance, seed 0" in sentence for sentence in said)


def test_flags_name_their_subject() -> None:
    dead = edge_of(nn.Conv2d(3, 4, 1))
    nn.init.zeros_(dead.edge[0].weight)
    config = InverseNetworkConfig(width=8, depth=0, epochs=2, max_extensions=0, lr=0.0)
    found = audit(dead, KNOWN, VICTIM, config=config, check_attacks=True)
    names = {(f["subject"], f["name"]) for f in found.flags}
    assert {
        ("identity", "cannot_invert_identity"),
        ("edge", "constant_features"),
        ("edge", "loss_did_not_fall"),
        ("edge", "not_better_than_mean_image"),
    } <= names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"victim_data": IMAGES[150:]}, "50 of 90"),
        ({"victim_data": (IMAGES[199:] * 255).round().to(torch.uint8)}, r"victim_data\[0\]"),
        ({"victim_data": VICTIM[:, :, :14]}, "one size"),
        ({"victim_data": VICTIM[0]}, "victim_data"),
        ({"attacker_data": KNOWN * 2}, "attacker_data"),
        ({"attacker_data": KNOWN * float("nan")}, "NaN"),
        ({"attacker_data": KNOWN[..., :10, :], "victim_data": VICTIM[..., :10, :]}, "11 pixels"),
        ({"attacks": ("inverse_netwrok",)}, "Did you mean: inverse_network"),
        ({"attacks": ()}, "one or more attacks"),
        ({"attacks": ("inverse_network", "inverse_network")}, "different names"),
        ({"attacks": (3,)}, "Expected an attack"),
        ({"seeds": ()}, "seeds"),
        ({"seeds": (1, 1)}, "seeds"),
    ],
)
def test_bad_calls_are_refused_before_any_work(change: dict[str, object], message: str) -> None:
    class Untouched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("the edge ran")

    arguments = {"attacker_data": KNOWN, "victim_data": VICTIM} | change
    with pytest.raises(InputError, match=message):
        audit(edge_of(Untouched()), **arguments)  # type: ignore[arg-type]
