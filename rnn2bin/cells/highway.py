"""Highway layers (Srivastava et al. 2015, arXiv 1505.00387) and recurrent highway networks (Zilly et al. 2016, arXiv 1607.03474, eq. 7-9),
with the carry gate coupled to the transform gate: y = t φ(…) + (1 − t) x. t = 0 carries exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rnn2bin.cells.family import Equations, Look, Product
from rnn2bin.cells.weights import CellWeights, Gate, fold


def step(x: Tensor, state: tuple[Tensor, ...], w: CellWeights, gate: Gate) -> tuple[tuple[Tensor, ...], Tensor]:
    """x (B,H) -> t φ(W x + b) + (1 − t) x for every copy (B,n·H), and the pre-activations (B,1,n·H) of t. No step reads another."""
    copies = state[0].shape[1] // w.hidden
    pre = w.thresholds(x @ w.gates_ih.t())
    t = gate(pre)[:, 0]
    new = w.squash(x @ w.candidate_ih.t() + w.candidate_bias).repeat(1, copies)
    return (t * new + (1 - t) * x.repeat(1, copies),), pre


def step_recurrent(x: Tensor, state: tuple[Tensor, ...], w: CellWeights, gate: Gate) -> tuple[tuple[Tensor, ...], Tensor]:
    """x (B,I), state h (B,n·H) -> new h, and the pre-activations (B,L,n·H) of every layer's t. The first layer alone reads x; each carries
    on what the one before it gives."""
    (h,) = state
    hidden, copies = w.hidden, h.shape[1] // w.hidden
    pres = []
    for layer in range(w.depth):
        rows, read = slice(layer * hidden, (layer + 1) * hidden), fold(h, copies)
        asked, new = read @ w.gates_hh[rows].t(), read @ w.candidate_hh[rows].t() + w.candidate_bias[rows]
        if layer == 0:
            asked, new = asked + x @ w.gates_ih.t(), new + x @ w.candidate_ih.t()
        pre = w.thresholds(asked, first=layer)
        t = gate(pre, first=layer)[:, 0]
        h = t * w.squash(new).repeat(1, copies) + (1 - t) * h
        pres.append(pre)
    return (h,), torch.cat(pres, 1)


def _reads(look: Look) -> Sequence[Product]:
    size, every, rows = look.hidden, look.every(look.hidden), look.opens(0).sum(-1)
    return [Product(every, None, (size, size)), Product(rows, None, (size, size), candidate=True)]


def _reads_recurrent(look: Look) -> Sequence[Product]:
    """What layers hand on within a step is in no trace: it counts as whole, which it is but for a state of zero that all of them carry."""
    size, inputs, every = look.hidden, look.input_size, look.every(look.hidden)
    products = [Product(every, None, (size, inputs)), Product(look.opens(0).sum(-1), None, (size, inputs))]
    for layer in range(look.depth):
        seen = look.before(0).sum(-1) if layer == 0 else every
        products += [Product(every, seen, (size, size)), Product(look.opens(layer).sum(-1), seen, (size, size), candidate=True)]
    return products


CELLS = {"highway": Equations(step, _reads), "recurrent_highway": Equations(step_recurrent, _reads_recurrent)}
