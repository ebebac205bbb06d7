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
        "9 passed", "27 of 30", "3 survived", "mask dropped", "6000 cases", "1 findings",
        "1 regressions", "3 clean", "100000", "10 days", "2 days", "current", "1.07",
        "python -m verify replay crash-scatter2scatter-0a1b2c3d.json",
        "qwen3.t2048", "6.00", "2.10",
    ):  # fmt: skip
        assert words in text, words


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
    assert {row[5] for row in where.rows} == {"stale: lora_forward"}


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
    assert lines({"kernel": moments["kernel"][:1]}, title="one", unit="ms") == ""
    assert bars({}, title="none", unit="") == ""


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
window.addEventListener("error", event => document.body.dataset.errors = event.message);
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
  document.body.dataset.found = JSON.stringify({folds: folds.length, turned, wide,
    lost: lost.length, small: small.length, title: document.title});
});
</script></body>"""


@pytest.mark.browser
@pytest.mark.parametrize(("name", "size"), [("phone", (500, 900)), ("desktop", (1280, 900))])
def test_the_page_works_in_a_browser(html, tmp_path, name, size):
    browser = next((found for found in map(shutil.which, BROWSERS) if found), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    page = tmp_path / "page.html"
    probed = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    page.write_text(probed.replace("</body>", PROBE))
    command = [
        browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={size[0]},{size[1]}",
        "--virtual-time-budget=4000",
    ]  # fmt: skip
    ran = subprocess.run(
        [*command, "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "CONSOLE" not in ran.stderr
    match = re.search(r'data-found="([^"]*)"', ran.stdout)
    assert match, ran.stdout[-2000:] + ran.stderr[-2000:]
    assert "data-errors" not in ran.stdout.partition("<script>")[0]
    found = json.loads(match.group(1).replace("&quot;", '"'))
    assert found["folds"] > 5
    assert found == {
        "folds": found["folds"], "turned": found["folds"], "wide": 0, "lost": 0, "small": 0,
        "title": "scattermoe_lora: what is verified",
    }  # fmt: skip


@pytest.mark.correctness
def test_directories_of_what_is_written_are_made(records, tmp_path):
    files = [tmp_path / "new" / name / "report" for name in ("html", "markdown")]
    words = ["report", str(records), "--html", str(files[0]), "--markdown", str(files[1])]
    assert on_the_cpu(words) == 0
    assert all(file.stat().st_size for file in files)
