"""Files are written whole or not at all, and read only when their sha256 agrees."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import patrol_prune as pp
from patrol_prune.errors import CheckpointError, InputError
from patrol_prune.storage import (
    atomic_directory,
    atomic_write_json,
    atomic_write_text,
    keep_newest,
    load_state,
    newest_whole,
    read_whole,
    save_state,
    sha256_of,
)


def state(value: float = 1.0) -> dict[str, torch.Tensor]:
    base = torch.full((4, 3), value)
    return {
        "transposed": base.t(),
        "same_memory": base[:2],
        "scalar": torch.tensor(7),
        "bool": torch.tensor([True, False]),
        "generator": torch.Generator().manual_seed(3).get_state(),
        "empty": torch.zeros(0, 2),
        "half": base.to(torch.bfloat16),
    }


def test_state_comes_back_equal(tmp_path: Path) -> None:
    meta = {"epoch": 3, "lr": 0.1, "names": ["ä", "b"], "none": None, "loss": 1e-300}
    save_state(tmp_path / "epoch-0003", state(), meta)
    tensors, came = load_state(tmp_path / "epoch-0003")
    assert came == meta
    assert tensors.keys() == state().keys()
    for name, tensor in state().items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_replacing_leaves_the_new_one_alone(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        save_state(tmp_path / "state", state(value), {"value": value})
    assert load_state(tmp_path / "state")[1] == {"value": 2.0}
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("there", ["folder", "not yet", "interrupted"])
def test_a_link_stays_one_and_leads_to_what_was_saved_last(tmp_path: Path, there: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    target, link = tmp_path / "elsewhere" / "real", tmp_path / "latest"
    link.symlink_to(target)
    old = {"folder": target, "interrupted": target.with_name(f".real.old-{process.pid}-00aa")}
    if there in old:
        save_state(old[there], state(), {"value": 0})
    if there == "interrupted":
        assert load_state(link)[1] == {"value": 0}
    for value in (1.0, 2.0):
        save_state(link, state(value), {"value": value})
        assert load_state(target)[1] == load_state(link)[1] == {"value": value}
    assert link.readlink() == target and not target.is_symlink()
    assert {p.name for p in tmp_path.rglob("*") if p.parent != target} == {
        "latest", "elsewhere", "real"}


def test_a_link_with_a_slash_behind_it_stays_one_too(tmp_path: Path) -> None:
    save_state(tmp_path / "real", {}, {"value": 0})
    (tmp_path / "latest").symlink_to("real")
    save_state(f"{tmp_path / 'latest'}/", {}, {"value": 1})
    assert load_state(tmp_path / "real")[1] == {"value": 1}
    assert (tmp_path / "latest").is_symlink() and len(list(tmp_path.iterdir())) == 2


def test_a_link_left_by_an_interrupted_write_is_cleaned_alone(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    save_state(tmp_path / "mine", {}, {"value": 1})
    save_state(tmp_path / "state", {}, {})
    stray = tmp_path / f".state.old-{process.pid}-00aa"
    stray.symlink_to(tmp_path / "mine")
    save_state(tmp_path / "state", {}, {})
    assert not stray.is_symlink() and load_state(tmp_path / "mine")[1] == {"value": 1}


def test_links_among_checkpoints(tmp_path: Path) -> None:
    for epoch in (1, 2):
        save_state(tmp_path / f"epoch-{epoch}", state(), {"epoch": epoch})
    (tmp_path / "last-2").symlink_to("epoch-2")
    (tmp_path / "first").symlink_to("epoch-1")
    keep_newest(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"epoch-2", "last-2"}


def test_nothing_changes_when_the_writer_fails(tmp_path: Path) -> None:
    save_state(tmp_path / "state", state(), {"value": 1})
    with pytest.raises(RuntimeError, match="disk"), atomic_directory(tmp_path / "state") as fresh:
        (fresh / "half").write_text("…")
        raise RuntimeError("disk")
    assert load_state(tmp_path / "state")[1] == {"value": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("write", [
    lambda path, tensors: save_state(path, tensors, {}),
    lambda path, tensors: atomic_write_json(path / "file.json", ["a" * 5000]),
    lambda path, tensors: pp.save(pp.Split(nn.Sequential(nn.Conv2d(3, 99, 3), nn.ReLU(), nn.Conv2d(
        99, 1, 1)), torch.zeros(1, 3, 4, 4), "1"), path),
])
def test_a_full_disk_is_told_with_the_place_and_leaves_nothing(
    tmp_path: Path, write: Callable[[Path, dict[str, torch.Tensor]], None]
) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(OSError, match=rf"Make room .*{re.escape(str(tmp_path))}") as told:
            write(tmp_path / "new", {"many": torch.zeros(2000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert told.value.errno == errno.EFBIG
    assert not [p for p in tmp_path.rglob("*") if p.name != "new"]


def test_meta_must_be_json(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"meta\.json must be JSON"):
        save_state(tmp_path / "state", {}, {"tensor": torch.ones(1)})
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        save_state(tmp_path / "state", {}, {})
    assert (tmp_path / "state").read_text() == "mine"


@pytest.mark.parametrize(("manifest", "file"), [
    (None, "train.py"), ('{"name": "an app"}', "app/icon.png"), ('{"name": "torn', "thesis.tex"),
    ("ours", "notes.txt")])
def test_a_folder_with_files_of_somebody_else_is_not_replaced(
    tmp_path: Path, manifest: str | None, file: str
) -> None:
    folder = tmp_path / "state"
    if manifest == "ours":
        save_state(folder, state(), {"value": 1})
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text("mine")
    if manifest not in (None, "ours"):
        (folder / "manifest.json").write_text(str(manifest))
    there = sorted(folder.rglob("*"))
    with pytest.raises(InputError, match=f"state holds .*{file}, .*of its own"):
        save_state(folder, state(), {"value": 2})
    assert sorted(folder.rglob("*")) == there and sorted(tmp_path.iterdir()) == [folder]


def test_what_file_browsers_leave_is_no_hindrance(tmp_path: Path) -> None:
    save_state(tmp_path / "state", state(), {"value": 1})
    for name in (".DS_Store", "._meta.json", "desktop.ini"):
        (tmp_path / "state" / name).write_text("")
    save_state(tmp_path / "state", state(), {"value": 3})
    assert load_state(tmp_path / "state")[1] == {"value": 3}


def test_a_torn_folder_of_ours_and_an_empty_one_are_replaced(tmp_path: Path) -> None:
    save_state(tmp_path / "torn", state(), {})
    (tmp_path / "torn" / "manifest.json").write_text('{"version": 1, "sh')
    (tmp_path / "empty").mkdir()
    save_state(tmp_path / "without", state(), {})
    (tmp_path / "without" / "manifest.json").unlink()
    for name in ("torn", "empty", "without"):
        save_state(tmp_path / name, state(), {"name": name})
        assert load_state(tmp_path / name)[1] == {"name": name}


@pytest.mark.parametrize("place", [".", "..", "{}"])
def test_the_current_directory_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    with pytest.raises(InputError, match="the current directory or one above it"):
        save_state(place.format(tmp_path / "a" / "b"), state(), {})
    assert Path.cwd().is_dir()


@pytest.mark.parametrize("name", ["tensors.safetensors", "meta.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "lengthen", "remove"])
def test_a_harmed_file_is_refused_by_name(tmp_path: Path, name: str, harm: str) -> None:
    save_state(tmp_path / "state", state(), {"epoch": 1})
    path = tmp_path / "state" / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    changed = {"flip": bytes(content), "cut": bytes(content[:-1]), "lengthen": content + b"\0"}
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(changed[harm])
    with pytest.raises(CheckpointError, match=name) as error:
        load_state(tmp_path / "state")
    assert error.value.path == str(path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sha256": 3}', '{"sha256": {"meta.json": "0"}}'])
def test_a_harmed_manifest_is_refused(tmp_path: Path, text: str) -> None:
    save_state(tmp_path / "state", state(), {"epoch": 1})
    (tmp_path / "state" / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError):
        load_state(tmp_path / "state")


@pytest.mark.parametrize("name", [
    "../secret", "a/../../secret", "/secret", "..\\secret", "C:secret", "C:\\secret", "\\secret",
    "//host/secret", "\\\\host\\secret",
])
def test_a_manifest_cannot_reach_outside(tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (tmp_path / "state").mkdir()
    digest = hashlib.sha256(b"secret").hexdigest()
    manifest = {"version": 1, "sha256": {name: digest}}
    (tmp_path / "state" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="outside"):
        read_whole(tmp_path / "state")


def test_files_may_be_links_as_caches_lay_them(tmp_path: Path) -> None:
    save_state(tmp_path / "state", state(), {"epoch": 1})
    (tmp_path / "blobs").mkdir()
    for file in list((tmp_path / "state").iterdir()):
        blob = file.rename(tmp_path / "blobs" / sha256_of(file))
        file.symlink_to(Path("..", "blobs", blob.name))
    assert load_state(tmp_path / "state")[1] == {"epoch": 1}
    (tmp_path / "state" / "meta.json").resolve().write_text("{}")
    with pytest.raises(CheckpointError, match="sha256 is not"):
        load_state(tmp_path / "state")


def test_what_is_no_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not there"):
        load_state(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"has no manifest\.json"):
        load_state(tmp_path)


def test_newest_whole_passes_over_torn_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert newest_whole(tmp_path / "none") is None
    assert newest_whole(tmp_path) is None
    for epoch in (2, 9, 10):  # by number, not by name
        save_state(tmp_path / f"epoch-{epoch}", state(), {"epoch": epoch})
    (tmp_path / "notes").mkdir()
    assert newest_whole(tmp_path) == tmp_path / "epoch-10"
    (tmp_path / "epoch-10" / "meta.json").write_text("{}")
    (tmp_path / "epoch-9" / "manifest.json").unlink()
    assert newest_whole(tmp_path) == tmp_path / "epoch-2"
    assert "epoch-10" in caplog.text and "epoch-9" in caplog.text


def test_leftovers_of_a_dead_process_are_cleaned_and_a_live_one_kept(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    dead = tmp_path / f".state.tmp-{process.pid}-00aa"
    live = tmp_path / f".state.tmp-{os.getppid()}-00bb"
    other = tmp_path / f".other.tmp-{process.pid}-00cc"
    for folder in (dead, live, other):
        folder.mkdir()
    save_state(tmp_path / "state", {}, {})
    assert not dead.exists()
    assert live.exists() and other.exists()


def test_leftovers_are_found_beside_names_that_look_like_patterns(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    own, other = (tmp_path / f".{name}.tmp-{process.pid}-00aa" for name in ("a[1]*", "a1b"))
    for folder in (own, other):
        folder.mkdir()
    save_state(tmp_path / "a[1]*", {}, {})
    assert not own.exists() and other.exists()


def test_an_interrupted_replacement_is_put_back(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    save_state(tmp_path / "state", {}, {"value": 1})
    (tmp_path / "state").rename(tmp_path / f".state.old-{process.pid}-00aa")
    assert load_state(tmp_path / "state")[1] == {"value": 1}


WRITER = """
import sys, itertools, torch
from patrol_prune.storage import save_state
for i in itertools.count():
    save_state(sys.argv[1], {"x": torch.full((200_000,), float(i))}, {"i": i})
    print(i, flush=True)
"""


def test_a_killed_writer_leaves_a_whole_state(tmp_path: Path, root: Path) -> None:
    """SIGKILL at arbitrary moments of a save: what is read back is always a whole state."""
    target = tmp_path / "state"
    for delay in (0.0, 0.004, 0.011):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(target)], cwd=root, stdout=subprocess.PIPE
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        tensors, meta = load_state(target)
        assert torch.equal(tensors["x"], torch.full((200_000,), float(meta["i"])))
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_text_and_json(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "sub" / "a.txt", "ü\n")
    assert (tmp_path / "sub" / "a.txt").read_bytes() == "ü\n".encode()
    atomic_write_json(tmp_path / "a.json", {"ü": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ü": [1, None]}
    with pytest.raises(InputError):
        atomic_write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ü": [1, None]}


@given(st.binary(max_size=300))
def test_sha256_is_hashlibs(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("hash") / "file"
    path.write_bytes(content)
    assert sha256_of(path) == hashlib.sha256(content).hexdigest()
