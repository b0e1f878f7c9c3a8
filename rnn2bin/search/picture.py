"""The Pareto front as one SVG file: every trial, those that no other beats joined by a line, the chosen one and the limits marked."""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

from rnn2bin.evaluation.html import Axis, significant

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 400, 64, 20, 34, 46
ROOM = 16  # between two numbers
FAR = 1.5  # trials that lose more than so many times the front's worst lie on the upper edge
# Okabe-Ito colours, as in report.html
STYLE = """
svg { background: #fff; font: 12px system-ui, "DejaVu Sans", sans-serif; }
.grid { stroke: #dfe3e8; } .tick, .name { fill: #5a626d; }
.halo { stroke: #fff; stroke-width: 3px; fill: #fff; } .title { fill: #16191d; font-size: 13px; }
.limit { stroke: #5a626d; stroke-dasharray: 2 4; } .front { fill: none; stroke: #0072b2; stroke-width: 2; }
.other { fill: #9aa7b8; fill-opacity: .7; } .best { fill: #0072b2; } .chosen { fill: none; stroke: #d55e00; stroke-width: 2.5; }
"""


def draw(report: dict[str, Any]) -> str:
    """The picture of a search.json."""
    trials = [one for one in report["trials"] if one["drop"] is not None]
    best = [one for number in report["front"] for one in trials if one["number"] == number]
    across, up = _axes(trials, best, report["limits"])
    where = {one["number"]: (across.at(one["density"]), up.at(min(one["drop"], up.hi))) for one in trials}
    parts = [*_frame(across, up), *_limits(report["limits"], across, up)]
    parts += [f'<circle class="other" cx="{x:g}" cy="{y:g}" r="3.5"/>' for x, y in where.values()]
    parts.append(f'<path class="front" d="{_stairs([where[one["number"]] for one in best])}"/>')
    parts += [f'<circle class="best" cx="{x:g}" cy="{y:g}" r="4.5"/>' for x, y in (where[one["number"]] for one in best)]
    parts += _numbers([(one["number"], *where[one["number"]]) for one in best])
    marked = report["chosen"] if report["chosen"] is not None else report["nearest"]
    x, y = where[marked]
    parts.append(f'<circle class="chosen" cx="{x:g}" cy="{y:g}" r="8"/>')
    what = "chosen" if report["chosen"] is not None else "nearest to the limits"
    title = f"{len(trials)} trials on the validation part; ringed: {what}, trial {marked}"
    parts.append(f'<text class="title" x="{LEFT}" y="20">{escape(title)}</text>')
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n{body}\n</svg>\n"
    )


def _axes(trials: list[dict[str, Any]], best: list[dict[str, Any]], limits: dict[str, Any]) -> tuple[Axis, Axis]:
    """Density from 0 to the densest, drop from 0 (or the least) to the worst worth showing."""
    densities = [one["density"] for one in trials] + [limits["max_density"] or 0]
    drops = [one["drop"] for one in trials]
    high = max(min(max(drops), FAR * max(max(one["drop"] for one in best), 1e-4)), limits["max_drop"] or 0, 1e-4)
    low = min(0.0, *drops)
    return Axis(0.0, 1.08 * max(densities), LEFT, WIDTH - RIGHT), Axis(low - 0.05 * (high - low), 1.08 * high, HEIGHT - BOTTOM, TOP)


def _frame(across: Axis, up: Axis) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    rows = [
        f'<path class="grid" d="M{LEFT},{up.at(y):g}H{right}"/>'
        f'<text class="tick" x="{LEFT - 8}" y="{up.at(y) + 4:g}" text-anchor="end">{significant(100 * y)}%</text>'
        for y in up.ticks()
    ]
    columns = [
        f'<path class="grid" d="M{across.at(x):g},{TOP}V{bottom}"/>'
        f'<text class="tick" x="{across.at(x):g}" y="{bottom + 18}" text-anchor="middle">{significant(x)}</text>'
        for x in across.ticks()
    ]
    names = [
        f'<text class="name" x="{right}" y="{HEIGHT - 8}" text-anchor="end">share of the layers’ weights read at a step</text>',
        f'<text class="name" transform="translate(14,{TOP}) rotate(-90)" text-anchor="end">relative drop of the metric</text>',
    ]
    return [*rows, *columns, *names]


def _limits(limits: dict[str, Any], across: Axis, up: Axis) -> list[str]:
    drop, density = limits["max_drop"], limits["max_density"]
    return [
        *([f'<path class="limit" d="M{LEFT},{up.at(drop):g}H{WIDTH - RIGHT}"/>'] if drop is not None else []),
        *([f'<path class="limit" d="M{across.at(density):g},{TOP}V{HEIGHT - BOTTOM}"/>'] if density is not None else []),
    ]


def _stairs(points: list[tuple[float, float]]) -> str:
    """What is reached at each density: between two trials the one that reads less."""
    x, y = points[0]
    return f"M{x:g},{y:g}" + "".join(f"H{x:g}V{y:g}" for x, y in points[1:])


def _numbers(points: list[tuple[int, float, float]]) -> list[str]:
    """The trials' numbers; of some that lie on each other the first alone."""
    written: list[tuple[float, float]] = []
    parts = []
    for number, x, y in points:
        if all(abs(x - a) > ROOM or abs(y - b) > ROOM for a, b in written):
            written.append((x, y))
            parts += [f'<text class="{style}" x="{x + 9:g}" y="{y - 7:g}">{number}</text>' for style in ("halo", "name")]
    return parts
