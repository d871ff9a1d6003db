"""Compare forecasts for CUDA with what a GPU's allocator counts: 72 cells of model, method and batch.

    python benchmarks/cuda_forecasts.py [--steps 3]

Needs a CUDA device and the extra `transformers`. Each cell trains a model of random weights for a few steps and reads
torch.cuda's peak statistics. The table has measured requested, allocated and reserved bytes, each divided by its
forecast: 1 is exact, above 1 the forecast is too low.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch

import gradcost
from gradcost import Key, forecast
from gradcost.estimators.estimator import Estimator
from gradcost.integrations import transformers as integration
from gradcost.training.customary import Customary
from gradcost.training.train_state import TrainState

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
BATCHES = (2, 8, 32)
LENGTH = 512


def objective_of(name: str, batch: int) -> tuple[gradcost.Objective, Any]:
    with tempfile.TemporaryDirectory() as folder:
        settings = {"model_type": name, "max_position_embeddings": LENGTH, **SIZES, **MODELS[name]}
        (Path(folder) / "config.json").write_text(json.dumps(settings))
        return integration.objective(integration.from_config(folder, torch.bfloat16), batch, LENGTH)


def measured(name: str, estimator: Estimator, batch: int, steps: int) -> tuple[int, int, int]:
    """Train for some steps; return the peaks of requested, allocated and reserved bytes."""
    gc.collect()
    torch.cuda.empty_cache()
    objective, examples = objective_of(name, batch)
    objective.model.to_empty(device="cuda")
    for parameter in objective.model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    examples = examples.cuda()
    state = TrainState(objective, estimator, Customary().of(estimator))
    torch.cuda.reset_peak_memory_stats()
    for step in range(steps):
        state.step(examples, Key(step))
    stats = torch.cuda.memory_stats()
    return tuple(stats[f"{kind}_bytes.all.peak"] for kind in ("requested", "allocated", "reserved"))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="training steps of each cell")
    steps = parser.parse_args().steps
    if not torch.cuda.is_available():
        sys.exit("this benchmark compares forecasts with a GPU, and torch finds no CUDA device")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16, {LENGTH} tokens\n")
    print("| model | batch | method | forecast peak | requested | allocated | reserved |\n|" + "---|" * 7)
    for name, batch, (method, estimator) in product(MODELS, BATCHES, METHODS.items()):
        objective, examples = objective_of(name, batch)
        told = forecast(estimator, objective, examples, Customary().of(estimator), "cuda").cuda
        assert told is not None
        found = measured(name, estimator, batch, steps)
        ratios = [
            real / said for real, said in zip(found, (told.requested, told.allocated, told.reserved), strict=True)
        ]
        cells = " | ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"| {name} | {batch} | {method} | {told.requested:,} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
