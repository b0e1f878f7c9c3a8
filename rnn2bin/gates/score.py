"""Score-function estimators: the gradient at the pre-activation of a random bit, made of the losses behind it.

Any network can use them: `draw` bits, run what is behind them, give the loss of each example to `reinforce` or `disarm`, and add what these
return to the loss. Its value means nothing; its gradient in the pre-activations is the estimate, averaged over examples, and it goes on
through whatever made the pre-activations. What is random and what is remembered is passed in and out: a generator, a `Baseline`.

Shapes: pre and bits (N,U), N examples of U bits; losses (N,). Bits of a sequence belong to one example: `pre.movedim(1, 0).flatten(1)`.

Sources: REINFORCE: Williams 1992; baselines: Weaver & Tao 2001, Mnih & Gregor 2014 (arXiv 1402.0030); the one that makes a unit's variance
least: Bengio et al. 2013 (1308.3432); DisARM: Dong, Mnih & Tucker 2020 (2006.10680).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional

Kind = Literal["none", "mean", "unit", "conditional"]
DECAY = 0.95  # of the running means
RATE = 0.5  # of the conditional mean's steps, in units of the step that would cancel one example's error
_FLOOR = 1e-4  # of the per-unit baseline's denominator


def draw(pre: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Bits, each 1 with probability σ(pre), of the shape and dtype of `pre`; they carry no gradient."""
    p = torch.sigmoid(pre.detach())
    return (_uniform(p, generator) < p).to(pre.dtype)


def antithetic(pre: Tensor, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Two draws of the same bits from one uniform number each, u and 1 − u: as far apart as they can be, for `disarm`."""
    p = torch.sigmoid(pre.detach())
    u = _uniform(p, generator)
    return (1 - u < p).to(pre.dtype), (u < p).to(pre.dtype)


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def log_probability(pre: Tensor, bits: Tensor) -> Tensor:
    """log p(bit) of each bit under σ(pre); its gradient in `pre` is bit − σ(pre)."""
    return -functional.binary_cross_entropy_with_logits(pre, bits.detach(), reduction="none")


def exponential(losses: Tensor, *, temperature: float) -> Tensor:
    """The losses −e^{−L/T}, in (−1, 0) for L ≥ 0: a reward that no bad example can dominate. It is another objective than L itself."""
    return -torch.exp(-losses / temperature)


# ---------------------------------------------------------------------------------------------- baselines


class Baseline(Protocol):
    """What is subtracted from a loss before it meets the score; never made of the bits it is used for. A value: `seen` gives the next."""

    def values(self, losses: Tensor, context: Tensor | None) -> Tensor:
        """A baseline for each example (N,1), each unit (1,U) or all (1,1); of `losses` only dtype and device are read."""
        ...

    def seen(self, losses: Tensor, scores: Tensor, context: Tensor | None) -> Self:
        """The baseline after losses (N,) and scores bit − p (N,U) of this batch; context (N,F) is what the losses can be guessed from."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What it remembers, by name; `restored` takes it back."""
        ...


@dataclass(frozen=True)
class Nothing:
    """No baseline."""

    def values(self, losses: Tensor, context: Tensor | None) -> Tensor:
        return losses.new_zeros(1, 1)

    def seen(self, losses: Tensor, scores: Tensor, context: Tensor | None) -> Self:
        return self

    def tensors(self) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True)
class RunningMean:
    """The exponential mean of past losses, without the bias of its start; 0 before any were seen."""

    mean: Tensor | None = None
    weight: Tensor | None = None

    def values(self, losses: Tensor, context: Tensor | None) -> Tensor:
        if self.mean is None or self.weight is None:
            return losses.new_zeros(1, 1)
        return (self.mean / self.weight).view(1, 1)

    def seen(self, losses: Tensor, scores: Tensor, context: Tensor | None) -> Self:
        found = losses.detach().mean()
        mean, weight = (found * 0, found * 0) if self.mean is None or self.weight is None else (self.mean, self.weight)
        return replace(self, mean=DECAY * mean + (1 - DECAY) * found, weight=DECAY * weight + (1 - DECAY))

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.mean is None or self.weight is None else {"mean": self.mean, "weight": self.weight}


@dataclass(frozen=True)
class PerUnit:
    """E[(b−p)² L] / E[(b−p)²] of each unit, exponential means of past batches: where its gradient varies least."""

    top: Tensor | None = None  # (U,)
    bottom: Tensor | None = None

    def values(self, losses: Tensor, context: Tensor | None) -> Tensor:
        if self.top is None or self.bottom is None:
            return losses.new_zeros(1, 1)
        return (self.top / (self.bottom + _FLOOR)).unsqueeze(0)

    def seen(self, losses: Tensor, scores: Tensor, context: Tensor | None) -> Self:
        square = scores.detach().square()
        top, bottom = (square * losses.detach().unsqueeze(1)).mean(0), square.mean(0)
        if self.top is None or self.bottom is None:
            return replace(self, top=top, bottom=bottom)
        return replace(self, top=torch.lerp(top, self.top, DECAY), bottom=torch.lerp(bottom, self.bottom, DECAY))

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.top is None or self.bottom is None else {"top": self.top, "bottom": self.bottom}


@dataclass(frozen=True)
class ConditionalMean:
    """b(x): one linear layer from a context (N,F), fitted to the losses by normalized steps down the squared error."""

    weight: Tensor | None = None  # (F+1,), the last a bias

    def values(self, losses: Tensor, context: Tensor | None) -> Tensor:
        if self.weight is None:
            return losses.new_zeros(1, 1)
        return (_with_one(context) @ self.weight).unsqueeze(1)

    def seen(self, losses: Tensor, scores: Tensor, context: Tensor | None) -> Self:
        x, losses = _with_one(context), losses.detach()
        if self.weight is None:
            start = x.new_zeros(x.shape[1])
            start[-1] = losses.mean()
            return replace(self, weight=start)
        error = losses - x @ self.weight
        return replace(self, weight=self.weight + RATE * (x * (error / x.square().sum(1)).unsqueeze(1)).mean(0))

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.weight is None else {"weight": self.weight}


def _with_one(context: Tensor | None) -> Tensor:
    if context is None:
        raise ValueError("a conditional mean needs a context (N,F): what the loss can be guessed from before the bits are drawn")
    context = context.detach()
    return torch.cat([context, context.new_ones(len(context), 1)], 1)


_KINDS: dict[str, type[Nothing | RunningMean | PerUnit | ConditionalMean]] = {
    "none": Nothing,
    "mean": RunningMean,
    "unit": PerUnit,
    "conditional": ConditionalMean,
}


def baseline(kind: Kind) -> Baseline:
    """A baseline that has seen nothing."""
    return _KINDS[kind]()


def restored(kind: Kind, tensors: dict[str, Tensor]) -> Baseline:
    """A baseline of what `tensors()` gave."""
    return _KINDS[kind](**tensors)


# ---------------------------------------------------------------------------------------------- estimators


def reinforce(
    pre: Tensor,
    bits: Tensor,
    *,
    losses: Tensor,
    baseline: Baseline,
    context: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Baseline]:
    """pre, bits (N,U), losses (N,) -> a scalar whose gradient in `pre` is mean over N of (L − b)·(bit − σ(pre)), and the next baseline.

    Unbiased with every baseline. `counts` (N,U): 0 where a bit was not drawn (a pad, a gate without noise). `context` (N,F) for the
    conditional mean. Costs nothing beside the forward pass.
    """
    if losses.ndim != 1 or len(losses) != len(pre):
        raise ValueError(f"wanted one loss for each of {len(pre)} examples; found shape {tuple(losses.shape)}")
    losses = losses.detach()
    log_p = log_probability(pre, bits)
    scores = bits - torch.sigmoid(pre.detach())
    if counts is not None:
        log_p, scores = log_p * counts, scores * counts
    advantage = losses.unsqueeze(1) - baseline.values(losses, context)
    return (advantage * log_p).sum() / len(pre), baseline.seen(losses, scores, context)


def disarm(pre: Tensor, bits: Tensor, other: Tensor, *, losses: Tensor, other_losses: Tensor) -> Tensor:
    """pre and both draws of `antithetic` (N,U), the losses of each (N,) -> a scalar whose gradient in `pre` is DisARM's,
    ½(f(b) − f(b̃))·(−1)^b̃·1[b≠b̃]·σ(|pre|), averaged over N. Unbiased; costs a second forward pass of everything behind the bits.

    One layer of bits: bits that depend on earlier bits (another layer, another step) need a pair of passes each.
    """
    difference = (losses - other_losses).detach().unsqueeze(1) / 2
    sign = (bits - other).detach()  # (−1)^b̃ where they differ, 0 where they do not
    estimate = difference * sign * torch.sigmoid(pre.detach().abs())
    return (estimate * pre).sum() / len(pre)
