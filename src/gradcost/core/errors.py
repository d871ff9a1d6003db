"""The errors that a user can cause. The command line prints their text; any other exception is a bug in gradcost.

GradcostError(ValueError)
    BadInput        an argument, a file or an option is wrong
        NotFinite       the loss or a slope of a batch is not finite (gradcost.core.finite)
    Unsupported     a method cannot be used with this model, batch or installation
        MissingExtra    a package of an optional extra is not installed
    DoesNotFit      no method or setting fits the budget
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


class GradcostError(ValueError):
    """Base class of all errors that a user can cause."""


class BadInput(GradcostError):
    """An argument, a file or an option is wrong; the message names it, the reason and a correct alternative."""


class Unsupported(GradcostError):
    """A method cannot be used with this model, batch or installation; the message names an alternative."""


class MissingExtra(Unsupported, ImportError):
    """A package of an optional extra is not installed; the message names the extra to install."""


def described(error: BaseException) -> str:
    """Return the type of an exception and its text, as the last line of a traceback does, also if it has no text."""
    try:
        text = str(error)
    except Exception:
        text = "an error whose text cannot be made"
    if isinstance(error, MemoryError):
        text = text or "the memory is exhausted, or a limit of it, such as `ulimit -v`"
    return shortened(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def brief(error: BaseException) -> str:
    """Return the type of an exception and the first line of its text, without a full stop at its end."""
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """Return the first line of the text of an exception, without a full stop at its end; "no message" if empty."""
    return (str(error).strip().splitlines() or ["no message"])[0].rstrip(".")


def shortened(text: str, most: int = 20_000) -> str:
    """Return a text without the middle part if it has more than `most` characters: it may be a printed tensor."""
    left_out = len(text) - most
    if left_out <= 0:
        return text
    return f"{text[: most // 2]} ... ({left_out:,} characters left out) ... {text[len(text) - most // 2 :]}"


class DoesNotFit(GradcostError):
    """No method or setting fits the budget; the message states the smallest budget that would suffice."""


def require(module: str, purpose: str, extra: str) -> Any:
    """Import an optional dependency.

    Args:
        module: the module to import, such as "scipy.stats".
        purpose: what needs the module, such as "A report": the subject of the error message.
        extra: the extra of gradcost that installs the module.
    Returns:
        The imported module.
    Raises:
        MissingExtra: the module is not installed; the message names the extra.
        Unsupported: the module is installed and cannot be imported, such as for lack of memory.
    """
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f'{purpose} needs {package}, which is not installed: pip install "gradcost[{extra}]".'
        ) from error
    except (ImportError, MemoryError) as error:
        raise Unsupported(
            f"{purpose} needs {package}, which is installed and cannot be imported: {described(error)}. Check that "
            f"`python -c 'import {module}'` works."
        ) from error
