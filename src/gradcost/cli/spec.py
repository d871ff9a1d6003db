"""Parse the texts of options into methods, optimizers, tasks and other values. No other module does."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import importlib
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from gradcost.cli import expressions, plugins
from gradcost.core.errors import BadInput, GradcostError
from gradcost.core.value import is_value
from gradcost.results.comparability import CUSTOMARY

# The modules of gradcost that define the values and presets of each kind of expression.
_MODULES = {
    "method": ("checkpointing", "directions", "estimators", "planning.within", "slopes"),
    "optimizer": ("training.optimizers", "training.rounding", "training.eight_bit"),
    "task": (
        *(f"tasks.{name}" for name in ("architectures", "charlm", "cifar10", "digits", "emoji", "fashion_mnist")),
        *(f"tasks.{name}" for name in ("hub", "hub_images", "mnist", "pretrained", "texts")),
        *(f"tasks.{name}" for name in ("vision_language", "vqa")),
    ),
}
_DTYPES = ("bfloat16", "float16", "float32", "float64")
_DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "fp64": "float64"}


def names(*kinds: str) -> dict[str, Callable[..., Any]]:
    """Return the classes and presets that an expression of these kinds may call, by name."""
    known = {}
    for module in (module for kind in kinds for name in _MODULES[kind] for module in _import(f"gradcost.{name}")):
        for name, thing in vars(module).items():
            is_defined_here = getattr(thing, "__module__", None) == module.__name__
            if is_defined_here and not name.startswith("_") and _makes_a_value(thing):
                known[name] = thing
    return dict(sorted((known | plugins.added(kinds, known)).items()))


def _import(name: str) -> Iterator[ModuleType]:
    """Import and yield a module; for a package also each module in it, so that a new file needs no entry above."""
    module = importlib.import_module(name)
    yield module
    for submodule in pkgutil.iter_modules(getattr(module, "__path__", ())):
        yield importlib.import_module(f"{name}.{submodule.name}")


def _makes_a_value(thing: Any) -> bool:
    """Return whether `thing` is a value class (`gradcost.core.value`) or a preset."""
    if inspect.isclass(thing):
        return is_value(thing)
    return inspect.isfunction(thing) and thing.__module__ == "gradcost.estimators.presets"


def presets() -> dict[str, Callable[..., Any]]:
    """Return the presets, by name."""
    return {name: thing for name, thing in names("method").items() if inspect.isfunction(thing)}


def parse(text: str, *kinds: str, what: str | None = None) -> Any:
    """Return the value of an expression such as `Probing(slope=Jvp(), probes=4)` or `mezo()`.

    Law: parse(repr(value)) == value. Only calls of known names run, with literals or
    other such calls as arguments.

    Args:
        text: the expression.
        kinds: keys of `_MODULES`. None given: all of them.
        what: the noun for the value in messages. None: the only kind, if there is one.
    Raises:
        BadInput: the text is not such an expression. For an unknown name, the message suggests similar names.
    """
    if what is None and len(kinds) == 1:
        (what,) = kinds
    return _value(expressions.tree(text), names(*(kinds or _MODULES)), what)


def _value(node: ast.expr, known: Mapping[str, Callable[..., Any]], what: str | None = None) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.UnaryOp(operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.Tuple() | ast.List():
            return tuple(_value(item, known) for item in node.elts)
        case ast.Name():
            return _call(node.id, (), {}, known, what)
        case ast.Call(func=ast.Name(id=name)):
            arguments = [_value(argument, known) for argument in node.args]
            return _call(name, arguments, {str(k.arg): _value(k.value, known) for k in node.keywords}, known, what)
    raise AssertionError(f"`expressions.tree` refuses {node}")


def _call(
    name: str, arguments: Any, keywords: Mapping[str, Any], known: Mapping[str, Callable[..., Any]], what: str | None
) -> Any:
    if name not in known:
        near = ", or ".join(signature(known[n]) for n in similar(name, known))
        advice = f"Did you mean {near}?" if near else f"Known: {', '.join(known)}."
        raise BadInput(f"there is no {f'{what} ' if what else ''}{name!r}. {advice}")
    thing = known[name]
    try:
        bound = inspect.signature(thing).bind(*arguments, **keywords)
    except TypeError as error:
        raise BadInput(f"{name}: {error}. Write {signature(thing)}.") from None
    if problem := expressions.misfit(thing, bound.arguments, known):
        raise BadInput(f"{name}: {problem}. Write {signature(thing)}.")
    return thing(*arguments, **keywords)


def signature(thing: Callable[..., Any]) -> str:
    """Return the call of a class or preset with its defaults: `mezo(eps=0.001, probes=1)`."""
    parameters = [
        p.name if p.default is p.empty else f"{p.name}={p.default!r}"
        for p in inspect.signature(thing).parameters.values()
    ]
    return f"{thing.__name__}({', '.join(parameters)})"  # type: ignore[attr-defined]


def similar(name: str, known: Mapping[str, Any]) -> list[str]:
    """Return the known names that resemble `name`, the most similar first; one alone if only its case differs."""
    same = [k for k in known if k.lower() == name.lower()]
    if len(same) == 1:
        return same
    lower = {k.lower(): k for k in known}
    return [lower[match] for match in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)]


def hint(name: str, known: Mapping[str, Any]) -> str:
    """Return " Did you mean X?" with the similar known names, or "" if there are none."""
    near = similar(name, known)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def method(text: str) -> Any:
    """Return the estimator that an expression describes. A policy such as `Within(8GiB)` is backprop with it."""
    from gradcost.checkpointing.policies import Saving
    from gradcost.estimators.estimator import Estimator
    from gradcost.estimators.reverse import Reverse

    estimator = parse(text, "method")
    estimator = Reverse(estimator) if isinstance(estimator, Saving) else estimator
    if not isinstance(estimator, Estimator):
        raise BadInput(f"{text!r} is a part of a method, not a method: write Probing(slope=..., directions=...).")
    return estimator


def optimizer(text: str) -> Any:
    """Return the optimizer that an expression describes."""
    from gradcost.training.optimizers import Optimizer

    result = parse(text, "optimizer")
    if not isinstance(result, Optimizer):
        raise BadInput(f"{text!r} is not an optimizer: write AdamW(lr=0.001), for example.")
    return result


def optimizer_or_customary(text: str) -> Any:
    """Return the optimizer that an expression describes, or `Customary()` for the text `customary`."""
    from gradcost.training.customary import Customary

    return Customary() if text.strip() == CUSTOMARY else optimizer(text)


def optimizer_template(text: str) -> Any:
    """Return an optimizer whose learning rate will be replaced: `AdamW` and `AdamW(weight_decay=0.1)` need no lr.

    The text `customary` gives each method the optimizer that is customary for it.
    """
    if text.strip() == CUSTOMARY:
        return optimizer_or_customary(text)
    known, tree = names("optimizer"), expressions.tree(text)

    class WithRate(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return self.visit_Call(ast.Call(node, [], [])) if node.id in known else node

        def visit_Call(self, node: ast.Call) -> ast.expr:
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            node.args = [self.visit(argument) for argument in node.args]
            for keyword in node.keywords:
                keyword.value = self.visit(keyword.value)
            takes_rate = name in known and "lr" in inspect.signature(known[name]).parameters
            if takes_rate and not node.args and all(keyword.arg != "lr" for keyword in node.keywords):
                node.keywords.append(ast.keyword("lr", ast.Constant(1.0)))
            return node

    return optimizer(ast.unparse(ast.fix_missing_locations(WithRate().visit(tree))))


def executor(name: str, workers: int | None) -> Any:
    """Return the executor with this name. `workers`: number of worker processes; None for one per CPU core."""
    from gradcost.studies.executors import Local, Ray

    known = {"local": Local, "ray": Ray}
    if name not in known:
        raise BadInput(f"no executor {name!r}.{hint(name, known)} Executors: {', '.join(known)}.")
    return known[name](workers or os.cpu_count() or 1)


def dtype(text: str | None) -> Any:
    """Return the floating-point torch.dtype with this name; None for None."""
    if text is None:
        return None
    import torch

    name = _DTYPE_ALIASES.get(text, text.removeprefix("torch."))
    if name not in _DTYPES:
        near = hint(name, dict.fromkeys(_DTYPES))
        raise BadInput(f"no floating-point dtype {text!r}.{near} Dtypes: {', '.join(_DTYPES)}.")
    return getattr(torch, name)


def device(text: str | None) -> str | None:
    """Return the type "cpu" or "cuda" of a device such as "cuda:0"; None for None."""
    if text is not None and text.partition(":")[0] not in ("cpu", "cuda"):
        raise BadInput(f"no forecast for the device {text!r}: forecasts are for cpu or cuda.")
    return text and text.partition(":")[0]


def named(text: str, option: str) -> Callable[..., Any]:
    """Return the function that FILE.py:NAME or MODULE:NAME names; `option` appears in error messages."""
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise BadInput(f"{option} {text!r} names no function: write FILE.py:NAME or MODULE:NAME.")
    if place.endswith(".py"):
        module = loaded(str(Path(place).resolve()))
    else:
        from gradcost.core.user_errors import import_errors

        folder = str(Path.cwd())
        sys.path.insert(0, folder)  # an installed command does not search the current folder
        try:
            with import_errors(place):
                module = importlib.import_module(place)
        finally:
            with contextlib.suppress(ValueError):  # the module took it out
                sys.path.remove(folder)
    if not hasattr(module, name):
        raise BadInput(f"{place} defines no {name}.{hint(name, vars(module))}")
    thing = getattr(module, name)
    if not callable(thing):
        raise BadInput(f"{text} is {type(thing).__name__}, which cannot be called: {option} takes a function.")
    return thing


def task(text: str, model: str | None = None) -> tuple[Any, str, str, str | None]:
    """Return (task, its name, the name of its model, the user's file that defines it or None).

    Args:
        text: a name (`digits`), an expression (`Digits(batch=32)`), or FILE.py:NAME. NAME is a task or a
            function that returns one.
        model: the name of one of the task's models, or an expression (`Mlp(hidden=(32,))`).
    """
    from gradcost.studies.task_info import check_task, model_name, task_name
    from gradcost.tasks import TASKS

    match = re.fullmatch(r"(.+\.py):(\w+)", text)
    if text.endswith(".py"):
        raise BadInput(f"{text!r} names a file and no task in it: write {text}:NAME.")
    if match:
        file = str(Path(match[1]).resolve())
        result, name = _from_file(file, match[2]), match[2]
    elif text in TASKS:
        result, name, file = TASKS[text](), text, None  # pyright: ignore[reportAbstractUsage]
    elif "(" in text or text in names("task"):
        result, file = parse(text, "task"), None
        name = task_name(result)
    else:
        raise BadInput(
            f"no task {text!r}.{hint(text, TASKS)} Tasks: {', '.join(TASKS)} (`gradcost tasks` describes them)."
        )
    check_task(result, text)
    if model is None:
        return result, name, model_name(result), file
    return _with_model(result, name, model), name, model, file


def _with_model(task: Any, name: str, model: str) -> Any:
    models = getattr(type(task), "models", {})
    if "(" in model:
        return dataclasses.replace(task, model=parse(model, "task", what="model"))
    if model not in models:
        raise BadInput(
            f"{name} has no model {model!r}.{hint(model, models)} Models: {', '.join(models) or 'only its own'}."
        )
    return dataclasses.replace(task, model=models[model])


def loaded(path: str) -> ModuleType:
    """Import a Python file and return its module."""
    from gradcost.core.user_errors import import_errors
    from gradcost.studies.user_code import load_file

    if not Path(path).is_file():
        raise BadInput(f"there is no file {path}.")
    with import_errors(path):
        return load_file(path)


def _from_file(path: str, name: str) -> Any:
    module = loaded(path)
    if not hasattr(module, name):
        raise BadInput(f"{path} defines no {name}.")
    thing = getattr(module, name)
    if not hasattr(thing, "batch_at") or inspect.isclass(thing):
        if not callable(thing):
            raise BadInput(
                f"{path}:{name} is of type {type(thing).__name__}: --task takes a task, or a function that "
                "returns one."
            )
        try:
            result = thing()
        except GradcostError:
            raise
        except Exception as error:
            raise BadInput(f"{path}:{name} could not make a task: {type(error).__name__}: {error}") from error
    else:
        result = thing
    _refuse_model(result, path, name)
    if " at 0x" in repr(result):
        raise BadInput(
            f"the repr of {path}:{name} is {result!r}. It differs in every process, so runs cannot be identified by "
            "it. Make the task a frozen dataclass."
        )
    return result


def _refuse_model(result: Any, path: str, name: str) -> None:
    """Raise BadInput if --task names what --model takes: a function that returns a model, or (model, loss)."""
    from torch import nn

    made = result[0] if isinstance(result, tuple) and result else result
    if isinstance(made, nn.Module):
        file = Path(path).name
        raise BadInput(
            f"{file}:{name} returns a model, and --task takes a task. For your own model and data write --model "
            f"{file}:{name} --data {file}:LOADERS."
        )
