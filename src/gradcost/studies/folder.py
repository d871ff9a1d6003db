"""The results folder of a study: create it, and check that it belongs to the study."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from gradcost.core.errors import BadInput
from gradcost.core.notes import Note
from gradcost.results import ledger
from gradcost.results.ledger import document
from gradcost.results.records import TrialRecord, read
from gradcost.results.tuning import completed
from gradcost.studies.environment import describe, provenance


def make_folder(folder: Path) -> None:
    """Create a results folder, if there is none.

    Raises:
        BadInput: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror
        raise BadInput(
            f"{folder} cannot be a results folder ({reason}): choose another one (on the command line: -o DIR)."
        ) from error


def open_folder(folder: Path, document_: dict[str, Any], code: str, device: str | None = None) -> None:
    """Create the files of a results folder, or check that the existing ones belong to the same study.

    Args:
        folder: the results folder; it exists.
        document_: the content of study.json. Its fields "comparison" and "question" identify the study.
        code: the fingerprint of the code, for environment.json.
        device: where the trials run, for environment.json.
    Raises:
        BadInput: the folder contains another study.
        OSError: the folder cannot be written.
    """
    path = folder / "study.json"
    if path.exists():
        _repair_environment(folder / "environment.json", code)
        on_record(folder, document_)
        return
    make_folder(folder)
    _require_free(folder)
    environment = describe(torch.get_num_threads(), code, device)
    ledger.write_document(folder / "environment.json", {**environment, **provenance()})
    (folder / "records.jsonl").touch()
    ledger.write_document(path, document_)  # last, so a folder with a study.json is complete


def on_record(folder: Path, document_: dict[str, Any]) -> dict[str, TrialRecord]:
    """Return the trials of a study that finished or diverged, by their ids. This only reads.

    Args:
        folder: the results folder. Without a study.json, nothing is on record.
        document_: as in `open_folder`.
    Raises:
        BadInput: the folder contains another study.
    """
    path = folder / "study.json"
    if not path.exists():
        _require_free(folder)
        return {}
    found = read(folder)  # raises if the folder is incomplete or has another schema
    existing = document(path) or {}
    if any(existing.get(name) != document_.get(name) for name in ("question", "comparison")):
        kind = "study" if "question" in document_ else "comparison"
        held, wanted = existing.get("question"), document_.get("question")
        others = f" It holds: {held} Now: {wanted}" if held != wanted else ""
        raise BadInput(
            f"{folder} holds another {kind}, or the same one made by other code: choose another folder "
            f"(on the command line: -o DIR).{others}"
        )
    return {run.trial: run for run in completed(found.trials)}


def _require_free(folder: Path) -> None:
    """Raise BadInput if a folder without a study has files of something else under the names of a study's files."""
    records, environment = folder / "records.jsonl", folder / "environment.json"
    lines = [line for _, line in ledger.numbered_lines(records)] if records.is_file() else []
    foreign = [records] if lines and not any(line and "schema" in line for line in lines) else []
    if environment.is_file():
        try:
            known = document(environment)
        except BadInput:
            known = {}
        foreign += [] if known is None or not known or "gradcost" in known else [environment]
    if foreign:
        raise BadInput(
            f"{foreign[0]} belongs to something else: choose another folder (on the command line: -o DIR)."
        )


def _repair_environment(path: Path, code: str) -> None:
    """Replace a damaged environment.json, and keep it beside the new one: every record has its own environment."""
    try:
        document(path)
    except BadInput as error:
        kept = path.with_name(f"{path.name}.damaged")
        os.replace(path, kept)
        ledger.write_document(path, dict(describe(torch.get_num_threads(), code)))
        warnings.warn(f"{error} It is kept as {kept}, and a new one was written.", Note, stacklevel=2)
