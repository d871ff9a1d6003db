"""The cost of an estimate: in forward passes, in matmuls of one layer, and in activations at the peak."""

from __future__ import annotations

import math
from typing import NamedTuple

from gradcost.checkpointing.policies import Blocks, Everything, Offloaded, Saving, Segments
from gradcost.core.errors import BadInput
from gradcost.directions import Coordinates, Directions, Gaussian, Rademacher, Sphere, StatefulDirections
from gradcost.directions.orthogonal import Orthogonal
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.probing import Probing
from gradcost.estimators.reverse import Reverse
from gradcost.estimators.structure import micro_batches, unwrapped
from gradcost.slopes.slope import CentralDifference, ForwardDifference, Jvp, Slope


def forwards(estimator: Estimator) -> float | None:
    """Return the FLOPs of an estimate in forward passes F, with all weights trained.

    Law, for the matmuls of a network of depth L -> infinity:
    - backprop: 3 F; with every block or segment recomputed: 4 F;
    - n forward-mode probes, t of them per forward pass: (n/t + 2 n) F;
    - n central differences: 2 n F; n forward differences: (1 + n) F;
    - Accumulated(e), Clipped(e): as e.
    Not included: the Gram matrix of Projection, n^2 dot products of the length of the weights. `matmuls` is exact for
    a depth, `forecast` for a model.

    Args:
        estimator: how the gradient is obtained.
    Returns:
        The number of forward passes; None if it depends on the model, or directions are sparse or structured.
    Source: Griewank and Walther 2008, chapter 3 (3 F); Chen et al. 2016 (4 F); Baydin et al. 2022, section 3.
    """
    return _matmuls(estimator, _UnitCosts(forward=1, gradient=2, tangent=2, recompute=1))


def adapter_forwards(estimator: Estimator) -> float | None:
    """Return the FLOPs of an estimate in forward passes F, with all weights frozen but those of small adapters.

    Law: a frozen weight needs no gradient and no tangent; the activations through its layer do. So
    - backprop: 2 F; with every block recomputed: 3 F;
    - n forward-mode probes, t of them per forward pass: (n/t + n) F;
    - n central differences: 2 n F; n forward differences: (1 + n) F.
    Neglected: the matmuls of the adapters, and that the backward pass ends at the first adapter.

    Args:
        estimator: how the gradient is obtained.
    Returns:
        The number of forward passes; None if it depends on the model, or directions are sparse or structured.
    Source: Hu et al. 2021 (arXiv 2106.09685), section 4.2, for the frozen base; the counts are those of law 9.
    """
    return _matmuls(estimator, _UnitCosts(forward=1, gradient=1, tangent=1, recompute=1))


def matmuls(estimator: Estimator, layers: int) -> float | None:
    """Return the cost of an estimate on a chain of equal linear layers, in forward passes of one layer.

    The network: L linear layers without bias and with nothing between them, all trained.

    Law 9:
    - forward pass: L;
    - backprop: L + (2 L - 1), because the first layer's input needs no gradient;
    - Segments(k): L - k more, because the last layer of a segment is not recomputed; Blocks() is k = L;
    - n forward-mode probes, t of them per forward pass: ceil(n/t) L + n (2 L - 1);
    - n central differences: 2 n L; n forward differences: (1 + n) L;
    - Accumulated(e), Clipped(e): as e.

    Args:
        estimator: how the gradient is obtained.
        layers: L, 1 or more.
    Returns:
        The exact number; None if no formula is known.
    Raises:
        BadInput: layers is below 1.
    Source: Griewank and Walther 2008, chapter 3; Chen et al. 2016.
    """
    _check_layers(layers)
    recompute = 0
    match estimator:
        case Reverse(Segments(count)):
            recompute = layers - min(count, layers)
    return _matmuls(estimator, _UnitCosts(layers, 2 * layers - 1, 2 * layers - 1, recompute))


def activations(estimator: Estimator, layers: int) -> int | None:
    """Return the peak memory of a step on the network of `matmuls`, in outputs of one layer.

    The loss is the mean square. Weights and batch are not counted.

    Law:
    - finite differences: 2 (a layer's input and output), for any number of probes;
    - forward mode, t probes per forward pass: 2 + 3 t, and 6 for t = 1 (a tangent at the input, two parts of one at
      the output);
    - backprop: L + 4 (all outputs; at the loss its square, its gradient and intermediate values);
    - Segments(k): max(k + 4, k + ceil(L/k)), the inputs of the segments and the outputs of one segment; Blocks() is
      k = L.
    Neglected, because it does not grow with the batch: one layer's noise, tangents or shifted weights, and its
    gradient. `forecast` includes these to the byte.

    Args:
        estimator: how the gradient is obtained.
        layers: L, 1 or more.
    Returns:
        The number of layer outputs; None if no formula is known.
    Raises:
        BadInput: layers is below 1.
    Source: Panchal et al. 2025 (arXiv 2506.21833), table 1, for the orders; the constants are measured facts of this
    library (law 10).
    """
    _check_layers(layers)
    if micro_batches(estimator) > 1:
        return None
    match unwrapped(estimator):
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


class _UnitCosts(NamedTuple):
    """The costs of a forward pass, a backward pass, a tangent's forward pass, and the recomputation."""

    forward: int
    gradient: int
    tangent: int
    recompute: int


def _matmuls(estimator: Estimator, unit: _UnitCosts) -> float | None:
    match unwrapped(estimator):
        case Reverse(saving):
            recompute = _recomputed(saving, unit)
            return None if recompute is None else unit.forward + unit.gradient + recompute
        case Probing(slope=slope, directions=directions, probes=probes) if _move_all(directions):
            return _of_slopes(slope, probes, unit)
    return None


def _recomputed(saving: Saving, unit: _UnitCosts) -> int | None:
    match saving:
        case Everything() | Offloaded():
            return 0
        case Blocks() | Segments():
            return unit.recompute
    return None


def _of_slopes(slope: Slope, probes: int, unit: _UnitCosts) -> int | None:
    match slope:
        case Jvp(together):
            return math.ceil(probes / together) * unit.forward + probes * unit.tangent
        case CentralDifference():
            return 2 * probes * unit.forward
        case ForwardDifference():
            return (1 + probes) * unit.forward
    return None


def _move_all(directions: Directions | StatefulDirections) -> bool:
    """Return whether each direction moves every layer by a matrix without structure that reduces its cost."""
    return isinstance(directions, Gaussian | Rademacher | Sphere | Orthogonal | Coordinates)


def _check_layers(layers: int) -> None:
    if layers < 1:
        raise BadInput(f"layers must be 1 or more, not {layers}.")
