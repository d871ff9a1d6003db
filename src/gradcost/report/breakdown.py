"""The figure of peak memory by purpose, for plans and reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradcost.report.theme import BYTES, NEUTRAL, Figure, Theme
from gradcost.results.wording import DASH, size

_ORDER = ("parameters", "buffers", "inputs", "optimizer state", "gradients", "saved activations")
PURPOSES = (*_ORDER, "tangents and noise", "temporaries")
# Not the colours of the methods: steps from dark to light, so that lightness alone tells neighbours apart.
COLOURS = ("#45505e", "#5d6a7b", "#77869a", "#8f9db0", "#8a7a96", "#a596b3", "#bfb3c9", "#d0c8d8")


def bars(theme: Theme, rows: Sequence[dict[str, Any]], budget: int | None, caption: str) -> Figure:
    """Return a figure with one bar per method; the parts of a bar sum to the peak.

    Args:
        theme: colours and shapes of the methods.
        rows: one dictionary per method: "method" (label), "breakdown" (bytes by purpose), "peak" (bytes), "operator"
            and "module" (what runs at the peak; may be empty).
        budget: bytes, weights included, drawn as a dashed line. None draws no line.
        caption: caption of the figure.
    Returns:
        Figure "memory".
    """
    alt = theme.alt
    purposes = [purpose for purpose in PURPOSES if any(row["breakdown"].get(purpose) for row in rows)]
    pieces = []
    for row in rows:
        start = 0
        for purpose in purposes:
            nbytes = row["breakdown"].get(purpose, 0)
            piece = {"method": row["method"], "purpose": purpose, "start": start, "end": start + nbytes}
            pieces.append(piece | {"bytes": size(nbytes), "share": nbytes / row["peak"]})
            start += nbytes
    totals = [
        {"method": row["method"], "end": row["peak"], "text": size(row["peak"]), "where": _where(row)} for row in rows
    ]
    axis_end = 1.18 * max(budget or 0, *(row["peak"] for row in rows))
    y = alt.Y("method:N", sort=[row["method"] for row in rows], axis=None).scale(paddingInner=0, paddingOuter=0)
    axis = alt.Axis(labelExpr=BYTES, values=_byte_ticks(axis_end))
    scale = alt.Scale(domain=[0, axis_end], nice=False)
    x = alt.X("start:Q", title="bytes allocated at the peak of a step", scale=scale, axis=axis)
    legend = alt.Legend(title=None, orient="bottom", columns=2, symbolType="square")
    colour = alt.Color("purpose:N", sort=purposes, legend=legend)
    colour = colour.scale(domain=purposes, range=[COLOURS[PURPOSES.index(purpose)] for purpose in purposes])
    bar = theme.plain(pieces).mark_bar(height=10, yOffset=8)
    bar = bar.encode(y=y, x=x, x2="end:Q", color=colour, opacity=theme.opacity(0.9))
    bar = bar.encode(tooltip=["method:N", "purpose:N", "bytes:N", theme.tip("share", ".1%", "of the peak")])
    label = theme.plain(totals).mark_text(align="left", baseline="middle", dy=-7, dx=1, limit=300)
    label = label.encode(y=y, x=alt.value(0), text="method:N", opacity=theme.opacity(1, 0.35))
    value = theme.plain(totals).mark_text(align="left", baseline="middle", dx=6, dy=8, fontWeight=600)
    value = value.encode(y=y, x=alt.X("end:Q", scale=scale), text="text:N", color=alt.ColorValue(NEUTRAL))
    value = value.encode(
        opacity=theme.opacity(1, 0.35), tooltip=["method:N", alt.Tooltip("where:N", title="reached")]
    )
    layers = [bar, label, value]
    if budget is not None:
        rule = theme.plain([{"start": budget, "label": size(budget)}]).mark_rule(strokeDash=[4, 4], color=NEUTRAL)
        layers.append(rule.encode(x=x, tooltip=alt.Tooltip("label:N", title="budget")))
    return theme.figure("memory", "Memory at the peak by purpose", caption, layers, height=38 * len(rows))


def _where(row: dict[str, Any]) -> str:
    """Return where the peak occurs, such as "at aten::mm in blocks.3"."""
    if not row["operator"]:
        return DASH
    return f"at {row['operator']}" + (f" in {row['module']}" if row["module"] else "")


def _byte_ticks(high: float) -> list[float]:
    """Return the ticks of a linear axis of bytes from 0 to `high`: up to seven multiples of a power of two."""
    step = 1.0
    while high / step > 6:
        step *= 2
    return [step * i for i in range(int(high / step) + 1)]
