"""The truth meter: what torch's own allocator was asked for, kernels' workspaces and all."""

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
    """Bytes that a run of some work asked the allocator for, at the most at once, beyond what there was before.

    peak: as requested. allocated, reserved: on CUDA alone, what the requests were rounded up to, and what the
    process held of the device in all (that is what runs out). inside: operators whose kernels asked for more,
    for the time of a call, than ever stands between two operators, and by how many bytes; no tracker of
    tensors sees these. Empty on CUDA, where they are not looked for.
    """

    peak: int
    allocated: int | None = None
    reserved: int | None = None
    inside: dict[str, int] = field(default_factory=dict)


def allocated(work: Callable[[], object], device: str | torch.device = "cpu") -> Allocated:
    """Run the work under the allocator's own books: on a CPU once for the peak and once by operator, on CUDA once.

    Law: on a CPU it repeats to the byte. It tells more than a tracker of tensors does: workspaces within
    kernels, and 5,056 bytes for each state of a random generator that is kept meanwhile. The work should have
    run before: what a first run leaves behind for ever is counted too.

    Source: torch.profiler's memory events; `torch.cuda.memory_stats`.
    """
    device = torch.device(device)
    return _on_cuda(work, device) if device.type == "cuda" else _on_cpu(work)


def _on_cuda(work: Callable[[], object], device: torch.device) -> Allocated:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # else what earlier work left in the cache would count as reserved for this one
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    stats = torch.cuda.memory_stats(device)

    def beyond(kind: str) -> int:
        return stats[f"{kind}.all.peak"] - before[f"{kind}.all.current"]

    return Allocated(beyond("requested_bytes"), beyond("allocated_bytes"), stats["reserved_bytes.all.peak"])


def _on_cpu(work: Callable[[], object]) -> Allocated:
    peak = max(_levels(_recorded(work)), default=0)
    with _Marked():
        events = _recorded(work)
    return Allocated(max(peak, 0), inside=_inside(events))


class _Marked(TorchDispatchMode):
    """Each operator that a tracker sees leaves its name and its duration with the profiler."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with _RecordFunctionFast(_MARK + str(func)):
            return func(*args, **(kwargs or {}))


def _recorded(work: Callable[[], object]) -> list[Any]:
    """The profiler's events in the order of their beginning."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would announce each start and stop on standard error
    profiled: Any = profile(profile_memory=True)
    with profiled:
        work()
    return sorted(profiled.kineto_results.events(), key=lambda event: event.start_ns())


def _levels(events: Sequence[Any]) -> list[int]:
    """Bytes asked for and not given back, after each birth and death."""
    now, levels = 0, []
    for event in events:
        if _is_memory(event):
            now += event.nbytes()
            levels.append(now)
    return levels


def _is_memory(event: Any) -> bool:
    return event.name() == "[memory]" and event.device_type() == DeviceType.CPU


def _inside(events: Sequence[Any]) -> dict[str, int]:
    """By how much single operators exceed, while they run, the most that is alive between operators."""
    calls = [event for event in events if event.name().startswith(_MARK)]
    starts = [call.start_ns() for call in calls]
    between, now, before = 0, 0, None
    highest: dict[str, int] = {}
    for event in filter(_is_memory, events):
        at = bisect_right(starts, event.start_ns()) - 1
        call = calls[at] if at >= 0 and event.start_ns() <= starts[at] + calls[at].duration_ns() else None
        if call is not before or call is None:
            between = max(between, now)
        now, before = now + event.nbytes(), call
        if call is not None:
            name = call.name().removeprefix(_MARK)
            highest[name] = max(highest.get(name, 0), now)
    between = max(between, now)
    excess = {name: level - between for name, level in highest.items() if level > between}
    return dict(sorted(excess.items(), key=lambda item: -item[1]))
