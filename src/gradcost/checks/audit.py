"""Run the laws on somebody else's gradient function: a callable that fills `.grad`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradcost.checks.model_state import capture, diff
from gradcost.checks.report import CheckLine, CheckReport, Verdict, format_number
from gradcost.core.errors import BadInput, brief
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key

DRAWS = 1000
SIGMAS = 5.0  # accepted standard errors of a mean
Function = Callable[[nn.Module, Callable[[], Tensor]], Any]


class _Audited(NamedTuple):
    """The function under audit. The repr is its name, for the report."""

    name: str

    def __repr__(self) -> str:
        return self.name


class _Model(nn.Module):
    """The model of the audit: a vector and a matrix to train, and a frozen vector."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        numbers = torch.linspace(-1.0, 1.0, 12, dtype=dtype)
        self.vector = nn.Parameter(numbers[:4].clone())
        self.matrix = nn.Parameter(numbers[4:10].reshape(2, 3).clone())
        self.frozen = nn.Parameter(numbers[10:].clone(), requires_grad=False)
        self.register_buffer("buffer", numbers.clone())
        self.random = nn.Dropout(0.5)


@dataclass(frozen=True)
class _Linear:
    """loss = <slope, weights> + noise * (a random number per evaluation). A finite difference has no error here."""

    noise: float = 0.0

    def __call__(self, model: Any) -> Tensor:
        numbers = torch.arange(1.0, 11.0, dtype=model.vector.dtype)
        total = (numbers[:4] * model.vector).sum() - (numbers[4:].reshape(2, 3) * model.matrix).sum()
        return total + self.noise * model.random(torch.ones_like(numbers)).sum() + model.frozen.sum()


@dataclass(frozen=True)
class _Curved:
    """A smooth loss that is not quadratic."""

    def __call__(self, model: Any) -> Tensor:
        hidden = torch.tanh(model.vector[:2] @ model.matrix + 0.5)
        return hidden.square().sum() + torch.sin(model.vector).sum() + model.matrix.exp().mean()


class _Sample(NamedTuple):
    """Estimates at one point, one row each, and the gradient there; float64."""

    rows: Tensor
    gradient: Tensor


def audit(
    function: Function,
    key: Key = Key(0),  # noqa: B008 (a key is an immutable value)
    draws: int = DRAWS,
    name: str | None = None,
) -> CheckReport:
    """Run the laws on a function that fills `.grad` with a gradient or an estimate of one.

    The function is called as `function(model, loss)`. `loss()` returns the loss of the model at its present weights,
    a scalar with an autograd graph. The function must set `.grad` of each trainable parameter. The model has 10
    trainable weights in two parameters, in float64, and a known gradient.

    - Unbiased: the mean estimate is parallel to the gradient, coordinate by coordinate.
    - Scale: <mean g, grad> = |grad|^2.
    - Agreement: on a linear loss, no estimate points away from the gradient, because a slope has the sign of
      <direction, gradient>.
    - Second moment: E|g|^2 / |grad|^2, with the number of Gaussian or Rademacher directions that has this value.
    - The same function: random layers draw the same numbers in all evaluations of one estimate.
    - Nothing is disturbed: all but `.grad` and random generators has the same bits afterwards.

    A mean fails beyond five standard errors. Cost: about 3 * draws calls of the function.

    Args:
        function: the gradient function.
        key: seeds the default generators of torch, NumPy and `random` before each call.
        draws: the number of estimates per mean, 100 or more.
        name: the name in the report. None: that of the function.
    Returns:
        CheckReport. `report.failed` lists the laws that do not hold.
    Raises:
        BadInput: draws is below 100.
    """
    if draws < 100:
        raise BadInput(f"draws is the number of estimates per mean, 100 or more, not {draws!r}.")
    subject = _Audited(name or getattr(function, "__qualname__", repr(function)))
    title = f"10 weights, {draws:,} draws"
    try:
        linear = _sample(function, _Linear(), key.fold("linear"), draws)
    except _Unfilled as error:
        return CheckReport(subject, title, (CheckLine("fills .grad", str(error), "failed"),))
    except Exception as error:
        return CheckReport(subject, title, (CheckLine("fills .grad", brief(error), "failed"),))
    curved = _sample(function, _Curved(), key.fold("curved"), draws)
    lines = [
        CheckLine("fills .grad", "of every trainable parameter and no other", "ok"),
        _agreement(linear),
        _unbiased("unbiased on a linear loss", linear),
        _unbiased("unbiased on a curved loss", curved),
        _scale("scale on a linear loss", linear),
        _scale("scale on a curved loss", curved),
        _second_moment(linear),
        _same_function(function, linear, key, draws),
        *_undisturbed(function, key),
    ]
    return CheckReport(subject, title, tuple(lines))


class _Unfilled(Exception):
    """The function left a `.grad` empty, or filled one that it must not fill."""


def _called(function: Function, model: _Model, loss: Callable[[Any], Tensor], key: Key) -> Tensor:
    """Call the function; return the gradient that it wrote as one vector."""
    model.zero_grad()
    with seeded_generators(key), torch.enable_grad():
        function(model, lambda: loss(model))
    grads = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (parameter.grad is None or parameter.grad.shape != parameter.shape):
            raise _Unfilled(f"{name}.grad is not set: the function must fill it")
        if not parameter.requires_grad and parameter.grad is not None:
            raise _Unfilled(f"{name}.grad is set, but the parameter is frozen")
        if parameter.grad is not None:
            grads.append(parameter.grad.detach().double().flatten())
    return torch.cat(grads)


def _sample(function: Function, loss: Callable[[Any], Tensor], key: Key, draws: int) -> _Sample:
    model = _Model(torch.float64)
    rows = torch.stack([_called(function, model, loss, key.fold("draw", draw)) for draw in range(draws)])
    return _Sample(rows, _called(_backpropagated, _Model(torch.float64), loss, key))


def _backpropagated(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    loss().backward()


def _agreement(sample: _Sample) -> CheckLine:
    products = sample.rows @ sample.gradient / sample.gradient.norm() / sample.rows.norm(dim=1).clamp(min=1e-300)
    against = int((products < -1e-6).sum())
    text = "no estimate" if not against else f"{against:,} of {len(products):,} estimates"
    verdict: Verdict = "failed" if against else "ok"
    numbers = {"against": float(against), "least cosine": float(products.min())}
    return CheckLine("agreement: points away from the gradient", text, verdict, numbers)


def _unbiased(what: str, sample: _Sample) -> CheckLine:
    """Compare the mean with its own projection on the gradient: the scale is another line."""
    mean, error = sample.rows.mean(0), sample.rows.std(0) / len(sample.rows) ** 0.5
    factor = mean @ sample.gradient / sample.gradient.square().sum()
    size = float(mean.norm()) or 1.0
    gap = (mean - factor * sample.gradient).abs()
    worst = float((gap / (error + 1e-6 * size)).max())
    verdict: Verdict = "ok" if worst <= SIGMAS else "failed"
    text = f"largest deviation of a coordinate {worst:.1f} standard errors"
    if float(error.max()) <= 1e-6 * size:
        text = "all estimates are equal" + (", and not parallel to the gradient" if verdict == "failed" else "")
    return CheckLine(what, text, verdict, {"deviation": worst, "relative": float(gap.norm()) / size})


def _scale(what: str, sample: _Sample) -> CheckLine:
    ratios = sample.rows @ sample.gradient / sample.gradient.square().sum()
    mean, error = float(ratios.mean()), float(ratios.std()) / len(ratios) ** 0.5
    text = f"<mean g, grad> / |grad|^2 = {format_number(mean)} +- {format_number(error)}   theory 1"
    is_right = abs(mean - 1) <= SIGMAS * error + 0.01
    if not is_right and mean > 0:
        text += f": {format_number(mean if mean > 1 else 1 / mean)} times too {'long' if mean > 1 else 'short'}"
    return CheckLine(what, text, "ok" if is_right else "failed", {"mean": mean, "error": error})


def _second_moment(sample: _Sample) -> CheckLine:
    """State E|g|^2 / |grad|^2 of the estimate divided by its scale. Below 1 no estimator is unbiased (Jensen)."""
    squares = sample.gradient.square().sum()
    scale = float((sample.rows @ sample.gradient).mean() / squares) or 1.0
    moments = sample.rows.square().sum(1) / squares / scale**2
    mean, error = float(moments.mean()), float(moments.std()) / len(moments) ** 0.5
    text = f"E|g|^2 / |grad|^2 = {format_number(mean)} +- {format_number(error)}"
    dimension = len(sample.gradient)
    if mean > 1 + SIGMAS * error:
        counts = [(dimension + sign) / (mean - 1) for sign in (1, -1)]
        text += f": as {counts[0]:.2g} Gaussian or {counts[1]:.2g} Rademacher directions"
    verdict: Verdict = "failed" if not math.isfinite(mean) or mean < 1 - SIGMAS * error - 0.01 else "ok"
    return CheckLine("second moment, after division by the scale", text, verdict, {"mean": mean, "error": error})


def _same_function(function: Function, linear: _Sample, key: Key, draws: int) -> CheckLine:
    """Add to the loss a number that a dropout layer draws. It has no gradient, so the estimates must not change."""
    noisy = _sample(function, _Linear(noise=10.0), key.fold("linear"), draws)
    ratio = float(noisy.rows.norm() / linear.rows.norm())
    is_same = abs(ratio - 1) <= 0.2  # a function with a generator of its own draws other directions
    text = "a random layer changes nothing"
    if not is_same:
        text = f"with a random layer |g| is {format_number(ratio)} times as long: each evaluation draws other numbers"
    return CheckLine("the same function in all evaluations", text, "ok" if is_same else "failed", {"ratio": ratio})


def _undisturbed(function: Function, key: Key) -> list[CheckLine]:
    lines = []
    for dtype in (torch.float64, torch.float32):
        model = _Model(dtype)
        model.eval()
        objective: Any = _Captured(model)
        before, weights = capture(objective), [parameter.detach().clone() for parameter in model.parameters()]
        _called(function, model, _Linear(), key.fold("undisturbed"))
        changed = [name for name in diff(before, capture(objective)) if not _may_change(name)]
        gap = max(float((a - b.detach()).abs().max()) for a, b in zip(weights, model.parameters(), strict=True))
        text = "bitwise" if not changed else f"changed: {', '.join(changed)}"
        if gap:
            text += f" (a weight by {format_number(gap)})"
        what = f"nothing disturbed in {str(dtype).removeprefix('torch.')}"
        lines.append(
            CheckLine(what, text, "failed" if changed else "ok", {"changed": float(len(changed)), "gap": gap})
        )
    return lines


@dataclass(frozen=True)
class _Captured:
    """What `capture` reads of an objective."""

    model: nn.Module
    devices: tuple[torch.device, ...] = ()


def _may_change(name: str) -> bool:
    return name.endswith(": grad") or "generator" in name
