"""Synthetic gradients: a small network that guesses a gradient, so that what is below need not wait for it, or need not bear its noise.

Expected REINFORCE: `Subnet` regresses the REINFORCE gradient of a layer of bits; its guess, near the mean of what it saw, is what the layer
below receives. DNI (Jaderberg et al. 2017, arXiv 1608.05343): every layer of a feed-forward net is trained by the guess of the
module above it, and each module by the gradient that the next layer hands down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from rnn2bin.gates import score

Input = Literal["context", "probability", "gradient", "sample", "baseline", "complement"]
INPUTS: tuple[Input, ...] = get_args(Input)


class Subnet(nn.Module):
    """A guess (N,U) of a gradient: a linear map plus a residual MLP, both ending in zeros, so that it begins by guessing nothing.

    `widths`: how wide each of its inputs is, by name; an input that is left out is masked. Its parameters want an optimizer of their own.
    """

    def __init__(self, units: int, *, widths: dict[str, int], hidden: int = 64) -> None:
        super().__init__()
        self.names = tuple(widths)
        size = sum(widths.values())
        self.linear = nn.Linear(size, units)
        self.below = nn.Linear(size, hidden)
        self.middle = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, units)
        for last in (self.linear, self.out):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """features by name, each (N,width), those of `widths` at least -> (N,U)."""
        x = torch.cat([features[name].detach() for name in self.names], 1)
        first = torch.relu(self.below(x))
        return self.linear(x) + self.out(first + torch.relu(self.middle(first)))


def subnet(units: int, *, context: int = 0, inputs: Sequence[Input] = INPUTS, hidden: int = 64) -> Subnet:
    """A subnet for a layer of `units` bits. Of σ(pre), ∂L/∂bit, the bits, their baseline, 1 − σ(pre) and a context it reads `inputs`."""
    sizes = {name: context if name == "context" else units for name in inputs}
    return Subnet(units, widths={name: size for name, size in sizes.items() if size}, hidden=hidden)


@dataclass(frozen=True)
class Expected:
    """What `expected_reinforce` found: `surrogate`, whose gradient in `pre` is the guess; `fit`, the subnet's loss, whose gradient is in
    its parameters alone; the losses (N,) of the first draw, differentiable in all that is behind the bits; the next baseline."""

    surrogate: Tensor
    fit: Tensor
    losses: Tensor
    bits: Tensor
    baseline: score.Baseline


def expected_reinforce(
    pre: Tensor,
    loss_of: Callable[[Tensor], Tensor],
    *,
    subnet: Subnet,
    baseline: score.Baseline,
    context: Tensor | None = None,
    repeats: int = 1,
    generator: torch.Generator | None = None,
) -> Expected:
    """pre (N,U), `loss_of`: bits (N,U) -> losses (N,). REINFORCE's gradient (L − b)(bit − p), averaged over `repeats` draws, is what
    `subnet` is fitted to; its guess for the first draw is what `pre` receives.

    Its target is unbiased, the guess is not: it is 0 before the subnet has learned, and what the subnet cannot tell stays unsaid. Costs
    `repeats` forward passes behind the bits, a backward pass to the bits, and the subnet.
    """
    p = torch.sigmoid(pre.detach())
    first = score.draw(pre, generator=generator).requires_grad_()
    losses = loss_of(first)
    # The losses of the first draw are used again by the caller: the graph stays.
    (gradient,) = torch.autograd.grad(losses.sum(), first, retain_graph=True)
    level = baseline.values(losses, context)
    target = (losses.detach().unsqueeze(1) - level) * (first.detach() - p)
    with torch.no_grad():
        for _ in range(repeats - 1):
            again = score.draw(pre, generator=generator)
            target = target + (loss_of(again).unsqueeze(1) - level) * (again - p)
    target = target / repeats
    features = {"probability": p, "gradient": gradient, "sample": first, "baseline": level.expand_as(p), "complement": 1 - p}
    if context is not None:
        features["context"] = context
    guess = subnet(features)
    return Expected(
        surrogate=(guess.detach() * pre).sum() / len(pre),
        fit=functional.mse_loss(guess, target),
        losses=losses,
        bits=first.detach(),
        baseline=baseline.seen(losses, first.detach() - p, context),
    )


def due(step: int, *, interval: float, growth: float = 0.0) -> bool:
    """Whether a subnet is fitted at this step, where the interval between two fits is `interval`·e^(growth·step): a pure function.

    Interval 1 and growth 0: every step.
    """

    def fits(at: int) -> float:
        """∫ 1/interval from 0 to `at`."""
        return at / interval if growth == 0 else -math.expm1(-growth * at) / (interval * growth)

    # The first is due at step 0; rounding must not lose one that falls on a whole number.
    return step == 0 or math.floor(fits(step) + 1e-9) > math.floor(fits(step - 1) + 1e-9)


# ---------------------------------------------------------------------------------------------- DNI


def dni_step(
    layers: Sequence[nn.Module],
    guessers: Sequence[Subnet],
    x: Tensor,
    loss_of: Callable[[Tensor], Tensor],
    *,
    context: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One decoupled step of a feed-forward net: leaves gradients in the parameters of `layers` (by the guesses) and of `guessers` (by how
    far these were off); returns (the loss, the guessers' error).

    x (N,·); `guessers[k]` sees the output of layers[k] as `sample`, and `context` (a label, say) where it takes one, and guesses
    d(loss)/d(output)·N; there is one fewer than layers. `loss_of`: the last layer's output -> the mean loss. Gradients add up: clear
    them before.
    """
    if len(guessers) != len(layers) - 1:
        raise ValueError(f"{len(layers)} layers take {len(layers) - 1} guessers; found {len(guessers)}")
    error, guess = x.new_zeros(()), None
    for k, layer in enumerate(layers):
        entering = x.detach().requires_grad_(k > 0)
        y = layer(entering)
        if k < len(guessers):
            features = {"sample": y.flatten(1)} | ({} if context is None else {"context": context})
            above = guessers[k](features)
            torch.autograd.backward(y, above.detach().view_as(y) / len(y))
        else:
            above, loss = None, loss_of(y)
            loss.backward()
        if guess is not None:
            assert entering.grad is not None
            missed = functional.mse_loss(guess, entering.grad.detach().flatten(1) * len(y))
            missed.backward()
            error = error + missed.detach()
        guess, x = above, y
    return loss.detach(), error
