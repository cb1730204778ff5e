"""What several test files share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)  # the tensors are small, and threads that wait for a busy core spin
settings.register_profile("quick", deadline=None, max_examples=25)
settings.load_profile("quick")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="module")
def import_benchmark() -> Iterator[Callable[[str], ModuleType]]:
    """A function that imports a script of `benchmarks/` as they import each other."""
    yield from _importing(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def import_vehicles() -> Iterator[Callable[[str], ModuleType]]:
    """The same of `integrations/vehicle_reid/`."""
    yield from _importing(str(ROOT / "integrations" / "vehicle_reid"))


def _importing(folder: str) -> Iterator[Callable[[str], ModuleType]]:
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield import_module
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(folder):
            del sys.modules[name]


@pytest.fixture(scope="session")
def write_folder() -> Callable[..., Path]:
    """A function that writes a small image folder: one hue per class, a bright square somewhere."""

    def write(
        where: Path, *, parts: tuple[str, ...] = ("train", "test"),
        classes: tuple[str, ...] = ("blue", "green", "red"), count: int = 8, size: int = 16,
    ) -> Path:
        for part in parts:
            for c, name in enumerate(classes):
                folder = where / part / name
                folder.mkdir(parents=True, exist_ok=True)
                for i in range(count):
                    rng = np.random.default_rng((*part.encode(), c, i))
                    image = rng.integers(0, 90, (size, size, 3), dtype=np.uint8)
                    image[..., c % 3] += 120
                    y, x = rng.integers(0, size - 4, 2)
                    image[y : y + 4, x : x + 4] = 255
                    Image.fromarray(image).save(folder / f"{i:03d}.png")
        return where

    return write
