"""The page on long sequences shows the table that its script makes of the committed records."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "results"


@pytest.mark.filterwarnings("ignore")
def test_the_table_of_the_page_is_what_the_records_say():
    spec = importlib.util.spec_from_file_location("long_sequences", FOLDER / "long_sequences.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.table(FOLDER / "long-sequences") in (FOLDER / "long_sequences.md").read_text("utf-8")
