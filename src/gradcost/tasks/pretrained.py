"""Pretrained language models as architectures, with all their weights trained or with LoRA adapters.

The weights are named in one of three ways:

- `minilm-l6` or `smollm2-135m`: files of a known checksum, which `gradcost data fetch NAME` downloads.
- a folder in the format of transformers.
- a name on the Hugging Face hub, such as `FacebookAI/roberta-base`; transformers downloads and caches it.

This module needs the extra `gradcost[transformers]`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradcost.core.errors import BadInput, Unsupported, require
from gradcost.core.inner_model import inner_model
from gradcost.core.isolation import eval_mode, restored_generators
from gradcost.core.value import value
from gradcost.tasks.architectures import Architecture
from gradcost.tasks.padding import Mask, best_mask, padded_example, plain_mask
from gradcost.tasks.pretrained_files import MINILM, SMOLLM2, load_model, padding_token, quiet, tokenizer


@value
class Lora:
    """Low-rank adapters: the base model is frozen, and W x becomes W x + (alpha / rank) B A x.

    A is random and B is zero at the start, so the first loss is that of the base model. The classification head, and
    all weights that the files of the base model lack, are trained in full.

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

    def applied(self, model: nn.Module, kind: str, new: Collection[str] = ()) -> nn.Module:
        """Freeze a model in place and return it with adapters.

        Args:
            model: a transformers model.
            kind: peft's task type, "SEQ_CLS" or "CAUSAL_LM".
            new: names of parameters that are trained in full, besides those of the head.
        Raises:
            Unsupported: peft cannot add adapters to this model.
        """
        peft = require("peft", "LoRA", "transformers")
        targets = list(self.targets) or None
        config = peft.LoraConfig(
            task_type=kind, r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=targets
        )
        untrained = [parameter for name, parameter in model.named_parameters() if name in new]
        try:
            with quiet():
                adapted = peft.get_peft_model(model, config)
        except (ValueError, TypeError, AttributeError) as error:
            raise Unsupported(
                f"peft cannot add LoRA adapters to {type(model).__name__}: {error} Name the layers in "
                'Lora(targets=...), such as ("q_proj", "v_proj").'
            ) from error
        for name, parameter in adapted.named_parameters():
            # peft trains a copy of the head; the original has no effect.
            if "original_module" not in name and any(parameter is other for other in untrained):
                parameter.requires_grad_(True)
        return adapted


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

    It is the class of transformers for sequence classification, `AutoModelForSequenceClassification`. That of a
    causal language model also works: its head gets the last real token.

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
        kind = "AutoModelForSequenceClassification"
        loaded, new = load_model(kind, self.weights, self.attention, num_labels=classes)
        loaded.config.pad_token_id = padding
        loaded.config.use_cache = False
        mask = best_mask(loaded, padded_example(self.weights, inputs[0]), padding)
        return SequenceLogits(self.lora.applied(loaded, "SEQ_CLS", new) if self.lora else loaded, padding, mask)


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
        loaded, new = load_model("AutoModelForCausalLM", self.weights, self.attention)
        loaded.config.use_cache = False
        return self.lora.applied(loaded, "CAUSAL_LM", new) if self.lora else loaded


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
        Unsupported: when built, the language model scales or caps the logits of its head.
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
        model = WordLogits(self.lm.language_model(), first, padding_token(self.weights))
        model.check_head()
        return model


class SequenceLogits(nn.Module):
    """Map tokens (N, T) to the logits of a sequence classifier, with padding masked."""

    def __init__(self, model: nn.Module, padding: int, mask: Mask = plain_mask) -> None:
        super().__init__()
        self.model = model
        self.padding = padding
        self.mask = mask

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, attention_mask=self.mask(tokens, self.padding)).logits.float()


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

    def check_head(self) -> None:
        """Compare the logits of a short text with those of the model itself.

        Raises:
            Unsupported: they differ, because the model scales or caps the logits of its head.
        """
        inner, tokens = inner_model(self.model), torch.tensor([self.words])
        with eval_mode(self), torch.no_grad(), restored_generators():
            every = inner(input_ids=tokens).logits[0, last_real(tokens, self.padding)].flatten().float()
            found = self(tokens)[0]
        if not torch.allclose(found, every[list(self.words)], rtol=0, atol=1e-5 * float(every.abs().max())):
            raise Unsupported(
                f"Verbalizer cannot compute the logits of single words of {type(inner).__name__}, which scales or "
                "caps the logits of its head. Use Encoder(weights), which trains a new head, or another model."
            )


def last_real(tokens: Tensor, padding: int) -> Tensor:
    """Return the index of the last token of each row that is not padding; 0 for a row of padding. Shape (N,)."""
    places = torch.arange(tokens.shape[1], device=tokens.device)
    return torch.where(tokens != padding, places, 0).amax(1)
