"""Estimators and schedules: what a gate becomes, what training sends back, and the traps of public code."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tolerances import assert_close

from rnn2bin import evaluation, student, tasks
from rnn2bin.cells import weights
from rnn2bin.cells.network import Network
from rnn2bin.data import Part
from rnn2bin.distill import anneal, trainer
from rnn2bin.gates import schedules
from rnn2bin.gates.estimators import (
    BINARY,
    BITS,
    FLOAT,
    NOISY,
    SCORE,
    Discretize,
    Name,
    Sample,
    derivative,
    hard_sigmoid,
    logistic_noise,
    sample,
)
from rnn2bin.measure import Candidate, compare
from rnn2bin.recipe import SOFT_ESTIMATORS, Estimator, Recipe, Schedule, parse
from rnn2bin.runtime.torch_backend import Model
from rnn2bin.spec import EmbeddingSpec, LayerSpec, LinearSpec, RnnSpec, SectionSpec

ALL = get_args(Name)
MANY = 200_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(mode: Discretize, pre: float, *, count: int = MANY, seed: int = 0) -> torch.Tensor:
    x = torch.full((count,), pre)
    mode = replace(mode, generator=seeded(seed))
    return sample(mode, x, logistic_noise(x.shape, mode, x))


# ---------------------------------------------------------------------------------------------- estimators


@pytest.mark.parametrize("estimator", ["gumbel", "gumbel-softmax"])
@pytest.mark.parametrize(("pre", "temperature"), [(0.0, 1.0), (1.5, 0.4), (-0.7, 2.0)])
def test_gumbel_sigmoid_is_a_softmax_over_two_gumbels(pre, temperature, estimator):
    ours = draw(Discretize(estimator, temperature=temperature), pre, count=20_000)
    g = -torch.log(-torch.log(torch.rand(20_000, 2, generator=seeded(1)).clamp(1e-6, 1 - 1e-6)))
    theirs = torch.softmax((torch.tensor([pre, 0.0]) + g) / temperature, -1)[:, 0]
    assert stats.ks_2samp(ours.numpy(), theirs.numpy()).pvalue > 0.01
    shifted = draw(Discretize(estimator, temperature=temperature), pre + 0.2, count=20_000)
    assert stats.ks_2samp(shifted.numpy(), theirs.numpy()).pvalue < 1e-6  # the test can fail


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("pre", [-2.0, 0.0, 0.5])
def test_soft_samples_are_near_bits_as_the_temperature_falls(pre, temperature):
    """|P(D = 1) − P(G ≥ 1−ε)| ≤ (τ/4) log(1/ε), on the same draws."""
    hard = draw(Discretize("gumbel-hard", temperature=temperature), pre).mean()
    soft = draw(Discretize("gumbel", temperature=temperature), pre)
    assert abs(float(hard) - 1 / (1 + math.exp(-pre))) < 0.005
    for epsilon in (0.3, 0.1, 0.01):
        gap = abs(float(hard - (soft >= 1 - epsilon).float().mean()))
        assert gap <= temperature / 4 * math.log(1 / epsilon) + 0.005


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("pre", [-2.0, 0.0, 0.5])
def test_the_hard_concrete_is_exactly_a_bit_with_the_chances_of_its_paper(pre, temperature):
    """P(0) = σ(τ log(−γ/ζ) − pre) for γ = −0.1, ζ = 1.1, P(1) the same for −pre; P(bit) and P(1) differ by at most (τ/4) log 11."""
    mode = Discretize("hard-concrete", temperature=temperature)
    drawn = draw(mode, pre)
    for end, sign in ((0.0, -1), (1.0, 1)):
        wanted = 1 / (1 + math.exp(temperature * math.log(11) - sign * pre))
        assert abs(float((drawn == end).float().mean()) - wanted) < 0.005
    hard = draw(Discretize("gumbel-hard"), pre)
    assert abs(float(hard.mean() - (drawn == 1).float().mean())) <= temperature / 4 * math.log(11) + 0.005
    u = torch.rand(MANY, generator=seeded(5), dtype=torch.float64)
    theirs = (1.2 * torch.sigmoid((torch.log(u) - torch.log(1 - u) + pre) / temperature) - 0.1).clamp(0, 1)
    assert float(drawn.mean()) == pytest.approx(float(theirs.mean()), abs=0.005)


@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("backward", ["sigmoid", "hard-sigmoid", "identity"])
def test_everything_stays_finite_and_in_range_at_extremes(estimator, backward, monkeypatch):
    pre = torch.tensor([-1e30, -1e4, -1e-30, 0.0, 1e-30, 1e4, 1e30])
    for u in (0.0, 0.5, 1.0):
        monkeypatch.setattr(torch, "rand", lambda shape, u=u, **k: torch.full(shape, u))
        mode = Discretize(estimator, temperature=0.01, slope=50.0, backward=backward)
        noise = logistic_noise(pre.shape, mode, pre)
        value = sample(mode, pre, noise)
        assert torch.isfinite(noise).all()
        assert ((value >= 0) & (value <= 1)).all()
        assert torch.isfinite(derivative(mode, pre, value, noise)).all()


def test_the_threshold_is_a_probability_of_one_half():
    """`soft > 0.5 - soft` cuts at 0.25: logits between −1.1 and 0 would count as ones."""
    pre = torch.tensor([-5.0, -1.0, -0.5, -1e-6, 0.0, 1e-6, 0.5, 5.0])
    wanted = [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    for estimator in BITS:
        assert sample(Discretize(estimator, slope=3.0, temperature=0.1), pre).tolist() == wanted, estimator


def test_the_recipe_knows_which_estimators_are_soft():
    assert set(get_args(Estimator)) - BITS == SOFT_ESTIMATORS


@pytest.mark.parametrize("estimator", sorted(BITS))
def test_bits_are_exactly_zero_or_one(estimator):
    pre = torch.randn(1000, generator=seeded())
    value = sample(Discretize(estimator), pre, torch.randn(1000, generator=seeded(1)))
    assert set(value.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("slope", [0.5, 1.0, 4.0])
def test_straight_through_derivatives(slope):
    edge = 1 / slope
    pre = torch.tensor([-2 * edge, -1.001 * edge, -0.999 * edge, 0.0, 0.999 * edge, 1.001 * edge])
    of = lambda backward: derivative(Discretize("straight-through", slope=slope, backward=backward), pre, (pre > 0).float())
    assert of("hard-sigmoid").tolist() == [0, 0, slope / 2, slope / 2, slope / 2, 0]
    assert of("identity").tolist() == [1] * 6
    s = 1 / (1 + torch.exp(-slope * pre))
    assert_close(of("sigmoid"), slope * s * (1 - s))


@pytest.mark.parametrize("estimator", ["float", "sigmoid", "gumbel", "hard-concrete", "hard-sigmoid"])
def test_derivatives_of_smooth_estimators_are_those_of_their_samples(estimator):
    mode = Discretize(estimator, temperature=0.6, slope=1.7)
    pre, noise = torch.randn(500, generator=seeded(), dtype=torch.float64), torch.randn(500, generator=seeded(1), dtype=torch.float64)
    if estimator == "hard-sigmoid":
        pre = pre[(pre.abs() - 0.6 / 1.7).abs() > 1e-3]
        noise = noise[: len(pre)]
    if estimator == "hard-concrete":  # cut where (s·pre + L)/τ is beyond ±log 11
        smooth = (((1.7 * pre + noise) / 0.6).abs() - math.log(11)).abs() > 1e-3
        pre, noise = pre[smooth], noise[smooth]
        assert 0 < int((sample(mode, pre, noise) % 1 == 0).sum()) < len(pre)
    step = 1e-6
    slopes = (sample(mode, pre + step, noise) - sample(mode, pre - step, noise)) / (2 * step)
    assert (slopes - derivative(mode, pre, sample(mode, pre, noise), noise)).abs().max() < 1e-7


def test_the_gradient_of_a_bit_reaches_its_pre_activation():
    """An estimator that sends nothing back is a frozen layer; those that need the loss for it are in test_score.py."""
    for estimator in set(ALL) - SCORE:
        pre = torch.tensor([0.2, -0.3], requires_grad=True)
        Sample.apply(pre, torch.tensor([0.1, 0.1]), Discretize(estimator)).sum().backward()
        assert pre.grad is not None, estimator
        assert (pre.grad > 0).all(), estimator


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_noise_share(share):
    x = torch.zeros(MANY)
    noise = logistic_noise(x.shape, Discretize("gumbel", noise=share, generator=seeded()), x)
    assert abs(float((noise != 0).float().mean()) - share) < 0.005
    assert Discretize("gumbel", noise=share).draws == (share > 0)


@pytest.mark.parametrize(("pre", "slope"), [(-0.8, 1.0), (0.3, 1.0), (0.3, 2.5), (0.6, 2.0)])
@pytest.mark.parametrize("backward", ["hard-sigmoid", "sigmoid"])
def test_stochastic_rate(pre, slope, backward):
    wanted = min(max((slope * pre + 1) / 2, 0), 1) if backward == "hard-sigmoid" else 1 / (1 + math.exp(-slope * pre))
    rate = float(draw(Discretize("stochastic", slope=slope, backward=backward), pre).mean())
    assert abs(rate - wanted) < 0.005
    assert float(hard_sigmoid(torch.tensor(pre), slope)) == pytest.approx(min(max((slope * pre + 1) / 2, 0), 1))


@pytest.mark.parametrize("estimator", sorted(NOISY))
def test_noise_is_drawn_anew_each_call_and_reproducible(estimator):
    cell = weights.Cell(LayerSpec("gru", 3, 50), (True, True))
    pre = torch.zeros(4, 2, 50)
    mode = Discretize(estimator, generator=seeded(3))
    gate = cell.gate(mode)
    first, second = gate(pre), gate(pre)
    assert not torch.equal(first, second)
    again = cell.gate(replace(mode, generator=seeded(3)))
    assert torch.equal(again(pre), first)
    assert torch.equal(again(pre), second)


@pytest.mark.parametrize(
    "estimator", ["gumbel", "gumbel-hard", "hard-concrete", "sigmoid", "straight-through", "stochastic", "hard-sigmoid"]
)
def test_the_soft_gate_keeps_temperature_and_slope(estimator):
    """Known trap: a test-time sigmoid without the temperature it was trained with."""
    mode = Discretize(estimator, temperature=0.25, slope=1.5).soft()
    assert not mode.draws
    x = 0.1 * 1.5 / 0.25
    soft = 1 / (1 + math.exp(-x))
    wanted = {"hard-sigmoid": (x + 1) / 2, "hard-concrete": 1.2 * soft - 0.1}.get(estimator, soft)
    assert float(sample(mode, torch.tensor(0.1))) == pytest.approx(wanted, rel=1e-5)


# ---------------------------------------------------------------------------------------------- schedules

KINDS = ["constant", "linear", "exponential", "cosine", "step"]
schedule = st.builds(
    Schedule,
    schedule=st.sampled_from(KINDS),
    start=st.floats(1e-3, 1e3),
    end=st.floats(1e-3, 1e3),
    until=st.floats(0.01, 1.0),
    steps=st.integers(1, 12),
)


@settings(deadline=None)
@given(schedule)
def test_endpoints(s):
    end = s.start if s.schedule == "constant" else s.end
    for progress in (-1.0, 0.0):
        assert schedules.value(s, progress) == pytest.approx(s.start)
    for progress in (s.until, (s.until + 1) / 2, 1.0, 2.0):
        assert schedules.value(s, progress) == pytest.approx(end)


@settings(deadline=None)
@given(schedule, st.floats(0, 1), st.floats(0, 1))
def test_between_its_ends_and_monotone(s, a, b):
    early, late = (schedules.value(s, p) for p in sorted((a, b)))
    low, high = sorted((s.start, s.end))
    assert low * (1 - 1e-9) <= early <= high * (1 + 1e-9)
    assert (late - early) * (s.end - s.start) >= -1e-9 * high * abs(s.end - s.start)


@pytest.mark.parametrize(("kind", "wanted"), [("linear", 2.5), ("exponential", 2.0), ("cosine", 2.5), ("step", 2.5), ("constant", 1.0)])
def test_half_way(kind, wanted):
    assert schedules.value(Schedule(schedule=kind, start=1, end=4, until=0.5, steps=2), 0.25) == pytest.approx(wanted)


def test_step_holds_its_values():
    s = Schedule(schedule="step", start=1, end=3, steps=2)
    assert [schedules.value(s, p) for p in (0, 0.3, 0.34, 0.6, 0.67, 1)] == [1, 1, 2, 2, 3, 3]


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0, 1))
def test_advance(progress, step):
    assert schedules.advance(progress, step, closed_loop=True, keeps_up=False) == progress
    for closed_loop, keeps_up in ((True, True), (False, False), (False, True)):
        assert schedules.advance(progress, step, closed_loop=closed_loop, keeps_up=keeps_up) == min(progress + step, 1.0)


@settings(deadline=None)
@given(st.floats(0, 0.5), st.floats(0, 1), st.floats(0, 1))
def test_learning_rate_factor(warmup, final, done):
    of = lambda d: schedules.learning_rate_factor(d, warmup=warmup, final=final)
    assert min(final, 1e-3) <= of(done) <= 1
    assert of(1.0) == pytest.approx(final)
    assert of(warmup) == pytest.approx(1.0)


# ---------------------------------------------------------------------------------------------- traps

WORDS = 5


def problem(*, window: int = 4) -> tuple[Network, Part]:
    """A token LSTM with random weights, and a stream it may be trained on."""
    section = SectionSpec((LayerSpec("lstm", 3, 6),), EmbeddingSpec(WORDS, 3), (LinearSpec(6, WORDS),))
    teacher = Network(RnnSpec({"main": section}))
    with torch.no_grad():
        for p in teacher.parameters():
            p.copy_(torch.randn(p.shape, generator=seeded(p.numel())) * 0.7)
    teacher.eval().requires_grad_(False)
    return teacher, Part(torch.randint(WORDS, (4, 60), generator=seeded(2)), stream=True)


def recipe_of(**gates) -> Recipe:
    train = {"steps": 6, "max_steps": 8, "batch_size": 2, "window": 4, "evaluate_every": 3, "tolerance": 0}
    return parse({"task": "next-token", "gates": gates, "train": train})


TEMPERATURE, SLOPE = Schedule(start=1, end=0.1), Schedule(schedule="linear", start=1, end=3, until=0.5)


def training_modes(estimator: str, tmp_path: Path) -> list[Discretize]:
    """The mode of every training step's forward pass."""
    teacher, part = problem()
    gates = {"estimator": estimator, "temperature": TEMPERATURE.model_dump(), "slope": SLOPE.model_dump(), "straight_through_from": 0.5}
    recipe = recipe_of(**gates)
    trained = student.student(teacher, recipe.gates)
    seen: list[Discretize] = []
    plain = trained.forward

    def spy(*args, mode, **kwargs):
        if torch.is_grad_enabled():
            seen.append(mode)
        return plain(*args, mode=mode, **kwargs)

    trained.forward = spy
    task = tasks.resolve(recipe, teacher.spec, part)
    trainer.train(trained, teacher, task=task, recipe=recipe, train=part, valid=part, out=tmp_path)
    return seen


def follow_the_schedules(seen: list[Discretize]) -> bool:
    at = [min(k / 6, 1.0) for k in range(8)]
    wanted = [(schedules.value(TEMPERATURE, p), schedules.value(SLOPE, p)) for p in at]
    return [(m.temperature, m.slope) for m in seen] == [pytest.approx(w) for w in wanted]


@pytest.mark.parametrize("estimator", ["gumbel", "hard-concrete", "straight-through", "hard-sigmoid", "reinmax", "reinforce"])
def test_training_sees_the_temperature_and_slope_of_each_step(estimator, tmp_path: Path):
    """Known trap: an annealed slope that reached evaluation only."""
    seen = training_modes(estimator, tmp_path)
    assert follow_the_schedules(seen)
    assert [m.estimator for m in seen] == [estimator] * 3 + ["straight-through"] * 5


def test_trap_an_annealed_slope_that_reaches_evaluation_only(monkeypatch, tmp_path: Path):
    """The trap put back: training keeps the first values, evaluation sees the annealed ones; the check above tells."""
    honest = anneal.AnnealTrainer.training_mode
    frozen = lambda self: replace(honest(self), slope=SLOPE.start, temperature=TEMPERATURE.start)
    monkeypatch.setattr(anneal.AnnealTrainer, "training_mode", frozen)
    assert not follow_the_schedules(training_modes("gumbel", tmp_path))


def test_gates_at_one_half_give_different_soft_and_hard_numbers():
    """Known trap: soft gates reported as binary."""
    teacher, part = problem()
    network = student.student(teacher, recipe_of().gates)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if ".gates." in name:
                p.mul_(1e-3)
    task = tasks.resolve(recipe_of(), teacher.spec, part)
    soft_mode = Discretize("sigmoid")
    found = compare(task, part, Candidate(teacher, FLOAT), {"hard": Candidate(network, BINARY), "soft": Candidate(network, soft_mode)})
    assert abs(found["hard"].value - found["soft"].value) > 1e-3
    assert abs(found["hard"].loss - found["soft"].loss) > 1e-3


def report_and_gates(levels: str, monkeypatch) -> tuple[dict, list[tuple[torch.Tensor, ...]], Network, Part]:
    """A report, and every gate value with its levels that making it took."""
    teacher, part = problem()
    gates = recipe_of(levels=levels).gates
    network = student.student(teacher, gates)
    with torch.no_grad():
        for cell in network.cells().values():
            cell.levels.lo.fill_(0.25)
            cell.levels.hi.fill_(0.75)
    seen: list[tuple[torch.Tensor, ...]] = []

    def spy(bits, lo, hi):
        value = torch.lerp(lo, hi, bits)
        seen.append((value, lo, hi))
        return value

    with monkeypatch.context() as patch:
        patch.setattr(weights, "select", spy)
        task = tasks.resolve(recipe_of(), teacher.spec, part)
        report = evaluation.evaluate_parts(
            teacher=teacher,
            model=Model(network, {}),
            task=task,
            part=part,
            soft_mode=Discretize("sigmoid"),
            gates=gates,
            with_controls=False,
        )
    return report, seen, network, part


def are_bits(seen: list[tuple[torch.Tensor, ...]]) -> bool:
    return all(bool(((value == lo) | (value == hi)).all()) for value, lo, hi in seen)


@pytest.mark.parametrize("levels", ["strict", "learned"])
def test_a_number_called_binary_comes_from_bits(levels, monkeypatch):
    report, seen, network, part = report_and_gates(levels, monkeypatch)
    teacher, _ = problem()
    # every step of the oracle's walk, of the binary network alone: to be measured, and once more on the sequences that lost most
    assert len(seen) == 2 * (part.inputs.shape[1] - 1)
    assert report["worst"]
    assert are_bits(seen)
    assert any((value == lo).any() and (value == hi).any() for value, lo, hi in seen)
    task = tasks.resolve(recipe_of(), teacher.spec, part)
    mode_of = lambda mode: compare(task, part, Candidate(teacher, FLOAT), {"x": Candidate(network, mode)})["x"].value
    assert report["binary"]["metric"] == mode_of(BINARY)
    assert report["soft_student"]["metric"] == pytest.approx(mode_of(Discretize("sigmoid")), rel=1e-5)


def test_trap_soft_gates_reported_as_binary(monkeypatch):
    """The trap put back: the report's binary network runs with soft gates; the check above tells."""
    honest, _, _, _ = report_and_gates("strict", monkeypatch)
    monkeypatch.setattr(evaluation, "BINARY", Discretize("sigmoid"))
    report, seen, _, _ = report_and_gates("strict", monkeypatch)
    assert not are_bits(seen)
    assert report["binary"]["metric"] != honest["binary"]["metric"]
