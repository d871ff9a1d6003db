"""Formulas for the cost of an estimate: its FLOPs in forward passes, and its peak memory in layer outputs."""

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
    """Return the FLOPs of an estimate in units of F, the FLOPs of one forward pass. All weights are trained.

    Law, counting only matmuls, for a deep network (depth L -> infinity):
    - backprop: 3 F; with every block or segment recomputed: 4 F;
    - n forward-mode probes, with t tangents per forward pass: (ceil(n/t) + 2 n) F;
    - n central differences: 2 n F; n forward differences: (1 + n) F;
    - Accumulated(e), Clipped(e): as e.
    Not included: the Gram matrix of Projection (n^2 dot products over all weights). `matmuls` is exact for a given
    depth, `forecast` for a given model.

    Args:
        estimator: how the gradient is obtained.
    Returns:
        FLOPs / F. None if it depends on the model, or if no formula is known (masked, low-rank, layerwise and guided
        directions, and estimators other than `Reverse` and `Probing`).
    Source: Griewank and Walther 2008, chapter 3 (3 F); Chen et al. 2016 (4 F); Baydin et al. 2022, section 3.
    """
    return _total_cost(estimator, _UnitCosts(forward=1, gradient=2, tangent=2, recompute=1))


def adapter_forwards(estimator: Estimator) -> float | None:
    """Return the FLOPs of an estimate in units of F, the FLOPs of one forward pass. Only small adapters are trained.

    Law: a frozen weight needs no gradient and no tangent, but the activations of its layer need both. So
    - backprop: 2 F; with every block recomputed: 3 F;
    - n forward-mode probes, with t tangents per forward pass: (ceil(n/t) + n) F;
    - n central differences: 2 n F; n forward differences: (1 + n) F.
    Neglected: the matmuls of the adapters. The backward pass is counted down to the input, although it ends at the
    first adapter.

    Args:
        estimator: how the gradient is obtained.
    Returns:
        FLOPs / F. None if it depends on the model, or if no formula is known (masked, low-rank, layerwise and guided
        directions, and estimators other than `Reverse` and `Probing`).
    Source: Hu et al. 2021 (arXiv 2106.09685), section 4.2, for the frozen base; the counts follow law 9 (`matmuls`).
    """
    return _total_cost(estimator, _UnitCosts(forward=1, gradient=1, tangent=1, recompute=1))


def matmuls(estimator: Estimator, layers: int) -> float | None:
    """Return the matmuls of an estimate on a chain of equal linear layers; one layer's forward pass is one matmul.

    The network is L linear layers without bias, with no activation functions between them, all trained.

    Law 9:
    - forward pass: L;
    - backprop: L + (2 L - 1), because the first layer's input needs no gradient;
    - backprop with Segments(k): L - k more, because the last layer of each segment is not recomputed. Blocks() costs
      the same as k = L;
    - n forward-mode probes, with t tangents per forward pass: ceil(n/t) L + n (2 L - 1);
    - n central differences: 2 n L; n forward differences: (1 + n) L;
    - Accumulated(e), Clipped(e): as e.

    Args:
        estimator: how the gradient is obtained.
        layers: L, 1 or more.
    Returns:
        The exact number of matmuls; None if no formula is known.
    Raises:
        BadInput: layers is below 1.
    Source: Griewank and Walther 2008, chapter 3; Chen et al. 2016.
    """
    _check_layers(layers)
    recompute = 0
    match unwrapped(estimator):
        case Reverse(Segments(count)):
            recompute = layers - min(count, layers)
    return _total_cost(estimator, _UnitCosts(layers, 2 * layers - 1, 2 * layers - 1, recompute))


def activations(estimator: Estimator, layers: int) -> int | None:
    """Return the peak memory of a step on the network of `matmuls`, in units of one layer's output.

    The loss is the mean square of the network's output. Weights and batch are not counted.

    Law:
    - finite differences: 2 (one layer's input and output), for any number of probes;
    - forward mode, with t tangents per forward pass: 4 + 2 t. At the loss these are its output and the square of it,
      each with t tangents, and two intermediate values;
    - backprop: L + 4 (the outputs of all layers; at the loss, its square, its gradient and intermediate values);
    - backprop with Segments(k): max(k + 4, k + ceil(L/k)). These are the inputs of all segments and the outputs
      inside one segment. Blocks() has the memory of k = L.
    Neglected, because they do not grow with the batch: the noise, weight tangents, shifted weights and gradient of
    one layer. `forecast` includes these to the byte.

    Args:
        estimator: how the gradient is obtained.
        layers: L, 1 or more.
    Returns:
        The number of layer outputs; None if no formula is known.
    Raises:
        BadInput: layers is below 1.
    Source: Panchal et al. 2025 (arXiv 2506.21833), table 1, for the orders of growth. The constants are measured on
    this library (law 10).
    """
    _check_layers(layers)
    if micro_batches(estimator) > 1:
        return None
    match unwrapped(estimator):
        case Reverse(Everything() | Blocks()):
            return layers + 4
        case Reverse(Segments(count)):
            segments = min(count, layers)
            return max(segments + 4, segments + math.ceil(layers / segments))
        case Probing(directions=directions) if not _cost_as_dense(directions):
            return None
        case Probing(slope=Jvp(together), probes=probes):
            tangents = min(together, probes)
            return 4 + 2 * tangents
        case Probing(slope=CentralDifference() | ForwardDifference()):
            return 2
    return None


class _UnitCosts(NamedTuple):
    """The cost of one forward pass, the backward pass, the propagation of one tangent, and the recomputation."""

    forward: int
    gradient: int
    tangent: int
    recompute: int


def _total_cost(estimator: Estimator, unit: _UnitCosts) -> float | None:
    match unwrapped(estimator):
        case Reverse(saving):
            recompute = _recompute_cost(saving, unit)
            return None if recompute is None else unit.forward + unit.gradient + recompute
        case Probing(slope=slope, directions=directions, probes=probes) if _cost_as_dense(directions):
            return _cost_of_slopes(slope, probes, unit)
    return None


def _recompute_cost(saving: Saving, unit: _UnitCosts) -> int | None:
    match saving:
        case Everything() | Offloaded():
            return 0
        case Blocks() | Segments():
            return unit.recompute
    return None


def _cost_of_slopes(slope: Slope, probes: int, unit: _UnitCosts) -> int | None:
    match slope:
        case Jvp(together):
            return math.ceil(probes / together) * unit.forward + probes * unit.tangent
        case CentralDifference():
            return 2 * probes * unit.forward
        case ForwardDifference():
            return (1 + probes) * unit.forward
    return None


def _cost_as_dense(directions: Directions | StatefulDirections) -> bool:
    """Return whether a probe costs as much as a dense perturbation of all weights."""
    return isinstance(directions, Gaussian | Rademacher | Sphere | Orthogonal | Coordinates)


def _check_layers(layers: int) -> None:
    if layers < 1:
        raise BadInput(f"layers must be 1 or more, not {layers}.")
