"""Render every table and figure of README and docs from `benchmarks/results/*.json`.

A page holds `<!-- figures:NAME -->` and `<!-- end:NAME -->`; what stands between them is replaced.
A name without its record is left as it is.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import answer_figures
import audit_figures
import backbone_figures
import depth_figures
import gap_figures
import lipschitz_figures
import matplotlib
import published_figures
import reid_figures
import score_figures
import seed_figures
import sweep_figures
import time_figures
import yardstick_figures

from patrol_prune.report import render_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]
NAMES = {
    "dense": "dense, not pruned",
    "taylor": "Taylor pruning",
    "magnitude": "magnitude pruning",
    "patrol": "**PATROL** (Lipschitz and adversarial)",
    "patrol-adversarial": "PATROL, adversarial term only",
    "patrol-masks": "PATROL, learned masks, adversarial term only",
    "patrol-lipschitz": "PATROL, Lipschitz term only",
    "patrol-score-only": "PATROL's score, plain fine-tuning",
    "patrol-finetune-only": "Taylor's score, PATROL's fine-tuning",
}
ORDER = list(NAMES)


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def by_method(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows under the strong decoder with all its images, without the defences' sweep."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if (row.get("defence") or row["attack"] != "inverse_network"
                or row.get("attacker_data") == "shifted" or row.get("times_as_long", 1) > 1
                or row["attacker_images"] < 5_000
                or row.get("victim_images", 1_000) < 1_000):
            continue
        groups.setdefault((row["method"], row["split"]), []).append(row)
    return dict(sorted(groups.items(), key=lambda g: (ORDER.index(g[0][0]), g[0][1])))


def spread(rows: list[Row], key: str, digits: int) -> str:
    return seed_figures.mean_and_deviation([row[key] for row in rows], digits)


FEW = 4
"""Commits that a sentence lists."""


def circumstances(record: dict[str, Any]) -> str:
    """When, at which commit, where and with what; a record may lack what nobody wrote down."""
    commits, versions = record.get("commit", "").split(", "), record.get("versions", {})
    at = commits if len(commits) <= FEW else [f"{len(commits)} commits, named in the rows,"]
    told = f"Measured {record['date']}"
    told += f" at {', '.join(at)}" if "commit" in record else ""
    told += f" on {record['device']}" if "device" in record else ""
    named = [f"{name} {versions[name]}" for name in ("torch", "torchvision", "torch-pruning")
             if name in versions]
    return f"{', '.join([told, *named])}; `{record['command'].split(' --')[0]}`."


def told(name: str) -> tuple[dict[str, Any], str]:
    """A record, and under which circumstances it was measured."""
    return load(name), circumstances(load(name))


def source(name: str) -> str:
    """The circumstances of the record `name`."""
    return circumstances(load(name))


def of_frontier(rows: Callable[[Row], bool]) -> str:
    """The circumstances of those of the frontier's rows; two sentences where they have two."""
    record = load("frontier")
    bases = {row.get("base") == "earlier" for row in record["rows"] if rows(row)}
    parts = [circumstances(record)] * (False in bases)
    if True in bases and record.get("earlier"):
        told = circumstances(record["earlier"])
        parts.append(f"Rows with †: {uncapitalised(told)}" if parts else told)
    return " ".join(parts)


def uncapitalised(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def of_every_attack() -> tuple[dict[str, Any], str]:
    """The record of the models that met every attack: the frontier's rows, in which models that
    `strongest.json` holds are replaced by what that says of them.
    """
    named = audit_figures.name_in_the_table
    record = load("frontier")
    if not (RESULTS / "strongest.json").exists():
        return record, of_frontier(lambda row: named(row) is not None)
    newest, told_of_it = told("strongest")
    there = {named(row) for row in newest["rows"]}
    kept = [{**row, "base": "earlier"} for row in record["rows"]
            if named(row) is not None and named(row) not in there]
    rows = [*newest["rows"], *kept]
    shown = (row for each in audit_figures.thorough(rows).values() for row in each.values())
    if any(row.get("base") == "earlier" for row in shown):
        told_of_it += f" Rows with †: {uncapitalised(circumstances(record))}"
    return {**newest, "rows": rows}, told_of_it


def is_swept(row: Row) -> bool:
    return bool(row.get("defence"))


def is_deeper(row: Row) -> bool:
    return row["split"].startswith("layer4")


def is_model(row: Row) -> bool:
    return not row.get("defence")


def frontier() -> str:
    record = load("frontier")
    table = []
    for (method, split), rows in by_method(record["rows"]).items():
        first = rows[0]
        believed = first["surrogate_mse"]
        table.append({
            "method": NAMES[method], "split": split,
            "macs": f"{first['edge_macs'] / 1e6:.2f} M",
            "bytes": f"{first['feature_bytes'] / 1024:.0f} KiB",
            "accuracy": f"{100 * first['accuracy']:.1f}%",
            "ssim": spread(rows, "ssim", 3), "worst": spread(rows, "ssim_worst5", 3),
            "mse": spread(rows, "mse", 4),
            "believed": "" if believed is None else f"{believed:.4f}",
            "plateau": "yes" if all(row["plateau"] for row in rows) else "no",
            "seeds": str(len(rows)),
        })
    first = record["rows"][0]
    columns = {
        "method": "method", "split": "split after", "macs": "edge MACs", "bytes": "uploaded",
        "accuracy": "accuracy", "ssim": "attacker's SSIM", "worst": "worst 5%",
        "mse": "attacker's MSE", "believed": "surrogates believed", "plateau": "plateau",
        "seeds": "attack seeds",
    }
    return "\n\n".join([
        f"{first['dataset']}, ResNet-18 with a CIFAR stem and {record['settings']['width']} base "
        f"channels, {record['settings']['train_images']:,} training images, one training seed. "
        f"Every attacker is a fresh residual decoder trained on {first['attacker_images']:,} other "
        "images; SSIM and MSE are means over "
        f"{record['settings']['test_images']:,} test images; lower SSIM is more private. "
        f"Floor, the mean image: SSIM {first['floor_ssim']:.3f}, MSE {first['floor_mse']:.4f}.",
        render_table(table, columns).strip(),
        verdict(record),
        not_done(record),
        of_frontier(is_model),
    ])


def verdict(record: dict[str, Any]) -> str:
    """What the bar of this benchmark compares, said in one sentence from the rows."""
    groups = by_method(record["rows"])
    taylor, patrol = groups.get(("taylor", "layer3")), groups.get(("patrol", "layer3"))
    if not taylor or not patrol:
        return ""
    ratio = (statistics.mean(r["ssim"] for r in patrol)
             / statistics.mean(r["ssim"] for r in taylor))
    points = 100 * (patrol[0]["accuracy"] - taylor[0]["accuracy"])
    met = ratio <= 0.40 and points >= -1.0
    return (
        f"At the split after layer3, PATROL's accuracy is {points:+.1f} points from Taylor "
        f"pruning's and the attacker's SSIM {ratio:.2f} times Taylor pruning's. The goal, within "
        f"1 point and at most 0.40 times, is {'met' if met else 'not met'}."
    )


def not_done(record: dict[str, Any]) -> str:
    return audit_figures.not_measured(record.get("missing", []))


def plot_frontier() -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    record = load("frontier")
    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    markers = iter("osD^vP*Xph<>d")
    for (method, split), rows in by_method(record["rows"]).items():
        label = NAMES[method].replace("*", "") + f", {split}"
        colour = {"dense": "grey", "taylor": "tab:orange"}.get(method, "tab:blue")
        ssim, accuracy = statistics.mean(r["ssim"] for r in rows), 100 * rows[0]["accuracy"]
        axes.scatter(ssim, accuracy, color=colour, marker=next(markers), label=label, zorder=3)
    floor = record["rows"][0]["floor_ssim"]
    axes.axvline(floor, color="green", linestyle=":", label="floor: the mean image")
    axes.set(xlabel="fresh attacker's SSIM (lower is more private)", ylabel="accuracy in %",
             title=record["rows"][0]["dataset"] + ", equal edge MACs but for the dense splits")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center right")
    figure.savefig(ROOT / "docs" / "frontier.png", dpi=110)
    pyplot.close(figure)


def budget() -> str:
    record = load("budget")
    rows = sorted(record["rows"], key=lambda r: (r["loop_steps"], r["model"]))
    table = [{
        **row,
        "at": f"{row['model']}, {row['split']}",
        "ours": of_budget(row.get("of_budget")),
        "host": of_budget(row.get("loop_of_budget")),
        "steps": f"{row.get('loop_steps_taken', 0)} of {row['loop_steps']}",
        "faster": times(row.get("times_faster_cpu")),
        "step_faster": times(row.get("step_times_faster_cpu")),
        "graphs": times(row.get("step_over_graph_cpu")),
        "notes": "; ".join(budget_notes(row)),
    } for row in rows]
    columns = {
        "at": "model, split after", "ours": "MACs / budget", "host": "Torch-Pruning's",
        "steps": "its steps", "faster": "times faster, all", "step_faster": "pruning alone",
        "graphs": "step, in graph builds", "repeats": "turns", "notes": "notes",
    }
    done = [row for row in rows if row.get("times_faster_cpu")]
    near = [row for row in done
            if abs(1 - row["of_budget"]) <= abs(1 - row["loop_of_budget"])]
    fast = [row for row in near if row["times_faster_cpu"] >= 5]
    size = rows[0]["image_size"]
    commits = ", ".join(sorted({row["commit"] for row in rows if row.get("commit")}))
    text = (
        f"`PatrolPruner` against Torch-Pruning's loop of small global steps to half of the edge's "
        f"MACs, both with `GroupTaylorImportance` and the same gradients, {size}x{size}, "
        "alternating in one process. `times faster, all` takes both pruners' constructors in, "
        "`pruning alone` leaves both out; ratios are of processor time, medians within a turn. Its "
        "own script takes 400 steps from the dense to the empty network; fewer are faster and land "
        "further from the budget. A row whose time ran out counts the turns that had ended."
    )
    goal = (
        f"At least 5 times faster at a result at least as close to the budget: in {len(fast)} of "
        f"the {len(done)} rows where its loop ends, closer in {len(near)}. Rows at {commits}."
    )
    return "\n\n".join([text, render_table(table, columns).strip(), goal, circumstances(record)])


def of_budget(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f}%"


def times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.1f}"


def budget_notes(row: Row) -> list[str]:
    """What did not go well, in a table's cell."""
    ours = row["status"] if row["status"] != "ok" else ""
    host = row.get("loop_status", "ok")
    return [note for note in (ours, "" if host == "ok" else f"Torch-Pruning: {host}") if note]


def grocery() -> str:
    record = load("grocery")
    first = record["rows"][0]
    table = [{
        **row, "method": NAMES[row["method"]], "macs": f"{row['edge_macs'] / 1e6:.2f} M",
        "bytes": f"{row['feature_bytes'] / 1024:.0f} KiB",
        "accuracy": f"{100 * row['accuracy']:.1f}%",
        "plateau": "yes" if row["plateau"] else "no",
    } for row in record["rows"]]
    columns = {"method": "method", "split": "split after", "macs": "edge MACs",
               "bytes": "uploaded", "accuracy": "accuracy", "ssim": "attacker's SSIM",
               "ssim_worst5": "worst 5%", "mse": "attacker's MSE", "plateau": "plateau"}
    text = (
        f"{first['dataset']}, {first['model']} trained from scratch, `patrol-prune run` from the "
        f"command line, {record['minutes']:.0f} minutes on a busy machine. Attacker: "
        f"{first['attacker_images']:,} other images; {first['victim_images']} test images. Floor, "
        f"the mean image: SSIM {first['floor_ssim']:.3f}, MSE {first['floor_mse']:.4f}."
    )
    return "\n\n".join([text, render_table(table, columns).strip(), circumstances(record)])


RENDERERS: dict[str, tuple[str, Callable[[], str]]] = {
    "frontier": ("frontier", frontier),
    "budget": ("budget", budget),
    "grocery": ("grocery", grocery),
    "step_cost": ("step_cost", lambda: time_figures.step_cost(*told("step_cost"))),
    "strongest": ("frontier", lambda: audit_figures.strongest(*of_every_attack())),
    "every-attack": ("frontier", lambda: audit_figures.every_attack(*of_every_attack())),
    "sweep": ("frontier", lambda: sweep_figures.sweep(
        f"{source('strongest')} Rows with ¤: {uncapitalised(of_frontier(is_swept))}")),
    "gap": ("frontier", lambda: gap_figures.surrogate_gap(
        [told(name) for name in gap_figures.RECORDS if (RESULTS / f"{name}.json").exists()])),
    "depth": ("frontier", lambda: depth_figures.depth(load("frontier"), of_frontier(is_deeper))),
    "seeds": ("seeds", lambda: seed_figures.seeds(*told("seeds"))),
    "seed-means": ("seeds", lambda: seed_figures.means(*told("seeds"))),
    "fidelity": ("fidelity", lambda: score_figures.fidelity(*told("fidelity"))),
    "scores": ("scores", lambda: score_figures.scores(*told("scores"))),
    "published": ("published", lambda: published_figures.published(source("published"))),
    "bounds": ("bounds", lambda: audit_figures.bounds(source("bounds"))),
    "backbones": ("backbones",
                  lambda: backbone_figures.backbones(load("backbones"), source("backbones"))),
    "heads": ("heads", lambda: backbone_figures.heads(*told("heads"))),
    "answers": ("answers", lambda: answer_figures.answers(load("answers"), load("seeds"),
                                                          source("answers"))),
    "lipschitz": ("lipschitz", lambda: lipschitz_figures.lipschitz(*told("lipschitz"))),
    "yardsticks": ("yardsticks", lambda: yardstick_figures.yardsticks(*told("yardsticks"))),
    "reid": ("reid", lambda: reid_figures.reid(load("reid"))),
    "throughput": ("throughput", lambda: time_figures.throughput(*told("throughput"))),
}
"""Name of each block to the record it needs and the function that renders it."""


def render(text: str) -> str:
    """The page with every block that has a record rendered anew."""
    for name, (needed, renderer) in RENDERERS.items():
        if (RESULTS / f"{needed}.json").exists():
            pattern = rf"(<!-- figures:{name} -->\n).*?(<!-- end:{name} -->)"
            if re.search(pattern, text, re.S):
                body = renderer()
                text = re.sub(pattern, lambda m, body=body: f"{m[1]}{body}\n{m[2]}", text,
                              flags=re.S)
    return text


def main() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")),
                 *sorted((ROOT / "integrations").glob("*/README.md"))]:
        before = page.read_text()
        after = render(before)
        if after != before:
            page.write_text(after)
            print(f"rendered {page.relative_to(ROOT)}")
    if (RESULTS / "frontier.json").exists():
        plot_frontier()
        sweep_figures.plot_sweep()
        print("rendered docs/frontier.png and docs/defences.png")


if __name__ == "__main__":
    main()
