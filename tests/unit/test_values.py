"""Values: a public value's text is its configuration, its identity and its hash, in every process."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import os
import pickle
import subprocess
import sys
import types
from typing import Any

import pytest

import gradcost
from gradcost import (
    SGD,
    Accumulated,
    Adam,
    AdamW,
    Adaptive,
    ByLength,
    CentralDifference,
    Clipped,
    ForwardDifference,
    Gaussian,
    Jvp,
    Key,
    Mixed,
    Momentum,
    Probing,
    Rademacher,
    Reverse,
    VarianceReduced,
    activity_perturbation,
    addax,
    backprop,
    checkpointed,
    forward_gradient,
    fzoo,
    hizoo,
    mezo,
    multi_tangent,
    spsa,
    zo_sgd_sign,
    zo_svrg,
)
from gradcost.checkpointing import Attention, Blocks, Everything, Matmuls, Offloaded, Schedule, Segments, Selective
from gradcost.checks import Recorder
from gradcost.core.value import digest, is_value
from gradcost.directions import (
    Coordinates,
    EachBlock,
    EachLeaf,
    EachModule,
    Fixed,
    Guided,
    Largest,
    Layerwise,
    LazyLowRank,
    LowRank,
    Masked,
    Named,
    Orthogonal,
    Random,
    Smallest,
    Sphere,
)
from gradcost.estimators import (
    ActivityPerturbation,
    Flattest,
    HessianInformed,
    Mean,
    Normalized,
    Projection,
    Sign,
    Steepest,
)
from gradcost.instruments import Allocator, Seconds
from gradcost.planning import Within
from gradcost.training import BatchParallel, DirectionParallel, Master, Nesterov, StochasticallyRounded
from gradcost.training.eight_bit import AdamW8bit
from tables import ESTIMATORS

OTHERS = ("noise", "results", "studies", "tasks")  # their values are tested with their studies
PACKAGES = [
    thing for name in gradcost.__all__ if inspect.ismodule(thing := getattr(gradcost, name)) and name not in OTHERS
]
NAMES = {name: getattr(place, name) for place in (gradcost, *PACKAGES) for name in getattr(place, "__all__", ())}
KINDS = {
    kind
    for kind in NAMES.values()
    if inspect.isclass(kind) and is_value(kind) and kind.__module__ != "gradcost.studies.trial"
}

EXAMPLES: list[Any] = [
    *(Steepest(), Flattest(), Adaptive(mezo(), 2, Flattest()), HessianInformed(), hizoo(1e-2, 3)),
    *(ActivityPerturbation(CentralDifference(0.01), Rademacher(), 2), activity_perturbation(3)),
    *(row.estimator for row in ESTIMATORS.values()),
    *(Key(0), Key(2**64 - 1), Key(1).fold("step", 3)),
    *(Orthogonal(), LowRank(), LowRank(rank=4), LazyLowRank(), LazyLowRank(2, every=7)),
    *(Gaussian(), Rademacher(), Sphere(), Coordinates()),
    *(Masked(Smallest(0.25)), Masked(Named("*.q"), Sphere()), Largest(1), Fixed(0.5, seed=7), Random(0.1)),
    *(Named("a'b*"), Guided(), Guided(Sphere(), share=0.25), Layerwise(), Layerwise(Rademacher(), EachBlock())),
    *(Smallest(0.5), Masked(Random(0.5), Rademacher()), EachLeaf(), EachModule(), EachBlock()),
    *(Mean(), Projection(), Sign(), Normalized()),
    *(Jvp(), Jvp(together=7), CentralDifference(), CentralDifference(1e-5), ForwardDifference(eps=3e-9)),
    *(Everything(), Blocks(), Segments(1), Segments(count=12), Offloaded(), Within(2**30), Within(bytes=5, beside=4)),
    *(Matmuls(), Attention(), Selective(), Selective((Attention(),)), Schedule((((2,), (3,), 1), (2,), 4))),
    *(Reverse(), Reverse(Segments(3)), Probing(Jvp()), Probing(CentralDifference(0.1), Sphere(), probes=9)),
    *(Accumulated(Clipped(Accumulated(Probing(Jvp()), 2), 0.5), 3), Clipped(mezo())),
    *(VarianceReduced(mezo()), VarianceReduced(Accumulated(mezo(), 2), 5, Reverse()), Momentum(spsa(), 0.5, 3)),
    *(Mixed("head.*", Reverse(Blocks()), mezo()), ByLength(backprop(), mezo(), 170, 0.1), addax(longest=64)),
    *(zo_svrg(every=10), zo_sgd_sign(), fzoo(probes=4), multi_tangent(8)),
    *(backprop(), checkpointed(), forward_gradient(8), spsa(1e-2, 3), mezo(eps=1e-4)),
    *(SGD(0.1), SGD(lr=0.1, momentum=0.9, weight_decay=1e-4, decay=0.01), Nesterov(0.1), Adam(1e-3)),
    *(Master(Adam(1e-3)), StochasticallyRounded(SGD(0.1)), StochasticallyRounded(SGD(0.1), Key(3))),
    *(DirectionParallel(Probing(Jvp(), probes=4)), BatchParallel(Probing(Jvp()))),
    *(Recorder(), Recorder(every=7, rise=2.5)),
    *(Seconds(), Seconds(samples=5), Allocator(), Allocator(device="cpu")),
    *(Adam(1e-3, 0.8, 0.99, 1e-6, 0.1), AdamW(1e-3), AdamW(1e-3, weight_decay=0.0), AdamW8bit(1e-3)),
]
EACH = pytest.mark.parametrize("example", EXAMPLES, ids=repr)


def test_there_is_an_example_of_every_public_value():
    assert {type(example) for example in EXAMPLES} == KINDS


@EACH
def test_a_text_evaluates_to_an_equal_value(example: Any):
    found = eval(repr(example), {"__builtins__": {}}, NAMES)
    assert found == example
    assert type(found) is type(example)
    assert hash(found) == hash(example)
    assert repr(found) == repr(example)


@EACH
def test_a_value_pickles_and_copies(example: Any):
    for found in (pickle.loads(pickle.dumps(example)), copy.copy(example), copy.deepcopy(example)):
        assert found == example
        assert hash(found) == hash(example)


@EACH
def test_a_value_cannot_be_changed(example: Any):
    for field in dataclasses.fields(example):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(example, field.name, getattr(example, field.name))


def test_values_are_equal_when_their_texts_are():
    for one in EXAMPLES:
        for other in EXAMPLES:
            assert (one == other) == (repr(one) == repr(other))
    assert len(set(EXAMPLES)) == len({repr(example) for example in EXAMPLES})
    assert len({digest(example) for example in EXAMPLES}) == len(set(EXAMPLES))


def test_a_hash_is_one_of_the_text():
    """So that it is the same in every process: Python's own hash of a string is not."""
    for example in EXAMPLES:
        assert hash(example) == int(digest(example), 16) >> 3
    assert digest(Key(0)) == "fb5928ec7f1ef7f9"


def test_another_process_has_the_same_hashes_of_the_same_pickles():
    """With another seed of Python's own hash of strings: values name files, and are found in other processes."""
    code = (
        "import pickle, sys\nfor value in pickle.load(sys.stdin.buffer): print(hash(value), repr(value), sep='\\t')"
    )
    environment = os.environ | {"PYTHONHASHSEED": "314159"}
    message = pickle.dumps(EXAMPLES)
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, input=message, capture_output=True, check=True
    )
    assert ran.stdout.decode().splitlines() == [f"{hash(example)}\t{example!r}" for example in EXAMPLES]


def test_the_presets_are_compositions_of_public_parts():
    presets = (backprop(), checkpointed(), forward_gradient(), spsa(), mezo())
    named = (zo_svrg(), addax(64), zo_sgd_sign(), fzoo(), multi_tangent())
    assert named == (
        VarianceReduced(Probing(ForwardDifference(1e-3), Sphere(), 1), 100, None),
        ByLength(Reverse(), Probing(CentralDifference(1e-3), Gaussian(), 1), 64, 0.5),
        Probing(CentralDifference(1e-3), Gaussian(), 1, Sign()),
        Probing(ForwardDifference(1e-3), Rademacher(), 8, Normalized()),
        Probing(Jvp(), Gaussian(), 4, Projection()),
    )
    assert [repr(preset) for preset in presets] == [
        "Reverse(saving=Everything())",
        "Reverse(saving=Blocks())",
        "Probing(slope=Jvp(together=1), directions=Gaussian(), probes=1, combine=Mean())",
        "Probing(slope=CentralDifference(eps=0.001), directions=Rademacher(), probes=1, combine=Mean())",
        "Probing(slope=CentralDifference(eps=0.001), directions=Gaussian(), probes=1, combine=Mean())",
    ]


USER_FILE = """
from typing import Optional
from gradcost.core.value import value

@value
class Mine:
    count: int
    rate: float = 1
    limit: Optional[float] = None
    other: "NotThere" = None
"""


@pytest.mark.parametrize("future", ["", "from __future__ import annotations\n"], ids=["types", "text"])
@pytest.mark.parametrize("missing", [False, True], ids=["resolved", "unresolved"])
def test_number_fields_are_checked_however_their_types_are_written(
    future: str, missing: bool, monkeypatch: pytest.MonkeyPatch
):
    """Annotations are types or text, and text may name a type that does not exist at run time."""
    text = USER_FILE if missing else USER_FILE.replace("NotThere", "str")
    text = text.replace("Optional[float]", "float | None") if missing and future else text
    module = types.ModuleType("user_file")
    monkeypatch.setitem(sys.modules, "user_file", module)
    exec(compile(future + text, "user_file.py", "exec", dont_inherit=True), vars(module))
    kind = module.Mine
    assert repr(kind(2, 3, 4)) == "Mine(count=2, rate=3.0, limit=4.0, other=None)"
    assert kind(2) == kind(2, 1.0)
    assert hash(kind(2)) == hash(kind(2, 1.0))
    with pytest.raises(ValueError, match=r"count of Mine is a whole number, not 2\.0"):
        kind(2.0)
    for arguments in ((1, "a"), (1, True), (1, 1.0, "b")):
        with pytest.raises(ValueError, match="of Mine is a number, not"):
            kind(*arguments)


REFUSED: list[tuple[Any, str]] = [
    (lambda: Key(-1), r"a Key needs a whole number from 0 to 2\*\*64 - 1, not -1\."),
    (lambda: Probing(Jvp(), probes=0), "probes is the number of directions per estimate, 1 or more, not 0."),
    (lambda: Probing(Jvp(), probes=1.5), "is a whole number, not 1.5."),  # type: ignore[arg-type]
    (lambda: forward_gradient(-2), "1 or more, not -2."),
    (lambda: CentralDifference(0.0), "eps is the length of a step along a direction and must be above 0, not 0.0."),
    (lambda: CentralDifference(-1e-3), "must be above 0, not -0.001."),
    (lambda: CentralDifference(float("nan")), "must be above 0, not nan."),
    (lambda: ForwardDifference(0.0), "must be above 0, not 0.0."),
    (lambda: mezo(eps=-1.0), "must be above 0, not -1.0."),
    (lambda: Jvp(together=0), "together is how many directions share a forward: 1 or more, not 0."),
    (lambda: Segments(0), "a chain is cut into 1 segment or more, not 0."),
    (lambda: Clipped(mezo(), 0.0), "the cap on the slope must be above 0, not 0.0."),
    (lambda: Clipped(mezo(), float("nan")), "the cap on the slope must be above 0, not nan."),
    (lambda: Accumulated(mezo(), 0), "parts is the number of micro-batches per batch, 1 or more, not 0."),
    (lambda: Accumulated(mezo(), 2.0), "is a whole number, not 2.0."),  # type: ignore[arg-type]
    (lambda: VarianceReduced(mezo(), 0), "every is the number of estimates between snapshots, 1 or more, not 0."),
    (lambda: Momentum(mezo(), 1.5), "decay is the factor on an older estimate's weight, 0 to 1, not 1.5."),
    (lambda: Momentum(mezo(), window=0), "window is the number of estimates averaged, 1 or more, not 0."),
    (lambda: addax(0), "longest, the most tokens of a short example, must be 1 or more, not 0."),
    (lambda: addax(9, 1.5), "weight, the factor of the long examples' gradient, must be between 0 and 1, not 1.5."),
    (lambda: SGD(0.0), "lr, the learning rate, must be finite and above 0, not 0.0."),
    (lambda: Adam(float("inf")), "lr, the learning rate, must be finite and above 0, not inf."),
    (lambda: AdamW(1e-3, decay=-1.0), "0 or more, not -1.0."),
    (lambda: SGD(0.1, decay=float("inf")), "must be finite and 0 or more, not inf."),
    (lambda: SGD(0.1, momentum=-1.0), "momentum of SGD must be 0 or more and finite, not -1.0."),
    (lambda: SGD(0.1, weight_decay=float("nan")), "weight_decay of SGD must be 0 or more and finite, not nan."),
    (lambda: Nesterov(0.1, momentum=0.0), "Nesterov's momentum must be above 0, not 0.0: use SGD without momentum."),
    (lambda: Adam(0.1, eps=-1e-8), "eps of Adam must be 0 or more and finite, not -1e-08."),
    (lambda: AdamW(0.1, beta1=1.0), "beta1 of AdamW must be 0 or more and below 1, not 1.0."),
    (lambda: AdamW8bit(0.1, beta2=-0.1), "beta2 of AdamW8bit must be 0 or more and below 1, not -0.1."),
]


@pytest.mark.parametrize(("make", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_a_bad_argument_is_refused_in_a_sentence(make: Any, sentence: str):
    with pytest.raises(ValueError, match=sentence) as refused:
        make()
    text = str(refused.value)
    assert text.endswith(".")
    assert len(text.split()) > 6
