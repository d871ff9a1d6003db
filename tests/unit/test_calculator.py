"""The calculator in a browser: its controls give the figures of `gradcost plan`, offline and without an error."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest
from test_plan_cli import MINE
from test_report_browser import chromium, opened

from gradcost.core.units import number, size
from gradcost.report import calculator
from gradcost.report.pages import packaged
from in_process import inside

__all__ = ["chromium"]

FACTORY = ("--model", "mine.py:make", "--data", "mine.py:batch")
METHODS = ["backprop()", "checkpointed()", "Accumulated(checkpointed(), 2)", "mezo()", "mezo(probes=4)"]
ASKED = tuple(word for method in METHODS for word in ("--method", method))
SETTINGS = [  # memory, batch, optimizer
    ("110kB", 8, 0),
    ("90000B", 23, 0),
    ("64KiB", 30, 1),
    ("50kB", 17, 1),
    ("36kB", 40, 1),
    ("1kB", 5, 1),
]

# Shows the page in a frame, sets its controls, and returns what it observed.
_OBSERVE = """
const frame = document.querySelector("iframe"), settings = SETTINGS;
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
(async () => {
  while (!frame.contentDocument?.documentElement?.dataset?.drawn) await wait(20);
  const page = frame.contentDocument, view = frame.contentWindow, observed = { answers: [] };
  const set = (input, value, kind) => { input.value = value; input.dispatchEvent(new view.Event(kind)); };
  const rows = () => [...page.querySelectorAll("#rows tbody tr")];
  const texts = () => [...page.querySelectorAll("#rows thead th")].map((cell) => cell.textContent);
  const look = () => ({
    answer: page.getElementById("answer").textContent,
    facts: page.getElementById("facts").textContent,
    breakdown: page.getElementById("breakdown").textContent,
    shown: rows().filter((row) => !row.hidden).map((row) => row.dataset.method),
    picked: rows().filter((row) => row.classList.contains("pick")).map((row) => row.dataset.method),
    points: page.querySelectorAll("#curve .point").length,
    limits: page.querySelectorAll("#rows .stack u").length,
    cells: Object.fromEntries(rows().map((row) => [row.dataset.method, Object.fromEntries(
      [...row.cells].slice(1).map((cell) => [cell.dataset.label, cell.firstChild?.textContent ?? ""]))])),
    table: texts(),
  });
  observed.width = page.documentElement.scrollWidth;
  observed.paper = view.getComputedStyle(page.body).backgroundColor;
  for (const [memory, batch, optimizer] of settings) {
    set(page.getElementById("memory"), memory, "input");
    set(page.getElementById("batch"), String(batch), "input");
    page.querySelectorAll('input[name="axis-optimizer"]')[optimizer]?.click();
    observed.answers.push(look());
  }
  const memory = page.getElementById("memory");
  set(memory, "many", "input");
  observed.wrong = [memory.getAttribute("aria-invalid"), look().answer === observed.answers.at(-1).answer];
  set(page.getElementById("memory-slider"), "1000", "input");
  observed.most = [memory.value, look()];
  const more = page.querySelector(".more");
  more.focus();
  more.click();
  observed.unfolded = [look().shown, page.activeElement.className];
  set(page.getElementById("method"), "mezo()", "change");
  observed.mezo = look();
  page.querySelector("#curve .point").dispatchEvent(new view.MouseEvent("click"));
  observed.pressed = look().picked;
  observed.inputs = [...page.querySelectorAll("input, select, button, summary")].every((each) => each.tabIndex === 0);
  observed.problems = page.getElementById("problems").textContent;
  const output = document.createElement("pre");
  output.id = "observed";
  output.textContent = JSON.stringify(observed);
  frame.replaceWith(output);
})();
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "mine.py").write_text(MINE)
    sweep = ("--sweep", "batch=1..40,optimizer=AdamW(lr=0.001)|SGD(0.1)", "-o", "page.html")
    ran = inside("plan", *FACTORY, "--memory", "110kB", *sweep, *ASKED, "--json", folder=folder)
    assert ran.returncode == 0, ran.stderr
    (folder / "record.json").write_text(ran.stdout)
    return folder


def observed(
    chromium: str,
    page: Path,
    folder: Path,
    width: int,
    dark: bool = False,
    settings: Sequence[tuple[str, int, int]] = (),
) -> dict[str, Any]:
    """settings: the memory, and the places of the batch and of the optimizer among their values."""
    settings = settings or [(memory, batch - 1, optimizer) for memory, batch, optimizer in SETTINGS]
    outer = folder / "frame.html"
    frame = f'<iframe srcdoc="{escape(page.read_text("utf-8"))}" style="border:0;width:{width}px;height:900px">'
    script = _OBSERVE.replace("SETTINGS", json.dumps(settings))
    outer.write_text(f'<meta charset="utf-8">{frame}</iframe><script>{script}</script>', "utf-8")
    output = opened(chromium, outer, folder / "profile", dark).split('<pre id="observed">')[1]
    return json.loads(unescape(output.split("</pre>")[0]))


@pytest.fixture(scope="module")
def found(chromium: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return observed(chromium, folder / "page.html", tmp_path_factory.mktemp("browser"), 1440)


@pytest.mark.parametrize("place", range(len(SETTINGS)), ids=lambda place: " ".join(map(str, SETTINGS[place])))
def test_the_table_and_the_answer_are_those_of_a_plan(folder: Path, found: dict[str, Any], place: int):
    (memory, batch, optimizer), page = SETTINGS[place], found["answers"][place]
    options = ("--batch", str(batch), "--optimizer", ("AdamW(lr=0.001)", "SGD(0.1)")[optimizer], "--memory", memory)
    ran = inside("plan", *FACTORY, *options, *ASKED, "--json", folder=folder)
    record = json.loads(ran.stdout)
    for row in record["rows"]:
        cells = page["cells"][row["method"]]
        if row["method"].startswith("Accumulated") and batch % 2:
            assert cells["peak"] == cells["fits"] == "–"
            continue
        expected = {"peak": "peak", "fits": "fits", "forwards": "forwards", "steps": "steps × (theory)"}
        assert {name: cells[name] for name in expected} == {k: row["cells"][v] for k, v in expected.items()}
    assert record["choice"] is None or not batch % 2 or "Accumulated" not in record["choice"]
    if any(row["fits"] and row["exact"] for row in record["rows"]):
        assert page["answer"].startswith(record["sentence"])
    else:
        left = "Accumulated" if batch % 2 else "none"
        exact = [row["peak"] for row in record["rows"] if row["exact"] and not row["method"].startswith(left)]
        assert f"No exact gradient of this table fits {size(record['budget'])}." in page["answer"]
        assert f"The smallest peak: {size(min(exact))} (" in page["answer"]
        assert ("Micro-batches of unequal sizes are left out." in page["answer"]) == (batch % 2 == 1)
        assert page["answer"].startswith("Nothing" if record["choice"] is None else f"Use {record['choice']}, ")
    if record["choice"] is not None:
        assert page["picked"] == [record["choice"]]
        assert f'--batch {batch} --memory {memory} --method "{record["write"]}"' in page["answer"]
        assert page["breakdown"] == next(line for line in record["lines"] if line.startswith("peak of"))
    assert page["points"] == len(METHODS) - batch % 2
    assert ("AdamW" in page["facts"]) == (optimizer == 0)


def test_every_control_works_without_an_error(found: dict[str, Any]):
    assert found["problems"].strip() == ""
    assert found["wrong"] == ["true", True]
    text, most = found["most"]
    assert re.fullmatch(r"[\d.]+KiB", text)
    assert most["cells"]["backprop()"]["fits"] == "yes"
    assert most["limits"] == len(most["shown"])
    assert found["unfolded"] == [[*METHODS], "more"]
    assert most["shown"] == METHODS[:4]
    assert found["mezo"]["answer"].startswith("mezo() fits: ")
    assert found["mezo"]["picked"] == ["mezo()"]
    assert found["pressed"] != ["mezo()"]
    assert found["inputs"]


@pytest.mark.slow
def test_within_and_its_schedules_are_those_of_a_plan(chromium: str, folder: Path, tmp_path: Path):
    """With the default methods. The third budget is below all peaks of the whole batch, the last one below all."""
    options = (*FACTORY, "--optimizer", "SGD(0.1)")
    sweep = ("--memory", "41kB", "--sweep", "batch=16,24", "-o", "default.html")
    assert inside("plan", *options, *sweep, folder=folder).returncode == 0
    budgets = ["60kB", "44500B", "41kB", "1kB"]
    settings = [(budget, 1, 0) for budget in budgets]
    found = observed(chromium, folder / "default.html", tmp_path, 1440, settings=settings)
    assert found["problems"].strip() == ""
    for budget, page in zip(budgets, found["answers"], strict=True):
        ran = inside("plan", *options, "--batch", "24", "--memory", budget, "--json", folder=folder)
        record = json.loads(ran.stdout)
        for row in (row for row in record["rows"] if row["method"] in page["cells"]):
            cells = page["cells"][row["method"]]
            assert (cells["peak"], cells["forwards"]) == (row["cells"]["peak"], row["cells"]["forwards"])
        within = next(row for row in record["rows"] if row["method"].startswith("Within"))
        assert page["cells"][within["method"]]["peak"] == within["cells"]["peak"]
        if any(row["fits"] and row["exact"] for row in record["rows"]) and "micro-batches" not in record["choice"]:
            assert page["answer"].startswith(record["sentence"])
        elif record["least"] is not None:
            assert record["sentence"].partition(" Use ")[0].partition(" needs ")[0] in page["answer"]


@pytest.mark.parametrize(("width", "dark"), [(390, True), (1440, True)])
def test_it_fits_a_phone_and_has_a_dark_side(chromium: str, folder: Path, tmp_path: Path, width: int, dark: bool):
    found = observed(chromium, folder / "page.html", tmp_path, width, dark)
    assert found["problems"].strip() == ""
    assert found["width"] <= width
    assert found["paper"] == "rgb(20, 23, 26)"


def test_the_page_opens_from_a_file_without_a_network(chromium: str, folder: Path, tmp_path: Path):
    page = folder / "page.html"
    text = opened(chromium, page, tmp_path)
    assert 'data-drawn="1"' in text
    assert re.search(r'id="problems" hidden="?"?>\s*</div>', text)
    source = page.read_text("utf-8")
    assert len(source) < 1_500_000
    assert "default-src 'none'" in source
    assert not re.search(r"""(?:src|href)=["']?(?:https?:|//)""", source)


def test_a_combination_that_is_refused_is_a_sentence_of_the_page(chromium: str, folder: Path, tmp_path: Path):
    record = json.loads((folder / "record.json").read_text())
    record["objectives"][0] = {"choice": [0], "refusal": "These settings exclude each other."}
    text = opened(chromium, calculator.write(record, tmp_path / "page.html"), tmp_path / "profile")
    assert "<p>These settings exclude each other.</p>" in text
    assert re.search(r'id="problems" hidden="?"?>\s*</div>', text)


def test_numbers_are_formatted_as_on_the_command_line(chromium: str, folder: Path, tmp_path: Path):
    """Ties and the ends of the units included."""
    values = [0, 1, 999, 1000, 1023, 1024, 1047552, 1023488, 2**40 - 1, 2**30 * 1.125, 2**43, 2**20 * 999.5]
    rounded = [0.125, 2.5, 3.125, 0.375, 1234.5, 9.995, 99.95, 1e-7, 6738415618.0]
    source = packaged("calculator.js")
    functions = source[source.index("  const fixed =") : source.index("  const bytes =")]
    script = (
        f'const DASH = "–";{functions}; document.body.textContent = JSON.stringify([{json.dumps(values)}.map(size), '
    )
    script += f"{json.dumps(rounded)}.map((x) => [number(x), number(x, 2), fixed(x, 2)])])"
    page = tmp_path / "numbers.html"
    page.write_text(f'<meta charset="utf-8"><body><script>{script}</script></body>', "utf-8")
    text = re.search(r"<body>(.*)</body>", opened(chromium, page, tmp_path / "profile"), re.DOTALL)
    assert text is not None
    sizes, numbers = json.loads(unescape(text[1]))
    assert sizes == [size(value) for value in values]
    assert numbers == [[number(value), number(value, 2), f"{value:,.2f}"] for value in rounded]


def test_the_page_replaces_only_a_calculator(folder: Path, tmp_path: Path):
    page = tmp_path / "page.html"
    page.write_bytes((folder / "page.html").read_bytes())
    calculator.check_output(page)
    calculator.check_output(tmp_path / "new.html")
