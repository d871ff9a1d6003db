"""Plans: what fits, which one is recommended, the largest batch, and the figures that are told from fewer runs."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import gradcost
from gradcost import Accumulated, Clipped, Gaussian, Jvp, Probing, Rademacher, Reverse
from gradcost.checkpointing import Segments
from gradcost.checkpointing.policies import Schedule, Selective
from gradcost.cli import spec
from gradcost.core.fake import repeated
from gradcost.core.pytree import batch_size
from gradcost.core.units import size
from gradcost.directions import Coordinates, Sphere
from gradcost.estimators.estimator import Estimator
from gradcost.instruments.memory import MemoryTracker
from gradcost.noise.philox import Normals, Signs
from gradcost.planning import roofline
from gradcost.planning.batch import MOST, largest, resized
from gradcost.planning.candidates import described, label, options
from gradcost.planning.curve import curve
from gradcost.planning.forecast import Forecast, forecast
from gradcost.planning.forecasts import Forecasts
from gradcost.planning.plan import Plan, plan
from gradcost.planning.within import Within
from gradcost.slopes import slope
from gradcost.tasks.task import Batch, cross_entropy
from gradcost.theory.moments import second_moment

ADAM = gradcost.AdamW(1e-3)


def chain(blocks: int = 4, width: int = 32, dtype: torch.dtype = torch.float32) -> gradcost.Objective:
    layers = [layer for _ in range(blocks) for layer in (nn.Linear(width, width), nn.Tanh())]
    return gradcost.Objective(nn.Sequential(*layers, nn.Linear(width, 10)).to(dtype), cross_entropy)


def examples(count: int, width: int = 32) -> Batch:
    return Batch(torch.zeros(count, width), torch.zeros(count, dtype=torch.int64))


def told(estimator: Estimator, objective: gradcost.Objective, batch: Any, **more: Any) -> Forecast:
    found = Forecasts(objective, batch, ADAM, more.get("device", "cpu")).of(estimator)
    assert isinstance(found, Forecast), found
    return found


@pytest.mark.parametrize(
    "estimator",
    [
        gradcost.Accumulated(gradcost.backprop(), 8),
        gradcost.forward_gradient(40),
        gradcost.mezo(probes=9),
    ],
    ids=repr,
)
@pytest.mark.parametrize("width", [32, 3000])
def test_all_counts_of_an_extrapolated_step_are_those_of_the_whole_one(estimator: Estimator, width: int):
    """For CUDA the bytes that tensors request are not those that the allocator rounds up.

    Slopes are blocks of 512 bytes each in a forward pass, and one block for all in the update.
    """
    objective, batch = chain(1, width), examples(640, width)
    objective = gradcost.Objective(objective.model[-1:], cross_entropy)  # type: ignore[index]
    whole = forecast(estimator, objective, batch, ADAM, "cuda")
    found = told(estimator, objective, batch, device="cuda")
    assert found.cuda is not None
    assert whole.cuda is not None
    assert found.cuda.requested == whole.cuda.requested
    slopes = 0 if isinstance(estimator, Accumulated) else 9 * 1024
    for one, other in ((found.peak, whole.peak), (found.cuda.allocated, whole.cuda.allocated)):
        assert other <= one <= other + slopes
    assert found.cuda.reserved >= whole.cuda.reserved


# ---- the plan


@pytest.fixture(scope="module")
def planned() -> Plan:
    return plan(chain(), examples(64), 108_000, optimizer=ADAM)


def test_every_row_is_a_forecast_or_has_a_reason(planned: Plan):
    for row in planned.rows:
        assert (row.forecast is None) == (row.refusal is not None)
        if row.forecast is not None:
            assert row.over == max(row.forecast.peak - planned.budget, 0)
    usual = {row.method for row in planned.rows}
    assert {"backprop()", "checkpointed()", "Reverse(Segments(2))", "mezo(probes=16)", "spsa()"} <= usual
    assert {"Accumulated(checkpointed(), 4)", "forward_gradient(probes=4)"} <= usual
    assert "forward_gradient(probes=4, together=1)" in usual


def test_the_choice_is_the_exact_gradient_that_fits_with_the_fewest_flops(planned: Plan):
    exact = [row.forecast for row in planned.rows if row.fits and row.exact and row.forecast]
    assert planned.chosen is not None
    assert planned.chosen.forecast is not None
    assert planned.chosen.forecast.flops == min(found.flops for found in exact)
    assert planned.sentence.startswith(f"Use {planned.chosen.method}, the cheapest exact gradient that fits")
    again = forecast(planned.choice, chain(), examples(64), ADAM)  # type: ignore[arg-type]
    assert again.peak == planned.chosen.forecast.peak <= planned.budget


def test_among_equally_cheap_exact_gradients_that_fit_the_simplest_is_chosen():
    budget = 1 << 33
    candidates = [Reverse(Selective()), Reverse(Within(budget)), gradcost.checkpointed(), gradcost.backprop()]
    found = plan(chain(), examples(64), budget, candidates, optimizer=ADAM)
    flops = [row.forecast.flops for row in found.rows if row.forecast is not None]
    assert flops[0] == flops[1] == flops[3] < flops[2]  # Selective, Within and backprop
    assert found.choice == gradcost.backprop()


def test_the_choice_fits_when_it_is_run(planned: Plan):
    from gradcost.training.train_state import TrainState

    objective, batch = chain(), examples(64)
    assert planned.choice is not None
    train_state = TrainState(objective, planned.choice, ADAM)
    train_state.step(batch, gradcost.Key(0))
    live = MemoryTracker(objective.model)
    live.register("inputs", batch)
    live.register("optimizer state", train_state.held_tensors())
    with live.followed():
        train_state.step(batch, gradcost.Key(1))
    assert live.memory().peak <= planned.budget


def test_a_plan_prints_as_its_table_and_its_record_is_plain_json(planned: Plan):
    lines = str(planned).splitlines()
    assert lines[0] == planned.sentence
    assert "108,000 bytes = 105 KiB" in lines[2]
    assert lines[4].split() == ["method", "peak", "fits", "forwards", "steps", "×", "(theory)"]  # no empty columns
    assert [line.split("   ")[0].strip() for line in lines[5 : 5 + len(planned.rows)]] == [
        row.method for row in planned.rows
    ]
    record = json.loads(json.dumps(planned.record()))
    assert record["choice"] == planned.chosen.method  # type: ignore[union-attr]
    assert [row["peak"] for row in record["rows"]] == [row.forecast and row.forecast.peak for row in planned.rows]


def test_every_way_of_writing_a_row_is_read_back(planned: Plan):
    for row in planned.rows:
        assert spec.method(label(row.estimator)) == row.estimator
        assert spec.method(repr(row.estimator)) == row.estimator


@pytest.mark.slow
def test_where_no_usual_exact_gradient_fits_micro_batches_of_the_best_schedule_are_tried():
    found = plan(chain(), examples(512), 160_000, optimizer=ADAM)
    assert isinstance(found.choice, Accumulated)
    assert found.chosen is not None
    assert found.chosen.forecast is not None
    again = forecast(found.choice, chain(), examples(512), ADAM)
    assert again.peak <= 160_000
    assert found.chosen.forecast.peak == again.peak
    assert found.chosen.forecast.flops == again.flops


def test_where_only_an_estimate_fits_the_sentence_says_so():
    objective, batch = chain(), examples(64)
    exact = forecast(gradcost.backprop(), objective, batch).peak
    least = forecast(gradcost.mezo(), objective, batch).peak
    found = plan(objective, batch, (exact + least) // 2, [gradcost.backprop(), gradcost.mezo()])
    assert found.choice == gradcost.mezo()
    assert found.least is not None
    assert found.least.forecast.peak <= found.budget < exact  # micro-batches that the plan was not asked about
    assert found.sentence.startswith("None of these exact gradients fits 60.4 KiB, but Within(60.4KiB), 64")
    assert "Use mezo(), which fits" in found.sentence
    assert "times the steps" in found.sentence


@pytest.mark.slow
def test_a_plan_without_an_exact_gradient_says_that_none_was_asked_for():
    """It said "None of these exact gradients fits", and listed none."""
    objective, batch = chain(), examples(64)
    found = plan(objective, batch, 1 << 30, [gradcost.mezo()])
    assert found.choice == gradcost.mezo()
    assert found.sentence.startswith("No exact gradient was asked for, but Within(1GiB) fits 1 GiB: ")


def test_where_nothing_fits_the_least_is_named():
    found = plan(chain(), examples(64), 30_000, optimizer=ADAM)
    assert found.choice is None
    assert found.least is not None
    peaks = [row.forecast.peak for row in found.rows if row.forecast is not None and row.exact]
    assert found.least.forecast.peak <= min(peaks)
    assert found.sentence.startswith("29.3 KiB is less than any exact gradient needs with these settings: ")
    assert size(found.least.forecast.peak) in found.sentence
    assert "needs" in found.sentence.split("). ")[1]
    again = forecast(found.least.estimator, chain(), examples(64), ADAM)
    assert again.peak == found.least.forecast.peak


def test_a_model_without_blocks_is_planned_and_refusals_are_kept():
    objective = gradcost.Objective(nn.Linear(8, 3), cross_entropy)
    found = plan(objective, examples(4, 8), 1 << 20, [gradcost.backprop(), gradcost.checkpointed()])
    assert found.choice == gradcost.backprop()
    assert "no repeated blocks" in (found.rows[1].refusal or "")
    assert found.rows[1].refusal in str(found)  # type: ignore[operator]
    assert plan(objective, examples(4, 8), 1 << 20).choice == gradcost.backprop()


def test_estimated_seconds_decide_where_the_rates_are_known(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(roofline, "stored_rates", lambda device: SimpleNamespace())
    monkeypatch.setattr(roofline, "seconds", lambda counts, rates, dtype, stream: 1e9 / counts.flops)
    found = plan(chain(), examples(64), 1 << 20, [gradcost.backprop(), gradcost.checkpointed()])
    assert found.choice == gradcost.checkpointed()  # here, what computes more is faster
    assert ", the fastest exact gradient that fits" in found.sentence
    assert "--calibrate" not in str(found)


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_is_above_zero(budget: int):
    with pytest.raises(ValueError, match="above 0"):
        plan(chain(), examples(4), budget)


def test_a_batch_that_the_loss_rejects_is_a_sentence():
    with pytest.raises(ValueError, match="cannot be evaluated on this batch: RuntimeError"):
        plan(chain(), examples(4, 31), 1 << 20)


def test_offloading_whose_transfers_no_figure_counts_is_the_last_resort():
    both = [Reverse(gradcost.checkpointing.Offloaded()), gradcost.checkpointed()]
    found = plan(chain(), examples(64), 1 << 20, both, device="cuda")
    assert found.choice == gradcost.checkpointed()
    assert "transfers to the CPU" in str(found)
    assert ", the cheapest exact gradient that fits without offloading: " in found.sentence
    assert plan(chain(), examples(64), 1 << 20, both[:1], device="cuda").choice == both[0]


def test_micro_batches_of_a_model_with_batch_norm_are_the_last_resort():
    """Each has its own statistics, so their gradient is not that of the batch."""
    objective, batch = chain(), examples(8)
    objective.model.add_module("9", nn.BatchNorm1d(10))
    methods = [gradcost.checkpointed(), Accumulated(gradcost.backprop(), 2)]
    found = plan(objective, batch, 1 << 30, methods)
    assert found.choice == gradcost.checkpointed()
    assert any("micro-batches: 9 (BatchNorm1d) uses the statistics of each" in line for line in found.lines())
    assert plan(objective, batch, 1 << 30, methods[1:]).choice == methods[1]
    objective.model.eval()
    found = plan(objective, batch, 1 << 30, methods)
    assert found.choice == methods[1]
    assert not any("micro-batches" in line for line in found.lines())


def test_a_plan_for_cuda_tells_what_the_allocator_reserves():
    small, large = (plan(chain(), examples(64), budget, [Reverse()], device="cuda") for budget in (1 << 20, 1 << 30))
    for found in (small, large):
        assert any("CUDA's allocator reserves up to" in line for line in found.lines())
        beyond = "Its tensors fit, but with what CUDA's allocator reserves it may take "
        assert (beyond in found.sentence) is (found is small)
        reserved = found.record()["rows"][0]["reserved"]
        assert reserved == found.rows[0].forecast.cuda.reserved  # type: ignore[union-attr]
        assert found.rows[0].forecast.peak <= reserved  # type: ignore[union-attr]
    assert plan(chain(), examples(64), 1 << 20, [Reverse()]).record()["rows"][0]["reserved"] is None


def test_only_a_gpu_is_offered_the_cpu_s_memory():
    def kinds(device: str) -> set[str]:
        return {type(e.saving).__name__ for e in options(chain(), 8, 1, device) if isinstance(e, Reverse)}

    assert kinds("cuda") - kinds("cpu") == {"Offloaded"}


# ---- told from fewer runs

MANY = [
    gradcost.mezo(probes=7),
    gradcost.spsa(probes=16),
    gradcost.forward_gradient(probes=5),
    Probing(Jvp(together=2), Gaussian(), 8),
    Probing(gradcost.ForwardDifference(), Rademacher(), 6),
    Accumulated(gradcost.mezo(probes=5), 2),
    Clipped(gradcost.spsa(probes=6), 1.0),
]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("estimator", MANY, ids=label)
def test_many_probes_are_told_from_two(estimator: Estimator, device: str, monkeypatch: pytest.MonkeyPatch):
    """Every figure is that of a simulation of all probes."""
    objective, batch = chain(2), examples(16)
    runs = 0

    def counted(run: Any, items: Any) -> Any:
        def counting(item: Any) -> Any:
            nonlocal runs
            runs += 1
            return run(item)

        return repeated(counting, items)

    with monkeypatch.context() as patch:
        patch.setattr(slope, "repeated", lambda run, items: [run(item) for item in items])
        whole = forecast(estimator, objective, batch, ADAM, device)
    monkeypatch.setattr(slope, "repeated", counted)
    found = told(estimator, objective, batch, device=device)
    assert runs <= 3  # one of them in `objection`
    assert (found.counts, found.forward, found.message) == (whole.counts, whole.forward, whole.message)
    assert (found.peak, found.breakdown) == (whole.peak, whole.breakdown)
    assert (found.memory.operator, found.memory.module) == (whole.memory.operator, whole.memory.module)
    if found.cuda is not None and whole.cuda is not None:
        assert (found.cuda.requested, found.cuda.allocated) == (whole.cuda.requested, whole.cuda.allocated)
        assert found.cuda.reserved == whole.cuda.reserved


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "estimator", [Clipped(gradcost.spsa(probes=90), 1.0), Probing(Jvp(together=3), Gaussian(), 200)], ids=label
)
def test_more_than_64_passes_are_told_from_64(estimator: Estimator, device: str):
    """The last of 67 passes with three directions has two. On CUDA, the block of all slopes is rounded up."""
    objective, batch = chain(2), examples(16)
    found, whole = (
        told(estimator, objective, batch, device=device),
        forecast(estimator, objective, batch, ADAM, device),
    )
    assert (found.estimator, found.flops, found.forward) == (estimator, whole.flops, whole.forward)
    assert (found.counts.elementwise, found.counts.drawn) == (whole.counts.elementwise, whole.counts.drawn)
    assert found.message == whole.message
    assert abs(found.peak - whole.peak) <= (0 if device == "cpu" else 512)
    assert found.breakdown["parameters"] == whole.breakdown["parameters"]
    assert sum(found.breakdown.values()) == found.peak


@pytest.mark.parametrize("parts", [4, 8, 16])
@pytest.mark.parametrize(
    "inner", [gradcost.backprop(), gradcost.checkpointed(), Reverse(Segments(2)), gradcost.mezo()], ids=label
)
def test_many_micro_batches_are_told_from_three(inner: Estimator, parts: int):
    objective, batch = chain(), examples(32)
    estimator = Accumulated(inner, parts)
    found, whole = told(estimator, objective, batch), forecast(estimator, objective, batch, ADAM)
    assert found.estimator == estimator
    assert (found.flops, found.forward, found.matmuls) == (whole.flops, whole.forward, whole.matmuls)
    assert found.peak == whole.peak
    assert found.breakdown == whole.breakdown


@pytest.mark.parametrize("count", [100, 1283, 70_000])
@pytest.mark.parametrize("seeds", [[3], [3, 4], [3, 4, 5]], ids=len)
@pytest.mark.parametrize("stream", [Signs(), Normals()], ids=repr)
def test_noise_on_fakes_takes_the_memory_of_noise(stream: Any, seeds: list[int], count: int):
    from torch._subclasses.fake_tensor import FakeTensorMode

    from gradcost.noise import add as noise

    def peak(base: torch.Tensor) -> int:
        out, live = torch.empty_like(base), MemoryTracker(nn.Linear(1, 1))
        live.register("inputs", [base, out])
        with live.followed():
            noise.reference(stream, seeds, [1.0] * len(seeds), 5, base, out)
        return live.memory().peak

    real = peak(torch.zeros(count))
    with FakeTensorMode():
        assert abs(peak(torch.zeros(count)) - real) <= 64


# ---- the largest batch


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 50), st.integers(1, 30), st.integers(1, 9), st.integers(1, 64), st.integers(1, 5), st.data())
def test_the_end_is_found_on_any_ascending_line_with_kinks(base, slope, start, kink, floor, data):
    """Also where the line that two points draw leads astray."""
    extra = data.draw(st.integers(0, 100))
    budget = data.draw(st.integers(0, 2000))

    def peak(size: int) -> int | None:
        return None if size < floor else base + slope * size + (extra * (size - kink) if size > kink else 0)

    found = largest(peak, budget, start, floor)
    fitting = [size for size in range(1, 2100) if (p := peak(size)) is not None and p <= budget]
    assert found == max(fitting, default=0)


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 10**5)), min_size=1, max_size=4),
    st.integers(10**5, 10**7),
    st.integers(1, 64),
)
def test_few_sizes_are_tried(lines, budget, start):
    """A chord with one fixed end took up to 27 sizes on two lines; 13 was the most in 30,000 random cases."""
    tried = []

    def peak(size: int) -> int:
        tried.append(size)
        return max(base + slope * size for base, slope in lines)

    found = largest(peak, budget, start)
    assert found == min((max(budget - base, 0) // slope for base, slope in lines), default=0)
    assert len(set(tried)) == len(tried) <= 16


def test_what_does_not_grow_has_no_largest():
    assert largest(lambda size: 10, 20, 4) == MOST
    assert largest(lambda size: 10, 5, 4) == 0


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(
        [
            gradcost.backprop(),
            gradcost.checkpointed(),
            Reverse(Segments(2)),
            Reverse(Selective()),
            Accumulated(gradcost.checkpointed(), 3),
            gradcost.mezo(),
            gradcost.forward_gradient(),
        ]
    ),
    st.integers(60_000, 400_000),
    st.integers(1, 40),
)
def test_the_largest_batch_fits_and_one_more_does_not(estimator: Estimator, budget: int, start: int):
    objective, batch = chain(3), examples(start)
    found = Forecasts(objective, batch, ADAM, "cpu").largest(estimator, budget)

    def peak(count: int) -> int:
        return forecast(estimator, objective, resized(batch, count), ADAM).peak

    floor = estimator.parts if isinstance(estimator, Accumulated) else 1
    assert found == 0 or peak(found) <= budget
    assert peak(max(found + 1, floor)) > budget


def test_the_largest_batch_of_a_schedule_within_the_budget_is_that_of_the_least_schedule():
    objective, budget = chain(6), 200_000
    forecasts = Forecasts(objective, examples(32), ADAM, "cpu")
    most = forecasts.largest(forecasts.within(budget)[0], budget)
    assert most >= forecasts.largest(gradcost.checkpointed(), budget) > 0
    assert (forecasts.least(1, most) or 0) <= budget < (forecasts.least(1, most + 1) or 0)
    full = Forecasts(objective, examples(most), ADAM, "cpu").within(budget)[1]
    assert isinstance(full, Forecast)
    assert full.peak <= budget


def test_a_plan_tells_the_largest_batch_of_each_row():
    found = plan(chain(2), examples(8), 60_000, [gradcost.backprop(), gradcost.mezo()], ADAM, largest=True)
    assert all(row.largest is not None and row.largest > 8 for row in found.rows)
    assert str(found.rows[0].largest) in str(found).splitlines()[5]


# ---- batches in other sizes


def test_a_batch_is_resized_without_data():
    batch = {"x": torch.rand(4, 3), "tokens": torch.arange(8).reshape(4, 2), "scale": torch.tensor(2.0), "n": 5}
    made = resized(batch, 7)
    assert made["x"].shape == (7, 3)
    assert made["x"].is_meta
    assert made["tokens"][:, 0].tolist() == [0, 2, 4, 6, 0, 2, 4]
    assert made["scale"] is batch["scale"]
    assert made["n"] == 5
    assert batch_size(made) == 7
    assert resized(batch, 1 << 22)["tokens"].is_meta


@pytest.mark.parametrize(("batch", "what"), [((torch.zeros(2), torch.zeros(3)), "here it is 2, 3"), (3, "none has")])
def test_a_batch_without_examples_is_a_sentence(batch: Any, what: str):
    with pytest.raises(ValueError, match=what):
        batch_size(batch)


# ---- theory


@pytest.mark.parametrize("probes", [1, 2, 3, 5, 7])
def test_the_second_moment_of_coordinates_is_the_mean_over_all_orders(probes: int):
    d = 3
    gradient = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    moments = []
    rounds = [list(itertools.permutations(range(d)))] * -(-probes // d)
    for orders in itertools.product(*rounds):
        drawn = [index for order in orders for index in order][:probes]
        estimate = torch.zeros(d, dtype=torch.float64)
        for index in drawn:
            estimate[index] += d * gradient[index] / probes
        moments.append(float(estimate.square().sum()))
    mean = sum(moments) / len(moments)
    expected = second_moment(Probing(Jvp(), Coordinates(), probes), d)
    assert mean / float(gradient.square().sum()) == pytest.approx(expected, rel=1e-12)


def test_second_moments():
    assert second_moment(gradcost.backprop(), 100) == 1
    assert second_moment(gradcost.forward_gradient(4), 99) == 26
    assert second_moment(gradcost.spsa(), 99) == 99
    assert second_moment(Probing(Jvp(), Sphere(), 2), 99) == 50
    assert second_moment(Accumulated(Clipped(gradcost.mezo(), 1.0), 2), 9) == 11
    with pytest.raises(ValueError, match="must be 1 or more"):
        second_moment(gradcost.mezo(), 0)


# ---- words


def test_long_expressions_are_said_in_words():
    nested = Reverse(Schedule((((2,), 1), 1)))
    assert described(nested) == "nested checkpointing"
    assert described(Accumulated(nested, 4)) == "nested checkpointing, 4 micro-batches"
    assert described(Reverse(Within(24 << 30))) == "Within(24GiB)"
    assert label(replace(gradcost.mezo(), probes=3)) == "mezo(probes=3)"
    assert label(gradcost.mezo(eps=0.01)) == "mezo(eps=0.01)"


@pytest.mark.parametrize(
    "written",
    [
        "backprop()",
        "checkpointed()",
        "fzoo()",
        "fzoo(probes=4)",
        "mezo(eps=None, probes=4)",
        "forward_gradient(probes=4, together=1)",
        "zo_svrg(every=7)",
        "addax(longest=12, weight=0.1)",
        "hizoo()",
        "multi_tangent()",
        "activity_perturbation()",
        "zo_sgd_sign()",
        "Clipped(fzoo(), 2.0)",
        "Accumulated(mezo(), 4)",
        "Probing(Jvp(), Rademacher(), 3)",
    ],
)
def test_a_preset_keeps_the_name_that_it_is_known_by(written: str):
    """`fzoo()` was listed as Probing(ForwardDifference(0.001), Rademacher(), probes=8, combine=Normalized())."""
    assert label(spec.method(written)) == written


def test_a_field_that_no_preset_takes_is_no_preset():
    odd = replace(gradcost.mezo(), slope=gradcost.CentralDifference(0.5), directions=Sphere())
    assert label(odd) == "Probing(CentralDifference(0.5), Sphere())"


def test_the_curve_has_both_kinds_of_checkpointing_and_descends():
    points = curve(chain(6), examples(64), ADAM, points=5)
    segments = [point for point in points if point["curve"] == "Segments(k)"]
    best = [point for point in points if point["curve"] == "best schedules"]
    assert segments[0]["method"] == "Reverse(Segments(1))"
    assert 2 <= len(best) <= 5
    assert [point["forwards"] for point in best] == sorted((point["forwards"] for point in best), reverse=True)
    assert min(point["peak"] for point in best) <= min(point["peak"] for point in segments)
