"""What the windows share: decisions of several gates at once, copies, activations, and the gradient of levels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rnn2bin.cells.weights import PHI
from rnn2bin.gates.estimators import Discretize, derivative, sample

Modes = tuple[Discretize, ...]


@dataclass(frozen=True)
class Drawn:
    """A window's noise, None where none is drawn: `units` (T,B,G,n·H) of the gates that decide for a unit, `shared` (T,B,S) of those that
    decide for all."""

    units: Tensor | None = None
    shared: Tensor | None = None


def sampled(modes: Modes, pre: Tensor, noise: Tensor | None) -> Tensor:
    """Samples for pre (...,G,H); one pass where all gates share a mode."""
    if len(set(modes)) == 1:
        return sample(modes[0], pre, noise)
    parts = [sample(m, pre[..., k, :], None if noise is None else noise[..., k, :]) for k, m in enumerate(modes)]
    return torch.stack(parts, -2)


def derivatives(modes: Modes, pre: Tensor, value: Tensor, noise: Tensor | None) -> Tensor:
    """d sample / d pre (...,G,H), of the same arguments."""
    if len(set(modes)) == 1:
        return derivative(modes[0], pre, value, noise)
    parts = [derivative(m, pre[..., k, :], value[..., k, :], None if noise is None else noise[..., k, :]) for k, m in enumerate(modes)]
    return torch.stack(parts, -2)


class Decisions:
    """The gates of a window as it runs: pre-activations, samples and the levels these select, (T,B,G,n·H) each, filled step by step."""

    def __init__(self, like: Tensor, bias: Tensor, lo: Tensor, hi: Tensor, *, noise: Tensor | None, modes: Modes) -> None:
        """`like` (T,B,…); `bias` and levels (G,n·H)."""
        self.bias, self.lo, self.hi, self.noise, self.modes = bias, lo, hi, noise, modes
        self.pre, self.bits, self.values = (like.new_empty(*like.shape[:2], *bias.shape) for _ in range(3))

    def decide(self, t: int, product: Tensor, *, first: int = 0) -> Tensor:
        """Products (B,g,H) of the gates from `first` on at step t -> the levels they select (B,g,n·H)."""
        at = slice(first, first + product.shape[1])
        pre = add_thresholds(self.bias[at], product, self.pre[t, :, at])
        bits = self.bits[t, :, at] = sampled(self.modes[at], pre, None if self.noise is None else self.noise[t, :, at])
        return torch.lerp(self.lo[at], self.hi[at], bits, out=self.values[t, :, at])

    def saved(self) -> tuple[Tensor | None, ...]:
        """What `Decided` is made of on the way back."""
        return self.pre, self.bits, self.values, self.lo, self.hi, self.noise


class Decided:
    """The same on the way back: a window writes into `d_value` what each gate's value received, and asks for what that sends further."""

    SAVED = 6  # tensors of `Decisions.saved`

    def __init__(
        self, modes: Modes, pre: Tensor, bits: Tensor, values: Tensor, lo: Tensor, hi: Tensor, noise: Tensor | None, *, grad: Tensor | None
    ) -> None:
        """`grad`: what the pre-activations received from outside, if anything."""
        self.bits, self.values, self.grad = bits, values, grad
        self.through = derivatives(modes, pre, bits, noise).mul_(hi - lo) if modes else pre
        self.d_value, self.d_pre = torch.empty_like(pre), torch.empty_like(pre)

    def send(self, t: int, first: int, last: int, *, copies: int) -> Tensor:
        """The gradient (B,g,H) of the products behind the gates from `first` to before `last` at step t."""
        at = slice(first, last)
        torch.mul(self.d_value[t, :, at], self.through[t, :, at], out=self.d_pre[t, :, at])
        if self.grad is not None:
            self.d_pre[t, :, at] += self.grad[t, :, at]
        return gather(self.d_pre[t, :, at], copies)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of thresholds, lo and hi, (G,n·H) each."""
        return self.d_pre.sum((0, 1)), *level_gradients(self.d_value, self.bits)


def level_gradients(received: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of (lo, hi), each (G,n·H), from what the gates' values received over the window (T,B,G,n·H)."""
    d_hi = (received * bits).sum((0, 1))
    return received.sum((0, 1)) - d_hi, d_hi


def activated(name: str, x: Tensor, out: Tensor) -> Tensor:
    """φ(x) -> out."""
    return tanh(x, out) if name == "tanh" else out.copy_(PHI[name].value(x))


def tanh(x: Tensor, out: Tensor) -> Tensor:
    """tanh x as 2σ(2x) − 1: on CPUs torch's sigmoid takes a sixth of the time of its tanh; the error, 1e-7, does not matter here."""
    return torch.sigmoid(torch.mul(x, 2, out=out), out=out).mul_(2).sub_(1)


def squash(phi: str, pre: Tensor, out: Tensor, clip: float, inside: Tensor | None) -> Tensor:
    """A candidate of its pre-activation, which is clipped in place; `inside`: where that changes nothing, None where nothing is clipped."""
    if inside is not None:
        torch.le(pre.abs(), clip, out=inside)
        pre.clamp_(-clip, clip)
    return activated(phi, pre, out)


def add_thresholds(bias: Tensor, product: Tensor, out: Tensor) -> Tensor:
    """product (B,G,H) + a threshold for each copy, bias (G,n·H) -> out (B,G,n·H)."""
    batch, gates, hidden = product.shape
    torch.add(product.unsqueeze(2), bias.view(gates, -1, hidden), out=out.view(batch, gates, -1, hidden))
    return out


def spread(x: Tensor, copies: int) -> Tensor:
    """(…,H) -> (…,n·H), the same for every copy."""
    return x if copies == 1 else x.repeat(*[1] * (x.ndim - 1), copies)


def gather(x: Tensor, copies: int) -> Tensor:
    """(…,n·H) -> the sum over copies (…,H): the gradient of `spread`."""
    return x if copies == 1 else x.unflatten(-1, (copies, -1)).sum(-2)
