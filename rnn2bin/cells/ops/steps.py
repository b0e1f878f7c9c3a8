"""What ONNX has no operation for: masked steps as Keras means them, which the layer does not see, and layers without gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rnn2bin.cells.ops.table import Values, given, maybe, operation


@operation("Compact")
def _compact(values: Values, attributes: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """x (T,B,…), mask (B,T) -> the real steps first, in order, zeros behind; lengths (B,); for each step the place its output is at (T,B).

    A masked step's place is that of the last real step before it, −1 where there is none. No ONNX operation.
    """
    x, mask = given(values, 0), given(values, 1).bool().t()
    lengths = mask.sum(0)
    order = (~mask).to(torch.uint8).argsort(dim=0, stable=True)
    wide = (*mask.shape, *[1] * (x.ndim - 2))
    moved = x.gather(0, order.view(wide).expand_as(x))
    real = torch.arange(len(x), device=x.device)[:, None] < lengths[None]
    return torch.where(real.view(wide), moved, moved.new_zeros(())), lengths, mask.long().cumsum(0) - 1


@operation("Spread")
def _spread(values: Values, attributes: dict[str, Any]) -> Tensor:
    """y (T,B,·) of compacted steps, places (T,B) of `Compact` -> outputs at the original steps; zeros where nothing real has come yet, and
    with `zero` at every masked step too (mask (B,T) as third value). No ONNX operation."""
    y, places = given(values, 0), given(values, 1)
    out = y.gather(0, places.clamp_min(0).unsqueeze(-1).expand(*places.shape, y.shape[2]))
    keep = places >= 0
    if attributes.get("zero"):
        keep = keep & given(values, 2).bool().t()
    return torch.where(keep.unsqueeze(-1), out, out.new_zeros(()))


@operation("PlainRnn")
def _plain_rnn(values: Values, attributes: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """h' = φ(W x + U h + b). x (T,B,I), W (H,I), U (H,H), b (H,), h0 (B,H)?, lengths (B,)? -> every h (T,B,H), the last (B,H).

    `reverse` walks backwards within each length; `activation`: tanh or relu. No ONNX operation: theirs has both directions in one.
    """
    from rnn2bin.cells.network import reverse, valid_steps

    x, w, u, b = (given(values, k) for k in range(4))
    h, lengths = maybe(values, 4), maybe(values, 5)
    h = x.new_zeros(x.shape[1], u.shape[0]) if h is None else h
    phi = torch.relu if attributes.get("activation") == "relu" else torch.tanh
    x = reverse(x, lengths) if attributes.get("reverse") else x
    real = None if lengths is None else valid_steps(lengths, len(x))
    steps = []
    for t, x_t in enumerate(functional.linear(x, w, b)):
        new = phi(x_t + h @ u.t())
        h = new if real is None else torch.where(real[t], new, h)
        steps.append(h if real is None else torch.where(real[t], new, new.new_zeros(())))
    y = torch.stack(steps)
    return (reverse(y, lengths) if attributes.get("reverse") else y), h
