"""What a step reads."""

from __future__ import annotations

from typing import Any

from rnn2bin.evaluation.html.words import Report, finite, get, percent, size, whole

DENSITY = {
    "weights_touched": ("Weights", "share of all recurrent-layer weights that a step reads"),
    "columns": ("Columns", "share of state units that are not 0, whose columns are read"),
    "candidate_rows": ("Candidate rows", "share of candidate rows that are computed"),
}


def layers(report: Report) -> list[dict[str, Any]]:
    """One bar a layer and direction, in the network's order."""
    found = get(report, "density", "layers") or {}
    return [
        {
            "label": name if "." in name else f"{name}: output layer",
            "about": "",
            "width": round(100 * min(1.0, max(0.0, one["weights_touched"])), 1),
            "text": percent(one["weights_touched"]),
            "detail": f"of {whole(one['weights'])} weights" if finite(one.get("weights")) else "",
        }
        for name, one in found.items()
        if isinstance(one, dict) and finite(one.get("weights_touched"))
    ]


def density(report: Report) -> list[dict[str, Any]]:
    """One bar a row, all of them shares of the dense network."""
    density = get(report, "density") or {}
    rows = [(label, about, density.get(key), "") for key, (label, about) in DENSITY.items()]
    ours, dense = density.get("bytes_per_step"), density.get("dense_bytes_per_step")
    if finite(ours) and finite(dense) and dense:
        rows.append(
            ("Bytes per step", "weights read from memory, against the dense network", ours / dense, f"{size(ours)} of {size(dense)}")
        )
    return [
        {"label": label, "about": about, "width": round(100 * min(1.0, max(0.0, share)), 1), "text": percent(share), "detail": detail}
        for label, about, share, detail in rows
        if finite(share)
    ]
