"""Complex tensors as real ones: an element counts as two real numbers, its real and its imaginary part."""

from __future__ import annotations

from torch import Tensor, view_as_real


def as_real(tensor: Tensor) -> Tensor:
    """Return a complex tensor as a real one with a last dimension of size 2 (a view); a real tensor unchanged."""
    return view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def real_count(tensor: Tensor) -> int:
    """Return how many real numbers the tensor holds."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)
