"""Training checkpoints: save the state of a training run in a file and resume it bit for bit.

A training checkpoint is one safetensors file. Its tensors are numbered. Its metadata contains:

- a JSON tree that refers to the tensors by number. A complex128 tensor is stored as pairs of real numbers;
- a schema number, and a checksum of the tree and of all tensors;
- in the tree, the reprs of the estimator, optimizer, key and task. Another training refuses the file.

Reading a file imports no module and calls no function that the file names. For activation checkpointing see
`gradcost.checkpointing`.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradcost.core.bits import raw_bytes
from gradcost.core.errors import BadInput, require
from gradcost.core.evaluation.next_state import carried, restore
from gradcost.core.files import write_whole
from gradcost.training.train_state import TrainState

SCHEMA = "3"
_OLDER = {"2": {"frozen": {}}}  # by schema: what its document lacks. A file of schema 2 contains all parameters.


class BadCheckpoint(BadInput):
    """The file is not a training checkpoint, is damaged, or belongs to another training."""


def write(path: Path, train_state: TrainState, notes: Any = None) -> None:
    """Write a training checkpoint: weights, buffers, optimizer state and estimator state. The write is atomic.

    The file also contains attributes that training steps change, such as hidden states, and the buffers of modules
    that only the loss uses. Of a frozen parameter that still has its first value (`TrainState.frozen`) it contains a
    hash only.

    Args:
        path: the file. An existing file is replaced.
        train_state: the state to save.
        notes: the caller's own data, saved in the same file: a tree of None, bool, int, float, str, tensors, dict,
            list and tuple (named tuples too).
    Raises:
        BadInput: the estimator's state, an attribute or `notes` contains an object of another type; or parameters
            are sharded over processes.
        OSError: the file cannot be written; the old file is unchanged.
    """
    tensors: dict[str, Tensor] = {}
    objective = train_state.objective
    if objective.structure.sharded is not None:
        raise BadInput(
            f"{objective.structure.sharded}, and a training checkpoint has whole parameters: save the model with "
            "torch.distributed.checkpoint."
        )
    tensors_of_model, frozen = _tensors(objective.model), train_state.frozen or {}
    unchanged = {name: known for name, known in frozen.items() if _hash(tensors_of_model[name]) == known}
    document = {
        "training": train_state.training,
        "model": {name: tensor for name, tensor in tensors_of_model.items() if name not in unchanged},
        "frozen": unchanged,
        "steps": train_state.state_dict(),
        "notes": notes,
        "further": carried(objective),
    }
    tree = json.dumps(_encode(document, tensors))
    metadata = {"schema": SCHEMA, "tree": tree, "checksum": _checksum(tree, tensors)}
    write_whole(path, _safetensors().save(tensors, metadata))


def read(path: Path, train_state: TrainState) -> None:
    """Restore the state that `write` saved.

    Args:
        path: a training checkpoint.
        train_state: a new TrainState with the same model, estimator, optimizer, key and task; changed in place.
    Raises:
        BadCheckpoint: the file is not a training checkpoint, is damaged, or belongs to another training. Nothing has
            changed, unless the file was crafted.
        BadInput: the file holds buffers of modules that only the loss reaches, and `prepare` was not called.
        OSError: the file cannot be read.
    """
    document = _document(path)
    try:
        _install(path, document, train_state)
    except BadInput:
        raise
    except Exception as error:  # a crafted file, whose checksum is right
        raise BadCheckpoint(f"{path} holds no state of this training ({error}): delete it.") from error


def _install(path: Path, document: dict[str, Any], train_state: TrainState) -> None:
    saved, current = document["model"], _tensors(train_state.objective.model)
    frozen = {name: current.pop(name) for name in document["frozen"] if name in current}
    if difference := (
        _difference(document["training"], train_state.training)
        or _other_model(saved | dict.fromkeys(document["frozen"].keys() - frozen.keys()), current)
        or _other_frozen(document["frozen"], frozen)
    ):
        part, details = difference
        raise BadCheckpoint(
            f"{path} is a training checkpoint of another {part}: {details}. Pass the same {part}, or delete the file."
        )
    with torch.no_grad():
        for name, tensor in current.items():
            tensor.copy_(saved[name])
    restore(train_state.objective, document["further"])
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
    if path.exists() and not path.is_file():
        raise BadCheckpoint(f"{path} is not a training checkpoint: it is not a regular file.")
    data = path.read_bytes()
    try:
        tensors = safetensors.load(data)
        # File: length of the header (8 bytes), JSON header, tensors. `safetensors.load` does not return the metadata.
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        tree, schema, checksum = metadata["tree"], metadata.get("schema", "1"), metadata.get("checksum")
    except Exception as error:
        raise BadCheckpoint(f"{path} is not a training checkpoint, or is incomplete ({error}): delete it.") from error
    if schema not in (SCHEMA, *_OLDER):
        raise BadCheckpoint(
            f"{path} has schema {schema}, but this version of gradcost reads {SCHEMA}: delete it, or resume with the "
            "version that wrote it."
        )
    if checksum != _checksum(tree, tensors):
        raise BadCheckpoint(f"{path} is damaged, because its checksum differs: delete it; training then begins anew.")
    try:
        document = _OLDER.get(schema, {}) | _decode(json.loads(tree), tensors)
        assert document.keys() == {"training", "model", "frozen", "steps", "notes", "further"}
    except Exception as error:
        raise BadCheckpoint(f"{path} is not a training checkpoint ({error}): delete it.") from error
    return document


def frozen(model: nn.Module) -> dict[str, str]:
    """Return a hash of each parameter of the model that does not train, for `TrainState.frozen`."""
    return {f"p.{name}": _hash(each) for name, each in model.named_parameters() if not each.requires_grad}


def _hash(tensor: Tensor) -> str:
    return _checksum("", {"": tensor})


def _checksum(tree: str, tensors: dict[str, Tensor]) -> str:
    """Return a hash of everything that reading uses: the tree, and the name, dtype, shape and bits of each tensor."""
    digest = blake2b(tree.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def _difference(saved: dict[str, str], current: dict[str, str]) -> tuple[str, str] | None:
    """Return the first part of the training that differs, and how. A part that only one of the two names is equal."""
    for name, text in current.items():
        if saved.get(name, text) != text:
            return name, f"the file has {saved[name]}, this training has {text}"
    return None


def _other_model(saved: dict[str, Tensor], current: dict[str, Tensor]) -> tuple[str, str] | None:
    if saved.keys() != current.keys():
        name = min(saved.keys() ^ current.keys())
        return "model", f"only {'the file' if name in saved else 'this model'} has {name[2:]}"
    for name, tensor in current.items():
        one, other = (f"{t.dtype} of shape {tuple(t.shape)}" for t in (saved[name], tensor))
        if one != other:
            return "model", f"{name[2:]} is {one} in the file and {other} in this model"
    return None


def _other_frozen(saved: dict[str, str], current: dict[str, Tensor]) -> tuple[str, str] | None:
    for name, tensor in current.items():
        if _hash(tensor) != saved[name]:
            return "model", f"{name[2:]}, which does not train, has other values in this model"
    return None


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
            name, tensor = str(len(tensors)), tree.detach().contiguous().clone()
            # complex64 is the only complex type of safetensors
            is_split = tensor.is_complex() and tensor.dtype != torch.complex64
            tensors[name] = torch.view_as_real(tensor) if is_split else tensor
            return ["complex" if is_split else "tensor", name]
        case np.ndarray() if tree.dtype.kind in "biufc":
            kind, name = _encode(torch.from_numpy(np.ascontiguousarray(tree)), tensors)
            return ["array" if kind == "tensor" else "complex array", name]
        case dict():
            return ["dict", [[_encode(key, tensors), _encode(item, tensors)] for key, item in tree.items()]]
        case list():
            return ["list", [_encode(item, tensors) for item in tree]]
        case deque():
            return ["queue", tree.maxlen, [_encode(item, tensors) for item in tree]]
        case set():
            return ["set", [_encode(item, tensors) for item in tree]]
        case tuple():
            kind = type(tree)
            name = "" if kind is tuple else f"{kind.__module__}:{kind.__qualname__}"
            return ["tuple", name, [_encode(item, tensors) for item in tree]]
    raise BadInput(
        f"a training checkpoint cannot store a {type(tree).__name__}: use tuples, lists, queues, dictionaries, "
        "sets, numbers, text, arrays and tensors."
    )


def _decode(tree: Any, tensors: dict[str, Tensor]) -> Any:
    match tree:
        case ["tensor", name]:
            return tensors[name]
        case ["complex", name]:
            return torch.view_as_complex(tensors[name])
        case ["array", name]:
            return tensors[name].numpy()
        case ["complex array", name]:
            return torch.view_as_complex(tensors[name]).numpy()
        case ["dict", items]:
            return {_decode(key, tensors): _decode(item, tensors) for key, item in items}
        case ["list", items]:
            return [_decode(item, tensors) for item in items]
        case ["queue", length, items]:
            return deque((_decode(item, tensors) for item in items), length)
        case ["set", items]:
            return {_decode(item, tensors) for item in items}
        case ["tuple", "", items]:
            return tuple(_decode(item, tensors) for item in items)
        case ["tuple", name, items]:
            return _named_tuple(name, [_decode(item, tensors) for item in items])
    return tree


def _named_tuple(name: str, items: list[Any]) -> Any:
    """Return a named tuple of the class MODULE:NAME.

    The class is looked up among the modules that this process has already imported, and none of its methods is
    called. So a file can neither import a module nor call a function.
    """
    module, _, path = name.partition(":")
    kind: Any = sys.modules.get(module)
    for attribute in path.split("."):
        kind = getattr(kind, "__dict__", {}).get(attribute)  # not getattr: a module may import on access
    if not (isinstance(kind, type) and issubclass(kind, tuple) and len(getattr(kind, "_fields", ())) == len(items)):
        raise BadCheckpoint(f"{name} is not a named tuple of {len(items)} fields in a module that is imported")
    return tuple.__new__(kind, items)


def _safetensors() -> Any:
    return require("safetensors.torch", "A training checkpoint", "study")
