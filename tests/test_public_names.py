"""What `import patrol_prune as pp` gives."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

import patrol_prune as pp


def test_every_name_is_there_and_none_is_a_module() -> None:
    assert not [name for name in pp.__all__ if isinstance(getattr(pp, name), ModuleType)]


@pytest.mark.slow
def test_importing_a_module_does_not_hide_the_function_of_its_name() -> None:
    code = ("import patrol_prune.pipeline, patrol_prune as pp; pp.FinetuneConfig; "
            "assert all(callable(f) for f in (pp.plan, pp.audit, pp.finetune)); "
            "import sys, patrol_prune.commands; assert 'torchmetrics' not in sys.modules")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False)
    assert done.returncode == 0
