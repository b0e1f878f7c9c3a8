"""Gated feedback stacks (`cells/feedback.py`): all layers of a step, each reading what every layer was a step ago.

What a step reads of the step before is one batch of products, a source each; what it reads of the layer below is one product a layer, for
the first layer made before the loop. Products of a source are kept: they are what a global gate's gradient is multiplied by.

Windows of layers stand as (T,L,B,·); where they are walked, one behind the other, layer k of step t is at t·L + k.
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
)

# ---------------------------------------------------------------------------------------------- what a layer does with what reaches it

Back = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Unit:
    """`gates`: its own. `has_cell`: h is what is shown of c. `forward`: a layer's state before, W h^{j−1} + b and Σ g U h (B,H), own
    gates (B,n·H) each, φ, copies -> its state, and what is kept of the step. `backward`: the states before all steps and after them,
    what was kept, (T,L,B,·) each, own gates (T,L,B,U,n·H), Σ g U h, φ, copies -> a function of a place, d read (B,H) and what its state
    carries back (B,n·H): what own gates received (B,U,n·H), the gradients of W h^{j−1} + b and Σ g U h, and what is carried on."""

    gates: int
    forward: Callable[..., tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]
    backward: Callable[..., Back]
    has_cell: bool = False


def _tanh(state: Sequence[Tensor], entered: Tensor, fed: Tensor, opened: Sequence[Tensor], phi: str, copies: int) -> Any:
    return (activated(phi, entered + fed),), ()


def _tanh_back(
    before: Sequence[Tensor], after: Sequence[Tensor], kept: Sequence[Tensor], values: Tensor, fed: Tensor, phi: str, copies: int
) -> Back:
    slope = _places(PHI[phi].slope(after[0]))

    def back(at: int, d_read: Tensor, carried: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d = (carried + d_read) * slope[at]
        return d.new_empty(0), d, d, torch.zeros_like(carried)

    return back


def _gru(state: Sequence[Tensor], entered: Tensor, fed: Tensor, opened: Sequence[Tensor], phi: str, copies: int) -> Any:
    r, z = opened
    n = activated(phi, torch.addcmul(spread(entered, copies), r, spread(fed, copies)))
    return (torch.lerp(n, state[0], z),), (n,)


def _gru_back(
    before: Sequence[Tensor], after: Sequence[Tensor], kept: Sequence[Tensor], values: Tensor, fed: Tensor, phi: str, copies: int
) -> Back:
    (n,), (r, z) = kept, values.unbind(3)
    slopes = torch.stack([(1 - z) * PHI[phi].slope(n), before[0] - n], 3)  # d h to the candidate, and to z
    slope, from_n, kept_r, kept_z = _places(slopes), _places(spread(fed, copies)), _places(r), _places(z)

    def back(at: int, d_read: Tensor, carried: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dh = carried + shared(d_read, copies)
        received = dh.unsqueeze(1) * slope[at]
        dn = received[:, 0].clone()
        received[:, 0] *= from_n[at]
        return received, gather(dn, copies), gather(dn * kept_r[at], copies), dh * kept_z[at]

    return back


def _lstm(state: Sequence[Tensor], entered: Tensor, fed: Tensor, opened: Sequence[Tensor], phi: str, copies: int) -> Any:
    i, f, o = opened
    n = activated(phi, entered + fed)
    c = (f * state[1]).addcmul_(i, spread(n, copies))
    y = activated(phi, c)
    return (fold(o * y, copies), c), (n, y)


def _lstm_back(
    before: Sequence[Tensor], after: Sequence[Tensor], kept: Sequence[Tensor], values: Tensor, fed: Tensor, phi: str, copies: int
) -> Back:
    (n, y), (i, f, o) = kept, values.unbind(3)
    every_n, slope = spread(n, copies), PHI[phi].slope
    by_cell = _places(torch.stack([every_n, before[1], f, i * slope(every_n)], 3))  # d c to i, to f, to the cell before, to the candidate
    by_read, shown = _places(o * slope(y)), _places(y)

    def back(at: int, d_read: Tensor, carried: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dm = shared(d_read, copies)  # d(o·φ(c))
        sent = torch.addcmul(carried, dm, by_read[at]).unsqueeze(1) * by_cell[at]
        d = gather(sent[:, 3], copies)
        return torch.cat([sent[:, :2], (dm * shown[at]).unsqueeze(1)], 1), d, d, sent[:, 2]

    return back


UNITS = {"gf_tanh": Unit(0, _tanh, _tanh_back), "gf_gru": Unit(2, _gru, _gru_back), "gf_lstm": Unit(3, _lstm, _lstm_back, has_cell=True)}


# ------------------------------------------------------------------------------------------------------------------------- the stack


def _places(x: Tensor) -> Sequence[Tensor]:
    """(T,L,B,…) -> each layer of each step, in order."""
    return [layer for step in x.unbind(0) for layer in step.unbind(0)]


def _in_layers(x: Tensor, layers: int) -> Tensor:
    """Gates (T,B,L·U,·) -> (T,L,B,U,·)."""
    return x.unflatten(2, (layers, x.shape[2] // layers)).transpose(1, 2)


def _window(places: list[Tensor], layers: int) -> Tensor:
    """The reverse of `_places`."""
    return stacked(places).unflatten(0, (-1, layers))


def _put(lists: list[list[Tensor]], values: Sequence[Tensor]) -> None:
    """Each value behind its list, which is made for the first."""
    lists.extend([] for _ in values[len(lists) :])
    for one, value in zip(lists, values, strict=True):
        one.append(value)


class FeedbackWindow(torch.autograd.Function):
    """x_pre (T,B,(U+1)·H+L), the first layer's: U own gates without their bias, the candidate, L global gates -> h (T,L,B,·) as wide as a
    state, c (T,L,B,n·H), empty without one, the layers' pre-activations (T,B,L·U,n·H), those of the global gates (T,B,L²,1)."""

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
        (layers, rows, hidden), own, width = source.shape, unit.gates, gates_bias.shape[1]
        copies, of_layer, of_source = width // hidden, [own * hidden, hidden, layers], [layers * hidden, own * hidden, layers**2]
        units = Decisions(gates_bias, lo, hi, noise=noise.units, modes=modes[: layers * own])
        none = x_pre.new_zeros(layers**2, 1)
        global_ = Decisions(
            none, none, none + 1, noise=None if noise.shared is None else noise.shared.unsqueeze(3), modes=modes[layers * own :]
        )
        decide = [units.part(k * own, (k + 1) * own, hidden) for k in range(layers)] if own else []
        link = [global_.part(k * layers, (k + 1) * layers, 1) for k in range(layers)]
        under, across = below.transpose(1, 2).contiguous().unbind(0), source.transpose(1, 2).contiguous()
        state = list(zip(*(s.unbind(0) for s in (h0, c0) if s is not None), strict=True))
        read = h0 if unit.has_cell else fold(h0, copies)
        products, reads, feds = x_pre.new_empty(len(x_pre), *h0.shape[:2], rows), [read], []
        states, kept = list[list[Tensor]](), list[list[Tensor]]()
        for x, of_read in zip(x_pre.unbind(0), products.unbind(0), strict=True):
            blocks, gates, asked = torch.bmm(read, across, out=of_read).split(of_source, 2)
            by_target, of_gates = blocks.unflatten(2, (layers, hidden)).unbind(2), gates.unbind(0)
            asked, seen = asked.sum(0).split(layers, 1), list[Tensor]()
            for k in range(layers):
                product = torch.addmm(bias[k - 1], seen[-1], under[k - 1]) if k else x
                asks, entered, links = product.split(of_layer, 1)
                g = link[k](links + asked[k])
                fed = (by_target[k] * g.transpose(0, 1)).sum(0)
                opened = decide[k](asks + of_gates[k]).unbind(1) if own else ()
                state[k], more = unit.forward(state[k], entered, fed, opened, phi, copies)
                seen.append(state[k][0] if unit.has_cell else fold(state[k][0], copies))
                feds.append(fed)
                _put(states, state[k])
                _put(kept, more)
            reads.append(read := torch.stack(seen))
        h, *c = (_window(s, layers) for s in states)
        of_units, of_links = units.over_time(x_pre), global_.over_time(x_pre)
        saved = (*of_units, lo, hi, units.noise, *of_links, none, none + 1, global_.noise, h0, c0, h, c[0] if c else None)
        of_steps = [_window(m, layers) for m in kept]
        ctx.save_for_backward(below, source, products, stacked(reads), _window(feds, layers), *saved, *of_steps)
        ctx.modes, ctx.phi, ctx.unit = (units.modes, global_.modes), phi, unit
        ctx.set_materialize_grads(False)
        return h, c[0] if c else h.new_empty(0), of_units[0], of_links[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None, grad_pre: Tensor | None, grad_links: Tensor | None) -> Any:
        below, source, products, reads, fed, *saved = ctx.saved_tensors
        (pre, samples, values, lo, hi, noise), of_links, (h0, c0, h, c), kept = saved[:6], saved[6:12], saved[12:16], saved[16:]
        (steps, layers), hidden, unit = products.shape[:2], source.shape[2], ctx.unit
        copies, own = values.shape[3] // hidden, unit.gates
        after = (h,) if c is None else (h, c)
        before = [torch.cat([s0[None], s[:-1]]) for s0, s in zip((h0, c0), after, strict=False)]
        back = unit.backward(before, after, kept, _in_layers(values, layers), fed, ctx.phi, copies)
        through = _places(_in_layers(level_slopes(ctx.modes[0], pre, samples, lo, hi, noise), layers)) if own else []
        through_links = _places(_in_layers(level_slopes(ctx.modes[1], *of_links[:2], *of_links[3:]), layers).squeeze(4))
        g = _places(_in_layers(of_links[2], layers).transpose(2, 3))  # (L,B,1)
        blocks = _places(products[..., : layers * hidden].unflatten(3, (layers, hidden)).permute(0, 3, 1, 2, 4))  # (L,B,H)
        decided = None if grad_pre is None or not own else _places(_in_layers(grad_pre, layers))
        linked = None if grad_links is None else _places(_in_layers(grad_links, layers).squeeze(4))
        shown, memory = (None if x is None else _places(x) for x in (grad_h, grad_c))
        carried = list(torch.zeros_like(after[-1][0]).unbind(0))
        d_read, d_pres, received = list(torch.zeros_like(reads[0]).unbind(0)), [], []
        # Layers first: a gradient of weights is a product of a layer's steps, one behind the other.
        d_rows, d_products = (products.new_empty(layers, steps, len(carried[0]), n) for n in (below.shape[1], products.shape[3]))
        learns = ctx.needs_input_grad[7] or ctx.needs_input_grad[8]
        for t in reversed(range(steps)):
            d_blocks, d_gates, d_links = [], [], []
            for k in reversed(range(layers)):
                at = t * layers + k
                if unit.has_cell:
                    d_read[k], carried[k] = plus(d_read[k], shown, at), plus(carried[k], memory, at)
                else:
                    carried[k] = plus(carried[k], shown, at)
                of_gates, d_entered, d_fed, carried[k] = back(at, d_read[k], carried[k])
                if own:
                    d_pres.append(d_pre := plus(of_gates * through[at], decided, at))
                    if learns:
                        received.append(of_gates)
                    d_gates.append(gather(d_pre, copies).flatten(1))
                d_links.append(plus((d_fed * blocks[at]).sum(2).t() * through_links[at], linked, at))
                d_blocks.append(g[at] * d_fed)
                row = torch.cat([*d_gates[-1:], d_entered, d_links[-1]], 1, out=d_rows[k, t])
                if k:
                    d_read[k - 1] = torch.addmm(d_read[k - 1], row, below[k - 1])
            to_gates = [in_order(d_gates)] if own else []
            of_sources = torch.cat([*reversed(d_blocks), *to_gates, torch.cat(d_links[::-1], 1).expand(layers, -1, -1)], 2)
            d_products[:, t] = of_sources
            d_read = list(torch.bmm(of_sources, source).unbind(0))
        d_h0 = torch.stack(d_read) if unit.has_cell else shared(torch.stack(d_read), copies)
        states = (d_h0, torch.stack(carried)) if unit.has_cell else (d_h0 + torch.stack(carried), None)
        by_layer = reads.transpose(0, 1)  # (L,T+1,B,H)
        d_below = d_rows[1:].flatten(1, 2).transpose(1, 2) @ by_layer[:-1, 1:].flatten(1, 2)
        d_source = d_products.flatten(1, 2).transpose(1, 2) @ by_layer[:, :-1].flatten(1, 2)
        d_bias, d_lo, d_hi = None, torch.zeros_like(lo), torch.zeros_like(hi)
        if own:
            of_units = lambda x: in_order(x).unflatten(0, (steps, layers)).transpose(1, 2).flatten(2, 3)  # (T,B,L·U,n·H)
            d_bias = of_units(d_pres).sum((0, 1))
            if learns:
                d_lo, d_hi = level_gradients(of_units(received), samples)
        return d_rows[0], d_below, d_rows[1:].sum((1, 2)), d_source, d_bias, *states, d_lo, d_hi, *(None,) * 4


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
    start = (states[0], states[1] if unit.has_cell else None)
    matrices = (below, bias[1:], _sources(w, layers, hidden), w.gates_bias.view(own, layer.width))
    h, c, pre, links = FeedbackWindow.apply(x_pre, *matrices, *start, lo[:own], hi[:own], noise, modes, layer.activation, unit)
    found = tuple(s.transpose(1, 2).flatten(2) for s in ((h, c) if unit.has_cell else (h,)))
    return Trace(found, torch.cat([pre, links.expand(-1, -1, -1, layer.width)], 2))
