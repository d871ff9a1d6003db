"""Pictures in PNG files, read by Pillow."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gradcost.core.errors import described, require
from gradcost.tasks.sources import DataError


def read_png(path: Path, mode: Literal["RGB", "RGBA"] = "RGB") -> NDArray[np.uint8]:
    """Read a PNG.

    Args:
        path: the file.
        mode: the kind of pixels that the file must have.
    Returns:
        uint8, shape (height, width, len(mode)).
    Raises:
        DataError: the file is damaged or has pixels of another kind.
        MissingExtra: Pillow is not installed.
    """
    image = require("PIL.Image", "A data set of PNG pictures", "tasks")
    try:
        with image.open(path, formats=["PNG"]) as picture:
            if picture.mode != mode:
                raise DataError(f"{path.name} has {picture.mode} pixels, and {mode} ones are expected")
            return np.array(picture)
    except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path.name} is not a complete PNG ({described(error)})") from error
