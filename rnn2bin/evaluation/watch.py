"""What a report draws of one pass over held-out data: histograms of gates, one sequence's decisions, density and open rates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rnn2bin import tasks
from rnn2bin.cells.network import Network, Output, valid_steps
from rnn2bin.data import Names
from rnn2bin.evaluation.density import DensityCounter
from rnn2bin.evaluation.html import Figures, Heatmap, Histogram
from rnn2bin.gates.estimators import FLOAT, Discretize, sample

BINS = 40
HEATMAP_STEPS, HEATMAP_UNITS = 96, 64


def histogram(values: Tensor) -> Tensor:
    """How many of the values, all within 0 and 1, lie in each of BINS bins: as `torch.histc` on one core, in a seventh of its time."""
    return torch.bincount((values.flatten() * BINS).to(torch.uint8).clamp_(max=BINS - 1), minlength=BINS).float()


@dataclass
class Watch:
    """Looks at every output once: density and open rates of the binary network, histograms of gates, one sequence's bits."""

    student: Network
    soft_mode: Discretize
    density: DensityCounter
    before: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    after: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    heat: list[tuple[str, str, Tensor, int]] = field(default_factory=list)  # section, label, bits (T,H'), H
    read: dict[str, Tensor | None] = field(default_factory=dict)  # section -> the tokens its cells read, (T,)

    def seen(self, name: str, prepared: tasks.Prepared, out: Output) -> None:
        if name == "binary":
            self.density.add(prepared, out)
            if not self.heat:
                self._one_sequence(prepared, out)
        elif name == "teacher":
            self._histogram(self.before, out, FLOAT)
        elif name == "soft_student":
            self._histogram(self.after, out, self.soft_mode)

    def _cells(self, out: Output):
        for (prefix, cell), pre, lengths in zip(self.student.cells().items(), out.pre, out.lengths, strict=True):
            yield prefix, cell, pre, lengths

    def _histogram(self, into: dict[tuple[str, str], Tensor], out: Output, mode: Discretize) -> None:
        for prefix, cell, pre, lengths in self._cells(out):
            real = pre if lengths is None else pre[valid_steps(lengths, pre.shape[0])[..., 0]]
            for k, gate in enumerate(cell.layer.kind.gate_names[: real.shape[-2]]):  # the teacher's may be fewer
                values = sample(cell.modes(mode)[k], real[..., k, :]).float().cpu()
                counts = histogram(values)
                into[prefix, gate] = into.get((prefix, gate), torch.zeros(BINS)) + counts

    def _one_sequence(self, prepared: tasks.Prepared, out: Output) -> None:
        """Of the first batch the first sequence that is long enough to fill a picture, or the longest."""
        column = 0 if prepared.lengths is None else int(prepared.lengths.clamp_max(HEATMAP_STEPS).argmax())
        given: dict[str, tuple[Tensor | None, Tensor | None]] = {
            "main": (prepared.inputs, prepared.lengths),
            "encoder": (prepared.inputs, prepared.lengths),
        }
        given["decoder"] = (prepared.decoder_input, prepared.decoder_lengths)
        for prefix, cell, pre, lengths in self._cells(out):
            section = prefix.partition(".")[0]
            steps = min(int(lengths[column]) if lengths is not None else pre.shape[0], HEATMAP_STEPS)
            for k, gate in enumerate(cell.layer.kind.gate_names):
                if cell.binary[k]:
                    width = pre.shape[-1]
                    units = torch.linspace(0, width - 1, min(HEATMAP_UNITS, width)).round().long()
                    bits = (pre[:steps, column, k].cpu()[:, units] > 0).int()
                    # z = 1 keeps: drawn as the others, "open" is what costs
                    self.heat.append((section, f"{prefix} {gate}", 1 - bits if gate == "z" else bits, width))
            inputs, own = given.get(section, (None, None))
            aligned = inputs is not None and len(pre) == len(inputs) and lengths is own  # whether the cells' steps are the input's
            tokens = None if inputs is None or not aligned or inputs.is_floating_point() else inputs[:HEATMAP_STEPS, column].cpu()
            self.read[section] = tokens if self.read.get(section, tokens) is not None else None

    def figures(self, names: Names) -> Figures:
        """`names` of the tokens on the axis of the heat maps."""
        edges = torch.linspace(0, 1, BINS + 1).numpy()
        histograms = [
            Histogram(prefix.rpartition(".")[0], direction(prefix), gate, edges, before.numpy(), self.after[prefix, gate].numpy())
            for (prefix, gate), before in self.before.items()
        ]
        return Figures(histograms, [self._heatmap(section, names) for section in dict.fromkeys(one[0] for one in self.heat)])

    def _heatmap(self, section: str, names: Names) -> Heatmap:
        rows = [(label, bits.numpy(), units) for of, label, bits, units in self.heat if of == section]
        steps = min(len(bits) for _, bits, _ in rows)
        read, known = self.read[section], names.outputs if section == "decoder" else names.inputs
        tokens = None if read is None else [known[int(t)] if known else str(int(t)) for t in read[:steps]]
        return Heatmap(section, tokens, [(label, bits[:steps], units) for label, bits, units in rows])


def direction(prefix: str) -> str:
    return "backward" if prefix.endswith("bwd") else "forward"


def figures_of(histograms: dict[tuple[str, str], tuple[Any, Any]]) -> Figures:
    """(prefix, gate) -> (counts before, counts after), without a heat map."""
    edges = torch.linspace(0, 1, BINS + 1).numpy()
    return Figures(
        [Histogram(p.rpartition(".")[0], direction(p), gate, edges, before, after) for (p, gate), (before, after) in histograms.items()]
    )
