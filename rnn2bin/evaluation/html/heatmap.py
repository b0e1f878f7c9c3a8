"""Decisions along one sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rnn2bin.evaluation.html.figures import Heatmap
from rnn2bin.evaluation.html.words import NONE, percent

MAX_UNITS, MAX_STEPS = 64, 96  # more cannot be told apart on a page
MAP_WIDTH = 940


def _heat_panel(label: str, bits: NDArray[Any], units: int, *, steps: int) -> dict[str, Any]:
    """One gate of one layer: evenly spread units, the often open ones on top. The path is in cells, one unit high, runs joined."""
    bits = np.asarray(bits)[:steps] != 0  # (T, H)
    hidden = bits.shape[1]
    units = max(units, hidden)
    shown = bits[:, np.unique(np.linspace(0, hidden - 1, min(MAX_UNITS, hidden)).astype(int))] if hidden else bits
    shown = shown[:, np.argsort(-shown.mean(0), kind="stable")] if shown.size else shown
    ends = np.diff(np.pad(shown.astype(np.int8), ((1, 1), (0, 0))), axis=0)  # (T + 1, units): +1 a run opens, -1 it closes
    unit, start = np.nonzero(ends.T == 1)
    stop = np.nonzero(ends.T == -1)[1]
    path = "".join(f"M{x} {y}h{right - x}v1h{x - right}z" for x, y, right in zip(start, unit, stop, strict=True))
    return {
        "label": label,
        "path": path,
        "steps": shown.shape[0],
        "units": shown.shape[1],
        "hidden": units,
        "open": percent(float(bits.mean())) if bits.size else NONE,
    }


def visible(token: str) -> str:
    """A token as an axis can show it."""
    shown = token.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")
    return shown if len(shown) <= 9 else shown[:8] + "…"


def heatmap(heatmap: Heatmap) -> dict[str, Any] | None:
    """Panels and the axis they share; None where there is nothing to draw."""
    most = MAX_STEPS if heatmap.tokens is None else min(MAX_STEPS, len(heatmap.tokens))  # what follows the last token is padding
    panels = [_heat_panel(label, bits, units, steps=most) for label, bits, units in heatmap.rows]
    steps = max((panel["steps"] for panel in panels), default=0)
    if not steps:
        return None
    cell = min(28.0, MAP_WIDTH / steps)
    tokens = [visible(str(token)) for token in list(heatmap.tokens)[:steps]] if heatmap.tokens is not None else None
    labels = tokens or [str(step) if step % 10 == 0 else "" for step in range(steps)]
    long = max((len(token) for token in tokens or []), default=0) > 1
    axis = [(round((index + 0.5) * cell, 1), text) for index, text in enumerate(labels) if text]
    cut = any(panel["hidden"] > panel["units"] for panel in panels)
    # narrow panels stand side by side, each with its own axis
    small = bool(panels) and steps * cell <= MAP_WIDTH / 3
    drawn = steps * cell if small else MAP_WIDTH
    shape = {
        "small": small,
        "drawn": drawn,
        "cell": cell,
        "width": MAP_WIDTH,
        "axis": axis,
        "turned": long,
        "tokens": bool(tokens),
        "cut": cut,
    }
    title = "" if heatmap.section == "main" else heatmap.section
    return {"title": title, "panels": panels, **shape}
