"""Names and error messages of a stranger's records are shown as text: in the terminal, on pages and in tables."""

from __future__ import annotations

import csv
import io
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unicodedata import category
from xml.etree import ElementTree

import pytest
from report_records import cost, quality, trial, write_folder

from gradcost import SGD, BadInput, Trial, backprop
from gradcost.core.printable import printable
from gradcost.report import assets, html
from gradcost.results.records import read
from gradcost.studies.comparison import make_comparison
from gradcost.tasks import Digits
from in_process import inside

INVISIBLE = {
    "null": "a\0b",
    "bell": "a\ab",
    "backspace": "abc\b\b\b",
    "colour": "\x1b[31mred",
    "clear the screen": "\x1b[2J\x1b[H",
    "title": "\x1b]0;owned\a",
    "clipboard": "\x1b]52;c;ZXZpbA==\a",
    "hyperlink": "\x1b]8;;https://example.org\x1b\\x\x1b]8;;\x1b\\",
    "eight-bit escape": "\x9b31mred",
    "delete": "a\x7fb",
    "line feed": "a\nb",
    "carriage return": "real\rfake",
    "line ends": "a\r\nb",
    "tab": "a\tb",
    "vertical tab": "a\vb",
    "form feed": "a\fb",
    "next line": "a\x85b",
    "line separator": "a\u2028b",
    "paragraph separator": "a\u2029b",
    "right to left": "\u202egpj.exe",
    "left to right": "\u202dabc",
    "isolate": "\u2067abc\u2069",
    "mark": "a\u200fb",
    "zero width": "a\u200bb",
    "byte order mark": "\ufeffab",
    "soft hyphen": "a\xadb",
    "tag": "a\U000e0041b",
    "high surrogate": "a\ud800b",
    "low surrogate": "a\udc80b",
    "private use": "a\ue000b",
    "unassigned": "a\U0003fffdb",
}
MARKUP = {
    "script": "<script>alert(1)</script>",
    "closing script": "</script><script>alert(2)</script>",
    "image": "\"><img src=x onerror='alert(3)'>",
    "comment": "<!--",
    "template": "{{ 7 * 7 }}{% raw %}",
    "link": "[click](javascript:alert(4))",
    "table": "a | b",
    "formula": "=HYPERLINK('https://example.org')",
    "plus": "+1+cmd|' /C calc'!A0",
    "minus": "-2+3+cmd|' /C calc'!A0",
    "at": "@SUM(1)",
    "latex": r"\input{/etc/passwd} $x_1$ 50% #1 & ~ ^",
    "rich": "[bold red]x[/bold red] [link=https://example.org]y[/link]",
    "emoji": ":smile: :skull:",
    "long": "x" * 3000,
}
NAMES = list((INVISIBLE | MARKUP).values())


def hostile_folder(folder: Path, names: list[str]) -> Path:
    """A study whose methods, tasks, reasons and machine have these names."""
    lines: list[dict[str, Any]] = []
    for name in names:
        score = {"loss": 0.5, "accuracy": 0.9}
        texts = {"method": name, "estimator": name, "optimizer": name, "task": name, "note": name}
        shared = texts | {"environment": {"cpu": name}}
        failed = {"status": "failed", "reason": name, "traceback": f"Traceback:\n{name}"}
        lines += [
            cost(name, 1024, 1.0, name, operator=name, module=name, doubt=name),
            quality(name, name, 2),
            trial("", "tune", validation=score) | shared,
            trial("", "final", 0.1, 1, validation=score, test=score) | shared,
            trial("", "final", 0.1, 2) | shared | failed,
            {"schema": 1, "kind": "refused", "method": f"no {name}", "estimator": name, "reason": name},
        ]
    for line in lines:
        if "trial" in line:
            line["trial"] = f"{len(lines):x}{lines.index(line):06x}"
    return write_folder(folder, lines, task=names[0], task_name=names[0], model_name=names[-1])


def is_shown(text: str, besides: str = "\n") -> bool:
    return all(c.isprintable() or c in besides or category(c) == "Zs" for c in text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile_folder(tmp_path_factory.mktemp("hostile"), NAMES)


def test_what_cannot_be_shown_is_escaped_and_the_rest_is_unchanged():
    for name in INVISIBLE.values():
        assert is_shown(printable(name), besides="")
        assert printable(name) == name.encode("unicode_escape", "surrogatepass").decode().replace("\\\\", "\\")
    for text in (*MARKUP.values(), "Förland", "模型", "a\xa0b", "e\u0301"):
        assert printable(text) == text
    assert printable("a\n\x1b", keep="\n") == "a\n\\x1b"


def test_no_two_names_become_one(folder: Path):
    results = read(folder)
    assert results.torn == 0
    assert len({run.method for run in results.trials}) == len(NAMES)
    assert all(is_shown(text, "") for run in results.trials for text in (run.method, run.estimator, run.note or ""))


@pytest.mark.parametrize("command", ["status", "lint", "show", "why"])
def test_the_terminal_shows_names_and_obeys_none(folder: Path, command: str):
    runs = [run for run in read(folder).trials if run.status == "failed"]
    for run in runs if command in ("show", "why") else runs[:1]:
        ran = inside(command, str(folder), *([run.trial] if command in ("show", "why") else []), folder=folder)
        assert ran.returncode == 0
        assert is_shown(ran.stdout + ran.stderr, "\n\t")
        if command == "show" and "smile" in run.method:
            assert ":smile: :skull:" in ran.stdout
        if command == "show" and "bold red" in run.method:
            assert "[bold red]x[/bold red]" in ran.stdout


class Elements(HTMLParser):
    """The elements of a page, and its attributes that run or load something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on") or name in ("href", "src", "action")]


def test_names_on_the_page_are_text(folder: Path, tmp_path: Path):
    text = html.write(folder, tmp_path / "report.html").read_text("utf-8")
    page = Elements()
    page.feed(text)
    plain = Elements()
    plain.feed(html.write(hostile_folder(tmp_path / "plain", ["a", "b"]), tmp_path / "plain.html").read_text("utf-8"))
    assert page.tags.count("script") == plain.tags.count("script")
    assert page.tags.count("img") == plain.tags.count("img")
    assert page.handlers == plain.handlers
    assert "{{ 7 * 7 }}" in text
    assert is_shown(re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL), "\n\t")


def test_names_in_tables_are_text(folder: Path):
    texts = assets.written(read(folder))
    for name, text in texts.items():
        assert is_shown(text), name
        if name.endswith(".csv"):
            cells = [cell for row in csv.reader(io.StringIO(text)) for cell in row]
            assert [cell for cell in cells if re.match(r"[=+@\t\r]|-.*[A-Za-z|!]", cell)] == []
        if name.endswith(".md"):
            assert "<script" not in text
            assert "<img" not in text
            assert "](javascript" not in text
        if name.endswith(".tex"):
            assert "\\input{" not in text
    assert "'=HYPERLINK" in texts["results.csv"]
    assert "1,024" not in texts["results.csv"]


@pytest.mark.slow
def test_figures_are_drawn_with_such_names(folder: Path, tmp_path: Path):
    """Before, a null byte ended the process, and a line feed the figure."""
    for path in assets.write(folder, tmp_path):
        assert path.stat().st_size > 0
    drawings = [ElementTree.parse(path) for path in tmp_path.glob("*.svg")]  # a hostile name is text in it
    assert len(drawings) > 5
    for element in (element for drawing in drawings for element in drawing.iter()):
        assert element.tag.rpartition("}")[2] not in ("script", "img", "image", "a", "foreignObject")
        assert not [name for name in element.attrib if name.startswith("on") or name.endswith("href")]


@pytest.mark.parametrize("name", ["null", "colour", "right to left", "line feed"])
def test_a_label_that_cannot_be_shown_is_refused(name: str):
    label = INVISIBLE[name]
    with pytest.raises(BadInput, match="has a character that cannot be shown"):
        Trial(Digits(), label, backprop(), SGD(0.1), 5)
    with pytest.raises(BadInput, match="has a character that cannot be shown"):
        make_comparison(
            "digits",
            {label: backprop()},
            steps=5,
            seeds=1,
            tuning_points=1,
            extra_points=0,
            confirm_seeds=0,
            lr_range=(0.1, 1.0),
            target=None,
            memory_beyond_weights=None,
        )


NOT_UTF8 = os.fsdecode(b"\xff")
OWN = """
from gradcost import SGD, Trial, backprop, study
from gradcost.core.value import value
from gradcost.tasks.digits import Digits

@value
class Mine(Digits):
    pass

@study("Does it learn?")
def own():
    yield [Trial(Mine(), "b", backprop(), SGD(0.1), 2, "tune", 0)]
"""


@pytest.mark.parametrize("name", [f"{NOT_UTF8}.py", "a\\N.py", 'a"""b.py', "a\nb.py", "it's.py"])
def test_a_name_that_cannot_stand_in_the_example_is_refused_and_no_file_is_left(tmp_path: Path, name: str):
    ran = inside("init", name, folder=tmp_path)
    assert ran.returncode == 2
    assert "cannot stand in a Python text: choose a name of letters, digits and _" in ran.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["my.task.py", "my task.py", "é.py", "%s{x}.py"])
def test_an_example_of_any_other_name_compiles(tmp_path: Path, name: str):
    assert inside("init", name, folder=tmp_path).returncode == 0
    text = (tmp_path / name).read_text("utf-8")
    compile(text, name, "exec")
    assert f"--model {name}:make" in text


def test_a_study_file_may_have_dots_and_bytes_that_are_no_text_in_its_name(tmp_path: Path):
    """A worker finds the file's own classes by the name of its module, where a dot would name a package."""
    (tmp_path / f"{NOT_UTF8}.b%2E.py").write_text(OWN)
    ran = inside("study", f"{NOT_UTF8}.b%2E.py", "-o", "st", "-j", "1", folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert [run.status for run in read(tmp_path / "st").trials] == ["finished"]


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (f"{NOT_UTF8}.parquet", r"gradcost: \udcff.parquet is no name in UTF-8, which Parquet needs: choose another"),
        ("", "gradcost: . is a folder: name a file in it, such as trials.parquet."),
        ("st", "gradcost: st is a folder: name a file in it, such as st/trials.parquet."),
    ],
)
def test_a_table_needs_a_name_of_a_file(tmp_path: Path, output: str, said: str):
    pytest.importorskip("pyarrow")
    write_folder(tmp_path / "st")
    before = sorted(tmp_path.rglob("*"))
    ran = inside("export", "st", "-o", output, folder=tmp_path)
    assert ran.returncode == 2
    assert ran.stderr.startswith(said)
    assert sorted(tmp_path.rglob("*")) == before
