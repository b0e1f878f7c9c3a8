"""What the page draws beyond the report's own numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    """Decisions of every gate along one sequence. rows: (label, bits (T, H)); tokens name the T steps, where there are any."""

    tokens: Sequence[str] | None
    rows: Sequence[tuple[str, NDArray[Any]]]


@dataclass(frozen=True)
class Figures:
    """What the page draws beyond the report's own numbers."""

    histograms: Sequence[Histogram] = ()
    heatmap: Heatmap | None = None
