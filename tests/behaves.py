"""A task whose trials misbehave: they leave threads or processes behind, hang, or die."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradcost.core.value import value
from gradcost.tasks.digits import Digits
from gradcost.tasks.task import Split, Splits

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


def limited_memory() -> None:
    """Leave 256 MiB of address space, as `ulimit -v` does."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + (256 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def memory(write: Write) -> None:
    limited_memory()
    bytearray(1 << 30)


def memory_of_torch(write: Write) -> None:
    limited_memory()
    torch.empty(1 << 30)


def exit_quietly(write: Write) -> None:
    sys.exit()


def exit_at_once(write: Write) -> None:
    os._exit(0)


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError


def unprintable(write: Write) -> None:
    raise Unprintable


def change_folder(write: Write) -> None:
    os.chdir("/")


def none(write: Write) -> None:
    pass


_KINDS = (thread, process, crash_with_child, sleep, stop, segfault, memory, memory_of_torch, exit_quietly)
_KINDS += (exit_at_once, unprintable, change_folder, none)
KINDS = {each.__name__: each for each in _KINDS}


@value
class Behaves(Digits):
    """Digits, with a side effect before the trial trains: a key of `KINDS`. pids: the file for ids of processes."""

    kind: str = "none"
    pids: str = ""

    def splits(self) -> Splits:
        KINDS[self.kind](lambda *ids: Path(self.pids).write_text(" ".join(map(str, ids))))
        return super().splits()


@value
class Scores(Digits):
    """Digits whose score has a number of targets that no record can hold."""

    def score(self, model: nn.Module, split: Split) -> Any:
        return {"loss": 1.0, "accuracy": 0.5, "targets": torch.ones(2)}
