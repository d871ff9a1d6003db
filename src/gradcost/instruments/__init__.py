"""Measure memory, FLOPs and time of any function, each in a separate run.

`measure(work, Bytes(), Operations(), Seconds())` returns memory, FLOPs and time.
"""

from gradcost.instruments.cuda_allocator import Reserved
from gradcost.instruments.doctor import Finding, diagnose
from gradcost.instruments.measure import (
    Allocator,
    Bytes,
    Instrument,
    Measurement,
    Operations,
    Seconds,
    TrainingStep,
    measure,
)

__all__ = [
    "Allocator",
    "Bytes",
    "Finding",
    "Instrument",
    "Measurement",
    "Operations",
    "Reserved",
    "Seconds",
    "TrainingStep",
    "diagnose",
    "measure",
]
