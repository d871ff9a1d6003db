"""The errors that a user can cause. The command line prints their text; any other exception is a bug in gradcost.

GradcostError(ValueError)
    BadInput        an argument, a file or an option is wrong
    Unsupported     a method cannot be used with this model, batch or installation
        MissingExtra    a package of an optional extra is not installed
    DoesNotFit      nothing fits the budget
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


class GradcostError(ValueError):
    """Base class of every error that gradcost raises about its input."""


class BadInput(GradcostError):
    """An argument, a file or an option is wrong; the message names it, the reason and a correct alternative."""


class Unsupported(GradcostError):
    """A method cannot be used with this model, batch or installation; the message names an alternative."""


class MissingExtra(Unsupported, ImportError):
    """A package of an optional extra is not installed; the message names the extra to install."""


class DoesNotFit(GradcostError):
    """No choice fits the budget; the message states the smallest budget that would suffice."""


def require(module: str, purpose: str, extra: str) -> Any:
    """Import an optional dependency.

    Args:
        module: the module to import, such as "scipy.stats".
        purpose: what needs the module, as the subject of a sentence: "A report".
        extra: the extra of gradcost that installs it.
    Returns:
        The module.
    Raises:
        MissingExtra: it is not installed; the message names the extra.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtra(
            f'{purpose} needs {package}, which is not installed: pip install "gradcost[{extra}]".'
        ) from error
