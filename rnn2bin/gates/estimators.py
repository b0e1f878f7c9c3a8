"""Estimators: a gate's pre-activation -> a sample in [0, 1], and the surrogate derivative that training sends back.

Every estimator is the pair (`sample`, `derivative`), both elementwise and pure, so that the step-by-step oracle and the windowed
training kernels share one definition. Temperature, slope and noise are arguments.

Sources: Gumbel-sigmoid / binary concrete: Maddison et al. 2017 (arXiv 1611.00712), Jang et al. 2017 (1611.01144);
straight-through: Bengio et al. 2013 (1308.3432); hard sigmoid with an annealed slope: Chung et al. 2017, HM-RNN (1609.01704);
noise on a share of the gates: Li et al. 2018, G2-LSTM (1806.02988); hard concrete: Louizos et al. 2018 (1712.01312); ReinMax: Liu et al.
2023 (2304.08612).

What needs the loss behind the gate (REINFORCE, DisARM) is in `rnn2bin.gates.score`; here `reinforce` only draws. docs/estimators.md has
equation, bias and cost of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Name = Literal[
    "float",
    "binary",
    "gumbel",
    "gumbel-hard",
    "gumbel-softmax",
    "hard-concrete",
    "sigmoid",
    "hard-sigmoid",
    "straight-through",
    "stochastic",
    "reinmax",
    "reinforce",
]
Backward = Literal["sigmoid", "hard-sigmoid", "identity"]

NOISY: frozenset[str] = frozenset({"gumbel", "gumbel-hard", "gumbel-softmax", "hard-concrete", "stochastic", "reinmax", "reinforce"})
BITS: frozenset[str] = frozenset({"binary", "gumbel-hard", "straight-through", "stochastic", "reinmax", "reinforce"})
SCORE: frozenset[str] = frozenset({"reinforce"})  # the bit sends nothing back: its gradient is made of the losses behind it, in `score`
_UNIFORM_EDGE = 1e-6  # keeps log u and log(1 - u) finite in fp32
_LOW, _HIGH = -0.1, 1.1  # what the hard concrete stretches [0, 1] to before it is cut: its paper's γ and ζ


@dataclass(frozen=True)
class Discretize:
    """What happens to a binary gate in this call: the estimator and its values now. Gates left soft stay σ(pre).

    `float`: σ(pre), the teacher's gate. `binary`: 1[pre > 0], what ships.
    `temperature` τ > 0 and `slope` s > 0; `noise` is the share of gates that receive noise. `clip` > 0: pre is brought into [−clip, clip]
    first; only gates left soft are (no bit changes by it).
    """

    estimator: Name = "binary"
    temperature: float = 1.0
    slope: float = 1.0
    backward: Backward = "hard-sigmoid"
    noise: float = 1.0
    clip: float = 0.0
    generator: torch.Generator | None = None

    @property
    def draws(self) -> bool:
        return self.estimator in NOISY and self.noise > 0

    def soft(self) -> Discretize:
        """The same gate without noise and without bits: σ(s·pre/τ), stretched for the hard concrete, or the hard sigmoid where that is
        the estimator."""
        if self.estimator == "hard-concrete":
            return replace(self, noise=0.0)
        name: Name = "hard-sigmoid" if self.estimator == "hard-sigmoid" else "sigmoid"
        return replace(self, estimator=name)


FLOAT = Discretize("float")
BINARY = Discretize("binary")


def logistic_noise(shape: Sequence[int], mode: Discretize, like: Tensor) -> Tensor:
    """Logistic noise log u − log(1−u) of `shape`; zero on a share 1 − `mode.noise` of the entries.

    For `gumbel-softmax` it is the difference of two Gumbels −log(−log u), which has the same distribution.
    """
    if mode.estimator == "gumbel-softmax":
        return _two_gumbels(shape, mode, like)
    u = torch.rand(tuple(shape), generator=mode.generator, device=like.device, dtype=like.dtype)
    if mode.noise < 1:
        # One draw says both: below the share it is uniform again once divided by it; logit(½) is no noise.
        u = torch.where(u < mode.noise, u / mode.noise, 0.5)
    return torch.logit(u.clamp_(_UNIFORM_EDGE, 1 - _UNIFORM_EDGE))


def _two_gumbels(shape: Sequence[int], mode: Discretize, like: Tensor) -> Tensor:
    u = torch.rand((3, *shape), generator=mode.generator, device=like.device, dtype=like.dtype)
    one, other = u[:2].clamp_(_UNIFORM_EDGE, 1 - _UNIFORM_EDGE).log_().neg_().log_().neg_().unbind()
    return (one - other).mul_(u[2] < mode.noise)


def hard_sigmoid(x: Tensor, slope: float) -> Tensor:
    """clip((slope·x + 1)/2, 0, 1)."""
    return (slope * x).add_(1).mul_(0.5).clamp_(0, 1)


def sample(mode: Discretize, pre: Tensor, noise: Tensor | None = None) -> Tensor:
    """The gate's sample in [0, 1], of the shape of `pre`; `noise` is logistic, for the estimators that draw."""
    if mode.clip:
        pre = pre.clamp(-mode.clip, mode.clip)
    match mode.estimator:
        case "float":
            return torch.sigmoid(pre)
        case "binary" | "straight-through":
            return _bits(pre)
        case "sigmoid":
            return (pre * (mode.slope / mode.temperature)).sigmoid_()
        case "hard-sigmoid":
            return hard_sigmoid(pre, mode.slope / mode.temperature)
        case "gumbel" | "gumbel-softmax":
            # The first entry of the softmax over two classes with logits (s·pre + G₁, G₂)/τ is σ of their difference.
            return _noisy(mode, pre, noise).div_(mode.temperature).sigmoid_()
        case "hard-concrete":
            return _noisy(mode, pre, noise).div_(mode.temperature).sigmoid_().mul_(_HIGH - _LOW).add_(_LOW).clamp_(0, 1)
        case "gumbel-hard" | "reinmax" | "reinforce":
            return _bits(_noisy(mode, pre, noise))
        case "stochastic":
            return _bernoulli(mode, pre, noise)


def _noisy(mode: Discretize, pre: Tensor, noise: Tensor | None) -> Tensor:
    """s·pre + L."""
    return pre * mode.slope if noise is None else torch.add(noise, pre, alpha=mode.slope)


def _bits(pre: Tensor) -> Tensor:
    """1[pre > 0] in the dtype of `pre`; several times faster than comparing and converting."""
    return pre.sign().clamp_(min=0)


def _bernoulli(mode: Discretize, pre: Tensor, noise: Tensor | None) -> Tensor:
    """1 with probability hs(s·pre), or σ(s·pre): the same uniform draw, recovered from the logistic noise."""
    if noise is None:
        return (pre > 0).to(pre.dtype)
    probability = torch.sigmoid(mode.slope * pre) if mode.backward == "sigmoid" else hard_sigmoid(pre, mode.slope)
    return (probability > torch.sigmoid(-noise)).to(pre.dtype)


def derivative(mode: Discretize, pre: Tensor, value: Tensor, noise: Tensor | None = None) -> Tensor:
    """d sample / d pre as training sees it; `value` is what `sample` returned for the same arguments. 0 for those in `SCORE`."""
    if mode.clip:
        inside = pre.abs() < mode.clip
        return derivative(replace(mode, clip=0.0), pre, value, noise).mul_(inside)
    match mode.estimator:
        case "float":
            return value * (1 - value)
        case "sigmoid" | "gumbel" | "gumbel-softmax":
            return (value * (1 - value)).mul_(mode.slope / mode.temperature)
        case "gumbel-hard":
            soft = sample(replace(mode, estimator="gumbel"), pre, noise)
            return (soft * (1 - soft)).mul_(mode.slope / mode.temperature)
        case "hard-concrete":
            # Between its ends the sample tells σ, v = γ + (ζ − γ)σ: its slope (ζ − γ)σ(1 − σ) is (v − γ)(ζ − v)/(ζ − γ). At them it is 0.
            slope = (value - _LOW).mul_(_HIGH - value).mul_(mode.slope / mode.temperature / (_HIGH - _LOW))
            return slope.mul_((value > 0) & (value < 1))
        case "hard-sigmoid":
            return _window(pre, mode.slope / mode.temperature)
        case "reinmax":
            return _reinmax(mode, pre, value)
        case "reinforce":
            return torch.zeros_like(pre)
        case "binary" | "straight-through" | "stochastic":
            return _surrogate(mode, pre)


def _reinmax(mode: Discretize, pre: Tensor, bit: Tensor) -> Tensor:
    """2·m(1−m) − ½·p(1−p) with p = σ(s·pre) and m = (bit + σ(s·pre/τ))/2: at τ = 1 the trapezoid rule, exact for losses that are at
    most quadratic in each bit (Heun's method; Liu et al. 2023, algorithm 2, for two classes)."""
    p = torch.sigmoid(mode.slope * pre)
    middle = torch.sigmoid(pre * (mode.slope / mode.temperature)).add_(bit).div_(2)
    return (2 * middle * (1 - middle)).sub_(0.5 * p * (1 - p)).mul_(mode.slope)


def _surrogate(mode: Discretize, pre: Tensor) -> Tensor:
    if mode.backward == "identity":
        return torch.ones_like(pre)
    if mode.backward == "sigmoid":
        soft = torch.sigmoid(mode.slope * pre)
        return (soft * (1 - soft)).mul_(mode.slope)
    return _window(pre, mode.slope)


def _window(pre: Tensor, slope: float) -> Tensor:
    """The hard sigmoid's gradient: slope/2 where |pre| < 1/slope, else 0."""
    return (pre.abs() < 1 / slope).to(pre.dtype).mul_(slope / 2)


class Sample(torch.autograd.Function):
    """`sample` with `derivative` as its gradient, for the step-by-step oracle."""

    @staticmethod
    def forward(ctx, pre: Tensor, noise: Tensor | None, mode: Discretize) -> Tensor:  # type: ignore[override]
        value = sample(mode, pre, noise)
        ctx.save_for_backward(pre, value, *([] if noise is None else [noise]))
        ctx.mode = mode
        return value

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        pre, value, *noise = ctx.saved_tensors
        return grad * derivative(ctx.mode, pre, value, noise[0] if noise else None), None, None
