"""Each defence against a slow reference, and all of them through training, saving and loading."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pruning_helpers import cifar_resnet
from torch import Tensor, nn

import patrol_prune as pp
from patrol_prune.cost import count_macs, evaluating
from patrol_prune.data import Batches, ImageSet
from patrol_prune.defences import (
    DEFENCES,
    AdversarialOnly,
    Adversary,
    Bottleneck,
    CemPatrol,
    Combined,
    Defence,
    Disco,
    FeatureDropout,
    GaussianNoise,
    LaplacianNoise,
    NoPeek,
    Patrol,
    Quantisation,
    Trained,
    distance_correlation,
    make_defence,
)
from patrol_prune.defences.base import calibration_features, wrapped
from patrol_prune.defences.cem_patrol import lowest
from patrol_prune.defences.disco import ChannelDropper
from patrol_prune.defences.randomness import RandomUpload, seeded
from patrol_prune.errors import InputError
from patrol_prune.finetune import FinetuneConfig, finetune
from patrol_prune.group_table import GroupTable
from patrol_prune.objective import PatrolObjective
from patrol_prune.pixels import Normalization
from patrol_prune.split import Split
from patrol_prune.surrogate import SurrogateSpec

NORMALIZATION = Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
SMALL = Adversary(images=8, precision="fp32",
                  surrogates=(SurrogateSpec("residual", 8, 1), SurrogateSpec("transposed", 8)))
CONFIG = FinetuneConfig(epochs=2, lr=0.02, surrogate_warmup_steps=1, inner_steps=1,
                        precision="fp32")
ALL: dict[str, Defence] = {
    "none": Trained(),
    "patrol": Patrol(alpha=0.01, beta=1.0, adversary=SMALL),
    "adversarial_only": AdversarialOnly(beta=1.0, adversary=SMALL),
    "cem_patrol": CemPatrol(beta=1.0, ratio=0.2, adversary=SMALL),
    "gaussian_noise": GaussianNoise(0.5),
    "laplacian_noise": LaplacianNoise(0.5),
    "feature_dropout": FeatureDropout(0.3),
    "quantisation": Quantisation(4),
    "nopeek": NoPeek(0.5, precision="fp32"),
    "bottleneck": Bottleneck(4, beta=1.0, adversary=SMALL),
    "disco": Disco(0.5, beta=1.0, adversary=SMALL),
    "combined": Combined((FeatureDropout(0.3), Patrol(alpha=0.0, beta=1.0, adversary=SMALL))),
}
RANDOM = ("gaussian_noise", "laplacian_noise", "feature_dropout", "combined")
ADVERSARIAL = ("patrol", "adversarial_only", "cem_patrol", "bottleneck", "disco", "combined")
EVERY = pytest.mark.parametrize("defence", ALL.values(), ids=ALL.keys())


def inputs(count: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def images(count: int = 32) -> ImageSet:
    pixels = NORMALIZATION.to_pixels(inputs(count, 9))
    return ImageSet((pixels * 255).to(torch.uint8), torch.arange(count) % 10,
                    tuple("abcdefghij"))


def split(seed: int = 0) -> pp.Split:
    with torch.random.fork_rng():
        return pp.Split(cifar_resnet(width=8, seed=seed), torch.zeros(1, 3, 16, 16), at="layer2")


def pruned(seed: int = 0) -> pp.Split:
    found = split(seed)
    pp.PatrolPruner(found.model, found.example_inputs, _Magnitude(), split=found,
                    edge_macs=0.6).step()
    return found


class _Magnitude:
    def __call__(self, group) -> Tensor:  # type: ignore[no-untyped-def]
        return group[0].dep.target.module.weight.detach().flatten(1).norm(dim=1)


def train(found: pp.Split, defence: Defence, **more: object):  # type: ignore[no-untyped-def]
    objective = defence.objective(found, normalization=NORMALIZATION, seed=3)
    batches = Batches(images(), 16, normalization=NORMALIZATION, shuffle=True, seed=1)
    return finetune(found, batches, objective=objective, config=CONFIG, progress=False,
                    teacher=copy.deepcopy(split().model), **more)  # type: ignore[arg-type]


def feature(found: pp.Split, x: Tensor) -> Tensor:
    with torch.no_grad(), evaluating(found.edge):
        return found.edge(x)


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


class TestEveryDefence:
    def test_registry(self) -> None:
        assert {name: type(d) for name, d in ALL.items() if name != "combined"} == DEFENCES

    @pytest.mark.parametrize("name", [
        name if name in ("feature_dropout", "disco", "nopeek", "combined") else
        pytest.param(name, marks=pytest.mark.slow) for name in ALL])
    def test_training_changes_the_edge_and_resumes_to_the_same_bits(
        self, name: str, tmp_path: Path
    ) -> None:
        defence = ALL[name]
        whole = defence.apply(split(), calibration=inputs())
        before = copy.deepcopy(whole.model.state_dict())
        global_state = torch.get_rng_state()
        history = train(whole, defence).history
        assert torch.equal(global_state, torch.get_rng_state())
        after = whole.model.state_dict()
        learned = [n for n, p in whole.edge.named_parameters() if p.requires_grad]
        assert all(not torch.equal(before[f"edge.{n}"], after[f"edge.{n}"]) for n in learned
                   if f"edge.{n}" in before)
        assert all(math.isfinite(v) for record in history for v in record.values())
        assert ("adversarial" in history[0]) == (defence.name in ADVERSARIAL)
        assert ("penalty" in history[0]) == (defence.name == "nopeek")

        class Killed(Exception):
            pass

        class Dies(Batches):
            def __iter__(self):  # type: ignore[no-untyped-def]
                if self.epoch == 1:
                    raise Killed
                return super().__iter__()

        halted = defence.apply(split(), calibration=inputs())
        objective = defence.objective(halted, normalization=NORMALIZATION, seed=3)
        with pytest.raises(Killed):
            finetune(halted, Dies(images(), 16, normalization=NORMALIZATION, shuffle=True, seed=1),
                     objective=objective, config=CONFIG, progress=False,
                     teacher=copy.deepcopy(split().model), checkpoint_dir=tmp_path)
        resumed = defence.apply(split(), calibration=inputs())
        assert train(resumed, defence, checkpoint_dir=tmp_path, resume=True).resumed_from == 1
        assert_same_state(whole.model, resumed.model)

    @EVERY
    def test_a_state_dict_makes_a_fresh_split_the_same_edge(self, defence: Defence) -> None:
        one = defence.apply(split(), calibration=inputs())
        other = defence.apply(split(seed=1))
        feature(one, inputs(1))  # moves a random upload's generator on
        other.model.load_state_dict(one.model.state_dict())
        x = inputs(4, 7)
        assert torch.equal(feature(one, x), feature(other, x))
        assert torch.isfinite(feature(one, x)).all()

    @EVERY
    def test_pruned_defended_saved_and_loaded(self, defence: Defence, tmp_path: Path) -> None:
        one = defence.apply(pruned(), calibration=inputs())
        pp.save(one, tmp_path / "edge.patrol")
        other = pp.load(tmp_path / "edge.patrol", lambda: split(seed=1).model)
        x = inputs(4, 7)
        if defence.name in RANDOM:
            for found in (one, other):
                found.edge.upload.silent = True
        assert torch.equal(feature(one, x), feature(other, x))
        z = feature(one, x)
        with torch.no_grad():
            assert torch.equal(one.cloud.eval()(z), other.cloud.eval()(z))

    @EVERY
    def test_modes_grads_and_the_splits_cost_are_kept(self, defence: Defence) -> None:
        found = split()
        found.model.train()
        found.model.bn1.eval()
        modes = {name: m.training for name, m in found.model.named_modules()}
        global_state = torch.get_rng_state()
        made = defence.apply(found, calibration=inputs())
        assert {name: m.training for name, m in found.model.named_modules()} == modes
        assert made.model.training
        still = defence.apply(split(), calibration=inputs()).model
        layers = [module for module in still.modules() if next(module.children(), None) is None]
        assert not any(module.training for module in (still, *layers))
        assert torch.equal(global_state, torch.get_rng_state())
        assert all(p.grad is None for p in made.model.parameters())
        macs = count_macs(made.edge, made.example_inputs).total
        dense = count_macs(split().edge, made.example_inputs).total
        extra = {"bottleneck": 16 * 4 * 64, "disco": 32 * 64 + 64 * 16}.get(defence.name, 0)
        assert macs == dense + extra or (defence.name == "cem_patrol" and macs < dense)

    @EVERY
    def test_the_input_gets_a_gradient(self, defence: Defence) -> None:
        found = defence.apply(split(), calibration=inputs())
        x = inputs(2).requires_grad_()
        with evaluating(found.edge):
            found.edge(x).square().sum().backward()
        assert x.grad is not None and float(x.grad.norm()) > 0

    @pytest.mark.parametrize("name", RANDOM)
    def test_draws_differ_in_evaluation_mode_and_between_copies(self, name: str) -> None:
        found, x = ALL[name].apply(split(), calibration=inputs()), inputs(2)
        found.model.eval()
        twins = [copy.deepcopy(found.edge), copy.deepcopy(found.edge),
                 pickle.loads(pickle.dumps(found.edge.upload))]
        twins[2] = nn.Sequential(found.edge.features, twins[2])
        again = ALL[name].apply(split(), calibration=inputs())
        again.model.eval()
        with torch.no_grad():
            assert torch.equal(found.edge(x), again.edge(x))  # the same seed
            drawn = [found.edge(x), found.edge(x), *(twin(x) for twin in twins)]
        for i, a in enumerate(drawn):
            assert all(not torch.equal(a, b) for b in drawn[:i])

    def test_uncalibrated_uploads_are_nan_until_loaded(self) -> None:
        for name in ("gaussian_noise", "laplacian_noise", "quantisation"):
            assert not torch.isfinite(feature(ALL[name].apply(split()), inputs(2))).any(), name

    def test_tokens_and_vectors(self) -> None:
        for edge in (nn.Flatten(2), nn.Flatten(1)):
            cloud = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
            found = pp.Split.from_modules(edge, cloud, torch.zeros(1, 3, 16, 16))
            for name in (*RANDOM, "quantisation", "bottleneck", "disco"):
                made = ALL[name].apply(found, calibration=inputs())
                assert made.model(inputs(2)).shape == (2, 10), name

    def test_bad_calibration_is_refused(self) -> None:
        for bad in (torch.zeros(0, 3, 16, 16), torch.full((2, 3, 16, 16), float("nan"))):
            with pytest.raises(InputError):
                GaussianNoise(0.1).apply(split(), calibration=bad)

    @pytest.mark.parametrize("make", [
        lambda: GaussianNoise(-1.0), lambda: GaussianNoise(float("nan")),
        lambda: FeatureDropout(1.0), lambda: FeatureDropout(0.5, spared=1.0),
        lambda: Quantisation(0), lambda: Quantisation(2.5),
        lambda: NoPeek(-1.0), lambda: Bottleneck(0), lambda: Disco(1.0), lambda: CemPatrol(ratio=2),
        lambda: Patrol(alpha=-1.0), lambda: make_defence("gausian_noise"),
        lambda: make_defence("none", 1.0), lambda: make_defence("quantisation", 2.5),
        lambda: make_defence("nopeek", 1.0, bits=3),
    ])
    def test_out_of_range_is_refused(self, make: Callable[[], Defence]) -> None:
        with pytest.raises(InputError):
            make()

    def test_strength_is_the_swept_field(self) -> None:
        assert make_defence("quantisation", 4.0) == Quantisation(4)
        assert make_defence("patrol", 7.0, alpha=0.5) == Patrol(alpha=0.5, beta=7.0)
        assert make_defence("patrol", 7.0) == Patrol(alpha=0.0, beta=7.0)
        assert make_defence("none") == Trained() and Trained().strength == 0.0
        for name, kind in DEFENCES.items():
            if kind.swept:
                assert make_defence(name, 1 if name in ("quantisation", "bottleneck") else 0.25
                                    ).strength in (1.0, 0.25)


class Own(RandomUpload):
    """A caller's own dropout on the package's stream."""

    def forward(self, z: Tensor) -> Tensor:
        draw = torch.rand(z.shape, generator=self.generator(z.device))
        return z * (draw >= 0.5)


class Holder(nn.Module):
    """The same with a generator of its own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.draws = torch.Generator().manual_seed(seed)

    def forward(self, z: Tensor) -> Tensor:
        return z * (torch.rand(z.shape, generator=self.draws) >= 0.5)


@dataclasses.dataclass(frozen=True)
class OwnDefence(Defence):
    name: ClassVar[str] = "own"

    module: Callable[[int], nn.Module] = Own

    def apply(self, split: Split, *, calibration: Tensor | None = None) -> Split:
        return wrapped(split, self.module(0))


def all_behind(edge: nn.Module) -> nn.Sequential:
    """What stands behind the edge's layers, in its order."""
    found: list[nn.Module] = []
    while hasattr(edge, "upload"):
        found.insert(0, edge.upload)
        edge = edge.features
    return nn.Sequential(*found)


class TestCombined:
    def test_each_is_calibrated_on_what_the_ones_before_it_send(self) -> None:
        both = Combined((FeatureDropout(0.5, seed=3), GaussianNoise(0.5)))
        found = both.apply(split(), calibration=inputs())
        thinned = feature(FeatureDropout(0.5, seed=3).apply(split()), inputs())
        rms = math.sqrt(float(thinned.double().square().mean()))
        assert float(found.edge.upload.sigma) == pytest.approx(0.5 * rms, rel=1e-5)
        plain = GaussianNoise(0.5).apply(split(), calibration=inputs()).edge.upload.sigma
        assert float(found.edge.upload.sigma) > 1.2 * float(plain)  # 1/sqrt(1 - p) = 1.41

    def test_the_surrogates_see_the_upload_as_it_leaves(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = ALL["combined"].apply(split())
        objective = ALL["combined"].objective(found, normalization=NORMALIZATION)
        assert isinstance(objective, PatrolObjective) and objective.beta == 1.0
        seen: list[Tensor] = []
        strongest = objective.surrogates.strongest

        def spy(z: Tensor, *arguments: object, **more: object) -> Tensor:
            seen.append(z.detach())
            return strongest(z, *arguments, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(objective.surrogates, "strongest", spy)
        found.model.eval()
        objective.terms(inputs(8), torch.arange(8))
        whole = feature(split(), inputs(8))
        kept = whole / (1.0 - 0.3)
        assert torch.equal(seen[0], torch.where(seen[0] == 0, torch.zeros(()), kept))
        dropped = (seen[0] == 0) & (whole != 0)
        assert float(dropped.sum() / (whole != 0).sum()) == pytest.approx(0.3, abs=0.03)

    def test_two_that_draw_have_streams_of_their_own(self) -> None:
        """With one seed for both, the dropped values would tell the noise of another picture."""
        both = Combined((GaussianNoise(0.5), FeatureDropout(0.5))).apply(split(),
                                                                         calibration=inputs())
        noise, drop = both.edge.features.upload, both.edge.upload
        assert noise.generator(torch.device("cpu")).initial_seed() != drop.generator(
            torch.device("cpu")).initial_seed()

    @pytest.mark.parametrize("own", [Own, Holder])
    def test_an_own_defence_draws_apart_from_ours(self, own: type[nn.Module]) -> None:
        """Two masks of one seed would be one mask, and hide half as much as they seem to."""
        parts = FeatureDropout(0.5), OwnDefence(own), OwnDefence(own)
        z, bare = torch.ones(4, 16, 8, 8), split()

        def sent(parts: tuple[Defence, ...]) -> Tensor:
            return all_behind(Combined(parts).apply(bare).edge)(z)

        for count, share in ((2, 0.25), (3, 0.125)):
            kept = (sent(parts[:count]) != 0).float().mean()
            assert float(kept) == pytest.approx(share, abs=0.03)
        assert torch.equal(sent(parts), sent(parts)), "and is repeatable"
        first = Combined((OwnDefence(own),)).apply(bare).edge.upload
        assert torch.equal(first(z), own(0)(z)), "one alone draws by its own seed"

    def test_ours_draw_as_they_always_did(self) -> None:
        """Published figures stand on these streams."""
        both = Combined((GaussianNoise(0.5, seed=3), FeatureDropout(0.5, seed=4))).apply(
            split(), calibration=inputs())
        z = torch.ones(2, 16, 8, 8)
        for module, seed in ((both.edge.features.upload, 3), (both.edge.upload, 4 + 1_000_003)):
            draw = module.generator(torch.device("cpu"))
            assert torch.equal(draw.get_state(), seeded(seed).get_state())
        assert (both.edge.upload(z) == 0).any()

    def test_nested_ones_and_a_list_are_the_same_as_flat(self) -> None:
        flat = Combined((FeatureDropout(0.5), Patrol(alpha=0.0)))
        assert Combined((Combined((FeatureDropout(0.5),)), Patrol(alpha=0.0))) == flat
        assert Combined([FeatureDropout(0.5), Patrol(alpha=0.0)]) == flat and hash(flat)

    def test_bytes_are_those_of_the_last_behind_the_edge(self) -> None:
        shape = (16, 8, 8)
        for parts in ((FeatureDropout(0.5), Quantisation(4), Patrol(alpha=0.0)),
                      (Quantisation(4),), (CemPatrol(), Quantisation(4))):
            assert Combined(parts).upload_bytes(shape) == Quantisation(4).upload_bytes(shape)
        assert Combined((Patrol(),)).upload_bytes(shape) == 4 * 16 * 8 * 8
        assert Combined((Trained(), FeatureDropout(0.5))).objective(split()) is None

    def test_behind_a_bottleneck_the_narrow_feature_is_thinned(self) -> None:
        parts = Bottleneck(4, beta=0.0), FeatureDropout(0.5), Patrol(alpha=0.0, beta=2.0)
        found = Combined(parts).apply(split())
        objective = Combined(parts).objective(found)
        assert objective is not None and objective.beta == 2.0
        assert tuple(found.feature_shape) == (4, 8, 8) and found.model(inputs(2)).shape == (2, 10)
        assert 0.3 < float((feature(found, inputs(8)) == 0).float().mean()) < 0.7

    @pytest.mark.parametrize("parts", [
        (), (FeatureDropout,), (Patrol(), NoPeek()), (Quantisation(4), GaussianNoise(0.5)),
        (Disco(0.5), FeatureDropout(0.5)),
        (FeatureDropout(0.5), CemPatrol()), (Bottleneck(4, beta=1.0), Patrol(alpha=0.0)),
    ])
    def test_what_cannot_go_together_is_refused(self, parts: tuple[Defence, ...]) -> None:
        with pytest.raises(InputError, match="Combined: expected"):
            Combined(parts)

    def test_an_apply_without_calibration_is_named(self) -> None:
        class Own(Defence):
            def apply(self, split: Split) -> Split:  # type: ignore[override]
                return split

        with pytest.raises(InputError, match=r"of Own a method.*came apply\(split: 'Split'\)"):
            Combined((FeatureDropout(0.5), Own()))

    def test_an_objective_without_its_arguments_is_named(self) -> None:
        class Own(Defence):
            def objective(self, split: Split, **more: Any) -> None:
                return None

        Combined((FeatureDropout(0.5), Own()))

        class Fewer(Defence):
            def objective(  # type: ignore[override]
                self, split: Split, *, seed: int = 0
            ) -> None:
                return None

        with pytest.raises(InputError, match=r"of Fewer a method objective.*'normalization'"):
            Combined((FeatureDropout(0.5), Fewer()))


class TestNoise:
    @pytest.mark.parametrize("kind", [GaussianNoise, LaplacianNoise])
    def test_moments(self, kind: type[GaussianNoise]) -> None:
        """Mean 0, the given share of the root mean square, and the family's own kurtosis."""
        found = kind(0.5, seed=4).apply(split(), calibration=inputs())
        z = calibration_features(split(), inputs())
        rms = math.sqrt(sum(v * v for v in z.flatten().tolist()) / z.numel())
        assert float(found.edge.upload.sigma) == pytest.approx(0.5 * rms, rel=1e-4)
        clean = torch.ones(400, 16, 8, 8)
        noise = (found.edge.upload(clean) - clean).double().flatten()
        deviation = float(noise.std())
        assert deviation == pytest.approx(0.5 * rms, rel=0.01)
        assert abs(float(noise.mean())) < 0.01 * deviation
        kurtosis = float((noise / deviation).pow(4).mean())
        assert kurtosis == pytest.approx(3.0 if kind is GaussianNoise else 6.0, rel=0.05)
        assert float((noise[1:] * noise[:-1]).mean()) < 0.01 * deviation**2

    def test_no_noise_is_the_undefended_edge(self) -> None:
        x = inputs(4)
        z = feature(GaussianNoise(0.0).apply(split(), calibration=inputs()), x)
        assert torch.equal(z, feature(split(), x))

    def test_dropped_share_and_mean(self) -> None:
        upload = FeatureDropout(0.3, seed=2).apply(split()).edge.upload
        z = upload(torch.ones(200, 16, 8, 8))
        assert float((z == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
        assert float(z.mean()) == pytest.approx(1.0, abs=0.02)
        assert set(z.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}

    @pytest.mark.parametrize(("spared", "count"), [(0.0, 0), (0.5, 5), (0.25, 3), (0.9, 9)])
    def test_spared_share_of_a_training_batch_passes_whole(self, spared: float, count: int) -> None:
        made = FeatureDropout(0.5, spared=spared).apply(split())
        upload, z = made.edge.upload, torch.rand(10, 16, 8, 8)
        whole = [torch.equal(a, b) for a, b in zip(upload.train()(z), z, strict=True)]
        assert sum(whole) == count
        assert max(len(run) for run in "".join("x" if w else " " for w in whole).split(" ")) <= (
            1 if spared <= 0.5 else count)
        thinned = upload(z)[torch.tensor(whole).logical_not()]
        assert float((thinned == 0).float().mean()) == pytest.approx(0.5, abs=0.05)
        assert not any(torch.equal(a, b) for a, b in zip(upload.eval()(z), z, strict=True))

    def test_sparing_leaves_the_draws_as_they_are(self) -> None:
        plain, sparing = (FeatureDropout(0.5, seed=4, spared=s).apply(split()).edge.upload.train()
                          for s in (0.0, 0.5))
        z = torch.rand(6, 16, 8, 8)
        for _ in range(2):
            a, b = plain(z), sparing(z)
            assert torch.equal(a[1::2], b[1::2]) and torch.equal(b[::2], z[::2])


class TestQuantisation:
    @pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
    def test_eight_bits_are_torchs_own(self) -> None:
        found, x = Quantisation(8).apply(split(), calibration=inputs()), inputs(8, 5)
        upload, z = found.edge.upload, feature(split(), x)
        theirs = torch.quantize_per_channel(z, upload.scale.double(), upload.zero_point, 1,
                                            torch.quint8).dequantize()
        torch.testing.assert_close(feature(found, x), theirs, rtol=0, atol=1e-6)

    @pytest.mark.parametrize(("bits", "shift"), [(1, -0.2), (3, -0.2), (8, -0.2), (3, 0.5)])
    def test_against_a_loop(self, bits: int, shift: float) -> None:
        found = Quantisation(bits).apply(split(), calibration=inputs())
        z = calibration_features(split(), inputs()) + shift
        upload = found.edge.upload
        upload.calibrate(z)
        got, levels = upload(z), 2**bits - 1
        for c in (0, 5):
            values = z[:2, c].flatten().tolist()
            low, high = min(0.0, float(z[:, c].min())), max(0.0, float(z[:, c].max()))
            if bits == 1:
                low, high = (low, 0.0) if -low > high else (0.0, high)
            scale = (high - low) / levels
            zero = round(-low / scale)
            expected = [(min(max(round(v / scale) + zero, 0), levels) - zero) * scale
                        for v in values]
            torch.testing.assert_close(got[:2, c].flatten(), torch.tensor(expected),
                                       rtol=0, atol=1e-4 * scale)
            assert len(got[:, c].unique()) <= 2**bits
        assert found.edge.upload(z).isfinite().all()

    def test_a_dead_channel_stays_zero(self) -> None:
        upload = Quantisation(4).apply(split()).edge.upload
        z = torch.rand(8, 16, 8, 8, generator=torch.Generator().manual_seed(0))
        z[:, 3] = 0
        upload.calibrate(z)
        assert torch.equal(upload(z)[:, 3], z[:, 3])

    def test_gradient_passes_inside_the_range_only(self) -> None:
        upload = Quantisation(2).apply(split()).edge.upload
        upload.calibrate(torch.linspace(0, 1, 64).view(1, 1, 8, 8).expand(1, 16, 8, 8))
        z = torch.full((1, 16, 8, 8), 0.4)
        z[:, :8] = 3.0
        z.requires_grad_()
        upload(z).sum().backward()
        assert z.grad is not None
        assert torch.equal(z.grad[0, :, 0, 0], torch.tensor([0.0] * 8 + [1.0] * 8))


def slow_distance_correlation(x: list[list[float]], z: list[list[float]]) -> float:
    """Straight from the definition."""
    def centred(values: list[list[float]]) -> list[list[float]]:
        n = len(values)
        d = [[math.dist(a, b) for b in values] for a in values]
        rows = [sum(r) / n for r in d]
        columns = [sum(d[j][k] for j in range(n)) / n for k in range(n)]
        whole = sum(rows) / n
        return [[d[j][k] - rows[j] - columns[k] + whole for k in range(n)] for j in range(n)]

    def covariance(a: list[list[float]], b: list[list[float]]) -> float:
        n = len(a)
        return sum(a[j][k] * b[j][k] for j in range(n) for k in range(n)) / n**2

    a, b = centred(x), centred(z)
    return math.sqrt(covariance(a, b) / math.sqrt(covariance(a, a) * covariance(b, b)))


class TestNoPeek:
    def test_distance_correlation_against_a_double_loop(self) -> None:
        g = torch.Generator().manual_seed(0)
        x = torch.randn(12, 3, 4, 4, generator=g)
        z = torch.tanh(x[:, :1]) + 0.5 * torch.randn(12, 1, 4, 4, generator=g)
        expected = slow_distance_correlation(x.flatten(1).tolist(), z.flatten(1).tolist())
        assert float(distance_correlation(x, z)) == pytest.approx(expected, rel=1e-5)

    def test_end_points(self) -> None:
        g = torch.Generator().manual_seed(1)
        x = torch.randn(40, 6, generator=g)
        turned = 3.0 * x @ torch.linalg.qr(torch.randn(6, 6, generator=g))[0] + 7.0
        assert float(distance_correlation(x, turned)) == pytest.approx(1.0, abs=1e-4)
        constant = torch.ones(40, 6, requires_grad=True)
        value = distance_correlation(x, constant)
        value.backward()
        assert value.item() < 1e-5 and constant.grad is not None
        assert distance_correlation(x, torch.full((40, 6), 0.1)).item() < 1e-5
        assert distance_correlation(x, 1e-9 * x).item() == pytest.approx(1.0, abs=1e-4)
        assert torch.isfinite(constant.grad).all()
        line = torch.randn(400, 1, generator=g)
        other = torch.randn(400, 1, generator=g)
        assert float(distance_correlation(line, other)) < 0.15

    def test_gradient(self) -> None:
        g = torch.Generator().manual_seed(2)
        x, z = torch.randn(6, 3, generator=g), torch.randn(6, 2, generator=g)
        z.requires_grad_()
        distance_correlation(x, z).backward()
        step = torch.zeros_like(z)
        step[2, 1] = 1e-2
        with torch.no_grad():
            slope = (distance_correlation(x, z + step) - distance_correlation(x, z - step)) / 2e-2
        assert z.grad is not None
        assert float(z.grad[2, 1]) == pytest.approx(float(slope), rel=0.02)

    def test_total(self) -> None:
        x, y = inputs(16), torch.arange(16) % 10
        found = split()
        terms = NoPeek(2.0, precision="fp32").objective(
            found, normalization=NORMALIZATION).terms(x, y)
        expected = distance_correlation(NORMALIZATION.to_pixels(x), found.edge(x))
        assert terms.penalty.item() == pytest.approx(expected.item(), abs=1e-6)
        assert terms.total.item() == pytest.approx((terms.task + 2.0 * terms.penalty).item())

    def test_the_weight_trains_it_down(self) -> None:
        g = torch.Generator().manual_seed(0)
        colours = torch.rand(32, 3, 1, 1, generator=g).expand(32, 3, 16, 16)
        coloured = ImageSet((colours * 255).to(torch.uint8), (colours[:, 0, 0, 0] > 0.5).long(),
                            ("a", "b"))
        batches = Batches(coloured, 32, normalization=NORMALIZATION, seed=1)
        config = dataclasses.replace(CONFIG, epochs=15, lr=0.05)
        penalties = []
        for weight in (0.0, 20.0):
            found, defence = split(), NoPeek(weight, precision="fp32")
            objective = defence.objective(found, normalization=NORMALIZATION)
            history = finetune(found, batches, objective=objective, config=config,
                               progress=False).history
            penalties.append([record["penalty"] for record in (history[0], history[-1])])
        assert penalties[0][0] == pytest.approx(penalties[1][0])
        assert penalties[1][1] < 0.6 * penalties[0][1]


class TestBottleneck:
    def test_full_width_is_the_same_network(self) -> None:
        found, x = Bottleneck(16).apply(split(), calibration=inputs()), inputs(4, 3)
        with torch.no_grad():
            torch.testing.assert_close(found.model.eval()(x), split().model.eval()(x),
                                       rtol=1e-4, atol=1e-4)
        assert found.feature_shape == (16, 8, 8)

    def test_starts_at_the_least_linear_loss(self) -> None:
        """The residual variance is the sum of the smallest eigenvalues of the covariance."""
        found = Bottleneck(5).apply(split(), calibration=inputs())
        z = calibration_features(split(), inputs())
        with torch.no_grad():
            back = found.cloud.receive(found.edge.upload(z))
        flat = z.movedim(1, -1).flatten(0, 2).double()
        loss = float((back - z).double().square().sum()) / len(flat)
        smallest = torch.linalg.eigvalsh(torch.cov(flat.T, correction=0))[:-5].sum()
        assert loss == pytest.approx(float(smallest), rel=1e-4)
        assert found.feature_shape == (5, 8, 8)
        assert Bottleneck(5).upload_bytes(found.feature_shape) == 4 * 5 * 64

    def test_too_wide_is_refused(self) -> None:
        with pytest.raises(InputError, match="at most the feature's 16"):
            Bottleneck(17).apply(split())


class TestDisco:
    def test_mask_against_a_loop(self) -> None:
        dropper = ChannelDropper(16, 6, 1, width=8, temperature=0.1, seed=0)
        z = torch.rand(5, 16, 4, 4, generator=torch.Generator().manual_seed(3))
        out = dropper(z)
        patterns = set()
        for image in range(5):
            values = z[image].flatten(1)
            pooled = torch.cat([values.mean(1), values.square().mean(1).sqrt()])
            scores = dropper.scorer(pooled).tolist()
            best = sorted(range(16), key=lambda c: -scores[c])[:6]
            patterns.add(tuple(sorted(best)))
            for c in range(16):
                expected = z[image, c] if c in best else torch.zeros(4, 4)
                torch.testing.assert_close(out[image, c], expected, rtol=1e-6, atol=1e-6)
        assert len(patterns) > 1  # the choice depends on the image

    def test_the_scorer_learns(self) -> None:
        dropper = ChannelDropper(16, 6, 1, width=8, temperature=0.1, seed=0)
        dropper(inputs(4).repeat(1, 6, 1, 1)[:, :16]).square().sum().backward()
        assert all(p.grad is not None and float(p.grad.norm()) > 0
                   for p in dropper.scorer.parameters())

    @pytest.mark.parametrize(("ratio", "kept"), [(0.0, 16), (0.5, 8), (0.3, 12), (0.99, 1)])
    def test_dropped_share_and_bytes(self, ratio: float, kept: int) -> None:
        defence = Disco(ratio)
        found = defence.apply(split())
        live = feature(found, inputs(8)).abs().flatten(2).sum(2) > 0
        assert int(live.sum(1).max()) <= kept
        assert defence.upload_bytes(found.feature_shape) == 4 * kept * 64 + 2
        if ratio == 0.0:
            assert torch.equal(feature(found, inputs(8)), feature(split(), inputs(8)))


class TestTrainingAlone:
    def test_terms(self) -> None:
        found = split()
        assert Trained().objective(found) is None and Trained().apply(found) is found
        assert Bottleneck(4).objective(found) is None
        for defence, alpha, beta in ((Patrol(alpha=0.5, beta=3.0), 0.5, 3.0),
                                     (AdversarialOnly(3.0), 0.0, 3.0), (CemPatrol(3.0), 0.0, 3.0),
                                     (Disco(beta=3.0), 0.0, 3.0)):
            objective = defence.objective(found, normalization=NORMALIZATION, seed=5)
            assert isinstance(objective, PatrolObjective) and objective.split is found
            assert (objective.alpha, objective.beta, objective.seed) == (alpha, beta, 5)
            assert objective.normalization == NORMALIZATION

    def test_upload_bytes(self) -> None:
        for dense in (Trained(), GaussianNoise(), FeatureDropout(), NoPeek()):
            assert dense.upload_bytes((16, 8, 8)) == 4096
        assert Quantisation(8).upload_bytes((16, 8, 8)) == 1024
        assert Quantisation(3).upload_bytes((5,)) == 2


class TestCemPatrol:
    def test_prunes_the_least_taylor_scores_on_noise(self) -> None:
        """The middle channels of the first block: removed are those whose zeroing moves S least."""
        found, defence = split(), CemPatrol(ratio=0.3, seed=6)
        noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(6))
        model = split().model
        gate = torch.ones(8, requires_grad=True)
        handle = model.layer1[0].conv2.register_forward_pre_hook(
            lambda _, args: (args[0] * gate.view(1, -1, 1, 1),))
        model(noise).sum().backward()
        handle.remove()
        assert gate.grad is not None
        least = set(gate.grad.abs().argsort()[:3].tolist())  # 8 - int(8 * 0.7)
        kept = [c for c in range(8) if c not in least]
        expected = model.layer1[0].bn1.weight.detach()[kept]  # random, so it tells channels apart
        assert defence.apply(found) is found
        assert torch.equal(found.model.layer1[0].bn1.weight, expected)
        assert found.model.layer2[0].conv1.out_channels == 16 - 5
        assert found.feature_shape == (16, 8, 8)
        assert found.model.layer3[0].conv1.out_channels == 32  # the cloud is whole

    def test_five_per_cent_by_default(self) -> None:
        found = CemPatrol().apply(split())
        assert found.model.layer1[0].conv1.out_channels == 8 - int(8 * 0.05 + 1)
        assert found.pruning_history


class TestStates:
    @pytest.mark.parametrize("name", RANDOM)
    def test_a_loaded_split_draws_on_as_the_saved_one_would(
        self, name: str, tmp_path: Path
    ) -> None:
        found = ALL[name].apply(split(), calibration=inputs())
        feature(found, inputs(4))
        pp.save(found, tmp_path / "made")
        loaded = pp.load(tmp_path / "made", lambda: split(1).model)
        assert torch.equal(feature(loaded, inputs(4)), feature(found, inputs(4)))

    def test_counting_and_timing_are_no_uploads(self) -> None:
        found = GaussianNoise(0.5).apply(split(), calibration=inputs())
        before = found.edge.upload.get_extra_state()
        pp.edge_macs(found)
        found.refresh()
        pp.measure_latency(found.edge, inputs(1), pp.LatencyConfig(min_run_time=0.01))
        assert torch.equal(found.edge.upload.get_extra_state(), before)

    @pytest.mark.parametrize("name", ["gaussian_noise", "laplacian_noise", "feature_dropout",
                                      "quantisation", "bottleneck", "disco"])
    def test_models_in_half_precision_stay_in_it(self, name: str) -> None:
        half = pp.Split(split().model.bfloat16(), torch.zeros(1, 3, 16, 16).bfloat16(), at="layer2")
        x = inputs(4).bfloat16()
        found = ALL[name].apply(half, calibration=inputs().bfloat16())
        assert feature(found, x).dtype == torch.bfloat16
        assert found.model(x).dtype == torch.bfloat16
        later = ALL[name].apply(split(), calibration=inputs())
        assert later.model.bfloat16()(x).isfinite().all()

    def test_an_uncalibrated_defence_is_not_trained(self) -> None:
        with pytest.raises(InputError, match="calibration="):
            train(GaussianNoise(0.5).apply(split()), ALL["gaussian_noise"])

    @pytest.mark.parametrize("make", [
        lambda: make_defence("gaussian_noise", "0.5"), lambda: make_defence(None),
        lambda: make_defence("disco", 0.5, width=1.5),
        lambda: make_defence("gaussian_noise", 0.5, sigma=0.9),
        lambda: GaussianNoise(0.5).apply(split(), calibration=torch.randn(2, 4, 16, 16)),
    ])
    def test_slips_are_refused_in_words(self, make: Callable[[], object]) -> None:
        with pytest.raises(InputError):
            make()

    def test_behind_a_defence_that_draws_every_block_has_its_constant(self) -> None:
        bare = split()
        defence = Combined((FeatureDropout(0.3), Patrol(alpha=0.1, beta=0.0, adversary=SMALL)))
        found = defence.apply(bare, calibration=inputs())
        assert len(bare.blocks) > 1 and len(found.blocks) == len(bare.blocks) + 1
        kept = found.blocks
        found.refresh()
        assert all(a is b for a, b in zip(kept, found.blocks, strict=True))
        x = inputs(4)
        with evaluating(found.model), torch.no_grad():
            z = x
            for block in found.blocks[:-1]:
                z = block(z)
            assert torch.allclose(z, bare.edge(x), atol=1e-6)
        objective = defence.objective(found, normalization=NORMALIZATION)
        assert objective is not None
        terms = objective.terms(x, torch.arange(4))
        assert float(terms.lipschitz) > 0 and torch.isfinite(terms.total)

    def test_a_last_batch_of_one_image_has_no_distances(self) -> None:
        objective = NoPeek(0.5, precision="fp32").objective(split(), normalization=NORMALIZATION)
        terms = objective.terms(inputs(1), torch.zeros(1, dtype=torch.long))
        assert float(terms.penalty) == 0.0 and torch.isfinite(terms.total)

    @pytest.mark.parametrize("spared", [0.1, 0.25, 0.5])
    def test_the_first_images_of_a_batch_hold_a_spared_one(self, spared: float) -> None:
        found = FeatureDropout(0.5, spared=spared).apply(split())
        upload = found.edge.upload.train()
        some = upload(torch.ones(round(0.5 / spared), 200))
        assert int((some == 1).all(1).sum()) == 1

    def test_one_bit_of_a_channel_with_both_signs_is_not_dead(self) -> None:
        z = torch.linspace(-1, 1, 64)[:, None].repeat(1, 3) * torch.tensor([1.0, -1.0, 0.1])
        z[:, 1] -= 0.5
        quantiser = Quantisation(1).apply(split()).edge.upload
        quantiser = type(quantiser)(3, 1, 1)
        quantiser.calibrate(z)
        sent = quantiser(z)
        for channel in range(3):
            values = sent[:, channel].unique()
            assert len(values) == 2 and float(values.abs().min()) == 0.0

    def test_bytes_of_maps_whose_channels_come_last(self) -> None:
        assert Disco(0.75).upload_bytes((2, 2, 768)) == 4 * 2 * 2 * 192 + 96
        assert Disco(0.75).upload_bytes((768, 2, 2)) == 4 * 2 * 2 * 192 + 96
        assert Disco(0.75).upload_bytes((16, 16, 12)) == 4 * 16 * 12 * 4 + 2  # as `apply` reads it


@pytest.mark.parametrize(("groups", "left"), [(1, 1), (4, 2)])
def test_as_many_tied_channels_stay_as_have_to(groups: int, left: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 1, groups=groups),
                          nn.Conv2d(12, 2, 1))
    group = GroupTable.build(model, torch.zeros(1, 3, 4, 4)).groups["0"]
    gone = lowest(group, torch.arange(12.0), ratio=0.99)
    assert 12 - len(gone) == left * groups
