"""GRUs in both reset forms, and with an output gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rnn2bin.cells.network import CellState, Lookup, Trace
from rnn2bin.cells.weights import PHI, Cell, fold
from rnn2bin.distill.windows.inputs import input_product
from rnn2bin.distill.windows.parts import Drawn, Modes, add_thresholds, derivatives, gather, level_gradients, sampled, spread, squash


class GruWindow(torch.autograd.Function):
    """GRU, reset after the product, with an output gate or without. x_pre (T,B,G+1,H) in the order r,z,(o,)n, the gates' without their bias
    -> what is read h (T,B,H), empty without an output gate, the memory c (T,B,n·H), gate pre-activations (T,B,G,n·H)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x_pre: Tensor,
        weight_hh: Tensor,  # ((G+1)H,H)
        gates_bias: Tensor,  # (G,n·H)
        bias_hh: Tensor,  # (H,) the candidate's
        h0: Tensor | None,  # (B,H) with an output gate
        c0: Tensor,  # (B,n·H)
        lo: Tensor,  # (G,n·H)
        hi: Tensor,
        noise: Tensor | None,
        modes: Modes,
        phi: str,
        clip: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        steps, batch, blocks, hidden = x_pre.shape
        gates, width = gates_bias.shape
        copies = width // hidden
        recurrent = weight_hh.t().contiguous()
        product = x_pre.new_empty(batch, blocks, hidden)
        pre, bits = (x_pre.new_empty(steps, batch, gates, width) for _ in range(2))
        c, n = (x_pre.new_empty(steps, batch, width) for _ in range(2))
        h = x_pre.new_empty(0 if h0 is None else steps, batch, hidden)
        inside = torch.empty_like(n, dtype=torch.bool) if clip else None
        u = x_pre.new_empty(steps, batch, hidden)  # U_n h + b_hn
        last, read = c0, fold(c0, copies) if h0 is None else h0
        for t in range(steps):
            torch.mm(read, recurrent, out=product.view(batch, blocks * hidden))
            torch.add(product[:, gates], bias_hh, out=u[t])
            add_thresholds(gates_bias, x_pre[t, :, :gates] + product[:, :gates], pre[t])
            bits[t] = sampled(modes, pre[t], None if noise is None else noise[t])
            r, z, *o = torch.lerp(lo, hi, bits[t]).unbind(1)
            torch.addcmul(spread(x_pre[t, :, gates], copies), r, spread(u[t], copies), out=n[t])
            squash(phi, n[t], n[t], clip, None if inside is None else inside[t])
            torch.lerp(n[t], last, z, out=c[t])
            last, read = c[t], fold(o[0] * c[t] if o else c[t], copies)
            if o:
                h[t] = read
        ctx.save_for_backward(weight_hh, h0, c0, lo, hi, noise, pre, bits, h, c, n, inside, u)
        ctx.modes, ctx.phi = modes, phi
        ctx.set_materialize_grads(False)
        return h, c, pre

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None, grad_pre: Tensor | None) -> tuple[Tensor | None, ...]:
        weight_hh, h0, c0, lo, hi, noise, pre, bits, h, c, n, inside, u = ctx.saved_tensors
        steps, batch, hidden = u.shape
        gates, copies = lo.shape[0], c.shape[2] // hidden
        r, z, *o = torch.lerp(lo, hi, bits).unbind(2)
        before, every_u = torch.cat([c0[None], c[:-1]]), spread(u, copies)
        h_before = fold(before, copies) if h0 is None else torch.cat([h0[None], h[:-1]])
        through = derivatives(ctx.modes, pre, bits, noise).mul_(hi - lo)
        slope_n = (1 - z) * PHI[ctx.phi].slope(n)
        if inside is not None:
            slope_n = slope_n * inside
        slope_r, slope_z = through[:, :, 0] * every_u, through[:, :, 1] * (before - n)
        grad, d_product = u.new_empty(steps, batch, gates + 1, hidden), u.new_empty(steps, batch, gates + 1, hidden)
        d_pre, all_dc, all_dn = torch.empty_like(pre), torch.empty_like(c), torch.empty_like(c)
        all_dm = torch.empty_like(c) if o else None
        dread, dc = u.new_zeros(batch, hidden), torch.zeros_like(c0)
        for t in reversed(range(steps)):
            if grad_c is not None:
                dc = dc + grad_c[t]
            if all_dm is None:
                dc = dc + spread(dread / copies, copies)
            else:
                dm = all_dm[t] = spread((dread if grad_h is None else dread + grad_h[t]) / copies, copies)  # d(o⊙c)
                torch.mul(dm, through[t, :, 2] * c[t], out=d_pre[t, :, 2])
                dc = torch.addcmul(dc, dm, o[0][t])
            all_dc[t] = dc
            dn = torch.mul(dc, slope_n[t], out=all_dn[t])
            torch.mul(dn, slope_r[t], out=d_pre[t, :, 0])
            torch.mul(dc, slope_z[t], out=d_pre[t, :, 1])
            if grad_pre is not None:
                d_pre[t] += grad_pre[t]
            d_product[t, :, :gates] = gather(d_pre[t], copies)
            d_product[t, :, gates] = gather(dn * r[t], copies)
            dread, dc = d_product[t].flatten(1) @ weight_hh, dc * z[t]
        if all_dm is None:
            dc = dc + spread(dread / copies, copies)
        grad[:, :, :gates], grad[:, :, gates] = d_product[:, :, :gates], gather(all_dn, copies)
        d_weight = d_product.flatten(2).flatten(0, 1).t() @ h_before.flatten(0, 1)
        received = [all_dn * every_u, all_dc * (before - n), *([] if all_dm is None else [all_dm * c])]
        d_lo, d_hi = _gru_level_grads(ctx, 6, bits, received)
        d_h0 = None if h0 is None else dread
        return grad, d_weight, d_pre.sum((0, 1)), d_product[:, :, gates].sum((0, 1)), d_h0, dc, d_lo, d_hi, None, None, None, None


class GruBeforeWindow(torch.autograd.Function):
    """GRU, reset before the product. x_pre (T,B,3,H) in the order r,z,n, the gates' without their bias -> h (T,B,n·H), gate pre-activations
    (T,B,2,n·H)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x_pre: Tensor,
        gates_hh: Tensor,  # (2H,H)
        candidate_hh: Tensor,  # (H,H)
        gates_bias: Tensor,  # (2,n·H)
        h0: Tensor,
        lo: Tensor,
        hi: Tensor,
        noise: Tensor | None,
        modes: Modes,
        phi: str,
        clip: float,
    ) -> tuple[Tensor, Tensor]:
        steps, batch, _, hidden = x_pre.shape
        width = gates_bias.shape[1]
        copies = width // hidden
        gates, candidate = gates_hh.t().contiguous(), candidate_hh.t().contiguous()
        product = x_pre.new_empty(batch, 2, hidden)
        pre, bits = (x_pre.new_empty(steps, batch, 2, width) for _ in range(2))
        h, n, read = x_pre.new_empty(steps, batch, width), x_pre.new_empty(steps, batch, hidden), x_pre.new_empty(steps, batch, hidden)
        inside = torch.empty_like(n, dtype=torch.bool) if clip else None
        last = h0
        for t in range(steps):
            torch.addmm(x_pre[t, :, :2].flatten(1), fold(last, copies), gates, out=product.view(batch, 2 * hidden))
            bits[t] = sampled(modes, add_thresholds(gates_bias, product, pre[t]), None if noise is None else noise[t])
            r, z = torch.lerp(lo, hi, bits[t]).unbind(1)
            read[t] = fold(r * last, copies)
            torch.addmm(x_pre[t, :, 2], read[t], candidate, out=n[t])
            squash(phi, n[t], n[t], clip, None if inside is None else inside[t])
            torch.lerp(spread(n[t], copies), last, z, out=h[t])
            last = h[t]
        ctx.save_for_backward(gates_hh, candidate_hh, h0, lo, hi, noise, pre, bits, h, n, inside, read)
        ctx.modes, ctx.phi = modes, phi
        ctx.set_materialize_grads(False)
        return h, pre

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor | None, grad_pre: Tensor | None) -> tuple[Tensor | None, ...]:
        gates_hh, candidate_hh, h0, lo, hi, noise, pre, bits, h, n, inside, read = ctx.saved_tensors
        steps, batch, hidden = n.shape
        copies = h.shape[2] // hidden
        r, z = torch.lerp(lo, hi, bits).unbind(2)
        before = torch.cat([h0[None], h[:-1]])
        through = derivatives(ctx.modes, pre, bits, noise).mul_(hi - lo)
        slope_n, moved = PHI[ctx.phi].slope(n), before - spread(n, copies)
        if inside is not None:
            slope_n = slope_n * inside
        slope_r, slope_z = through[:, :, 0] * before, through[:, :, 1] * moved
        grad, d_pre = n.new_empty(steps, batch, 3, hidden), torch.empty_like(pre)
        all_dh, all_dread = torch.empty_like(h), torch.empty_like(h)
        dh = torch.zeros_like(h0)
        for t in reversed(range(steps)):
            if grad_h is not None:
                dh = dh + grad_h[t]
            all_dh[t] = dh
            dn = torch.mul(gather(dh * (1 - z[t]), copies), slope_n[t], out=grad[t, :, 2])
            all_dread[t] = dread = spread(dn @ candidate_hh / copies, copies)
            torch.mul(dread, slope_r[t], out=d_pre[t, :, 0])
            torch.mul(dh, slope_z[t], out=d_pre[t, :, 1])
            if grad_pre is not None:
                d_pre[t] += grad_pre[t]
            grad[t, :, :2] = gather(d_pre[t], copies)
            dh = (dh * z[t]).addcmul_(dread, r[t]) + spread(grad[t, :, :2].flatten(1) @ gates_hh / copies, copies)
        d_gates = grad[:, :, :2].flatten(2).flatten(0, 1).t() @ fold(before, copies).flatten(0, 1)
        d_candidate = grad[:, :, 2].flatten(0, 1).t() @ read.flatten(0, 1)
        d_lo, d_hi = _gru_level_grads(ctx, 5, bits, [all_dread * before, all_dh * moved])
        return grad, d_gates, d_candidate, d_pre.sum((0, 1)), dh, d_lo, d_hi, None, None, None, None


def _gru_level_grads(ctx: Any, lo_at: int, bits: Tensor, received: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of (lo, hi), each (G,n·H), from what the gates' values received over the window, each (T,B,n·H)."""
    if not (ctx.needs_input_grad[lo_at] or ctx.needs_input_grad[lo_at + 1]):
        return None, None
    return level_gradients(torch.stack(received, 2), bits)


def run(cell: Cell, x: Tensor | Lookup, state: CellState, *, modes: Modes, noise: Drawn) -> Trace:
    """x (T,B,I) or tokens, state h (B,n·H), or h (B,H) and c (B,n·H) with an output gate."""
    w, (lo, hi), kind = cell.weights(), cell.level_values(), cell.layer.kind
    gates, hidden = len(modes), cell.layer.hidden_size
    bias = torch.cat([w.candidate_bias.new_zeros(gates * hidden), w.candidate_bias])  # the gates' belong to the copies
    x_pre = input_product(x, torch.cat([w.gates_ih, w.candidate_ih]), bias=bias).unflatten(2, (gates + 1, hidden))
    gates_bias, more = w.gates_bias.view(gates, -1), (lo, hi, noise.units, modes, cell.layer.activation, w.clip)
    if kind.name == "gru_reset_before":
        h, pre = GruBeforeWindow.apply(x_pre, w.gates_hh, w.candidate_hh, gates_bias, state[0], *more)
        return Trace((h,), pre)
    h0, c0 = state if kind.has_cell else (None, state[0])
    h, c, pre = GruWindow.apply(x_pre, torch.cat([w.gates_hh, w.candidate_hh]), gates_bias, w.candidate_bias_hh, h0, c0, *more)
    return Trace((h, c) if kind.has_cell else (c,), pre)
