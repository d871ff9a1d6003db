"""A task on another device, in another dtype, or under autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gradcost.core.errors import BadInput
from gradcost.core.evaluation.autocast import UnderAutocast
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.core.pytree import tree_map
from gradcost.core.value import value


@value
class Placed:
    """A task whose model and batches are on a device and in a dtype, or whose loss is computed under autocast.

    The initial weights are those of the task, cast. Everything else is that of the task.

    Args:
        task: the task.
        device: the device of the model and of each batch: "cpu" or "cuda". None: the CPU.
        dtype: the dtype of the weights and of floating-point inputs. None: unchanged.
        autocast: the dtype of `torch.autocast` around the loss and the score. None: no autocast.
    """

    task: Any
    device: str | None = None
    dtype: torch.dtype | None = None
    autocast: torch.dtype | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "task":  # before the fields exist, as in unpickling
            raise AttributeError(name)
        return getattr(self.task, name)

    @property
    def name(self) -> str:
        """The name of the task in reports."""
        return getattr(self.task, "name", type(self.task).__name__.lower())

    def objective(self, key: Key) -> Objective:
        """Return the objective of the task, with its model moved and cast, and its loss under autocast.

        Args:
            key: the source of the initial weights.
        """
        made = self.task.objective(key)
        model = made.model.to(device=self.device, dtype=self.dtype)
        loss = made.loss if self.autocast is None else UnderAutocast(made.loss, self._device_type, self.autocast)
        return Objective(model, loss, data=made.data and self.once_through)

    def batch_at(self, key: Key, step: int) -> Any:
        """Return the training batch of one step, moved and cast.

        Args:
            key: the source of the order of the data.
            step: the number of the step, from 0.
        """
        return self._moved(self.task.batch_at(key, step))

    def once_through(self) -> Iterator[Any]:
        """Yield the training batches once, moved and cast."""
        for batch in self.task.once_through():
            yield self._moved(batch)

    def splits(self) -> Any:
        """Return the splits of the task, on the CPU. `score` moves them."""
        return self.task.splits()

    def score(self, model: nn.Module, split: Any) -> Any:
        """Return the score of a model on a split, computed as the loss is.

        Args:
            model: the model of `objective`.
            split: one of the three `splits()`.
        """
        cast = nullcontext() if self.autocast is None else torch.autocast(self._device_type, self.autocast)
        with cast:
            return self.task.score(model, self._cast_split(split))

    @property
    def _device_type(self) -> str:
        return torch.device(self.device or "cpu").type

    def _moved(self, batch: Any) -> Any:
        return tree_map(
            lambda leaf: leaf.to(self.device) if isinstance(leaf, Tensor) else leaf, cast(batch, self.dtype)
        )

    def _cast_split(self, split: Any) -> Any:
        """Cast a split, which is a batch or a loader. A loader is cast batch by batch."""
        if self.dtype is None or isinstance(split, tuple | list | dict):
            return cast(split, self.dtype)
        return (cast(batch, self.dtype) for batch in split)


def cast(batch: Any, dtype: torch.dtype | None) -> Any:
    """Return a batch with its floating-point tensors in another dtype. None: the batch as it is."""
    if dtype is None:
        return batch
    return tree_map(
        lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, batch
    )


def placed(
    task: Any, device: str | None = None, dtype: torch.dtype | None = None, autocast: torch.dtype | None = None
) -> Any:
    """Put a task on a device, in a dtype, or under autocast.

    Args:
        task: the task.
        device: "cpu", "cuda" or "cuda:1". None: the CPU.
        dtype: the dtype of the weights and of floating-point inputs. None: unchanged.
        autocast: the dtype of `torch.autocast` around the loss: bfloat16. None: no autocast.
    Returns:
        A `Placed`; the task itself if all three are None. What is None stays as it is in a task that is a `Placed`.
    Raises:
        BadInput: this machine has no such device, or training is not possible in that dtype.
    """
    if device is None and dtype is None and autocast is None:
        return task
    require_device(device)
    for name, given in (("dtype", dtype), ("autocast", autocast)):
        if given is not None and not (isinstance(given, torch.dtype) and given.is_floating_point):
            raise BadInput(f"{name} is {given!r}: give a floating-point dtype such as torch.bfloat16.")
    if isinstance(task, Placed):  # one Placed has all three: autocast is for the type of its device
        device, dtype, autocast = device or task.device, dtype or task.dtype, autocast or task.autocast
        task = task.task
    if autocast not in (None, torch.bfloat16):
        raise BadInput(f"autocast to {autocast} is not available: give torch.bfloat16, which needs no loss scaling.")
    return Placed(task, device, dtype, autocast)


def require_device(device: str | None) -> None:
    """Raise BadInput if this machine has no such device for trials."""
    if device is None:
        return
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise BadInput(f"there is no device {device!r}: give cpu or cuda.") from error
    if resolved.type not in ("cpu", "cuda"):
        raise BadInput(f"there is no device {device!r}: give cpu or cuda.")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise BadInput(
            f"torch finds {found or 'no'} CUDA device{'s' * (found > 1)} here, so {device} is not available."
        )
