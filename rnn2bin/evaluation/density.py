"""Density: the share of weights that a skipping runtime must touch, summed over a part; `rnn2bin.cost` says what counts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rnn2bin import cost
from rnn2bin.cells.network import Network, Output
from rnn2bin.cost import Count, Read
from rnn2bin.tasks import Prepared

BYTES = {"fp16": 2, "int8": 1}  # of a layer's weight; a head's has 2


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
        for read in cost.cells(self.network, prepared, output):
            self.add_cell(read)
        last = -1
        for section, spec in self.network.spec.sections.items():
            last += len(spec.layers)
            if spec.head and spec.readout == "all":
                lengths = prepared.decoder_lengths if section == "decoder" else prepared.lengths
                _accumulate(self.heads, section, cost.head(spec, output.hidden[last], lengths))

    def add_cell(self, read: Read) -> None:
        _accumulate(self.cells, read.name, cost.count(read))
        mask, pre = read.mask, read.trace.pre
        open_now = cost.bits(pre).sum(-1).double() / pre.shape[-1]  # a sum of bits is exact in float32
        opened = (open_now * mask[..., None]).sum((0, 1)).cpu()
        self.opened[read.name] = self.opened.get(read.name, torch.zeros_like(opened)) + opened
        self.steps[read.name] = self.steps.get(read.name, 0.0) + float(mask.sum())

    def open_rate(self, name: str) -> list[float]:
        """Share of ones of each gate of a cell."""
        return (self.opened[name] / self.steps[name]).tolist()

    def _steps_of(self, name: str) -> float:
        """Steps that a cell, or the head of a section, ran."""
        own = self.steps.get(name)
        return own if own is not None else max(steps for cell, steps in self.steps.items() if cell.startswith(f"{name}."))

    def result(self) -> dict[str, Any]:
        """The `density` object of report.json."""
        cells = list(self.cells.values())
        both = cells + list(self.heads.values())
        per_step = 1 / max(self.steps.values())
        sizes = [BYTES[self.network.weights]] * len(cells) + [BYTES["fp16"]] * len(self.heads)
        return {
            "weights_touched": _share("touched", "dense", both),
            "recurrent": _share("recurrent", "recurrent_dense", cells),
            "columns": _share("columns", "columns_dense", cells),
            "candidate_rows": _share("rows", "rows_dense", cells),
            "incremental": _share("incremental", "dense", both),
            "read": _share("incremental", "dense", cells),  # what budget.density counts: the layers alone
            "bytes_per_step": sum(_total("touched", [c]) * size for c, size in zip(both, sizes, strict=True)) * per_step,
            "dense_bytes_per_step": sum(_total("dense", [c]) * size for c, size in zip(both, sizes, strict=True)) * per_step,
            "layers": {
                name: {"weights_touched": _share("touched", "dense", [c]), "weights": round(_total("dense", [c]) / self._steps_of(name))}
                for name, c in {**self.cells, **self.heads}.items()
            },
        }


def around(network: Network) -> int:
    """Weights of a graph's operations around the layers: read whole, whatever the gates say, and in no other figure.

    A plain chain has none: its linear layers are counted as `head`.
    """
    graphs = [section.graph for section in network.spec.sections.values() if section.graph]
    return sum(math.prod(shape) for graph in graphs for shape in graph.tensors.values())


def _total(name: str, over: list[Count]) -> float:
    return sum(float(getattr(c, name)) for c in over)


def _share(touched: str, dense: str, over: list[Count]) -> float:
    return _total(touched, over) / max(_total(dense, over), 1e-12)


def _accumulate(into: dict[str, Count], name: str, count: Count) -> None:
    into[name] = into[name] + count if name in into else count
