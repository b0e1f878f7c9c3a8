"""LSTM with diagonal peepholes (Gers & Schmidhuber 2000; Graves 2013, arXiv 1308.0850, eq. 7-11): gates see their own unit's cell."""

from __future__ import annotations

import torch
from torch import Tensor

from rnn2bin.cells.weights import CellWeights, Gate, clipped, fold


def step(x: Tensor, state: tuple[Tensor, ...], w: CellWeights, gate: Gate) -> tuple[tuple[Tensor, ...], Tensor]:
    """As `lstm.step`; i and f see the cell before the step, o the cell after it."""
    h, c = state
    pre = w.gate_pre(x, h)
    copies = c.shape[1] // w.candidate_hh.shape[0]
    before = pre[:, :2] + w.peek(c)[:, :2]
    i, f = gate(before).unbind(1)
    g = w.squash(x @ w.candidate_ih.t() + h @ w.candidate_hh.t() + w.candidate_bias)
    c = clipped(f * c + i * g.repeat(1, copies), w.cell_clip)
    after = pre[:, 2:] + w.peek(c)[:, 2:]
    (o,) = gate(after, first=2).unbind(1)
    return (w.emit(fold(o * w.phi(c), copies)), c), torch.cat([before, after], 1)
