"""Load pretrained models and tokenizers by name. `pretrained` lists the three kinds of names.

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
from torch import Tensor

from gradcost.core.errors import first_line, require
from gradcost.core.files import cache_folder
from gradcost.tasks import catalogue, data
from gradcost.tasks.sources import DataError

MINILM, SMOLLM2 = catalogue.MINILM.name, catalogue.SMOLLM2.name


def location(weights: str) -> str:
    """Return what transformers loads: a verified folder for a known name, else the folder or hub name itself.

    Raises:
        DataError: the files of a known name are missing or damaged.
    """
    if weights == MINILM:
        return os.fspath(data.verified(catalogue.MINILM))
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


def load_model(kind: str, weights: str, attention: str, **options: Any) -> tuple[Any, set[str]]:
    """Return a model in float32, and the names of its weights that the files lack: these are random.

    Random weights come from torch's default generator.

    Args:
        kind: the class of transformers that loads it, such as "AutoModelForCausalLM".
        weights: the name of the pretrained model.
        attention: transformers' `attn_implementation`.
        options: further options of `from_pretrained`.
    Raises:
        DataError: it cannot be loaded.
    """
    options |= {"attn_implementation": attention, "dtype": torch.float32, "output_loading_info": True}
    model, report = _from_pretrained(kind, weights, **options)
    return model.train(), set(report["missing_keys"])


def _from_pretrained(kind: str, weights: str, **options: Any) -> Any:
    transformers = require("transformers", "A pretrained model", "transformers")
    place = location(weights)
    try:
        with quiet():
            return getattr(transformers, kind).from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{weights!r} cannot be loaded: {first_line(error)}. Give {MINILM!r} or {SMOLLM2!r} (`gradcost data "
            "fetch NAME`), a folder that transformers saved, or a name on the Hugging Face hub (needs a network)."
        ) from error


def _smollm2() -> Path:
    """Return the folder with SmolLM2 in float32; convert the quantised file on the first use (538 MB)."""
    source = data.verified(catalogue.SMOLLM2)
    folder = cache_folder() / f"{SMOLLM2}-float32"
    if (folder / "model.safetensors").is_file():
        return folder
    transformers = require("transformers", "A pretrained model", "transformers")
    require("gguf", f"Reading {SMOLLM2}", "transformers")
    torch_files = require("safetensors.torch", f"Converting {SMOLLM2}", "transformers")
    options = {"gguf_file": catalogue.SMOLLM2.pieces[0].name}
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{SMOLLM2}-") as scratch, quiet():
            transformers.AutoTokenizer.from_pretrained(source, **options).save_pretrained(scratch)
            loaded = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
            # transformers refuses to save a model that it loaded from such a file, so save its parts.
            if hasattr(loaded.config, "quantization_config"):
                del loaded.config.quantization_config
            loaded.config.save_pretrained(scratch)
            kept = {name: tensor for name, tensor in loaded.state_dict().items() if name != "lm_head.weight"}
            assert loaded.config.tie_word_embeddings
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
def quiet() -> Iterator[None]:
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
