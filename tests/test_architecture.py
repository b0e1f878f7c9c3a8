"""Imports go one way: each place may import what stands above it in this list, and itself."""

import ast
from pathlib import Path

import pytest

import rnn2bin

ROOT = Path(rnn2bin.__file__).parent
ORDER = [
    "errors",
    "files",
    "libraries",
    "signals",
    "storage",
    "processes",
    "kinds",
    "spec",
    "graph_paths",
    "yaml_tree",
    "recipe",
    "recipe_yaml",
    "packed",
    "tokenizer",
    "stages",
    "gates",
    "diagnostics",
    "cells",
    "loaders",
    "data",
    "tasks",
    "measure",
    "cost",
    "sharing",
    "student",
    "distill",
    "machine",
    "pack",
    "runtime",
    "bench",
    "evaluation",
    "export",
    "pipeline",
    "search",
    "plan",
    "reproduce",
    "modules",
    "hub",
    "doctor",
    "serve",
    "cli",
]
# Function-level imports that close a loop on purpose, each with its reason.
ALLOWED = {
    ("pipeline", "modules"),  # convert() hands an nn.Module over
    ("pipeline", "search"),  # convert() with two limits
    ("pipeline", "plan"),  # the pre-flight check before the work starts
}


def place_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rnn2bin":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found & set(ORDER)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_the_list(path):
    place = place_of(path)
    if place in ("__init__", "__main__"):
        return
    allowed = set(ORDER[: ORDER.index(place) + 1]) | {b for a, b in ALLOWED if a == place}
    assert imported(path) <= allowed


def test_every_place_is_in_the_order_and_in_the_docs():
    places = {place_of(p) for p in ROOT.rglob("*.py")} - {"__init__", "__main__"}
    assert places == set(ORDER)
    docs = (ROOT.parent / "docs" / "architecture.md").read_text()
    assert [p for p in ORDER if p not in docs] == []
