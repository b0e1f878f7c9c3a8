"""What the page says first, in a handful of figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rnn2bin.evaluation.html.networks import measured
from rnn2bin.evaluation.html.speed import fastest, rival
from rnn2bin.evaluation.html.words import NONE, Report, Scale, duration, finite, get, percent, significant, size, whole


@dataclass(frozen=True)
class Tile:
    label: str
    value: str
    about: str


def tiles(report: Report) -> list[Tile]:
    """Metric, loss with its interval, weights read, size, speed and time: those that were measured."""
    found = [_metric(report), _lost(report), _read(report), _size(report), _speed(report), _took(report)]
    return [tile for tile in found if tile and tile.value != NONE]


def _metric(report: Report) -> Tile:
    scale = Scale.of(report)
    value = get(report, measured(report) or "binary", "metric")
    return Tile(scale.label, scale.value(value), f"float network: {scale.value(get(report, 'teacher', 'metric'))}")


def _lost(report: Report) -> Tile | None:
    scale, value, ends = Scale.of(report), get(report, "drop", "value"), get(report, "drop", "ci95")
    if not finite(value):
        return None
    unit, sign = " points" if scale.factor == 100 else "", -1 if value < 0 else 1
    lo, hi = sorted(sign * end for end in ends) if ends and all(map(finite, ends)) else (None, None)
    about = f"95%: {scale.number(lo)} to {scale.number(hi)}" if ends else "no interval"
    return Tile("better by" if value < 0 else "worse by", scale.number(abs(value)) + unit, about)


def _read(report: Report) -> Tile:
    density = get(report, "density") or {}
    ours, dense = density.get("bytes_per_step"), density.get("dense_bytes_per_step")
    about = f"{size(ours)} of {size(dense)} a step" if finite(ours) and finite(dense) else "of a step’s"
    return Tile("weights read", percent(density.get("weights_touched")), about)


def _size(report: Report) -> Tile:
    return Tile("size", size(get(report, "size", "packed_bytes")), f"source file: {size(get(report, 'size', 'source_bytes'))}")


def _speed(report: Report) -> Tile | None:
    row = fastest(report)
    if row is None:
        return None
    rivals: dict[str, Any] = row.get("rivals") or {}
    timed = {name: one for name, one in rivals.items() if finite(one.get("us_per_step"))}
    about = "a step, on one core"
    if timed:
        name = min(timed, key=lambda name: timed[name]["us_per_step"])
        about = f"a step; {rival(name)}: {significant(timed[name]['us_per_step'], 2)} µs"
    return Tile("speed", f"{significant(row['us_per_step'], 2)} µs", about)


def _took(report: Report) -> Tile:
    return Tile("conversion", duration(get(report, "cost", "seconds")), f"{whole(get(report, 'cost', 'steps'))} training steps")
