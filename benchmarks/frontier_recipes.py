"""How hard the attackers inside training are: what the frontier varies for one defence."""

from __future__ import annotations

from dataclasses import dataclass, replace

from patrol_prune.defences import Adversary, FeatureDropout
from patrol_prune.finetune import FinetuneConfig
from patrol_prune.lipschitz import LipschitzForm
from patrol_prune.surrogate import DEFAULT_SURROGATES, SURROGATE_SETS, SurrogateSpec

LARGE = SURROGATE_SETS["large"]

LIPSCHITZ: dict[LipschitzForm, tuple[float, ...]] = {
    "paper": (0.2, 2.0, 0.02), "scale_free": (0.2, 2.0, 0.02), "spectral": (0.006, 0.02, 0.002),
}
"""Each form of the Lipschitz term and its weights; with the first they cost about as much."""


@dataclass(frozen=True)
class Recipe:
    """One setting of the inner problem.

    Attributes:
        surrogates: the attackers inside.
        loss: theirs.
        images: of each batch that they see; all where None.
        inner_steps: of theirs for each of the model.
        renew_every: steps after which the weakest of them starts anew.
        pool: they learn from images that the model is not trained on: the rest of the defender's.
        feature_weight: of the distance to the dense model's last features.
        epochs: as many times the sweep's.
        alpha: weight of each block's Lipschitz constant.
        lipschitz_form: of that term.
        upload_channels: the upload is pruned to so many channels first, by PATROL's score.
        behind: dropout behind the edge that is trained.
        budget: of a base: this share of the dense edge's multiply-adds after the last layer,
            instead of what the dense edge needs up to layer1.
    """

    surrogates: tuple[SurrogateSpec, ...] = DEFAULT_SURROGATES
    loss: str = "auto"
    images: int | None = 64
    inner_steps: int = 2
    renew_every: int = 0
    pool: bool = False
    feature_weight: float = 0.0
    epochs: int = 1
    alpha: float = 0.0
    lipschitz_form: LipschitzForm = "scale_free"
    upload_channels: int | None = None
    behind: FeatureDropout | None = None
    budget: float | None = None

    def adversary(self) -> Adversary:
        return Adversary(images=self.images, surrogates=self.surrogates, loss=self.loss)

    def config(self, config: FinetuneConfig) -> FinetuneConfig:
        """`config` with this recipe's part of it."""
        return replace(config, inner_steps=self.inner_steps, renew_every=self.renew_every,
                       feature_weight=self.feature_weight, epochs=self.epochs * config.epochs)


RECIPES: dict[str, Recipe] = {
    "": Recipe(),
    "mse": Recipe(loss="mse"),
    "large": Recipe(surrogates=LARGE, images=None),
    "renewed": Recipe(surrogates=LARGE, images=None, renew_every=60),
    "pool": Recipe(surrogates=LARGE, images=None, pool=True),
    "features": Recipe(surrogates=LARGE, images=None, feature_weight=1.0),
    "long": Recipe(surrogates=LARGE, images=None, epochs=3),
    "narrow-16": Recipe(upload_channels=16),
    "narrow-8": Recipe(upload_channels=8),
    "longer": Recipe(epochs=3),
    "longest": Recipe(epochs=6),
    "longer-dropout": Recipe(epochs=3, behind=FeatureDropout(0.5)),
    "longer-light-dropout": Recipe(epochs=3, behind=FeatureDropout(0.25)),
    "longer-spared-dropout": Recipe(epochs=3, behind=FeatureDropout(0.5, spared=0.5)),
    "half": Recipe(budget=0.5),
    "half-longer": Recipe(epochs=3),
    "half-longer-light-dropout": Recipe(epochs=3, behind=FeatureDropout(0.25)),
    "longer-whole": Recipe(epochs=3),
    "half-longer-whole": Recipe(epochs=3),
    "half-longest-whole": Recipe(epochs=6),
    "half-longer-whole-light-dropout": Recipe(epochs=3, behind=FeatureDropout(0.25)),
    "half-long": Recipe(surrogates=LARGE, images=None, epochs=3),
    "taylor": Recipe(),
    **{f"{form}-{alpha:g}": Recipe(alpha=alpha, lipschitz_form=form)
       for form, alphas in LIPSCHITZ.items() for alpha in alphas},
}
"""By name; "" is what every defence with an adversarial term gets. "whole": with attackers inside
that read the whole of a small feature, where those of the recipes before them pressed it."""
