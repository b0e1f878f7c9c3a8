"""Gradient diagnostics: what an estimator says about a layer of random bits, against what is true.

The truth is d/d pre of E[L(b)], b ~ Bernoulli(σ(s·pre)): by enumeration up to 12 bits, beyond by very many samples of REINFORCE, each
against the mean of the others. Estimators that draw by the hard sigmoid are held against the truth under that probability.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, get_args
from xml.sax.saxutils import escape

import torch
from torch import Tensor

from rnn2bin.errors import UsageError
from rnn2bin.gates import score, synthetic
from rnn2bin.gates.estimators import Discretize, Sample, hard_sigmoid, logistic_noise

MOST_ENUMERATED = 12
REFERENCE = 400_000  # samples that stand for the truth where it cannot be enumerated
CHUNK = 20_000  # rows run at once
WARM_UP = 20  # batches a baseline sees before it is judged
FITS = 2000  # steps a subnet is fitted before it is judged
Kind = Literal["linear", "multilinear", "quadratic", "network"]
Probability = Callable[[Tensor, float], Tensor]


class LossOf(Protocol):
    """bits (M,U), which (M,) of the examples they belong to -> losses (M,)."""

    def __call__(self, bits: Tensor, which: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Problem:
    """N examples of U bits. `loss_of(bits (M,U), which (M,) of the examples)` -> losses (M,), differentiable in bits, soft ones too.

    `context` (N,F): what is known of an example before its bits are drawn, for a conditional baseline.
    """

    pre: Tensor  # (N,U)
    loss_of: LossOf
    context: Tensor | None = None
    slope: float = 1.0


@dataclass(frozen=True)
class Row:
    """One estimator. bias²: ‖mean − truth‖² without what chance adds to it (it may fall below 0 by chance); variance: the trace of one
    sample's covariance; cosine with the truth and the share of samples in its half-space, both of single samples; norm of the mean, and
    that of the truth. A sample is one draw for each of the N examples."""

    estimator: str
    bias2: float
    variance: float
    cosine: float
    half_space: float
    norm: float
    true_norm: float
    samples: int


@dataclass(frozen=True)
class Found:
    """A row with what it was made of: mean gradient (N,U), its standard error, the truth and the truth's standard error."""

    row: Row
    mean: Tensor
    error: Tensor
    truth: Tensor
    truth_error: Tensor

    @property
    def biased(self) -> bool:
        """Whether these samples tell its bias from none."""
        chance = self.error.square().sum() + self.truth_error.square().sum()
        return self.row.bias2 > 3 * float(chance) + 1e-20


# ---------------------------------------------------------------------------------------------- problems


def problem(bits: int, *, loss: Kind = "network", examples: int = 4, slope: float = 1.0, seed: int = 0) -> Problem:
    """A problem made by chance. linear: a weight for each bit. multilinear: and for each pair. quadratic: the squared distance of a sum
    from a target. network: two tanh layers and the squared error of what they say."""
    if bits < 1 or examples < 1:
        raise UsageError("a problem needs at least one bit and one example")
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)
    pre, own, pairs = normal(examples, bits), normal(examples, bits), normal(bits, bits).triu(1) / bits**0.5
    first, second, wanted = normal(8, bits) * 2 / bits**0.5, normal(1, 8), normal(examples)

    def network(bits: Tensor, which: Tensor) -> Tensor:
        return (torch.tanh((bits + own[which] / 2) @ first.t()) @ second.t()).squeeze(1)

    losses: dict[str, LossOf] = {
        "linear": lambda bits, which: (bits * own[which]).sum(1),
        "multilinear": lambda bits, which: (bits * own[which]).sum(1) + torch.einsum("mi,ij,mj->m", bits, pairs, bits),
        "quadratic": lambda bits, which: ((bits * own[which]).sum(1) - wanted[which]).square(),
        "network": lambda bits, which: (network(bits, which) - wanted[which]).square(),
    }
    return Problem(pre, losses[loss], own, slope)


def exact(given: Problem, *, probability: Probability | None = None) -> Tensor:
    """The gradient (N,U) of the expected loss, over all 2^U settings of the bits. `probability(pre, slope)`: σ(slope·pre) if not given."""
    examples, bits = given.pre.shape
    if bits > MOST_ENUMERATED:
        raise UsageError(f"{bits} bits have too many settings to enumerate; at most {MOST_ENUMERATED}")
    settings = torch.tensor(list(itertools.product((0.0, 1.0), repeat=bits)), dtype=given.pre.dtype)
    pre = given.pre.detach().clone().requires_grad_()
    p = _sigmoid(pre, given.slope) if probability is None else probability(pre, given.slope)
    for k in range(examples):
        chance = torch.where(settings > 0, p[k], 1 - p[k]).prod(1)
        with torch.no_grad():
            losses = given.loss_of(settings, torch.full((len(settings),), k))
        (chance * losses).sum().backward(retain_graph=True)
    assert pre.grad is not None
    return pre.grad


def sampled(given: Problem, *, samples: int = REFERENCE, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The same by REINFORCE with the mean of an example's other losses as its baseline, and its standard error, each (N,U)."""
    generator = torch.Generator().manual_seed(seed)
    examples, count = len(given.pre), max(2, min(CHUNK, samples))
    sums = torch.zeros(2, *given.pre.shape, dtype=given.pre.dtype)
    rounds = -(-samples // count)
    for _ in range(rounds):
        pre, which = _rows(given, count)
        bits = score.draw(given.slope * pre, generator=generator)
        losses = given.loss_of(bits, which).detach().view(count, examples, 1)
        advantage = (losses - losses.mean(0)) * (count / (count - 1))
        each = advantage * given.slope * (bits - torch.sigmoid(given.slope * pre)).view(count, *given.pre.shape)
        sums += torch.stack([each.sum(0), each.square().sum(0)])
    total = rounds * count
    mean = sums[0] / total
    return mean, ((sums[1] / total - mean.square()).clamp_min(0) / total).sqrt()


def _rows(given: Problem, count: int) -> tuple[Tensor, Tensor]:
    """`count` times all examples: pre (count·N,U), which (count·N,)."""
    return given.pre.detach().repeat(count, 1), torch.arange(len(given.pre)).repeat(count)


def _sigmoid(pre: Tensor, slope: float) -> Tensor:
    return torch.sigmoid(slope * pre)


# ---------------------------------------------------------------------------------------------- estimators


@dataclass(frozen=True)
class Estimator:
    """`gradients(problem, count, generator)` -> (count,N,U). `probability`: under which its bits are drawn."""

    gradients: Callable[[Problem, int, torch.Generator], Tensor]
    probability: Probability = _sigmoid


def elementwise(mode: Discretize) -> Estimator:
    """An estimator that sends the loss's gradient through the bit."""

    def gradients(given: Problem, count: int, generator: torch.Generator) -> Tensor:
        here = replace(mode, slope=given.slope, generator=generator)
        pre, which = _rows(given, count)
        pre.requires_grad_()
        noise = logistic_noise(pre.shape, here, pre) if here.draws else None
        bits = Sample.apply(pre, noise, here)
        return torch.autograd.grad(given.loss_of(bits, which).sum(), pre)[0].view(count, *given.pre.shape)

    hard = mode.estimator == "stochastic" and mode.backward != "sigmoid"
    return Estimator(gradients, hard_sigmoid_of if hard else _sigmoid)


def hard_sigmoid_of(pre: Tensor, slope: float) -> Tensor:
    """The probability of estimators that draw by the hard sigmoid."""
    return hard_sigmoid(pre, slope)


def scored(kind: score.Kind, *, reward_temperature: float | None = None) -> Estimator:
    """REINFORCE with a baseline that has seen `WARM_UP` batches; with a temperature the reward is exponential."""

    def gradients(given: Problem, count: int, generator: torch.Generator) -> Tensor:
        baseline, found = score.baseline(kind), given.pre
        for k in range(WARM_UP + 1):
            pre, which = _rows(given, count if k == WARM_UP else max(1, min(count, CHUNK // 20)))
            logits = (given.slope * pre).requires_grad_()
            bits = score.draw(logits, generator=generator)
            losses = given.loss_of(bits, which).detach()
            if reward_temperature is not None:
                losses = score.exponential(losses, temperature=reward_temperature)
            context = None if given.context is None else given.context[which]
            term, baseline = score.reinforce(logits, bits, losses=losses, baseline=baseline, context=context)
            if k == WARM_UP:
                found = torch.autograd.grad(term, logits)[0]
        return (found * given.slope * len(found)).view(count, *given.pre.shape)

    return Estimator(gradients)


def _disarm(given: Problem, count: int, generator: torch.Generator) -> Tensor:
    pre, which = _rows(given, count)
    logits = (given.slope * pre).requires_grad_()
    bits, other = score.antithetic(logits, generator=generator)
    term = score.disarm(logits, bits, other, losses=given.loss_of(bits, which), other_losses=given.loss_of(other, which))
    return (torch.autograd.grad(term, logits)[0] * given.slope * len(pre)).view(count, *given.pre.shape)


def _expected(given: Problem, count: int, generator: torch.Generator) -> Tensor:
    width = 0 if given.context is None else given.context.shape[1]
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        subnet = synthetic.subnet(given.pre.shape[1], context=width).to(given.pre.dtype)
    optimizer = torch.optim.Adam(subnet.parameters(), lr=3e-3)
    baseline = score.baseline("mean")
    for k in range(FITS + 1):
        pre, which = _rows(given, count if k == FITS else 32)
        logits = (given.slope * pre).requires_grad_()
        found = synthetic.expected_reinforce(
            logits,
            partial(given.loss_of, which=which),
            subnet=subnet,
            baseline=baseline,
            context=None if given.context is None else given.context[which],
            repeats=4,
            generator=generator,
        )
        baseline = found.baseline
        if k < FITS:
            optimizer.zero_grad()
            found.fit.backward()
            optimizer.step()
    return (torch.autograd.grad(found.surrogate, logits)[0] * given.slope * len(pre)).view(count, *given.pre.shape)


def estimators(*, temperature: float = 0.5) -> dict[str, Estimator]:
    """All of them by name; `temperature` is that of the Gumbel family."""
    back = get_args(Literal["identity", "sigmoid", "hard-sigmoid"])
    return {
        "sigmoid": elementwise(Discretize("sigmoid")),
        "sharpened-sigmoid": elementwise(Discretize("sigmoid", temperature=0.2)),
        "hard-sigmoid": elementwise(Discretize("hard-sigmoid")),
        **{f"straight-through-{by}": elementwise(Discretize("straight-through", backward=by)) for by in back},
        **{f"stochastic-{by}": elementwise(Discretize("stochastic", backward=by)) for by in back},
        "gumbel": elementwise(Discretize("gumbel", temperature=temperature)),
        "gumbel-softmax": elementwise(Discretize("gumbel-softmax", temperature=temperature)),
        "gumbel-hard": elementwise(Discretize("gumbel-hard", temperature=temperature)),
        "hard-concrete": elementwise(Discretize("hard-concrete", temperature=temperature)),
        "reinmax": elementwise(Discretize("reinmax")),
        "reinforce": scored("none"),
        "reinforce-mean": scored("mean"),
        "reinforce-unit": scored("unit"),
        "reinforce-conditional": scored("conditional"),
        "reinforce-exponential": scored("mean", reward_temperature=1.0),
        "disarm": Estimator(_disarm),
        "expected-reinforce": Estimator(_expected),
    }


# ---------------------------------------------------------------------------------------------- comparison


def compare(given: Problem, *, names: Sequence[str] = (), samples: int = 10_000, temperature: float = 0.5, seed: int = 0) -> list[Found]:
    """Every estimator (or those in `names`) against the truth. Raises UsageError for a name that is not there."""
    known = estimators(temperature=temperature)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(*(f"there is no estimator {name!r}; there are {', '.join(known)}" for name in unknown))
    if samples < 2:
        raise UsageError("--samples: a variance needs at least 2")
    enumerable = given.pre.shape[1] <= MOST_ENUMERATED
    chosen = {name: known[name] for name in names or known}
    if not enumerable:  # there is no reference for bits drawn by the hard sigmoid
        chosen = {name: one for name, one in chosen.items() if one.probability is _sigmoid}
    reference = sampled(given, seed=seed + 1) if not enumerable else None
    found = []
    for name, one in chosen.items():
        truth, truth_error = reference or ((g := exact(given, probability=one.probability)), torch.zeros_like(g))
        gradients = one.gradients(given, samples, torch.Generator().manual_seed(seed))
        found.append(_judged(name, gradients, truth, truth_error))
    return found


def _judged(name: str, gradients: Tensor, truth: Tensor, truth_error: Tensor) -> Found:
    mean, spread = gradients.mean(0), gradients.var(0)
    error = (spread / len(gradients)).sqrt()
    flat, goal = gradients.flatten(1), truth.flatten()
    product, lengths = flat @ goal, flat.norm(dim=1)
    row = Row(
        estimator=name,
        bias2=float((mean - truth).square().sum() - error.square().sum() - truth_error.square().sum()),
        variance=float(spread.sum()),
        cosine=float((product / (lengths * goal.norm()).clamp_min(1e-30)).mean()),
        half_space=float((product > 0).double().mean()),
        norm=float(mean.norm()),
        true_norm=float(goal.norm()),
        samples=len(gradients),
    )
    return Found(row, mean, error, truth, truth_error)


# ---------------------------------------------------------------------------------------------- what is shown


def as_dicts(found: Sequence[Found]) -> list[dict[str, Any]]:
    """The rows as plain data."""
    return [asdict(one.row) for one in found]


def render(found: Sequence[Found]) -> str:
    """The rows as a table for a terminal."""
    head = ("estimator", "bias²", "variance", "cosine", "half-space", "norm", "true norm")
    rows = [head]
    for one in found:
        r = one.row
        bias = f"{r.bias2:.3g}" if one.biased else "0"
        cells = (f"{r.variance:.3g}", f"{r.cosine:.3f}", f"{r.half_space:.3f}", f"{r.norm:.3g}", f"{r.true_norm:.3g}")
        rows.append((r.estimator, bias, *cells))
    widths = [max(len(row[k]) for row in rows) for k in range(len(head))]
    aligned = lambda row: [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
    lines = ["  ".join(aligned(row)) for row in rows]
    return "\n".join([*lines, "bias² 0: not told apart from none by these samples"])


def write_plot(found: Sequence[Found], path: Path) -> None:
    """Bias against spread as one SVG file, both in lengths of the true gradient; the nearer to the lower left corner the better."""
    path.write_text(_draw(found), encoding="utf-8")


WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 780, 470, 70, 30, 50, 210
_FLOOR = 1e-3  # what is less is drawn on the edge


def _draw(found: Sequence[Found]) -> str:
    points = []
    for one in found:
        scale = max(one.row.true_norm, 1e-30)
        points.append((one.row.estimator, one.row.bias2**0.5 / scale if one.biased else 0.0, one.row.variance**0.5 / scale))
    across, up = _decades([p[2] for p in points]), _decades([p[1] for p in points])
    x_of = lambda v: LEFT + (WIDTH - LEFT - RIGHT) * _share(v, across)
    y_of = lambda v: HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * _share(v, up)
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, DejaVu Sans, sans-serif">']
    lines += [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>']
    for power in range(across[0], across[1] + 1):
        x = x_of(10.0**power)
        lines.append(f'<path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#dfe3e8"/>')
        lines.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" {_SMALL} text-anchor="middle">{_tick(power)}</text>')
    for power in range(up[0], up[1] + 1):
        y = y_of(10.0**power)
        lines.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#dfe3e8"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" {_SMALL} text-anchor="end">{_tick(power)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    lines.append(f'<text x="{middle}" y="{HEIGHT - 12}" {_SMALL} text-anchor="middle">spread of one sample / true gradient</text>')
    lines.append(f'<text transform="translate(16 {HEIGHT / 2}) rotate(-90)" {_SMALL} text-anchor="middle">bias / true gradient</text>')
    taken: list[float] = []
    for name, bias, spread in sorted(points, key=lambda p: -p[1]):
        x, y = x_of(spread), y_of(bias)
        beside = _free(y, taken)
        taken.append(beside)
        lines.append(f'<path d="M{x:.1f} {y:.1f}L{WIDTH - RIGHT + 8} {beside:.1f}" stroke="#9aa7b8" stroke-width=".6"/>')
        lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#0072b2"/>')
        lines.append(f'<text x="{WIDTH - RIGHT + 12}" y="{beside + 4:.1f}" font-size="12" fill="#16191d">{escape(name)}</text>')
    return "\n".join([*lines, "</svg>", ""])


_SMALL = 'font-size="11" fill="#5a626d"'


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Whole powers of ten around the values, at least one decade."""
    logs = [float(torch.tensor(max(v, _FLOOR)).log10()) for v in values]
    low, high = int(torch.tensor(min(logs) + 1e-6).floor()), int(torch.tensor(max(logs)).ceil())
    return low, max(high, low + 1)


def _share(value: float, decades: tuple[int, int]) -> float:
    at = (float(torch.tensor(max(value, _FLOOR)).log10()) - decades[0]) / (decades[1] - decades[0])
    return min(max(at, 0.0), 1.0)


def _tick(power: int) -> str:
    return f"{10.0**power:g}" if 10.0**power > _FLOOR else f"≤ {_FLOOR:g}"


def _free(wanted: float, taken: Sequence[float], room: float = 15.0) -> float:
    """The place for a label nearest to `wanted` that leaves room to those taken."""
    places = sorted((HEIGHT - BOTTOM - k * room for k in range(int((HEIGHT - TOP - BOTTOM) / room) + 1)), key=lambda y: abs(y - wanted))
    return next((y for y in places if all(abs(y - other) >= room - 0.1 for other in taken)), wanted)
