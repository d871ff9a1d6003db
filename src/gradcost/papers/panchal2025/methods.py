"""The methods of Panchal et al. 2025 as estimators, by their names in the paper.

Where the paper's public code computes another estimate than the name says, `as_coded` has that estimate too. It was
read from the code's training functions for text classification; the code itself was not run. These details differ:

- The code of ZO-Sparse chooses its weights once per epoch, `as_coded` at every estimate.
- The code of FmAD-SVRG also sets the weights back to the snapshot at every step. `as_coded` does not.
- The code of FmAD-SVRG draws the direction at the snapshot once per epoch, and takes a snapshot at every fifth epoch.
  `as_coded` draws it once per snapshot.
- The code of ZO-SVRG adds noise to its stale vector where the model has dropout. `as_coded` does not.
- Adaptive selects a direction per pair of adapter matrices in the code, and one for all parameters here.

Source: "The Cost of Avoiding Backpropagation", arXiv 2506.21833 (2025);
github.com/Astuary/The_Cost_of_Avoiding_Backpropagation at commit 8e47ca2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from gradcost.core.errors import BadInput
from gradcost.core.value import value
from gradcost.directions.direction import Directions
from gradcost.directions.groups import Whole
from gradcost.directions.masks import Largest, Mask, Masked, Smallest
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.adaptive import Adaptive, Flattest
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.presets import backprop, checkpointed, forward_gradient, mezo
from gradcost.estimators.probing import Probing
from gradcost.estimators.variance_reduced import VarianceReduced
from gradcost.papers.panchal2025.as_coded import FirstStep, Repeated, Scaled, StaleGradient, Unpaired

TITLE = "Panchal, Choudhary, Brun and Guan (2025), The Cost of Avoiding Backpropagation"
EPS = 1e-3  # finite-difference step


@value
class Settings:
    """The sizes that the names of the methods leave open.

    Args:
        probes: number of directions per estimate of "multiple".
        parts: number of micro-batches per batch of "accumulate".
        candidates: number of directions from which "adaptive" selects one, for all parameters together.
        every: number of steps from one snapshot of "SVRG" to the next.
        share: fraction of each parameter's weights that "sparse" perturbs, those of smallest magnitude.
        eps: finite-difference step, in units of the parameters.
    Raises:
        BadInput: a number is not above 0.
    """

    probes: int = 10
    parts: int = 4
    candidates: int = 4
    every: int = 100
    share: float = 0.01
    eps: float = EPS

    def __post_init__(self) -> None:
        if min(self.probes, self.parts, self.candidates, self.every, self.share, self.eps) <= 0:
            raise BadInput(f"all numbers of Settings are above 0, not {self}.")


STANDARD = Settings()


@dataclass(frozen=True)
class Method:
    """A method of the paper.

    Args:
        name: its name in the paper.
        estimator: the estimate that the name says.
        as_coded: what the public code computes, if it is another estimate; else None.
        difference: what the public code does otherwise, as one sentence; "" if nothing.
    """

    name: str
    estimator: Estimator
    as_coded: Estimator | None = None
    difference: str = ""

    @property
    def key(self) -> str:
        """The name on the command line: lower case, with hyphens."""
        return self.name.lower()


def methods(settings: Settings = STANDARD) -> tuple[Method, ...]:
    """Return all methods of the paper, in its order.

    - ZO-Vanilla and MeZO are one estimate. In the paper they differ in memory: MeZO regenerates the direction from a
      seed. gradcost always does so.
    - The public code of ZO-Vanilla is also that of the other ZO methods: their updates too are eps times too small.
      The first step of ZO-Adaptive is not: the code perturbs by sqrt(eps) z there, and divides by 2 eps.

    Args:
        settings: the sizes that the names leave open.
    """
    forward, zero = forward_gradient(), mezo(settings.eps)
    bp = Accumulated(backprop(), settings.parts)
    return (
        Method("BP-Vanilla", backprop()),
        Method(
            "BP-Accumulate",
            bp,
            Scaled(bp, settings.parts),
            "It sums over micro-batches, and the other methods average.",
        ),
        Method("BP-Checkpointing", checkpointed()),
        *_family("FmAD", forward, forward_gradient(settings.probes), settings),
        *(_scaled(each, settings.eps) for each in _family("ZO", zero, mezo(settings.eps, settings.probes), settings)),
        Method("MeZO", zero),
    )


def method(name: str, settings: Settings = STANDARD) -> Method:
    """Return the method with a name of the paper, in any case, such as "FmAD-SVRG".

    Raises:
        BadInput: the paper has no such method.
    """
    by_key = {each.key: each for each in methods(settings)}
    if name.lower() not in by_key:
        names = ", ".join(each.name for each in by_key.values())
        raise BadInput(f"the paper has no method {name!r}: give one of {names}.")
    return by_key[name.lower()]


def _family(family: str, one: Probing, many: Probing, settings: Settings) -> tuple[Method, ...]:
    """Return the six methods of forward mode or of zero-order. Their code differs for "multiple" and "SVRG"."""
    assert isinstance(many.directions, Directions)
    forward = family == "FmAD"
    repeated = replace(many, directions=Repeated(many.directions))
    svrg = Unpaired(one, settings.every) if forward else StaleGradient(one, settings.every)
    return (
        Method(f"{family}-Vanilla", one),
        Method(f"{family}-Multiple", many, repeated if forward else None, _REPEATED if forward else ""),
        Method(f"{family}-Accumulate", Accumulated(one, settings.parts)),
        Method(
            f"{family}-Adaptive",
            Adaptive(one, settings.candidates, by=Whole()),
            FirstStep(Adaptive(one, settings.candidates, Flattest(), Whole()), one),
            "It selects the direction with the smallest slope, and only at the first step.",
        ),
        Method(f"{family}-SVRG", VarianceReduced(one, settings.every), svrg, _UNPAIRED if forward else _STALE),
        Method(
            f"{family}-Sparse",
            _masked(one, Smallest(settings.share)),
            _masked(one, Largest(settings.share)),
            "It chooses the weights of largest magnitude. Sparse MeZO, whose method it is, chooses the smallest.",
        ),
    )


def _scaled(method: Method, eps: float) -> Method:
    """Return a zero-order method, whose code updates along eps z; but see the first step of ZO-Adaptive."""
    coded = method.as_coded or method.estimator
    if not isinstance(coded, FirstStep):
        difference = f"It updates along eps z, not z. {method.difference}".strip()
        return replace(method, as_coded=Scaled(coded, eps), difference=difference)
    # The code: v = sqrt(eps) z and g = v (L(theta + v) - L(theta - v)) / (2 eps), so eps cancels.
    assert isinstance(coded.first, Adaptive)
    first = replace(coded.first, estimator=mezo(math.sqrt(eps)))
    return replace(
        method,
        as_coded=FirstStep(first, Scaled(coded.later, eps)),
        difference=f"{method.difference} That step is along z, with a finite difference of sqrt(eps). The later ones "
        "are along eps z.",
    )


def _masked(probing: Probing, mask: Mask) -> Probing:
    assert isinstance(probing.directions, Directions)
    return replace(probing, directions=Masked(mask, probing.directions))


_REPEATED = "In some of its training functions all directions of an estimate are one: the loop uses one seed."
_UNPAIRED = (
    "Its estimate at the snapshot has a direction of its own, the same at all steps until the next snapshot, so its "
    "error is a constant bias."
)
_STALE = (
    "Its snapshot is empty, so without dropout the correction is 0 and one stale vector is applied until the next "
    "snapshot."
)
