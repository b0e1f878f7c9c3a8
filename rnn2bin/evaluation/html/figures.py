"""What the page draws beyond the report's numbers; report.json keeps it under `figures`, so that the page can be drawn again from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Histogram:
    """Gate values on held-out data: the teacher's (before) and the student's soft gates (after). edges (K+1,), counts (K,)."""

    layer: str
    direction: str
    gate: str
    edges: NDArray[Any]
    before: NDArray[Any]
    after: NDArray[Any]


@dataclass(frozen=True)
class Heatmap:
    """Decisions of the gates of one section along one sequence. rows: (label, bits (T, H'), H), H' of the H units; tokens name the T
    steps, where there are any."""

    section: str
    tokens: Sequence[str] | None
    rows: Sequence[tuple[str, NDArray[Any], int]]


@dataclass(frozen=True)
class Figures:
    """What the page draws beyond the report's own numbers."""

    histograms: Sequence[Histogram] = ()
    heatmaps: Sequence[Heatmap] = ()

    def to_dict(self) -> dict[str, Any]:
        """The `figures` of report.json: bits as a text of 0 and 1 for each unit, in the order of its steps."""
        return {
            "histograms": [
                {
                    "layer": one.layer,
                    "direction": one.direction,
                    "gate": one.gate,
                    "range": [float(one.edges[0]), float(one.edges[-1])],
                    "before": [int(count) for count in one.before],
                    "after": [int(count) for count in one.after],
                }
                for one in self.histograms
            ],
            "heatmaps": [
                {
                    "section": one.section,
                    "tokens": None if one.tokens is None else list(one.tokens),
                    "rows": [
                        {"gate": label, "of_units": of, "units": ["".join("01"[int(bit)] for bit in unit) for unit in np.asarray(bits).T]}
                        for label, bits, of in one.rows
                    ],
                }
                for one in self.heatmaps
            ],
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any] | None) -> Figures:
        """Of a report's `figures`; none where it has none. KeyError, TypeError or ValueError where they have another shape."""
        content = content or {}
        return cls([_histogram(one) for one in content.get("histograms") or ()], [_heatmap(one) for one in content.get("heatmaps") or ()])


def _histogram(one: dict[str, Any]) -> Histogram:
    before, after = (np.array(one[name], np.float64) for name in ("before", "after"))
    if before.shape != after.shape or before.ndim != 1:
        raise ValueError("a histogram's counts before and after differ in number")
    lo, hi = map(float, one["range"])
    return Histogram(str(one["layer"]), str(one["direction"]), str(one["gate"]), np.linspace(lo, hi, before.size + 1), before, after)


def _heatmap(one: dict[str, Any]) -> Heatmap:
    rows = [(str(row["gate"]), _bits(row["units"]), int(row["of_units"])) for row in one["rows"]]
    tokens = one.get("tokens")
    return Heatmap(str(one["section"]), None if tokens is None else [str(token) for token in tokens], rows)


def _bits(units: Sequence[str]) -> NDArray[Any]:
    """(T, H') of H' texts of T digits."""
    return np.array([[digit == "1" for digit in unit] for unit in units], dtype=np.int8).reshape(len(units), -1).T
