"""Cells between an RNN and the LSTM, as "Written Memories" derives the LSTM (R2RT 2016): a state that is written selectively (i), forgotten
selectively (f) and read selectively (o).

The prototype reads its bare state and exposes it; normalized, its state is divided by sqrt(Var(s) + 1) at each step. The pseudo-LSTM looks
at φ(s) instead. Three differences lead from it to the LSTM, each of them a switch here, so that there are eight cells, `pseudo` to
`pseudo_123`:

1. the state is read after it was written, by this step's o, for the next step's candidate: r = o φ(s); else before, by the same step's o;
2. gates look at what is read of the state, and not at all of it. Without 1, o itself must be decided first and looks at all of it;
3. what others see is read too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rnn2bin.cells.family import Equations, Look, Phi, Product
from rnn2bin.cells.weights import CellWeights, Gate, fold


@dataclass(frozen=True)
class Variant:
    """`bare`: φ stands nowhere but in the candidate, and the only state is h, the memory itself."""

    bare: bool = False
    normalized: bool = False
    reads_late: bool = False  # difference 1
    gates_read: bool = False  # difference 2
    output_read: bool = False  # difference 3


def step(x: Tensor, state: tuple[Tensor, ...], w: CellWeights, gate: Gate, *, variant: Variant) -> tuple[tuple[Tensor, ...], Tensor]:
    """x (B,I), state h (B,n·H) of a prototype, else h (B,H), c (B,n·H), and r (B,H) with difference 1 but not 3 -> new states, and the
    pre-activations (B,3,n·H) of i, f, o."""
    s = state[0 if variant.bare else 1]
    copies = s.shape[1] // w.hidden
    view = s if variant.bare else w.phi(s)
    if variant.reads_late:
        read = state[0 if variant.output_read else 2]
        pre = w.gate_pre(x, read if variant.gates_read else fold(view, copies))
        i, f, o = gate(pre).unbind(1)
    elif variant.gates_read:
        late = w.gate_pre(x, fold(view, copies), first=2)
        (o,) = gate(late, first=2).unbind(1)
        read = fold(o * view, copies)
        early = w.gate_pre(x, read, last=2)
        i, f = gate(early).unbind(1)
        pre = torch.cat([early, late], 1)
    else:
        pre = w.gate_pre(x, fold(view, copies))
        i, f, o = gate(pre).unbind(1)
        read = fold(o * view, copies)
    new = w.squash(x @ w.candidate_ih.t() + read @ w.candidate_hh.t() + w.candidate_bias)
    s = f * s + i * new.repeat(1, copies)
    if variant.normalized:
        s = s / (s.var(1, correction=0, keepdim=True) + 1).sqrt()
    if variant.bare:
        return (s,), pre
    seen = w.phi(s)
    after = fold(o * seen, copies)
    h = after if variant.output_read else fold(seen, copies)
    return (h, s, after) if variant.reads_late and not variant.output_read else (h, s), pre


def _reads(look: Look, *, variant: Variant) -> Sequence[Product]:
    size, inputs, every = look.hidden, look.input_size, look.every(look.hidden)
    at = 0 if variant.bare else 1
    memory = look.before(at)  # φ(s) is zero where s is
    if variant.reads_late:
        read = look.before(0 if variant.output_read else 2)
    else:
        read = look.reads(2, at)
    seen, read = memory.sum(-1), read.sum(-1)
    gates = [Product(3 * every, None, (3 * size, inputs))]
    if variant.gates_read and not variant.reads_late:
        gates += [Product(2 * every, read, (2 * size, size)), Product(every, seen, (size, size))]
    else:
        gates += [Product(3 * every, read if variant.gates_read else seen, (3 * size, size))]
    rows = look.opens(0).sum(-1)
    return [*gates, Product(rows, None, (size, inputs)), Product(rows, read, (size, size), candidate=True)]


def _multiplied(values: Tensor, before: tuple[Tensor, ...], after: tuple[Tensor, ...], phi: Phi, *, variant: Variant) -> Sequence[Tensor]:
    """i multiplies the candidate, f the old memory, o what is read of it. Where the memory is normalized the trace hides the candidate."""
    at = 0 if variant.bare else 1
    i, f, _ = values.unbind(2)
    read = after[at] if variant.reads_late else before[at]
    new = torch.ones_like(i) if variant.normalized else (after[at] - f * before[at]) / i.clamp_min(1e-3)
    return [new, before[at], read if variant.bare else phi(read)]


VARIANTS = {
    "prototype": Variant(bare=True),
    "prototype_normalized": Variant(bare=True, normalized=True),
    "pseudo": Variant(),
    "pseudo_1": Variant(reads_late=True),
    "pseudo_2": Variant(gates_read=True),
    "pseudo_3": Variant(output_read=True),
    "pseudo_12": Variant(reads_late=True, gates_read=True),
    "pseudo_13": Variant(reads_late=True, output_read=True),
    "pseudo_23": Variant(gates_read=True, output_read=True),
    "pseudo_123": Variant(reads_late=True, gates_read=True, output_read=True),
}
CELLS = {
    name: Equations(partial(step, variant=one), partial(_reads, variant=one), partial(_multiplied, variant=one))
    for name, one in VARIANTS.items()
}
