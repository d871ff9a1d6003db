"""Plans of transformers models with their own losses, from their configurations alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gradcost import Key, Objective, backprop, forecast
from gradcost.core.isolation import seeded_generators
from gradcost.core.pytree import tensors
from gradcost.instruments.memory import MemoryTracker
from gradcost.integrations import transformers as ours
from gradcost.integrations.inputs import own_loss
from gradcost.training import SGD, TrainState

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 99,
}
HEADS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
PAIR = HEADS | {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 99}
PAIR |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SPEECH = PAIR | {
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 12,
    "decoder_start_token_id": 3,
}
T5 = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 99}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "T5ForConditionalGeneration": ("t5", T5, {"input_ids": (2, 16), "labels": (2, 16)}),
    "BartForConditionalGeneration": ("bart", PAIR, {"input_ids": (2, 16), "labels": (2, 16)}),
    "WhisperForConditionalGeneration": ("whisper", SPEECH, {"input_features": (2, 8, 40), "labels": (2, 12)}),
    "ViTForImageClassification": (
        "vit",
        SMALL | {"image_size": 32, "patch_size": 8},
        {"pixel_values": (2, 3, 32, 32), "labels": (2,)},
    ),
    "BertForTokenClassification": ("bert", SMALL, {"input_ids": (2, 16), "labels": (2, 16)}),
    "BertForQuestionAnswering": (
        "bert",
        SMALL,
        {"input_ids": (2, 16), "start_positions": (2,), "end_positions": (2,)},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_inputs_follow_from_the_configuration_and_the_forecast_is_exact(name: str, tmp_path: Path):
    kind, settings, shapes = MODELS[name]
    (tmp_path / "config.json").write_text(json.dumps(settings | {"model_type": kind, "architectures": [name]}))
    objective, batch = ours.objective(ours.from_config(tmp_path), 2, 16)
    assert {part: tuple(tensor.shape) for part, tensor in batch.items()} == shapes
    predicted = forecast(backprop(), objective, batch, SGD(0.1))
    with seeded_generators(Key(0)):
        objective = Objective(getattr(transformers, name)(objective.model.config).train(), own_loss)
    state = TrainState(objective, backprop(), SGD(0.1))
    state.step(batch, Key(1))
    tracker = MemoryTracker(objective.model)
    tracker.register("inputs", tensors(batch))
    with tracker.followed():
        state.step(batch, Key(1))
    assert tracker.memory().peak == predicted.peak
