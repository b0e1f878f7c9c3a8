"""Density: the share of weights that a skipping runtime must touch, counted from the bits of real steps.

What is exact is counted: columns of zeros in h, candidate rows of closed gates, recurrent rows of closed reset gates. Token inputs touch no
input matrix (W·embedding is a table), in the dense count neither. For GRUs `incremental` adds what updating the gates' pre-activations by
changed units alone would save; the other figures do not assume it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rnn2bin.cells.network import Lookup, Network, Output, reverse, valid_steps
from rnn2bin.spec import DIRECTIONS, LayerSpec
from rnn2bin.tasks import Prepared

BYTES = 2  # fp16


@dataclass
class Count:
    """Sums over real steps, in weights."""

    touched: float = 0.0
    incremental: float = 0.0
    dense: float = 0.0
    recurrent: float = 0.0
    recurrent_dense: float = 0.0
    columns: float = 0.0
    columns_dense: float = 0.0
    rows: float = 0.0
    rows_dense: float = 0.0


@dataclass
class DensityCounter:
    """Feed it every batch's output; `result` gives report.json's `density` and `gates`' open rates."""

    network: Network
    cells: dict[str, Count] = field(default_factory=dict)
    heads: dict[str, Count] = field(default_factory=dict)
    opened: dict[str, Tensor] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)

    def add(self, prepared: Prepared, output: Output) -> None:
        """`output` of the binary network on this batch."""
        pre, reads, hidden, real = iter(output.pre), iter(output.inputs), iter(output.hidden), iter(output.lengths)
        for section, spec in self.network.spec.sections.items():
            given = (
                {node.attributes["layer"] for node in spec.graph.nodes if node.op == "Recurrent" and any(node.inputs[1:3])}
                if spec.graph
                else ()
            )
            for index, layer in enumerate(spec.layers):
                rested = prepared.batch.first and section != "decoder" and index not in given
                x, below = next(reads), next(hidden)
                for direction in DIRECTIONS[: layer.directions]:
                    name, lengths = f"{section}.layers.{index}.{direction}", next(real)
                    backward = direction == "bwd"
                    seen = None if isinstance(x, Lookup) else (reverse(x, lengths) if backward else x)
                    self.add_cell(name, layer, next(pre), seen, lengths, rested=rested)
            if spec.head and spec.readout == "all":
                self._add_head(section, below, lengths)

    def add_cell(self, name: str, layer: LayerSpec, pre: Tensor, x: Tensor | None, lengths: Tensor | None, *, rested: bool) -> None:
        """`rested`: the state before the first step is zero. Where it is not (a decoder, a later window of a text) the first step counts as
        dense, since what the step before left open is not in this batch."""
        cell = self.network.cells()[name]
        steps, rows = pre.shape[:2]
        mask = (pre.new_ones(steps, rows) if lengths is None else valid_steps(lengths, steps)[..., 0].to(pre.dtype)).double()
        bits = (pre > 0).double()
        gate = {g: bits[:, :, k] for k, g in enumerate(layer.kind.gate_names)}
        binary = dict(zip(layer.kind.gate_names, cell.binary, strict=True))
        inputs = None if x is None else (x != 0).sum(-1).double()
        count = (_lstm if layer.cell == "lstm" else _gru)(layer, gate, binary, inputs, mask, rested)
        _accumulate(self.cells.setdefault(name, Count()), count)
        self.opened[name] = (
            self.opened.get(name, torch.zeros(len(cell.binary), dtype=torch.float64)) + (bits.mean(-1) * mask[..., None]).sum((0, 1)).cpu()
        )
        self.steps[name] = self.steps.get(name, 0.0) + float(mask.sum())

    def _add_head(self, section: str, below: Tensor, lengths: Tensor | None) -> None:
        spec = self.network.spec.sections[section].head
        mask = torch.ones(below.shape[:2]) if lengths is None else valid_steps(lengths, below.shape[0])[..., 0]
        nonzero = float(((below != 0).sum(-1).double() * mask).sum())
        steps = float(mask.sum())
        rest = sum(linear.in_features * linear.out_features for linear in spec[1:]) * steps
        touched = nonzero * spec[0].out_features + rest
        dense = steps * spec[0].in_features * spec[0].out_features + rest
        _accumulate(self.heads.setdefault(section, Count()), Count(touched=touched, incremental=touched, dense=dense))

    def open_rate(self, name: str) -> list[float]:
        """Share of ones of each gate of a cell."""
        return (self.opened[name] / self.steps[name]).tolist()

    def result(self) -> dict[str, Any]:
        """The `density` object of report.json."""
        cells = list(self.cells.values())
        both = cells + list(self.heads.values())
        total = lambda name, over: sum(getattr(c, name) for c in over)
        share = lambda a, b, over: total(a, over) / max(total(b, over), 1e-12)
        longest = max(self.steps.values())
        per_step = BYTES / longest
        return {
            "weights_touched": share("touched", "dense", both),
            "recurrent": share("recurrent", "recurrent_dense", cells),
            "columns": share("columns", "columns_dense", cells),
            "candidate_rows": share("rows", "rows_dense", cells),
            "incremental": share("incremental", "dense", both),
            "bytes_per_step": total("touched", both) * per_step,
            "dense_bytes_per_step": total("dense", both) * per_step,
            "layers": {name: {"weights_touched": c.touched / max(c.dense, 1e-12)} for name, c in {**self.cells, **self.heads}.items()},
        }


def around(network: Network) -> int:
    """Weights of a graph's operations around the layers: read whole, whatever the gates say, and in no other figure.

    A plain chain has none: its linear layers are counted as `head`.
    """
    graphs = [section.graph for section in network.spec.sections.values() if section.graph]
    return sum(math.prod(shape) for graph in graphs for shape in graph.tensors.values())


def _accumulate(into: Count, count: Count) -> None:
    for name in vars(count):
        setattr(into, name, getattr(into, name) + getattr(count, name))


def _before(values: Tensor, start: float) -> Tensor:
    """values (T,B) one step later, `start` before the first."""
    return torch.cat([torch.full_like(values[:1], start), values[:-1]])


def _any(bits: Tensor, layer: LayerSpec) -> Tensor:
    """bits (T,B,n·H) over copies -> (T,B,H), 1 where any of a unit's copies is: its row or column is read once for all of them."""
    return bits.unflatten(-1, (layer.copies, layer.hidden_size)).amax(-2)


def _lstm(layer: LayerSpec, gate: dict[str, Tensor], binary: dict[str, bool], inputs: Tensor | None, mask: Tensor, rested: bool) -> Count:
    """Per step: 3H gate rows over the non-zero columns; a candidate row for each open input gate; the projection's columns for open o."""
    hidden, steps = layer.hidden_size, float(mask.sum())
    full = torch.full_like(mask, hidden)
    read = _any(gate["o"], layer).sum(-1) if binary["o"] else full
    rows = _any(gate["i"], layer).sum(-1) if binary["i"] else full
    columns = _before(torch.full_like(mask, layer.recurrent_size) if layer.proj_size else read, 0 if rested else layer.recurrent_size)
    recurrent = float(((3 * hidden + rows) * columns * mask).sum())
    recurrent_dense = 4 * hidden * layer.recurrent_size * steps
    touched, dense = recurrent, recurrent_dense
    if inputs is not None:
        touched += float(((3 * hidden + rows) * inputs * mask).sum())
        dense += 4 * hidden * layer.input_size * steps
    if layer.proj_size:
        touched += float((read * layer.proj_size * mask).sum())
        dense += hidden * layer.proj_size * steps
    return Count(
        touched,
        touched,
        dense,
        recurrent,
        recurrent_dense,
        float((columns * mask).sum()),
        layer.recurrent_size * steps,
        float((rows * mask).sum()),
        hidden * steps,
    )


def _gru(layer: LayerSpec, gate: dict[str, Tensor], binary: dict[str, bool], inputs: Tensor | None, mask: Tensor, rested: bool) -> Count:
    """Per step: 2H gate rows over all of h; candidate rows of units that are updated (z = 0), their recurrent half only where r = 1."""
    hidden, steps = layer.hidden_size, float(mask.sum())
    ones = torch.ones_like(gate["z"])
    updated = 1 - gate["z"] if binary["z"] else ones
    reads = gate["r"] if binary["r"] else ones
    rows = _any(updated, layer).sum(-1)
    state = _before(torch.ones_like(mask), 0 if rested else 1)  # 0 where the state before the step is zero
    if layer.cell == "gru":
        candidate = _any(updated * reads, layer).sum(-1) * hidden * state
    else:
        candidate = rows * _any(reads, layer).sum(-1) * state
    before = _before(rows, 0 if rested else hidden)  # units that changed in the step before
    gates = 2 * hidden * hidden * state
    changed = 2 * hidden * before
    recurrent = float(((gates + candidate) * mask).sum())
    incremental = float(((changed + candidate) * mask).sum())
    recurrent_dense = 3 * hidden * hidden * steps
    touched, dense = recurrent, recurrent_dense
    if inputs is not None:
        extra = float(((2 * hidden + rows) * inputs * mask).sum())
        touched, incremental, dense = touched + extra, incremental + extra, dense + 3 * hidden * layer.input_size * steps
    columns = float((before * mask).sum())
    return Count(
        touched, incremental, dense, recurrent, recurrent_dense, columns, hidden * steps, float((rows * mask).sum()), hidden * steps
    )
