"""From counts to seconds: what a machine does in a second, and a roofline over single operations."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from gradcost.core.errors import MissingExtra, Unsupported
from gradcost.core.files import cache_folder, write_whole
from gradcost.instruments.flops import Counts
from gradcost.instruments.timing import Timing, time_steps
from gradcost.noise.add import add_noise
from gradcost.noise.philox import Normals, Signs, Stream

_SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices that are multiplied
_COPIED = {"cpu": 1 << 26, "cuda": 1 << 30}  # bytes: beyond every cache
_SMALL = 1000  # operations on one number, and
_DRAWN = 1 << 22  # random numbers a sample


@dataclass(frozen=True)
class Rates:
    """What a device does in a second, as measured, on `threads` threads of torch.

    matmul: FLOP/s of a large product of matrices, by the name of the dtype. copy: bytes read and written a
    second by a large copy. overhead: seconds of one operation that has next to nothing to do. normals, signs:
    random numbers a second that `noise.add` makes and adds. doubt: why not to rely on them, or None.
    """

    device: str
    threads: int
    matmul: dict[str, float]
    copy: float
    overhead: float
    normals: float
    signs: float
    doubt: str | None = None

    def rows(self) -> list[tuple[str, str]]:
        """A table of them for people."""
        products = [(f"{name} products", f"{1e-9 * rate:,.1f} GFLOP/s") for name, rate in self.matmul.items()]
        return [
            *products,
            ("a copy", f"{1e-9 * self.copy:,.1f} GB/s, read and written"),
            ("an operation", f"{1e6 * self.overhead:.2f} us at least"),
            ("noise", f"{1e-6 * self.normals:,.0f} M normals/s, {1e-6 * self.signs:,.0f} M signs/s"),
            ("measured on", f"{self.device}, {self.threads} threads"),
            *([("doubtful", self.doubt)] if self.doubt else []),
        ]


def calibrate(device: str = "cpu", seconds: float = 10.0) -> Rates:
    """Measure the rates of a device within about so many seconds; everything else should rest meanwhile.

    Each rate is that of the median run. On the present thread count; needs 2 MiB to 4 GiB of the device.
    """
    kind = torch.device(device).type
    dtypes = [torch.float32, torch.bfloat16] + ([torch.float16] if kind == "cuda" else [])
    readings: dict[str, Timing] = {}

    def median(name: str, work: Callable[[], object]) -> float:
        share = seconds / (len(dtypes) + 4)
        readings[name] = time_steps(work, samples=5, warmup=1, attempts=1, lasting=share)
        return readings[name].median / 1e3

    def drawn(stream: Stream) -> float:
        weights = torch.zeros(_DRAWN, device=device)
        work = lambda: add_noise(stream, [0], [1.0], 0, weights, in_place=True)  # noqa: E731
        return _DRAWN / median(repr(stream), work)

    matmul = {}
    for dtype in dtypes:
        side = _SIDE[kind]
        a = torch.ones(side, side, dtype=dtype, device=device)
        matmul[_named(dtype)] = 2 * side**3 / median(_named(dtype), lambda a=a: a @ a)
    source = torch.ones(_COPIED[kind], dtype=torch.uint8, device=device)  # zeros are pages that are not there yet
    target = torch.ones_like(source)
    copy = 2 * _COPIED[kind] / median("copy", lambda: target.copy_(source))
    one = torch.ones(1, device=device)
    overhead = median("overhead", lambda: _add_often(one)) / _SMALL
    normals, signs = drawn(Normals()), drawn(Signs())
    doubts = (f"{name}: {reading.doubt}" for name, reading in readings.items() if reading.doubt is not None)
    return Rates(
        device_name(device),
        torch.get_num_threads(),
        matmul,
        copy,
        overhead,
        normals,
        signs,
        next(doubts, None),
    )


def seconds(counts: Counts, rates: Rates, dtype: torch.dtype, stream: Stream | None = None) -> float:
    """An estimate of how long the counted operations take on a device of these rates, in seconds.

    The sum over operations of overhead + max(FLOPs / matmul rate, bytes / copy rate), and random numbers / their
    rate. It is an estimate: it knows no caches, no products that are too small or thin for full speed, and
    nothing that Python and autograd do between operations. Take a forecast's counts where torch makes the noise
    (a GPU, or no numba): those of a run hold its operations as well. stream: what is drawn; normals if None.

    Source: Williams, Waterman, Patterson, "Roofline", CACM 52 (2009). Raises: ValueError for a dtype whose rate
    was not measured.
    """
    rate = rates.matmul.get(_named(dtype))
    if rate is None:
        raise Unsupported(
            f"the rate of {_named(dtype)} products was not measured on {rates.device}, but those of "
            f"{', '.join(rates.matmul)} were: give one of these."
        )
    total = sum(
        times * (rates.overhead + max(flops / rate, moved / rates.copy))
        for (flops, moved), times in counts.work.items()
    )
    return total + counts.drawn / (rates.signs if isinstance(stream, Signs) else rates.normals)


def remember(rates: Rates) -> Path:
    """Keep the rates for `remembered`, in the cache folder (GRADCOST_CACHE, or the platform's); gives the file.

    Raises: OSError when it cannot be written.
    """
    path = cache_folder() / "rates.json"
    document = _kept(path) | {_place(rates.device, rates.threads): asdict(rates)}
    return write_whole(path, json.dumps(document, indent=2) + "\n")


def remembered(device: str = "cpu") -> Rates | None:
    """The rates last kept for this machine's device and torch's present thread count; None if there are none."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        return None
    try:
        return Rates(**_kept(cache_folder() / "rates.json")[_place(device_name(device), torch.get_num_threads())])
    except (OSError, MissingExtra, KeyError, TypeError):
        return None


def device_name(device: str = "cpu") -> str:
    """What is measured: a GPU's name, or a CPU's kind, with how many cores."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"


def _place(device: str, threads: int) -> str:
    """A cache folder may be shared by machines, and rates of one thread count are none of another."""
    return f"{platform.node()}: {device}, {threads} threads"


def _kept(path: Path) -> dict[str, dict]:
    """What is in the file: nothing if it is missing or damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _add_often(one: Tensor) -> None:
    for _ in range(_SMALL):
        torch.add(one, one)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
