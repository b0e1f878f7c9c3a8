"""Gated feedback stacks (`cells/feedback.py`): all layers of a step, each reading what every layer was a step ago.

What a step reads of the step before is one batch of products, a source each; what it reads of the layer below is one product a layer, for
the first layer made before the loop. Products of a source are kept: they are what a global gate's gradient is multiplied by.

Everything here stands layers first, (T,L,B,·). States and reads have a step more, the first of which is where the window starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rnn2bin.cells.network import CellState, Lookup, Trace
from rnn2bin.cells.weights import PHI, Cell, CellWeights, fold
from rnn2bin.distill.windows.inputs import input_product
from rnn2bin.distill.windows.parts import Decided, Decisions, Drawn, Modes, activated, gather, spread

Kept = dict[str, Tensor]  # h (T+1,L,B,·), with "lstm" c (T+1,L,B,n·H) and phi_c; n: candidates; fed (T,L,B,H): what all layers fed one
Forward = Callable[[int, int, Tensor, Sequence[Tensor]], None]  # step, layer, W h^{j−1} + b (B,H), own gates (B,n·H) each -> h
Backward = Callable[[int, int, Tensor], tuple[Tensor, Tensor]]  # step, layer, d read (B,H) -> d (W h^{j−1} + b), d fed, both (B,H)


@dataclass(frozen=True)
class Unit:
    """What a layer does with what reaches it: its own gates, whether it has a cell, its steps forward and back."""

    gates: int
    forward: Callable[[Kept, str, int], Forward]
    backward: Callable[[Kept, str, int, Sequence[Tensor], Sequence[Tensor | None], Tensor, Tensor], Backward]
    cell: bool = False


def _added(x: Tensor, grad: Tensor | None, t: int, k: int) -> Tensor:
    return x if grad is None else x + grad[t, k]


def _tanh(kept: Kept, phi: str, copies: int) -> Forward:
    def step(t: int, k: int, entered: Tensor, opened: Sequence[Tensor]) -> None:
        activated(phi, entered + kept["fed"][t, k], kept["h"][t + 1, k])

    return step


def _tanh_back(
    kept: Kept, phi: str, copies: int, values: Sequence[Tensor], grads: Sequence[Tensor | None], d_value: Tensor, carried: Tensor
) -> Backward:
    slope = PHI[phi].slope(kept["h"][1:])

    def back(t: int, k: int, d_read: Tensor) -> tuple[Tensor, Tensor]:
        d = _added(d_read, grads[0], t, k) * slope[t, k]
        return d, d

    return back


def _gru(kept: Kept, phi: str, copies: int) -> Forward:
    h, n, fed = kept["h"], kept["n"], kept["fed"]

    def step(t: int, k: int, entered: Tensor, opened: Sequence[Tensor]) -> None:
        r, z = opened
        torch.addcmul(spread(entered, copies), r, spread(fed[t, k], copies), out=n[t, k])
        torch.lerp(activated(phi, n[t, k], n[t, k]), h[t, k], z, out=h[t + 1, k])

    return step


def _gru_back(
    kept: Kept, phi: str, copies: int, values: Sequence[Tensor], grads: Sequence[Tensor | None], d_value: Tensor, carried: Tensor
) -> Backward:
    """`carried` is d h where it was kept."""
    r, z = values
    slope, moved, every_fed = (1 - z) * PHI[phi].slope(kept["n"]), kept["h"][:-1] - kept["n"], spread(kept["fed"], copies)

    def back(t: int, k: int, d_read: Tensor) -> tuple[Tensor, Tensor]:
        dh = _added(carried[k] + spread(d_read / copies, copies), grads[0], t, k)
        dn = dh * slope[t, k]
        torch.mul(dn, every_fed[t, k], out=d_value[t, k, :, 0])
        torch.mul(dh, moved[t, k], out=d_value[t, k, :, 1])
        torch.mul(dh, z[t, k], out=carried[k])
        return gather(dn, copies), gather(dn * r[t, k], copies)

    return back


def _lstm(kept: Kept, phi: str, copies: int) -> Forward:
    h, c, phi_c, n, fed = (kept[name] for name in ("h", "c", "phi_c", "n", "fed"))

    def step(t: int, k: int, entered: Tensor, opened: Sequence[Tensor]) -> None:
        i, f, o = opened
        new = spread(activated(phi, entered + fed[t, k], n[t, k]), copies)
        torch.mul(f, c[t, k], out=c[t + 1, k]).addcmul_(i, new)
        h[t + 1, k] = fold(o * activated(phi, c[t + 1, k], phi_c[t, k]), copies)

    return step


def _lstm_back(
    kept: Kept, phi: str, copies: int, values: Sequence[Tensor], grads: Sequence[Tensor | None], d_value: Tensor, carried: Tensor
) -> Backward:
    """`carried` is d c."""
    (i, f, o), phi_c, slope, every_n = values, kept["phi_c"], PHI[phi].slope, spread(kept["n"], copies)
    slope_c, slope_n, moved = o * slope(phi_c), i * slope(every_n), torch.stack([every_n, kept["c"][:-1]], 3)

    def back(t: int, k: int, d_read: Tensor) -> tuple[Tensor, Tensor]:
        dm = spread(_added(d_read, grads[0], t, k) / copies, copies)  # d(o·φ(c))
        dc = _added(torch.addcmul(carried[k], dm, slope_c[t, k]), grads[1], t, k)
        torch.mul(dc.unsqueeze(1), moved[t, k], out=d_value[t, k, :, :2])
        torch.mul(dm, phi_c[t, k], out=d_value[t, k, :, 2])
        torch.mul(dc, f[t, k], out=carried[k])
        d = gather(dc * slope_n[t, k], copies)
        return d, d

    return back


UNITS = {"gf_tanh": Unit(0, _tanh, _tanh_back), "gf_gru": Unit(2, _gru, _gru_back), "gf_lstm": Unit(3, _lstm, _lstm_back, cell=True)}


class FeedbackWindow(torch.autograd.Function):
    """x_pre (T,B,(U+1)·H+L), the first layer's: U own gates without their bias, the candidate, L global gates -> h (T,L,B,·) as wide as a
    state, c (T,L,B,n·H), empty without one, the own gates' pre-activations (T,B,L·U,n·H), those of the global gates (T,B,L²)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x_pre: Tensor,
        below: Tensor,  # (L-1,(U+1)·H+L,H): the same rows for the layers above the first
        bias: Tensor,  # (L-1,(U+1)·H+L), 0 for own gates
        source: Tensor,  # (L,(L+U)·H+L²,H): what is read of a layer, for the candidate of each, its own gates, all global gates
        gates_bias: Tensor,  # (L·U,n·H)
        h0: Tensor,  # (L,B,·)
        c0: Tensor | None,  # (L,B,n·H)
        lo: Tensor,  # (L·U,n·H)
        hi: Tensor,
        noise: Drawn,
        modes: Modes,
        phi: str,
        unit: Unit,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (steps, batch, _), (layers, rows, hidden), width, own = x_pre.shape, source.shape, gates_bias.shape[1], unit.gates
        copies, entered, links = width // hidden, slice(own * hidden, (own + 1) * hidden), (own + 1) * hidden
        units = Decisions(x_pre, gates_bias, lo, hi, noise=noise.units, modes=modes[: layers * own])
        none = x_pre.new_zeros(layers * layers, 1)
        drawn = None if noise.shared is None else noise.shared.unsqueeze(3)
        shared = Decisions(x_pre, none, none, none + 1, noise=drawn, modes=modes[layers * own :])
        new = lambda count, size: x_pre.new_empty(count, layers, batch, size)
        kept = {"h": new(steps + 1, h0.shape[2]), "fed": new(steps, hidden), "n": new(steps, hidden if unit.cell else width)}
        kept["h"][0] = h0
        if c0 is not None:
            kept |= {"c": new(steps + 1, width), "phi_c": new(steps, width)}
            kept["c"][0] = c0
        kept["read"] = kept["h"] if copies == 1 or unit.cell else new(steps + 1, hidden)
        kept["read"][0] = h0 if unit.cell else fold(h0, copies)
        kept["products"] = new(steps, rows)
        step = unit.forward(kept, phi, copies)
        under, across, read = below.transpose(1, 2).contiguous(), source.transpose(1, 2).contiguous(), kept["read"]
        for t in range(steps):
            of_sources = torch.bmm(read[t], across, out=kept["products"][t])
            asked = of_sources[:, :, -layers * layers :].sum(0)
            for k in range(layers):
                product = torch.addmm(bias[k - 1], read[t + 1, k - 1], under[k - 1]) if k else x_pre[t]
                g = shared.decide(t, (product[:, links:] + asked[:, k * layers :][:, :layers]).unsqueeze(2), first=k * layers)
                torch.sum(of_sources[:, :, k * hidden :][:, :, :hidden] * g.transpose(0, 1), 0, out=kept["fed"][t, k])
                decided: Sequence[Tensor] = ()
                if own:
                    of_gates = product[:, : own * hidden] + of_sources[k, :, layers * hidden : -layers * layers]
                    decided = units.decide(t, of_gates.view(batch, own, hidden), first=k * own).unbind(1)
                step(t, k, product[:, entered], decided)
                if read is not kept["h"]:
                    read[t + 1, k] = fold(kept["h"][t + 1, k], copies)
        ctx.save_for_backward(below, source, *units.saved(), *shared.saved(), *kept.values())
        ctx.names, ctx.modes, ctx.phi, ctx.unit = tuple(kept), (units.modes, shared.modes), phi, unit
        ctx.set_materialize_grads(False)
        c = kept["c"][1:].clone() if unit.cell else x_pre.new_empty(0)
        return kept["h"][1:].clone(), c, units.pre, shared.pre.squeeze(3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None, grad_pre: Tensor | None, grad_links: Tensor | None) -> Any:
        below, source, *saved = ctx.saved_tensors
        of_units, of_links, rest = saved[: Decided.SAVED], saved[Decided.SAVED : 2 * Decided.SAVED], saved[2 * Decided.SAVED :]
        units = Decided(ctx.modes[0], *of_units, grad=grad_pre)
        shared = Decided(ctx.modes[1], *of_links, grad=None if grad_links is None else grad_links.unsqueeze(3))
        kept: Kept = dict(zip(ctx.names, rest, strict=True))
        products, read, unit = kept["products"], kept["read"], ctx.unit
        (steps, layers, batch, _), hidden, own = products.shape, source.shape[2], unit.gates
        copies, links, fed = units.d_value.shape[3] // hidden, (own + 1) * hidden, layers * hidden
        grad, d_products = products.new_empty(steps, layers, batch, links + layers), torch.empty_like(products)
        carried, d_read = torch.zeros_like(kept["c" if unit.cell else "h"][0]), torch.zeros_like(read[0])
        by_layer = lambda x: x.unflatten(2, (layers, own)).transpose(1, 2) if own else x  # (T,B,L·U,·) -> (T,L,B,U,·)
        given = (by_layer(units.values).unbind(3), (grad_h, grad_c), by_layer(units.d_value), carried)
        back = unit.backward(kept, ctx.phi, copies, *given)
        g = shared.values.transpose(1, 2)  # (T,L²,B,1)
        for t in reversed(range(steps)):
            for k in reversed(range(layers)):
                row, from_k = grad[t, k], slice(k * layers, (k + 1) * layers)
                row[:, own * hidden : links], d_fed = back(t, k, d_read[k])
                if own:
                    row[:, : own * hidden] = units.send(t, k * own, (k + 1) * own, copies=copies).flatten(1)
                    d_products[t, k, :, fed : -layers * layers] = row[:, : own * hidden]
                of_fed = slice(k * hidden, (k + 1) * hidden)
                torch.mul(d_fed, g[t, from_k], out=d_products[t, :, :, of_fed])
                torch.sum(d_fed * products[t, :, :, of_fed], 2, out=shared.d_value[t, :, from_k, 0].t())
                row[:, links:] = shared.send(t, k * layers, (k + 1) * layers, copies=1)[:, :, 0]
                if k:
                    d_read[k - 1] += row @ below[k - 1]
            d_products[t, :, :, -layers * layers :] = shared.d_pre[t, :, :, 0]
            torch.bmm(d_products[t], source, out=d_read)
        d_h0 = d_read if unit.cell else spread(d_read / copies, copies)
        if own == 2:
            d_h0 = d_h0 + carried
        in_rows = lambda x: x.transpose(0, 1).flatten(1, 2)  # (T,L,B,·) -> (L,T·B,·)
        d_below = in_rows(grad[:, 1:]).transpose(1, 2) @ in_rows(read[1:, :-1])
        d_source = in_rows(d_products).transpose(1, 2) @ in_rows(read[:-1])
        d_bias, d_lo, d_hi = units.gradients()
        states = (d_h0, carried if unit.cell else None)
        return grad[:, 0], d_below, grad[:, 1:].sum((0, 2)), d_source, d_bias, *states, d_lo, d_hi, *(None,) * 4


def _joined(w: CellWeights, leaf: str, layers: int) -> Tensor:
    """A layer's rows of every matrix, own gates first, then the candidate, then global gates: (layers,(U+1)·H+L,·)."""
    parts = [w.all.get(f"{part}.{leaf}") for part in ("gates", "candidate", "global")]
    return torch.cat([part.unflatten(0, (layers, -1)) for part in parts if part is not None], 1)


def _sources(w: CellWeights, layers: int, hidden: int) -> Tensor:
    """What is read of each layer: (L,(L+U)·H+L²,H)."""
    by_source = lambda matrix: matrix.unflatten(1, (layers, hidden)).transpose(0, 1)
    own = [w.gates_hh.unflatten(0, (layers, -1))] if w.gates_hh.numel() else []
    return torch.cat([by_source(w.candidate_hh), *own, by_source(w.all["global.weight_hh"])], 1)


def run(cell: Cell, x: Tensor | Lookup, state: CellState, *, modes: Modes, noise: Drawn) -> Trace:
    """x (T,B,I) or tokens, states h (B,L·n·H), or h (B,L·H) and c (B,L·n·H)."""
    w, (lo, hi), layer, unit = cell.weights(), cell.level_values(), cell.layer, UNITS[cell.layer.cell]
    layers, hidden, own = layer.depth, layer.hidden_size, unit.gates * layer.depth
    parts = [w.candidate_bias.view(layers, hidden), w.all["global.bias"].view(layers, layers)]
    bias = torch.cat([w.candidate_bias.new_zeros(layers, unit.gates * hidden), *parts], 1)  # own gates' belong to the copies
    x_pre = input_product(x, _joined(w, "weight_ih", 1)[0], bias=bias[0])
    below = _joined(w, "weight_below", layers - 1) if layers > 1 else bias.new_zeros(0, bias.shape[1], hidden)
    states = [s.unflatten(1, (layers, -1)).transpose(0, 1) for s in state]
    start = (states[0], states[1] if unit.cell else None)
    matrices = (below, bias[1:], _sources(w, layers, hidden))
    more = (lo[:own], hi[:own], noise, modes, layer.activation, unit)
    h, c, pre, links = FeedbackWindow.apply(x_pre, *matrices, w.gates_bias.view(own, layer.width), *start, *more)
    found = [s.transpose(1, 2).flatten(2) for s in ((h, c) if unit.cell else (h,))]
    return Trace(tuple(found), torch.cat([pre, links.unsqueeze(3).expand(-1, -1, -1, layer.width)], 2))
