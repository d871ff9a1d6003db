"""Models of the transformers library, from their configuration alone: shapes without weights and without a network.

Needs the extra gradcost[transformers].
"""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradcost.checkpointing.chunked_loss import chunked_cross_entropy
from gradcost.core.errors import BadInput, Unsupported, require
from gradcost.core.objective import Objective
from gradcost.tasks.task import Batch

LENGTH = 512  # tokens of an example where nothing else is asked for


def from_config(path: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The model that a config.json describes, on the `meta` device, in `dtype` or the configuration's own.

    Its class is the first of `architectures`; without that, the causal language model of its `model_type`. Its
    key-value cache is off. Raises: ValueError when the file is missing or no such configuration, or transformers
    does not know its model_type; ImportError without transformers.
    """
    transformers = _transformers()
    config = _config(transformers, Path(path))
    config.use_cache = False
    named = getattr(config, "architectures", None) or []
    made = getattr(transformers, named[0], None) if named else None
    asked = {} if dtype is None else {"dtype": dtype}
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            if made is None:
                model = transformers.AutoModelForCausalLM.from_config(config, **asked)
            else:
                model = made._from_config(config, **asked)
    except (ValueError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        what = str(error).strip().split("\n")[0]
        raise BadInput(f"no model could be made of {path}: {type(error).__name__}: {what}") from error
    return model.train()


def _config(transformers: Any, path: Path) -> Any:
    path = path / "config.json" if path.is_dir() else path
    try:
        said = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}. Give a model's config.json.") from None
    except ValueError as error:
        raise BadInput(f"{path} is no JSON: {error}.") from None
    if not isinstance(said, dict) or not isinstance(said.get("model_type"), str):
        raise BadInput(f"{path} is no configuration of a transformers model: it says no model_type.")
    kind, known = said["model_type"], transformers.CONFIG_MAPPING
    if kind not in known:
        near = difflib.get_close_matches(kind, list(known), n=3, cutoff=0.5)
        meant = f" Did you mean {' or '.join(near)}?" if near else ""
        raise Unsupported(
            f"transformers {transformers.__version__} knows no model_type {kind!r}.{meant} A newer transformers may; "
            "for code of your own give FILE.py:FACTORY."
        )
    try:
        return known[kind].from_dict(said)
    except Exception as error:  # it checks itself, by exceptions of its own
        what = " ".join(str(error).split())
        raise BadInput(f"{path} is no configuration of {kind!r}: {what}") from error


def with_lora(model: nn.Module, rank: int) -> nn.Module:
    """The model frozen, with trainable LoRA adapters of this rank on all of its linear layers but the head (peft).

    Source: Hu et al. 2021 (arXiv 2106.09685). Raises: ValueError when rank < 1 or nothing can be adapted;
    ImportError without peft.
    """
    if rank < 1:
        raise BadInput(f"the rank of LoRA adapters is 1 or more, not {rank}.")
    peft = require("peft", "LoRA", "transformers")
    device = next(model.parameters()).device
    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules="all-linear")).train()
        except (ValueError, TypeError, AttributeError) as error:
            raise Unsupported(f"LoRA cannot be put on {type(model).__name__}: {error}") from error


def is_model(found: Any) -> bool:
    """Whether it is a model of the transformers library, with adapters or without."""
    return isinstance(
        getattr(_inner(found), "config", None),
        _transformers().PretrainedConfig,
    )


def objective(
    model: nn.Module, examples: int, length: int | None = None, chunks: int | None = None
) -> tuple[Objective, Any]:
    """The training loss of a transformers model and a batch of `examples`, each of `length` tokens.

    A language model is given tokens and told to say the next one (a masked one, the same): the mean cross-entropy,
    with the logits in float32. chunks: the head and its loss in so many chunks (`chunked_cross_entropy`). A
    classifier of sequences has labels. Raises: ValueError when examples or length < 1, the model takes fewer
    tokens, or is of another kind.
    """
    config, name = _inner(model).config, type(_inner(model)).__name__
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    length = min(LENGTH, most or LENGTH) if length is None else length
    if examples < 1 or length < 1:
        raise BadInput(f"a batch has 1 example of 1 token or more, not {examples} of {length}.")
    if most is not None and length > most:
        raise BadInput(f"{name} takes at most {most:,} tokens, by max_position_embeddings, and not {length:,}.")
    tokens = torch.ones(examples, length, dtype=torch.int64)
    if name.endswith("ForSequenceClassification"):
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = 0
        return Objective(model, classification), Batch(tokens, torch.zeros(examples, dtype=torch.int64))
    head = getattr(_inner(model), "get_output_embeddings", lambda: None)()
    if head is None or getattr(config, "is_encoder_decoder", False):
        raise BadInput(
            f"{name} is neither a language model with one stack of blocks nor a classifier of sequences: give "
            "FILE.py:FACTORY that returns (model, loss), and --data."
        )
    shift = 0 if name.endswith("ForMaskedLM") else 1
    return Objective(model, language(chunks, shift)), tokens


def language(chunks: int | None = None, shift: int = 1) -> Callable[[nn.Module, Tensor], Tensor]:
    """The mean cross-entropy of tokens (examples, length), each told from those before it."""

    def whole(model: nn.Module, tokens: Tensor) -> Tensor:
        logits = model(input_ids=tokens).logits.float()
        return F.cross_entropy(logits.flatten(0, -2), _targets(tokens, shift).flatten())

    def in_chunks(model: nn.Module, tokens: Tensor) -> Tensor:
        inner = _inner(model)
        hidden = inner.base_model(input_ids=tokens).last_hidden_state
        head = inner.get_output_embeddings()
        bias = getattr(head, "bias", None)
        return chunked_cross_entropy(hidden, head.weight, _targets(tokens, shift), chunks or 1, bias)

    return whole if chunks is None else in_chunks


def classification(model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross-entropy of the labels `batch.y` of sequences of tokens `batch.x`."""
    return F.cross_entropy(model(input_ids=batch.x).logits.float(), batch.y)


def _targets(tokens: Tensor, shift: int) -> Tensor:
    # Padded, not sliced: a slice of the logits would be a second one.
    return F.pad(tokens[:, shift:], (0, shift), value=-100) if shift else tokens


def _inner(model: Any) -> Any:
    """The transformers model within peft's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _transformers() -> Any:
    return require("transformers", "A model of transformers", "transformers")
