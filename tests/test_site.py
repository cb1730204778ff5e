"""The documentation site: every public name is on it, and it builds without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import patrol_prune as pp

ROOT = Path(__file__).resolve().parent.parent


def test_each_public_name_stands_on_the_api_page_once() -> None:
    listed = re.findall(r"^   (\w+)$", (ROOT / "docs" / "api.rst").read_text("utf-8"), re.M)
    assert sorted(listed) == [name for name in pp.__all__ if name != "__version__"]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Links between pages, pages that no list has, and every public docstring's markup."""
    for needed in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(needed)
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", "docs",
         "-d", str(tmp_path / "doctrees"), ".", str(tmp_path / "html")],
        cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "html" / "docs" / "api" / "patrol_prune.Split.html").read_text("utf-8")
    assert "example_inputs" in page and "UnsupportedModelError" in page
    assert (tmp_path / "html" / "README.html").is_file()
    assert (tmp_path / "html" / "integrations" / "vehicle_reid" / "README.html").is_file()
    assert "docs/index.html" in (tmp_path / "html" / "index.html").read_text("utf-8")
