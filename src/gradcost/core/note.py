"""The category of gradcost's warnings. This module imports no torch."""

from __future__ import annotations


class Note(UserWarning):
    """A warning about a choice that gradcost makes for the user, or about a problem in the user's model or study."""
