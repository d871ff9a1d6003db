"""A results folder as tidy Parquet tables: one row per trial, and one row per point of its curves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gradcost.core.errors import BadInput, require
from gradcost.core.files import replacing
from gradcost.results import ledger
from gradcost.results.records import Results, TrialRecord, read

PART = 500  # number of trials whose curves are in memory at once

# Fields of TrialRecord without a column of the same name.
_NESTED = ("curve", "validation", "test", "slopes", "environment")
# The type of each field of TrialRecord, such as "int", without None.
_TYPES = {field.name: str(field.type).removesuffix(" | None") for field in dataclasses.fields(TrialRecord)}
# Pairs of fields of Curve: steps, and the values at these steps.
_CURVES = (
    ("step", "loss"),
    ("step", "slope"),
    ("validation_step", "validation_loss"),
    ("validation_step", "validation_accuracy"),
    ("validation_step", "validation_score"),
)


def trials(results: Results) -> list[dict[str, Any]]:
    """Return one row per trial: its fields, and its scores in columns such as `validation_accuracy`.

    `validation_score` and `test_score` are those that rank the runs: the accuracy, or `Metric.score`.
    """
    return [_row(run) for run in results.trials]


def _row(run: TrialRecord) -> dict[str, Any]:
    row = {field.name: getattr(run, field.name) for field in dataclasses.fields(run) if field.name not in _NESTED}
    for split, scores in (("validation", run.validation), ("test", run.test)):
        for name in ("loss", "accuracy", "score"):
            row[f"{split}_{name}"] = None if scores is None else getattr(scores, name)
    return row


def curves(runs: Iterable[TrialRecord]) -> dict[str, list[Any]]:
    """Return the points of the curves as columns: "trial", "step", "what" (the field of `Curve`) and "value".

    Scores that are the accuracies are not repeated.

    Args:
        runs: records of trials.
    """
    columns: dict[str, list[Any]] = {"trial": [], "step": [], "what": [], "value": []}
    for run in runs:
        for step_name, name in _CURVES:
            values = getattr(run.curve, name)  # empty for slopes that were not measured
            if name == "validation_score" and values == run.curve.validation_accuracy:
                continue
            columns["trial"] += [run.trial] * len(values)
            columns["step"] += getattr(run.curve, step_name)[: len(values)]
            columns["what"] += [name] * len(values)
            columns["value"] += values
    return columns


def write(folder: Path, path: Path, results: Results | None = None) -> tuple[Path, Path]:
    """Write the trials to `path`, and their curves to NAME.curves.parquet in the same folder.

    Args:
        folder: a results folder.
        path: the file for the trials, NAME.parquet.
        results: the records of the folder. None: they are read.
    Returns:
        Both paths.
    Raises:
        BadInput: the folder is not a results folder, or `path` is one of its files, a folder, no UTF-8, or does
            not end with .parquet.
        MissingExtra: pyarrow is not installed.
        OSError: a file cannot be written.
    """
    parquet = require("pyarrow.parquet", "An export", "export")
    pyarrow = require("pyarrow", "An export", "export")
    results = read(folder) if results is None else results
    if path.is_dir():
        raise BadInput(f"{path} is a folder: name a file in it, such as {path / 'trials.parquet'}.")
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise BadInput(f"{path} is no name in UTF-8, which Parquet needs: choose another name.") from None
    ledger.refuse_own(folder, path)
    if path.suffix != ".parquet":
        raise BadInput(
            f"an export is a Parquet file, and {path} does not end with .parquet: write {path.stem}.parquet."
        )
    curves_path = path.with_name(f"{path.stem}.curves{path.suffix}")
    text, integer, real = pyarrow.string(), pyarrow.int64(), pyarrow.float64()
    types = {"trial": text, "step": integer, "what": text, "value": real}
    schema = pyarrow.schema(list(types.items()))
    with replacing(curves_path) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        for start in range(0, len(results.trials), PART):
            part = results.trials[start : start + PART]
            writer.write_table(pyarrow.Table.from_pydict(curves(part), schema))
    rows = trials(results)
    columns = {"int": integer, "float": real, "bool": pyarrow.bool_()}
    types = {
        name: real if name.endswith(("_loss", "_accuracy", "_score")) else columns.get(_TYPES[name], text)
        for name in (rows[0] if rows else ())
    }
    with replacing(path) as temporary:
        parquet.write_table(pyarrow.Table.from_pylist(rows, pyarrow.schema(list(types.items()))), temporary)
    return path, curves_path
