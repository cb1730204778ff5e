"""Attacks without queries: moments against loops, shadows learn, and nothing forbidden is read."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from patrol_prune.attacks.base import Attack, Knowledge
from patrol_prune.attacks.inverse_network import InverseNetworkConfig
from patrol_prune.attacks.query_free import QueryFree
from patrol_prune.attacks.query_free_config import QueryFreeConfig
from patrol_prune.attacks.rmle import RMLEConfig
from patrol_prune.attacks.shadow import SHIFTS, FeatureMoments, OtherEdge
from patrol_prune.errors import InputError, TrainingError
from patrol_prune.metrics import mse

IMAGE = (3, 16, 16)
DECODER = InverseNetworkConfig(
    width=16, depth=1, epochs=4, batch_size=16, precision="fp32", max_extensions=0
)
SMALL = QueryFreeConfig(
    epochs=6, lr=1e-2, batch_size=32, decoder=DECODER, precision="fp32", width=8,
    reconstruct=("decoder",),
)


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Smooth images, one bright quarter each, and which quarter: the class."""
    generator = torch.Generator().manual_seed(seed)
    coarse = 0.6 * torch.rand(count, 3, 4, 4, generator=generator)
    labels = torch.randint(4, (count,), generator=generator)
    for n, label in enumerate(labels.tolist()):
        top, left = 2 * (label // 2), 2 * (label % 2)
        coarse[n, :, top : top + 2, left : left + 2] += 0.4
    smooth = nn.functional.interpolate(coarse, size=IMAGE[1:], mode="bilinear")
    return smooth.clamp(0, 1), labels


PIXELS, LABELS = images(320, 0)
VICTIM, _ = images(64, 1)
FLOOR = float(mse(VICTIM, PIXELS.mean(0).expand_as(VICTIM)).mean())
MEAN, STD = (0.4, 0.4, 0.4), (0.25, 0.25, 0.25)


def fresh_edge(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU())


def trained_model() -> tuple[nn.Module, nn.Module]:
    """A model trained for a moment: edge and cloud."""
    edge = fresh_edge(123)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(5)
        cloud = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(),
                              nn.Dropout(0.2), nn.Linear(128, 4))
        model = nn.Sequential(edge, cloud)
        pixels, labels = images(512, 9)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(40):
            pick = torch.randint(512, (64,))
            loss = nn.functional.cross_entropy(model((pixels[pick] - 0.4) / 0.25), labels[pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return edge.eval(), cloud.eval()


EDGE, CLOUD = trained_model()


def upload(pixels: Tensor) -> Tensor:
    with torch.no_grad():
        z: Tensor = EDGE((pixels - 0.4) / 0.25)
    return z


OBSERVED = upload(VICTIM)


class Forbidden(Knowledge):
    """Knowledge that notices when what a query would give is read."""

    def __getattribute__(self, name: str) -> object:
        if name in ("z", "edge", "pairs", "white_box"):
            raise AssertionError(f"{name} was read without a query")
        return super().__getattribute__(name)


def known(**changes: object) -> Knowledge:
    given_ = {"pixels": PIXELS, "cloud": CLOUD, "labels": LABELS, "observed": OBSERVED,
              "shadow_edge": fresh_edge, **changes}
    return Forbidden(**given_)  # type: ignore[arg-type]


def error(attack: Attack) -> float:
    return float(mse(VICTIM, attack.reconstruct(OBSERVED)).mean())


# --- moments ------------------------------------------------------------------------------------


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_moments_are_those_of_loops(channels: int, height: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(4, channels, height, width, generator=generator)
    # `(channels, channels * 2 * ...)` images of another aspect never read these as channels-last.
    moments = FeatureMoments(z, (3, height * 4, width * 4))
    if moments.dim != 1:
        return
    v = z.double() - z.double().mean((0, 2, 3), keepdim=True)
    v = v / moments.std.double().view(1, -1, 1, 1)
    correlation = v.movedim(1, -1).flatten(0, 2).T @ v.movedim(1, -1).flatten(0, 2)
    root = moments.whitening.double()
    eye = torch.eye(channels, dtype=torch.float64)
    inside = correlation * channels / v.numel() + 0.3 * eye
    assert torch.allclose(root @ inside @ root, eye, atol=1e-3) and torch.allclose(root, root.T)
    u = torch.einsum("ij,njhw->nihw", root, v)
    mean, signed, *matrices = moments.targets
    assert torch.allclose(mean.double().permute(2, 0, 1), u.mean(0), atol=1e-3)
    assert torch.allclose(signed.double(), (v * v.abs()).mean((0, 2, 3)), atol=1e-3)
    shifts = [s for s in SHIFTS if s[0] < height and s[1] < width]
    assert len(matrices) == len(shifts)
    for (down, right), matrix in zip(shifts, matrices, strict=True):
        for i in range(channels):
            for j in range(channels):
                products = [u[n, i, y, x] * u[n, j, y + down, x + right]
                            for n in range(4) for y in range(height - down)
                            for x in range(width - right)]
                assert float(matrix[i, j]) == pytest.approx(
                    float(sum(products)) / len(products), rel=1e-3, abs=1e-3)


def test_the_loss_is_zero_on_what_was_observed_and_grows_with_what_differs() -> None:
    z = torch.randn(32, 6, 8, 8, generator=torch.Generator().manual_seed(0)).relu()
    z = nn.functional.avg_pool2d(z, 3, 1, 1) * torch.arange(1.0, 7.0).view(-1, 1, 1)
    moments = FeatureMoments(z, IMAGE)
    twice = torch.cat([z, z])
    assert float(moments.loss(twice)) == pytest.approx(0.0, abs=1e-6)
    turned = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    flipped = twice.flip(3) + torch.linspace(0, 1, 8)
    for other in (-twice, 1.2 * twice, twice.flip(1), flipped, torch.randn_like(twice),
                  torch.einsum("ij,njhw->nihw", turned, twice)):
        assert float(moments.loss(other)) > 0.05


def test_the_loss_of_small_batches_is_right_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4000, 3, 2, 2, generator=generator)
    moments = FeatureMoments(z, IMAGE)
    same = torch.stack([moments.loss(part) for part in torch.split(z, 4)])
    # The naive distance of a batch from its own population would be about 3.
    assert abs(float(same.mean())) < 4 * float(same.std()) / len(same) ** 0.5
    assert float(same.min()) < 0.0


def test_large_maps_are_compared_in_tiles_and_on_average_exactly() -> None:
    z = torch.randn(8, 3, 40, 24, generator=torch.Generator().manual_seed(0))
    moments = FeatureMoments(z, (3, 80, 48))
    assert (moments.tile_size, len(moments.tiles)) == ((14, 12), 6)
    covered = torch.zeros(40, 24)
    for top, left in moments.tiles:
        covered[top : top + 14, left : left + 12] += 1
    assert bool((covered > 0).all())
    u = moments._standard(z)
    each = torch.stack([moments._moments(u, [t])[2] for t in range(6)]).mean(0)
    assert torch.allclose(each, moments.targets[2], atol=1e-4)


@pytest.mark.parametrize("shape", [(700,), (5, 700), (700, 2, 2)])
def test_many_channels_are_projected(shape: tuple[int, ...]) -> None:
    z = torch.randn(6, *shape, generator=torch.Generator().manual_seed(0))
    moments = FeatureMoments(z, IMAGE)
    assert moments.targets[2].shape == (512, 512)
    assert float(moments.loss(torch.cat([z, z]))) == pytest.approx(0.0, abs=1e-4)
    assert float(moments.loss(2 * torch.cat([z, z]))) > 0.1


# --- other architecture -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [(8, 8, 8), (8, 16, 16), (8, 5, 3), (6, 20, 20), (17, 12), (16, 12), (7, 12), (10,),
     (8, 8, 24)],
)
def test_the_other_edge_gives_features_of_any_shape(shape: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    x = PIXELS[:4]
    first = OtherEdge(IMAGE, shape, width=4, seed=0)(x).detach()
    assert first.shape == (4, *shape) and bool((first < 0).any())
    assert OtherEdge(IMAGE, shape, width=4).eval()(x).shape == first.shape
    assert float((first[0] - first[1]).abs().max()) > 1e-2
    assert torch.equal(first, OtherEdge(IMAGE, shape, width=4, seed=0)(x))
    assert not torch.equal(first, OtherEdge(IMAGE, shape, width=4, seed=1)(x))
    positive = OtherEdge(IMAGE, shape, width=4, positive=True, seed=0)(x)
    assert torch.equal(positive, first.relu())
    assert torch.equal(torch.get_rng_state(), before)


# --- the attack ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["shadow_same", *(
    pytest.param(mode, marks=pytest.mark.slow) for mode in ("shadow_other", "match"))])
def test_a_shallow_edge_is_inverted_without_a_query(mode: str) -> None:
    attack = QueryFree(dataclasses.replace(SMALL, mode=mode))
    assert isinstance(attack, Attack)
    changes = {"labels": None} if mode == "match" else {}
    record = attack.fit(known(**changes))
    assert error(attack) < 0.6 * FLOOR
    assert record.best_loss < 0.5 * record.initial_loss
    assert record.best_loss < record.mean_image_loss
    assert record.chosen is not None and record.chosen["mode"] == mode
    assert len(record.history) == len(record.train_history) == SMALL.epochs


@pytest.mark.slow
def test_an_untrained_shadow_gives_less_away_and_its_loss_does_not_fall() -> None:
    trained, untrained = QueryFree(SMALL), QueryFree(dataclasses.replace(SMALL, lr=0.0))
    trained.fit(known())
    record = untrained.fit(known())
    assert error(trained) < 0.7 * error(untrained)
    assert not record.best_loss < 0.99 * record.initial_loss


def test_the_cloud_and_labels_alone_are_enough() -> None:
    attack = QueryFree(SMALL)
    attack.fit(known(observed=None))
    assert error(attack) < FLOOR


def test_same_seed_same_result_and_everything_is_left_as_found() -> None:
    CLOUD[3].train()
    CLOUD[0].weight.grad = None
    before, weights = torch.get_rng_state(), CLOUD[0].weight.detach().clone()
    outputs = []
    quick = dataclasses.replace(SMALL, epochs=1, decoder=dataclasses.replace(DECODER, epochs=1))
    for seed in (0, 0, 1):
        attack = QueryFree(dataclasses.replace(quick, seed=seed))
        attack.fit(known())
        outputs.append(attack.reconstruct(OBSERVED[:8]))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    assert outputs[0].shape == (8, *IMAGE) and outputs[0].dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), before)
    assert CLOUD[3].training and CLOUD[0].weight.requires_grad and CLOUD[0].weight.grad is None
    assert torch.equal(CLOUD[0].weight, weights)
    CLOUD.eval()


@pytest.mark.slow
def test_all_reconstructions_are_tried_on_held_out_images_and_shadows_are_averaged() -> None:
    rmle = RMLEConfig(losses=("mse",), lambda_tv=(1e-2,), steps=30, tuning_images=2, refine=False)
    config = dataclasses.replace(SMALL, epochs=2, shadows=2, rmle=rmle, moment_epochs=1,
                                 reconstruct=("decoder", "linear", "rmle"))
    attack = QueryFree(config)
    record = attack.fit(known())
    scores = record.chosen["held_out_mse"]  # type: ignore[index]
    assert set(scores) == {"decoder", "linear", "rmle"}
    assert record.chosen["reconstruct"] == min(scores, key=scores.get)  # type: ignore[index]
    assert len(attack.shadows) == len(attack.reconstructors) == 2 and len(record.history) == 3
    parts = [r.reconstruct(limits.clip(OBSERVED))
             for r, limits in zip(attack.reconstructors, attack._ranges, strict=True)]
    mean, share = attack._mean_image, record.chosen["share"]  # type: ignore[index]
    assert mean is not None and 0.0 < share <= 1.0
    expected = mean + share * (torch.stack(parts).mean(0) - mean)
    assert torch.allclose(attack.reconstruct(OBSERVED), expected, atol=1e-5)


def test_without_another_shadow_the_answer_is_the_reconstruction_itself() -> None:
    attack = QueryFree(dataclasses.replace(SMALL, epochs=1, starts=1))
    record = attack.fit(known())
    assert record.chosen["share"] == 1.0  # type: ignore[index]
    z = attack._ranges[0].clip(OBSERVED)
    assert torch.equal(attack.reconstruct(OBSERVED), attack.reconstructors[0].reconstruct(z))
    # Far outside of what the shadow ever said, uploads are no worse than at the border.
    far = attack.reconstruct(1e4 * torch.ones_like(OBSERVED))
    assert torch.equal(far, attack.reconstruct(1e6 * torch.ones_like(OBSERVED)))


@pytest.mark.slow
def test_shadows_that_know_little_go_less_far_from_the_mean_image() -> None:
    # Untrained deep shadows: what is learnt on one transfers badly to another.
    def deep(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.Tanh(), nn.Linear(64, 64))

    attack = QueryFree(dataclasses.replace(SMALL, lr=0.0, shadows=2, starts=2))
    with torch.no_grad():
        uploads = deep(99)(VICTIM)
    record = attack.fit(known(cloud=nn.Linear(64, 4), shadow_edge=deep, observed=uploads))
    share = attack.share
    assert record.chosen["share"] == share < 0.9  # type: ignore[index]
    with_share = float(mse(VICTIM, attack.reconstruct(uploads)).mean())
    attack.share = 1.0
    assert with_share < float(mse(VICTIM, attack.reconstruct(uploads)).mean())


def test_bytes_are_pixels() -> None:
    quick = dataclasses.replace(SMALL, epochs=1, reconstruct=("decoder", "linear"),
                                decoder=dataclasses.replace(DECODER, epochs=1))
    as_bytes = (PIXELS * 255).round().to(torch.uint8)
    outputs = []
    for pixels in (as_bytes, as_bytes.float() / 255):
        attack = QueryFree(quick)
        attack.fit(known(pixels=pixels))
        outputs.append(attack.reconstruct(OBSERVED[:4]))
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)


# --- misuse -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "changes", "message"),
    [
        ("shadow_same", {"cloud": None}, "needs cloud"),
        ("shadow_same", {"labels": None}, "needs labels"),
        ("shadow_same", {"shadow_edge": None}, "needs shadow_edge"),
        ("shadow_other", {"observed": None}, "needs observed"),
        ("match", {"observed": None}, "needs observed"),
        ("match", {"pixels": PIXELS[:21]}, "at least 22"),
        ("match", {"pixels": PIXELS * 2}, r"on \[0, 1\]"),
        ("match", {"observed": OBSERVED[:1]}, "at least 2"),
        ("match", {"observed": OBSERVED * torch.nan}, "finite"),
        ("shadow_same", {"labels": LABELS[:5]}, "one label per image"),
    ],
)
def test_missing_knowledge_is_named(mode: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        QueryFree(dataclasses.replace(SMALL, mode=mode)).fit(known(**changes))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"mode": "shadow_some"}, "Did you mean: shadow_same"),
        ({"reconstruct": ("decode",)}, "Did you mean: decoder"),
        ({"precision": "fp16"}, "bf16"),
        ({"reconstruct": ()}, "came"),
        ({"epochs": 0}, "epochs >= 1"),
        ({"shadows": 3, "starts": 2}, "starts >= 3"),
        ({"lr": float("nan")}, "lr >= 0"),
        ({"holdout": 0.0}, "holdout"),
        ({"mean": (0.5,)}, "mean and std together"),
        ({"mean": (0.5,), "std": (0.0,)}, "mean and std together"),
    ],
)
def test_bad_settings_are_refused(setting: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        QueryFreeConfig(**setting)  # type: ignore[arg-type]


def test_divergence_wrong_channels_and_no_fit() -> None:
    with pytest.raises(TrainingError, match="not finite"):
        QueryFree(dataclasses.replace(SMALL, lr=1e30)).fit(known())
    with pytest.raises(InputError, match="one mean per image channel"):
        QueryFree(dataclasses.replace(SMALL, mean=(0.5,), std=(0.5,))).fit(known())
    with pytest.raises(InputError, match="fit"):
        QueryFree(SMALL).reconstruct(OBSERVED)


def test_uploads_of_another_shape_are_refused_in_words() -> None:
    attack = QueryFree(dataclasses.replace(SMALL, mode="match", epochs=1, reconstruct=("linear",)))
    attack.fit(known())
    z = upload(VICTIM[:2])
    for other in (z[0], z[:, :1], z[0, 0], z.flatten(1), z[:, :, ::2]):
        with pytest.raises(InputError, match="uploads .* as this attack was fitted on"):
            attack.reconstruct(other)
