"""Record a training at a small cost: slope spikes, clip rate, divergence, and the quality of the estimates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from torch import Tensor

from gradcost.checks.quality import draw
from gradcost.checks.reference import Reference
from gradcost.checks.report import format_number
from gradcost.core.divergence import RISE, DivergenceMonitor
from gradcost.core.errors import BadInput
from gradcost.core.finite import NotFinite
from gradcost.core.value import value
from gradcost.estimators.structure import micro_batches
from gradcost.training.loop import StepResult
from gradcost.training.spikes import SlopeMonitor


@value
class Recorder:
    """Compare estimates with backpropagation every `every` steps of a training, on the batch of the step.

        recording = Recorder(every=100).following(train(task, estimator, optimizer, steps=1000))
        for step in recording:
            ...
        print(recording)

    Law: the training has the same bits with and without a Recorder.

    Cost, every `every` steps: `draws` estimates, three forwards, and one backpropagation (one more per draw with
    random layers), with memory for one whole gradient. Between comparisons the losses and slopes are stored
    without reading their values from the device.

    Args:
        every: steps between two comparisons.
        draws: estimates per comparison.
        window: the number of previous slopes that set the threshold of a spike.
        deviations: threshold of a spike, in robust standard deviations above the median of the window.
        rise: a loss above `rise` times the first loss, for several steps, is a divergence (`DivergenceMonitor`).
            `SlopeMonitor` defines spikes.
    Raises:
        BadInput: every, draws or window < 1, or deviations or rise <= 0.
    """

    every: int = 100
    draws: int = 1
    window: int = 200
    deviations: float = 8.0
    rise: float = RISE

    def __post_init__(self) -> None:
        for name in ("every", "draws", "window"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} of a Recorder is at least 1, not {getattr(self, name)!r}.")
        for name in ("deviations", "rise"):
            if not getattr(self, name) > 0:
                raise BadInput(f"{name} of a Recorder is a factor above 0, not {getattr(self, name)!r}.")

    def following(self, steps: Iterable[StepResult]) -> Recording:
        """Return an iterable that yields the same steps and records them.

        Args:
            steps: the steps of `train`.
        Returns:
            The Recording. Iterate over it instead of over `steps`.
        """
        return Recording(self, steps)


@dataclass(frozen=True)
class Alignment:
    """A comparison of estimates with the gradient after one step: means over the draws.

    Args:
        step: the number of the step.
        cosine: cos(g, grad).
        ratio: |g| / |grad|.
    """

    step: int
    cosine: float
    ratio: float


class Recording:
    """The steps of a training, recorded while you iterate over them. Print it for a summary of the steps so far.

    Attributes:
        series: spikes and divergence, from the slopes and losses read so far.
        alignments: the comparisons with the gradient, one every `every` steps.
        steps: the number of steps so far.

    Args:
        recorder: how to record.
        steps: the steps of `train`.
    """

    def __init__(self, recorder: Recorder, steps: Iterable[StepResult]) -> None:
        self.recorder, self._steps = recorder, steps
        self.series = SlopeMonitor(recorder.window, recorder.deviations, DivergenceMonitor(recorder.rise))
        self.alignments: list[Alignment] = []
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
                    self._compare(step)
                yield step
        finally:  # also after a break in the caller's loop, and after the loss raises
            self.read()

    def read(self) -> None:
        """Read the losses and slopes since the last call. On an accelerator this waits until they are computed."""
        for number, loss, slopes in self._unread:
            self.series.add(number, float(loss), [] if slopes is None else slopes.tolist())
        self._unread.clear()

    def _compare(self, step: StepResult) -> None:
        """Compare estimates with the gradient at the weights after the step."""
        estimator, state = step.train_state.estimator, step.train_state.state
        objective = step.objective.in_micro_batches(micro_batches(estimator))
        reference = Reference(objective, step.batch, step.key.fold("recorder"))
        if reference.refusal is not None:
            return
        draws = range(self.recorder.draws)
        try:
            sample = [draw(estimator, step.objective, reference, number, state) for number in draws]
        except NotFinite:
            return
        cosine, ratio = fmean(one.cosine for one in sample), fmean(one.ratio for one in sample)
        self.alignments.append(Alignment(step.number, cosine, ratio))

    @property
    def clip_rate(self) -> float | None:
        """The fraction of slopes that `Clipped` cut, in [0, 1]; None without `Clipped`."""
        return fmean(self.clipped) if self.clipped else None

    def record(self) -> dict[str, Any]:
        """Return the recording as plain data, for JSON."""
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
            "alignments": [asdict(alignment) for alignment in self.alignments],
        }

    def __str__(self) -> str:
        self.read()
        series, rows = self.series, [("steps", f"{self.steps:,}")]
        if series.slopes:
            rows.append(("largest |slope|", format_number(series.largest)))
            rows.append(("slope spikes", f"{len(series.spikes)} of {series.slopes:,} slopes"))
        if self.clip_rate is not None:
            rows.append(("clipped", f"{100 * self.clip_rate:.1f}% of slopes"))
        first_and_last = dict.fromkeys([*self.alignments[:1], *self.alignments[-1:]])
        rows += [(f"at step {alignment.step:,}", _describe(alignment)) for alignment in first_and_last]
        rows.append(("diverged", self._divergence()))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}   {text}" for name, text in rows)

    def _divergence(self) -> str:
        """The step of the divergence and the first spike before it, in words."""
        series = self.series
        if series.diverged is None:
            return "no"
        text = f"at step {series.diverged:,}"
        if series.first_warning is None:
            return f"{text}; no slope spike before it" if series.slopes else text
        ahead = series.diverged - series.first_warning.step
        return f"{text}; first spike ({format_number(series.first_warning.slope)}) {ahead:,} steps before"


def _describe(alignment: Alignment) -> str:
    return f"cosine {format_number(alignment.cosine)}, |g| / |grad| {format_number(alignment.ratio)}"
