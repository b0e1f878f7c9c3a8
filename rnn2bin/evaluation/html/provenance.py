"""What the conversion took, and what it was made from."""

from __future__ import annotations

from typing import Any

import yaml

from rnn2bin.evaluation.html.words import NONE, Report, duration, finite, get, significant, size, whole, words


def ratio(part: Any, whole: Any) -> str:
    return f" ({significant(part / whole, 2)} × the source)" if finite(part) and finite(whole) and whole else ""


def cost(report: Report) -> list[tuple[str, str]]:
    source, packed = (get(report, "size", key) for key in ("source_bytes", "packed_bytes"))
    cost, parity = get(report, "cost") or {}, get(report, "parity") or {}
    around = get(report, "density", "around") or None
    rows = [
        ("Source file", size(source)),
        ("Packed weights", size(packed) + ratio(packed, source)),
        ("Weights around the layers, read whole", whole(around)),
        ("Conversion took", duration(cost.get("seconds"))),
        ("Training steps", whole(cost.get("steps"))),
        ("Tokens or time steps seen", whole(cost.get("tokens"))),
        ("Training speed, per second", whole(cost.get("tokens_per_second"))),
        ("The teacher alone, per second", whole(cost.get("teacher_tokens_per_second"))),
        ("C kernel against torch, largest difference", significant(parity["max_abs"], 2) if finite(parity.get("max_abs")) else NONE),
        ("Steps compared", whole(parity.get("steps"))),
        ("Decisions that flipped within rounding of 0", whole(parity.get("flips_in_margin"))),
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


def provenance(report: Report) -> list[tuple[str, str]]:
    apart = lambda key, value: key in ("recipe", "command") and not isinstance(value, str)
    given = {key: value for key, value in (report.get("provenance") or {}).items() if not apart(key, value)}
    if isinstance(given.get("data_free"), bool):
        given["data_free"] = "none given: sequences sampled from the teacher" if given["data_free"] else "given by the user"
    if given.get("levels") in LEVELS:
        given["levels"] = LEVELS[given["levels"]]
    known = [(label, _plain(given.pop(key))) for key, label in PROVENANCE.items() if given.get(key) is not None]
    return known + [(words(key), _plain(value)) for key, value in given.items() if value not in (None, [], {})]


def recipe(report: Report) -> str:
    """The whole recipe as YAML; empty where the report names it only."""
    found = get(report, "provenance", "recipe")
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=100) if isinstance(found, dict) else ""


def title(report: Report) -> str:
    source = str(get(report, "provenance", "source") or "").rstrip("/").rsplit("/", 1)[-1]
    return f"{source} with binary gates" if source else "A network with binary gates"
