"""What `inspect` says: the recognised parts, the `source:` section as YAML, the text for people. No torch here."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rnn2bin.loaders.assemble import BLOCKS, LEFT_OVER
from rnn2bin.spec import GraphSpec, RnnSpec

MOST_ROWS = 200


def _plain(line: str) -> str:
    """Names come from the file: a line break or an escape sequence in one must not reach a recipe or a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


BY_HAND = """\
source:
  main:
    cell: lstm  # or lstm_peephole, lstm_coupled, gru, gru_reset_before …
    embedding: null  # tensor (vocabulary, width); or `one_hot: true`; neither for float inputs
    layers:
    - {weight_ih: unknown, weight_hh: unknown, bias_ih: unknown, bias_hh: unknown}
    head:
    - {weight: unknown, bias: unknown, activation: none}
    readout: all  # or last, final, mean, max
"""


def parts(draft: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """One line for each recognised part, in the order data pass through them."""
    lines = []
    for name in ("main", "encoder", "decoder"):
        section = (draft or {}).get(name)
        if not section:
            continue
        if section.get("embedding"):
            lines.append(f"{name}: embedding {section['embedding']} {shapes.get(section['embedding'])}")
        for index, layer in enumerate(section["layers"]):
            lines.append(f"{name}: layer {index}: {_layer(section['cell'], layer, shapes)}")
        for linear in section.get("head", []):
            lines.append(f"{name}: linear {linear['weight']} {shapes.get(linear['weight'])}, then {linear.get('activation', 'none')}")
    return lines


def spec_parts(spec: RnnSpec) -> list[str]:
    """The same for a network whose file says itself how its parts join."""
    lines = []
    for name, section in spec.sections.items():
        if section.embedding:
            lines.append(f"{name}: embedding {section.embedding.num_embeddings}x{section.embedding.embedding_dim}")
        for index, layer in enumerate(section.layers):
            ways = "both directions" if layer.directions == 2 else "one direction"
            clips = {"pre-activations": layer.clip, "cells": layer.cell_clip, "projections": layer.proj_clip}
            clipped = "".join(f", {what} clipped to ±{bound:g}" for what, bound in clips.items() if bound)
            lines.append(f"{name}: layer {index}: {layer.cell} {layer.input_size} -> {layer.hidden_size}, {ways}{clipped}")
        if section.graph is None:
            lines.append(f"{name}: reads out {section.readout}")
            lines += [f"{name}: linear {one.in_features} -> {one.out_features}, then {one.activation}" for one in section.head]
            continue
        lines += [f"{name}: {line}" for line in around(section.graph)]
    return lines


def around(graph: GraphSpec) -> list[str]:
    """What stands around a graph's layers, and what it gives."""
    counts = Counter(node.op for node in graph.nodes if node.op not in ("Constant", "Recurrent"))
    every = "every step" if graph.per_step else "a whole sequence"
    steps = f", {graph.steps} steps only" if graph.steps else ""
    return [
        f"around the layers: {', '.join(f'{op} × {n}' if n > 1 else op for op, n in counts.items())}",
        f"{graph.output_size} values for {every}, then {graph.activation}{steps}",
    ]


def _layer(cell: str, layer: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str:
    ih, hh = shapes.get(layer["weight_ih"]), shapes.get(layer["weight_hh"])
    hidden = hh[0] // len(BLOCKS[cell]) if hh else "?"
    ways = "both directions" if layer.get("reverse") else "one direction"
    projected = f", projected to {shapes[layer['weight_hr']][0]}" if layer.get("weight_hr") in shapes else ""
    bias = "" if layer.get("bias_ih") or layer.get("bias_hh") else ", no bias"
    return f"{cell} {ih[1] if ih and len(ih) == 2 else '?'} -> {hidden}, {ways}{projected}{bias} ({layer['weight_ih']})"


def source_yaml(draft: Mapping[str, Any] | None, reasons: Sequence[str], ignore: Sequence[str], unused: Sequence[str] = ()) -> str:
    """The `source:` section to paste into a recipe; `unknown` stands where the file does not say, and no recipe accepts it. `unused`:
    tensors that the draft leaves over, which the file alone does not place."""
    import yaml  # type: ignore[import-untyped, unused-ignore]

    if draft is None:
        return _open(reasons) + BY_HAND
    # What is left over stands by name in what is printed behind the draft, to be uncommented.
    comments = _open([line for line in reasons if not line.endswith(LEFT_OVER)])
    data = {"source": {**draft, **({"ignore": list(ignore)} if ignore else {})}}
    body = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, allow_unicode=True, width=1000)
    notes = "# where it applies, add to a section: `readout: last` (or final, mean, max); `one_hot: true` for tokens without a table\n"
    notes = notes if {"main", "encoder"} & draft.keys() and not draft.get("main", {}).get("graph") else ""
    return comments + notes + str(body) + _left(unused, ignore)


def _open(reasons: Sequence[str]) -> str:
    return "".join(f"# open: {_plain(line)}\n" for line in reasons)


def _left(unused: Sequence[str], ignore: Sequence[str]) -> str:
    """Both ways to settle tensors that are left over, to be uncommented."""
    if not unused:
        return ""
    listed = json.dumps([*ignore, *unused])  # on one line, whatever the names hold
    operations = "".join(f"#    - {{op: unknown, inputs: [y, {json.dumps(name)}], outputs: [unknown]}}\n" for name in unused)
    return (
        "# what is left over, where the outputs are the same without it:\n"
        f"#  ignore: {listed}\n"
        "# where it takes part (docs/graphs.md), in `main`:\n"
        "#    graph:\n"
        "#    - {op: Recurrent, inputs: [input], outputs: [y]}\n" + operations
    )


def text(
    format_name: str,
    tensors: Sequence[tuple[str, tuple[int, ...], str]],
    found: Sequence[str],
    reasons: Sequence[str],
    source: str,
) -> str:
    """The whole of `rnn2bin inspect` as text."""
    found, reasons = [_plain(line) for line in found], [_plain(line) for line in reasons]
    tensors = [(_plain(name), shape, dtype) for name, shape, dtype in tensors]
    width = max((len(name) for name, _, _ in tensors), default=0)
    lines = [f"{format_name}: {len(tensors)} tensors"]
    lines += [f"  {name:<{width}}  {dtype:<8}  {'x'.join(map(str, shape)) or 'scalar'}" for name, shape, dtype in tensors[:MOST_ROWS]]
    if len(tensors) > MOST_ROWS:
        lines.append(f"  … and {len(tensors) - MOST_ROWS} more (all with --json)")
    lines += ["", "recognised:", *(f"  {line}" for line in found or ["nothing"])]
    lines += ["", "not settled:" if reasons else "not settled: nothing, it can be converted as it is", *(f"  {line}" for line in reasons)]
    return "\n".join([*lines, "", source.rstrip(), ""] if source else [*lines, ""])
