"""The packages that only a report needs, imported when one is made."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def need(name: str) -> Any:
    """The module `name`. Raises ImportError with the extra that brings it."""
    try:
        return import_module(name)
    except ImportError:
        raise ImportError(
            f"A report needs {name}, which is not installed: install gradcost[report], "
            "which brings altair, vl-convert-python and jinja2."
        ) from None
