"""Time a step: the median of many runs, and whether it is reliable."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import psutil
import torch

from gradcost.core.errors import BadInput

WIDE = 0.10  # a timing is doubtful if its interquartile range exceeds this fraction of the median
BUSY = 0.10  # a timing is doubtful if other programs use more than this fraction of one core
MEASURABLE = 0.3  # least seconds of sampling: the system counts busy time in hundredths of a second


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one step.

    The load of other programs is recorded because it can slow down all runs equally, which the spread does not show.
    Example: threads that waited for one another on a shared core were 40 times slower, with a spread of 0.1%.

    Args:
        samples: milliseconds of each run, in order.
        others: mean number of cores that other programs used; None if the system does not report it.
        first: milliseconds of the first warm-up call, which may compile, allocate and load; None without a warm-up.
    """

    samples: tuple[float, ...]
    others: float | None = None
    first: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.samples, n=4)
        return low, high

    @property
    def spread(self) -> float:
        """Return the interquartile range divided by the median."""
        low, high = self.quartiles
        return (high - low) / self.median

    @property
    def doubt(self) -> str | None:
        """Return why this timing is unreliable; None if it is reliable."""
        if self.others is not None and self.others > BUSY:
            cores = f"{self.others:.1f} core{'' if f'{self.others:.1f}' == '1.0' else 's'}"
            return f"other programs used {cores} during the timing; time it again on an idle machine"
        if self.spread > WIDE:
            return (
                f"the middle half of {len(self.samples)} steps spreads over {100 * self.spread:.0f}% of their median"
            )
        return None


def time_steps(
    step: Callable[[], object], samples: int = 30, warmup: int = 3, attempts: int = 3, lasting: float = MEASURABLE
) -> Timing:
    """Time a step: a warm-up, then `samples` runs or `lasting` seconds of runs, whichever takes longer.

    If the process uses GPUs, each sample synchronizes with them at its start and its end.

    Args:
        step: the function to time.
        samples: least number of timed runs, 2 or more.
        warmup: number of warm-up runs.
        attempts: largest number of timings: the step is timed again while `Timing.doubt` is not None.
        lasting: least seconds of sampling.
    Returns:
        The first timing without doubt. If there is none, the timing with the least load of other programs, and among
        equal loads the one with the least spread.
    Raises:
        BadInput: fewer than 2 samples, which have no spread.
    """
    if samples < 2:
        raise BadInput(f"a timing takes 2 samples or more, not {samples}: the spread shows whether it is reliable.")
    warm = [_milliseconds(step, _used_gpus()) for _ in range(warmup)]
    timings = []
    for _ in range(attempts):
        timings.append(replace(_sampled(step, samples, lasting), first=warm[0] if warm else None))
        if timings[-1].doubt is None:
            break
    return min(timings, key=lambda timing: (max(timing.others or 0.0, BUSY), timing.spread))


def time_in_turn(steps: Mapping[str, Callable[[], object]], rounds: int = 30, warmup: int = 3) -> dict[str, Timing]:
    """Time several functions in turn, so that the load of the machine affects all of them alike.

    Each round runs each function once. The function that starts the round changes from round to round.

    Args:
        steps: the functions to time, by name.
        rounds: number of rounds.
        warmup: number of rounds before the first one that counts.
    Returns:
        The Timing of each function, under its name. The samples at one place of all timings are from one round, so
        their ratio is a paired ratio. `others` is None.
    """
    names = list(steps)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        gpus, start = _used_gpus(), number % len(names)
        for name in names[start:] + names[:start]:
            samples[name].append(_milliseconds(steps[name], gpus))
    return {
        name: Timing(tuple(times[warmup:]), first=(times[0] if warmup else None)) for name, times in samples.items()
    }


def _sampled(step: Callable[[], object], samples: int, lasting: float) -> Timing:
    gpus = _used_gpus()
    milliseconds = []
    busy_before, process_before, start = _busy_seconds(), time.process_time(), time.perf_counter()
    while len(milliseconds) < samples or time.perf_counter() - start < lasting:
        milliseconds.append(_milliseconds(step, gpus))
    elapsed, busy_after = time.perf_counter() - start, _busy_seconds()
    if busy_before is None or busy_after is None:
        return Timing(tuple(milliseconds))
    own = time.process_time() - process_before
    return Timing(tuple(milliseconds), max(0.0, busy_after - busy_before - own) / elapsed)


def _milliseconds(step: Callable[[], object], gpus: list[int]) -> float:
    _synchronize(gpus)
    start = time.perf_counter()
    step()
    _synchronize(gpus)
    return 1e3 * (time.perf_counter() - start)


def _synchronize(gpus: list[int]) -> None:
    for gpu in gpus:
        torch.cuda.synchronize(gpu)


def _used_gpus() -> list[int]:
    """Return the GPUs that hold tensors of this process. Synchronizing with an unused GPU would initialize it."""
    if not torch.cuda.is_initialized():
        return []
    return [gpu for gpu in range(torch.cuda.device_count()) if torch.cuda.memory_allocated(gpu)]


def _busy_seconds() -> float | None:
    """Return the processor seconds used by all programs since the machine started; None if unknown."""
    try:
        times = psutil.cpu_times()
    except (OSError, RuntimeError):
        return None
    return sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
