"""What a picture gives away in the end: can a reader tell the plate, can one tell the place?

A reconstruction may be far from the picture in MSE and still show the number, or near and not. So
readers are trained on pictures whose truth the attacker knows, and read what the attack shows. A
reader's rate is a lower bound on the leak. Read the originals with the same reader as well: one
that fails there says nothing about a reconstruction (`weak_reader`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patrol_prune.errors import InputError

_CELL = 20
_MARGIN = 0.3
_SCENE = 32


@dataclass(frozen=True)
class Leak:
    """How often a reader is right.

    Attributes:
        rate: share of right answers, 0 to 1; lower is more private.
        chance: the share that a guess without looking has right, always the answer most frequent in
            training or answers drawn as often as there, whichever is better.
        count: over how many answers.
    """

    rate: float
    chance: float
    count: int


@dataclass(frozen=True)
class ReaderConfig:
    """How a reader is trained.

    Args:
        epochs: passes over the pictures.
        batch_size: answers in a batch.
        lr: peak of Adam's rate, which falls to zero by a cosine.
        width: channels of the first layer; of an `UploadReader`, values of the hidden layer.
        seed: of weights and order.
        device: where it computes.

    Raises:
        InputError: a value out of its range.
    """

    epochs: int = 15
    batch_size: int = 64
    lr: float = 3e-3
    width: int = 24
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if min(self.epochs, self.width) < 1 or self.batch_size < 2 or self.lr <= 0.0:
            raise InputError(
                "Expected a reader with at least 1 epoch, 1 channel, 2 answers in a batch and a "
                f"positive rate, came {self}. Raise the one that is too small."
            )


class PlateReader:
    """Reads the characters of a plate whose corners are known.

    The corners come from the truth, which favours the attacker: finding the plate is not part of
    the question. Each plate is rectified, cut into as many cells as it has characters, and one
    small CNN names each cell's character. Fit it on the attacker's own pictures; fitted on their
    reconstructions too (`torch.cat`, the truth is the same), it learns to read those.

    Args:
        config: how it is trained.
    """

    def __init__(self, config: ReaderConfig | None = None) -> None:
        self.config = config or ReaderConfig()
        self._alphabet: tuple[str, ...] = ()
        self._places: tuple[Counter[str], ...] = ()
        self._network: nn.Module | None = None

    def fit(self, images: Tensor, boxes: Tensor, texts: Sequence[str]) -> PlateReader:
        """Train from scratch.

        Args:
            images: pixels on [0, 1], `[N, 3, H, W]`.
            boxes: the plates' corners in pixels, `[N, 4, 2]`: upper left, upper right, lower right,
                lower left, as x and y from the picture's upper left corner.
            texts: what the plates say, all of one length.

        Returns:
            itself.

        Raises:
            InputError: shapes or lengths that do not fit, fewer than two characters.
        """
        length = len(texts[0]) if len(texts) else 0
        _check_images(images, len(texts))
        _check_texts(texts, length)
        self._alphabet = tuple(sorted(set("".join(texts))))
        if len(self._alphabet) < 2:
            raise InputError(
                f"Expected plates with at least two different characters, came {texts[0]!r}. "
                "Give plates that differ."
            )
        self._places = tuple(Counter(column) for column in zip(*texts, strict=True))
        cells = plate_cells(images, boxes, length)
        labels = torch.tensor([self._alphabet.index(c) for text in texts for c in text])
        self._network = _train(cells.flatten(0, 1), labels, len(self._alphabet), self.config)
        return self

    def read(self, images: Tensor, boxes: Tensor) -> list[str]:
        """The texts of the plates; arguments as in `fit`.

        Raises:
            InputError: the reader is not fitted, or shapes do not fit.
        """
        network = _fitted(self._network, "PlateReader")
        _check_images(images, len(boxes))
        cells = plate_cells(images, boxes, len(self._places))
        best = _answers(network, cells.flatten(0, 1), self.config)
        return ["".join(self._alphabet[i] for i in row) for row in
                best.view(len(images), -1).tolist()]

    def accuracy(self, images: Tensor, boxes: Tensor, texts: Sequence[str]) -> Leak:
        """Share of characters that are read right; arguments as in `fit`.

        Raises:
            InputError: the reader is not fitted, shapes or lengths do not fit.
        """
        _fitted(self._network, "PlateReader")
        _check_images(images, len(texts))
        _check_texts(texts, len(self._places))
        read, true = "".join(self.read(images, boxes)), "".join(texts)
        right = sum(a == b for a, b in zip(read, true, strict=True))
        columns = zip(*texts, strict=True)
        guesses = [guess_rate(p, c) for p, c in zip(self._places, columns, strict=True)]
        return Leak(right / len(true), sum(guesses) / len(guesses), len(true))


class SceneReader:
    """Tells the place, or any other label of a whole picture.

    Args:
        config: how it is trained.
    """

    def __init__(self, config: ReaderConfig | None = None) -> None:
        self.config = config or ReaderConfig()
        self._scenes: tuple[str, ...] = ()
        self._counts: Counter[str] = Counter()
        self._network: nn.Module | None = None

    def fit(self, images: Tensor, scenes: Sequence[str]) -> SceneReader:
        """Train from scratch on pixels on [0, 1], `[N, 3, H, W]`, and the scene of each; returns
        itself.

        Raises:
            InputError: shapes that do not fit, fewer than two scenes.
        """
        _check_images(images, len(scenes))
        self._scenes = tuple(sorted(set(scenes)))
        if len(self._scenes) < 2:
            raise InputError(
                f"Expected pictures of at least two scenes, came {self._scenes}. There is nothing "
                "to tell apart; give pictures of more places."
            )
        self._counts = Counter(scenes)
        labels = torch.tensor([self._scenes.index(scene) for scene in scenes])
        self._network = _train(_small(images), labels, len(self._scenes), self.config)
        return self

    def tell(self, images: Tensor) -> list[str]:
        """The scene of each picture `[N, 3, H, W]`.

        Raises:
            InputError: the reader is not fitted, or shapes do not fit.
        """
        network = _fitted(self._network, "SceneReader")
        _check_images(images, len(images))
        best = _answers(network, _small(images), self.config)
        return [self._scenes[i] for i in best.tolist()]

    def accuracy(self, images: Tensor, scenes: Sequence[str]) -> Leak:
        """Share of pictures whose scene is told right.

        Raises:
            InputError: the reader is not fitted, or shapes do not fit.
        """
        _fitted(self._network, "SceneReader")
        _check_images(images, len(scenes))
        right = sum(a == b for a, b in zip(self.tell(images), scenes, strict=True))
        return Leak(right / len(scenes), guess_rate(self._counts, scenes), len(scenes))


def guess_rate(seen: Counter[str], truth: Sequence[str]) -> float:
    """The share right without looking: the better of two guesses.

    Either always the answer most frequent in training, or answers drawn as often as in training,
    `sum over answers of p_training p_truth`. The second is the steadier where all answers are
    about equally frequent, as the characters of plates are.
    """
    common = seen.most_common(1)[0][0]
    drawn = sum(seen[answer] for answer in truth) / (seen.total() * len(truth))
    return max(sum(answer == common for answer in truth) / len(truth), drawn)


def weak_reader(on_originals: Leak, least: float = 0.9) -> str:
    """What to say of a reader that cannot read originals either; empty where it can."""
    if on_originals.rate >= least:
        return ""
    return (
        f"the reader is right on {on_originals.rate:.1%} of the original pictures, below "
        f"{least:.0%}: a low rate on reconstructions may be its own weakness"
    )


def plate_cells(images: Tensor, boxes: Tensor, characters: int) -> Tensor:
    """Each plate seen from the front, cut into overlapping cells, one per character.

    Args:
        images: `[N, 3, H, W]`.
        boxes: corners in pixels `[N, 4, 2]`, as in `PlateReader.fit`.
        characters: how many cells.

    Returns:
        `[N, characters, 3, 20, 20]`, each cell standardised, so that neither the light nor the
        plate's colour matters.
    """
    if boxes.shape != (len(images), 4, 2):
        raise InputError(
            f"Expected the plates' corners [{len(images)}, 4, 2], came {tuple(boxes.shape)}. Give "
            "x and y of four corners for each picture."
        )
    height, width = images.shape[2:]
    steps = (torch.arange(_CELL, dtype=torch.float64) + 0.5) / _CELL
    inside = steps * (1 + 2 * _MARGIN) - _MARGIN
    u = (torch.arange(characters)[:, None] + inside) / characters
    v = steps * 1.2 - 0.1
    plane = torch.stack(torch.broadcast_tensors(u[:, None, :], v[None, :, None]), dim=-1)
    points = map_square(boxes.double().cpu(), plane.reshape(-1, 2)).to(images.device)
    grid = 2 * points / points.new_tensor([width, height]) - 1
    grid = grid.view(len(images), characters * _CELL, _CELL, 2).to(images.dtype)
    cells = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    cells = cells.view(len(images), 3, characters, _CELL, _CELL).transpose(1, 2)
    mean = cells.mean(dim=(2, 3, 4), keepdim=True)
    return (cells - mean) / (cells.std(dim=(2, 3, 4), keepdim=True) + 0.02)


def map_square(corners: Tensor, points: Tensor) -> Tensor:
    """Map the unit square onto quadrangles by their homographies (Heckbert 1989, section 2.2.3).

    Args:
        corners: where (0, 0), (1, 0), (1, 1) and (0, 1) go, `[N, 4, 2]`.
        points: in the square's coordinates, `[P, 2]`, or `[N, P, 2]` for each quadrangle its own.

    Returns:
        `[N, P, 2]`.
    """
    return _mapped(_homographies(corners), points)


def square_of(corners: Tensor, points: Tensor) -> Tensor:
    """The inverse of `map_square`: where points lie in the unit square's coordinates.

    Args:
        corners: as there, of quadrangles with an area.
        points: in the quadrangles' coordinates, `[P, 2]` or `[N, P, 2]`.

    Returns:
        `[N, P, 2]`; within a convex quadrangle on [0, 1].
    """
    return _mapped(torch.linalg.inv(_homographies(corners)), points)


def _homographies(corners: Tensor) -> Tensor:
    """From the unit square to each quadrangle, `[N, 3, 3]`."""
    p0, p1, p2, p3 = corners.unbind(dim=1)
    d1, d2, s = p1 - p2, p3 - p2, p0 - p1 + p2 - p3
    area = _cross(d1, d2)
    g, h = (_cross(s, d2) / area)[:, None], (_cross(d1, s) / area)[:, None]
    columns = [torch.cat(c, 1) for c in ((p1 - p0 + g * p1, g), (p3 - p0 + h * p3, h),
                                         (p0, torch.ones_like(g)))]
    return torch.stack(columns, 2)


def _mapped(homographies: Tensor, points: Tensor) -> Tensor:
    kind = torch.promote_types(points.dtype, homographies.dtype)
    whole = F.pad(points.to(kind), (0, 1), value=1.0) @ homographies.mT.to(kind)
    return whole[..., :2] / whole[..., 2:]


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]


def _small(images: Tensor) -> Tensor:
    return F.interpolate(images, size=(_SCENE, _SCENE), mode="area") - 0.5


def _network(width: int, classes: int, side: int) -> nn.Sequential:
    """Three convolutions, two halvings, one linear layer."""
    channels = (3, width, 2 * width, 2 * width)
    layers: list[nn.Module] = []
    for i in range(3):
        layers += [nn.Conv2d(channels[i], channels[i + 1], 3, padding=1, bias=False),
                   nn.BatchNorm2d(channels[i + 1]), nn.ReLU(inplace=True)]
        if i < 2:
            layers.append(nn.MaxPool2d(2))
    left = (side // 4) ** 2 * channels[-1]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(left, classes))


def _train(inputs: Tensor, labels: Tensor, classes: int, config: ReaderConfig) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        network = _network(config.width, classes, inputs.shape[-1]).to(config.device).train()
        minimise(F.cross_entropy, network, inputs, labels, config, weight_decay=1e-3)
        _measure_statistics(network, inputs, config)
    return network.eval()


def minimise(
    loss: Callable[[Tensor, Tensor], Tensor], network: nn.Module, inputs: Tensor, labels: Tensor,
    config: ReaderConfig, *, weight_decay: float,
) -> None:
    """Train by AdamW, its rate falling to zero by a cosine; `loss(scores, labels)` of each batch.

    Order and dropout are drawn from torch's generator.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=weight_decay)
    size = min(config.batch_size, len(inputs))
    steps = config.epochs * (len(inputs) // size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for _ in range(config.epochs):
        order = torch.randperm(len(inputs))
        for start in range(0, len(inputs) - size + 1, size):
            rows = order[start : start + size]
            scores = network(inputs[rows.to(inputs.device)].to(config.device))
            optimizer.zero_grad(set_to_none=True)
            loss(scores, labels[rows].to(config.device)).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def _measure_statistics(network: nn.Module, inputs: Tensor, config: ReaderConfig) -> None:
    """BatchNorm's averages over the training anew: those of a short training lag behind."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    for part in inputs.split(512):
        network(part.to(config.device))


@torch.no_grad()
def _answers(network: nn.Module, inputs: Tensor, config: ReaderConfig) -> Tensor:
    parts = inputs.split(512)
    return torch.cat([network(part.to(config.device)).argmax(dim=1).cpu() for part in parts])


def _fitted(network: nn.Module | None, name: str) -> nn.Module:
    if network is None:
        raise InputError(f"This {name} is not fitted. Call fit on pictures with known truth first.")
    return network


def _check_images(images: Tensor, count: int) -> None:
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise InputError(
            f"Expected pixels on [0, 1] as a float tensor [N, 3, H, W], came {images.dtype} "
            f"{tuple(images.shape)}. Divide bytes by 255."
        )
    if len(images) != count or count < 1:
        raise InputError(
            f"Expected one truth for each picture and at least one, came {count} for "
            f"{len(images)} pictures. Give both in the same order."
        )


def _check_texts(texts: Sequence[str], length: int) -> None:
    odd = [text for text in texts if len(text) != length or not text]
    if odd:
        raise InputError(
            f"Expected plates of {length} characters as the first has, came {odd[0]!r}. Read "
            "plates of different lengths with a reader each."
        )
