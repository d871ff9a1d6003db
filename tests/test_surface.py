"""The public surface: about 45 flat names, the rest in the namespaces of their packages, all documented and typed."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import gradcost

SURFACE = [
    "Accumulated",
    "Adam",
    "AdamW",
    "Adaptive",
    "BadInput",
    "ByLength",
    "CentralDifference",
    "Clipped",
    "DoesNotFit",
    "Estimate",
    "Estimator",
    "ForwardDifference",
    "Gaussian",
    "GradcostError",
    "Gradient",
    "Jvp",
    "Key",
    "Mixed",
    "Momentum",
    "Objective",
    "Probing",
    "Rademacher",
    "Reverse",
    "SGD",
    "Trial",
    "Unsupported",
    "VarianceReduced",
    "activity_perturbation",
    "addax",
    "backprop",
    "check",
    "checkpoint",
    "checkpointed",
    "compare",
    "forecast",
    "forward_gradient",
    "fzoo",
    "hizoo",
    "measure",
    "mezo",
    "multi_tangent",
    "plan",
    "run_study",
    "spsa",
    "study",
    "surrogate_loss",
    "train",
    "zo_sgd_sign",
    "zo_svrg",
]

SOURCE = Path(gradcost.__file__).parent
PACKAGES = {name: thing for name in gradcost.__all__ if inspect.ismodule(thing := getattr(gradcost, name))}
FLAT = sorted(set(gradcost.__all__) - set(PACKAGES))
PLACES: list[ModuleType] = [gradcost, *PACKAGES.values()]
PUBLIC = {
    f"{place.__name__}.{name}": thing
    for place in PLACES
    for name in getattr(place, "__all__", ())
    if not inspect.ismodule(thing := getattr(place, name))
}


def test_the_flat_names_are_these():
    assert FLAT == SURFACE


def test_every_package_is_a_namespace():
    folders = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert set(PACKAGES) == folders - {"cli"}


def test_each_public_name_is_defined_in_the_library_under_that_name():
    for name, thing in PUBLIC.items():
        if callable(thing):
            assert thing.__module__.startswith("gradcost."), name
            assert thing.__name__ == name.rpartition(".")[2]


def test_the_stub_lists_each_name_once_and_in_order():
    lines = [line for line in (SOURCE / "__init__.pyi").read_text().splitlines() if line.startswith("from ")]
    flat = [line.split()[-1] for line in lines if not line.startswith("from . ")]
    assert sorted(flat) == FLAT
    assert all(line.split()[-1] == line.split()[-3] for line in lines), "re-exported as itself, for type checkers"


def test_a_wrong_name_is_an_attribute_error():
    for name in ("Momenta", "np", "torch"):
        with pytest.raises(AttributeError, match=name):
            getattr(gradcost, name)


def test_former_names_still_work_with_a_warning():
    with pytest.warns(DeprecationWarning, match="gradcost.Steps is now gradcost.instruments.TrainingStep"):
        assert gradcost.Steps is gradcost.instruments.TrainingStep  # type: ignore[attr-defined]
    assert set(gradcost._FORMER).isdisjoint(FLAT)  # type: ignore[attr-defined]


def test_the_version_is_the_installed_one():
    from importlib.metadata import version

    assert gradcost.__version__ == version("gradcost")
    assert (SOURCE / "py.typed").exists()


def test_importing_the_library_and_making_a_key_imports_no_torch():
    code = "import sys, gradcost; gradcost.Key(0).fold('a'); dir(gradcost); print(*sorted(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in ran.stdout.split()}
    assert "gradcost" in loaded
    assert loaded.isdisjoint({"torch", "numpy", "numba", "rich", "typer", "altair", "sklearn"})


# ---- docstrings


def parameters(thing: object) -> list[str]:
    """The names that a caller passes: of a function, or of a class whose instances a user makes."""
    if inspect.isclass(thing):
        if inspect.isabstract(thing) or issubclass(thing, BaseException):
            return []
        if "__init__" not in vars(thing) and not hasattr(thing, "__dataclass_fields__"):
            return []
    names = inspect.signature(thing).parameters  # type: ignore[arg-type]
    return [name for name in names if not name.startswith("_")]


def section(text: str, title: str) -> str | None:
    """The indented body of `Args:` or `Returns:` in a docstring; None where there is none."""
    lines = inspect.cleandoc(text).splitlines()
    if f"{title}:" not in lines:
        return None
    body = []
    for line in lines[lines.index(f"{title}:") + 1 :]:
        if line and not line.startswith(" "):
            break
        body.append(line)
    return "\n".join(body)


CALLABLES = {name: thing for name, thing in PUBLIC.items() if inspect.isfunction(thing) or inspect.isclass(thing)}


def test_every_public_callable_lists_its_arguments_and_what_it_returns():
    missing = []
    for name, thing in CALLABLES.items():
        text = thing.__doc__ or ""
        arguments = section(text, "Args") or ""
        missing += [f"{name}: {p}" for p in parameters(thing) if f"    {p}:" not in f"\n{arguments}"]
        if inspect.isfunction(thing):
            returns = inspect.signature(thing).return_annotation
            if returns not in (None, "None") and not (section(text, "Returns") or section(text, "Yields")):
                missing.append(f"{name}: Returns")
    assert missing == []


def methods(kind: type) -> list[tuple[str, ast.FunctionDef]]:
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(kind)))
    assert isinstance(tree.body[0], ast.ClassDef)
    return [(kind.__name__, node) for node in tree.body[0].body if isinstance(node, ast.FunctionDef)]


def test_every_method_of_a_public_protocol_lists_its_arguments():
    """An abstract method states the contract once; what implements it needs no second docstring."""
    missing = []
    for kind in {thing for thing in CALLABLES.values() if inspect.isclass(thing) and inspect.isabstract(thing)}:
        for owner, method in methods(kind):
            given = [a.arg for a in (*method.args.args, *method.args.kwonlyargs) if a.arg not in ("self", "cls")]
            text = ast.get_docstring(method) or ""
            if method.name.startswith("_") or not given:
                continue
            arguments = section(text, "Args") or ""
            missing += [f"{owner}.{method.name}: {name}" for name in given if f"    {name}:" not in f"\n{arguments}"]
    assert missing == []
