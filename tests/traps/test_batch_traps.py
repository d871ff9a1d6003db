"""What a batch is: how it is split into micro-batches, and which weights the losses of the micro-batches have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradcost
from gradcost.checkpointing import chunked_cross_entropy
from gradcost.core.batching.micro_batches import split
from gradcost.core.errors import Unsupported
from gradcost.core.evaluation.first_use import findings
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.notes import Note
from gradcost.core.objective import Objective
from gradcost.directions import Gaussian, Rademacher
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.activity import ActivityPerturbation
from gradcost.estimators.by_length import ByLength
from gradcost.estimators.presets import backprop, checkpointed
from gradcost.estimators.probing import Probing
from gradcost.slopes.slope import CentralDifference, ForwardDifference, Jvp
from gradcost.training.optimizers import SGD
from gradcost.training.train_state import TrainState
from vectors import flat

KEY = Key(31)
WORDS, WIDTH = 7, 6


class Words(nn.Module):
    """Logits for each of the tokens of each example, from two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2)])
        self.head = nn.Linear(WIDTH, WORDS)

    def features(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return x

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.features(ids))


def words() -> Words:
    with seeded_generators(KEY):
        return Words().double()


def batch(counts: tuple[int, ...] = (5, 1, 4, 0, 2, 3), length: int = 5) -> dict[str, Tensor]:
    """Examples with these numbers of targets; the other targets are -100."""
    with seeded_generators(KEY):
        ids = torch.randint(WORDS, (len(counts), length))
        labels = torch.randint(WORDS, (len(counts), length))
    mask = torch.arange(length) < torch.tensor(counts).unsqueeze(1)
    return {"ids": ids, "labels": labels.masked_fill(~mask, -100), "mask": mask}


def by_token(model: nn.Module, batch: Any) -> Tensor:
    labels = batch["labels"].clamp(min=0)
    return F.cross_entropy(model(batch["ids"]).transpose(1, 2), labels, reduction="none")


def padded(model: Any, batch: Any, **options: Any) -> Tensor:
    return F.cross_entropy(model(batch["ids"]).flatten(0, 1), batch["labels"].flatten(), **options)


def masked_sum(model: nn.Module, batch: Any) -> Tensor:
    return (by_token(model, batch) * batch["mask"]).sum()


def chunked(model: Any, batch: Any) -> Tensor:
    return chunked_cross_entropy(model.features(batch["ids"]), model.head.weight, batch["labels"], 2, model.head.bias)


SPREAD = torch.linspace(0.2, 2.0, WORDS, dtype=torch.float64)
AVERAGES: dict[str, Callable[[nn.Module, Any], Tensor]] = {
    "targets": padded,
    "targets, half": lambda model, batch: padded(model, batch) / 2.0,
    "targets, in bits": lambda model, batch: 1.4427 * padded(model, batch),
    "label smoothing": lambda model, batch: padded(model, batch, label_smoothing=0.1),
    "class weights": lambda model, batch: padded(model, batch, weight=SPREAD),
    "log probabilities": lambda model, batch: F.nll_loss(
        model(batch["ids"]).log_softmax(2).flatten(0, 1), batch["labels"].flatten(), ignore_index=-100
    ),
    "nn.CrossEntropyLoss": lambda model, batch: nn.CrossEntropyLoss()(
        model(batch["ids"]).transpose(1, 2), batch["labels"]
    ),
    "chunks": chunked,
    "a sum over a mask": lambda model, batch: masked_sum(model, batch) / batch["mask"].sum(),
    "a sum over a number": lambda model, batch: masked_sum(model, batch) / batch["mask"].sum().item(),
    "a guarded sum": lambda model, batch: masked_sum(model, batch) / batch["mask"].sum().clamp(min=1),
    "a guarded number": lambda model, batch: masked_sum(model, batch) / max(int(batch["mask"].sum()), 1),
    "selected": lambda model, batch: by_token(model, batch)[batch["mask"]].mean(),
    "masked_select": lambda model, batch: by_token(model, batch).masked_select(batch["mask"]).mean(),
    "all tokens": lambda model, batch: (by_token(model, batch) * batch["mask"]).mean(),
    "examples": lambda model, batch: (
        (by_token(model, batch) * batch["mask"]).sum(1) / batch["mask"].sum(1).clamp(min=1)
    ).mean(),
    "a loop over examples": lambda model, batch: torch.stack(
        [F.cross_entropy(model(ids[None])[0], ids) for ids in batch["ids"]]
    ).mean(),
    "a sum": lambda model, batch: padded(model, batch, reduction="sum"),
    "a sum and a constant": lambda model, batch: padded(model, batch, reduction="sum") / 64,
    "batchmean": lambda model, batch: (
        F.kl_div(model(batch["ids"]).log_softmax(2), model(batch["ids"]).detach().softmax(2), reduction="batchmean")
        + padded(model, batch, reduction="sum") / len(batch["ids"])
    ),
    "weight decay": lambda model, batch: padded(model, batch) + 0.1 * model.head.weight.square().sum(),  # type: ignore[union-attr]
}


def whole(loss: Any, of: Any) -> tuple[float, Tensor]:
    """The loss and the gradient by torch alone."""
    model = words()
    value = loss(model, of)
    value.backward()
    return float(value), torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
    )


def assert_exact(estimator: Any, objective: Objective, of: Any, expected: tuple[float, Tensor]) -> None:
    found = estimator.estimate(objective, of, KEY)
    assert float(found.loss) == pytest.approx(expected[0], rel=1e-12)
    assert (flat(found.gradient) - expected[1]).abs().max() <= 1e-12 * expected[1].abs().max()


@pytest.mark.parametrize("name", AVERAGES)
def test_micro_batches_weigh_what_the_loss_averages_over(name: str):
    """Micro-batches have different numbers of targets, and one has none."""
    loss = AVERAGES[name]
    for counts in ((5, 1, 4, 0, 2, 3), (2, 2, 2, 2, 2, 2)):
        expected = whole(loss, batch(counts))
        for parts in (2, 3, 4, 6):
            assert_exact(Accumulated(backprop(), parts), Objective(words(), loss), batch(counts), expected)


@pytest.mark.parametrize("name", AVERAGES)
def test_what_a_loss_averages_over_shows_only_in_a_later_batch(name: str):
    loss = AVERAGES[name]
    objective, estimator = Objective(words(), loss), Accumulated(backprop(), 3)
    for counts in ((3, 3, 3, 3, 3, 3), (5, 1, 4, 0, 2, 3), (0, 0, 5, 5, 1, 2)):
        assert_exact(estimator, objective, batch(counts), whole(loss, batch(counts)))


SLOPES = {
    "jvp": Jvp(),
    "jvp together": Jvp(together=2),
    "central": CentralDifference(1e-5),
    "forward": ForwardDifference(1e-7),
}


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("name", ["targets", "class weights", "a guarded sum", "selected", "a sum", "examples"])
def test_slopes_are_those_of_the_whole_batch(name: str, slope: str):
    loss, directions = AVERAGES[name], Gaussian()
    objective = Objective(words(), loss)
    for counts in ((3, 3, 3, 3, 3, 3), (5, 1, 4, 0, 2, 3)):
        expected = Probing(Jvp(), directions, 2).estimate(Objective(words(), loss), batch(counts), KEY)
        found = Accumulated(Probing(SLOPES[slope], directions, 2), 4).estimate(objective, batch(counts), KEY)
        tolerance = {"central": 1e-6, "forward": 1e-4}.get(slope, 1e-12)
        assert expected.slopes is not None
        assert torch.allclose(found.slopes, expected.slopes, rtol=tolerance, atol=tolerance)  # type: ignore[arg-type]
        assert float(found.loss) == pytest.approx(float(expected.loss), rel=max(tolerance, 1e-5))


@pytest.mark.parametrize("slope", [Jvp(), CentralDifference(1e-5)], ids=repr)
def test_activity_perturbation_weighs_micro_batches_too(slope: Any):
    expected = ActivityPerturbation(slope).estimate(Objective(words(), padded), batch(), KEY)
    found = Accumulated(ActivityPerturbation(slope), 3).estimate(Objective(words(), padded), batch(), KEY)
    assert (flat(found.gradient) - flat(expected.gradient)).abs().max() <= 1e-6 * flat(expected.gradient).abs().max()


def test_recomputation_leaves_out_a_micro_batch_without_targets():
    expected = whole(padded, batch((0, 4, 0, 1)))
    assert_exact(Accumulated(checkpointed(), 4), Objective(words(), padded), batch((0, 4, 0, 1)), expected)
    assert_exact(
        Accumulated(checkpointed(), 4),
        Objective(words(), padded),
        batch((3, 4, 2, 0)),
        whole(padded, batch((3, 4, 2, 0))),
    )


@pytest.mark.parametrize("inner", [backprop(), gradcost.mezo(), gradcost.forward_gradient()], ids=repr)
def test_a_batch_without_any_target_has_no_estimate(inner: Any):
    with pytest.raises(gradcost.GradcostError, match="nan"):
        Accumulated(inner, 2).estimate(Objective(words(), padded), batch((0, 0, 0, 0)), KEY)


def test_equal_numbers_of_targets_keep_the_bits_of_a_mean_by_examples():
    model, of = words(), batch((5,) * 7)
    found = Accumulated(backprop(), 3).estimate(Objective(model, padded), of, KEY)
    reference, total = words(), torch.zeros((), dtype=torch.float64)
    for weight, piece in split(of, 3):
        value = weight * padded(reference, piece)
        value.backward()
        total = total + value.detach()
    assert torch.equal(found.loss, total)
    assert torch.equal(flat(found.gradient), torch.cat([p.grad.flatten() for p in reference.parameters()]))  # type: ignore[union-attr]


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    features = F.normalize(model.features(batch["ids"]).mean(1), dim=1)  # type: ignore[operator]
    return F.cross_entropy(features @ features.T, torch.arange(len(features)))


REFUSED: dict[str, Callable[[nn.Module, Any], Tensor]] = {
    "examples are compared": contrastive,
    "two averages": lambda model, batch: padded(model, batch) + by_token(model, batch).mean(),
    "two masks": lambda model, batch: (
        padded(model, batch) + masked_sum(model, batch | {"mask": batch["labels"] > 2}) / (batch["labels"] > 2).sum()
    ),
    "overlap": lambda model, batch: 1 - masked_sum(model, batch) / (masked_sum(model, batch) + batch["mask"].sum()),
    "a square": lambda model, batch: padded(model, batch).square(),
    "a sum with weight decay": lambda model, batch: (
        padded(model, batch, reduction="sum") + sum(p.square().sum() for p in model.parameters())
    ),
    "another way of dividing": lambda model, batch: torch.einsum(
        "bt,bt->", by_token(model, batch), batch["mask"] * batch["mask"].sum().double().reciprocal()
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_loss_that_micro_batches_do_not_determine_is_refused(name: str):
    objective, of = Objective(words(), REFUSED[name]), batch((5, 1, 4, 1, 2, 3))
    for estimator in (Accumulated(backprop(), 3), Accumulated(gradcost.mezo(), 2)):
        with pytest.raises(gradcost.GradcostError, match="not a weighted mean or a sum of the losses of its micro-b"):
            estimator.estimate(objective, of, KEY)
        assert "not a weighted mean" in str(estimator.objection(objective, of))
    backprop().estimate(objective, of, KEY)  # at once it is served


def test_batch_norm_without_running_statistics_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 1)).double()
    x = torch.arange(24.0).reshape(6, 4).sin().double()
    objective = Objective(model, lambda model, x: model(x).square().mean())
    with pytest.raises(gradcost.GradcostError, match="compares examples with each other"):
        Accumulated(backprop(), 2).estimate(objective, x, KEY)


def by_row(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean(-1)


WEIGHTED_MEANS: dict[str, Callable[..., Tensor]] = {  # of the losses l of rows with weights k
    "mean(l k) / mean(k)": lambda model, b: (by_row(model, b) * b[2]).mean() / b[2].mean(),
    "sum(l k) (1 / sum(k))": lambda model, b: (by_row(model, b) * b[2]).sum() * (1 / b[2].sum()),
    "normalize": lambda model, b: (by_row(model, b) * F.normalize(b[2], p=1, dim=0)).sum(),
    "keepdim": lambda model, b: (by_row(model, b) * (b[2] / b[2].sum(0, keepdim=True))).sum(),
    "exp(log - log)": lambda model, b: ((by_row(model, b) * b[2]).sum().log() - b[2].sum().log()).exp(),
    "nanmean": lambda model, b: torch.nanmean(torch.where(b[2] > 0, by_row(model, b), torch.nan)),
    "kept rows": lambda model, b: by_row(model, b)[torch.where(b[2] > 0)[0]].mean(),
}


@pytest.mark.parametrize("k", [(1, 0.2, 0.1, 0, 1, 1), (1, 0, 0, 1, 1, 1)], ids=["weights", "mask"])
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("name", WEIGHTED_MEANS)
def test_padding_that_a_later_batch_brings_is_weighed_or_refused(name: str, parts: int, k: tuple[float, ...]):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 8, generator=generator).double(), torch.randn(6, 8, generator=generator).double()
    objective = Objective(nn.Linear(8, 8).double(), WEIGHTED_MEANS[name])
    for weights in (torch.ones(6).double(), torch.tensor(k).double()):
        batch = (x, y, weights)
        true = flat(backprop().estimate(objective, batch, Key(0)).gradient)
        try:
            found = flat(Accumulated(backprop(), parts).estimate(objective, batch, Key(0)).gradient)
        except Unsupported:
            assert not torch.equal(weights, torch.ones(6)), "without padding the loss is a mean over examples"
        else:
            torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-12)


def test_a_second_average_that_only_a_later_batch_shows_is_refused():
    objective, estimator = Objective(words(), REFUSED["two averages"]), Accumulated(backprop(), 3)
    estimator.estimate(objective, batch((5, 5, 5, 5, 5, 5)), KEY)
    with pytest.raises(gradcost.GradcostError, match="not a weighted mean or a sum"):
        estimator.estimate(objective, batch(), KEY)


def test_a_loss_that_draws_is_weighed_by_examples():
    """A diffusion loss: noise and times of each evaluation are drawn, also in eval mode."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        time = torch.rand(len(x), 1, dtype=x.dtype)
        noise = torch.randn_like(x)
        return F.mse_loss(model(time * x + (1 - time) * noise), noise)

    objective = Objective(nn.Linear(4, 4).double(), loss)
    found = [weight for weight, _, _ in objective.in_micro_batches(3).losses(torch.ones(7, 4).double(), KEY)]
    Accumulated(backprop(), 3).estimate(objective, torch.ones(7, 4).double(), KEY)
    assert found == [weight for weight, _, _ in objective.in_micro_batches(3).losses(torch.ones(7, 4).double(), KEY)]
    assert found == [3 / 7, 2 / 7, 2 / 7]


def test_two_losses_of_one_factory_have_weights_of_their_own():
    def made(reduction: str) -> Any:
        return lambda model, batch: padded(model, batch, reduction=reduction)

    model = words()
    for reduction in ("mean", "sum", "mean"):
        expected = whole(made(reduction), batch())
        assert_exact(Accumulated(backprop(), 3), Objective(model, made(reduction)), batch(), expected)


def with_options(options: dict[str, Any]) -> Callable[..., Tensor]:
    return lambda model, batch: F.mse_loss(model(batch[0]), batch[1], **options)


def with_contrast(weight: float) -> Callable[..., Tensor]:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        z = F.normalize(model(batch[0]), dim=-1)
        return F.mse_loss(z, batch[1]) + weight * F.cross_entropy(5 * z @ z.T, torch.arange(len(z)))

    return loss


@pytest.mark.parametrize(
    ("make", "first", "second"),
    [(with_options, {"reduction": "mean"}, {"reduction": "sum"}), (with_contrast, 0.0, 0.5)],
)
def test_what_is_known_of_a_loss_is_not_believed_of_its_factory(make: Any, first: Any, second: Any):
    """The second option is a sum, or a term over the batch that its warm-up left out."""
    model, batch = nn.Linear(8, 8).double(), (torch.randn(6, 8).double(), torch.randn(6, 8).double())
    for option in (first, second):
        objective = Objective(model, make(option))
        true = flat(backprop().estimate(objective, batch, Key(0)).gradient)
        try:
            found = flat(Accumulated(backprop(), 2).estimate(objective, batch, Key(0)).gradient)
        except Unsupported:
            assert option == 0.5
        else:
            torch.testing.assert_close(found, true)


def test_numbers_that_change_at_each_step_are_seldom_new_losses():
    model = nn.Linear(2, 2)
    found = [findings(model, lambda model, batch, weight=0.1 * step: weight) for step in range(100)]
    assert len({id(each) for each in found}) == 7  # the 1st, 2nd, 4th, ... 64th
    assert findings(model, lambda model, batch, weight=0.0: weight) is not found[0], "other code"


def test_a_test_of_the_weights_disturbs_nothing_and_costs_nothing_later():
    model, calls = words(), []
    model.register_forward_hook(lambda *_: calls.append(model.training))
    objective, estimator = Objective(model, padded), Accumulated(backprop(), 3)
    with torch.random.fork_rng():
        before = torch.get_rng_state()
        estimator.estimate(objective, batch(), KEY)
        assert torch.equal(before, torch.get_rng_state())
    assert model.training
    calls.clear()
    estimator.estimate(objective, batch(), KEY)
    assert calls == [True] * 3


@pytest.mark.parametrize("inner", [backprop(), checkpointed(), Probing(CentralDifference(1e-3))], ids=repr)
def test_no_check_needs_the_memory_of_more_than_the_micro_batches(inner: Any):
    """Before, the first step and the examination at the eighth evaluation ran on the whole batch, and a test of the
    weights kept the activations of half a micro-batch without recomputation."""
    sizes: list[tuple[int, bool]] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        sizes.append((len(batch[0]), torch.is_grad_enabled()))
        return F.cross_entropy(model(batch[0]), batch[1])

    objective = Objective(nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)]), loss)
    batch = torch.randn(64, 6), torch.randint(6, (64,))
    training = TrainState(objective, Accumulated(inner, 8), SGD(1e-3))
    for number in range(9):
        training.step(batch, KEY.fold("step", number))
    assert max(size for size, _ in sizes) == 16, "two micro-batches, without gradients"
    assert {size for size, with_gradients in sizes if with_gradients} <= {1, 2, 8}


# ---- transformers


def test_the_loss_of_a_causal_language_model_is_weighed_by_its_targets():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    of = {name: tensor for name, tensor in batch((5, 1, 4, 2)).items() if name != "mask"}

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(input_ids=batch["ids"], labels=batch["labels"], use_cache=False).loss

    def with_number(model: nn.Module, batch: Any) -> Tensor:
        return model(input_ids=batch["ids"], labels=batch["labels"], num_items_in_batch=8, use_cache=False).loss

    for function in (loss, with_number):
        with seeded_generators(KEY):
            model = GPT2LMHeadModel(config).double()
        expected = backprop().estimate(Objective(model, function), of, KEY)
        for parts in (2, 4):
            found = Accumulated(backprop(), parts).estimate(Objective(model, function), of, KEY)
            assert (flat(found.gradient) - flat(expected.gradient)).abs().max() <= 1e-6 * flat(
                expected.gradient
            ).abs().max()
            assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-6)


def test_a_seeded_gradient_of_micro_batches_replays_along_the_same_directions():
    once = Probing(CentralDifference(1e-4), Rademacher()).estimate(Objective(words(), padded), batch(), KEY)
    found = Accumulated(Probing(CentralDifference(1e-4), Rademacher()), 3).estimate(
        Objective(words(), padded), batch(), KEY
    )
    assert found.gradient.seeds == once.gradient.seeds  # type: ignore[attr-defined]


# ---- padding of short examples


class Positions(nn.Module):
    """Absolute positions: the columns before an example are part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.at, self.head = nn.Embedding(WORDS, WIDTH), nn.Embedding(9, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = torch.tanh(self.embed(ids) + self.at(torch.arange(ids.shape[1]))) * mask.unsqueeze(2)
        return self.head(x.sum(1) / mask.sum(1, keepdim=True))


class MeanOverColumns(Positions):
    """Averages all columns, padding included."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head((self.embed(ids) * mask.unsqueeze(2)).mean(1))


def of_lengths(left: bool) -> dict[str, Tensor]:
    mask = (torch.arange(9) < torch.tensor((3, 9, 2, 7, 4)).unsqueeze(1)).long()
    with seeded_generators(KEY):
        ids, labels = torch.randint(WORDS, (5, 9)), torch.randint(3, (5,))
    return {"ids": ids, "attention_mask": mask.flip(1) if left else mask, "labels": labels}


def read(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["ids"], batch["attention_mask"]), batch["labels"])


@pytest.mark.parametrize(
    ("kind", "left", "kept"),
    [
        (Positions, True, True),
        (Positions, False, False),
        (MeanOverColumns, True, True),
        (MeanOverColumns, False, True),
    ],
)
def test_short_examples_lose_no_padding_that_the_model_reads(kind: type[nn.Module], left: bool, kept: bool):
    with seeded_generators(KEY):
        model = kind().double()
    objective, of = Objective(model, read), of_lengths(left)
    estimator = ByLength(backprop(), backprop(), 4, 0.4)  # 0.4: the share of long examples
    expected = backprop().estimate(Objective(model, read), of, KEY)
    if kept:
        with pytest.warns(Note, match="ByLength keeps the padding on the"):
            found = estimator.estimate(objective, of, KEY)
    else:
        found = estimator.estimate(objective, of, KEY)
    assert (flat(found.gradient) - flat(expected.gradient)).abs().max() <= 1e-12 * flat(expected.gradient).abs().max()
    assert gradcost.forecast(estimator, objective, of).peak > 0  # known from the estimate


def test_a_forecast_does_not_guess_whether_padding_on_the_left_is_read():
    objective = Objective(Positions(), read)
    with pytest.raises(
        gradcost.GradcostError, match="does not know whether the loss changes without padding on the left"
    ):
        gradcost.forecast(ByLength(backprop(), backprop(), 4), objective, of_lengths(left=True))
