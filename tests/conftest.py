"""Fixtures of all tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _no_files_of_other_tests() -> Iterator[None]:
    """Forget the user's files that a test has imported: another test may have a file of the same name."""
    yield
    for name in [name for name in sys.modules if name.startswith("gradcost_user_")]:
        del sys.modules[name]
