"""The commands. Each imports its modules when it runs, so `gradcost --help` does not import torch."""

from __future__ import annotations

import functools
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from gradcost.cli import init, results, setup
from gradcost.cli.options import (
    AuditOptions,
    CheckOptions,
    CompareOptions,
    Folder,
    Json,
    PlanOptions,
    StudyOptions,
    with_options,
)
from gradcost.cli.reproduce_options import ReproduceOptions
from gradcost.cli.train_options import ReplayOptions, TrainOptions
from gradcost.core.errors import GradcostError
from gradcost.core.streams import open_closed_streams

app = typer.Typer(
    help="Measure what a gradient costs and choose how to get one: backprop, checkpointing, forward or zero-order.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data = typer.Typer(help="Download data sets and models.", no_args_is_help=True)
app.add_typer(data, name="data")

KEPT = {  # what an interrupted command keeps
    "study": "finished trials are kept; the same command resumes",
    "reproduce": "finished trials are kept; the same command resumes",
}
# Signals that end a process like Ctrl-C; Windows has no SIGHUP.
_ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
BUG = 70  # the exit code of an internal error: EX_SOFTWARE of sysexits.h


def reported(command: Callable[..., int | None]) -> Callable[..., None]:
    """Wrap a command: print user errors as one sentence and bugs with a traceback, and exit with a code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        from gradcost.cli.console import complain, only_results

        try:
            with only_results():
                code = command(*args, **kwargs)
        except KeyboardInterrupt as error:
            complain("; ".join(filter(None, ["interrupted", str(error) or KEPT.get(command.__name__)])) + ".")
            code = 130
        except OSError as error:
            reason = error.strerror or str(error)
            complain(f"{reason}: {error.filename}" if error.filename else reason)
            code = 1
        except GradcostError as error:
            complain(str(error))
            code = 2
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except BaseException as error:
            code = _unexpected(error, complain)
        raise typer.Exit(code or 0)

    return run


def _unexpected(error: BaseException, complain: Callable[[str], None]) -> int:
    """Print an error that is not one of gradcost's as a sentence if the user's code raised it; else as a bug."""
    from gradcost.core.user_errors import is_of_user, sentence

    if is_of_user(error):
        complain(f"your own code failed: {sentence(error)}")
        return 2
    if not isinstance(error, Exception):  # rich exits when the reader of standard output has closed it
        raise error
    traceback.print_exception(error)
    complain("this is a bug in gradcost: please report it with the traceback above and your command.")
    return BUG


@app.command()
@reported
@with_options(CompareOptions)
def compare(options: CompareOptions) -> int:
    """Tune every method with equal effort, train with each, and recommend one."""
    from gradcost.cli.compare import compare_methods

    return compare_methods(options)


@app.command()
@reported
@with_options(PlanOptions)
def plan(options: PlanOptions) -> int:
    """Forecast the memory and FLOPs of one step of each method, and recommend a method. No step runs."""
    from gradcost.cli.plan import plan_methods

    return plan_methods(options)


@app.command()
@reported
@with_options(CheckOptions)
def check(options: CheckOptions) -> int:
    """Check that a method is correct on a model and data, and compare its estimates with the exact gradient."""
    from gradcost.cli.check import check_methods

    return check_methods(options)


@app.command()
@reported
@with_options(AuditOptions)
def audit(options: AuditOptions) -> int:
    """Run the laws on somebody else's gradient function: bias, length, and side effects."""
    from gradcost.cli.audit import audit_function

    return audit_function(options)


@app.command()
@reported
@with_options(TrainOptions)
def train(options: TrainOptions) -> int:
    """Train a model with one method. With --resume, an interrupted run continues with the same bits."""
    from gradcost.cli.train import train_model

    return train_model(options)


@app.command()
@reported
@with_options(StudyOptions)
def study(options: StudyOptions) -> int:
    """Run the study of a Python file. Run the same command again to resume it."""
    from gradcost.cli.study import run_file

    return run_file(options)


@app.command()
@reported
@with_options(ReplayOptions)
def replay(options: ReplayOptions) -> int:
    """Rebuild the weights after a step from the step log of a training run. No loss is evaluated."""
    from gradcost.cli.replay import replay_log

    return replay_log(options)


@app.command()
@reported
@with_options(ReproduceOptions)
def reproduce(options: ReproduceOptions) -> int:
    """Repeat the experiments of a paper, and show which of its numbers are reproduced."""
    from gradcost.cli.reproduce import reproduce_paper

    return reproduce_paper(options)


@app.command()
@reported
def methods(
    name: Annotated[str | None, typer.Argument(help="The method or part to explain. Default: list all.")] = None,
    as_json: Json = False,
) -> int:
    """List all methods with their costs, and the parts to compose methods from; or explain one of them."""
    from gradcost.cli.methods import explain_method, list_methods

    return list_methods(as_json) if name is None else explain_method(name, as_json)


@app.command()
@reported
def report(
    folder: Folder,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The HTML file. Default: report.html in the results folder.")
    ] = None,
    assets: Annotated[
        bool, typer.Option("--assets", help="Also write each figure and table as a file, in report-files/.")
    ] = False,
) -> None:
    """Write the report of a results folder from its records."""
    from gradcost.cli import console
    from gradcost.report import assets as files
    from gradcost.report import html
    from gradcost.results.records import read

    results = read(folder)
    console.show(str(html.write(folder, output, results=results)))
    console.complain_of(results)
    if assets:
        written = files.write(folder, results=results)
        console.show(f"{written[0].parent}: {len(written)} files")


@app.command()
@reported
def lint(
    folder: Folder,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with code 3 if a finding is an error, or no trial is on record.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Find what makes a study unfair or inconclusive, from its records."""
    from gradcost.cli.lint import lint_folder

    return lint_folder(folder, strict, as_json)


for _command in (
    *(init.init, setup.tasks, setup.doctor),
    *(results.status, results.show, results.why, results.diff, results.export),
):
    app.command()(reported(_command))
data.command()(reported(setup.fetch))


def version(is_asked: bool) -> None:
    if is_asked:
        from importlib.metadata import version as installed

        print(f"gradcost {installed('gradcost')}")
        raise typer.Exit


@app.callback()
def options(
    show: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _without_bad_widths() -> None:
    """Leave out widths of the terminal that are no numbers, where rich raises, or 0, where it shows nothing."""
    for name in ("COLUMNS", "LINES", "TERMINAL_WIDTH"):
        text = os.environ.get(name, "1")
        if not (text.isascii() and text.isdigit() and 0 < int(text[:7]) < 100_000):
            del os.environ[name]


def _show_notes_plainly() -> None:
    """Print a `Note` as one line, without the place in the code that issued it."""
    from gradcost.core.note import Note

    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
        if not issubclass(category, Note):
            shown(message, category, *place, **options)
        elif sys.stderr is not None:
            print(f"note: {message}", file=sys.stderr)

    warnings.showwarning = show


def main() -> None:
    _without_bad_widths()
    _show_notes_plainly()
    if "stdout" in open_closed_streams():
        print("gradcost: standard output is closed, so no result can be shown: send it to a file.", file=sys.stderr)
        sys.exit(2)
    for number in _ENDING:
        if signal.getsignal(number) is signal.SIG_DFL:  # `nohup` ignores SIGHUP
            signal.signal(number, signal.default_int_handler)
    try:
        app(prog_name="gradcost")
    finally:
        # While Python exits, a further Ctrl-C would be a traceback of some library. It ends the process at once.
        for number in (signal.SIGINT, *_ENDING):
            if signal.getsignal(number) is signal.default_int_handler:
                signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
