"""Tiny pretrained models with random weights, saved as folders that transformers loads without a network."""

from __future__ import annotations

from pathlib import Path

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key

WORDS = [f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "END")]
WORDS += ["who", "what", "where", "is", "the", "answer", "yes", "no", ":", "?", ".", "####", *"abcdef1234ABCD"]


def tokenizer(folder: Path, is_encoder: bool) -> None:
    fast = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    special = {"unk_token": "[UNK]", "eos_token": "[END]"}
    if is_encoder:
        ends = [("[CLS]", WORDS.index("[CLS]")), ("[SEP]", WORDS.index("[SEP]"))]
        fast.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)  # pyright: ignore[reportAttributeAccessIssue]
        special |= {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **special).save_pretrained(folder)


def byte_level(folder: Path) -> str:
    """Save a tokenizer in `folder` whose tokens are the bytes of a text, and return the folder as a string."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE({byte: index for index, byte in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    fast.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<end>").save_pretrained(folder)
    return str(folder)


def encoder(folder: Path) -> str:
    """Save a BERT of two layers in `folder`, without a classification head, and return the folder as a string."""
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    with seeded_generators(Key(5)):
        transformers.BertModel(config).save_pretrained(folder)
    tokenizer(folder, is_encoder=True)
    return str(folder)


def saved(folder: Path, config: transformers.PreTrainedConfig, is_encoder: bool) -> str:
    """Save a random model of a configuration in `folder`, without a head, and return the folder as a string."""
    with seeded_generators(Key(5)):
        transformers.AutoModel.from_config(config).save_pretrained(folder)
    tokenizer(folder, is_encoder)
    return str(folder)


def causal(folder: Path) -> str:
    """Save a Llama of two layers in `folder`, and return the folder as a string. Its tokenizer has no padding."""
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=WORDS.index("[END]"),
    )
    with seeded_generators(Key(6)):
        transformers.LlamaForCausalLM(config).float().save_pretrained(folder)
    tokenizer(folder, is_encoder=False)
    return str(folder)


def vision_language(folder: Path) -> str:
    """Save a Qwen2-VL of two layers in `folder`, and return the folder as a string."""
    special = {"vision_start_token_id": 1, "vision_end_token_id": 2, "image_token_id": 3, "video_token_id": 3}
    ends = {"bos_token_id": None, "eos_token_id": WORDS.index("[END]")}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig.from_dict(
        {
            "text_config": {
                "vocab_size": len(WORDS),
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 128,
                "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
                **ends,
            },
            "vision_config": vision,
            **special,
        }
    )
    with seeded_generators(Key(7)):
        transformers.Qwen2VLForConditionalGeneration(config).float().save_pretrained(folder)
    tokenizer(folder, is_encoder=False)
    return str(folder)
