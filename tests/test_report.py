"""The page: self-contained, escaped, and every number on it is the record's."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from patrol_prune import figures
from patrol_prune._report_facts import (
    attack_rows,
    comparison,
    headline,
    limits,
    number,
    short,
    story,
    strongest,
)
from patrol_prune.audit_report import AuditReport
from patrol_prune.errors import InputError
from patrol_prune.report import RunSummary, console_table, render_table, write_report
from patrol_prune.tables import ATTACK_COLUMNS, attack_table, flag_lines, merged_flags

COSTS = ("edge_macs", "edge_params", "feature_bytes", "accuracy")


def record(subject: str, seed: int | None, ssim: float, **more: Any) -> dict[str, Any]:
    return {
        "subject": subject, "attack": "mean_image" if seed is None else "inverse_network",
        "attack_seed": seed, "attacker_images": 1000, "victim_images": 480, "ssim": ssim,
        "psnr": 20.0 * ssim + 9.0, "mse": 0.07 - 0.06 * ssim, "ssim_worst5": ssim + 0.0731,
        "plateau": None if seed is None else True, "seconds": 12.25,
        "box": "none" if seed is None else "black", "gmsd": 0.3 - 0.2 * ssim, "rank1": ssim,
        "chance1": 1 / 480, "attacker_data": "same", **more,
    }


def flag(name: str, seed: int) -> dict[str, Any]:
    return {
        "subject": "edge", "attack": "inverse_network", "attack_seed": seed, "name": name,
        "meaning": "The attack was <still> improving.", "advice": "Raise epochs.",
    }


def make_audit(**changes: Any) -> AuditReport:
    rng = np.random.default_rng(0)
    originals = rng.integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    noise = rng.integers(0, 40, originals.shape, dtype=np.uint8)
    audit = AuditReport(
        records=[
            record("floor", None, 0.12517), record("edge", 0, 0.28123), record("edge", 1, 0.28719),
            record("undefended", 0, 0.87341), record("undefended", 1, 0.87011),
        ],
        flags=[flag("not_converged", 0), flag("not_converged", 1)],
        examples={
            "originals": originals, "undefended": originals // 4 * 3 + noise,
            "edge": originals // 4 + 96, "floor": np.full_like(originals, 128),
        },
    )
    for key, value in changes.items():
        setattr(audit, key, value)
    return audit


def make_summary(**changes: Any) -> RunSummary:
    summary = RunSummary(
        name="demo", model="resnet18", dataset="rendered vehicles", split="layer2",
        plan={"boundary": "prune"}, prune={"layer1.0.conv1": (9, 16), "layer2.0.conv1": (13, 32)},
        dense=dict(zip(COSTS, (9437184, 45217, 32768, 0.9771), strict=True)),
        pruned=dict(zip(COSTS, (4700161, 21013, 20480, 0.9583), strict=True)),
        history=[{"epoch": e, "task": 1 / e, "accuracy": 0.8 + 0.01 * e} for e in range(1, 6)],
        config={"beta": 20.0}, versions={"torch": "2"}, command="patrol-prune demo --seed 0",
        notes=["The pictures are drawn."],
    )
    return replace(summary, **changes)


LADDER = [{"side": k, "ssim": 0.2 + 0.05 * k, "ssim_worst5": 0.5, "mse": 0.01}
          for k in range(1, 20)]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], ""),
        (LADDER, "a thumbnail of 2x2 pixels, enlarged; the undefended upload, of 13x13."),
        (LADDER[:3], "a thumbnail of 2x2 pixels, enlarged."),
        (LADDER[5:], "less than the picture's mean colour would."),
    ],
)
def test_the_story_says_what_a_likeness_means(rows: list[dict[str, Any]], expected: str) -> None:
    seen = dict(story(make_summary(), make_audit(thumbnails=rows)))["What is seen"]
    assert expected in seen and ("By SSIM" in seen) == bool(rows)


def test_the_story_says_where_the_whole_picture_is_seen() -> None:
    rows = [*LADDER[:12], {"side": 32, "ssim": 1.0, "ssim_worst5": 1.0, "mse": 0.0}]
    for edge, expected in ((0.28719, "a thumbnail of 2x2 pixels, enlarged; the undefended upload, "
                                     "the whole picture."),
                           (1.0, "it shows the whole picture; the undefended upload, the whole")):
        made = make_audit(thumbnails=rows, records=[record("edge", 0, edge),
                                                    record("undefended", 0, 1.0)])
        assert expected in dict(story(make_summary(), made))["What is seen"]


class Page(HTMLParser):
    """Collects tags, `<data>` values with the text they show, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data: list[tuple[str, str, str]] = []
        self.text = ""
        self._open: tuple[str, str] | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "data":
            values = dict(attrs)
            self._open = (values.get("class") or "", values["value"] or "")
            self.data.append((*self._open, ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == "data":
            self._open = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open is not None:
            self.data[-1] = (*self._open, self.data[-1][2] + data.strip())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(make_summary(), make_audit(), tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def html(written: Path) -> str:
    return written.read_text(encoding="utf-8")


def test_the_page_needs_nothing_else(html: str) -> None:
    assert not re.search(r"https?://|//cdn|@import|url\(", html)
    for tag, attributes in Page(html).tags:
        assert tag not in ("script", "link", "iframe", "object")
        assert not any(name.startswith("on") for name in attributes)
        if "src" in attributes:
            assert (attributes["src"] or "").startswith("data:image/png;base64,")


def test_every_picture_decodes_and_says_what_it_is(html: str) -> None:
    images = [attributes for tag, attributes in Page(html).tags if tag == "img"]
    assert len(images) == 3 * 8 + 3, "eight columns of three, and three figures"
    for attributes in images:
        data = base64.b64decode((attributes["src"] or "").partition(",")[2], validate=True)
        assert Image.open(io.BytesIO(data)).size[0] >= 32
        assert len(attributes["alt"] or "") > 15
        assert "\n" not in (attributes["alt"] or "")


def test_the_strip_shows_the_examples_themselves(html: str) -> None:
    audit = make_audit()
    images = [a for tag, a in Page(html).tags if tag == "img"][:24]
    for i, attributes in enumerate(images):
        shown = np.asarray(
            Image.open(io.BytesIO(base64.b64decode((attributes["src"] or "").partition(",")[2])))
        )
        key = ("originals", "undefended", "edge")[i // 8]
        assert (shown == audit.examples[key][i % 8]).all()


def test_all_numbers_are_the_records(html: str) -> None:
    """The values behind the table and the texts in front are both the records', independently."""
    data = Page(html).data
    cells = [(value, text) for kind, value, text in data if kind == "cell"]
    s = make_summary()
    ceiling, edge, floor = record("u", 0, 0.87341), record("e", 1, 0.28719), record("f", 0, 0.12517)
    expected: list[Any] = []
    for key in COSTS:
        expected += [s.dense[key], s.pruned[key]]
    for key in ("ssim", "ssim_worst5", "psnr", "mse", "gmsd", "rank1", "chance1"):
        expected += [ceiling[key], edge[key], floor[key]]
    assert [float(value) for value, _ in cells] == [float(value) for value in expected]
    for value, text in cells:
        share = 100.0 if text.endswith("%") else 1.0
        shown = float(text.rstrip("%").replace(",", ""))
        rounding = 0.06 if share > 1 else 0.0006
        assert shown == pytest.approx(float(value) * share, rel=0.006, abs=rounding)
    means = [float(value) for kind, value, _ in data if kind == "mean"]
    assert means == [row[key] for row in attack_rows(make_audit().records)
                     for key in ATTACK_COLUMNS if isinstance(row[key], int | float)]
    records = [value for kind, value, _ in data if kind == "record"]
    assert records == [
        "" if value is None else str(value)
        for entry in make_audit().records for value in entry.values()
    ]


def test_the_captions_are_the_ssim_of_the_pictures_shown(html: str) -> None:
    torch = pytest.importorskip("torch")
    piq = pytest.importorskip("piq")
    audit = make_audit()
    original, rebuilt = (
        torch.tensor(audit.examples[key][:8]).permute(0, 3, 1, 2) / 255.0
        for key in ("originals", "edge")
    )
    oracle = piq.ssim(rebuilt, original, data_range=1.0, downsample=False, reduction="none")
    captions = [float(value) for kind, value, _ in Page(html).data if kind == ""]
    assert captions[8:] == pytest.approx(oracle.tolist(), abs=0.03)


def test_the_page_says_the_essentials_in_words(html: str) -> None:
    text = " ".join(Page(html).text.split())
    for sentence in (
        "resnet18 is cut after layer2", "26 of the 48 channels", "50% of the 9.44 M",
        "Accuracy 95.8%, before 97.7%", "a likeness (SSIM) of 0.29 instead of 0.87",
        "average picture gives 0.13", "22% is left", "No white-box attack",
        "The pictures are drawn.", "patrol-prune demo --seed 0",
        "0.281 to 0.287 over one attack (2 times)",
    ):
        assert sentence in text, sentence


def test_flags_are_told_once_with_where_they_were_raised(html: str) -> None:
    text = " ".join(Page(html).text.split())
    assert text.count("The attack was <still> improving.") == 1
    assert "inverse_network, seed 0; PATROL, inverse_network, seed 1" in text
    assert "raised no flag" not in text


@pytest.mark.usefixtures("no_plots")
def test_flags_of_one_name_that_say_different_things_all_stand() -> None:
    flags = [{"name": "attack_failed", "meaning": told, "advice": "Mend it.", "subject": "edge",
              "attack": attack, "attack_seed": 0}
             for told, attack in (("one", "a"), ("two", "b"), ("one", "c"))]
    found = merged_flags(flags)
    assert [(f["meaning"], f["where"]) for f in found] == [
        ("one", "PATROL, a, seed 0; PATROL, c, seed 0"), ("two", "PATROL, b, seed 0")]


def test_no_flag_is_said_too(tmp_path: Path) -> None:
    page = write_report(make_summary(), make_audit(flags=[]), tmp_path).read_text()
    assert "raised no flag" in page


def test_what_comes_from_outside_is_escaped(tmp_path: Path) -> None:
    evil = "$<script>alert('x')</script>\"><b>"
    summary = make_summary(
        name=evil, model=evil, dataset=evil, split=evil, prune={evil: (3, 8)}, notes=[evil],
        config={evil: evil}, versions={evil: evil}, command=evil, device=evil, plan={"at": evil},
    )
    audit = make_audit(flags=[flag(evil, 0)])
    audit.records[1]["attack"] = evil
    page = Page(write_report(summary, audit, tmp_path).read_text())
    assert not [tag for tag, _ in page.tags if tag in ("script", "b")]
    assert evil in page.text


def test_files_beside_the_page(written: Path) -> None:
    folder = written.parent
    assert {p.name for p in folder.iterdir()} == {"figures", "report.html", "report.json"}
    plots = {p.stem: p for p in (folder / "figures").iterdir()}
    assert set(plots) == {"pictures", "leak", "channels", "training"}
    for plot in plots.values():
        pixels = np.asarray(Image.open(plot).convert("RGB"))
        assert min(pixels.shape[:2]) > 100 and pixels.std() > 5


def test_the_twin_holds_everything(written: Path) -> None:
    twin = json.loads((written.parent / "report.json").read_text())
    assert twin["records"] == make_audit().records
    assert twin["summary"]["pruned"] == make_summary().pruned
    assert twin["summary"]["prune"]["layer1.0.conv1"] == [9, 16]
    assert twin["headline"] in written.read_text()


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figures out, where they take most of the time and are not what is tested."""
    dot = figures.png(np.zeros((4, 4, 3), np.uint8))
    monkeypatch.setattr("patrol_prune.report._plots", lambda *_: {"leak": dot})


@pytest.mark.usefixtures("no_plots")
def test_a_second_report_replaces_the_first(tmp_path: Path) -> None:
    write_report(make_summary(), make_audit(), tmp_path)
    path = write_report(make_summary(name="again"), make_audit(), tmp_path)
    assert "<title>again" in path.read_text()


def test_the_same_records_give_the_same_bytes(tmp_path: Path, written: Path) -> None:
    again = write_report(make_summary(), make_audit(), tmp_path)
    assert again.read_bytes() == written.read_bytes()


def test_a_run_without_ceiling_pruning_or_history(tmp_path: Path) -> None:
    audit = make_audit(records=[record("edge", 0, 0.3, psnr=float("inf"))])
    del audit.examples["undefended"]
    path = write_report(make_summary(prune={}, history=[]), audit, tmp_path)
    page = Page(path.read_text())
    assert "there is no ceiling" in page.text
    assert "∞" in page.text
    twin = json.loads(
        (tmp_path / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    assert twin["records"][0]["psnr"] == "inf"
    assert not (tmp_path / "figures" / "training.png").exists()


@pytest.mark.usefixtures("no_plots")
def test_grey_pictures(tmp_path: Path) -> None:
    audit = make_audit()
    audit.examples = {key: images[..., :1] for key, images in audit.examples.items()}
    assert write_report(make_summary(), audit, tmp_path).is_file()


def test_a_report_refuses_what_it_cannot_tell(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Attack the edge"):
        write_report(make_summary(), make_audit(records=[record("floor", None, 0.1)]), tmp_path)
    with pytest.raises(InputError, match="originals"):
        write_report(make_summary(), make_audit(examples={}), tmp_path)
    audit = make_audit()
    audit.examples["edge"] = audit.examples["edge"][:3]
    with pytest.raises(InputError, match="same victims"):
        write_report(make_summary(), audit, tmp_path)
    with pytest.raises(InputError, match="accuracy"):
        make_summary(dense={"edge_macs": 1, "edge_params": 1, "feature_bytes": 1})
    with pytest.raises(InputError, match="kept first"):
        make_summary(prune={"conv1": (16, 9)})
    assert not list(tmp_path.iterdir())


def test_the_strongest_attack_counts() -> None:
    records = make_audit().records
    found = strongest(records, "edge")
    assert found is not None and found["attack_seed"] == 1
    assert strongest(records, "nobody") is None
    rows = {row["key"]: row for row in comparison(make_summary(), make_audit())}
    assert rows["ssim"]["edge"] == make_audit().strongest("edge")["ssim"]


def test_a_defence_that_fails_is_called_that() -> None:
    audit = make_audit(records=[record("edge", 0, 0.9), record("undefended", 0, 0.9)])
    assert "hides nothing" in headline(make_summary(), audit)
    assert "hides nothing" not in headline(make_summary(), make_audit())


def test_attacks_that_fail_on_both_edges_do_not_show_a_deep_cut() -> None:
    audit = make_audit(thumbnails=LADDER, records=[
        record("edge", 0, 0.23), record("undefended", 0, 0.24),
        record("floor", None, 0.4, attack="mean_image")])
    text = headline(make_summary(), audit)
    assert "Cut this deep" not in text and "more than 0.24" in text and "has failed" in text
    assert "thumbnail" not in " ".join(text for _, text in story(make_summary(), audit))


def test_a_cut_that_leaks_nothing_to_begin_with_is_said_to() -> None:
    audit = make_audit()
    floor = next(r["ssim"] for r in audit.records if r["subject"] == "floor")
    for record in audit.records:
        if record["subject"] != "floor":
            record["ssim"] = floor + 0.01
    text = headline(make_summary(), audit)
    assert "even from the undefended upload" in text and "hides nothing" not in text
    for record in audit.records:  # pruning made it worse
        if record["subject"] == "edge":
            record["ssim"] = 0.8
    assert "no worse than" in headline(make_summary(), audit)


def test_an_attack_below_the_average_picture_is_not_called_a_defence() -> None:
    audit = make_audit(records=[
        record("edge", 0, 0.02), record("undefended", 0, 0.8),
        record("floor", None, 0.25, attack="mean_image")])
    assert "has failed" in headline(make_summary(), audit)
    told = " ".join(text for _, text in story(make_summary(), audit))
    assert "is left" not in told
    assert "has failed" not in headline(make_summary(), make_audit())
    assert "is left" in " ".join(text for _, text in story(make_summary(), make_audit()))


def test_each_row_is_of_the_attack_that_gets_furthest_in_it() -> None:
    audit = make_audit(records=[
        record("edge", 0, 0.30, mse=0.050, rank1=0.10, psnr=13.0),
        record("edge", 0, 0.29, mse=0.012, rank1=0.95, psnr=19.0, attack="linear_inverse"),
        record("floor", None, 0.25, attack="mean_image")])
    rows = {row["key"]: row["edge"] for row in comparison(make_summary(), audit)}
    assert (rows["ssim"], rows["mse"], rows["rank1"], rows["psnr"]) == (0.30, 0.012, 0.95, 19.0)


def test_an_attack_that_broke_off_was_tried() -> None:
    audit = make_audit()
    audit.flags.append({"name": "attack_failed", "meaning": "", "advice": "", "subject": "edge",
                        "attack": "rmle", "attack_seed": 0})
    told = " ".join(limits(make_summary(), audit))
    assert "Broken off, with one seed at least: rmle." in told
    assert "Only these attacks gave a result" in told
    assert "was tried." not in told


def test_limits_follow_the_attacks_that_ran() -> None:
    assert any("No white-box" in text for text in limits(make_summary(), make_audit()))
    audit = make_audit()
    audit.records.append(record("edge", 0, 0.2, attack="rmle"))
    assert not any("No white-box" in text for text in limits(make_summary(), audit))


def mixed() -> AuditReport:
    audit = make_audit()
    audit.records += [
        record("edge", 0, 0.41234, attack="rmle", box="white"),
        record("edge", 0, 0.35, attack="rmle", box="white", attacker_images=100),
        record("edge", 0, 0.30, attack="rmle", box="white", attacker_data="shifted"),
        record("undefended", 0, 0.91, attack="linear_inverse"),
        record("floor", None, 0.2, attack="nearest_image", box="black"),
    ]
    return audit


def test_every_attack_has_a_line_and_the_strongest_of_each_subject_is_marked() -> None:
    rows = attack_rows(mixed().records)
    assert [(r["subject"], r["attack"], r["attacker"], r["seeds"]) for r in rows] == [
        ("undefended", "linear_inverse", "1,000", 1), ("undefended", "inverse_network", "1,000", 2),
        ("edge", "rmle", "1,000", 1), ("edge", "rmle", "100", 1),
        ("edge", "rmle", "1,000, other", 1), ("edge", "inverse_network", "1,000", 2),
        ("floor", "nearest_image", "1,000", 1), ("floor", "mean_image", "1,000", 1),
    ]
    assert [r["ssim"] for r in rows if r["strongest"]] == [0.91, 0.41234, 0.2]
    assert rows[5]["ssim"] == pytest.approx((0.28123 + 0.28719) / 2)


def test_the_page_names_the_strongest_attack_and_shows_all(tmp_path: Path) -> None:
    audit = mixed()
    text = headline(make_summary(), audit)
    assert "the strongest of the 2 attacks tried, rmle," in text
    assert "0.41 instead of 0.91" in text and "average picture gives 0.13" in text
    page = Page(write_report(make_summary(), audit, tmp_path).read_text(encoding="utf-8"))
    shown = " ".join(page.text.split())
    assert "white-box optimisation" in shown and "by least squares" in shown
    assert "Every kind of attack" in shown and "nearest_image" in shown
    assert "No white-box" not in shown and "owned 1,000 pictures" in shown
    twin = json.loads((tmp_path / "report.json").read_text())
    assert [row["attack"] for row in twin["attacks"] if row["strongest"]] == [
        "linear_inverse", "rmle", "nearest_image"
    ]
    console = Console(width=160, file=io.StringIO())
    console.print(attack_table(audit))
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert "0.412" in told and "1,000, other" in told and "nearest_image" in told
    assert flag_lines(audit.flags) == [
        "not_converged (PATROL, inverse_network, seed 0; PATROL, inverse_network, seed 1): "
        "The attack was <still> improving. Raise epochs."
    ]


def test_console_table_shows_the_same_numbers() -> None:
    console = Console(width=140, file=io.StringIO())
    console.print(console_table(make_summary(), make_audit()))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for shown in ("4,700,161", "9,437,184", "95.8%", "0.287", "0.873", "0.125"):
        assert shown in text


def test_markdown_table() -> None:
    rows = [
        {"method": "a|b", "ssim": 0.71249, "edge_macs": 1234567, "ok": True},
        {"method": "dense", "ssim": None, "edge_macs": 3},
    ]
    headings = {"method": "Method", "ssim": "SSIM", "edge_macs": "MACs", "ok": "ok"}
    table = render_table(rows, headings)
    assert table == (
        "| Method | SSIM | MACs | ok |\n"
        "| --- | ---: | ---: | --- |\n"
        "| a\\|b | 0.712 | 1,234,567 | yes |\n"
        "| dense | – | 3 | – |\n"
    )
    with pytest.raises(InputError, match="at least one column"):
        render_table(rows, [])


@pytest.mark.parametrize(
    ("count", "text"),
    [(2359296, "2.36 M"), (4.7e9, "4.7 G"), (20480, "20.5 k"), (999, "999"), (0, "0")],
)
def test_short(count: float, text: str) -> None:
    assert short(count) == text


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("accuracy", 0.7934, "79.3%"), ("ssim", 0.28719, "0.287"), ("mse", 0.04912, "0.0491"),
        ("edge_macs", 2359296.0, "2,359,296"), ("attack", None, "–"), ("psnr", float("inf"), "∞"),
        ("plateau", False, "no"),
    ],
)
def test_number(key: str, value: Any, text: str) -> None:
    assert number(key, value) == text


def test_many_layers_fit_one_figure() -> None:
    data = figures.channels({f"layer{i}": (i + 1, 2 * i + 2) for i in range(150)})
    width, height = Image.open(io.BytesIO(data)).size
    assert height < width


def test_a_picture_of_the_wrong_kind_is_refused() -> None:
    with pytest.raises(InputError, match="uint8"):
        figures.png(np.zeros((8, 8, 3)))


def test_removed_blocks_are_told(tmp_path: Path) -> None:
    one = write_report(make_summary(removed_blocks=["layer1.<1>"]), make_audit(), tmp_path / "a")
    page = one.read_text(encoding="utf-8")
    assert "1 residual block was removed whole: layer1.&lt;1&gt;." in page
    assert "<code>layer1.&lt;1&gt;</code>" in page
    two = write_report(make_summary(removed_blocks=["a", "b"]), make_audit(), tmp_path / "b")
    assert "2 residual blocks were removed whole: a, b." in two.read_text(encoding="utf-8")
    none = write_report(make_summary(), make_audit(), tmp_path / "c").read_text(encoding="utf-8")
    assert "removed whole" not in none and "Residual blocks removed" not in none
