"""Measure peak memory from torch's allocator, which includes the workspaces inside kernels."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._C._profiler import _RecordFunctionFast
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

_MARK = "gradcost "


@dataclass(frozen=True)
class Allocated:
    """Peak bytes requested from the allocator during a run, beyond those allocated before it.

    Args:
        peak: the peak of requested bytes, without rounding.
        allocated: on CUDA, the peak of bytes rounded up to allocator blocks; else None.
        reserved: on CUDA, the most bytes that the process reserved on the device, earlier allocations included; this
            number decides whether a device runs out of memory. Else None.
        inside: for each operator whose own peak exceeds the peak between operators, the excess in bytes. It is due
            to workspaces, which `Bytes` misses. Empty on CUDA, where workspaces are not measured.
    """

    peak: int
    allocated: int | None = None
    reserved: int | None = None
    inside: dict[str, int] = field(default_factory=dict)


def allocated(work: Callable[[], object], device: str | torch.device = "cpu") -> Allocated:
    """Call `work` and return its peak memory from the allocator: two calls on a CPU, one on CUDA.

    Law: on a CPU the peak is the same number of bytes every time. It exceeds the peak of `Bytes` by the workspaces
    inside kernels, and by 5,056 bytes for each random-generator state that is in memory during the run.

    Args:
        work: any function. Call it once before: the first call may allocate memory that it never frees.
        device: the device whose allocator is read.
    Returns:
        Allocated(peak, allocated, reserved, inside).
    Source: torch.profiler's memory events; `torch.cuda.memory_stats`.
    """
    device = torch.device(device)
    return _on_cuda(work, device) if device.type == "cuda" else _on_cpu(work)


def _on_cuda(work: Callable[[], object], device: torch.device) -> Allocated:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # else cached blocks of earlier work count as reserved
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    stats = torch.cuda.memory_stats(device)

    def increase(kind: str) -> int:
        return stats[f"{kind}.all.peak"] - before[f"{kind}.all.current"]

    return Allocated(increase("requested_bytes"), increase("allocated_bytes"), stats["reserved_bytes.all.peak"])


def _on_cpu(work: Callable[[], object]) -> Allocated:
    peak = max(_totals(_profiled_events(work)), default=0)
    with _OperatorMarks():
        events = _profiled_events(work)
    return Allocated(max(peak, 0), inside=_workspaces(events))


class _OperatorMarks(TorchDispatchMode):
    """Add an event to the profiler for each dispatched operator, with its name and duration."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with _RecordFunctionFast(_MARK + str(func)):
            return func(*args, **(kwargs or {}))


def _profiled_events(work: Callable[[], object]) -> list[Any]:
    """Return the profiler's events in order of their start."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else Kineto prints every start and stop to standard error
    profiler: Any = profile(profile_memory=True)
    with profiler:
        work()
    return sorted(profiler.kineto_results.events(), key=lambda event: event.start_ns())


def _totals(events: Sequence[Any]) -> list[int]:
    """Return the total of allocated bytes after each allocation or free."""
    current, totals = 0, []
    for event in events:
        if _is_memory(event):
            current += event.nbytes()
            totals.append(current)
    return totals


def _is_memory(event: Any) -> bool:
    return event.name() == "[memory]" and event.device_type() == DeviceType.CPU


def _workspaces(events: Sequence[Any]) -> dict[str, int]:
    """Return the excess of each operator's own peak over the peak between operators, in bytes, largest first."""
    calls = [event for event in events if event.name().startswith(_MARK)]
    starts = [call.start_ns() for call in calls]
    peak_between, current, previous = 0, 0, None
    peak_inside: dict[str, int] = {}
    for event in filter(_is_memory, events):
        i = bisect_right(starts, event.start_ns()) - 1
        call = calls[i] if i >= 0 and event.start_ns() <= starts[i] + calls[i].duration_ns() else None
        if call is not previous or call is None:
            peak_between = max(peak_between, current)  # the operator call has changed, or there is none
        current, previous = current + event.nbytes(), call
        if call is not None:
            name = call.name().removeprefix(_MARK)
            peak_inside[name] = max(peak_inside.get(name, 0), current)
    peak_between = max(peak_between, current)
    excess = {name: level - peak_between for name, level in peak_inside.items() if level > peak_between}
    return dict(sorted(excess.items(), key=lambda item: -item[1]))
