"""The bounds against edges whose optimal attacker is known in closed form."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from patrol_prune.bounds import (
    capped_information,
    conditional_entropy_bound,
    diagonal_fisher_information,
    dithered_entropy,
)
from patrol_prune.covariance import gaussian_information, shrinkage_intensity
from patrol_prune.errors import InputError
from patrol_prune.jacobian import blocked_outputs, jacobian_effective_rank

seeds = st.integers(0, 10_000)
LOG_2_PI_E = math.log(2 * math.pi * math.e)
UNIT = 1e-3
"""Of a Gaussian pixel's spread in pixels on [0, 1]; the bounds do not depend on it."""


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=gen(seed), dtype=torch.float64)


def spd(d: int, seed: int) -> Tensor:
    root = normal(d, d, seed=seed)
    return root @ root.T + 0.1 * torch.eye(d, dtype=torch.float64)


def orthogonal(d: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(d, d, seed=seed))[0]


def with_covariance(s: Tensor) -> Tensor:
    """`2d` points whose sample covariance is exactly `s`: plus and minus each scaled axis."""
    d = len(s)
    axes = math.sqrt((2 * d - 1) / 2) * torch.eye(d, dtype=s.dtype)
    return 0.7 + torch.cat([axes, -axes]) @ torch.linalg.cholesky(s).T


def gaussian_entropy(s: Tensor) -> float:
    return 0.5 * (len(s) * LOG_2_PI_E + float(torch.logdet(s)))


def posterior_covariance(a: Tensor, s: Tensor, sigma: float) -> Tensor:
    """Of `x ~ N(0, s)` given `a x + n`: the optimal attacker errs by its mean diagonal."""
    return torch.linalg.inv(torch.linalg.inv(s) + a.T @ a / sigma**2)


class TestLinearGaussianEdge:
    @given(d=st.integers(1, 6), k=st.integers(1, 8), sigma=st.floats(0.05, 5), seed=seeds)
    def test_entropy_bound_holds_for_the_optimal_attacker(
        self, d: int, k: int, sigma: float, seed: int
    ) -> None:
        s, a = spd(d, seed), normal(k, d, seed=seed + 1)
        z = with_covariance(s) @ a.T
        optimal = float(posterior_covariance(a, s, sigma).trace()) / d
        for shrinkage in (0.0, 0.4, 1.0):
            bound = conditional_entropy_bound(
                z, sigma, d, shrinkage=shrinkage, entropy=gaussian_entropy(s) + d * math.log(UNIT)
            )
            assert bound.mse_bound is not None
            assert bound.mse_bound <= UNIT**2 * optimal * (1 + 1e-9)

    @given(d=st.integers(1, 6), sigma=st.floats(0.05, 5))
    def test_entropy_bound_is_the_optimal_error_for_white_pixels(
        self, d: int, sigma: float
    ) -> None:
        s = torch.eye(d, dtype=torch.float64)
        bound = conditional_entropy_bound(
            with_covariance(s), sigma, d, entropy=d * (0.5 * LOG_2_PI_E + math.log(UNIT))
        )
        assert bound.mse_factor == pytest.approx(sigma**2 / (1 + sigma**2), rel=1e-9)
        assert bound.mse_bound == pytest.approx(UNIT**2 * bound.mse_factor, rel=1e-9)

    @given(d=st.integers(1, 6), sigma=st.floats(0.05, 5), seed=seeds)
    def test_entropy_bound_is_tight_where_the_posterior_is_white(
        self, d: int, sigma: float, seed: int
    ) -> None:
        s = spd(d, seed)
        error = 0.5 * float(torch.linalg.eigvalsh(s)[0])
        precision = sigma**2 * (torch.eye(d, dtype=s.dtype) / error - torch.linalg.inv(s))
        a = torch.linalg.cholesky(precision).T
        bound = conditional_entropy_bound(
            with_covariance(s) @ a.T, sigma, d, shrinkage=0.0,
            entropy=gaussian_entropy(s) + d * math.log(UNIT),
        )
        assert bound.mse_bound == pytest.approx(UNIT**2 * error, rel=1e-6)

    @given(d=st.integers(1, 6), more=st.integers(0, 4), sigma=st.floats(0.05, 5), seed=seeds)
    def test_fisher_bound_holds_for_the_unbiased_attacker(
        self, d: int, more: int, sigma: float, seed: int
    ) -> None:
        a = normal(d + more, d, seed=seed)
        leak = diagonal_fisher_information(lambda x: x @ a.T, normal(3, d), sigma, probes=None)
        least_squares = sigma**2 * float(torch.linalg.inv(a.T @ a).trace()) / d
        assert leak.mse_bound <= least_squares * (1 + 1e-9)
        q = 1.7 * orthogonal(d, seed)
        leak = diagonal_fisher_information(lambda x: x @ q.T, normal(3, d), sigma, probes=None)
        assert leak.mse_bound == pytest.approx((sigma / 1.7) ** 2, rel=1e-9)
        assert leak.mse_bound == pytest.approx(leak.worst_mse_bound)

    def test_least_squares_attacker_meets_the_fisher_bound_when_run(self) -> None:
        q, x, sigma = orthogonal(4, 1), normal(20_000, 4, seed=2), 0.3
        uploaded = x @ q.T + sigma * normal(20_000, 4, seed=3)
        found = float((uploaded @ q - x).square().mean())
        leak = diagonal_fisher_information(lambda v: v @ q.T, x[:4], sigma)
        assert found == pytest.approx(leak.mse_bound, rel=0.03)

    @given(d=st.integers(1, 6), k=st.integers(1, 8), sigma=st.floats(0.05, 5), seed=seeds)
    def test_van_trees_holds_for_the_biased_attacker_who_beats_the_fisher_bound(
        self, d: int, k: int, sigma: float, seed: int
    ) -> None:
        s, a = spd(d, seed), normal(k, d, seed=seed + 1)
        leak = diagonal_fisher_information(lambda x: x @ a.T, normal(2, d), sigma, probes=None)
        optimal = float(posterior_covariance(a, s, sigma).trace()) / d
        prior = float(torch.linalg.inv(s).trace()) / d
        assert leak.any_attacker(prior) <= optimal * (1 + 1e-9)
        white = diagonal_fisher_information(lambda x: 1.0 * x, normal(2, d), sigma, probes=None)
        biased = sigma**2 / (1 + sigma**2)  # posterior mean of white pixels
        assert biased < white.mse_bound
        assert white.any_attacker(1.0) == pytest.approx(biased, rel=1e-9)


class TestFisher:
    def edge(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.BatchNorm2d(3), nn.Tanh()).eval()

    def test_exact_is_the_jacobians_squared_norm(self) -> None:
        edge, x = self.edge(), torch.rand(3, 2, 6, 6, generator=gen(0))
        leak = diagonal_fisher_information(edge, x, 0.5, probes=None)
        for image, value in zip(x, leak.dfil, strict=True):
            jacobian = torch.autograd.functional.jacobian(edge, image[None])
            assert isinstance(jacobian, Tensor)
            expected = float(jacobian.double().square().sum()) / (0.25 * 72)
            assert float(value) == pytest.approx(expected, rel=1e-5)
        assert leak.exact and float(leak.standard_error.max()) == 0.0
        assert leak.mse_bound == pytest.approx(1 / float(leak.dfil.mean()))

    def test_probes_agree_within_their_own_error(self) -> None:
        edge, x = self.edge(), torch.rand(40, 2, 6, 6, generator=gen(0))
        exact = diagonal_fisher_information(edge, x, 1.0, probes=None).dfil
        guess = diagonal_fisher_information(edge, x, 1.0, probes=8, generator=gen(3))
        apart = (guess.dfil - exact) / guess.standard_error
        assert not guess.exact
        assert 0.4 < float(apart.abs().median()) < 1.2  # of Student's t with 7 degrees: 0.71
        assert float(guess.dfil.mean()) == pytest.approx(float(exact.mean()), rel=0.05)
        assert 0 < float((guess.standard_error / exact).max()) < 0.6

    def test_units_and_repeated_uploads(self) -> None:
        edge, x = self.edge(), torch.rand(2, 2, 6, 6, generator=gen(0))
        one = diagonal_fisher_information(edge, x, 1.0, probes=None)
        scaled = diagonal_fisher_information(lambda u: edge(0.2 * u), 5 * x, 1.0, probes=None)
        torch.testing.assert_close(scaled.dfil, 0.04 * one.dfil)
        twice = diagonal_fisher_information(
            lambda u: torch.cat([edge(u), edge(u)], 1), x, 1.0, probes=None
        )
        louder = diagonal_fisher_information(edge, x, 1 / math.sqrt(2), probes=None)
        torch.testing.assert_close(twice.dfil, louder.dfil)

    def test_everything_is_left_as_found(self) -> None:
        edge, x = self.edge(), torch.rand(2, 2, 6, 6)
        before = torch.get_rng_state()
        with torch.no_grad():
            diagonal_fisher_information(edge, x, 1.0, probes=4)
            jacobian_effective_rank(edge, x)
            jacobian_effective_rank(edge, x, exact_limit=1, probes=4)
        assert torch.equal(before, torch.get_rng_state())
        assert all(p.grad is None for p in edge.parameters()) and not x.requires_grad

    def test_an_output_that_is_flat_where_it_was_looked_at_is_not_blocked(self) -> None:
        """A clamp that holds it at one end for one image and at the other for the next."""
        x = torch.stack([torch.zeros(2, 6, 6), torch.ones(2, 6, 6)])

        def edge(v: torch.Tensor) -> torch.Tensor:
            flat = v.flatten(1)
            return torch.cat([(3.0 * flat[:, :5] - 1.0).clamp(0.0, 1.0), flat[:, 5:]], 1)

        varying, blocked = blocked_outputs(edge, x)
        assert bool(varying.all()) and not bool(blocked.any())
        diagonal_fisher_information(edge, x, 1.0)
        # What jumps has no slope anywhere.
        _, blocked = blocked_outputs(lambda v: (v.flatten(1) > 0.5).float() + 0.0 * v.flatten(1), x)
        assert bool(blocked.all())

    def test_outputs_that_are_dead_or_the_same_for_every_image_are_not_blocked(self) -> None:
        def edge(v: torch.Tensor) -> torch.Tensor:
            return torch.cat([v.flatten(1), 0.0 * v.flatten(1) + 0.1, (v - 2.0).relu().flatten(1)],
                             1)

        varying, blocked = blocked_outputs(edge, torch.rand(3, 2, 6, 6))
        assert varying.tolist() == [True] * 72 + [False] * 144 and not bool(blocked.any())

    def test_without_second_derivatives_some_outputs_are_looked_at(self) -> None:
        class Once(torch.autograd.Function):
            @staticmethod
            def forward(ctx: object, z: torch.Tensor) -> torch.Tensor:
                return 2.0 * z

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
                return 2.0 * gradient

        def edge(v: torch.Tensor) -> torch.Tensor:
            flat = Once.apply(v.flatten(1))
            return torch.cat([flat[:, :50], flat[:, 50:].detach()], 1)

        varying, blocked = blocked_outputs(edge, torch.rand(3, 2, 6, 6))
        assert int(varying.sum()) == 64  # of 72, as many as are asked
        assert not bool(blocked[:50].any()) and torch.equal(blocked[50:], varying[50:])

    @pytest.mark.parametrize("images", [1, 2])
    def test_one_image_or_the_same_again_proves_no_more(self, images: int) -> None:
        x = torch.rand(1, 2, 6, 6, generator=gen(0)).expand(images, -1, -1, -1)
        with pytest.raises(InputError, match="true slope"):
            diagonal_fisher_information(lambda v: (9 * v).round().flatten(1), x, 1.0)
        with pytest.raises(InputError, match="72 of the 144 outputs"):
            diagonal_fisher_information(
                lambda v: torch.cat([v.flatten(1), v.detach().flatten(1)], 1), x, 1.0)
        assert diagonal_fisher_information(lambda v: 2.0 * v, x, 1.0).mse_bound == 0.25
        assert diagonal_fisher_information(lambda v: 0.0 * v, x, 1.0).mse_bound == math.inf

    def test_edges_that_prove_nothing_are_refused(self) -> None:
        edge, x = self.edge(), torch.rand(3, 2, 6, 6)
        with pytest.raises(InputError, match="edge without noise"):
            diagonal_fisher_information(lambda v: edge(v) + torch.randn(1), x, 1.0)
        with pytest.raises(InputError, match="evaluation mode"):
            diagonal_fisher_information(self.edge().train(), x, 1.0)
        with pytest.raises(InputError, match="detached"):
            diagonal_fisher_information(lambda v: edge(v.detach()), x, 1.0)
        with pytest.raises(InputError, match="true slope"):
            diagonal_fisher_information(lambda v: (9 * v).round(), x, 1.0)
        def half(v: torch.Tensor) -> torch.Tensor:  # 3 of 4 outputs where nobody looks
            return torch.cat([v.flatten(1)[:, :18], v.detach().flatten(1)[:, :54]], 1)

        for probes in (2, None):
            with pytest.raises(InputError, match="54 of the 72 outputs"):
                diagonal_fisher_information(half, x, 1.0, probes=probes)

        def beside(v: torch.Tensor) -> torch.Tensor:  # where large constants stand
            large = torch.full((len(v), 64), 1e7)
            return torch.cat([large, v.detach().flatten(1), 1e-3 * v.flatten(1)[:, :9]], 1)

        with pytest.raises(InputError, match="72 of the 81 outputs"):
            diagonal_fisher_information(beside, x, 1.0)
        with pytest.raises(InputError, match="Without noise there is no such bound"):
            diagonal_fisher_information(edge, x, 0.0)
        with pytest.raises(InputError, match="prior_information above 0"):
            diagonal_fisher_information(edge, x, 1.0).any_attacker(0.0)
        for images in (x, x[:1]):  # the root has an infinite slope at 0, times 0 is NaN
            with pytest.raises(InputError, match="finite slope"):
                diagonal_fisher_information(lambda v: (0 * v).sqrt(), images, 1.0)
        constant = diagonal_fisher_information(lambda v: 0 * v, x, 1.0)
        assert constant.mse_bound == math.inf


class TestEntropy:
    @given(n=st.integers(2, 9), k=st.integers(1, 9), rho=st.floats(0, 1), seed=seeds)
    def test_log_det_matches_the_definition_on_either_side(
        self, n: int, k: int, rho: float, seed: int
    ) -> None:
        z, sigma = 3 + normal(n, k, seed=seed), 0.7
        s = torch.cov(z.T).reshape(k, k)
        mixed = (1 - rho) * s + rho * torch.diag(s.diagonal())
        expected = 0.5 * float(torch.logdet(torch.eye(k, dtype=s.dtype) + mixed / sigma**2))
        padded = torch.cat([z, torch.ones(n, 12, dtype=z.dtype)], 1)  # now the N x N side
        for features in (z, padded):
            assert gaussian_information(features, sigma, rho) == pytest.approx(expected, rel=1e-8)

    @given(n=st.integers(2, 9), k=st.integers(2, 9), seed=seeds)
    def test_more_shrinkage_never_lowers_the_information(self, n: int, k: int, seed: int) -> None:
        z = normal(n, k, seed=seed) @ normal(k, k, seed=seed + 1)
        values = [gaussian_information(z, 0.5, r) for r in (0.0, 0.3, 0.7, 1.0)]
        assert all(a <= b + 1e-9 for a, b in itertools.pairwise(values))
        power = float(z.var(0).mean())
        assert values[-1] <= capped_information(power, 0.5, k) + 1e-9

    def test_few_images_underestimate_and_the_diagonal_does_not(self) -> None:
        k, sigma = 60, 0.5
        truth = 0.5 * k * math.log1p(1 / sigma**2)
        bounds = {
            rho: [conditional_entropy_bound(normal(20, k, seed=i), sigma, k, shrinkage=rho)
                  for i in range(20)]
            for rho in (0.0, 1.0, "auto")
        }
        means = {rho: sum(b.information for b in found) / 20 for rho, found in bounds.items()}
        assert means[0.0] < 0.6 * truth
        assert means[1.0] == pytest.approx(truth - k / 38 * 0.64, rel=0.01)  # the bias
        assert means[0.0] < means["auto"] <= means[1.0]
        assert bounds["auto"][0].rank_deficient and bounds["auto"][0].shrinkage > 0.7
        assert not conditional_entropy_bound(normal(61, k), sigma, k).rank_deficient

    def test_shrinkage_matches_a_loop_over_entries(self) -> None:
        for n, k in ((12, 6), (11, 15)):
            z = normal(n, k, seed=n) @ normal(k, k, seed=k)
            c = z - z.mean(0)
            variance = square = 0.0
            for i in range(k):
                for j in range(k):
                    if i != j:
                        w = c[:, i] * c[:, j]
                        square += float(n / (n - 1) * w.mean()) ** 2
                        variance += n / (n - 1) ** 3 * float((w - w.mean()).square().sum())
            expected = min(1.0, variance / square)
            assert shrinkage_intensity(z) == pytest.approx(expected)
            auto = conditional_entropy_bound(z, 0.5, k, shrinkage="auto")
            assert auto.information == pytest.approx(gaussian_information(z, 0.5, expected))

    def test_units_of_the_feature_do_not_matter_and_of_the_pixels_do(self) -> None:
        z = normal(50, 5) @ normal(5, 5, seed=1)
        plain = conditional_entropy_bound(z, 0.5, 8, shrinkage=0.0)
        turned = 10 * z @ orthogonal(5, 2) + 4
        other = conditional_entropy_bound(turned, 5.0, 8, shrinkage=0.0)
        assert other.information == pytest.approx(plain.information)
        assert plain.mse_bound is None
        small = conditional_entropy_bound(z, 0.5, 8, entropy=-40.0).mse_bound
        large = conditional_entropy_bound(z, 0.5, 8, entropy=-40.0 + 8 * math.log(3)).mse_bound
        assert small is not None and large == pytest.approx(9 * small)

    def test_groups_tighten_the_bound_and_stay_above_the_truth(self) -> None:
        sigma, apart = 1.0, 12.0
        spread = normal(4000, 1)
        labels = torch.arange(4000) % 2
        z = spread + apart * labels[:, None]
        grid = torch.linspace(-10, apart + 10, 20_001, dtype=torch.float64)
        density = torch.stack([(-(grid - m).square() / 4).exp() for m in (0.0, apart)]).mean(0)
        density /= math.sqrt(4 * math.pi)
        entropy = float(torch.trapezoid(torch.special.entr(density), grid))
        truth = entropy - 0.5 * LOG_2_PI_E
        whole = conditional_entropy_bound(z, sigma, 1).information
        parts = conditional_entropy_bound(z, sigma, 1, groups=labels)
        assert parts.information == pytest.approx(math.log(2) + 0.5 * math.log(2), abs=0.02)
        assert truth - 0.02 <= parts.information < whole - 0.5
        assert parts.groups == 2

    def test_grey_levels(self) -> None:
        """One pixel value of 8 bits, uniform: the bound against the posterior mean on a grid."""
        sigma = 0.5
        x = torch.arange(256, dtype=torch.float64) / 255
        y = torch.linspace(-4, 5, 9001, dtype=torch.float64)
        joint = (-(y[:, None] - x).square() / (2 * sigma**2)).exp()
        mean = (joint * x).sum(1) / joint.sum(1)
        error = (joint * (mean[:, None] - x).square()).sum(1) / joint.sum(1)
        optimal = float((error * joint.sum(1)).sum() / joint.sum())
        bound = conditional_entropy_bound(
            x[:, None], sigma, 1, entropy=dithered_entropy(8.0, 1), levels=256
        )
        assert bound.mse_bound is not None and 0.7 * optimal < bound.mse_bound < optimal
        nothing = conditional_entropy_bound(
            x[:, None], sigma, 1, entropy=dithered_entropy(0.0, 1), levels=256
        )
        assert nothing.mse_bound == 0.0

    def test_bad_arguments_are_refused(self) -> None:
        z = normal(6, 3)
        cases = [
            (dict(shrinkage=1.5), "shrinkage on"),
            (dict(groups=torch.tensor([0, 0, 0, 1, 1, 2])), "a group of 1"),
            (dict(groups=torch.zeros(5, dtype=torch.long)), "one integer group"),
            (dict(entropy=math.nan), "finite and at most"),
            (dict(entropy=0.0, levels=1), "grey levels .* at least 2"),
            (dict(shrinkage=True), "shrinkage on"),
            (dict(shrinkage=math.nan), "shrinkage on"),
            (dict(levels=2.5), "grey levels"),
        ]
        for pixels in (27.5, True, "27", 0):
            with pytest.raises(InputError, match=r"pixel_values, C \* H \* W"):
                conditional_entropy_bound(z, 0.5, pixels)  # type: ignore[arg-type]
        for arguments, message in cases:
            with pytest.raises(InputError, match=message):
                conditional_entropy_bound(z, 1.0, 3, **arguments)  # type: ignore[arg-type]
        for features, message in ((z[:1], "at least 2 images"), (z / 0, "finite")):
            with pytest.raises(InputError, match=message):
                conditional_entropy_bound(features, 1.0, 3)
        with pytest.raises(InputError, match="Without noise"):
            conditional_entropy_bound(z, 0.0, 3)


class TestFewImagesAndGroups:
    def test_every_group_needs_its_own_images(self) -> None:
        z = normal(200, 150)
        groups = torch.arange(200) % 2
        assert conditional_entropy_bound(z, 0.1, 150, groups=groups).rank_deficient
        assert not conditional_entropy_bound(normal(400, 150), 0.1, 150).rank_deficient

    def test_two_images_of_a_group_say_nothing_of_a_covariance(self) -> None:
        z, groups = normal(200, 50), torch.arange(200) // 2
        auto = conditional_entropy_bound(z, 0.1, 50, groups=groups, shrinkage="auto")
        assert auto.shrinkage == pytest.approx(1.0)
        assert auto.information == pytest.approx(auto.diagonal_information)
        assert auto.smallest_group == 2

    def test_a_sigma_may_be_a_tensor(self) -> None:
        z = normal(20, 4)
        one, other = (conditional_entropy_bound(z, sigma, 3) for sigma in (0.1, torch.tensor(0.1)))
        assert float(other.information) == pytest.approx(float(one.information), rel=1e-5)

    def test_an_entropy_that_no_image_has_is_refused(self) -> None:
        z, d = normal(20, 4), 3072
        for entropy, levels in ((d * 2.65 * math.log(2), None), (1e6, None), (math.nan, None),
                                (d * 0.01, 256)):
            with pytest.raises(InputError, match="dithered_entropy"):
                conditional_entropy_bound(z, 0.1, d, entropy=entropy, levels=levels)
        uniform = dithered_entropy(8.0, d)
        assert conditional_entropy_bound(z, 0.1, d, entropy=uniform, levels=256).mse_bound
        for bits, levels in ((20.0, 256), (math.nan, 256), (1.0, 1), (-1.0, 256)):
            with pytest.raises(InputError):
                dithered_entropy(bits, d, levels)
        for arguments in ((-1.0, 0.1, 4), (1.0, 0.5, -10), (1.0, 0.5, 2.5), (True, 0.5, 3)):
            with pytest.raises(InputError):
                capped_information(*arguments)  # type: ignore[arg-type]


class TestEffectiveRank:
    def test_many_pixels_cost_no_square_of_them(self) -> None:
        """A square matrix of all pixels would take 19 GB."""
        weight = normal(10, 3 * 128 * 128).float()
        pixels = torch.rand(1, 3, 128, 128)
        found = jacobian_effective_rank(lambda x: x.flatten(1) @ weight.T, pixels)
        assert found.effective_rank is not None and 9.9 < float(found.effective_rank) <= 10.001

    def test_slopes_that_are_no_number_are_refused(self) -> None:
        with pytest.raises(InputError, match="finite slope"):
            jacobian_effective_rank(lambda x: x.flatten(1).sqrt(), torch.zeros(1, 1, 2, 2))

    def test_one_image_shows_an_edge_that_mixes_them(self) -> None:
        edge = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).train()
        with pytest.raises(InputError, match="evaluation mode"):
            jacobian_effective_rank(edge, torch.rand(1, 1, 4, 4))

    @given(d=st.integers(1, 9), k=st.integers(1, 9), seed=seeds)
    def test_matches_the_singular_values(self, d: int, k: int, seed: int) -> None:
        a = normal(k, d, seed=seed)
        p = torch.linalg.svdvals(a).square()
        p = p / p.sum()
        expected = float((-(p * p.log()).sum()).exp())
        rank = jacobian_effective_rank(lambda x: x @ a.T, normal(2, d))
        assert rank.effective_rank is not None and rank.exact
        assert rank.effective_rank.tolist() == pytest.approx([expected] * 2, rel=1e-6)
        assert rank.participation_ratio.tolist() == pytest.approx([1 / float((p**2).sum())] * 2)
        assert bool((rank.participation_ratio <= rank.effective_rank + 1e-9).all())

    def test_end_points(self) -> None:
        q, x = orthogonal(70, 1), normal(1, 70)
        edges = {70.0: q, 1.0: torch.outer(q[0], q[1]), 0.0: 0 * q}
        for expected, a in edges.items():
            rank = jacobian_effective_rank(lambda v, a=a: v @ a.T, x)
            assert rank.effective_rank is not None
            assert float(rank.effective_rank) == pytest.approx(expected, abs=1e-6)

    def test_probes_estimate_the_participation_ratio(self) -> None:
        a, x = normal(90, 50, seed=4) * torch.linspace(0.05, 3, 50), normal(12, 50)
        exact = jacobian_effective_rank(lambda v: v @ a.T, x)
        guess = jacobian_effective_rank(lambda v: v @ a.T, x, exact_limit=10, probes=60)
        assert guess.effective_rank is None and not guess.exact
        torch.testing.assert_close(
            guess.participation_ratio, exact.participation_ratio, rtol=0.2, atol=0.0
        )
        few = jacobian_effective_rank(
            lambda v: v @ a.T, normal(150, 50), exact_limit=10, probes=12, generator=gen(5)
        )
        expected = float(exact.participation_ratio[0])
        assert float(few.participation_ratio.mean()) == pytest.approx(expected, rel=0.1)
