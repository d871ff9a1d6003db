"""The models of Panchal et al. 2025 without weights, each with a batch of the size that the paper's public code has.

The configurations are the published config.json files of the models, without fields that change no cost. The public
code (see `methods`) has 64 tokens per text, 40 texts per batch of AG News and 6 examples per batch of VQAv2. Its
adapters are on the query and value projections, with rank 1. It loads BERT and RoBERTa in float32, and the larger
models in bfloat16 with weights in 4 bits. Here the OPT models have weights in 16 bits, and Llama-3.1-8B both.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradcost.core.errors import require
from gradcost.core.objective import Objective
from gradcost.integrations.four_bit import in_four_bits
from gradcost.integrations.transformers import classification
from gradcost.tasks.pretrained import Lora
from gradcost.tasks.task import Batch

TEXTS, LENGTH, CLASSES = 40, 64, 4  # AG News
IMAGES = 6  # VQAv2
PATCHES = (34, 46)  # rows and columns of patches of 14 x 14 pixels: an image of about 480 x 640
_EVERY = "all weights"
_LORA = "LoRA, rank 1"
_FOUR_BITS = "LoRA, rank 1; base in 4 bits"

Config = Mapping[str, Any]


class Case(NamedTuple):
    """A model without weights, its loss, and a batch."""

    objective: Objective
    batch: Any


@dataclass(frozen=True)
class CostModel:
    """A model whose costs are forecast.

    Args:
        name: the model's name.
        trained: which weights are trained, and how the others are stored.
        dtype: the name of the dtype of the weights; adapters are in float32.
        batch: the batch, in words.
        make: makes the case for a value of transformers' `attn_implementation`.
    """

    name: str
    trained: str
    dtype: str
    batch: str
    make: Callable[[str], Case]


class ImagesAndTexts(NamedTuple):
    """A batch of Qwen2-VL. The positions are given, because the model's code would read them from the tokens."""

    tokens: Tensor
    positions: Tensor
    pixels: Tensor
    grid: Tensor


def classifier(config: Config, dtype: torch.dtype, lora: Lora | None, four_bits: bool, attention: str) -> Case:
    """Return a sequence classifier of AG News.

    Args:
        config: the configuration.
        dtype: the type of the weights.
        lora: the adapters; None to train all weights.
        four_bits: whether the frozen layers of the blocks are stored in 4 bits.
        attention: transformers' `attn_implementation`.
    """
    model = _built("AutoModelForSequenceClassification", {**config, "num_labels": CLASSES}, dtype, attention)
    model = model if lora is None else _adapted(model, lora, "SEQ_CLS", four_bits)
    tokens = torch.full((TEXTS, LENGTH), 5, dtype=torch.int64)
    return Case(Objective(model, classification), Batch(tokens, torch.zeros(TEXTS, dtype=torch.int64)))


def answers(config: Config, dtype: torch.dtype, four_bits: bool, patches: tuple[int, int], attention: str) -> Case:
    """Return a vision-language model of the architecture of Qwen2-VL, with adapters, on images with a text each.

    Args:
        config: the configuration.
        dtype: the type of the weights.
        four_bits: whether the frozen layers of the language model's blocks are stored in 4 bits.
        patches: rows and columns of the patches of an image, both even.
        attention: transformers' `attn_implementation`.
    """
    built = _built("AutoModelForImageTextToText", config, dtype, attention)
    rows, columns = patches
    image = [config["vision_start_token_id"], *[config["image_token_id"]] * (rows * columns // 4)]
    tokens = torch.tensor([[*image, config["vision_end_token_id"], *[9] * LENGTH]] * IMAGES)
    vision = built.config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.empty((IMAGES * rows * columns, width), dtype=dtype, device="meta")
    grid = torch.tensor([[1, rows, columns]] * IMAGES)
    kinds = (tokens == config["image_token_id"]).long()
    positions = built.model.get_rope_index(tokens, mm_token_type_ids=kinds, image_grid_thw=grid)[0]
    model = _adapted(built, Lora(targets=("q_proj", "v_proj")), "CAUSAL_LM", four_bits)
    return Case(Objective(model, _next_token), ImagesAndTexts(tokens, positions, pixels, grid))


def _next_token(model: nn.Module, batch: ImagesAndTexts) -> Tensor:
    given = {"input_ids": batch.tokens, "position_ids": batch.positions, "image_grid_thw": batch.grid}
    logits = model(pixel_values=batch.pixels, **given).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), F.pad(batch.tokens[:, 1:], (0, 1), value=-100).flatten())


def _built(kind: str, config: Config, dtype: torch.dtype, attention: str) -> Any:
    """Build a model on the `meta` device, in training mode."""
    transformers = require("transformers", "A model of transformers", "transformers")
    made = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, kind).from_config(made, attn_implementation=attention, dtype=dtype)
    model.config.use_cache = False
    return model.train()


def _adapted(model: Any, lora: Lora, kind: str, four_bits: bool) -> nn.Module:
    with torch.device("meta"):
        adapted = lora.applied(model, kind).train()
        return in_four_bits(adapted, ".layers.") if four_bits else adapted


def _bert(hidden: int, layers: int, heads: int, vocabulary: int) -> Config:
    size = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    shape = {"model_type": "bert", "intermediate_size": 4 * hidden, "vocab_size": vocabulary, "pad_token_id": 0}
    return size | shape | {"max_position_embeddings": 512, "type_vocab_size": 2}


def _roberta(hidden: int, layers: int, heads: int) -> Config:
    changed = {"model_type": "roberta", "pad_token_id": 1, "max_position_embeddings": 514, "type_vocab_size": 1}
    return {**_bert(hidden, layers, heads, 50265), **changed}


def _opt(hidden: int, layers: int, heads: int) -> Config:
    size = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    shape = {"ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden, "vocab_size": 50272, "pad_token_id": 1}
    return size | shape | {"model_type": "opt", "max_position_embeddings": 2048}


BERT_LARGE = _bert(1024, 24, 16, 30522)
ROBERTA_BASE, ROBERTA_LARGE = _roberta(768, 12, 12), _roberta(1024, 24, 16)
OPT_1_3B, OPT_6_7B, OPT_13B = _opt(2048, 24, 32), _opt(4096, 32, 32), _opt(5120, 40, 40)
LLAMA_8B: Config = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "pad_token_id": 128001,
}
QWEN2_VL_7B: Config = {
    "model_type": "qwen2_vl",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": False,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 3584,
        "num_heads": 16,
        "mlp_ratio": 4,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}


def _of_texts(name: str, config: Config, dtype: torch.dtype, trained: str = _LORA) -> CostModel:
    lora = None if trained == _EVERY else Lora()
    make = partial(classifier, config, dtype, lora, trained == _FOUR_BITS)
    return CostModel(name, trained, _name(dtype), f"{TEXTS} texts of {LENGTH} tokens", make)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_SINGLE, _HALF = torch.float32, torch.bfloat16
_IMAGES = f"{IMAGES} images of 480 x 640 pixels, each with {LENGTH} tokens of text"
COST_MODELS = (
    _of_texts("RoBERTa-base", ROBERTA_BASE, _SINGLE),
    _of_texts("BERT-large", BERT_LARGE, _SINGLE),
    _of_texts("RoBERTa-large", ROBERTA_LARGE, _SINGLE),
    _of_texts("OPT-1.3B", OPT_1_3B, _HALF),
    _of_texts("OPT-6.7B", OPT_6_7B, _HALF),
    _of_texts("OPT-13B", OPT_13B, _HALF),
    _of_texts("Llama-3.1-8B", LLAMA_8B, _HALF, _EVERY),
    _of_texts("Llama-3.1-8B", LLAMA_8B, _HALF),
    _of_texts("Llama-3.1-8B", LLAMA_8B, _HALF, _FOUR_BITS),
    CostModel("Qwen2-VL-7B", _FOUR_BITS, _name(_HALF), _IMAGES, partial(answers, QWEN2_VL_7B, _HALF, True, PATCHES)),
)
