"""The standard streams of this process, also where its caller has closed some of them, as `>&-` does in a shell."""

from __future__ import annotations

import os
import sys


def open_closed_streams() -> set[str]:
    """Open /dev/null in the place of each closed standard stream, also for processes that this one starts.

    Otherwise the next file that is opened would get the number of the stream, and receive what is printed.

    Returns:
        The names of the streams that were closed: "stdin", "stdout", "stderr".
    """
    names = ("stdin", "stdout", "stderr")
    closed = {name for name in names if getattr(sys, name) is None}
    for number, name in enumerate(names):
        try:
            os.fstat(number)
        except OSError:
            descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest free number, so that of the stream
            os.set_inheritable(descriptor, True)
            closed.add(name)
    for name in closed:  # after the loop, because these files take further numbers
        setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
    return closed
