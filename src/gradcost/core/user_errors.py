"""Errors that the user's own code raises: a sentence with their type, their text, and the line that raised them."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gradcost.core.errors import BadInput, GradcostError, described
from gradcost.core.evaluation.user_modules import is_users
from gradcost.core.interrupts import TORCH_AND_GRADCOST

_GRADCOST = Path(__file__).parents[1]


def line_of(error: BaseException) -> str:
    """Return the user's line that an error has passed last, as " (FILE, line N)"; "" if there is none."""
    frames = [frame for frame in _frames(error) if is_users(_path(frame))]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def line_outside(error: BaseException) -> traceback.FrameSummary | None:
    """Return the last line outside of torch and gradcost that an error has passed; None if there is none."""
    passed = traceback.extract_tb(error.__traceback__)
    return next((line for line in reversed(passed) if not _path(line).startswith(TORCH_AND_GRADCOST)), None)


def is_of_user(error: BaseException) -> bool:
    """Return whether the user's code raised an error: the user's own lines are inside those of gradcost."""
    paths = [_path(frame) for frame in _frames(error)]
    ours = (is_users(path) for path in reversed(paths) if is_users(path) or Path(path).is_relative_to(_GRADCOST))
    return next(ours, False)


def _frames(error: BaseException) -> traceback.StackSummary:
    """Return the lines that an error has passed. Python converts a StopIteration that a generator raises."""
    cause = error.__cause__
    return traceback.extract_tb((cause if isinstance(cause, StopIteration) else error).__traceback__)


def _path(frame: traceback.FrameSummary) -> str:
    return os.path.abspath(frame.filename)


def sentence(error: BaseException) -> str:
    """Return what the user's code raised and where, in one sentence."""
    if isinstance(error, SystemExit):
        return f"the code ended the process by sys.exit({error.code!r}){line_of(error)}: leave that call out."
    return f"{described(error)}{line_of(error)}."


@contextmanager
def user_errors(what: str) -> Iterator[None]:
    """Convert exceptions that the user's code raises inside the context to errors that a user can cause.

    Args:
        what: what failed: the beginning of the message.
    Raises:
        BadInput: the user's code raised, or called `sys.exit`. The message has the type, the text and the line.
        GradcostError: a call in the user's code raised it; the type is the same, and the message has the line.
    """
    try:
        yield
    except GradcostError as error:
        if not (line := line_of(error)):
            raise
        raise type(error)(f"{what}{line}: {error}") from error
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or not is_of_user(error):
            raise
        raise BadInput(f"{what}: {sentence(error)}") from error


@contextmanager
def import_errors(what: str) -> Iterator[None]:
    """Convert an exception of an import of `what` to BadInput, with its type, its text and the user's line."""
    try:
        yield
    except Exception as error:
        raise BadInput(f"{what} could not be imported: {described(error)}{line_of(error)}") from error
