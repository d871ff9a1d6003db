"""Run a function in several processes of one torch.distributed group."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Results = list[dict[str, Any]]


def in_processes(work: Callable[[Path], dict[str, Any]], folder: Path, count: int) -> Results:
    """Run `work(folder)` in `count` processes of one group; return what each one returns."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gradcost.studies.preload"])
    children = [context.Process(target=_enter, args=(work, folder, rank, count)) for rank in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join(300)
    assert [child.exitcode for child in children] == [0] * count
    return [json.loads((folder / f"result{rank}").read_text()) for rank in range(count)]


def _enter(work: Callable[[Path], dict[str, Any]], folder: Path, rank: int, count: int) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(seconds=120), world_size=count, rank=rank)
    result = work(folder)
    (folder / f"result{rank}").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
