"""The whole report as one page. Every value arrives in words; the page's shape is the templates'."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from rnn2bin.evaluation.html.axes import FRAME
from rnn2bin.evaluation.html.curves import Chart, charts
from rnn2bin.evaluation.html.density import density, layers
from rnn2bin.evaluation.html.examples import examples
from rnn2bin.evaluation.html.figures import Figures
from rnn2bin.evaluation.html.gates import gates
from rnn2bin.evaluation.html.glance import Tile, tiles
from rnn2bin.evaluation.html.heatmap import heatmap
from rnn2bin.evaluation.html.histograms import histogram
from rnn2bin.evaluation.html.networks import Row, extra_names, networks_of, rows
from rnn2bin.evaluation.html.provenance import cost, provenance, recipe, title
from rnn2bin.evaluation.html.speed import machine, speed
from rnn2bin.evaluation.html.standing import Standing, standing
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
    tiles: list[Tile]
    extras: list[str]
    standing: Standing | None
    rows: list[Row]
    charts: list[Chart]
    density: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    gates: list[dict[str, Any]]
    histograms: list[dict[str, Any]]
    heatmaps: list[dict[str, Any]]
    speed: list[dict[str, Any]]
    machine: str
    worst: list[dict[str, Any]]
    cost: list[tuple[str, str]]
    provenance: list[tuple[str, str]]
    recipe: str
    n: str  # sequences of the interval
    sizes: bool  # whether the networks were measured on different amounts of data
    updates: bool  # whether a gate is an update gate, whose "open" is its bit 0
    many_decisions: bool  # whether units take several decisions a gate
    shared_rows: bool  # and whether they read rows of weights together
    frame: dict[str, int] = field(default_factory=lambda: dict(FRAME))


def render(report: Report, figures: Figures | None = None) -> str:
    """The whole report as one HTML page that needs no network: inline SVG and CSS, every text from outside escaped.

    `figures`: None draws those that the report holds.
    """
    scale = Scale.of(report)
    figures = Figures.from_dict(report.get("figures")) if figures is None else figures
    table = gates(report)
    view = _View(
        title=title(report),
        sentence=sentence(report),
        task=str(report.get("task") or ""),
        metric=scale.label,
        better="higher" if get(report, "metric", "higher_is_better") else "lower",
        unit="points" if scale.factor == 100 else scale.label,
        tiles=tiles(report),
        extras=[words(name) for name in extra_names(networks_of(report))],
        standing=standing(report),
        rows=rows(report),
        charts=charts(report),
        density=density(report),
        layers=layers(report),
        gates=table,
        histograms=[histogram(one) for one in figures.histograms],
        heatmaps=[drawn for one in figures.heatmaps if (drawn := heatmap(one))],
        speed=speed(report),
        machine=machine(report),
        worst=examples(report),
        cost=cost(report),
        provenance=provenance(report),
        recipe=recipe(report),
        n=whole(get(report, "drop", "n")),
        sizes=len({network.get("n") for network in networks_of(report).values()}) > 1,
        updates=any(gate.get("gate") == "z" for gate in report.get("gates") or []),
        many_decisions=any(gate["copies"] > 1 for gate in table),
        shared_rows=any(gate["shared"] > 1 for gate in table),
    )
    return template("page.html.j2", view=view)


def template(name: str, **values: Any) -> str:
    """A file of templates/, filled in; every value is escaped."""
    return _environment().get_template(name).render(**values)


@cache
def _environment() -> Environment:
    """One for all pages: it holds its templates compiled, which takes longer than to fill them in."""
    read = lambda name: resources.files(__package__).joinpath("templates", name).read_text(encoding="utf-8")
    return Environment(loader=FunctionLoader(read), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
