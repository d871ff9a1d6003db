"""Peak memory beyond the weights against the FLOPs of a step, for every kind of gradient.

    python benchmarks/memory_against_flops.py docs > table.md

The model has 16 Llama-like layers, with a language-model head or a classification head (two classes). Either all
weights are trained or LoRA (r = 8) alone. All figures are forecasts, which compute no numbers; tests compare
forecasts with real steps byte by byte. Writes docs/images/memory-against-flops.svg and prints the table of
docs/memory.md. Needs the extras report and transformers.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradcost import CentralDifference, Jvp, Objective, Probing, Rademacher, Reverse
from gradcost.checkpointing import Blocks, Schedule, Segments
from gradcost.estimators.estimator import Estimator
from gradcost.planning.forecast import Forecast
from gradcost.planning.forecasts import Forecasts
from gradcost.planning.within import MemoryTradeoff

LAYERS, WIDTH, VOCABULARY, BATCH, LENGTH = 16, 256, 2048, 4, 128
COLOURS = {
    "backprop": "#1b1b1b",
    "Segments(1..16)": "#4c78a8",
    "Within (best schedules)": "#72b7b2",
    "per-block checkpointing": "#54a24b",
    "forward mode, n one by one": "#e45756",
    "forward mode, n together": "#f58518",
    "two-sided difference": "#b279a2",
}
HEADS = {"words": "language-model head", "classes": "classification head"}
ROWS = {  # the rows of the table, by method and label in the figure
    "Segments(1..16)": "Segments {}",
    "forward mode, n one by one": "forward mode, {} directions, one pass each",
    "forward mode, n together": "forward mode, {} directions in one pass",
    "two-sided difference": "two-sided difference, {} directions",
}


def problem(head: str, trained: str) -> tuple[Objective, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        pad_token_id=0,
        use_cache=False,
    )
    with torch.device("meta"):
        model: nn.Module = (LlamaForCausalLM if head == "words" else LlamaForSequenceClassification)(config)
        if trained == "LoRA":
            from peft import LoraConfig, get_peft_model

            kind = "CAUSAL_LM" if head == "words" else "SEQ_CLS"
            targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
            model = get_peft_model(model, LoraConfig(task_type=kind, r=8, target_modules=targets))  # type: ignore[arg-type]
    words = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    labels = words if head == "words" else torch.zeros(BATCH, dtype=torch.int64)
    batch = {"input_ids": words, "labels": labels}
    return Objective(model, lambda model, batch: model(**batch).loss), batch


def methods() -> Iterator[tuple[str, str, Estimator]]:
    yield "backprop", "", Reverse()
    yield "per-block checkpointing", "", Reverse(Blocks())
    for count in range(1, LAYERS + 1):
        yield "Segments(1..16)", str(count), Reverse(Segments(count))
    for n in (1, 4, 16):
        yield "forward mode, n one by one", f"n = {n}", Probing(Jvp(), probes=n)
        if n > 1:
            yield "forward mode, n together", f"n = {n}", Probing(Jvp(n), probes=n)
        yield "two-sided difference", f"n = {n}", Probing(CentralDifference(), Rademacher(), n)


def rows(head: str, trained: str) -> Iterator[dict[str, Any]]:
    print(f"{HEADS[head]}, {trained}", file=sys.stderr)
    objective, batch = problem(head, trained)

    def row(kind: str, label: str, forecast: Forecast) -> dict[str, Any]:
        panel = f"{HEADS[head]}, {trained} trained"
        return {
            "panel": panel,
            "method": kind,
            "label": label,
            "mib": forecast.beyond / 2**20,
            "forwards": forecast.forwards,
        }

    forecasts = Forecasts(objective, batch, None, "cpu")
    for kind, label, estimator in methods():
        forecast = forecasts.of(estimator)
        assert not isinstance(forecast, str), forecast
        yield row(kind, label, forecast)
    points = MemoryTradeoff(objective, batch).points
    for point in points[:: max(1, len(points) // 10)]:
        forecast = forecasts.of(Reverse(Schedule(point.items)))
        assert not isinstance(forecast, str), forecast
        if forecast.forwards < 8:
            yield row("Within (best schedules)", "", forecast)


def draw_chart(rows: list[dict[str, Any]]) -> Any:
    import altair as alt

    x = alt.X("forwards:Q", title="FLOPs of a step, in forwards", scale=alt.Scale(type="log", nice=False))
    y = alt.Y("mib:Q", title="peak beyond the weights, MiB", scale=alt.Scale(type="log", nice=False))
    colour = alt.Color("method:N", title=None, scale=alt.Scale(domain=list(COLOURS), range=list(COLOURS.values())))
    chart = alt.Chart(alt.Data(values=rows)).encode(x=x, y=y, color=colour)
    lines = chart.mark_line(strokeWidth=1.5, opacity=0.6).encode(order="forwards:Q")
    dots = chart.mark_point(filled=True, size=45).encode(
        shape=alt.Shape("method:N", title=None, scale=alt.Scale(domain=list(COLOURS))), tooltip=["label:N"]
    )
    labels = chart.mark_text(dy=-8, fontSize=9).encode(text="label:N")
    labels = labels.transform_filter(alt.datum.method != "Segments(1..16)")
    layers = alt.layer(lines, dots, labels).properties(width=380, height=280)
    return layers.facet(facet=alt.Facet("panel:N", title=None), columns=2)


def main(folder: Path) -> None:
    every = [row for head in HEADS for trained in ("all weights", "LoRA") for row in rows(head, trained)]
    draw_chart(every).save(str(folder / "images" / "memory-against-flops.svg"))
    kinds = list(COLOURS)
    lines = ["| | " + " | ".join(dict.fromkeys(row["panel"] for row in every)) + " |", "|:---|" + "---:|" * 4]
    cells: dict[tuple[str, str], list[str]] = {}
    for row in every:
        if row["method"] == "Within (best schedules)" or (
            row["method"] == "Segments(1..16)" and int(row["label"]) not in (1, 2, 4, 8, 16)
        ):
            continue
        name = ROWS.get(row["method"], row["method"]).format(row["label"].removeprefix("n = "))
        name = re.sub(r", 1 directions.*", ", 1 direction", name)
        cells.setdefault((row["method"], name), []).append(f"{row['mib']:.1f} / {row['forwards']:.2f}")
    for panel in dict.fromkeys(row["panel"] for row in every):
        best = min(
            (row for row in every if row["panel"] == panel and row["method"] == "Within (best schedules)"),
            key=lambda row: row["mib"],
        )
        cells.setdefault(("Within (best schedules)", "Within, least memory in the figure"), []).append(
            f"{best['mib']:.1f} / {best['forwards']:.2f}"
        )
    for (_, name), figures in sorted(cells.items(), key=lambda cell: kinds.index(cell[0][0])):
        lines.append(f"| {name} | " + " | ".join(figures) + " |")
    print("\n".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
