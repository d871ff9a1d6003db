"""Text to values: the one place where a string says what to use."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from gradcost.core.errors import BadInput
from gradcost.core.value import is_value

_HOMES = {
    "method": ("checkpointing", "directions", "estimators", "planning.within", "slopes"),
    "optimizer": ("training.optimizers", "training.rounding"),
    "task": ("tasks.architectures", "tasks.charlm", "tasks.digits", "tasks.mnist"),
}
_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def names(*kinds: str) -> dict[str, Callable[..., Any]]:
    """What an expression may call: the values and presets that the modules of these kinds define."""
    found = {}
    for module in (module for kind in kinds for home in _HOMES[kind] for module in _modules(f"gradcost.{home}")):
        for name, thing in vars(module).items():
            made_here = getattr(thing, "__module__", None) == module.__name__
            if made_here and not name.startswith("_") and _makes_a_value(thing):
                found[name] = thing
    return dict(sorted(found.items()))


def _modules(home: str) -> Iterator[ModuleType]:
    """A module, or all of a folder's: a new file there is known here."""
    module = importlib.import_module(home)
    yield module
    for found in pkgutil.iter_modules(getattr(module, "__path__", ())):
        yield importlib.import_module(f"{home}.{found.name}")


def _makes_a_value(thing: Any) -> bool:
    if inspect.isclass(thing):
        return is_value(thing)
    return inspect.isfunction(thing) and thing.__module__ == "gradcost.estimators.presets"


def presets() -> dict[str, Callable[..., Any]]:
    """The names that people know, of those that stand for methods."""
    return {name: thing for name, thing in names("method").items() if inspect.isfunction(thing)}


def parse(text: str, *kinds: str) -> Any:
    """The value that an expression such as `Probing(slope=Jvp(), probes=4)` or `mezo()` stands for.

    Law: parse(repr(value)) == value. Only calls of known names with literal arguments are read; nothing is
    evaluated. Raises: ValueError with a sentence, for an unknown name with the near ones and their signatures.
    """
    kinds = kinds or tuple(_HOMES)
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise BadInput(f"{text!r} is not an expression like mezo(probes=4): {error.msg}.") from None
    return _value(tree, text, names(*kinds))


def _value(node: ast.expr, text: str, known: Mapping[str, Callable[..., Any]]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        return -node.operand.value  # type: ignore[operator]
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(_value(item, text, known) for item in node.elts)
    if isinstance(node, ast.Name):
        return _called(node.id, (), {}, known)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        arguments = [_value(argument, text, known) for argument in node.args]
        named = {k.arg: _value(k.value, text, known) for k in node.keywords if k.arg is not None}
        return _called(node.func.id, arguments, named, known)
    raise BadInput(f"{ast.unparse(node)!r} in {text!r} is neither a number, a tuple nor a call such as mezo().")


def _called(name: str, arguments: Any, named: Mapping[str, Any], known: Mapping[str, Callable[..., Any]]) -> Any:
    if name not in known:
        near = close(name, known) or sorted(known)
        raise BadInput(f"no method or part {name!r}. Did you mean {', or '.join(signature(known[n]) for n in near)}?")
    try:
        inspect.signature(known[name]).bind(*arguments, **named)
    except TypeError as error:
        raise BadInput(f"{name}: {error}. It is {signature(known[name])}.") from None
    try:
        return known[name](*arguments, **named)
    except TypeError as error:
        raise BadInput(f"{name}: an argument is of a wrong kind ({error}). It is {signature(known[name])}.") from None


def signature(thing: Callable[..., Any]) -> str:
    """How a value is written, with its defaults: `mezo(eps=0.001, probes=1)`."""
    parameters = [
        p.name if p.default is p.empty else f"{p.name}={p.default!r}"
        for p in inspect.signature(thing).parameters.values()
    ]
    return f"{thing.__name__}({', '.join(parameters)})"  # type: ignore[attr-defined]


def close(name: str, known: Mapping[str, Any]) -> list[str]:
    """The known names that `name` may have been meant for, the nearest first."""
    lower = {k.lower(): k for k in known}
    return [lower[match] for match in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)]


def hint(name: str, known: Mapping[str, Any]) -> str:
    """A question with the known names that are near, after a space; nothing where none is."""
    near = close(name, known)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def method(text: str) -> Any:
    """An estimator. Raises: ValueError when the expression stands for something else."""
    from gradcost.estimators.estimator import Estimator

    found = parse(text, "method")
    if not isinstance(found, Estimator):
        raise BadInput(
            f"{text!r} is a part of a method, not one: write Probing(slope=..., directions=...) around it."
        )
    return found


def optimizer(text: str) -> Any:
    """An optimizer. Raises: ValueError when the expression stands for something else."""
    from gradcost.training.optimizers import Optimizer

    found = parse(text, "optimizer")
    if not isinstance(found, Optimizer):
        raise BadInput(f"{text!r} is no optimizer: write AdamW(lr=0.001), for example.")
    return found


def dtype(text: str | None) -> Any:
    """A floating-point torch.dtype by its name; None for None. Raises: ValueError with the names."""
    if text is None:
        return None
    import torch

    known = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "fp64": "float64"}
    names = ("bfloat16", "float16", "float32", "float64")
    name = known.get(text, text.removeprefix("torch."))
    if name not in names:
        raise BadInput(f"no type of numbers {text!r}.{hint(name, dict.fromkeys(names))} Types: {', '.join(names)}.")
    return getattr(torch, name)


def device(text: str | None) -> str | None:
    """The type of a device that forecasts can be made for. Raises: ValueError with the types."""
    if text is not None and text.partition(":")[0] not in ("cpu", "cuda"):
        raise BadInput(f"no device {text!r} is known here: forecasts are for cpu or cuda.")
    return text and text.partition(":")[0]


def named(text: str, option: str) -> Callable[..., Any]:
    """What FILE.py:NAME or MODULE:NAME stands for: something to call. Raises: ValueError with a sentence."""
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise BadInput(f"{option} {text!r} names nothing: write FILE.py:NAME or MODULE:NAME.")
    if place.endswith(".py"):
        found = loaded(str(Path(place).resolve()))
    else:
        import sys

        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does: an installed command does not look here
        try:
            found = importlib.import_module(place)
        except Exception as error:
            raise BadInput(f"{place} could not be imported: {type(error).__name__}: {error}") from error
        finally:
            sys.path.remove(str(Path.cwd()))
    if not hasattr(found, name):
        raise BadInput(f"{place} defines no {name}.{hint(name, vars(found))}")
    thing = getattr(found, name)
    if not callable(thing):
        raise BadInput(f"{text} is {type(thing).__name__}, which cannot be called: {option} is a function.")
    return thing


def task(text: str, model: str | None = None) -> tuple[Any, str, str, str | None]:
    """A task, its name and its model's name, and the user's file if it comes from one.

    `text` is a name (`digits`), an expression (`Digits(batch=32)`) or FILE.py:NAME, a task or what makes one;
    `model` is one of the task's model names or an expression (`Mlp(hidden=(32,))`).
    """
    from gradcost.tasks import TASKS

    match = re.fullmatch(r"(.+\.py):(\w+)", text)
    if match:
        file = str(Path(match[1]).resolve())
        found, name = _from_file(file, match[2]), match[2]
    elif text in TASKS:
        found, name, file = TASKS[text](), text, None  # pyright: ignore[reportAbstractUsage]
    elif "(" in text:
        found, file = parse(text, "task"), None
        name = type(found).__name__.lower()
    else:
        raise BadInput(
            f"no task {text!r}.{hint(text, TASKS)} Tasks: {', '.join(TASKS)} (`gradcost tasks` tells more)."
        )
    for need in ("objective", "batch_at", "splits", "score"):
        if not hasattr(found, need):
            raise BadInput(f"{text} is no task: it has no `{need}`. Subclass gradcost.tasks.Task.")
    if model is None:
        return found, name, _model_name(found), file
    return _with_model(found, name, model), name, model, file


def _with_model(found: Any, name: str, model: str) -> Any:
    models = getattr(type(found), "models", {})
    if "(" in model:
        return dataclasses.replace(found, model=parse(model, "task"))
    if model not in models:
        raise BadInput(
            f"{name} has no model {model!r}.{hint(model, models)} Models: {', '.join(models) or 'its own'}."
        )
    return dataclasses.replace(found, model=models[model])


def _model_name(found: Any) -> str:
    models = getattr(type(found), "models", {})
    mine = getattr(found, "model", None)
    return next((name for name, model in models.items() if model == mine), repr(mine) if mine else "its own model")


def loaded(path: str) -> Any:
    """A Python file as a module. Raises: ValueError where there is none, or what it raises."""
    from gradcost.studies.worker import load_file

    if not Path(path).is_file():
        raise BadInput(f"there is no file {path}.")
    try:
        return load_file(path)
    except Exception as error:
        raise BadInput(f"{path} could not be imported: {type(error).__name__}: {error}") from error


def _from_file(path: str, name: str) -> Any:
    module = loaded(path)
    if not hasattr(module, name):
        raise BadInput(f"{path} defines no {name}.")
    found = getattr(module, name)
    found = found() if inspect.isclass(found) or not hasattr(found, "batch_at") else found
    if " at 0x" in repr(found):
        raise BadInput(
            f"{path}:{name} prints as {found!r}, another text in every process, so its runs could not be told from "
            "others'. Make it a frozen dataclass, as tasks are."
        )
    return found


def size(text: str) -> int:
    """Bytes: `64MiB` is 64 x 2^20, `64MB` is 64 x 10^6. Raises: ValueError with a sentence."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    if not match or match[2].lower() not in units:
        raise BadInput(f"{text!r} is no amount of memory: write a number above 0 and one of {', '.join(_UNITS)}.")
    amount = int(float(match[1]) * units[match[2].lower()])
    if amount <= 0:
        raise BadInput(f"{text!r} is no amount of memory: it must be above 0.")
    return amount
