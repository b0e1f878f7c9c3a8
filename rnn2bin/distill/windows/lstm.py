"""LSTMs: projected, clipped, with diagonal peepholes, with one decision for input and forget gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rnn2bin.cells.network import CellState, Lookup, Trace
from rnn2bin.cells.weights import PHI, Cell, clipped, fold
from rnn2bin.distill.windows.inputs import input_product
from rnn2bin.distill.windows.parts import (
    Drawn,
    Modes,
    activated,
    add_thresholds,
    derivatives,
    gather,
    level_gradients,
    sampled,
    spread,
    squash,
)


@dataclass(frozen=True)
class Clips:
    """What an LSTM clips, 0 where it does not: the candidate's pre-activation, its cell, what it projects."""

    candidate: float
    cell: float
    projection: float


class LstmWindow(torch.autograd.Function):
    """x_pre (T,B,G+1,H) in the order i,f,o,g, or i,o,g where f = 1 − i; the gates' without their bias -> h (T,B,R), c (T,B,n·H), gate
    pre-activations (T,B,G,n·H)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x_pre: Tensor,
        weight_hh: Tensor,  # ((G+1)H,R)
        gates_bias: Tensor,  # (G,n·H)
        peephole: Tensor | None,  # (G,H)
        projection: Tensor | None,  # (R,H)
        h0: Tensor,
        c0: Tensor,
        lo: Tensor,  # (G,n·H)
        hi: Tensor,
        noise: Tensor | None,  # (T,B,G,n·H)
        modes: Modes,
        phi: str,
        clips: Clips,
    ) -> tuple[Tensor, Tensor, Tensor]:
        steps, batch, blocks, hidden = x_pre.shape
        gates, width = gates_bias.shape
        copies, coupled = width // hidden, gates == 2
        peep = None if peephole is None else spread(peephole, copies)
        recurrent, x_flat = weight_hh.t().contiguous(), x_pre.flatten(2)
        product = x_pre.new_empty(batch, blocks, hidden)
        pre, bits = (x_pre.new_empty(steps, batch, gates, width) for _ in range(2))
        g = x_pre.new_empty(steps, batch, hidden)
        inside = torch.empty_like(g, dtype=torch.bool) if clips.candidate else None
        c, phi_c = (x_pre.new_empty(steps, batch, width) for _ in range(2))
        within = torch.empty_like(c, dtype=torch.bool) if clips.cell else None
        h = x_pre.new_empty(steps, batch, h0.shape[1])
        last_h, last_c = h0, c0
        # Gates that see the cell after its update are decided behind it: all others at once, before.
        early, late = (slice(gates), None) if peep is None else (slice(gates - 1), slice(gates - 1, gates))

        def decide(t: int, at: slice) -> Tensor:
            return sampled(modes[at], pre[t][:, at], None if noise is None else noise[t][:, at])

        for t in range(steps):
            torch.addmm(x_flat[t], last_h, recurrent, out=product.view(batch, blocks * hidden))
            add_thresholds(gates_bias, product[:, :gates], pre[t])
            if peep is not None:
                pre[t][:, early].addcmul_(peep[early], last_c.unsqueeze(1))
            bits[t][:, early] = decide(t, early)
            admit = torch.lerp(lo[0], hi[0], bits[t][:, 0])
            keep = 1 - admit if coupled else torch.lerp(lo[1], hi[1], bits[t][:, 1])
            squash(phi, product[:, gates], g[t], clips.candidate, None if inside is None else inside[t])
            torch.mul(keep, last_c, out=c[t]).addcmul_(admit, spread(g[t], copies))
            if within is not None:
                torch.le(c[t].abs(), clips.cell, out=within[t])  # a cell that is kept may lie on the bound: it passes its gradient on
                c[t].clamp_(-clips.cell, clips.cell)
            if peep is not None and late is not None:
                pre[t][:, late].addcmul_(peep[late], c[t].unsqueeze(1))
                bits[t][:, late] = decide(t, late)
            activated(phi, c[t], phi_c[t])
            read = fold(torch.lerp(lo[-1], hi[-1], bits[t][:, -1]) * phi_c[t], copies)
            h[t] = read if projection is None else clipped(read @ projection.t(), clips.projection)
            last_h, last_c = h[t], c[t]
        ctx.save_for_backward(weight_hh, peep, projection, h0, c0, lo, hi, noise, pre, bits, g, inside, c, within, phi_c, h)
        ctx.modes, ctx.phi, ctx.clips = modes, phi, clips
        ctx.set_materialize_grads(False)
        return h, c, pre

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None, grad_pre: Tensor | None) -> tuple[Tensor | None, ...]:
        weight_hh, peep, projection, h0, c0, lo, hi, noise, pre, bits, g, inside, c, within, phi_c, h = ctx.saved_tensors
        steps, batch, hidden = g.shape
        gates, width = lo.shape
        copies, coupled, clips = width // hidden, gates == 2, ctx.clips
        values = torch.lerp(lo, hi, bits)
        i, o = values[:, :, 0], values[:, :, -1]
        f = 1 - i if coupled else values[:, :, 1]
        c_before, h_before = torch.cat([c0[None], c[:-1]]), torch.cat([h0[None], h[:-1]])
        through = derivatives(ctx.modes, pre, bits, noise).mul_(hi - lo)
        # What the gates receive per unit of d c (i, f) or of d(o·φ(c)) (o), and the candidate per unit of d c.
        every_g, dphi = spread(g, copies), PHI[ctx.phi].slope
        moved = (every_g - c_before).unsqueeze(2) if coupled else torch.stack([every_g, c_before], 2)
        slope = through[:, :, :-1] * moved
        slope_o, slope_c, slope_g = through[:, :, -1] * phi_c, o * dphi(phi_c), i * dphi(every_g)
        if inside is not None:
            slope_g = slope_g * spread(inside, copies)
        grad, d_pre = g.new_empty(steps, batch, gates + 1, hidden), torch.empty_like(pre)
        all_dc, all_dm, all_dy = torch.empty_like(c), torch.empty_like(c), torch.empty_like(h)
        dh, dc = torch.zeros_like(h0), torch.zeros_like(c0)
        for t in reversed(range(steps)):
            if grad_h is not None:
                dh = dh + grad_h[t]
            if grad_c is not None:
                dc = dc + grad_c[t]
            if clips.projection:
                dh = dh * (h[t].abs() < clips.projection)
            all_dy[t] = dh
            dm = spread((dh if projection is None else dh @ projection) / copies, copies)  # d(o·φ(c))
            torch.mul(dm, slope_o[t], out=d_pre[t, :, -1])
            if grad_pre is not None:
                d_pre[t, :, -1] += grad_pre[t, :, -1]
            dc = torch.addcmul(dc, dm, slope_c[t])
            if peep is not None:
                dc = dc.addcmul_(d_pre[t, :, -1], peep[-1])
            if within is not None:
                dc = dc * within[t]
            all_dm[t], all_dc[t] = dm, dc
            torch.mul(dc.unsqueeze(1), slope[t], out=d_pre[t, :, :-1])
            if grad_pre is not None:
                d_pre[t, :, :-1] += grad_pre[t, :, :-1]
            grad[t, :, :-1] = gather(d_pre[t], copies)
            grad[t, :, -1] = gather(dc * slope_g[t], copies)
            dh = grad[t].flatten(1) @ weight_hh
            dc = dc * f[t]
            if peep is not None:
                dc = dc + (d_pre[t, :, :-1] * peep[:-1]).sum(1)
        d_weight = grad.flatten(2).flatten(0, 1).t() @ h_before.flatten(0, 1)
        d_peephole = None
        if peep is not None:
            seen = [*[c_before] * (gates - 1), c]
            d_peephole = gather(torch.stack([(d_pre[:, :, k] * one).sum((0, 1)) for k, one in enumerate(seen)]), copies)
        read = fold(o * phi_c, copies)
        d_projection = None if projection is None else all_dy.flatten(0, 1).t() @ read.flatten(0, 1)
        d_lo = d_hi = None
        if ctx.needs_input_grad[7] or ctx.needs_input_grad[8]:
            d_value = torch.cat([all_dc.unsqueeze(2) * moved, (all_dm * phi_c).unsqueeze(2)], 2)
            d_lo, d_hi = level_gradients(d_value, bits)
        return grad, d_weight, d_pre.sum((0, 1)), d_peephole, d_projection, dh, dc, d_lo, d_hi, None, None, None, None


def run(cell: Cell, x: Tensor | Lookup, state: CellState, *, modes: Modes, noise: Drawn) -> Trace:
    """x (T,B,I) or tokens, states h (B,R) and c (B,n·H)."""
    w, (lo, hi) = cell.weights(), cell.level_values()
    gates, hidden = len(modes), cell.layer.hidden_size
    bias = torch.cat([w.candidate_bias.new_zeros(gates * hidden), w.candidate_bias])  # the gates' belong to the copies
    x_pre = input_product(x, torch.cat([w.gates_ih, w.candidate_ih]), bias=bias).unflatten(2, (gates + 1, hidden))
    weight_hh, gates_bias = torch.cat([w.gates_hh, w.candidate_hh]), w.gates_bias.view(gates, -1)
    peephole = None if w.peephole is None else w.peephole.view(gates, hidden)
    more = (noise.units, modes, cell.layer.activation, Clips(w.clip, w.cell_clip, w.proj_clip))
    h, c, pre = LstmWindow.apply(x_pre, weight_hh, gates_bias, peephole, w.projection, *state, lo, hi, *more)
    return Trace((h, c), pre)
