"""Estimate the seconds of a step from its counts: a roofline model per operator, with measured rates."""

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
from gradcost.core.files import cache_folder, read_regular, write_whole
from gradcost.instruments.flops import Counts
from gradcost.instruments.timing import Timing, time_steps
from gradcost.noise.add import add_noise
from gradcost.noise.philox import Normals, Signs, Stream

_SIDE = {"cpu": 1024, "cuda": 8192}  # rows of the square matrices
_COPIED = {"cpu": 1 << 26, "cuda": 1 << 30}  # bytes: larger than every cache
_SMALL = 1000  # one-element operations per timing sample
_DRAWN = 1 << 22  # random numbers per timing sample


@dataclass(frozen=True)
class Rates:
    """The measured rates of a device.

    Args:
        device: the name of the device.
        threads: the number of torch threads.
        matmul: FLOP/s of a large matrix product, by dtype name.
        copy: bytes read and written per second by a large copy.
        overhead: seconds of one operator on one number.
        normals: normal random numbers per second that `add_noise` draws and adds.
        signs: random signs per second that `add_noise` draws and adds.
        doubt: why the rates may be wrong; None if there is no reason.
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
        """Return the rates as rows of a table."""
        products = [(f"{name} products", f"{1e-9 * rate:,.1f} GFLOP/s") for name, rate in self.matmul.items()]
        return [
            *products,
            ("a copy", f"{1e-9 * self.copy:,.1f} GB/s, read and written"),
            ("an operation", f"{1e6 * self.overhead:.2f} us at least"),
            ("noise", f"{1e-6 * self.normals:,.0f} M normals/s, {1e-6 * self.signs:,.0f} M signs/s"),
            ("measured on", f"{self.device}, {self.threads} threads"),
            *([("unreliable", self.doubt)] if self.doubt else []),
        ]


def calibrate(device: str = "cpu", seconds: float = 10.0) -> Rates:
    """Measure the rates of a device at torch's current thread count. Run nothing else during the measurement.

    Each rate is the median of five samples. Needs about 0.2 GiB of memory on a CPU and 2.3 GiB on CUDA.

    Args:
        device: "cpu" or a CUDA device.
        seconds: approximate duration of the measurement.
    Returns:
        The rates.
    """
    kind = torch.device(device).type
    dtypes = [torch.float32, torch.bfloat16] + ([torch.float16] if kind == "cuda" else [])
    readings: dict[str, Timing] = {}

    def median(name: str, work: Callable[[], object]) -> float:
        duration = seconds / (len(dtypes) + 4)
        readings[name] = time_steps(work, samples=5, warmup=1, attempts=1, lasting=duration)
        return readings[name].median / 1e3

    def draw_rate(stream: Stream) -> float:
        weights = torch.zeros(_DRAWN, device=device)
        work = lambda: add_noise(stream, [0], [1.0], 0, weights, in_place=True)  # noqa: E731
        return _DRAWN / median(repr(stream), work)

    matmul = {}
    for dtype in dtypes:
        side = _SIDE[kind]
        a = torch.ones(side, side, dtype=dtype, device=device)
        matmul[_named(dtype)] = 2 * side**3 / median(_named(dtype), lambda a=a: a @ a)
    source = torch.ones(_COPIED[kind], dtype=torch.uint8, device=device)  # pages of zeros may not be mapped yet
    target = torch.ones_like(source)
    copy = 2 * _COPIED[kind] / median("copy", lambda: target.copy_(source))
    one = torch.ones(1, device=device)
    overhead = median("overhead", lambda: _add_repeatedly(one)) / _SMALL
    normals, signs = draw_rate(Normals()), draw_rate(Signs())
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
    """Estimate how long the counted operations take on a device with these rates, in seconds.

    Law: sum over operations of overhead + max(FLOPs / matmul rate, bytes / copy rate), plus random numbers / their
    rate. The estimate ignores caches, the lower rate of small or thin products, and the time that Python and autograd
    spend between operators. Use the counts of a forecast if torch draws the noise (on a GPU, or without numba): the
    counts of a real step then include the operators that draw it.

    Args:
        counts: FLOPs, bytes and random numbers of a step.
        rates: the rates of the device.
        dtype: the type of the matrix products.
        stream: the type of random numbers; None for normal numbers.
    Raises:
        Unsupported: the rate of this dtype was not measured.
    Source: Williams, Waterman, Patterson, "Roofline", CACM 52 (2009).
    """
    rate = rates.matmul.get(_named(dtype))
    if rate is None:
        raise Unsupported(
            f"the rate of {_named(dtype)} matrix products was not measured on {rates.device}: use one of "
            f"{', '.join(rates.matmul)}."
        )
    total = sum(
        calls * (rates.overhead + max(flops / rate, moved / rates.copy))
        for (flops, moved), calls in counts.work.items()
    )
    return total + counts.drawn / (rates.signs if isinstance(stream, Signs) else rates.normals)


def store_rates(rates: Rates) -> Path:
    """Write the rates to the cache folder, from which `stored_rates` reads them. Return the path of the file."""
    path = cache_folder() / "rates.json"
    document = _read(path) | {_entry(rates.device, rates.threads): asdict(rates)}
    return write_whole(path, json.dumps(document, indent=2) + "\n")


def stored_rates(device: str = "cpu") -> Rates | None:
    """Read the stored rates of this machine's device at torch's current thread count; None if there are none."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        return None
    try:
        return Rates(**_read(cache_folder() / "rates.json")[_entry(device_name(device), torch.get_num_threads())])
    except (OSError, MissingExtra, KeyError, TypeError):
        return None


def device_name(device: str = "cpu") -> str:
    """Return the name of a GPU, or the type of a CPU and its number of cores."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"


def _entry(device: str, threads: int) -> str:
    """The key of the rates in the file: machine (several may share a cache folder), device and thread count."""
    return f"{platform.node()}: {device}, {threads} threads"


def _read(path: Path) -> dict[str, dict]:
    """The content of the file; empty if it is missing or damaged."""
    try:
        content = json.loads(read_regular(path))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _add_repeatedly(one: Tensor) -> None:
    for _ in range(_SMALL):
        torch.add(one, one)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
