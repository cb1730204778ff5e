"""A re-identification model out of any classifier: its last linear layer becomes a BNNeck.

Luo et al., Bag of Tricks and A Strong Baseline for Deep Person Re-identification, 2019: the triplet
loss reads the pooled feature, a BatchNorm without a shift comes after it, identities are told apart
behind that by a linear layer without a bias, and what is compared in a search is the BatchNorm's
output. Everything before the last linear layer keeps its name, so the model is cut and pruned as
before.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from patrol_prune.cost import evaluating
from patrol_prune.errors import InputError, UnsupportedModelError
from patrol_prune.models import build_model, check_model

_CLASSIFIER_STD = 1e-3
_MARK = "is_bnneck"
"""Of the BatchNorm, which tells it also in the halves of a split, whose graphs hold layers only."""


class BNNeck(nn.Module):
    """Features `[N, D]` to logits of identities `[N, K]`, by `classifier(neck(f))`.

    Args:
        features: `D`.
        identities: `K`.

    Attributes:
        neck: a BatchNorm whose shift is 0 and is not trained. Its input is what a triplet loss
            reads, its output in evaluation mode the embedding.
        classifier: a linear layer without a bias.
    """

    def __init__(self, features: int, identities: int) -> None:
        super().__init__()
        self.neck = nn.BatchNorm1d(features)
        self.neck.bias.requires_grad_(False)
        setattr(self.neck, _MARK, True)
        self.classifier = nn.Linear(features, identities, bias=False)
        nn.init.normal_(self.classifier.weight, std=_CLASSIFIER_STD)

    def forward(self, features: Tensor) -> Tensor:
        """`[N, D]` to `[N, K]`."""
        logits: Tensor = self.classifier(self.neck(features))
        return logits


def add_bnneck(model: nn.Module, identities: int) -> nn.Module:
    """Replace the last linear layer of `model` by a `BNNeck`, in place; returns the model.

    The feature is what that layer read. Dropout beside it is switched off: distances between
    features with holes mean little.

    Args:
        model: a classifier whose output is that of its last linear layer.
        identities: to be told apart in training.

    Raises:
        InputError: fewer than two identities.
        UnsupportedModelError: the model has no linear layer, or is one.
    """
    if identities < 2:
        raise InputError(f"Expected at least two identities to train on, came {identities}.")
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not layers or not layers[-1][0]:
        raise UnsupportedModelError(
            f"Expected a model with a last linear layer to replace, came {type(model).__name__} "
            "with none inside. Choose another backbone, or put a BNNeck into the model yourself."
        )
    path, last = layers[-1]
    parent, _, name = path.rpartition(".")
    beside = model.get_submodule(parent)
    setattr(beside, name, BNNeck(last.in_features, identities).to(last.weight.device))
    if isinstance(beside, nn.Sequential):
        for layer in beside.children():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
    return model


def build_reid_model(
    name: str, identities: int, *, image_size: int, seed: int = 0
) -> nn.Module:
    """A classifier with fresh weights and a `BNNeck`, shown to take images of this size.

    Args:
        name: of a torchvision classifier, "small_resnet" (`patrol_prune.models.model_names()` has
            all), or `module:function` of your own, which takes `num_classes` if it wants to know.
        identities: to be told apart in training.
        image_size: side of the square images, in pixels.
        seed: of the initial weights; the global generator stays untouched.

    Raises:
        InputError: an unknown name, module or function, an image size that the model cannot take,
            fewer than two identities.
        UnsupportedModelError: the model has no linear layer, or returns other things than logits.
    """
    model = build_model(name, max(2, identities), image_size=image_size, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        add_bnneck(model, identities)
    check_model(model, f"{name} with a BNNeck", identities, image_size)
    return model


def neck_of(model: nn.Module) -> nn.BatchNorm1d:
    """The BatchNorm of the model's `BNNeck`, also of a split with a defence behind its edge.

    Raises:
        InputError: the model has no `BNNeck`.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d) and getattr(module, _MARK, False):
            return module
    raise InputError(
        f"Expected a re-identification model, came {type(model).__name__} without a BNNeck. Make "
        "it with build_reid_model or add_bnneck."
    )


@torch.no_grad()
def embed(
    model: nn.Module, inputs: Iterable[Tensor], *, device: str | torch.device = "cpu"
) -> Tensor:
    """The embeddings of images: the neck's output in evaluation mode, float32 on the CPU.

    The model's mode comes back as it was, and no hook stays behind.

    Args:
        model: has a `BNNeck`.
        inputs: batches of model input `[B, C, H, W]`.
        device: where the model is.

    Returns:
        `[N, D]`.

    Raises:
        InputError: no batch, or a model without a `BNNeck`.
    """
    found: list[Tensor] = []
    handle = neck_of(model).register_forward_hook(
        lambda module, args, output: found.append(output.float().cpu())
    )
    try:
        with evaluating(model):
            for x in inputs:
                model(x.to(device))
    finally:
        handle.remove()
    if not found:
        raise InputError("Expected at least one batch of images to embed, came none.")
    return torch.cat(found)
