"""The report in a browser: every figure is drawn, there are no errors, and it fits a phone."""

from __future__ import annotations

import json
import shutil
import subprocess
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_records import HOSTILE, cost, records, trial, write_folder

from gradcost.report import html

# Shows the page in a frame of a given width, presses the first method of the legend, and returns what it observed.
_OBSERVE = """
const frame = document.querySelector("iframe");
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
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
        *("accuracy-memory", "validation-loss", "validation-loss-samples", "validation-loss-flops"),
        *("validation-loss-seconds", "training-loss", "memory", "forwards", "milliseconds"),
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


def test_dark_and_light_differ_in_the_figures_too(chromium: str, report: Path, tmp_path: Path):
    for side in ("light", "dark"):
        (tmp_path / side).mkdir()
    light = observed(chromium, report, tmp_path / "light", 1200)
    dark = observed(chromium, report, tmp_path / "dark", 1200, dark=True)
    assert light["paper"] != dark["paper"]
    assert light["label"] != dark["label"]
