"""The tables of estimators and objectives, with the facts about each. A law is tested on their cross product.

A new method is one row here; every law then applies to it. tests/test_tables.py tests the tables themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradcost
from gradcost.checkpointing.policies import Blocks, Everything, Segments, Selective
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.directions import Coordinates, Directions, Gaussian, Rademacher, Sphere
from gradcost.directions.groups import EachBlock, EachModule
from gradcost.directions.guided import Guided
from gradcost.directions.layerwise import Layerwise
from gradcost.directions.low_rank import LazyLowRank, LowRank
from gradcost.directions.masks import Largest, Masked, Random, Smallest
from gradcost.directions.orthogonal import Orthogonal
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.activity import ActivityPerturbation
from gradcost.estimators.adaptive import Adaptive
from gradcost.estimators.clipped import Clipped
from gradcost.estimators.combine import Normalized, Projection, Sign
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.hessian_informed import HessianInformed
from gradcost.estimators.mixed import Mixed
from gradcost.estimators.momentum import Momentum
from gradcost.estimators.probing import Probing
from gradcost.estimators.reverse import Reverse
from gradcost.estimators.variance_reduced import VarianceReduced
from gradcost.slopes.slope import CentralDifference, ForwardDifference, Jvp, Slope

# ---- estimators

DIRECTIONS: dict[str, Directions] = {
    "gaussian": Gaussian(),
    "rademacher": Rademacher(),
    "sphere": Sphere(),
    "coordinates": Coordinates(),
    "orthogonal": Orthogonal(),
    "lowrank": LowRank(),
}
WHOLE = ("lowrank",)  # an entry depends on more than its index, so `add` needs the complete leaf
SLOPES: dict[str, Slope] = {
    "jvp": Jvp(),
    "jvp3": Jvp(together=3),
    "central": CentralDifference(1e-3),
    "forward": ForwardDifference(1e-3),
}


# The objectives that `pairs` tries a row on: a dense network, one with dropout and tied weights, and one whose
# parameters no module looks up as its own.
WIDE = ("mlp", "transformer", "direct")
EVERYWHERE = (*WIDE, "cnn", "attention", "tiny", "linear")


@dataclass(frozen=True)
class Row:
    """An estimator and the facts about it.

    evaluations: how many forward passes of the loss one estimate starts.
    matmuls: n -> the matmuls of an estimate on n equal linear layers without bias, counted in forward passes of one
        layer. Its terms are: n for a forward pass; n for the gradients or tangents of the weights; n - 1 for those
        of the layers' inputs, since the first layer's input needs none.
    moment: (d, n) -> E|g|^2 / |grad|^2 on d weights with n probes; None where no formula is claimed.
    exact: whether its slopes have no bias in eps.
    blocks: whether it needs a model with repeated blocks.
    unbiased: whether its mean is the gradient, up to that bias.
    on: the objectives that `pairs` tries it on. The others are marked slow.
    """

    estimator: Estimator
    evaluations: int
    matmuls: Callable[[int], float]
    moment: Callable[[int, int], float] | None
    exact: bool = True
    blocks: bool = False
    unbiased: bool = True
    on: tuple[str, ...] = WIDE


def moment(directions: Directions) -> Callable[[int, int], float] | None:
    """Return (d, n) -> E|g|^2 / |grad|^2 for a mean of n probes, or None if it depends on more than d and n.

    One probe has E|s z|^2 = E[|z|^2 (z . grad)^2] = m |grad|^2. A mean of n independent ones has 1 + (m - 1) / n.
    """
    if isinstance(directions, LowRank):
        return None
    if isinstance(directions, Gaussian):
        return lambda d, n: 1 + (d + 1) / n  # m = d + 2, by the fourth moments of a normal vector
    if isinstance(directions, Coordinates | Orthogonal):
        return lambda d, n: d / n  # n distinct coordinates of the gradient in some basis, each times d/n
    return lambda d, n: 1 + (d - 1) / n  # Rademacher, Sphere: |z|^2 = d always, so m = d


def probing(slope: Slope, directions: Directions, probes: int) -> Row:
    """Return the row of a plain `Probing`: its cost follows from the slope, its moment from the directions."""
    estimator = Probing(slope, directions, probes)
    if isinstance(slope, Jvp):
        forwards = math.ceil(probes / slope.together)
        # n for each forward pass; n weight tangents and n - 1 input tangents for each probe.
        return Row(estimator, forwards, lambda n: forwards * n + probes * (2 * n - 1), moment(directions))
    # A central difference evaluates both ends of each probe; a forward difference one end, and the weights once.
    forwards = 2 * probes if isinstance(slope, CentralDifference) else 1 + probes
    return Row(estimator, forwards, lambda n: forwards * n, moment(directions), exact=False)


def everywhere(row: Row) -> Row:
    """Return the row with every objective as its default, for the rows that stand for a kind of estimator."""
    return replace(row, on=EVERYWHERE)


PROBES = {"jvp": 2, "jvp3": 4, "central": 2, "forward": 3}  # jvp3: three probes share a forward, one has its own

ESTIMATORS: dict[str, Row] = {
    f"{way}-{slope}": probing(SLOPES[slope], DIRECTIONS[way], PROBES[slope])
    for way in ("gaussian", "rademacher", "sphere", "coordinates")
    for slope in SLOPES
} | {
    # Backprop: a forward pass n, weight gradients n, input gradients n - 1. It is the gradient, so its moment is 1.
    "backprop": Row(Reverse(Everything()), 1, lambda n: 3 * n - 1, lambda d, n: 1.0),
    # A block of one bare layer recomputes nothing: the backward of a linear layer needs only the block's input.
    "checkpointed": Row(Reverse(Blocks()), 1, lambda n: 3 * n - 1, lambda d, n: 1.0, blocks=True),
    "selective": Row(Reverse(Selective()), 1, lambda n: 3 * n - 1, lambda d, n: 1.0, blocks=True),
    # Each of two segments recomputes all layers but its last, whose input is enough: n - 2 more.
    "segments2": Row(Reverse(Segments(2)), 1, lambda n: 3 * n - 1 + n - 2, lambda d, n: 1.0, blocks=True),
    # A micro-batch of a k-th of the batch costs a k-th: all k together cost what the batch costs at once.
    "accumulated-backprop": Row(Accumulated(Reverse(), 3), 3, lambda n: 3 * n - 1, lambda d, n: 1.0),
    "accumulated-checkpointed": Row(
        Accumulated(Reverse(Blocks()), 2), 2, lambda n: 3 * n - 1, lambda d, n: 1.0, blocks=True
    ),
    "accumulated-jvp3": Row(
        Accumulated(Probing(Jvp(3), Gaussian(), 3), 2), 2, lambda n: n + 3 * (2 * n - 1), moment(Gaussian())
    ),
    "accumulated-central": Row(
        Accumulated(Probing(CentralDifference(1e-3), Rademacher()), 3),
        6,
        lambda n: 2 * n,
        moment(Rademacher()),
        exact=False,
    ),
    # A clip bounds the measured slopes, and costs nothing.
    "clipped-jvp": Row(
        Clipped(Probing(Jvp(), Gaussian(), 2), 0.1), 2, lambda n: 2 * (3 * n - 1), None, unbiased=False
    ),
    "clipped-accumulated": Row(
        Clipped(Accumulated(Probing(ForwardDifference(1e-3), Sphere()), 2), 0.1),
        4,
        lambda n: 2 * n,
        None,
        exact=False,
        unbiased=False,
    ),
    "accumulated-clipped": Row(
        Accumulated(Clipped(Probing(Jvp(), Rademacher()), 0.1), 2), 2, lambda n: 3 * n - 1, None, unbiased=False
    ),
    # The slopes' own cost, and the Gram matrix of k directions: k * k inner products of 144 weights a layer, in units
    # of 6 x 144 (a batch of 6), so k * k / 6 a layer. Moment: the projection on n random directions keeps n/d of
    # |grad|^2 on average, and is scaled by d/n, so (d/n)^2 n/d = d/n.
    "projection-jvp3": Row(
        Probing(Jvp(together=3), Gaussian(), 6, Projection()),
        2,
        lambda n: 2 * n + 6 * (2 * n - 1) + 6 * n,
        lambda d, n: d / n,
    ),
    "projection-central": Row(
        Probing(CentralDifference(1e-3), Sphere(), 3, Projection()),
        6,
        lambda n: 6 * n + 1.5 * n,
        lambda d, n: d / n,
        exact=False,
    ),
    "sign-central": Row(
        Probing(CentralDifference(1e-3), Gaussian(), 2, Sign()),
        4,
        lambda n: 4 * n,
        None,
        exact=False,
        unbiased=False,
    ),
    "normalized-forward": Row(
        Probing(ForwardDifference(1e-3), Rademacher(), 3, Normalized()),
        4,
        lambda n: 4 * n,
        None,
        exact=False,
        unbiased=False,
    ),
    "masked-smallest-jvp3": Row(
        Probing(Jvp(together=3), Masked(Smallest(0.4)), 4),
        2,
        lambda n: 2 * n + 4 * (2 * n - 1),
        None,
        unbiased=False,
    ),
    # Moment: an entry is 0, or normal over sqrt(share), so E z^4 = 3 / share and m = d - 1 + 3 / share.
    "masked-random-jvp3": Row(
        Probing(Jvp(together=3), Masked(Random(0.5)), 4),
        2,
        lambda n: 2 * n + 4 * (2 * n - 1),
        lambda d, n: 1 + (d - 2 + 3 / 0.5) / n,
    ),
    "masked-largest-central": Row(
        Probing(CentralDifference(1e-3), Masked(Largest(0.3), Rademacher()), 2),
        4,
        lambda n: 4 * n,
        None,
        exact=False,
        unbiased=False,
    ),
    # 6 probes perturb each of n layers 6 / n times. A probe of layer l costs the forward pass n, one weight tangent,
    # and n - l input tangents of later layers. The sum over l is n * n + n + n (n - 1) / 2.
    "layerwise-jvp": Row(
        Probing(Jvp(), Layerwise(by=EachModule()), 6),
        6,
        lambda n: 6 / n * (n * n + n + n * (n - 1) / 2),
        None,
    ),
    "layerwise-central": Row(
        Probing(CentralDifference(1e-3), Layerwise(Rademacher(), EachBlock()), 2),
        4,
        lambda n: 4 * n,
        None,
        exact=False,
    ),
    "orthogonal-jvp3": probing(Jvp(together=3), Orthogonal(), 4),
    "orthogonal-central": probing(CentralDifference(1e-3), Orthogonal(), 2),
    # A layer's weight tangent A B' is never made: x B and then (x B) A' are 2 products with 12 x rank matrices, so
    # 2 rank / 12 = rank / 6 of a layer each. Two forward passes, and input tangents as ever.
    "lowrank-jvp3": Row(Probing(Jvp(together=3), LowRank(), 4), 2, lambda n: 2 * n + 4 * (n - 1) + 4 * n / 6, None),
    "lowrank-central": probing(CentralDifference(1e-3), LowRank(), 2),
    "lazy-lowrank-jvp3": Row(
        Probing(Jvp(together=3), LazyLowRank(rank=3, every=2), 4),
        2,
        lambda n: 2 * n + 4 * (n - 1) + 4 * n / 2,
        None,
    ),
    "lazy-lowrank-central": Row(
        Probing(CentralDifference(1e-3), LazyLowRank(), 2), 4, lambda n: 4 * n, None, exact=False
    ),
    "guided-jvp3": Row(
        Probing(Jvp(together=3), Guided(), 4),
        2,
        lambda n: 2 * n + 4 * (2 * n - 1),
        None,
        unbiased=False,
    ),
    "guided-central": Row(
        Probing(CentralDifference(1e-3), Guided(Rademacher(), 0.25), 2),
        4,
        lambda n: 4 * n,
        None,
        exact=False,
        unbiased=False,
    ),
    # Two candidates for each leaf: `raising` has 9 leaves, n layers have n. A central difference has 2 forward passes
    # of n for each of the 2 n candidates. A tangent that starts in layer l costs what it does under "layerwise-jvp".
    "adaptive-central": Row(
        Adaptive(gradcost.mezo(1e-3), 2), 36, lambda n: 4 * n * n, None, exact=False, unbiased=False
    ),
    "adaptive-jvp": Row(
        Adaptive(gradcost.forward_gradient(), 2),
        18,
        lambda n: 2 * (n * n + n + n * (n - 1) / 2),
        None,
        unbiased=False,
        on=("mlp", "direct"),  # on the transformer's 38 leaves one estimate takes seconds
    ),
    # The loss at the weights, and at both ends of 2 probes.
    "hessian-informed": Row(HessianInformed(1e-3, 2, 0.1), 5, lambda n: 5 * n, None, exact=False, unbiased=False),
    # The noise starts at a layer's output, so a probe has n - 1 input tangents and no weight tangent. One more
    # forward pass follows, n, with the product of noise and input in each layer, n for all probes together.
    "activity-jvp": everywhere(Row(ActivityPerturbation(probes=2), 3, lambda n: 2 * (2 * n - 1) + 2 * n, None)),
    "activity-central": Row(
        ActivityPerturbation(CentralDifference(1e-3), Rademacher(), 2),
        5,
        lambda n: 4 * n + 2 * n,
        None,
        exact=False,
    ),
    # The first estimate makes the snapshot: one pass of the anchor over the data, which is one batch here, and then
    # two estimates, at the weights and at the snapshot.
    "svrg-central": Row(
        VarianceReduced(Probing(CentralDifference(1e-3), Gaussian(), 2)),
        12,
        lambda n: 12 * n,
        moment(Gaussian()),
        exact=False,
    ),
    "svrg-jvp3-anchored": Row(
        VarianceReduced(Probing(Jvp(together=3), Rademacher(), 3), 2, Reverse()),
        3,
        lambda n: 3 * n - 1 + 2 * (n + 3 * (2 * n - 1)),
        lambda d, n: 1.0,  # law 13: at the snapshot the estimate is the anchor's gradient, by backprop
    ),
    "svrg-backprop": Row(VarianceReduced(Reverse(), 5), 3, lambda n: 3 * (3 * n - 1), lambda d, n: 1.0),
    # A gradient of the past is replayed, not measured: it costs no forward pass.
    "momentum-central": Row(
        Momentum(Probing(CentralDifference(1e-3), Gaussian(), 2)),
        4,
        lambda n: 4 * n,
        moment(Gaussian()),
        exact=False,
    ),
    # The pattern matches some leaves of every model here. On n layers it matches the first one's weight, for which
    # backprop costs a forward pass n, n - 1 input gradients and 1 weight gradient. One probe is 2 forward passes.
    "mixed-backprop-central": Row(
        Mixed("[0bfth]*", Reverse(), Probing(CentralDifference(1e-3), Rademacher())),
        3,
        lambda n: 2 * n + 2 * n,
        None,
        exact=False,
    ),
    # The other presets that users know are rows above, under the names of their parts: see PRESETS.
    "spsa": Row(gradcost.spsa(1e-3), 2, lambda n: 2 * n, moment(Rademacher()), exact=False),
}
for _name in ("backprop", "checkpointed", "gaussian-jvp", "sphere-jvp3", "rademacher-central"):
    ESTIMATORS[_name] = everywhere(ESTIMATORS[_name])

# Presets and the row that is the same estimator, so that the laws are not run on it twice.
PRESETS: dict[str, Estimator] = {
    "backprop": gradcost.backprop(),
    "checkpointed": gradcost.checkpointed(),
    "gaussian-jvp": gradcost.forward_gradient(2, together=1),
    "gaussian-central": gradcost.mezo(1e-3, 2),
    "spsa": gradcost.spsa(1e-3),
}

# A row of each wrapper, each slope and each kind of stateful directions, for tests that take many steps.
REPRESENTATIVE = (
    "accumulated-jvp3",
    "clipped-accumulated",
    "masked-smallest-jvp3",
    "layerwise-central",
    "lazy-lowrank-jvp3",
    "guided-central",
    "adaptive-central",
    "hessian-informed",
    "activity-central",
    "svrg-jvp3-anchored",
    "momentum-central",
    "mixed-backprop-central",
)

# ---- objectives

KEY = Key(20).fold("tables")


@dataclass(frozen=True)
class Problem:
    """A factory of objectives with a batch of 7, and the facts about it. Every call makes the same numbers.

    blocks: how many repeated blocks it has.
    smooth: whether the loss has three derivatives everywhere.
    draws: whether the loss draws random numbers.
    mixes: whether an example's output depends on the others.
    """

    build: Callable[[], tuple[nn.Module, Callable[[nn.Module, Any], Tensor], tuple[Tensor, ...]]]
    blocks: int
    smooth: bool = True
    draws: bool = False
    mixes: bool = False

    def make(self, dtype: torch.dtype = torch.float32) -> tuple[Objective, tuple[Tensor, ...]]:
        with seeded_generators(KEY):
            model, loss, batch = self.build()
        batch = tuple(part.to(dtype) if part.is_floating_point() else part for part in batch)
        return Objective(model.to(dtype), loss, data=lambda: [batch]), batch


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def mlp() -> Any:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, cross_entropy, (torch.randn(7, 6), torch.randint(3, (7,)))


def cnn() -> Any:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    return model, cross_entropy, (torch.randn(7, 1, 6, 6), torch.randint(3, (7,)))


class Block(nn.Module):
    """A transformer block: fused attention with dropout, then two linear layers."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        x = x + self.drop(self.out(seen.transpose(1, 2).flatten(2)))
        return x + self.drop(self.down(F.gelu(self.up(self.second(x)))))


class Transformer(nn.Module):
    """A language model whose head is tied to its embedding and whose positions are read directly."""

    def __init__(self, words: int = 11, width: int = 8, heads: int = 2, layers: int = 3, length: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.positions = nn.Parameter(0.1 * torch.randn(length, width))
        self.drop = nn.Dropout(0.1)
        self.blocks = nn.ModuleList([Block(width, heads, 0.1) for _ in range(layers)])
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.drop(self.embed(words) + self.positions)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def transformer() -> Any:
    words = torch.randint(11, (7, 6))
    return Transformer(), cross_entropy, (words[:, :-1], words[:, 1:])


class Attends(nn.Module):
    """`nn.MultiheadAttention`, which reads `out_proj.weight` without calling `out_proj`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


class Attention(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attends(width), Attends(width)])
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def attention() -> Any:
    model = Attention().eval()  # in eval mode without gradients PyTorch would take its C++ fast path
    return model, cross_entropy, (torch.randn(7, 4, 8), torch.randint(3, (7,)))


class Direct(nn.Module):
    """Parameters that no module reads in its own forward: a list of them, and one that only the loss reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ParameterList([0.5 * torch.randn(5, 5) for _ in range(2)])
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.unused = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.layers:
            x = torch.tanh(x @ weight)
        return x


def tempered(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]) * model.temperature.exp(), batch[1])


def direct() -> Any:
    return Direct(), tempered, (torch.randn(7, 5), torch.randint(5, (7,)))


def tiny() -> Any:
    """Eight weights, so that all 256 sign vectors can be probed."""
    return nn.Linear(3, 2), cross_entropy, (torch.randn(7, 3), torch.randint(2, (7,)))


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.free = nn.Parameter(torch.randn(5))


def linear_in_the_weights(model: Any, batch: Any) -> Tensor:
    x, y, pull = batch
    return (model.layer(x) * y).mean() + (pull * model.free).mean()


def linear() -> Any:
    """A loss that is a linear function of its 20 weights: every slope is exact at every eps."""
    return Linear(), linear_in_the_weights, (torch.randn(7, 4), torch.randn(7, 3), torch.randn(7, 5))


OBJECTIVES: dict[str, Problem] = {
    "mlp": Problem(mlp, blocks=3),
    "cnn": Problem(cnn, blocks=5, smooth=False, mixes=True),
    "transformer": Problem(transformer, blocks=3, draws=True),
    "attention": Problem(attention, blocks=2),
    "direct": Problem(direct, blocks=0),
    "tiny": Problem(tiny, blocks=0),
    "linear": Problem(linear, blocks=0),
}


# ---- a loss that raises in the middle


class Fails(nn.Module):
    """A scale whose call number `at` (from 1) raises, while its parameter is substituted."""

    # An evaluation restores attributes of modules, so a count of evaluations is kept elsewhere.
    counts: WeakKeyDictionary[Fails, int] = WeakKeyDictionary()

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.calls, self.at = 0, 0
        self.error: type[BaseException] = MemoryError

    @property
    def calls(self) -> int:
        return self.counts[self]

    @calls.setter
    def calls(self, value: int) -> None:
        self.counts[self] = value

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise self.error("half-way")
        return x.clone() * self.scale  # saves the clone, so a recomputation runs this again


def raising() -> tuple[Objective, tuple[Tensor, ...], Fails]:
    """Return an objective with every kind of state, a batch, and the module in it whose `at` sets when it raises."""
    fails = Fails()
    with seeded_generators(KEY):
        model = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Dropout(0.1), fails, nn.Tanh()
        )
        model.append(nn.Linear(8, 3))
        batch = torch.randn(7, 6), torch.randint(3, (7,))
    return Objective(model, cross_entropy, data=lambda: [batch]), batch, fails


def _all_pairs() -> list[tuple[str, str]]:
    return [
        (estimator, objective)
        for estimator, row in ESTIMATORS.items()
        for objective, problem in OBJECTIVES.items()
        if not row.blocks or problem.blocks >= 2
    ]


def pairs() -> list[tuple[str, str]]:
    """Return each estimator with each objective of its row that it can serve."""
    return [(estimator, objective) for estimator, objective in _all_pairs() if objective in ESTIMATORS[estimator].on]


def grid(keep: Callable[[str, str], bool] = lambda estimator, objective: True, without: str = "") -> Any:
    """Parametrize a test by (estimator, objective): by default `pairs`; `pytest -m slow` runs all other pairs.

    Args:
        keep: whether the test is for this estimator and this objective.
        without: an objective that only rows of kind `everywhere` are tried on by default.
    """
    default = {pair for pair in pairs() if pair[1] != without or ESTIMATORS[pair[0]].on == EVERYWHERE}
    slow = {pair: () if pair in default else (pytest.mark.slow,) for pair in _all_pairs()}
    parameters = [pytest.param(*pair, marks=marks) for pair, marks in slow.items() if keep(*pair)]
    return pytest.mark.parametrize(("estimator", "objective"), parameters)
