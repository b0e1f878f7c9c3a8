"""Where each network stands on the metric: a dot each, the interval of what was lost on the binary one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rnn2bin.evaluation.html.axes import Axis
from rnn2bin.evaluation.html.networks import NETWORKS, lost_by, measured, networks_of
from rnn2bin.evaluation.html.words import Report, Scale, finite, get, words

WIDTH, LEFT, RIGHT, ROW, BOTTOM = 640, 150, 70, 24, 34
NEAR = ("teacher", "soft_student", "binary", "native", "float_same_compute")
FAR = 8  # a control so many times further off than the networks that are near lies on the edge, with an arrow


@dataclass(frozen=True)
class Standing:
    height: int
    rows: list[dict[str, Any]]
    ticks: list[tuple[float, str]]
    teacher: float | None
    describe: str
    width: int = WIDTH
    left: int = LEFT
    right: int = WIDTH - RIGHT


def standing(report: Report) -> Standing | None:
    """None where fewer than two networks were measured."""
    scale = Scale.of(report)
    values = {key: one["metric"] for key, one in networks_of(report).items() if finite(one.get("metric"))}
    if len(values) < 2:
        return None
    bounds = _interval(report)
    axis = _axis(values, bounds)
    rows = []
    for index, (key, value) in enumerate(values.items()):
        inside = axis.lo <= value <= axis.hi
        rows.append(
            {
                "name": NETWORKS.get(key, (words(key), ""))[0],
                "style": "ours" if key in ("binary", "native") else "teacher" if key == "teacher" else "other",
                "y": ROW * index + ROW / 2,
                "x": axis.at(min(max(value, axis.lo), axis.hi)),
                "edge": None if inside else ("right" if value > axis.hi else "left"),
                "text": scale.value(value),
                "interval": (axis.at(bounds[0]), axis.at(bounds[1])) if bounds and key == measured(report) else None,
            }
        )
    teacher = values.get("teacher")
    return Standing(
        height=ROW * len(rows) + BOTTOM,
        rows=rows,
        ticks=[(axis.at(tick), scale.value(tick) if scale.factor == 100 else f"{tick:g}") for tick in axis.ticks()],
        teacher=axis.at(teacher) if teacher is not None else None,
        describe="; ".join(f"{row['name']} {row['text']}" for row in rows),
    )


def _interval(report: Report) -> tuple[float, float] | None:
    """The drop's interval as values of the metric, around the teacher's."""
    ends, teacher = get(report, "drop", "ci95"), get(report, "teacher", "metric")
    key = measured(report)
    if not ends or not all(map(finite, ends)) or not finite(teacher) or key is None or lost_by(report, report[key]) is None:
        return None
    sign = -1 if get(report, "metric", "higher_is_better") else 1
    lo, hi = sorted(teacher + sign * end for end in ends)
    return lo, hi


def _axis(values: dict[str, float], bounds: tuple[float, float] | None) -> Axis:
    near = [value for key, value in values.items() if key in NEAR] + list(bounds or ())
    lo, hi = min(near, default=0.0), max(near, default=1.0)
    reach = FAR * ((hi - lo) or abs(hi) / 100 or 1e-9)
    shown = [value for value in values.values() if lo - reach <= value <= hi + reach]
    lo, hi = min([lo, *shown]), max([hi, *shown])
    pad = 0.08 * ((hi - lo) or abs(hi) or 1.0)
    return Axis(lo - pad, hi + pad, LEFT, WIDTH - RIGHT)
