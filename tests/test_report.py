"""The report says what the records say, in a browser too."""

import json
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest
import sample_records
from commands import on_the_cpu

from verify.html_report import page_of, render
from verify.plots import Point, bars, lines, roofline
from verify.qualify import STAGES
from verify.report_records import collect

pytest.importorskip("jinja2", reason="the report needs the dev extra")
ROOT = Path(__file__).parent.parent
NOW = datetime(2026, 11, 11, 10, tzinfo=UTC)
TODAY = dict.fromkeys(sample_records.KERNELS, "0123456789abcdef")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture
def records(tmp_path) -> Path:
    for name, values in sample_records.every().items():
        file = tmp_path / "records" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    return tmp_path / "records"


@pytest.fixture
def html(records) -> str:
    return render(page_of(collect([records]), fingerprint=TODAY, now=NOW), "report.html")


class Outline(HTMLParser):
    """Ids, links, and what a page loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids, self.links, self.loads, self.tags, self.images = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        if tag == "a":
            self.links.append(values["href"])
        elif tag == "svg" and values.get("role") == "img":
            self.images.append(values["aria-label"])
        else:
            self.loads += [values[name] for name in ("src", "href", "data") if name in values]


@pytest.mark.correctness
def test_the_page_says_what_the_records_say(html):
    text = re.sub(r"<[^>]+>", " ", html)
    for words in (
        "9 passed", "27 of 30", "3 survived", "mask dropped", "6000 cases", "1 finding",
        "1 regression", "2 of 60 benchmarks", "3 clean", "100000", "10 days", "2 days", "current",
        "1.07",
        "python -m verify replay crash-scatter2scatter-0a1b2c3d.json",
        "qwen3.t2048", "6.00", "2.10",
    ):  # fmt: skip
        assert words in text, words


@pytest.mark.correctness
def test_a_function_whose_mutants_are_all_equivalent_has_no_score(records):
    values = sample_records.mutants()
    values["scores"]["equal"] = {"killed": 0, "total": 0, "equivalent": 2, "invalid": 1}
    values["scores"]["whole"] = {"killed": 4, "total": 4, "equivalent": 0, "invalid": 0}
    (records / "mutants.json").write_text(json.dumps(values))
    page = page_of(collect([records]), fingerprint=TODAY, now=NOW)
    (section,) = [section for section in page.sections if section.id == "mutants"]
    drawn = "".join(section.plots)
    assert ">equal<" not in drawn
    assert ">whole<" not in drawn
    assert all(f">{kernel}<" in drawn for kernel in sample_records.KERNELS)
    assert ("equal", "2", "1", "0", "0") in [tuple(row[-5:]) for row in section.rows]


@pytest.mark.correctness
def test_the_page_loads_nothing_and_its_links_lead_somewhere(html):
    outline = Outline(html)
    assert outline.loads == ["data:,"]
    assert "script" not in outline.tags
    assert not re.search(r"url\(|@import", html)
    assert len(outline.ids) == len(set(outline.ids))
    assert {link.removeprefix("#") for link in outline.links} <= set(outline.ids)
    assert len(outline.links) >= 10
    assert all(len(words) > 20 for words in outline.images)
    assert len(outline.images) >= 5


@pytest.mark.correctness
def test_words_of_a_record_are_never_markup(html, records):
    assert sample_records.HOSTILE not in html
    assert "&lt;script&gt;" in html
    markdown = render(page_of(collect([records]), fingerprint=TODAY, now=NOW), "report.md")
    rows = [line for line in markdown.splitlines() if "document.title" in line and "|" in line]
    assert rows
    assert all("\\|" in line for line in rows if line.startswith("|"))


@pytest.mark.correctness
def test_changed_sources_make_a_record_stale(records):
    changed = TODAY | {"lora_forward": "f" * 16}
    page = page_of(collect([records]), fingerprint=changed, now=NOW)
    (where,) = [section for section in page.sections if section.id == "where"]
    assert {row[-1] for row in where.rows} == {"stale: lora_forward"}
    assert {tile.state for tile in page.tiles} == {"bad", "none"}
    assert any(tile.note == "0 with errors, of older sources" for tile in page.tiles)


@pytest.mark.correctness
def test_a_kernel_that_was_not_checked_makes_no_record_of_checks_stale(records):
    unchecked = {"experts_mlp": "0" * 16}
    values = sample_records.check()
    values |= {"fingerprint": values["fingerprint"] | unchecked}
    (records / "check.json").write_text(json.dumps(values))
    page = page_of(collect([records]), fingerprint=dict.fromkeys(unchecked, "f" * 16), now=NOW)
    (where,) = [section for section in page.sections if section.id == "where"]
    assert not any(row[-1].startswith("stale") for row in where.rows if row[0] == "check")
    assert "experts_mlp" not in sample_records.KERNELS


@pytest.mark.correctness
def test_many_changed_kernels_are_counted_and_named_below(records):
    values = sample_records.sanitize() | {"fingerprint": dict.fromkeys("abcde", "0" * 16)}
    (records / "sanitize.json").write_text(json.dumps(values))
    changed = dict.fromkeys("abcd", "f" * 16)
    page = page_of(collect([records]), fingerprint=changed, now=NOW)
    (where,) = [section for section in page.sections if section.id == "where"]
    assert any(row[-1] == "stale: 4 of 5 kernels" for row in where.rows)
    assert ("kernels that have changed", "sanitize.json: a, b, c, d") in where.folds


@pytest.mark.correctness
def test_records_of_other_names_stand_beside_each_other(records):
    """A record of some cases does not hide the one of the others."""
    model = sample_records.check()
    more = [sample_records.outcome("shrink", "bfloat16", case="model")]
    counts = {"passed": 1, "failed": 0, "errors": 0, "unavailable": 0, "total": 1}
    model |= {"started": "2026-11-10T10:00:00+00:00", "outcomes": more, "summary": counts}
    (records / "check-model.json").write_text(json.dumps(model))
    layers = sample_records.bench(10, slower=1.5)
    layers["benchmarks"] = layers["benchmarks"][2:3]
    (records / "bench-layers.json").write_text(json.dumps(layers))
    page = page_of(collect([records]), fingerprint=TODAY, now=NOW)
    sections = {section.id: section for section in page.sections}
    assert {row[0] for row in sections["errors"].rows} == {*sample_records.KERNELS, "shrink"}
    assert len(sections["failures"].rows) == 1
    assert {"check", "check-model", "bench", "bench-layers"} <= {
        row[0] for row in sections["where"].rows
    }
    titles = [tile.title for tile in page.tiles if tile.title.startswith("checks")]
    machine = sample_records.MACHINE["device"]
    assert titles == [f"checks on {machine}", f"checks on {machine} (check-model)"]
    times = {row[0]: row[2] for row in sections["speed"].rows}
    assert times == {
        "kernel.qwen3.t2048.r16": "0.360", "kernel.mixtral.t2048.r16": "1.770",
        "layer.qwen3.t2048.r16": "2.400", "layer.qwen3.t8192.r16": "3.000",
    }  # fmt: skip
    (plot,) = sections["history"].plots
    floors = re.findall(r"<title>layer [^:]+:\d+:\d+\+00:00: ([\d.]+)</title>", plot)
    assert floors == ["1.920", "1.600", "2.400"]


@pytest.mark.correctness
def test_times_are_drawn_over_the_rank_from_three_ranks_on(records):
    values = sample_records.bench(9)
    (entry, other) = values["benchmarks"][:2]
    for rank, ms in ((128, 1.75), (8, 1.25)):
        more = entry | {"name": entry["name"].replace("r16", f"r{rank}"), "R": rank, "ms": ms}
        values["benchmarks"].append(more)
    values["benchmarks"].append(other | {"name": other["name"].replace("r16", "r64"), "R": 64})
    (records / "bench.json").write_text(json.dumps(values))
    page = page_of(collect([records]), fingerprint=TODAY, now=NOW)
    (section,) = [section for section in page.sections if section.id == "speed"]
    (plot,) = [plot for plot in section.plots if "by rank" in plot]
    name = entry["name"].removesuffix(".r16")
    assert f"<figcaption>{name} by rank, {values['environment']['device']}<" in plot
    drawn = re.findall(r">(rank \d+)<.*?>([\d.]+ ms)<", plot)
    assert drawn == [
        ("rank 8", "1.25 ms"), ("rank 16", f"{entry['ms']:.2f} ms"), ("rank 128", "1.75 ms"),
    ]  # fmt: skip


@pytest.mark.correctness
def test_each_plot_says_of_which_machine_it_is(records):
    other = "Another <GPU>"
    for name in ("check", "mutants", "bench"):
        values = json.loads((records / f"{name}.json").read_text())
        values["environment"] = values["environment"] | {"device": other}
        (records / f"{name}-other.json").write_text(json.dumps(values))
    page = page_of(collect([records]), fingerprint=TODAY, now=NOW)
    captions = re.findall("<figcaption>(.*?)</figcaption>", render(page, "report.html"))
    machines = {sample_records.MACHINE["device"], "Another &lt;GPU&gt;"}
    for what in ("worst error", "mutants killed", "roofline", "times faster"):
        mine = [caption for caption in captions if caption.startswith(what)]
        assert {caption.rpartition(", ")[2] for caption in mine} == machines, what


@pytest.mark.correctness
@pytest.mark.parametrize(
    ("passed", "failed", "state"),
    [(len(STAGES), 0, "good"), (len(STAGES) - 1, 0, "none"), (1, 1, "bad")],
)
def test_a_gpu_is_qualified_where_every_stage_passed(tmp_path, passed, failed, state):
    stages = [{"name": "doctor"}, {"name": "check"}]
    summary = {"passed": passed, "failed": failed}
    values = sample_records.head("qualify", summary=summary, stages=stages)
    (tmp_path / "qualify.json").write_text(json.dumps(values))
    (tile,) = page_of(collect([tmp_path]), fingerprint=TODAY, now=NOW).tiles
    assert (tile.value, tile.state) == (f"{passed} of {len(STAGES)} stages", state)
    assert tile.title == f"qualified on {sample_records.MACHINE['device']}"


@pytest.mark.correctness
@pytest.mark.parametrize(
    ("decisions", "invalid", "state", "note"),
    [
        (("same",) * 60, [], "good", "60 of 60 benchmarks"),
        (("same",) * 59, [], "none", "59 of 60 benchmarks"),
        (("same",) * 58 + ("ambiguous", "unmeasured"), [], "none", "2 not decided"),
        (("same",) * 60, ["a peer took 2 ms"], "none", "1 measured beside a peer"),
        (("same",) * 59 + ("regression",), [], "bad", "60 of 60 benchmarks"),
        ((), [], "none", "0 of 60 benchmarks"),
    ],
)
def test_a_gate_that_did_not_decide_is_not_green(tmp_path, decisions, invalid, state, note):
    entries = [
        {"name": f"b{place}", "decision": decision, "ratio": 1.0, "reason": ""}
        for place, decision in enumerate(decisions)
    ]
    values = sample_records.head("gate", summary={"invalid": invalid}, benchmarks=entries)
    (tmp_path / "gate.json").write_text(json.dumps(values))
    (tile,) = page_of(collect([tmp_path]), fingerprint=TODAY, now=NOW).tiles
    assert tile.state == state
    assert note in tile.note


@pytest.mark.correctness
def test_what_the_gate_promises_and_found_of_planted_slowdowns_is_told(tmp_path):
    rates = {
        "false_alarms": 0, "draws": 2000, "benchmarks": 60, "false_alarm_rate_at_most": 0.0015,
        "undecided_suites": 3, "slowdown": 0.05, "power": 0.9985, "weakest": "kernel.sort",
        "mean_power": 1.0, "processes": 10,
    }  # fmt: skip
    for name, values in {
        "gate-samples": sample_records.head("gate-samples", summary={}, rates=rates),
        "gate-planted-5": sample_records.head(
            "gate-planted", summary={"regression": 59, "benchmarks": 60}, plant=5.0, benchmarks=[]
        ),
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    page = page_of(collect([tmp_path]), fingerprint=TODAY, now=NOW)
    text = render(page, "report.html")
    assert "Of 60 slowdowns of 5% that were planted, 59 were found." in text
    assert "found with 99.85% where that is hardest (kernel.sort)" in text
    assert "from 10 processes" in text


@pytest.mark.correctness
def test_only_the_newest_record_of_a_machine_counts_and_history_shows_all(records):
    page = page_of(collect([records]), fingerprint=TODAY, now=NOW)
    sections = {section.id: section for section in page.sections}
    assert len(sections["speed"].rows) == 4
    (plot,) = sections["history"].plots
    assert plot.count("<circle class") == 6  # two kinds, twice, and the legend
    (records / "older" / "bench.json").unlink()
    page = page_of(collect([records]), fingerprint=TODAY, now=NOW)
    assert {s.id: s for s in page.sections}["history"].plots == ()


@pytest.mark.correctness
def test_what_is_no_record_is_named(records):
    (records / "broken.json").write_text("{")
    (records / "partial.json").write_text('{"schema": 1, "command": "check"}')
    (records / "table.json").write_text('{"plans": []}')
    found = collect([records])
    assert [name for name, _ in found.refused] == ["broken.json", "partial.json"]
    assert "it has no environment" in found.refused[1][1]
    assert "broken.json" in render(page_of(found, fingerprint=TODAY, now=NOW), "report.html")


@pytest.mark.correctness
def test_a_page_without_records_says_how_to_make_one(tmp_path):
    page = page_of(collect([tmp_path]), fingerprint=TODAY, now=NOW)
    assert "python -m verify check" in render(page, "report.html")
    assert "No records" in render(page, "report.md")


@pytest.mark.correctness
def test_plots_stay_within_their_frame():
    points = [Point(x=2.0, y=3.0, label="a"), Point(x=900.0, y=700.0, label="b", group="layer")]
    moments = {"kernel": [("2026-01-01", 1.1), ("2026-02-01", 3.0)]}
    for plot in (
        roofline(points, flops=777, bandwidth=3.0, title="roof"),
        bars({"a": 0.2, "b" * 60: 1.4}, title="bars", unit="x", mark=1.0),
        lines(moments, title="lines", unit="ms"),
    ):
        width, height = map(float, re.search(r'viewBox="0 0 (\d+) (\d+)"', plot).groups())
        drawn = plot.partition("</svg>")[0]
        for name, limit in (("cx", width), ("cy", height), ("x1", width), ("y2", height)):
            assert all(0 <= float(v) <= limit for v in re.findall(rf'\b{name}="([^"]+)"', drawn))
    uneven = {"kernel": moments["kernel"][1:], "layer": [("2026-01-01", 2.0)]}
    places = re.findall(r'cx="([\d.]+)"[^>]*><title>', lines(uneven, title="two", unit="ms"))
    assert float(places[0]) > float(places[1])
    assert lines({"kernel": moments["kernel"][:1]}, title="one", unit="ms") == ""
    assert bars({}, title="none", unit="") == ""


@pytest.mark.correctness
def test_names_of_bars_are_never_cut():
    short, long = "lora_weight_grad bfloat16", "transformers grouped_mm, no adapter"
    assert f'text-anchor="end">{short}<' in bars({short: 1.0}, title="short", unit="")
    plot = bars({short: 0.2, long: 1.4}, title="long", unit="x", mark=1.0)
    for name in (short, long):
        assert re.search(f'<text x="0" y="[^"]+">{name}<', plot), name


def test_the_command_writes_both_forms(records, tmp_path):
    page, summary = tmp_path / "out" / "report.html", tmp_path / "summary.md"
    summary.write_text("before\n")
    ran = subprocess.run(
        [sys.executable, "-m", "verify", "report", str(records), "--html", str(page),
         "--markdown", str(summary)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert page.read_text().startswith("<!doctype html>")
    assert summary.read_text().startswith("before\n# scattermoe_lora")
    assert len(summary.read_bytes()) < 1024 * 1024


PROBE = """<script>
window.addEventListener("error", event => parent.postMessage("error: " + event.message, "*"));
window.addEventListener("load", () => {
  const folds = [...document.querySelectorAll("details")];
  const before = folds.map(fold => fold.open);
  document.querySelectorAll("summary").forEach(summary => summary.click());
  const turned = folds.filter((fold, place) => fold.open !== before[place]).length;
  folds.forEach(fold => fold.open = true);
  const lost = [...document.querySelectorAll("a")].filter(link => {
    link.click(); return !document.querySelector(":target"); });
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const small = [...document.querySelectorAll("nav a, summary")].filter(
    item => item.getBoundingClientRect().height < 24);
  const cut = [...document.querySelectorAll(".plot text")].filter(text => {
    const box = text.getBBox(), frame = text.ownerSVGElement.viewBox.baseVal;
    return box.x < -1 || box.x + box.width > frame.width + 1; });
  parent.postMessage(JSON.stringify({folds: folds.length, turned, wide, lost: lost.length,
    small: small.length, cut: cut.map(text => text.textContent), across: innerWidth,
    title: document.title}), "*");
});
</script></body>"""
# Chromium's windows are never narrower than 500 pixels; a frame is.
FRAME = """<!doctype html><body>
<iframe src="page.html" style="width: {}px; height: {}px; border: 0"></iframe><script>
addEventListener("message", event => document.body.dataset.found = event.data);
</script></body>"""


@pytest.mark.browser
@pytest.mark.parametrize(("name", "size"), [("phone", (390, 844)), ("desktop", (1280, 900))])
def test_the_page_works_in_a_browser(html, tmp_path, name, size):
    browser = next((found for found in map(shutil.which, BROWSERS) if found), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    probed = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    (tmp_path / "page.html").write_text(probed.replace("</body>", PROBE))
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(*size))
    command = [
        browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        "--no-first-run", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", "--disable-quic", f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1400,1000", "--virtual-time-budget=4000",
    ]  # fmt: skip
    ran = subprocess.run(
        [*command, "--dump-dom", frame.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "CONSOLE" not in ran.stderr
    match = re.search(r'data-found="([^"]*)"', ran.stdout)
    assert match, ran.stdout[-2000:] + ran.stderr[-2000:]
    found = json.loads(match.group(1).replace("&quot;", '"'))
    assert found["folds"] > 5
    assert found == {
        "folds": found["folds"], "turned": found["folds"], "wide": 0, "lost": 0, "small": 0,
        "cut": [], "across": size[0], "title": "scattermoe_lora: what is verified",
    }  # fmt: skip


@pytest.mark.correctness
def test_directories_of_what_is_written_are_made(records, tmp_path):
    files = [tmp_path / "new" / name / "report" for name in ("html", "markdown")]
    words = ["report", str(records), "--html", str(files[0]), "--markdown", str(files[1])]
    assert on_the_cpu(words) == 0
    assert all(file.stat().st_size for file in files)
