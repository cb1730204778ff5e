"""Every flag is raised on a case that was planted for it, and not on a healthy one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from patrol_prune.attacks import (
    FitRecord,
    InverseNetworkConfig,
    Knowledge,
    LinearInverse,
    LinearInverseConfig,
    check_boxes,
    check_draws,
    check_fit,
    check_more_data,
    self_test,
)
from patrol_prune.attacks.base import EdgeFunction
from patrol_prune.attacks.checks import smooth_images
from patrol_prune.attacks.rmle import RMLE, RMLEConfig
from patrol_prune.audit import AttackChoice, audit
from patrol_prune.audit_report import AuditReport
from patrol_prune.errors import InputError, TrainingError

IMAGES = smooth_images(240, (3, 16, 16), seed=9)
KNOWN, VICTIM = IMAGES[:200], IMAGES[200:]
LEARNED = InverseNetworkConfig(width=16, depth=1, epochs=6, batch_size=16, max_extensions=0)
OPTIMISED = RMLEConfig(
    losses=("mse",), lambda_tv=(0.0,), spaces=("pixels",), steps=40, tuning_steps=40,
    tuning_images=8, refine=False,
)


class Open(nn.Module):
    """An orthogonal map of every 12 pixels to 12 numbers, which keeps everything."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.layer = nn.Conv2d(3, 12, 2, stride=2)
            nn.init.orthogonal_(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Detached(Open):
    """The same features, and no gradient to the input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class Scrambled(Open):
    """The same features, and a gradient that points elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        return _Scramble.apply(super().forward(x))  # type: ignore[no-any-return,no-untyped-call]


class _Scramble(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, z: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return -gradients[0].flip(0, 1, 2, 3)


class Noise(nn.Module):
    """Sends noise of its own, and `signal` times the image's mean colour."""

    def __init__(self, signal: float) -> None:
        super().__init__()
        self.signal, self.generator = signal, torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(len(x), 3, 4, 4, generator=self.generator)
        return noise + self.signal * x.mean(dim=(2, 3), keepdim=True)


def flags(edge: nn.Module, *attacks: AttackChoice, **more: object) -> set[tuple[str, str]]:
    """`{(flag's name, attack)}` on the edge."""
    return flags_of(audit(SimpleNamespace(edge=edge), KNOWN, VICTIM, attacks=attacks,
                          examples=0, **more))  # type: ignore[arg-type]


def flags_of(report: AuditReport) -> set[tuple[str, str]]:
    assert all(f["meaning"].endswith(".") and f["advice"].endswith(".") for f in report.flags)
    return {(f["name"], f["attack"]) for f in report.flags}


@pytest.fixture(scope="module")
def healthy() -> AuditReport:
    return audit(
        SimpleNamespace(edge=Open()), KNOWN, VICTIM, examples=0, config=replace(LEARNED, epochs=8),
        attacks=("inverse_network", "linear_inverse", "rmle"), settings={"rmle": OPTIMISED},
    )


def test_healthy_attacks_on_an_open_edge_raise_nothing_but_that_they_are_short(
    healthy: AuditReport,
) -> None:
    assert {name for name, _ in flags_of(healthy)} <= {"not_converged"}
    assert healthy.strongest("edge")["ssim"] > 0.95


def test_a_learning_rate_of_zero() -> None:
    frozen = replace(LEARNED, lr=0.0, weight_decay=0.0, epochs=1)
    found = flags(Open(), "inverse_network", "rmle", config=frozen,
                  settings={"rmle": replace(OPTIMISED, lr=0.0)})
    assert ("loss_did_not_fall", "inverse_network") in found
    assert ("not_better_than_mean_image", "inverse_network") in found
    cold = flags(Open(), "rmle", settings={"rmle": replace(OPTIMISED, lr=0.0)})
    assert ("loss_did_not_fall", "rmle") in cold


def test_an_edge_that_passes_no_gradient(healthy: AuditReport) -> None:
    assert ("no_gradient", "rmle") in flags(Detached(), "rmle", settings={"rmle": OPTIMISED})
    assert "no_gradient" not in {name for name, _ in flags_of(healthy)}


class Halved(Open):
    """The same features, and no gradient through those of `blocked` channels; behind noise."""

    def __init__(self, blocked: int, sigma: float = 0.0) -> None:
        super().__init__()
        self.blocked, self.sigma = blocked, sigma
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        # Noise beside a channel that says nothing of the image is not what an attacker follows.
        z = torch.cat([z[:, : self.blocked].detach(), z[:, self.blocked :], 0.0 * z[:, :1]], dim=1)
        if not self.sigma:
            return z
        return z + self.sigma * torch.randn(z.shape, generator=self.generator)


@pytest.mark.parametrize("sigma", [0.0, 0.1])
@pytest.mark.parametrize("blocked", [0, 6, 12])
def test_an_edge_that_passes_the_gradient_of_a_part(blocked: int, sigma: float) -> None:
    brief = replace(OPTIMISED, steps=2, tuning_steps=2)
    made = audit(SimpleNamespace(edge=Halved(blocked, sigma)), KNOWN, VICTIM, examples=0,
                 attacks=("rmle", "linear_inverse"), settings={"rmle": brief})
    found = [f for f in made.flags if f["name"] == "no_gradient"]
    assert [f["attack"] for f in found] == ["rmle"] * (blocked > 0)
    if blocked == 6:
        assert "50% pass no gradient" in found[0]["meaning"]


def test_a_gradient_that_misleads_makes_the_white_box_the_weaker() -> None:
    def cold(seed: int) -> RMLE:
        return RMLE(OPTIMISED)

    assert ("white_box_weaker_than_black_box", "cold") in flags(
        Scrambled(), "linear_inverse", cold
    )
    assert "white_box_weaker_than_black_box" not in {
        name for name, _ in flags(Open(), "linear_inverse", cold)
    }
    # A warm start lends it the black box's score, and hides that the gradient is of no use.
    for edge, useless in ((Scrambled(), True), (Open(), False)):
        found = flags(edge, "inverse_network", "rmle", config=replace(LEARNED, epochs=2),
                      settings={"rmle": replace(OPTIMISED, lambda_start=(1e3,))})
        assert ("white_box_weaker_than_black_box", "rmle") not in found
        assert (("no_better_than_warm_start", "rmle") in found) is useless
    assert check_boxes([0.5], [0.51]) == check_boxes([], [0.9]) == check_boxes([0.9], []) == []
    assert len(check_boxes([0.1, 0.5], [0.53, 0.2])) == 1


def test_a_constant_edge() -> None:
    constant = Open()
    nn.init.zeros_(constant.layer.weight)
    found = flags(constant, "inverse_network", config=replace(LEARNED, epochs=3))
    assert {("constant_features", None), ("not_better_than_mean_image", "inverse_network"),
            ("contrast_collapsed", "inverse_network")} <= found


def test_an_edge_that_sends_only_noise() -> None:
    assert ("noise_only", None) in flags(Noise(0.0), "linear_inverse")
    assert ("noise_only", None) not in flags(Noise(3.0), "linear_inverse")


def test_noise_is_told_from_a_faint_image_and_rarely_taken_for_one() -> None:
    faint = Noise(2.0)
    share = 4.0 * float(KNOWN[:64].mean(dim=(2, 3)).var(dim=0).mean())
    assert share < 0.03, "of the noise's variance"
    assert check_draws(faint, KNOWN[:64]) == []
    generator = torch.Generator().manual_seed(1)

    def spread(x: Tensor) -> Tensor:  # too faint in each of its 2,304 coordinates
        noise = torch.randn(len(x), 2304, generator=generator)
        return noise + 0.3 * x.flatten(1).repeat(1, 3)

    assert check_draws(spread, KNOWN[:64]) == []
    pure = Noise(0.0)
    assert sum(not check_draws(pure, KNOWN[:64]) for _ in range(20)) <= 1
    # A single coordinate that depends on the image is found among silent and noisy ones.
    one = Noise(0.0)

    def edge(x: Tensor) -> Tensor:
        z = one(x).flatten(1)
        z[:, 5] += 2.0 * x[:, 0, 0, 0]
        return torch.cat([z, torch.zeros(len(x), 2)], dim=1)

    assert check_draws(edge, KNOWN[:64]) == []
    assert check_draws(lambda x: torch.cat([one(x).flatten(1), x[:, 0, 0, :1]], 1), KNOWN) == []
    with pytest.raises(InputError, match="at least 8 images"):
        check_draws(pure, KNOWN[:7])


def test_signs_and_orders_that_are_drawn_are_told_from_noise() -> None:
    generator = torch.Generator().manual_seed(2)

    def signs(z: torch.Tensor) -> torch.Tensor:
        return torch.randint(0, 2, z.shape, generator=generator) * 2.0 - 1.0

    def order(x: torch.Tensor) -> torch.Tensor:
        z = x.flatten(1) - 0.5
        return z[:, torch.randperm(z.shape[1], generator=generator)]

    edges: tuple[EdgeFunction, ...] = (
        lambda x: x * signs(x[:, :1, :1, :1]), lambda x: x * signs(x), order)
    for edge in edges:
        assert check_draws(edge, KNOWN[:64]) == []
    for noise in (signs, lambda x: 3.0e6 + signs(x)):
        assert [flag.name for flag in check_draws(noise, KNOWN[:64])] == ["noise_only"]


def test_a_training_that_was_cut_short() -> None:
    short = replace(LEARNED, epochs=3, plateau_tolerance=0.0)
    assert ("not_converged", "inverse_network") in flags(Open(), "inverse_network", config=short)


def test_more_data_help() -> None:
    found = flags(Open(), "inverse_network", "linear_inverse", attacker_images=(40, None),
                  config=replace(LEARNED, epochs=4),
                  settings={"linear_inverse": LinearInverseConfig(kernel=1)})
    assert ("more_data_helps", "inverse_network") in found
    # One convolution is inverted to the last bit from a few images already.
    assert ("more_data_helps", "linear_inverse") not in found
    assert check_more_data(1.0, 0.96) == [] and len(check_more_data(1.0, 0.94)) == 1


class Copies:
    """Answers with what it is sent: inverts an identity and nothing else."""

    def fit(self, known: Knowledge) -> None:
        self.mean = known.pixels.mean(0)

    def reconstruct(self, z: Tensor) -> Tensor:
        return z if z.shape[1:] == self.mean.shape else self.mean.expand(len(z), -1, -1, -1)


class Guesses(Copies):
    """Answers with the mean image."""

    def reconstruct(self, z: Tensor) -> Tensor:
        return self.mean.expand(len(z), -1, -1, -1)


def test_self_tests() -> None:
    assert self_test(LinearInverse()) == []
    assert [f.name for f in self_test(Copies())] == ["cannot_invert_one_convolution"]
    assert [f.name for f in self_test(Guesses())] == [
        "cannot_invert_identity", "cannot_invert_one_convolution"
    ]
    assert [f.name for f in self_test(Guesses(), edges=("identity",))] == ["cannot_invert_identity"]
    with pytest.raises(InputError, match="Did you mean: identity"):
        self_test(Guesses(), edges=("identty",))


def test_an_audit_runs_the_self_tests() -> None:
    found = flags(Open(), "linear_inverse", Copies(), Guesses(), check_attacks=True)
    assert {
        ("cannot_invert_one_convolution", "Copies"), ("cannot_invert_one_convolution", "Guesses"),
        ("cannot_invert_identity", "Guesses"), ("not_better_than_mean_image", "Copies"),
        ("contrast_collapsed", "Guesses"),
    } <= found
    assert not any(attack == "linear_inverse" for _, attack in found)


class Breaks(Copies):
    """Cannot be trained where features have as many channels as one convolution gives."""

    def __init__(self, error: Callable[[], Exception]) -> None:
        self.error = error

    def fit(self, known: Knowledge) -> None:
        super().fit(known)
        if known.z is not None and known.z.shape[1] == 16:
            raise self.error()


def diverged() -> TrainingError:
    return TrainingError("the loss is NaN", step=3, term="reconstruction")


def test_an_attack_that_breaks_off_in_a_self_test_cannot_invert() -> None:
    assert [f.name for f in self_test(Breaks(diverged))] == ["cannot_invert_one_convolution"]
    with pytest.raises(RuntimeError):  # whoever tests an attack of his own wants to see why
        self_test(Breaks(RuntimeError))


@pytest.mark.parametrize("error", [diverged, RuntimeError])
def test_an_audit_goes_on_where_a_self_test_breaks_off(
    error: Callable[[], Exception],
) -> None:
    found = flags(Open(), "linear_inverse", Breaks(error), check_attacks=True)
    assert ("cannot_invert_one_convolution", "Breaks") in found
    assert ("cannot_invert_identity", "Breaks") not in found


class Sized(Copies):
    """Is built for pictures of 24 pixels a side."""

    def __init__(self) -> None:
        self.layer = nn.Linear(24 * 24, 1)

    def fit(self, known: Knowledge) -> None:
        super().fit(known)
        self.layer(known.pixels.flatten(2))


def test_a_self_test_on_which_an_own_attack_breaks_off_tells_why() -> None:
    images = smooth_images(60, (3, 24, 24), seed=2)
    found = audit(SimpleNamespace(edge=Open()), images[:50], images[50:],
                  attacks={"sized": Sized()}, check_attacks=True)
    assert [r["attack"] for r in found.records if r["subject"] == "edge"] == ["sized"]
    told = [f for f in found.flags if f["subject"] == "identity"]
    assert [f["name"] for f in told] == ["cannot_invert_identity", "cannot_invert_one_convolution"]
    for flag in told:
        assert "pictures of 3x16x16 pixels: RuntimeError" in flag["meaning"]
        assert "shapes cannot be multiplied" in flag["meaning"]


@pytest.mark.parametrize(
    ("start", "reached", "flagged"),
    [(0.5, 0.499, True), (0.5, 0.49, False), (None, 0.5, False), (9e-4, 9e-4, False)],
)
def test_a_warm_start_has_to_be_improved(
    start: float | None, reached: float, flagged: bool
) -> None:
    record = FitRecord((reached,), (reached,), 1.0, 1.0, 0, True, 0, 0.0, start_loss=start)
    assert [f.name for f in check_fit(record)] == ["no_better_than_warm_start"] * flagged
