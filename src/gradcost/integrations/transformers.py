"""Build models of the transformers library from a config.json, without weights and without the network.

This module needs the extra `gradcost[transformers]`.
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
from gradcost.core.errors import BadInput, Unsupported, brief, require
from gradcost.core.files import read_regular
from gradcost.core.inner_model import inner_model
from gradcost.core.objective import Objective
from gradcost.integrations.four_bit import in_four_bits
from gradcost.integrations.inputs import made_for, own_loss
from gradcost.tasks.task import Batch

LENGTH = 512  # tokens per example by default
MOST_LAYERS = 10_000  # of a model that is built in seconds


def from_config(path: str | Path, dtype: torch.dtype | None = None, attention: str | None = None) -> nn.Module:
    """Build the model that a config.json describes, on the `meta` device and in training mode.

    The class of the model is the first entry of `architectures` in the file. If transformers has no such class, it is
    the causal language model of the file's `model_type`. The key-value cache is off.

    Args:
        path: the config.json, or the folder that contains it.
        dtype: the type of the weights. None: the type in the config.json.
        attention: transformers' `attn_implementation`, "sdpa" or "eager". None: the model's own.
    Returns:
        The model. Its weights are on the `meta` device and have no values.
    Raises:
        BadInput: the file is missing, is not a configuration of a model, or transformers cannot build the model.
        Unsupported: the installed transformers does not have the `model_type`.
        MissingExtra: transformers is not installed.
    """
    settings = _settings(Path(path))
    transformers = _transformers()
    config = _config(transformers, path, settings)
    config.use_cache = False
    architectures = getattr(config, "architectures", None) or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise BadInput(f"{path} is not a configuration of a model: architectures is a list of names of classes.")
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise BadInput(f"{path} has {layers:,} layers, and {MOST_LAYERS:,} are the most that can be built.")
    _require_known_quantization(path, config)
    kind = getattr(transformers, architectures[0], None) if architectures else None
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    options |= {} if attention is None else {"attn_implementation": attention}
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            if kind is None:
                model = transformers.AutoModelForCausalLM.from_config(config, **options)
            else:
                model = kind._from_config(config, **options)
    except Exception as error:  # a model's own code raises exceptions of many types
        raise BadInput(f"transformers cannot build the model of {path}: {brief(error)}") from error
    return model.train()


def _settings(path: Path) -> dict[str, Any]:
    path = path / "config.json" if path.is_dir() else path
    try:
        settings = json.loads(read_regular(path))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}. Give a model's config.json.") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON: {error}. Give a model's config.json.") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("model_type"), str):
        raise BadInput(f"{path} is not a configuration of a transformers model: it has no model_type.")
    return settings


def _config(transformers: Any, path: str | Path, settings: dict[str, Any]) -> Any:
    kind, known = settings["model_type"], transformers.CONFIG_MAPPING
    if kind not in known:
        near = difflib.get_close_matches(kind, list(known), n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise Unsupported(
            f"transformers {transformers.__version__} does not have the model_type {kind!r}.{hint} Install a newer "
            "transformers, or give FILE.py:FACTORY for other code."
        )
    try:
        return known[kind].from_dict(settings)
    except Exception as error:  # a configuration validates itself and raises exceptions of many types
        message = " ".join(str(error).split())
        raise BadInput(f"{path} is not a configuration of {kind!r}: {message}") from error


def is_quantized(model: nn.Module) -> bool:
    """Return whether the configuration of a model from `from_config` stores frozen weights in 4 bits."""
    return getattr(model.config, "quantization_config", None) is not None


def _require_known_quantization(path: str | Path, config: Any) -> None:
    settings = getattr(config, "quantization_config", None)
    settings = settings if settings is None or isinstance(settings, dict) else settings.to_dict()
    if settings is None or settings.get("load_in_4bit") is True:
        return
    raise Unsupported(
        f"{path} has a quantization_config ({settings.get('quant_method', 'no method')}), and a forecast knows only "
        '"load_in_4bit": true of bitsandbytes. Delete quantization_config to forecast the weights without it.'
    )


def quantized(model: nn.Module) -> nn.Module:
    """Store the frozen linear layers of a model in 4 bits, except its head, and return the model.

    Half a byte per weight, and a scale for each 64: nearly the layout of bitsandbytes' NF4. A layer's weights are
    computed in the dtype of the model when they are needed, and not saved.

    Args:
        model: a transformers model with adapters from `with_lora`. It is changed in place.
    Raises:
        BadInput: no weight is frozen, or the number of inputs of a layer is not a multiple of 64.
    Source: Dettmers et al. 2023 (arXiv 2305.14314).
    """
    if all(parameter.requires_grad for parameter in model.parameters()):
        raise BadInput("weights in 4 bits cannot be trained: add --lora RANK, which trains adapters instead.")
    return in_four_bits(model, head=inner_model(model).get_output_embeddings())  # type: ignore[operator]


def with_lora(model: nn.Module, rank: int) -> nn.Module:
    """Freeze a model and add trainable LoRA adapters to all linear layers except the head, with peft.

    Args:
        model: a transformers model. It is changed in place.
        rank: the rank of the adapters, 1 or more.
    Returns:
        peft's wrapper around the model, in training mode.
    Raises:
        BadInput: `rank` is below 1.
        Unsupported: peft cannot add adapters to this model.
        MissingExtra: peft is not installed.
    Source: Hu et al. 2021 (arXiv 2106.09685).
    """
    if rank < 1:
        raise BadInput(f"the rank of LoRA adapters must be 1 or more, not {rank}.")
    peft = require("peft", "LoRA", "transformers")
    device = next(model.parameters()).device
    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules="all-linear")).train()
        except (ValueError, TypeError, AttributeError) as error:
            raise Unsupported(f"peft cannot add LoRA adapters to {type(model).__name__}: {error}") from error


def has_adapters(model: nn.Module) -> bool:
    """Return whether peft has added adapters to a model, by a wrapper or in place."""
    return hasattr(model, "peft_config")


def is_model(model: Any) -> bool:
    """Return whether an object is a model of the transformers library, with or without peft adapters.

    Args:
        model: any object.
    Returns:
        True if the object has a transformers configuration.
    Raises:
        MissingExtra: transformers is not installed.
    """
    return isinstance(getattr(inner_model(model), "config", None), _transformers().PretrainedConfig)


def objective(
    model: nn.Module, examples: int, length: int | None = None, chunks: int | None = None
) -> tuple[Objective, Any]:
    """Return the objective of a transformers model, with its training loss, and a batch of the given size.

    The loss is the mean cross-entropy, with the logits in float32:
    - a causal language model predicts the next token;
    - a masked language model predicts the token at the same position;
    - a sequence classifier predicts the label of the sequence.

    Encoder-decoder models of text and speech, and classifiers of tokens, answers and images, compute their own loss.

    Args:
        model: a model from `from_config`, `with_lora` or transformers.
        examples: number of sequences in the batch.
        length: number of tokens per sequence. None: 512, or the maximum of the model if that is less.
        chunks: number of parts in which the head and the loss are computed (`chunked_cross_entropy`). None: all
            logits are computed at once.
    Returns:
        (objective, batch). batch: int64 tokens, shape (examples, length); for a classifier Split(tokens, labels); for
        a model with its own loss a dictionary of its arguments.
    Raises:
        BadInput: `examples` or `length` is below 1, `length` is above the maximum of the model, the tokens do not fit
            this machine, `chunks` is given for a model that is no language model, or the model is of another kind.
    """
    config, name = inner_model(model).config, type(inner_model(model)).__name__
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    length = min(LENGTH, most or LENGTH) if length is None else length
    if examples < 1 or length < 1:
        raise BadInput(f"a batch needs at least 1 example of 1 token, not {examples} examples of {length} tokens.")
    if most is not None and length > most:
        raise BadInput(f"{name} takes at most {most:,} tokens (its max_position_embeddings), not {length:,}.")
    try:
        tokens = torch.ones(examples, length, dtype=torch.int64)
    except (RuntimeError, TypeError) as error:  # no memory, or a number above 64 bits
        raise BadInput(
            f"{examples:,} examples of {length:,} tokens do not fit the memory of this machine: take a smaller batch."
        ) from error
    is_classifier = name.endswith("ForSequenceClassification")
    inputs = None if is_classifier else made_for(name, config, examples, length)
    if chunks is not None and (is_classifier or inputs is not None):
        raise BadInput(f"{name} has no language model's head to compute in chunks: leave chunks out.")
    if is_classifier:
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = 0
        return Objective(model, classification), Batch(tokens, torch.zeros(examples, dtype=torch.int64))
    if inputs is not None:
        return Objective(model, own_loss), inputs
    if getattr(inner_model(model), "get_output_embeddings", lambda: None)() is None:
        raise BadInput(
            f"{name} is no language model, and no classifier of sequences, tokens, answers or images: give "
            "FILE.py:FACTORY that returns (model, loss), and --data."
        )
    shift = 0 if name.endswith("ForMaskedLM") else 1
    return Objective(model, language(chunks, shift)), tokens


def language(chunks: int | None = None, shift: int = 1) -> Callable[[nn.Module, Tensor], Tensor]:
    """Return the loss of a language model: the mean cross-entropy of tokens, in nats.

    Args:
        chunks: number of parts in which the head and the loss are computed (`chunked_cross_entropy`). None: all
            logits are computed at once.
        shift: position t predicts token t + shift: 1 for causal models, 0 for masked models.
    Returns:
        A function loss(model, tokens), with int64 tokens of shape (examples, length).
    """

    def at_once(model: nn.Module, tokens: Tensor) -> Tensor:
        logits = model(input_ids=tokens).logits.float()
        return F.cross_entropy(logits.flatten(0, -2), _targets(tokens, shift).flatten())

    def in_chunks(model: nn.Module, tokens: Tensor) -> Tensor:
        inner = inner_model(model)
        hidden = inner.base_model(input_ids=tokens).last_hidden_state
        head = inner.get_output_embeddings()
        bias = getattr(head, "bias", None)
        return chunked_cross_entropy(hidden, head.weight, _targets(tokens, shift), chunks or 1, bias)

    return at_once if chunks is None else in_chunks


def classification(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of a sequence classifier, in nats.

    Args:
        model: a transformers model with logits of shape (examples, classes).
        batch: Split(x, y). x: int64 tokens, shape (examples, length). y: int64 labels, shape (examples,).
    Returns:
        A scalar, float32.
    """
    return F.cross_entropy(model(input_ids=batch.x).logits.float(), batch.y)


def _targets(tokens: Tensor, shift: int) -> Tensor:
    # Pad the targets, because slicing the logits to the same length would copy the logits.
    return F.pad(tokens[:, shift:], (0, shift), value=-100) if shift else tokens


def _transformers() -> Any:
    return require("transformers", "A model of transformers", "transformers")
