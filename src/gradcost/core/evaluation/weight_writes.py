"""Notice that an evaluation of a loss writes into a parameter: by checksums, so that no copy is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradcost.core.bits import checksum
from gradcost.core.errors import BadInput
from gradcost.core.evaluation.saved_state import version_of

Checksum = tuple[str, nn.Parameter, tuple[int, Any]]  # the name of a parameter; its version and the sum of its bits


def without_writes(isolation: Any, with_bits: bool, evaluate: Callable[[], Tensor]) -> Tensor:
    """Return `evaluate()`, the loss. Cost: 0.5 us per parameter; with bits, two passes over the weights.

    Args:
        isolation: the `Isolation` of the model, which lists its parameters and their names.
        with_bits: whether to compare the bits too, which a write through `.data` changes without a new version.
        evaluate: evaluates the loss.
    Raises:
        BadInput: the evaluation writes into a parameter, or gives it another storage.
    """
    if _moves_weights.get():
        return evaluate()
    parameters = isolation.parameters
    before, sums = _versions(parameters), _outside_modes(isolation.named) if with_bits else []
    loss = evaluate()
    for parameter, old, new in zip(parameters, before, _versions(parameters), strict=True):
        if old != new:
            raise BadInput(_WRITES.format(_name(isolation.named, parameter)))
    for (name, _, (_, old)), (_, _, (_, new)) in zip(
        sums, _outside_modes(isolation.named) if sums else [], strict=True
    ):
        if old != new:
            raise BadInput(_WRITES.format(name))
    return loss


@contextmanager
def moving_weights() -> Iterator[None]:
    """Inside this context evaluations may write into parameters: the caller moves each after its last use."""
    token = _moves_weights.set(True)
    try:
        yield
    finally:
        _moves_weights.reset(token)


_moves_weights: ContextVar[bool] = ContextVar("_moves_weights", default=False)


def _versions(parameters: Sequence[nn.Parameter]) -> list[tuple[int, int]]:
    with torch._C.DisableTorchFunction():  # a mode would replace the parameters by substituted weights
        return [(parameter._version, parameter.data_ptr()) for parameter in parameters]


def _outside_modes(named: Iterable[tuple[str, nn.Module]]) -> list[Checksum]:
    with torch._C.DisableTorchFunction(), torch.no_grad():
        return checksums(named)


def _name(named: Iterable[tuple[str, nn.Module]], parameter: nn.Parameter) -> str:
    for name, module in named:
        for key, value in module._parameters.items():
            if value is parameter:
                return f"{name}.{key}" if name else key
    return "a parameter"


def checksums(named: Iterable[tuple[str, nn.Module]]) -> list[Checksum]:
    """Return the checksum of each parameter of these modules."""
    return [
        (f"{name}.{key}" if name else key, parameter, _checksum(parameter))
        for name, module in named
        for key, parameter in module._parameters.items()
        if parameter is not None
    ]


def _checksum(parameter: nn.Parameter) -> tuple[int, Any]:
    version = version_of(parameter)
    values = parameter.detach()
    if values.layout != torch.strided or values.is_quantized or values.is_meta:
        return version, parameter.data_ptr() if values.layout == torch.strided else None
    return version, checksum(values)


def refuse_writes(before: Iterable[Checksum]) -> None:
    """Raise BadInput if one of the parameters has another checksum now."""
    for name, parameter, known in before:
        if _checksum(parameter) != known:
            raise BadInput(_WRITES.format(name))


_WRITES = (
    "an evaluation of the loss writes into the parameter `{}`, so the weights of the next one differ. Write into it "
    "after the step instead, or make it a buffer."
)


class Reads(TorchFunctionMode):
    """Collects the tensors whose `.data` and `.grad` are read."""

    def __init__(self) -> None:
        super().__init__()
        self.of_data: list[Tensor] = []
        self.of_grad: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _DATA:
            self.of_data.append(args[0])
        elif func == _GRAD:
            self.of_grad.append(args[0])
        return func(*args, **kwargs or {})


_DATA: Any = Tensor.data.__get__  # type: ignore[attr-defined]
_GRAD: Any = Tensor.grad.__get__  # type: ignore[attr-defined]
