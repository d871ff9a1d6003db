"""Gradient estimates from perturbing the outputs of layers instead of their weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradcost.core.batching.loss_weights import with_settled_weights
from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.evaluation.autograd_use import ORDINARY, known_use
from gradcost.core.evaluation.gradient_mode import with_known_use
from gradcost.core.evaluation.weight_writes import moving_weights
from gradcost.core.fake import numbers
from gradcost.core.finite import require_finite
from gradcost.core.key import Key
from gradcost.core.memory_events import tag
from gradcost.core.objective import Leaf, Objective
from gradcost.core.precision import LOSSES_IN_FLOAT32
from gradcost.core.value import value
from gradcost.directions import Directions, Gaussian, Rademacher
from gradcost.directions.confined import confined
from gradcost.estimators.estimator import Estimate, Estimator, Facts, LeafConsumer, State
from gradcost.estimators.gradient import Concatenated, Dense, Gradient, Seeded, Streamed
from gradcost.estimators.outputs import Layers, Output, layers_of, visited
from gradcost.estimators.probing import replayed
from gradcost.slopes.duals import with_tangent
from gradcost.slopes.forward_mode import differentiate
from gradcost.slopes.read_check import check_reads
from gradcost.slopes.slope import CentralDifference, Jvp, Slope, shifted
from gradcost.slopes.substitution import substituted


@value
class ActivityPerturbation(Estimator):
    """g_W = (1/n) sum_k s_k (dy/dW)' u_k, where u_k is noise on the output y of the layer with weight W.

    The layers are linear layers and convolutions. s_k is the slope of the loss along the noise on all outputs.

    Law: E g = grad. With delta = dL/dy for all outputs y, the slope is s = <delta, u>. If E[u u'] = I, then
    E[s u] = delta, and (dy/dW)' delta is the gradient of W. The variance grows with the number m of perturbed outputs
    (batch x positions x units), not with the number of weights: E|(1/n) sum_k s_k u_k|^2 over all outputs is
    (1 + (m + 1)/n) |delta|^2 for Gaussian noise and (1 + (m - 1)/n) |delta|^2 for random signs.

    All other parameters are perturbed as weights in the same forward passes. Other parameters are those of other
    modules (LayerNorm, embeddings) and of subclasses (the projection of nn.MultiheadAttention), and parameters that
    two modules share or that are read without a call of their module. A layer that is called twice gets independent
    noise for each call; its gradient is the sum over both calls. Every forward pass draws the same dropout masks. If
    the first dimension of the outputs is the batch, micro-batches do not change the estimate.

    Cost: for L linear layers 2L - 1 forward matmuls per probe with Jvp (weights have no tangents) and 2L with a
    finite difference. In addition, once per estimate, a forward pass without noise (L matmuls), whose loss is
    `Estimate.loss`, and the products (dy/dW)' u (L matmuls). One layer's gradient exists at a time.

    Args:
        slope: Jvp() or CentralDifference(eps) with an eps other than None.
        directions: Gaussian() or Rademacher(), the noise on the outputs.
        probes: n, the number of noise samples per estimate.
    Raises:
        BadInput: probes < 1, another slope, or other directions.
        Unsupported: a layer's weight is read without calling the layer.
    Source: Ren, Kornblith, Liao, Hinton, "Scaling forward gradient with local losses", arXiv 2210.03310 (2023),
        section 3.
    """

    slope: Slope = Jvp()
    directions: Directions = Gaussian()
    probes: int = 1

    def __post_init__(self) -> None:
        if self.probes < 1:
            raise BadInput(f"probes is the number of directions per estimate, 1 or more, not {self.probes!r}.")
        match self.slope:
            case Jvp(together=1) | CentralDifference(eps=float()):
                pass
            case _:
                raise BadInput(
                    f"ActivityPerturbation perturbs one probe at a time by a fixed length, so {self.slope} cannot "
                    "measure its slopes: use Jvp() or CentralDifference(eps=0.001)."
                )
        if not isinstance(self.directions, Gaussian | Rademacher):
            raise BadInput(
                f"ActivityPerturbation needs independent noise for each output, unlike {self.directions}: "
                "use Gaussian() or Rademacher()."
            )

    @property
    def facts(self) -> Facts:
        return Facts(unbiased=True)

    def init(self, objective: Objective) -> None:
        return None

    def estimate(self, objective: Objective, batch: Any, key: Key, state: State | None = None) -> Estimate:
        tensors: dict[str, Tensor] = {}
        loss, slopes, outside = self._estimate(objective, batch, key, tensors.__setitem__)
        pieces: list[Gradient] = [Dense(objective.only(tensors), tensors)] if tensors else []
        pieces += [outside] if outside is not None else []
        return Estimate(loss, Concatenated(objective, tuple(pieces)), slopes)

    def stream(
        self, objective: Objective, batch: Any, key: Key, use: LeafConsumer, state: State | None = None
    ) -> Estimate:
        sizes: list[int] = []

        def use_and_count(name: str, gradient: Tensor) -> None:
            sizes.append(gradient.nbytes)
            use(name, gradient)

        loss, slopes, outside = self._estimate(objective, batch, key, use_and_count)
        if outside is not None:
            replayed(Estimate(loss, outside), use)
        message = sum(sizes) + (0 if outside is None else outside.message_nbytes)
        return Estimate(loss, Streamed(objective, message), slopes)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        try:
            self._try(objective, batch, Key(0))
        except Unsupported as reason:
            return str(reason)
        return self.slope.objection(objective, batch)

    @with_known_use
    def _try(self, objective: Objective, batch: Any, key: Key) -> None:
        _refuse_inner_derivatives(objective)
        unused = _LayerGradients(layers_of(objective), Counter(), _no_noise, _ignore)
        self._gradient_pass(objective, batch, key, unused)

    @with_known_use
    @with_settled_weights
    def _estimate(
        self, objective: Objective, batch: Any, key: Key, use: LeafConsumer
    ) -> tuple[Tensor, Tensor, Seeded | None]:
        """Return loss, slopes and the gradient of parameters outside layers. Pass the layers' gradients to `use`."""
        _refuse_inner_derivatives(objective)
        check_reads(objective, batch, key)
        layers = layers_of(objective)
        inside = {leaf.name for leaves in layers.values() for leaf in leaves}
        outside = [leaf for leaf in objective.leaves if leaf.name not in inside]
        outside_directions = confined(self.directions, outside)
        seeds = self.directions.seeds(key, self.probes, objective.dimension)
        measured = [self._slope(objective, batch, key, layers, outside_directions, seed) for seed in seeds]
        slopes, (_, calls) = torch.cat([slope for slope, _ in measured]), measured[-1]
        require_finite(slopes[0], slopes)
        weights = [slope / self.probes for slope in numbers(slopes)]

        def noise(output: Output) -> Tensor:
            return output.noise(self.directions, seeds, weights)

        loss = self._gradient_pass(objective, batch, key, _LayerGradients(layers, calls, noise, use))
        if not outside:
            return loss, slopes, None
        rest = objective.only([leaf.name for leaf in outside])
        return loss, slopes, Seeded(rest, outside_directions, seeds, tuple(weights))

    def _slope(
        self, objective: Objective, batch: Any, key: Key, layers: Layers, outside_directions: Directions, seed: int
    ) -> tuple[Tensor, Counter[nn.Module]]:
        """Return the slope along the noise of one seed, shape (1,), and the number of calls of each layer."""

        def perturbed(output: Output) -> Tensor:
            primal, tangent = forward_ad.unpack_dual(output.value)
            noise = tag("tangents", output.noise(self.directions, [seed], [1.0]))
            return with_tangent(output.name, primal, noise if tangent is None else noise.add_(tangent))

        if isinstance(self.slope, CentralDifference):
            eps, ends, calls = self.slope.eps, [], Counter[nn.Module]()
            assert eps is not None
            for step in (eps, -eps):
                with visited(
                    objective, layers, lambda out, step=step: out.moved(self.directions, seed, step)
                ) as visits:
                    ends.append(shifted(visits.objective, batch, key, outside_directions, seed, step).double())
                calls = visits.calls
            return ((ends[0] - ends[1]) / (2 * eps)).reshape(1), calls
        with visited(objective, layers, perturbed) as visits:
            slopes = differentiate(visits.objective, batch, key, outside_directions, [seed])[1]
            return slopes.double(), visits.calls

    def _gradient_pass(self, objective: Objective, batch: Any, key: Key, layer_gradients: _LayerGradients) -> Tensor:
        """Return the float64 loss without noise. `layer_gradients` computes the gradients in this forward pass."""
        # Jvp slopes use the math kernel of attention; a fused kernel may draw other dropout masks.
        kernel = sdpa_kernel(SDPBackend.MATH) if isinstance(self.slope, Jvp) else nullcontext()
        with (
            kernel,
            moving_weights(),  # `stream` passes a layer's gradient on before the next layer runs
            substituted(objective, layer_gradients.make, LOSSES_IN_FLOAT32),
            visited(objective, layer_gradients.layers, layer_gradients.leave, layer_gradients.enter) as visits,
        ):
            loss = visits.objective.evaluate(batch, key).double()
        layer_gradients.finish()
        return loss


def _refuse_inner_derivatives(objective: Objective) -> None:
    use = known_use(objective) or ORDINARY
    reasons = {
        "differentiates the model (torch.autograd.grad)": use.differentiates,
        "applies a torch.func transform": use.transforms,
        "reads weights or activations under torch.no_grad()": use.has_constants,
        "has another value where gradients are off": use.depends_on_mode,
    }
    if any(reasons.values()):
        raise Unsupported(
            "activity_perturbation computes each layer's gradient right after the layer runs, and the loss "
            f"{next(reason for reason, holds in reasons.items() if holds)}. Use forward_gradient() or mezo(), which "
            "perturb weights, or backprop()."
        )


class _LayerGradients:
    """Compute each layer's gradient right after the layer runs, so that autograd's graph covers one layer at a time.

    calls: number of calls of each layer in the forward pass. noise: returns (1/n) sum_k s_k u_k for an output. use:
    receives a parameter's gradient after the last call of its layer.
    """

    def __init__(
        self, layers: Layers, calls: Counter[nn.Module], noise: Callable[[Output], Tensor], use: LeafConsumer
    ) -> None:
        self.layers, self.remaining, self.noise, self.use = layers, Counter(calls), noise, use
        self.owner = {leaf.name: layer for layer, leaves in layers.items() for leaf in leaves}
        self.running: nn.Module | None = None
        self.read: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}

    def make(self, leaf: Leaf) -> Tensor:
        weight = leaf.parameter.detach()
        if leaf.name not in self.owner:
            return weight
        if self.owner[leaf.name] is not self.running:
            raise Unsupported(
                f"`{leaf.name}` is read without calling its layer, so perturbing the layer's output misses this "
                "use. Call the layer, or use forward_gradient() or mezo(), which perturb weights."
            )
        self.read[leaf.name] = weight.requires_grad_()
        return weight

    def enter(self, layer: nn.Module) -> None:
        self.running = layer
        torch.set_grad_enabled(True)  # until `leave`; after an exception, `Objective.evaluate` restores the mode

    def leave(self, output: Output) -> Tensor:
        torch.set_grad_enabled(False)
        leaves, self.running = self.layers[output.layer], None
        read = [self.read.pop(leaf.name) for leaf in leaves]
        gradients = list(torch.autograd.grad(output.value, read, self.noise(output)))
        self.remaining[output.layer] -= 1
        for leaf in reversed(leaves):
            gradient = gradients.pop()
            if leaf.name in self.sums:
                gradient = self.sums.pop(leaf.name).add_(gradient)
            if self.remaining[output.layer] == 0:
                self.use(leaf.name, tag("gradients", gradient))
            else:
                self.sums[leaf.name] = gradient
            del gradient  # before `use` gets the next one
        return output.value.detach()

    def finish(self) -> None:
        """Pass zeros to `use` for layers that were never called."""
        for layer, leaves in self.layers.items():
            for leaf in leaves if layer not in self.remaining else ():
                self.use(leaf.name, tag("gradients", torch.zeros_like(leaf.parameter, requires_grad=False)))


def _no_noise(output: Output) -> Tensor:
    return torch.zeros_like(output.value)


def _ignore(name: str, gradient: Tensor) -> None:
    pass
