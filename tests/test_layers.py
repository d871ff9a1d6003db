"""The structure of the library: layers of packages, downward imports, and the house rules a parser can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "gradcost"

# From the bottom up. A package imports from itself and from packages on the lines above its own.
LAYERS = [
    ["core"],
    ["noise", "results", "tasks"],
    ["directions", "report"],
    ["slopes", "checkpointing"],
    ["estimators"],
    ["training", "theory"],
    ["instruments", "checks"],
    ["planning", "integrations"],
    ["studies"],
    ["papers"],
    ["cli"],
]
LEVEL = {package: level for level, layer in enumerate(LAYERS) for package in layer}

# Records are read, and reports written, where no torch is installed.
TORCH_FREE = ["results/*.py", "report/*.py"]
HEAVY = {"torch", "numpy", "numba", "sklearn"}
# 2^n sign flips; the curves of thousands of runs.
ALLOWED = {"results/statistics.py": {"numpy"}, "results/rankings.py": {"numpy"}}
TORCH_FREE_AT_IMPORT = [
    "gradcost",
    "gradcost.cli.main",
    "gradcost.cli.spec",
    "gradcost.core.value",
    "gradcost.core.key",
]


def files(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns or ("**/*.py",) for path in SOURCE.glob(pattern))


def name(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports: at its top, inside a function, or for the type checker alone."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)} imports relatively"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_files(path: Path) -> set[Path]:
    """The library's own files among a file's imports, the `__init__` of a package only where a name comes from it."""
    found = set()
    for module in imports(path):
        inside = SOURCE.parent / Path(*module.split("."))
        found |= {file for file in (inside.with_suffix(".py"),) if file.is_file()}
    return found


PACKAGED = [path for path in files() if path.parent != SOURCE]


def package(path: Path) -> str:
    return name(path).split("/")[0]


def test_every_package_has_a_layer_and_says_what_it_is_for():
    assert {package(path) for path in PACKAGED} == set(LEVEL)
    silent = [name(path) for path in files("**/__init__.py") if not ast.get_docstring(tree(path))]
    assert silent == []


def test_the_package_root_holds_no_module():
    assert {path.name for path in files("*.py")} <= {"__init__.py", "__main__.py", "errors.py"}


def test_imports_only_point_down():
    wrong = [
        (name(path), module)
        for path in PACKAGED
        for module in imports(path)
        if (to := module.split(".")[1:2]) and module.startswith("gradcost.") and to[0] in LEVEL
        if to[0] != package(path) and LEVEL[to[0]] >= LEVEL[package(path)]
    ]
    assert wrong == []


def test_no_module_imports_itself_in_a_circle():
    """Not even inside a function or for the type checker alone: prepare() raises CycleError with the circle."""
    TopologicalSorter({path: imported_files(path) for path in PACKAGED}).prepare()


REQUIRED = {"filelock", "lazy_loader", "numba", "numpy", "psutil", "rich", "torch", "typer"}
OPTIONAL = {
    "altair",
    "jinja2",
    "markupsafe",
    "peft",
    "pooch",
    "pyarrow",
    "ray",
    "safetensors",
    "scipy",
    "sklearn",
}
OPTIONAL |= {"transformers", "vl_convert"}
WITH_CUDA = {"triton"}  # torch depends on it where it is built for CUDA; imported only on a GPU


def test_every_import_is_of_the_standard_library_or_a_declared_dependency():
    """Not of a package that another dependency happens to install."""
    known = REQUIRED | OPTIONAL | WITH_CUDA | {"gradcost"} | set(sys.stdlib_module_names)
    wrong = [
        (name(path), module) for path in files() for module in imports(path) if module.split(".")[0] not in known
    ]
    assert wrong == []


def test_nothing_imports_the_public_surface():
    assert [name(path) for path in PACKAGED if "gradcost" in set(imports(path))] == []


def test_results_and_report_import_no_torch_directly_or_indirectly():
    wrong, seen, todo = [], set(), files(*TORCH_FREE)
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        found = {module.split(".")[0] for module in imports(path)}
        wrong += [(name(path), module) for module in found & HEAVY - ALLOWED.get(name(path), set())]
        todo += imported_files(path)
    assert wrong == []


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    modules = [f"gradcost.{name(path).removesuffix('.py').replace('/', '.')}" for path in files(*TORCH_FREE)]
    modules = [module.removesuffix(".__init__") for module in modules] + TORCH_FREE_AT_IMPORT
    code = f"import importlib, sys; [importlib.import_module(m) for m in {modules}]; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(ran.stdout.split())


def test_results_report_and_the_command_line_load_no_torch(loaded: set[str]):
    assert {"gradcost.report.html", "gradcost.results.ledger", "gradcost.cli.main"} <= loaded
    assert "torch" not in loaded


# ---- no global randomness


def dotted(node: ast.AST) -> str:
    """`torch.cuda.manual_seed` for such an attribute expression, "" for any other expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := dotted(node.value)):
        return f"{before}.{node.attr}"
    return ""


DRAWS = {f"torch.{kind}" for kind in ("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial")}
SEEDS = ("torch.manual_seed", "cuda.manual_seed", "cuda.manual_seed_all")
GLOBAL = ("random.", "torch.default_generator", "torch.set_rng_state", "np.random", "numpy.random")
# These files keep the states of the default generators and set them, around an evaluation or a recomputation.
KEEPERS = {"core/isolation.py", "core/evaluation/generator_states.py", "core/evaluation/mutable_state.py"}
KEEPERS |= {f"checkpointing/{file}.py" for file in ("call_state", "containers", "replay")}
STATES = {"random", "get_state", "set_state", "getstate", "setstate", "seed", "initial_seed", "default_generator"}
STATES |= {
    "_inst",
    "gauss_next",
    "get_bit_generator",
    "MT19937",
    "Generator",
    "RandomState",
    "Random",
    "SystemRandom",
}


def test_no_global_generator_is_seeded_or_drawn_from():
    """The states of the default generators are set by few files, and no file draws from them."""
    wrong = []
    for path in files():
        for node in ast.walk(tree(path)):
            used = dotted(node)
            if used.endswith(SEEDS):
                wrong.append((name(path), used))
            if used.startswith(GLOBAL) and (name(path) not in KEEPERS or used.split(".")[-1] not in STATES):
                wrong.append((name(path), used))
            generators = [k for k in node.keywords if k.arg == "generator"] if isinstance(node, ast.Call) else []
            if isinstance(node, ast.Call) and dotted(node.func) in DRAWS and not generators:
                wrong.append((name(path), f"{dotted(node.func)} at line {node.lineno}"))
        wrong += [(name(path), module) for module in imports(path) if module.startswith("numpy.random")]
    assert wrong == []


# ---- sizes and shapes


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return 0 if not body else (function.end_lineno or 0) - body[0].lineno + 1


def test_no_file_is_over_350_lines():
    assert [name(path) for path in files() if len(path.read_text(encoding="utf-8").splitlines()) > 350] == []


def test_no_function_body_is_over_60_lines():
    long = [
        (name(path), function.name) for path in files() for function in functions(path) if body_lines(function) > 60
    ]
    assert long == []


def test_no_function_takes_more_than_seven_parameters_by_position():
    """`self` and `cls` are not counted, nor are the options of a Typer command, which are given by name."""
    wrong = []
    for path in files():
        for function in functions(path):
            given = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
            command = any("command" in ast.unparse(decorator) for decorator in function.decorator_list)
            if len([argument for argument in given if argument not in ("self", "cls")]) > 7 and not command:
                wrong.append((name(path), function.name, len(given)))
    assert wrong == []


def test_there_is_no_utils():
    tests = Path(__file__).parent
    names = ("utils", "util", "helpers", "common", "misc")
    assert [path for path in (*files(), *tests.rglob("*.py")) if path.stem in names] == []


def test_nothing_calls_super_but_a_constructor():
    """No overriding of concrete methods: what calls `super()` elsewhere extends one."""
    wrong = []
    for path in files():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and dotted(node.func) == "super":
                within = {f.name for f in functions(path) if f.lineno <= node.lineno <= (f.end_lineno or 0)}
                wrong += [] if "__init__" in within else [(name(path), node.lineno)]
    assert wrong == []
