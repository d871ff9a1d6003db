"""`gradcost compare`: from arguments to a verdict."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from gradcost.cli import console, spec
from gradcost.cli.study import measure
from gradcost.core.errors import BadInput
from gradcost.core.key import Key
from gradcost.report import html, tables
from gradcost.results import summary
from gradcost.results.records import read
from gradcost.results.tuning import log_grid
from gradcost.results.wording import size
from gradcost.studies import compare, costs
from gradcost.studies.compare import Comparison
from gradcost.studies.executors import Local, Work
from gradcost.studies.study import alone, conduct

METHODS = ("backprop()", "checkpointed()", "forward_gradient()", "spsa()", "mezo()")


def rates(span: str, points: int) -> tuple[float, ...]:
    """`points` learning rates over LEAST:MOST, evenly spaced in their logarithm, to two digits."""
    try:
        low, high = (float(end) for end in span.split(":"))
    except ValueError:
        raise BadInput(f"{span!r} is not a range of learning rates: write LOW:HIGH, such as 1e-4:10.") from None
    return log_grid(low, high, 1 if low == high else points)


def compare_methods(
    task: str,
    model: str | None,
    methods: list[str],
    memory: str | None,
    steps: int | None,
    seeds: int,
    points: int,
    more: int,
    confirm: int,
    span: str,
    target: float,
    output: Path | None,
    as_json: bool,
    dry_run: bool,
) -> int:
    """Run or resume a comparison and show what came of it. Returns the exit code."""
    found, task_name, model_name, user_file = spec.task(task, model)
    budget = spec.size(memory) if memory else None
    chosen = [(text.strip(), spec.method(text)) for text in methods or METHODS]
    exact = costs.exact_within(found, budget) if budget is not None and not methods else None
    if exact is not None:
        chosen.insert(1, (f"backprop in {size(budget)}", exact))
    comparison = Comparison(
        found,
        tuple(chosen),
        rates(span, points),
        steps or getattr(found, "steps", 1000),
        tuple(range(1, seeds + 1)),
        target,
        budget,
        more,
        confirm,
        user_file,
    )
    name = f"{task_name}-{model_name if model_name.isidentifier() else 'model'}"
    folder = output or Path("gradcost-runs") / f"{name}-{comparison.name[:4]}"
    _introduce(comparison, task_name, model_name)
    known, reasons = {}, {}
    for label, cost in costs.forecast_methods(comparison.task, comparison.steppers, comparison.memory):
        if isinstance(cost, str):
            reasons[label] = cost
            console.say(f"    {label}: not run. {cost}")
        else:
            known[label] = cost
    if dry_run:
        _plan(comparison, known, folder)
        return 0 if known else 4
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with alone(folder):
            compare.open_folder(folder, comparison, task_name, model_name)
            for label, reason in reasons.items():
                costs.refuse(folder, label, dict(comparison.methods)[label], reason)
            failures = _run(comparison, folder, set(known)) if known else 0
            if not failures:
                measure(comparison.task, comparison.steppers, comparison.memory, folder, known)
    except KeyboardInterrupt:
        done = sum(trial.status != "failed" for trial in read(folder).trials)
        console.complain(f"interrupted. {done} finished runs are kept in {folder}; the same command goes on.")
        console.abandon(130)
    _answer(folder, as_json)
    if failures:
        console.complain(f"{failures} runs failed; their tracebacks are in {folder}/records.jsonl.")
        return 1
    return 0 if known else 4


def _introduce(comparison: Comparison, task_name: str, model_name: str) -> None:
    objective = comparison.task.objective(Key(0))
    console.say(
        f"{task_name} / {model_name}, {objective.dimension:,} weights   {comparison.steps:,} steps   "
        f"tuning {len(comparison.rates) + comparison.more} points each   seeds {len(comparison.seeds)}"
    )


def _plan(comparison: Comparison, known: dict, folder: Path) -> None:
    runs = len(known) * comparison.runs
    console.show(f"{runs} runs of {comparison.steps:,} steps would go into {folder}; a step of each:")
    rows = [[label, size(cost.beyond), f"{cost.forwards:.2f}", str(cost.matmuls)] for label, cost in known.items()]
    console.show_table(["method", "beyond weights", "forwards", "matmuls"], rows)


def _run(comparison: Comparison, folder: Path, labels: set[str]) -> int:
    """All phases; returns how many runs failed."""
    failed = 0
    work = Work(comparison.code, folder, comparison.user_file)
    with console.board({label: comparison.runs for label, _ in comparison.methods if label in labels}) as board:
        known = {trial.trial: trial for trial in read(folder).trials if trial.status != "failed"}
        for label in labels:
            board.start_with(label, sum(trial.method == label for trial in known.values()))
        for record in conduct(comparison.study(labels), Local(os.cpu_count() or 1), work):
            failed += record["status"] == "failed"
            board.finished(record)
    return failed


def _answer(folder: Path, as_json: bool) -> None:
    results = read(folder)
    try:
        report = html.write(folder)
    except ImportError as error:
        report = None
        console.complain(str(error))
    if as_json:
        rows = [summary.plain(row) for row in summary.summarise(results)]
        refused = [dataclasses.asdict(refusal) for refusal in results.refused]
        answer = {"verdict": summary.verdict(results), "rows": rows, "refused": refused, "folder": str(folder)}
        print(json.dumps(answer, indent=2, default=str))
        return
    console.show()
    console.show(summary.verdict(results), bold=True)
    console.show()
    console.show_table(*tables.table(results))
    for refusal in results.refused:
        console.show(f"{refusal.method}: {refusal.reason}")
    for cost in results.costs:
        if cost.doubt is not None:
            console.show(f"~ {cost.method}: {cost.doubt}.")
    console.show()
    if report is not None:
        console.show(f"report   {report}")
    console.show("again    the same command goes on where it stopped; nothing is run twice")
