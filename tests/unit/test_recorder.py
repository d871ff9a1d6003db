"""Recorder: spikes and divergence on a series, and on a real training whose bits must not change."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import gradcost
from gradcost.checks.recorder import Recorder, Recording
from gradcost.core.divergence import RISE, DivergenceMonitor
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.clipped import Clipped
from gradcost.estimators.presets import backprop, forward_gradient, mezo, zo_svrg
from gradcost.tasks.digits import Digits
from gradcost.training.loop import StepResult, train
from gradcost.training.optimizers import SGD
from gradcost.training.spikes import SlopeMonitor


def noisy(seed: int, steps: int) -> list[float]:
    draw = random.Random(seed)
    return [draw.gauss(0.0, 2.0) for _ in range(steps)]


def series(slopes: list[float], losses: list[float], **how: Any) -> SlopeMonitor:
    found = SlopeMonitor(**how)
    for step, (slope, loss) in enumerate(zip(slopes, losses, strict=True)):
        found.add(step, loss, [slope])
    return found


def test_normal_slopes_have_no_spike_and_a_cliff_is_one():
    slopes = noisy(0, 3000)
    assert series(slopes, [1.0] * 3000).spikes == []
    slopes[2000] = -416.6  # the largest that was published of a training before its explosion
    found = series(slopes, [1.0] * 3000)
    assert [(spike.step, spike.slope) for spike in found.spikes] == [(2000, 416.6)]
    assert found.spikes[0].threshold < 30
    assert found.largest == 416.6
    assert found.diverged is None
    assert found.first_warning is None


def test_the_threshold_is_the_median_and_eight_robust_standard_deviations():
    """Slopes of size 1 and 3 have the median 2 and the median absolute deviation 1."""
    (spike,) = series([*([1.0, -3.0] * 50), 14.0], [1.0] * 101).spikes
    assert spike.threshold == pytest.approx(2 + 8 * 1.4826)
    assert series([*([1.0, -3.0] * 50), 13.8], [1.0] * 101).spikes == []


def test_spikes_hide_no_spike_after_them():
    """The median and its deviation are robust: ten spikes in the window raise the threshold by little."""
    slopes = noisy(1, 400)
    for step in range(300, 400, 10):
        slopes[step] = 400.0
    assert [spike.step for spike in series(slopes, [1.0] * 400).spikes] == list(range(300, 400, 10))


@pytest.mark.parametrize("end", [math.nan, math.inf, 9.1])
def test_divergence_is_a_loss_that_is_no_number_or_rose_and_its_herald_the_first_spike_before(end: float):
    slopes = noisy(2, 500)
    slopes[50] = 300.0  # too long before the end to have to do with it
    slopes[460], slopes[470], slopes[495] = 200.0, 300.0, 300.0
    losses = [3.0] * 490 + [end] * 10
    found = series(slopes, losses, window=100, loss=DivergenceMonitor(rise=3.0, patience=9))
    assert found.diverged == 490
    assert found.first_warning is not None
    assert found.first_warning.step == 460
    brief = DivergenceMonitor(rise=3.0, patience=9)
    assert series(slopes, losses, window=10, loss=brief).first_warning is None
    assert series(slopes, [3.0] * 490 + [8.9] * 10, loss=DivergenceMonitor(3.0, 0)).diverged is None


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [
        ([-1.0, -1.5, -0.5, 0.9], None),
        ([-1.0, 1.1], 1),
        ([0.0, 1e-9, 5.0], None),
        ([0.0, math.inf], 1),
        ([math.inf, 1.0], 0),
        ([math.nan], 0),
    ],
)
def test_a_divergence_is_told_of_losses_of_any_sign(losses: list[float], diverged: int | None):
    found = SlopeMonitor(loss=DivergenceMonitor(rise=3.0, patience=0))
    for step, loss in enumerate(losses):
        found.add(step, loss, [])
    assert found.diverged == diverged


def test_a_loss_far_above_the_first_is_a_divergence_only_where_it_stays_there():
    far = 2.0 * RISE + 1
    assert series([1.0] * 200, [2.0] * 100 + [far] * 50 + [2.0] * 50).diverged is None
    found = series([1.0] * 200, [2.0] * 100 + [far] * 51 + [2.0] * 49)
    assert found.diverged == 100
    assert found.loss.reason == "the loss stayed above 200, 100 times the first loss, from step 100 to step 150"
    assert series([1.0] * 200, [2.0] * 100 + [2.0 * RISE] * 100).diverged is None


def test_slopes_that_are_mostly_zero_have_no_spikes():
    found, chance = SlopeMonitor(), random.Random(0)
    for step in range(1000):
        found.add(step, 1.0, [0.0 if chance.random() < 0.9 else chance.gauss(0, 1)])
    assert found.spikes == []


def test_a_series_goes_on_from_plain_data():
    chance = random.Random(1)
    slopes = [chance.gauss(0, 1) for _ in range(400)]
    slopes[300] = 100.0
    whole, half = SlopeMonitor(), SlopeMonitor()
    for step, slope in enumerate(slopes):
        whole.add(step, 1.0, [slope])
        if step < 350:
            half.add(step, 1.0, [slope])
    half = SlopeMonitor.of(json.loads(json.dumps(half.plain())))
    for step, slope in enumerate(slopes[350:], start=350):
        half.add(step, 1.0, [slope])
    assert half == whole
    assert [spike.step for spike in half.spikes] == [300]


def test_a_slope_that_is_no_number_is_a_spike_and_spoils_no_threshold():
    found = series([*noisy(3, 50), math.nan, 2.0, math.inf, 1.0], [1.0] * 54)
    assert [spike.step for spike in found.spikes] == [50, 52]


ESTIMATORS = {
    "forward": forward_gradient(2),
    "clipped": Clipped(mezo(), 0.5),
    "backprop": backprop(),
    "accumulated": Accumulated(forward_gradient(), 2),
    "stateful": zo_svrg(every=3),
}


class Drops(nn.Module):
    """Digits with dropout and a batch norm: what a comparison with side effects would change."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 10)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Task:
    """Digits on that model."""

    def objective(self, key: Key) -> Objective:
        from gradcost.core.isolation import seeded_generators
        from gradcost.tasks.task import cross_entropy

        with seeded_generators(key):
            return Objective(Drops(), cross_entropy, data=Digits().once_through)

    def batch_at(self, key: Key, step: int) -> Any:
        return Digits().batch_at(key, step)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_training_is_the_same_bit_for_bit_with_a_recorder(name: str):
    def run(follow: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        losses, last = [], None
        for step in follow(train(Task(), ESTIMATORS[name], SGD(0.01, momentum=0.9), steps=7)):
            losses.append(step.loss)
            last = step
        assert last is not None
        return losses, [*last.objective.model.state_dict().values()]

    bare = run(lambda steps: steps)
    recordings: list[Recording] = []

    def follow(steps: Iterator[StepResult]) -> Recording:
        recordings.append(Recorder(every=2, draws=2).following(steps))
        return recordings[0]

    recorded = run(follow)
    for one, other in zip(itertools.chain(*bare), itertools.chain(*recorded), strict=True):
        assert torch.equal(one, other)
    (recording,) = recordings
    assert [alignment.step for alignment in recording.alignments] == [0, 2, 4, 6]
    if name == "backprop":
        assert all(abs(alignment.cosine - 1) < 1e-6 for alignment in recording.alignments)
        assert all(abs(alignment.ratio - 1) < 1e-6 for alignment in recording.alignments)
    else:
        assert all(abs(alignment.cosine) < 0.9 for alignment in recording.alignments)


def test_a_forward_gradient_at_too_high_a_rate_diverges_after_a_spike_and_the_summary_says_so():
    recorder = Recorder(every=100, rise=3.0)
    recording = recorder.following(train(Digits(), forward_gradient(), SGD(0.02), steps=400))
    steps = list(recording)
    losses = [float(step.loss) for step in steps]
    diverged = recording.series.diverged
    assert diverged is not None
    assert losses[diverged] > 3 * losses[0]
    assert max(losses[:diverged]) <= 3 * losses[0]
    first_warning = recording.series.first_warning
    assert first_warning is not None
    assert 0 < diverged - first_warning.step <= 200
    slopes = sorted(abs(float(step.slopes[0])) for step in steps[: first_warning.step] if step.slopes is not None)
    assert first_warning.slope > 3 * slopes[len(slopes) // 2]
    assert f"diverged          at step {diverged}; first spike" in str(recording)
    assert json.loads(json.dumps(recording.record()))["first spike before"]["step"] == first_warning.step


def test_a_low_rate_does_not_diverge_and_a_clip_is_counted():
    clipped = Clipped(forward_gradient(), 0.2)
    recording = Recorder(every=50).following(train(Digits(), clipped, SGD(0.003), steps=100))
    rates = [step.clipped for step in recording]
    assert recording.series.diverged is None
    assert recording.clip_rate == pytest.approx(sum(rate or 0.0 for rate in rates) / 100)
    assert recording.clip_rate is not None
    assert 0 < recording.clip_rate < 1
    assert recording.series.largest > 0.2  # before the clip
    assert "clipped" in str(recording)


def test_numbers_are_read_at_a_look_and_not_at_each_step():
    recording = Recorder(every=5).following(train(Digits(), mezo(), SGD(0.01), steps=8))
    read = []
    for _ in recording:
        read.append(recording.series.slopes)
    assert read == [1, 1, 1, 1, 1, 6, 6, 6]
    assert recording.series.slopes == 8


@pytest.mark.parametrize("wrong", ["every=0", "draws=0", "window=0", "deviations=0.0", "rise=-1.0"])
def test_a_recorder_that_cannot_record_is_refused_in_a_sentence(wrong: str):
    with pytest.raises(ValueError, match=f"{wrong.split('=')[0]} of a Recorder is"):
        eval(f"Recorder({wrong})", {"Recorder": gradcost.checks.Recorder})
