"""Models that scale or cap the logits of their head: the logits are the model's own, or the model is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import tiny_models
from gradcost.core.errors import Unsupported
from gradcost.core.inner_model import inner_model
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.tasks import vision_language
from gradcost.tasks.efficientnet import EfficientNetLite0
from gradcost.tasks.pretrained import CausalLm, Encoder, Lora, Verbalizer
from gradcost.tasks.vision_language import VisionLanguage

SIZES: dict[str, Any] = {
    "vocab_size": len(tiny_models.WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "pad_token_id": 0,
}
SMALL: dict[str, Any] = {"vocab_size": len(tiny_models.WORDS), "n_embd": 16, "n_layer": 2, "n_head": 2}
ENDS: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": 4}
SCALED = {
    "gemma2": transformers.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.1, query_pre_attn_scalar=8),
    "granite": transformers.GraniteConfig(**SIZES, logits_scaling=8.0),
    "cohere": transformers.CohereConfig(**SIZES, **ENDS, logit_scale=0.0625),
}
PLAIN = {"llama": transformers.LlamaConfig(**SIZES), "gpt2": transformers.GPT2Config(**SMALL)}
WORDS = ("yes", "no")


def saved(name: str, folder: Path) -> str:
    with seeded_generators(Key(5)):
        transformers.AutoModelForCausalLM.from_config((SCALED | PLAIN)[name]).save_pretrained(folder)
    tiny_models.tokenizer(folder, is_encoder=False)
    return str(folder)


@pytest.mark.parametrize("lora", [None, Lora()], ids=repr)
@pytest.mark.parametrize("name", PLAIN)
def test_the_words_of_a_plain_head_have_the_logits_of_the_model(name: str, lora: Lora | None, tmp_path: Path):
    model: Any = Verbalizer(CausalLm(saved(name, tmp_path), lora), WORDS).build((8,), 2).eval()
    tokens = torch.randint(5, len(tiny_models.WORDS), (2, 8))
    ids = [tiny_models.WORDS.index(word) for word in WORDS]
    torch.testing.assert_close(model(tokens), model.model(input_ids=tokens).logits[:, -1, ids])


@pytest.mark.parametrize("name", SCALED)
def test_the_words_of_a_scaled_head_are_refused(name: str, tmp_path: Path):
    weights = saved(name, tmp_path)
    with pytest.raises(Unsupported, match=r"single words of \w+ForCausalLM, which scales or caps .* Use Encoder"):
        Verbalizer(CausalLm(weights, attention="eager"), WORDS).build((8,), 2)
    if name == "gemma2":
        assert Encoder(weights, attention="eager").build((8,), 2)(torch.tensor([[5, 6]])).shape == (1, 2)


@pytest.mark.parametrize("name", SCALED | PLAIN)
def test_an_image_is_followed_by_the_logits_of_the_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def encoder() -> nn.Module:
        with seeded_generators(Key(1)):
            return EfficientNetLite0().requires_grad_(False)

    monkeypatch.setattr(vision_language, "efficientnet_lite0", encoder)
    task = VisionLanguage(CausalLm(saved(name, tmp_path), attention="eager"), side=8, size=32)
    model: Any = task.build((3 * 8 * 8 + 6,), 0).eval()
    images, tokens = torch.rand(2, 3, 32, 32), torch.randint(5, len(tiny_models.WORDS), (2, 6))
    lm = inner_model(model.model)
    with torch.no_grad():
        embedded = torch.cat([model.visual(images), lm.get_input_embeddings()(tokens)], 1)
        expected = lm(inputs_embeds=embedded).logits[:, 1:]
        torch.testing.assert_close(model.logits(images, tokens), expected)
        hidden = lm.base_model(inputs_embeds=embedded).last_hidden_state[:, 1:]
    is_plain = torch.allclose(expected, lm.get_output_embeddings()(hidden))
    assert is_plain == (name in PLAIN)
