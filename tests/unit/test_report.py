"""The report: reading a results folder, its tables, its figures and the page."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape
from report_records import (
    HOSTILE,
    METHODS,
    PROBING,
    cost,
    curve,
    quality,
    records,
    results_of,
    study,
    trial,
    write_folder,
)

from gradcost.report import assets, html, plan, series, tables
from gradcost.report.figures import figures
from gradcost.report.quality import pictures
from gradcost.report.theme import protocol
from gradcost.results import summary, wording
from gradcost.results.facts import facts
from gradcost.results.lint import lint
from gradcost.results.records import Results, read
from gradcost.results.tuning import final_steps


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


def test_a_record_without_its_fields_is_skipped_and_counted(tmp_path: Path):
    lines = [trial("a"), {"schema": 1, "kind": "trial", "trial": "0", "method": "a"}]
    results = read(write_folder(tmp_path, lines))
    assert (len(results.trials), results.torn_lines) == (1, (2,))


def test_numbers_that_are_not_finite_read_as_none(tmp_path: Path):
    folder = write_folder(tmp_path, [trial("a", test={"loss": math.nan, "accuracy": 0.5})])
    assert "NaN" in (folder / "records.jsonl").read_text()
    scores = read(folder).trials[0].test
    assert scores is not None
    assert scores.loss is None


# ---- the words and the tables


def test_the_page_has_the_range_of_steps_if_final_runs_differ(tmp_path: Path):
    lines = [trial("a", seed=1), trial("b", seed=1) | {"steps": 20}]
    results = read(write_folder(tmp_path, lines))
    assert final_steps(results) == f"20 to {trial('a')['steps']:,} steps"
    assert final_steps(results) in html.page(results)
    assert final_steps(results) in protocol(results)


def test_sizes_have_one_spelling():
    sizes = [wording.size(n) for n in (0, 812, 1010, 9728, 31_949, 1_047_552, 1_048_576, 38 * 2**20, 24 * 2**30)]
    assert sizes == ["0 B", "812 B", "0.986 KiB", "9.5 KiB", "31.2 KiB", "0.999 MiB", "1 MiB", "38 MiB", "24 GiB"]
    assert wording.size(None) == wording.DASH


def test_the_table_is_rectangular_and_the_same_in_markdown(whole: Results):
    columns, rows = tables.table(whole)
    assert columns == [
        *("method", "test acc", "test loss", "beyond weights", "a step (forwards)"),
        *("ms", "to 90%", "diverged", "lr"),
    ]
    assert all(len(row) == len(columns) for row in rows)
    lines = tables.markdown(tables.table(whole)).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == rows[0]
    assert rows[4][-1] == "0.001 (edge)"
    assert rows[4][5] == "~0.74"


@pytest.mark.parametrize(
    ("statuses", "diverged", "target"),
    [
        (["finished"], "0 of 1", "120 steps"),
        (["finished", "diverged"], "1 of 2", "120 steps (1 of 2)"),
        (["finished", "failed", "finished"], "0 of 3", "120 steps (2 of 3)"),
    ],
)
def test_runs_that_are_still_to_come_are_not_counted(tmp_path: Path, statuses: list[str], diverged: str, target: str):
    """Of three planned seeds. One run was "0 of 3 diverged"."""
    scores = {"loss": 0.1, "accuracy": 0.9}
    lines = [
        trial("a()", seed=seed, status=status, test=scores if status == "finished" else None, reached=120)
        for seed, status in enumerate(statuses)
    ]
    columns, rows = tables.table(read(write_folder(tmp_path, lines)))
    row = dict(zip(columns, rows[0], strict=True))
    assert (row["diverged"], row["to 90%"]) == (diverged, target)


def test_a_bar_in_a_label_does_not_break_markdown(tmp_path: Path):
    line = tables.markdown(tables.table(read(write_folder(tmp_path, [trial(HOSTILE)])))).splitlines()[2]
    assert len(re.findall(r"(?<!\\)\|", line)) == 10


def test_csv_holds_unrounded_numbers(whole: Results):
    rows = list(csv.DictReader(tables.to_csv(whole).splitlines()))
    for row, want in zip(rows, summary.summarise(whole), strict=True):
        assert want.accuracy is not None
        assert float(row["test_accuracy"]) == want.accuracy.median
        assert int(row["peak_bytes"]) == want.peak_bytes


def test_the_audit_flags_the_edge(whole: Results):
    notes = {row[0]: row[-1] for row in tables.audit(whole).rows}
    assert notes["mezo()"] == "edge: 0.001 is the smallest of 7; 5 diverged"
    assert "slope clipped in 2.1% of final steps" in notes["forward_gradient(probes=8)"]


# ---- the figures and the page


def test_every_figure_has_a_caption_and_one_colour_per_method(whole: Results):
    drawn = figures(whole)
    assert [figure.name for figure in drawn] == [
        *("accuracy-memory", "validation-loss", "validation-loss-samples", "validation-loss-flops"),
        *("validation-loss-seconds", "training-loss", "memory", "forwards", "milliseconds"),
        *("estimate-cosine", "estimate-error", "slope-spikes"),
        *("tuning", "tuning-points", "time-to-target"),
    ]
    scales = [
        layer["encoding"]["color"]["scale"]
        for figure in drawn
        for layer in figure.spec["layer"]
        if "scale" in layer["encoding"].get("color", {}) and figure.name != "memory"  # whose colours are purposes
    ]
    assert len(scales) >= 11
    assert all(scale == scales[0] for scale in scales)
    assert len(set(scales[0]["range"])) == len(METHODS)
    assert all(len(figure.caption) > 60 for figure in drawn)


def test_figures_without_data_are_left_out(tmp_path: Path):
    assert figures(read(write_folder(tmp_path / "none", []))) == []
    results = results_of(tmp_path, {"method": "a()", "accuracies": [0.9]})
    assert [figure.name for figure in figures(results)] == [
        *("accuracy-memory", "memory", "forwards", "milliseconds")
    ]


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

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        html.write(folder)
    assert (folder / "report.html").read_text() == "old"
    assert len(list(folder.iterdir())) == 4


def test_a_run_that_diverged_counts_as_the_greatest_loss_from_there_on(tmp_path: Path):
    def run(seed: int, losses: list[float]) -> dict[str, Any]:
        status = "finished" if len(losses) == 4 else "diverged"
        seen = {"validation_step": [1, 2, 3, 4][: len(losses)], "validation_loss": losses}
        return trial("a", seed=seed, curve=seen, status=status, steps=min(len(losses) + 1, 4))

    some = [run(0, [1.0, 0.8, 0.6, 0.4]), run(1, [1.1, 0.9, 0.7, 0.5]), run(2, [1.2, 3.0])]
    rows = series.curves(read(write_folder(tmp_path / "some", some, steps=4)), series.validation)
    assert [(row["step"], row["median"], row["high"]) for row in rows] == [
        *((1, 1.1, 1.2), (2, 0.9, 3.0)),
        *((3, 0.7, 0.7), (4, 0.5, 0.5)),
    ]
    most = [run(0, [1.0, 0.8, 0.6, 0.4]), run(1, [1.1, 0.9]), run(2, [1.2, 3.0])]
    rows = series.curves(read(write_folder(tmp_path / "most", most, steps=4)), series.validation)
    assert [row["step"] for row in rows] == [1, 2]


def test_settings_of_one_method_are_a_curve_and_a_single_one_is_a_point(tmp_path: Path):
    lines = [{"method": f"some({n})", "estimator": f"Probing(eps={n})", "accuracies": [0.9]} for n in (1, 0.002)]
    rows, _, _ = series.frontier(results_of(tmp_path, *lines, {"method": "other()", "accuracies": [0.9]}))
    families = {row["method"]: row["family"] for row in rows}
    assert families["some(1)"] == families["some(0.002)"] != families["other()"]


def test_the_best_of_more_points_is_never_worse_and_one_that_diverged_is_guessing(whole: Results):
    curves: dict[str, list[float]] = {}
    for row in series.expected(whole):
        curves.setdefault(row["method"], []).append(row["best"])
    assert all(len(best) == whole.study.points and best == sorted(best) for best in curves.values())
    tried = [t for t in whole.trials if t.method == "mezo()" and t.phase == "tune"]
    reached = [t.validation.accuracy if t.validation else whole.study.chance for t in tried]
    assert curves["mezo()"][0] == pytest.approx(sum(x or 0 for x in reached) / len(reached), rel=1e-4)


def test_the_time_to_the_target_is_in_calibrated_seconds_with_the_censored_counted(tmp_path: Path):
    seen = {"loss": 0.1, "accuracy": 0.9}
    lines = [cost("a", 1024, 2.0, "Reverse()"), cost("b", 1024, 1.0, "Reverse()"), trial("b", test=seen)]
    lines += [trial("a", seed=s, test=seen, reached=at) for s, at in enumerate([100, None, 300, None])]
    rows, timed, never = series.reaching(read(write_folder(tmp_path, lines)))
    assert timed
    assert never == ["b"]
    assert [(row["time"], row["share"]) for row in rows] == [(0, 0), (0.2, 0.25), (0.6, 0.5), (1.2, 0.5)]


def test_estimates_have_the_theory_of_their_number_of_probes(whole: Results):
    rows, theory = series.estimates(whole, "error")
    assert {(row["method"], row["probes"]) for row in rows} == {("forward_gradient(probes=8)", 8), ("mezo()", 1)}
    expected = {line["probes"]: line["value"] for line in theory}
    for row in rows:
        assert row["value"] == pytest.approx(0.9 * expected[row["probes"]])
        assert row["low"] < row["value"] < row["high"]
        assert float(row["theory"]) == pytest.approx(expected[row["probes"]], rel=0.005)
    assert len({line["curve"] for line in theory}) == 1, "methods with the same theory share one curve"


def test_a_method_that_theory_does_not_know_has_no_curve(tmp_path: Path):
    lines = [*records(), {**quality("mezo()", PROBING, 1), "theory": None, "cosine_se": None}]
    rows, theory = series.estimates(read(write_folder(tmp_path / "one", lines)), "cosine")
    (row,) = [row for row in rows if row["method"] == "mezo()"]
    assert row["theory"] == "unknown"
    assert row["low"] == row["value"] == row["high"]
    assert theory, "that of the other is drawn"


def test_curves_of_theory_that_differ_are_two_lines_in_any_order(tmp_path: Path):
    other = {"probes": [1, 2], "cosine": [0.5, 0.6], "error": [3.0, 2.0]}
    lines = [quality("a()", PROBING, 1), quality("b()", PROBING, 2), {**quality("c()", PROBING, 1), "theory": other}]
    lines += [trial(name, test={"loss": 0.1, "accuracy": 0.9}, estimator=PROBING) for name in ("a()", "b()", "c()")]
    _, theory = series.estimates(read(write_folder(tmp_path / "two", lines)), "error")
    assert len(theory) == 5 + 2
    assert len({line["curve"] for line in theory}) == 2


def test_a_task_without_a_batch_is_read_and_drawn(tmp_path: Path):
    results = read(write_folder(tmp_path / "whole", batch=None))
    assert results.study.batch is None
    assert "of batch" not in html.page(results)


def test_a_study_of_a_loss_has_one_column_for_it_and_a_page(tmp_path: Path):
    """Its scores are losses with the other sign: the slider and the picture show the losses."""
    metric = {"metric": "loss", "lower_is_better": True}
    seen = {"validation_step": [100, 600], "validation_loss": [2.0, 0.5], "validation_score": [-2.0, -0.5]}
    test = {"loss": 0.5, "accuracy": None, "score": -0.5}
    lines = [trial("a()", seed=seed, test=test, curve=seen) for seed in (0, 1)] + [
        cost("a()", 1024, 1.0, "Reverse()")
    ]
    results = read(write_folder(tmp_path, lines, **metric, chance=None, target=None))
    columns, (row,) = tables.table(results)
    assert columns.count("test loss") == 1
    assert len(columns) == len(row)
    assert {figure.name for figure in pictures(results)} == {"quality-flops", "quality-seconds", "quality-steps"}
    specs = json.loads(html.page(results).split('id="specs">')[1].split("</script>")[0])
    assert specs["answer"]["metric"] == {"name": "loss", "sign": -1, "percent": False}
    assert specs["answer"]["methods"][0]["runs"]["0"] == [[100, 600], [-2.0, -0.5]]
    (rows,) = [data for data in specs["quality-steps"]["datasets"].values() if len(data) == 2 and "low" in data[0]][
        :1
    ]
    assert [row["median"] for row in rows] == [2.0, 0.5]


def test_a_run_that_reached_the_target_and_then_diverged_never_reached_it(tmp_path: Path):
    lines = [trial("a()", seed=seed, reached=100, test={"loss": 0.1, "accuracy": 0.9}) for seed in range(2)]
    lines.append(trial("a()", seed=2, status="diverged", steps=400, reached=200))
    rows, _, _ = series.reaching(read(write_folder(tmp_path / "lost", lines)))
    assert max(row["share"] for row in rows) == pytest.approx(2 / 3, abs=1e-4)


def test_captions_name_what_was_run_and_not_what_might_have_been(tmp_path: Path):
    test = {"loss": 0.1, "accuracy": 0.9}
    lines = [trial("a()", seed=1, optimizer="Adam(lr=0.1)", test=test), cost("a()", 1024, 1.0, "Reverse()")]
    (frontier, *_) = figures(read(write_folder(tmp_path / "untuned", lines)))
    assert "Adam at the learning rates that the study gives" in frontier.caption


def test_spikes_are_counted_and_a_curve_keeps_the_largest_slope(whole: Results):
    marked, counted = series.spikes(whole)
    assert counted == {"forward_gradient(probes=8)": (3, 1800), "mezo()": (3, 1800)}
    assert {(row["step"], row["slope"]) for row in marked} == {(300, 40.0)}
    rows = series.curves(whole, series.slopes, max)
    assert {row["method"] for row in rows} == set(counted)
    assert max(row["median"] for row in rows) == 40.0, "a mean over a window would hide it"
    (figure,) = [figure for figure in figures(whole) if figure.name == "slope-spikes"]
    assert "forward_gradient(probes=8) 3 of 1,800 slopes" in figure.caption


def test_a_long_study_fits_a_small_file(tmp_path: Path):
    """100 trials of 500 steps, each step recorded."""
    chance = random.Random(0)
    lines = [cost(f"method({m})", 1000 * (m + 1), 1.0, "Reverse()") for m in range(10)]
    for m in range(10):
        for seed in range(10):
            path = curve(chance, 0.9, 0.1, 3.0, 500)
            scores = {"loss": 0.1, "accuracy": 0.9 + chance.uniform(-0.02, 0.02)}
            more = {"steps": 500, "curve": path, "validation": scores, "test": scores, "reached": 400}
            lines.append(trial(f"method({m})", seed=seed, **more))
    path = html.write(write_folder(tmp_path, lines, steps=500, seeds=list(range(10))))
    assert path.stat().st_size < 1_500_000


def test_every_figure_and_table_is_a_file_too(tmp_path: Path):
    folder = write_folder(tmp_path, [trial("a_b()", test={"loss": 0.1, "accuracy": 0.9}), cost("a_b()", 9, 1.0, "")])
    made = assets.write(folder)
    drawn = [figure.name for figure in figures(read(folder))]
    assert {path.name for path in made} == {
        *(f"{name}.{kind}" for name in drawn for kind in ("svg", "png", "pdf")),
        *(f"{name}.{kind}" for name in ("decision", "tuning") for kind in ("csv", "md", "tex")),
        *("results.csv", "captions.md", "page.md"),
    }
    signs = {".svg": b"<svg", ".png": b"\x89PNG", ".pdf": b"%PDF", ".tex": rb"\begin{tabular}"}
    assert all(path.read_bytes().startswith(signs.get(path.suffix, b"")) for path in made)
    assert r"a\_b() & 90.0 & 0.100 &" in (folder / "report-files" / "decision.tex").read_text()
    assert all(figure in (folder / "report-files" / "captions.md").read_text() for figure in drawn)


def test_what_lint_finds_is_on_the_page(whole: Results):
    page = html.page(whole)
    found = lint(facts(whole))
    assert found
    assert all(finding.code in page and str(escape(finding.found)) in page for finding in found)


def test_the_audit_lists_rates_beyond_the_common_grid_and_confirming_runs(tmp_path: Path):
    seen = {"loss": 0.1, "accuracy": 0.9}
    tuned = [trial(m, "tune", lr, validation=seen) for m in ("a", "b") for lr in (0.1, 1.0)]
    tuned.append(trial("b", "tune", 10.0, validation={"loss": 0.1, "accuracy": 0.95}))
    again = [trial("b", "confirm", lr, seed, validation=seen) for lr in (1.0, 10.0) for seed in (1, 2)]
    notes = {row[0]: row[-1] for row in tables.audit(read(write_folder(tmp_path, [*tuned, *again]))).rows}
    assert "point" not in notes["a"]
    assert notes["b"].startswith("1 extra point: 10; 2 rates confirmed on 2 fresh seeds")


@pytest.mark.parametrize("lines", [[], [trial(HOSTILE, test={"loss": 0.1, "accuracy": 0.9})]], ids=["none", "one"])
def test_the_page_of_a_study_with_few_records(tmp_path: Path, lines: list[dict[str, Any]]):
    text = html.write(write_folder(tmp_path, lines)).read_text()
    assert "Where and how did it run?" in text


def test_a_hostile_label_is_text_and_nothing_is_loaded(tmp_path: Path):
    lines = [*records(), trial(HOSTILE, test={"loss": 0.1, "accuracy": 0.9}), cost(HOSTILE, 1024, 1.0, HOSTILE)]
    lines = [line for line in lines if line["kind"] != "refused"]
    text = html.write(write_folder(tmp_path, lines, task=HOSTILE, model_name=HOSTILE)).read_text()
    page, scripts = text.split("<script", 1)
    assert "<img" not in page
    assert not re.search(r"""\b(?:src|href=(?!"#)|action|data|srcset)\s*=""", page.replace(str(escape(HOSTILE)), ""))
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
        "import sys; from gradcost.report import html, tables; from gradcost.results import summary; "
        f"html.write({str(folder)!r}); print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


def test_reading_and_summing_up_need_no_extra(tmp_path: Path):
    folder = write_folder(tmp_path)
    code = (
        "import sys; sys.modules.update(altair=None, vl_convert=None, jinja2=None, scipy=None)\n"
        "from gradcost.report import html, tables; from gradcost.results import records, verdict\n"
        f"results = records.read({str(folder)!r})\n"
        "tables.markdown(tables.table(results)), tables.to_csv(results), verdict(results)\n"
        f"try: html.write({str(folder)!r})\n"
        "except ImportError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "gradcost[report]" in ran.stdout


PLAN_ROW: dict[str, Any] = {
    "method": "mezo()",
    "refusal": None,
    "fits": False,
    "over": 1024,
    "peak": 4096,
    "forwards": 2.0,
    "seconds": None,
    "breakdown": {"parameters": 3072, "temporaries": 1024},
    "operator": "aten.addmm.default",
    "module": "0",
}


@pytest.mark.parametrize("cells", [None, {"peak": "4 KiB", "fits": "no", "forwards": "2.00", "est. s/step": "0.1"}])
def test_the_page_of_a_plan_lays_out_the_cells_and_renders_old_records_without(cells: dict[str, str] | None):
    rows = [PLAN_ROW if cells is None else {**PLAN_ROW, "cells": cells}]
    record = {"model": "Linear", "rows": rows, "budget": 3072, "choice": None, "weights": 768, "device": "cpu"}
    page = plan.page(record | {"batch": 8, "optimizer": None, "sentence": "None fits.", "lines": []})
    assert ">4 KiB<" in page.replace("\n", "").replace("    ", "")
    assert ("est. s/step" in page) is (cells is not None)


RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.mark.parametrize(
    "folder", ["mnist-mlp", "equal-flops-1", "equal-flops-6", "equal-seconds-12", "equal-seconds-73"]
)
def test_the_tables_in_the_docs_are_those_of_the_records_beside_them(folder: str):
    texts = assets.written(read(RESULTS / folder))
    tables = [path for path in (RESULTS / folder).iterdir() if path.suffix in (".md", ".csv")]
    assert tables
    for path in tables:
        assert path.read_text() == texts[path.name], path.name
