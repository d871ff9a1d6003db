"""Memory per device when several devices share the state of training: arithmetic on the forecast of one device."""

from __future__ import annotations

from gradcost.core.blocks import find_blocks
from gradcost.core.objective import Objective
from gradcost.planning.forecast import Forecast

STAGES = ("ZeRO-1", "ZeRO-2", "ZeRO-3, FSDP2")


def per_device(forecast: Forecast, objective: Objective, devices: int) -> dict[str, int]:
    """Return the peak bytes of each device, for each of STAGES.

    Law: every device computes its own batch, the one of the forecast, and holds all gradients until the update.
    ZeRO-1 divides the optimizer's state by the number of devices, ZeRO-2 also the gradients. ZeRO-3 and FSDP2 also
    divide the parameters; the largest block is gathered. Not included: buffers for communication, and a second block
    that is gathered ahead.

    Args:
        forecast: a step on one device.
        objective: the model and the loss of the forecast.
        devices: their number, 1 or more.
    Source: Rajbhandari et al. 2020 (arXiv 1910.02054), section 3.
    """
    parameters, state = forecast.breakdown["parameters"], forecast.breakdown["optimizer state"]
    gradients = sum(leaf.parameter.nbytes for leaf in objective.leaves)
    others = forecast.peak - parameters - state - forecast.breakdown["gradients"]
    blocks = find_blocks(objective.model)
    sizes = [sum(p.nbytes for module in block for p in module.parameters()) for block in blocks]
    outside = parameters - sum(sizes)
    gathered = max(*sizes, outside) if sizes else parameters
    first = parameters + gradients + _share(state, devices) + others
    second = first - gradients + _share(gradients, devices)
    third = second - parameters + min(_share(parameters, devices) + gathered, parameters)
    return dict(zip(STAGES, (first, second, third), strict=True))


def _share(nbytes: int, devices: int) -> int:
    return -(-nbytes // devices)
