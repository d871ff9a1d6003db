"""Errors: one hierarchy, extras named, and bugs shown with their traceback."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from gradcost.cli import main
from gradcost.core.errors import BadInput, DoesNotFit, GradcostError, MissingExtra, Unsupported, described, require


def test_every_error_is_a_gradcost_error_and_a_value_error():
    for kind in (BadInput, Unsupported, DoesNotFit, MissingExtra):
        assert issubclass(kind, GradcostError)
        assert issubclass(kind, ValueError)
    assert issubclass(MissingExtra, ImportError)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(MissingExtra, match=r'This statistic needs scipy.*pip install "gradcost\[study\]"'):
        require("scipy.stats", "This statistic", "study")


def test_a_package_that_is_installed_and_broken_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "broken_package.py").write_text("raise ImportError('failed to map segment')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        Unsupported, match=r"which is installed and cannot be imported: ImportError: failed to"
    ) as told:
        require("broken_package", "This statistic", "study")
    assert not isinstance(told.value, MissingExtra)


def run(error: BaseException):
    given: dict[str, Any] = {"error": error}
    exec(compile("def command():\n    raise error", main.__file__, "exec"), given)  # a line of gradcost itself
    command = given["command"]
    app = typer.Typer()
    app.command()(main.reported(command))
    return CliRunner().invoke(app, [])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BadInput("no such task."), 2),
        (Unsupported("use mezo()."), 2),
        (MissingExtra("needs scipy."), 2),
        (OSError(28, "No space left on device"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_error_of_the_user_is_a_sentence(error: BaseException, code: int):
    ran = run(error)
    assert ran.exit_code == code
    assert "Traceback" not in ran.output
    assert ran.output.startswith("gradcost: ")


@pytest.mark.parametrize("error", [ValueError("zip() argument 2 is shorter"), KeyError("slopes"), AssertionError()])
def test_a_bug_shows_its_traceback_and_exits_with_70(error: Exception):
    ran = run(error)
    assert ran.exit_code == 70
    assert "Traceback (most recent call last)" in ran.output
    assert type(error).__name__ in ran.output
    assert "bug in gradcost" in ran.output
    assert "usage" not in ran.output.lower()


def test_a_very_long_text_is_recorded_without_its_middle():
    error = ValueError("a" * 1_000_000 + "the end")
    said = described(error)
    assert len(said) < 21_000
    assert said.startswith("ValueError: aaa")
    assert said.endswith("the end")
    assert "characters left out" in said
    assert described(ValueError("short")) == "ValueError: short"
