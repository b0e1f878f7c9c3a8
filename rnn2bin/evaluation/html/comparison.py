"""Two reports side by side, for people: one page, one table at a terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rnn2bin.evaluation.html.axes import Axis
from rnn2bin.evaluation.html.page import template
from rnn2bin.evaluation.html.terminal import columns, terminal
from rnn2bin.evaluation.html.words import NONE, Report, Scale, duration, finite, percent, significant, size, whole

NAMES = {
    "teacher": "teacher",
    "binary": "binary",
    "native": "binary, in C",
    "soft_student": "soft student",
    "threshold_only": "threshold only",
    "float_same_compute": "float, same training",
    "drop": "worse by",
    "drop_relative": "worse by, relative",
    "weights_touched": "weights read",
    "layers_read": "layers’ weights read",
    "bytes_per_step": "bytes a step",
    "packed_bytes": "size",
    "seconds": "conversion took",
    "steps": "training steps",
}
METRICS = ("teacher", "binary", "native", "soft_student", "threshold_only", "float_same_compute")
SHARES = ("weights_touched", "layers_read", "drop_relative")
PLOT_WIDTH, PLOT_LEFT, PLOT_RIGHT, PLOT_ROW = 640, 50, 70, 30


@dataclass(frozen=True)
class Line:
    name: str
    a: str
    b: str
    difference: str
    better: str  # "a", "b" or ""
    bars: tuple[float, float] | None  # widths, where the figures are amounts


def lines(found: Report) -> list[Line]:
    """Every figure in words."""
    scale = Scale.of({"metric": found["metric"], "drop": {"ci95": next((ends for ends in found["drop_ci95"] if ends), None)}})
    return [_line(figure, scale, found["drop_ci95"]) for figure in found["figures"]]


def _line(figure: Report, scale: Scale, intervals: list[Any]) -> Line:
    name = str(figure["name"])
    write = lambda value: _written(name, value, scale)
    a, b = write(figure["a"]), write(figure["b"])
    if name == "drop":
        a, b = (f"{text}{_interval(ends, scale)}" for text, ends in zip((a, b), intervals, strict=True))
    amounts = name not in METRICS and name not in ("drop", "drop_relative") and finite(figure["a"]) and finite(figure["b"])
    most = max(figure["a"], figure["b"]) if amounts else 0
    bars = (round(100 * figure["a"] / most, 1), round(100 * figure["b"] / most, 1)) if amounts and most > 0 else None
    label = NAMES.get(name, name.replace("us_per_step", "a step,"))
    return Line(
        f"{label}, {scale.label}" if name in METRICS else label, a, b, _difference(name, figure, scale), figure["better"] or "", bars
    )


def _interval(ends: Any, scale: Scale) -> str:
    return f" ({scale.number(ends[0])} to {scale.number(ends[1])})" if ends and all(map(finite, ends)) else ""


def _written(name: str, value: Any, scale: Scale) -> str:
    if not finite(value):
        return NONE
    if name in METRICS:
        return scale.value(value)
    if name == "drop":
        return scale.number(value)
    if name in SHARES:
        return percent(value) if value >= 0 else "−" + percent(-value)
    if name in ("bytes_per_step", "packed_bytes"):
        return size(value)
    if name == "seconds":
        return duration(value)
    return f"{significant(value, 3)} µs" if name.startswith("us_per_step") else whole(value)


def _difference(name: str, figure: Report, scale: Scale) -> str:
    """B against A: a difference of metrics and losses, a ratio of amounts."""
    value = figure["difference"]
    if not finite(value):
        return NONE
    sign = "+" if value > 0 else ""
    if name in METRICS or name == "drop":
        return sign + scale.number(value)
    if name == "drop_relative":
        return f"{sign}{significant(100 * value, 2)} points".replace("-", "−")
    return f"{significant(figure['b'] / figure['a'], 3)} ×" if figure["a"] else NONE


def verdict(found: Report) -> str:
    """One sentence: whether the losses can be told apart, and who reads less."""
    figures = {figure["name"]: figure for figure in found["figures"]}
    drop, read = figures.get("drop"), figures.get("weights_touched")
    parts = []
    if drop and finite(drop["difference"]):
        if found["overlap"]:
            parts.append("The intervals of what was lost overlap: these numbers do not tell the two apart")
        elif drop["difference"]:
            parts.append(
                f"{'B' if drop['better'] == 'b' else 'A'} lost less{'' if found['overlap'] is None else ', beyond both intervals'}"
            )
        else:
            parts.append("Both lost the same")
    if read and finite(read["difference"]) and read["difference"]:
        ours, theirs = percent(read["a"]), percent(read["b"])
        parts.append(f"{'B' if read['better'] == 'b' else 'A'} reads less of the weights (A {ours}, B {theirs})")
    return ("; ".join(parts) or "Nothing was measured in both") + "."


def knobs(found: Report) -> list[tuple[str, str, str]]:
    said = lambda value: NONE if value is None else " ".join(str(value).split())
    return [(name, said(a), said(b)) for name, (a, b) in found["recipe"].items()]


def _plot(found: Report) -> dict[str, Any] | None:
    """Both losses with their intervals on one axis; 0 is the teacher."""
    drop = next((figure for figure in found["figures"] if figure["name"] == "drop"), None)
    if drop is None or not (finite(drop["a"]) and finite(drop["b"])):
        return None
    scale = Scale.of({"metric": found["metric"]})
    ends = [list(one) if one and all(map(finite, one)) else [] for one in found["drop_ci95"]]
    values = [0.0, drop["a"], drop["b"], *ends[0], *ends[1]]
    pad = 0.08 * ((max(values) - min(values)) or 1.0)
    axis = Axis(min(values) - pad, max(values) + pad, PLOT_LEFT, PLOT_WIDTH - PLOT_RIGHT)
    rows = []
    for index, (name, key) in enumerate((("A", "a"), ("B", "b"))):
        place = {"y": PLOT_ROW * index + PLOT_ROW / 2, "x": axis.at(drop[key]), "interval": [axis.at(end) for end in ends[index]] or None}
        rows.append({"name": name, "text": scale.number(drop[key]), **place})
    ticks = [(axis.at(tick), significant(scale.factor * tick)) for tick in axis.ticks()]
    shape = {"width": PLOT_WIDTH, "height": 2 * PLOT_ROW + 44, "left": PLOT_LEFT, "right": PLOT_WIDTH - PLOT_RIGHT}
    return {**shape, "rows": rows, "ticks": ticks, "zero": axis.at(0.0), "unit": f"worse by, {scale.lost}"}


def render_comparison(found: Report) -> str:
    """One HTML page of a `compare` document, in the report's own style."""
    return template("compare.html.j2", found=found, lines=lines(found), verdict=verdict(found), knobs=knobs(found), plot=_plot(found))


def render_comparison_table(found: Report) -> str:
    """The same at a terminal; warnings stand first, so that nobody misses them."""
    head = ["", "A", "B", "B against A"]
    marks = {"a": "A", "b": "B", "": ""}
    cells = [[line.name, line.a, line.b, f"{line.difference} {marks[line.better]:1}"] for line in lines(found)]
    names = [f"{letter}: {one['path']}" for letter, one in zip("AB", found["reports"], strict=True)]
    table = columns([head, *cells])
    recipe = columns([["recipe", "A", "B"], *map(list, knobs(found))]) if found["recipe"] else ["the recipes are the same"]
    warnings = [f"WARNING: {text}" for text in found["warnings"]]
    return "\n".join([*map(terminal, [*warnings, *names]), "", *table, "", *recipe, "", terminal(verdict(found))])
