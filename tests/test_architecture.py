"""The rules that keep the package readable: one way of importing, one door per third party."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "patrol_prune"

# A module imports only from modules that stand above it.
ORDER = [
    "errors", "precision", "symmetric", "given", "pixels", "storage", "data",
    "reid_layout", "retrieval",
    "_vehicle_shapes", "_vehicle_scenes", "_vehicle_drawing", "_vehicle_files", "vehicles",
    "_vehicle_sites", "vehicle_identities", "vehicle_truth", "leaks", "models",
    "attention_heads", "groups", "channel_norms", "live_attention", "prunable", "_tp",
    "operators", "trial", "shuffles", "local_groups", "following", "group_table", "cost", "latency",
    "_trace", "open_attention", "_cuts", "split", "transmitted", "_residuals", "blocks", "lineage",
    "removal",
    "_block_pruning", "metric_learning", "reid_model", "reid_training",
    "budget", "_search", "choice", "metrics", "covariance", "jacobian", "bounds",
    "edge_sizes", "plan_limits", "plan_rows", "_mask_hooks", "masks", "folding", "shrinkage",
    "lipschitz", "spectral_rules",
    "spectral", "decoder_blocks", "decoders", "ridge", "upload_reader", "surrogate", "objective",
    "survivors", "importance", "mask_importance", "origins", "regularizer", "_host_options",
    "prune_result", "pruner", "pruned_edges", "plan_choice", "plan",
    "training_state", "evaluation",
    "distillation", "image_pool", "finetune_config", "trainer", "finetune", "learned_masks",
    "saved_sizes", "checkpoint", "defences",
    "attacks", "access", "received", "warm_start", "audit_choice", "audit_scores",
    "audit_report", "audit_run", "audit", "_report_facts", "figures", "tables", "report",
    "rundir", "settings", "preparation", "audit_model", "run_objectives",
    "run_summary",
    "pipeline", "reaudit",
    "tune_settings", "tune_result", "tune_report", "tune_space", "tune_workers",
    "tune_study", "tune", "_audit_command", "_tune_command", "_plan_command",
    "commands", "cli",
    "__main__", "__init__",
]
ATTACKS_MAY_IMPORT = {"split", "decoders", "metrics", "errors", "precision", "symmetric",
                      "ridge", "attacks"}
# Only these import the named third party at all.
DOORS = {
    "torch_pruning": {"_tp"},
    "fvcore": {"cost"},
    "jsonargparse": {"commands", "_audit_command", "_tune_command", "_plan_command"},
    "rich": {"commands", "_audit_command", "_tune_command", "_plan_command", "tables"},
    "optuna": {"tune_study"},
    "sklearn": {"retrieval"},
    "safetensors": {"storage", "checkpoint"},
    "jinja2": {"report"},
    "pytorch_metric_learning": {"metric_learning"},
}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """The module's name in ORDER; everything below a package counts as the package."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


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


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
class TestEachFile:
    def test_imports_point_one_way(self, path: Path) -> None:
        imported = inner_imports(path, tree_of(path))
        above = set(ORDER[: ORDER.index(name_of(path))])
        assert is_order_kept(name_of(path), imported), (
            f"{path.name} imports {sorted(imported - above)}"
        )

    def test_attacks_know_nothing_of_the_defence(self, path: Path) -> None:
        if name_of(path) == "attacks":
            assert inner_imports(path, tree_of(path)) <= ATTACKS_MAY_IMPORT

    def test_third_parties_enter_through_one_door(self, path: Path) -> None:
        for module in imports_of(tree_of(path)):
            door = DOORS.get(module.partition(".")[0])
            assert door is None or name_of(path) in door, f"{path.name} imports {module}"

    def test_nothing_unpickles(self, path: Path) -> None:
        tree = tree_of(path)
        assert not {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"} & set(
            imports_of(tree)
        )
        calls = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
        assert not calls & {"torch.load", "torch.save", "yaml.load", "eval", "exec"}

    def test_no_star_bare_except_or_mutable_default(self, path: Path) -> None:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ImportFrom):
                assert all(alias.name != "*" for alias in node.names), "star import"
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"bare except in line {node.lineno}"
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                defaults = [*node.args.defaults, *(d for d in node.args.kw_defaults if d)]
                assert not any(is_mutable(d) for d in defaults), f"mutable default: {node.name}"

    def test_library_does_not_print_or_exit(self, path: Path) -> None:
        if name_of(path) in ("cli", "commands", "__main__"):
            return
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("print", "sys.exit", "exit")

    def test_short(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 400, f"{path.name} has {len(lines)} lines"

    def test_functions_are_short(self, path: Path) -> None:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                assert lines <= 60, f"{node.name} has {lines} lines"

    def test_public_signatures_are_annotated(self, path: Path) -> None:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                bare = [a.arg for a in arguments if a.annotation is None
                        and a.arg not in ("self", "cls")]
                assert not bare and node.returns is not None, f"{node.name}: {bare}"


def is_mutable(node: ast.expr) -> bool:
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in ("dict", "list", "set")
    return isinstance(node, (ast.List, ast.Dict, ast.Set))


def test_mutable_defaults_are_recognised() -> None:
    defaults = ast.parse("def f(a=[], b=dict(), c=(), d=None): ...").body[0].args.defaults  # type: ignore[attr-defined]
    assert [is_mutable(d) for d in defaults] == [True, True, False, False]


def test_no_drawer() -> None:
    assert not [p for p in files() if re.fullmatch(r"(utils|helpers|misc|common)", p.stem)]
