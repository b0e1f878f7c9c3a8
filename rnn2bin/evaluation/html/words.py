"""Numbers in words, and the one sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

Report = dict[str, Any]

NONE = "–"
LABELS = {
    "bits_per_token": "bits per token",
    "accuracy": "accuracy",
    "sequence_accuracy": "whole sequences right",
    "agreement": "agreement with the teacher",
    "mse": "mean squared error",
    "cosine": "cosine similarity",
}
GATE_NAMES = {"i": "input", "f": "forget", "o": "output", "r": "reset", "z": "update", "g": "global"}


def finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)


def get(report: Any, *path: str) -> Any:
    """The value at a path of keys, None wherever the path ends early."""
    for key in path:
        report = report.get(key) if isinstance(report, dict) else None
    return report


def is_share(name: str) -> bool:
    """Whether a metric is a share, to be read in percent."""
    return name in ("accuracy", "agreement") or name.endswith(("_accuracy", "_agreement", "_rate", "_right"))


def words(name: str) -> str:
    return LABELS.get(name, name.replace("_", " "))


def significant(value: float, digits: int = 4) -> str:
    """1234.5 -> 1234, 0.00012 -> 0.00012, 1.2e-07 -> 1.2e-7; never an exponent where plain digits are as short."""
    text = f"{value:.{digits}g}"
    if "e" not in text:
        return text.replace("-", "−")
    mantissa, exponent = text.split("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−")


def fixed(value: float, decimals: int) -> str:
    text = f"{value:.{decimals}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def percent(share: Any) -> str:
    """41 %, and 0.4 % or 99.6 % where whole numbers would say none or all."""
    if not finite(share):
        return NONE
    percent = 100 * share
    near_end = 0 < percent < 1 or 99 < percent < 100
    return f"{fixed(percent, 1 if near_end else 0)}%"


def size(count: Any) -> str:
    if not finite(count):
        return NONE
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{significant(count / size, 3)} {unit}"
    return f"{count:.0f} bytes"


def whole(count: Any) -> str:
    return f"{count:,.0f}" if finite(count) else NONE


def duration(seconds: Any) -> str:
    if not finite(seconds):
        return NONE
    if seconds < 90:
        return f"{significant(seconds, 2)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


@dataclass(frozen=True)
class Scale:
    """How values and differences of the report's metric are written: in percent and points, or as they are."""

    name: str
    label: str
    factor: float
    decimals: int | None  # None: significant digits, for metrics without a natural size (mse)

    @classmethod
    def of(cls, report: Report) -> Scale:
        name = str(get(report, "metric", "name") or "metric")
        label = str(get(report, "metric", "label") or words(name))
        factor = 100.0 if is_share(name) else 1.0
        if not (is_share(name) or name in ("bits_per_token", "cosine")):
            return cls(name, label, factor, None)
        least = 1 if is_share(name) else 3
        ends: Sequence[Any] = get(report, "drop", "ci95") or ()
        width = factor * abs(ends[1] - ends[0]) if len(ends) == 2 and all(map(finite, ends)) else 0.0
        # the first digit of the interval's width is the last that says anything
        return cls(name, label, factor, min(6, max(least, -math.floor(math.log10(width)))) if width else least)

    def number(self, value: Any) -> str:
        """A value or difference without its unit."""
        if not finite(value):
            return NONE
        return significant(value, 3) if self.decimals is None else fixed(self.factor * value, self.decimals)

    def value(self, value: Any) -> str:
        return self.number(value) + ("%" if self.factor == 100 and finite(value) else "")

    @property
    def lost(self) -> str:
        """What a difference is counted in: "points of accuracy", "bits per token", "of cosine similarity"."""
        if self.factor == 100:
            return f"points of {self.label}"
        return self.label if self.name == "bits_per_token" else f"of {self.label}"


def sentence(report: Report) -> str:
    """What was lost, with its 95 % interval, and what share of the weights is still read; one sentence in plain words."""
    scale, drop, density = Scale.of(report), get(report, "drop"), get(report, "density", "weights_touched")
    reading = f", reading {percent(density)} of the weights" if finite(density) else ""
    if not finite(get(drop, "value")):
        return f"What binary gates cost was not measured{reading}."
    gained = drop["value"] < 0
    amount = scale.number(abs(drop["value"]))
    return f"Binary gates {'gained' if gained else 'cost'} {amount} {scale.lost}{_interval(drop, scale, gained=gained)}{reading}."


def _interval(drop: Report, scale: Scale, *, gained: bool) -> str:
    """ " (95% interval 0.1 to 1.5)" in the sense of the sentence, and what it means where it holds 0."""
    ends = drop.get("ci95")
    if not ends or not all(map(finite, ends)):
        return ""
    lo, hi = (-ends[1], -ends[0]) if gained else ends
    unclear = ", so possibly nothing" if lo <= 0 <= hi and (lo or hi) else ""
    return f" (95% interval {scale.number(lo)} to {scale.number(hi)}{unclear})"
