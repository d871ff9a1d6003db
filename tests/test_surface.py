"""The public surface, pinned: a name is added or taken away here, on purpose, or not at all."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys

import pytest

import gradcost

SURFACE = [
    "Accumulated",
    "ActivityPerturbation",
    "Adam",
    "AdamW",
    "Adaptive",
    "Allocator",
    "Attention",
    "Blocks",
    "ByLength",
    "Bytes",
    "CentralDifference",
    "Clipped",
    "Coordinates",
    "Dense",
    "CheckReport",
    "Directions",
    "EachBlock",
    "EachLeaf",
    "EachModule",
    "Estimate",
    "Estimator",
    "Everything",
    "Fixed",
    "Flattest",
    "Forecast",
    "ForwardDifference",
    "Gaussian",
    "Gradient",
    "Grouping",
    "Guided",
    "HessianInformed",
    "Jvp",
    "Key",
    "Largest",
    "Layerwise",
    "LazyLowRank",
    "LowRank",
    "Mask",
    "Masked",
    "Master",
    "Matmuls",
    "Mean",
    "Measurement",
    "Mixed",
    "Momentum",
    "Named",
    "Nesterov",
    "Normalized",
    "Note",
    "Objective",
    "Offloaded",
    "Operations",
    "Orthogonal",
    "Plan",
    "Probing",
    "Projection",
    "Rademacher",
    "Random",
    "Recorder",
    "Reverse",
    "SGD",
    "Schedule",
    "Seconds",
    "Seeded",
    "Segments",
    "Selective",
    "Sign",
    "Signed",
    "StatefulDirections",
    "Smallest",
    "Sphere",
    "Steepest",
    "Step",
    "Steps",
    "StochasticallyRounded",
    "Sum",
    "VarianceReduced",
    "Within",
    "activity_perturbation",
    "addax",
    "backprop",
    "best_eps",
    "best_forward_eps",
    "checkpointed",
    "chunked_cross_entropy",
    "cosine_along_coordinates",
    "diagnose",
    "effective_slowdown",
    "expected_cosine",
    "expected_losses",
    "forecast",
    "forward_gradient",
    "fzoo",
    "gradient_bound",
    "hizoo",
    "measure",
    "mezo",
    "multi_tangent",
    "plan",
    "probes_to_match",
    "second_moment",
    "selection_bias",
    "slowdown",
    "spsa",
    "stable_step",
    "train",
    "zo_sgd_sign",
    "zo_svrg",
]


def test_the_public_names_are_these():
    assert gradcost.__all__ == SURFACE
    assert sorted(SURFACE) == SURFACE
    assert dir(gradcost) == SURFACE


def test_each_public_name_is_there_and_comes_from_the_library():
    for name in SURFACE:
        thing = getattr(gradcost, name)
        assert thing.__module__.startswith("gradcost.")
        assert thing.__name__ == name
        assert getattr(importlib.import_module(thing.__module__), name) is thing


def test_each_public_name_says_what_it_is():
    for name in SURFACE:
        text = getattr(gradcost, name).__doc__
        assert text
        assert not text.startswith(f"{name}("), f"{name} has dataclass's docstring and none of its own"


def test_the_names_for_type_checkers_are_the_public_ones():
    """`from gradcost import X` is checked against the imports that only a type checker reads."""
    found = [
        (alias.name, alias.asname, node.module)
        for node in ast.walk(ast.parse(inspect.getsource(gradcost)))
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("gradcost.")
        for alias in node.names
    ]
    assert sorted(name for name, _, _ in found) == SURFACE
    assert all(name == given for name, given, _ in found)
    assert {name: module for name, _, module in found} == {
        name: f"gradcost.{home}" for name, home in gradcost._HOME.items()
    }


def test_a_name_that_is_not_there_is_an_attribute_error():
    for name in ("Momenta", "np", "torch"):
        with pytest.raises(AttributeError, match=f"module 'gradcost' has no attribute '{name}'"):
            getattr(gradcost, name)


def test_importing_the_library_and_making_a_key_imports_no_torch():
    code = "import sys, gradcost; gradcost.Key(0).fold('a'); dir(gradcost); print(*sorted(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in ran.stdout.split()}
    assert "gradcost" in loaded
    assert loaded.isdisjoint({"torch", "numpy", "numba", "rich", "typer", "altair", "sklearn"})
