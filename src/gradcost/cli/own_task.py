"""Make a task from the options --model, --data and --metric of `gradcost compare`."""

from __future__ import annotations

from typing import Any

from gradcost.cli import spec
from gradcost.core.errors import BadInput
from gradcost.tasks import from_loaders


def own_task(
    model: str, data: str | None, *, batch: int | None, metric: str | None, lower_is_better: bool | None
) -> tuple[Any, str, str, None]:
    """Return (task, its name, the name of its model, None) for --model FILE.py:MAKE --data FILE.py:LOADERS.

    Args:
        model: names a function that returns a new model, or (model, loss).
        data: names a function that returns {"train": ..., "validation": ..., "test": ...}.
        batch: the batch size for `data`. None: its own default.
        metric: the name of a metric, or of a function. None: the loss.
        lower_is_better: whether smaller values of the function are better.
    """
    if data is None:
        raise BadInput(
            f"--model {model} is a model of your own, which needs data: add --data FILE.py:LOADERS, a function that "
            'returns {"train": ..., "validation": ..., "test": ...}. `gradcost init` writes an example.'
        )
    make, loaders = spec.named(model, "--model"), spec.named(data, "--data")
    files = {text.rpartition(":")[0] for text in (model, data, metric or "") if ":" in text}
    if len(files) > 1:
        raise BadInput(f"{' and '.join(sorted(files))} are two files, and worker processes import one: use one file.")
    measure = "loss" if metric is None else spec.named(metric, "--metric") if ":" in metric else metric
    task = from_loaders(make, loaders=loaders, batch=batch, metric=measure, lower_is_better=lower_is_better)
    return task, task.name, repr(task.model), None
