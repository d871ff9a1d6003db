"""Limits of the operating system that would make a command crash."""

from __future__ import annotations

from gradcost.core.errors import Unsupported

ADDRESS_SPACE = 3 << 29  # bytes with which torch, scikit-learn and the fork server can be imported


def check_address_space() -> None:
    """Raise Unsupported if a limit leaves too little memory to import torch: the import would crash or never end."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < ADDRESS_SPACE:
        raise Unsupported(
            f"this process may use {limit >> 20} MiB of address space, and torch needs {ADDRESS_SPACE >> 20} MiB: "
            "raise the limit, such as with `ulimit -v unlimited`."
        )
