"""Compare forecasts for CUDA with what a GPU's allocator counts, and time the steps.

    python benchmarks/cuda_forecasts.py --output FILE.json            4 models x 3 batches x 6 methods
    python benchmarks/cuda_forecasts.py --output FILE.json --paper    and the models, methods of Panchal et al. 2025
    python benchmarks/cuda_forecasts.py --output FILE.json --paper --skip-done --cells "Llama.*MeZO"

Needs the extra `transformers`. Each cell trains a model of random weights in bfloat16 for a few steps. The first step
is neither timed nor in the peaks, because a forecast is for a step after it. A ratio is measured / forecast: above 1
the forecast is too low. cuBLAS has a workspace for each thread that multiplies matrices: the measured bytes contain
it, the forecasts do not, and the column `cuBLAS` has its MiB.

Other processes compute the forecasts. `--device none` computes nothing else; a later run with `--skip-done` keeps
them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from importlib.metadata import version
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

import gradcost
from gradcost import Key, Objective, forecast
from gradcost.core.files import write_whole
from gradcost.core.inner_model import inner_model
from gradcost.core.pytree import tree_map
from gradcost.estimators.estimator import Estimator
from gradcost.integrations import transformers as integration
from gradcost.papers.panchal2025.cost import FUSED
from gradcost.papers.panchal2025.cost_models import LENGTH, LLAMA_8B, OPT_1_3B, OPT_6_7B, TEXTS, Case, classifier
from gradcost.papers.panchal2025.methods import method, methods
from gradcost.tasks.pretrained import Lora
from gradcost.training.customary import Customary
from gradcost.training.optimizers import AdamW, Optimizer
from gradcost.training.train_state import TrainState

ALL, LORA = "all weights", "LoRA, rank 1"
KINDS = ("requested", "allocated", "reserved")
HEADERS = ("model", "trained", "batch", "method", "forecast", *KINDS, "cuBLAS", "GFLOP", "ms")
RATE = 1e-6  # so low that the losses stay finite; no cost depends on it
STEPS, SECONDS = 4, 1.0  # of a cell: the most timed steps, and the time after which no further one starts

SIZES = {"hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16, "vocab_size": 32000}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "intermediate_size": 2816, "num_key_value_heads": 4},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "intermediate_size": 2816, "num_key_value_heads": 4},
    "gpt2": {"architectures": ["GPT2LMHeadModel"], "n_embd": 1024, "n_layer": 8, "n_head": 16, "n_positions": 512},
    "bert": {"architectures": ["BertForMaskedLM"], "intermediate_size": 4096},
}
METHODS: dict[str, Estimator] = {
    "backprop()": gradcost.backprop(),
    "checkpointed()": gradcost.checkpointed(),
    "Reverse(Selective())": gradcost.Reverse(gradcost.checkpointing.Selective()),
    "Accumulated(checkpointed(), 2)": gradcost.Accumulated(gradcost.checkpointed(), 2),
    "forward_gradient()": gradcost.forward_gradient(),
    "mezo()": gradcost.mezo(),
}
BATCHES, TOKENS = (2, 8, 32), 512
PAPER = {"OPT-1.3B": OPT_1_3B, "OPT-6.7B": OPT_6_7B, "Llama-3.1-8B": LLAMA_8B}
PAPER_METHODS = tuple(each.name for each in methods() if each.name != "ZO-Vanilla")  # that one is MeZO


class Cell(NamedTuple):
    """A row of the table."""

    table: str
    model: str
    trained: str
    batch: int
    length: int
    method: str = ""

    @property
    def name(self) -> str:
        return " | ".join(map(str, self))

    @property
    def group(self) -> Cell:
        """What cells with the same model and batch share."""
        return self._replace(method="")


def list_cells(paper: bool) -> list[Cell]:
    """Return the cells in the order of their measurement."""
    small, large = product(MODELS, BATCHES, METHODS), product((LORA, ALL), PAPER, PAPER_METHODS)
    found = [Cell("small", model, ALL, batch, TOKENS, each) for model, batch, each in small]
    if paper:
        found += [Cell("paper", model, trained, TEXTS, LENGTH, each) for trained, model, each in large]
    # The thresholds of billions of weights come last: kthvalue has one block of threads per tensor on a GPU.
    return sorted(found, key=lambda cell: cell.trained == ALL and "Sparse" in cell.method)


def build(group: Cell) -> Case:
    """Return the objective and the batch of a group, without weights. The batch is all of the data."""
    if group.table == "paper":
        config, lora = PAPER[group.model], Lora() if group.trained == LORA else None
        objective, batch = classifier(config, torch.bfloat16, lora, False, FUSED)
    else:
        with tempfile.TemporaryDirectory() as folder:
            settings = {"model_type": group.model, "max_position_embeddings": TOKENS, **SIZES, **MODELS[group.model]}
            (Path(folder) / "config.json").write_text(json.dumps(settings))
            model = integration.from_config(folder, torch.bfloat16)
        objective, batch = integration.objective(model, group.batch, group.length)
    return Case(replace(objective, data=lambda: [batch]), batch)


def method_of(cell: Cell) -> tuple[Estimator, Optimizer]:
    if cell.table == "paper":
        return method(cell.method).estimator, AdamW(RATE)
    estimator = METHODS[cell.method]
    return estimator, replace(Customary().of(estimator), lr=RATE)  # type: ignore[call-arg]


def attempt(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Return the figures of a function, or the reason why it fails."""
    try:
        return {**function(*arguments), "versions": {name: version(name) for name in ("torch", "transformers")}}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


build_once = cache(build)


def start_worker() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a worker must not take memory of the GPU
    os.nice(10)  # nor delay the process whose steps are timed
    torch.set_num_threads(1)


def predict(cell: Cell) -> dict[str, Any]:
    start, (estimator, optimizer) = time.perf_counter(), method_of(cell)
    found = forecast(estimator, *build_once(cell.group), optimizer, "cuda")
    sizes = [getattr(found.cuda, kind) for kind in KINDS]
    return {"bytes": sizes, "flops": found.flops, "forwards": found.forwards, "seconds": time.perf_counter() - start}


@lru_cache(1)
def build_on(device: str, group: Cell) -> Case:
    """Return a case with random weights, made on the device.

    `to_empty` makes new parameters and buffers. Tied parameters are then no longer tied. Buffers that are not saved,
    such as positions and rotary frequencies, have no values. The methods of transformers restore both.
    """
    objective, batch = build(group)
    inner: Any = inner_model(objective.model.to_empty(device=device))
    inner.tie_weights()
    with torch.no_grad():
        for parameter in objective.model.parameters():
            parameter.normal_(std=0.02)
        for module in inner.modules():
            inner._init_weights(module)
    batch = tree_map(lambda part: part.to(device), batch)
    return Case(Objective(objective.model, objective.loss, data=lambda: [batch]), batch)


def wait(device: str) -> float:
    """Wait for the device, and return the time."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def read_peaks(device: str) -> list[int] | None:
    """Return the peaks since the last call; None on a CPU."""
    if device != "cuda":
        return None
    stats = torch.cuda.memory_stats()
    torch.cuda.reset_peak_memory_stats()
    return [stats[f"{kind}_bytes.all.peak"] for kind in KINDS]


def free_workspaces(device: str) -> int:
    """Free the workspaces of cuBLAS and return their bytes; 0 on a CPU."""
    if device != "cuda":
        return 0
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch._C._cuda_clearCublasWorkspaces()
    return before - torch.cuda.memory_stats()["requested_bytes.all.current"]


def measure(cell: Cell, device: str) -> dict[str, Any]:
    """Train for some steps; return the peaks of the first and of the others, and the milliseconds of one."""
    case = build_on(device, cell.group)
    gc.collect()
    free_workspaces(device)
    torch.cuda.empty_cache()
    read_peaks(device)
    state, times, first = TrainState(case.objective, *method_of(cell)), [], None
    while len(times) < 2 or (len(times) <= STEPS and sum(times[1:]) < SECONDS):
        start = wait(device)
        loss = state.step(case.batch, Key(len(times))).loss
        times.append(wait(device) - start)
        if not loss.isfinite():
            raise ArithmeticError("the loss is not finite, so no step was taken")
        first = first or read_peaks(device)
    memory = {"bytes": read_peaks(device), "bytes of the first step": first, "workspaces": free_workspaces(device)}
    name = torch.cuda.get_device_name() if device == "cuda" else device
    return {**memory, "ms": 1e3 * statistics.median(times[1:]), "all ms": [1e3 * each for each in times], "gpu": name}


def format_row(cell: Cell, row: dict[str, Any]) -> str:
    expected, found = row["forecast"], row.get("measured", {})
    sizes, peaks, missing = expected.get("bytes"), found.get("bytes"), ["n/a"]
    shown = [cell.model, cell.trained, f"{cell.batch} x {cell.length}", cell.method]
    shown += [f"{sizes[0]:,}"] if sizes else missing
    shown += [f"{x / y:.4f}" for x, y in zip(peaks, sizes, strict=True)] if peaks and sizes else 3 * missing
    shown += [f"{found['workspaces'] / 2**20:.0f}"] if peaks else missing
    shown += [f"{expected['flops'] / 1e9:,.0f}"] if sizes else missing
    shown += [f"{found['ms']:.1f}"] if "ms" in found else missing
    failures = [f"{part} failed: {figures['failed']}" for part, figures in row.items() if "failed" in figures]
    return f"| {' | '.join(shown + failures)} |"


class Table:
    """The figures of all cells, written to a file after each one. A complete row is printed."""

    def __init__(self, chosen: Sequence[Cell], path: Path | None, parts: Sequence[str], keep: bool) -> None:
        self.chosen, self.path, self.parts = chosen, path, set(parts)
        self.rows: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path and path.is_file() else {}
        for row, part in product([self.rows.setdefault(cell.name, {}) for cell in chosen], parts):
            if not keep or "failed" in row.get(part, {}):
                row.pop(part, None)

    def lacking(self, *parts: str) -> list[Cell]:
        return [cell for cell in self.chosen if not self.rows[cell.name].keys() >= set(parts)]

    def put(self, cell: Cell, **figures: dict[str, Any]) -> None:
        row = self.rows[cell.name]
        row.update(figures)
        if figures and self.path is not None:
            write_whole(self.path, json.dumps(self.rows, indent=1))
        if row.keys() >= self.parts:
            print(format_row(cell, row), flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", action="store_true", help="also the models and methods of Panchal et al. 2025")
    parser.add_argument("--cells", default="", help='regular expression of names such as "paper | OPT-1.3B | LoRA"')
    parser.add_argument("--output", type=Path, help="a JSON file of all figures; its other cells stay")
    parser.add_argument("--skip-done", action="store_true", help="keep what the file has")
    parser.add_argument("--seconds", type=float, default=600, help="stop after this time")
    parser.add_argument("--workers", type=int, default=max((os.cpu_count() or 2) - 1, 1), help="of the forecasts")
    parser.add_argument("--device", choices=("cuda", "cpu", "none"), default="cuda", help="a CPU measures times only")
    return parser.parse_args()


def main() -> None:
    options, start = parse_options(), time.perf_counter()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("this benchmark compares forecasts with a GPU, and torch finds no CUDA device")
    chosen = [cell for cell in list_cells(options.paper) if re.search(options.cells, cell.name)]
    parts = ("forecast",) if options.device == "none" else ("forecast", "measured")
    table = Table(chosen, options.output, parts, options.skip_done)
    print(f"| {' | '.join(HEADERS)} |\n|{'---|' * len(HEADERS)}")
    for cell in chosen:
        table.put(cell)
    unmeasured = [] if options.device == "none" else table.lacking("measured")
    with get_context("spawn").Pool(options.workers, start_worker) as pool:
        pending = {cell: pool.apply_async(attempt, (predict, cell)) for cell in table.lacking("forecast")}
        while (pending or unmeasured) and time.perf_counter() - start < options.seconds:
            if unmeasured:
                cell = unmeasured.pop(0)
                table.put(cell, measured=attempt(measure, cell, options.device))
            else:
                time.sleep(0.1)
            for cell in [cell for cell, result in pending.items() if result.ready()]:
                table.put(cell, forecast=pending.pop(cell).get())
    print(f"\n{time.perf_counter() - start:.0f} s; {len(table.lacking(*parts))} of {len(chosen)} cells not complete")


if __name__ == "__main__":
    main()
