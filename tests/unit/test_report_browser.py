"""The report in a browser: every figure is drawn, there are no errors, and it fits a phone."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_records import HOSTILE, cost, records, trial, write_folder

from gradcost.report import html
from gradcost.report.quality import pictures
from gradcost.results.rankings import rankings
from gradcost.results.records import read

# Shows the page in a frame of a given width, presses the first method of the legend, and returns what it observed.
_OBSERVE = """
const frame = document.querySelector("iframe");
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const shown = (page, selector) => [...page.querySelectorAll(selector)].filter((each) => !each.hidden);
const ask = (page, view) => {
  const budget = page.getElementById("budget"), slider = budget.querySelector("input[type=range]");
  const table = page.querySelector("table.decision"), said = () => budget.querySelector(".reply").textContent;
  const rows = () => shown(page, "table.decision tbody tr").map((row) => row.dataset.method);
  const set = (value) => { slider.value = value; slider.dispatchEvent(new view.Event("input")); };
  const found = { all: said(), rows: rows(), closed: page.querySelectorAll("details:not([open])").length };
  set("300");
  found.less = said();
  set("0");
  found.least = said();
  found.number = page.querySelectorAll("table.decision tbody tr").length;
  found.over = page.querySelectorAll("tr.over").length;
  const flops = page.querySelector('input[name="budget"][value="flops"]');
  if (!flops) return found;  // the page of a plan
  flops.click();
  found.all_flops = said();
  found.picture = shown(page, ".choice").map((choice) => choice.id);
  set("500");
  found.flops = said();
  found.amount = budget.querySelector("output").textContent;
  page.querySelector('input[name="axis"][value="accuracy-memory"]').click();
  found.back = page.querySelector('input[name="budget"]:checked').value;
  table.querySelectorAll("th button")[3].click();
  found.by_memory = rows();
  table.querySelectorAll("th button")[3].click();
  found.by_memory_again = rows();
  const search = page.querySelector(".search input");
  search.value = "mezo";
  search.dispatchEvent(new view.Event("input"));
  found.searched = rows();
  search.value = "";
  search.dispatchEvent(new view.Event("input"));
  page.querySelector('.more:not([hidden])')?.click();
  found.unfolded = rows();
  const fold = page.getElementById("cost");
  fold.open = true;
  found.width = fold.querySelector(".drawing svg").clientWidth;
  found.saves = shown(page, ".save").length;
  found.links = [...page.querySelectorAll("nav a")].map((link) => link.getAttribute("href"));
  found.entries = [...page.querySelector(".legend").querySelectorAll("button")].map((each) => each.textContent);
  return found;
};
const faded = (page) => page.querySelectorAll('.drawing [opacity="0.1"]').length;
(async () => {
  while (!frame.contentDocument?.documentElement?.dataset?.drawn) await wait(20);
  const page = frame.contentDocument, view = frame.contentWindow;
  const observed = { width: page.documentElement.scrollWidth, before: faded(page) };
  observed.paper = view.getComputedStyle(page.body).backgroundColor;
  observed.label = view.getComputedStyle(page.querySelector(".role-axis-label text")).fill;
  observed.drawing = page.querySelector(".drawing svg").clientWidth;
  observed.panels = [...page.querySelectorAll(".panel")].map((panel) => panel.id);
  const dot = page.querySelector("#accuracy-memory .mark-symbol:last-of-type path");
  if (dot) {  // the page of a plan has none
    const at = dot.getBoundingClientRect(), where = { clientX: at.x + at.width / 2, clientY: at.y + at.height / 2 };
    for (const type of ["pointerover", "pointermove"]) {
      dot.dispatchEvent(new view.PointerEvent(type, { bubbles: true, view, ...where }));
    }
    await wait(300);
  }
  const tip = page.getElementById("vg-tooltip-element");
  observed.tip = tip?.classList.contains("visible") ? tip.textContent : "";
  page.querySelector(".legend button").click();
  await wait(300);
  observed.after = faded(page);
  page.querySelector(".legend button").click();
  await wait(300);
  observed.again = faded(page);
  observed.questions = ask(page, view);
  await wait(300);
  observed.problems = page.getElementById("problems").textContent;
  const output = document.createElement("pre");
  output.id = "observed";
  output.textContent = JSON.stringify(observed);
  frame.replaceWith(output);
})();
"""


class Drawn(HTMLParser):
    """Counts the marks in each figure, and collects the page's errors."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: dict[str, int] = {}
        self.drawing, self.inside, self.problems = "", "", ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        kinds = (found.get("class") or "").split()
        self.inside = found.get("id") or ""
        if "drawing" in kinds:
            self.drawing = self.inside
            self.marks[self.drawing] = 0
        elif tag == "figcaption":
            self.drawing = ""
        elif self.drawing and tag == "g" and "role-mark" in kinds:
            self.marks[self.drawing] += 1

    def handle_data(self, data: str) -> None:
        if self.inside == "problems":
            self.problems += data


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium is installed")
    return found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = [line for line in records() if line["kind"] != "refused"]
    lines += [trial(HOSTILE, test={"loss": 0.1, "accuracy": 0.9}), cost(HOSTILE, 30_000, 1.0, "Probing()")]
    return html.write(write_folder(tmp_path_factory.mktemp("results"), lines, memory=48 * 1024))


def opened(chromium: str, page: Path, profile: Path, dark: bool = False) -> str:
    """The document after its scripts have run."""
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    flags += " --proxy-server=127.0.0.1:9"  # no server listens there, so the network is off
    flags += " --disable-component-update --disable-sync --disable-quic --virtual-time-budget=20000 --dump-dom"
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    ran = subprocess.run(
        [chromium, *flags.split(), scheme, f"--user-data-dir={profile}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return ran.stdout


def observed(chromium: str, report: Path, folder: Path, width: int, dark: bool = False) -> dict[str, Any]:
    page = folder / "frame.html"
    frame = f'<iframe srcdoc="{escape(report.read_text("utf-8"))}" style="border:0;width:{width}px;height:900px">'
    page.write_text(f'<meta charset="utf-8">{frame}</iframe><script>{_OBSERVE}</script>', "utf-8")
    output = opened(chromium, page, folder / "profile", dark).split('<pre id="observed">')[1]
    return json.loads(unescape(output.split("</pre>")[0]))


def test_every_figure_has_marks_and_there_are_no_errors(chromium: str, report: Path, tmp_path: Path):
    text = opened(chromium, report, tmp_path)
    drawn = Drawn()
    drawn.feed(text)
    assert set(drawn.marks) == {
        *("accuracy-memory", "quality-flops", "quality-seconds", "quality-steps", "validation-loss"),
        *("training-loss", "memory", "forwards", "milliseconds"),
        *("estimate-cosine", "estimate-error", "slope-spikes", "tuning", "tuning-points", "time-to-target"),
    }
    assert all(count >= 3 for count in drawn.marks.values())
    assert 'data-drawn="15"' in text
    assert drawn.problems.strip() == ""


@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_fits_its_window_and_the_legend_fades_the_others(
    chromium: str, report: Path, tmp_path: Path, width: int
):
    found = observed(chromium, report, tmp_path, width)
    assert found["problems"].strip() == ""
    assert found["width"] <= width
    assert 300 < found["drawing"] <= width
    assert found["before"] == found["again"] == 0
    assert found["after"] > 10
    assert found["panels"] == ["equal-memory", "equal-flops", "equal-seconds", "equal-steps"]
    assert "method" in found["tip"]


def asked(chromium: str, page: Path, folder: Path, width: int = 1440) -> dict[str, Any]:
    return observed(chromium, page, folder, width)["questions"]


def test_the_slider_answers_for_a_budget_of_memory_and_of_flops(chromium: str, report: Path, tmp_path: Path):
    found = asked(chromium, report, tmp_path)
    assert found["all"].startswith("Use accumulated(4)") or found["all"].startswith("Use checkpointed()")
    assert "validation accuracy" in found["all"]
    assert "without backprop: " in found["all"]
    assert "methods do not fit." in found["less"]
    assert found["least"].startswith("Use mezo()")
    assert "No method with backprop fits this budget." in found["least"]
    assert found["over"] == found["number"] - 1
    assert found["picture"] == ["choice-quality-flops"]
    picked, rest = found["all_flops"].removeprefix("Use ").split(": ", 1)
    ranking = next(each for each in rankings(read(report.parent)) if each.name == "flops")
    standing = next(each for each in ranking.standings if each.method == picked)
    low, middle, high = (
        f"{100 * x:.1f}%" for x in (standing.accuracy.low, standing.accuracy.median, standing.accuracy.high)
    )
    steps = math.floor(standing.steps)
    assert rest.startswith(f"{middle} [{low}, {high}] validation accuracy after {steps} steps")
    assert " steps, " in found["flops"]
    assert found["amount"].endswith("FLOP")
    assert found["back"] == "memory"


def test_the_table_is_sorted_searched_and_unfolded(chromium: str, tmp_path: Path):
    """Three settings of one family are one row, until the reader asks for the others."""
    lines = records()
    for probes, peak in ((2, 50_000), (4, 60_000)):
        name, estimator = f"forward_gradient(probes={probes})", f"Probing(slope=Jvp(), probes={probes})"
        lines += [
            trial(name, lr=0.03, seed=s, estimator=estimator, test={"loss": 1, "accuracy": 0.5}) for s in (0, 1)
        ]
        lines.append(cost(name, peak, 1.0, estimator))
    page = html.write(write_folder(tmp_path / "r", [line for line in lines if line["kind"] != "refused"]))
    found = asked(chromium, page, tmp_path)
    assert len(found["rows"]) == 5
    assert "forward_gradient(probes=2)" not in found["rows"]
    assert found["by_memory"][0] == "mezo()"
    assert found["by_memory"] == found["by_memory_again"][::-1]
    assert found["searched"] == ["mezo()"]
    assert set(found["unfolded"]) == {*found["rows"], "forward_gradient(probes=2)", "forward_gradient(probes=4)"}
    assert found["closed"] >= 5
    assert 300 < found["width"] < 800
    assert found["saves"] >= 10
    assert {"#answer", "#picture", "#table", "#certainty", "#cost", "#where"} <= set(found["links"])


def test_methods_with_the_same_runs_are_one_entry_and_one_curve(chromium: str, tmp_path: Path):
    lines = [line for line in records() if line["method"] in ("backprop()", "mezo()")]
    lines += [
        {
            **line,
            "trial": f"{line.get('trial')}00",
            "method": "checkpointed()",
            "estimator": "Reverse(saving=Blocks())",
        }
        for line in lines
        if line["method"] == "backprop()"
    ]
    folder = write_folder(tmp_path / "r", lines)
    assert asked(chromium, html.write(folder), tmp_path)["entries"] == ["backprop() = checkpointed()", "mezo()"]
    steps = next(figure for figure in pictures(read(folder)) if figure.name == "quality-steps")
    drawn = {row["method"] for rows in steps.spec["datasets"].values() for row in rows if "method" in row}
    assert drawn == {"backprop()", "mezo()"}


def test_dark_and_light_differ_in_the_figures_too(chromium: str, report: Path, tmp_path: Path):
    for side in ("light", "dark"):
        (tmp_path / side).mkdir()
    light = observed(chromium, report, tmp_path / "light", 1200)
    dark = observed(chromium, report, tmp_path / "dark", 1200, dark=True)
    assert light["paper"] != dark["paper"]
    assert light["label"] != dark["label"]
