"""Run functions in parallel on the threads that torch computes on.

After a matrix product, the OpenMP threads of torch spin for some milliseconds. A thread pool, or a second OpenMP
runtime (numba's parallel loops), would share the cores with them: on two cores it gains nothing over one thread.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run_in_parallel(jobs: Sequence[Callable[[], object]]) -> None:
    """Call all jobs, each on a thread, and return when all are finished.

    The threads are those of the OpenMP runtime that torch has loaded. Where it has not GCC's interface (such as on
    macOS), they are those of a pool.

    Args:
        jobs: functions that release the GIL for most of their time. At least one.
    Raises:
        BaseException: the first error of a job.
    """
    parallel = _openmp_parallel()
    if parallel is None:
        futures = [_pool(len(jobs) - 1).submit(job) for job in jobs[1:]]
        try:
            jobs[0]()
        finally:
            wait(futures)  # jobs write into tensors of the caller
        for future in futures:
            future.result()
        return
    waiting, finished, errors = iter(jobs), [], []

    def run_waiting(_: object) -> None:
        try:
            for job in waiting:
                job()
                finished.append(job)
        except BaseException as error:  # ctypes would print it and continue
            errors.append(error)

    parallel(_BODY(run_waiting), None, len(jobs), 0)
    if errors:
        raise errors[0]
    if len(finished) < len(jobs):  # an interrupt came before the `try`
        raise KeyboardInterrupt


@functools.cache
def _openmp_parallel() -> Callable[..., None] | None:
    """Return GOMP_parallel(body, data, threads, flags) of the runtime that torch has loaded, or None."""
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes, parallel.restype = (_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return parallel


@functools.cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="gradcost-noise")
