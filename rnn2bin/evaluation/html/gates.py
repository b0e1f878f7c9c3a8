"""The table of gates."""

from __future__ import annotations

from typing import Any

from rnn2bin.evaluation.html.words import NONE, Report, finite, get, percent, significant

GATE_NAMES = {"i": "input", "f": "forget", "o": "output", "r": "reset", "z": "update", "g": "global"}


def gate_name(gate: str) -> str:
    return f"{gate} ({GATE_NAMES[gate]})" if gate in GATE_NAMES else gate


def _level(quantiles: Any) -> str:
    """ "0.72 (0.41 to 0.93)": the median unit and the 10th and 90th percentile; one number where they agree."""
    if not isinstance(quantiles, (list, tuple)) or not quantiles or not all(map(finite, quantiles)):
        return NONE
    lo, middle, hi = (significant(q, 2) for q in (quantiles[0], quantiles[len(quantiles) // 2], quantiles[-1]))
    return middle if lo == hi else f"{middle} ({lo} to {hi})"


def gates(report: Report) -> list[dict[str, Any]]:
    return [
        {
            "layer": str(gate.get("layer", "")),
            "direction": str(gate.get("direction") or ""),
            "gate": gate_name(str(gate.get("gate", ""))),
            "binary": bool(gate.get("binary")),
            "copies": int(gate.get("copies") or 1),
            "shared": int(gate.get("shared") or 1),
            "open": percent(gate.get("open_rate")),
            "width": round(100 * gate["open_rate"], 1) if finite(gate.get("open_rate")) else None,
            "lo": _level(get(gate, "levels", "lo")),
            "hi": _level(get(gate, "levels", "hi")),
        }
        for gate in report.get("gates") or []
    ]
