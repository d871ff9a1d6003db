"""The report of a comparison while it runs: rewritten now and then, and reloaded by the browser."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from gradcost.report import html

FIRST = 20  # seconds before the first page: a short comparison needs none
RELOAD = 30  # seconds between two loads of the page by a browser, and at least between two versions of it
SHARE = 0.03  # largest share of the time that goes into pages


class LivePage:
    """The report of a results folder that is not finished. Without the packages of gradcost[report] there is none.

    Args:
        folder: the results folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.due = time.monotonic() + FIRST
        self.path: Path | None = None

    def update(self) -> bool:
        """Write the page if it is due. Return whether this was the first time."""
        start = time.monotonic()
        if start < self.due:
            return False
        is_first = self.path is None
        try:
            self.path = html.write(self.folder, reload=RELOAD)
        except (ImportError, OSError):
            self.due = float("inf")
            return False
        now = time.monotonic()
        self.due = now + max(RELOAD, (now - start) / SHARE)
        return is_first

    def end(self) -> None:
        """Write the page a last time, so that it is not reloaded any more."""
        if self.path is not None:
            with contextlib.suppress(ImportError, OSError):
                html.write(self.folder)
