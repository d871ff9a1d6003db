"""Exports to TensorBoard, W&B and MLflow: with the real packages, which read back what was written."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gradcost import BadInput
from gradcost.core.errors import MissingExtra
from gradcost.integrations import trackers
from gradcost.results import export, ledger
from gradcost.results.records import read
from in_process import inside

STUDY = {
    "schema": 1,
    "task": "Digits()",
    "task_name": "digits",
    "model_name": "mlp",
    "batch": 64,
    "target": 0.9,
    "optimizer": "SGD",
}
COST = {"schema": 1, "kind": "cost", "method": "mezo()", "estimator": "mezo()", "peak_bytes": 4096, "forwards": 2.0}


def trial(name: str, lr: float, status: str = "finished", **more: Any) -> dict[str, Any]:
    curve = {"step": [1, 2], "loss": [2.0, None], "validation_step": [2], "validation_loss": [1.5]}
    return {
        "schema": 1,
        "kind": "trial",
        "trial": name,
        "method": "mezo()",
        "estimator": "mezo()",
        "optimizer": f"SGD(lr={lr})",
        "phase": "final",
        "lr": lr,
        "seed": 3,
        "steps": 2,
        "seconds": 0.5,
        "status": status,
        "curve": curve | {"validation_accuracy": [0.75]},
        "validation": {"loss": 1.5, "accuracy": 0.75},
        "test": {"loss": 1.25, "accuracy": 0.5},
    } | more


def study(folder: Path, trials: list[dict[str, Any]], **more: Any) -> Path:
    folder.mkdir()
    ledger.write_document(folder / "study.json", STUDY | more)
    for record in (*trials, COST):
        ledger.append(folder, record)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return study(tmp_path / "digits-mlp", [trial("aa01", 0.01), trial("aa02", 0.1, "failed", reason="OSError: gone")])


def test_a_run_has_the_settings_curves_and_figures_of_its_trial(folder: Path):
    first, second = trackers.runs(read(folder))
    assert first.name == "mezo() final lr=0.01 seed=3"
    assert first.config == {
        "trial": "aa01",
        "method": "mezo()",
        "estimator": "mezo()",
        "optimizer": "SGD(lr=0.01)",
        "phase": "final",
        "lr": 0.01,
        "seed": 3,
        "status": "finished",
        "task": "Digits()",
        "model": "mlp",
        "batch": 64,
    }
    assert first.points == {1: {"loss": 2.0}, 2: {"validation_loss": 1.5, "validation_accuracy": 0.75}}
    assert first.summary == {
        "steps": 2,
        "seconds": 0.5,
        "validation_loss": 1.5,
        "validation_accuracy": 0.75,
        "test_loss": 1.25,
        "test_accuracy": 0.5,
        "step_peak_bytes": 4096,
        "step_forwards": 2.0,
    }
    assert not first.has_failed
    assert second.has_failed
    assert second.config["reason"] == "OSError: gone"


def test_scores_have_the_name_and_the_sign_of_the_metric(tmp_path: Path):
    """A record holds -4.5 as the score of a perplexity of 4.5. The Parquet tables lacked the score."""
    curve = {"validation_step": [2], "validation_loss": [1.5], "validation_accuracy": [None]}
    record = trial("aa01", 0.01, curve=curve | {"validation_score": [-4.5]}, test={"loss": 1.25, "score": -3.5})
    results = read(study(tmp_path / "lm", [record], metric="perplexity", lower_is_better=True))
    (run,) = trackers.runs(results)
    assert run.points == {2: {"validation_loss": 1.5, "validation_perplexity": 4.5}}
    assert run.summary["test_perplexity"] == 3.5
    assert {"test_score", "test_accuracy"}.isdisjoint(run.summary)
    assert export.trials(results)[0]["test_score"] == -3.5
    assert dict(zip(*[export.curves(results.trials)[name] for name in ("what", "value")], strict=True)) == {
        "validation_loss": 1.5,
        "validation_accuracy": None,
        "validation_score": -4.5,
    }


def test_tensorboard_reads_the_runs_and_a_second_export_replaces_them(folder: Path, tmp_path: Path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: gradcost[tensorboard]")
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer  # type: ignore[import]
    from tensorboard.plugins.hparams import plugin_data_pb2  # type: ignore[import]

    for _ in range(2):
        ran = inside("export", str(folder), "--to", "tensorboard", "-o", "out put", folder=tmp_path)
        assert ran.returncode == 0, ran.stderr
        assert "tensorboard --logdir 'out put'" in ran.stdout
    seen = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "out put"))
    seen.Reload()
    names = ["mezo()/final_lr=0.01_seed=3_aa01", "mezo()/final_lr=0.1_seed=3_aa02"]
    assert sorted(seen.Runs()) == names
    assert [(x.step, x.value) for x in seen.Scalars(names[0], "loss")] == [(1, 2.0)]
    assert {(x.step, x.value) for x in seen.Scalars(names[0], "validation_accuracy")} == {(2, 0.75)}
    assert {(x.step, x.value) for x in seen.Scalars(names[0], "test_accuracy")} == {(2, 0.5)}
    content = seen.PluginRunToTagToContent("hparams")[names[0]]["_hparams_/session_start_info"]
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert start.hparams["lr"].number_value == 0.01
    assert start.hparams["method"].string_value == "mezo()"


def logged(file: bytes) -> Iterator[bytes]:
    """The records of a short .wandb file: a log of LevelDB, whose records have a checksum, a length and a type."""
    start = 7
    while start < len(file):
        (length, kind) = struct.unpack("<HB", file[start + 4 : start + 7])
        assert kind == 1, "a record of several parts"
        yield file[start + 7 : start + 7 + length]
        start += 7 + length


def test_wandb_writes_runs_without_network(folder: Path, tmp_path: Path):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: gradcost[wandb]")
    from wandb.proto import wandb_internal_pb2  # type: ignore[import]

    ran = inside("export", str(folder), "--to", "wandb", "-o", "out", folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "wandb sync out/wandb/offline-run-*" in ran.stdout
    wandb.teardown()
    files = {path.stem: path for path in tmp_path.glob("out/wandb/offline-run-*/*.wandb")}
    assert set(files) == {"run-aa01", "run-aa02"}
    records = [wandb_internal_pb2.Record.FromString(data) for data in logged(files["run-aa01"].read_bytes())]
    (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (run.project, run.run_group, run.run_id) == ("digits-mlp", "mezo()", "aa01")
    assert {item.key: json.loads(item.value_json) for item in run.config.update}["lr"] == 0.01
    history = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [(row["_step"], row.get("loss"), row.get("validation_accuracy")) for row in history] == [
        (1, 2.0, None),
        (2, None, 0.75),
    ]
    summary: dict[str, Any] = {}
    for record in records:
        for item in record.summary.update:
            summary[item.key or item.nested_key[0]] = json.loads(item.value_json)
    assert (summary["test_accuracy"], summary["step_peak_bytes"]) == (0.5, 4096)


def test_mlflow_reads_the_runs_and_a_second_export_replaces_them(folder: Path, tmp_path: Path):
    mlflow = pytest.importorskip("mlflow", minversion="3", reason="mlflow is not installed: gradcost[mlflow]")
    for _ in range(2):
        ran = inside("export", str(folder), "--to", "mlflow", "-o", "out", "--json", folder=tmp_path)
        assert ran.returncode == 0, ran.stderr
        assert json.loads(ran.stdout) == {"runs": 2}
    client = mlflow.MlflowClient(tracking_uri=trackers.mlflow_uri(tmp_path / "out"))
    place = client.get_experiment_by_name("digits-mlp").experiment_id
    found = {run.info.run_name: run for run in client.search_runs([place])}
    assert set(found) == {"mezo() final lr=0.01 seed=3", "mezo() final lr=0.1 seed=3"}
    run = found["mezo() final lr=0.01 seed=3"]
    assert (run.data.params["lr"], run.data.params["method"]) == ("0.01", "mezo()")
    assert (run.data.metrics["test_accuracy"], run.data.metrics["step_peak_bytes"]) == (0.5, 4096)
    history = client.get_metric_history(run.info.run_id, "validation_accuracy")
    assert [(point.step, point.value) for point in history] == [(2, 0.75)]
    assert {name: run.info.status for name, run in found.items()} == {
        "mezo() final lr=0.01 seed=3": "FINISHED",
        "mezo() final lr=0.1 seed=3": "FAILED",
    }


def test_names_of_records_stay_inside_the_folder(tmp_path: Path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: gradcost[tensorboard]")
    record = trial("../../x", 0.01, method="../../outside")
    trackers.to_tensorboard(read(study(tmp_path / "study", [record])), tmp_path / "in" / "here" / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"study", "in"}
    assert [path.name for path in (tmp_path / "in" / "here").iterdir()] == ["out"]


@pytest.mark.parametrize("package", ["tensorboard", "wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named_with_its_extra(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
):
    monkeypatch.setitem(sys.modules, package, None)
    ran = inside("export", str(folder), "--to", package, "-o", str(tmp_path / "out"), folder=tmp_path)
    assert ran.returncode == 2
    assert f'needs {package}, which is not installed: pip install "gradcost[{package}]".' in ran.stderr
    assert not (tmp_path / "out").exists()
    write = getattr(trackers, f"to_{package}")
    with pytest.raises(MissingExtra):
        write(read(folder), tmp_path / "out") if package == "tensorboard" else write(read(folder), "p")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--to", "csv"), "--to takes parquet, tensorboard, wandb or mlflow, not 'csv'."),
        ((), "--to parquet needs -o FILE.parquet."),
        (("--to", "tensorboard"), "--to tensorboard needs -o FOLDER."),
    ],
)
def test_what_an_export_cannot_do_is_a_sentence(folder: Path, arguments: tuple[str, ...], told: str):
    ran = inside("export", str(folder), *arguments, folder=folder)
    assert (ran.returncode, ran.stderr) == (2, f"gradcost: {told}\n")


def test_a_file_cannot_be_the_folder(folder: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"file cannot be a folder .*: choose another one \(-o FOLDER\)\."):
        trackers._make(tmp_path / "file")


def test_wandb_without_a_login_is_a_sentence(folder: Path, tmp_path: Path):
    pytest.importorskip("wandb", reason="wandb is not installed: gradcost[wandb]")
    command = [sys.executable, "-m", "gradcost", "export", str(folder), "--to", "wandb"]
    kept = {name: text for name, text in os.environ.items() if not name.startswith("WANDB_")}
    ran = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, stdin=subprocess.DEVNULL,
        env=kept | {"HOME": str(tmp_path)},
    )  # fmt: skip
    assert ran.returncode == 2
    assert ran.stderr.startswith("gradcost: Weights & Biases refuses: ")
    assert ran.stderr.endswith(". With -o FOLDER it needs no login.\n")
