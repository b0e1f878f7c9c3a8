"""Score-function estimators, synthetic gradients, diagnostics: every gate gradient against the exact one, and the traps of public code.

A trap's test runs the honest code and the trap, and fails where they are not told apart.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from scipy import integrate
from torch import Tensor, nn

from rnn2bin import diagnostics
from rnn2bin.cli import main
from rnn2bin.diagnostics import compare, exact, problem
from rnn2bin.errors import UsageError
from rnn2bin.gates import estimators, score, synthetic
from rnn2bin.gates.estimators import Discretize, Sample, logistic_noise

BITS = 6
UNBIASED = ("reinforce", "reinforce-mean", "reinforce-unit", "reinforce-conditional", "disarm")
NAMES = tuple(diagnostics.estimators())
SAMPLES = 20_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pooled(given: diagnostics.Problem, name: str, *, seeds: int = 4) -> diagnostics.Found:
    """One estimator over several seeds: estimators share the draws of a seed, and an unlucky one fails all."""
    found = [compare(given, names=[name], samples=SAMPLES, seed=seed)[0] for seed in range(seeds)]
    mean = torch.stack([one.mean for one in found]).mean(0)
    error = torch.stack([one.error.square() for one in found]).sum(0).sqrt() / seeds
    return replace(found[0], mean=mean, error=error)


def misses(found: diagnostics.Found) -> float:
    """The largest distance from the truth in standard errors."""
    return float(((found.mean - found.truth).abs() / (found.error + 1e-12)).max())


def told(found: diagnostics.Found, *, errors: float = 3.0) -> bool:
    """Whether the whole gradient is farther from the truth than chance takes it: the squared distance in its own standard errors.

    Of 24 components the largest is beyond 3 standard errors in one of 16 honest runs; their mean square is not."""
    z = ((found.mean - found.truth) / (found.error + 1e-12)).flatten()
    return float(z.square().mean()) > 1 + errors * math.sqrt(2 / len(z))


# ---------------------------------------------------------------------------------------------- every estimator


@pytest.mark.parametrize("name", NAMES)
def test_every_gate_gradient_is_finite_and_not_zero(name):
    found = compare(problem(4, examples=2), names=[name], samples=200)[0]
    assert torch.isfinite(found.mean).all()
    hard = name.endswith("hard-sigmoid") or name == "stochastic-identity"  # zero where |pre| > 1: by its definition
    inside = problem(4, examples=2).pre.abs() < 1 if hard else torch.ones(2, 4, dtype=torch.bool)
    assert (found.mean[inside] != 0).all()
    assert found.row.norm > 1e-3 * found.row.true_norm


@pytest.mark.parametrize("loss", ["linear", "multilinear", "quadratic", "network"])
@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased_means_within_three_standard_errors(name, loss):
    found = pooled(problem(BITS, loss=loss), name)
    assert not told(found)
    assert misses(found) < 4  # of 24 components


@pytest.mark.parametrize("name", UNBIASED)
@pytest.mark.parametrize("slope", [0.5, 2.5])
def test_the_slope_is_part_of_the_probability(name, slope):
    found = pooled(problem(BITS, slope=slope), name)
    assert not told(found)
    assert told(replace(found, truth=found.truth * 1.3))  # the test can fail


def factor(name: str, pre: float, *, temperature: float = 0.5) -> float:
    """What an estimator's mean is of the truth on a loss whose slope in a bit knows nothing of that bit (docs/estimators.md)."""
    p = 1 / (1 + math.exp(-pre))
    density = p * (1 - p)
    if name == "stochastic-identity":
        return 2.0 if abs(pre) < 1 else math.inf  # the truth's own slope is ½
    if name.startswith("gumbel") or name == "hard-concrete":

        def at(noise: float) -> float:
            soft = 1 / (1 + math.exp(-(pre + noise) / temperature))
            weight = math.exp(-noise) / (1 + math.exp(-noise)) ** 2
            return weight * soft * (1 - soft) / temperature

        if name == "hard-concrete":  # 1.2σ − 0.1, where that is between 0 and 1
            edge = temperature * math.log(11)
            return 1.2 * integrate.quad(at, -pre - edge, -pre + edge)[0] / density
        return integrate.quad(at, -40, 40, limit=200)[0] / density
    return 1.0


@pytest.mark.parametrize("name", ["stochastic-sigmoid", "stochastic-hard-sigmoid", "reinmax", "gumbel-hard", "stochastic-identity"])
def test_the_documented_bias_on_a_loss_that_is_linear_in_each_bit(name):
    given = problem(BITS, loss="multilinear")
    found = compare(given, names=[name], samples=SAMPLES, seed=2)[0]
    factors = torch.tensor([[factor(name, float(a)) for a in row] for row in given.pre], dtype=torch.float64)
    inside = torch.isfinite(factors)
    wanted = torch.where(inside, factors * found.truth, found.mean)
    assert not told(replace(found, truth=wanted))
    assert told(replace(found, truth=wanted * 1.1))


@pytest.mark.parametrize("name", ["gumbel", "gumbel-softmax", "hard-concrete"])
def test_a_soft_sample_is_unbiased_for_its_own_relaxed_loss(name):
    """d/d pre of E[L(G)]: on a linear loss Σ w·E[G], by quadrature."""
    given = problem(BITS, loss="linear")
    found = compare(given, names=[name], samples=SAMPLES, seed=2)[0]
    factors = torch.tensor([[factor(name, float(a)) for a in row] for row in given.pre], dtype=torch.float64)
    assert not told(replace(found, truth=factors * found.truth))
    assert told(replace(found, truth=1.1 * factors * found.truth))
    assert found.biased


def test_the_two_gumbels_agree_in_their_gradients():
    one, other = compare(problem(BITS), names=["gumbel", "gumbel-softmax"], samples=SAMPLES)
    chance = (one.error.square() + other.error.square()).sqrt()
    assert float(((one.mean - other.mean) / chance).square().mean()) < 1 + 3 * math.sqrt(2 / one.mean.numel())
    assert one.row.variance == pytest.approx(other.row.variance, rel=0.1)


def test_the_mean_gate_is_exact_on_a_loss_that_is_linear_in_each_bit():
    found = compare(problem(BITS, loss="multilinear"), names=["sigmoid", "sharpened-sigmoid"], samples=2)
    assert torch.allclose(found[0].mean, found[0].truth)
    assert found[1].biased


@pytest.mark.parametrize("loss", ["linear", "multilinear"])
def test_the_deterministic_straight_through_is_exact_only_where_bits_do_not_interact(loss):
    found = compare(problem(BITS, loss=loss), names=["straight-through-sigmoid"], samples=2)[0]
    assert torch.allclose(found.mean, found.truth) == (loss == "linear")


def test_reinmax_is_exact_for_a_quadratic_loss_and_straight_through_is_not():
    plain, second = compare(problem(BITS, loss="quadratic"), names=["stochastic-sigmoid", "reinmax"], samples=SAMPLES)
    assert not told(second)
    assert told(plain, errors=30)


def test_reinmax_at_a_temperature_is_that_of_the_paper():
    """2·softmax'(m) − ½·softmax'(θ) with m = (one-hot + softmax(θ/τ))/2, by autograd over two classes."""
    for pre, bit, temperature in ((0.7, 1.0, 1.0), (-0.4, 1.0, 1.7), (1.3, 0.0, 1.3)):
        theta = torch.tensor([pre, 0.0], dtype=torch.float64, requires_grad=True)
        first = torch.softmax(theta, 0)
        chosen = torch.tensor([bit, 1 - bit], dtype=torch.float64)
        middle = (chosen + torch.softmax(theta / temperature, 0)).detach() / 2
        again = torch.softmax((middle.log() - theta).detach() + theta, 0)
        (2 * again - first / 2)[0].backward()
        mode = Discretize("reinmax", temperature=temperature)
        x = torch.tensor([pre], dtype=torch.float64)
        assert theta.grad is not None
        assert float(estimators.derivative(mode, x, torch.tensor([bit], dtype=torch.float64))) == pytest.approx(float(theta.grad[0]))


def test_the_exponential_reward_is_unbiased_for_its_own_loss():
    given = problem(BITS)
    found = compare(given, names=["reinforce-exponential"], samples=SAMPLES)[0]
    own = replace(given, loss_of=lambda bits, which: -torch.exp(-given.loss_of(bits, which)))
    assert not told(replace(found, truth=exact(own)))
    assert found.biased


def test_expected_reinforce_learns_the_gradient_and_begins_with_none():
    given = problem(BITS)
    subnet = synthetic.subnet(BITS, context=BITS).double()
    pre = given.pre.clone().requires_grad_()
    whole = torch.arange(4)
    options = {"subnet": subnet, "baseline": score.baseline("mean"), "context": given.context, "generator": seeded()}
    found = synthetic.expected_reinforce(pre, partial(given.loss_of, which=whole), **options)
    assert torch.equal(torch.autograd.grad(found.surrogate, pre)[0], torch.zeros_like(pre))  # zero-initialised
    learned = compare(given, names=["expected-reinforce"], samples=2000)[0]
    assert float(torch.cosine_similarity(learned.mean.flatten(), learned.truth.flatten(), 0)) > 0.9
    plain = compare(given, names=["reinforce-mean"], samples=2000)[0]
    assert learned.row.variance < plain.row.variance / 4


def test_the_subnets_target_is_unbiased_whatever_it_is_told():
    """The mean over draws of what it is fitted to: the exact gradient."""
    given = problem(4, examples=1)
    count = 40_000
    pre, which = given.pre.repeat(count, 1), torch.zeros(count, dtype=torch.long)
    seen: list[Tensor] = []

    class Watch(synthetic.Subnet):
        def forward(self, features):
            return super().forward(features) * 0

    subnet = Watch(4, widths={"probability": 4}).double()
    options = {"subnet": subnet, "baseline": score.Nothing(), "repeats": 2, "generator": seeded()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic.functional, "mse_loss", lambda guess, target: seen.append(target) or target.sum())
        synthetic.expected_reinforce(pre.requires_grad_(), partial(given.loss_of, which=which), **options)
    mean, error = seen[0].mean(0), seen[0].std(0) / count**0.5
    assert float(((mean - exact(given)[0]) / error).abs().max()) < 3.5


@pytest.mark.parametrize("masked", synthetic.INPUTS)
def test_an_input_of_the_subnet_can_be_masked(masked):
    names = [name for name in synthetic.INPUTS if name != masked]
    subnet = synthetic.subnet(3, context=2, inputs=names)
    features = {name: torch.randn(5, 2 if name == "context" else 3) for name in synthetic.INPUTS}
    nn.init.normal_(subnet.linear.weight)
    before = subnet(features)
    assert torch.equal(before, subnet(features | {masked: features[masked] + 1}))
    other = names[0]
    assert not torch.equal(before, subnet(features | {other: features[other] + 1}))


def test_the_update_interval_decays():
    steps = range(4000)
    assert all(synthetic.due(k, interval=1) for k in steps)
    assert [k for k in steps if synthetic.due(k, interval=4)] == list(range(0, 4000, 4))
    growing = [k for k in steps if synthetic.due(k, interval=2, growth=1e-3)]
    gaps = [b - a for a, b in pairwise(growing)]
    assert gaps[:3] == [3, 2, 2]  # two and a thousandth, in whole steps
    assert max(gaps[-3:]) > 20
    assert all(b >= a - 1 for a, b in pairwise(gaps))


# ---------------------------------------------------------------------------------------------- baselines


def rounds(kind: score.Kind, count: int = 200) -> tuple[score.Baseline, Tensor]:
    given = problem(BITS)
    baseline, generator = score.baseline(kind), seeded()
    pre, which = given.pre.repeat(64, 1), torch.arange(4).repeat(64)
    for _ in range(count):
        bits = score.draw(pre, generator=generator)
        losses = given.loss_of(bits, which)
        _, baseline = score.reinforce(pre, bits, losses=losses, baseline=baseline, context=given.context[which])
    return baseline, losses


def test_baselines_come_to_what_they_estimate():
    given, count = problem(BITS), 50_000
    pre, which = given.pre.repeat(count, 1), torch.arange(4).repeat(count)
    bits = score.draw(pre, generator=seeded(9))
    losses = given.loss_of(bits, which)
    mean = rounds("mean")[0].values(losses, None)
    assert float(mean) == pytest.approx(float(losses.mean()), rel=0.1)
    square = (bits - torch.sigmoid(pre)).square()
    best = (square * losses[:, None]).mean(0) / square.mean(0)
    assert torch.allclose(rounds("unit")[0].values(losses, None)[0], best, rtol=0.1)
    conditional = rounds("conditional", 2000)[0].values(losses, given.context).flatten()
    assert torch.allclose(conditional, losses.view(-1, 4).mean(0), atol=0.5)


@pytest.mark.parametrize("kind", ["none", "mean", "unit", "conditional"])
def test_a_baseline_is_a_value(kind):
    """Nothing is kept between calls but what is passed in: the same arguments give the same answer, before and after others."""
    first, losses = rounds(kind, 3)
    before = {name: t.clone() for name, t in first.tensors().items()}
    again = score.restored(kind, first.tensors())
    first.seen(losses, torch.randn(len(losses), BITS, dtype=losses.dtype), torch.randn(len(losses), BITS, dtype=losses.dtype))
    assert all(torch.equal(t, first.tensors()[name]) for name, t in before.items())
    context = torch.ones(len(losses), BITS, dtype=losses.dtype)
    assert torch.equal(first.values(losses, context), again.values(losses, context))


def test_a_conditional_mean_without_context_says_what_it_wants():
    pre = torch.zeros(2, 3)
    _, seen = score.reinforce(pre, pre, losses=torch.ones(2), baseline=score.Nothing())
    with pytest.raises(ValueError, match="needs a context"):
        score.reinforce(pre, pre, losses=torch.ones(2), baseline=score.baseline("conditional"))
    with pytest.raises(ValueError, match="one loss for each of 2 examples"):
        score.reinforce(pre, pre, losses=torch.ones(()), baseline=seen)


def test_bits_that_were_not_drawn_get_nothing():
    pre = torch.zeros(3, 4, requires_grad=True)
    counts = torch.ones(3, 4)
    counts[1, 2] = 0
    term, _ = score.reinforce(pre, torch.ones(3, 4), losses=torch.ones(3), baseline=score.Nothing(), counts=counts)
    term.backward()
    assert pre.grad is not None
    assert torch.equal(pre.grad != 0, counts > 0)


# ---------------------------------------------------------------------------------------------- DNI


def test_dni_with_perfect_guesses_is_backpropagation():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(3, 5), nn.Tanh()), nn.Sequential(nn.Linear(5, 4), nn.Tanh()), nn.Linear(4, 2)]
    x, y = torch.randn(7, 3), torch.randn(7, 2)
    loss_of = lambda out: (out - y).square().sum(1).mean()
    a = layers[0](x)
    b = layers[1](a)
    loss = loss_of(layers[2](b))
    parameters = [p for layer in layers for p in layer.parameters()]
    grads = torch.autograd.grad(loss, [a, b, *parameters])

    class Oracle(nn.Module):
        def __init__(self, truth: Tensor) -> None:
            super().__init__()
            self.truth = nn.Parameter(truth * 7)

        def forward(self, features):
            return self.truth

    found, error = synthetic.dni_step(layers, [Oracle(grads[0]), Oracle(grads[1])], x, loss_of)
    assert float(found) == pytest.approx(float(loss.detach()))
    assert float(error) == pytest.approx(0, abs=1e-10)
    for parameter, wanted in zip(parameters, grads[2:], strict=True):
        assert torch.allclose(parameter.grad, wanted, atol=1e-6)
    with pytest.raises(ValueError, match="3 layers take 2 guessers"):
        synthetic.dni_step(layers, [], x, loss_of)


def test_dni_learns_and_lower_layers_learn_by_guesses_alone():
    torch.manual_seed(1)
    layers = [nn.Sequential(nn.Linear(4, 16), nn.Tanh()), nn.Linear(16, 1)]
    guessers = [synthetic.Subnet(16, widths={"sample": 16, "context": 1}, hidden=32)]
    optimizers = [torch.optim.Adam(m.parameters(), lr=3e-3) for m in (nn.ModuleList(layers), nn.ModuleList(guessers))]
    losses = []
    for k in range(600):
        x = torch.randn(64, 4)
        y = (x[:, :1] * x[:, 1:2]).tanh()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss, _ = synthetic.dni_step(layers, guessers, x, lambda out, y=y: (out - y).square().mean(), context=y)
        if k == 0:  # the first guess is nothing
            assert all(float(p.grad.abs().sum()) == 0 for p in layers[0].parameters())
        for optimizer in optimizers:
            optimizer.step()
        losses.append(float(loss))
    assert sum(losses[-50:]) < 0.6 * sum(losses[:50])


# ---------------------------------------------------------------------------------------------- traps


def gate_gradient(term_of) -> Tensor:
    pre = torch.tensor([[0.3, -0.2, 0.6]], requires_grad=True)
    bits = score.draw(pre, generator=seeded())
    losses = (bits * torch.tensor([1.0, 2.0, -1.0])).sum(1) + 1.5 + 0 * pre.sum()
    (term_of(pre, bits, losses)).sum().backward()
    assert pre.grad is not None
    return pre.grad


def test_trap_log_p_that_never_enters_the_loss():
    honest = lambda pre, bits, losses: score.reinforce(pre, bits, losses=losses, baseline=score.Nothing())[0]

    def trap(pre, bits, losses):
        log_p = score.log_probability(pre, bits).detach()  # computed, and never differentiated
        return losses + 0 * log_p.sum()

    assert (gate_gradient(honest) != 0).all()
    assert (gate_gradient(trap) == 0).all()


def test_trap_log_p_left_out_of_the_conversion(monkeypatch, tmp_path: Path):
    """The same in a whole training step: with the term left out the gates' own gradient is that of a frozen layer."""
    from rnn2bin.distill import credit

    grads = conversion_gradients(tmp_path)
    assert all(float(g.abs().sum()) > 0 for g in grads.values())
    monkeypatch.setattr(credit, "surrogate", lambda *a, baselines, **k: (torch.zeros(()), baselines))
    assert all(float(g.abs().sum()) == 0 for g in conversion_gradients(tmp_path).values())


def test_trap_a_threshold_at_a_quarter():
    pre = torch.linspace(-3, 3, 601)
    pre = pre[pre.abs() > 1e-3]
    soft = torch.sigmoid(pre)
    honest, trap = estimators.sample(estimators.BINARY, pre), (soft > 0.5 - soft).float()
    at_half = (soft > 0.5).float()
    assert torch.equal(honest, at_half)
    assert not torch.equal(trap, at_half)


def test_trap_noise_kept_between_calls(monkeypatch):
    pre = torch.zeros(500)
    mode = Discretize("gumbel-hard", generator=seeded())
    calls = lambda draw: [estimators.sample(mode, pre, draw(pre.shape, mode, pre)) for _ in range(2)]
    honest = calls(logistic_noise)
    kept: list[Tensor] = []

    def trap(*args):
        if not kept:
            kept.append(logistic_noise(*args))
        return kept[0]

    repeated = calls(trap)
    assert not torch.equal(*honest)
    assert torch.equal(*repeated)


def test_trap_a_test_time_sigmoid_without_its_temperature():
    trained = Discretize("gumbel", temperature=0.2, slope=1.5)
    pre = torch.tensor([-0.4, 0.1, 0.3])
    honest, trap = estimators.sample(trained.soft(), pre), torch.sigmoid(pre)
    wanted = torch.sigmoid(pre * 1.5 / 0.2)
    assert torch.allclose(honest, wanted)
    assert not torch.allclose(trap, wanted, atol=0.05)


# ---------------------------------------------------------------------------------------------- in a conversion


def conversion_gradients(tmp_path: Path, **reinforce) -> dict[str, Tensor]:
    """What one training step leaves in the gates' biases. Nothing reaches them but through a bit."""
    from test_gates import problem as stream

    from rnn2bin import student, tasks
    from rnn2bin.distill import trainer
    from rnn2bin.recipe import parse

    teacher, part = stream()
    gates = {"estimator": "reinforce", "noise": 1.0, "straight_through_from": 1.0, "copies": 1, "reinforce": reinforce}
    train = {"steps": 4, "max_steps": 4, "batch_size": 4, "window": 4, "evaluate_every": 2}
    recipe = parse({"task": "next-token", "gates": gates, "train": train})
    network = student.student(teacher, recipe.gates)
    task = tasks.resolve(recipe, teacher.spec, part)
    torch.manual_seed(0)
    out = tmp_path / "run"
    one = trainer.DistillTrainer(network, teacher, task=task, recipe=recipe, train=part, valid=part, out=out)
    one.compute_loss(network, {"batch": one.train_dataset[0]}).backward()
    return {name: p.grad for name, p in network.named_parameters() if name.endswith("gates.bias")}


@pytest.mark.parametrize("baseline", ["none", "mean", "unit", "conditional"])
def test_every_baseline_in_a_conversion(baseline, tmp_path: Path):
    grads = conversion_gradients(tmp_path, baseline=baseline, reward="exponential")
    assert grads
    assert all(torch.isfinite(g).all() and float(g.abs().sum()) > 0 for g in grads.values())


def test_reinforce_in_a_recurrent_network_is_unbiased():
    """Every setting of the bits of a GRU over two steps, each with its probability, against the mean of many sampled surrogates."""
    from rnn2bin import student, tasks
    from rnn2bin.cells.network import Network
    from rnn2bin.data import Batch
    from rnn2bin.distill import credit
    from rnn2bin.distill.window import run_cell
    from rnn2bin.gates.estimators import FLOAT
    from rnn2bin.recipe import parse
    from rnn2bin.spec import EmbeddingSpec, LayerSpec, LinearSpec, RnnSpec, SectionSpec

    words, count = 3, 6000
    teacher = Network(RnnSpec({"main": SectionSpec((LayerSpec("gru", 2, 2),), EmbeddingSpec(words, 2), (LinearSpec(2, words),))})).double()
    with torch.no_grad():
        for p in teacher.parameters():
            p.copy_(torch.randn(p.shape, generator=seeded(p.numel()), dtype=p.dtype))
    gates = {"estimator": "reinforce", "noise": 1.0, "copies": 1, "reinforce": {"baseline": "none"}}
    recipe = parse({"task": "next-token", "gates": gates})
    network = student.student(teacher, recipe.gates).double()
    task = tasks.Task("next-token", "bits_per_token", teacher.spec)
    (cell,) = network.cells().values()
    tokens = torch.tensor([0, 2, 1])

    def step(rows: int):
        batch = Batch(tokens.unsqueeze(1).repeat(1, rows), None, None, None)
        prepared = tasks.prepare(task, batch, teacher)
        with torch.no_grad():
            target = prepared.forward(teacher, mode=FLOAT, walk=run_cell)
        return prepared, target

    # All 2^(2·2·2) settings: noise so large that it decides.
    settings = torch.tensor([[(k >> b) & 1 for b in range(8)] for k in range(256)], dtype=torch.float64)
    forced = (settings * 2 - 1).view(256, 2, 2, 2).permute(1, 0, 2, 3) * 1e6
    prepared, target = step(256)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rnn2bin.distill.window._noise", lambda *_: forced)
        output = prepared.forward(network, mode=Discretize("reinforce"), walk=run_cell)
    log_p = score.log_probability(output.pre[0], (forced > 0).double()).sum((0, 2, 3))
    losses = tasks.sequence_losses(task, recipe.loss, prepared, output.y, target.y)
    parameters = [cell.get_parameter(name) for name in ("gates.bias", "gates.weight_hh", "candidate.weight_hh")]
    truth = torch.autograd.grad((log_p.exp() * losses).sum(), parameters)

    prepared, target = step(count)
    chunks = []
    for k in range(8):
        mode = Discretize("reinforce", generator=seeded(k))
        output = prepared.forward(network, mode=mode, walk=run_cell)
        given = (task, recipe, prepared, output, target)
        term, _ = credit.surrogate(*given, student=network, mode=mode, baselines=credit.start(network, recipe))
        loss = tasks.loss(task, recipe.loss, prepared, output.y, target.y)
        chunks.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss + term, parameters)]))
    found, wanted = torch.stack(chunks), torch.cat([g.flatten() for g in truth])
    z = (found.mean(0) - wanted) / (found.std(0) / len(chunks) ** 0.5)
    assert float(z.abs().max()) < 6  # Student's t with 7 degrees of freedom, 12 components
    assert float(torch.cosine_similarity(found.mean(0), wanted, 0)) > 0.98


# ---------------------------------------------------------------------------------------------- diagnostics


def test_the_exact_gradient_is_a_difference_of_expectations():
    given = problem(3, examples=1)
    settings = torch.tensor([[(k >> b) & 1 for b in range(3)] for k in range(8)], dtype=torch.float64)

    def expected(pre: Tensor) -> float:
        p = torch.sigmoid(pre)
        return float((torch.where(settings > 0, p, 1 - p).prod(1) * given.loss_of(settings, torch.zeros(8, dtype=torch.long))).sum())

    for unit in range(3):
        step = torch.zeros(1, 3, dtype=torch.float64)
        step[0, unit] = 1e-5
        slope = (expected(given.pre + step) - expected(given.pre - step)) / 2e-5
        assert float(exact(given)[0, unit]) == pytest.approx(slope, rel=1e-6)


def test_many_samples_stand_for_the_exact_gradient():
    given = problem(BITS)
    mean, error = diagnostics.sampled(given, samples=100_000)
    z = ((mean - exact(given)) / error).flatten()
    assert float(z.square().mean()) < 1 + 3 * math.sqrt(2 / len(z))


def test_beyond_twelve_bits_the_reference_is_sampled(monkeypatch):
    monkeypatch.setattr(diagnostics, "REFERENCE", 40_000)
    monkeypatch.setattr(diagnostics.sampled, "__kwdefaults__", {"samples": 40_000, "seed": 0})
    found = {one.row.estimator: one for one in compare(problem(14, examples=1), samples=2000)}
    assert not {"stochastic-identity", "stochastic-hard-sigmoid"} & set(found)
    assert not found["disarm"].biased
    assert found["straight-through-identity"].biased
    assert float(found["disarm"].truth_error.sum()) > 0


def test_the_command(tmp_path: Path):
    plot = tmp_path / "plot.svg"
    options = ["gradients", "--bits", "4", "--samples", "500", "--estimator", "disarm", "--estimator", "reinmax"]
    done = CliRunner().invoke(main, [*options, "--json", "--plot", str(plot)])
    assert done.exit_code == 0
    rows = json.loads(done.output)
    assert [row["estimator"] for row in rows] == ["disarm", "reinmax"]
    assert set(rows[0]) == {"estimator", "bias2", "variance", "cosine", "half_space", "norm", "true_norm", "samples"}
    assert all(name in plot.read_text() for name in ("disarm", "reinmax"))
    told_ = CliRunner().invoke(main, options)
    assert "half-space" in told_.output
    wrong = CliRunner().invoke(main, ["gradients", "--estimator", "disarmm"])
    assert wrong.exit_code == 2
    with pytest.raises(UsageError, match="at most 12"):
        exact(problem(13))


def test_modules_refuse_what_needs_a_loss_for_each_sequence():
    import rnn2bin
    from rnn2bin.errors import RecipeError
    from rnn2bin.recipe import parse

    with pytest.raises(RecipeError, match="one number a batch"):
        rnn2bin.binarize(nn.LSTM(2, 3), recipe=parse({"gates": {"estimator": "reinforce"}}))


def test_sample_is_the_only_way_a_bit_sends_nothing_back():
    pre = torch.zeros(3, requires_grad=True)
    Sample.apply(pre, torch.ones(3), Discretize("reinforce")).sum().backward()
    assert pre.grad is not None
    assert torch.equal(pre.grad, torch.zeros(3))
