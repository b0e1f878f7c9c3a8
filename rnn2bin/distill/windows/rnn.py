"""Cells whose state is what they keep of it and what they write: the RNNs of `cells/rnn.py`, and recurrent highway networks, which do that
several times a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rnn2bin.cells.network import CellState, Lookup, Trace
from rnn2bin.cells.weights import PHI, Cell, fold
from rnn2bin.distill.windows.inputs import input_product
from rnn2bin.distill.windows.parts import (
    Decisions,
    Drawn,
    Modes,
    activated,
    gather,
    in_order,
    level_gradients,
    level_slopes,
    plus,
    shared,
    spread,
    stacked,
    steps_of,
)


@dataclass(frozen=True)
class Rule:
    """h' = keep·h + write·n, both of them a + b·v of the gate's value v, here (a, b)."""

    keep: tuple[float, float]
    write: tuple[float, float]

    def factors(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """keep and write, in v's shape."""
        (keep, by), (write, more) = self.keep, self.write
        return v * by + keep, v * more + write


RULES = {
    "rnn": Rule((0, 0), (1, 0)),
    "rnn_minimal": Rule((0, 1), (1, -1)),
    "rnn_residual": Rule((1, 0), (0, 1)),
    "recurrent_highway": Rule((1, -1), (0, 1)),
}


class RnnWindow(torch.autograd.Function):
    """x_pre (T,B,M), the first layer's, M = H or 2H in the order gate, candidate, the gate's without its bias -> h (T,B,n·H), gate
    pre-activations (T,B,L,n·H), of an RNN without gates (T,B,0,H)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x_pre: Tensor,
        weight: Tensor,  # (L,M,H)
        bias: Tensor,  # (L-1,M) of the other layers, the gate's part 0: it belongs to the copies
        gates_bias: Tensor,  # (G,n·H): G = L, or 0
        h0: Tensor,  # (B,n·H)
        lo: Tensor,  # (G,n·H)
        hi: Tensor,
        noise: Tensor | None,
        modes: Modes,
        phi: str,
        rule: Rule,
    ) -> tuple[Tensor, Tensor]:
        layers, _, hidden = weight.shape
        copies, recurrent = h0.shape[1] // hidden, weight.transpose(1, 2).contiguous().unbind(0)
        gates = Decisions(gates_bias, lo, hi, noise=noise, modes=modes)
        decide = [gates.part(k, k + 1, hidden) for k in range(len(modes))]
        h, every_n, every_h = h0, [], []
        for x in x_pre.unbind(0):
            for k in range(layers):
                product = torch.addmm(bias[k - 1] if k else x, fold(h, copies), recurrent[k])
                n = activated(phi, product[:, -hidden:])
                every_n.append(n)
                if modes:
                    keep, write = rule.factors(decide[k](product[:, :hidden])[:, 0])
                    h = (keep * h).addcmul_(write, spread(n, copies))
                else:
                    h = n
                every_h.append(h)
        n, every = (stacked(x).unflatten(0, (-1, layers)) for x in (every_n, every_h))  # (T,L,B,·)
        pre, samples, values = gates.over_time(x_pre)
        ctx.save_for_backward(weight, h0, n, every, pre, samples, values, lo, hi, noise)
        ctx.modes, ctx.phi, ctx.rule = modes, phi, rule
        ctx.set_materialize_grads(False)
        return every[:, -1].clone(), pre

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor | None, grad_pre: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, h0, n, h, pre, samples, values, lo, hi, noise = ctx.saved_tensors
        (steps, layers), hidden = h.shape[:2], weight.shape[2]
        copies, gated = h.shape[3] // hidden, bool(ctx.modes)
        every_n = spread(n, copies)
        before = torch.cat([h0[None], h.flatten(0, 1)[:-1]]).view_as(h)
        slopes = PHI[ctx.phi].slope(every_n).unsqueeze(3)  # what d h' sends to the candidate, and, before it, to a gate
        if gated:
            keep, write = (x.transpose(1, 2) for x in ctx.rule.factors(values))
            moved = before * ctx.rule.keep[1] + every_n * ctx.rule.write[1]
            through = level_slopes(ctx.modes, pre, samples, lo, hi, noise).transpose(1, 2)
            slopes = torch.stack([moved * through, slopes.squeeze(3) * write], 3)
            kept = keep.flatten(0, 1).unbind(0)  # what d h' sends to h as it is
        slope, outside, decided = slopes.flatten(0, 1).unbind(0), steps_of(grad_h), steps_of(grad_pre) if gated else None
        dh, d_hs, found = torch.zeros_like(h0), [], []
        for at in reversed(range(steps * layers)):
            t, k = divmod(at, layers)
            if k == layers - 1:
                dh = plus(dh, outside, t)
            row = dh.unsqueeze(1) * slope[at]
            if decided is not None:
                row[:, 0] += decided[t][:, k]
            d_hs.append(dh)
            found.append(row)
            read = shared(gather(row, copies).flatten(1) @ weight[k], copies)
            dh = torch.addcmul(read, dh, kept[at]) if gated else read
        d_pre = in_order(found).unflatten(0, (steps, layers))  # (T,L,B,1 or 2,n·H)
        grad = gather(d_pre, copies).flatten(3)
        d_weight = torch.einsum("tlbm,tlbk->lmk", grad, fold(before, copies))
        d_bias = d_lo = d_hi = None
        if gated:
            d_bias = d_pre[:, :, :, 0].sum((0, 2))
            if ctx.needs_input_grad[5] or ctx.needs_input_grad[6]:
                d_lo, d_hi = level_gradients((in_order(d_hs).view_as(h) * moved).transpose(1, 2), samples)
        return grad[:, 0], d_weight, grad[:, 1:].sum((0, 2)), d_bias, dh, d_lo, d_hi, None, None, None, None


def run(cell: Cell, x: Tensor | Lookup, state: CellState, *, modes: Modes, noise: Drawn) -> Trace:
    """x (T,B,I) or tokens, state h (B,n·H)."""
    w, (lo, hi), layer = cell.weights(), cell.level_values(), cell.layer
    layers, hidden, width = layer.depth, layer.hidden_size, layer.width
    in_layers = lambda gates, candidates: torch.cat([t.unflatten(0, (layers, hidden)) for t in (gates, candidates) if t.numel()], 1)
    weight = in_layers(w.gates_hh, w.candidate_hh)
    bias = w.candidate_bias.view(layers, hidden)
    bias = torch.cat([bias.new_zeros(layers, weight.shape[1] - hidden), bias], 1)
    x_pre = input_product(x, torch.cat([t for t in (w.gates_ih, w.candidate_ih) if t.numel()]), bias=bias[0])
    more = (lo, hi, noise.units, modes, layer.activation, RULES[layer.cell])
    h, pre = RnnWindow.apply(x_pre, weight, bias[1:], w.gates_bias.view(-1, width), state[0], *more)
    return Trace((h,), pre)
