"""Estimators in the training loops of other packages: transformers' Trainer, accelerate, Lightning, peft."""

from __future__ import annotations

import gc
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import gradcost
from gradcost import Clipped, Gaussian, Key, Objective, backprop, forward_gradient, mezo, surrogate_loss
from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.isolation import seeded_generators
from gradcost.directions import Rademacher
from gradcost.estimators import Momentum
from gradcost.estimators.surrogate import as_loss
from gradcost.training import SeededSGD, StepLog, replay
from gradcost.training.step_log import weights_digest
from tables import OBJECTIVES

transformers = pytest.importorskip("transformers")
trainer_of = pytest.importorskip("gradcost.integrations.trainer")
with_estimator = trainer_of.with_estimator

SEED = 7
OPTIONS = transformers.TrainingArguments.__dataclass_fields__
CHECKPOINTING = next(name for name in trainer_of._CHECKPOINTING if name in OPTIONS)


def llama(lora: bool = False) -> Any:
    with seeded_generators(Key(3)):
        config = transformers.LlamaConfig(
            vocab_size=29,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            use_cache=False,
        )
        model = transformers.LlamaForCausalLM(config)
        if lora:
            peft = pytest.importorskip("peft")
            return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.0))
        return model


def examples(count: int = 24) -> list[dict[str, Tensor]]:
    """Sequences of which different numbers of tokens count in the loss, so that `num_items_in_batch` matters."""
    with seeded_generators(Key(4)):
        found = []
        for number in range(count):
            tokens = torch.randint(29, (8,))
            labels = tokens.clone()
            labels[: 1 + number % 6] = -100
            found.append({"input_ids": tokens, "labels": labels})
        return found


def arguments(folder: Path, **changed: Any) -> Any:
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 0.01,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": SEED,
        "train_sampling_strategy": "sequential",
    }
    return transformers.TrainingArguments(**(given | changed))


def trained(
    kind: Any, folder: Path, model: Any = None, optimizer: Any = None, **changed: Any
) -> tuple[Any, list[float]]:
    """Train; return the Trainer and its logged losses."""
    model = llama() if model is None else model
    optimizers = (None if optimizer is None else optimizer(model), None)
    trainer = kind(model=model, args=arguments(folder, **changed), train_dataset=examples(), optimizers=optimizers)
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach() for parameter in model.parameters()]


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


def test_the_installed_release_is_the_tested_one_that_the_docs_name():
    release = ".".join(version("transformers").split(".")[:2])
    assert f"transformers {release}" in (trainer_of.__doc__ or "")
    page = Path(__file__).parent.parent.parent / "docs" / "trainers.md"
    for package in ("transformers", "accelerate", "peft"):
        assert f"{package} {'.'.join(version(package).split('.')[:2])}" in page.read_text()


class Masking(transformers.Trainer):
    """A Trainer whose `training_step` ignores the targets of every other token, around that of the Trainer."""

    calls: ClassVar[list[str]] = []

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self.calls.append(type(self).__name__)
        labels = inputs["labels"].clone()
        labels[:, ::2] = -100
        return super().training_step(model, {**inputs, "labels": labels}, num_items_in_batch)


def test_the_training_step_of_a_subclass_stays(tmp_path: Path):
    """It was replaced without a word: TRL's GRPO then generated before each step and trained on one part."""
    reference, expected = trained(Masking, tmp_path)
    ours, losses = trained(with_estimator(Masking, backprop()), tmp_path)
    assert Masking.calls == ["Masking"] * 8 + ["MaskingWithEstimator"] * 8
    assert losses == expected
    assert same(ours.model, reference.model)


def test_a_training_step_that_makes_no_estimate_is_refused(tmp_path: Path):
    class Own(transformers.Trainer):
        def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
            loss = self.compute_loss(model, inputs)
            loss.backward()
            return loss.detach()

    with pytest.raises(Unsupported, match=r"Own.training_step does not call super\(\).training_step"):
        trained(with_estimator(Own, mezo()), tmp_path)


class Attributes(transformers.Trainer):
    """A Trainer whose loss reads the batch by attributes, as that of a tokenizer's `pad` allows."""

    def compute_loss(self, model: nn.Module, inputs: Any, **options: Any) -> Any:
        loss = model(input_ids=inputs.input_ids, labels=inputs.labels).loss
        self.log({"own": float(loss)})
        return loss


class Pairs(transformers.Trainer):
    """A Trainer whose batches are pairs."""

    def compute_loss(self, model: nn.Module, inputs: Any, **options: Any) -> Any:
        tokens, labels = inputs
        return model(input_ids=tokens, labels=labels).loss


def encoding(rows: list[dict[str, Tensor]]) -> Any:
    return transformers.BatchEncoding({name: torch.stack([row[name] for row in rows]) for name in rows[0]})


def pair(rows: list[dict[str, Tensor]]) -> tuple[Tensor, ...]:
    return tuple(torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))


@pytest.mark.parametrize(("kind", "collate"), [(Attributes, encoding), (Pairs, pair)])
def test_the_loss_gets_the_batch_in_its_type_and_logs_once_per_batch(kind: Any, collate: Any, tmp_path: Path):
    def run(kind: Any) -> tuple[Any, list[float]]:
        model = llama()
        given = {"args": arguments(tmp_path), "train_dataset": examples(), "data_collator": collate}
        trainer = kind(model=model, **given)
        trainer.train()
        return model, [entry["own"] for entry in trainer.state.log_history if "own" in entry]

    (reference, expected), (ours, logged) = run(kind), run(with_estimator(kind, backprop()))
    assert same(ours, reference)
    assert logged == expected
    assert len(expected) == (8 if kind is Attributes else 0)


def test_what_is_no_trainer_class_or_no_estimator_is_refused(tmp_path: Path):
    with pytest.raises(BadInput, match=r"write a value such as gradcost.mezo\(\)"):
        with_estimator(transformers.Trainer, mezo)
    made = transformers.Trainer(model=llama(), args=arguments(tmp_path))
    for wrong, said in ((made, "an object of type Trainer"), (dict, "dict")):
        with pytest.raises(BadInput, match=f"takes a Trainer class, such as transformers.Trainer, not {said}"):
            with_estimator(wrong, mezo())


@pytest.mark.parametrize("name", [CHECKPOINTING, None])
def test_backprop_has_the_bits_of_the_trainer(name: str | None, tmp_path: Path):
    """With accumulation over unequal numbers of tokens, clipping to the default norm, AdamW and a schedule."""
    changed = {"max_grad_norm": 1.0} | ({} if name is None else {name: True})
    reference, expected = trained(transformers.Trainer, tmp_path, **changed)
    ours, losses = trained(with_estimator(transformers.Trainer, backprop()), tmp_path, **changed)
    assert losses == expected
    assert same(ours.model, reference.model)
    assert ours.state.total_flos == 0.0 < reference.state.total_flos
    norms = [[e["grad_norm"] for e in t.state.log_history if "grad_norm" in e] for t in (ours, reference)]
    assert norms[0] == norms[1]


@pytest.mark.slow
def test_a_compiled_model_is_trained_by_backprop(tmp_path: Path):
    reference, expected = trained(with_estimator(transformers.Trainer, backprop()), tmp_path)
    compiled, losses = trained(with_estimator(transformers.Trainer, backprop()), tmp_path, torch_compile=True)
    assert losses == pytest.approx(expected, rel=1e-5)
    for one, other in zip(weights(compiled.model), weights(reference.model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-4)


def test_a_compiled_model_whose_weights_are_to_be_perturbed_is_refused(tmp_path: Path):
    with pytest.raises(Unsupported, match="Pass the module before it is compiled"):
        trained(with_estimator(transformers.Trainer, mezo()), tmp_path, torch_compile=True)


def plain_loop(model: Any, estimator: Any, optimizer: Any, steps: int = 4, parts: int = 2) -> list[float]:
    """What the Trainer computes, written out: equal keys, batches in its order, its loss, its linear schedule."""
    with tempfile.TemporaryDirectory() as folder:  # a Trainer creates its folder
        trainer = transformers.Trainer(model=model, args=arguments(Path(folder)), train_dataset=examples())
    batches = list(trainer.get_train_dataloader())
    objective = Objective(model, lambda model, batch: model(**batch[0], num_items_in_batch=batch[1]).loss)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses, state = [], None
    model.train()
    for step in range(steps):
        group = batches[parts * step : parts * (step + 1)]
        items = sum((batch["labels"][:, 1:] != -100).sum() for batch in group)
        total = 0.0
        for number, batch in enumerate(group):
            key = Key(SEED).fold("step", step).fold("micro-batch", number)
            estimate = estimator.estimate(objective, (batch, items), key, state)
            state = estimate.state
            as_loss(estimate).backward()
            total += float(estimate.loss)
        losses.append(total)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize(
    "estimator",
    [mezo(1e-3, 2), forward_gradient(2), Momentum(mezo(1e-3))],
    ids=["mezo", "forward_gradient", "momentum"],
)
def test_an_estimator_has_the_weights_of_a_plain_loop(estimator: Any, tmp_path: Path):
    def sgd(model: Any) -> Any:
        return torch.optim.SGD(model.parameters(), lr=0.01)

    ours, losses = trained(with_estimator(transformers.Trainer, estimator), tmp_path, optimizer=sgd)
    model = llama()
    expected = plain_loop(model, estimator, sgd(model))
    assert losses == pytest.approx(expected, abs=1e-4)  # the Trainer logs rounded losses
    for one, other in zip(weights(ours.model), weights(model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_seeded_path_holds_no_gradient_and_moves_as_the_dense_one(tmp_path: Path):
    kind = with_estimator(transformers.Trainer, forward_gradient(2))
    held: list[bool] = []

    def seeded(model: Any) -> Any:
        optimizer: Any = SeededSGD(model.parameters(), lr=0.01, log=StepLog(tmp_path / "log", 2))
        step = optimizer.step

        def watched(*args: Any) -> None:
            held.append(any(parameter.grad is not None for parameter in model.parameters()))
            step(*args)

        optimizer.step = watched
        return optimizer

    ours, losses = trained(kind, tmp_path, optimizer=seeded)
    assert held == [False] * 4
    assert all(parameter.grad is None for parameter in ours.model.parameters())
    dense, expected = trained(kind, tmp_path, optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.01))
    assert losses == pytest.approx(expected, abs=1e-4)
    for one, other in zip(weights(ours.model), weights(dense.model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    objective = Objective(llama(), lambda model, batch: torch.zeros(()))
    assert replay(tmp_path / "log", objective, Gaussian(), gradcost.SGD(0.01)) == 4
    assert weights_digest(objective) == weights_digest(Objective(ours.model, objective.loss))


class Own(nn.Module):
    """A model whose `forward` knows no `num_items_in_batch`, so the Trainer divides the loss by the micro-batches."""

    def __init__(self) -> None:
        super().__init__()
        with seeded_generators(Key(3)):
            self.embedding, self.head = nn.Embedding(29, 8), nn.Linear(8, 29)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.embedding(input_ids))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def test_a_model_of_ones_own_is_accumulated_and_logged_as_by_the_trainer(tmp_path: Path):
    reference, expected = trained(transformers.Trainer, tmp_path, Own())
    assert not reference.model_accepts_loss_kwargs
    ours, losses = trained(with_estimator(transformers.Trainer, backprop()), tmp_path, Own())
    assert losses == expected
    assert expected[0] < 4  # near log(29) = 3.4, and not twice as much
    assert same(ours.model, reference.model)


def test_the_seeded_path_divides_by_the_micro_batches_too(tmp_path: Path):
    kind = with_estimator(transformers.Trainer, mezo(1e-3))
    dense, expected = trained(kind, tmp_path, Own(), lambda model: torch.optim.SGD(model.parameters(), lr=0.01))
    seeded, losses = trained(kind, tmp_path, Own(), lambda model: SeededSGD(model.parameters(), lr=0.01))
    assert losses == pytest.approx(expected, abs=1e-4)
    for one, other in zip(weights(seeded.model), weights(dense.model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_peft_model_trains_its_adapters_alone(tmp_path: Path):
    model = llama(lora=True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained(with_estimator(transformers.Trainer, mezo(1e-3)), tmp_path, model)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if "lora_" in name}


def test_what_would_be_silently_wrong_is_refused(tmp_path: Path):
    def make(estimator: Any, **changed: Any) -> None:
        kind = with_estimator(transformers.Trainer, estimator)
        kind(model=llama(), args=arguments(tmp_path, **changed), train_dataset=examples())

    with pytest.raises(Unsupported, match=r"max_grad_norm=1\.0 would .* Set max_grad_norm=0\. To limit slopes"):
        make(mezo(), max_grad_norm=1.0)
    with pytest.raises(Unsupported, match=f"{CHECKPOINTING}=True"):
        make(mezo(), **{CHECKPOINTING: True})
    make(backprop(), max_grad_norm=1.0)

    def stub(processes: int = 1, kind: str = "NO", **changed: Any) -> Any:
        args = {"max_grad_norm": 0.0, "fp16": False, "n_gpu": 1} | changed
        accelerator = SimpleNamespace(num_processes=processes, distributed_type=kind)
        return SimpleNamespace(args=SimpleNamespace(**args), accelerator=accelerator)

    trainer_of.refuse(stub(), mezo())
    for wrong, message in [
        (stub(gradient_checkpointing=True), "gradient_checkpointing=True"),  # the name before 5.23
        (stub(fp16=True), "fp16=True"),
        (stub(processes=2, kind="MULTI_GPU"), "2 processes"),
        (stub(n_gpu=4), "4 processes or GPUs"),
        (stub(kind="FSDP"), "FSDP"),
    ]:
        with pytest.raises(Unsupported, match=message):
            trainer_of.refuse(wrong, Clipped(mezo()))
    trainer_of.refuse(stub(gradient_checkpointing=True), backprop())


def test_clipping_to_the_default_norm_changes_the_length_of_a_zero_order_step():
    """Why `max_grad_norm` is refused: the estimate is many times as long as the limit."""
    made, batch = OBJECTIVES["transformer"].make()
    surrogate_loss(mezo(1e-3), made, batch, Key(0)).backward()
    norm = torch.nn.utils.clip_grad_norm_(made.model.parameters(), 1.0)
    assert norm > 3
    assert torch.nn.utils.get_total_norm([p.grad for p in made.model.parameters() if p.grad is not None]) <= 1.001


def test_a_resumed_run_continues_with_the_keys_of_its_step_or_is_refused(tmp_path: Path):
    kind = with_estimator(transformers.Trainer, mezo(1e-3))
    whole, _ = trained(kind, tmp_path / "a", save_strategy="steps", save_steps=1)
    expected = [tensor.clone() for tensor in weights(whole.model)]
    again = kind(model=llama(), args=arguments(tmp_path / "a"), train_dataset=examples())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
        whole.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))  # its last step, again from part 0
    for trainer in (again, whole):
        assert all(torch.equal(a, b) for a, b in zip(weights(trainer.model), expected, strict=True))
    stateful = with_estimator(transformers.Trainer, Momentum(mezo(1e-3)))
    refused = stateful(model=llama(), args=arguments(tmp_path / "a"), train_dataset=examples())
    with pytest.raises(Unsupported, match="resumed run would differ"):
        refused.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))


@pytest.mark.parametrize("is_resumed", [False, True], ids=["model_init", "resumed"])
def test_another_training_of_one_trainer_has_no_state_of_the_first(is_resumed: bool, tmp_path: Path):
    kind = with_estimator(transformers.Trainer, Momentum(mezo(1e-3)))
    args = arguments(tmp_path, max_steps=2, optim="sgd", save_strategy="steps", save_steps=1)
    made = kind(model_init=llama, args=args, train_dataset=examples())
    made.train()
    first = made.model
    if is_resumed:
        with pytest.raises(Unsupported, match="resumed run would differ"):
            made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        return
    made.train()
    assert made.model is not first
    assert same(made.model, first)


def test_a_batch_without_targets_adds_a_gradient_of_zero_as_in_the_trainer(tmp_path: Path):
    """The weights decay and momentum acts in that step, as torch has it."""
    data = examples()
    for row in data[2:6]:  # one of the two micro-batches of steps 0 and 1
        row["labels"] = torch.full((8,), -100)

    def run(kind: Any, model: Any, optimizer: Any = None, parts: int = 2) -> tuple[Any, list[float]]:
        args = arguments(tmp_path, weight_decay=0.1, gradient_accumulation_steps=parts)
        made = kind(model=model, args=args, train_dataset=data, optimizers=(optimizer, None))
        made.train()
        return made.model, [entry["loss"] for entry in made.state.log_history if "loss" in entry]

    for make, parts in [(llama, 1), (Own, 2)]:
        with pytest.warns(gradcost.core.Note, match="a step was skipped: the loss of this batch is nan"):
            ours, losses = run(with_estimator(transformers.Trainer, backprop()), make(), parts=parts)
        plain, expected = run(transformers.Trainer, make(), parts=parts)
        assert losses == expected
        assert same(ours, plain)
    kind = with_estimator(transformers.Trainer, mezo(1e-3))
    models = []
    for optimizer in (torch.optim.SGD, SeededSGD):
        model = Own()
        models.append(run(kind, model, optimizer(model.parameters(), lr=0.01))[0])
    for one, other in zip(weights(models[0]), weights(models[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class Unfreeze(transformers.TrainerCallback):
    """Gradual unfreezing: all parameters are trainable from step 2 on."""

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if state.global_step == 2:
            objects["model"].requires_grad_(True)


def test_parameters_may_be_unfrozen_during_the_training(tmp_path: Path):
    def unfrozen(kind: Any, optimizer: Any) -> Any:
        model = llama()
        model.model.requires_grad_(False)
        optimizers = (optimizer(model.parameters(), lr=0.01), None)
        args, data = arguments(tmp_path), examples()
        made = kind(model=model, args=args, train_dataset=data, optimizers=optimizers, callbacks=[Unfreeze()])
        made.train()
        return made.model

    plain, sgd = transformers.Trainer, torch.optim.SGD
    assert same(unfrozen(with_estimator(plain, backprop()), sgd), unfrozen(plain, sgd))
    dense, seeded = (unfrozen(with_estimator(plain, mezo(1e-3)), optimizer) for optimizer in (sgd, SeededSGD))
    for one, other in zip(weights(seeded), weights(dense), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    with pytest.raises(Unsupported, match=r"was unfrozen .* during the training\. The state of Momentum"):
        unfrozen(with_estimator(plain, Momentum(mezo(1e-3))), sgd)


# ---- accelerate and Lightning: `surrogate_loss` in the loop


def test_accelerate_with_accumulation_has_the_bits_of_a_plain_loop():
    accelerate = pytest.importorskip("accelerate")

    def loop(use_accelerate: bool) -> nn.Module:
        made, batch = OBJECTIVES["mlp"].make()
        optimizer: Any = torch.optim.AdamW(made.model.parameters(), lr=0.01)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2) if use_accelerate else None
        model = made.model
        if accelerator is not None:
            model, optimizer = accelerator.prepare(model, optimizer)
        objective = Objective(model, made.loss)
        for step in range(4):
            rows = slice(step, step + 4)
            loss = surrogate_loss(mezo(1e-3), objective, (batch[0][rows], batch[1][rows]), Key(step))
            if accelerator is not None:
                with accelerator.accumulate(model):
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
            else:
                (loss / 2).backward()
                if step % 2:
                    optimizer.step()
                    optimizer.zero_grad()
        return made.model

    assert same(loop(True), loop(False))


@pytest.mark.parametrize("is_automatic", [True, False], ids=["automatic", "manual"])
def test_lightning_has_the_bits_of_a_plain_loop(is_automatic: bool):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    made, batch = OBJECTIVES["mlp"].make()

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = made.model
            self.automatic_optimization = is_automatic

        def training_step(self, batch: Any, number: int) -> Any:
            loss = surrogate_loss(mezo(1e-3), made, tuple(part[0] for part in batch), Key(number))
            if not is_automatic:
                self.optimizers().zero_grad()
                self.manual_backward(loss)
                self.optimizers().step()
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*(part[None] for part in batch)))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    lightning.Trainer(max_epochs=1, **options).fit(Module(), data)
    other, _ = OBJECTIVES["mlp"].make()
    surrogate_loss(mezo(1e-3), other, batch, Key(0)).backward()
    torch.optim.SGD(other.model.parameters(), lr=0.01).step()
    assert same(made.model, other.model)


# ---- SeededSGD


def test_seeded_sgd_has_the_bits_of_train():
    made, batch = OBJECTIVES["mlp"].make()
    optimizer = SeededSGD(made.model.parameters(), lr=0.01)
    other, _ = OBJECTIVES["mlp"].make()
    steps = gradcost.training.TrainState(other, mezo(1e-3, 2), gradcost.SGD(0.01))
    for number in range(3):
        optimizer.add(mezo(1e-3, 2).estimate(made, batch, Key(number)))
        optimizer.step()
        steps.step(batch, Key(number))
    assert same(made.model, other.model)


def test_seeded_sgd_refuses_what_it_would_ignore(tmp_path: Path):
    made, batch = OBJECTIVES["mlp"].make()
    optimizer = SeededSGD(made.model.parameters(), lr=0.01)
    with pytest.raises(Unsupported, match="Dense"):
        optimizer.add(backprop().estimate(made, batch, Key(0)))
    before = [tensor.clone() for tensor in weights(made.model)]
    optimizer.add(mezo(1e-3).estimate(made, batch, Key(0)))
    with pytest.raises(BadInput, match="along"):
        optimizer.add(gradcost.spsa(1e-3).estimate(made, batch, Key(0)))
    assert gradcost.spsa(1e-3).directions == Rademacher()  # type: ignore[attr-defined]
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights(made.model), before, strict=True))
    surrogate_loss(mezo(1e-3), made, batch, Key(0)).backward()
    with pytest.raises(BadInput, match=r"not backward\(\)"):
        optimizer.step()
    other, _ = OBJECTIVES["mlp"].make()
    with pytest.raises(BadInput, match="does not have the parameter"):
        optimizer.add(mezo(1e-3).estimate(other, batch, Key(0)))
    with pytest.raises(BadInput, match="learning rate"):
        SeededSGD(made.model.parameters(), lr=0.0)
    groups: Any = [{"params": made.model.parameters(), "weight_decay": 0.1, "lr": 0.1}]
    with pytest.raises(BadInput, match="without weight_decay"):
        SeededSGD(groups, lr=0.1)
    loaded = SeededSGD(dict(made.model.named_parameters()).items(), lr=0.1)  # type: ignore[arg-type]
    torch.optim.lr_scheduler.OneCycleLR(loaded, 1.0, total_steps=4, cycle_momentum=False)
    loaded.zero_grad()
    made.model.zero_grad()
    loaded.step()
    loaded.load_state_dict(torch.optim.SGD(made.model.parameters(), 0.1, momentum=0.9).state_dict())
    with pytest.raises(BadInput, match="without momentum"):
        loaded.step()
    (tmp_path / "log").touch()
    with pytest.raises(BadInput, match="exists"):
        SeededSGD(made.model.parameters(), 0.1, StepLog(tmp_path / "log"))
    gc.collect()
