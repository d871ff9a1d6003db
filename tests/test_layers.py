"""The shape of the house: a folder is a floor, imports only point down; and the house rules that a parser can see."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "gradcost"

# From the ground up. What stands on one line may import what stands on the lines above it, and its own.
FLOORS = [
    ["value", "amounts", "whole"],
    ["key", "chain", "watch", "fake", "trees", "schedules", "note"],
    ["philox"],
    ["hartley"],
    ["noise_fused"],
    ["noise"],
    ["objective"],
    ["directions", "precision"],
    ["gradient"],
    ["combine"],
    ["substitute", "region", "resolution", "factored"],
    ["recompute"],
    ["dual"],
    ["slopes", "saving", "chunked"],
    ["estimators"],
    ["tasks"],
    ["training"],
    ["theory"],
    ["cost"],
    ["diagnostics"],
    ["study"],
    ["papers"],
    ["report"],
    ["integrations"],
    ["cli"],
]
HEIGHT = {name: height for height, floor in enumerate(FLOORS) for name in floor}

# A report is a pure function of plain records, and a ledger is read where no torch is installed.
TORCHLESS = ["report/*.py", "study/ledger.py", "study/records.py", "study/facts.py", "study/lint.py"]
TORCHLESS += ["cli/console.py"]
TORCHLESS += ["study/tune.py", "study/look.py", "study/search.py", "cli/inspect.py"]
TORCHLESS += ["papers/rike2022.py", "papers/rike2022_verdicts.py", "papers/rike2022_page.py"]
NUMBERS = ["study/statistics.py"]  # goes through 2^n flips of signs, for which it may have numpy
# What the command line imports before it knows what to do.
TORCHLESS_AT_IMPORT = ["gradcost.cli.main", "gradcost.cli.spec", "gradcost.value", "gradcost.key"]


def files(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns or ("**/*.py",) for path in SOURCE.glob(pattern))


def name(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top, within a function or for the type checker alone."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)} imports relatively"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor(module: str) -> str | None:
    """`gradcost.report.tables` stands on `report`."""
    parts = module.split(".")
    return parts[1] if parts[0] == "gradcost" and len(parts) > 1 and parts[1] in HEIGHT else None


EVERY = pytest.mark.parametrize("path", files(), ids=name)
ROOMS = [path for path in files() if name(path) != "__init__.py"]  # the public surface is the roof


def test_every_file_stands_on_a_floor():
    standing = {name(path).split("/")[0].removesuffix(".py") for path in ROOMS}
    assert standing == set(HEIGHT), "a new folder or file at the top is a line in FLOORS"


@pytest.mark.parametrize("path", ROOMS, ids=name)
def test_imports_only_point_down(path: Path):
    here = name(path).split("/")[0].removesuffix(".py")
    above = {module for module in imports(path) if (to := floor(module)) is not None and HEIGHT[to] > HEIGHT[here]}
    assert above == set()
    beside = {to for module in imports(path) if (to := floor(module)) is not None and HEIGHT[to] == HEIGHT[here]}
    assert beside - {here} == set(), "two on one floor that know each other belong on two"


def test_nothing_imports_the_public_surface():
    """`from gradcost import X` within the library would go up to the roof; `from gradcost import noise` is a file."""
    for path in ROOMS:
        assert not {module for module in imports(path) if module.startswith("gradcost.") and floor(module) is None}


@pytest.mark.parametrize("path", files(*TORCHLESS), ids=name)
def test_what_reads_records_imports_no_torch_at_all(path: Path):
    """Neither itself nor by anything of the library that it imports."""
    seen, todo = set(), [path]
    while todo:
        at = todo.pop()
        if at in seen:
            continue
        seen.add(at)
        found = set(imports(at))
        heavy = {"torch", "numpy", "numba", "sklearn"} - ({"numpy"} if name(at) in NUMBERS else set())
        assert not {module for module in found if module.split(".")[0] in heavy}, at
        for module in found:
            inside = SOURCE.parent / Path(*module.split("."))
            todo += [file for file in (inside.with_suffix(".py"), inside / "__init__.py") if file.exists()]
    assert path in seen


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    modules = [f"gradcost.{name(path).removesuffix('.py').replace('/', '.')}" for path in files(*TORCHLESS)]
    modules = [module.removesuffix(".__init__") for module in modules] + TORCHLESS_AT_IMPORT
    code = f"import importlib, sys; [importlib.import_module(m) for m in {modules}]; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(ran.stdout.split())


def test_reports_the_ledger_and_the_command_line_load_no_torch(loaded: set[str]):
    assert "gradcost.report.html" in loaded
    assert "gradcost.study.ledger" in loaded
    assert "gradcost.cli.main" in loaded
    assert "torch" not in loaded


# ---- no global randomness


def dotted(node: ast.AST) -> str:
    """`torch.cuda.manual_seed` of the expression that says so, and "" of any other."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := dotted(node.value)):
        return f"{before}.{node.attr}"
    return ""


DRAWS = {f"torch.{kind}" for kind in ("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial")}


@EVERY
def test_no_global_generator_is_seeded_or_drawn_from(path: Path):
    """Default generators are set in objective.py alone, around an evaluation: dropout and its like read them."""
    for node in ast.walk(tree(path)):
        said = dotted(node)
        assert not said.endswith(("torch.manual_seed", "cuda.manual_seed", "cuda.manual_seed_all")), said
        assert not said.startswith(("np.random", "numpy.random")), said
        if name(path) != "objective.py":
            assert not said.startswith(("random.", "torch.default_generator", "torch.set_rng_state")), said
        if isinstance(node, ast.Call) and dotted(node.func) in DRAWS:
            assert "generator" in {keyword.arg for keyword in node.keywords}, f"{dotted(node.func)} at {node.lineno}"
    assert not {module for module in imports(path) if module.startswith("numpy.random")}


# ---- sizes


@EVERY
def test_no_file_is_over_350_lines(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350


@EVERY
def test_no_function_body_is_over_60_lines(path: Path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = 0 if not body else (node.end_lineno or 0) - body[0].lineno + 1
            assert lines <= 60, f"{node.name} has {lines} lines"


def test_there_is_no_utils():
    tests = Path(__file__).parent
    found = [path for path in (*files(), *tests.rglob("*.py")) if path.stem in ("utils", "util", "helpers", "common")]
    assert found == []


@EVERY
def test_nothing_calls_super_but_a_constructor(path: Path):
    """No overriding of concrete methods: what calls `super()` elsewhere extends one."""
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and dotted(node.func) == "super":
            within = {f.name for f in functions if f.lineno <= node.lineno <= (f.end_lineno or 0)}
            assert "__init__" in within, f"super() at line {node.lineno}"
