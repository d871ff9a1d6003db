"""Evaluations in different threads run one after the other.

An evaluation seeds the random generators of the process, and changes modules and modes that other threads see. So a
lock is held during each estimate, evaluation of an objective, and training step. Code of another thread that
draws random numbers at the same time is not held back: it disturbs an evaluation, and is disturbed by it.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


class _State:
    lock = threading.RLock()  # reentrant: an estimate evaluates its objective


def one_at_a_time(function: Function) -> Function:
    """Wrap a function: while it runs in one thread, other threads wait before they run any function wrapped so.

    Args:
        function: the function to wrap. It must not wait for another thread that calls such a function.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _State.lock:
            return function(*args, **kwargs)

    return run  # pyright: ignore[reportReturnType]


def _new_lock() -> None:
    _State.lock = threading.RLock()  # in a forked process, the thread that held the old one does not exist


os.register_at_fork(after_in_child=_new_lock)
