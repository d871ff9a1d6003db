"""Activation checkpointing: which intermediate values backprop saves and which it recomputes.

The policies change memory and time, never a bit of the gradient.
"""

from gradcost.checkpointing.chunked_loss import chunked_cross_entropy
from gradcost.checkpointing.policies import (
    Attention,
    Blocks,
    Everything,
    Matmuls,
    Offloaded,
    Saving,
    Schedule,
    Segments,
    Selective,
)

__all__ = [
    "Attention",
    "Blocks",
    "Everything",
    "Matmuls",
    "Offloaded",
    "Saving",
    "Schedule",
    "Segments",
    "Selective",
    "chunked_cross_entropy",
]
