"""A packed directory's report on disk: read with suspicion, written with its page and its model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rnn2bin import storage
from rnn2bin.errors import UnsupportedError, UsageError
from rnn2bin.evaluation import html
from rnn2bin.files import json_file

Report = dict[str, Any]

SCHEMA_VERSION = 1
REPORT, PAGE, CARD = "report.json", "report.html", "README.md"
MAPS = ("metric", "teacher", "binary", "drop")  # what every report holds as an object


def write(folder: Path, report: Report) -> None:
    """report.json, report.html and README.md, into a directory that nobody reads yet."""
    for name, text in texts(report).items():
        (folder / name).write_text(text, encoding="utf-8")


def texts(report: Report) -> dict[str, str]:
    """Name -> content of the three files that say what a report says."""
    content = json.dumps(report, indent=2, allow_nan=False) + "\n"
    return {REPORT: content, PAGE: html.render(report), CARD: html.render_card(report)}


def read(path: Path) -> Report:
    """The report of a packed directory, or a report.json. Raises UsageError where there is none, UnsupportedError where it is none that
    this version can draw, UnsafeError as `files.json_file`."""
    file = path / REPORT if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{file}: no such report; give a packed directory or its {REPORT}")
    report = json_file(file)
    version = report.get("schema_version")
    if type(version) is not int or not all(isinstance(report.get(name), dict) for name in MAPS):
        raise UnsupportedError(f"{file}: not a report of rnn2bin")
    if version > SCHEMA_VERSION:
        raise UnsupportedError(f"{file}: schema version {version}; this rnn2bin reads up to {SCHEMA_VERSION}: update it")
    try:
        texts(report)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
        raise UnsupportedError(f"{file}: a damaged report, or one of another version ({type(error).__name__})") from None
    return report


def add(folder: Path, **fields: Any) -> Report:
    """Set fields of a packed directory's report and draw its page anew; a model card that was edited stays as it is.

    Each file is old or new, the report first: what a kill between them leaves behind is drawn by the next call. Raises as `read`, and
    ResourceError where the disk takes no more.
    """
    old = read(folder)
    report = {**old, **fields}
    before, after = texts(old), texts(report)
    card = folder / CARD
    edited = not card.is_file() or card.read_text(encoding="utf-8", errors="replace") != before[CARD]
    with storage.failures(folder, "the report is what it was; free space"):
        for name, text in after.items():
            if name != CARD or not edited:
                storage.write_synced(folder / name, text)
    return report
