"""Where values lie in a drawing."""

from __future__ import annotations

import math
from dataclasses import dataclass

# viewBox of every chart, and the room of its axes
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 230, 54, 12, 10, 34

FRAME = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic range and where it lies in the drawing."""

    lo: float
    hi: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        lo, hi, value = (math.log(x) if self.log else x for x in (self.lo, self.hi, value))
        return round(self.start + (self.end - self.start) * (value - lo) / ((hi - lo) or 1), 1)

    def ticks(self) -> list[float]:
        return _log_ticks(self.lo, self.hi) if self.log else _linear_ticks(self.lo, self.hi)


def _linear_ticks(lo: float, hi: float) -> list[float]:
    step = 10 ** math.floor(math.log10((hi - lo) / 4))
    step *= next(k for k in (1, 2, 5, 10) if (hi - lo) / (k * step) <= 6)
    return [round(k * step, 12) for k in range(math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9) + 1)]


def _log_ticks(lo: float, hi: float) -> list[float]:
    decades = range(math.floor(math.log10(lo)), math.ceil(math.log10(hi)) + 1)
    marks = (1, 2, 5) if len(decades) < 4 else (1,)
    return [tick for power in decades for k in marks if lo <= (tick := k * 10.0**power) <= hi]
