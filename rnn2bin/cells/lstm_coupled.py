"""LSTM whose input and forget gate are one decision, f = 1 − i (CIFG: Greff et al. 2015, arXiv 1503.04069), with peepholes and without."""

from __future__ import annotations

import torch
from torch import Tensor

from rnn2bin.cells.weights import CellWeights, Gate, clipped, fold


def step(x: Tensor, state: tuple[Tensor, ...], w: CellWeights, gate: Gate) -> tuple[tuple[Tensor, ...], Tensor]:
    """x (B,I), state h (B,R) and c (B,n·H) -> new (h, c), and the pre-activations (B,2,n·H) of i, o. i = 0 keeps c."""
    h, c = state
    pre = w.gate_pre(x, h)
    copies = c.shape[1] // w.candidate_hh.shape[0]
    i, o = gate(pre).unbind(1)
    g = w.squash(x @ w.candidate_ih.t() + h @ w.candidate_hh.t() + w.candidate_bias)
    c = clipped((1 - i) * c + i * g.repeat(1, copies), w.cell_clip)
    return (w.emit(fold(o * w.phi(c), copies)), c), pre


def step_peephole(x: Tensor, state: tuple[Tensor, ...], w: CellWeights, gate: Gate) -> tuple[tuple[Tensor, ...], Tensor]:
    """As `step`; i sees the cell before the step, o the cell after it."""
    h, c = state
    pre = w.gate_pre(x, h)
    copies = c.shape[1] // w.candidate_hh.shape[0]
    before = pre[:, :1] + w.peek(c)[:, :1]
    (i,) = gate(before).unbind(1)
    g = w.squash(x @ w.candidate_ih.t() + h @ w.candidate_hh.t() + w.candidate_bias)
    c = clipped((1 - i) * c + i * g.repeat(1, copies), w.cell_clip)
    after = pre[:, 1:] + w.peek(c)[:, 1:]
    (o,) = gate(after, first=1).unbind(1)
    return (w.emit(fold(o * w.phi(c), copies)), c), torch.cat([before, after], 1)
