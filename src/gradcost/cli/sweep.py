"""`gradcost plan --sweep`: parse the values, compute their plans, write the calculator page."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gradcost.cli import console, quantities, spec
from gradcost.cli.objective import dtypes
from gradcost.cli.options import PlanOptions
from gradcost.core.errors import BadInput
from gradcost.core.inner_model import inner_model
from gradcost.core.objective import Objective
from gradcost.core.pytree import batch_size, tensors
from gradcost.core.units import count
from gradcost.planning.batch import resized
from gradcost.planning.candidates import PROBES
from gradcost.planning.sweep import sweep
from gradcost.report import calculator

MOST_SIZES = 1024
MOST_OBJECTIVES = 64  # combinations of the values of all options except the batch

Make = Callable[[PlanOptions], tuple[Objective, Any]]  # the objective and a batch of a plan

_NAMES: tuple[str, ...] = ("batch", "length", "lora", "bits", "chunks", "dtype", "optimizer")
_WITHOUT = ("lora", "bits", "chunks")  # options that 0 leaves out
_EXAMPLE = 'Write, for example, --sweep "batch=1..64,length=512..4096".'


def write_calculator(options: PlanOptions, make: Make) -> int:
    """Write the page for every combination of the swept values, and return the exit code."""
    if options.output is None:
        raise BadInput("--sweep writes a page: add -o calculator.html.")
    for flag, is_given in (
        ("--max-batch", options.max_batch),
        ("--fail-over", options.fail_over),
        ("--devices", options.devices > 1),
    ):
        if is_given:
            raise BadInput(f"{flag} cannot be combined with --sweep: leave one out.")
    axes, budget, device = (
        parsed(options.sweep or (), options),
        quantities.size(options.memory),
        spec.device(options.device),
    )
    estimators = [spec.method(text) for text in options.method or ()] or None
    calculator.check_output(options.output)
    sizes = axes.pop("batch", None)
    settings = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if len(settings) > MOST_OBJECTIVES:
        raise BadInput(
            f"these values have {len(settings):,} combinations beside the batch, and {MOST_OBJECTIVES} are allowed: "
            "give fewer values, or write several pages."
        )
    made = [made_of(options, make, sizes, values) for values in settings]
    batches = [batch for _, batch, reason in made if not reason]
    if not batches:
        raise BadInput(made[0][2])
    sizes = sizes or [batch_size(batches[0])]
    gc.freeze()  # as in a plan
    objectives: list[dict[str, Any]] = []
    with console.status("sweeping") as progress:
        for values, (objective, batch, reason) in zip(settings, made, strict=True):
            record: dict[str, Any] = {"choice": [axes[name].index(value) for name, value in values.items()]}
            objectives.append(record)
            if objective is None:
                record["refusal"] = reason
                continue
            where = ", ".join(f"{name} {value}" for name, value in values.items())
            found = sweep(
                objective,
                batch,
                sizes,
                estimators,
                spec.optimizer_or_customary(str(values.get("optimizer", options.optimizer))),
                device=device,
                probes=PROBES if options.all_rows else PROBES[:1],
                on_progress=lambda item, where=where: progress(f"{where}: {item}" if where else item),
            )
            name = type(inner_model(objective.model)).__name__
            record |= {"model": name, "dtype": dtypes(objective), **found.record()}
    record = _record(options, axes, sizes, budget, objectives)
    calculator.write(record, options.output)
    _show(options, record)
    return 0


def parsed(texts: Sequence[str], options: PlanOptions) -> dict[str, list[Any]]:
    """Return the values of each swept option: {"batch": [1, 2, 3], "optimizer": ["SGD(0.1)"]}.

    A text is NAME=VALUES, or several of them after commas. VALUES are separated by "," or "|"; `A..B` is every whole
    number from A to B for the batch, and A, 2 A, 4 A, ... up to B for the length. 0 leaves out lora, bits or chunks.

    Raises:
        BadInput: a name or value is wrong or appears twice, or the option is also given alone.
    """
    found: dict[str, list[Any]] = {}
    name = ""
    for text in texts:
        name = ""
        for item in _items(text):
            match = re.match(r"(\w+)\s*=(.*)", item, re.DOTALL)
            if match:
                name, item = match[1], match[2].strip()
                _check_name(name, found, options)
                found[name] = []
            if not name:
                raise BadInput(f"--sweep {item!r} does not begin with the name of an option and =. {_EXAMPLE}")
            found[name] += _values(name, item)
    for name, values in found.items():
        twice = [value for i, value in enumerate(values) if value in values[:i]]
        if twice:
            raise BadInput(f"--sweep {name} has {twice[0]} twice: write each value once.")
        if name == "batch":
            values.sort()
    if len(found.get("batch", ())) > MOST_SIZES:
        raise BadInput(f"--sweep batch has too many sizes: {MOST_SIZES:,} are the most.")
    return found


def _items(text: str) -> Iterator[str]:
    """Yield the parts of a text between commas or bars that are outside parentheses."""
    depth, start = 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if letter in ",|" and depth == 0:
            yield text[start:place].strip()
            start = place + 1
    yield text[start:].strip()


def _check_name(name: str, found: dict[str, list[Any]], options: PlanOptions) -> None:
    if name not in _NAMES:
        known = dict.fromkeys(_NAMES)
        raise BadInput(f"--sweep has no option {name!r}.{spec.hint(name, known)} Options: {', '.join(_NAMES)}.")
    if name in found:
        raise BadInput(f"--sweep has {name} twice: write all its values once, such as {name}=A,B.")
    if getattr(options, name) != PlanOptions.__dataclass_fields__[name].default:
        raise BadInput(f"--{name} cannot be combined with --sweep {name}=...: leave one out.")


def _values(name: str, item: str) -> list[Any]:
    if not item:
        raise BadInput(f"--sweep {name} has an empty value. {_EXAMPLE}")
    if name == "dtype":
        spec.dtype(item)
        return [item]
    if name == "optimizer":
        spec.optimizer_or_customary(item)
        return [item]
    match = re.fullmatch(r"(\d{1,9})(?:\s*\.\.\s*(\d{1,9}))?", item)
    if not match or (match[2] and name not in ("batch", "length")):
        ranges = " or a range A..B" if name in ("batch", "length") else ""
        raise BadInput(f"--sweep {name} has {item!r}, which is no whole number{ranges}. {_EXAMPLE}")
    low, high = int(match[1]), int(match[2] or match[1])
    if low > high:
        raise BadInput(f"--sweep {name} has {item}, which is empty: write {high}..{low}.")
    if low < 1 and name not in _WITHOUT:
        raise BadInput(f"--sweep {name} has {item}, and a {name} is 1 or more.")
    if name == "bits" and low not in (0, 4):
        raise BadInput(f"--sweep bits has {item}: write 4, or 0 for weights as they are.")
    if name == "length":
        return list(itertools.takewhile(lambda length: length <= high, (low << i for i in itertools.count())))
    return list(range(low, min(high, low + MOST_SIZES) + 1))


def made_of(
    options: PlanOptions, make: Make, sizes: Sequence[int] | None, values: dict[str, Any]
) -> tuple[Objective | None, Any, str]:
    """Return the objective and batch of a combination; None and the reason if two values exclude each other."""
    given = {name: value or None for name, value in values.items()}
    chosen = dataclasses.replace(options, batch=sizes[0] if sizes else options.batch, **given)
    if chosen.bits and "lora" in values and not chosen.lora:
        return None, None, "Weights in 4 bits cannot be trained: they need LoRA adapters."
    objective, batch = make(chosen)
    if sizes and not (options.model or "").startswith("hf:"):
        largest = make(dataclasses.replace(chosen, batch=sizes[-1]))[1]
        one, other = ([(x.shape, x.dtype) for x in tensors(each)] for each in (largest, resized(batch, sizes[-1])))
        if one != other:
            raise BadInput(
                f"the tensors of a batch of {sizes[-1]} are not those of a batch of {sizes[0]} with more examples: "
                "leave batch out of --sweep, and set --batch."
            )
    return objective, batch, ""


def _record(
    options: PlanOptions,
    axes: dict[str, list[Any]],
    sizes: Sequence[int],
    budget: int,
    objectives: list[dict[str, Any]],
) -> dict[str, Any]:
    return {
        "kind": "calculator",
        "source": options.model or options.task,
        "budget": budget,
        "memory": options.memory,
        "sizes": list(sizes),
        "command": _command(options),
        "made by": _command(options, "memory", "sweep", "output", "method", "batch"),
        "axes": [
            {"name": name, "values": [{"label": str(value), "words": _words(name, value)} for value in values]}
            for name, values in axes.items()
        ],
        "objectives": objectives,
    }


def _words(name: str, value: Any) -> str:
    return "" if name in _WITHOUT and not value else f"--{name} {shlex.quote(str(value))}"


def _command(options: PlanOptions, *more: str) -> str:
    """Return `gradcost plan` with the options that are given; those of the page only if in `more`."""
    words = ["gradcost", "plan"]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        is_left_out = field.name in ("memory", "sweep", "output", "method", "batch") and field.name not in more
        if value == field.default or value is None or isinstance(value, bool) or is_left_out:
            continue
        for each in value if isinstance(value, list) else [value]:
            words += ["-o" if field.name == "output" else f"--{field.name}", str(each)]
    return shlex.join([*words, *(["--all"] if options.all_rows and more else [])])


def _show(options: PlanOptions, record: dict[str, Any]) -> None:
    if options.as_json:
        console.print_json(record)
        return
    found = [each for each in record["objectives"] if "methods" in each]
    pairs = sum(len(each["methods"]) * len(record["sizes"]) for each in found)
    simulated = sum(each["simulated"] for each in found)
    console.show(
        f"{count(len(found), 'setting')} of the model at {count(len(record['sizes']), 'batch size')}: {pairs:,} "
        f"forecasts of methods, from {simulated:,} simulations, those of checkpointing schedules included"
    )
    console.show(f"page    {options.output}")
