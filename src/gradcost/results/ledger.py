"""Records on disk: one JSON object per line, appended and synced, so a crash loses at most one line.

The last field of each object, "crc", is the CRC-32 of the bytes before it. Lines of older versions lack it.
"""

from __future__ import annotations

import json
import os
import re
import warnings
import zlib
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any

from gradcost.core.errors import BadInput
from gradcost.core.files import no_link, write_whole
from gradcost.core.note import Note

RECORDS = "records.jsonl"
_OWN = (RECORDS, "study.json", "environment.json", "lock")
_READ = (".jsonl", ".safetensors", ".log", ".py")  # of records, weights, step logs and the user's own code
CHECKSUM = "crc"
_SEAL = re.compile(rb',\s*"crc":\s*"([0-9a-f]{8})"\s*}\s*$')
_LARGE = re.compile(rb"\d{20}|[eE]\+?\d{3}")  # may be a number that is not finite, or too long; others are fast
_MARK = b"\xef\xbb\xbf"  # the byte order mark that some editors put before UTF-8


def append(folder: Path, record: dict[str, Any]) -> None:
    """Add a record to `records.jsonl` and wait until it is on disk. Only one process may write at a time.

    If a crash left the last line incomplete, the record starts on a new line.

    Args:
        folder: the results folder.
        record: plain JSON; numbers must be finite.
    Raises:
        OSError: the disk is full, the folder is read-only, or the file is a symbolic link. Earlier records are
            intact; the new one may be incomplete.
    """
    line = _sealed(json.dumps(record, allow_nan=False, separators=(",", ":")), ",", ":")
    with open(folder / RECORDS, "ab+", opener=no_link) as file:
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
    """Yield the JSON object of each line that is not empty; None for a damaged line.

    A killed run can leave an incomplete line at the end. After the first line with a checksum, a line without one is
    damaged.
    """
    for _, record in numbered_lines(path):
        yield record


def numbered_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield the number of each line, from 1, with the object that `lines` yields."""
    expected = False
    for number, line in enumerate(_content(path).split(b"\n"), 1):
        if line.strip():
            record = parse(line, expected)
            expected = expected or (record is not None and _SEAL.search(line, max(0, len(line) - 60)) is not None)
            yield number, record


def parse(text: bytes, has_checksum: bool = False) -> dict[str, Any] | None:
    """Return the JSON object in `text` without its checksum; None if `text` is not one or its checksum differs.

    Numbers that are not finite become None.

    Args:
        text: UTF-8.
        has_checksum: whether an object without a checksum counts as damaged.
    """
    try:
        return _parsed(text, has_checksum)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, damaged, or nested too deep
        return None


def _parsed(text: bytes, has_checksum: bool = False) -> dict[str, Any]:
    text = text.removeprefix(_MARK).replace(b"\r\n", b"\n")
    seal = _SEAL.search(text, max(0, len(text) - 60))
    if has_checksum and seal is None:
        raise ValueError("it has no checksum")
    numbers = {"parse_float": _finite, "parse_int": _whole} if _LARGE.search(text) else {}
    content = json.loads(text, parse_constant=lambda _: None, **numbers)
    if seal is not None and zlib.crc32(text[: seal.start()]) != int(seal[1], 16):
        raise ValueError("its checksum differs")
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    content.pop(CHECKSUM, None)
    return content


def _finite(text: str) -> float | None:
    number = float(text)
    return number if isfinite(number) else None


def _whole(text: str) -> int | None:
    return int(text) if len(text) <= 20 else None  # 20 digits hold every seed


def _sealed(text: str, comma: str, colon: str) -> str:
    """Return the text of a JSON object with its checksum as the last field, and a line end."""
    before = text.removesuffix("}").rstrip("\n")
    return f'{before}{comma}"{CHECKSUM}"{colon}"{zlib.crc32(before.encode()):08x}"' + text[len(before) :] + "\n"


def write_document(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON document atomically: a reader sees the complete old or new content."""
    write_whole(path, _sealed(json.dumps(document, indent=2, allow_nan=False), ",\n  ", ": "))


def document(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None if there is no file.

    Raises:
        BadInput: the file holds no JSON object, or is damaged. The message names the line.
        OSError: the file cannot be read.
    """
    if not path.exists():
        return None
    content = _content(path)
    try:
        return _parsed(content)
    except (ValueError, RecursionError) as error:
        line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise BadInput(f"{path}{line} is damaged ({error}): it was cut short or edited.") from None


def environment(path: Path) -> dict[str, Any]:
    """Return the JSON object in environment.json. If the file is missing, or damaged, which issues a Note: {}."""
    try:
        return document(path) or {}
    except BadInput as error:
        warnings.warn(f"{error} Every record has its own environment, so nothing is lost: delete it.", Note, 2)
        return {}


def _content(path: Path) -> bytes:
    if not path.is_file():  # reading a FIFO or a device could last for ever
        raise BadInput(f"{path} is not a regular file: remove it.")
    return path.read_bytes()


def refuse_own(folder: str | Path, output: Path) -> None:
    """Raise BadInput if `output` is a file that is read, which it would replace: of the study, or of another one.

    Args:
        folder: a results folder.
        output: the file to write.
    """
    own = {(Path(folder) / name).resolve() for name in _OWN}
    is_read = output.is_file() and (output.name in _OWN or output.suffix in _READ)
    if is_read or output.resolve() in own:
        raise BadInput(
            f"{output} is a file of the study itself, or one that is read: give another name for the output."
        )
