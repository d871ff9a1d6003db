"""A task whose trials misbehave: they leave threads or processes behind, hang, or die."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from gradcost.core.value import value
from gradcost.tasks.digits import Digits
from gradcost.tasks.task import Splits

Write = Callable[..., object]  # notes the ids of the processes that must not stay


def thread(write: Write) -> None:
    threading.Thread(target=time.sleep, args=(600,)).start()
    write(os.getpid())


def process(write: Write) -> None:
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    write(os.getpid(), child.pid)


def crash_with_child(write: Write) -> None:
    child = os.fork()  # it holds the worker's end of the pipe open
    if child == 0:
        time.sleep(600)
        os._exit(0)
    write(os.getpid(), child)
    os._exit(3)


def sleep(write: Write) -> None:
    write(os.getpid())
    time.sleep(600)


def stop(write: Write) -> None:
    write(os.getpid())
    os.kill(os.getpid(), signal.SIGSTOP)


def segfault(write: Write) -> None:
    write(os.getpid())
    os.kill(os.getpid(), signal.SIGSEGV)


def none(write: Write) -> None:
    pass


KINDS = {each.__name__: each for each in (thread, process, crash_with_child, sleep, stop, segfault, none)}


@value
class Behaves(Digits):
    """Digits, with a side effect before the trial trains: a key of `KINDS`. pids: the file for ids of processes."""

    kind: str = "none"
    pids: str = ""

    def splits(self) -> Splits:
        KINDS[self.kind](lambda *ids: Path(self.pids).write_text(" ".join(map(str, ids))))
        return super().splits()
