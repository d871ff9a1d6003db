"""What a training step of the paper's models costs, by forecast from their configurations: nothing runs.

gradcost reproduce panchal2025 --costs -o FOLDER --page PAGE.md        some minutes; the same command resumes
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch

from gradcost.core.errors import BadInput
from gradcost.core.files import write_whole
from gradcost.papers.panchal2025.cost_models import COST_MODELS, CostModel
from gradcost.papers.panchal2025.methods import Settings, method
from gradcost.planning.forecasts import Forecasts
from gradcost.training.optimizers import AdamW

METHODS = ("BP-Vanilla", "BP-Checkpointing", "FmAD-Vanilla", "MeZO", "FmAD-Multiple")
SETTINGS = Settings(probes=4)  # directions of FmAD-Multiple, as many as share one forward pass
EAGER, FUSED = "eager", "sdpa"  # transformers' names of attention that stores all scores, and of torch's kernels
FILE = "costs.jsonl"


class CostKey(NamedTuple):
    """What a forecast is of."""

    model: str
    trained: str
    attention: str
    method: str


@dataclass(frozen=True)
class CostRecord:
    """The forecast of a step, or the reason why there is none.

    Args:
        model: the name of the model.
        trained: which weights are trained, and how the others are stored.
        attention: transformers' `attn_implementation`.
        method: the name of the method in the paper.
        estimator: its estimator.
        dtype: the type of the weights that are not trained.
        batch: the batch, in words.
        weights: number of trained weights.
        refusal: why there is no forecast; None if there is one.
        peak: the most bytes of a step at once.
        breakdown: these bytes by purpose.
        flops: FLOPs of a step.
        forward: FLOPs of a forward pass.
        seconds: processor time of the forecast.
        torch: the version of torch.
    """

    model: str
    trained: str
    attention: str
    method: str
    estimator: str
    dtype: str
    batch: str
    weights: int
    refusal: str | None = None
    peak: int = 0
    breakdown: Mapping[str, int] = field(default_factory=dict)
    flops: int = 0
    forward: int = 0
    seconds: float = 0.0
    torch: str = torch.__version__

    @property
    def key(self) -> CostKey:
        """What the forecast is of."""
        return CostKey(self.model, self.trained, self.attention, self.method)

    @property
    def forwards(self) -> float:
        """FLOPs of a step, in forward passes."""
        return self.flops / self.forward

    @property
    def beyond(self) -> int:
        """The bytes at the peak without parameters, buffers, batch and the optimizer's state."""
        fixed = ("parameters", "buffers", "inputs", "optimizer state")
        return self.peak - sum(self.breakdown.get(purpose, 0) for purpose in fixed)


def read_costs(folder: Path) -> list[CostRecord]:
    """Return the forecasts in a folder, in the order of the file; an incomplete last line is left out.

    Raises:
        BadInput: another line is damaged.
    """
    path = folder / FILE
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    names = {each.name for each in fields(CostRecord)}
    found = []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            if set(values) != names:
                raise ValueError("other fields than those of a forecast")
            found.append(CostRecord(**values))
        except (ValueError, TypeError, RecursionError) as error:
            raise BadInput(f"{path}, line {number}: {error}. Delete the file and forecast again.") from error
    return found


def forecast_costs(
    folder: Path,
    models: Iterable[CostModel] = COST_MODELS,
    on_progress: Callable[[CostKey], None] = lambda key: None,
    chosen: Sequence[str] = METHODS,
) -> list[CostRecord]:
    """Forecast a step of each method on each model with both kinds of attention, except what the folder has already.

    The optimizer is AdamW; its state is part of the peak. The forecasts are for a CPU: there the peak is exact.

    Args:
        folder: the folder of the records. Each forecast is written as soon as it is there.
        models: the models.
        on_progress: called before each forecast.
        chosen: the names of the methods.
    Returns:
        All records of the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = {record.key for record in read_costs(folder)}
    _end_with_a_whole_line(folder / FILE)
    for model in models:
        for attention in (EAGER, FUSED):
            keys = [CostKey(model.name, model.trained, attention, name) for name in chosen]
            missing = [key for key in keys if key not in known]
            if not missing:
                continue
            forecasts = Forecasts(*model.make(attention), AdamW(1e-3), "cpu")
            for key in missing:
                on_progress(key)
                record = _forecast(model, key, forecasts)
                with (folder / FILE).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(record), sort_keys=True) + "\n")
    return read_costs(folder)


def _forecast(model: CostModel, key: CostKey, forecasts: Forecasts) -> CostRecord:
    start = time.process_time()
    estimator = method(key.method, SETTINGS).estimator
    found = forecasts.of(estimator)
    facts = CostRecord(
        model=key.model,
        trained=key.trained,
        attention=key.attention,
        method=key.method,
        estimator=repr(estimator),
        dtype=model.dtype,
        batch=model.batch,
        weights=forecasts.objective.dimension,
    )
    if isinstance(found, str):
        return replace(facts, refusal=found)
    return replace(
        facts,
        peak=found.peak,
        breakdown=dict(found.breakdown),
        flops=found.flops,
        forward=found.forward,
        seconds=round(time.process_time() - start, 1),
    )


def _end_with_a_whole_line(path: Path) -> None:
    """Remove what an interrupted process wrote of its last line."""
    if path.is_file():
        data = path.read_bytes()
        if not data.endswith(b"\n") and data:
            if not data.startswith(b"{"):
                raise BadInput(f"{path} is not a file of forecasts: choose another folder.")
            write_whole(path, data[: data.rfind(b"\n") + 1])
