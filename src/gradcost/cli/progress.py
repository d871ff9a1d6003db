"""Print the events of a comparison or a study on standard error."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from gradcost.cli import console
from gradcost.cli.live import LivePage
from gradcost.core.units import count
from gradcost.studies.events import (
    ComparisonStarted,
    EstimatesAssessed,
    Event,
    MethodForecast,
    MethodRefused,
    RoundEnded,
    StepTimed,
    TimeIsUp,
    TrialFinished,
    TrialsEnded,
    TrialsStarted,
    TrialsWarned,
)

MANY_FORWARDS = 1000  # forward passes in a step, above which they are printed before anything runs


class EventPrinter:
    """A callback that prints events. As a context manager it removes its progress bars on exit.

    folder: the results folder, None until the comparison starts. ran, failed: numbers of trials in this call.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.ran, self.failed = 0, 0
        self._board: console.Board | None = None
        self._page: LivePage | None = None
        self._stack = ExitStack()

    def __enter__(self) -> EventPrinter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the progress bars."""
        self._stack.close()

    def end_page(self) -> None:
        """Write the page of an interrupted comparison a last time, if it has one."""
        if self._page is not None:
            self._page.end()

    def __call__(self, event: Event) -> None:
        match event:
            case ComparisonStarted():
                self.folder = event.folder
                console.say(
                    f"{event.task} / {event.model}, {event.weights:,} weights   {event.steps:,} steps   "
                    f"{count(event.points, 'learning rate')} per method   {count(event.seeds, 'seed')}"
                )
            case MethodRefused(method, reason):
                console.say(f"    {method}: not run. {reason}")
            case MethodForecast(method, forecast) if forecast.forwards > MANY_FORWARDS:
                console.say(f"    {method}: each step costs {forecast.forwards:,.0f} forward passes")
            case TrialsStarted(totals, finished, metric):
                if self.folder is not None:
                    self._page = LivePage(self.folder)
                self._board = self._stack.enter_context(console.board(totals, finished, metric))
            case TrialFinished(trial, metric):
                self.ran += 1
                if self._board is not None:
                    self._board.finished(trial)
                else:
                    console.say(f"{self.ran}  {trial.method}  {console.trial_line(trial, metric)}")
                if self._page is not None and self._page.update():
                    console.say(f"{self._page.path} shows the results so far, also while trials run")
            case RoundEnded(text):
                console.say(text)
            case TimeIsUp(finished, most):
                console.say(f"The time is up: {finished} of at most {most} trials ran. The same command continues.")
            case TrialsEnded(folder, _, failed, reason):
                self.failed = failed
                self.close()  # a thread redraws the bars, and would disturb the timing of steps
                if failed:
                    why = (reason or "no reason was recorded").rstrip(".")
                    console.complain(
                        f"{count(failed, 'trial')} failed. The first: {why}. {folder / 'records.jsonl'} has the "
                        "tracebacks. Run the same command again to repeat them."
                    )
            case TrialsWarned(warned):
                console.say(
                    f"{count(warned.trials, 'trial')} issued {count(warned.warnings, 'different warning')}, such as "
                    f'"{warned.example}". The output of each trial is in {warned.folder}.'
                )
            case StepTimed(method):
                console.say(f"timed a step of {method}")
            case EstimatesAssessed(method):
                console.say(f"measured the quality of the estimates of {method}")
            case _:
                pass


RESUME = "resume   run the same command again; no trial runs twice"
