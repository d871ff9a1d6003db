"""Questions whose answers a language model generates: their tokens, their prompts, and the generated texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradcost.core.errors import require
from gradcost.core.interrupts import undoing
from gradcost.core.isolation import eval_mode
from gradcost.tasks.metrics import IGNORED


def question_tokens(encode: Any, question: str, answer: str, length: int) -> tuple[list[int], list[int]] | None:
    """Return the tokens of a question with its answer, and their targets; None if there are more than `length`.

    Only the tokens of the answer and its end are targets. Both lists are padded on the right. The token of the
    beginning is first if the tokenizer begins each text with it.
    """
    text = f"Question: {question}\nAnswer:"
    prompt = encode(text, add_special_tokens=False)["input_ids"]
    if encode(text)["input_ids"][0] == encode.bos_token_id:
        prompt = [encode.bos_token_id, *prompt]
    end = [*encode(f" {answer}", add_special_tokens=False)["input_ids"], encode.eos_token_id]
    padding = length + 1 - len(prompt) - len(end)
    if padding < 0:
        return None
    tokens = (prompt + end + [encode.pad_token_id] * padding)[:-1]
    return tokens, [IGNORED] * (len(prompt) - 1) + end + [IGNORED] * padding


def prompts_and_answers(encode: Any, tokens: Tensor, targets: Tensor) -> tuple[list[Tensor], list[str]]:
    """Return the tokens of each question and the text of its answer, from rows of `question_tokens`."""
    prompts = [row[: int((y != IGNORED).nonzero()[0]) + 1] for row, y in zip(tokens, targets, strict=True)]
    return prompts, answer_texts(encode, targets)


def answer_texts(encode: Any, targets: Tensor) -> list[str]:
    """Return the text of each answer, from targets of `question_tokens`."""
    return [encode.decode(y[y != IGNORED], skip_special_tokens=True) for y in targets]


def continuations(
    model: nn.Module,
    continued: Callable[[Tensor, Tensor, dict[str, Any]], Tensor],
    prompts: Sequence[Tensor],
    encode: Any,
    tokens: int,
) -> list[str]:
    """Return the continuation of each prompt by the most probable tokens.

    The prompts are padded on the left, so that each continuation follows its prompt. A continuation ends at the
    tokenizer's end token. The model's `generation_config`, such as a repetition penalty, has no effect. It is
    restored, as is the mode of each module.

    Args:
        model: the module that `continued` calls.
        continued: maps padded prompts, a mask that is 0 on the padding, and options of transformers' `generate` to
            the tokens that follow.
        prompts: int64 tokens, one dimension each.
        encode: the tokenizer, with a padding token.
        tokens: the largest number of tokens to generate.
    """
    device = next(model.parameters()).device
    length = max(len(prompt) for prompt in prompts)
    padded = torch.full((len(prompts), length), encode.pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(padded)
    for row, shown, prompt in zip(padded, mask, prompts, strict=True):
        row[length - len(prompt) :] = prompt
        shown[length - len(prompt) :] = 1
    options = {"max_new_tokens": tokens, "do_sample": False, "use_cache": True, "pad_token_id": encode.pad_token_id}
    options["eos_token_id"] = encode.eos_token_id
    with eval_mode(model), _default_generation(model), torch.no_grad():
        output = continued(padded.to(device), mask.to(device), options)
    return encode.batch_decode(output, skip_special_tokens=True)


@contextmanager
def _default_generation(model: nn.Module) -> Iterator[None]:
    """Give each module with a `generation_config` an empty one inside the context: `generate` reads it always."""
    transformers = require("transformers", "Generation", "transformers")
    configured: list[Any] = [module for module in model.modules() if "generation_config" in vars(module)]
    before = [module.generation_config for module in configured]

    def restore() -> None:
        for module, config in zip(configured, before, strict=True):
            module.generation_config = config

    with undoing(restore):
        for module in configured:
            module.generation_config = transformers.GenerationConfig()
        yield
