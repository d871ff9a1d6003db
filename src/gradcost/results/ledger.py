"""Records on disk: one JSON object per line, appended and synced, so a crash loses at most one line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any

from gradcost.core.files import write_whole

RECORDS = "records.jsonl"


def append(folder: Path, record: dict[str, Any]) -> None:
    """Add a record to `records.jsonl` and wait until it is on disk. Only one process may write at a time.

    If a crash left the last line incomplete, the record starts on a new line.

    Args:
        folder: the results folder.
        record: plain JSON; numbers must be finite.
    Raises:
        OSError: the disk is full or the folder read-only. Earlier records are intact; the new one may be incomplete.
    """
    line = json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n"
    with (folder / RECORDS).open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def records(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a folder in the order they were appended, without incomplete lines."""
    path = folder / RECORDS
    if path.exists():
        yield from (record for record in lines(path) if record is not None)


def lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """Yield the JSON object of each line; None for an incomplete line, which a killed run can leave at the end."""
    for line in path.read_bytes().split(b"\n"):
        if line.strip():
            yield parse(line)


def parse(text: bytes) -> dict[str, Any] | None:
    """Return the JSON object in `text`; None if `text` is not one. Numbers in it that are not finite become None."""
    try:
        content = json.loads(text, parse_constant=lambda _: None, parse_float=_finite)
    except ValueError:  # not JSON, or not UTF-8
        return None
    return content if isinstance(content, dict) else None


def _finite(text: str) -> float | None:
    number = float(text)
    return number if isfinite(number) else None


def write_document(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON document atomically: a reader sees the complete old or new content."""
    write_whole(path, json.dumps(document, indent=2, allow_nan=False) + "\n")
