"""The model card: README.md of the packed directory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup

from rnn2bin.evaluation.html.networks import extra_names, networks_of, rows
from rnn2bin.evaluation.html.provenance import cost, provenance, title
from rnn2bin.evaluation.html.words import NONE, Report, Scale, get, sentence, words


def _markdown(text: Any) -> str:
    """Text from outside, in one line of a markdown table: no tag, link, cell or code span can start in it."""
    escaped = str(Markup.escape(" ".join(str(text).split())))
    return "".join("\\" + character if character in "\\`*_[]|#" else character for character in escaped)


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_markdown(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


CARD = """---
library_name: rnn2bin
tags: [rnn, binary-gates]
---
# {title}

{sentence}

This is a recurrent network whose gates decide: each{binary} one is exactly 0 or 1, and the weights of closed gates are skipped.
rnn2bin distilled it from a trained float network{free}. Details and plots: `report.html`; all numbers: `report.json`.

## What was lost

{table}

{better} is better; measured on held-out data, with gates exactly 0 or 1 in the binary rows.

## How to load it

```python
import rnn2bin

model = rnn2bin.load("OUT")  # this directory
y, state = model(x)          # x: (time, batch, features) floats or (time, batch) tokens
y, state = model(x, state)   # go on where it stopped
```

`runtime/` runs the same weights with a C11 compiler and nothing else.

## Provenance

{provenance}
"""


def render_card(report: Report) -> str:
    """The model card: README.md of the packed directory."""
    lines, extras = rows(report), extra_names(networks_of(report))
    scale = Scale.of(report)
    head = ["Network", _markdown(scale.label), "worse by", "95% interval", *(_markdown(words(name)) for name in extras), "n"]
    free = ", without data: on sequences sampled from that network itself" if get(report, "provenance", "data_free") else ""
    return CARD.format(
        title=_markdown(title(report)),
        sentence=_markdown(sentence(report)),
        free=free,
        binary=" binary" if any(not gate.get("binary") for gate in report.get("gates") or []) else "",
        table=_markdown_table(head, [(row.name, row.metric, row.lost, row.interval or NONE, *row.extra, row.n) for row in lines]),
        better="Higher" if get(report, "metric", "higher_is_better") else "Lower",
        provenance=_markdown_table(["", ""], [*provenance(report), *cost(report)]),
    )
