"""What an estimate costs: in forwards, in matmuls of one layer and in activations alive at once."""

from __future__ import annotations

import math
from typing import NamedTuple

from gradcost.checkpointing.policies import Blocks, Everything, Offloaded, Saving, Segments
from gradcost.core.errors import BadInput
from gradcost.directions import Coordinates, Directions, Gaussian, Rademacher, Sphere, StatefulDirections
from gradcost.directions.orthogonal import Orthogonal
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.clipped import Clipped
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.probing import Probing
from gradcost.estimators.reverse import Reverse
from gradcost.slopes.slope import CentralDifference, ForwardDifference, Jvp, Slope


def forwards(estimator: Estimator) -> float | None:
    """FLOPs of an estimate, in forwards F, where all weights are trained; None where the model
    decides, or directions that leave weights out or have structure.

    Law, of the matmuls of a deep network (L layers without end): backpropagation 3 F, and 4 F with every block or
    segment computed again; n forward-mode probes, t of them sharing a forward, (n/t + 2 n) F; n two-sided
    differences 2 n F; n one-sided ones (1 + n) F. Accumulated(e) and Clipped(e) are e. A Projection's Gram
    matrix, n^2 products as long as the weights, comes on top. `matmuls` is exact for a given depth, `forecast` for
    a given model.

    Source: Griewank and Walther 2008, chapter 3 (3 F); Chen et al. 2016 (4 F); Baydin et al. 2022, section 3.
    """
    return _matmuls(estimator, _Parts(forward=1, gradient=2, tangent=2, again=1))


def adapter_forwards(estimator: Estimator) -> float | None:
    """FLOPs of an estimate, in forwards F, where all but small adapters is frozen; None where the model decides.

    Law: a frozen layer's weights want neither a gradient nor a tangent, but what passes through it does. So
    backpropagation 2 F, and 3 F with every block computed again; n forward-mode probes, t sharing a forward,
    (n/t + n) F; two-sided differences 2 n F, one-sided ones (1 + n) F. The adapters' own matmuls are not counted,
    nor is it counted that nothing flows back below the first adapter.

    Source: Hu et al. 2021 (arXiv 2106.09685), section 4.2, for the frozen base; the counts are law 9's.
    """
    return _matmuls(estimator, _Parts(forward=1, gradient=1, tangent=1, again=1))


def matmuls(estimator: Estimator, layers: int) -> float | None:
    """Law 9's whole number: what an estimate costs on L = `layers` equal linear layers without bias and nothing
    between them, all trained, in forwards of one layer; None where no formula is claimed.

    Law: forward L; backpropagation L + (2 L - 1), for the first layer's input wants no gradient; Segments(k) L - k
    more, for the last layer of a segment is not computed again, and Blocks() is k = L; n forward-mode probes, t
    sharing a forward, ceil(n/t) L + n (2 L - 1); two-sided differences 2 n L; one-sided ones (1 + n) L.
    Accumulated(e) and Clipped(e) are e.

    Source: Griewank and Walther 2008, chapter 3; Chen et al. 2016. Raises: ValueError when layers < 1.
    """
    _check_layers(layers)
    again = 0
    match estimator:
        case Reverse(Segments(count)):
            again = layers - min(count, layers)
    return _matmuls(estimator, _Parts(layers, 2 * layers - 1, 2 * layers - 1, again))


def activations(estimator: Estimator, layers: int) -> int | None:
    """How many layers' outputs are alive at a step's peak on the network of `matmuls` under a mean-square loss,
    beside weights and batch; None where no formula is claimed.

    Law: differences 2 (a layer's input and output), however many probes; forward mode with t sharing a forward
    2 + 3 t, and 6 for t = 1 (a tangent at the input, and two parts of one at the output); backpropagation L + 4
    (all outputs, and at the loss its square, its gradient and what these pass through); Segments(k) of it
    max(k + 4, k + ceil(L/k)): the inputs of the segments, and one segment's outputs. Blocks() is k = L.
    Smaller terms, which do not grow with the batch, are not counted: one layer's noise, tangents or shifted
    weights, and its gradient when it is used as it comes. `forecast` has them, to the byte.

    Source: the orders are those of Panchal et al. 2025 (arXiv 2506.21833), table 1; the constants are measured
    facts of this library (law 10). Raises: ValueError when layers < 1.
    """
    _check_layers(layers)
    match estimator:
        case Clipped(inner):
            return activations(inner, layers)
        case Reverse(Everything() | Blocks()):
            return layers + 4
        case Reverse(Segments(count)):
            held = min(count, layers)
            return max(held + 4, held + math.ceil(layers / held))
        case Probing(directions=directions) if not _move_all(directions):
            return None
        case Probing(slope=Jvp(together), probes=probes):
            sharing = min(together, probes)
            return 6 if sharing == 1 else 2 + 3 * sharing
        case Probing(slope=CentralDifference() | ForwardDifference()):
            return 2
    return None


class _Parts(NamedTuple):
    """What the parts of an estimate cost: a forward, the way back, a tangent's forward, computing all again."""

    forward: int
    gradient: int
    tangent: int
    again: int


def _matmuls(estimator: Estimator, parts: _Parts) -> float | None:
    match estimator:
        case Accumulated(inner) | Clipped(inner):
            return _matmuls(inner, parts)
        case Reverse(saving):
            again = _again(saving, parts)
            return None if again is None else parts.forward + parts.gradient + again
        case Probing(slope=slope, directions=directions, probes=probes) if _move_all(directions):
            return _of_slopes(slope, probes, parts)
    return None


def _again(saving: Saving, parts: _Parts) -> int | None:
    match saving:
        case Everything() | Offloaded():
            return 0
        case Blocks() | Segments():
            return parts.again
    return None


def _of_slopes(slope: Slope, probes: int, parts: _Parts) -> int | None:
    match slope:
        case Jvp(together):
            return math.ceil(probes / together) * parts.forward + probes * parts.tangent
        case CentralDifference():
            return 2 * probes * parts.forward
        case ForwardDifference():
            return (1 + probes) * parts.forward
    return None


def _move_all(directions: Directions | StatefulDirections) -> bool:
    """Whether each direction moves every layer by a matrix without structure that could make it cheaper."""
    return isinstance(directions, Gaussian | Rademacher | Sphere | Orthogonal | Coordinates)


def _check_layers(layers: int) -> None:
    if layers < 1:
        raise BadInput(f"a network has 1 layer or more, not {layers}.")
