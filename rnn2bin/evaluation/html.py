"""report.json as a page, a model card and a terminal table. Words, numbers and geometry here; the page's shape in report.html.j2.

Nothing is measured here: every number comes from the report, and what the report leaves null is shown as a dash or left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, TypeGuard

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

Report = dict[str, Any]

MAX_UNITS, MAX_STEPS = 64, 96  # of a heat map: more cannot be told apart on a page
MAX_POINTS = 400  # of a curve: as many as there are pixels

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
# key in the report, or in its controls -> name and what it is
NETWORKS = {
    "teacher": ("teacher", "the float network as it was given"),
    "threshold_only": ("threshold only", "the teacher with every gate rounded to 0 or 1, not trained further"),
    "soft_student": ("soft student", "the trained network before its gates are rounded"),
    "binary": ("binary", "every decision exactly 0 or 1: what ships"),
    "native": ("binary, in C", "the same weights, run by the C kernel"),
    "sharpened_sigmoid": ("sharpened sigmoid", "control: the teacher with steeper gates, not trained further"),
    "random_gates": ("random gates", "control: the same open rates, decided by chance"),
    "float_same_compute": ("float, same training", "control: the teacher fine-tuned with the same data and steps"),
}
DENSITY = {
    "weights_touched": ("Weights", "share of all recurrent-layer weights that a step reads"),
    "columns": ("Columns", "share of state units that are not 0, whose columns are read"),
    "candidate_rows": ("Candidate rows", "share of candidate rows that are computed"),
}


# --- what is drawn -------------------------------------------------------------------------------------------------------


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


# --- numbers in words ----------------------------------------------------------------------------------------------------


def _finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _get(report: Any, *path: str) -> Any:
    """The value at a path of keys, None wherever the path ends early."""
    for key in path:
        report = report.get(key) if isinstance(report, dict) else None
    return report


def _is_share(name: str) -> bool:
    """Whether a metric is a share, to be read in percent."""
    return name in ("accuracy", "agreement") or name.endswith(("_accuracy", "_agreement", "_rate", "_right"))


def _words(name: str) -> str:
    return LABELS.get(name, name.replace("_", " "))


def significant(value: float, digits: int = 4) -> str:
    """1234.5 -> 1234, 0.00012 -> 0.00012, 1.2e-07 -> 1.2e-7; never an exponent where plain digits are as short."""
    text = f"{value:.{digits}g}"
    if "e" not in text:
        return text.replace("-", "−")
    mantissa, exponent = text.split("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−")


def _fixed(value: float, decimals: int) -> str:
    text = f"{value:.{decimals}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def _percent(share: Any) -> str:
    """41 %, and 0.4 % or 99.6 % where whole numbers would say none or all."""
    if not _finite(share):
        return NONE
    percent = 100 * share
    near_end = 0 < percent < 1 or 99 < percent < 100
    return f"{_fixed(percent, 1 if near_end else 0)}%"


def _size(count: Any) -> str:
    if not _finite(count):
        return NONE
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{significant(count / size, 3)} {unit}"
    return f"{count:.0f} bytes"


def _whole(count: Any) -> str:
    return f"{count:,.0f}" if _finite(count) else NONE


def _duration(seconds: Any) -> str:
    if not _finite(seconds):
        return NONE
    if seconds < 90:
        return f"{significant(seconds, 2)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


@dataclass(frozen=True)
class _Scale:
    """How values and differences of the report's metric are written: in percent and points, or as they are."""

    name: str
    label: str
    factor: float
    decimals: int | None  # None: significant digits, for metrics without a natural size (mse)

    @classmethod
    def of(cls, report: Report) -> _Scale:
        name = str(_get(report, "metric", "name") or "metric")
        label = str(_get(report, "metric", "label") or _words(name))
        factor = 100.0 if _is_share(name) else 1.0
        if not (_is_share(name) or name in ("bits_per_token", "cosine")):
            return cls(name, label, factor, None)
        least = 1 if _is_share(name) else 3
        ends: Sequence[Any] = _get(report, "drop", "ci95") or ()
        width = factor * abs(ends[1] - ends[0]) if len(ends) == 2 and all(map(_finite, ends)) else 0.0
        # the first digit of the interval's width is the last that says anything
        return cls(name, label, factor, min(6, max(least, -math.floor(math.log10(width)))) if width else least)

    def number(self, value: Any) -> str:
        """A value or difference without its unit."""
        if not _finite(value):
            return NONE
        return significant(value, 3) if self.decimals is None else _fixed(self.factor * value, self.decimals)

    def value(self, value: Any) -> str:
        return self.number(value) + ("%" if self.factor == 100 and _finite(value) else "")

    @property
    def lost(self) -> str:
        """What a difference is counted in: "points of accuracy", "bits per token", "of cosine similarity"."""
        if self.factor == 100:
            return f"points of {self.label}"
        return self.label if self.name == "bits_per_token" else f"of {self.label}"


def sentence(report: Report) -> str:
    """What was lost, with its 95 % interval, and what share of the weights is still read; one sentence in plain words."""
    scale, drop, density = _Scale.of(report), _get(report, "drop"), _get(report, "density", "weights_touched")
    reading = f", reading {_percent(density)} of the weights" if _finite(density) else ""
    if not _finite(_get(drop, "value")):
        return f"What binary gates cost was not measured{reading}."
    gained = drop["value"] < 0
    amount = scale.number(abs(drop["value"]))
    return f"Binary gates {'gained' if gained else 'cost'} {amount} {scale.lost}{_interval(drop, scale, gained=gained)}{reading}."


def _interval(drop: Report, scale: _Scale, *, gained: bool) -> str:
    """ " (95% interval 0.1 to 1.5)" in the sense of the sentence, and what it means where it holds 0."""
    ends = drop.get("ci95")
    if not ends or not all(map(_finite, ends)):
        return ""
    lo, hi = (-ends[1], -ends[0]) if gained else ends
    unclear = ", so possibly nothing" if lo <= 0 <= hi and (lo or hi) else ""
    return f" (95% interval {scale.number(lo)} to {scale.number(hi)}{unclear})"


# --- the table of networks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    key: str
    name: str
    about: str
    metric: str
    loss: str
    lost: str
    interval: str
    relative: str
    extra: tuple[str, ...]
    n: str


def _networks(report: Report) -> dict[str, Report]:
    """Every network that was measured, the four of the contract first, then native, then the other controls."""
    controls = dict(_get(report, "controls") or {})
    found = {"teacher": report.get("teacher"), "threshold_only": controls.pop("threshold_only", None)}
    found |= {key: report.get(key) for key in ("soft_student", "binary", "native")} | controls
    return {key: value for key, value in found.items() if isinstance(value, dict)}


def _extras(networks: dict[str, Report]) -> list[str]:
    """Names of the further metrics, in order of appearance."""
    return list(dict.fromkeys(name for network in networks.values() for name in network.get("extra") or {}))


def _extra(name: str, value: Any) -> str:
    if not _finite(value):
        return NONE if value is None else str(value)
    return f"{_fixed(100 * value, 1)}%" if _is_share(name) else significant(value)


def _lost(report: Report, network: Report) -> float | None:
    """The plain difference from the teacher, positive where the network is worse."""
    here, teacher = network.get("metric"), _get(report, "teacher", "metric")
    if not (_finite(here) and _finite(teacher)) or here is None:
        return None
    return float(teacher - here if _get(report, "metric", "higher_is_better") else here - teacher)


def _measured(report: Report, networks: dict[str, Report]) -> str | None:
    """Which network the report's drop is about: its own backend's choice may be the C kernel or torch."""
    losses = {key: _lost(report, networks[key]) for key in ("binary", "native") if key in networks}
    value = _get(report, "drop", "value")
    known = {key: abs(loss - value) for key, loss in losses.items() if loss is not None and _finite(value)}
    return min(known, key=lambda key: known[key]) if known else None


def _rows(report: Report) -> list[_Row]:
    scale, networks = _Scale.of(report), _networks(report)
    extras, measured = _extras(networks), _measured(report, networks)
    rows = []
    for key, network in networks.items():
        drop = _get(report, "drop") if key == measured else None
        ends, relative, lost = _get(drop, "ci95"), _get(drop, "relative"), _lost(report, network)
        name, about = NETWORKS.get(key, (_words(key), "control"))
        rows.append(
            _Row(
                key=key,
                name=name,
                about=about,
                metric=scale.value(network.get("metric")),
                loss=significant(network["loss"]) if _finite(network.get("loss")) else NONE,
                lost=NONE if key == "teacher" else scale.number(lost),
                interval=f"{scale.number(ends[0])} to {scale.number(ends[1])}" if ends else "",
                relative=f"{significant(100 * relative, 2)}% of the teacher’s" if _finite(relative) else "",
                extra=tuple(_extra(extra, (network.get("extra") or {}).get(extra)) for extra in extras),
                n=_whole(network.get("n")),
            )
        )
    return rows


# --- curves --------------------------------------------------------------------------------------------------------------

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


@dataclass(frozen=True)
class _Line:
    label: str
    style: str  # a class of the template: "soft", "hard", "plain", …
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class _Chart:
    title: str
    describe: str
    lines: list[dict[str, Any]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    guide: tuple[float, str] | None = None
    note: str = ""


def _points(training: Iterable[Report], key: str, *, positive: bool = False) -> list[tuple[float, float]]:
    """(step, value) wherever both were logged, thinned to what can be seen; the last point always stays."""
    logged = [(p["step"], p[key]) for p in training if _finite(p.get("step")) and _finite(p.get(key))]
    points = [(step, value) for step, value in logged if value > 0 or not positive]
    every = math.ceil(len(points) / MAX_POINTS) or 1
    return points[::-every][::-1]


def _range(lines: Sequence[_Line], guide: float | None, *, log: bool) -> tuple[float, float, bool]:
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


def _chart(
    title: str,
    lines: Sequence[_Line],
    *,
    log: bool = False,
    guide: tuple[float, str] | None = None,
    text: Callable[[float], str] = significant,
) -> _Chart | None:
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
    return _Chart(
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


def _last(line: _Line, across: Axis, up: Axis) -> tuple[float, float] | None:
    """Where the line ends; nowhere when that is off the panel."""
    x, y = line.points[-1]
    return (across.at(x), up.at(y)) if up.lo <= y <= up.hi else None


def _steps(step: float) -> str:
    return f"{significant(step / 1000)}k" if step >= 1000 else f"{step:.0f}"


def _charts(report: Report) -> list[_Chart]:
    training, scale = report.get("training") or [], _Scale.of(report)
    teacher = report.get("training_teacher")  # on the validation data the curves are measured on
    unit = "%" if scale.factor == 100 else ""
    metric = _chart(
        scale.label[:1].upper() + scale.label[1:],
        [_Line("soft gates", "soft", _points(training, "soft")), _Line("hard gates", "hard", _points(training, "hard"))],
        guide=(teacher, "teacher") if _finite(teacher) else None,
        text=lambda value: significant(scale.factor * value) + unit,
    )
    annealing = [_Line(key, style, _points(training, key, positive=True)) for key, style in (("temperature", "first"), ("slope", "second"))]
    saturation = [_Line("share of gates near 0 or 1", "third", _points(training, "saturation"))]
    charts = (
        metric,
        _chart("Temperature and slope (log scale)", annealing, log=True),
        _chart("Training loss", [_Line("loss", "first", _points(training, "loss"))]),
        _chart("Saturation", saturation, text=lambda value: significant(100 * value) + "%"),
    )
    return [chart for chart in charts if chart]


# --- gates: table, histograms, heat map ----------------------------------------------------------------------------------


def _gate_name(gate: str) -> str:
    return f"{gate} ({GATE_NAMES[gate]})" if gate in GATE_NAMES else gate


def _level(quantiles: Any) -> str:
    """ "0.72 (0.41 to 0.93)": the median unit and the 10th and 90th percentile; one number where they agree."""
    if not isinstance(quantiles, (list, tuple)) or not quantiles or not all(map(_finite, quantiles)):
        return NONE
    lo, middle, hi = (significant(q, 2) for q in (quantiles[0], quantiles[len(quantiles) // 2], quantiles[-1]))
    return middle if lo == hi else f"{middle} ({lo} to {hi})"


def _gates(report: Report) -> list[dict[str, Any]]:
    return [
        {
            "layer": str(gate.get("layer", "")),
            "direction": str(gate.get("direction") or ""),
            "gate": _gate_name(str(gate.get("gate", ""))),
            "binary": bool(gate.get("binary")),
            "copies": int(gate.get("copies") or 1),
            "open": _percent(gate.get("open_rate")),
            "width": round(100 * gate["open_rate"], 1) if _finite(gate.get("open_rate")) else None,
            "lo": _level(_get(gate, "levels", "lo")),
            "hi": _level(_get(gate, "levels", "hi")),
        }
        for gate in report.get("gates") or []
    ]


HIST_WIDTH, HIST_HEIGHT, MAP_WIDTH = 200, 90, 940


def _histogram(histogram: Histogram) -> dict[str, Any]:
    """Bars as one path each; height is the square root of a bin's share, so that thin bins show beside the peaks at 0 and 1."""
    edges = np.asarray(histogram.edges, float)
    x = HIST_WIDTH * (edges - edges[0]) / ((edges[-1] - edges[0]) or 1)
    shares = [_share(counts) for counts in (histogram.before, histogram.after)]
    top = max(float(share.max(initial=0)) for share in shares) or 1.0
    before, after = (_bars(x, HIST_HEIGHT * (1 - np.sqrt(share / top))) for share in shares)
    name = " ".join(part for part in (str(histogram.layer), histogram.direction) if part)
    ends = [_percent(float(share[:1].sum() + share[-1:].sum())) for share in shares]
    return {
        "layer": name,
        "gate": _gate_name(histogram.gate),
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


def _heat_panel(label: str, bits: NDArray[Any], *, steps: int) -> dict[str, Any]:
    """One gate of one layer: evenly spread units, the often open ones on top. The path is in cells, one unit high, runs joined."""
    bits = np.asarray(bits)[:steps] != 0  # (T, H)
    hidden = bits.shape[1]
    shown = bits[:, np.unique(np.linspace(0, hidden - 1, min(MAX_UNITS, hidden)).astype(int))] if hidden else bits
    shown = shown[:, np.argsort(-shown.mean(0), kind="stable")] if shown.size else shown
    ends = np.diff(np.pad(shown.astype(np.int8), ((1, 1), (0, 0))), axis=0)  # (T + 1, units): +1 a run opens, -1 it closes
    unit, start = np.nonzero(ends.T == 1)
    stop = np.nonzero(ends.T == -1)[1]
    path = "".join(f"M{x} {y}h{right - x}v1h{x - right}z" for x, y, right in zip(start, unit, stop, strict=True))
    return {
        "label": label,
        "path": path,
        "steps": shown.shape[0],
        "units": shown.shape[1],
        "hidden": hidden,
        "open": _percent(float(bits.mean())) if bits.size else NONE,
    }


def _visible(token: str) -> str:
    """A token as an axis can show it."""
    shown = token.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")
    return shown if len(shown) <= 9 else shown[:8] + "…"


def _heatmap(heatmap: Heatmap | None) -> dict[str, Any] | None:
    """Panels and the axis they share; None where there is nothing to draw."""
    if heatmap is None:
        return None
    most = MAX_STEPS if heatmap.tokens is None else min(MAX_STEPS, len(heatmap.tokens))  # what follows the last token is padding
    panels = [_heat_panel(label, bits, steps=most) for label, bits in heatmap.rows]
    steps = max((panel["steps"] for panel in panels), default=0)
    if not steps:
        return None
    cell = min(28.0, MAP_WIDTH / steps)
    tokens = [_visible(str(token)) for token in list(heatmap.tokens)[:steps]] if heatmap.tokens is not None else None
    labels = tokens or [str(step) if step % 10 == 0 else "" for step in range(steps)]
    long = max((len(token) for token in tokens or []), default=0) > 1
    axis = [(round((index + 0.5) * cell, 1), text) for index, text in enumerate(labels) if text]
    cut = any(panel["hidden"] > panel["units"] for panel in panels)
    return {"panels": panels, "cell": cell, "width": MAP_WIDTH, "axis": axis, "turned": long, "tokens": bool(tokens), "cut": cut}


# --- density, cost, provenance -------------------------------------------------------------------------------------------


def _density(report: Report) -> list[dict[str, Any]]:
    """One bar a row, all of them shares of the dense network."""
    density = _get(report, "density") or {}
    rows = [(label, about, density.get(key), "") for key, (label, about) in DENSITY.items()]
    ours, dense = density.get("bytes_per_step"), density.get("dense_bytes_per_step")
    if _finite(ours) and _finite(dense) and dense:
        rows.append(
            ("Bytes per step", "weights read from memory, against the dense network", ours / dense, f"{_size(ours)} of {_size(dense)}")
        )
    return [
        {"label": label, "about": about, "width": round(100 * min(1.0, max(0.0, share)), 1), "text": _percent(share), "detail": detail}
        for label, about, share, detail in rows
        if _finite(share)
    ]


def _ratio(part: Any, whole: Any) -> str:
    return f" ({significant(part / whole, 2)} × the source)" if _finite(part) and _finite(whole) and whole else ""


def _cost(report: Report) -> list[tuple[str, str]]:
    source, packed = (_get(report, "size", key) for key in ("source_bytes", "packed_bytes"))
    cost, parity = _get(report, "cost") or {}, _get(report, "parity") or {}
    around = _get(report, "density", "around") or None
    rows = [
        ("Source file", _size(source)),
        ("Packed weights", _size(packed) + _ratio(packed, source)),
        ("Weights around the layers, read whole", _whole(around)),
        ("Conversion took", _duration(cost.get("seconds"))),
        ("Training steps", _whole(cost.get("steps"))),
        ("Tokens or time steps seen", _whole(cost.get("tokens"))),
        ("Training speed, per second", _whole(cost.get("tokens_per_second"))),
        ("The teacher alone, per second", _whole(cost.get("teacher_tokens_per_second"))),
        ("C kernel against torch, largest difference", significant(parity["max_abs"], 2) if _finite(parity.get("max_abs")) else NONE),
        ("Steps compared", _whole(parity.get("steps"))),
        ("Decisions that flipped within rounding of 0", _whole(parity.get("flips_in_margin"))),
    ]
    return [(name, text) for name, text in rows if text != NONE]


PROVENANCE = {
    "source": "Source",
    "source_sha256": "SHA-256 of the source",
    "recipe": "Recipe",
    "seed": "Seed",
    "levels": "Levels",
    "data_free": "Data",
    "versions": "Versions",
}
LEVELS = {"learned": "learned: each unit has its own constant for an open gate", "strict": "strict: exactly 0 and 1"}


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, (list, tuple)) else str(value)


def _provenance(report: Report) -> list[tuple[str, str]]:
    given = dict(report.get("provenance") or {})
    if isinstance(given.get("data_free"), bool):
        given["data_free"] = "none given: sequences sampled from the teacher" if given["data_free"] else "given by the user"
    if given.get("levels") in LEVELS:
        given["levels"] = LEVELS[given["levels"]]
    known = [(label, _plain(given.pop(key))) for key, label in PROVENANCE.items() if given.get(key) is not None]
    return known + [(_words(key), _plain(value)) for key, value in given.items() if value is not None]


# --- the three outputs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """All that the template prints, already in words."""

    title: str
    sentence: str
    task: str
    metric: str
    better: str
    unit: str
    extras: list[str]
    rows: list[_Row]
    charts: list[_Chart]
    density: list[dict[str, Any]]
    gates: list[dict[str, Any]]
    histograms: list[dict[str, Any]]
    heatmap: dict[str, Any] | None
    worst: list[dict[str, Any]]
    cost: list[tuple[str, str]]
    provenance: list[tuple[str, str]]
    n: str  # sequences of the interval
    sizes: bool  # whether the networks were measured on different amounts of data
    updates: bool  # whether a gate is an update gate, whose "open" is its bit 0
    frame: dict[str, int] = field(default_factory=lambda: dict(FRAME))


def _title(report: Report) -> str:
    source = str(_get(report, "provenance", "source") or "").rstrip("/").rsplit("/", 1)[-1]
    return f"{source} with binary gates" if source else "A network with binary gates"


def render(report: Report, figures: Figures) -> str:
    """The whole report as one HTML page that needs no network: inline SVG and CSS, every text from outside escaped."""
    scale = _Scale.of(report)
    view = _View(
        title=_title(report),
        sentence=sentence(report),
        task=str(report.get("task") or ""),
        metric=scale.label,
        better="higher" if _get(report, "metric", "higher_is_better") else "lower",
        unit="points" if scale.factor == 100 else scale.label,
        extras=[_words(name) for name in _extras(_networks(report))],
        rows=_rows(report),
        charts=_charts(report),
        density=_density(report),
        gates=_gates(report),
        histograms=[_histogram(histogram) for histogram in figures.histograms],
        heatmap=_heatmap(figures.heatmap),
        worst=list(report.get("worst") or []),
        cost=_cost(report),
        provenance=_provenance(report),
        n=_whole(_get(report, "drop", "n")),
        sizes=len({network.get("n") for network in _networks(report).values()}) > 1,
        updates=any(gate.get("gate") == "z" for gate in report.get("gates") or []),
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(view=view)


def _markdown(text: Any) -> str:
    """Text from outside, in one line of a markdown table: no tag, link, cell or code span can start in it."""
    escaped = str(Markup.escape(" ".join(str(text).split())))
    return "".join("\\" + character if character in "\\`*_[]|#" else character for character in escaped)


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_markdown(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


CARD = """---
library_name: rnn2bin
tags: [rnn, binary-gates]
---
# {title}

{sentence}

This is a recurrent network whose gates decide: each{binary} one is exactly 0 or 1, and the weights of closed gates are skipped.
rnn2bin distilled it from a trained float network{free}. Details and plots: `report.html`; all numbers: `report.json`.

## What was lost

{table}

{better} is better; measured on held-out data, with gates exactly 0 or 1 in the binary rows.

## How to load it

```python
import rnn2bin

model = rnn2bin.load("OUT")  # this directory
y, state = model(x)          # x: (time, batch, features) floats or (time, batch) tokens
y, state = model(x, state)   # go on where it stopped
```

`runtime/` runs the same weights with a C11 compiler and nothing else.

## Provenance

{provenance}
"""


def render_card(report: Report) -> str:
    """The model card: README.md of the packed directory."""
    rows, extras = _rows(report), _extras(_networks(report))
    scale = _Scale.of(report)
    head = ["Network", _markdown(scale.label), "worse by", "95% interval", *(_markdown(_words(name)) for name in extras), "n"]
    free = ", without data: on sequences sampled from that network itself" if _get(report, "provenance", "data_free") else ""
    return CARD.format(
        title=_markdown(_title(report)),
        sentence=_markdown(sentence(report)),
        free=free,
        binary=" binary" if any(not gate.get("binary") for gate in report.get("gates") or []) else "",
        table=_markdown_table(head, [(row.name, row.metric, row.lost, row.interval or NONE, *row.extra, row.n) for row in rows]),
        better="Higher" if _get(report, "metric", "higher_is_better") else "Lower",
        provenance=_markdown_table(["", ""], [*_provenance(report), *_cost(report)]),
    )


def _terminal(text: str) -> str:
    """Plain characters only: what a file says must not steer the terminal."""
    replaced = text.translate({ord("−"): "-", ord("–"): "-", ord("’"): "'", ord("×"): "x", ord("…"): "..."})
    return "".join(character if character.isprintable() else "?" for character in replaced)


def render_table(report: Report) -> str:
    """Teacher, threshold-only, soft student and binary as monospaced text, ending in the sentence."""
    extras = [_words(name) for name in _extras(_networks(report))]
    head = ["", _Scale.of(report).label, *extras, "worse by", "95% interval", "weights read", "size", "took"]
    shown = [row for row in _rows(report) if row.key in ("teacher", "threshold_only", "soft_student", "binary", "native")]
    cells = [[row.name, row.metric, *row.extra, row.lost, row.interval or NONE, *_terminal_costs(report, row.key)] for row in shown]
    lines = [[_terminal(cell) for cell in line] for line in (head, *cells)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    table = ["  ".join(line) for line in aligned]
    return "\n".join([table[0], "-" * len(table[0]), *table[1:], "", _terminal(sentence(report))])


def _terminal_costs(report: Report, key: str) -> tuple[str, str, str]:
    """Weights read, size and time, where they belong to a row: the source's to the teacher, the conversion's to the binary network."""
    if key == "teacher":
        return (_percent(1.0), _size(_get(report, "size", "source_bytes")), NONE)
    if key == "binary":
        packed, seconds = _get(report, "size", "packed_bytes"), _get(report, "cost", "seconds")
        return (_percent(_get(report, "density", "weights_touched")), _size(packed), _duration(seconds))
    return (NONE, NONE, NONE)
