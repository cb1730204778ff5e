"""The rules that keep the package readable: one way of importing, one door per third party."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "patrol_prune"

# A module imports only from modules that stand above it.
ORDER = [
    "errors", "versions", "precision", "symmetric", "given", "pixels", "regions", "storage", "data",
    "reid_layout", "retrieval",
    "_vehicle_shapes", "_vehicle_scenes", "_vehicle_drawing", "_vehicle_files", "vehicles",
    "_vehicle_sites", "vehicle_identities", "vehicle_truth", "leaks", "models",
    "attention_heads", "groups", "channel_norms", "live_attention", "prunable", "_tp",
    "plain_groups", "operators", "trial", "shuffles", "local_groups", "following", "group_table",
    "cost", "latency", "_trace", "open_attention", "_cuts", "_halves", "split", "transmitted",
    "_residuals", "blocks",
    "lineage", "removal",
    "_block_pruning", "metric_learning", "reid_model", "reid_training",
    "budget", "_search", "choice", "metrics", "covariance", "jacobian", "bounds",
    "edge_sizes", "plan_limits", "plan_rows", "_mask_hooks", "masks", "folding", "shrinkage",
    "lipschitz", "spectral_rules",
    "spectral", "decoder_blocks", "decoders", "whitening", "ridge", "upload_reader", "surrogate",
    "objective", "survivors", "predicted_change", "importance", "mask_importance", "origins",
    "regularizer", "_host_options", "kept_whole",
    "prune_result", "pruner", "pruned_edges", "plan_choice", "plan",
    "training_state", "evaluation",
    "distillation", "image_pool", "finetune_config", "trainer", "finetune", "learned_masks",
    "defences", "saved_sizes", "saved_description", "saved_defence", "saved_model", "checkpoint",
    "_onnx", "_programs", "packing", "exported",
    "export",
    "attacks", "access", "alone", "received", "per_picture", "arrangement", "undoing", "warm_start",
    "unharmed",
    "audit_choice", "audit_scores", "audit_report", "audit_attack", "audit_run", "audit_kept",
    "audit_setup",
    "audit", "_report_facts", "figures", "tables", "report", "rundir", "plain_settings",
    "settings", "preparation",
    "audit_model", "run_objectives",
    "run_summary",
    "pipeline", "reaudit",
    "tune_settings", "tune_result", "tune_report", "tune_space", "tune_workers",
    "tune_study", "tune", "_audit_command", "_export_command", "_tune_command", "_plan_command",
    "commands", "cli",
    "__main__", "__init__",
]
ATTACKS_MAY_IMPORT = {"split", "decoders", "whitening", "metrics", "errors", "precision", "regions",
                      "symmetric", "ridge", "attacks"}
# Only these import the named third party at all.
DOORS = {
    "torch_pruning": {"_tp"},
    "fvcore": {"cost"},
    "jsonargparse": {"commands", "_audit_command", "_export_command", "_tune_command",
                     "_plan_command"},
    "rich": {"commands", "_audit_command", "_tune_command", "_plan_command", "tables"},
    "optuna": {"tune_study"},
    "sklearn": {"retrieval"},
    "safetensors": {"storage", "checkpoint"},
    "jinja2": {"report"},
    "pytorch_metric_learning": {"metric_learning"},
    "onnxruntime": {"_onnx"},
}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """The module's name in ORDER; everything below a package counts as the package."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports_of(tree: ast.Module) -> Iterator[str]:
    """Full names of everything imported anywhere in the file, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            assert node.module is not None
            yield node.module
            if node.module == "patrol_prune":
                yield from (f"patrol_prune.{alias.name}" for alias in node.names)


def inner_imports(path: Path, tree: ast.Module) -> set[str]:
    return {m.split(".")[1] for m in imports_of(tree) if m.startswith("patrol_prune.")}


def is_order_kept(name: str, imported: set[str]) -> bool:
    above = set(ORDER[: ORDER.index(name)])
    return imported - {name} <= above


def test_every_module_has_its_place() -> None:
    assert {name_of(p) for p in files()} <= set(ORDER)
    assert len(ORDER) == len(set(ORDER))


def test_the_check_itself_finds_an_import_upwards() -> None:
    tree = ast.parse("from patrol_prune import cli\nfrom patrol_prune.errors import InputError")
    assert not is_order_kept("split", inner_imports(Path("split.py"), tree))
    assert is_order_kept("split", {"errors"})


# A rule says of one file what breaks it.


def points_upwards(path: Path, tree: ast.Module) -> Iterator[str]:
    imported = inner_imports(path, tree)
    if not is_order_kept(name_of(path), imported):
        above = set(ORDER[: ORDER.index(name_of(path))])
        yield f"imports {sorted(imported - above)}"


def attacks_know_the_defence(path: Path, tree: ast.Module) -> Iterator[str]:
    if name_of(path) == "attacks":
        yield from sorted(inner_imports(path, tree) - ATTACKS_MAY_IMPORT)


def third_party_by_another_door(path: Path, tree: ast.Module) -> Iterator[str]:
    for module in imports_of(tree):
        door = DOORS.get(module.partition(".")[0])
        if door is not None and name_of(path) not in door:
            yield f"imports {module}"


def unpickles(path: Path, tree: ast.Module) -> Iterator[str]:
    yield from {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"} & set(
        imports_of(tree))
    calls = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    yield from calls & {"torch.load", "torch.save", "yaml.load", "eval", "exec"}


def star_bare_except_or_mutable_default(path: Path, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            yield "star import"
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"bare except in line {node.lineno}"
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            defaults = [*node.args.defaults, *(d for d in node.args.kw_defaults if d)]
            if any(is_mutable(d) for d in defaults):
                yield f"mutable default: {node.name}"


def library_prints_or_exits(path: Path, tree: ast.Module) -> Iterator[str]:
    if name_of(path) not in ("cli", "commands", "__main__"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in ("print", "sys.exit", "exit"):
                    yield f"{called} in line {node.lineno}"


def too_long(path: Path, tree: ast.Module) -> Iterator[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) > 400:
        yield f"{len(lines)} lines"


def function_too_long(path: Path, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            if lines > 60:
                yield f"{node.name} has {lines} lines"


def public_signature_bare(path: Path, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in arguments if a.annotation is None
                    and a.arg not in ("self", "cls")]
            if bare or node.returns is None:
                yield f"{node.name}: {bare}"


RULES = (points_upwards, attacks_know_the_defence, third_party_by_another_door, unpickles,
         star_bare_except_or_mutable_default, library_prints_or_exits, too_long,
         function_too_long, public_signature_bare)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_file_breaks(rule: Callable[[Path, ast.Module], Iterator[str]]) -> None:
    assert not [f"{path.relative_to(PACKAGE)}: {fault}"
                for path in files() for fault in rule(path, tree_of(path))]


def test_the_rules_of_attacks_and_of_length_find_what_breaks_them(tmp_path: Path) -> None:
    source = "from patrol_prune import pruner"
    assert list(attacks_know_the_defence(PACKAGE / "attacks" / "x.py", ast.parse(source)))
    assert not list(attacks_know_the_defence(PACKAGE / "split.py", ast.parse(source)))
    file = tmp_path / "long.py"
    for lines, faults in ((400, 0), (401, 1)):
        file.write_text("x = 1\n" * lines)
        assert len(list(too_long(file, ast.parse("")))) == faults


@pytest.mark.parametrize(("rule", "source"), [
    (points_upwards, "from patrol_prune import cli"),
    (third_party_by_another_door, "import optuna.trial"),
    (third_party_by_another_door, "from optuna import trial"),
    (unpickles, "def f():\n    import pickle"),
    (unpickles, "torch.load(path)"),
    (star_bare_except_or_mutable_default, "from os import *"),
    (star_bare_except_or_mutable_default, "try:\n    f()\nexcept:\n    g()"),
    (star_bare_except_or_mutable_default, "def f(*, a={}): ..."),
    (library_prints_or_exits, "print(1)"),
    (function_too_long, "def f() -> None:\n" + "    x()\n" * 61),
    (public_signature_bare, "def f(a) -> None: ..."),
    (public_signature_bare, "def f(a: int): ..."),
])
def test_each_rule_finds_what_breaks_it(
    rule: Callable[[Path, ast.Module], Iterator[str]], source: str,
) -> None:
    assert list(rule(PACKAGE / "split.py", ast.parse(source)))
    assert not list(rule(PACKAGE / "split.py", ast.parse("def f(a: int = 0) -> None: ...")))


def is_mutable(node: ast.expr) -> bool:
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in ("dict", "list", "set")
    return isinstance(node, (ast.List, ast.Dict, ast.Set))


def test_mutable_defaults_are_recognised() -> None:
    defaults = ast.parse("def f(a=[], b=dict(), c=(), d=None): ...").body[0].args.defaults  # type: ignore[attr-defined]
    assert [is_mutable(d) for d in defaults] == [True, True, False, False]


def test_no_drawer() -> None:
    assert not [p for p in files() if re.fullmatch(r"(utils|helpers|misc|common)", p.stem)]
