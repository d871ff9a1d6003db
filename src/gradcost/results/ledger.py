"""Records on disk: one JSON object a line, appended and synced, so that a crash costs at most one line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradcost.core.files import write_whole


def append(folder: Path, record: dict[str, Any]) -> None:
    """Add a record to `records.jsonl` and wait until the disk has it. One process writes; others send to it.

    A line that a crash tore is closed first, so that it spoils no other. Raises: OSError (a full disk, a
    read-only folder), in which case the file holds what it held, or that and a torn line.
    """
    line = json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n"
    with (folder / "records.jsonl").open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def records(folder: Path) -> Iterator[dict[str, Any]]:
    """What was appended, in that order; a line that a crash tore is passed over."""
    path = folder / "records.jsonl"
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


def write_document(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON document so that a reader finds the whole old one or the whole new one."""
    write_whole(path, json.dumps(document, indent=2, allow_nan=False) + "\n")
