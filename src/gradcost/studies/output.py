"""What worker processes print: a file for each trial, so that a terminal shows the progress alone."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gradcost.core.errors import BadInput
from gradcost.core.files import no_link
from gradcost.core.streams import open_closed_streams

OUTPUT = "output"  # the folder of these files in a results folder
LARGEST = 1 << 20  # bytes of a file in which warnings are looked for
_WARNING = re.compile(r"^\S.*?: (\w*Warning: .*)$", re.MULTILINE)


def to_file(path: Path) -> None:
    """Send what this process and its children print to a file from now on. Without a file, nothing changes.

    Args:
        path: the file. What a process prints is added to its end.
    """
    with contextlib.suppress(OSError, BadInput):
        path.parent.mkdir(exist_ok=True)
        open_closed_streams()
        with open(path, "ab", opener=no_link) as file:
            for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
                stream.flush()
                os.dup2(file.fileno(), descriptor)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def remove_if_empty(path: Path) -> None:
    """Remove the file of a process that has printed nothing."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        if not path.stat().st_size:
            path.unlink()


@dataclass(frozen=True)
class Warned:
    """The warnings of some trials.

    Args:
        warnings: the number of different warnings.
        trials: the number of trials that issued one or more.
        example: the warning of the most trials, in one line.
        folder: where the trials' output is.
    """

    warnings: int
    trials: int
    example: str
    folder: Path


def warned(folder: Path, trials: Iterable[str]) -> Warned | None:
    """Return the warnings that some trials of a results folder printed; None if there are none.

    Args:
        folder: the results folder.
        trials: ids of the trials.
    """
    found: Counter[str] = Counter()
    affected = 0
    for trial in trials:
        try:
            with open(folder / OUTPUT / f"{trial}.txt", encoding="utf-8", errors="replace", opener=no_link) as file:
                messages = set(_WARNING.findall(file.read(LARGEST)))
        except (OSError, BadInput):
            continue
        found.update(messages)
        affected += bool(messages)
    if not found:
        return None
    return Warned(len(found), affected, found.most_common(1)[0][0], folder / OUTPUT)
