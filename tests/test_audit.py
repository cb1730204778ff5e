"""The audit end to end on a tiny edge, its report on disk, and what it refuses."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from patrol_prune.access import Draws
from patrol_prune.attacks import (
    FitRecord,
    InverseNetworkConfig,
    Knowledge,
    LinearInverseConfig,
    registry,
)
from patrol_prune.attacks.base import some_of
from patrol_prune.attacks.checks import NO_GRADIENT, smooth_images
from patrol_prune.attacks.query_free_config import QueryFreeConfig
from patrol_prune.attacks.registry import ATTACKS
from patrol_prune.attacks.rmle import RMLEConfig
from patrol_prune.audit import audit, compute_features
from patrol_prune.audit_report import AuditReport, mean_and_std
from patrol_prune.audit_run import AuditRun
from patrol_prune.errors import CheckpointError, InputError, TrainingError
from patrol_prune.metrics import mse, ssim, thumbnail
from patrol_prune.pixels import Normalization
from patrol_prune.warm_start import WarmStarts

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

    box = "black"

    def fit(self, known: Knowledge) -> None:
        self.fitted = True

    def reconstruct(self, z: Tensor) -> Tensor:
        return VICTIM.clone()


@pytest.fixture(scope="module")
def report() -> AuditReport:
    return audit(
        closed_edge(), KNOWN, VICTIM, attacks=("inverse_network",), seeds=(0, 1),
        undefended=open_edge(), config=CONFIG,
        normalization=NORMALIZATION, examples=5,
    )


def test_the_report_says_what_it_was_made_with(report: AuditReport) -> None:
    found = report.setup
    told = found["attacks"]["inverse_network"]
    assert told["seeds"] == [0, 1]
    assert {"width", "epochs", "loss"} <= told["settings"].keys() and "seed" not in told["settings"]
    assert told["settings"]["width"] == CONFIG.width
    assert found["features"] == {"edge": [3], "undefended": [12, 8, 8]}
    assert found["normalization"]["mean"] == [0.5, 0.4, 0.3]
    assert AuditReport.from_json(report.to_json()).setup == found
    old = json.loads(report.to_json())
    del old["setup"]
    assert AuditReport.from_json(json.dumps(old)).setup == {}


def test_setups_differ_where_attackers_or_pictures_do() -> None:
    def setup(width: int = 4, known: Tensor = KNOWN, victim: Tensor = VICTIM) -> dict[str, object]:
        config = dataclasses.replace(CONFIG, width=width, epochs=1)
        made = audit(open_edge(), known, victim, attacks={
            "small": "inverse_network", "linear_inverse": "linear_inverse",
            "own": lambda seed: Oracle()}, config=config)
        assert AuditReport.from_json(made.to_json()).setup == made.setup
        return made.setup

    first = setup()
    assert first["attacks"]["own"] == {"seeds": [0], "settings": None}  # type: ignore[index]
    eight_bits = (VICTIM * 255).round().byte()
    assert setup(victim=eight_bits.float() / 255)["victims"] == setup(victim=eight_bits)["victims"]
    for other, key in ((setup(width=6), "attacks"), (setup(known=KNOWN[1:]), "attackers"),
                       (setup(victim=VICTIM.flip(0)), "victims")):
        assert {k for k in first if first[k] != other[k]} == {key}


@pytest.mark.parametrize(("attack", "seed", "told"), [
    (None, None, "edge: "), ("rmle", None, "edge, rmle: "), ("rmle", 0, "edge, rmle, seed 0: ")])
def test_a_warning_names_what_it_is_of_alone(
    caplog: pytest.LogCaptureFixture, attack: str | None, seed: int | None, told: str
) -> None:
    run = AuditRun([], VICTIM, NORMALIZATION, 8, 0, None)
    run.flag([NO_GRADIENT], "edge", attack, seed)
    assert caplog.messages == [told + NO_GRADIENT.meaning]


def test_the_edge_stands_between_floor_and_ceiling(report: AuditReport) -> None:
    assert [(r["subject"], r["attack"], r["attack_seed"]) for r in report.records] == [
        ("floor", "mean_image", None),
        ("floor", "nearest_image", None),
        ("edge", "inverse_network", 0),
        ("edge", "inverse_network", 1),
        ("undefended", "inverse_network", 0),
        ("undefended", "inverse_network", 1),
    ]
    rows = {row["subject"]: row for row in report.summary() if row["attack"] != "nearest_image"}
    assert rows["floor"]["mse"] > rows["edge"]["mse"] > 2 * rows["undefended"]["mse"]
    assert rows["edge"]["ssim"] < rows["undefended"]["ssim"] - 0.2
    for r in report.records:
        assert (r["attacker_images"], r["victim_images"]) == (200, 40)
        assert r["ssim_worst5"] >= r["ssim"] and r["mse_worst5"] <= r["mse"]
        assert (r["attacker_data"], r["ms_ssim"], r["chance1"]) == ("same", None, 1 / 40)
    boxes = {(r["attack"], r["box"], r["random_edge"]) for r in report.records}
    assert boxes == {("mean_image", "none", None), ("nearest_image", "black", False),
                     ("inverse_network", "black", False)}
    # Who sees an image's details tells it from others; a guess is right once in 40.
    assert rows["undefended"]["rank1"] > 0.9 and rows["floor"]["rank1"] < 0.1


def test_the_floor_is_the_mean_of_the_attackers_images(report: AuditReport) -> None:
    guess = KNOWN.mean(0).expand_as(VICTIM)
    floor = report.records[0]
    assert floor["mse"] == pytest.approx(float(mse(VICTIM, guess).mean()))
    values = ssim(VICTIM, guess)
    assert floor["ssim"] == pytest.approx(float(values.mean()))
    # The 5% that were reconstructed best are 2 of 40.
    best = mse(VICTIM, guess).sort().values[:2]
    assert floor["mse_worst5"] == pytest.approx(float(best.mean()))
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


def test_what_is_printed_is_the_most_that_any_attack_saw() -> None:
    row = {"subject": "edge", "attack": "blurred", "ssim": 0.6, "ssim_worst5": 0.7, "mse": 0.02}
    sharp = {**row, "attack": "sharp", "ssim": 0.5, "ssim_worst5": 0.9, "mse": 0.01}
    again = {**row, "ssim": 0.55, "ssim_worst5": 0.8}
    assert str(AuditReport([row, again])).endswith("SSIM 0.600 by blurred, worst 5% 0.800, "
                                                   "MSE 0.0200")
    found = AuditReport([row, again, sharp])
    assert str(found).endswith("SSIM 0.600 by blurred, worst 5% 0.900 by sharp, MSE 0.0100 by "
                               "sharp")
    assert found.strongest() is row


class Thumbnails(Oracle):
    """Sees thumbnails of the victim's images."""

    def __init__(self, side: int) -> None:
        self.side = side

    def reconstruct(self, z: Tensor) -> Tensor:
        return thumbnail(VICTIM, self.side)


@pytest.mark.parametrize("side", [2, 4, 6])
def test_a_likeness_is_told_as_a_thumbnail_of_the_same(side: int, tmp_path: Path) -> None:
    made = audit(open_edge(), KNOWN, VICTIM, attacks={"cheat": Thumbnails(side)})
    sides = [row["side"] for row in made.thumbnails]
    assert sides == sorted(sides) and sides[0] == 1 and max(sides) < 16
    assert made.as_thumbnail() == pytest.approx(side, abs=1e-3)
    made.to_json(tmp_path / "audit.json")
    assert AuditReport.from_json(tmp_path / "audit.json").as_thumbnail() == made.as_thumbnail()


@pytest.mark.parametrize("up", [1, 2])
def test_the_whole_picture_is_the_largest_thumbnail(up: int) -> None:
    """Nothing is hidden there, so that no answer would be the wrong one."""
    class Wide(Oracle):
        def reconstruct(self, z: Tensor) -> Tensor:
            return VICTIM.repeat_interleave(up, dim=3)

    wide = [images.repeat_interleave(up, dim=3) for images in (KNOWN, VICTIM)]
    made = audit(open_edge(), *wide, attacks={"oracle": Wide()})
    assert made.as_thumbnail() == 16.0 and made.thumbnails[-2]["side"] == 12
    assert AuditReport(made.records).as_thumbnail() is None


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
    one, two = (audit(open_edge(), KNOWN, VICTIM, attacks="inverse_network",
                            config=config, seeds=(4,)) for _ in range(2))
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
    assert [(r["attack"], r["attack_seed"]) for r in found.records[2:]] == [
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
    found = audit(dead, KNOWN, VICTIM, attacks="inverse_network", config=config,
                  check_attacks=True)
    names = {(f["subject"], f["name"]) for f in found.flags}
    assert {
        ("identity", "cannot_invert_identity"),
        ("edge", "constant_features"),
        ("edge", "loss_did_not_fall"),
        ("edge", "not_better_than_mean_image"),
    } <= names


class Grey(Oracle):
    box = "grey"


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
        ({"attacks": ("query_free_same",)}, "needs the other half"),
        ({"settings": {"inverse_netwrk": CONFIG}}, "Did you mean: inverse_network"),
        ({"settings": {"rmle": LinearInverseConfig()}}, "as RMLEConfig"),
        ({"attacker_labels": torch.zeros(3)}, "one class for each of the 200"),
        ({"attacker_labels": [0] * 200}, "came list"),
        ({"attacker_labels": torch.zeros(200)}, "came torch.float32"),
        ({"attacker_labels": torch.arange(200) - 1}, "came -1 among them"),
        ({"examples": 2.5}, "examples as a whole number of at least 0"),
        ({"examples": -1}, "examples as a whole number of at least 0"),
        ({"batch_size": 0}, "batch_size as a whole number of at least 1"),
        ({"batch_size": "a"}, "batch_size as a whole number of at least 1"),
        ({"largest_feature_bytes": -1}, "largest_feature_bytes"),
        ({"settings": RMLEConfig()}, "settings as a mapping"),
        ({"progress": "x"}, "progress as a function"),
        ({"observer": "x"}, "observer as a function"),
        ({"attacker_images": (2.5,)}, "attacker_images as a whole number"),
        ({"attacks": {3: "rmle"}}, "name of an attack as a str"),
        ({"attacks": {"own": lambda seed: None}}, "came NoneType"),
        ({"attacks": {"own": Grey()}}, "black, white, none, or none at all, came 'grey'"),
        ({"attacks": {"own": lambda seed: Grey()}}, "attribute box of the attack Grey"),
        ({"attacker_images": (50, 50)}, "different numbers"),
        ({"attacker_images": (201,)}, "between 1 and the attacker's 200"),
        ({"shifted_data": IMAGES[150:]}, "also in shifted_data"),
        ({"shifted_data": KNOWN[..., :14]}, "shifted_data and victim images of one size"),
        ({"seeds": ()}, "seeds"),
        ({"uploads": 0}, "uploads as a whole number of at least 1"),
        ({"uploads": 2.5}, "uploads as a whole number of at least 1"),
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


def test_every_edge_runs_once_before_the_first_attack() -> None:
    begun: list[int] = []

    class Begins(Oracle):
        def fit(self, known: Knowledge) -> None:
            begun.append(1)

    other = edge_of(nn.Conv2d(1, 1, 1))
    for split, more, named in ((open_edge(), {"undefended": other}, "undefended"),
                               (other, {}, "edge")):
        with pytest.raises(InputError, match=rf"edge of the {named} that runs on images \[N, 3, "):
            audit(split, KNOWN, VICTIM, attacks=(Begins(),), **more)
    assert not begun


def test_numbers_of_numpy_stand_in_a_report_as_pythons() -> None:
    found = audit(open_edge(), KNOWN, VICTIM, attacks=(Oracle(),), seeds=np.arange(1, 2),
                  attacker_images=np.array([50]), examples=0)
    assert AuditReport.from_json(found.to_json()).strongest()["attack_seed"] == 1


def test_pictures_that_the_attacker_nearly_owns_are_flagged() -> None:
    changed = VICTIM[:3].flip(3)
    changed[0, 0, 0, 0] = 1.0 - changed[0, 0, 0, 0]
    found = audit(open_edge(), torch.cat([KNOWN, changed]), VICTIM, attacks=(Oracle(),),
                  shifted_data=torch.cat([1 - KNOWN, VICTIM[5:6] * 0.99]))
    told = [(f["attacker_data"], f["meaning"]) for f in found.flags
            if f["name"] == "near_duplicates"]
    assert [data for data, _ in told] == ["same", "shifted"]
    assert told[0][1].startswith("3 of the victim's 40") and told[0][1].endswith("i 0, 1, 2).")
    assert "i 5)" in told[1][1]
    clean = audit(open_edge(), KNOWN, VICTIM, attacks=(Oracle(),))
    assert "near_duplicates" not in {f["name"] for f in clean.flags}


class Exploding(Oracle):
    """An attack whose loss becomes NaN."""

    def fit(self, known: Knowledge) -> None:
        raise TrainingError("The loss was not finite.", step=3, term="reconstruction")


def test_an_attack_that_breaks_off_is_flagged_and_the_others_go_on() -> None:
    split = open_edge()
    report = audit(split, KNOWN, VICTIM, attacks={"exploding": Exploding(), "oracle": Oracle()})
    assert [r["attack"] for r in report.records if r["subject"] == "edge"] == ["oracle"]
    assert ("attack_failed", "exploding") in [(f["name"], f["attack"]) for f in report.flags]
    with pytest.raises(TrainingError, match="Every attack"):
        audit(split, KNOWN, VICTIM, attacks={"exploding": Exploding()})


class Sklearn(Oracle):
    def fit(self, known: Knowledge) -> object:  # type: ignore[override]
        return self


class OddRecord(Oracle):
    """Its record names an epoch that it does not have."""

    def fit(self, known: Knowledge) -> FitRecord:  # type: ignore[override]
        return FitRecord((), (), 1.0, 1.0, 3, True, 0, 0.0)


class Words(Oracle):
    def fit(self, known: Knowledge) -> FitRecord:  # type: ignore[override]
        return FitRecord(("low",), (), 1.0, 1.0, 0, True, 0, 0.0)  # type: ignore[arg-type]


class NoTensor(Oracle):
    def reconstruct(self, z: Tensor) -> Tensor:
        return [VICTIM]  # type: ignore[return-value]


class TooMany(Oracle):
    def reconstruct(self, z: Tensor) -> Tensor:
        return torch.cat([VICTIM, VICTIM])


class NoBox(Oracle):
    @property
    def box(self) -> str:  # type: ignore[override]
        raise OSError("no box today")


def unmade(seed: int) -> Oracle:
    raise OSError("no weights today")


@pytest.mark.parametrize(("own", "reason"), [
    (Sklearn(), "expected a FitRecord or None from fit"), (OddRecord(), "IndexError"),
    (Words(), "ValueError"), (NoTensor(), "came list"), (TooMany(), "to reconstruct"),
    (NoBox(), "no box today"), (unmade, "no weights today"),
])
def test_what_ones_own_attack_hands_back_costs_its_own_score_alone(
    own: object, reason: str
) -> None:
    found = audit(open_edge(), KNOWN, VICTIM,
                  attacks={"own": own, "oracle": Oracle()})  # type: ignore[dict-item]
    assert [r["attack"] for r in found.records if r["subject"] == "edge"] == ["oracle"]
    flag = next(f for f in found.flags if f["attack"] == "own")
    assert flag["name"] == "attack_failed" and reason in flag["meaning"]


def test_an_own_record_is_kept_in_numbers_that_json_knows(tmp_path: Path) -> None:
    class Own(Oracle):
        def fit(self, known: Knowledge) -> FitRecord:  # type: ignore[override]
            loss = torch.tensor(0.25)
            return FitRecord((loss,), (loss,), np.float32(1), loss,  # type: ignore[arg-type]
                             np.int64(0), np.True_, np.int64(2), 0.0)  # type: ignore[arg-type]

    found = audit(open_edge(), KNOWN, VICTIM, attacks={"own": Own()}, examples=0)
    found.to_json(tmp_path / "audit.json")
    row = AuditReport.from_json(tmp_path / "audit.json").strongest()
    assert (row["held_out_loss"], row["plateau"], row["extensions"]) == (0.25, True, 2)


def test_an_observer_that_fails_on_ones_own_attack_costs_no_score() -> None:
    def observer(subject: str, name: str, attack: object, guess: Tensor) -> None:
        attack.config  # type: ignore[attr-defined]  # noqa: B018
        raise OSError("no place left")

    found = audit(open_edge(), KNOWN, VICTIM, attacks={"own": Oracle()}, observer=observer)
    assert found.strongest()["ssim"] > 0.999
    told = {f["name"]: f["meaning"] for f in found.flags}
    assert "has no attribute 'config'" in told["observer_failed"]
    with pytest.raises(OSError, match="no place left"):  # what is ours has a configuration
        audit(open_edge(), KNOWN, VICTIM, attacks="linear_inverse", observer=observer)


class Curious:
    """Keeps what it was given."""

    box = "white"

    def __init__(self, seen: list[Knowledge], relative: float = 0.5) -> None:
        self.seen, self.relative = seen, relative

    def fit(self, known: Knowledge) -> FitRecord:
        self.seen.append(known)
        self.mean = known.pixels.mean(0)
        loss = (self.relative,)
        return FitRecord(loss, loss, 1.0, 1.0, 0, True, 0, 0.0, chosen={"lr": 0.1, "tried": [1]})

    def reconstruct(self, z: Tensor) -> Tensor:
        return self.mean.expand(len(z), -1, -1, -1)


class Noisy(nn.Module):
    def __init__(self, sigma: float = 0.1) -> None:
        super().__init__()
        self.layer, self.sigma = open_edge().edge, sigma
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        return z + self.sigma * torch.randn(z.shape, generator=self.generator)


def test_the_mean_of_many_uploads_has_less_noise() -> None:
    """Sixteen uploads under noise are one under noise a quarter as large."""
    def attacked(sigma: float, uploads: int) -> AuditReport:
        return audit(SimpleNamespace(edge=Noisy(sigma)), KNOWN, VICTIM, uploads=uploads,
                     attacks=("linear_inverse",), normalization=NORMALIZATION)

    once, often, quarter = attacked(2.0, 1), attacked(2.0, 16), attacked(0.5, 1)
    found = [r.strongest()["mse"] for r in (once, often, quarter)]
    assert found[1] == pytest.approx(found[2], rel=0.05) and found[0] > 1.5 * found[1]
    assert [r.strongest()["uploads"] for r in (once, often)] == [1, 16]
    told = [[flag["name"] for flag in r.flags].count("seen_once") for r in (once, often)]
    assert told == [1, 0]


def test_many_uploads_undo_dropout() -> None:
    """What came through shows the rest: some eight draws of half of the values are all of them."""
    class Dropping(Noisy):
        def forward(self, x: Tensor) -> Tensor:
            z = self.layer(x)
            return 2.0 * z * (torch.rand(z.shape, generator=self.generator) < 0.5)

    def attacked(edge: nn.Module, uploads: int) -> float:
        found = audit(SimpleNamespace(edge=edge), KNOWN, VICTIM, uploads=uploads,
                      attacks=("linear_inverse",), normalization=NORMALIZATION)
        return float(found.strongest()["mse"])

    plain, often, once = attacked(Noisy(0.0), 1), attacked(Dropping(), 12), attacked(Dropping(), 1)
    assert often == pytest.approx(plain, rel=0.05) and once > 2.0 * plain


def test_a_random_edge_is_known_by_any_of_its_images() -> None:
    """Dropout shows on no black picture of an edge without a bias."""
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.generator = nn.Conv2d(3, 4, 1, bias=False), torch.Generator()

        def forward(self, x: Tensor) -> Tensor:
            z = self.layer(x)
            return z * (torch.rand(z.shape, generator=self.generator) < 0.5)

    victim = VICTIM.clone()
    victim[:3] = 0.0
    found = audit(SimpleNamespace(edge=Dropping()), KNOWN, victim, attacks=("linear_inverse",),
                  uploads=3)
    assert [(r["random_edge"], r["uploads"]) for r in found.records if r["subject"] == "edge"] == [
        (True, 3)]


def test_an_edge_that_draws_nothing_is_asked_once_for_each_upload_or_many() -> None:
    split, asked = open_edge(), []
    split.edge.register_forward_hook(lambda *_: asked.append(1))
    counts = []
    for uploads in (1, 4):
        asked.clear()
        found = audit(split, KNOWN, VICTIM, uploads=uploads, attacks=("linear_inverse",))
        counts.append(len(asked))
        assert "seen_once" not in {flag["name"] for flag in found.flags}
    assert counts[1] <= counts[0] + 2  # the two that tell whether it draws


def test_an_attacker_gets_the_edge_itself_and_nothing_of_the_victims_images() -> None:
    seen: list[Knowledge] = []
    split = SimpleNamespace(edge=Noisy(), cloud=nn.Flatten())
    labels = torch.arange(len(KNOWN))
    weight = split.edge.layer[0].weight
    before = split.edge.generator.get_state()

    def curious(seed: int) -> Curious:
        return Curious(seen)

    found = audit(split, KNOWN, VICTIM, attacks=(curious,), normalization=NORMALIZATION,
                  attacker_labels=labels, attacker_images=(50, None), shifted_data=1 - KNOWN)
    whole, some, shifted = seen
    assert [len(k.pixels) for k in seen] == [200, 50, 200]
    picked = some_of(200, 50)
    assert picked is not None and torch.equal(whole.pixels, KNOWN)
    assert torch.equal(some.pixels, KNOWN[picked]) and torch.equal(shifted.pixels, 1 - KNOWN)
    assert whole.labels is not None and some.labels is not None and shifted.labels is None
    assert torch.equal(whole.labels, labels) and torch.equal(some.labels, labels[picked])
    assert whole.z is not None and some.z is not None and torch.equal(some.z, whole.z[picked])
    assert whole.cloud is split.cloud and whole.random_edge
    assert whole.observed is not None and len(whole.observed) == len(VICTIM)
    assert [(r["attacker_data"], r["attacker_images"], r["box"], r["chosen"], r["random_edge"])
            for r in found.records if r["subject"] == "edge"] == [
        ("same", 200, "white", "lr 0.1", True), ("same", 50, "white", "lr 0.1", True),
        ("shifted", 200, "white", "lr 0.1", True),
    ]
    floors = [(r["attack"], r["attacker_data"]) for r in found.records if r["subject"] == "floor"]
    assert floors == [("mean_image", "same"), ("mean_image", "shifted"), ("nearest_image", "same")]
    assert set(found.per_image) >= {"edge/curious/0", "edge/curious/0/same-50"}
    # Everything is as it was: the noise's generator, the weights' flags and gradients.
    assert torch.equal(split.edge.generator.get_state(), before)
    assert weight.requires_grad and weight.grad is None
    # Each query draws anew, around the true feature, and has a gradient.
    assert whole.edge is not None
    split.edge.eval()
    pixels = KNOWN[:4].clone().requires_grad_()
    one, two = whole.edge(pixels), whole.edge(pixels)
    true = split.edge.layer(NORMALIZATION.to_input(KNOWN[:4]))
    assert not torch.equal(one, two) and 0.05 < float((one - true).detach().std()) < 0.2
    one.sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().sum() > 0


def test_a_shadow_has_the_architecture_and_none_of_the_weights() -> None:
    seen: list[Knowledge] = []
    split = open_edge()
    audit(split, KNOWN, VICTIM, attacks=(Curious(seen), lambda seed: Curious(seen)))
    make = seen[-1].shadow_edge
    assert make is not None
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, same, other = make(1), make(1), make(2)
    assert torch.equal(torch.get_rng_state(), state)
    original = split.edge.state_dict()
    for name, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
    assert one[0].weight.shape == split.edge[0].weight.shape
    assert not torch.equal(one[0].weight, original["0.weight"])
    assert not torch.equal(one[0].weight, other[0].weight)
    assert one.training and all(p.requires_grad for p in one.parameters())


def test_features_too_large_to_keep_are_not_kept() -> None:
    seen: list[Knowledge] = []
    found = audit(open_edge(), KNOWN, VICTIM, largest_feature_bytes=1000, config=CONFIG,
                  attacks=(lambda seed: Curious(seen), "linear_inverse"))
    assert seen[0].z is None and seen[0].edge is not None
    kept = audit(open_edge(), KNOWN, VICTIM, attacks=("linear_inverse",))
    assert found.records[-1]["ssim"] == pytest.approx(kept.records[-1]["ssim"], abs=1e-4)
    assert found.records[1]["mse"] == pytest.approx(kept.records[1]["mse"], rel=1e-3)


def test_rmle_begins_at_the_strongest_black_box_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[object] = []

    def spy(config: object, device: str, warm: object) -> Curious:
        begun.append(warm)
        return Curious([])

    kind = registry.ATTACKS["rmle"]
    monkeypatch.setitem(registry.ATTACKS, "rmle", dataclasses.replace(kind, make=spy))
    attacks = ("rmle", "inverse_network", "linear_inverse")
    config = dataclasses.replace(CONFIG, epochs=1)
    found = audit(open_edge(), KNOWN, VICTIM, attacks=attacks, config=config)
    assert [r["attack"] for r in found.records[2:]] == [
        "inverse_network", "linear_inverse", "rmle"
    ]
    # One epoch reaches less than least squares on the attacker's held-out images.
    assert [type(warm).__name__ for warm in begun] == ["NoneType", "LinearInverse"]
    begun.clear()
    audit(open_edge(), KNOWN, VICTIM, attacks=("rmle",))
    assert begun == [None, None]


def test_each_seed_of_a_white_box_begins_at_its_own_black_box(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the spread over seeds is less than that of attackers."""
    begun: list[object] = []

    def spy(config: RMLEConfig, device: str, warm: object) -> Curious:
        begun.append(None if warm is None else (config.seed, warm.config.seed))
        return Curious([])

    kind = registry.ATTACKS["rmle"]
    monkeypatch.setitem(registry.ATTACKS, "rmle", dataclasses.replace(kind, make=spy))
    audit(open_edge(), KNOWN, VICTIM, attacks=("linear_inverse", "rmle"), seeds=(0, 1, 2))
    assert [pair for pair in begun if pair is not None] == [(0, 0), (1, 1), (2, 2)]


class Answers:
    """Reconstructs with the given images, in their order."""

    def __init__(self, images: Tensor, held_out: Tensor | None) -> None:
        self.images, self.held_out = images, held_out

    def fit(self, known: Knowledge) -> None:
        pass

    def reconstruct(self, z: Tensor) -> Tensor:
        return self.images[z[:, 0].long()]


def test_a_warm_start_is_chosen_by_the_error_on_images_that_were_held_out() -> None:
    known = Knowledge(KNOWN, z=torch.arange(200.0).unsqueeze(1))
    near, far = (KNOWN * share for share in (0.98, 0.97))
    overfit = KNOWN.clone()
    overfit[:20] *= 0.9
    held = torch.arange(20)
    one, two, three, silent = (Answers(images, held) for images in (overfit, near, far, far))
    silent.held_out, silent.images = None, 0.9 * KNOWN
    warm = WarmStarts(known, KNOWN.mean(0))
    assert warm.of(0) is None
    warm.offer(0, one)
    assert warm.of(0) is one and warm.of(7) is one
    warm.offer(0, three)
    warm.offer(1, two)
    warm.offer(0, silent)
    assert warm.of(0) is three and warm.of(1) is two and warm.of(7) is two


@pytest.mark.slow
def test_draws_are_set_apart_for_each_attack() -> None:
    """What an attack scores on a random edge does not depend on which others there are."""
    def scores(*attacks: str, edge: nn.Module) -> dict[str, float]:
        found = audit(SimpleNamespace(edge=edge), KNOWN, VICTIM, attacks=attacks, seeds=(0, 1),
                      attacker_images=(150, None), shifted_data=1 - KNOWN,
                      config=dataclasses.replace(CONFIG, epochs=1))
        return {key: value["mse"] for key, value in found.per_image.items() if "linear" in key}

    many = scores("inverse_network", "linear_inverse", edge=Noisy(0.5))
    assert len(many) == 6 and scores("linear_inverse", edge=Noisy(0.5)) == many
    # The same of one that draws from the global generator.
    drops = nn.Sequential(open_edge().edge, AlwaysDropout())
    state = torch.get_rng_state()
    many = scores("inverse_network", "linear_inverse", edge=drops)
    assert torch.equal(torch.get_rng_state(), state)
    assert scores("linear_inverse", edge=drops) == many


class AlwaysDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.3, training=True)


def test_draws_differ_between_those_they_are_set_apart_for() -> None:
    edge = Noisy()
    draws, x = Draws(edge), KNOWN[:2]
    first = edge(x)
    seen = []
    for who in ("a", "b", "a"):
        draws.apart(who, 3)
        seen.append((edge(x), torch.rand(4)))
    for kind in (0, 1):
        assert torch.equal(seen[0][kind], seen[2][kind])
        assert not torch.equal(seen[0][kind], seen[1][kind])
    assert not torch.equal(first, seen[0][0]) and not torch.equal(first, seen[1][0])


class BreaksOff(Curious):
    """Cannot be trained on that many images."""

    def __init__(self, count: int) -> None:
        super().__init__([])
        self.count = count

    def fit(self, known: Knowledge) -> FitRecord:
        if len(known.pixels) == self.count:
            raise TrainingError("the loss is NaN", step=3, term="reconstruction")
        return super().fit(known)


@pytest.mark.parametrize("count", [50, 200])
def test_an_attack_that_breaks_off_with_one_number_of_images_ends_no_audit(count: int) -> None:
    found = audit(open_edge(), KNOWN, VICTIM, attacks={"breaks": BreaksOff(count)},
                  attacker_images=(50, None))
    rows = [r["attacker_images"] for r in found.records if r["attack"] == "breaks"]
    assert rows == [250 - count]
    assert "attack_failed" in {flag["name"] for flag in found.flags}


@pytest.mark.slow
def test_every_attack_that_ships_runs_on_a_split_model() -> None:
    cloud = nn.Sequential(nn.Flatten(), nn.Linear(12 * 8 * 8, 3))
    split = SimpleNamespace(edge=open_edge().edge, cloud=cloud.eval())
    z = compute_features(split.edge, KNOWN, NORMALIZATION)
    labels = cloud(z).argmax(1)
    short = {
        "rmle": RMLEConfig(steps=20, tuning_steps=10, tuning_images=4),
        **{name: QueryFreeConfig(epochs=1, decoder=CONFIG) for name in ATTACKS if "free" in name},
    }
    if "image_prior" in ATTACKS:
        short["image_prior"] = dataclasses.replace(ATTACKS["image_prior"].config, steps=20)
    found = audit(split, KNOWN, VICTIM, attacks=tuple(ATTACKS), settings=short,
                  attacker_labels=labels, normalization=NORMALIZATION,
                  config=dataclasses.replace(CONFIG, epochs=2))
    assert {r["attack"] for r in found.records} == {*ATTACKS, "mean_image"}
    assert {r["box"] for r in found.records} == {"black", "white", "none"}


def test_an_observer_gets_every_fitted_attack_and_what_it_rebuilt() -> None:
    seen = []

    def observer(subject: str, name: str, attack: object, guess: Tensor) -> None:
        seen.append((subject, name, guess.clone(), attack.fitted))  # type: ignore[attr-defined]

    audit(closed_edge(), KNOWN, VICTIM, attacks={"oracle": Oracle()}, observer=observer,
          undefended=open_edge())
    assert [(s, n, f) for s, n, _, f in seen] == [("edge", "oracle", True),
                                                  ("undefended", "oracle", True)]
    assert torch.equal(seen[0][2], VICTIM)


def test_an_observer_that_asks_for_it_gets_the_row_of_the_report_that_its_call_is_about() -> None:
    rows = []

    def observer(
        subject: str, name: str, attack: object, guess: Tensor, *, record: dict[str, object]
    ) -> None:
        rows.append(dict(record))
        record.clear()  # it is the observer's own

    found = audit(closed_edge(), KNOWN, VICTIM, attacks={"own": lambda seed: Oracle()},
                  observer=observer, seeds=(3, 4), attacker_images=(None, 50),
                  shifted_data=1 - KNOWN, examples=0)
    assert rows == [r for r in found.records if r["subject"] == "edge"]
    told = [(r["attack_seed"], r["attacker_data"], r["attacker_images"]) for r in rows]
    assert told == [(seed, *whose) for whose in (("same", 200), ("same", 50), ("shifted", 200))
                    for seed in (3, 4)]


def test_an_observers_own_parameter_of_that_name_stays_its_own() -> None:
    rows: list[str] = []

    def keeps(subject: str, name: str, attack: object, guess: Tensor, record: Any = rows) -> None:
        record.append(name)

    def known(record: str, name: str, attack: object, guess: Tensor) -> None:
        rows.append(record)

    def named(subject: str, name: str, attack: object, guess: Tensor, **more: object) -> None:
        rows.extend(more)

    for observer in (keeps, known, named, partial(keeps, record=rows)):
        found = audit(closed_edge(), KNOWN, VICTIM, attacks={"own": Oracle()}, observer=observer,
                      examples=0)
        assert not any(f["name"] == "observer_failed" for f in found.flags)
    assert rows == ["own", "edge", "own"]


def test_a_box_that_is_told_by_the_fit_is_recorded() -> None:
    class Told(Oracle):
        def fit(self, known: Knowledge) -> None:
            assert known.edge is not None
            self.box = "white"

    found = audit(closed_edge(), KNOWN, VICTIM, attacks={"own": Told()}, examples=0)
    assert found.records[-1]["box"] == "white"


class Unqueried(Oracle):
    """Says that it asks the edge nothing."""

    box = "none"

    def __init__(self, reads: str | None = None, seen: list[Knowledge] | None = None) -> None:
        self.reads, self.seen = reads, [] if seen is None else seen

    def fit(self, known: Knowledge) -> None:
        self.seen.append(known)
        if self.reads == "pairs":
            known.pairs()
        elif self.reads == "edge":
            known.edge(known.pixels)  # type: ignore[misc]


def test_an_own_attack_whose_box_is_none_gets_no_answers_of_the_edge() -> None:
    split, labels = open_edge(), torch.arange(len(KNOWN)) % 3
    split.cloud = nn.Flatten()
    seen: list[Knowledge] = []
    found = audit(split, KNOWN, VICTIM, attacker_labels=labels, examples=0, attacks={
        "good": lambda seed: Unqueried(None, seen), "pairs": Unqueried("pairs"),
        "edge": Unqueried("edge")})
    rows = [r for r in found.records if r["subject"] == "edge"]
    assert [(r["attack"], r["box"]) for r in rows] == [("good", "none")]
    assert seen[0].z is None and seen[0].edge is None and seen[0].labels is not None
    assert seen[0].cloud is not None and seen[0].observed is not None
    told = {f["attack"]: f for f in found.flags if f["name"] == "attack_failed"}
    assert set(told) == {"pairs", "edge"}
    assert all("neither known.z nor known.edge" in f["advice"] for f in told.values())


class Gradless:
    """Turns gradients off and leaves them off."""

    def fit(self, known: Knowledge) -> None:
        torch.set_grad_enabled(False)

    def reconstruct(self, z: Tensor) -> Tensor:
        return torch.full((len(z), 3, 16, 16), 0.5)


def test_gradients_are_on_for_each_attack_wherever_the_audit_is_called_and_stay_as_they_were(
) -> None:
    split, config = open_edge(), dataclasses.replace(CONFIG, epochs=1)
    attacks = {"mine": lambda seed: Gradless(), "inverse_network": "inverse_network"}
    found = []
    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with mode:
            before = torch.is_grad_enabled()
            report = audit(split, KNOWN[:40] * 1.0, VICTIM[:4] * 1.0, attacks=attacks,
                           config=config, examples=0)
            assert torch.is_grad_enabled() == before
        found.append([r["ssim"] for r in report.records])
    assert found[0] == found[1] == found[2] and len(found[0]) == 4
    with torch.inference_mode():
        frozen = open_edge()
    with pytest.raises(InputError, match="made under torch.inference_mode"):
        audit(frozen, KNOWN[:40], VICTIM[:4], config=config)
