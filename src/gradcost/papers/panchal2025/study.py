"""The study that trains a pretrained model with the methods of Panchal et al. 2025, at equal FLOPs and equal tuning.

gradcost reproduce panchal2025 --dry-run        the runs and their hours on this machine
gradcost reproduce panchal2025 -o FOLDER        start; the same command resumes
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf

from gradcost.core.errors import BadInput, GradcostError
from gradcost.core.value import value
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.variance_reduced import VarianceReduced
from gradcost.papers.panchal2025.as_coded import Scaled
from gradcost.papers.panchal2025.methods import Method, Settings, method
from gradcost.planning.forecast import forecast
from gradcost.studies.phases import phases
from gradcost.studies.study import Stages, Study
from gradcost.studies.task_info import first_step
from gradcost.studies.trial import Trial
from gradcost.studies.trial_log import evaluated_steps
from gradcost.tasks.pretrained import Encoder, Lora
from gradcost.tasks.task import Task
from gradcost.tasks.texts import Trec
from gradcost.training.optimizers import AdamW

# The methods whose estimates differ. BP-Accumulate and FmAD-Accumulate equal BP-Vanilla and FmAD-Vanilla up to
# rounding and dropout masks, and ZO-Vanilla is MeZO.
DISTINCT = (
    "BP-Vanilla",
    "BP-Checkpointing",
    "FmAD-Vanilla",
    "FmAD-Multiple",
    "FmAD-Adaptive",
    "FmAD-SVRG",
    "FmAD-Sparse",
    "MeZO",
    "ZO-Multiple",
    "ZO-Adaptive",
    "ZO-SVRG",
    "ZO-Sparse",
)
RATES = (1e-4, 3.2e-4, 1e-3, 3.2e-3, 1e-2)  # of AdamW, half a decade apart, the same for every method
AS_CODED = ", as coded"  # the label of what the public code computes is the name of the method plus this


@dataclass(frozen=True)
class Length:
    """How long one method trains.

    Args:
        name: the label of the method.
        estimator: its estimator.
        step: FLOPs of a step, in units of one forward pass.
        steps: number of steps of each run.
        snapshot: FLOPs of a full gradient of SVRG, in forward passes; 0 for other methods.
        every: steps from one full gradient to the next; the first one is before the first step.
    """

    name: str
    estimator: Estimator
    step: float
    steps: int
    snapshot: float = 0.0
    every: int = 1

    def until(self, steps: int) -> float:
        """Return the FLOPs of so many steps, in forward passes."""
        return steps * self.step + -(-steps // self.every) * self.snapshot

    @property
    def forwards(self) -> float:
        """The FLOPs per step of a whole run, in forward passes."""
        return self.until(self.steps) / self.steps


@value
class Reproduction:
    """The settings of the study.

    Args:
        task: the data and the pretrained model with its adapters.
        methods: names of the paper, in any case; stored as in the paper, each once. A name that ends in ", as coded"
            is what the public code computes.
        forwards: the budget of every run, in FLOPs of one forward pass of a batch.
        rates: the learning rates of the grid, the same for all methods.
        more: number of further learning rates, each chosen from the results so far.
        seeds: number of final runs per method.
        target: the validation accuracy of "steps to the target".
        settings: the sizes that the names leave open.
    Raises:
        BadInput: an unknown method, a method that has no other estimate as coded, or a number out of range.
    """

    task: Task = Trec(model=Encoder(lora=Lora()))
    methods: tuple[str, ...] = DISTINCT
    forwards: float = 6000.0
    rates: tuple[float, ...] = RATES
    more: int = 2
    seeds: int = 3
    target: float = 0.8
    settings: Settings = Settings()

    def __post_init__(self) -> None:
        for name, is_valid, allowed in (
            ("forwards", 0 < self.forwards < inf, "is a number above 0"),
            ("seeds", self.seeds >= 1, "is 1 or more"),
            ("more", self.more >= 0, "is 0 or more"),
            ("rates", self.rates, "are one learning rate or more"),
            ("methods", self.methods, "are one name of the paper or more"),
            ("target", 0 < self.target <= 1, "is an accuracy above 0 and at most 1"),
        ):
            if not is_valid:
                raise BadInput(f"{name} of a Reproduction {allowed}, not {getattr(self, name)!r}.")
        object.__setattr__(self, "methods", tuple(dict.fromkeys(self._label(name) for name in self.methods)))

    @property
    def runs(self) -> int:
        """The number of runs of one method."""
        return len(self.rates) + self.more + self.seeds

    @property
    def study(self) -> Study:
        # A results folder accepts one question only. Seeds and rates are not in it, so a folder can get more of both.
        others = [f"target {self.target:g}"] if self.target != Reproduction.target else []
        others += [f"{self.settings}"] if self.settings != Settings() else []
        what = "".join(f", {each}" for each in others)
        question = (
            f"Panchal et al. 2025: which method trains best at {self.forwards:g} forwards of {self.task}{what}?"
        )
        return Study(question, self._stages, __file__)

    def named(self) -> tuple[Method, ...]:
        """Return the methods of this study, each once. `as_coded` is None for those that run as named only."""
        names = dict.fromkeys(name.removesuffix(AS_CODED) for name in self.methods)
        found = [method(name, self.settings) for name in names]
        coded = {name.removesuffix(AS_CODED) for name in self.methods if name.endswith(AS_CODED)}
        return tuple(each if each.name in coded else replace(each, as_coded=None, difference="") for each in found)

    def lengths(self) -> tuple[Length, ...]:
        """Return the cost of a step and the number of steps of every method. Loads the data and the model.

        Raises:
            BadInput: the budget is less than one step of a method.
        """
        return tuple(self._length(name) for name in self.methods)

    def hours(self, seconds_per_forward: float, lengths: tuple[Length, ...]) -> float:
        """Return the core-hours of all runs, with their scores on the validation and test splits.

        Args:
            seconds_per_forward: the time of one forward pass of a batch on one core (`forward_seconds`).
            lengths: from `lengths`.
        """
        _, validation, test = self.task.splits()
        once, last = (
            len(validation.x) / self.task.batch,
            len(test.x) / self.task.batch,
        )  # in forward passes of a batch
        tuned = len(self.rates) + self.more
        forwards = 0.0
        for each in lengths:
            scored = {phase: len(evaluated_steps(each.steps, phase)) for phase in ("tune", "final")}
            forwards += self.runs * each.steps * each.forwards
            forwards += tuned * scored["tune"] * once + self.seeds * (scored["final"] * once + last)
        return forwards * seconds_per_forward / 3600

    def _length(self, name: str) -> Length:
        estimator = self._estimator(name)
        anchor, every = _anchor(estimator)
        try:
            step = _forwards(self.task, estimator)
            snapshot = 0.0 if anchor is None else _batches(self.task) * _forwards(self.task, anchor)
        except GradcostError as error:
            raise BadInput(f"{name} cannot train {self.task}: {error}") from error
        steps = _most_steps(self.forwards, step, snapshot, every)
        if steps < 1:
            raise BadInput(
                f"{name} needs {step + snapshot:.0f} forwards for its first step, and the budget is "
                f"{self.forwards:g}: raise the budget, or leave {name} out."
            )
        return Length(name, estimator, step, steps, snapshot, every)

    def _label(self, name: str) -> str:
        """Return the name of a method in the case of the paper."""
        is_coded = name.lower().endswith(AS_CODED)
        found = method(name[: -len(AS_CODED)] if is_coded else name, self.settings)
        if is_coded and found.as_coded is None:
            raise BadInput(f"the public code of {found.name} computes what the name says: leave out {AS_CODED!r}.")
        return found.name + (AS_CODED if is_coded else "")

    def _estimator(self, name: str) -> Estimator:
        found = method(name.removesuffix(AS_CODED), self.settings)
        return found.estimator if found.as_coded is None or not name.endswith(AS_CODED) else found.as_coded

    def _stages(self) -> Stages:
        lengths = {each.name: each for each in self.lengths()}

        def trial(name: str, lr: float, phase: str, seed: int) -> Trial:
            length = lengths[name]
            return Trial(self.task, name, length.estimator, AdamW(lr), length.steps, phase, seed, self.target)

        rates = dict.fromkeys(lengths, self.rates)
        yield from phases(rates, trial, more=self.more, confirm=0, seeds=range(1, self.seeds + 1))


@lru_cache(maxsize=256)
def _forwards(task: Task, estimator: Estimator) -> float:
    """Return the FLOPs of one estimate, in forward passes. A forecast takes seconds, and a study needs it often."""
    return forecast(estimator, *first_step(task)).forwards


def _batches(task: Task) -> int:
    """Return the number of batches in the training split."""
    return -(-len(task.splits().train.x) // task.batch)


def _anchor(estimator: Estimator) -> tuple[Estimator | None, int]:
    """Return the estimator of the full gradients of SVRG, and the steps between two of them; (None, 1) for others."""
    if isinstance(estimator, Scaled):
        return _anchor(estimator.estimator)
    if isinstance(estimator, VarianceReduced):
        return estimator.anchor or estimator.estimator, estimator.every
    return None, 1


def _most_steps(budget: float, step: float, snapshot: float, every: int) -> int:
    """Return the largest number of steps n with n step + ceil(n / every) snapshot <= budget."""
    period = every * step + snapshot
    full = int(budget // period)
    rest = budget - full * period - snapshot
    return full * every + max(0, min(every, int(rest // step)))
