"""torchvision's models with random weights, at the smallest input that keeps them whole."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

CLASSES = 10
SMALLEST = 64
SIZES = {"inception_v3": 299, "maxvit_t": 224, "vit_h_14": 56, "swin_v2_": 128, "swin_": 112,
         "ssd300_": 300}
"""Input sides other than 64, by the beginning of the name: an auxiliary head, a fixed partition, a
patch of 14 pixels, windows of 8 and of 7 that would otherwise be mostly padding, a size that the
last of many strided layers needs."""

SEGMENTATION = (
    "lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "fcn_resnet50",
    "deeplabv3_resnet50", "fcn_resnet101", "deeplabv3_resnet101",
)  # fmt: skip
AUXILIARY = ("googlenet", "inception_v3")
WITHOUT_HEADS = tuple(f"{name}, no auxiliary heads" for name in AUXILIARY)
DETECTION = (
    "ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fasterrcnn_mobilenet_v3_large_fpn", "ssd300_vgg16", "fasterrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn", "fcos_resnet50_fpn", "maskrcnn_resnet50_fpn",
    "keypointrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "retinanet_resnet50_fpn_v2",
    "maskrcnn_resnet50_fpn_v2",
)  # fmt: skip


class Maps(nn.Module):
    """A model that returns named tensors, returning them as a tuple."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model(x).values())


def classifiers() -> list[str]:
    """The names of the classification models, the one with fewest parameters first."""
    names = torchvision.models.list_models(module=torchvision.models)

    def parameters(name: str) -> int:
        weights = torchvision.models.get_model_weights(name)
        return next(iter(weights)).meta["num_params"]

    return sorted(names, key=parameters)


def kind_of(name: str) -> str:
    """What a model is for; of all but classifiers only the backbone is taken, without a pyramid."""
    if name in WITHOUT_HEADS:
        return "classification, auxiliary heads off"
    if name in SEGMENTATION:
        return "segmentation backbone"
    return "detection backbone" if name in DETECTION else "classification"


def image_size(name: str) -> int:
    """Side of the smallest input used for a model."""
    return next((size for start, size in SIZES.items() if name.startswith(start)), SMALLEST)


def build(name: str, size: int) -> nn.Module:
    """A model with random weights, statistics and affine parameters, in evaluation mode."""
    kind, name = kind_of(name), name.split(",")[0]
    options: dict[str, Any] = {"weights": None, "num_classes": CLASSES}
    backbone_only = kind.endswith("backbone")
    if backbone_only:
        options["weights_backbone"] = None
    elif name.startswith("vit"):
        options["image_size"] = size
    elif name in AUXILIARY:
        options |= {"init_weights": False, "aux_logits": "off" not in kind}
    with torch.random.fork_rng(devices=[]), uninitialised():
        model = torchvision.models.get_model(name, **options)
    if backbone_only:
        model = Maps(getattr(model.backbone, "body", model.backbone))
    fill(model)
    return model.eval()


@contextmanager
def uninitialised() -> Iterator[None]:
    """Inside, torch's initialisers do nothing: `fill` writes every value anyway."""
    names = [n for n in dir(nn.init) if n.endswith("_") and not n.startswith("_")]
    before = {n: getattr(nn.init, n) for n in names}
    try:
        for n in names:
            setattr(nn.init, n, lambda tensor, *_, **__: tensor)
        yield
    finally:
        for n, function in before.items():
            setattr(nn.init, n, function)


def fill(model: nn.Module, seed: int = 0) -> None:
    """Random values everywhere: nothing is 0 or 1, so that nothing hides an error."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and name.endswith("weight"):
                bound = math.sqrt(3.0 / p[0].numel())
                p.uniform_(-bound, bound, generator=g)
            elif name.endswith(("weight", "scale")):
                p.uniform_(0.5, 1.5, generator=g)
            else:
                p.uniform_(-0.2, 0.2, generator=g)
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.uniform_(-0.3, 0.3, generator=g)
            elif name.endswith("running_var"):
                b.uniform_(0.5, 1.5, generator=g)
