"""Train the models of Panchal et al. 2025 on a GPU with every method, and compare memory and time with the forecasts.

    python benchmarks/cuda_costs.py [--models OPT-1.3B Llama-3.1-8B] [--output costs.json]

Needs a CUDA device and the extra `transformers`. A model has the configuration, the batch and the length of the
paper, and random weights. Each row trains for a few steps. The table has the forecast of the bytes that torch
requests at the peak, the measured bytes less the forecast, the ratios measured / forecast of the allocated and the
reserved bytes, the FLOPs of a step in forward passes, and the time of a step, also divided by that of a forward
pass.

cuBLAS has a workspace for each thread that multiplies matrices, two with backprop: no forecast contains it. One has
32 MiB on an H100 or H200.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gradcost import Key, Objective, forecast
from gradcost.core.pytree import tree_map
from gradcost.papers.panchal2025.cost import EAGER, FUSED, SETTINGS
from gradcost.papers.panchal2025.cost_models import COST_MODELS, Case, CostModel
from gradcost.papers.panchal2025.methods import method, methods
from gradcost.training.optimizers import AdamW
from gradcost.training.train_state import TrainState

OPTIMIZER = AdamW(1e-3)
STEPS = 4  # the first is not timed
MODELS = ("OPT-1.3B", "OPT-6.7B", "Llama-3.1-8B")
# SVRG needs passes over the data; ZO-Vanilla is MeZO.
NAMES = tuple(each.name for each in methods() if "SVRG" not in each.name and each.name != "ZO-Vanilla")
KINDS = ("requested", "allocated", "reserved")
HEADERS = ("model", "trained", "attention", "method", "forecast", "measured less forecast", "allocated", "reserved")
HEADERS += ("forwards", "ms", "ms / ms of a forward")


class Told(NamedTuple):
    """A forecast: bytes at the peak as the allocator counts them, and FLOPs of a step in forward passes."""

    bytes: tuple[int, ...]
    forwards: float


@cache
def case_of(number: int, attention: str) -> Case:
    return COST_MODELS[number].make(attention, COST_MODELS[number].layers)


def told(number: int, attention: str, name: str) -> Told | str:
    """Forecast a step on a GPU, in another process; or the reason why there is no forecast."""
    case = case_of(number, attention)
    try:
        found = forecast(method(name, SETTINGS).estimator, case.objective, case.batch, OPTIMIZER, "cuda")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    assert found.cuda is not None
    return Told(tuple(getattr(found.cuda, kind) for kind in KINDS), found.forwards)


def on_gpu(case: Case) -> Case:
    """Give a model without weights random ones on the GPU."""
    model = case.objective.model.to_empty(device="cuda")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02) if parameter.is_floating_point() else parameter.zero_()
        for buffer in model.buffers():
            buffer.fill_(0.5) if buffer.is_floating_point() else buffer.zero_()
    return Case(Objective(model, case.objective.loss), tree_map(lambda part: part.cuda(), case.batch))


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Return the median time of some calls, after one that is not timed."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def forward_milliseconds(case: Case) -> float:
    with torch.no_grad():
        return milliseconds(lambda: case.objective.loss(case.objective.model, case.batch), 6)


def measured(name: str, case: Case) -> tuple[tuple[int, ...], float]:
    """Return the peaks in bytes of some training steps, workspaces included, and the milliseconds of one."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    state, keys = TrainState(case.objective, method(name, SETTINGS).estimator, OPTIMIZER), iter(range(STEPS))
    took = milliseconds(lambda: state.step(case.batch, Key(next(keys))), STEPS)
    stats = torch.cuda.memory_stats()
    return tuple(stats[f"{kind}_bytes.all.peak"] for kind in KINDS), took


def rows(models: list[int], forecasts: dict[tuple[int, str, str], Future[Told | str]]) -> Iterator[dict[str, Any]]:
    """Measure every method on every model, and yield each row as soon as its forecast is there too."""
    for number in models:
        for attention in (FUSED, EAGER):
            model: CostModel = COST_MODELS[number]
            case = on_gpu(model.make(attention, model.layers))
            forward, found = forward_milliseconds(case), {}
            for name in NAMES:
                try:
                    found[name] = measured(name, case)
                except Exception as error:
                    found[name] = f"{type(error).__name__}: {str(error)[:200]}"
            del case
            for name, seen in found.items():
                said = forecasts[number, attention, name].result()
                row = {"model": model.name, "trained": model.trained, "attention": attention, "method": name}
                failed = next((each for each in (seen, said) if isinstance(each, str)), None)
                yield row | ({"failed": failed} if failed else numbers(said, seen, forward))


def numbers(said: Any, seen: Any, forward: float) -> dict[str, Any]:
    peaks, took = seen
    ratios = {kind: real / told for kind, real, told in zip(KINDS[1:], peaks[1:], said.bytes[1:], strict=True)}
    return {
        "forecast": said.bytes[0],
        "measured less forecast": peaks[0] - said.bytes[0],
        **ratios,
        "forwards": said.forwards,
        "ms": took,
        "ms / ms of a forward": took / forward,
        "bytes forecast": said.bytes,
        "bytes measured": peaks,
    }


def line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"| {' | '.join(row[name] for name in HEADERS[:4])} | failed: {row['failed']} |"
    shown = [f"{row['forecast'] / 2**30:.3f} GiB", f"{row['measured less forecast'] / 2**20:+.1f} MiB"]
    shown += [f"{row[name]:.4f}" for name in KINDS[1:]] + [f"{row[name]:.2f}" for name in HEADERS[8:]]
    return f"| {' | '.join([*(row[name] for name in HEADERS[:4]), *shown])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="names of models, without those in 4 bits")
    parser.add_argument("--output", type=Path, help="a JSON file for all numbers, written after each row")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark compares forecasts with a GPU, and torch finds no CUDA device")
    chosen = [n for n, each in enumerate(COST_MODELS) if each.name in options.models and "4 bits" not in each.trained]
    header = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": []}
    print(f"{header['gpu']}, torch {header['torch']}\n\n| {' | '.join(HEADERS)} |\n|{'---|' * len(HEADERS)}")
    with ProcessPoolExecutor((os.cpu_count() or 2) - 1, get_context("spawn")) as pool:
        wanted = [(number, attention, name) for number in chosen for attention in (FUSED, EAGER) for name in NAMES]
        forecasts = {key: pool.submit(told, *key) for key in wanted}
        for row in rows(chosen, forecasts):
            print(line(row), flush=True)
            header["rows"].append(row)
            if options.output is not None:
                options.output.write_text(json.dumps(header, indent=1))


if __name__ == "__main__":
    main()
