"""Make an objective and a batch from the options --task, --model and --data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gradcost.cli import spec
from gradcost.core.batching.batches import Batches
from gradcost.core.errors import BadInput
from gradcost.core.inner_model import inner_model
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.tasks import contract
from gradcost.tasks.metrics import default_loss
from gradcost.tasks.placed import cast

EXAMPLES = 8  # the default batch size

Make = Callable[[Callable[[], Any]], Any]  # calls a model factory, for example on the meta device


def refuse(other: str, **options: Any) -> None:
    """Raise BadInput if one of `options` is not None, because `other` cannot be combined with it."""
    for name, value in options.items():
        if value is not None:
            raise BadInput(f"{name} cannot be combined with {other}: leave one out.")


def of_task(task: str, model: str | None, batch: int | None) -> tuple[Objective, Any]:
    """Return the objective and the first batch of a task."""
    instance = with_batch(spec.task(task, model)[0], batch, task)
    return instance.objective(Key(0)), instance.batch_at(Key(0), 0)


def with_batch(task: Any, batch: int | None, name: str) -> Any:
    """Return a task with another batch size; the task itself if `batch` is None. `name` appears in the message."""
    if batch is None:
        return task
    if "batch" not in getattr(type(task), "__dataclass_fields__", {}):
        raise BadInput(f"{name} has a fixed batch size: leave --batch out.")
    return replace(task, batch=batch)


def of_model(
    model: str,
    data: str | None,
    batch: int | None,
    make: Make,
    *,
    dtype: torch.dtype | None = None,
    length: int | None = None,
    lora: int | None = None,
    chunks: int | None = None,
    bits: int | None = None,
    attention: str | None = None,
) -> tuple[Objective, Any]:
    """Return the objective of --model, and a batch: from --data, or random tokens for a model of transformers."""
    from gradcost.integrations import transformers

    examples = EXAMPLES if batch is None else batch
    if examples < 1:
        raise BadInput(f"a batch has 1 example or more, not {examples}.")
    if model.startswith("hf:"):
        module, loss = transformers.from_config(model.removeprefix("hf:"), dtype, attention), None
    else:
        module, loss = from_factory(model, dtype, make)
    # `is_model` imports transformers, which may not be installed: call it only for models that need transformers.
    is_transformers = model.startswith("hf:") or (_is_from("transformers", module) and transformers.is_model(module))
    if not is_transformers:
        options = {"--length": length, "--lora": lora, "--chunks": chunks, "--bits": bits}
        for name in (name for name, value in options.items() if value is not None):
            raise BadInput(f"{name} is for models of transformers, but {model} returns a {type(module).__name__}.")
    if attention is not None and not model.startswith("hf:"):
        raise BadInput(f"--attention is for hf:CONFIG.json: {model} chooses its attention itself. Leave it out.")
    if lora is not None:
        if transformers.has_adapters(module):
            raise BadInput(f"the model that {model} returns already has adapters: leave --lora out.")
        module = transformers.with_lora(module, lora)
    if bits is not None or (model.startswith("hf:") and transformers.is_quantized(module)):
        module = transformers.quantized(module)
    if data is not None:
        refuse("--data", **{"--length": length, "--chunks": chunks})
        made, epoch = _batch_of(data, examples, dtype)
        return Objective(module, loss or default_loss, data=epoch), made
    if not is_transformers:
        raise BadInput(
            f"{model} returns a {type(module).__name__}, which needs data: add --data FILE.py:FUNCTION, where "
            "FUNCTION(batch_size) returns a batch (x, y)."
        )
    if loss is not None and chunks is not None:
        raise BadInput(f"--chunks is for the loss of gradcost, and {model} returns its own: leave --chunks out.")
    objective, tokens = transformers.objective(module, examples, length, chunks)
    return (objective if loss is None else Objective(module, loss)), tokens


def _is_from(library: str, module: nn.Module) -> bool:
    """Return whether the class of a module or a base class is from `library`; LoRA wrappers do not count."""
    return any(kind.__module__.split(".")[0] == library for kind in type(inner_model(module)).__mro__)


def without_numbers(factory: Callable[[], Any]) -> Any:
    """Call a model factory on the meta device, so that weights need no memory; if that fails, call it normally."""
    try:
        with torch.device("meta"):
            return factory()
    except Exception:  # if the meta device is not the cause, the second call raises too
        return factory()


def from_factory(text: str, dtype: torch.dtype | None, make: Make) -> tuple[nn.Module, Any]:
    """Call the factory that `text` names; return its module, and its loss or None."""
    factory = spec.named(text, "--model")
    with contract.naming(text, "make a model"):
        module, loss = contract.model_and_loss(make(factory), text)
    return (module if dtype is None else module.to(dtype)), loss


def called_data(text: str, examples: int) -> Any:
    """Call the function that --data names, with the batch size, or without arguments if it takes none."""
    function = spec.named(text, "--data")
    sized = contract.misfit(function, (examples,))
    if sized and contract.misfit(function, ()):
        raise BadInput(f"{text} is called with the batch size alone, which does not fit its arguments: {sized}.")
    with contract.naming(text, f"make a batch of {examples}"):
        return function() if sized else function(examples)


def training_part(made: Any, text: str) -> Any:
    """Return the training loader, if the function that --data names returned a mapping of loaders as for `compare`.

    Raises:
        BadInput: it returned a tuple of loaders.
    """
    if isinstance(made, Mapping) and not isinstance(made.get("train", Tensor()), Tensor):
        return made["train"]
    if isinstance(made, tuple) and any(isinstance(part, DataLoader) for part in made):
        raise BadInput(f'{text} returned a tuple of loaders: return the training loader, or {{"train": ..., ...}}.')
    return made


def _batch_of(text: str, examples: int, dtype: torch.dtype | None) -> tuple[Any, Callable[[], Iterable[Any]] | None]:
    """Call the function that --data names; return a batch, and a function that returns all of them if known."""
    made = called_data(text, examples)
    loader = training_part(made, text)
    if loader is made and not isinstance(made, DataLoader):
        return cast(made, dtype), None
    contract.check_loader(loader, f"what {text} returns")
    return cast(Batches(loader).at(Key(0), 0), dtype), lambda: (cast(batch, dtype) for batch in loader)


def dtypes(objective: Objective) -> str:
    """Return the dtypes of the weights, such as "bfloat16 and float32", sorted by bytes, the most first."""
    sizes: dict[str, int] = {}
    for parameter in objective.model.parameters():
        name = str(parameter.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + parameter.nbytes
    return " and ".join(sorted(sizes, key=lambda name: -sizes[name]))
