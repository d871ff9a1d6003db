"""Text to values and back."""

from __future__ import annotations

import inspect
import random
import re
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import gradcost
from gradcost import CentralDifference, Clipped, Gaussian, Jvp, Probing, Rademacher, Reverse
from gradcost.checkpointing.policies import Segments
from gradcost.cli import quantities, spec
from gradcost.directions import Coordinates
from gradcost.estimators import Mean
from gradcost.tasks import TASKS
from gradcost.tasks.architectures import Mlp

WRITTEN = [
    Probing(Jvp(), Rademacher(), 4),
    Probing(Jvp(together=4), Coordinates(), 8, Mean()),
    Probing(CentralDifference(1e-4), Gaussian()),
    Reverse(Segments(3)),
    Clipped(gradcost.Accumulated(gradcost.mezo(), 2), 0.5),
    gradcost.SGD(0.1, momentum=0.9, decay=1e-5),
    gradcost.AdamW(3e-4),
    *(task() for task in TASKS.values()),
]


@pytest.mark.parametrize("value", WRITTEN, ids=repr)
def test_what_is_printed_parses_back_to_an_equal_value(value: object):
    assert spec.parse(repr(value)) == value


@pytest.mark.parametrize("name", ["backprop", "checkpointed", "forward_gradient", "spsa", "mezo"])
def test_a_preset_may_be_written_with_or_without_brackets(name: str):
    assert spec.method(name) == spec.method(f"{name}()") == getattr(gradcost, name)()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("mzo()", "mezo(eps=0.001, probes=1)"),
        ("forward_gradients(probes=2)", "forward_gradient(probes=1, together=None)"),
        ("Probing(slope=JVP())", "Jvp(together=1)"),
        ("Probing(slope=Jvp(), direction=Gaussian())", "Probing(slope, directions="),
        ("mezo(probes=0)", "1 or more, not 0"),
        ("spsa(eps=-1)", "must be above 0"),
        ("spsa(eps='x')", "is a number, not 'x'"),
        ("spsa(probes=1.5)", "is a whole number, not 1.5"),
        ("Reverse(Segments('2'))", "is a whole number"),
        ("spsa(eps=1e999)", "'1e999' is too large"),
        ("Gaussian()", "is a part of a method"),
        ("mezo(", "is not an expression"),
        ("__import__('os').system('true')", "neither a number"),
        ("mezo(probes=1+1)", "neither a number"),
        ("mezo(-'a')", "\"-'a'\" in"),
        ("mezo(-None)", "'-None' in"),
        ("mezo(-True)", "'-True' in"),
        ("Reverse(...)", "'...' in"),
        ("mezo(b'a')", "neither a number"),
        ("mezo(2j)", "neither a number"),
        ("mezo(*(1, 2))", "neither a number"),
        ("-" * 50 + "1", "neither a number"),
        ("-" * 9999 + "1", "nested too deep"),
        ("(" * 5000 + ")" * 5000, "nested"),
        ("Clipped(" * 100 + "mezo()" + ")" * 100, "nested too deep"),
        ("mezo(" + "9" * 10_000 + ")", "at most 10,000 characters, and"),
        ("mezo(probes=" + "9" * 5000 + ")", "is not an expression"),
        ("mezo(probes=" + "9" * 400 + ")", "at most 19 digits"),
        ("mezo(probes=-" + "9" * 400 + ")", "at most 19 digits"),
        ("mezo(eps='\0')", "expression"),
        ("mezo(eps='\udc80')", "a character that no expression has"),
        ("mezo(**{'probes': 7})", "contains **"),
        ("mezo(probes=1, probes=7)", "gives an argument twice"),
        ("Clipped(mezo(eps=1, eps=2))", "gives an argument twice"),
    ],
)
def test_a_wrong_method_gets_a_sentence_with_the_way_out(text: str, told: str):
    with pytest.raises(ValueError) as error:
        spec.method(text)
    assert told in str(error.value)
    assert str(error.value).endswith((".", "?"))


MISFITS = [
    (
        "Clipped(estimator=Everything())",
        "Clipped: estimator is an Estimator (activity_perturbation, addax, backprop, ",
    ),
    ("Clipped(mezo)", None),
    ("Clipped(None)", "Clipped: estimator is an Estimator"),
    ("Probing(slope=backprop())", "slope is a Slope (CentralDifference, ForwardDifference, Jvp), not Reverse("),
    ("Probing(slope=2)", "slope is a Slope (CentralDifference, ForwardDifference, Jvp), not 2"),
    ("Probing(Jvp(), Jvp())", "directions is a Directions (Coordinates, Gaussian, "),
    (
        "Probing(Jvp(), combine=Gaussian())",
        "combine is a Combine (Mean, Normalized, Projection, Sign), not Gaussian()",
    ),
    ("Probing(Jvp(), Layerwise(0.5))", "Layerwise: directions is a Directions"),
    ("Probing(Jvp(), Masked(True))", "Masked: mask is a Mask (Fixed, Largest, Named, Random, Smallest), not True"),
    ("Reverse(Jvp())", "saving is a Saving (Blocks, Everything, "),
    ("Mixed(1, 2, 3)", "Mixed: named is a text in quotes, not 1"),
    ("Mixed('head.*', mezo(), 3)", "Mixed: outside is an Estimator"),
    ("VarianceReduced(3)", "VarianceReduced: estimator is an Estimator"),
    ("Accumulated(mezo(), 2.5)", "Accumulated: parts is a whole number, not 2.5"),
    ("Accumulated(mezo(), True)", "Accumulated: parts is a whole number, not True"),
    ("Reverse(Selective((Matmuls(), Jvp())))", "keep is a tuple, and each item is an Operators (Attention, Matmuls)"),
    ("Reverse(Selective(Matmuls()))", "keep is a tuple, and each item is an Operators (Attention, Matmuls)"),
]


@pytest.mark.parametrize(("text", "told"), MISFITS)
def test_an_argument_of_another_kind_is_refused_when_it_is_parsed(text: str, told: str | None):
    """Before, most of these parsed, and raised exceptions of Python where the estimate used them."""
    if told is None:
        assert spec.method(text) == Clipped(gradcost.mezo())
        return
    with pytest.raises(gradcost.BadInput) as error:
        spec.method(text)
    assert told in str(error.value)
    assert "Write " in str(error.value)


def test_every_annotation_of_a_part_can_be_checked():
    """An annotation that cannot be resolved, or that is no class, would silently accept every value."""
    for name, thing in spec.names("method", "optimizer", "task").items():
        hints = get_type_hints(thing)
        for parameter in inspect.signature(thing).parameters:
            parts = get_args(hints[parameter]) or (hints[parameter],)
            assert all(isinstance(part, type) or part is ... for part in parts), (name, parameter, hints[parameter])


PIECES = (
    "1",
    "0",
    "-1",
    "0.5",
    "1e999",
    "2**9",
    "9" * 30,
    "None",
    "True",
    "''",
    "'a'",
    "()",
    "(1,)",
    "[mezo()]",
    "**{}",
    "*()",
)
PIECES += (
    "...",
    "-",
    "lambda: 1",
    "x",
    "f''",
    "\udc80",
    "\0",
    "\n",
    "#",
    "=",
    ",",
    "(",
    ")",
    "mezo(probes=",
    "eps=1",
)


def mutated(chance: random.Random, sources: list[str]) -> str:
    """Return an expression with random replacements: of a part by another, of characters, or of a piece."""
    text = chance.choice(sources)
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(len(text) + 1)
        part = chance.choice(re.findall(r"\w+\([^()]*\)|[\w.]+", text) or ["1"])
        match chance.randrange(5):
            case 0 | 1:
                text = text.replace(part, chance.choice(sources), 1)
            case 2:
                text = text.replace(part, chance.choice(PIECES), 1)
            case 3:
                text = text[:at] + chance.choice(PIECES) + text[at:]
            case 4:
                text = text[:at] + text[at + chance.randrange(1, 5) :]
    return text


@pytest.mark.parametrize("number", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_mutated_expression_is_a_value_or_a_sentence(number: int):
    known = spec.names("method", "optimizer", "task")
    sources = [repr(value) for value in WRITTEN] + [f"{name}()" for name in known]
    sources += ["Mixed('head.*', backprop(), mezo())", "Probing(Jvp(), Masked(Largest(0.5)))", "addax(longest=9)"]
    chance, counts = random.Random(19), Counter[str]()
    for _ in range(number):
        text = mutated(chance, sources)
        try:
            value = spec.parse(text)
        except gradcost.GradcostError as error:
            assert str(error).endswith((".", "?")), text  # noqa: PT017 (many are values)
            str(error).encode()  # no lone surrogate
            counts["a sentence"] += 1
        else:
            assert spec.parse(repr(value)) == value
            counts["a value"] += 1
    print(counts)
    assert min(counts.values()) > 0.05 * number


def test_an_expression_with_a_warning_of_python_is_one_sentence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(gradcost.BadInput):
            spec.method("mezo(probes=1or 2)")


def test_a_whole_number_for_a_float_is_the_same_value_with_the_same_text():
    assert repr(spec.method("mezo(eps=1)")) == repr(spec.method("mezo(eps=1.0)"))
    assert hash(spec.method("mezo(eps=1)")) == hash(gradcost.mezo(1.0))


def test_a_task_is_a_name_an_expression_or_both_with_a_model():
    assert spec.task("digits")[:3] == (TASKS["digits"](), "digits", "mlp")
    assert spec.task("Digits(batch=32)")[0].batch == 32
    assert spec.task("digits", "Mlp(hidden=(8,))")[0].model == Mlp((8,))
    assert spec.task("digits", "logistic")[2] == "logistic"


@pytest.mark.parametrize(
    ("text", "told"), [("mnst", "Did you mean mnist"), ("nowhere.py:X", "no file"), ("x", "Tasks:")]
)
def test_a_wrong_task_gets_a_sentence(text: str, told: str):
    with pytest.raises(ValueError, match=told):
        spec.task(text)


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [
        ("64MiB", 64 * 2**20),
        ("2GB", 2 * 10**9),
        ("2GiB", 2 * 2**30),
        ("1.5 kib", 1536),
        ("3mb", 3 * 10**6),
        ("12", None),
        ("100B", 100),
    ],
)
def test_an_amount_of_memory_has_its_unit(text: str, bytes_: int | None):
    if bytes_ is None:
        with pytest.raises(ValueError, match="one of B, kB"):
            quantities.size(text)
    else:
        assert quantities.size(text) == bytes_


@pytest.mark.parametrize(
    ("text", "advice"), [("64Mb", "64MB or 64MiB"), ("2 Gib", "2GB or 2GiB"), ("1Kb", "1kB or 1KiB")]
)
def test_a_unit_of_bits_is_refused(text: str, advice: str):
    with pytest.raises(ValueError, match=f"may mean bits: write {advice} for bytes"):
        quantities.size(text)


@pytest.mark.parametrize("text", ["-1", "0MiB", "2XB", "", "lots", "9" * 400 + "GiB", "9223372036854775808B", "0.5B"])
def test_no_amount_of_memory_is_a_sentence(text: str):
    with pytest.raises(ValueError, match="not a number of bytes"):
        quantities.size(text)


@pytest.mark.parametrize(
    ("text", "kind", "advice"),
    [
        ("adam", "optimizer", r"there is no optimizer 'adam'\. Did you mean Adam\([^)]*\)\?"),
        ("MEZO(probes=2)", "method", r"there is no method 'MEZO'\. Did you mean mezo\([^)]*\)\?"),
        ("meso()", "method", r"there is no method 'meso'\. Did you mean mezo\("),
        ("Probing(jvp())", "method", r"there is no 'jvp'\. Did you mean Jvp\("),
        ("mezo()", "task", r"there is no task 'mezo'\. Known: AgNews, "),
    ],
)
def test_an_unknown_name_is_refused_with_its_kind_and_a_similar_name(text: str, kind: str, advice: str):
    with pytest.raises(ValueError, match=advice):
        spec.parse(text, kind)


def test_a_module_may_change_the_folder_and_the_path_while_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "moves.py").write_text("import os\nos.chdir('sub')\ndef make(): pass\n")
    (tmp_path / "clears.py").write_text("import sys\ndel sys.path[0]\ndef make(): pass\n")
    before = list(sys.path)
    for module in ("moves", "clears"):
        monkeypatch.chdir(tmp_path)
        assert spec.named(f"{module}:make", "--model").__name__ == "make"
        assert sys.path == before
