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
from rnn2bin.distill.windows.parts import Decided, Decisions, Drawn, Modes, activated, gather, spread


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
        (steps, batch, _), (layers, _, hidden) = x_pre.shape, weight.shape
        copies = h0.shape[1] // hidden
        recurrent = weight.transpose(1, 2).contiguous()
        gates = Decisions(x_pre, gates_bias, lo, hi, noise=noise, modes=modes)
        n = x_pre.new_empty(steps, batch, layers, hidden)
        h = x_pre.new_empty(steps, batch, layers, h0.shape[1])
        last = h0
        for t in range(steps):
            for layer in range(layers):
                product = torch.addmm(bias[layer - 1] if layer else x_pre[t], fold(last, copies), recurrent[layer])
                new = activated(phi, product[:, -hidden:], n[t, :, layer])
                if modes:
                    value = gates.decide(t, product[:, None, :hidden], first=layer)[:, 0]
                    keep, write = rule.factors(value)
                    torch.mul(keep, last, out=h[t, :, layer]).addcmul_(write, spread(new, copies))
                else:
                    h[t, :, layer] = new
                last = h[t, :, layer]
        ctx.save_for_backward(weight, h0, n, h, *gates.saved())
        ctx.modes, ctx.phi, ctx.rule = modes, phi, rule
        ctx.set_materialize_grads(False)
        return h[:, :, -1].clone(), gates.pre

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor | None, grad_pre: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, h0, n, h, *saved = ctx.saved_tensors
        gates = Decided(ctx.modes, *saved, grad=grad_pre)
        (steps, batch, layers, width), (_, rows, hidden) = h.shape, weight.shape
        copies, every_n = width // hidden, spread(n, width // hidden)
        before = torch.cat([h0[None], h[:-1, :, -1]]).unsqueeze(2)
        before = torch.cat([before, h[:, :, :-1]], 2)
        slope_n = PHI[ctx.phi].slope(every_n)
        if ctx.modes:
            keep, write = ctx.rule.factors(gates.values)
            slope_n = slope_n * write
            moved = before * ctx.rule.keep[1] + every_n * ctx.rule.write[1]
        grad = n.new_empty(steps, batch, layers, rows)
        dh = torch.zeros_like(h0)
        for t in reversed(range(steps)):
            if grad_h is not None:
                dh = dh + grad_h[t]
            for layer in reversed(range(layers)):
                grad[t, :, layer, -hidden:] = gather(dh * slope_n[t, :, layer], copies)
                kept = None
                if ctx.modes:
                    torch.mul(dh, moved[t, :, layer], out=gates.d_value[t, :, layer])
                    grad[t, :, layer, :hidden] = gates.send(t, layer, layer + 1, copies=copies)[:, 0]
                    kept = dh * keep[t, :, layer]
                dh = spread(grad[t, :, layer] @ weight[layer] / copies, copies)
                dh = dh if kept is None else dh + kept
        d_weight = torch.einsum("tblm,tblk->lmk", grad, fold(before, copies))
        d_bias, d_lo, d_hi = gates.gradients()
        return grad[:, :, 0], d_weight, grad[:, :, 1:].sum((0, 1)), d_bias, dh, d_lo, d_hi, None, None, None, None


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
