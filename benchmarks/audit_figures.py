"""Tables and plots about the attacks: strongest of all, the published ones, the sweep, speed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from patrol_prune.report import render_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]

METHODS = {
    "dense": "dense, not pruned",
    "taylor": "Taylor pruning",
    "patrol": "**PATROL**",
    "patrol-adversarial": "PATROL, adversarial term only",
}
ATTACKS = {
    "inverse_network": "residual decoder",
    "inverse_network_ssim": "residual decoder, MSE + SSIM",
    "transposed": "transposed-convolution decoder",
    "transposed_ssim": "transposed-convolution decoder, MSE + SSIM",
    "unet": "U-shaped decoder",
    "unet_ssim": "U-shaped decoder, MSE + SSIM",
    "linear_inverse": "linear decoder, closed form",
    "nearest_image": "nearest of the attacker's images",
    "rmle": "rMLE, white box, warm-started",
    "rmle_published": "rMLE with the published settings",
    "image_prior": "image prior, white box",
    "query_free": "query-free, same architecture",
    "query_free_same": "query-free, same architecture",
    "query_free_other": "query-free, other architecture",
    "query_free_match": "query-free, without labels",
}
DEFENCES = {
    "none": "none (trained on)",
    "patrol-more": "PATROL",
    "adversarial_only": "adversarial training",
    "gaussian_noise": "Gaussian noise",
    "laplacian_noise": "Laplacian noise",
    "feature_dropout": "dropout on features",
    "quantisation": "quantisation",
    "nopeek": "NoPeek",
    "bottleneck": "bottleneck",
    "disco": "DISCO-style channel dropping",
    "cem_patrol": "CEM's \"PATROL\" baseline",
}
STRENGTHS = {
    "patrol-more": "β {:g}", "adversarial_only": "β {:g}", "gaussian_noise": "σ {:g} of the RMS",
    "laplacian_noise": "σ {:g} of the RMS", "feature_dropout": "p {:g}", "quantisation": "{:g} bit",
    "nopeek": "weight {:g}", "bottleneck": "{:g} channels", "disco": "{:.0%} dropped",
    "cem_patrol": "β {:g}",
}


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def attack_name(row: Row) -> str:
    """The attack's name as tables say it, with the attacker's data where it is not the usual."""
    name = ATTACKS.get(row["attack"], row["attack"])
    if row.get("attacker_data") == "shifted":
        return f"{name}, other kind of images"
    if row["attacker_images"] < 5_000 and row["attack"] == "inverse_network":
        return f"{name}, {row['attacker_images']:,} images"
    return name


def usual(rows: Iterable[Row]) -> list[Row]:
    """The rows of methods that are no defence of the sweep, under attackers with all they have."""
    return [r for r in rows if not r.get("defence")]


def thorough(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows of the methods that met every attack, by method, at the split after layer3."""
    groups: dict[str, list[Row]] = {}
    for row in usual(rows):
        if row["method"] in METHODS and row["split"] == "layer3":
            groups.setdefault(row["method"], []).append(row)
    return {m: groups[m] for m in METHODS if len({attack_name(r) for r in groups.get(m, [])}) > 3}


def strongest(circumstances: str) -> str:
    """One line per method with its strongest attack, then every attack on every method."""
    groups = thorough(load("frontier")["rows"])
    if not groups:
        return "Not measured yet."
    head, means = [], {}
    for method, rows in groups.items():
        means[method] = by_attack(rows)
        best = max(means[method], key=lambda name: mean(means[method][name], "ssim"))
        worst = max(means[method], key=lambda name: mean(means[method][name], "ssim_worst5"))
        closest = min(means[method], key=lambda name: mean(means[method][name], "mse"))
        head.append({
            "method": METHODS[method], "accuracy": f"{100 * rows[0]['accuracy']:.1f}%",
            "macs": f"{rows[0]['edge_macs'] / 1e6:.2f} M",
            "ssim": f"{mean(means[method][best], 'ssim'):.3f}", "attack": best,
            "worst": f"{mean(means[method][worst], 'ssim_worst5'):.3f}",
            "mse": f"{mean(means[method][closest], 'mse'):.4f}", "closest": closest,
        })
    columns = {"method": "method", "accuracy": "accuracy", "macs": "edge MACs",
               "ssim": "strongest attack's SSIM", "attack": "which attack", "worst": "worst 5%",
               "mse": "smallest MSE", "closest": "by which attack"}
    return "\n\n".join([
        render_table(head, columns).strip(), verdict(groups), matrix(means), circumstances,
    ])


def verdict(groups: dict[str, list[Row]]) -> str:
    """Whether PATROL's advantage over Taylor pruning stands under the strongest attack of each."""
    if not {"taylor", "patrol"} <= groups.keys():
        return ""
    first, best = {}, {}
    for method in ("taylor", "patrol"):
        same = by_attack(groups[method])
        first[method] = mean(same[ATTACKS["inverse_network"]], "ssim")
        best[method] = max(mean(rows, "ssim") for rows in same.values())
    before, after = (x["patrol"] / x["taylor"] for x in (first, best))
    trend = "shrinks" if after > before + 0.01 else "grows" if after < before - 0.01 else "stands"
    points = 100 * (groups["patrol"][0]["accuracy"] - groups["taylor"][0]["accuracy"])
    return (
        f"Under the residual decoder alone PATROL's SSIM is {before:.2f} times Taylor pruning's; "
        f"under the strongest attack of each it is {after:.2f} times: the advantage {trend}, at "
        f"{points:+.1f} points of accuracy."
    )


def by_attack(rows: list[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(attack_name(row), []).append(row)
    return groups


def mean(rows: list[Row], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def matrix(means: dict[str, dict[str, list[Row]]]) -> str:
    """SSIM of every attack (rows) on every method (columns)."""
    names = dict.fromkeys(name for attacks in means.values() for name in attacks)
    table = []
    for name in names:
        line: Row = {"attack": name}
        for method, attacks in means.items():
            rows = attacks.get(name)
            line[method] = "" if rows is None else f"{mean(rows, 'ssim'):.3f}" + (
                f" ± {statistics.stdev(r['ssim'] for r in rows):.3f}" if len(rows) > 1 else ""
            ) + ("" if all(r["plateau"] in (True, None) for r in rows) else " *")
        table.append(line)
    table.sort(key=lambda line: -max(float(v.split()[0]) for k, v in line.items()
                                     if k != "attack" and v))
    columns = {"attack": "SSIM under", **{m: METHODS[m].replace("*", "") for m in means}}
    return render_table(table, columns).strip() + (
        "\n\n\\* had not reached its plateau, or (rMLE) gained from more steps. Attacks that "
        "optimise every image were run on the first 256 test images, the others on 1,000."
    )


def sweep(circumstances: str) -> str:
    """Every defence at each strength: accuracy against the attacker's SSIM."""
    record = load("frontier")
    rows = [r for r in record["rows"] if r.get("defence")]
    if not rows:
        return "Not measured yet."
    table = []
    for row in sorted(rows, key=lambda r: (list(DEFENCES).index(r["method"]), r["strength"])):
        strength = STRENGTHS.get(row["method"], "").format(row["strength"])
        table.append({
            "defence": DEFENCES[row["method"]], "strength": strength,
            "accuracy": f"{100 * row['accuracy']:.1f}%", "ssim": f"{row['ssim']:.3f}",
            "worst": f"{row['ssim_worst5']:.3f}", "mse": f"{row['mse']:.4f}",
            "macs": f"{row['edge_macs'] / 1e6:.2f} M",
            "bytes": f"{row['feature_bytes'] / 1024:.3g} KiB",
            "plateau": "yes" if row["plateau"] else "no",
        })
    settings = record["settings"]
    columns = {"defence": "defence", "strength": "strength", "accuracy": "accuracy",
               "ssim": "attacker's SSIM", "worst": "worst 5%", "mse": "attacker's MSE",
               "macs": "edge MACs", "bytes": "uploaded", "plateau": "plateau"}
    return "\n\n".join([
        f"Each defence on top of the Taylor-pruned model, PATROL's on top of PATROL's own; all "
        f"trained {settings['sweep_epochs']} more epochs of {settings['sweep_images']:,} images "
        "with the same distillation, then attacked by one fresh residual decoder that knows the "
        "defence.", render_table(table, columns).strip(), circumstances,
    ])


def published(circumstances: str) -> str:
    """Our attacks beside the published figures, on the network those were measured on."""
    record = load("published")
    table = []
    for row in record["rows"]:
        table.append({
            "split": row["split"], "attack": ATTACKS[row["attack"]], "images": f"{row['images']:,}",
            "psnr": f"{row['psnr']:.2f}", "ssim": f"{row['ssim']:.3f}",
            "paper": f"{row['published_psnr']:.2f} / {row['published_ssim']:.3f}",
            "reached": "yes" if reaches(row) else "no",
        })
    order = ["conv11", "ReLU22", "ReLU32"]
    table.sort(key=lambda line: order.index(line["split"]))
    columns = {"split": "split after", "attack": "attack", "images": "test images",
               "psnr": "PSNR, dB", "ssim": "SSIM", "paper": "published PSNR / SSIM, 10 images",
               "reached": "reached"}
    first = record["rows"][0]
    missing = record.get("missing", [])
    return "\n\n".join(filter(None, [
        f"{first['dataset']}, the six-layer CNN of He et al. trained here (accuracy "
        f"{100 * first['accuracy']:.1f}%), attackers with {first['attacker_images']:,} images that "
        "the network was not trained on. A query-free attack counts as reached within 2 dB.",
        render_table(table, columns).strip(),
        f"Not measured: {', '.join(missing)}." * bool(missing), circumstances,
    ]))


def reaches(row: Row) -> bool:
    """At least the published PSNR and SSIM; for query-free attacks within 2 dB."""
    if row["threat"] == "query_free":
        return row["psnr"] >= row["published_psnr"] - 2.0
    return row["psnr"] >= row["published_psnr"] and row["ssim"] >= row["published_ssim"] - 5e-4


def throughput(circumstances: str) -> str:
    """Milliseconds per image of rMLE, together and one at a time."""
    record = load("throughput")
    columns = {"edge": "edge", "images": "together", "ms_per_image_together_wall": "ms per image",
               "ms_per_image_alone_wall": "one at a time, ms", "times_faster_wall": "times faster",
               "times_faster_cpu": "in CPU time", "mse_together": "MSE together",
               "mse_alone": "MSE one at a time"}
    steps, threads = record["rows"][0]["steps"], record["threads"]
    return "\n\n".join([
        f"rMLE, {steps} steps, {threads} threads, both ways in turns within one process; medians. "
        "The MSE is over the images that ran both ways.",
        render_table(record["rows"], columns).strip(), circumstances,
    ])


def plot_sweep() -> None:
    """Accuracy against SSIM, one line for each defence."""
    from matplotlib import pyplot

    rows = [r for r in load("frontier")["rows"] if r.get("defence")]
    if not rows:
        return
    figure, axes = pyplot.subplots(figsize=(7.5, 4.8), layout="constrained")
    markers = iter("ovs^D<>Pp*hX")
    for method in (m for m in DEFENCES if any(r["method"] == m for r in rows)):
        same = sorted((r for r in rows if r["method"] == method), key=lambda r: r["ssim"])
        bold = {"linewidth": 2.2, "color": "black"} if method == "patrol-more" else {}
        axes.plot([r["ssim"] for r in same], [100 * r["accuracy"] for r in same],
                  marker=next(markers), label=DEFENCES[method], alpha=0.85, **bold)
    axes.axvline(rows[0]["floor_ssim"], color="green", linestyle=":", label="floor: mean image")
    axes.set(xlabel="fresh attacker's SSIM (lower is more private)", ylabel="accuracy in %",
             title="Every defence over its own strength, equal edge MACs")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="lower right")
    figure.savefig(ROOT / "docs" / "defences.png", dpi=110)
    pyplot.close(figure)
