"""Pretrained language models as architectures, with all their weights trained or with LoRA adapters.

The weights are named in one of three ways:

- `minilm-l6` or `smollm2-135m`: files of a known checksum, which `gradcost data fetch NAME` downloads.
- a folder in the format of transformers.
- a name on the Hugging Face hub, such as `FacebookAI/roberta-base`; transformers downloads and caches it.

This module needs the extra `gradcost[transformers]`.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradcost.core.errors import BadInput, Unsupported, require
from gradcost.core.files import cache_folder
from gradcost.core.value import value
from gradcost.tasks import data
from gradcost.tasks.architectures import Architecture
from gradcost.tasks.sources import DataError

MINILM, SMOLLM2 = data.MINILM.name, data.SMOLLM2.name


@value
class Lora:
    """Low-rank adapters: the base model is frozen, and W x becomes W x + (alpha / rank) B A x.

    A is random and B is zero at the start, so the first loss is that of the base model. A new classification head is
    trained in full.

    Args:
        rank: the rank of the adapters.
        alpha: the scale of the adapters, times `rank`.
        targets: the ends of the names of the adapted layers. Empty: the query and value projections (peft's
            default for most models).
        dropout: dropout probability of the adapters' input.
    Raises:
        BadInput: rank < 1, or dropout is not in [0, 1).
    Source: Hu et al. 2021 (arXiv 2106.09685).
    """

    rank: int = 1
    alpha: float = 1.0
    targets: tuple[str, ...] = ()
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise BadInput(f"rank of Lora must be 1 or more, not {self.rank}.")
        if not 0 <= self.dropout < 1:
            raise BadInput(f"dropout of Lora must be at least 0 and below 1, not {self.dropout!r}.")

    def applied(self, model: nn.Module, kind: str) -> nn.Module:
        """Freeze a model in place and return it with adapters.

        Args:
            model: a transformers model.
            kind: peft's task type, "SEQ_CLS" or "CAUSAL_LM".
        Raises:
            Unsupported: peft cannot add adapters to this model.
        """
        peft = require("peft", "LoRA", "transformers")
        targets = list(self.targets) or None
        config = peft.LoraConfig(
            task_type=kind, r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=targets
        )
        try:
            with _quiet():
                return peft.get_peft_model(model, config)
        except (ValueError, TypeError, AttributeError) as error:
            raise Unsupported(
                f"peft cannot add LoRA adapters to {type(model).__name__}: {error} Name the layers in "
                'Lora(targets=...), such as ("q_proj", "v_proj").'
            ) from error


class Pretrained(Architecture):
    """A pretrained model for sequences of tokens. Sequences are padded on the right; padding has no effect.

    Args:
        weights: a known name, a folder, or a name on the hub (see this module).
        lora: the adapters to train. None: all weights are trained.
        attention: transformers' `attn_implementation`, such as "sdpa" or "eager".
    """

    weights: str
    lora: Lora | None
    attention: str


@value
class Encoder(Pretrained):
    """A pretrained encoder with a new classification head: int64 tokens (N, T) -> logits (N, classes).

    It is the class of transformers for sequence classification, `AutoModelForSequenceClassification`.

    Args:
        weights: `minilm-l6`, a folder, or a name on the hub, such as `google-bert/bert-base-uncased`.
        lora: the adapters to train. None: all weights are trained.
        attention: transformers' `attn_implementation`, such as "sdpa" or "eager".
    Source: Wang et al. 2020 (arXiv 2002.10957) for MiniLM.
    """

    weights: str = MINILM
    lora: Lora | None = None
    attention: str = "sdpa"

    def build(self, inputs: tuple[int, ...], classes: int) -> nn.Module:
        padding = padding_token(self.weights)
        model = _loaded(self, "AutoModelForSequenceClassification", num_labels=classes)
        model.config.pad_token_id = padding
        return SequenceLogits(self.lora.applied(model, "SEQ_CLS") if self.lora else model, padding)


@value
class CausalLm(Pretrained):
    """A pretrained causal language model: int64 tokens (N, T) -> logits (N, T, vocabulary).

    Args:
        weights: `smollm2-135m`, a folder, or a name on the hub, such as `facebook/opt-1.3b`. The weights of
            `smollm2-135m` were quantised to 4 bits and are used in float32.
        lora: the adapters to train. None: all weights are trained.
        attention: transformers' `attn_implementation`, such as "sdpa" or "eager".
    Source: Ben Allal et al. 2025 (arXiv 2502.02737) for SmolLM2.
    """

    weights: str = SMOLLM2
    lora: Lora | None = None
    attention: str = "sdpa"

    def build(self, inputs: tuple[int, ...], classes: int) -> nn.Module:
        return TokenLogits(self.language_model())

    def language_model(self) -> nn.Module:
        """Return the model of transformers, or peft's wrapper around it. Its key-value cache is off."""
        model = _loaded(self, "AutoModelForCausalLM")
        model.config.use_cache = False
        return self.lora.applied(model, "CAUSAL_LM") if self.lora else model


@value
class Verbalizer(Architecture):
    """A prompted classifier: int64 tokens (N, T) -> the logits of one word per class, as the next token (N, classes).

    The logits are those after the last token that is not padding. Only the head's rows of these words are computed,
    so the probabilities are over the words, not over the vocabulary.

    Args:
        lm: the causal language model.
        words: one word per class; their first tokens must differ.
    Raises:
        BadInput: fewer than two words; when built, also if two words begin with the same token.
    Source: Schick and Schuetze 2021 (arXiv 2001.07676).
    """

    lm: CausalLm = CausalLm()
    words: tuple[str, ...] = ("no", "yes")

    def __post_init__(self) -> None:
        if len(self.words) < 2:
            raise BadInput(f"a Verbalizer needs a word for each of two or more classes, not {self.words!r}.")

    @property
    def weights(self) -> str:
        """The name of the language model's weights."""
        return self.lm.weights

    def build(self, inputs: tuple[int, ...], classes: int) -> nn.Module:
        if classes != len(self.words):
            raise BadInput(f"the task has {classes} classes and the Verbalizer {len(self.words)} words.")
        encode = tokenizer(self.weights)
        first = [encode(f" {word}", add_special_tokens=False)["input_ids"][0] for word in self.words]
        if len(set(first)) < len(first):
            raise BadInput(f"two of the words {self.words} begin with the same token: choose other words.")
        return WordLogits(self.lm.language_model(), first, padding_token(self.weights))


class SequenceLogits(nn.Module):
    """Map tokens (N, T) to the logits of a sequence classifier, with padding masked."""

    def __init__(self, model: nn.Module, padding: int) -> None:
        super().__init__()
        self.model = model
        self.padding = padding

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, attention_mask=_additive_mask(tokens, self.padding)).logits.float()


class TokenLogits(nn.Module):
    """Map tokens (N, T) to logits at each position. Padding on the right does not change the logits before it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).logits.float()


class WordLogits(nn.Module):
    """Map tokens (N, T), padded on the right, to the logits of some words after the last real token."""

    def __init__(self, model: nn.Module, words: Sequence[int], padding: int) -> None:
        super().__init__()
        self.model = model
        self.words = tuple(words)
        self.padding = padding

    def forward(self, tokens: Tensor) -> Tensor:
        inner = inner_model(self.model)
        hidden = inner.base_model(input_ids=tokens).last_hidden_state
        last = last_real(tokens, self.padding)
        head = inner.get_output_embeddings()
        words = torch.tensor(self.words, device=tokens.device)
        bias = None if getattr(head, "bias", None) is None else head.bias[words]
        return F.linear(
            hidden[torch.arange(len(tokens), device=tokens.device), last], head.weight[words], bias
        ).float()


def last_real(tokens: Tensor, padding: int) -> Tensor:
    """Return the index of the last token of each row that is not padding; 0 for a row of padding. Shape (N,)."""
    places = torch.arange(tokens.shape[1], device=tokens.device)
    return torch.where(tokens != padding, places, 0).amax(1)


def inner_model(model: Any) -> Any:
    """Return the transformers model inside peft's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _additive_mask(tokens: Tensor, padding: int) -> Tensor:
    """Return 0 for real tokens and the least float32 for padding, of shape (N, 1, 1, T).

    transformers uses a mask of four dimensions as it is. It reads the values of a mask of two dimensions, which a
    forecast without data cannot do.
    """
    mask = torch.zeros(tokens.shape, device=tokens.device)
    return mask.masked_fill(tokens == padding, torch.finfo(mask.dtype).min)[:, None, None, :]


# ---- files


def location(weights: str) -> str:
    """Return what transformers loads: a verified folder for a known name, else the folder or hub name itself.

    Raises:
        DataError: the files of a known name are missing or damaged.
    """
    if weights == MINILM:
        return os.fspath(data.verified(data.MINILM))
    return os.fspath(_smollm2()) if weights == SMOLLM2 else weights


def config(weights: str) -> Any:
    """Return the configuration of a pretrained model.

    Raises:
        DataError: it cannot be loaded.
    """
    return _from_pretrained("AutoConfig", weights)


@lru_cache(maxsize=4)
def tokenizer(weights: str) -> Any:
    """Return the tokenizer of a pretrained model. A model without a padding token is padded with its end token.

    Raises:
        DataError: it cannot be loaded.
    """
    loaded = _from_pretrained("AutoTokenizer", weights)
    if loaded.pad_token_id is None:
        loaded.pad_token = loaded.eos_token
    return loaded


def padding_token(weights: str) -> int:
    """Return the token with which sequences for a pretrained model are padded."""
    return tokenizer(weights).pad_token_id


def encoded(weights: str, texts: Sequence[str], length: int) -> Tensor:
    """Return the tokens of texts, cut to `length` and padded on the right: int64, shape (len(texts), length).

    Args:
        weights: the name of a pretrained model, whose tokenizer is used.
        texts: the texts.
        length: number of tokens per text.
    """
    options = {"truncation": True, "max_length": length, "padding": "max_length", "padding_side": "right"}
    return torch.tensor(tokenizer(weights)(list(texts), **options)["input_ids"], dtype=torch.int64)


def _loaded(architecture: Pretrained, kind: str, **options: Any) -> Any:
    """Return a model in float32. Weights that the files lack come from torch's default generator."""
    options |= {"attn_implementation": architecture.attention, "dtype": torch.float32}
    return _from_pretrained(kind, architecture.weights, **options).train()


def _from_pretrained(kind: str, weights: str, **options: Any) -> Any:
    transformers = require("transformers", "A pretrained model", "transformers")
    place = location(weights)
    try:
        with _quiet():
            return getattr(transformers, kind).from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{weights!r} cannot be loaded: {reason} Give {MINILM!r} or {SMOLLM2!r} (`gradcost data fetch NAME`), a "
            "folder that transformers saved, or a name on the Hugging Face hub (needs a network)."
        ) from error


def _smollm2() -> Path:
    """Return the folder with SmolLM2 in float32; convert the quantised file on the first use (538 MB)."""
    source = data.verified(data.SMOLLM2)
    folder = cache_folder() / f"{SMOLLM2}-float32"
    if (folder / "model.safetensors").is_file():
        return folder
    transformers = require("transformers", "A pretrained model", "transformers")
    require("gguf", f"Reading {SMOLLM2}", "transformers")
    torch_files = require("safetensors.torch", f"Converting {SMOLLM2}", "transformers")
    options = {"gguf_file": data.SMOLLM2.pieces[0].name}
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{SMOLLM2}-") as scratch, _quiet():
            transformers.AutoTokenizer.from_pretrained(source, **options).save_pretrained(scratch)
            model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
            # transformers refuses to save a model that it loaded from such a file, so save its parts.
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.config.save_pretrained(scratch)
            kept = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
            assert model.config.tie_word_embeddings
            torch_files.save_file(kept, Path(scratch) / "model.safetensors", metadata={"format": "pt"})
            folder.mkdir(exist_ok=True)
            # The weights are last: their presence marks a complete folder.
            for path in sorted(Path(scratch).iterdir(), key=lambda path: path.suffix == ".safetensors"):
                os.replace(path, folder / path.name)
    except OSError as error:
        raise DataError(
            f"{SMOLLM2} cannot be converted in {folder} ({error.strerror or error}). Set GRADCOST_CACHE to a folder "
            "that is writable and has 1.2 GB of free space."
        ) from error
    return folder


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide warnings, log lines and progress bars of transformers inside the context."""
    log = require("transformers", "A pretrained model", "transformers").utils.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()
