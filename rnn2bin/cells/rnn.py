"""RNNs with one gate or none: the vanilla one (Elman 1990), and those of one forget gate between keeping h and writing it, or adding to it
(the minimal and the residual RNN)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from rnn2bin.cells.family import Equations, Look, Phi, Product
from rnn2bin.cells.weights import CellWeights, Gate, fold


def step_vanilla(x: Tensor, state: tuple[Tensor, ...], w: CellWeights, gate: Gate) -> tuple[tuple[Tensor, ...], Tensor]:
    """x (B,I), state h (B,H) -> φ(W x + U h + b), and no pre-activations (B,0,H)."""
    (h,) = state
    new = w.squash(x @ w.candidate_ih.t() + h @ w.candidate_hh.t() + w.candidate_bias)
    return (new,), h.new_zeros(len(h), 0, h.shape[1])


def step_minimal(x: Tensor, state: tuple[Tensor, ...], w: CellWeights, gate: Gate) -> tuple[tuple[Tensor, ...], Tensor]:
    """x (B,I), state h (B,n·H) -> f h + (1 − f) φ(…), and the pre-activations (B,1,n·H) of f. f = 1 keeps h."""
    h, n, f, pre = _decided(x, state, w, gate)
    return (f * h + (1 - f) * n,), pre


def step_residual(x: Tensor, state: tuple[Tensor, ...], w: CellWeights, gate: Gate) -> tuple[tuple[Tensor, ...], Tensor]:
    """As `step_minimal`, h + f φ(…). f = 0 keeps h."""
    h, n, f, pre = _decided(x, state, w, gate)
    return (h + f * n,), pre


def _decided(x: Tensor, state: tuple[Tensor, ...], w: CellWeights, gate: Gate) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, the candidate, the multipliers of f, its pre-activations."""
    (h,) = state
    copies = h.shape[1] // w.hidden
    read = fold(h, copies)
    pre = w.gate_pre(x, read)
    n = w.squash(x @ w.candidate_ih.t() + read @ w.candidate_hh.t() + w.candidate_bias).repeat(1, copies)
    return h, n, gate(pre)[:, 0], pre


def _reads(look: Look, *, writes: int | None) -> Sequence[Product]:
    """`writes`: the bit of f that asks for the candidate; None where there is no gate."""
    size, inputs, read, every = look.hidden, look.input_size, look.before(0).sum(-1), look.every(look.hidden)
    rows = every if writes is None else (look.opens(0) if writes else look.closes(0)).sum(-1)
    gates = [] if writes is None else [Product(every, None, (size, inputs)), Product(every, read, (size, size))]
    return [*gates, Product(rows, None, (size, inputs)), Product(rows, read, (size, size), candidate=True)]


def _kept(values: Tensor, before: tuple[Tensor, ...], after: tuple[Tensor, ...], phi: Phi) -> Sequence[Tensor]:
    """f chooses between h and the candidate: h − n = (h − h') / (1 − f)."""
    return [(before[0] - after[0]) / (1 - values[:, :, 0]).clamp_min(1e-3)]


def _added(values: Tensor, before: tuple[Tensor, ...], after: tuple[Tensor, ...], phi: Phi) -> Sequence[Tensor]:
    return [(after[0] - before[0]) / values[:, :, 0].clamp_min(1e-3)]


CELLS = {
    "rnn": Equations(step_vanilla, partial(_reads, writes=None)),
    "rnn_minimal": Equations(step_minimal, partial(_reads, writes=0), _kept),
    "rnn_residual": Equations(step_residual, partial(_reads, writes=1), _added),
}
