"""Training kernels: one differentiable function for a whole window and layer, equal to the oracle in `cells/` but several times faster.

What depends on the recursion runs step by step, in place; everything else (input product, surrogate derivatives, weight gradients) is one
product or one elementwise pass over the whole window. Gradients are written by hand and held against the oracle's autograd in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rnn2bin.cells.network import CellState, Lookup, Trace
from rnn2bin.cells.network import walk as oracle_walk
from rnn2bin.cells.weights import PHI, Cell, clipped, fold
from rnn2bin.distill import native
from rnn2bin.gates.estimators import SCORE, Discretize, derivative, logistic_noise, sample

Modes = tuple[Discretize, ...]
# Cells with a window here. All others walk as the oracle does, step by step through autograd: exact, and slower (docs/adding-a-cell.md).
WINDOWS = frozenset({"lstm", "lstm_peephole", "lstm_coupled", "lstm_coupled_peephole", "gru", "gru_output", "gru_reset_before"})
ONE_HOT_LIMIT = 512  # tokens: beyond, adding rows one by one beats the product with one-hot rows


def _sample(modes: Modes, pre: Tensor, noise: Tensor | None) -> Tensor:
    """Samples for pre (...,G,H); one pass where all gates share a mode."""
    if len(set(modes)) == 1:
        return sample(modes[0], pre, noise)
    parts = [sample(m, pre[..., k, :], None if noise is None else noise[..., k, :]) for k, m in enumerate(modes)]
    return torch.stack(parts, -2)


def _derivative(modes: Modes, pre: Tensor, value: Tensor, noise: Tensor | None) -> Tensor:
    if len(set(modes)) == 1:
        return derivative(modes[0], pre, value, noise)
    parts = [derivative(m, pre[..., k, :], value[..., k, :], None if noise is None else noise[..., k, :]) for k, m in enumerate(modes)]
    return torch.stack(parts, -2)


def _phi(name: str, x: Tensor, out: Tensor) -> Tensor:
    return _tanh(x, out) if name == "tanh" else out.copy_(PHI[name].value(x))


def _tanh(x: Tensor, out: Tensor) -> Tensor:
    """tanh x as 2σ(2x) − 1: on CPUs torch's sigmoid takes a sixth of the time of its tanh; the error, 1e-7, does not matter here."""
    return torch.sigmoid(torch.mul(x, 2, out=out), out=out).mul_(2).sub_(1)


def _squash(phi: str, pre: Tensor, out: Tensor, clip: float, inside: Tensor | None) -> Tensor:
    """A candidate of its pre-activation, which is clipped in place; `inside`: where that changes nothing, None where nothing is clipped."""
    if inside is not None:
        torch.le(pre.abs(), clip, out=inside)
        pre.clamp_(-clip, clip)
    return _phi(phi, pre, out)


def _rows(bias: Tensor, product: Tensor, out: Tensor) -> Tensor:
    """product (B,G,H) + a threshold for each copy, bias (G,n·H) -> out (B,G,n·H)."""
    batch, gates, hidden = product.shape
    torch.add(product.unsqueeze(2), bias.view(gates, -1, hidden), out=out.view(batch, gates, -1, hidden))
    return out


def _spread(x: Tensor, copies: int) -> Tensor:
    """(…,H) -> (…,n·H), the same for every copy."""
    return x if copies == 1 else x.repeat(*[1] * (x.ndim - 1), copies)


def _gather(x: Tensor, copies: int) -> Tensor:
    """(…,n·H) -> the sum over copies (…,H): the gradient of `_spread`."""
    return x if copies == 1 else x.unflatten(-1, (copies, -1)).sum(-2)


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
        peep = None if peephole is None else _spread(peephole, copies)
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
            return _sample(modes[at], pre[t][:, at], None if noise is None else noise[t][:, at])

        for t in range(steps):
            torch.addmm(x_flat[t], last_h, recurrent, out=product.view(batch, blocks * hidden))
            _rows(gates_bias, product[:, :gates], pre[t])
            if peep is not None:
                pre[t][:, early].addcmul_(peep[early], last_c.unsqueeze(1))
            bits[t][:, early] = decide(t, early)
            admit = torch.lerp(lo[0], hi[0], bits[t][:, 0])
            keep = 1 - admit if coupled else torch.lerp(lo[1], hi[1], bits[t][:, 1])
            _squash(phi, product[:, gates], g[t], clips.candidate, None if inside is None else inside[t])
            torch.mul(keep, last_c, out=c[t]).addcmul_(admit, _spread(g[t], copies))
            if within is not None:
                torch.le(c[t].abs(), clips.cell, out=within[t])  # a cell that is kept may lie on the bound: it passes its gradient on
                c[t].clamp_(-clips.cell, clips.cell)
            if peep is not None and late is not None:
                pre[t][:, late].addcmul_(peep[late], c[t].unsqueeze(1))
                bits[t][:, late] = decide(t, late)
            _phi(phi, c[t], phi_c[t])
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
        through = _derivative(ctx.modes, pre, bits, noise).mul_(hi - lo)
        # What the gates receive per unit of d c (i, f) or of d(o·φ(c)) (o), and the candidate per unit of d c.
        every_g, dphi = _spread(g, copies), PHI[ctx.phi].slope
        moved = (every_g - c_before).unsqueeze(2) if coupled else torch.stack([every_g, c_before], 2)
        slope = through[:, :, :-1] * moved
        slope_o, slope_c, slope_g = through[:, :, -1] * phi_c, o * dphi(phi_c), i * dphi(every_g)
        if inside is not None:
            slope_g = slope_g * _spread(inside, copies)
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
            dm = _spread((dh if projection is None else dh @ projection) / copies, copies)  # d(o·φ(c))
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
            grad[t, :, :-1] = _gather(d_pre[t], copies)
            grad[t, :, -1] = _gather(dc * slope_g[t], copies)
            dh = grad[t].flatten(1) @ weight_hh
            dc = dc * f[t]
            if peep is not None:
                dc = dc + (d_pre[t, :, :-1] * peep[:-1]).sum(1)
        d_weight = grad.flatten(2).flatten(0, 1).t() @ h_before.flatten(0, 1)
        d_peephole = None
        if peep is not None:
            seen = [*[c_before] * (gates - 1), c]
            d_peephole = _gather(torch.stack([(d_pre[:, :, k] * one).sum((0, 1)) for k, one in enumerate(seen)]), copies)
        read = fold(o * phi_c, copies)
        d_projection = None if projection is None else all_dy.flatten(0, 1).t() @ read.flatten(0, 1)
        d_lo = d_hi = None
        if ctx.needs_input_grad[7] or ctx.needs_input_grad[8]:
            d_value = torch.cat([all_dc.unsqueeze(2) * moved, (all_dm * phi_c).unsqueeze(2)], 2)
            d_hi = (d_value * bits).sum((0, 1))
            d_lo = d_value.sum((0, 1)) - d_hi
        return grad, d_weight, d_pre.sum((0, 1)), d_peephole, d_projection, dh, dc, d_lo, d_hi, None, None, None, None


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
            _rows(gates_bias, x_pre[t, :, :gates] + product[:, :gates], pre[t])
            bits[t] = _sample(modes, pre[t], None if noise is None else noise[t])
            r, z, *o = torch.lerp(lo, hi, bits[t]).unbind(1)
            torch.addcmul(_spread(x_pre[t, :, gates], copies), r, _spread(u[t], copies), out=n[t])
            _squash(phi, n[t], n[t], clip, None if inside is None else inside[t])
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
        before, every_u = torch.cat([c0[None], c[:-1]]), _spread(u, copies)
        h_before = fold(before, copies) if h0 is None else torch.cat([h0[None], h[:-1]])
        through = _derivative(ctx.modes, pre, bits, noise).mul_(hi - lo)
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
                dc = dc + _spread(dread / copies, copies)
            else:
                dm = all_dm[t] = _spread((dread if grad_h is None else dread + grad_h[t]) / copies, copies)  # d(o⊙c)
                torch.mul(dm, through[t, :, 2] * c[t], out=d_pre[t, :, 2])
                dc = torch.addcmul(dc, dm, o[0][t])
            all_dc[t] = dc
            dn = torch.mul(dc, slope_n[t], out=all_dn[t])
            torch.mul(dn, slope_r[t], out=d_pre[t, :, 0])
            torch.mul(dc, slope_z[t], out=d_pre[t, :, 1])
            if grad_pre is not None:
                d_pre[t] += grad_pre[t]
            d_product[t, :, :gates] = _gather(d_pre[t], copies)
            d_product[t, :, gates] = _gather(dn * r[t], copies)
            dread, dc = d_product[t].flatten(1) @ weight_hh, dc * z[t]
        if all_dm is None:
            dc = dc + _spread(dread / copies, copies)
        grad[:, :, :gates], grad[:, :, gates] = d_product[:, :, :gates], _gather(all_dn, copies)
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
            bits[t] = _sample(modes, _rows(gates_bias, product, pre[t]), None if noise is None else noise[t])
            r, z = torch.lerp(lo, hi, bits[t]).unbind(1)
            read[t] = fold(r * last, copies)
            torch.addmm(x_pre[t, :, 2], read[t], candidate, out=n[t])
            _squash(phi, n[t], n[t], clip, None if inside is None else inside[t])
            torch.lerp(_spread(n[t], copies), last, z, out=h[t])
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
        through = _derivative(ctx.modes, pre, bits, noise).mul_(hi - lo)
        slope_n, moved = PHI[ctx.phi].slope(n), before - _spread(n, copies)
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
            dn = torch.mul(_gather(dh * (1 - z[t]), copies), slope_n[t], out=grad[t, :, 2])
            all_dread[t] = dread = _spread(dn @ candidate_hh / copies, copies)
            torch.mul(dread, slope_r[t], out=d_pre[t, :, 0])
            torch.mul(dh, slope_z[t], out=d_pre[t, :, 1])
            if grad_pre is not None:
                d_pre[t] += grad_pre[t]
            grad[t, :, :2] = _gather(d_pre[t], copies)
            dh = (dh * z[t]).addcmul_(dread, r[t]) + _spread(grad[t, :, :2].flatten(1) @ gates_hh / copies, copies)
        d_gates = grad[:, :, :2].flatten(2).flatten(0, 1).t() @ fold(before, copies).flatten(0, 1)
        d_candidate = grad[:, :, 2].flatten(0, 1).t() @ read.flatten(0, 1)
        d_lo, d_hi = _gru_level_grads(ctx, 5, bits, [all_dread * before, all_dh * moved])
        return grad, d_gates, d_candidate, d_pre.sum((0, 1)), dh, d_lo, d_hi, None, None, None, None


def _gru_level_grads(ctx: Any, lo_at: int, bits: Tensor, received: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of (lo, hi), each (G,n·H), from what the gates' values received over the window, each (T,B,n·H)."""
    if not (ctx.needs_input_grad[lo_at] or ctx.needs_input_grad[lo_at + 1]):
        return None, None
    d_value = torch.stack(received, 2)
    d_hi = (d_value * bits).sum((0, 1))
    return d_value.sum((0, 1)) - d_hi, d_hi


class Rows(torch.autograd.Function):
    """table (V,M), index (N,) -> table[index] (N,M). torch adds up the gradient's rows slowly: the native kernels do it instead, or, for
    small tables, one product with one-hot rows."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(index)
        ctx.size = table.shape[0]
        return table.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        if _is_native(grad):
            return native.add_rows(grad, index.long(), ctx.size), None
        if ctx.size > ONE_HOT_LIMIT:
            return grad.new_zeros(ctx.size, grad.shape[1]).index_add_(0, index, grad), None
        one_hot = torch.zeros(ctx.size, len(index), dtype=grad.dtype, device=grad.device).scatter_(0, index[None].long(), 1)
        return one_hot @ grad, None


def _is_native(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and native.library() is not None


def input_product(x: Tensor | Lookup, weight: Tensor, bias: Tensor | None, precision: str) -> Tensor:
    """x (T,B,I) · weightᵀ + bias -> (T,B,M). For tokens of a small vocabulary the product is made once for each token, not
    for each step. No bias: it belongs to the native kernels, and so does the product."""
    tokens = x if isinstance(x, Lookup) and x.size <= x.index.numel() else None
    rows = tokens.table if tokens else x.rows(weight.dtype) if isinstance(x, Lookup) else x
    if rows is None:
        product = weight.t() if bias is None else bias + weight.t()
    elif bias is None:
        product = native.Product.apply(rows.flatten(0, -2), weight, precision)
    else:
        product = torch.addmm(bias, rows.flatten(0, -2), weight.t())
    if tokens:
        return Rows.apply(product, tokens.index.flatten()).view(*tokens.index.shape, -1)
    steps, batch = x.index.shape if isinstance(x, Lookup) else x.shape[:2]
    return product.view(steps, batch, -1)


def _noise(mode: Discretize, like: Tensor, *shape: int) -> Tensor:
    """What the native kernels would draw, where they are there; noise (T,B,G,n·H)."""
    alike = mode.estimator != "gumbel-softmax"  # which has a draw of its own
    return native.Noise.of(mode).fill(*shape) if alike and _is_native(like) else logistic_noise(shape, mode, like)


def run_cell(cell: Cell, x: Tensor | Lookup, state: CellState, mode: Discretize, *, precision: str = "float32") -> Trace:
    """x (T,B,I) or tokens, and the state before it -> the trace of the window. Differentiable in x, state, weights and levels.

    `precision`: "bfloat16" rounds the operands of products where the native kernels run (`native.takes`); elsewhere it changes nothing.
    """
    kind = cell.layer.kind
    if kind.name not in WINDOWS:
        return oracle_walk(cell, x, state, mode)
    w = cell.weights()
    modes, (lo, hi) = cell.modes(mode), cell.level_values()
    gates, hidden, width = len(kind.gates), cell.layer.hidden_size, cell.layer.width
    weight_ih = torch.cat([w.gates_ih, w.candidate_ih])
    gates_bias = w.gates_bias.view(gates, width)
    fast = native.takes(cell, weight_ih, modes)
    precision = precision if fast and native.has_bfloat16() else "float32"
    noisy = mode.draws and any(cell.binary)
    weight_hh, phi, clip = torch.cat([w.gates_hh, w.candidate_hh]), cell.layer.activation, cell.layer.clip
    if fast:
        c0 = state[1] if kind.has_cell else None
        drawn = native.Noise.of(mode) if noisy else None
        biases, states = (gates_bias, w.candidate_bias, w.candidate_bias_hh), (state[0], c0)
        x_pre = input_product(x, weight_ih, None, precision).unflatten(2, (gates + 1, hidden))
        h, c, products = native.NativeWindow.apply(x_pre, weight_hh, *biases, *states, lo, hi, drawn, kind.name, modes, precision)
        return Trace((h,) if c0 is None else (h, c), products, gates_bias)
    bias = torch.cat([w.candidate_bias.new_zeros(gates * hidden), w.candidate_bias])  # the gates' belong to the copies
    x_pre = input_product(x, weight_ih, bias, precision).unflatten(2, (gates + 1, hidden))
    noise = _noise(mode, x_pre, *x_pre.shape[:2], gates, width) if noisy else None
    kept = noise if mode.estimator in SCORE else None
    if kind.name in ("gru", "gru_output"):
        h0, c0 = state if kind.has_cell else (None, state[0])
        h, c, pre = GruWindow.apply(x_pre, weight_hh, gates_bias, w.candidate_bias_hh, h0, c0, lo, hi, noise, modes, phi, clip)
        return Trace((h, c) if kind.has_cell else (c,), pre, noise=kept)
    if kind.has_cell:
        peephole = None if w.peephole is None else w.peephole.view(gates, hidden)
        clips = Clips(clip, w.cell_clip, w.proj_clip)
        h, c, pre = LstmWindow.apply(
            x_pre, weight_hh, gates_bias, peephole, w.projection, state[0], state[1], lo, hi, noise, modes, phi, clips
        )
        return Trace((h, c), pre, noise=kept)
    h, pre = GruBeforeWindow.apply(x_pre, w.gates_hh, w.candidate_hh, gates_bias, state[0], lo, hi, noise, modes, phi, clip)
    return Trace((h,), pre, noise=kept)
