"""Distributions of random directions z in parameter space, with E[z z'] = I where `unbiased` is True.

A direction is stored as a seed. Its elements are regenerated from the seed, one parameter at a time.
"""

from gradcost.directions.coordinates import Coordinates
from gradcost.directions.direction import Directions, SparseDirections, StatefulDirections
from gradcost.directions.groups import EachBlock, EachLeaf, EachModule, Grouping
from gradcost.directions.guided import Guided
from gradcost.directions.independent import Gaussian, Rademacher
from gradcost.directions.layerwise import Layerwise
from gradcost.directions.low_rank import LazyLowRank, LowRank
from gradcost.directions.masks import Fixed, Largest, Mask, Masked, Named, Random, Smallest
from gradcost.directions.orthogonal import Orthogonal
from gradcost.directions.sphere import Sphere

__all__ = [
    "Coordinates",
    "Directions",
    "EachBlock",
    "EachLeaf",
    "EachModule",
    "Fixed",
    "Gaussian",
    "Grouping",
    "Guided",
    "Largest",
    "Layerwise",
    "LazyLowRank",
    "LowRank",
    "Mask",
    "Masked",
    "Named",
    "Orthogonal",
    "Rademacher",
    "Random",
    "Smallest",
    "SparseDirections",
    "Sphere",
    "StatefulDirections",
]
