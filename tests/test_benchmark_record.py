"""What a benchmark's record says of itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.mark.parametrize(("given", "shown"), [
    ("/home/me/data/cifar10", "cifar10"), ("~/data/cifar10", "cifar10"),
    ('["/home/me/frontier", "~/more/frontier-1"]', '["frontier", "frontier-1"]'),
    ("--work=/home/me/frontier", "--work=frontier"), ('["with-patrol@longer-10-layer4"]',) * 2,
    ("benchmarks/models",) * 2, ("0.5",) * 2,
])
def test_no_folder_of_this_machine_is_named(
    monkeypatch: pytest.MonkeyPatch, import_benchmark: Callable[[str], ModuleType],
    given: str, shown: str,
) -> None:
    record = import_benchmark("record")
    monkeypatch.setattr(sys, "argv", [str(record.ROOT / "seeds.py"), "--works", given])
    assert record.command() == f"python benchmarks/seeds.py --works {shown}"
