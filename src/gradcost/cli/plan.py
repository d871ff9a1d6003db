"""`gradcost plan`: from arguments to a plan, before anything runs."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradcost.cli import console, spec
from gradcost.core.errors import BadInput
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.core.units import DASH
from gradcost.planning.curve import curve
from gradcost.planning.plan import Plan, plan
from gradcost.planning.row import COLUMNS

EXAMPLES = 8  # of a batch where nothing else is asked for


def plan_methods(
    model: str | None,
    data: str | None,
    task: str | None,
    memory: str,
    device: str | None,
    dtype: str | None,
    batch: int | None,
    length: int | None,
    lora: int | None,
    chunks: int | None,
    optimizer: str,
    methods: list[str],
    max_batch: bool,
    as_json: bool,
    output: Path | None,
) -> int:
    """Show what each method would take and which to use. Returns the exit code."""
    budget, where, kind = spec.size(memory), spec.device(device), spec.dtype(dtype)
    estimators = [spec.method(text) for text in methods] or None
    updates = spec.optimizer(optimizer)
    if task is not None:
        refuse("--task", **{"--data": data, "--dtype": dtype, "--length": length, "--lora": lora, "--chunks": chunks})
        objective, examples = of_task(task, model, batch)
    elif model is None:
        raise BadInput("no model is given: write --model hf:CONFIG.json, --model FILE.py:FACTORY, or --task digits.")
    else:
        with progress("planning") as told:
            told(f"making {model}")
            objective, examples = of_model(model, data, kind, batch, length, lora, chunks, without_numbers)
    with progress("planning") as told:
        found = plan(objective, examples, budget, estimators, updates, where, max_batch, told)
        points = curve(objective, examples, updates, where, on_progress=told) if output is not None else []
    record = found.record() | {"dtype": _dtypes(objective), "curve": points}
    if output is not None:
        from gradcost.report import plan as page

        page.write(record, output)
    if as_json:
        print(json.dumps(record, indent=2))
    else:
        _show(found, record, output)
    return 0 if found.choice is not None else 4


def _show(found: Plan, record: dict[str, Any], output: Path | None) -> None:
    console.show(f"{found.title}   {record['dtype']}")
    console.show()
    rows = [row.cells() for row in found.rows]
    # A column in which nothing is said is left out: what would fill it is said below, or in --help.
    told = [i for i in range(len(COLUMNS)) if i < 4 or any(row[i] != DASH for row in rows)]
    console.show_table([COLUMNS[i] for i in told], [[row[i] for i in told] for row in rows])
    console.show()
    console.show(found.sentence, bold=True)
    for line in found.lines():
        console.show(line)
    if output is not None:
        console.show(f"page    {output}")


@contextmanager
def progress(work: str) -> Iterator[Callable[[str], None]]:
    """What is looked at, on a terminal; elsewhere nothing."""
    if not console.err.is_terminal:
        yield lambda what: None
        return
    with console.err.status(work) as status:
        yield lambda what: status.update(f"{work}: {what}")


def refuse(beside: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise BadInput(f"{name} says something about --model, and {beside} already says it: leave one out.")


def of_task(task: str, model: str | None, batch: int | None) -> tuple[Objective, Any]:
    found = spec.task(task, model)[0]
    if batch is not None:
        if "batch" not in getattr(type(found), "__dataclass_fields__", {}):
            raise BadInput(f"{task} has a batch size of its own: leave --batch out.")
        found = replace(found, batch=batch)
    return found.objective(Key(0)), found.batch_at(Key(0), 0)


def of_model(
    model: str,
    data: str | None,
    dtype: torch.dtype | None,
    batch: int | None,
    length: int | None,
    lora: int | None,
    chunks: int | None,
    make: Callable[[Callable[[], Any]], Any],
) -> tuple[Objective, Any]:
    """The objective and the batch that --model and --data stand for; `make` calls the factory."""
    from gradcost.integrations import transformers

    examples = EXAMPLES if batch is None else batch
    if examples < 1:
        raise BadInput(f"a batch has 1 example or more, not {examples}.")
    if model.startswith("hf:"):
        made, loss = transformers.from_config(model.removeprefix("hf:"), dtype), None
    else:
        made, loss = _from_factory(model, dtype, make)
    # Without the library installed, it is none of its models.
    known = model.startswith("hf:") or (_is_from("transformers", made) and transformers.is_model(made))
    if not known:
        options = {"--length": length, "--lora": lora, "--chunks": chunks}
        for name in (name for name, value in options.items() if value is not None):
            raise BadInput(f"{name} is for models of transformers, and {model} gives {type(made).__name__}.")
    if lora is not None:
        made = transformers.with_lora(made, lora)
    if data is not None:
        given = _batch_of(data, examples)
        return Objective(made, loss or _cross_entropy), given
    if not known:
        raise BadInput(
            f"{model} gives {type(made).__name__}, and nothing says what it is trained on: add --data "
            "FILE.py:FUNCTION, where FUNCTION(batch size) gives a batch (x, y)."
        )
    objective, given = transformers.objective(made, examples, length, chunks)
    return (objective if loss is None else Objective(made, loss)), given


def _is_from(library: str, made: nn.Module) -> bool:
    inner: Any = made.get_base_model() if hasattr(made, "get_base_model") else made  # type: ignore[operator]
    return any(kind.__module__.split(".")[0] == library for kind in type(inner).__mro__)


def without_numbers(factory: Callable[[], Any]) -> Any:
    """What a factory makes, without data where it can be made so."""
    try:
        with torch.device("meta"):
            return factory()
    except Exception:  # it needs numbers: whatever is wrong beside that is said by its second failure
        return factory()


def _from_factory(
    text: str, dtype: torch.dtype | None, make: Callable[[Callable[[], Any]], Any]
) -> tuple[nn.Module, Any]:
    """What a factory makes: a module, or one with its loss."""
    factory = spec.named(text, "--model")
    try:
        made = make(factory)
    except Exception as error:
        raise BadInput(f"{text} could not make a model: {type(error).__name__}: {error}") from error
    module, loss = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module) or not (loss is None or callable(loss)):
        raise BadInput(
            f"{text} returned {type(made).__name__}: a factory returns a torch.nn.Module, or a module and its "
            "loss(model, batch)."
        )
    return (module if dtype is None else module.to(dtype)), loss


def _batch_of(text: str, examples: int) -> Any:
    function = spec.named(text, "--data")
    try:
        inspect.signature(function).bind(examples)
    except TypeError as error:
        raise BadInput(f"{text} is called with the batch size alone, and it takes others: {error}.") from None
    except ValueError:
        pass  # a function without a signature
    try:
        return function(examples)
    except Exception as error:
        raise BadInput(f"{text} could not make a batch of {examples}: {type(error).__name__}: {error}") from error


def _cross_entropy(model: nn.Module, batch: Any) -> torch.Tensor:
    from gradcost.tasks.task import Batch, cross_entropy

    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise BadInput(
            f"--data gave {type(batch).__name__}: without a loss of its own, a module is trained on (x, y) by "
            "cross-entropy. Let the factory return (model, loss) for anything else."
        )
    return cross_entropy(model, Batch(*batch))


def _dtypes(objective: Objective) -> str:
    """The types of the weights, that of most bytes first."""
    sizes: dict[str, int] = {}
    for parameter in objective.model.parameters():
        name = str(parameter.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + parameter.nbytes
    return " and ".join(sorted(sizes, key=lambda name: -sizes[name]))
