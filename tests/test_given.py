"""Easy mistakes are refused in words that name them, before any work."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

import patrol_prune as pp
from patrol_prune.attacks import FitRecord, Knowledge
from patrol_prune.errors import CheckpointError, InputError, TrainingError, UnsupportedModelError
from patrol_prune.finetune import check_training
from patrol_prune.models import SmallResNet
from patrol_prune.surrogate import SurrogateSpec

SPECS = (SurrogateSpec("transposed", width=8),)
QUICK = pp.FinetuneConfig(epochs=1, surrogate_warmup_steps=0)


def split(at: str = "layer1") -> pp.Split:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return pp.Split(SmallResNet(5, width=4), torch.zeros(1, 3, 16, 16), at=at)


def images(count: int = 40) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def batches(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    return [(images(8), torch.arange(8) % 5)] * count


def objective(of: pp.Split, **settings: Any) -> pp.PatrolObjective:
    return pp.PatrolObjective(of, F.cross_entropy, beta=1.0, surrogates=SPECS, **settings)


class Mine:
    """An attack that answers with what it is made with."""

    def __init__(self, guess: Any = 0.5) -> None:
        self.guess = guess

    def fit(self, known: Knowledge) -> FitRecord | None:
        return None

    def reconstruct(self, z: Tensor) -> Tensor:
        if isinstance(self.guess, Exception):
            raise self.guess
        if self.guess is None:
            return None  # type: ignore[return-value]
        return torch.full((len(z), 3, 16, 16), float(self.guess))


class Plain(Mine):
    def __init__(self) -> None:
        super().__init__()


def audit(what: Any, **settings: Any) -> Any:
    return pp.audit(what, images(), images(48)[40:], **{"attacks": {"mine": Mine()}, **settings})


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "audit of a model": (lambda: audit(SmallResNet(5, width=4)), "split as a Split.*SmallResNet"),
    "undefended model": (lambda: audit(split(), undefended=split().model), "undefended as a Split"),
    "objective of a model": (lambda: objective(split().model), "Cut the model first"),
    "a tuple as normalization": (lambda: objective(split(), normalization=(0.5,)), "came tuple"),
    "the same in an audit": (lambda: audit(split(), normalization=(0.5,)), "came tuple"),
    "one seed as a number": (lambda: audit(split(), seeds=0), r"seeds=\(0,\)"),
    "one number of images": (lambda: audit(split(), attacker_images=9), r"attacker_images=\(9,\)"),
    "the class of an attack": (lambda: audit(split(), attacks={"mine": Plain}), "takes no seed"),
    "saving a model": (lambda: pp.save(split().model, "nowhere"), "split as a Split"),
    "a model as the factory": (lambda: pp.load("nowhere", split().model), "function without arg"),
    "batches without labels": (lambda: pp.finetune(split(), [images(8)], progress=False),
                               "came a Tensor"),
    "batches as dicts": (lambda: pp.finetune(split(), [{"image": 1, "label": 2}], progress=False),
                         "a dict of image, label"),
    "batches of bytes": (lambda: pp.finetune(
        split(), [((images(8) * 255).byte(), torch.zeros(8))], progress=False), "torch.uint8"),
    "a generator": (lambda: pp.finetune(split(), iter(batches())), "read again.*list_iterator"),
    "a split as the teacher": (lambda: pp.finetune(split(), batches(), teacher=split()),
                               "Give split.model"),
    "a factory of nothing": (lambda: pp.load("nowhere", lambda: None), "came NoneType"),
    "no task loss": (lambda: pp.PatrolObjective(split(), None), "function of logits"),
    "beta in words": (lambda: pp.PatrolObjective(split(), F.cross_entropy, beta="1"), "beta as a"),
    "alpha of nothing": (lambda: objective(split(), alpha=None), "alpha as a number"),
    "a precision of its own": (lambda: objective(split(), precision="fp8"), "precision out of"),
    "surrogates in words": (lambda: pp.PatrolObjective(split(), F.cross_entropy, surrogates="conv"),
                            "SurrogateSpec"),
    "an ensemble as surrogates": (lambda: pp.PatrolObjective(
        split(), F.cross_entropy, surrogates=pp.SurrogateEnsemble((4, 8, 8), (3, 16, 16), SPECS)),
        "as a sequence of SurrogateSpec.*, came SurrogateEnsemble"),
    "one spec": (lambda: pp.PatrolObjective(split(), F.cross_entropy, surrogates=SPECS[0]),
                 "as a sequence of.*came SurrogateSpec"),
    "a family of no decoder": (lambda: SurrogateSpec("resdual", 8), "family out.*mean: residual"),
    "a width of nothing": (lambda: SurrogateSpec("residual", 0), "width as a whole number"),
    "half a channel": (lambda: SurrogateSpec("unet", 4.5), "width as a whole number"),
    "less than no depth": (lambda: SurrogateSpec("residual", 8, -1), "depth as a whole number"),
    "an ensemble's rate": (lambda: pp.SurrogateEnsemble((4, 8, 8), (3, 16, 16), SPECS, lr=-1.0),
                           "surrogate_lr"),
    "names in an ensemble": (lambda: pp.SurrogateEnsemble((4, 8, 8), (3, 16, 16), ("residual",)),
                             "as a sequence of SurrogateSpec"),
    "bytes in an ensemble": (lambda: pp.SurrogateEnsemble((4, 8, 8), (3, 16, 16), SPECS).step(
        torch.zeros(8, 4, 8, 8), images(8) * 255), "on \\[0, 1\\], came .*% outside"),
    "attackers of no pictures": (lambda: objective(pp.Split.from_modules(
        nn.Linear(6, 4), nn.Linear(4, 5), torch.zeros(2, 6))), "images .*beta .*example_shape"),
    "attackers of volumes": (lambda: objective(pp.Split.from_modules(
        nn.Conv3d(3, 4, 1), nn.Flatten(), torch.zeros(2, 3, 4, 4, 4))), "images .*leave beta at 0"),
    "no surrogates": (lambda: pp.PatrolObjective(split(), F.cross_entropy, surrogates=[]),
                      "at least one surrogate"),
    "a negative rate": (lambda: objective(split(), surrogate_lr=-1.0), "surrogate_lr"),
    "an unknown loss inside": (lambda: objective(split(), surrogate_loss="l1"), "surrogate_loss"),
    "no steps": (lambda: objective(split()).fit_surrogates(batches(), 0), "steps as a whole"),
    "an importance of a split": (lambda: pp.PatrolImportance(split()), "objective as a Patrol"),
    "a weight that is no number": (lambda: pp.PatrolImportance(objective(split()),
                                                               adv_weight=float("nan")),
                                   "adv_weight as a number"),
    "float labels to score by": (lambda: pp.PatrolImportance(objective(split())).accumulate(
        images(2), torch.zeros(2)), "labels as int64"),
    "float labels to train on": (lambda: pp.finetune(
        split(), [(images(4), torch.zeros(4))], progress=False,
        config=pp.FinetuneConfig(epochs=1)), "labels as int64"),
    "a seed as text": (lambda: audit(split(), seeds=("0",)), "seeds as a whole number"),
    "targets in a list": (lambda: pp.PatrolImportance(objective(split())).accumulate(
        images(2), [1, 2]), "as_tensor"),
    "an importance as objective": (lambda: pp.finetune(
        split(), batches(), objective=tp.importance.MagnitudeImportance()), "as a PatrolObjective"),
    "a config as a dict": (lambda: pp.finetune(split(), batches(), config={"epochs": 1}),
                           "config as a FinetuneConfig"),
    "no such device": (lambda: pp.finetune(split(), batches(), device="gpu"), "of this machine"),
    "a teacher of other classes": (lambda: pp.finetune(
        split(), batches(), teacher=SmallResNet(7, width=4), progress=False,
        config=pp.FinetuneConfig(epochs=1, distill_weight=0.5)), "the same classes"),
    "masks without an objective": (lambda: pp.learn_masks(
        split(), batches(), None, edge_macs=0.5), "as a PatrolObjective"),
    "limits as a dict": (lambda: pp.plan(SmallResNet(5, width=4), images(1), edge_macs=0.5,
                                         limits={"feature_bytes": 9}), "limits as a PlanLimits"),
    "batches that end": (lambda: objective(split()).fit_surrogates(iter(batches()), 3),
                         "for 3 steps, came 2"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_it_is_named(mistake: str) -> None:
    call, words = MISTAKES[mistake]
    with pytest.raises(InputError, match=words):
        call()


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(batches())


def test_a_loader_of_a_stream_has_no_length() -> None:
    with pytest.raises(InputError, match="read again"):
        pp.finetune(split(), torch.utils.data.DataLoader(Stream()), progress=False)


def test_any_model_is_trained_on_any_numbers() -> None:
    words = [(torch.arange(6), torch.arange(6) % 3)] * 2
    model = torch.nn.Embedding(6, 3)
    before = model.weight.detach().clone()
    pp.finetune(model, words, config=QUICK, progress=False)
    assert not torch.equal(model.weight, before)


def test_training_leaves_no_gradients_behind() -> None:
    """An importance of the host's that reads gradients would score by the last step's."""
    trained = split()
    pp.finetune(trained, batches(), objective=objective(trained), config=QUICK, progress=False)
    assert all(p.grad is None for p in trained.model.parameters())


def test_answers_of_any_kind_reach_the_task_loss() -> None:
    class Answers(SmallResNet):
        def forward(self, x: Tensor) -> Any:
            return {"logits": super().forward(x)}

    with torch.random.fork_rng():
        torch.manual_seed(0)
        cut = pp.Split(Answers(5, width=4), torch.zeros(1, 3, 16, 16), at="layer1")
    made = pp.PatrolObjective(cut, lambda out, y: F.cross_entropy(out["logits"], y), beta=1.0,
                              surrogates=SPECS)
    importance = pp.PatrolImportance(made)
    importance.accumulate(*batches()[0])
    assert importance.scores
    pp.finetune(cut, batches(), objective=made, config=QUICK, progress=False)
    with pytest.raises(InputError, match="returns logits, came a dict"):
        pp.finetune(cut, batches(), config=QUICK, progress=False)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_are_scored_and_audited(kind: torch.dtype) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SmallResNet(5, width=4).to(kind)
    cut = pp.Split(model, torch.zeros(1, 3, 16, 16, dtype=kind), at="layer1")
    made = objective(cut)
    x, y = images(8).to(kind), torch.arange(8) % 5
    made.fit_surrogates([(x, y)], 2)
    importance = pp.PatrolImportance(made)
    importance.accumulate(x, y)
    assert importance.scores
    assert audit(cut).strongest()["ssim"] is not None
    if kind == torch.float64:
        assert pp.finetune(cut, [(x, y)], objective=made, config=QUICK, progress=False).history


def test_a_look_before_training_draws_nothing() -> None:
    drawing = pp.make_defence("feature_dropout", 0.5).apply(split())
    before = drawing.edge.upload.get_extra_state().clone()
    with pytest.raises(InputError, match="Give split.model"):
        pp.finetune(drawing, batches(), teacher=drawing)  # type: ignore[arg-type]
    check_training(drawing, batches(), None, None)
    assert torch.equal(drawing.edge.upload.get_extra_state(), before)


def test_an_objective_of_another_cut_is_refused() -> None:
    first = split()
    other = pp.Split(first.model, first.example_inputs, at="layer2")
    with pytest.raises(InputError, match="after 'layer2', but the split is cut after 'layer1'"):
        pp.finetune(first, batches(), objective=objective(other))


def test_a_split_pruned_by_the_host_is_read_again_before_training() -> None:
    cut = split()
    tp.pruner.BasePruner(
        cut.model, cut.example_inputs, tp.importance.MagnitudeImportance(), pruning_ratio=0.5,
        ignored_layers=cut.protected_layers(),
    ).step()
    before = cut.feature_shape
    pp.finetune(cut, batches(), objective=objective(cut), config=QUICK, progress=False)
    assert cut.feature_shape == tuple(cut.edge(images(1)).shape[1:]) != before


@pytest.mark.parametrize(("importance", "words"), [
    (tp.importance.GroupTaylorImportance, "failed on a group.*loss.backward"),
    (tp.importance.GroupHessianImportance, "none of the edge's groups a score.*loss.backward"),
])
def test_importances_without_their_gradients_are_told_apart_from_a_budget(
    importance: Any, words: str
) -> None:
    cut = split("layer3")
    pruner = pp.PatrolPruner(cut.model, cut.example_inputs, importance(), split=cut, edge_macs=0.5)
    with pytest.raises(InputError, match=words):
        pruner.step()


def test_a_forgotten_normalization_is_told_once() -> None:
    inputs = (images(8) - 0.45) / 0.225
    with pytest.warns(UserWarning, match="Give normalization="):
        wrong = objective(split())
        wrong.fit_surrogates([(inputs, torch.zeros(8))], 1)
    right = objective(split(), normalization=pp.Normalization((0.45,) * 3, (0.225,) * 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrong.fit_surrogates([(inputs, torch.zeros(8))], 1)
        right.fit_surrogates([(inputs, torch.zeros(8))], 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_model_is_refused_before_it_is_trained_or_scored(dtype: torch.dtype) -> None:
    """In bfloat16 surrogates learn, and what has no small differences is scored."""
    cut = split()
    of = objective(cut, alpha=0.1)
    for whole in (True, False):  # and one whose normalisation is in float32
        cut.model.to(dtype)
        if not whole:
            cut.model.bn1.float()
        before = copy.deepcopy(cut.model.state_dict())
        fits = [] if dtype == torch.bfloat16 else [lambda: of.fit_surrogates(batches(), 1)]
        for work in (
            *fits,
            lambda: pp.PatrolImportance(of).accumulate(*batches()[0]),
            lambda: pp.finetune(cut, batches(), objective=of, config=QUICK, progress=False),
            lambda: pp.learn_masks(cut, batches(), of, edge_macs=0.9, progress=False),
        ):
            with pytest.raises(UnsupportedModelError, match=r"model\.float\(\), with precision"):
                work()
        assert all(map(torch.equal, before.values(), cut.model.state_dict().values()))


def test_a_model_in_float32_may_take_compact_images() -> None:
    class Widens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.float())  # type: ignore[no-any-return]

    model, x = Widens(), images(8).half()
    model(x)
    cut = pp.Split(model, x[:1], at="net.1")
    assert pp.finetune(cut, [(x, torch.arange(8) % 5)], config=QUICK, progress=False).history


class Compiled(nn.Module):
    """What torch.compile makes, as far as others see it; importing all of it takes seconds."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_tracing() or not isinstance(x, Tensor):
            raise RuntimeError("Detected that you are tracing a dynamo-optimized function")
        return self._orig_mod(x)


@pytest.mark.parametrize("made", [
    Compiled, pytest.param(lambda m: torch.compile(m, backend="eager"), marks=pytest.mark.slow)])
def test_a_compiled_model_is_told_wherever_it_is_taken(
    made: Callable[[nn.Module], nn.Module]
) -> None:
    cut, x = split(), torch.zeros(1, 3, 16, 16)
    compiled, inside = made(cut.model), split().model
    inside.layer1 = made(inside.layer1)
    importance = tp.importance.MagnitudeImportance()
    works: dict[str, list[Callable[[], object]]] = {
        r"around it\. .* model\._orig_mod\.": [
            lambda: pp.Split(compiled, x, at="layer1"), lambda: pp.split_points(compiled, x),
            lambda: pp.residual_blocks(compiled, x), lambda: pp.SoftMasks(compiled, x),
            lambda: pp.open_attention(compiled, x), lambda: pp.count_macs(compiled, x),
            lambda: pp.PatrolPruner(compiled, x, importance, split=cut, edge_macs=0.5)],
        r"around its layer1\. .* before torch\.compile\.": [
            lambda: pp.Split(inside, x, at="layer1"), lambda: pp.count_macs(inside, x)],
    }
    for words, calls in works.items():
        for call in calls:
            with pytest.raises(UnsupportedModelError, match=words):
                call()


def test_attackers_that_learnt_nothing_are_told() -> None:
    unfitted = objective(split())
    with pytest.warns(UserWarning, match=r"fit_surrogates\(batches, steps=300\) first"):
        pp.PatrolImportance(unfitted).accumulate(*batches()[0])
    unfitted.fit_surrogates(batches(), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pp.PatrolImportance(unfitted).accumulate(*batches()[0])
        pp.PatrolImportance(objective(split()), adv_weight=0.0).accumulate(*batches()[0])


def test_local_pruning_is_not_what_a_budget_does() -> None:
    cut = split()
    with pytest.warns(UserWarning, match="global_pruning is not used"):
        pp.PatrolPruner(cut.model, cut.example_inputs, tp.importance.MagnitudeImportance(),
                        split=cut, edge_macs=0.5, global_pruning=False)


def test_grey_images_need_no_normalization() -> None:
    grey = images(3)[:, :1]
    assert torch.equal(pp.Normalization().to_input(grey), grey)
    with pytest.raises(InputError, match="one mean per channel"):
        pp.Normalization.imagenet().to_input(grey)


class TestAnAttackOfOnesOwn:
    def test_that_breaks_costs_its_own_score_alone(self) -> None:
        report = audit(split(), attacks={"boom": Mine(ValueError("boom")), "mine": Mine()})
        assert {r["attack"] for r in report.records if r["subject"] == "edge"} == {"mine"}
        flag = next(f for f in report.flags if f["name"] == "attack_failed")
        assert flag["attack"] == "boom" and "ValueError: boom" in flag["meaning"]
        assert "edge: SSIM" in repr(report) and len(repr(report)) < 400

    @pytest.mark.parametrize(("guess", "words"), [
        (ValueError("boom"), r"ValueError: boom \(.*test_given.py, line \d+\)\. Mend them"),
        (None, r"expected a tensor .* came NoneType"), (255.0, "the attack mine reconstructs on"),
    ])
    def test_that_is_the_only_one_ends_the_audit_with_the_reason(
        self, guess: Any, words: str
    ) -> None:
        with pytest.raises(TrainingError, match=words):
            audit(split(), attacks={"mine": Mine(guess)})


def test_a_factory_of_another_model_is_refused(tmp_path: Path) -> None:
    cut = split()
    pp.save(cut, tmp_path / "cut")
    with pytest.raises(CheckpointError, match=r"fc\..*the very model"):
        pp.load(tmp_path / "cut", lambda: SmallResNet(3, width=4))
    again = pp.load(tmp_path / "cut", lambda: SmallResNet(5, width=4))
    assert torch.equal(again.edge(images(2)), copy.deepcopy(cut).edge(images(2)))
    assert repr(again) == "Split(SmallResNet, at='layer1', feature 4x16x16)"
