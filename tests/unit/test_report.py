"""The report: from plain records to the verdict, the tables, the figures and one offline page."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

HOSTILE = "evil(\"</script><img src=x onerror=alert(1)>\", a|b & 'c')"

# label, estimator, final accuracy, final loss, peak bytes, forwards, ms, the best of the grid's rates
METHODS = [
    ("backprop()", "Reverse(saving=Everything())", 0.972, 0.09, 66_048, 3.0, 0.61, 0.1),
    ("checkpointed()", "Reverse(saving=Blocks())", 0.971, 0.092, 33_792, 4.0, 0.83, 0.1),
    (
        "accumulated(4)",
        "Accumulated(Reverse(saving=Everything()), steps=4)",
        0.95,
        0.13,
        24_064,
        3.0,
        1.4,
        0.1,
    ),
    ("forward_gradient(probes=8)", "Probing(slope=Jvp(), probes=8)", 0.905, 0.31, 41_472, 17.0, 3.4, 0.03),
    (
        "mezo()",
        "Probing(slope=CentralDifference(eps=0.001), probes=1)",
        0.712,
        0.98,
        19_968,
        2.0,
        0.74,
        0.001,
    ),
]
GRID = [1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0]


def study(methods: list[str], **changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "task": "Digits(validation=300, test=360)",
        "task_name": "digits",
        "model_name": "mlp",
        "weights": 4810,
        "weights_bytes": 19240,
        "methods": methods,
        "seeds": [0, 1, 2],
        "points": len(GRID),
        "steps": 600,
        "batch": 64,
        "target": 0.9,
        "memory": None,
        "optimizer": "SGD",
        "chance": 0.1,
        **changes,
    }


def trial(method: str, phase: str = "final", lr: float = 0.1, seed: int = 0, **changes: Any) -> dict[str, Any]:
    record = {
        "schema": 1,
        "kind": "trial",
        "trial": f"{method} {phase} {lr} {seed}".encode().hex(),
        "method": method,
        "estimator": "Reverse(saving=Everything())",
        "optimizer": f"SGD(lr={lr})",
        "phase": phase,
        "lr": lr,
        "seed": seed,
        "status": "finished",
        "steps": 600,
        "curve": {},
        "validation": None,
        "test": None,
        "clip_rate": None,
        "reached": None,
        "seconds": 3.0,
        "reason": None,
    }
    return {**record, **changes}


def cost(method: str, peak: int, ms: float, estimator: str, **changes: Any) -> dict[str, Any]:
    record = {"schema": 1, "kind": "cost", "method": method, "estimator": estimator, "peak_bytes": peak}
    record |= {"flops": 1_800_000, "forwards": 3.0, "matmuls": 8, "ms": ms, "ms_low": ms * 0.96}
    return {**record, "ms_high": ms * 1.07, "doubt": None, "fits": None, **changes}


def curve(chance: random.Random, best: float, least: float, rate: float, steps: int) -> dict[str, Any]:
    """A loss that falls from log 10 to `least` and an accuracy that rises to `best`, with noise."""
    fall = [math.exp(-s * rate / steps) for s in range(steps)]
    loss = [least + (2.3 - least) * f * chance.uniform(0.85, 1.15) for f in fall]
    at = list(range(0, steps, 50)) + [steps - 1]
    return {
        "step": list(range(steps)),
        "loss": [max(x * chance.uniform(0.7, 1.3), 1e-3) for x in loss],
        "validation_step": at,
        "validation_loss": [loss[s] * chance.uniform(0.95, 1.05) for s in at],
        "validation_accuracy": [min(best - (best - 0.1) * fall[s] * chance.uniform(0.9, 1.1), 1.0) for s in at],
    }


def records(seed: int = 0) -> list[dict[str, Any]]:
    """A whole study by construction: tuning with an edge and diverged rates, finals, costs, a refusal."""
    chance, made = random.Random(seed), []
    for label, estimator, best, least, peak, forwards, ms, rate in METHODS:
        doubt = "the quartiles lie 31% apart: the machine was busy" if label == "mezo()" else None
        made.append(cost(label, peak, ms, estimator, forwards=forwards, doubt=doubt))
        for lr in GRID:
            away = abs(math.log10(lr / rate))
            found = {"loss": least + 0.5 * away, "accuracy": max(best - 0.16 * away**1.6, 0.1)}
            run = trial(label, "tune", lr, estimator=estimator, validation=found)
            if lr > rate * 4:
                reason = f"the loss was not finite at step {chance.randrange(20, 300)}"
                run |= {"status": "diverged", "validation": None, "reason": reason}
            made.append(run)
        for s in range(3):
            path = curve(chance, best, least, 7.0 if "Reverse" in estimator else 3.0, 600)
            found = {
                "loss": least * chance.uniform(0.95, 1.05),
                "accuracy": best + chance.uniform(-0.006, 0.006),
            }
            over = [a for a, v in zip(path["validation_step"], path["validation_accuracy"], strict=True) if v >= 0.9]
            more = {"curve": path, "validation": found, "test": found, "reached": over[0] if over else None}
            clip = 0.021 if "Jvp" in estimator else None
            made.append(trial(label, "final", rate, s, estimator=estimator, clip_rate=clip, **more))
    reason = "aten::_flash_attention_forward has no forward rule: use mezo(), which needs none."
    made.append({"schema": 1, "kind": "refused", "method": HOSTILE, "estimator": "Probing()", "reason": reason})
    return made


def write_folder(folder: Path, lines: list[dict[str, Any]] | None = None, **changes: Any) -> Path:
    """A results folder; without `lines`, of the whole synthetic study."""
    lines = records() if lines is None else lines
    folder.mkdir(parents=True, exist_ok=True)
    methods = list(dict.fromkeys(line["method"] for line in lines))
    (folder / "study.json").write_text(json.dumps(study(methods, **changes)))
    machine = {"python": "3.11.9", "torch": "2.9.0", "cpu": "an invented processor", "threads": 2}
    machine |= {"gradcost": "0.1.0", "platform": "Linux x86_64", "commit": "0123abc"}
    (folder / "environment.json").write_text(json.dumps(machine))
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def whole(tmp_path: Path) -> Results:
    return read(write_folder(tmp_path / "whole"))


def made(tmp_path: Path, *methods: dict[str, Any], **changes: Any) -> Results:
    """Results of methods that are given by what matters to a verdict: accuracies, peak, ms, estimator."""
    lines: list[dict[str, Any]] = []
    for method in methods:
        name, estimator = method["method"], method.get("estimator", "Reverse(saving=Everything())")
        fits = method.get("fits")
        lines.append(cost(name, method.get("peak", 1024), method.get("ms", 1.0), estimator, fits=fits))
        for seed, accuracy in enumerate(method.get("accuracies", [])):
            scores = None if accuracy is None else {"loss": 1 - accuracy, "accuracy": accuracy}
            status = "diverged" if accuracy is None else "finished"
            lines.append(trial(name, seed=seed, status=status, test=scores, estimator=estimator))
    return read(write_folder(tmp_path / "made", lines, **changes))


PROBING = "Probing(slope=Jvp(), probes=1)"


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


# ---- the summary


@pytest.mark.parametrize("df", [*range(1, 61), 120, 1000])
def test_students_quantile(df: int):
    stats = pytest.importorskip("scipy.stats")
    assert quantile(df) == pytest.approx(stats.t.ppf(0.975, df), abs=2e-5)


def test_the_interval_is_students_and_clipped():
    found = interval([0.9, 0.92, 0.94], 0.0, 1.0)
    assert found is not None
    assert found.half == pytest.approx(4.302653 * 0.02 / math.sqrt(3))
    wide = interval([0.99, 0.9], 0.0, 1.0)
    assert wide is not None
    assert (wide.low, wide.high) == (pytest.approx(0.945 - 12.706205 * 0.045), 1.0)
    one = interval([0.5])
    assert one is not None
    assert (one.mean, one.half, one.low) == (0.5, None, None)
    assert interval([]) is None


def tried(lr: float, accuracy: float | None, loss: float | None, status: str = "finished") -> dict[str, Any]:
    return trial("a", "tune", lr, status=status, validation={"loss": loss, "accuracy": accuracy})


def test_tuning_takes_the_best_accuracy_then_the_lower_loss_then_the_smaller_rate(tmp_path: Path):
    lines = [tried(0.1, 0.9, 0.5), tried(1.0, 0.9, 0.3), tried(0.3, 0.9, 0.3), tried(3.0, 0.99, 0.1, "diverged")]
    for order in (lines, lines[::-1]):
        assert summary.chosen(read(write_folder(tmp_path, order)).trials, "a") == 0.3
    assert summary.chosen([], "a") is None
    unscored = [tried(0.1, None, 0.5), tried(1.0, None, 0.3)]
    assert summary.chosen(read(write_folder(tmp_path, unscored)).trials, "a") == 1.0


@pytest.mark.parametrize(("lr", "edge"), [(0.1, "smallest"), (1.0, None), (10.0, "largest"), (None, None)])
def test_an_edge_of_the_grid(lr: float | None, edge: str | None):
    assert summary.edge((0.1, 1.0, 10.0), lr) == edge
    assert summary.edge((0.1,), lr) is None


def test_final_runs_at_another_rate_than_the_chosen_one_are_left_out(tmp_path: Path):
    best = {"loss": 0.1, "accuracy": 0.9}
    lines = [trial("a", "final", lr, s, test=best) for lr in (0.1, 1.0) for s in range(2)]
    chose = read(write_folder(tmp_path, [tried(0.1, 0.9, 0.1), tried(1.0, 0.8, 0.1), *lines]))
    assert {t.lr for t in summary.finals(chose.trials, "a")} == {0.1}
    (row,) = summary.summarise(chose)
    assert (row.lr, row.seeds, row.edge) == (0.1, 2, "smallest")
    overridden = read(write_folder(tmp_path, [tried(0.1, 0.9, 0.1), tried(1.0, 0.8, 0.1), *lines[2:]]))
    assert summary.summarise(overridden)[0].lr == 1.0
    assert "not at the rate that tuning chose" in tables.audit(overridden).rows[0][-1]


def test_steps_to_target_are_the_median_of_the_seeds_that_reached_it(tmp_path: Path):
    best = {"loss": 0.1, "accuracy": 0.9}
    lines = [cost("a", 1024, 2.0, "Reverse()")]
    lines += [trial("a", seed=s, test=best, reached=at) for s, at in enumerate([100, None, 300])]
    (row,) = summary.summarise(read(write_folder(tmp_path, lines)))
    assert (row.steps_to_target, row.reached, row.seconds_to_target) == (200, 2, pytest.approx(0.4))
    assert tables.to_target(row) == "200 steps, 0.4 s (2 of 3)"


def test_rows_follow_the_study_and_leave_out_the_refused(whole: Results):
    assert [row.method for row in summary.summarise(whole)] == [label for label, *_ in METHODS]


@pytest.mark.parametrize(
    ("estimator", "uses"),
    [
        ("Reverse(saving=Everything())", True),
        ("Clipped(Accumulated(Reverse(saving=Blocks()), steps=4), norm=1.0)", True),
        ("Probing(slope=Jvp(), probes=8)", False),
        ("NotReverse(1)", False),
    ],
)
def test_backprop_is_recognised_inside_wrappers(estimator: str, uses: bool):
    assert summary.uses_backprop(estimator) is uses


# ---- the verdict


def test_the_verdict_of_a_whole_study(whole: Results):
    found = summary.verdict(whole)
    assert found.startswith("Use checkpointed(): 97.2% test accuracy [96.6, 97.7] in 33 KiB beyond the weights")
    assert "backprop() (97.3%, 64.5 KiB) is not told apart from it in accuracy and needs more memory" in found
    assert "The best that avoids backprop, forward_gradient(probes=8), is 6.5 points behind" in found
    assert "in 40.5 KiB and 3.4 ms a step against 0.83." in found


def test_a_clear_winner_alone(tmp_path: Path):
    found = summary.verdict(made(tmp_path, {"method": "only()", "accuracies": [0.9, 0.91, 0.92], "peak": 2048}))
    assert found == "Use only(): 91.0% test accuracy [88.5, 93.5] in 2 KiB beyond the weights."


def test_equal_accuracy_and_memory_goes_to_the_faster(tmp_path: Path):
    slow = {"method": "slow()", "accuracies": [0.9, 0.91, 0.92], "ms": 2.0}
    fast = {"method": "fast()", "accuracies": [0.9, 0.91, 0.92], "ms": 1.0}
    found = summary.verdict(made(tmp_path, slow, fast))
    assert found.startswith("Use fast(): ")
    assert found.endswith("slow() (91.0%, 1 KiB) is not told apart from it in accuracy.")


def test_a_method_that_does_not_fit_is_not_recommended(tmp_path: Path):
    big = {"method": "big()", "accuracies": [0.97, 0.98, 0.97], "peak": 9216, "fits": False}
    small = {"method": "small()", "accuracies": [0.8, 0.81, 0.8], "estimator": PROBING, "fits": True}
    found = summary.verdict(made(tmp_path, big, small, memory=4096))
    assert found.startswith("Use small(): 80.3% test accuracy")
    assert found.endswith("Nothing that uses backprop fits 4 KiB: the least, big(), needs 9 KiB.")


def test_nothing_fits(tmp_path: Path):
    big = {"method": "big()", "accuracies": [0.97], "peak": 9216, "fits": False}
    less = {"method": "less()", "peak": 8192, "fits": False}
    found = summary.verdict(made(tmp_path, big, less, memory=4096))
    assert found == "There is no method to name: nothing fits 4 KiB: the least, less(), needs 8 KiB."


def test_nothing_finished_yet(tmp_path: Path):
    found = summary.verdict(made(tmp_path, {"method": "a()"}))
    assert found.startswith("There is no method to name: nothing has finished yet; the same command again")


def test_everything_diverged(tmp_path: Path):
    found = summary.verdict(made(tmp_path, {"method": "a()", "accuracies": [None, None, None]}))
    assert found == "There is no method to name: nothing finished: 3 runs diverged."


def test_every_method_was_refused(tmp_path: Path):
    lines = [{"schema": 1, "kind": "refused", "method": "a", "estimator": "", "reason": "it cannot."}]
    assert summary.verdict(read(write_folder(tmp_path, lines))).startswith("No method can serve here")


def test_a_seed_that_diverged_counts_as_guessing(tmp_path: Path):
    wild = {"method": "wild()", "accuracies": [0.99, 0.99, None]}
    calm = {"method": "calm()", "accuracies": [0.9, 0.91, 0.9]}
    found = summary.verdict(made(tmp_path, wild, calm))
    assert found.startswith("Use calm(): ")
    alone = summary.verdict(made(tmp_path, wild))
    assert alone.startswith("Use wild(): 99.0% test accuracy [99.0, 99.0] (1 of 3 seeds diverged)")


def test_forward_only_that_diverged_and_forward_only_that_wins(tmp_path: Path):
    exact = {"method": "backprop()", "accuracies": [0.97, 0.98, 0.97], "peak": 4096}
    lost = {"method": "mezo()", "accuracies": [None, None, None], "estimator": PROBING}
    assert summary.verdict(made(tmp_path, exact, lost)).endswith(
        "Nothing that avoids backprop finished: 3 runs diverged."
    )
    alike = {"method": "mezo()", "accuracies": [0.97, 0.98, 0.97], "estimator": PROBING, "ms": 3.0}
    found = summary.verdict(made(tmp_path, exact, alike))
    assert found.startswith("Use mezo(): ")
    assert "The best that uses backprop is backprop(): 97.3%" in found
    assert found.endswith("in 4 KiB and 1 ms a step against 3.")


def test_nothing_learned(tmp_path: Path):
    found = summary.verdict(made(tmp_path, {"method": "a()", "accuracies": [0.1, 0.11, 0.1]}))
    assert found.startswith("Nothing learned: the best, a(), is at 10.3%")
    assert found.endswith("chance is 10.0%.")


def test_one_seed_has_no_interval_and_missing_seeds_are_told(tmp_path: Path):
    one = made(tmp_path, {"method": "a()", "accuracies": [0.9]})
    assert "90.0% test accuracy (one seed, no interval) (2 of 3 seeds missing)" in summary.verdict(one)


# ---- the words and the tables


def test_sizes_have_one_spelling():
    said = [wording.size(n) for n in (0, 812, 1010, 9728, 31_949, 1_047_552, 1_048_576, 38 * 2**20, 24 * 2**30)]
    assert said == ["0 B", "812 B", "0.986 KiB", "9.5 KiB", "31.2 KiB", "1 MiB", "1 MiB", "38 MiB", "24 GiB"]
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
    assert figures(read(write_folder(tmp_path / "none", [], methods=["a"]))) == []
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

    monkeypatch.setattr(html.os, "replace", full)
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
    assert "<img" not in text
    assert text.count("</script>") == text.count("<script") - text.count('"<script')
    assert not re.search(r"""(?:src|href|action|data)\s*=\s*["']?(?:https?:)?//""", text.split("<script")[0])
    assert not re.search(r"@import|url\(", text.split("<script")[0])
    assert "default-src 'none'" in text
    specs = re.search(r'<script type="application/json" id="specs">(.*?)</script>', text, re.S)
    assert specs is not None
    assert "http" not in specs[1]
    assert HOSTILE in json.dumps(json.loads(specs[1]), ensure_ascii=False).replace('\\"', '"')


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
        "from gradcost.report import html, records, summary, tables\n"
        f"results = records.read({str(folder)!r})\n"
        "tables.to_markdown(results), tables.to_csv(results), summary.verdict(results)\n"
        f"try: html.write({str(folder)!r})\n"
        "except ImportError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "gradcost[report]" in ran.stdout
