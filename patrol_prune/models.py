"""A model by its torchvision name or from the user's own `module:function`, weights from a file."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import models as torchvision_models
from torchvision.models.resnet import BasicBlock

from patrol_prune.errors import InputError, PatrolError, UnsupportedModelError, nearest
from patrol_prune.storage import read_tensors

logger = logging.getLogger(__name__)

SMALL_RESNET = "small_resnet"
_TRAINS_AUXILIARY_HEADS = ("googlenet", "inception_v3")


class SmallResNet(nn.Module):
    """ResNet-18's blocks behind a 3×3 stem of stride 1, with `width` base channels.

    For images of 32 to 128 pixels. The feature after `layer1` .. `layer4` is 1, 1/2, 1/4 and 1/8
    as high as the image and has 1, 2, 4 and 8 times `width` channels.
    """

    def __init__(self, num_classes: int = 10, *, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _layer(width, width, 1)
        self.layer2 = _layer(width, 2 * width, 2)
        self.layer3 = _layer(2 * width, 4 * width, 2)
        self.layer4 = _layer(4 * width, 8 * width, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images `[N, 3, H, W]` to logits `[N, num_classes]`."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )
    return nn.Sequential(
        BasicBlock(inputs, outputs, stride, shortcut), BasicBlock(outputs, outputs)
    )


def model_names() -> list[str]:
    """Every name that `build_model` knows: torchvision's classifiers and `small_resnet`."""
    return [SMALL_RESNET, *torchvision_models.list_models(module=torchvision_models)]


def build_model(name: str, num_classes: int, *, image_size: int, seed: int = 0) -> nn.Module:
    """A model with fresh weights drawn from `seed`, shown to take images of this size.

    Args:
        name: one of `model_names()`, or `module:function`, where the function returns a
            `nn.Module` and takes `num_classes` if it wants to know. It builds on the CPU: the
            seed is not that of an accelerator's generator.
        num_classes: outputs of the classifier.
        image_size: side of the square images, in pixels.
        seed: of the initial weights; the global generator stays untouched.

    Raises:
        InputError: an unknown name, module or function, an image size the model cannot take, or
            a model whose output is not `[N, num_classes]`.
    """
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that one would also reseed every accelerator.
        torch.default_generator.manual_seed(seed)
        if ":" in name:
            model = _from_function(name, num_classes)
        elif name == SMALL_RESNET:
            model = SmallResNet(num_classes)
        else:
            model = _from_torchvision(name, num_classes, image_size)
    check_model(model, name, num_classes, image_size)
    return model


def _from_torchvision(name: str, num_classes: int, image_size: int) -> nn.Module:
    if name not in model_names():
        raise InputError(
            f"There is no model called {name!r}. {nearest(name, model_names())} A model of your "
            "own is given as module:function."
        )
    if name.startswith("vit_"):
        return torchvision_models.get_model(
            name, weights=None, num_classes=num_classes, image_size=image_size
        )
    if name in _TRAINS_AUXILIARY_HEADS:
        return torchvision_models.get_model(
            name, weights=None, num_classes=num_classes, aux_logits=False, init_weights=True
        )
    return torchvision_models.get_model(name, weights=None, num_classes=num_classes)


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


def own_function(name: str, what: str, example: str) -> Callable[..., object]:
    """The function that a user names as `module:function`; its module is imported.

    Args:
        name: of module and function.
        what: it is, "model", in messages.
        example: of such a name.

    Raises:
        InputError: no such name, a module that cannot be imported, or none of its functions.
    """
    module_name, _, function_name = name.partition(":")
    if not function_name or "" in module_name.split("."):
        raise InputError(
            f"Expected a {what} of your own as module:function, as in {example}, came {name!r}.")
    try:
        with _working_directory_importable():
            module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        raise InputError(
            f"The {what} {name!r} means the function {function_name!r} of the module "
            f"{module_name!r}, which cannot be imported ({type(error).__name__}: {error}). Run "
            "from the folder that holds it, or install it."
        ) from error
    function: Callable[..., object] | None = getattr(module, function_name, None)
    if not callable(function):
        public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise InputError(
            f"The module {module_name!r} has no function {function_name!r}. "
            f"{nearest(function_name, public)}"
        )
    return function


def _from_function(name: str, num_classes: int) -> nn.Module:
    model = _call(own_function(name, "model", "mymodels:build"), name, num_classes)
    if not isinstance(model, nn.Module):
        raise InputError(
            f"Expected {name} to return a torch.nn.Module, came {type(model).__name__}. Return "
            "the model itself."
        )
    return model


def _call(function: Callable[..., object], name: str, num_classes: int) -> object:
    try:
        takes: Mapping[str, inspect.Parameter] = inspect.signature(function).parameters
    except (ValueError, TypeError):  # of some functions written in C nobody knows
        takes = {}
    arguments = {"num_classes": num_classes} if "num_classes" in takes else {}
    more = [p.name for p in takes.values() if p.default is p.empty and p.name not in arguments
            and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if more:
        raise InputError(
            f"Expected {name} to take nothing but num_classes, came a function that asks for "
            f"{', '.join(more)} as well. Give them defaults, or write a function that fills them "
            "in."
        )
    try:
        return function(**arguments)
    except PatrolError:
        raise
    except Exception as error:  # whatever the user's function raises
        raise InputError(
            f"Expected {name} to return a model, but it raised {type(error).__name__}: {error}. "
            "Call it by itself and mend it."
        ) from error


def check_model(model: nn.Module, name: str, num_classes: int, image_size: int) -> None:
    """Run one grey image through `model` and look at what comes out; its mode is restored.

    Raises:
        InputError: the images are of a size the model cannot take, or the output is not
            `[1, num_classes]`.
    """
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    first = next(iter(model.parameters()), torch.zeros(()))
    image = torch.zeros(1, 3, image_size, image_size, dtype=first.dtype, device=first.device)
    try:
        with torch.no_grad():
            output = model(image)
    except Exception as error:  # whatever the user's forward raises
        raise InputError(
            f"{name} cannot take images of {image_size}x{image_size} pixels: its forward raised "
            f"{type(error).__name__}: {error}. Choose another --image-size, or another model."
        ) from error
    finally:
        for module, mode in was_training.items():
            module.training = mode
    if not isinstance(output, Tensor):
        raise UnsupportedModelError(
            f"Expected {name} to return one tensor of logits, came {type(output).__name__}. Wrap "
            "it so that its forward returns the logits alone."
        )
    if output.shape != (1, num_classes):
        raise InputError(
            f"Expected {name} to return logits of shape (1, {num_classes}) for one image, as many "
            f"as there are class folders, came {tuple(output.shape)}. Let the function take "
            "num_classes, or check the folders."
        )


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> list[str]:
    """Fill `model` from a safetensors file; returns the tensors that stayed as they were.

    A file from another task differs in the number of classes: the last layer's tensors are then
    left as initialised and named in the return value, for the caller to train. Anything else must
    fit exactly.

    Raises:
        InputError: no such file, a pickled file, names or shapes that do not fit.
    """
    state = _read_weights(Path(path))
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise InputError(
            f"The weights in {path} belong to another model: "
            f"{len(missing)} tensors are missing ({', '.join(missing[:3]) or 'none'}), "
            f"{len(unexpected)} are unknown ({', '.join(unexpected[:3]) or 'none'}). Give the "
            "weights of this very model."
        )
    odd = [name for name in own if own[name].shape != state[name].shape]
    head = _last_layer(model)
    wrong = [name for name in odd if head is None or name.rpartition(".")[0] != head]
    if wrong:
        name = wrong[0]
        raise InputError(
            f"In {path}, {name} has shape {tuple(state[name].shape)} where the model has "
            f"{tuple(own[name].shape)}. Give the weights of this very model."
        )
    model.load_state_dict({k: v for k, v in state.items() if k not in odd}, strict=False)
    if odd:
        logger.warning("%s has another number of classes: %s starts fresh.", path, head)
    return odd


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"There is no file of weights at {path}. Give a .safetensors file.")
    if path.suffix != ".safetensors":
        convert = (
            "python -c \"import torch, safetensors.torch as s; "
            f"s.save_file(torch.load({str(path)!r}, weights_only=True), "
            f"{str(path.with_suffix('.safetensors'))!r})\""
        )
        raise InputError(
            f"Expected weights in a .safetensors file, came {path}. Pickled files can run code "
            f"and are not read; convert one that you trust with\n  {convert}"
        )
    return read_tensors(path.read_bytes(), path)


def _last_layer(model: nn.Module) -> str | None:
    names = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return names[-1] if names else None
