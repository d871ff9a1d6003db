"""Interrupt a piece of work at a chosen moment, as Ctrl-C does."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from gradcost.core.evaluation import one_at_a_time


class Moments:
    """Counts the moments of some work: the call and each line of every Python function, also in torch.

    A KeyboardInterrupt from a signal comes between two calls, so at the latest before such a line. `at` is the number
    of the moment at which it is raised; None only counts.
    """

    def __init__(self, at: int | None = None) -> None:
        self.at, self.count = at, 0

    def of(self, work: Callable[[], object]) -> BaseException | None:
        """Run the work; return the exception that leaves it, None if none does."""
        sys.settrace(self._trace)
        try:
            work()
        except BaseException as error:
            return error
        finally:
            sys.settrace(None)
        return None

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename == one_at_a_time.__file__:
            return None  # a signal cannot come between the end of a `with` block and the release of a lock
        if event in ("call", "line"):
            self.count += 1
            if self.count == self.at:
                raise KeyboardInterrupt
        return self._trace


def after(seconds: float, work: Callable[[], object]) -> BaseException | None:
    """Run the work and interrupt it by a signal after a time; return the exception that leaves it, if any."""
    is_running = True

    def interrupt(number: int, frame: FrameType | None) -> None:
        if is_running:
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
        work()
        is_running = False
    except BaseException as error:
        is_running = False
        return error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    return None
