"""GRU in both reset forms: after the recurrent product (PyTorch, cuDNN) and before it (Cho et al. 2014, arXiv 1406.1078)."""

from __future__ import annotations

from torch import Tensor

from rnn2bin.cells.weights import CellWeights, Gate, fold


def step_reset_after(x: Tensor, state: tuple[Tensor, ...], w: CellWeights, gate: Gate) -> tuple[tuple[Tensor, ...], Tensor]:
    """x (B,I), state h (B,n·H) -> new h, and the pre-activations (B,2,n·H) of r, z. z = 1 keeps h."""
    (h,) = state
    copies = h.shape[1] // w.candidate_hh.shape[0]
    read = fold(h, copies)
    pre = w.gate_pre(x, read)
    r, z = gate(pre).unbind(1)
    assert w.candidate_bias_hh is not None  # kinds.CellKind.candidate_bias_hh
    recurrent = read @ w.candidate_hh.t() + w.candidate_bias_hh
    n = w.squash((x @ w.candidate_ih.t() + w.candidate_bias).repeat(1, copies) + r * recurrent.repeat(1, copies))
    return (z * h + (1 - z) * n,), pre


def step_output(x: Tensor, state: tuple[Tensor, ...], w: CellWeights, gate: Gate) -> tuple[tuple[Tensor, ...], Tensor]:
    """As `step_reset_after` with an output gate: x (B,I), state h (B,H) and c (B,n·H) -> new (h, c), and the pre-activations (B,3,n·H) of
    r, z, o. h = o⊙c is all that is read."""
    h, c = state
    copies = c.shape[1] // w.candidate_hh.shape[0]
    pre = w.gate_pre(x, h)
    r, z, o = gate(pre).unbind(1)
    assert w.candidate_bias_hh is not None  # kinds.CellKind.candidate_bias_hh
    recurrent = h @ w.candidate_hh.t() + w.candidate_bias_hh
    n = w.squash((x @ w.candidate_ih.t() + w.candidate_bias).repeat(1, copies) + r * recurrent.repeat(1, copies))
    c = z * c + (1 - z) * n
    return (fold(o * c, copies), c), pre


def step_reset_before(x: Tensor, state: tuple[Tensor, ...], w: CellWeights, gate: Gate) -> tuple[tuple[Tensor, ...], Tensor]:
    """As `step_reset_after`, with r applied to h before the candidate's recurrent product."""
    (h,) = state
    copies = h.shape[1] // w.candidate_hh.shape[0]
    pre = w.gate_pre(x, fold(h, copies))
    r, z = gate(pre).unbind(1)
    n = w.squash(x @ w.candidate_ih.t() + fold(r * h, copies) @ w.candidate_hh.t() + w.candidate_bias).repeat(1, copies)
    return (z * h + (1 - z) * n,), pre
