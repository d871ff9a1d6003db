"""The names that people know, each a composition of the parts with its paper."""

from __future__ import annotations

from gradcost.checkpointing.policies import Blocks, Everything
from gradcost.directions import Gaussian, Rademacher, Sphere
from gradcost.estimators.activity import ActivityPerturbation
from gradcost.estimators.by_length import ByLength
from gradcost.estimators.combine import Normalized, Projection, Sign
from gradcost.estimators.hessian_informed import HessianInformed
from gradcost.estimators.probing import Probing
from gradcost.estimators.reverse import Reverse
from gradcost.estimators.variance_reduced import VarianceReduced
from gradcost.slopes.slope import CentralDifference, ForwardDifference, Jvp


def backprop() -> Reverse:
    """Backpropagation that saves everything: g = grad loss, exactly.

    Law: unbiased; it is the gradient.
    Cost: 3 forwards, 2 where a frozen base carries adapters.
    Memory: every activation of the batch, and one leaf's gradient at a time.
    Use it: wherever it fits; nothing else makes more of a step.
    Not: where the activations do not fit (then checkpointed()), or the loss has no derivative (then mezo()).
    Source: Rumelhart, Hinton, Williams, Nature 323 (1986).
    """
    return Reverse(Everything())


def checkpointed() -> Reverse:
    """Backpropagation that saves the input of each block and computes the block again: g = grad loss, exactly.

    Law: unbiased; it is the gradient, with backprop's bits.
    Cost: 4 forwards, 3 where a frozen base carries adapters.
    Memory: the inputs of the blocks, the activations of one block, and one leaf's gradient at a time.
    Use it: where backprop() does not fit; Within(bytes) saves as much as a budget allows.
    Not: on a model without repeated blocks, or where even one block's activations are too many.
    Source: Chen, Xu, Zhang, Guestrin, arXiv 1604.06174 (2016).
    """
    return Reverse(Blocks())


def forward_gradient(probes: int = 1) -> Probing:
    """Forward gradient: g = mean of (grad loss . v) v, v ~ N(0, I), by forward-mode differentiation.

    Law: unbiased; E|g|^2 = (1 + (d + 1)/n)|grad|^2 for d weights and n probes.
    Cost: 3 forwards a probe, 2 where a frozen base carries adapters.
    Memory: the activations of one layer and their tangents, whatever the depth; 16 bytes a probe.
    Use it: with few trained weights (d/n times backprop's steps are expected), and a loss that has a derivative.
    Not: where checkpointed() fits, or a module has no forward-mode rule (gradcost check names it). Clip its slopes.
    Source: Baydin, Pearlmutter, Syme, Wood, Torr, arXiv 2202.08587 (2022), definition 1.
    """
    return Probing(Jvp(), Gaussian(), probes)


def spsa(eps: float | None = 1e-3, probes: int = 1) -> Probing:
    """SPSA: g = mean of z (loss(theta + eps z) - loss(theta - eps z)) / (2 eps), z of random signs.

    Law: unbiased up to O(eps^2); E|g|^2 = (1 + (d - 1)/n)|grad|^2 for d weights and n probes.
    Cost: 2 forwards a probe.
    Memory: the activations of one layer and one layer's moved weights, whatever the depth; 16 bytes a probe.
    Use it: where a loss can only be evaluated, or where nothing fits but inference; signs are the cheapest noise.
    Not: where checkpointed() fits, or the loss is too coarse for its eps (gradcost check says so).
    Source: Spall, IEEE TAC 37 (1992), equation 2.2.
    """
    return Probing(CentralDifference(eps), Rademacher(), probes)


def mezo(eps: float | None = 1e-3, probes: int = 1) -> Probing:
    """Two-sided difference: g = mean of z (loss(theta + eps z) - loss(theta - eps z)) / (2 eps), z ~ N(0, I).

    Law: unbiased up to O(eps^2); E|g|^2 = (1 + (d + 1)/n)|grad|^2 for d weights and n probes.
    Cost: 2 forwards a probe.
    Memory: the activations of one layer and one layer's moved weights, whatever the depth; 16 bytes a probe.
    Use it: to fine-tune where nothing fits but inference, on losses without a derivative, through opaque modules.
    Not: where checkpointed() fits, to train from scratch, or where eps drowns in half-precision weights.
    Source: Malladi et al., arXiv 2305.17333 (2023), algorithm 1.
    """
    return Probing(CentralDifference(eps), Gaussian(), probes)


def zo_svrg(eps: float = 1e-3, probes: int = 1, every: int = 100) -> VarianceReduced:
    """SVRG of one-sided differences on the sphere: g = ghat(theta) - ghat(snapshot) + mu, mu the mean at the latter.

    Law: unbiased up to O(eps); at the snapshot g is mu, and the scatter grows with the distance from it.
    Cost: 2 (1 + n) forwards for n probes, and 1/every of a pass over the data.
    Memory: the activations of one layer, and two copies of the weights: the snapshot and mu.
    Use it: to study what variance reduction gives; with anchor=Reverse() its snapshots are exact.
    Not: where two copies of the weights are too much (that is what a zero-order method saves), or there is no data.
    Source: Liu et al., arXiv 1805.10367 (2018), algorithm 2, equations 2 and 3.
    """
    return VarianceReduced(Probing(ForwardDifference(eps), Sphere(), probes), every)


def addax(longest: int, weight: float = 0.5, eps: float = 1e-3) -> ByLength:
    """Backprop for short examples, MeZO for long ones: g = weight g_long + (1 - weight) g_short.

    Law: unbiased up to O(eps^2) for the weighted loss; for the mean loss only where weight is the long ones' share.
    Cost: 3 forwards of the short examples and 2 of the long ones.
    Memory: the activations of the short examples alone, at their own length; 16 bytes for the long ones.
    Use it: where a few long examples set backprop's peak.
    Not: on batches without an attention_mask, or of examples that are all of one length.
    Source: Li et al., arXiv 2410.06441 (2024), algorithm 1.
    """
    return ByLength(backprop(), mezo(eps), longest, weight)


def zo_sgd_sign(eps: float = 1e-3, probes: int = 1) -> Probing:
    """The signs of a mean of two-sided differences: g = sign(mean of z s), z ~ N(0, I).

    Law: biased: every weight moves by one length, and E g is not along the gradient.
    Cost: 2 forwards a probe.
    Memory: the activations of one layer and one layer's moved weights; 16 bytes a probe.
    Use it: where the scale of the slopes jumps, for no slope makes a step longer than another.
    Not: with one probe late in a training, when a step should shrink with the gradient: lower the learning rate.
    Source: Liu, Chen, Chen, Hong, "signSGD via zeroth-order oracle", ICLR 2019, algorithm 1.
    """
    return Probing(CentralDifference(eps), Gaussian(), probes, Sign())


def fzoo(eps: float = 1e-3, probes: int = 8) -> Probing:
    """One-sided differences along random signs, over their standard deviation: g = mean of (s / sigma) z.

    Law: biased: E g is along the gradient, without its length.
    Cost: 1 + n forwards for n probes.
    Memory: the activations of one layer and one layer's moved weights; 16 bytes a probe.
    Use it: instead of mezo() with several probes: a probe costs half, and the step adapts to the loss's scale.
    Not: with one probe, whose slopes have no deviation. Its learning rate is FZOO's divided by eps.
    Source: FZOO, arXiv 2506.09034 (2025), equations 3 and 4.
    """
    return Probing(ForwardDifference(eps), Rademacher(), probes, Normalized())


def multi_tangent(probes: int = 4) -> Probing:
    """The gradient's projection on several tangents, times d/n: g = (d/n) Z (Z'Z)^+ s, in forward mode.

    Law: unbiased; E|g|^2 = (d/n)|grad|^2 for n <= d probes, and n = d is the gradient.
    Cost: 3 forwards a probe, and the Gram matrix: n^2 products as long as the weights.
    Memory: the activations of one layer and their tangents, and n directions of the largest leaf at once.
    Use it: where the probes come near the number of trained weights: there it beats their mean.
    Not: with few probes for many weights, where it is forward_gradient() at a higher price.
    Source: Fluegel et al., arXiv 2410.17764 (2024), section 3.
    """
    return Probing(Jvp(), Gaussian(), probes, Projection())


def hizoo(eps: float = 1e-3, probes: int = 1) -> HessianInformed:
    """MeZO along directions that are long where the loss is flat: g = mean of s Sigma^{1/2} u, u ~ N(0, I).

    Law: biased: E g = Sigma grad, up to O(eps^2), where Sigma^-1 follows the size of the Hessian's diagonal.
    Cost: 2 forwards a probe and one more.
    Memory: as mezo, and 4 bytes a weight for Sigma^-1, twice while an estimate is held.
    Use it: where weights have very different curvatures and training is long enough to learn them.
    Not: in short runs: until Sigma is learned its rate must suit the steepest weight, as MeZO's does.
    Source: Zhao et al., arXiv 2402.15173 (2024), algorithm 1.
    """
    return HessianInformed(eps, probes)


def activity_perturbation(probes: int = 1) -> ActivityPerturbation:
    """Forward gradients of layers' outputs, not of their weights: g = mean of s u'x, u ~ N(0, I) on the outputs.

    Law: unbiased; the scatter grows with the number of outputs (batch x positions x units), not of weights.
    Cost: 2 forwards a probe, and 2 once.
    Memory: the activations of one layer, their tangents, and one layer's gradient.
    Use it: where layers have many more weights than outputs in a batch: small batches of wide layers.
    Not: with convolutions or long sequences, whose outputs are more than their weights.
    Source: Ren et al., arXiv 2210.03310 (2023), section 3.
    """
    return ActivityPerturbation(Jvp(), Gaussian(), probes)
