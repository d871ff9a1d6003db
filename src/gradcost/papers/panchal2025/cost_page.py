"""The Markdown page with the costs of a training step of the paper's models, from the records of the forecasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from gradcost.core.units import number
from gradcost.papers.claims import markdown_table
from gradcost.papers.panchal2025.cost import EAGER, METHODS, SETTINGS, CostKey, CostRecord
from gradcost.papers.panchal2025.cost_models import COST_MODELS
from gradcost.results.wording import DASH, flops, listed, size

REPRODUCED = 879_526_633_088  # FLOPs of a step: another group's count for RoBERTa-base, LoRA r = 1, batch 40 x 64
Case = tuple[str, str]  # the name of a model, and which weights are trained
_PURPOSES = ("parameters", "optimizer state", "gradients", "saved activations", "tangents and noise", "temporaries")


class CostTable:
    """Records of forecasts, and the choice of the better kind of attention per method.

    records: from `cost.forecast_costs`.
    """

    def __init__(self, records: Sequence[CostRecord]) -> None:
        self.records = {record.key: record for record in records}
        self.cases = list(dict.fromkeys((record.model, record.trained) for record in records))

    def eager(self, case: Case, method: str) -> CostRecord | None:
        """Return the forecast with attention that stores all scores; None if there is none."""
        found = self.records.get(CostKey(*case, EAGER, method))
        return None if found is None or found.refusal else found

    def best(self, case: Case, method: str) -> CostRecord | None:
        """Return the forecast with the smallest peak over the kinds of attention; None if there is none."""
        keys = [key for key in self.records if (key.model, key.trained, key.method) == (*case, method)]
        found = [self.records[key] for key in keys if self.records[key].refusal is None]
        return min(found, key=lambda record: record.peak, default=None)

    def refusals(self) -> list[str]:
        """Return a sentence per failed forecast."""
        return [
            f"{record.model} ({record.trained}), {record.method}, attention `{record.attention}`: {record.refusal}"
            for record in self.records.values()
            if record.refusal
        ]


def cost_page(records: Sequence[CostRecord], command: str, folder: str) -> str:
    """Return the page as Markdown.

    Args:
        records: from `cost.forecast_costs`.
        command: the command that writes the page.
        folder: the name of the folder of the records, or a link to it.
    """
    table = CostTable(records)
    minutes = sum(record.seconds for record in records) / 60
    parts = [
        "# Panchal et al. 2025: what a step costs on the paper's models",
        "Every number of this page is a forecast from the configuration of a model: no step ran, and no weights were "
        f"loaded. The forecasts took {minutes:.0f} minutes of one core. Records: {folder}.\n\n"
        f"```bash\n{command}\n```",
        "## At a glance\n\n" + "\n".join(f"- {line}" for line in _glance(table)),
        *cost_sections(records),
    ]
    return "\n\n".join(parts) + "\n"


def cost_sections(records: Sequence[CostRecord]) -> Iterator[str]:
    """Yield the tables of memory and FLOPs, the breakdown and the conditions, each with its heading.

    Args:
        records: from `cost.forecast_costs`.
    """
    table = CostTable(records)
    yield "## Peak memory of a step, attention `eager` for all"
    yield "The paper's public code has this policy. Everything is included: weights, optimizer's state and batch."
    yield markdown_table(("model", "trained", *METHODS), [_row(table.eager, case, _peak) for case in table.cases])
    yield "## Peak memory of a step, each method with its better kind of attention"
    yield (
        "The smaller peak of `eager` and of `sdpa`, torch's `scaled_dot_product_attention`. An asterisk is `sdpa`. "
        "Dropout of the attention's weights (BERT and RoBERTa) keeps backprop from the kernel without scores."
    )
    yield markdown_table(("model", "trained", *METHODS), [_row(table.best, case, _marked) for case in table.cases])
    yield "## Memory beyond weights, optimizer's state and batch"
    yield "This is what a method adds to the model. Each method with its better kind of attention."
    yield markdown_table(("model", "trained", *METHODS), [_row(table.best, case, _beyond) for case in table.cases])
    yield "## FLOPs of a step"
    yield "In forward passes of the batch; the last column is one forward pass. Attention as in the table above."
    headers = ("model", "trained", *METHODS, "forward pass")
    yield markdown_table(headers, [_flops_row(table, case) for case in table.cases])
    yield "## What the peak consists of"
    yield "GiB, each method with its better kind of attention. Buffers and the batch are below 0.2 GiB."
    rows = [row for case in table.cases for row in _breakdowns(table, case)]
    yield markdown_table(("model", "trained", "method", *_PURPOSES), rows)
    yield "## Conditions"
    yield "\n".join(f"- {line}" for line in (*_conditions(table), *table.refusals(), *_missing(table)))


def _glance(table: CostTable) -> Iterator[str]:
    yield from (_range(table, *line) for line in _RATIOS)
    check = table.eager((_CHECKED, _RANK_1), METHODS[0])
    if check is not None:
        yield (
            f"An independent reproduction of the paper counted {REPRODUCED:,} FLOPs per step of backprop for "
            f"{_CHECKED} ({_RANK_1}, 40 texts of 64 tokens). The forecast is "
            f"{check.flops:,}, {100 * abs(check.flops / REPRODUCED - 1):.3f}% from it."
        )
    yield (
        "Whether a method reaches the same accuracy, and after how many steps, does not follow from these numbers: "
        "the study of a small model measures it."
    )


_CHECKED, _RANK_1 = "RoBERTa-base", "LoRA, rank 1"
# words, method, reference, quantity
_RATIOS = (
    ("the peak of {0} is {1} times that of {2}", "BP-Vanilla", "MeZO", "peak"),
    ("the peak of {0} is {1} times that of {2}", "BP-Checkpointing", "MeZO", "peak"),
    ("the peak of {0} is {1} times that of {2}", "BP-Checkpointing", "FmAD-Vanilla", "peak"),
    ("{0} needs {1} times the FLOPs of {2} for a step", "BP-Checkpointing", "MeZO", "flops"),
    ("{0} needs {1} times the FLOPs of {2} for a step", "FmAD-Multiple", "BP-Checkpointing", "flops"),
)


def _range(table: CostTable, words: str, name: str, other: str, quantity: str) -> str:
    ratios = []
    for case in table.cases:
        one, two = table.best(case, name), table.best(case, other)
        if one is not None and two is not None:
            ratios.append(getattr(one, quantity) / getattr(two, quantity))
    low, high = (number(end(ratios), 3) for end in (min, max)) if ratios else (DASH, DASH)
    sentence = words.format(name, low if low == high else f"{low} to {high}", other)
    return f"Over the models, {sentence}."


def _row(
    choose: Callable[[Case, str], CostRecord | None], case: Case, cell: Callable[[CostRecord], str]
) -> list[str]:
    return [*case, *(DASH if (found := choose(case, name)) is None else cell(found) for name in METHODS)]


def _peak(record: CostRecord) -> str:
    return size(record.peak)


def _marked(record: CostRecord) -> str:
    return size(record.peak) + ("" if record.attention == EAGER else " *")


def _beyond(record: CostRecord) -> str:
    return size(record.beyond)


def _flops_row(table: CostTable, case: Case) -> list[str]:
    found = [table.best(case, name) for name in METHODS]
    forward = next((flops(each.forward) for each in found if each is not None), DASH)
    return [*case, *(DASH if each is None else f"{each.forwards:.2f}" for each in found), forward]


def _breakdowns(table: CostTable, case: Case) -> Iterator[list[str]]:
    for name in METHODS:
        found = table.best(case, name)
        if found is not None:
            yield [*case, name, *(f"{found.breakdown.get(purpose, 0) / 2**30:.2f}" for purpose in _PURPOSES)]


def _missing(table: CostTable) -> Iterator[str]:
    left = [
        f"{model.name} ({model.trained}): {listed(names)}"
        for model in COST_MODELS
        if (names := [name for name in METHODS if table.best((model.name, model.trained), name) is None])
    ]
    if left:
        yield f"Not forecast, for want of time; the same command adds them: {'; '.join(left)}."


def _conditions(table: CostTable) -> Iterator[str]:
    for case in table.cases:
        found = next((one for key, one in table.records.items() if (key.model, key.trained) == case), None)
        if found is not None:
            yield f"{found.model}, {found.trained}: {found.weights:,} trained weights, {found.dtype}, {found.batch}."
    yield (
        "Batches and lengths are those of the paper's public code, which sets one length for all data sets of texts. "
        "Qwen2-VL: images of 480 x 640 pixels, a common size in the data set, give 391 visual tokens."
    )
    yield (
        "BP-Checkpointing recomputes each block. The gradient of a parameter is freed after its update by AdamW. "
        "MeZO and forward mode regenerate directions from a seed."
    )
    yield (
        f"FmAD-Multiple has {SETTINGS.probes} directions, which share a forward pass where the code of a model "
        "permits it. Layers in 4 bits and the images of Qwen2-VL do not; there it takes one direction after another. "
        "More directions need more FLOPs, and no more memory."
    )
    yield (
        "A layer in 4 bits has half a byte per weight and one scale per 64 weights; its weights in 16 bits exist "
        "while its product is computed, and are not saved. The paper's public code has another layout, GPTQ."
    )
    yield (
        "The forecasts are for a CPU, where the peak of tensors is exact. Workspaces inside kernels and the rounding "
        "of a GPU's allocator come on top."
    )
