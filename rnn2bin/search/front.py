"""What may be lost, what may be read, and which of several networks is the one that is wanted: the one home of that decision.

`rnn2bin search` chooses a recipe by it, `convert` with both limits a network. Figures are those of the validation part; what is held out
for the report is seen by neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

LEAST = 1e-3  # a limit below it is taken for it where distances from limits are compared


@dataclass(frozen=True)
class Found:
    """A network measured: relative drop of the metric with the upper end of its 95% interval, and share of the layers' weights read."""

    drop: float
    density: float
    highest: float
    what: Any = field(default=None, compare=False)  # what was measured: a trial, a training

    def said(self) -> str:
        return f"a relative drop of {self.drop:.4g} at density {self.density:.3f}"


@dataclass(frozen=True)
class Limits:
    max_drop: float | None = None
    max_density: float | None = None

    @property
    def given(self) -> bool:
        return self.max_drop is not None or self.max_density is not None

    def keeps(self, found: Found) -> bool:
        return self.excess(found) <= 0

    def surely(self, found: Found) -> bool:
        """Whether the drop is kept by the whole of its interval: what is chosen here is judged again, on data not seen before."""
        return self.keeps(found) and (self.max_drop is None or found.highest <= self.max_drop)

    def excess(self, found: Found) -> float:
        """How far outside the limits, as a share of the limit that is missed most; 0 inside."""
        pairs = [(found.drop, self.max_drop), (found.density, self.max_density)]
        return max([0.0, *((value - limit) / max(limit, LEAST) for value, limit in pairs if limit is not None)])

    def said(self) -> str:
        parts = [
            *([f"a relative drop of {self.max_drop:g}"] if self.max_drop is not None else []),
            *([f"density {self.max_density:g}"] if self.max_density is not None else []),
        ]
        return " at ".join(parts)


def front(found: Sequence[Found]) -> list[Found]:
    """Those that no other beats in both figures, the fastest first."""
    best: list[Found] = []
    for one in sorted(found, key=lambda f: (f.density, f.drop)):
        if not best or one.drop < best[-1].drop:
            best.append(one)
    return best


def choose(found: Sequence[Found], limits: Limits) -> tuple[Found, bool]:
    """The fastest network that keeps the limits, and True; the nearest to them, and False where none does.

    The fastest of those that surely keep them; where none does so surely, the most accurate of those that keep them. Without limits the
    one on the front that is nearest to its ideal, the least drop at the least density found.
    """
    if not limits.given:
        return _nearest_to_ideal(front(found)), True
    kept = [one for one in found if limits.keeps(one)]
    if not kept:
        return min(found, key=lambda one: (limits.excess(one), one.density)), False
    sure = [one for one in kept if limits.surely(one)]
    return (min(sure, key=lambda one: (one.density, one.drop)) if sure else min(kept, key=lambda one: (one.drop, one.density))), True


def _nearest_to_ideal(best: Sequence[Found]) -> Found:
    spread = lambda values: (min(values), (max(values) - min(values)) or 1.0)
    (drop, drops), (density, densities) = spread([f.drop for f in best]), spread([f.density for f in best])
    return min(best, key=lambda f: ((f.drop - drop) / drops) ** 2 + ((f.density - density) / densities) ** 2)


def missed(nearest: Found, limits: Limits) -> str:
    """Why nothing was chosen, what came nearest, and what to try: the line of exit code 5."""
    tries = [
        *([f"--max-drop {_above(nearest.drop)}"] if limits.max_drop is not None and nearest.drop > limits.max_drop else []),
        *([f"--max-density {_above(nearest.density)}"] if limits.max_density is not None else []),
    ]
    return (
        f"accuracy budget missed: no network kept {limits.said()} on the validation part; the nearest has {nearest.said()}; "
        f"nothing was written; try {' or '.join(tries)}, or more steps (train.steps)"
    )


def _above(value: float) -> str:
    """A limit that this value keeps, in two digits or three."""
    digits = 4
    return f"{round(value * 1.05 + 0.5 * 10**-digits, digits):g}"
