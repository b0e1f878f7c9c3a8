"""Two reports side by side: what each lost, reads, takes and weighs, and in which knobs their recipes differ."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rnn2bin.errors import UsageError
from rnn2bin.evaluation import html, stored

Report = dict[str, Any]

SCHEMA_VERSION = 1
# What two reports must share for their numbers to be about the same thing: name -> where it stands
SAME: dict[str, tuple[str, ...]] = {
    "task": ("task",),
    "metric": ("metric", "name"),
    "held-out data": ("provenance", "data_sha256"),
    "held-out sequences": ("drop", "n"),
    "source network": ("provenance", "source_sha256"),
}
FATAL = ("task", "metric")  # other numbers altogether
# name -> (where it stands, whether more is better; None: the metric says)
FIGURES: dict[str, tuple[tuple[str, ...], bool | None]] = {
    "teacher": (("teacher", "metric"), None),
    "binary": (("binary", "metric"), None),
    "native": (("native", "metric"), None),
    "soft_student": (("soft_student", "metric"), None),
    "threshold_only": (("controls", "threshold_only", "metric"), None),
    "float_same_compute": (("controls", "float_same_compute", "metric"), None),
    "drop": (("drop", "value"), False),
    "drop_relative": (("drop", "relative"), False),
    "weights_touched": (("density", "weights_touched"), False),
    "layers_read": (("density", "read"), False),
    "bytes_per_step": (("density", "bytes_per_step"), False),
    "packed_bytes": (("size", "packed_bytes"), False),
    "seconds": (("cost", "seconds"), False),
    "steps": (("cost", "steps"), False),
}


def compare(one: Path, other: Path) -> Report:
    """The JSON document of `rnn2bin compare`: {schema_version, reports, metric, warnings, figures, drop_ci95, overlap, recipe}.

    `figures`: [{name, a, b, difference (b − a), better: "a" | "b" | None}]; `recipe`: {knob: [a, b]} where they differ. Raises UsageError
    where task or metric differ, and as `stored.read`; other held-out data or another source network is a warning.
    """
    a, b = stored.read(one), stored.read(other)
    differing = [name for name, path in SAME.items() if _at(a, path) != _at(b, path)]
    if wrong := [name for name in FATAL if name in differing]:
        said = lambda name, report: _at(report, SAME[name])
        raise UsageError(*(f"compare: {name} is {said(name, a)} in {one} and {said(name, b)} in {other}" for name in wrong))
    higher = bool(_at(a, ("metric", "higher_is_better")))
    ends = [_at(report, ("drop", "ci95")) for report in (a, b)]
    return {
        "schema_version": SCHEMA_VERSION,
        "reports": [_named(one, a), _named(other, b)],
        "task": a.get("task"),
        "metric": a["metric"],
        "warnings": [_warning(name) for name in differing],
        "figures": [figure for figure in (_figure(name, a, b, higher=higher) for name in FIGURES) if figure] + _speeds(a, b),
        "drop_ci95": ends,
        "overlap": max(ends[0][0], ends[1][0]) <= min(ends[0][1], ends[1][1]) if all(ends) else None,
        "recipe": _knobs(a, b),
    }


def _named(path: Path, report: Report) -> Report:
    return {"path": str(path), "title": html.title(report), "sentence": html.sentence(report)}


def _at(report: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        report = report.get(key) if isinstance(report, dict) else None
    return report


def _warning(name: str) -> str:
    said = {
        "held-out data": "the held-out data differ: accuracies and shares are not about the same sequences",
        "held-out sequences": "the number of held-out sequences differs",
        "source network": "the source networks differ: what each lost is against its own",
    }
    return said[name]


def _figure(name: str, a: Report, b: Report, *, higher: bool) -> Report | None:
    path, better = FIGURES[name]
    return _pair(name, _at(a, path), _at(b, path), higher=higher if better is None else better, judged=name not in ("teacher", "steps"))


def _pair(name: str, ours: Any, theirs: Any, *, higher: bool, judged: bool = True) -> Report | None:
    ours, theirs = (value if html.finite(value) else None for value in (ours, theirs))
    if ours is None and theirs is None:
        return None
    difference = None if ours is None or theirs is None else theirs - ours
    better = None if not difference or not judged else "b" if (difference > 0) is higher else "a"
    return {"name": name, "a": ours, "b": theirs, "difference": difference, "better": better}


def _speeds(a: Report, b: Report) -> list[Report]:
    """µs a step of each way to call that both, or one, were benched in."""
    times = [{(row.get("call"), row.get("batch")): row["us_per_step"] for row in html.timed(report)} for report in (a, b)]
    both = dict.fromkeys([*times[0], *times[1]])
    pairs = (_pair(f"us_per_step {call}, batch {batch}", *(one.get((call, batch)) for one in times), higher=False) for call, batch in both)
    return [pair for pair in pairs if pair]


def _knobs(a: Report, b: Report) -> dict[str, list[Any]]:
    ours, theirs = (dict(_flat(_at(report, ("provenance", "recipe")))) for report in (a, b))
    seeds = {"seed": [_at(report, ("provenance", "seed")) for report in (a, b)]}
    names = dict.fromkeys([*ours, *theirs])
    found = {name: [ours.get(name), theirs.get(name)] for name in names if ours.get(name) != theirs.get(name)}
    return found if "seed" in found or seeds["seed"][0] == seeds["seed"][1] else seeds | found


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, value
