"""The table of estimators and the table of objectives, with the facts about each: a law is a cross product.

A new method is one row here, and every law then speaks of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradcost
from gradcost.checkpointing.policies import Blocks, Everything, Segments, Selective
from gradcost.core.isolation import randomness
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
WHOLE = ("lowrank",)  # those whose entries are no function of their index alone: they take each leaf whole
SLOPES: dict[str, Slope] = {
    "jvp": Jvp(),
    "jvp3": Jvp(together=3),
    "central": CentralDifference(1e-3),
    "forward": ForwardDifference(1e-3),
}


@dataclass(frozen=True)
class Row:
    """An estimator and the facts about it.

    evaluations: how many forwards of the loss one estimate starts. matmuls: L -> the matmuls of an estimate,
    in forwards of one layer, on L linear layers without bias. moment: (d, n) -> E|g|^2 / |grad|^2 on d weights
    with n probes, None where no formula is claimed. exact: whether its slopes have no bias in eps. blocks:
    whether it needs a model with repeated blocks. unbiased: whether its mean is the gradient, up to that bias. on:
    the objectives that the costlier products of the laws try it on; None for all.
    """

    estimator: Estimator
    evaluations: int
    matmuls: Callable[[int], float]
    moment: Callable[[int, int], float] | None
    exact: bool = True
    blocks: bool = False
    unbiased: bool = True
    on: tuple[str, ...] | None = None


def moment(directions: Directions) -> Callable[[int, int], float] | None:
    """The second moment of a mean of n probes, in units of |grad|^2: the laws of `Probing` and `directions`. None
    where it depends on more than the number of weights."""
    if isinstance(directions, LowRank):
        return None
    if isinstance(directions, Gaussian):
        return lambda d, n: 1 + (d + 1) / n
    if isinstance(directions, Coordinates | Orthogonal):
        return lambda d, n: d / n  # n distinct coordinates of the gradient in some basis, each times d/n
    return lambda d, n: 1 + (d - 1) / n  # |z|^2 = d exactly: Rademacher, Sphere


def probing(slope: Slope, directions: Directions, probes: int) -> Row:
    """A row for `Probing`: what its slope costs and its directions scatter."""
    estimator = Probing(slope, directions, probes)
    if isinstance(slope, Jvp):
        forwards = math.ceil(probes / slope.together)
        # The primal once a forward; a tangent of the input (not of the first one) and one of the weight a layer.
        return Row(
            estimator, forwards, lambda layers: forwards * layers + probes * (2 * layers - 1), moment(directions)
        )
    forwards = 2 * probes if isinstance(slope, CentralDifference) else 1 + probes
    return Row(estimator, forwards, lambda layers: forwards * layers, moment(directions), exact=False)


# A dense network, one with dropout and tied weights, and one that no module's forward looks up its weights in.
WIDE = ("mlp", "transformer", "direct")
PROBES = {"jvp": 2, "jvp3": 4, "central": 2, "forward": 3}  # jvp3: a forward that three share and one left over

ESTIMATORS: dict[str, Row] = {
    f"{way}-{slope}": probing(SLOPES[slope], DIRECTIONS[way], PROBES[slope])
    for way in ("gaussian", "rademacher", "sphere", "coordinates")
    for slope in SLOPES
} | {
    "everything": Row(Reverse(Everything()), 1, lambda n: 3 * n - 1, lambda d, n: 1.0),
    "blocks": Row(Reverse(Blocks()), 1, lambda n: 3 * n - 1, lambda d, n: 1.0, blocks=True),
    "selective": Row(Reverse(Selective()), 1, lambda n: 3 * n - 1, lambda d, n: 1.0, blocks=True),
    # Each of two segments computes all but its last layer again: that one's input is all that is wanted of it.
    "segments2": Row(Reverse(Segments(2)), 1, lambda n: 3 * n - 1 + n - 2, lambda d, n: 1.0, blocks=True),
    "accumulated-everything": Row(Accumulated(Reverse(), 3), 3, lambda n: 3 * n - 1, lambda d, n: 1.0),
    "accumulated-blocks": Row(
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
    # The Gram matrix of k directions is k * k products as long as a leaf: k * k / 6 forwards on a batch of 6.
    "projection-jvp3": Row(
        Probing(Jvp(together=3), Gaussian(), 6, Projection()),
        2,
        lambda n: 2 * n + 6 * (2 * n - 1) + 6 * n,
        lambda d, n: d / n,
        on=WIDE,
    ),
    "projection-central": Row(
        Probing(CentralDifference(1e-3), Sphere(), 3, Projection()),
        6,
        lambda n: 6 * n + 1.5 * n,
        lambda d, n: d / n,
        exact=False,
        on=WIDE,
    ),
    "sign-central": Row(
        Probing(CentralDifference(1e-3), Gaussian(), 2, Sign()),
        4,
        lambda n: 4 * n,
        None,
        exact=False,
        unbiased=False,
        on=WIDE,
    ),
    "normalized-forward": Row(
        Probing(ForwardDifference(1e-3), Rademacher(), 3, Normalized()),
        4,
        lambda n: 4 * n,
        None,
        exact=False,
        unbiased=False,
        on=WIDE,
    ),
    "masked-smallest-jvp3": Row(
        Probing(Jvp(together=3), Masked(Smallest(0.4)), 4),
        2,
        lambda n: 2 * n + 4 * (2 * n - 1),
        None,
        unbiased=False,
        on=WIDE,
    ),
    "masked-random-jvp3": Row(
        Probing(Jvp(together=3), Masked(Random(0.5)), 4),
        2,
        lambda n: 2 * n + 4 * (2 * n - 1),
        lambda d, n: 1 + (d - 2 + 3 / 0.5) / n,
        on=WIDE,
    ),
    "masked-largest-central": Row(
        Probing(CentralDifference(1e-3), Masked(Largest(0.3), Rademacher()), 2),
        4,
        lambda n: 4 * n,
        None,
        exact=False,
        unbiased=False,
        on=WIDE,
    ),
    # Each of n layers is looked into 6 / n times: its own product, those of the later layers' inputs, the primal.
    "layerwise-jvp": Row(
        Probing(Jvp(), Layerwise(by=EachModule()), 6),
        6,
        lambda n: 6 / n * (n * n + n + n * (n - 1) / 2),
        None,
        on=WIDE,
    ),
    "layerwise-central": Row(
        Probing(CentralDifference(1e-3), Layerwise(Rademacher(), EachBlock()), 2),
        4,
        lambda n: 4 * n,
        None,
        exact=False,
        on=WIDE,
    ),
    "orthogonal-jvp3": replace(probing(Jvp(together=3), Orthogonal(), 4), on=WIDE),
    "orthogonal-central": replace(probing(CentralDifference(1e-3), Orthogonal(), 2), on=WIDE),
    # A tangent of the input a layer and not of the weight, but products with two factors: 12 x rank of a 12 x 12.
    "lowrank-jvp3": Row(
        Probing(Jvp(together=3), LowRank(), 4), 2, lambda n: 2 * n + 4 * (n - 1) + 4 * n / 6, None, on=WIDE
    ),
    "lowrank-central": replace(probing(CentralDifference(1e-3), LowRank(), 2), on=WIDE),
    "lazy-lowrank-jvp3": Row(
        Probing(Jvp(together=3), LazyLowRank(rank=3, every=2), 4),
        2,
        lambda n: 2 * n + 4 * (n - 1) + 4 * n / 2,
        None,
        on=WIDE,
    ),
    "lazy-lowrank-central": Row(
        Probing(CentralDifference(1e-3), LazyLowRank(), 2), 4, lambda n: 4 * n, None, exact=False, on=WIDE
    ),
    "guided-jvp3": Row(
        Probing(Jvp(together=3), Guided(), 4),
        2,
        lambda n: 2 * n + 4 * (2 * n - 1),
        None,
        unbiased=False,
        on=WIDE,
    ),
    "guided-central": Row(
        Probing(CentralDifference(1e-3), Guided(Rademacher(), 0.25), 2),
        4,
        lambda n: 4 * n,
        None,
        exact=False,
        unbiased=False,
        on=WIDE,
    ),
    # Two candidates in each of 9 leaves; of n layers alone each is a leaf, in which a tangent starts.
    "adaptive-central": Row(
        Adaptive(gradcost.mezo(1e-3), 2), 36, lambda n: 4 * n * n, None, exact=False, unbiased=False, on=WIDE
    ),
    "adaptive-jvp": Row(
        Adaptive(gradcost.forward_gradient(), 2),
        18,
        lambda n: 2 * (n * n + n + n * (n - 1) / 2),
        None,
        unbiased=False,
        on=WIDE,
    ),
    "hessian-informed": Row(
        HessianInformed(1e-3, 2, 0.1), 5, lambda n: 5 * n, None, exact=False, unbiased=False, on=WIDE
    ),
    # A forward more, and with it each layer's own product of noise and input.
    "activity-jvp": Row(ActivityPerturbation(probes=2), 3, lambda n: 2 * (2 * n - 1) + 2 * n, None),
    "activity-central": Row(
        ActivityPerturbation(CentralDifference(1e-3), Rademacher(), 2),
        5,
        lambda n: 4 * n + 2 * n,
        None,
        exact=False,
        on=WIDE,
    ),
    # The first estimate, which makes the snapshot: a pass over the data, one batch here, and the two estimates.
    "svrg-central": Row(
        VarianceReduced(Probing(CentralDifference(1e-3), Gaussian(), 2)),
        12,
        lambda n: 12 * n,
        moment(Gaussian()),
        exact=False,
        on=WIDE,
    ),
    "svrg-jvp3-anchored": Row(
        VarianceReduced(Probing(Jvp(together=3), Rademacher(), 3), 2, Reverse()),
        3,
        lambda n: 3 * n - 1 + 2 * (n + 3 * (2 * n - 1)),
        lambda d, n: 1.0,  # at the snapshot
        on=WIDE,
    ),
    "svrg-everything": Row(VarianceReduced(Reverse(), 5), 3, lambda n: 3 * (3 * n - 1), lambda d, n: 1.0, on=WIDE),
    "momentum-central": Row(
        Momentum(Probing(CentralDifference(1e-3), Gaussian(), 2)),
        4,
        lambda n: 4 * n,
        moment(Gaussian()),
        exact=False,
        on=WIDE,
    ),
    # By one name or another the first leaves: on n layers alone, backprop of the first one's weight costs 2 n.
    "mixed-everything-central": Row(
        Mixed("[0bfth]*", Reverse(), Probing(CentralDifference(1e-3), Rademacher())),
        3,
        lambda n: 2 * n + 2 * n,
        None,
        exact=False,
        on=WIDE,
    ),
    "backprop": Row(gradcost.backprop(), 1, lambda n: 3 * n - 1, lambda d, n: 1.0),
    "checkpointed": Row(gradcost.checkpointed(), 1, lambda n: 3 * n - 1, lambda d, n: 1.0, blocks=True),
    "forward_gradient": Row(gradcost.forward_gradient(2), 2, lambda n: 2 * (3 * n - 1), moment(Gaussian())),
    "spsa": Row(gradcost.spsa(1e-3), 2, lambda n: 2 * n, moment(Rademacher()), exact=False),
    "mezo": Row(gradcost.mezo(1e-3, 2), 4, lambda n: 4 * n, moment(Gaussian()), exact=False),
}

# ---- objectives

KEY = Key(20).fold("tables")


@dataclass(frozen=True)
class Problem:
    """A factory of objectives with a batch of 7, the same numbers at every call, and the facts about it.

    blocks: how many repeated blocks it has. smooth: whether the loss has three derivatives everywhere. draws:
    whether the loss draws random numbers. mixes: whether an example's output depends on the others.
    """

    build: Callable[[], tuple[nn.Module, Callable[[nn.Module, Any], Tensor], tuple[Tensor, ...]]]
    blocks: int
    smooth: bool = True
    draws: bool = False
    mixes: bool = False

    def make(self, dtype: torch.dtype = torch.float32) -> tuple[Objective, tuple[Tensor, ...]]:
        with randomness(KEY):
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
    """A transformer's block: attention that PyTorch fuses, with dropout, then two linear layers."""

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
    model = Attention().eval()  # where, without gradients, PyTorch would leave for its C++ fast path
    return model, cross_entropy, (torch.randn(7, 4, 8), torch.randint(3, (7,)))


class Direct(nn.Module):
    """Parameters that no module's forward looks up as its own: a list of them, and one that the loss reads."""

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
    """Eight weights, so that all 256 sign vectors can be looked along."""
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


# ---- a loss that raises half-way


class Fails(nn.Module):
    """A scale, but its call number `at` (from 1) raises: while it runs, and its own parameter is another's."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.calls, self.at = 0, 0
        self.error: type[BaseException] = MemoryError

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise self.error("half-way")
        return x * self.scale


def raising() -> tuple[Objective, tuple[Tensor, ...], Fails]:
    """An objective of every kind of state, a batch, and the module within it that can be told when to raise."""
    fails = Fails()
    with randomness(KEY):
        model = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Dropout(0.1), fails, nn.Tanh()
        )
        model.append(nn.Linear(8, 3))
        batch = torch.randn(7, 6), torch.randint(3, (7,))
    return Objective(model, cross_entropy, data=lambda: [batch]), batch, fails


def pairs() -> list[tuple[str, str]]:
    """Every estimator with every objective that it can serve."""
    return [
        (estimator, objective)
        for estimator, row in ESTIMATORS.items()
        for objective, problem in OBJECTIVES.items()
        if (not row.blocks or problem.blocks >= 2) and (row.on is None or objective in row.on)
    ]
