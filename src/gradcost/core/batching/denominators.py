"""Observe what a loss divides by: the number of targets, a sum of weights, the number of elements of a mean."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch

from gradcost.core.errors import Unsupported
from gradcost.core.fake import known


class Denominator(NamedTuple):
    """One division that a loss made.

    Args:
        value: returns the denominator; None if it is not known, as on fake tensors.
        is_loss: whether the result of this division is the loss.
        depends_on_weights: whether autograd would differentiate the denominator.
    """

    value: Callable[[], float | None]
    is_loss: bool
    depends_on_weights: bool


class Observed(NamedTuple):
    """The result of `observed`.

    Args:
        loss: what the function returned.
        denominators: the divisions, in order.
        is_static: whether all denominators depend on shapes only, and no shape depends on values.
    """

    loss: Any
    denominators: tuple[Denominator, ...]
    is_static: bool


def observed(function: Callable[[], Any]) -> Observed:
    """Call a function that returns a loss, and observe its divisions. Its numbers do not change.

    A division is one of: the mean of `F.cross_entropy` and of the other losses of `torch.nn.functional`, the mean of
    all elements of a tensor, and a division by a scalar.

    Args:
        function: evaluates the loss.
    Raises:
        Unsupported: an embedding has scale_grad_by_freq, so its gradient is not determined by those of micro-batches.
    """
    observer = _Observer()
    with observer:
        loss = function()
    found = tuple(Denominator(value, output() is loss, depends) for value, output, depends in observer.found)
    return Observed(loss, found, observer.is_static)


class _Observer(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Callable[[], float | None], Callable[[], Any], bool]] = []
        self.is_static = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **kwargs) if kwargs else func(*args)
        observe = _observers.get(func, _unknown)
        if observe is _unknown:
            observe = _observers[func] = _observer_of(getattr(func, "__name__", ""))
        if observe is not None:
            observe(self, func, args, kwargs or {}, output)
        return output

    def read(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        self.is_static = False

    def indexed(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        self.is_static &= not _depends_on_values(args[1])

    def averaged(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        is_mean = func.__name__ == "mean" or _reduction(kwargs) == "mean"
        if is_mean and isinstance(output, Tensor) and output.ndim == 0 and args and isinstance(args[0], Tensor):
            elements = args[0].numel()
            self._add(lambda: elements, output)

    def _add(self, value: Callable[[], float | None], output: Tensor, depends_on_weights: bool = False) -> None:
        self.found.append((value, weakref.ref(output), depends_on_weights))

    def divided(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        numerator, denominator = args[0], args[1] if len(args) > 1 else kwargs.get("other")
        if not isinstance(numerator, Tensor) or not isinstance(output, Tensor):
            return
        if isinstance(denominator, Tensor) and denominator.ndim == 0:
            self._add(lambda: number(denominator), output, denominator.requires_grad)
            self.is_static = False
        elif isinstance(denominator, int | float) and output.ndim == 0:
            self._add(lambda: float(denominator), output)
            self.is_static = False

    def embedded(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        scales = args[5] if len(args) > 5 else kwargs.get("scale_grad_by_freq", False)
        if func in (F.embedding, F.embedding_bag) and scales:
            raise Unsupported(
                "scale_grad_by_freq=True divides an embedding's gradient by counts, and the backward pass of a "
                "micro-batch counts in that micro-batch only. Set it to False, or evaluate the batch at once "
                "(without Accumulated, parts=1)."
            )

    def averaged_over_targets(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        loss = _target_loss(*args, **kwargs)
        if loss.reduction == "mean" and isinstance(output, Tensor):
            self._add(loss.counted, output)
            self.is_static &= loss.target.is_floating_point()


_observers: dict[Any, Any] = {}  # the method of _Observer for a torch function, or None
_unknown = object()


def _observer_of(name: str) -> Any:
    if name in ("cross_entropy", "nll_loss"):
        return _Observer.averaged_over_targets
    if name in ("embedding", "embedding_bag"):
        return _Observer.embedded
    if name == "mean" or name in _LOSSES:
        return _Observer.averaged
    if name in _DIVISIONS:
        return _Observer.divided
    return _Observer.indexed if name == "__getitem__" else _Observer.read if name in _READS else None


class _TargetLoss(NamedTuple):
    """The arguments of `F.cross_entropy` or `F.nll_loss` that determine what a mean divides by."""

    classes: int
    target: Tensor
    weight: Tensor | None
    ignore_index: int
    reduction: str
    elements: int

    def counted(self) -> float | None:
        """Return the number of targets that are not ignored, or the sum of their classes' weights."""
        if self.target.is_floating_point():  # probabilities of the classes: a mean over the rows
            return self.elements / max(self.classes, 1)
        target, weight = _plain(self.target), None if self.weight is None else _plain(self.weight)
        if target is None or (self.weight is not None and weight is None):
            return None
        with _outside_of_modes():
            is_counted = target != self.ignore_index
            if weight is None:
                return float(is_counted.sum().item())
            return float(weight.detach()[target[is_counted]].double().sum().item())


def _target_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    *_: Any,  # label_smoothing, which does not change the denominator
    **__: Any,
) -> _TargetLoss:
    classes = input.shape[0 if input.ndim == 1 else 1]
    if size_average is not None or reduce is not None:
        reduction = _legacy(size_average, reduce)
    return _TargetLoss(classes, target, weight, ignore_index, reduction, input.numel())


_LOSSES = {name for name in dir(F) if name.endswith("_loss")} | {"cross_entropy", "kl_div"}
_LOSSES |= {"binary_cross_entropy", "binary_cross_entropy_with_logits"}
_DIVISIONS = {"div", "div_", "divide", "true_divide", "__truediv__", "__itruediv__", "__div__"}
# Functions whose results, or their shapes, depend on values.
_READS = {"item", "tolist", "__int__", "__float__", "__index__", "__bool__", "numpy", "__array__"}
_READS |= {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "repeat_interleave", "bincount"}


def _legacy(size_average: bool | None, reduce: bool | None) -> str:
    if reduce is False:
        return "none"
    return "sum" if size_average is False else "mean"


def _reduction(kwargs: dict[str, Any]) -> str:
    if kwargs.get("size_average") is not None or kwargs.get("reduce") is not None:
        return _legacy(kwargs.get("size_average"), kwargs.get("reduce"))
    return kwargs.get("reduction", "mean")


def _depends_on_values(index: Any) -> bool:
    """Return whether an index contains a mask (bool, uint8), whose values determine the number of elements."""
    entries = index if isinstance(index, tuple) else (index,)
    return any(isinstance(entry, Tensor) and entry.dtype in (torch.bool, torch.uint8) for entry in entries)


def number(tensor: Tensor) -> float | None:
    """Return the value of a scalar tensor; None if it is fake, batched or complex."""
    plain = _plain(tensor)
    if plain is None or plain.numel() != 1 or plain.is_complex():
        return None
    with _outside_of_modes():
        return float(plain.detach().item())


def _plain(tensor: Tensor) -> Tensor | None:
    """Return the tensor inside functorch's wrappers; None if it has no values (fake or meta)."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    real = known(tensor)
    return None if real is None or real.is_meta else real


@contextmanager
def _outside_of_modes() -> Iterator[None]:
    """Inside the context, torch modes and transforms do not count, track or wrap operations."""
    if not torch._C._len_torch_dispatch_stack() and functorch.maybe_current_level() is None:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            yield
        return
    # No ExitStack: an exception would refer to its guards, which would restore an old state when it is collected.
    with torch._C.DisableTorchFunction(), no_dispatch(), torch._C._DisableFuncTorch(), torch.no_grad():
        yield
