"""What the windows share: decisions of several gates at once, copies, activations, and the gradient of levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """The gates of a window as it runs: those that are decided together are a `part`."""

    def __init__(self, bias: Tensor, lo: Tensor, hi: Tensor, *, noise: Tensor | None, modes: Modes) -> None:
        """`bias` and levels (G,n·H), noise (T,B,G,n·H)."""
        self.bias, self.lo, self.hi, self.noise, self.modes = bias, lo, hi, noise, modes
        self.strict = bool((lo == 0).all() & (hi == 1).all())  # a sample is its level
        self.parts: list[tuple[list[Tensor], list[Tensor], list[Tensor]]] = []

    def part(self, first: int, last: int, hidden: int) -> Callable[[Tensor], Tensor]:
        """The gates from `first` to before `last`, of H units; parts are asked for in the order of their gates. At each step the function
        that is returned takes their products (B,g·H) and gives the levels that they select (B,g,n·H)."""
        at = slice(first, last)
        bias, lo, hi, modes = self.bias[at].view(last - first, -1, hidden), self.lo[at], self.hi[at], self.modes[at]
        noise = None if self.noise is None else self.noise[:, :, at].unbind(0)
        pres, samples, values = [], [], []  # type: ignore[var-annotated]
        self.parts.append((pres, samples, samples if self.strict else values))

        def decide(product: Tensor) -> Tensor:
            drawn = None if noise is None else noise[len(pres)]
            pres.append(pre := (product.view(-1, last - first, 1, hidden) + bias).flatten(2))
            samples.append(value := sampled(modes, pre, drawn))
            if not self.strict:
                values.append(value := torch.lerp(lo, hi, value))
            return value

        return decide

    def over_time(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pre-activations, samples and levels of all gates and steps, (T,B,G,n·H) each; of no gates where there are none, x (T,B,·) says
        for how many steps."""
        if not self.parts:
            return (like.new_zeros(*like.shape[:2], 0, self.bias.shape[1]),) * 3
        pre, samples = (_side_by_side([stacked(part[k]) for part in self.parts]) for k in (0, 1))
        return pre, samples, samples if self.strict else _side_by_side([stacked(part[2]) for part in self.parts])


def _side_by_side(parts: list[Tensor]) -> Tensor:
    """Gates of several parts (T,B,g,n·H) -> all of them."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def stacked(steps: list[Tensor]) -> Tensor:
    """A list of steps -> a window. The list is emptied: both would be a window's memory twice."""
    window = torch.stack(steps)
    steps.clear()
    return window


def in_order(steps: list[Tensor]) -> Tensor:
    """The same of what was found from the last step to the first."""
    steps.reverse()
    return stacked(steps)


def level_slopes(modes: Modes, pre: Tensor, samples: Tensor, lo: Tensor, hi: Tensor, noise: Tensor | None) -> Tensor:
    """d level / d pre-activation (T,B,G,n·H)."""
    return derivatives(modes, pre, samples, noise).mul_(hi - lo) if modes else torch.zeros_like(pre)


def level_gradients(received: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of (lo, hi), each (G,n·H), from what the gates' values received over the window (T,B,G,n·H)."""
    d_hi = (received * bits).sum((0, 1))
    return received.sum((0, 1)) - d_hi, d_hi


def activated(name: str, x: Tensor, out: Tensor | None = None) -> Tensor:
    """φ(x), in `out` if given."""
    if name == "tanh":
        return tanh(x, out)
    return PHI[name].value(x) if out is None else out.copy_(PHI[name].value(x))


def tanh(x: Tensor, out: Tensor | None = None) -> Tensor:
    """tanh x as 2σ(2x) − 1: on CPUs torch's sigmoid takes a sixth of the time of its tanh; the error, 1e-7, does not matter here."""
    out = torch.mul(x, 2, out=out)
    return torch.sigmoid(out, out=out).mul_(2).sub_(1)


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


def shared(x: Tensor, copies: int) -> Tensor:
    """The gradient of a mean over copies (…,H) -> what each copy receives of it (…,n·H)."""
    return x if copies == 1 else spread(x / copies, copies)


def plus(x: Tensor, more: Sequence[Tensor] | None, t: int) -> Tensor:
    """x, and what came from outside at step t, if anything did."""
    return x if more is None else x + more[t]


def steps_of(x: Tensor | None) -> Sequence[Tensor] | None:
    """A window's gradient step by step, None where there is none."""
    return None if x is None else x.unbind(0)
