"""LoRA adapters: what is trained, at which scale, and under which dropout masks."""

from __future__ import annotations

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
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.presets import backprop, checkpointed, mezo
from gradcost.tasks.pretrained import Encoder, Lora
from gradcost.tasks.task import Batch, cross_entropy

SIZES: dict[str, Any] = {
    "vocab_size": len(tiny_models.WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "pad_token_id": 0,
}
VOCABULARY = len(tiny_models.WORDS)
SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}
# The adapted layers, and those of the head that the files lack.
NEW: dict[str, tuple[Any, tuple[str, ...], set[str]]] = {
    "bert": (transformers.BertConfig(**SIZES), (), {"classifier"}),
    "deberta-v2": (transformers.DebertaV2Config(**SIZES), (), {"classifier", "pooler.dense"}),
    "distilbert": (transformers.DistilBertConfig(**SMALL), ("q_lin",), {"classifier", "pre_classifier"}),
    "roberta": (transformers.RobertaConfig(**SIZES), (), {"classifier.dense", "classifier.out_proj"}),
    "llama": (transformers.LlamaConfig(**SIZES), (), {"score"}),
}


@pytest.mark.parametrize("name", NEW)
def test_weights_that_the_files_lack_are_trained_in_full(name: str, tmp_path: Path):
    config, targets, new = NEW[name]
    weights = tiny_models.saved(tmp_path, config, name != "llama")
    model = Encoder(weights, Lora(targets=targets, dropout=0.0), "eager").build((8,), 3).eval()
    trained = [each for each, parameter in model.named_parameters() if parameter.requires_grad]
    plain = {each.replace("modules_to_save.default.", "").rpartition(".")[0] for each in trained}
    prefix = "model.base_model.model."
    assert {each.removeprefix(prefix) for each in plain if "lora_" not in each} == new
    batch = Batch(torch.randint(5, VOCABULARY, (2, 8)), torch.tensor([0, 1]))
    backprop().estimate(Objective(model, cross_entropy), batch, Key(1))  # raises where a parameter has no effect


def adapted(folder: Path, dropout: float) -> Any:
    weights = tiny_models.encoder(folder)
    with seeded_generators(Key(2)):
        return Encoder(weights, Lora(4, 8.0, dropout=dropout)).build((8,), 2)


def test_an_adapter_adds_alpha_over_rank_times_b_a_x(tmp_path: Path):
    model = adapted(tmp_path, 0.0)
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert len(layers) == 4
    for layer in layers:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert a.std() > 0
        assert not b.any()
        x = torch.randn(3, 16)
        b.data.normal_()
        torch.testing.assert_close(layer(x), layer.base_layer(x) + 8.0 / 4 * x @ a.T @ b.T)


@pytest.mark.parametrize("estimator", [mezo(), checkpointed()], ids=["mezo", "checkpointed"])
def test_all_evaluations_of_a_step_have_the_same_dropout_masks(estimator: Estimator, tmp_path: Path):
    model = adapted(tmp_path, 0.5).train()
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout) and module.p == 0.5]
    assert len(dropouts) == 4
    masks: dict[nn.Module, list[torch.Tensor]] = {dropout: [] for dropout in dropouts}
    for dropout in dropouts:
        dropout.register_forward_hook(lambda module, inputs, output: masks[module].append(torch.ne(output, 0)))
    objective = Objective(model, cross_entropy)
    batch = Batch(torch.randint(5, VOCABULARY, (2, 8)), torch.tensor([0, 1]))
    estimator.estimate(objective, batch, Key(1))  # the first estimate also examines the model
    seen = []
    for key in (Key(1), Key(1), Key(2)):
        masks |= {dropout: [] for dropout in dropouts}
        estimator.estimate(objective, batch, key)
        for found in masks.values():
            assert len(found) >= 2
            assert all(torch.equal(mask, found[0]) for mask in found)
        seen.append(torch.stack([found[0] for found in masks.values()]))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
