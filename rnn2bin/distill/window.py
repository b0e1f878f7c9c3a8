"""Training kernels: one differentiable function for a whole window and layer, equal to the oracle in `cells/` but several times faster.

What depends on the recursion runs step by step, in place; everything else (input product, surrogate derivatives, weight gradients) is one
product or one elementwise pass over the whole window. Gradients are written by hand and held against the oracle's autograd in the tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rnn2bin.cells.network import CellState, Lookup, Trace
from rnn2bin.cells.weights import Cell
from rnn2bin.distill import native
from rnn2bin.gates.estimators import Discretize, derivative, logistic_noise, sample

Modes = tuple[Discretize, ...]
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


def _tanh(x: Tensor, out: Tensor) -> Tensor:
    """tanh x as 2σ(2x) − 1: on CPUs torch's sigmoid takes a sixth of the time of its tanh; the error, 1e-7, does not matter here."""
    return torch.sigmoid(torch.mul(x, 2, out=out), out=out).mul_(2).sub_(1)


class LstmWindow(torch.autograd.Function):
    """x_pre (T,B,4,H) in the order i,f,o,g with biases added -> h (T,B,R), c (T,B,H), gate pre-activations (T,B,3,H)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x_pre: Tensor,
        weight_hh: Tensor,  # (4H,R)
        projection: Tensor | None,  # (R,H)
        h0: Tensor,
        c0: Tensor,
        lo: Tensor,  # (3,H)
        hi: Tensor,
        noise: Tensor | None,  # (T,B,3,H)
        modes: Modes,
    ) -> tuple[Tensor, Tensor, Tensor]:
        steps, batch, _, hidden = x_pre.shape
        recurrent = weight_hh.t().contiguous()
        every = torch.empty_like(x_pre)
        flat, x_flat = every.view(steps, batch, 4 * hidden), x_pre.reshape(steps, batch, 4 * hidden)
        bits = x_pre.new_empty(steps, batch, 3, hidden)
        g = x_pre.new_empty(steps, batch, hidden)
        c, tanh_c = torch.empty_like(g), torch.empty_like(g)
        h = x_pre.new_empty(steps, batch, h0.shape[1])
        last_h, last_c = h0, c0
        for t in range(steps):
            torch.addmm(x_flat[t], last_h, recurrent, out=flat[t])
            bits[t] = _sample(modes, every[t, :, :3], None if noise is None else noise[t])
            i, f, o = torch.lerp(lo, hi, bits[t]).unbind(1)
            _tanh(every[t, :, 3], g[t])
            torch.mul(f, last_c, out=c[t]).addcmul_(i, g[t])
            _tanh(c[t], tanh_c[t])
            if projection is None:
                torch.mul(o, tanh_c[t], out=h[t])
            else:
                torch.mm(o * tanh_c[t], projection.t(), out=h[t])
            last_h, last_c = h[t], c[t]
        pre = every[:, :, :3].contiguous()
        ctx.save_for_backward(weight_hh, projection, h0, c0, lo, hi, noise, pre, bits, g, c, tanh_c, h)
        ctx.modes = modes
        ctx.set_materialize_grads(False)
        return h, c, pre

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None, grad_pre: Tensor | None) -> tuple[Tensor | None, ...]:
        weight_hh, projection, h0, c0, lo, hi, noise, pre, bits, g, c, tanh_c, h = ctx.saved_tensors
        steps, batch, hidden = c.shape
        i, f, o = torch.lerp(lo, hi, bits).unbind(2)
        c_before, h_before = torch.cat([c0[None], c[:-1]]), torch.cat([h0[None], h[:-1]])
        through = _derivative(ctx.modes, pre, bits, noise).mul_(hi - lo)
        # What a gate's value and the candidate receive per unit of d c (i, f, g) or of d(o·tanh c) (o).
        reach = torch.stack([g, c_before, i], 2)
        slope = torch.cat([through[:, :, :2], (1 - g * g).unsqueeze(2)], 2).mul_(reach)
        slope_o, slope_c = through[:, :, 2] * tanh_c, o * (1 - tanh_c * tanh_c)
        grad = c.new_empty(steps, batch, 4, hidden)
        flat = grad.view(steps, batch, 4 * hidden)
        all_dc, all_dm, all_dh = torch.empty_like(c), torch.empty_like(c), torch.empty_like(h)
        dh, dc = torch.zeros_like(h0), torch.zeros_like(c0)
        for t in reversed(range(steps)):
            if grad_h is not None:
                dh = dh + grad_h[t]
            if grad_c is not None:
                dc = dc + grad_c[t]
            all_dh[t] = dh
            dm = dh if projection is None else dh @ projection  # d(o·tanh c)
            dc = torch.addcmul(dc, dm, slope_c[t])
            all_dm[t], all_dc[t] = dm, dc
            torch.mul(dc.unsqueeze(1), slope[t, :, :2], out=grad[t, :, :2])
            torch.mul(dm, slope_o[t], out=grad[t, :, 2])
            torch.mul(dc, slope[t, :, 2], out=grad[t, :, 3])
            if grad_pre is not None:
                grad[t, :, :3] += grad_pre[t]
            dh = flat[t] @ weight_hh
            dc = dc * f[t]
        d_weight = flat.flatten(0, 1).t() @ h_before.flatten(0, 1)
        d_projection = None if projection is None else all_dh.flatten(0, 1).t() @ (o * tanh_c).flatten(0, 1)
        d_lo = d_hi = None
        if ctx.needs_input_grad[5] or ctx.needs_input_grad[6]:
            d_value = torch.stack([all_dc * g, all_dc * c_before, all_dm * tanh_c], 2)
            d_hi = (d_value * bits).sum((0, 1))
            d_lo = d_value.sum((0, 1)) - d_hi
        return grad, d_weight, d_projection, dh, dc, d_lo, d_hi, None, None


class GruWindow(torch.autograd.Function):
    """GRU, reset after the product. x_pre (T,B,3,H) in the order r,z,n -> h (T,B,H), gate pre-activations (T,B,2,H)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x_pre: Tensor,
        weight_hh: Tensor,  # (3H,H)
        bias_hh: Tensor,  # (H,) the candidate's
        h0: Tensor,
        lo: Tensor,  # (2,H)
        hi: Tensor,
        noise: Tensor | None,
        modes: Modes,
    ) -> tuple[Tensor, Tensor]:
        steps, batch, _, hidden = x_pre.shape
        recurrent = weight_hh.t().contiguous()
        bias = torch.cat([bias_hh.new_zeros(2 * hidden), bias_hh])
        pre, bits = x_pre.new_empty(steps, batch, 2, hidden), x_pre.new_empty(steps, batch, 2, hidden)
        product = x_pre.new_empty(batch, 3, hidden)
        h, n, u = (x_pre.new_empty(steps, batch, hidden) for _ in range(3))  # u: U_n h + b_hn
        last = h0
        for t in range(steps):
            torch.addmm(bias, last, recurrent, out=product.view(batch, 3 * hidden))
            torch.add(x_pre[t, :, :2], product[:, :2], out=pre[t])
            u[t] = product[:, 2]
            bits[t] = _sample(modes, pre[t], None if noise is None else noise[t])
            r, z = torch.lerp(lo, hi, bits[t]).unbind(1)
            _tanh(torch.addcmul(x_pre[t, :, 2], r, u[t], out=n[t]), n[t])
            torch.lerp(n[t], last, z, out=h[t])
            last = h[t]
        ctx.save_for_backward(weight_hh, h0, lo, hi, noise, pre, bits, h, n, u)
        ctx.modes = modes
        ctx.set_materialize_grads(False)
        return h, pre

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor | None, grad_pre: Tensor | None) -> tuple[Tensor | None, ...]:
        weight_hh, h0, lo, hi, noise, pre, bits, h, n, u = ctx.saved_tensors
        steps, batch, hidden = h.shape
        r, z = torch.lerp(lo, hi, bits).unbind(2)
        before = torch.cat([h0[None], h[:-1]])
        through = _derivative(ctx.modes, pre, bits, noise).mul_(hi - lo)
        slope_n = (1 - z) * (1 - n * n)
        slope_r, slope_z = through[:, :, 0] * u, through[:, :, 1] * (before - n)
        grad, d_product = h.new_empty(steps, batch, 3, hidden), h.new_empty(steps, batch, 3, hidden)
        all_dh = torch.empty_like(h)
        dh = torch.zeros_like(h0)
        for t in reversed(range(steps)):
            if grad_h is not None:
                dh = dh + grad_h[t]
            all_dh[t] = dh
            dn = torch.mul(dh, slope_n[t], out=grad[t, :, 2])
            torch.mul(dn, slope_r[t], out=grad[t, :, 0])
            torch.mul(dh, slope_z[t], out=grad[t, :, 1])
            if grad_pre is not None:
                grad[t, :, :2] += grad_pre[t]
            d_product[t, :, :2] = grad[t, :, :2]
            torch.mul(dn, r[t], out=d_product[t, :, 2])
            dh = torch.addmm(dh * z[t], d_product[t].flatten(1), weight_hh)
        d_weight = d_product.flatten(2).flatten(0, 1).t() @ before.flatten(0, 1)
        d_bias = d_product[:, :, 2].sum((0, 1))
        d_lo, d_hi = _gru_level_grads(ctx, 4, bits, grad[:, :, 2] * u, all_dh * (before - n))
        return grad, d_weight, d_bias, dh, d_lo, d_hi, None, None


class GruBeforeWindow(torch.autograd.Function):
    """GRU, reset before the product. x_pre (T,B,3,H) in the order r,z,n -> h (T,B,H), gate pre-activations (T,B,2,H)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x_pre: Tensor,
        gates_hh: Tensor,  # (2H,H)
        candidate_hh: Tensor,  # (H,H)
        h0: Tensor,
        lo: Tensor,
        hi: Tensor,
        noise: Tensor | None,
        modes: Modes,
    ) -> tuple[Tensor, Tensor]:
        steps, batch, _, hidden = x_pre.shape
        gates, candidate = gates_hh.t().contiguous(), candidate_hh.t().contiguous()
        pre, bits = x_pre.new_empty(steps, batch, 2, hidden), x_pre.new_empty(steps, batch, 2, hidden)
        h, n, read = (x_pre.new_empty(steps, batch, hidden) for _ in range(3))  # read: r ⊙ h
        last = h0
        for t in range(steps):
            torch.addmm(x_pre[t, :, :2].flatten(1), last, gates, out=pre[t].view(batch, 2 * hidden))
            bits[t] = _sample(modes, pre[t], None if noise is None else noise[t])
            r, z = torch.lerp(lo, hi, bits[t]).unbind(1)
            torch.mul(r, last, out=read[t])
            _tanh(torch.addmm(x_pre[t, :, 2], read[t], candidate, out=n[t]), n[t])
            torch.lerp(n[t], last, z, out=h[t])
            last = h[t]
        ctx.save_for_backward(gates_hh, candidate_hh, h0, lo, hi, noise, pre, bits, h, n, read)
        ctx.modes = modes
        ctx.set_materialize_grads(False)
        return h, pre

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor | None, grad_pre: Tensor | None) -> tuple[Tensor | None, ...]:
        gates_hh, candidate_hh, h0, lo, hi, noise, pre, bits, h, n, read = ctx.saved_tensors
        steps, batch, hidden = h.shape
        r, z = torch.lerp(lo, hi, bits).unbind(2)
        before = torch.cat([h0[None], h[:-1]])
        through = _derivative(ctx.modes, pre, bits, noise).mul_(hi - lo)
        slope_n = (1 - z) * (1 - n * n)
        slope_r, slope_z = through[:, :, 0] * before, through[:, :, 1] * (before - n)
        grad = h.new_empty(steps, batch, 3, hidden)
        all_dh, all_dread = torch.empty_like(h), torch.empty_like(h)
        dh = torch.zeros_like(h0)
        for t in reversed(range(steps)):
            if grad_h is not None:
                dh = dh + grad_h[t]
            all_dh[t] = dh
            dn = torch.mul(dh, slope_n[t], out=grad[t, :, 2])
            dread = torch.mm(dn, candidate_hh, out=all_dread[t])
            torch.mul(dread, slope_r[t], out=grad[t, :, 0])
            torch.mul(dh, slope_z[t], out=grad[t, :, 1])
            if grad_pre is not None:
                grad[t, :, :2] += grad_pre[t]
            dh = torch.addmm((dh * z[t]).addcmul_(dread, r[t]), grad[t, :, :2].flatten(1), gates_hh)
        d_gates = grad[:, :, :2].flatten(2).flatten(0, 1).t() @ before.flatten(0, 1)
        d_candidate = grad[:, :, 2].flatten(0, 1).t() @ read.flatten(0, 1)
        d_lo, d_hi = _gru_level_grads(ctx, 4, bits, all_dread * before, all_dh * (before - n))
        return grad, d_gates, d_candidate, dh, d_lo, d_hi, None, None


def _gru_level_grads(ctx: Any, lo_at: int, bits: Tensor, d_r: Tensor, d_z: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of (lo, hi), each (2,H), from what the values of r and z received over the window (T,B,H)."""
    if not (ctx.needs_input_grad[lo_at] or ctx.needs_input_grad[lo_at + 1]):
        return None, None
    d_value = torch.stack([d_r, d_z], 2)
    d_hi = (d_value * bits).sum((0, 1))
    return d_value.sum((0, 1)) - d_hi, d_hi


class Rows(torch.autograd.Function):
    """table (V,M), index (N,) -> table[index] (N,M). The gradient is one product with one-hot rows: for the small tables this is used
    with, several times faster than adding row by row."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, precision: str) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(index)
        ctx.size, ctx.precision = table.shape[0], precision
        return table.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        if ctx.size > ONE_HOT_LIMIT:
            return grad.new_zeros(ctx.size, grad.shape[1]).index_add_(0, index, grad), None, None
        kind = torch.bfloat16 if ctx.precision == "bfloat16" else grad.dtype
        one_hot = torch.zeros(ctx.size, len(index), dtype=kind, device=grad.device).scatter_(0, index[None], 1)
        return (one_hot @ grad.to(kind)).to(grad.dtype), None, None


def input_product(x: Tensor | Lookup, weight: Tensor, bias: Tensor, precision: str) -> Tensor:
    """x (T,B,I) · weightᵀ + bias -> (T,B,M). For tokens of a small vocabulary the product is made once for each token, not
    for each step."""
    if isinstance(x, Lookup) and x.size <= x.index.numel():
        table = bias + weight.t() if x.table is None else torch.addmm(bias, x.table, weight.t())
        return Rows.apply(table, x.index.flatten(), precision).view(*x.index.shape, -1)
    rows = x.rows(weight.dtype) if isinstance(x, Lookup) else x
    flat = rows.flatten(0, 1)
    product = native.LowProduct.apply(flat, weight, bias) if precision == "bfloat16" else torch.addmm(bias, flat, weight.t())
    return product.view(*rows.shape[:2], -1)


def run_cell(cell: Cell, x: Tensor | Lookup, state: CellState, mode: Discretize, *, precision: str = "float32") -> Trace:
    """x (T,B,I) or tokens, and the state before it -> the trace of the window. Differentiable in x, state, weights and levels.

    `precision`: "bfloat16" rounds the operands of products where the native kernels run (`native.takes`); elsewhere it changes nothing.
    """
    w, kind = cell.weights(), cell.layer.kind
    modes, (lo, hi) = cell.modes(mode), cell.level_values()
    gates, hidden = len(kind.gates), cell.layer.hidden_size
    weight_ih = torch.cat([w.gates_ih, w.candidate_ih])
    bias = torch.cat([w.gates_bias, w.candidate_bias])
    fast = native.takes(cell, weight_ih, modes)
    precision = precision if fast and native.has_bfloat16() else "float32"
    x_pre = input_product(x, weight_ih, bias, precision).unflatten(2, (gates + 1, hidden))
    noise = logistic_noise((*x_pre.shape[:2], gates, hidden), mode, x_pre) if mode.draws and any(cell.binary) else None
    weight_hh = torch.cat([w.gates_hh, w.candidate_hh])
    if fast:
        c0 = state[1] if kind.name == "lstm" else None
        h, c, pre = native.NativeWindow.apply(
            x_pre, weight_hh, w.candidate_bias_hh, state[0], c0, lo, hi, noise, kind.name, modes, precision
        )
        return Trace((h,) if c0 is None else (h, c), pre)
    match kind.name:
        case "lstm":
            h, c, pre = LstmWindow.apply(x_pre, weight_hh, w.projection, state[0], state[1], lo, hi, noise, modes)
            return Trace((h, c), pre)
        case "gru":
            h, pre = GruWindow.apply(x_pre, weight_hh, w.candidate_bias_hh, state[0], lo, hi, noise, modes)
        case _:
            h, pre = GruBeforeWindow.apply(x_pre, w.gates_hh, w.candidate_hh, state[0], lo, hi, noise, modes)
    return Trace((h,), pre)
