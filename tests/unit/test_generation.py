"""Questions begin as the tokenizer begins texts, and generation depends on no file beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing

import tiny_models
from gradcost.tasks.generation import continuations, prompts_and_answers, question_tokens
from gradcost.tasks.hub import generate
from gradcost.tasks.metrics import IGNORED
from gradcost.tasks.pretrained import CausalLm
from gradcost.tasks.pretrained_files import tokenizer

START, END = tiny_models.WORDS.index("[CLS]"), tiny_models.WORDS.index("[END]")


@pytest.fixture
def weights(tmp_path: Path) -> str:
    tokenizer.cache_clear()
    return tiny_models.causal(tmp_path)


def starting(folder: str, template: str, bos: str) -> Any:
    """Return the tokenizer of a folder, with a start token and a template of each text."""
    encode: Any = transformers.AutoTokenizer.from_pretrained(folder, bos_token=bos, pad_token="[END]")
    special = [("[CLS]", START), ("[SEP]", tiny_models.WORDS.index("[SEP]"))]
    encode._tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)  # pyright: ignore[reportCallIssue]
    return encode


def test_a_question_begins_with_the_start_token_of_the_tokenizer(weights: str):
    plain = question_tokens(tokenizer(weights), "what is a", "b", 12)
    assert plain is not None
    encode = starting(weights, "[CLS] $A", "[CLS]")
    assert encode("a")["input_ids"][0] == START
    pair = question_tokens(encode, "what is a", "b", 12)
    assert pair is not None
    assert pair[0] == [START, *plain[0][:-1]]
    assert pair[1] == [IGNORED, *plain[1][:-1]]
    prompts, answers = prompts_and_answers(encode, *(torch.tensor([each]) for each in pair))
    assert prompts[0].tolist() == encode("Question: what is a\nAnswer:")["input_ids"]
    assert answers == ["b"]
    for template, bos in (("$A", "[CLS]"), ("$A [SEP]", "[CLS]"), ("[CLS] $A", "[SEP]")):
        assert question_tokens(starting(weights, template, bos), "what is a", "b", 12) == plain


PROMPTS = [torch.tensor([word]) for word in range(5, 15)]


def varied(weights: str) -> Any:
    """Return a model with larger random weights, whose continuations have more than one word."""
    model = CausalLm(weights).build((8,), 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def test_the_generation_config_of_the_weights_has_no_effect(weights: str):
    model, encode = varied(weights), tokenizer(weights)
    greedy = generate(model, PROMPTS, encode, 6)
    assert any(len(set(text.split())) < len(text.split()) for text in greedy), "a penalty would change these"
    inner = model.model
    options = {"repetition_penalty": 3.0, "min_new_tokens": 6, "suppress_tokens": [10], "do_sample": True}
    inner.generation_config = config = transformers.GenerationConfig(**options, eos_token_id=5)
    assert generate(model, PROMPTS, encode, 6) == greedy
    assert inner.generation_config is config


def test_a_continuation_ends_at_the_end_token_of_the_tokenizer(weights: str):
    model = varied(weights)
    encode: Any = transformers.AutoTokenizer.from_pretrained(weights, pad_token="[END]")
    words = [text.split() for text in generate(model, PROMPTS, encode, 6)]
    model.model.generation_config.eos_token_id = encode.convert_tokens_to_ids(words[0][0])
    end = next(found[1] for found in words if len(found) > 1 and found[1] != found[0])
    encode.eos_token = end
    found = [text.split() for text in generate(model, PROMPTS, encode, 6)]
    assert [each[: each.index(end) + 1] if end in each else each for each in words] == found


def test_the_generation_config_is_restored_after_an_error(weights: str):
    model: Any = CausalLm(weights).build((8,), 0)
    config = model.model.generation_config

    def failing(*_: Any) -> torch.Tensor:
        assert model.model.generation_config is not config
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        continuations(model, failing, PROMPTS, tokenizer(weights), 2)
    assert model.model.generation_config is config
    assert model.training
