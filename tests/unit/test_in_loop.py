"""`checkpoint(model, saving)` in loops that call loss.backward(): the same bits, less memory, nothing left behind."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from gradcost.checkpointing import Blocks, Everything, Saving, Segments, Selective, apply, checkpoint
from gradcost.core.errors import BadInput, DoesNotFit, Unsupported
from gradcost.core.notes import Note
from gradcost.instruments import Bytes, measure
from gradcost.planning.within import Within
from leftovers import assert_nothing_left

transformers: Any = pytest.importorskip("transformers")

Step = Callable[[], Tensor]


def tokens(high: int = 90, shape: tuple[int, int] = (2, 12)) -> Tensor:
    return torch.randint(3, high, shape, generator=torch.Generator().manual_seed(3))


def gpt2() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=4, n_head=4, n_positions=32, use_cache=False)
    return transformers.GPT2LMHeadModel(config), {"input_ids": tokens(), "labels": tokens()}


def llama(**options: Any) -> tuple[nn.Module, dict[str, Any]]:
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.1}
    config = transformers.LlamaConfig(**sizes, **heads, use_cache=False, **options)
    return transformers.LlamaForCausalLM(config), {"input_ids": tokens(), "labels": tokens()}


def bert() -> tuple[nn.Module, dict[str, Any]]:
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    config = transformers.BertConfig(**sizes, num_attention_heads=4, num_labels=3)
    batch = {"input_ids": tokens(), "attention_mask": torch.ones(2, 12), "labels": torch.tensor([0, 2])}
    return transformers.BertForSequenceClassification(config), batch


def vit() -> tuple[nn.Module, dict[str, Any]]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    return transformers.ViTForImageClassification(config), {"pixel_values": images, "labels": torch.tensor([0, 2])}


def t5() -> tuple[nn.Module, dict[str, Any]]:
    sizes = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, use_cache=False)
    return transformers.T5ForConditionalGeneration(config), {"input_ids": tokens(), "labels": tokens()}


def normalised() -> tuple[nn.Module, dict[str, Any]]:
    """BatchNorm's running statistics move in each forward pass of a loop."""
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh()) for _ in range(4)]
    return nn.Sequential(*blocks), {"input": torch.rand(5, 8, generator=torch.Generator().manual_seed(2))}


MODELS = {make.__name__: make for make in (gpt2, llama, bert, vit, t5, normalised)}
POLICIES = [Everything(), Blocks(), Segments(2), Selective()]


def made(name: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    return model.train(), batch


def scalar(output: Any) -> Tensor:
    return output.square().mean() if isinstance(output, Tensor) else output.loss


def state(model: nn.Module) -> list[Tensor]:
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [*gradients, *(buffer.clone() for buffer in model.buffers()), torch.get_rng_state()]


def loop(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    """Two steps, the first of two micro-batches, with one draw of Python's random before each backward pass."""
    torch.manual_seed(1)
    model.zero_grad()
    found: list[Tensor] = []
    for parts in (2, 1):
        for _ in range(parts):
            loss = scalar(model(**batch)) / parts
            random.random()
            loss.backward()
        found += state(model)
        model.zero_grad()
    return found


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other) > 2
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def peak(model: nn.Module, batch: dict[str, Any], saving: Saving, warm: bool = True) -> int:
    """Return the bytes at the peak of a step of a plain loop, with weights, inputs and all gradients."""

    def work() -> None:
        model.zero_grad()
        scalar(model(**batch)).backward()

    with checkpoint(model, saving):
        if warm:
            work()
        model.zero_grad()
        memory = measure(work, Bytes(model, batch)).memory
    assert memory is not None
    return memory.peak


@pytest.mark.parametrize("saving", POLICIES, ids=repr)
@pytest.mark.parametrize("name", MODELS)
def test_the_gradients_random_numbers_and_buffers_of_a_plain_loop(name: str, saving: Saving):
    model, batch = made(name)
    plain = loop(*made(name))
    with checkpoint(model, saving):
        assert_same(loop(model, batch), plain)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("ends", [False, True])
def test_nothing_is_left_of_a_forward_pass_that_ctrl_c_ended(ends: bool):
    made_model, batch = made("llama")
    model: Any = made_model
    model.gradient_checkpointing_enable()
    plain = loop(*made("llama"))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with warnings.catch_warnings(), checkpoint(model, Blocks()) as applied:
        warnings.simplefilter("ignore", Note)
        hook = model.model.layers[2].mlp.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**batch)
        hook.remove()
        if not ends:
            assert_same(loop(model, batch), plain)
            assert not applied._calls
    assert model.model.gradient_checkpointing
    assert not any("forward" in vars(module) for module in model.modules())


def budgets(name: str, count: int) -> list[int]:
    """Return budgets from the least that a schedule needs to the peak of the plain loop."""
    model, batch = made(name)
    most = peak(model, batch, Everything())
    with pytest.raises(DoesNotFit, match="bytes are too few") as refused, checkpoint(model, Within(most // 2)):
        model(**batch)
    least = int(str(refused.value).split("of the whole batch is ")[1].split(" bytes")[0].replace(",", ""))
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert f"and {gradients:,} are for gradients of a plain loop" in str(refused.value)
    return [least + (most + gradients - least) * i // max(count - 1, 1) for i in range(count)]


def test_no_step_leaves_a_tensor_to_the_garbage_collector():
    """Before, the checks of the first and the eighth forward pass left the inputs of all blocks and the batch."""
    model, batch = made("normalised")

    def step(number: int) -> None:
        scalar(model(**batch)).backward()
        model.zero_grad()

    with checkpoint(model, Blocks()):
        assert_nothing_left(step)


def test_a_plain_loop_stays_within_the_budget():
    check_budgets("normalised", 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit", "t5"])
def test_a_plain_loop_stays_within_ten_budgets(name: str):
    check_budgets(name, 10)


def check_budgets(name: str, count: int) -> None:
    plain = loop(*made(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)
        for budget in budgets(name, count):
            model, batch = made(name)
            with checkpoint(model, Within(budget)):
                assert_same(loop(model, batch), plain)
            assert peak(model, batch, Within(budget)) <= budget


def test_the_schedule_follows_the_shape_of_the_batch_and_parameters_that_are_frozen_later():
    model, batch = made("gpt2")
    short = {name: value[:, :5] for name, value in batch.items()}
    plain = [loop(model, batch), loop(model, short)]
    with checkpoint(model, Blocks()):
        assert_same(loop(model, batch), plain[0])
        assert_same(loop(model, short), plain[1])
        next(model.parameters()).requires_grad_(False)
        frozen = loop(model, batch)
    assert_same(frozen, loop(model, batch))


@pytest.mark.parametrize("saving", [Blocks(), Selective()], ids=repr)
def test_autocast_and_a_gradient_scaler(saving: Saving):
    model, batch = made("llama")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def run() -> list[Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = scalar(model(**batch))
        scaler.scale(loss).backward()
        return state(model)

    plain = run()
    with checkpoint(model, saving):
        assert_same(run(), plain)


def test_lora():
    peft: Any = pytest.importorskip("peft")
    torch.manual_seed(0)
    inner, batch = llama()
    model = peft.get_peft_model(inner, peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1)).train()
    plain = loop(model, batch)
    most = peak(model, batch, Everything())
    for saving in (Blocks(), Within(most * 9 // 10)):
        with checkpoint(model, saving):
            assert_same(loop(model, batch), plain)


def test_the_loss_of_the_loop_counts_where_it_is_given():
    model = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(6)])
    x = torch.rand(512, 16)

    def loss(output: Tensor) -> Tensor:
        return torch.cat([output] * 20).exp().sum()

    def work() -> None:
        model.zero_grad()
        loss(model(x)).backward()

    budget = 3_000_000
    with checkpoint(model, Within(budget), loss=loss):
        work()
        memory = measure(work, Bytes(model, x)).memory
    assert memory is not None
    assert memory.peak <= budget
    with pytest.raises(DoesNotFit), checkpoint(model, Within(1_000_000), loss=loss):
        work()


def test_an_error_in_the_forward_pass_leaves_the_model_usable():
    model, batch = made("gpt2")
    plain = loop(model, batch)
    with checkpoint(model, Blocks()):
        with pytest.raises(AttributeError):
            model(input_ids="no tensor")
        assert_same(loop(model, batch), plain)
        with torch.no_grad():
            model(**batch)


def test_apply_ends_with_remove_and_a_second_policy_is_refused():
    model, batch = made("gpt2")
    plain = loop(model, batch)
    applied = apply(model, Blocks())
    with pytest.raises(BadInput, match="has a checkpointing policy already"):
        apply(model, Segments(2))
    loss = scalar(model(**batch))
    applied.remove()
    loss.backward()
    assert_same(loop(model, batch), plain)
    with pytest.raises(BadInput, match=r"needs a torch\.nn\.Module"):
        apply("model", Blocks())  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="needs a policy such as"):
        apply(model, "blocks")  # type: ignore[arg-type]
    with pytest.raises(DoesNotFit, match="the gradients of all parameters take"):
        apply(model, Within(1000))
    linear = nn.Linear(2, 2)
    with pytest.raises(Unsupported, match="no repeated blocks"), checkpoint(linear, Blocks()):
        linear(torch.ones(1, 2))


def test_the_policy_replaces_the_models_own_checkpointing():
    model, batch = made("gpt2")
    plain, full = loop(model, batch), peak(model, batch, Everything())
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    with pytest.warns(Note, match="replaces it here"), checkpoint(model, Everything()):
        assert_same(loop(model, batch), plain)
    assert peak(model, batch, Everything()) == full
    assert any(vars(module).get("gradient_checkpointing") for module in model.modules())


class OwnBlock(nn.Module):
    def __init__(self, dtype: torch.dtype, reentrant: bool | None) -> None:
        super().__init__()
        self.linear, self.reentrant = nn.Linear(16, 16, dtype=dtype), reentrant

    def forward(self, x: Tensor) -> Any:
        if self.reentrant is None:
            return torch.tanh(self.linear(x))
        return torch.utils.checkpoint.checkpoint(self.linear, x, use_reentrant=self.reentrant)


def own_blocks(dtype: torch.dtype = torch.float32, reentrant: bool | None = None) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(OwnBlock(dtype, reentrant) for _ in range(6)))


def test_a_complex_output_within_a_budget():
    x, gradients = torch.randn(64, 16, dtype=torch.complex64), []
    for budget in (None, 1 << 20, 110_000):
        model = own_blocks(torch.complex64)
        with nullcontext() if budget is None else checkpoint(model, Within(budget)):
            model(x).abs().square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(
        torch.equal(one, other) for ours in gradients[1:] for one, other in zip(gradients[0], ours, strict=True)
    )


def test_reentrant_blocks_within_a_budget_are_refused_with_the_reason():
    x = torch.randn(64, 16)
    model, message = own_blocks(reentrant=True), "no graph: the model checkpoints with use_reentrant=True"
    with checkpoint(model, Within(1 << 20)), pytest.raises(BadInput, match=message):
        model(x)
    with checkpoint(model := own_blocks(reentrant=False), Within(1 << 20)):
        model(x).square().mean().backward()


def test_reentrant_blocks_within_a_budget_have_their_gradients_if_the_input_has_one():
    found = []
    for saving in (None, Within(1 << 20), Within(45_000)):
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        model = own_blocks(reentrant=True)
        with nullcontext() if saving is None else checkpoint(model, saving):
            model(x).square().mean().backward()
        found.append([x.grad, *(parameter.grad for parameter in model.parameters())])
    for other in found[1:]:
        assert all(torch.equal(one, another) for one, another in zip(found[0], other, strict=True))
