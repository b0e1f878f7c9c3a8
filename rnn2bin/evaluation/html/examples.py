"""Worst examples: what both networks gave for the sequences on which the binary one lost most, differences marked."""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import Any

from rnn2bin.evaluation.html.heatmap import visible
from rnn2bin.evaluation.html.words import NONE, Report, finite, is_share, significant

Marked = list[tuple[str, bool]]  # pieces of a text, and whether they differ from the other's


def examples(report: Report) -> list[dict[str, Any]]:
    return [_example(row, str((report.get("metric") or {}).get("name"))) for row in report.get("worst") or [] if isinstance(row, dict)]


def _example(row: Report, metric: str) -> dict[str, Any]:
    steps = [step for step in row.get("steps") or [] if isinstance(step, dict)]
    teacher, binary = (str(row.get(name, "")) for name in ("teacher", "binary"))
    target = None if row.get("target") is None else str(row["target"])
    wanted = target if target is not None else teacher
    scores = row.get("metric") if isinstance(row.get("metric"), dict) else {}
    return {
        "index": row.get("index", ""),
        "input": str(row.get("input", "")),
        "target": target,
        "teacher": marked(teacher, wanted),
        "binary": marked(binary, wanted),
        "difference": str(row.get("difference", "")),
        "scores": ", ".join(f"{name} {_score(value, metric)}" for name, value in (scores or {}).items()),
        "strip": _strip(steps),
    }


def _score(value: Any, metric: str) -> str:
    if not finite(value):
        return NONE
    return f"{100 * value:.0f}%" if is_share(metric) else significant(value, 3)


def marked(text: str, other: str) -> Marked:
    """Pieces of `text`, those that `other` has not marked: by words where there are several, else whole."""
    ours, theirs = text.split(" "), other.split(" ")
    if len(ours) == len(theirs) == 1 or "(" in text:  # a class with its probability
        return [(text, ours[0] != theirs[0])]
    pieces: Marked = []
    for kind, start, stop, _, _ in SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        words = " ".join(ours[start:stop])
        if words:
            pieces.append((words, kind != "equal"))
        elif kind == "insert":
            pieces.append(("·", True))  # something is missing here
    return pieces


def _strip(steps: list[Report]) -> dict[str, Any] | None:
    """One cell a step: what was read, what was wanted and given, and how much more was lost, as a height; None where nothing was lost."""
    most = max((step["lost"] for step in steps if finite(step.get("lost"))), default=0.0)
    if most <= 0:
        return None
    given = [name for name in ("target", "teacher", "binary") if any(step.get(name) is not None for step in steps)]
    return {"given": given, "most": significant(most, 2), "cells": [_cell(step, most) for step in steps]}


def _cell(step: Report, most: float) -> dict[str, Any]:
    text = lambda name: None if step.get(name) is None else visible(str(step[name]))
    lost = step["lost"] if finite(step.get("lost")) else 0.0
    wanted = step.get("target") if step.get("target") is not None else step.get("teacher")
    return {
        "input": text("input") or "",
        "target": text("target"),
        "teacher": text("teacher"),
        "binary": text("binary"),
        "target_wrong": False,
        "teacher_wrong": step.get("target") is not None and step.get("teacher") != step["target"],
        "binary_wrong": step.get("binary") is not None and step.get("binary") != wanted,
        "shade": round(min(1.0, max(0.0, lost / most)), 2),
        "lost": significant(lost, 2),
    }
