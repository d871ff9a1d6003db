"""A stand-in for the library `datasets`: splits as lists of rows, from files or from memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


class Part:
    """A split. It counts the rows that are read in full, as images are decoded then.

    Args:
        rows: the rows.
        read: a list that gets each row that is read in full.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], read: list[Any] | None = None) -> None:
        self.rows, self.read = list(rows), [] if read is None else read
        self.column_names = list(self.rows[0])

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for row in self.rows:
            self.read.append(row)
            yield row

    def __getitem__(self, column: str) -> list[Any]:
        return [row[column] for row in self.rows]

    def select(self, places: Iterable[int]) -> Part:
        return Part((self.rows[place] for place in places), self.read)


class Jsonl:
    """A stand-in for `datasets` that reads jsonl files alone."""

    @staticmethod
    def load_dataset(source: str, name: None, folder: None, data_files: dict[str, str]) -> dict[str, Part]:
        assert (source, name, folder) == ("json", None, None)
        return {
            part: Part(json.loads(line) for line in Path(path).read_text().splitlines())
            for part, path in data_files.items()
        }
