"""Fixtures of all tests."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest


def pytest_collection_finish() -> None:
    """Leave what the imports and the collection of tests have made out of further passes of the garbage collector."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_files_of_other_tests() -> Iterator[None]:
    """Forget the user's files that a test has imported: another test may have a file of the same name."""
    before = len(sys.modules)
    yield
    if (imported := len(sys.modules) - before) > 0:
        for name in [name for name in sys.modules if name.startswith("gradcost_user_")]:
            del sys.modules[name]
        if imported > 100:  # a library
            pytest_collection_finish()
