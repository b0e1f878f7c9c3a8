"""The table for people at a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rnn2bin.evaluation.html.networks import extra_names, networks_of, rows
from rnn2bin.evaluation.html.words import NONE, Report, Scale, duration, get, percent, sentence, size, words


def terminal(text: str) -> str:
    """Plain characters only: what a file says must not steer the terminal."""
    replaced = text.translate({ord("−"): "-", ord("–"): "-", ord("’"): "'", ord("×"): "x", ord("…"): "...", ord("µ"): "u"})
    return "".join(character if character.isprintable() else "?" for character in replaced)


def columns(table: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose first row is its head, the first column to the left, the others to the right."""
    lines = [[terminal(cell) for cell in line] for line in table]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    return [aligned[0], "-" * len(aligned[0]), *aligned[1:]]


def render_table(report: Report) -> str:
    """Teacher, threshold-only, soft student and binary as monospaced text, ending in the sentence."""
    extras = [words(name) for name in extra_names(networks_of(report))]
    head = ["", Scale.of(report).label, *extras, "worse by", "95% interval", "weights read", "size", "took"]
    shown = [row for row in rows(report) if row.key in ("teacher", "threshold_only", "soft_student", "binary", "native")]
    cells = [[row.name, row.metric, *row.extra, row.lost, row.interval or NONE, *_costs(report, row.key)] for row in shown]
    return "\n".join([*columns([head, *cells]), "", terminal(sentence(report))])


def _costs(report: Report, key: str) -> tuple[str, str, str]:
    """Weights read, size and time, where they belong to a row: the source's to the teacher, the conversion's to the binary network."""
    if key == "teacher":
        return (percent(1.0), size(get(report, "size", "source_bytes")), NONE)
    if key == "binary":
        packed, seconds = get(report, "size", "packed_bytes"), get(report, "cost", "seconds")
        return (percent(get(report, "density", "weights_touched")), size(packed), duration(seconds))
    return (NONE, NONE, NONE)
