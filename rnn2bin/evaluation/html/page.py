"""The whole report as one page. Every value arrives in words; the page's shape is the template's."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from rnn2bin.evaluation.html.axes import FRAME
from rnn2bin.evaluation.html.curves import Chart, charts
from rnn2bin.evaluation.html.density import density
from rnn2bin.evaluation.html.figures import Figures
from rnn2bin.evaluation.html.gates import gates
from rnn2bin.evaluation.html.heatmap import heatmap
from rnn2bin.evaluation.html.histograms import histogram
from rnn2bin.evaluation.html.networks import Row, extra_names, networks_of, rows
from rnn2bin.evaluation.html.provenance import cost, provenance, title
from rnn2bin.evaluation.html.words import Report, Scale, get, sentence, whole, words


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
    rows: list[Row]
    charts: list[Chart]
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


def render(report: Report, figures: Figures) -> str:
    """The whole report as one HTML page that needs no network: inline SVG and CSS, every text from outside escaped."""
    scale = Scale.of(report)
    view = _View(
        title=title(report),
        sentence=sentence(report),
        task=str(report.get("task") or ""),
        metric=scale.label,
        better="higher" if get(report, "metric", "higher_is_better") else "lower",
        unit="points" if scale.factor == 100 else scale.label,
        extras=[words(name) for name in extra_names(networks_of(report))],
        rows=rows(report),
        charts=charts(report),
        density=density(report),
        gates=gates(report),
        histograms=[histogram(one) for one in figures.histograms],
        heatmap=heatmap(figures.heatmap),
        worst=list(report.get("worst") or []),
        cost=cost(report),
        provenance=provenance(report),
        n=whole(get(report, "drop", "n")),
        sizes=len({network.get("n") for network in networks_of(report).values()}) > 1,
        updates=any(gate.get("gate") == "z" for gate in report.get("gates") or []),
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = resources.files(__package__).joinpath("templates", "page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(view=view)
