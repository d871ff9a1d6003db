"""The logits of padded sequences are those that the model itself gives for a mask of two dimensions."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import tiny_models
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.estimators.presets import backprop, checkpointed, forward_gradient, mezo
from gradcost.planning.forecast import forecast
from gradcost.tasks.padding import additive_mask, best_mask, no_mask, padded_example, plain_mask
from gradcost.tasks.pretrained import Encoder
from gradcost.tasks.task import Batch, cross_entropy
from vectors import estimated, true_gradient

KEY = Key(3)
LENGTH = 16
VOCABULARY = len(tiny_models.WORDS) + 8
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "pad_token_id": 0,
}
ENDS: dict[str, Any] = {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
HEADS: dict[str, Any] = {"num_key_value_heads": 2}
WINDOW: dict[str, Any] = {"local_attention": 8, "global_attn_every_n_layers": 2}
SMALL_GPT2: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2}

ENCODERS = {
    "bert": transformers.BertConfig(**SIZES),
    "roberta": transformers.RobertaConfig(**SIZES),
    "deberta": transformers.DebertaConfig(**SIZES),
    "deberta-v2": transformers.DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "modernbert": transformers.ModernBertConfig(**SIZES, **ENDS, **WINDOW),
    "xlnet": transformers.XLNetConfig(vocab_size=VOCABULARY, d_model=16, n_layer=2, n_head=2, d_inner=32),
}
DECODERS = {
    "llama": transformers.LlamaConfig(**SIZES, **HEADS),
    "qwen2": transformers.Qwen2Config(**SIZES, **HEADS),
    "mistral": transformers.MistralConfig(**SIZES, **HEADS, sliding_window=4),
    "gpt2": transformers.GPT2Config(**SMALL_GPT2),
    "opt": transformers.OPTConfig(**{**SIZES, "intermediate_size": None}, ffn_dim=32, word_embed_proj_dim=16),
}
MASKS = {"bert": additive_mask, "roberta": additive_mask} | dict.fromkeys(DECODERS, no_mask)
NO_SDPA = ("deberta", "deberta-v2", "xlnet")


def built(name: str, folder: Path) -> Any:
    weights = tiny_models.saved(folder, (ENCODERS | DECODERS)[name], name in ENCODERS)
    with seeded_generators(Key(1)):
        model: Any = Encoder(weights, attention="eager" if name in NO_SDPA else "sdpa").build((LENGTH,), 3)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # random weights of transformers are so small that all logits are alike
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def padded(padding: int) -> torch.Tensor:
    tokens = torch.randint(5, len(tiny_models.WORDS), (3, LENGTH), generator=torch.Generator().manual_seed(1))
    tokens[0, 8:] = padding
    tokens[1, 10:] = padding
    return tokens


@pytest.mark.parametrize("name", ENCODERS | DECODERS)
def test_logits_are_those_of_the_mask_of_two_dimensions(name: str, tmp_path: Path):
    model = built(name, tmp_path).eval()
    tokens = padded(model.padding)
    with torch.no_grad():
        expected = model.model(input_ids=tokens, attention_mask=plain_mask(tokens, model.padding)).logits
        torch.testing.assert_close(model(tokens), expected)
    assert not torch.allclose(expected[0], expected[1])
    assert model.mask is MASKS.get(name, plain_mask)


@pytest.mark.parametrize("name", [*DECODERS, "deberta-v2", "modernbert", "xlnet"])
def test_every_family_trains_the_model(name: str, tmp_path: Path):
    model = built(name, tmp_path).train()
    objective, batch = Objective(model, cross_entropy), Batch(padded(model.padding), torch.tensor([0, 1, 2]))
    exact = true_gradient(objective, batch, KEY)
    for estimator in (backprop(), checkpointed()):
        torch.testing.assert_close(estimated(estimator, objective, batch, KEY), exact)
    slope, difference = (each.estimate(objective, batch, KEY).slopes for each in (forward_gradient(), mezo()))
    assert slope is not None
    assert difference is not None
    torch.testing.assert_close(slope, difference, rtol=0.05, atol=2e-3)  # float32, and the kinks of relu
    for estimator, forwards in ((mezo(), 2), (forward_gradient(), 3), (backprop(), 3), (checkpointed(), 4)):
        assert forecast(estimator, objective, batch).forwards == pytest.approx(forwards, abs=0.3)


def test_a_head_of_zeros_cannot_choose_a_mask(tmp_path: Path):
    """Its logits are 0 for every mask, and the additive one is wrong for a causal model."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_models.causal(tmp_path))
    model.config.pad_token_id = 0
    model.score.weight.data.zero_()
    assert best_mask(model, padded_example(str(tmp_path), 8), 0) is plain_mask


def test_the_choice_of_a_mask_leaves_random_generators_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    weights = tiny_models.saved(tmp_path, ENCODERS["bert"], True)

    def state() -> tuple[float, float]:
        torch.manual_seed(0)
        random.seed(0)
        model = Encoder(weights).build((LENGTH,), 3)
        assert model.training
        return torch.rand(1).item(), random.random()

    found = state()
    monkeypatch.setattr("gradcost.tasks.pretrained.best_mask", lambda *_: plain_mask)
    assert found == state()


def test_the_example_has_the_format_of_the_tokenizer(tmp_path: Path):
    tiny_models.tokenizer(tmp_path, is_encoder=True)
    rows = padded_example(str(tmp_path), LENGTH)
    assert rows.shape == (2, LENGTH)
    special = [[int(token) if token in (0, 2, 3) else None for token in row] for row in rows]
    assert special[0] == [2, *[None] * (LENGTH - 2), 3]
    assert special[1] == [2, *[None] * 4, 3, *[0] * (LENGTH - 6)], "a quarter of the row is words"
    assert len(rows[0].unique()) > 5, "equal words have the same attention under each mask"
