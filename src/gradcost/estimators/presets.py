"""Presets: functions that return a published method as an estimator."""

from __future__ import annotations

from gradcost.checkpointing.policies import Blocks, Everything
from gradcost.core.arguments import require_step
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
    """Backpropagation that saves every activation: g = grad loss, exactly.

    Law: unbiased; it is the gradient.
    Cost: 3 forwards, 2 if only adapters on a frozen model are trained.
    Memory: every activation of the batch, and one parameter's gradient at a time.
    Use when: the activations fit into memory; no other method makes more progress per step.
    Avoid when: the activations do not fit (use checkpointed()), or the loss has no derivative (use mezo()).

    Returns:
        Reverse(Everything()).
    Source: Rumelhart, Hinton, Williams, Nature 323 (1986).
    """
    return Reverse(Everything())


def checkpointed() -> Reverse:
    """Backpropagation that saves the input of each block and recomputes the block: g = grad loss, exactly.

    Law: unbiased; it is the gradient of backprop(), bit for bit.
    Cost: 4 forwards, 3 if only adapters on a frozen model are trained.
    Memory: the inputs of the blocks, the activations of one block, and one parameter's gradient at a time.
    Use when: the activations of backprop() do not fit. Within(bytes) recomputes only as much as a budget requires.
    Avoid when: the model has no repeated blocks, or the activations of a single block do not fit.

    Returns:
        Reverse(Blocks()).
    Source: Chen, Xu, Zhang, Guestrin, arXiv 1604.06174 (2016).
    """
    return Reverse(Blocks())


_TOGETHER = 4  # directions per forward pass of `forward_gradient`


def forward_gradient(probes: int = 1, together: int | None = None) -> Probing:
    """Forward gradient: g = mean of (grad loss . v) v, v ~ N(0, I), by forward-mode AD.

    Law: unbiased; E|g|^2 = (1 + (d + 1)/n)|grad|^2 for d weights and n probes.
    Cost: with k directions that share a forward pass, 2 + 1/k forwards per probe; about 1 + 1/k if only adapters on a
        frozen model are trained.
    Memory: the activations of one layer and k tangents of each, for any depth; 16 bytes per probe.
    Use when: few weights are trained (d/n times the steps of backprop are needed) and the loss has a derivative. Wrap
        the estimator in Clipped.
    Avoid when: checkpointed() fits, or a module has no forward-mode rule (gradcost check names the module).

    Args:
        probes: n, the number of directions per estimate.
        together: k, how many directions share a forward pass. None: at most 4. More were not faster on a CPU. Results
            for two k differ by rounding only, because matrix products of other sizes add in another order.
    Returns:
        Probing(Jvp(together), Gaussian(), probes).
    Source: Baydin, Pearlmutter, Syme, Wood, Torr, arXiv 2202.08587 (2022), definition 1.
    """
    own = max(1, min(probes, _TOGETHER))  # probes < 1 is an error of Probing
    return Probing(Jvp(own if together is None else together), Gaussian(), probes)


def spsa(eps: float | None = 1e-3, probes: int = 1) -> Probing:
    """SPSA: g = mean of z (loss(theta + eps z) - loss(theta - eps z)) / (2 eps), z of random signs.

    Law: unbiased up to O(eps^2); E|g|^2 = (1 + (d - 1)/n)|grad|^2 for d weights and n probes.
    Cost: 2 forwards per probe.
    Memory: the activations and the perturbed weights of one layer, for any depth; 16 bytes per probe.
    Use when: the loss has no derivative, or only inference fits; random signs are the cheapest noise.
    Avoid when: checkpointed() fits, or a step of eps changes the loss by less than its rounding (see gradcost check).

    Args:
        eps: finite-difference step, in units of the parameters. None chooses it.
        probes: n, the number of directions per estimate.
    Returns:
        Probing(CentralDifference(eps), Rademacher(), probes).
    Source: Spall, IEEE TAC 37 (1992), equation 2.2.
    """
    return Probing(CentralDifference(require_step(eps)), Rademacher(), probes)


def mezo(eps: float | None = 1e-3, probes: int = 1) -> Probing:
    """MeZO: g = mean of z (loss(theta + eps z) - loss(theta - eps z)) / (2 eps), z ~ N(0, I).

    Law: unbiased up to O(eps^2); E|g|^2 = (1 + (d + 1)/n)|grad|^2 for d weights and n probes.
    Cost: 2 forwards per probe.
    Memory: the activations and the perturbed weights of one layer, for any depth; 16 bytes per probe.
    Use when: fine-tuning where only inference fits, or the loss has no derivative, or a module is a black box.
    Avoid when: checkpointed() fits, training starts from scratch, or eps is below the rounding of half-precision
        weights.

    Args:
        eps: finite-difference step, in units of the parameters. None chooses it.
        probes: n, the number of directions per estimate.
    Returns:
        Probing(CentralDifference(eps), Gaussian(), probes).
    Source: Malladi et al., arXiv 2305.17333 (2023), algorithm 1.
    """
    return Probing(CentralDifference(require_step(eps)), Gaussian(), probes)


def zo_svrg(eps: float = 1e-3, probes: int = 1, every: int = 100) -> VarianceReduced:
    """ZO-SVRG: g = ghat(theta) - ghat(snapshot) + mu, where mu is the mean of ghat(snapshot) over the data.

    ghat is a one-sided finite difference along directions on the sphere.

    Law: unbiased up to O(eps); if theta is the snapshot, g is mu, and the variance grows with the distance from it.
    Cost: 2 (1 + n) forwards for n probes, and 1/every of a pass over the data.
    Memory: the activations of one layer, and two copies of the weights: the snapshot and mu.
    Use when: variance reduction is the subject; VarianceReduced with anchor=Reverse() makes mu exact.
    Avoid when: two copies of the weights do not fit (other zero-order methods need none), or Objective has no data.

    Args:
        eps: finite-difference step, in units of the parameters.
        probes: n, the number of directions per estimate.
        every: number of estimates from one snapshot to the next.
    Returns:
        VarianceReduced(Probing(ForwardDifference(eps), Sphere(), probes), every).
    Source: Liu et al., arXiv 1805.10367 (2018), algorithm 2, equations 2 and 3.
    """
    return VarianceReduced(Probing(ForwardDifference(require_step(eps)), Sphere(), probes), every)


def addax(longest: int, weight: float = 0.5, eps: float = 1e-3) -> ByLength:
    """Addax: backprop for short examples, MeZO for long ones: g = weight g_long + (1 - weight) g_short.

    Law: unbiased up to O(eps^2) for the loss weight L_long + (1 - weight) L_short, with the mean losses L_long and
        L_short of long and short examples. It is the mean loss if weight is the fraction of long examples.
    Cost: 3 forwards of the short examples and 2 of the long ones.
    Memory: the activations of the short examples only, without padding to the long ones; 16 bytes for MeZO.
    Use when: a few long examples set the peak memory of backprop.
    Avoid when: batches have no attention_mask, or all examples have one length.

    Args:
        longest: the most tokens of a short example.
        weight: the weight of the long examples' gradient, in [0, 1].
        eps: finite-difference step, in units of the parameters.
    Returns:
        ByLength(backprop(), mezo(eps), longest, weight).
    Source: Li et al., arXiv 2410.06441 (2024), algorithm 1.
    """
    return ByLength(backprop(), mezo(eps), longest, weight)


def zo_sgd_sign(eps: float = 1e-3, probes: int = 1) -> Probing:
    """ZO-signSGD: g = sign(mean of s z), where s is a two-sided finite difference along z ~ N(0, I).

    Law: biased: every weight moves by the same length, and E g is not parallel to the gradient.
    Cost: 2 forwards per probe.
    Memory: the activations and the perturbed weights of one layer; 16 bytes per probe.
    Use when: the slopes vary strongly between steps: all steps have the same length.
    Avoid when: steps should become shorter with the gradient, as late in training (else decay the learning rate).

    Args:
        eps: finite-difference step, in units of the parameters.
        probes: n, the number of directions per estimate.
    Returns:
        Probing(CentralDifference(eps), Gaussian(), probes, Sign()).
    Source: Liu, Chen, Chen, Hong, "signSGD via zeroth-order oracle", ICLR 2019, algorithm 1.
    """
    return Probing(CentralDifference(require_step(eps)), Gaussian(), probes, Sign())


def fzoo(eps: float = 1e-3, probes: int = 8) -> Probing:
    """FZOO: g = mean of (s / sigma) z, where s is a one-sided finite difference along random signs z.

    sigma is the standard deviation of the slopes s.

    Law: biased: E g is nearly parallel to the gradient (`Normalized`), but does not have its length.
    Cost: 1 + n forwards for n probes.
    Memory: the activations and the perturbed weights of one layer; 16 bytes per probe.
    Use when: mezo() with several probes is too slow: a probe costs half, and the step adapts to the loss's scale. The
        learning rate is that of the authors' code times sqrt(n / (n - 1)), or that of the paper's equations divided
        by eps.
    Avoid when: only one probe is used: one slope has no standard deviation.

    Args:
        eps: finite-difference step, in units of the parameters.
        probes: n, the number of directions per estimate.
    Returns:
        Probing(ForwardDifference(eps), Rademacher(), probes, Normalized()).
    Source: FZOO, arXiv 2506.09034 (2025), equations 3 and 4.
    """
    return Probing(ForwardDifference(require_step(eps)), Rademacher(), probes, Normalized())


def multi_tangent(probes: int = 4) -> Probing:
    """Multi-tangent forward gradient: g = (d/n) Z (Z'Z)^+ s, d/n times the gradient's projection on n directions.

    The columns of Z are the directions, and s contains the slopes along them.

    Law: unbiased; E|g|^2 = (d/n)|grad|^2 for n <= d probes, and n = d is the gradient.
    Cost: 3 forwards per probe, and n^2 inner products of directions for Z'Z.
    Memory: the activations of one layer and their tangents, and n directions of the largest parameter at once.
    Use when: the number of probes is near the number of trained weights: the variance is lower than that of the mean.
    Avoid when: there are far fewer probes than weights: it equals forward_gradient() at a higher cost.

    Args:
        probes: n, the number of directions per estimate.
    Returns:
        Probing(Jvp(), Gaussian(), probes, Projection()).
    Source: Fluegel et al., arXiv 2410.17764 (2024), section 3.
    """
    return Probing(Jvp(), Gaussian(), probes, Projection())


def hizoo(eps: float = 1e-3, probes: int = 1) -> HessianInformed:
    """HiZOO: MeZO preconditioned by the curvature: g = mean of s Sigma^{1/2} u, where s is the slope, u ~ N(0, I).

    Law: biased: E g = Sigma grad, up to O(eps^2), where Sigma^-1 follows the size of the Hessian's diagonal.
    Cost: 2 forwards per probe, and one forward per estimate.
    Memory: that of mezo(), and 4 bytes per weight for Sigma^-1, twice while the previous Sigma^-1 is in use.
    Use when: weights have very different curvatures and training is long enough to learn Sigma.
    Avoid when: training is short: until Sigma is learned, the learning rate must suit the largest curvature.

    Args:
        eps: finite-difference step, in units of the parameters.
        probes: n, the number of directions per estimate.
    Returns:
        HessianInformed(eps, probes).
    Source: Zhao et al., arXiv 2402.15173 (2024), algorithm 1.
    """
    return HessianInformed(require_step(eps), probes)


def activity_perturbation(probes: int = 1) -> ActivityPerturbation:
    """Activity perturbation: g = mean of s u'x, where u ~ N(0, I) is noise on a layer's outputs and x its inputs.

    s is the slope of the loss along the noise of all layers.

    Law: unbiased; the variance grows with the number of outputs (batch x positions x units), not of weights.
    Cost: 2 forwards per probe, and 2 forwards per estimate.
    Memory: the activations of one layer, their tangents, and one layer's gradient.
    Use when: layers have many more weights than outputs in a batch: wide layers and small batches.
    Avoid when: the model has convolutions or long sequences, which have more outputs than weights.

    Args:
        probes: n, the number of noise samples per estimate.
    Returns:
        ActivityPerturbation(Jvp(), Gaussian(), probes).
    Source: Ren et al., arXiv 2210.03310 (2023), section 3.
    """
    return ActivityPerturbation(Jvp(), Gaussian(), probes)
