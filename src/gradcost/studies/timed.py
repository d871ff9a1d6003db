"""A comparison under a time limit: a coarse answer first, refined while the time lasts."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from gradcost.results.records import TrialRecord
from gradcost.results.tuning import best, confirmed_best, next_rate, scores
from gradcost.studies.phases import MakeTrial, grid_ratio
from gradcost.studies.study import Stage, Stages
from gradcost.studies.trial import Trial

COARSE = 3  # learning rates of each method in the first round
TUNING, CONFIRMING = 0.4, 0.65  # fractions of the time that tuning, and both, may use if the final runs do not fit
MARGIN = 1.1  # a stage starts if the time left is so many times what it is expected to take


@dataclass
class Pace:
    """What a comparison under a time limit may still start. The clock starts when this value is made.

    Args:
        seconds: the time limit.
        workers: how many trials run at once.
        recorded: the ids of the trials that earlier calls completed.
        final_has_begun: whether earlier calls completed a final run: then learning rates stay as they are.
        name: returns the id of a trial.
        on_round: called with all records so far when a stage of new trials has ended.
    """

    seconds: float
    workers: int
    recorded: Collection[str]
    final_has_begun: bool
    name: Callable[[Trial], str]
    on_round: Callable[[Sequence[TrialRecord]], None] = lambda records: None
    records: list[TrialRecord] = field(default_factory=list)
    started: float = field(default_factory=lambda: time.monotonic())
    is_cut: bool = False  # whether a final run was left out because of the time
    spent: float = 0.0  # seconds that the new trials of this call took, each by itself
    wall: float = 0.0  # seconds that their stages took

    def used(self) -> float:
        """Return the used fraction of the time."""
        return (time.monotonic() - self.started) / self.seconds

    def is_over(self) -> bool:
        """Return whether the time is over in the first stage. Later stages run to their end: equal efforts."""
        return not self.records and self.used() > 1

    def tunes(self, stage: Stage, least: float, later: Stage) -> bool:
        """Whether a stage of tuning or confirming runs may start. If it is on record, it has.

        Args:
            stage: its trials.
            least: the fraction of the time that it may use in any case.
            later: the trials that should fit after it.
        """
        if self.is_recorded(stage) or self.final_has_begun:
            return self.is_recorded(stage)
        return self.used() + self.expected(stage) <= max(least, 1 - self.expected(later))

    def tests(self, stage: Stage) -> bool:
        """Whether a stage of final runs may start: it should end within the time."""
        allowed = self.is_recorded(stage) or self.used() + self.expected(stage) <= 1
        self.is_cut |= not allowed
        return allowed

    def is_recorded(self, stage: Stage) -> bool:
        """Whether all trials of a stage are on record."""
        return all(self.name(trial) in self.recorded for trial in stage)

    def expected(self, stage: Stage) -> float:
        """Return the fraction of the time that a stage should take, by the mean seconds of each method's trials.

        A margin is added. The sum is divided by the number of workers, until stages of this call give a factor.
        """
        seconds: dict[str, list[float]] = {}
        for record in self.records:
            seconds.setdefault(record.method, []).append(record.seconds or 0.0)
        total = sum(fmean(seconds.get(trial.method, [0.0])) for trial in stage)
        return MARGIN * total * (self.wall / self.spent if self.spent else 1 / self.workers) / self.seconds

    def ended(self, stage: Stage, records: Sequence[TrialRecord]) -> list[TrialRecord]:
        """Note the records of a stage that has ended, and return them."""
        self.records += records
        if not self.is_recorded(stage):
            self.spent += sum(record.seconds or 0.0 for record in records)
            self.wall += time.monotonic() - self.started - self.wall
            self.on_round(self.records)
        return list(records)


def timed_phases(
    rates: Mapping[str, Sequence[float]],
    make: MakeTrial,
    *,
    more: int,
    confirm: int,
    seeds: Sequence[int],
    pace: Pace,
) -> Stages:
    """Yield the trials of all methods in the order of `phases`, as far as the time allows.

    - Every stage has the same trials for every method, so all methods have equal effort whenever the time is up.
    - The first stage, a coarse grid, always runs. Tuning goes on while all confirming and final runs still fit after
      it. If they do not, it may use 40% of the time, and with confirming 65%.
    - The final runs start one seed at a time, so that each further seed is one of all methods.
    - Once final runs have begun, no learning rate is tuned any more, also in later calls: the test split is scored at
      one learning rate.

    Args:
        rates: for each method, the learning rates of its coarse grid.
        make: returns the trial for a method, a learning rate, a phase and a seed.
        more: the largest number of learning rates that follow the grid.
        confirm: the number of seeds in the "confirm" phase; 0 skips it.
        seeds: the seeds of the final runs.
        pace: what may still start.
    """
    stage = [make(name, lr, "tune", 0) for name in rates for lr in rates[name]]
    tried = pace.ended(stage, (yield stage))
    for _ in range(more):
        extra = [(name, next_rate(scores(tried, name), grid_ratio(rates[name]))) for name in rates]
        stage = [make(name, lr, "tune", 0) for name, lr in extra if lr is not None]
        if not pace.tunes(stage, TUNING, stage * (3 * confirm + len(seeds))):
            break
        tried += pace.ended(stage, (yield stage))
    chosen = {name: best(scores(tried, name), 3 if confirm else 1) for name in rates}
    fresh = range(1, confirm + 1)
    stage = [make(name, lr, "confirm", seed) for name in rates for lr in chosen[name] for seed in fresh]
    single = [make(name, lr, "final", 0) for name in rates for lr in chosen[name][:1]]
    if stage and pace.tunes(stage, CONFIRMING, single * len(seeds)):
        confirmed = pace.ended(stage, (yield stage))
        chosen = {name: confirmed_best([*tried, *confirmed], name) for name in rates}
    for seed in seeds:
        stage = [make(name, lr, "final", seed) for name in rates for lr in chosen[name][:1]]
        if not pace.tests(stage):
            return
        pace.ended(stage, (yield stage))
