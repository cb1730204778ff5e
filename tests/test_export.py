"""Both halves as files: they compute what the halves do, and hold nothing of each other."""

from __future__ import annotations

import builtins
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
import yaml
from torch import Tensor, nn

import patrol_prune as pp
from patrol_prune import _onnx
from patrol_prune._programs import first_line, program_of
from patrol_prune.checkpoint import save
from patrol_prune.cli import main
from patrol_prune.errors import (
    CheckpointError,
    InputError,
    MissingPackageError,
    UnsupportedModelError,
)
from patrol_prune.export import TOLERANCE, export
from patrol_prune.exported import ExportedHalf
from patrol_prune.models import build_model
from patrol_prune.rundir import RunDirectory, read_config
from patrol_prune.settings import RunConfig
from patrol_prune.storage import read_whole

Capture = pytest.CaptureFixture[str]
X = torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
NORMALIZATION = pp.Normalization((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))


def net() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3),
                         nn.ReLU(), nn.Flatten(), nn.Linear(256, 5))
    made(torch.randn(8, 3, 12, 12))  # running statistics of its own
    return made.eval()


def split() -> pp.Split:
    return pp.Split(net(), X, at="2")


def by_onnx(file: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def by_torch(file: Path, x: Tensor) -> Tensor:
    found: Tensor = torch.export.load(file).module()(x)
    return found


def test_the_files_compute_what_the_halves_do_from_pixels(tmp_path: Path) -> None:
    made = split()
    written = export(made, tmp_path / "export", formats=("onnx", "pt2"),
                     normalization=NORMALIZATION)
    with torch.no_grad():
        z = made.edge(NORMALIZATION.to_input(X))
        answers = made.cloud(z)
    for run, kind in ((by_onnx, "onnx"), (by_torch, "pt2")):
        each = torch.cat([run(written.path / f"edge.{kind}", x) for x in X.split(1)])
        torch.testing.assert_close(each, z, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(run(written.path / f"cloud.{kind}", each), answers,
                                   rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(run(written.path / f"cloud.{kind}", z[:1]), answers[:1],
                                   rtol=1e-5, atol=1e-5)
    assert set(written.differences) == {"edge.onnx", "edge.pt2", "cloud.onnx", "cloud.pt2"}
    assert all(d is not None and d <= TOLERANCE / 10 for d in written.differences.values())
    told = json.loads((written.path / "about.json").read_text())
    assert told == {**written.about, "differences": written.differences}
    assert told["edge"]["macs"] == pp.edge_macs(made)
    assert told["edge"]["input"] == {"name": "image", "shape": [1, 3, 12, 12], "dtype": "float32",
                                     "holds": "pixels on [0, 1]"}
    assert told["edge"]["output"]["bytes"] == 6 * 10 * 10 * 4
    assert "rounded" not in told["edge"]["output"]
    assert told["cloud"]["input"]["shape"] == ["any", 6, 10, 10]
    assert set(read_whole(written.path)) == {*written.differences, "about.json"}


def test_the_edge_holds_no_layer_of_the_cloud_and_no_path(tmp_path: Path) -> None:
    made = split()
    path = export(made, tmp_path / "export", formats=("onnx", "pt2")).path
    held = onnx.load(str(path / "edge.onnx")).graph.initializer
    edge = sum(p.numel() for p in made.edge.parameters())
    assert sum(int(np.prod(t.dims)) for t in held) <= edge + 12  # BatchNorm's statistics as well
    folders = [str(Path(code).parent).encode() for code in (pp.__file__, torch.__file__, __file__)]
    for file in path.iterdir():
        assert not any(folder in file.read_bytes() for folder in folders), file.name


def test_the_split_stays_as_it_was(tmp_path: Path) -> None:
    made = split()
    made.model.train()
    state = {name: value.clone() for name, value in made.model.state_dict().items()}
    export(made, tmp_path / "export", formats=("pt2",))
    assert all(m.training for m in made.model.modules())
    assert all(p.requires_grad for p in made.model.parameters())
    for name, value in made.model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_any_number_of_pictures_at_once(tmp_path: Path) -> None:
    path = export(split(), tmp_path / "export", any_batch=True, formats=("onnx", "pt2")).path
    for run, kind in ((by_onnx, "onnx"), (by_torch, "pt2")):
        for count in (1, 3):
            assert len(run(path / f"edge.{kind}", X[:count])) == count


def test_a_cloud_that_fixes_the_number_takes_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Single(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z.reshape(1 if len(z) == 1 else 2, -1)  # guards the trace

    made = pp.Split.from_modules(nn.Conv2d(3, 2, 3).eval(), Single(), X[:1])
    assert export(made, tmp_path / "export", formats=("pt2",)).about["cloud"]["input"]["shape"] == [
        1, 2, 10, 10]
    assert "one upload at a time" in caplog.text


def test_a_line_that_ends_in_a_colon_is_told_with_the_next() -> None:
    error = UnsupportedModelError("advice")
    error.__cause__ = RuntimeError("Found conflicts:\n  - a static shape of 2.\nMore.\n")
    assert first_line(error) == "Found conflicts: a static shape of 2."


@pytest.mark.parametrize("bits", [1, 4, 8, 16])
def test_steps_are_the_same_in_the_file(bits: int, tmp_path: Path) -> None:
    made = pp.make_defence("quantisation", bits).apply(split(), calibration=X)
    written = export(made, tmp_path / "export", formats=("pt2",) if bits != 4 else ("onnx",))
    path, x = written.path, X[:1]
    z = by_torch(path / "edge.pt2", x) if bits != 4 else by_onnx(path / "edge.onnx", x)
    with torch.no_grad():
        mine = made.edge(x)
    assert torch.equal(z, mine) if bits != 4 else float((z - mine).abs().max()) <= 1e-4
    told = written.about["edge"]["output"]
    assert (told["bytes"], told["rounded"]["bytes"]) == (600 * 4, 600 * bits // 8)
    assert (told["rounded"]["bits"], told["rounded"]["dimension"]) == (bits, 1)
    scale, zero = (torch.tensor(told["rounded"][k]).view(-1, 1, 1) for k in ("scale", "zero_point"))
    whole = (z / scale).round() + zero  # what is sent, as the docstring says
    assert 0 <= int(whole.min()) <= int(whole.max()) < 2**bits
    torch.testing.assert_close((whole - zero) * scale, mine, rtol=0, atol=1e-4)
    assert written.about["cloud"]["input"]["rounded"] == told["rounded"]


def test_a_value_half_way_between_two_steps_may_go_either_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pp.make_defence("quantisation", 8).apply(split(), calibration=X)
    module, apart = sys.modules["patrol_prune.export"], [0, 0.0]

    class Otherwise(module.ExportedHalf):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            z = super().__call__(x)
            if z.dim() == 4:
                z.view(-1)[: int(apart[0])] += apart[1]
            return z

    monkeypatch.setattr(module, "ExportedHalf", Otherwise)
    values, step = made.edge(X[:1]).numel(), float(made.edge.upload.scale.max())
    few = max(1, values // 1000)
    apart[:] = few, step
    assert export(made, tmp_path / "a", formats=("pt2",)).differences["edge.pt2"] > 1e-4
    for too_much in ((few + 1, step), (few, 1.01 * step)):
        apart[:] = too_much
        with pytest.raises(UnsupportedModelError, match="something else"):
            export(made, tmp_path / "b", formats=("pt2",))
    apart[:] = few, step
    with pytest.raises(UnsupportedModelError, match="something else"):
        export(split(), tmp_path / "b", formats=("pt2",))


def test_an_edge_that_draws_is_no_onnx(tmp_path: Path) -> None:
    made = pp.make_defence("gaussian_noise", 1.0).apply(split(), calibration=X)
    with pytest.raises(InputError, match="32 bits"):
        export(made, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    with pytest.warns(UserWarning, match=r"torch.seed\(\)"):
        written = export(made, tmp_path / "export", formats=("pt2",))
    assert written.differences == {"edge.pt2": None, "cloud.pt2": 0.0}


class Drawn(nn.Module):
    """Noise of the caller's own: of torch's global generator, of one of its own, of NumPy's."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = by
        self.own = torch.Generator().manual_seed(0) if by in ("its own", "both") else None
        self.numpy = np.random.default_rng(0)

    def forward(self, z: Tensor) -> Tensor:
        if self.by == "a few":
            return z * (torch.rand(len(z), 1, 1, 1) > 0.01)
        if self.by == "both":
            z = z + 1e-3 * torch.randn_like(z)
            return z + torch.randn(z.shape, generator=self.own)
        if self.by == "numpy":
            return z + torch.from_numpy(self.numpy.normal(size=tuple(z.shape))).float()
        return z + torch.randn(z.shape, generator=self.own)


@pytest.mark.parametrize("by", ["its own", "numpy", "both"])
def test_draws_that_lie_in_the_file_are_refused(by: str, tmp_path: Path) -> None:
    """Whoever has the file would take them off every upload."""
    edge = nn.Sequential(nn.Conv2d(3, 2, 3), Drawn(by))
    made = pp.Split.from_modules(edge, nn.Flatten(), X)
    with pytest.raises(UnsupportedModelError, match="a generator of its own or NumPy's"):
        export(made, tmp_path / "export", formats=("pt2",))
    with pytest.raises(InputError, match="32 bits"):
        export(made, tmp_path / "export")
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("half", ["edge", "cloud"])
def test_a_generator_that_cannot_be_put_into_a_program_is_told_of_an_edge_alone(
    half: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch 2.10 answers; what a cloud draws lies in no upload."""
    def refused(*_: Any, **__: Any) -> None:
        raise NotImplementedError("argument of type: <class 'torch._C.Generator'>")

    monkeypatch.setattr(torch.export, "export", refused)
    told = "takes them off every" if half == "edge" else "cannot be exported for one picture"
    with pytest.raises(UnsupportedModelError, match=told):
        program_of(half, nn.Flatten(), X[:1], False)


@pytest.mark.parametrize("by", ["the global one", "a few"])
def test_draws_of_the_global_generator_are_none_of_the_file_s(by: str, tmp_path: Path) -> None:
    edge = nn.Sequential(nn.Conv2d(3, 2, 3), Drawn(by))
    made = pp.Split.from_modules(edge, nn.Flatten(), X)
    with pytest.raises(InputError, match="32 bits"):
        export(made, tmp_path / "export")
    before = torch.get_rng_state()
    written = export(made, tmp_path / "export", formats=("pt2",))
    assert torch.equal(torch.get_rng_state(), before)
    assert written.differences == {"edge.pt2": None, "cloud.pt2": 0.0}
    assert torch.equal(torch.get_rng_state(), before)
    if by != "a few":  # of a hundred
        one, other = (by_torch(written.path / "edge.pt2", X[:1]) for _ in range(2))
        assert not torch.equal(one, other)


def test_dropout_that_is_off_and_answers_that_are_no_numbers_are_no_draws(tmp_path: Path) -> None:
    edge = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Dropout(0.5))
    made = pp.Split.from_modules(edge, nn.Sequential(nn.Flatten(), Root()), X)
    made.model.eval()
    assert export(made, tmp_path / "export", formats=("pt2",)).differences["edge.pt2"] == 0.0


class Root(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z.abs().sqrt()


class Other(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return 2 * z if torch.compiler.is_exporting() else z


def test_a_file_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    made = pp.Split.from_modules(nn.Sequential(nn.Conv2d(3, 2, 3), Other()), nn.Flatten(), X)
    (tmp_path / "export").mkdir()
    with pytest.raises(UnsupportedModelError, match=r"edge\.pt2 computes something else"):
        export(made, tmp_path / "export", formats=("pt2",))
    assert list(tmp_path.rglob("*")) == [tmp_path / "export"], "nothing is left half"


def test_what_onnx_lacks_is_told_in_one_sentence(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return torch.special.bessel_j0(z)

    made = pp.Split.from_modules(nn.Sequential(nn.Conv2d(3, 2, 3), Odd()), nn.Flatten(), X)
    with pytest.raises(UnsupportedModelError, match="edge cannot be written as ONNX") as told:
        export(made, tmp_path / "export")
    assert "\n" not in str(told.value)


def test_bad_calls_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, other = split(), tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    monkeypatch.setattr(torch.export, "export", None)
    more: dict[str, Any]
    for more, message in (({"formats": ("tflite",)}, "tflite"), ({"formats": "onnx"}, "as a list"),
                          ({"formats": ()}, "as a list"), ({"opset": 3}, "at least 18"),
                          ({"classes": "cat"}, "classes as a list"),
                          ({"classes": [X]}, "classes as a list")):
        with pytest.raises(InputError, match=message):
            export(made, tmp_path / "export", **more)
    with pytest.raises(InputError, match="something else than an earlier export"):
        export(made, other)
    (other / "about.json").write_text("mine as well")
    for place in (other, other / "notes.txt"):
        with pytest.raises(InputError, match="something else than an earlier export"):
            export(made, place)
    with pytest.raises(InputError, match="Expected split as a Split"):
        export(made.edge, tmp_path / "export")  # type: ignore[arg-type]
    assert (other / "notes.txt").read_text() == "mine"
    real = builtins.__import__
    monkeypatch.setattr(
        _onnx.importlib, "import_module",
        lambda name: real("no_such_package") if name == "onnxscript" else real(name))
    with pytest.raises(MissingPackageError, match="pip install 'onnxscript"):
        export(made, tmp_path / "export")


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_what_is_deployed_is_audited_as_the_split_is(kind: str, tmp_path: Path) -> None:
    made, generator = split(), torch.Generator().manual_seed(1)
    pictures = torch.rand(40, 3, 12, 12, generator=generator)
    export(made, tmp_path / "export", formats=(kind,), normalization=NORMALIZATION)
    loaded = pp.load_exported(tmp_path / "export")
    with torch.no_grad():
        mine = made.cloud(made.edge(NORMALIZATION.to_input(pictures)))
        torch.testing.assert_close(loaded.cloud(loaded.edge(pictures)), mine, rtol=1e-4, atol=1e-5)
    attacks = ("linear_inverse",)
    was = pp.audit(made, pictures[:32], pictures[32:], attacks=attacks, normalization=NORMALIZATION)
    now = pp.audit(loaded, pictures[:32], pictures[32:], attacks=attacks)
    assert now.strongest()["ssim"] == pytest.approx(was.strongest()["ssim"], abs=1e-3)
    x = pictures[:1].requires_grad_()
    assert loaded.edge(x).requires_grad == (kind == "pt2")


def test_what_is_no_export_is_refused(tmp_path: Path) -> None:
    path = export(split(), tmp_path / "export", formats=("pt2",)).path
    with pytest.raises(InputError, match="out of pt2, came 'onnx'"):
        pp.load_exported(path, "onnx")
    save(split(), tmp_path / "edge.patrol")
    with pytest.raises(CheckpointError, match=r"no about\.json"):
        pp.load_exported(tmp_path / "edge.patrol")
    (path / "edge.pt2").write_bytes(b"changed")
    with pytest.raises(CheckpointError, match=r"edge\.pt2 is torn or was changed"):
        pp.load_exported(path)


class Given(nn.Module):
    """An edge with a layer and what is done around it."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.run = nn.Conv2d(3, 2, 3), run

    def forward(self, x: Tensor) -> Any:
        return self.run(self.conv, x)


def scaled_in_place(conv: nn.Module, x: Tensor) -> Tensor:
    z: Tensor = conv(x.sub_(0.5).div_(0.2))
    return z


def with_gradients(conv: nn.Module, x: Tensor) -> Tensor:
    with torch.enable_grad():  # a graph within the graph
        z: Tensor = conv(x.float() / 255)
    return z.relu()


def test_an_edge_that_writes_into_its_input(tmp_path: Path) -> None:
    made = pp.Split.from_modules(Given(scaled_in_place).eval(), nn.Flatten(), X)
    assert export(made, tmp_path / "export", formats=("pt2",)).differences["edge.pt2"] == 0.0


def test_neither_pictures_nor_paths_are_in_a_program(tmp_path: Path) -> None:
    picture = torch.arange(432).remainder(251).to(torch.uint8).view(1, 3, 12, 12)
    made = pp.Split.from_modules(Given(with_gradients).eval(), nn.Flatten(), picture)
    content = (export(made, tmp_path / "export", formats=("pt2",)).path / "edge.pt2").read_bytes()
    assert picture.numpy().tobytes() not in content
    for file in (__file__, pp.__file__, torch.__file__):
        assert str(Path(file).parent).encode() not in content


def test_an_edge_of_one_picture_at_a_time(tmp_path: Path) -> None:
    made = pp.Split.from_modules(
        Given(lambda conv, x: conv(x).reshape(1, -1)).eval(), nn.Linear(200, 4), X[:1])
    written = export(made, tmp_path / "export", formats=("pt2",))
    assert written.about["edge"]["output"]["shape"] == [1, 200]
    assert written.about["cloud"]["input"]["shape"] == ["any", 200]
    with pytest.raises(UnsupportedModelError, match="one at a time. Leave any_batch out"):
        export(made, tmp_path / "many", formats=("pt2",), any_batch=True)


class Several(nn.Module):
    def forward(self, z: Tensor) -> dict[str, Any]:
        flat = z.flatten(1)
        return {"logits": flat[:, :5], "none": None, "aux": (flat.argmax(1), flat[:, :5])}


def test_answers_are_told_by_name_shape_and_type(tmp_path: Path) -> None:
    made = pp.Split.from_modules(nn.Conv2d(3, 2, 3).eval(), Several(), X)
    path = export(made, tmp_path / "export").path
    told = json.loads((path / "about.json").read_text())["cloud"]["output"]
    assert told == [{"name": "answer.logits", "shape": ["any", 5], "dtype": "float32"},
                    {"name": "answer.aux.0", "shape": ["any"], "dtype": "int64"},
                    {"name": "answer.aux.1", "shape": ["any", 5], "dtype": "float32"}]
    names = [given.name for given in onnx.load(str(path / "cloud.onnx")).graph.output]
    assert names == [given["name"] for given in told]
    one = export(split(), tmp_path / "one", formats=("pt2",), opset=20).about
    assert one["cloud"]["output"] == {"name": "answer", "shape": ["any", 5], "dtype": "float32"}
    assert "opset" not in one, "there is no ONNX"


def test_what_onnx_runtime_cannot_run_is_told_in_one_sentence(tmp_path: Path) -> None:
    made = pp.Split(net().double(), X.double(), at="2")
    with pytest.raises(UnsupportedModelError, match=r"edge\.onnx cannot be run .*float32") as told:
        export(made, tmp_path / "export")
    assert "\n" not in str(told.value) and not (tmp_path / "export").exists()


def test_a_file_in_half_precision_takes_what_an_audit_gives(tmp_path: Path) -> None:
    made = pp.Split(net().bfloat16(), X.bfloat16(), at="2")
    path = export(made, tmp_path / "export", formats=("pt2",)).path
    z = pp.load_exported(path).edge(X)
    assert torch.equal(z, made.edge(X.bfloat16())) and z.dtype == torch.bfloat16


def test_a_file_of_one_at_a_time_gives_several_answers(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def forward(self, z: Tensor) -> dict[str, Tensor]:
            return {"flat": z.reshape(1 if len(z) == 1 else 2, -1), "twice": 2 * z}

    made = pp.Split.from_modules(nn.Conv2d(3, 2, 3).eval(), Pair(), X)
    cloud = pp.load_exported(export(made, tmp_path / "export", formats=("pt2",)).path).cloud
    found = cloud(made.edge(X))
    assert torch.equal(found["twice"], 2 * made.edge(X)) and found["flat"].shape == (3, 200)


def test_a_file_runs_where_onnx_is_only_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 18]>
        twice (float[N] x) => (float[N] y) { y = Add (x, x) }""")
    real = builtins.__import__
    monkeypatch.setattr(
        _onnx.importlib, "import_module",
        lambda name: real("no_such_package") if name != "onnxruntime" else real(name))
    half = ExportedHalf(model.SerializeToString(), "onnx")
    assert half(torch.tensor([1.0, 2.0])).tolist() == [2.0, 4.0]


@pytest.fixture
def a_run(tmp_path: Path) -> Path:
    """What a run leaves for `export`: its settings and its edge."""
    config = RunConfig(data="gone", edge_macs="0.5", model="small_resnet", image_size=16, name="a",
                       runs=str(tmp_path))
    made = pp.Split(build_model("small_resnet", 3, image_size=16), torch.rand(1, 3, 16, 16),
                    at="layer2")
    with RunDirectory(tmp_path / "a", config.to_dict()) as folder:
        save(made, folder / "edge.patrol", normalization=NORMALIZATION,
             extra={"classes": ["a", "b", "c"]})
        folder.finish("plan")
        folder.finish("finetune", ["edge.patrol"])
    return folder.path


def test_a_run_is_exported_without_its_images(a_run: Path, capsys: Capture) -> None:
    assert main(["export", str(a_run), "--formats", "pt2"]) == 0
    told = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "pixels on [0, 1]" in told and "edge.pt2" in told
    about = json.loads((a_run / "export" / "about.json").read_text())
    assert about["classes"] == ["a", "b", "c"]
    assert about["edge"]["input"]["holds"] == "pixels on [0, 1]"
    assert main(["export", str(a_run), "--formats", "pt2", "--out", str(a_run.parent / "b")]) == 0
    assert (a_run.parent / "b" / "cloud.pt2").is_file()


def test_runs_that_cannot_be_exported(a_run: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["export", str(tmp_path / "no")]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main(["export", str(a_run), "--model", "resnet18"]) == 2
    capsys.readouterr()
    config = RunConfig.from_yaml(a_run / "config.yaml").to_dict()
    config["privacy"]["dropout"] = 0.5
    (a_run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["export", str(a_run)]) == 2
    assert "32 bits" in capsys.readouterr().err
    with RunDirectory(a_run, config):
        assert main(["export", str(a_run)]) == 2
        assert "Another process" in capsys.readouterr().err


def test_an_edge_that_is_no_longer_the_runs_is_not_exported(a_run: Path, capsys: Capture) -> None:
    """It lies there still, while what it was made of is being made anew."""
    with RunDirectory(a_run, read_config(a_run / "config.yaml")) as folder:
        folder.forget(["finetune"])
    assert main(["export", str(a_run), "--formats", "pt2"]) == 2
    assert "no finished edge" in capsys.readouterr().err
