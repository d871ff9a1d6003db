"""Random numbers as functions of (seed, index): the same bits for any device, thread count and chunk size.

`add_noise` adds scaled random directions to a tensor in one pass.
"""

from gradcost.noise.add import add_noise
from gradcost.noise.hartley import Hartley
from gradcost.noise.permutation import sample_without_replacement
from gradcost.noise.philox import Normals, Signs, Stream

__all__ = [
    "Hartley",
    "Normals",
    "Signs",
    "Stream",
    "add_noise",
    "sample_without_replacement",
]
