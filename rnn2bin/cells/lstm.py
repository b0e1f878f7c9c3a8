"""LSTM (Hochreiter & Schmidhuber 1997, Gers et al. 2000), with PyTorch's optional projection (Sak et al. 2014)."""

from __future__ import annotations

from torch import Tensor

from rnn2bin.cells.weights import CellWeights, Gate, clipped, fold


def step(x: Tensor, state: tuple[Tensor, ...], w: CellWeights, gate: Gate) -> tuple[tuple[Tensor, ...], Tensor]:
    """x (B,I), state h (B,R) and c (B,n·H) -> new (h, c), and the pre-activations (B,3,n·H) of i, f, o."""
    h, c = state
    pre = w.gate_pre(x, h)
    copies = c.shape[1] // w.candidate_hh.shape[0]
    i, f, o = gate(pre).unbind(1)
    g = w.squash(x @ w.candidate_ih.t() + h @ w.candidate_hh.t() + w.candidate_bias)
    c = clipped(f * c + i * g.repeat(1, copies), w.cell_clip)
    return (w.emit(fold(o * w.phi(c), copies)), c), pre
