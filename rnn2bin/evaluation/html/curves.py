"""Curves over training steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rnn2bin.evaluation.html.axes import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis
from rnn2bin.evaluation.html.words import Report, Scale, finite, get, significant

MAX_POINTS = 400  # of a curve: as many as there are pixels


@dataclass(frozen=True)
class Line:
    label: str
    style: str  # a class of the template: "soft", "hard", "plain", …
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    title: str
    describe: str
    lines: list[dict[str, Any]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    guide: tuple[float, str] | None = None
    note: str = ""


def points(training: Iterable[Report], key: str, *, positive: bool = False) -> list[tuple[float, float]]:
    """(step, value) wherever both were logged, thinned to what can be seen; the last point always stays."""
    logged = [(p["step"], p[key]) for p in training if finite(p.get("step")) and finite(p.get(key))]
    points = [(step, value) for step, value in logged if value > 0 or not positive]
    every = math.ceil(len(points) / MAX_POINTS) or 1
    return points[::-every][::-1]


def _range(lines: Sequence[Line], guide: float | None, *, log: bool) -> tuple[float, float, bool]:
    """The shown values' range, and whether some values lie outside: a start far off would flatten everything after it."""
    values = np.array([y for line in lines for _, y in line.points] + ([guide] if guide is not None else []))
    lo, hi = float(values.min()), float(values.max())
    near = [float(x) for x in np.quantile(values, (0.05, 0.95))]
    cut = not log and values.size >= 10 and hi - lo > 10 * (near[1] - near[0]) > 0
    if cut:
        room = 0.75 * (near[1] - near[0])
        lo, hi = max(lo, near[0] - room), min(hi, near[1] + room)
    if hi == lo:
        lo, hi = (lo / 2, hi * 2) if log else (lo - (abs(lo) or 1) / 10, hi + (abs(hi) or 1) / 10)
    pad = 0.06 * (hi - lo)
    return (lo / 1.15, hi * 1.15, cut) if log else (lo - pad, hi + pad, cut)


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    log: bool = False,
    guide: tuple[float, str] | None = None,
    text: Callable[[float], str] = significant,
) -> Chart | None:
    """Lines over training steps; None where nothing was logged. `guide` is a level worth reaching."""
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    steps = [x for line in lines for x, _ in line.points]
    lo, hi, cut = _range(lines, guide[0] if guide else None, log=log)
    across = Axis(min(steps), max(steps) if max(steps) > min(steps) else min(steps) + 1, LEFT, WIDTH - RIGHT)
    up = Axis(lo, hi, HEIGHT - BOTTOM, TOP, log)
    drawn = [
        {
            "label": line.label,
            "style": line.style,
            "path": _path([(across.at(x), up.at(y)) for x, y in line.points]),
            "dot": _last(line, across, up),
        }
        for line in lines
    ]
    ends = "; ".join(f"{line.label} {text(line.points[0][1])} at first, {text(line.points[-1][1])} at last" for line in lines)
    return Chart(
        title=title,
        describe=f"{title} by training step. {ends}.",
        lines=drawn,
        x_ticks=[(across.at(x), _steps(x)) for x in across.ticks() if x == int(x)],
        y_ticks=[(up.at(y), text(y)) for y in up.ticks()],
        guide=(up.at(guide[0]), guide[1]) if guide else None,
        note="Values far outside the others run off the panel." if cut else "",
    )


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + " ".join(f"{x:g},{y:g}" for x, y in points)


def _last(line: Line, across: Axis, up: Axis) -> tuple[float, float] | None:
    """Where the line ends; nowhere when that is off the panel."""
    x, y = line.points[-1]
    return (across.at(x), up.at(y)) if up.lo <= y <= up.hi else None


def _steps(step: float) -> str:
    return f"{significant(step / 1000)}k" if step >= 1000 else f"{step:.0f}"


def charts(report: Report) -> list[Chart]:
    training, scale = report.get("training") or [], Scale.of(report)
    teacher = report.get("training_teacher")  # on the validation data the curves are measured on
    unit = "%" if scale.factor == 100 else ""
    metric = chart(
        scale.label[:1].upper() + scale.label[1:],
        [Line("soft gates", "soft", points(training, "soft")), Line("hard gates", "hard", points(training, "hard"))],
        guide=(teacher, "teacher") if finite(teacher) else None,
        text=lambda value: significant(scale.factor * value) + unit,
    )
    share = lambda value: significant(100 * value) + "%"
    wanted = get(report, "provenance", "recipe", "budget", "density")
    budget = (wanted, "budget") if finite(wanted) else None
    annealing = [Line(key, style, points(training, key, positive=True)) for key, style in (("temperature", "first"), ("slope", "second"))]
    saturation = [Line("share of gates near 0 or 1", "third", points(training, "saturation"))]
    charts = (
        metric,
        chart("Temperature and slope (log scale)", annealing, log=True),
        chart("Weights read, hard gates", [Line("share of the weights", "third", points(training, "density"))], guide=budget, text=share),
        chart("Training loss", [Line("loss", "first", points(training, "loss"))]),
        chart("Saturation", saturation, text=share),
    )
    return [chart for chart in charts if chart]
