"""Imported by the process that workers are forked from: what every trial needs is loaded there once."""

from __future__ import annotations

import torch

from gradcost.noise.add import add_noise
from gradcost.noise.philox import Normals, Signs
from gradcost.studies import worker  # noqa: F401 (what a worker does)

torch.set_num_threads(1)  # a pool of threads does not survive a fork
for _stream in (Signs(), Normals()):  # compiled code: its cache is read at the first use
    add_noise(_stream, (0,), (1.0,), 0, torch.zeros(4))
