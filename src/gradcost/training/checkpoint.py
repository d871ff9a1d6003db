"""Training checkpoints: save the state of a training run in a file and resume it bit for bit.

A training checkpoint is one safetensors file. Its tensors are numbered. Its metadata is a JSON tree that refers to
the tensors by number. Reading it runs no code from the file. For activation checkpointing see
`gradcost.checkpointing`.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradcost.core.errors import BadInput, require
from gradcost.core.files import write_whole
from gradcost.core.next_state import carried, restore
from gradcost.training.train_state import TrainState


def write(path: Path, train_state: TrainState, notes: Any = None) -> None:
    """Write a training checkpoint: weights, buffers, optimizer state and estimator state. The write is atomic.

    The file also contains attributes that training steps change, such as hidden states, and the buffers of modules
    that only the loss uses.

    Args:
        path: the file. An existing file is replaced.
        train_state: the state to save.
        notes: the caller's own data, saved in the same file: a tree of None, bool, int, float, str, tensors, dict,
            list and tuple (named tuples too).
    Raises:
        BadInput: the estimator's state, an attribute or `notes` contains an object of another type.
        OSError: the file cannot be written; the old file is unchanged.
    """
    tensors: dict[str, Tensor] = {}
    objective = train_state.objective
    document = {"model": _tensors(objective.model), "steps": train_state.state_dict(), "notes": notes}
    if further := carried(objective):
        document["further"] = further
    tree = _encode(document, tensors)
    write_whole(path, _safetensors().save(tensors, {"tree": json.dumps(tree)}))


def read(path: Path, train_state: TrainState) -> None:
    """Restore the state that `write` saved.

    Args:
        path: a training checkpoint.
        train_state: a new TrainState with the same model, estimator and optimizer; changed in place.
    Raises:
        BadInput: the file is not a complete training checkpoint, or belongs to another model.
        OSError: the file cannot be read.
    """
    document = _document(path)
    saved, current = document["model"], _tensors(train_state.objective.model)
    if {name: t.shape for name, t in saved.items()} != {name: t.shape for name, t in current.items()}:
        raise BadInput(
            f"{path} is a training checkpoint of another model: delete it, or give a checkpoint of this model."
        )
    with torch.no_grad():
        for name, tensor in current.items():
            tensor.copy_(saved[name])
    restore(train_state.objective, document.get("further", ()))
    train_state.load_state_dict(document["steps"])


def notes(path: Path) -> Any:
    """Return the notes that `write` saved.

    Args:
        path: a training checkpoint.
    Returns:
        The tree that was passed to `write`; None if there was none.
    Raises:
        BadInput: the file is not a complete training checkpoint.
        OSError: the file cannot be read.
    """
    return _document(path)["notes"]


def _document(path: Path) -> dict[str, Any]:
    safetensors = _safetensors()
    data = path.read_bytes()
    try:
        tensors = safetensors.load(data)
        # File: length of the header (8 bytes), JSON header, tensors. `safetensors.load` does not return the metadata.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        document = _decode(json.loads(header["__metadata__"]["tree"]), tensors)
        assert document.keys() - {"further"} == {"model", "steps", "notes"}
    except Exception as error:
        raise BadInput(f"{path} is not a training checkpoint, or is incomplete ({error}): delete it.") from error
    return document


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers, non-persistent ones too. Shared tensors occur once."""
    return {
        **{f"p.{name}": tensor.detach() for name, tensor in model.named_parameters()},
        **{f"b.{name}": tensor for name, tensor in model.named_buffers()},
    }


def _encode(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Return the tree as JSON data: each tensor is copied to `tensors` and replaced by its number."""
    match tree:
        case None | bool() | int() | float() | str():
            return tree
        case Tensor():
            name = str(len(tensors))
            tensors[name] = tree.detach().contiguous().clone()
            return ["tensor", name]
        case dict():
            return ["dict", [[_encode(key, tensors), _encode(item, tensors)] for key, item in tree.items()]]
        case list():
            return ["list", [_encode(item, tensors) for item in tree]]
        case tuple():
            kind = type(tree)
            name = "" if kind is tuple else f"{kind.__module__}:{kind.__qualname__}"
            return ["tuple", name, [_encode(item, tensors) for item in tree]]
    raise BadInput(
        f"a training checkpoint cannot store a {type(tree).__name__}: use tuples, lists, dictionaries, numbers, text "
        "and tensors."
    )


def _decode(tree: Any, tensors: dict[str, Tensor]) -> Any:
    match tree:
        case ["tensor", name]:
            return tensors[name]
        case ["dict", items]:
            return {_decode(key, tensors): _decode(item, tensors) for key, item in items}
        case ["list", items]:
            return [_decode(item, tensors) for item in items]
        case ["tuple", "", items]:
            return tuple(_decode(item, tensors) for item in items)
        case ["tuple", name, items]:
            return _named_tuple(name)(*(_decode(item, tensors) for item in items))
    return tree


def _named_tuple(name: str) -> Any:
    """Return the named tuple MODULE:NAME. Refuse any other object, so that a file cannot call arbitrary code."""
    module, _, attribute = name.partition(":")
    kind = getattr(importlib.import_module(module), attribute)
    if not (isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")):
        raise BadInput(f"{name} is not a named tuple")
    return kind


def _safetensors() -> Any:
    return require("safetensors.torch", "A training checkpoint", "study")
