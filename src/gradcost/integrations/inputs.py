"""Training batches for models of the transformers library that have a loss of their own, from their configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradcost.core.errors import BadInput

Inputs = dict[str, Tensor]


def own_loss(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return the loss that the model computes from its inputs and labels, a scalar."""
    return model(**inputs).loss


def made_for(name: str, config: Any, examples: int, length: int) -> Inputs | None:
    """Return inputs and labels for a model with an own loss; None if its kind is not known.

    Args:
        name: the name of the model's class.
        config: its configuration.
        examples: number of examples.
        length: number of tokens per example, or of the answer for speech; not used for images.
    Raises:
        BadInput: the model takes images and text.
    """
    if getattr(config, "vision_config", None) is not None:
        raise BadInput(
            f"{name} takes images and text, and hf:CONFIG.json makes tokens only: a forecast would lack the images: "
            "give FILE.py:FACTORY, and --data for a batch with both."
        )
    make = next((make for suffix, make in _MAKERS.items() if name.endswith(suffix)), None)
    if make is None and getattr(config, "is_encoder_decoder", False):
        if getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = 0
        make = _speech if hasattr(config, "num_mel_bins") else _sequences
    return None if make is None else make(config, examples, length)


def _tokens(examples: int, length: int) -> Tensor:
    return torch.ones(examples, length, dtype=torch.int64)


def _sequences(config: Any, examples: int, length: int) -> Inputs:
    return {"input_ids": _tokens(examples, length), "labels": _tokens(examples, length)}


def _answers(config: Any, examples: int, length: int) -> Inputs:
    zeros = torch.zeros(examples, dtype=torch.int64)
    return {"input_ids": _tokens(examples, length), "start_positions": zeros, "end_positions": zeros.clone()}


def _images(config: Any, examples: int, length: int) -> Inputs:
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.zeros(examples, getattr(config, "num_channels", 3), height, width)
    return {"pixel_values": pixels, "labels": torch.zeros(examples, dtype=torch.int64)}


def _speech(config: Any, examples: int, length: int) -> Inputs:
    features = torch.zeros(examples, config.num_mel_bins, 2 * config.max_source_positions)
    labels = _tokens(examples, min(length, config.max_target_positions))
    return {"input_features": features, "labels": labels}


_MAKERS: dict[str, Callable[[Any, int, int], Inputs]] = {
    "ForTokenClassification": lambda config, examples, length: {
        "input_ids": _tokens(examples, length),
        "labels": torch.zeros(examples, length, dtype=torch.int64),
    },
    "ForQuestionAnswering": _answers,
    "ForImageClassification": _images,
}
