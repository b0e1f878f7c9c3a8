"""Gated feedback RNNs (Chung et al. 2015, arXiv 1502.02367): a stack of layers in which every layer reads what all layers were a step ago,
each through a matrix that a global gate, one decision for all units, lets count or not. With such gates binary whole matrices are skipped.

A stack is one cell with a depth, since no layer can go a step ahead of the others (docs/decisions/023-stacks.md). Its states are those of
its layers in a row; others read the last one's h. Global gates have a bias, which the paper has not: a threshold must stand somewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rnn2bin.cells.family import Equations, Look, Product
from rnn2bin.cells.weights import CellWeights, Gate, fold


@dataclass(frozen=True)
class _Layer:
    """One layer of a stack: its rows of each matrix, and what is below it, x or the h of the layer before it (B,·)."""

    at: int
    below: Tensor
    w: CellWeights

    def under(self, part: str, rows: int) -> Tensor:
        """W h^{j−1}, `rows` rows of it for each layer."""
        weight = self.w.all[f"{part}.weight_ih"] if self.at == 0 else self.w.all[f"{part}.weight_below"][(self.at - 1) * rows :][:rows]
        return self.below @ weight.t()


def step(x: Tensor, state: tuple[Tensor, ...], w: CellWeights, gate: Gate, *, unit: str) -> tuple[tuple[Tensor, ...], Tensor]:
    """x (B,I), state h (B,L·n·H), or h (B,L·H) and c (B,L·n·H) with `unit` "lstm" -> new states, and the pre-activations (B,G,n·H): of each
    layer's own gates, then for each layer of the global gates from every layer, the same for all units."""
    layers, hidden = w.depth, w.hidden
    own = {"tanh": 0, "gru": 2, "lstm": 3}[unit]
    copies = w.gates_bias.shape[0] // (layers * own * hidden) if own else 1
    hs = state[0].unflatten(1, (layers, -1)).unbind(1)
    read = hs if unit == "lstm" else [fold(h, copies) for h in hs]
    everything = torch.cat(list(read), 1)
    pres, links, news, cells, below = [], [], [], [], x
    for at in range(layers):
        layer = _Layer(at, below, w)
        rows = slice(at * layers, (at + 1) * layers)
        link = layer.under("global", layers) + everything @ w.all["global.weight_hh"][rows].t() + w.all["global.bias"][rows]
        g = gate(link.unsqueeze(-1), first=(own + at) * layers)[:, :, :1]
        own_rows = slice(at * hidden, (at + 1) * hidden)
        blocks = w.candidate_hh[own_rows].unflatten(1, (layers, hidden)).unbind(1)
        fed = sum(g[:, i] * (read[i] @ blocks[i].t()) for i in range(layers))
        entered, bias = layer.under("candidate", hidden), w.candidate_bias[own_rows]
        if own:
            gates_rows = slice(at * own * hidden, (at + 1) * own * hidden)
            product = layer.under("gates", own * hidden) + read[at] @ w.gates_hh[gates_rows].t()
            pre = w.thresholds(product, first=at * own)
            pres.append(pre)
            opened = gate(pre, first=at * own).unbind(1)
        if unit == "lstm":
            i, f, o = opened
            c = f * state[1].unflatten(1, (layers, -1))[:, at] + i * w.squash(entered + fed + bias).repeat(1, copies)
            cells.append(c)
            h = below = fold(o * w.phi(c), copies)
        elif unit == "gru":
            r, z = opened
            n = w.squash((entered + bias).repeat(1, copies) + r * fed.repeat(1, copies))
            h = z * hs[at] + (1 - z) * n
            below = fold(h, copies)
        else:
            h = below = w.squash(entered + fed + bias)
        news.append(h)
        links.append(link)
    width = copies * hidden
    pre = torch.cat([*pres, torch.cat(links, 1).unsqueeze(-1).expand(-1, -1, width)], 1)
    return (torch.cat(news, 1), torch.cat(cells, 1)) if cells else (torch.cat(news, 1),), pre


def _reads(look: Look, *, unit: str) -> Sequence[Product]:
    size, layers, own = look.hidden, look.depth, {"tanh": 0, "gru": 2, "lstm": 3}[unit]
    before, after = (look.layers(state).sum(-1).unbind(-1) for state in (look.before(0), look.after(0)))
    every = look.every(size)
    products = []
    for at in range(layers):
        below, width = (None, look.input_size) if at == 0 else (after[at - 1], size)
        if unit == "lstm":
            rows = fed = look.opens(at * own).sum(-1)
        elif unit == "gru":
            rows, fed = look.closes(at * own + 1).sum(-1), look.closes_and_opens(at * own + 1, at * own).sum(-1)
        else:
            rows = fed = every
        if own:
            products += [Product(own * every, before[at], (own * size, size)), Product(own * every, below, (own * size, width))]
        products += [Product(look.every(layers), below, (layers, width))]
        products += [Product(look.every(layers), sum(before, look.every(0)), (layers, layers * size))]
        products += [Product(rows, below, (size, width), candidate=True)]
        for source in range(layers):
            through = look.opens(own * layers + at * layers + source)[..., 0]
            products += [Product(through * fed, before[source], (size, size))]
    return products


CELLS = {f"gf_{unit}": Equations(partial(step, unit=unit), partial(_reads, unit=unit)) for unit in ("tanh", "gru", "lstm")}
