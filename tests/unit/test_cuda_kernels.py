"""Forecasts for CUDA: what its kernels of dropout and attention save, not what a CPU's save."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import gradcost
from gradcost import Objective, backprop, checkpointed, forward_gradient, mezo
from gradcost.checkpointing.policies import Segments, Selective
from gradcost.estimators.reverse import Reverse
from gradcost.planning.cuda_kernels import cuda_kernels

FUNCTIONS = torch.dropout, torch._VF.dropout, F.scaled_dot_product_attention


class Attention(nn.Module):
    """One layer of attention, with residual connection; with `recompute`, checkpointed by torch."""

    def __init__(self, dropout: float, mask: bool, keys: int, recompute: bool) -> None:
        super().__init__()
        self.query, self.values = nn.Linear(32, 32), nn.Linear(32, 16 * keys)
        self.dropout, self.mask, self.keys, self.recompute = dropout, mask, keys, recompute

    def attend(self, x: Tensor) -> Tensor:
        query = self.query(x).unflatten(-1, (4, 8)).transpose(1, 2)
        key, value = self.values(x).unflatten(-1, (2 * self.keys, 8)).transpose(1, 2).chunk(2, dim=1)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool) if self.mask else None
        dropout = self.dropout if self.training else 0.0
        is_causal, shared = not self.mask, self.keys < 4
        out = F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal, enable_gqa=shared)
        return x + out.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        return torch_checkpoint(self.attend, x, use_reentrant=False) if self.recompute else self.attend(x)


def peak(
    length: int,
    device: str,
    estimator: Any = None,
    dtype: torch.dtype = torch.bfloat16,
    dropout: float = 0.1,
    mask: bool = False,
    keys: int = 4,
    recompute: bool = False,
) -> int:
    """Return the forecast peak beyond the weights of a network of three such layers."""
    model = nn.Sequential(*(Attention(dropout, mask, keys, recompute) for _ in range(3))).to(dtype)
    objective = Objective(model, lambda model, x: model(x).square().mean())
    batch = torch.zeros(2, length, 32, dtype=dtype)
    return gradcost.forecast(estimator or backprop(), objective, batch, device=device).beyond


POLICIES = [backprop(), checkpointed(), Reverse(Segments(2)), Reverse(Selective()), mezo()]


@pytest.mark.parametrize("estimator", POLICIES, ids=repr)
def test_attention_with_dropout_in_half_precision_keeps_no_scores(estimator: Any):
    assert peak(1024, "cuda", estimator) == pytest.approx(2 * peak(512, "cuda", estimator), rel=0.01)
    assert peak(1024, "cpu", estimator) > 3 * peak(512, "cpu", estimator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_mask_takes_the_efficient_kernel(dtype: torch.dtype):
    """Each layer has the mask as numbers; on a CPU each layer keeps the scores of 8 heads and examples."""

    def per_score(device: str) -> float:
        few, many = (peak(length, device, dtype=dtype, mask=True) for length in (256, 512))
        return (many - 2 * few) / (512**2 - 2 * 256**2)  # the quadratic part

    assert per_score("cuda") < 3 * (dtype.itemsize + 2)
    assert per_score("cpu") > 3 * 8 * dtype.itemsize


def test_float32_with_fewer_heads_for_keys_has_no_fused_kernel():
    assert peak(512, "cuda", dtype=torch.float32, dropout=0.0, keys=2) > 3 * 2 * 4 * 512 * 512 * 4
    assert peak(512, "cuda", dropout=0.0, keys=2) < 2 * 4 * 512 * 512 * 2


def test_recomputation_by_torch_takes_the_same_kernels():
    assert peak(512, "cuda", recompute=True) < peak(512, "cuda")


@pytest.mark.parametrize("length", [64, 512])
def test_forward_mode_runs_its_own_rules_on_both(length: int):
    peaks = [peak(length, device, forward_gradient(), dropout=0.0) for device in ("cpu", "cuda")]
    assert peaks[1] - peaks[0] < 512 * 64  # rounding


def test_dropout_saves_one_byte_per_element():
    model = nn.Sequential(nn.Linear(64, 4096), *(nn.Dropout(0.5) for _ in range(10)), nn.Linear(4096, 1))
    objective = Objective(model, lambda model, x: model(x).mean())
    batch = torch.zeros(32, 64)
    cpu, cuda = (gradcost.forecast(backprop(), objective, batch, device=device).beyond for device in ("cpu", "cuda"))
    assert (cpu - cuda) / (10 * 32 * 4096) == pytest.approx(4 - 1, abs=0.5)


def test_the_functions_of_torch_are_restored_also_after_an_error():
    def stopped() -> None:
        with cuda_kernels():
            assert torch.dropout is not FUNCTIONS[0]
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    assert (torch.dropout, torch._VF.dropout, F.scaled_dot_product_attention) == FUNCTIONS


SIZES = {
    "roberta": (8, 512, {"backprop": 3.91, "checkpointed": 1.03}),
    "gpt2": (8, 1024, {"backprop": 8.95, "checkpointed": 5.00}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_models_at_their_default_dropout_need_what_their_kept_tensors_add_up_to(name: str):
    """GiB in bfloat16, worked out from what CUDA keeps; with the CPU's kernels it was 13.7, 1.47, 23.0 and 5.01."""
    transformers = pytest.importorskip("transformers")
    batch, length, expected = SIZES[name]
    with torch.device("meta"):
        if name == "gpt2":
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False))
        else:
            sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
            config = transformers.RobertaConfig(
                **sizes, intermediate_size=4096, max_position_embeddings=514, vocab_size=50265, type_vocab_size=1
            )
            model = transformers.RobertaForSequenceClassification(config)
    model = model.to(torch.bfloat16).train()
    ids = torch.full((batch, length), 7)
    labels = ids if name == "gpt2" else torch.zeros(batch, dtype=torch.long)
    inputs = {"input_ids": ids, "labels": labels}
    inputs |= {} if name == "gpt2" else {"attention_mask": torch.ones_like(ids)}
    objective = Objective(model, lambda model, inputs: model(**inputs).loss)
    for method, size in expected.items():
        found = gradcost.forecast(getattr(gradcost, method)(), objective, inputs, device="cuda")
        assert found.peak / 2**30 == pytest.approx(size, abs=0.01)
