"""mkdocs hook: what is generated, commands from the command line and knobs from the recipe; links out of docs/."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

DECISIONS = Path(__file__).parent.parent / "docs" / "decisions"


def on_files(files: Any, config: Any) -> Any:
    """The list of decisions as a page."""
    from mkdocs.structure.files import File

    if files.get_file_from_path("decisions/index.md") is None:
        files.append(File.generated(config, "decisions/index.md", content=decisions()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    filled = {"<!-- commands -->": commands, "<!-- knobs -->": knobs}
    for mark, made in filled.items():
        if mark in markdown:
            markdown = markdown.replace(mark, made())
    # what is no page of the site is named, not linked
    return re.sub(r"\[([^\]]+)\]\(((?:\.\./)+(?:recipes|scripts|README|CHANGELOG|CONTRIBUTING)[^)]*)\)", r"`\1`", markdown)


def decisions() -> str:
    """A list of the pages in docs/decisions, by their own titles."""
    title = lambda path: path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    titles = {path.name: title(path) for path in sorted(DECISIONS.glob("[0-9]*.md"))}
    return "# Decisions\n\nWhat was weighed, measured and rejected.\n\n" + "\n".join(
        f"- [{title}]({name})" for name, title in titles.items()
    )


def commands() -> str:
    """Every command with its help, as `rnn2bin COMMAND --help` prints it."""
    from rnn2bin.cli import main

    return "\n\n".join(f"## {name}\n\n```text\n{text}\n```" for name, text in _help(main, "rnn2bin"))


def _help(command: click.Command, name: str) -> Iterator[tuple[str, str]]:
    with click.Context(command, info_name=name, max_content_width=100, terminal_width=100) as context:
        yield name, command.get_help(context)
    for inner, one in getattr(command, "commands", {}).items():
        yield from _help(one, f"{name} {inner}")


def knobs() -> str:
    """A table of every knob of a recipe: name, default, what it does."""
    from rnn2bin.recipe import Recipe

    rows = ["| knob | default | what it does |", "|---|---|---|"]
    rows += [f"| `{name}` | {_cell(default)} | {_cell(text)} |" for name, default, text in _knobs(Recipe)]
    return "\n".join(rows)


def _knobs(model: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    for name, field in model.model_fields.items():
        inner = field.annotation if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields") else None
        if inner is not None:
            yield from _knobs(inner, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else field.get_default(call_default_factory=True)
            yield f"{prefix}{name}", f"`{default}`", field.description or ""


def _cell(text: Any) -> str:
    return " ".join(str(text).replace("|", "\\|").split())
