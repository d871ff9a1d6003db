"""Activation checkpointing: which intermediate values backprop saves and which it recomputes.

Every policy gives the same gradient, bit for bit. Only memory and time differ.
"""

from gradcost.checkpointing.chunked_loss import chunked_cross_entropy
from gradcost.checkpointing.in_loop import AppliedPolicy, apply, checkpoint
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
    "AppliedPolicy",
    "Attention",
    "Blocks",
    "Everything",
    "Matmuls",
    "Offloaded",
    "Saving",
    "Schedule",
    "Segments",
    "Selective",
    "apply",
    "checkpoint",
    "chunked_cross_entropy",
]
