"""What a person asks of a results folder: how far it is, what a trial found, why it ran and why it was chosen."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gradcost import SGD, Key, backprop
from gradcost.cli import results as inspect
from gradcost.results import export, ledger, status
from gradcost.results.records import read
from gradcost.tasks.digits import Digits
from gradcost.training import checkpoint
from gradcost.training.train_state import TrainState
from in_process import inside

STUDY = {
    "schema": 1,
    "comparison": "c0de",
    "task": "Digits()",
    "task_name": "digits",
    "model_name": "mlp",
    "batch": 64,
    "target": 0.9,
    "optimizer": "SGD",
}


def trial(name: str, phase: str, lr: float, seed: int, accuracy: float | None, **more: Any) -> dict[str, Any]:
    curve = {"step": [1, 2], "loss": [2.0, None], "validation_step": [2], "validation_loss": [1.5]}
    return {
        "schema": 1,
        "kind": "trial",
        "trial": name,
        "method": "mezo",
        "estimator": "mezo()",
        "optimizer": f"SGD(lr={lr})",
        "phase": phase,
        "lr": lr,
        "seed": seed,
        "steps": 2,
        "seconds": 0.5,
        "status": "finished" if accuracy is not None else "diverged",
        "curve": curve | {"validation_accuracy": [accuracy]},
        "validation": {"loss": 1.5, "accuracy": accuracy},
        "test": {"loss": 1.6, "accuracy": 0.7} if phase == "final" else None,
    } | more


TRIALS = [
    trial("aa01", "tune", 0.01, 0, 0.8),
    trial("aa02", "tune", 0.1, 0, 0.9),
    trial("ab03", "tune", 1.0, 0, None, reason="the loss was inf at step 2", test=None),
    trial("ac04", "confirm", 0.01, 1, 0.85),
    trial("ac05", "confirm", 0.1, 1, 0.7),
    trial("ad06", "final", 0.01, 1, 0.84),
    trial("ad07", "final", 0.1, 1, 0.83),
    trial("ae08", "final", 0.01, 2, None, status="failed", reason="OSError: gone", traceback="Traceback: line 7"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    made.mkdir()
    ledger.write_document(made / "study.json", STUDY)
    for record in TRIALS:
        ledger.append(made, record)
    return made


def keep(folder: Path, name: str, steps: int) -> None:
    task = Digits()
    train_state = TrainState(task.objective(Key(0)), backprop(), SGD(0.1))
    for step in range(steps):
        train_state.step(task.batch_at(Key(0), step), Key(step))
    path = folder / "trials" / name / "checkpoint"
    path.parent.mkdir(parents=True)
    checkpoint.write(path, train_state, {"taken": 99, "more": [1.0]})


def test_status_counts_what_is_done_what_failed_and_what_is_half_finished(folder: Path):
    keep(folder, "ae08", 3)
    (folder / "trials" / "af09").mkdir()
    (folder / "trials" / "af09" / "checkpoint").write_bytes(b"torn")
    found = status.status(folder)
    assert found.done == {"tune": 3, "confirm": 2, "final": 2}
    assert found.failed == ("ae08",)
    assert found.kept == (status.UnfinishedTrial("ae08", 3), status.UnfinishedTrial("af09", None))
    assert found.pid is None
    with (folder / "lock").open("w") as file:
        file.write("4711")
        file.flush()
        assert status.status(folder).pid is None, "a lock that nobody holds is an old one"
        fcntl.flock(file, fcntl.LOCK_EX)
        assert status.status(folder).pid == 4711


def said(capsys: pytest.CaptureFixture[str], command: Any, *arguments: Any) -> tuple[str, Any]:
    """What a command tells a person, and a machine."""
    command(*arguments)
    text = capsys.readouterr().out
    command(*arguments, as_json=True)
    return text, json.loads(capsys.readouterr().out)


def test_every_command_speaks_to_people_and_machines(folder: Path, capsys: pytest.CaptureFixture[str]):
    text, machine = said(capsys, inspect.status, folder)
    assert "no process works on it" in text
    assert f"ae08  failed: `gradcost why {folder} ae08`" in text
    assert machine["done"] == {"tune": 3, "confirm": 2, "final": 2}
    text, machine = said(capsys, inspect.show, folder, "ae")
    assert "OSError: gone" in text
    assert "Traceback: line 7" in text
    assert machine == TRIALS[-1]
    text, machine = said(capsys, inspect.why, folder, "ae")
    assert "It failed: OSError: gone. The same command again repeats it." in text
    assert "Traceback: line 7" in text
    assert machine["traceback"] == "Traceback: line 7"
    assert machine["why"][1] in text


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "aa01",
            ["It ran to tune mezo: 0.01 is one of the 3", "It was chosen: validation accuracy 0.8250 and"],
        ),
        (
            "aa02",
            ["0.1 is one of the 3", "It was not chosen: validation accuracy 0.8000", "0.01 was chosen: validation"],
        ),
        (
            "ab03",
            ["It diverged: the loss was inf at", "not chosen: number 3 in tuning, so it was not"],
        ),
        ("ac05", ["to confirm 0.1, number 1 in tuning mezo, on fresh seed 1", "It was not chosen"]),
        ("ad06", ["It is a final run with 0.01, which the mean over the tuning and confirming seeds chose"]),
        ("ad07", ["with 0.1, as the study sets it. Tuning of mezo chose 0.01"]),
    ],
)
def test_why_tells_what_chose_a_rate_and_what_beat_it(folder: Path, name: str, told: list[str]):
    reasons = " ".join(status.why(folder, name))
    for part in told:
        assert part in reasons


def test_a_trial_of_no_tuning_and_a_method_that_always_diverged(tmp_path: Path):
    ledger.write_document(tmp_path / "study.json", STUDY)
    ledger.append(tmp_path, trial("aa", "final", 0.1, 1, 0.5))
    assert status.why(tmp_path, "aa") == ("It is a final run: no learning rate of mezo was tuned.",)
    ledger.append(tmp_path, trial("bb", "tune", 0.1, 1, None, reason="the loss was nan at step 1"))
    assert status.why(tmp_path, "bb")[-1] == "No learning rate was chosen: every one diverged."


def test_an_id_that_is_none_or_many_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"2 trials of .* begin with 'aa': give more"):
        status.record(folder, "aa")
    with pytest.raises(ValueError, match=r"no trial of .* begins with 'zz'"):
        status.record(folder, "zz")
    for command in (status.status, lambda at: status.why(at, "a"), lambda at: status.record(at, "a")):
        with pytest.raises(ValueError, match="holds no study"):
            command(tmp_path)


def test_an_export_holds_every_trial_and_every_point(folder: Path, tmp_path: Path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: gradcost[export]")
    first, second = export.write(folder, tmp_path / "out.parquet")
    assert second == tmp_path / "out.curves.parquet"
    rows = parquet.read_table(first).to_pylist()
    assert [row["trial"] for row in rows] == [record["trial"] for record in TRIALS]
    for row, record in zip(rows, TRIALS, strict=True):
        for name in ("method", "phase", "lr", "seed", "status", "steps", "seconds"):
            assert row[name] == record[name]
        assert row["validation_accuracy"] == record["validation"]["accuracy"]
        assert row["test_accuracy"] == (record["test"] or {}).get("accuracy")
    points = parquet.read_table(second).to_pylist()
    assert len(points) == 4 * len(TRIALS)
    assert points[:4] == [
        {"trial": "aa01", "step": 1, "what": "loss", "value": 2.0},
        {"trial": "aa01", "step": 2, "what": "loss", "value": None},
        {"trial": "aa01", "step": 2, "what": "validation_loss", "value": 1.5},
        {"trial": "aa01", "step": 2, "what": "validation_accuracy", "value": 0.8},
    ]


def test_an_export_has_a_column_of_the_type_of_each_field(tmp_path: Path):
    """The field `exact` is a bool. Before, every folder of this version failed."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: gradcost[export]")
    ledger.write_document(tmp_path / "study.json", STUDY)
    for record in TRIALS:
        ledger.append(tmp_path, {**record, "exact": record["seed"] == 0, "note": "new", "clip_rate": 0.5})
    first, _ = export.write(tmp_path, tmp_path / "out.parquet")
    rows = parquet.read_table(first).to_pylist()
    assert [row["exact"] for row in rows] == [record["seed"] == 0 for record in TRIALS]
    for row, run in zip(rows, read(tmp_path).trials, strict=True):
        for field in dataclasses.fields(run):
            if field.name in row:
                assert row[field.name] == getattr(run, field.name)
                assert type(row[field.name]) is type(getattr(run, field.name))


@pytest.mark.parametrize("name", ["records.jsonl", "study.json", "environment.json", "lock"])
@pytest.mark.parametrize("command", ["report", "export"])
def test_no_output_replaces_a_file_of_the_study(folder: Path, command: str, name: str):
    path = folder / name
    path.touch()
    before = path.read_bytes()
    for output in (str(path), str(folder / ".." / folder.name / name)):
        ran = inside(command, str(folder), "-o", output, folder=folder)
        assert ran.returncode == 2
        assert "is a file of the study itself" in ran.stderr
    assert path.read_bytes() == before


def test_an_export_of_nothing_yet_has_no_rows(tmp_path: Path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: gradcost[export]")
    ledger.write_document(tmp_path / "study.json", STUDY)
    (tmp_path / "records.jsonl").touch()
    first, second = export.write(tmp_path, tmp_path / "out.parquet")
    assert (parquet.read_table(first).num_rows, parquet.read_table(second).num_rows) == (0, 0)


@pytest.mark.parametrize("name", ["out.csv", "out", "out.parquet.gz"])
def test_an_export_is_named_as_what_it_is(folder: Path, name: str):
    """`-o q.csv` wrote Parquet."""
    pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: gradcost[export]")
    ran = inside("export", str(folder), "-o", str(folder / name), folder=folder)
    assert ran.returncode == 2
    assert "does not end with .parquet: write out" in ran.stderr
    assert not (folder / name).exists()


@pytest.mark.parametrize("command", ["export", "diff"])
def test_every_reader_tells_of_damaged_lines(folder: Path, command: str):
    with open(folder / "records.jsonl", "a") as file:
        file.write('{"kind": "trial", "torn')
    rest = ("-o", "out.parquet") if command == "export" else (str(folder),)
    ran = inside(command, str(folder), *rest, folder=folder)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("1 damaged line of records.jsonl skipped") == (1 if command == "export" else 2)


def test_a_strict_lint_of_no_trial_is_no_success(tmp_path: Path):
    ledger.write_document(tmp_path / "study.json", STUDY)
    (tmp_path / "records.jsonl").touch()
    assert inside("lint", str(tmp_path), folder=tmp_path).returncode == 0
    ran = inside("lint", str(tmp_path), "--strict", folder=tmp_path)
    assert ran.returncode == 3
    assert "no trial on record" in ran.stderr


def test_an_export_without_pyarrow_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"gradcost\[export\]"):
        export.write(folder, folder / "out.parquet")
    assert not (folder / "out.parquet").exists()


def test_they_are_commands_and_load_no_torch(folder: Path):
    code = (
        "import sys\nfrom gradcost.cli.main import app\n"
        f"try: app(['why', {str(folder)!r}, 'aa01'])\nexcept SystemExit as left: code = left.code\n"
        "print('code', code, 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "It was chosen" in ran.stdout
    assert ran.stdout.endswith("code 0 False\n")
    command = [sys.executable, "-m", "gradcost.cli.main"]
    refused = subprocess.run([*command, "show", str(folder), "zz"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("gradcost: no trial of")
