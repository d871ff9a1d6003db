"""Every code block of the documentation runs, every command exists, and the site lists every page."""

from __future__ import annotations

import dataclasses
import doctest
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import yaml

import tiny_models
from gradcost.results import ledger
from gradcost.results.records import Cost, Curve, Quality, Refused, StudyRecord, TrialRecord
from in_process import inside

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)
FILE = re.compile(r"# file: (\S+\.py)\n")
AVOID = re.compile(r"\b(told|herald|reigns|nobody's|whereabouts|deal|begun|settled)\b")


class Block(NamedTuple):
    """A fenced block of a page: its language, its text and the line of the page before its first one."""

    language: str
    text: str
    line: int


def blocks(page: Path, *languages: str) -> list[Block]:
    text = page.read_text()
    return [
        Block(match["language"], match["text"], text.count("\n", 0, match.start("text")))
        for match in BLOCK.finditer(text)
        if match["language"] in languages
    ]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ---- Python

WITH_CODE = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_every_example_runs_and_prints_what_the_page_shows(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One namespace a page. `>>>` examples are doctests; a block with `# file: NAME` runs as a script of its own."""
    namespace = ModuleType("page")  # a module, so that annotations of classes defined on the page can be resolved
    monkeypatch.setitem(sys.modules, "page", namespace)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(DOCS)  # pages name the files of a clone
    for block in blocks(page, "python"):
        if match := FILE.match(block.text):
            monkeypatch.delitem(sys.modules, Path(match[1]).stem, raising=False)  # another page's file of that name
            run_script(tmp_path / match[1], block)
        elif ">>> " in block.text:
            run_examples(page, block, vars(namespace))
        else:
            code = compile("\n" * block.line + block.text, str(page), "exec", flags=0, dont_inherit=True)
            exec(code, vars(namespace))


def test_the_file_on_own_texts_trains_a_saved_model(tmp_path: Path):
    block = next(block.text for block in blocks(DOCS / "pretrained.md", "python") if "own_texts.py" in block.text)
    saved = tiny_models.encoder(tmp_path / "saved")
    (tmp_path / "own_texts.py").write_text(block.replace("google-bert/bert-base-uncased", saved).replace("64", "8"))
    rows = "".join(f"{word} is the answer,{label}\n" for label, word in enumerate(("who", "what")) for _ in range(20))
    (tmp_path / "texts.csv").write_text(f"text,label\n{rows}")
    own = ("--model", "own_texts.py:make", "--data", "own_texts.py:loaders", "--batch", "4")
    for command in (
        ("plan", "--memory", "1GiB"),
        ("train", "mezo()", "--optimizer", "AdamW(1e-4)", "--steps", "2", "-o", "model"),
    ):
        ran = inside(*command, *own, folder=tmp_path)
        assert ran.returncode == 0, ran.stdout + ran.stderr


def run_script(script: Path, block: Block) -> None:
    script.write_text(block.text)
    command = [sys.executable, script.name]
    ran = subprocess.run(command, cwd=script.parent, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def run_examples(page: Path, block: Block, namespace: dict[str, Any]) -> None:
    examples = doctest.DocTestParser().get_examples(block.text, name(page))
    test = doctest.DocTest(examples, namespace, name(page), str(page), block.line, block.text)
    test.globs = namespace  # DocTest copies; the next block continues where this one ends
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    result = runner.run(test, out=report.append, clear_globs=False)
    assert result.failed == 0, "".join(report)


def test_python_is_shown_in_blocks_that_run():
    assert [name(page) for page in PAGES if ">>> " in BLOCK.sub("", page.read_text())] == []


# ---- commands


def commands(page: Path) -> list[str]:
    """The lines of a page's bash blocks that start with `gradcost`, continued ones joined."""
    text = "\n".join(block.text for block in blocks(page, "bash")).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.startswith("gradcost ")]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name)
def test_every_command_parses(page: Path):
    import typer

    from gradcost.cli.main import app

    for line in commands(page):
        command, arguments = typer.main.get_command(app), shlex.split(line, comments=True)[1:]
        if arguments == ["--help"]:
            continue
        while subcommands := getattr(command, "commands", None):
            assert arguments[0] in subcommands, line
            command = subcommands[arguments.pop(0)]
        try:
            command.make_context("gradcost", list(arguments))
        except Exception as error:  # click's usage errors name the option
            pytest.fail(f"{line}: {getattr(error, 'message', None) or error}")


# ---- the site


def nav(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in nav(part)]


def test_the_navigation_names_every_page_once():
    listed = nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    tables = [folder for folder in (DOCS / "results").iterdir() if folder.is_dir()]  # linked from the pages
    pages = [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if not {*tables} & {*page.parents}]
    assert sorted(listed) == sorted(pages)


def test_the_reference_lists_the_flat_names():
    import gradcost

    flat = {name for name in gradcost.__all__ if not isinstance(getattr(gradcost, name), ModuleType)}
    page = (DOCS / "reference" / "index.md").read_text()
    assert set(re.findall(r"\[`gradcost\.(\w+)`\]\[", page)) == flat


def test_the_page_on_studies_lists_every_field_of_a_results_folder():
    """Those that the library reads, and those of the published records."""
    page = (DOCS / "write-a-study.md").read_text()
    named = set(re.findall(r"`(\w+)`", page[page.index("## Files of a results folder") :]))
    fields = {
        f.name for kind in (StudyRecord, TrialRecord, Cost, Quality, Refused, Curve) for f in dataclasses.fields(kind)
    }
    for folder in {path.parent for path in DOCS.glob("results/*/records.jsonl")}:
        fields |= set(json.loads((folder / "study.json").read_text()))
        fields |= {name for r in ledger.records(folder) if r["kind"] in ("trial", "cost", "quality") for name in r}
    assert sorted(fields - named) == []
    invented = (
        named - fields - {"schema", "crc", "kind", "trial", "cost", "quality", "refused", "traceback", "samples"}
    )
    values = {"finished", "diverged", "failed", "null", "customary", "loss", "accuracy", "score", "targets", "of"}
    assert sorted(invented - values - {"lower_is_better", "others", "question", "note"}) == []


def test_the_prose_avoids_the_words_of_the_style_guide():
    records = DOCS / "results"  # pages written from records, and the records themselves
    files = [page for page in PAGES if records not in page.parents]
    assert [(name(page), word) for page in files for word in AVOID.findall(page.read_text())] == []


def test_the_readme_is_one_screen_and_its_links_exist():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 70
    links = re.findall(r"\]\((?!http)([^)#]+)", text)
    assert [link for link in links if not (ROOT / link).exists()] == []
