"""`gradcost reproduce panchal2025`: train with the methods of the paper, at equal FLOPs and equal tuning."""

from __future__ import annotations

import dataclasses
import math
import os
import shlex

from gradcost.cli import console, spec
from gradcost.cli.progress import RESUME
from gradcost.cli.quantities import lr_range
from gradcost.cli.reproduce_options import ReproduceOptions
from gradcost.cli.reproduction import check_page, option, other_task, run_or_resume, with_file, write_page
from gradcost.core.errors import BadInput
from gradcost.core.units import DASH, number, size
from gradcost.papers.panchal2025 import page as panchal2025_page
from gradcost.papers.panchal2025.cost import FILE, METHODS, CostRecord, forecast_costs, read_costs
from gradcost.papers.panchal2025.cost_models import COST_MODELS
from gradcost.papers.panchal2025.cost_page import CostTable, cost_page
from gradcost.papers.panchal2025.methods import Settings, methods
from gradcost.papers.panchal2025.study import AS_CODED, DISTINCT, RATES, Reproduction
from gradcost.results.records import read
from gradcost.results.tuning import log_grid
from gradcost.studies.costs import forward_seconds
from gradcost.studies.run import RUNS


def reproduce(options: ReproduceOptions) -> int:
    """Run or resume the study of the paper, show the results of each method, and return the exit code."""
    if options.tuned:
        raise BadInput("panchal2025 has no --tuned: all its runs are tuned. Leave the option out.")
    if options.costs:
        return _costs(options)
    reproduction, file = _reproduction(options)
    if options.dry_run:
        _show_dry_run(reproduction, options)
        return 0
    folder = options.output or RUNS / options.paper
    printer = run_or_resume(with_file(reproduction.study, file), folder, options, measure=True)
    results, lengths = read(folder), reproduction.lengths()
    rows = panchal2025_page.table_rows(results, lengths)
    if options.page is not None:
        text = panchal2025_page.page(results, reproduction, lengths, _command(options), f"`{folder.name}`")
        write_page(options.page, text)
    if options.as_json:
        answers = [dict(zip(panchal2025_page.HEADERS, row, strict=True)) for row in rows]
        console.print_json({"folder": str(folder), "ran": printer.ran, "rows": answers})
    else:
        console.show_table(list(panchal2025_page.HEADERS), rows)
        if options.page is not None:
            console.show(f"page     {os.fspath(options.page)}")
        console.show(RESUME)
    return 1 if printer.failed else 0


def _costs(options: ReproduceOptions) -> int:
    """Forecast the costs on the paper's models, or resume; show the peaks, write the page, return the exit code."""
    folder = options.output or RUNS / f"{options.paper}-costs"
    for name in ("rows", "task", "device", "target", "probes", "snapshot_every", "seeds"):
        if getattr(options, name) is not None:
            raise BadInput(f"--costs forecasts all methods on the paper's models, so it has no {option(name)}.")
    check_page(options.page)
    models = () if options.records or options.dry_run else COST_MODELS
    if options.dry_run:
        done = {record.key[:2] for record in read_costs(folder)}
        left = [model for model in COST_MODELS if (model.name, model.trained) not in done]
        if options.as_json:
            console.print_json([{"model": m.name, "trained": m.trained, "batch": m.batch} for m in left])
            return 0
        for model in left:
            console.show(f"{model.name}, {model.trained}: {model.batch}")
        console.show(f"{len(left)} of {len(COST_MODELS)} models are left, one or two minutes of one core each.")
        return 0
    records = forecast_costs(folder, models, lambda key: console.say(" ".join(key)))
    if options.page is not None:
        command = shlex.join(["gradcost", "reproduce", options.paper, "--costs", "-o", folder.name])
        text = cost_page(records, f"{command} --page {options.page.name}", f"[{folder.name}]({folder.name}/{FILE})")
        write_page(options.page, text)
    if options.as_json:
        console.print_json([dataclasses.asdict(record) for record in records])
    else:
        table = CostTable(records)
        rows = [[*case, *(_peak_of(table.best(case, name)) for name in METHODS)] for case in table.cases]
        console.show_table(["model", "trained", *METHODS], rows, left=True)
    return 1 if any(record.refusal for record in records) else 0


def _peak_of(record: CostRecord | None) -> str:
    return DASH if record is None else size(record.peak)


def _reproduction(options: ReproduceOptions) -> tuple[Reproduction, str | None]:
    """Return the settings of the study, and the user's file that defines the task or None."""
    names = DISTINCT if options.rows is None else _names(options.rows)
    if not 0 < options.forwards < math.inf:
        raise BadInput(f"--forwards is a number of forward passes above 0, not {options.forwards:g}.")
    if options.target is not None and not 0 < options.target <= 1:
        raise BadInput(f"--target is an accuracy above 0 and at most 1, such as 0.8, not {options.target:g}.")
    task, file = other_task(options, lambda data: data())
    reproduction = Reproduction(
        task=task or Reproduction.task,
        methods=names,
        forwards=options.forwards,
        rates=_rates(options.rates),
        more=options.more,
        seeds=options.seeds or Reproduction.seeds,
        target=Reproduction.target if options.target is None else options.target,
        settings=Settings(probes=options.probes or Settings.probes, every=options.snapshot_every or Settings.every),
    )
    return reproduction, file


def _names(text: str) -> tuple[str, ...]:
    """Return the names of methods in --rows, as they are typed.

    Raises:
        BadInput: the paper has no such method, or the text has no name.
    """
    names, known = tuple(filter(None, map(str.strip, text.split(";")))), {each.name: each.key for each in methods()}
    every = ", ".join(known)
    if not names:
        raise BadInput(f"--rows {shlex.quote(text)} names no method. Choose from: {every}.")
    for name in names:
        if name.lower().removesuffix(AS_CODED) not in known.values():
            hint = spec.hint(name, known)
            raise BadInput(f"--rows {shlex.quote(name)} is not known.{hint} Choose from: {every}.")
    return names


def _rates(text: str) -> tuple[float, ...]:
    """Return the grid of --rates: so many of the largest rates of `RATES`, or a range in half decades.

    Raises:
        BadInput: the text is neither.
    """
    if ":" in text:
        low, high = lr_range(text)
        return log_grid(low, high, 1 + round(2 * math.log10(high / low)) if 0 < low < high < math.inf else 1)
    if text not in [str(points) for points in range(1, len(RATES) + 1)]:
        raise BadInput(f"--rates is a number from 1 to {len(RATES)}, or a range such as 1e-5:1e-3, not {text!r}.")
    return RATES[len(RATES) - int(text) :]


def _command(options: ReproduceOptions) -> str:
    """Return the command that writes the page."""
    words = ["gradcost", "reproduce", options.paper]
    for name in ("rows", "task", "device", "seeds", "target", "probes", "snapshot_every"):
        words += [option(name), str(getattr(options, name))] if getattr(options, name) is not None else []
    for name in ("forwards", "rates", "more"):
        chosen = getattr(options, name)
        text = chosen if isinstance(chosen, str) else f"{chosen:g}"
        words += [f"--{name}", text] if chosen != getattr(ReproduceOptions, name) else []
    assert options.page is not None
    return shlex.join([*words, "--page", options.page.name])


def _show_dry_run(reproduction: Reproduction, options: ReproduceOptions) -> None:
    lengths = reproduction.lengths()
    seconds = forward_seconds(reproduction.task)
    hours = reproduction.hours(seconds, lengths)
    rows = [
        [each.name, f"{each.forwards:.2f}", f"{each.steps:,}", str(reproduction.runs), repr(each.estimator)]
        for each in lengths
    ]
    total = (
        f"{len(lengths) * reproduction.runs} runs, {number(hours, 2)} core-hours: a forward pass takes "
        f"{number(1000 * seconds, 2)} ms of one core here. Other processes on this machine make it slower."
    )
    if options.as_json:
        keys = ("method", "forwards per step", "steps", "runs", "estimator")
        answers = [dict(zip(keys, row, strict=True)) for row in rows]
        console.print_json({"hours": hours, "seconds per forward": seconds, "rows": answers})
        return
    console.show(reproduction.study.question)
    console.show_table(["method", "forwards per step", "steps", "runs", "gradient"], rows, left=True)
    console.show(total)
