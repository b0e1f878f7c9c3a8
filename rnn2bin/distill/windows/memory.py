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
        hidden, lookers = x_pre.shape[3], _lookers(variant)
        copies, cut = s0.shape[1] // hidden, (4 - lookers) * hidden
        of_read, of_all = weight_hh[:cut].t().contiguous(), weight_hh[cut:].t().contiguous()
        gates = Decisions(gates_bias, lo, hi, noise=noise, modes=modes)
        decide_readers = gates.part(0, 3 - lookers, hidden) if lookers < 3 else None
        decide_lookers = gates.part(3 - lookers, 3, hidden) if lookers else None
        s, y0 = s0, s0 if variant.bare else PHI[phi].value(s0)
        y, read, shows = y0, fold(s0, copies) if read0 is None else read0, variant.reads_late or variant.output_read
        every_n, every_read, every_s, every_y, afters, scales = (list[Tensor]() for _ in range(6))
        for x_read, x_all in zip(*(x.unbind(0) for x in x_pre.flatten(2).split([cut, 4 * hidden - cut], 2)), strict=True):
            looked = decide_lookers(torch.addmm(x_all, fold(y, copies), of_all)).unbind(1) if decide_lookers else ()
            if not variant.reads_late:
                read = fold(looked[-1] * y, copies)
            product = torch.addmm(x_read, read, of_read)
            i, f, o = *(decide_readers(product[:, hidden:]).unbind(1) if decide_readers else ()), *looked
            n = activated(phi, product[:, :hidden])
            s = (f * s).addcmul_(i, spread(n, copies))
            if variant.normalized:
                scales.append(scale := (s.var(1, correction=0, keepdim=True) + 1).rsqrt_())
                s = s * scale
            y = s if variant.bare else activated(phi, s)
            for kept, value in ((every_n, n), (every_read, read), (every_s, s), (every_y, y)):
                kept.append(value)
            if shows:
                afters.append(after := fold(o * y, copies))
                read = after
        n, reads, s, ys = (stacked(kept) for kept in (every_n, every_read, every_s, every_y))
        every_after = stacked(afters) if shows else s0.new_empty(0)
        pre, samples, values = gates.over_time(x_pre)
        every_scale = stacked(scales) if variant.normalized else None
        ctx.save_for_backward(weight_hh, s0, y0, n, reads, s, ys, every_scale, pre, samples, values, lo, hi, noise)
        ctx.modes, ctx.phi, ctx.variant = modes, phi, variant
        ctx.set_materialize_grads(False)
        return s0.new_empty(0) if variant.bare or variant.output_read else fold(ys, copies).clone(), every_after, s, pre

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_shown: Tensor | None, grad_after: Tensor | None, grad_s: Tensor | None, grad_pre: Tensor | None) -> Any:
        weight_hh, s0, y0, n, reads, s, y, scale, pre, samples, values, lo, hi, noise = ctx.saved_tensors
        (steps, batch, hidden), late, lookers = n.shape, ctx.variant.reads_late, _lookers(ctx.variant)
        copies, cut, shows = s.shape[2] // hidden, (4 - lookers) * hidden, late or ctx.variant.output_read
        of_read, of_all, phi = weight_hh[:cut], weight_hh[cut:], PHI[ctx.phi].slope
        slope_y = (lambda y: torch.ones_like(y)) if ctx.variant.bare else phi
        i, f, o = values.unbind(2)
        s_before, y_before, every_n = torch.cat([s0[None], s[:-1]]), torch.cat([y0[None], y[:-1]]), spread(n, copies)
        through = level_slopes(ctx.modes, pre, samples, lo, hi, noise)
        moved = torch.stack([every_n, s_before], 2)  # by i and f
        # What d s sends to the candidate, to i and to f; what d(o·φ(s)) sends to o, and d φ(s) to s.
        of_s = torch.cat([(i * phi(every_n)).unsqueeze(2), through[:, :, :2] * moved], 2).unbind(0)
        of_before, of_after = (through[:, :, 2] * y_before).unbind(0), (through[:, :, 2] * y).unbind(0)
        of_y, kept, opened = slope_y(y).unbind(0), f.unbind(0), o.unbind(0)
        off_mean = None if scale is None else ((s - s.mean(2, keepdim=True)) * scale).unbind(0)
        shown, after, memory = steps_of(grad_shown), steps_of(grad_after), steps_of(grad_s)
        decided = steps_of(grad_pre)
        zero, none = torch.zeros_like(s0), n.new_zeros(batch, hidden)
        d_s, d_y, d_read = zero, zero, none
        learns = ctx.needs_input_grad[5] or ctx.needs_input_grad[6]
        rows, d_os, d_ss, befores, afters = [], [], [], [], []
        for t in reversed(range(steps)):
            if shown is not None:
                d_y = d_y + shared(shown[t], copies)
            d_o = zero
            if shows:
                dm = shared(plus(d_read if late else none, after, t), copies)  # d(o·φ(s)), after the step
                if learns:
                    afters.append(dm)
                d_o, d_y = dm * of_after[t], torch.addcmul(d_y, dm, opened[t])
            d_s = torch.addcmul(plus(d_s, memory, t), d_y, of_y[t])
            if off_mean is not None:
                d_s = d_s * scale[t] - off_mean[t] * (d_s * s[t]).mean(1, keepdim=True)
            row = d_s.unsqueeze(1) * of_s[t]
            if decided is not None:
                row[:, 1:] += decided[t][:, :2]
            folded, d_y = gather(row, copies), zero
            if not late:
                dm = shared(folded[:, : 4 - lookers].flatten(1) @ of_read, copies)  # the same before it
                if learns:
                    befores.append(dm)
                d_o, d_y = torch.addcmul(d_o, dm, of_before[t]), dm * opened[t]
            if decided is not None:
                d_o = d_o + decided[t][:, 2]
            every = torch.cat([folded.flatten(1), gather(d_o, copies)], 1)
            if late:
                d_read = every[:, :cut] @ of_read
            if lookers:
                d_y = d_y + shared(every[:, cut:] @ of_all, copies)
            rows.append(row)
            d_os.append(d_o)
            if learns:
                d_ss.append(d_s)
            d_s = d_s * kept[t]
        d_s = torch.addcmul(d_s, d_y, slope_y(y0))
        d_pre = torch.cat([in_order(rows), in_order(d_os).unsqueeze(2)], 2)  # and the candidate's, first
        grad = gather(d_pre, copies)
        flat = grad.flatten(2).flatten(0, 1).t()
        d_weight = torch.cat([flat[:cut] @ reads.flatten(0, 1), flat[cut:] @ fold(y_before, copies).flatten(0, 1)])
        d_lo = d_hi = None
        if learns:
            of_o = torch.zeros_like(s)
            for dms, seen in ((afters, y), (befores, y_before)):
                if dms:
                    of_o.addcmul_(in_order(dms), seen)
            d_lo, d_hi = level_gradients(torch.cat([in_order(d_ss).unsqueeze(2) * moved, of_o.unsqueeze(2)], 2), samples)
        return grad, d_weight, d_pre[:, :, 1:].sum((0, 1)), d_read if late else None, d_s, d_lo, d_hi, None, None, None, None


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
