"""The description of a data set that the package does not contain."""

from __future__ import annotations

from pathlib import Path

from gradcost.core.files import cache_folder
from gradcost.core.value import value
from gradcost.tasks.sources import Piece, Source


@value
class Dataset:
    """The files of a data set and where to get them.

    Args:
        name: the name on the command line, also that of the folder in the cache.
        pieces: the files.
        sources: where to get the files; `fetch` tries the sources in this order.
        licence: owner and terms of use.
    """

    name: str
    pieces: tuple[Piece, ...]
    sources: tuple[Source, ...]
    licence: str

    def folder(self) -> Path:
        """Return the folder of the files, which is `name` in `cache_folder()`."""
        return cache_folder() / self.name
