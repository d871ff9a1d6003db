"""Who performs trials: a pool of processes on this machine."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from gradcost.study.perform import perform, prepare
from gradcost.study.trial import Trial

# Imported once and forked from; torch's optimizers import dynamo at their first step. What is missing is passed over.
PRELOADED = ("gradcost.study.perform", "gradcost.noise_fused", "sklearn.datasets", "torch._dynamo")


def perform_all(
    trials: Sequence[Trial], code: str, workers: int, user_file: str | None = None
) -> Iterator[dict[str, Any]]:
    """The record of each trial, as it finishes. Each worker has one thread, so a trial's bits do not depend on
    how many there are. When the caller stops listening, or is interrupted, the workers are stopped."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    pool = ProcessPoolExecutor(
        max_workers=max(1, min(workers, len(trials))),
        mp_context=context,
        initializer=prepare,
        initargs=(1, user_file),
    )
    try:
        futures = [pool.submit(perform, trial, code) for trial in trials]
        for future in as_completed(futures):
            yield future.result()
        pool.shutdown()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()
        raise
