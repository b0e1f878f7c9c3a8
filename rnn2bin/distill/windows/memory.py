"""The cells of `cells/memory.py`: prototypes, the pseudo-LSTM, and what lies between it and the LSTM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rnn2bin.cells.memory import VARIANTS, Variant
from rnn2bin.cells.network import CellState, Lookup, Trace
from rnn2bin.cells.weights import PHI, Cell, fold
from rnn2bin.distill.windows.inputs import input_product
from rnn2bin.distill.windows.parts import Decided, Decisions, Drawn, Modes, activated, gather, spread


def _lookers(variant: Variant) -> int:
    """How many of i, f, o, the last ones, look at all of the memory. The others, as the candidate, look at what is read of it."""
    if not variant.gates_read:
        return 3
    return 0 if variant.reads_late else 1


class MemoryWindow(torch.autograd.Function):
    """x_pre (T,B,4,H) in the order candidate, i, f, o, the gates' without their bias -> what is shown of the memory s: all of it, folded
    φ(s) (T,B,H), and what is read of it after the step o φ(s) (T,B,H), each empty where the variant shows it nowhere; s (T,B,n·H); gate
    pre-activations (T,B,3,n·H). A product of two halves: of the rows that look at what is read, and of the last gates' (`_lookers`)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x_pre: Tensor,
        weight_hh: Tensor,  # (4H,H)
        gates_bias: Tensor,  # (3,n·H)
        read0: Tensor | None,  # (B,H) where reading is late
        s0: Tensor,  # (B,n·H)
        lo: Tensor,  # (3,n·H)
        hi: Tensor,
        noise: Tensor | None,
        modes: Modes,
        phi: str,
        variant: Variant,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        steps, batch, _, hidden = x_pre.shape
        copies, lookers = s0.shape[1] // hidden, _lookers(variant)
        cut = (4 - lookers) * hidden
        of_read, of_all = weight_hh[:cut].t().contiguous(), weight_hh[cut:].t().contiguous()
        view = "identity" if variant.bare else phi
        gates = Decisions(x_pre, gates_bias, lo, hi, noise=noise, modes=modes)
        n, read = x_pre.new_empty(steps, batch, hidden), x_pre.new_empty(steps, batch, hidden)
        s, y = x_pre.new_empty(steps, batch, s0.shape[1]), x_pre.new_empty(steps, batch, s0.shape[1])
        scale = x_pre.new_empty(steps, batch, 1) if variant.normalized else None
        after = x_pre.new_empty(steps if variant.reads_late or variant.output_read else 0, batch, hidden)
        x_read, x_all = x_pre.flatten(2)[:, :, :cut], x_pre.flatten(2)[:, :, cut:]
        y0 = PHI[view].value(s0)
        last_s, last_y = s0, y0
        for t in range(steps):
            if lookers:
                asked = torch.addmm(x_all[t], fold(last_y, copies), of_all)
                gates.decide(t, asked.view(batch, lookers, hidden), first=3 - lookers)
            i, f, o = gates.values[t].unbind(1)
            if not variant.reads_late:
                read[t] = fold(o * last_y, copies)
            elif read0 is not None:
                read[t] = after[t - 1] if t else read0
            product = torch.addmm(x_read[t], read[t], of_read).view(batch, 4 - lookers, hidden)
            if lookers < 3:
                gates.decide(t, product[:, 1:])
            activated(phi, product[:, 0], n[t])
            torch.mul(f, last_s, out=s[t]).addcmul_(i, spread(n[t], copies))
            if scale is not None:
                torch.rsqrt(s[t].var(1, correction=0, keepdim=True).add_(1), out=scale[t])
                s[t].mul_(scale[t])
            activated(view, s[t], y[t])
            if len(after):
                after[t] = fold(o * y[t], copies)
            last_s, last_y = s[t], y[t]
        shown = y.new_empty(0) if variant.bare or variant.output_read else fold(y, copies)
        ctx.save_for_backward(weight_hh, s0, y0, n, read, s, y, scale, *gates.saved())
        ctx.modes, ctx.phi, ctx.view, ctx.variant = modes, phi, view, variant
        ctx.set_materialize_grads(False)
        return shown, after, s, gates.pre

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_shown: Tensor | None, grad_after: Tensor | None, grad_s: Tensor | None, grad_pre: Tensor | None) -> Any:
        weight_hh, s0, y0, n, read, s, y, scale, *saved = ctx.saved_tensors
        gates = Decided(ctx.modes, *saved, grad=grad_pre)
        steps, batch, hidden = n.shape
        late, lookers = ctx.variant.reads_late, _lookers(ctx.variant)
        copies, cut = s.shape[2] // hidden, (4 - lookers) * hidden
        i, f, o = gates.values.unbind(2)
        d_i_f, d_o = gates.d_value[:, :, :2], gates.d_value[:, :, 2]
        s_before, y_before = torch.cat([s0[None], s[:-1]]), torch.cat([y0[None], y[:-1]])
        every_n, slope_y = spread(n, copies), PHI[ctx.view].slope(y)
        moved, slope_n = torch.stack([every_n, s_before], 2), i * PHI[ctx.phi].slope(every_n)
        if grad_shown is not None:
            grad_shown = spread(grad_shown / copies, copies)
        off_mean = None if scale is None else (s - s.mean(2, keepdim=True)) * scale
        grad = n.new_empty(steps, batch, 4, hidden)
        d_s, d_y, d_read = torch.zeros_like(s0), torch.zeros_like(s0), n.new_zeros(batch, hidden)
        for t in reversed(range(steps)):
            if grad_shown is not None:
                d_y += grad_shown[t]
            d_after = d_read if late else None
            if grad_after is not None:
                d_after = grad_after[t] if d_after is None else d_after + grad_after[t]
            if d_after is not None:
                dm = spread(d_after / copies, copies)  # d(o·φ(s))
                torch.mul(dm, y[t], out=d_o[t])
                d_y.addcmul_(dm, o[t])
            else:
                d_o[t] = 0
            if grad_s is not None:
                d_s += grad_s[t]
            d_s.addcmul_(d_y, slope_y[t])
            if scale is not None and off_mean is not None:
                d_s = d_s * scale[t] - off_mean[t] * (d_s * s[t]).mean(1, keepdim=True)
            torch.mul(d_s.unsqueeze(1), moved[t], out=d_i_f[t])
            grad[t, :, 0] = gather(d_s * slope_n[t], copies)
            if lookers < 3:
                grad[t, :, 1 : 4 - lookers] = gates.send(t, 0, 3 - lookers, copies=copies)
            d_read = grad[t].flatten(1)[:, :cut] @ weight_hh[:cut]
            d_y = torch.zeros_like(d_y)
            if not late:
                dm = spread(d_read / copies, copies)
                d_o[t].addcmul_(dm, y_before[t])
                d_y.addcmul_(dm, o[t])
            if lookers:
                grad[t, :, 4 - lookers :] = gates.send(t, 3 - lookers, 3, copies=copies)
                d_y += spread(grad[t].flatten(1)[:, cut:] @ weight_hh[cut:] / copies, copies)
            d_s = d_s * f[t]
        d_s = d_s.addcmul_(d_y, PHI[ctx.view].slope(y0))
        rows = grad.flatten(2).flatten(0, 1).t()
        d_weight = torch.cat([rows[:cut] @ read.flatten(0, 1), rows[cut:] @ fold(y_before, copies).flatten(0, 1)])
        d_bias, d_lo, d_hi = gates.gradients()
        return grad, d_weight, d_bias, d_read if late else None, d_s, d_lo, d_hi, None, None, None, None


def run(cell: Cell, x: Tensor | Lookup, state: CellState, *, modes: Modes, noise: Drawn) -> Trace:
    """x (T,B,I) or tokens, states as `cells.memory.step` has them."""
    w, (lo, hi), hidden = cell.weights(), cell.level_values(), cell.layer.hidden_size
    variant = VARIANTS[cell.layer.cell]
    bias = torch.cat([w.candidate_bias, w.candidate_bias.new_zeros(3 * hidden)])  # the gates' belong to the copies
    x_pre = input_product(x, torch.cat([w.candidate_ih, w.gates_ih]), bias=bias).unflatten(2, (4, hidden))
    weight_hh, gates_bias = torch.cat([w.candidate_hh, w.gates_hh]), w.gates_bias.view(3, -1)
    s0 = state[0 if variant.bare else 1]
    read0 = None if not variant.reads_late else state[0 if variant.output_read else 2]
    more = (lo, hi, noise.units, modes, cell.layer.activation, variant)
    shown, after, s, pre = MemoryWindow.apply(x_pre, weight_hh, gates_bias, read0, s0, *more)
    if variant.bare:
        return Trace((s,), pre)
    if variant.output_read:
        return Trace((after, s), pre)
    return Trace((shown, s, after) if variant.reads_late else (shown, s), pre)
