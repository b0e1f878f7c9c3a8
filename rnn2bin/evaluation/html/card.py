"""The model card: README.md of the packed directory, with the front matter that a model hub reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import yaml
from markupsafe import Markup

from rnn2bin.evaluation.html.networks import extra_names, measured, networks_of, rows
from rnn2bin.evaluation.html.provenance import cost, provenance, title
from rnn2bin.evaluation.html.speed import rival, timed
from rnn2bin.evaluation.html.words import NONE, Report, Scale, finite, get, percent, sentence, significant, words

# task -> the hub's name for it, and the Auto class that loads such a network
HUB_TASKS = {
    "next-token": ("text-generation", "AutoModelForCausalLM"),
    "classify": ("text-classification", "AutoModelForSequenceClassification"),
    "tag": ("token-classification", "AutoModelForTokenClassification"),
}


def _markdown(text: Any) -> str:
    """Text from outside, in one line of a markdown table: no tag, link, cell or code span can start in it."""
    escaped = str(Markup.escape(" ".join(str(text).split())))
    return "".join("\\" + character if character in "\\`*_[]|#" else character for character in escaped)


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_markdown(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _indexed(text: str) -> str:
    """A name for the front matter: one line, nothing a page could take for a tag."""
    return " ".join("".join(c for c in text if c.isprintable() and c not in "<>").split())


def front_matter(report: Report) -> str:
    """What the hub indexes: library, tags, task, the measured metric. The licence is the source network's and the user's to state."""
    gates = {str(gate.get("gate")) for gate in report.get("gates") or []}
    cells = (["gru"] if "z" in gates else []) + (["lstm"] if gates & {"i", "f"} else [])
    task = str(report.get("task") or "match")
    hub_task = HUB_TASKS[task][0] if task in HUB_TASKS else None
    value = get(report, measured(report) or "binary", "metric")
    metric = {"type": str(get(report, "metric", "name") or "metric"), "value": value, "name": _indexed(Scale.of(report).label)}
    result = {
        "task": {"type": hub_task or "other"},
        "dataset": {"type": "held-out", "name": "the held-out part of the data given"},
        "metrics": [metric],
    }
    content: dict[str, Any] = {"library_name": "rnn2bin", "tags": ["rnn2bin", "rnn", *cells, "binary-gates", "distillation"]}
    content |= {"pipeline_tag": hub_task} if hub_task else {}
    content |= {"metrics": [metric["type"]]}
    content |= {"model-index": [{"name": _indexed(title(report)), "results": [result]}]} if finite(value) else {}
    licence = "# license: that of the source network; state it before you publish\n"
    return "---\n" + licence + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=140) + "---\n"


CARD = """{front}# {title}

{sentence}

This is a recurrent network whose gates decide: each{binary} one is exactly 0 or 1, and the weights of closed gates are skipped.
rnn2bin distilled it from a trained float network{free}. Details and plots: `report.html`; all numbers: `report.json`.

## What was lost

{table}

{better} is better; measured on held-out data, with gates exactly 0 or 1 in the binary rows. Controls were not trained to be binary.
{speed}
## How to run it

{run}

## Limits

{limits}

## Provenance

{provenance}
"""

RUN = """```python
import rnn2bin

model = rnn2bin.load("OUT")  # this directory
y, state = model(x)          # x: (time, batch, features) floats or (time, batch) tokens
y, state = model(x, state)   # go on where it stopped
stream = model.stream()      # one sequence, a step at a time
```

    rnn2bin run OUT --data new.npz          # the same from a shell
    make -C OUT/runtime                     # the same weights with a C11 compiler and nothing else

With transformers, after `import rnn2bin` (no remote code): `{auto}.from_pretrained("OUT")`, in PyTorch, batch first."""

RUN_MODULE = """```python
import rnn2bin

module = rnn2bin.load("OUT", module=float_module)  # this directory, and an instance of {source}: its code is not packed
```"""


def render_card(report: Report) -> str:
    """README.md of the packed directory."""
    lines, extras = rows(report), extra_names(networks_of(report))
    scale = Scale.of(report)
    head = ["Network", _markdown(scale.label), "worse by", "95% interval", *(_markdown(words(name)) for name in extras), "n"]
    free = ", without data: on sequences sampled from that network itself" if get(report, "provenance", "data_free") else ""
    task = str(report.get("task") or "")
    auto = HUB_TASKS[task][1] if task in HUB_TASKS else "AutoModel"
    name = "".join(c for c in str(get(report, "provenance", "source") or "the module") if c.isalnum() or c in "._- ")
    return CARD.format(
        front=front_matter(report),
        title=_markdown(title(report)),
        sentence=_markdown(sentence(report)),
        free=free,
        binary=" binary" if any(not gate.get("binary") for gate in report.get("gates") or []) else "",
        table=_markdown_table(head, [(row.name, row.metric, row.lost, row.interval or NONE, *row.extra, row.n) for row in lines]),
        better="Higher" if get(report, "metric", "higher_is_better") else "Lower",
        speed=_speed(report),
        run=RUN_MODULE.format(source=name) if task == "module" else RUN.format(auto=auto),
        limits="\n".join(f"- {line}" for line in _limits(report)),
        provenance=_markdown_table(["", ""], [*provenance(report), *cost(report)]),
    )


def _speed(report: Report) -> str:
    """The benched rows as a table, empty where none were."""
    table = [
        (
            str(row.get("call")),
            f"{significant(row['us_per_step'], 3)} µs",
            *_fastest_rival(row),
        )
        for row in timed(report)
    ]
    if not table:
        return ""
    cpu = _markdown(get(report, "speed", "machine", "cpu") or "one core")
    head = ["call", "a step", "fastest rival", "its time in ours"]
    return f"\n## Speed\n\n{_markdown_table(head, table)}\n\nOne core of {cpu}; the rivals run the float network of the same shape.\n"


def _fastest_rival(row: Report) -> tuple[str, str]:
    rivals = {name: one for name, one in (row.get("rivals") or {}).items() if finite(one.get("us_per_step")) and finite(one.get("ratio"))}
    if not rivals:
        return NONE, NONE
    name = min(rivals, key=lambda name: rivals[name]["us_per_step"])
    return rival(name), f"{significant(rivals[name]['ratio'], 3)} ×"


def _limits(report: Report) -> list[str]:
    """What the numbers do not say: only what follows from the report itself."""
    scale, n = Scale.of(report), get(report, "drop", "n")
    held_out = f" ({n:,} sequences)" if finite(n) else ""
    found = [f"What was lost holds for data like the held-out part{held_out}; elsewhere, measure: `rnn2bin eval`."]
    ends = get(report, "drop", "ci95")
    if not ends:
        found.append("The loss has no interval: the metric is one number over all batches.")
    if get(report, "provenance", "data_free"):
        found.append("No data were given: it was trained and measured on sequences that the float network made up, not on real ones.")
    read = get(report, "density", "weights_touched")
    if finite(read):
        found.append(f"A step reads {percent(read)} of the weights on that data; other inputs open other gates.")
    around = get(report, "density", "around")
    if finite(around) and around:
        found.append(f"{around:,.0f} weights around the recurrent layers are read whole, whatever the gates say.")
    if report.get("native") is None:
        found.append("The native runtime was not measured; PyTorch runs it without skipping anything.")
    same = get(report, "controls", "float_same_compute", "metric")
    if finite(same):
        found.append(f"Trained on with the same data and steps, the float network reaches {_markdown(scale.value(same))}.")
    found.append("It inherits the source network’s biases and errors; `report.html` shows on which sequences the two differ most.")
    return found
