"""Text to values and back."""

from __future__ import annotations

import pytest

import gradcost
from gradcost import CentralDifference, Clipped, Gaussian, Jvp, Probing, Rademacher, Reverse
from gradcost.checkpointing.policies import Segments
from gradcost.cli import spec
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
        ("spsa(eps=1e999)", "above 0, not inf"),
        ("Gaussian()", "is a part of a method"),
        ("mezo(", "is not an expression"),
        ("__import__('os').system('true')", "neither a number"),
        ("mezo(probes=1+1)", "neither a number"),
    ],
)
def test_a_wrong_method_gets_a_sentence_with_the_way_out(text: str, told: str):
    with pytest.raises(ValueError) as error:
        spec.method(text)
    assert told in str(error.value)
    assert str(error.value).endswith((".", "?"))


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
    [("64MiB", 64 * 2**20), ("2GB", 2 * 10**9), ("2GiB", 2 * 2**30), ("1.5 kib", 1536), ("12", None), ("100B", 100)],
)
def test_an_amount_of_memory_has_its_unit(text: str, bytes_: int | None):
    if bytes_ is None:
        with pytest.raises(ValueError, match="one of B, kB"):
            spec.size(text)
    else:
        assert spec.size(text) == bytes_


@pytest.mark.parametrize("text", ["-1", "0MiB", "2XB", "", "lots"])
def test_no_amount_of_memory_is_a_sentence(text: str):
    with pytest.raises(ValueError, match="not a number of bytes"):
        spec.size(text)
