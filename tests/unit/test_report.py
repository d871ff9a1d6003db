"""The report: reading a results folder, the tables, the figures and one offline page."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape
from report_records import HOSTILE, METHODS, cost, made, records, study, trial, write_folder

from gradcost.report import html, pages, summary, tables, wording
from gradcost.report.figures import figures
from gradcost.study.records import Results, read


@pytest.fixture
def whole(tmp_path: Path) -> Results:
    return read(write_folder(tmp_path / "whole"))


# ---- reading


def test_a_missing_or_empty_folder_is_a_sentence(tmp_path: Path):
    with pytest.raises(ValueError, match=r"There is no folder .*nowhere"):
        read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no study\.json"):
        read(tmp_path)
    (tmp_path / "study.json").write_text(json.dumps(study(["a"])))
    with pytest.raises(ValueError, match=r"no records\.jsonl"):
        read(tmp_path)


def test_another_schema_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="schema 2"):
        read(write_folder(tmp_path, schema=2))


def test_a_torn_last_line_is_skipped_and_counted(tmp_path: Path):
    folder = write_folder(tmp_path)
    before = read(folder)
    path = folder / "records.jsonl"
    path.write_bytes(path.read_bytes() + '{"schema":1,"kind":"trial","trial":"é'.encode()[:-1])
    after = read(folder)
    assert (before.torn, after.torn) == (0, 1)
    assert after.trials == before.trials


def test_the_last_line_of_a_trial_wins(tmp_path: Path):
    first = trial("a", status="failed", reason="out of memory")
    results = read(write_folder(tmp_path, [first, trial("a", test={"loss": 0.1, "accuracy": 0.9})]))
    assert [t.status for t in results.trials] == ["finished"]


def test_what_a_later_version_adds_is_left_out(tmp_path: Path):
    lines = [{**trial("a"), "novel": 1}, {"schema": 1, "kind": "novelty", "method": "a"}]
    assert len(read(write_folder(tmp_path, lines)).trials) == 1


def test_a_record_without_its_fields_is_a_sentence(tmp_path: Path):
    lines = [{"schema": 1, "kind": "trial", "trial": "0", "method": "a"}]
    with pytest.raises(ValueError, match=r"A record of trial is incomplete.*estimator"):
        read(write_folder(tmp_path, lines))


def test_numbers_that_are_not_finite_read_as_none(tmp_path: Path):
    folder = write_folder(tmp_path, [trial("a", test={"loss": math.nan, "accuracy": 0.5})])
    assert "NaN" in (folder / "records.jsonl").read_text()
    scores = read(folder).trials[0].test
    assert scores is not None
    assert scores.loss is None


# ---- the words and the tables


def test_sizes_have_one_spelling():
    said = [wording.size(n) for n in (0, 812, 1010, 9728, 31_949, 1_047_552, 1_048_576, 38 * 2**20, 24 * 2**30)]
    assert said == ["0 B", "812 B", "0.986 KiB", "9.5 KiB", "31.2 KiB", "0.999 MiB", "1 MiB", "38 MiB", "24 GiB"]
    assert wording.size(None) == wording.NOTHING


def test_the_table_is_rectangular_and_the_same_in_markdown(whole: Results):
    columns, rows = tables.table(whole)
    assert columns == [
        *("method", "test acc", "test loss", "beyond weights", "a step (forwards)"),
        *("ms", "to 90%", "diverged", "lr"),
    ]
    assert all(len(row) == len(columns) for row in rows)
    lines = tables.to_markdown(whole).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == rows[0]
    assert rows[4][-1] == "0.001 (edge)"
    assert rows[4][5] == "~0.74"


def test_a_bar_in_a_label_does_not_break_markdown(tmp_path: Path):
    line = tables.to_markdown(read(write_folder(tmp_path, [trial(HOSTILE)]))).splitlines()[2]
    assert len(re.findall(r"(?<!\\)\|", line)) == 10


def test_csv_holds_unrounded_numbers(whole: Results):
    rows = list(csv.DictReader(tables.to_csv(whole).splitlines()))
    for row, want in zip(rows, summary.summarise(whole), strict=True):
        assert want.accuracy is not None
        assert float(row["test_accuracy"]) == want.accuracy.mean
        assert int(row["peak_bytes"]) == want.peak_bytes


def test_the_audit_flags_the_edge(whole: Results):
    notes = {row[0]: row[-1] for row in tables.audit(whole).rows}
    assert notes["mezo()"] == "edge: 0.001 is the smallest of 7; 5 diverged"
    assert "slope clipped in 2.1% of final steps" in notes["forward_gradient(probes=8)"]


# ---- the figures and the page


def test_every_figure_says_what_it_shows_and_keeps_a_methods_colour(whole: Results):
    drawn = figures(whole)
    assert [figure.name for figure in drawn] == [
        *("accuracy-memory", "validation-loss", "training-loss"),
        *("tuning", "forwards", "milliseconds"),
    ]
    scales = [
        layer["encoding"]["color"]["scale"]
        for figure in drawn
        for layer in figure.spec["layer"]
        if "scale" in layer["encoding"].get("color", {})
    ]
    assert len(scales) >= 6
    assert all(scale == scales[0] for scale in scales)
    assert len(set(scales[0]["range"])) == len(METHODS)
    assert all(len(figure.caption) > 60 for figure in drawn)


def test_figures_without_data_are_left_out(tmp_path: Path):
    assert figures(read(write_folder(tmp_path / "none", []))) == []
    results = made(tmp_path, {"method": "a()", "accuracies": [0.9]})
    assert [figure.name for figure in figures(results)] == ["accuracy-memory", "forwards", "milliseconds"]


def test_the_page_is_written_whole_and_alone(tmp_path: Path):
    folder = write_folder(tmp_path / "results")
    path = html.write(folder)
    assert path == folder / "report.html"
    assert html.write(folder, tmp_path / "made" / "deep.html").read_text() == path.read_text()
    assert {p.name for p in folder.iterdir()} == {*("study.json", "environment.json", "records.jsonl", "report.html")}


def test_a_write_that_fails_keeps_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_folder(tmp_path / "results")
    (folder / "report.html").write_text("old")

    def full(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(pages.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        html.write(folder)
    assert (folder / "report.html").read_text() == "old"
    assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("lines", [[], [trial(HOSTILE, test={"loss": 0.1, "accuracy": 0.9})]], ids=["none", "one"])
def test_the_page_of_a_study_that_has_hardly_begun(tmp_path: Path, lines: list[dict[str, Any]]):
    text = html.write(write_folder(tmp_path, lines)).read_text()
    assert "Where it ran" in text


def test_a_hostile_label_is_text_and_nothing_is_loaded(tmp_path: Path):
    lines = [*records(), trial(HOSTILE, test={"loss": 0.1, "accuracy": 0.9}), cost(HOSTILE, 1024, 1.0, HOSTILE)]
    lines = [line for line in lines if line["kind"] != "refused"]
    text = html.write(write_folder(tmp_path, lines, task=HOSTILE, model_name=HOSTILE)).read_text()
    page, scripts = text.split("<script", 1)
    assert "<img" not in page
    assert not re.search(r"""\b(?:src|href|action|data|srcset)\s*=""", page.replace(str(escape(HOSTILE)), ""))
    assert not re.search(r"@import|url\(", page)
    assert re.search(r"default-src 'none'; script-src ('sha256-[\w+/=]+' ?){2};", page)
    assert len(re.findall(r"<script[^>]*>", text)) == text.count("</script>") == 3
    specs = scripts.split(">", 1)[1].split("</script>")[0]
    assert "<" not in specs
    assert "http" not in specs
    assert HOSTILE in json.loads(specs)["forwards"]["layer"][0]["encoding"]["color"]["scale"]["domain"]


def test_no_torch_is_imported(tmp_path: Path):
    folder = write_folder(tmp_path)
    code = (
        "import sys; from gradcost.report import html, tables, summary; "
        f"html.write({str(folder)!r}); print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


def test_reading_and_summing_up_need_no_extra(tmp_path: Path):
    folder = write_folder(tmp_path)
    code = (
        "import sys; sys.modules.update(altair=None, vl_convert=None, jinja2=None, numpy=None)\n"
        "from gradcost.report import html, summary, tables; from gradcost.study import records\n"
        f"results = records.read({str(folder)!r})\n"
        "tables.to_markdown(results), tables.to_csv(results), summary.verdict(results)\n"
        f"try: html.write({str(folder)!r})\n"
        "except ImportError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "gradcost[report]" in ran.stdout
