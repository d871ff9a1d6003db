"""Notice that an evaluation of a loss writes into a parameter: by checksums, so that no copy is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradcost.core.errors import BadInput
from gradcost.core.mutable_state import version_of

Checksum = tuple[str, nn.Parameter, tuple[int, Any]]  # the name of a parameter; its version and the sum of its bits


def without_writes(named: Iterable[tuple[str, nn.Module]], evaluate: Callable[[], Tensor]) -> Tensor:
    """Return `evaluate()`, the loss.

    Args:
        named: the modules with their names.
        evaluate: evaluates the loss.
    Raises:
        BadInput: the evaluation writes into a parameter.
    """
    with torch._C.DisableTorchFunction(), torch.no_grad():
        before = checksums(named)
    loss = evaluate()
    with torch._C.DisableTorchFunction(), torch.no_grad():
        refuse_writes(before, of_same_bits=False)
    return loss


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
    if values.layout != torch.strided or values.dtype not in _WORDS or values.is_meta:
        return version, parameter.data_ptr() if values.layout == torch.strided else None
    return version, int(values.view(_WORDS[values.dtype]).sum(dtype=torch.int64))


_WORDS = {  # the integer type of the same size, to sum bits
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def refuse_writes(before: Iterable[Checksum], of_same_bits: bool = True) -> None:
    """Raise BadInput if one of the parameters has another checksum now.

    Args:
        before: the checksums before the evaluation.
        of_same_bits: whether a write that changes no bit is one too. Substituted weights share version counters.
    """
    for name, parameter, (version, bits) in before:
        new_version, new_bits = _checksum(parameter)
        if new_bits != bits or (of_same_bits and new_version != version):
            raise BadInput(
                f"an evaluation of the loss writes into the parameter `{name}`, so the weights of the next one "
                "differ. Write into it after the step instead, or make it a buffer."
            )


class DataReads(TorchFunctionMode):
    """Collects the tensors whose `.data` is read."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _DATA:
            self.tensors.append(args[0])
        return func(*args, **kwargs or {})


_DATA: Any = Tensor.data.__get__  # type: ignore[attr-defined]
