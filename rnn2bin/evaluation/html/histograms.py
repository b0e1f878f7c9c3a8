"""Gate values before and after, one small drawing a gate."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rnn2bin.evaluation.html.figures import Histogram
from rnn2bin.evaluation.html.gates import gate_name
from rnn2bin.evaluation.html.words import percent

HIST_WIDTH, HIST_HEIGHT = 200, 90


def histogram(histogram: Histogram) -> dict[str, Any]:
    """Bars as one path each; height is the square root of a bin's share, so that thin bins show beside the peaks at 0 and 1."""
    edges = np.asarray(histogram.edges, float)
    x = HIST_WIDTH * (edges - edges[0]) / ((edges[-1] - edges[0]) or 1)
    shares = [_share(counts) for counts in (histogram.before, histogram.after)]
    top = max(float(share.max(initial=0)) for share in shares) or 1.0
    before, after = (_bars(x, HIST_HEIGHT * (1 - np.sqrt(share / top))) for share in shares)
    name = " ".join(part for part in (str(histogram.layer), histogram.direction) if part)
    ends = [percent(float(share[:1].sum() + share[-1:].sum())) for share in shares]
    return {
        "layer": name,
        "gate": gate_name(histogram.gate),
        "before": before,
        "after": after,
        "lo": edges[0],
        "hi": edges[-1],
        "describe": f"{ends[0]} of values in the outermost bins before, {ends[1]} after",
    }


def _share(counts: NDArray[Any]) -> NDArray[np.float64]:
    counts = np.asarray(counts, np.float64)
    return counts / (counts.sum() or 1.0)


def _bars(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    """A step outline closed along the base line. x (K+1,), y (K,)."""
    steps = "".join(f"V{top:.1f}H{right:.1f}" for top, right in zip(y, x[1:], strict=True))
    return f"M{x[0]:.1f},{HIST_HEIGHT}{steps}V{HIST_HEIGHT}Z"
