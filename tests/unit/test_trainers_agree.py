"""The same training through a plain loop, transformers' Trainer, TRL, Lightning and accelerate: the same losses."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradcost import Clipped, Key, Objective, Reverse, backprop, forward_gradient, mezo, surrogate_loss
from gradcost.checkpointing import checkpoint
from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.files import cache_folder
from gradcost.core.isolation import seeded_generators
from gradcost.estimators import Momentum
from gradcost.estimators.surrogate import as_loss
from gradcost.integrations import accelerate as accelerate_adapter
from gradcost.integrations import lightning as lightning_adapter
from gradcost.integrations.lightning import EstimatedLoss
from gradcost.integrations.trainer import with_estimator
from gradcost.planning.within import Within
from gradcost.tasks.texts import trec_texts
from tables import OBJECTIVES

SEED = 7
LR = 0.01
VOCABULARY = 29
ESTIMATORS: dict[str, Any] = {
    "backprop": backprop(),
    "within": Reverse(Within(1 << 20)),
    "checkpoint": Within(1 << 20),  # no estimator: the trainer's own backward pass inside `checkpoint`
    "forward_gradient": forward_gradient(2),
    "mezo": mezo(1e-3),
}


def llama() -> Any:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    with seeded_generators(Key(3)):
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            use_cache=False,
        )
        model = transformers.LlamaForCausalLM(config)
        targets = ["q_proj", "v_proj", "up_proj"]
        lora = peft.LoraConfig(r=2, target_modules=targets, lora_dropout=0.0, init_lora_weights=False)
        return peft.get_peft_model(model, lora).train()


def examples(count: int) -> list[dict[str, Tensor]]:
    with seeded_generators(Key(4)):
        found = []
        for number in range(count):
            tokens = torch.randint(VOCABULARY, (8,))
            labels = tokens.clone()
            labels[: 1 + number % 5] = -100
            found.append({"input_ids": tokens, "labels": labels, "attention_mask": torch.ones(8, dtype=torch.int64)})
        return found


def questions(count: int) -> list[dict[str, Tensor]]:
    """The last letters of TREC's questions, as tokens; the words before the last one are not targets."""
    found = []
    for text in trec_texts().train.texts[:count]:
        letters = [1 + ord(letter) - ord("a") if "a" <= letter <= "z" else 0 for letter in text.lower()][-12:]
        tokens = torch.tensor([0] * (12 - len(letters)) + letters)
        labels = tokens.clone()
        labels[: 12 - len(text.split()[-1])] = -100
        found.append({"input_ids": tokens, "labels": labels, "attention_mask": torch.ones(12, dtype=torch.int64)})
    return found


def batches(steps: int) -> list[dict[str, Tensor]]:
    rows = examples(2 * steps)
    pairs = [rows[2 * step : 2 * step + 2] for step in range(steps)]
    return [{name: torch.stack([row[name] for row in pair]) for name in pair[0]} for pair in pairs]


def loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


def with_method(kind: Any, method: Any) -> Any:
    """Return the Trainer class with this estimator; the class itself under a checkpointing policy."""
    return kind if isinstance(method, Within) else with_estimator(kind, method)


def loss_of(method: Any, objective: Objective, batch: Any, step: int) -> Tensor:
    if isinstance(method, Within):
        return objective.loss(objective.model, batch)
    return surrogate_loss(method, objective, batch, key(step))


def recomputing(model: nn.Module, method: Any) -> Any:
    return checkpoint(model, method) if isinstance(method, Within) else nullcontext()


def key(step: int) -> Key:
    return Key(SEED).fold("step", step).fold("micro-batch", 0)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)


# ---- the five loops: each returns the loss of every step and the trained model


Loop = Callable[[Any, int, Path], tuple[list[float], Any]]


def plain(estimator: Any, steps: int, folder: Path) -> tuple[list[float], Any]:
    model = llama()
    objective, optimizer, losses = Objective(model, loss), sgd(model), []
    estimator = backprop() if isinstance(estimator, Within) else estimator
    for step, batch in enumerate(batches(steps)):
        estimate = estimator.estimate(objective, batch, key(step))
        estimate.gradient.write()
        optimizer.step()
        losses.append(float(estimate.loss))
    return losses, model


class Recorded(list[float]):
    """Losses in full precision: a Trainer logs rounded ones."""

    def __call__(self, kind: Any) -> Any:
        losses = self

        class Recording(kind):
            def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
                result = super().training_step(*args, **kwargs)
                losses.append(float(result))
                return result

        return Recording


ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "save_strategy": "no",
    "logging_steps": 10,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": SEED,
    "train_sampling_strategy": "sequential",
    "bf16": False,
}


def trainer(estimator: Any, steps: int, folder: Path) -> tuple[list[float], Any]:
    transformers = pytest.importorskip("transformers")
    model, losses = llama(), Recorded()
    args = transformers.TrainingArguments(output_dir=str(folder), max_steps=steps, **ARGUMENTS)
    kind = losses(with_method(transformers.Trainer, estimator))
    made = kind(model=model, args=args, train_dataset=examples(2 * steps), optimizers=(sgd(model), None))
    with recomputing(model, estimator):
        made.train()
    return losses, model


def tokenizer() -> Any:
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = {f"w{number}": number for number in range(VOCABULARY - 2)} | {"<eos>": 27, "<pad>": 28}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>")


def trl(estimator: Any, steps: int, folder: Path) -> tuple[list[float], Any]:
    transformers = pytest.importorskip("transformers")
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model, losses = llama(), Recorded()

    class OwnLoss(trl.SFTTrainer):
        """TRL's fused head has no forward-mode rule, and reads values. The model's loss has the same value."""

        compute_loss = transformers.Trainer.compute_loss

    own_loss = estimator in [ESTIMATORS[name] for name in ("forward_gradient", "within", "checkpoint")]
    kind = losses(with_method(OwnLoss if own_loss else trl.SFTTrainer, estimator))
    options = ARGUMENTS | {"dataset_kwargs": {"skip_prepare_dataset": True}, "gradient_checkpointing": False}
    args = trl.SFTConfig(output_dir=str(folder), max_steps=steps, **options)
    rows = [{name: tensor.tolist() for name, tensor in row.items()} for row in examples(2 * steps)]
    made = kind(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        optimizers=(sgd(model), None),
    )
    with recomputing(model, estimator):
        made.train()
    if not own_loss:
        counted = [entry["num_tokens"] for entry in made.state.log_history if "num_tokens" in entry]
        a_step = 2 * len(examples(1)[0]["input_ids"])
        assert counted[-1] == a_step * (steps // 10 * 10), "each token counts once, whatever the estimator evaluates"
    return losses, model


def lightning(estimator: Any, steps: int, folder: Path, automatic: bool = True) -> tuple[list[float], Any]:
    lightning = pytest.importorskip("lightning")
    losses: list[float] = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama()
            self.automatic_optimization = automatic
            if not isinstance(estimator, Within):
                self.loss = EstimatedLoss(estimator, self.model, loss, SEED)

        def training_step(self, batch: Any, number: int) -> Any:
            result = loss(self.model, batch) if isinstance(estimator, Within) else self.loss(self, batch)
            losses.append(float(result))
            if not automatic:
                optimizer = self.optimizers()
                optimizer.zero_grad()  # type: ignore[union-attr]
                self.manual_backward(result)
                optimizer.step()  # type: ignore[union-attr]
            return result

        def configure_optimizers(self) -> Any:
            return sgd(self.model)

    module = Module()
    with recomputing(module.model, estimator):
        fit(module, steps)
    return losses, module.model


def fit(module: Any, steps: int, ckpt_path: Path | None = None, **options: Any) -> Any:
    lightning = pytest.importorskip("lightning")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    quiet |= {"enable_model_summary": False, "devices": 1}
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = torch.utils.data.DataLoader(batches(steps), batch_size=None)  # type: ignore[arg-type]
        trainer = lightning.Trainer(**({"max_epochs": 1} | quiet | options))
        trainer.fit(module, data, data if "validation_step" in vars(module) else None, ckpt_path=ckpt_path)
    return trainer


def manual_lightning(estimator: Any, steps: int, folder: Path) -> tuple[list[float], Any]:
    return lightning(estimator, steps, folder, automatic=False)


def accelerate(estimator: Any, steps: int, folder: Path) -> tuple[list[float], Any]:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    if not isinstance(estimator, Within):
        accelerator = accelerate_adapter.checked(accelerator, estimator)
    model = llama()
    prepared, optimizer = accelerator.prepare(model, sgd(model))
    objective, losses = Objective(prepared, loss), []
    with recomputing(prepared, estimator):
        for step, batch in enumerate(batches(steps)):
            with accelerator.accumulate(prepared):
                found = loss_of(estimator, objective, batch, step)
                accelerator.backward(found)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(found))
    return losses, model


LOOPS: dict[str, Loop] = {
    "Trainer": trainer,
    "TRL": trl,
    "Lightning": lightning,
    "Lightning, manual": manual_lightning,
    "accelerate": accelerate,
}
SAME_KERNELS = ("Lightning", "Lightning, manual", "accelerate")


def assert_same(name: str, estimator: Any, steps: int, folder: Path) -> None:
    """Bitwise where the loss is the same function. The Trainers divide by the number of tokens in another order."""
    expected, reference = plain(estimator, steps, folder)
    losses, model = LOOPS[name](estimator, steps, folder)
    assert len(losses) == steps
    if name in SAME_KERNELS:
        assert losses == expected
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
    assert losses == pytest.approx(expected, rel=2e-5)
    assert expected[0] != expected[-1]


@pytest.mark.slow
@pytest.mark.skipif(not (cache_folder() / "trec").is_dir(), reason="gradcost data fetch trec")
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("name", LOOPS)
def test_200_steps_on_trec_have_the_losses_of_a_plain_loop(
    name: str, estimator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys.modules[__name__], "examples", questions)
    assert_same(name, estimator, 200, tmp_path)


@pytest.mark.parametrize("name", ["Trainer", "accelerate"])
def test_a_few_steps_have_the_losses_of_a_plain_loop(name: str, tmp_path: Path):
    assert_same(name, ESTIMATORS["mezo"], 4, tmp_path)


# ---- Lightning


@pytest.fixture
def small() -> Any:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    made, batch = OBJECTIVES["mlp"].make()

    class Module(lightning.LightningModule):
        def __init__(self, estimator: Any) -> None:
            super().__init__()
            self.model = made.model
            self.loss = EstimatedLoss(estimator, self.model, made.loss, SEED)
            self.losses: list[float] = []

        def training_step(self, rows: Any, number: int) -> Any:
            result = self.loss(self, batch)
            self.losses.append(float(result))
            return result

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.model.parameters(), lr=LR)

    return Module


@pytest.mark.slow
def test_lightning_accumulates_micro_batches_under_different_keys(small: Any):
    """Law: the key is Key(seed).fold("step", t).fold("micro-batch", m), and the mean of the estimates moves."""
    module = small(mezo(1e-3))
    fit(module, 4, accumulate_grad_batches=2)
    other, batch = OBJECTIVES["mlp"].make()
    optimizer = torch.optim.SGD(other.model.parameters(), lr=LR)
    for step in range(2):
        for part in range(2):
            estimate = mezo(1e-3).estimate(other, batch, Key(SEED).fold("step", step).fold("micro-batch", part))
            (as_loss(estimate) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(module.model.parameters(), other.model.parameters(), strict=True))


@pytest.mark.slow
def test_lightning_hands_on_the_state_of_an_estimator(small: Any):
    module = small(Momentum(mezo(1e-3)))
    fit(module, 3)
    other, batch = OBJECTIVES["mlp"].make()
    optimizer, state = torch.optim.SGD(other.model.parameters(), lr=LR), None
    for step in range(3):
        estimate = Momentum(mezo(1e-3)).estimate(other, batch, key(step), state)
        state = estimate.state
        estimate.gradient.write()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(module.model.parameters(), other.model.parameters(), strict=True))


@pytest.mark.parametrize("estimator", [mezo(1e-3), Momentum(mezo(1e-3))], ids=["mezo", "momentum"])
def test_another_fit_of_one_lightning_module_begins_anew(small: Any, estimator: Any, tmp_path: Path):
    module = small(estimator)
    start = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    fit(module, 1)
    module.load_state_dict(start)
    trainer = fit(module, 2)
    assert module.losses[:1] == module.losses[1:2]
    trained = [parameter.detach().clone() for parameter in module.parameters()]
    module.load_state_dict(start)
    fit(module, 2)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), trained, strict=True))
    if not isinstance(estimator, Momentum):
        return
    trainer.save_checkpoint(tmp_path / "saved")
    with pytest.raises(Unsupported, match="a resumed run would differ"):
        fit(module, 3, ckpt_path=tmp_path / "saved", max_epochs=2)


def test_the_loss_of_a_validation_step_is_no_estimate(small: Any):
    """Not in the sanity check either: the training has the bits of one without validation."""
    expected = small(Momentum(mezo(1e-3)))
    start = {name: tensor.clone() for name, tensor in expected.state_dict().items()}
    fit(expected, 3)
    trained = [parameter.detach().clone() for parameter in expected.parameters()]
    module = small(Momentum(mezo(1e-3)))
    module.load_state_dict(start)
    module.validation_step = module.training_step
    fit(module, 3, val_check_interval=1, inference_mode=False)
    assert len(module.losses) > 6
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), trained, strict=True))
    with torch.no_grad():
        module.training_step((), 0)


def test_lightning_trains_what_a_callback_unfreezes(small: Any):
    module = small(mezo(1e-3))
    first, *_ = module.model.parameters()
    first.requires_grad_(False)
    before = first.detach().clone()
    module.on_train_batch_end = lambda *_: first.requires_grad_(True)
    fit(module, 1)
    assert torch.equal(first, before)
    fit(module, 2)
    first.requires_grad_(False)
    assert not torch.equal(first, before)


def test_a_loss_may_use_the_lightning_module(small: Any):
    """The Trainer holds weak proxies of the module, which were taken for modules and have no hash."""

    def weights_after(closure: bool) -> list[Tensor]:
        module = small(mezo(1e-3))
        module.load_state_dict(start)
        inner = module.loss.estimates.loss
        module.factor = 2.0
        module.loss.estimates.loss = lambda model, rows: inner(model, rows) * (module.factor if closure else 2.0)
        fit(module, 3)
        return [parameter.detach().clone() for parameter in module.parameters()]

    start = {name: tensor.clone() for name, tensor in small(mezo(1e-3)).state_dict().items()}
    assert all(map(torch.equal, weights_after(True), weights_after(False)))


@pytest.mark.slow
def test_a_compiled_lightning_module_has_the_bits_of_one_that_is_not(small: Any):
    module = small(mezo(1e-3))
    start = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    fit(module, 2)
    expected = [parameter.detach().clone() for parameter in module.parameters()]
    module = small(mezo(1e-3))
    module.load_state_dict(start)
    fit(torch.compile(module, backend="eager"), 2)
    assert all(map(torch.equal, module.parameters(), expected))


def lightning_trainer(**changed: Any) -> Any:
    given = {"gradient_clip_val": None, "precision": "32-true", "world_size": 1, "strategy": None, "global_step": 0}
    given["training"] = True
    return SimpleNamespace(**(given | changed))


def test_what_would_be_silently_wrong_in_lightning_is_refused():
    for changed, message in [
        (
            {"gradient_clip_val": 1.0},
            r"gradient_clip_val=1\.0 would shorten .* Set gradient_clip_val=None\. To limit slopes",
        ),
        ({"precision": "16-mixed"}, "16-mixed"),
        ({"world_size": 2, "strategy": object()}, "2 processes"),
    ]:
        with pytest.raises(Unsupported, match=message):
            lightning_adapter.refuse(lightning_trainer(**changed), Clipped(mezo()))
    lightning_adapter.refuse(lightning_trainer(gradient_clip_val=1.0), backprop())
    lightning_adapter.refuse(lightning_trainer(precision="bf16-mixed"), mezo())
    made, batch = OBJECTIVES["mlp"].make()
    resumed = EstimatedLoss(Momentum(mezo(1e-3)), made.model, made.loss)
    module = SimpleNamespace(trainer=lightning_trainer(global_step=5), clip_gradients=print, on_train_start=print)
    with pytest.raises(Unsupported, match="a resumed run would differ"):
        resumed(module, batch)
    with pytest.raises(Unsupported, match="gradient_clip_val"):
        EstimatedLoss(mezo(), made.model, made.loss)(
            SimpleNamespace(trainer=lightning_trainer(gradient_clip_val=0.5)), batch
        )
    with pytest.raises(BadInput, match="a method of a"):
        EstimatedLoss(mezo(), made.model, made.model.forward)


@pytest.mark.parametrize("name", ["mezo", "backprop"])
def test_clipping_by_hand_in_lightning_is_refused_for_an_estimate_alone(small: Any, name: str):
    module = small(ESTIMATORS[name])
    module.automatic_optimization = False
    step, called = module.training_step, []

    def training_step(rows: Any, batch_idx: int) -> Any:
        optimizer = module.optimizers()
        module.manual_backward(step(rows, batch_idx))
        module.clip_gradients(optimizer)  # without a limit it clips nothing
        called.append(batch_idx)
        module.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        optimizer.step()

    module.training_step = training_step
    if name == "backprop":
        fit(module, 2)
        assert called == [0, 1]
        return
    with pytest.raises(Unsupported, match=r"clip_gradients\(gradient_clip_val=1\.0\) would shorten"):
        fit(module, 2)
    assert called == [0]


@pytest.mark.slow
def test_the_lightning_trainer_has_the_arguments_that_are_refused(small: Any):
    """Against the real Trainer, so that a renamed argument is noticed."""
    with pytest.raises(Unsupported, match="gradient_clip_val"):
        fit(small(mezo(1e-3)), 2, gradient_clip_val=1.0)
    fit(small(backprop()), 2, gradient_clip_val=1.0)
    fit(small(mezo(1e-3)), 2, precision="bf16-mixed")


# ---- accelerate


def test_what_would_be_silently_wrong_in_accelerate_is_refused():
    accelerate = pytest.importorskip("accelerate")

    def stub(**changed: Any) -> Any:
        return SimpleNamespace(**({"mixed_precision": "no", "num_processes": 1, "distributed_type": "NO"} | changed))

    with pytest.raises(Unsupported, match='mixed_precision="fp16"'):
        accelerate_adapter.checked(stub(mixed_precision="fp16"), mezo())
    with pytest.raises(Unsupported, match="4 processes"):
        accelerate_adapter.checked(stub(num_processes=4), mezo())
    accelerator = accelerate_adapter.checked(accelerate.Accelerator(cpu=True), mezo())
    parameters = [nn.Parameter(torch.ones(2))]
    with pytest.raises(Unsupported, match=r"clip_grad_norm_\(max_norm=1.0\)"):
        accelerator.clip_grad_norm_(parameters, 1.0)
    with pytest.raises(Unsupported, match=r"clip_grad_value_\(clip_value=1.0\) would shorten"):
        accelerator.clip_grad_value_(parameters, 1.0)
    exact = accelerate_adapter.checked(accelerate.Accelerator(cpu=True), backprop())
    parameters[0].grad = torch.ones(2)
    exact.clip_grad_norm_(parameters, 1.0)
    exact.clip_grad_value_(parameters, 1.0)


# ---- TRL


def test_the_page_names_the_tested_releases():
    page = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text()
    for package in ("trl", "lightning"):
        pytest.importorskip(package)
        assert f"{package} {'.'.join(version(package).split('.')[:2])}" in page


@pytest.mark.slow
def test_trl_refuses_forward_mode_through_its_fused_head_and_offloading(tmp_path: Path):
    pytest.importorskip("trl")
    trainer_of = pytest.importorskip("gradcost.integrations.trainer")
    stub = SimpleNamespace(args=SimpleNamespace(max_grad_norm=0.0, fp16=False, activation_offloading=True))
    with pytest.raises(Unsupported, match="activation_offloading=True"):
        trainer_of.refuse(stub, mezo())
    with pytest.raises(Unsupported, match=r"_ChunkedLogProbFunction|forward"):
        trl(forward_gradient(3), 2, tmp_path)
