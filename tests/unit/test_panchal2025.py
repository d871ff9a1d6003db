"""The methods of Panchal et al. 2025, what their public code computes instead, and the study that compares them."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import tiny_models
from gradcost.core.errors import BadInput
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.core.value import value
from gradcost.directions import Gaussian
from gradcost.directions.masks import Masked, Smallest
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.adaptive import Adaptive
from gradcost.estimators.presets import backprop, forward_gradient, mezo
from gradcost.estimators.probing import Probing
from gradcost.papers.panchal2025.headline import is_compared
from gradcost.papers.panchal2025.methods import Method, Settings, method, methods
from gradcost.papers.panchal2025.page import page
from gradcost.papers.panchal2025.study import AS_CODED, DISTINCT, Reproduction, _most_steps
from gradcost.results.records import read
from gradcost.results.tuning import finals
from gradcost.studies.costs import forward_seconds
from gradcost.studies.executors import Executor
from gradcost.studies.processes import Work
from gradcost.studies.run import run_study
from gradcost.studies.trial import Trial
from gradcost.studies.trial_log import evaluated_steps
from gradcost.studies.worker import perform
from gradcost.tasks.architectures import Architecture, Mlp
from gradcost.tasks.digits import Digits
from gradcost.tasks.pretrained import Encoder, Lora
from gradcost.tasks.task import Task
from gradcost.tasks.texts import Texts, TextSplits, TextTask
from gradcost.training import checkpoint
from gradcost.training.optimizers import SGD
from gradcost.training.train_state import TrainState
from tables import OBJECTIVES
from vectors import direction, estimated, flat, true_gradient

KEY = Key(2506)
SETTINGS = Settings(probes=3, parts=2, candidates=3, every=2, share=0.2)
METHODS = methods(SETTINGS)
CODED = [each for each in METHODS if each.as_coded is not None]


def made() -> tuple[Objective, tuple[Tensor, ...]]:
    return OBJECTIVES["transformer"].make(torch.float64)


def test_the_methods_are_those_of_the_paper():
    variants = ["Vanilla", "Multiple", "Accumulate", "Adaptive", "SVRG", "Sparse"]
    names = ["BP-Vanilla", "BP-Accumulate", "BP-Checkpointing"]
    names += [f"{family}-{variant}" for family in ("FmAD", "ZO") for variant in variants]
    assert [each.name for each in METHODS] == [*names, "MeZO"]
    assert method("fmad-svrg", SETTINGS) == METHODS[7]
    assert method("ZO-Vanilla").estimator == method("MeZO").estimator == mezo()
    assert set(DISTINCT) < set(names) | {"MeZO"}
    with pytest.raises(BadInput, match="no method 'zo-best': give one of BP-Vanilla, BP-Accumulate"):
        method("zo-best")
    with pytest.raises(BadInput, match="above 0"):
        Settings(probes=0)


@pytest.mark.parametrize("each", METHODS, ids=lambda each: each.name)
def test_every_method_gives_a_gradient_and_names_what_its_code_does_otherwise(each: Method):
    objective, batch = made()
    for estimator in (each.estimator, each.as_coded or each.estimator):
        assert eval(repr(estimator), _names()) == estimator
        assert estimator.objection(objective, batch) is None
        found = estimated(estimator, objective, batch, KEY)
        assert found.isfinite().all()
        assert found.abs().max() > 0
        streamed: dict[str, Tensor] = {}
        estimator.stream(objective, batch, KEY, lambda name, part: streamed.update({name: part.clone()}))  # noqa: B023
        torch.testing.assert_close(torch.cat([streamed[leaf.name].flatten() for leaf in objective.leaves]), found)
    assert (each.as_coded is None) == (each.difference == "")


def _names() -> dict[str, object]:
    from gradcost import directions, estimators, slopes
    from gradcost.checkpointing import policies
    from gradcost.directions import groups, masks
    from gradcost.estimators import adaptive, combine, variance_reduced
    from gradcost.papers.panchal2025 import as_coded
    from gradcost.slopes import slope

    modules = (directions, estimators, slopes, policies, groups, masks, adaptive, combine, variance_reduced)
    found: dict[str, object] = {}
    for module in (*modules, as_coded, slope):
        found |= vars(module)
    return found | {"Accumulated": Accumulated, "Probing": Probing}


def test_methods_of_backprop_give_the_gradient():
    objective, batch = made()
    exact = true_gradient(objective, batch, KEY)
    for name in ("BP-Vanilla", "BP-Checkpointing"):
        torch.testing.assert_close(estimated(method(name).estimator, objective, batch, KEY), exact)


# ---- what the code does


def test_the_code_sums_over_micro_batches_of_backprop_only():
    objective, batch = made()
    bp = method("BP-Accumulate", SETTINGS)
    assert bp.as_coded is not None
    averaged = estimated(bp.estimator, objective, batch, KEY)
    torch.testing.assert_close(estimated(bp.as_coded, objective, batch, KEY), 2 * averaged)
    assert method("FmAD-Accumulate").as_coded is None


def test_the_code_of_zero_order_updates_eps_times_too_little():
    objective, batch = made()
    vanilla = method("ZO-Vanilla", SETTINGS)
    assert vanilla.as_coded is not None
    right = estimated(vanilla.estimator, objective, batch, KEY)
    torch.testing.assert_close(estimated(vanilla.as_coded, objective, batch, KEY), SETTINGS.eps * right)


def test_the_code_of_multiple_takes_one_direction_and_pays_for_n():
    objective, batch = made()
    coded = method("FmAD-Multiple", SETTINGS).as_coded
    assert isinstance(coded, Probing)
    found = coded.estimate(objective, batch, KEY)
    assert found.slopes is not None
    assert len(found.slopes) == 3
    # The dropout masks are those of the key, so all slopes are one, and so is the estimate with one probe.
    torch.testing.assert_close(found.slopes, found.slopes[:1].expand(3))
    torch.testing.assert_close(flat(found.gradient), estimated(replace(coded, probes=1), objective, batch, KEY))
    named = method("FmAD-Multiple", SETTINGS).estimator.estimate(objective, batch, KEY)
    assert named.slopes is not None
    assert len(named.slopes.unique()) == 3


def test_the_code_of_adaptive_selects_the_smallest_slope_and_only_once():
    objective, batch = made()
    named, coded = method("FmAD-Adaptive", SETTINGS).estimator, method("FmAD-Adaptive", SETTINGS).as_coded
    assert isinstance(named, Adaptive)
    assert coded is not None
    first = coded.estimate(objective, batch, KEY)
    best = named.estimate(objective, batch, KEY)  # of the same candidates
    assert first.slopes is not None
    assert best.slopes is not None
    assert first.slopes.abs().item() < best.slopes.abs().item()
    later = coded.estimate(objective, batch, KEY, first.state)
    torch.testing.assert_close(flat(later.gradient), estimated(forward_gradient(), objective, batch, KEY))


def test_the_code_of_zero_order_adaptive_is_eps_times_too_small_after_its_first_step_only():
    """Both steps against the arithmetic of the public code, with the directions of gradcost."""
    objective, batch = made()
    coded = method("ZO-Adaptive", SETTINGS).as_coded
    assert coded is not None
    eps, settings = SETTINGS.eps, SETTINGS

    def projected(v: Tensor) -> float:
        up, down = (loss_at(objective, batch, v, sign) for sign in (1, -1))
        return (up - down) / (2 * eps)

    seeds = Gaussian().seeds(KEY.fold("group", 0), settings.candidates, objective.dimension)
    candidates = [eps**0.5 * direction(objective, Gaussian(), seed) for seed in seeds]
    flattest = min(candidates, key=lambda v: abs(projected(v)))
    first = coded.estimate(objective, batch, KEY)
    torch.testing.assert_close(flat(first.gradient), projected(flattest) * flattest)

    (seed,) = Gaussian().seeds(KEY, 1, objective.dimension)
    v = eps * direction(objective, Gaussian(), seed)
    later = coded.estimate(objective, batch, KEY, first.state)
    torch.testing.assert_close(flat(later.gradient), projected(v) * v)
    assert flat(first.gradient).norm() > 10 * flat(later.gradient).norm()


def loss_at(objective: Objective, batch: Any, v: Tensor, sign: int) -> float:
    """The loss at the weights plus or minus v."""
    parts = v.split([leaf.parameter.numel() for leaf in objective.leaves])
    moved = {
        leaf.name: leaf.parameter.detach() + sign * part.view_as(leaf.parameter)
        for leaf, part in zip(objective.leaves, parts, strict=True)
    }
    with objective.at_weights(moved):
        return objective.evaluate(batch, KEY).item()


def test_the_code_of_zero_order_svrg_applies_one_stale_vector_until_the_next_snapshot():
    objective, batch = made()
    coded = method("ZO-SVRG", SETTINGS).as_coded
    assert coded is not None
    first = coded.estimate(objective, batch, KEY.fold("step", 0))
    with torch.no_grad():
        for leaf in objective.leaves:
            leaf.parameter.mul_(1.1)
    second = coded.estimate(objective, batch, KEY.fold("step", 1), first.state)
    third = coded.estimate(objective, batch, KEY.fold("step", 2), second.state)  # every=2: a new snapshot
    assert torch.equal(flat(first.gradient), flat(second.gradient))
    assert not torch.equal(flat(second.gradient), flat(third.gradient))
    named = method("ZO-SVRG", SETTINGS).estimator
    moved = named.estimate(objective, batch, KEY.fold("step", 0))
    with torch.no_grad():
        for leaf in objective.leaves:
            leaf.parameter.mul_(1.1)
    corrected = named.estimate(objective, batch, KEY.fold("step", 1), moved.state)
    assert not torch.equal(flat(moved.gradient), flat(corrected.gradient))


def test_a_resumed_training_of_the_code_of_zero_order_svrg_is_the_uninterrupted_one(tmp_path: Path):
    coded = method("ZO-SVRG", replace(SETTINGS, every=6)).as_coded
    assert coded is not None

    def new() -> TrainState:
        return TrainState(SMALL.objective(Key(0)), coded, SGD(50.0))

    through, resumed = new(), new()
    start = flat_weights(through)
    for step in range(8):
        if step == 4:  # between two snapshots
            checkpoint.write(tmp_path / "c.safetensors", through)
            checkpoint.read(tmp_path / "c.safetensors", resumed)
        for state in (through, resumed) if step >= 4 else (through,):
            state.step(SMALL.batch_at(Key(1), step), Key(2).fold("step", step))
    assert torch.equal(flat_weights(through), flat_weights(resumed))
    assert (flat_weights(through) - start).norm() > 0.1


def flat_weights(state: TrainState) -> Tensor:
    return torch.cat([leaf.parameter.detach().flatten() for leaf in state.objective.leaves])


def test_the_code_of_zero_order_svrg_pays_for_the_two_estimates_it_does_not_need():
    coded = tiny_study(SMALL, methods=("ZO-SVRG", "ZO-SVRG" + AS_CODED)).lengths()
    assert coded[0].step == coded[1].step == 4.0
    assert coded[0].steps == coded[1].steps


def test_the_code_of_forward_svrg_subtracts_one_direction_until_the_next_snapshot():
    """With the same directions the two estimates cancel at the snapshot; this one is a bias that is no mean of 0."""
    objective, batch = made()
    svrg = method("FmAD-SVRG", SETTINGS)
    coded = svrg.as_coded
    assert coded is not None
    assert not coded.unbiased
    state: Any = coded.estimate(objective, batch, KEY).state  # takes the snapshot
    mu = torch.cat([state.gradient[leaf.name].flatten() for leaf in objective.leaves])

    def subtracted(state: Any, draw: int) -> Tensor:
        key = KEY.fold("draw", draw)
        found = flat(coded.estimate(objective, batch, key, state).gradient)
        return estimated(forward_gradient(), objective, batch, key) + mu - found

    first = subtracted(state, 0)
    for draw in range(1, 4):
        torch.testing.assert_close(subtracted(state, draw), first)
    # It is an estimate along one direction, longer than the gradient by about sqrt(d), and not mu.
    assert first.norm() > 3 * true_gradient(objective, batch, KEY).norm()
    assert not torch.allclose(first, mu)
    again: Any = coded.estimate(objective, batch, KEY, state._replace(step=2)).state  # every=2: the second snapshot
    mu = torch.cat([again.gradient[leaf.name].flatten() for leaf in objective.leaves])
    assert not torch.allclose(subtracted(again, 0), first)
    named = svrg.estimator.estimate(objective, batch, KEY)
    moved = svrg.estimator.estimate(objective, batch, KEY.fold("draw", 5), named.state)
    torch.testing.assert_close(flat(moved.gradient), flat(named.gradient))  # at the snapshot g is mu
    with pytest.raises(BadInput, match="1 or more"):
        type(coded)(forward_gradient(), 0)  # type: ignore[call-arg]


def test_the_code_of_sparse_chooses_the_largest_weights_and_updates_no_other():
    objective, batch = made()
    sparse = method("FmAD-Sparse", SETTINGS)
    assert sparse.as_coded is not None
    named, coded = (estimated(each, objective, batch, KEY) for each in (sparse.estimator, sparse.as_coded))
    magnitudes = torch.cat([leaf.parameter.detach().abs().flatten() for leaf in objective.leaves])
    for found in (named, coded):
        assert 0.1 < (found != 0).double().mean() < 0.35
    start = 0
    for leaf in objective.leaves:
        here = slice(start, start := start + leaf.parameter.numel())
        sizes, chosen = magnitudes[here], coded[here] != 0
        assert sizes[chosen].min() >= sizes[~chosen].max() if (~chosen).any() else True


# ---- the study


def _tiny_texts() -> TextSplits:
    texts = tuple(f"{question} is {a} {b}" for question in ("who", "what", "where") for a in "abcdef" for b in "abcd")
    labels = tuple(("who", "what", "where").index(text.split()[0]) for text in texts)
    return TextSplits(*(Texts(texts[part::3], labels[part::3]) for part in range(3)))


@value
class Toy(TextTask):
    """The first word of a text is its class."""

    model: Architecture = Encoder()
    batch: int = 6
    length: int = 8
    models: ClassVar[dict[str, Architecture]] = {}
    words: ClassVar[tuple[str, ...]] = ("a", "b", "c")
    prompt: ClassVar[str] = "{text} :"

    @property
    def texts(self) -> Callable[[], TextSplits]:
        return _tiny_texts


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    weights = tiny_models.encoder(tmp_path_factory.mktemp("tiny"))
    return Toy(Encoder(weights, lora=Lora(dropout=0.0)))


@dataclass(frozen=True)
class InProcess(Executor):
    """Run trials one after the other in this process, which has imported transformers already."""

    def ready(self) -> AbstractContextManager[None]:
        return nullcontext()

    def perform(self, trials: Sequence[Trial], work: Work) -> Generator[dict[str, Any]]:
        for trial in trials:
            yield perform(trial, work.code, work.folder, work.every)


SMALL = Digits(model=Mlp(), batch=512)


def tiny_study(task: Task, **changed: object) -> Reproduction:
    options = {"methods": (*DISTINCT, *(each.name + AS_CODED for each in CODED)), "forwards": 60.0, "seeds": 1}
    options |= {"rates": (1e-2,), "more": 0, "settings": SETTINGS} | changed
    return Reproduction(task, **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_no_method_gets_more_flops_than_the_budget(toy: Toy):
    reproduction = tiny_study(toy)
    lengths = {each.name: each for each in reproduction.lengths()}
    assert tuple(lengths) == reproduction.methods
    for each in lengths.values():
        assert 45 < each.steps * each.forwards <= 60 * (1 + 1e-9), each
    # Adapters only: backprop needs 2 forwards a step and a little for the head, checkpointed one more.
    assert 1.5 < lengths["BP-Vanilla"].forwards < 2.3 < lengths["BP-Checkpointing"].forwards < 3.4
    assert 0 < forward_seconds(toy, 1) < 60


def test_every_method_gets_as_many_flops_and_no_more():
    few = ("BP-Vanilla", "MeZO", "ZO-Multiple", "ZO-Adaptive", "ZO-SVRG")
    reproduction = tiny_study(SMALL, methods=few)
    lengths = {each.name: each for each in reproduction.lengths()}
    assert tuple(lengths) == few
    assert 2 < lengths["BP-Vanilla"].forwards <= 3
    assert (lengths["MeZO"].forwards, lengths["MeZO"].steps) == (2.0, 30)
    assert (lengths["ZO-Multiple"].forwards, lengths["ZO-Multiple"].steps) == (6.0, 10)
    assert (lengths["ZO-Adaptive"].forwards, lengths["ZO-Adaptive"].steps) == (6.0, 10)
    # SVRG: 4 forwards a step, and at every second step a pass over 3 batches with 2 forwards each: 8 in 15 steps.
    assert len(SMALL.splits().train.x) > 2 * SMALL.batch
    assert lengths["ZO-SVRG"].forwards == pytest.approx(
        4 + 6 * -(-lengths["ZO-SVRG"].steps // 2) / lengths["ZO-SVRG"].steps
    )
    assert lengths["ZO-SVRG"].steps == 8
    one = replace(reproduction, methods=("MeZO",))
    scores = 300 / 512  # forward passes of a batch, for a split
    tune, final = (len(evaluated_steps(30, phase)) for phase in ("tune", "final"))
    expected = 2 * 30 * 2.0 + scores * (tune + final + 1)
    assert one.hours(3600.0, one.lengths()) == pytest.approx(expected)


@pytest.mark.parametrize("every", [1, 3, 100])
@pytest.mark.parametrize("snapshot", [0.0, 7.0])
@pytest.mark.parametrize("budget", [0.5, 2.0, 9.0, 11.0, 60.0, 61.9])
def test_the_number_of_steps_is_the_largest_that_the_budget_pays_for(budget: float, snapshot: float, every: int):
    def cost(steps: int) -> float:
        return steps * 2.0 + -(-steps // every) * snapshot

    steps = _most_steps(budget, 2.0, snapshot, every)
    assert cost(steps) <= budget < cost(steps + 1)


def check_study(task: Task, folder: Path, targets: int) -> None:
    """Run a study of three methods, and check its records, its resumption, its table and its page."""
    few = ("BP-Checkpointing", "ZO-SVRG", "ZO-SVRG" + AS_CODED)
    reproduction = tiny_study(task, methods=few, forwards=24.0, rates=(1e-3, 1e-2))
    run = {"executor": InProcess(), "measure": False}
    ran = list(run_study(reproduction.study, folder, **run))  # type: ignore[arg-type]
    assert [trial.status for trial in ran] == ["finished"] * 9, [trial.reason for trial in ran]
    results = read(folder)
    for name in few:
        mine = [trial for trial in results.trials if trial.method == name]
        assert sorted(trial.lr for trial in mine if trial.phase == "tune") == [1e-3, 1e-2]
        (final,) = finals(results.trials, name)
        assert final.test is not None
        assert final.test.targets == targets
    assert list(run_study(reproduction.study, folder, **run)) == []  # type: ignore[arg-type]
    text = page(results, reproduction, reproduction.lengths(), "the command", "`here`")
    assert text.count("inconclusive") >= 3, "one seed decides nothing"
    assert all(f"| {name} |" in text for name in few)
    assert method("ZO-SVRG").difference in text
    more = replace(reproduction, seeds=2)
    assert len(list(run_study(more.study, folder, **run))) == 3  # type: ignore[arg-type]


def test_the_study_tunes_all_methods_alike_and_resumes(tmp_path: Path):
    check_study(SMALL, tmp_path, targets=300)


@pytest.mark.slow
def test_the_study_runs_on_a_pretrained_model(toy: Toy, tmp_path: Path):
    check_study(toy, tmp_path, targets=24)


def test_names_in_any_case_are_those_of_the_paper_each_once():
    typed = ("bp-checkpointing", "MEZO", "zo-svrg, As Coded", "MeZO", "BP-Checkpointing", "zo-svrg")
    reproduction = tiny_study(SMALL, methods=typed)
    names = ("BP-Checkpointing", "MeZO", "ZO-SVRG, as coded", "ZO-SVRG")
    assert reproduction.methods == names
    assert tuple(each.name for each in reproduction.lengths()) == names
    assert [is_compared(each) for each in reproduction.methods] == [False, True, False, True]
    (coded,) = [each.name for each in reproduction.named() if each.as_coded is not None]
    assert coded == "ZO-SVRG"


def test_a_reproduction_explains_what_it_refuses():
    with pytest.raises(BadInput, match="no method 'zo'"):
        Reproduction(methods=("zo",))
    with pytest.raises(BadInput, match="computes what the name says"):
        Reproduction(methods=("MeZO" + AS_CODED,))
    for wrong, sentence in (
        ({"forwards": 0.0}, r"forwards of a Reproduction is a number above 0, not 0\.0\."),
        ({"forwards": math.inf}, "a number above 0, not inf"),
        ({"forwards": math.nan}, "a number above 0, not nan"),
        ({"seeds": 0}, r"seeds of a Reproduction is 1 or more, not 0\."),
        ({"more": -1}, r"more of a Reproduction is 0 or more, not -1\."),
        ({"rates": ()}, "rates of a Reproduction are one learning rate or more"),
        ({"methods": ()}, "methods of a Reproduction are one name of the paper or more"),
        ({"target": 80.0}, "above 0 and at most 1, not 80"),
    ):
        with pytest.raises(BadInput, match=sentence):
            Reproduction(**wrong)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=r"ZO-SVRG needs 10 forwards for its first step, and the budget is 9"):
        tiny_study(SMALL, methods=("ZO-SVRG",), forwards=9.0).lengths()


def test_masks_and_accumulation_of_the_methods_are_those_of_the_library():
    assert method("BP-Accumulate").estimator == Accumulated(backprop(), 4)
    assert method("ZO-Sparse").estimator == replace(mezo(), directions=Masked(Smallest(0.01)))
