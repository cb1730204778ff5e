"""What a user installs: `patrol_prune` alone, typed, with one command."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from setuptools import Distribution
from setuptools.command.build_py import build_py


def config(root: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(root / "setup.cfg", encoding="utf-8")
    return parser


def wheel_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The paths that `build_py` would copy into the wheel; nothing is built."""
    monkeypatch.chdir(root)
    distribution = Distribution({"src_root": str(root)})
    distribution.script_name = "setup.py"
    distribution.parse_config_files([str(root / "setup.cfg")])
    command = build_py(distribution)
    command.ensure_finalized()
    sources = [source for _, _, source in command.find_all_modules()]
    sources += [f"{folder}/{name}" for _, folder, _, names in command.data_files for name in names]
    return {(root / source).resolve().relative_to(root).as_posix() for source in sources}


def test_wheel_holds_the_package_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = wheel_files(root, monkeypatch)
    assert {name.split("/")[0] for name in files} == {"patrol_prune"}
    assert "patrol_prune/py.typed" in files
    on_disk = {p.relative_to(root).as_posix() for p in (root / "patrol_prune").rglob("*.py")}
    assert on_disk <= files
    templates = (root / "patrol_prune" / "templates").glob("*")
    assert {p.relative_to(root).as_posix() for p in templates} <= files


def test_the_source_archive_holds_the_package_and_its_words_but_no_half_of_the_tests(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The listing of `sdist`, in a copy, where it writes."""
    keep = shutil.ignore_patterns(".*", "runs", "benchmarks", "integrations", "__pycache__",
                                  "build", "dist", "*.egg-info")
    shutil.copytree(root, tmp_path / "copy", ignore=keep)
    monkeypatch.chdir(tmp_path / "copy")
    distribution = Distribution()
    distribution.script_name = "setup.py"
    distribution.parse_config_files(["setup.cfg"])
    distribution.run_command("egg_info")
    listed = distribution.get_command_obj("egg_info").filelist.files
    files = {Path(name).as_posix() for name in listed}
    assert wheel_files(root, monkeypatch) <= files
    pages = {p.relative_to(root).as_posix() for p in (root / "docs").rglob("*") if p.is_file()}
    built = {name for name in pages if name.startswith(("docs/_build/", "docs/api/"))}
    assert pages - built <= files and not built & files
    assert {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "SECURITY.md", "setup.cfg",
            "pyproject.toml"} <= files
    assert not [name for name in files if name.startswith("tests")]


def test_metadata(root: Path) -> None:
    parser = config(root)
    assert parser["metadata"]["name"] == "patrol-prune"
    assert parser["options"]["python_requires"] == ">=3.10"
    assert "torch>=2.10" in parser["options"]["install_requires"]
    scripts = parser["options.entry_points"]["console_scripts"]
    assert scripts.strip() == "patrol-prune = patrol_prune.cli:main"
    assert (root / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")


def test_citation_has_the_version_of_the_package(root: Path) -> None:
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {config(root)['metadata']['version']}" in citation


def test_install_needs_no_setup_py(root: Path) -> None:
    assert not (root / "setup.py").exists()
    assert "setuptools.build_meta" in (root / "pyproject.toml").read_text(encoding="utf-8")
    assert "[project]" not in (root / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("target", ["test", "demo", "lint", "figures", "test-slow"])
def test_every_target_installs_by_itself(root: Path, tmp_path: Path, target: str) -> None:
    """In a fresh copy, `make -n` of each target first makes the environment and installs."""
    for name in ("Makefile", "setup.cfg", "pyproject.toml"):
        (tmp_path / name).write_bytes((root / name).read_bytes())
    plan = subprocess.run(
        ["make", "-n", target], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert plan.index("-m venv .venv") < plan.index("pip install")
    assert "-e '.[test]'" in plan
    assert "://" not in plan


def test_no_file_names_a_registry(root: Path) -> None:
    for name in ("setup.cfg", "pyproject.toml", "Makefile", ".ci/run"):
        text = (root / name).read_text(encoding="utf-8")
        assert "index-url" not in text
        assert "://" not in text


@pytest.mark.slow
def test_a_real_wheel_holds_what_the_listing_says(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wheel built for real, from a copy and without the network."""
    copy = tmp_path / "copy"
    keep = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(root, copy, ignore=keep)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps",
         "--wheel-dir", str(tmp_path), str(copy)],
        check=True,
    )
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = {n for n in wheel.namelist() if ".dist-info/" not in n}
    assert names == wheel_files(root, monkeypatch)
