"""A training in the middle, on disk: it goes on from there bit for bit as if it had never stopped.

One safetensors file: the tensors by number, and beside them, as JSON, the tree that they hang in. Nothing in it is
code, so reading one runs none.
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
from gradcost.training.train_state import TrainState


def write(path: Path, train_state: TrainState, notes: Any = None) -> None:
    """Write where a training stands, whole or not at all: weights, buffers, the optimizer's state, the estimator's.

    notes: a tree of numbers, texts and tensors of the caller's own. Raises: OSError where the disk refuses, in which
    case the file is what it was.
    """
    tensors: dict[str, Tensor] = {}
    tree = _encoded(
        {"model": _held(train_state.objective.model), "steps": train_state.state_dict(), "notes": notes}, tensors
    )
    write_whole(path, _safetensors().save(tensors, {"tree": json.dumps(tree)}))


def read(path: Path, train_state: TrainState) -> None:
    """Put a training where `write` left it.

    stepping: a fresh one of the same task, estimator and optimizer. Raises: ValueError where the file is none of ours
    or of another model; OSError where it cannot be read.
    """
    found = _document(path)
    held, model = found["model"], _held(train_state.objective.model)
    if {name: t.shape for name, t in held.items()} != {name: t.shape for name, t in model.items()}:
        raise BadInput(f"{path} is a checkpoint of another model: delete it, or give the right one.")
    with torch.no_grad():
        for name, tensor in model.items():
            tensor.copy_(held[name])
    train_state.load_state_dict(found["steps"])


def notes(path: Path) -> Any:
    """The notes that `write` was given. Raises: as `read`."""
    return _document(path)["notes"]


def _document(path: Path) -> dict[str, Any]:
    safetensors = _safetensors()
    data = path.read_bytes()
    try:
        tensors = safetensors.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        found = _decoded(json.loads(header["__metadata__"]["tree"]), tensors)
        assert found.keys() == {"model", "steps", "notes"}
    except Exception as error:
        raise BadInput(f"{path} is no checkpoint of a training, or was cut short ({error}): delete it.") from error
    return found


def _held(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each once, whether persistent or not."""
    return {
        **{f"p.{name}": tensor.detach() for name, tensor in model.named_parameters()},
        **{f"b.{name}": tensor for name, tensor in model.named_buffers()},
    }


def _encoded(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree as JSON, its tensors put into `tensors` under the numbers that stand for them."""
    match tree:
        case None | bool() | int() | float() | str():
            return tree
        case Tensor():
            name = str(len(tensors))
            tensors[name] = tree.detach().contiguous().clone()
            return ["tensor", name]
        case dict():
            return ["dict", [[_encoded(key, tensors), _encoded(item, tensors)] for key, item in tree.items()]]
        case list():
            return ["list", [_encoded(item, tensors) for item in tree]]
        case tuple():
            kind = type(tree)
            name = "" if kind is tuple else f"{kind.__module__}:{kind.__qualname__}"
            return ["tuple", name, [_encoded(item, tensors) for item in tree]]
    raise BadInput(f"a state of a {type(tree).__name__} cannot be kept: use tuples, dictionaries and tensors.")


def _decoded(tree: Any, tensors: dict[str, Tensor]) -> Any:
    match tree:
        case ["tensor", name]:
            return tensors[name]
        case ["dict", items]:
            return {_decoded(key, tensors): _decoded(item, tensors) for key, item in items}
        case ["list", items]:
            return [_decoded(item, tensors) for item in items]
        case ["tuple", "", items]:
            return tuple(_decoded(item, tensors) for item in items)
        case ["tuple", name, items]:
            return _named(name)(*(_decoded(item, tensors) for item in items))
    return tree


def _named(name: str) -> Any:
    """A named tuple's class. No other is looked up, so that a file cannot call what it likes."""
    module, _, kind = name.partition(":")
    found = getattr(importlib.import_module(module), kind)
    if not (isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_fields")):
        raise BadInput(f"{name} is no named tuple")
    return found


def _safetensors() -> Any:
    return require("safetensors.torch", "A training checkpoint", "study")
