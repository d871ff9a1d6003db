"""A training followed at a small cost: spikes, clips, and how near the estimates come to the gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from torch import Tensor

from gradcost.checks.quality import draw
from gradcost.checks.reference import Reference
from gradcost.checks.report import short
from gradcost.core.errors import BadInput
from gradcost.core.value import value
from gradcost.estimators.structure import micro_batches
from gradcost.training.loop import StepResult
from gradcost.training.spikes import SlopeMonitor


@value
class Recorder:
    """Looks at a training every `every` steps: `draws` fresh estimates beside backpropagation on the step's batch.

        recording = Recorder(every=100).following(train(task, estimator, optimizer, steps=1000))
        for step in recording:
            ...
        print(recording)

    Costs `draws` estimates and one backpropagation (one more a draw where layers draw at random) and three forwards
    every `every` steps, with memory for one whole gradient then; between, it keeps a loss and the slopes of each
    step and reads no number of them. Law: the training is the same, bit for bit, with it and without.

    A slope is a spike when it is `deviations` robust standard deviations above the median of the last `window`
    ones; the training has diverged when its loss is no number or above `rise` times the first one (see `Series`).

    Raises: ValueError when every, draws or window < 1, or deviations or rise is not above 0.
    """

    every: int = 100
    draws: int = 1
    window: int = 200
    deviations: float = 8.0
    rise: float = 3.0

    def __post_init__(self) -> None:
        for name in ("every", "draws", "window"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} of a Recorder is 1 or more, not {getattr(self, name)!r}.")
        for name in ("deviations", "rise"):
            if not getattr(self, name) > 0:
                raise BadInput(f"{name} of a Recorder is a factor above 0, not {getattr(self, name)!r}.")

    def following(self, steps: Iterable[StepResult]) -> Recording:
        """The same steps, and what is found of them."""
        return Recording(self, steps)


@dataclass(frozen=True)
class Look:
    """The estimates at one moment: mean cosine with the gradient, and mean |g| / |grad|."""

    step: int
    cosine: float
    ratio: float


class Recording:
    """A training as it is followed: iterate over it for the steps, print it for what was found so far.

    series: the slopes and losses read so far. looks: the estimates beside the gradient, every `every` steps.
    """

    def __init__(self, recorder: Recorder, steps: Iterable[StepResult]) -> None:
        self.recorder, self._steps = recorder, steps
        self.series = SlopeMonitor(recorder.window, recorder.deviations, recorder.rise)
        self.looks: list[Look] = []
        self.steps = 0
        self.clipped: list[float] = []
        self._unread: list[tuple[int, Tensor, Tensor | None]] = []

    def __iter__(self) -> Iterator[StepResult]:
        try:
            for step in self._steps:
                self.steps += 1
                self._unread.append((step.number, step.loss, step.slopes))
                if step.clipped is not None:
                    self.clipped.append(step.clipped)
                if step.number % self.recorder.every == 0:
                    self.read()
                    self._look(step)
                yield step
        finally:  # also when the caller breaks off, and when the loss raises
            self.read()

    def read(self) -> None:
        """Read the numbers of the steps since the last time; on an accelerator this waits for it."""
        for number, loss, slopes in self._unread:
            self.series.add(number, float(loss), [] if slopes is None else slopes.tolist())
        self._unread.clear()

    def _look(self, step: StepResult) -> None:
        """The weights are those after the step."""
        estimator, state = step.train_state.estimator, step.train_state.state
        objective = step.objective.in_parts(micro_batches(estimator))
        reference = Reference(objective, step.batch, step.key.fold("recorder"))
        if reference.refusal is not None:
            return
        drawn = [draw(estimator, step.objective, reference, number, state) for number in range(self.recorder.draws)]
        mean = Look(step.number, fmean(one.cosine for one in drawn), fmean(one.ratio for one in drawn))
        self.looks.append(mean)

    @property
    def clip_rate(self) -> float | None:
        """The share of all slopes that a clip cut; None where there is no clip."""
        return fmean(self.clipped) if self.clipped else None

    def record(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        self.read()
        first_warning = self.series.first_warning
        return {
            "recorder": repr(self.recorder),
            "steps": self.steps,
            "clip rate": self.clip_rate,
            "largest slope": self.series.largest if self.series.slopes else None,
            "spikes": [asdict(spike) for spike in self.series.spikes],
            "diverged": self.series.diverged,
            "first spike before": None if first_warning is None else asdict(first_warning),
            "looks": [asdict(look) for look in self.looks],
        }

    def __str__(self) -> str:
        self.read()
        series, rows = self.series, [("steps", f"{self.steps:,}")]
        if series.slopes:
            rows.append(("largest |slope|", short(series.largest)))
            rows.append(("slope spikes", f"{len(series.spikes)} of {series.slopes:,} slopes"))
        if self.clip_rate is not None:
            rows.append(("clipped", f"{100 * self.clip_rate:.1f}% of slopes"))
        ends = dict.fromkeys([*self.looks[:1], *self.looks[-1:]])
        rows += [(f"at step {look.step:,}", _told(look)) for look in ends]
        rows.append(("diverged", self._divergence()))
        left = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{left}}   {found}" for name, found in rows)

    def _divergence(self) -> str:
        series = self.series
        if series.diverged is None:
            return "no"
        said = f"at step {series.diverged:,}"
        if series.first_warning is None:
            return f"{said}, with no spike of the slope before it" if series.slopes else said
        ahead = series.diverged - series.first_warning.step
        return f"{said}; the first spike, of {short(series.first_warning.slope)}, came {ahead:,} steps before"


def _told(look: Look) -> str:
    return f"cosine {short(look.cosine)}, length {short(look.ratio)} of the gradient's"
