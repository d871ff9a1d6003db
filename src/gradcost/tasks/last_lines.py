"""A file that another file ends with, such as a data set that a package stores after other lines."""

from __future__ import annotations

from pathlib import Path

from gradcost.core.value import value
from gradcost.tasks.sources import DataError, Source


@value
class LastLines(Source):
    """The last lines of one file of another source, as a file of their own.

    Args:
        source: the other source.
        member: the name of its file.
        name: the name of the new file; it may be that of `member`.
        lines: number of lines.
        replaced: two byte strings: each occurrence of the first becomes the second. None: nothing is replaced.
    """

    source: Source
    member: str
    name: str
    lines: int
    replaced: tuple[bytes, bytes] | None = None

    @property
    def label(self) -> str:
        return self.source.label

    def fetch(self, folder: Path) -> None:
        self.source.fetch(folder)
        lines = (folder / self.member).read_bytes().splitlines(keepends=True)
        if len(lines) < self.lines:
            raise DataError(f"{self.member} has {len(lines)} lines, fewer than {self.lines}")
        content = b"".join(lines[-self.lines :])
        (folder / self.name).write_bytes(content.replace(*self.replaced) if self.replaced is not None else content)
