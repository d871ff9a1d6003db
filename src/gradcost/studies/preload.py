"""Load torch, the worker and compiled noise functions. The fork server imports this module once for all workers."""

from __future__ import annotations

import torch

from gradcost.noise.add import add_noise
from gradcost.noise.philox import Normals, Signs
from gradcost.studies import worker  # noqa: F401 (loaded for the workers)

torch.set_num_threads(1)  # a thread pool does not survive a fork
for _stream in (Signs(), Normals()):  # the first call loads compiled code from its cache
    add_noise(_stream, (0,), (1.0,), 0, torch.zeros(4))
