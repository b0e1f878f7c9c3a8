"""The weights' moving average: what it is a mean of, what is measured, chosen and shipped, and that training does not see it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from test_modules import batches, recipe, teacher
from test_trainer import TEXT, recipe_of, run, sequences, stream, teacher_of
from tolerances import assert_close
from torch import Tensor, nn

import rnn2bin
from rnn2bin import plan, student, tasks
from rnn2bin.cells.network import Network
from rnn2bin.distill import anneal, trainer
from rnn2bin.distill.averaging import Average
from rnn2bin.distill.window import run_cell
from rnn2bin.errors import InterruptedRunError
from rnn2bin.gates.estimators import BINARY, FLOAT
from rnn2bin.measure import Candidate, compare
from rnn2bin.recipe import Recipe, parse

DECAY = 0.8
AVERAGED = TEXT | {"train": {"averaging": DECAY, "learning_rate": 0.05, "evaluate_every": 1}}


def mean_of(steps: list[Tensor], decay: float = DECAY) -> Tensor:
    """Σ d^(n−k) (1−d) / (1−dⁿ) w_k, in float64."""
    counts = torch.tensor([decay ** (len(steps) - k) for k in range(1, len(steps) + 1)], dtype=torch.float64)
    return torch.einsum("k,k...->...", counts / counts.sum(), torch.stack(steps).double())


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The trained weights after each step of the runs of a test."""
    seen: list[dict[str, Tensor]] = []
    plain = Average.update

    def update(self: Average, step: int) -> None:
        seen.append({name: p.detach().clone() for name, p in self.weights.items()})
        plain(self, step)

    monkeypatch.setattr(Average, "update", update)
    return seen


@pytest.mark.parametrize("decay", [0.5, 0.99, 0.999])
def test_the_mean_forgets_where_it_began(decay):
    layer = nn.Linear(3, 2)
    average, steps = Average(layer, decay), []
    for step in range(1, 40):
        with torch.no_grad():
            layer.weight.copy_(torch.randn(2, 3, generator=torch.Generator().manual_seed(step)))
        average.update(step)
        steps.append(layer.weight.detach().clone())
        assert_close(average.means["weight"], mean_of(steps, decay).float())


def test_what_is_shown_is_given_back_to_the_bit():
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    average = Average(layer, 0.9)
    assert list(average.means) == ["weight"]  # what is not trained stays
    average.means["weight"].zero_()
    own = layer.weight.detach().clone()

    def fails() -> None:
        with average.shown():
            assert not layer.weight.any()
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert torch.equal(layer.weight, own)
    assert not average.means["weight"].any()


def test_the_average_is_measured_and_shipped_and_training_is_as_without(tmp_path, walked):
    network, trained = run(AVERAGED, tmp_path / "averaged")
    steps = walked.copy()
    _, plain = run(TEXT | {"train": AVERAGED["train"] | {"averaging": 0.0}}, tmp_path / "plain")
    assert [p.loss for p in trained.history] == [p.loss for p in plain.history]  # training sees its own weights
    assert all(one.hard != other.hard for one, other in zip(trained.history[1:], plain.history[1:], strict=True))
    assert len(steps) == trained.steps
    state = network.state_dict()
    assert any("levels" in name for name in steps[0])
    for name in steps[0]:
        assert_close(state[name], mean_of([one[name] for one in steps[: trained.best_step]]).float())
    valid = stream(seed=7)
    task = tasks.resolve(recipe_of(), network.spec, valid)
    found = compare(task, valid, Candidate(teacher_of("lstm"), FLOAT), {"hard": Candidate(network, BINARY, run_cell)})["hard"].value
    assert found == pytest.approx(next(p.hard for p in trained.history if p.step == trained.best_step), rel=1e-6)


def whole_run(out: Path, **options: Any) -> tuple[Network, anneal.Trained]:
    """With a density budget and matrices on eight-bit grids."""
    settings = {"averaging": DECAY, "evaluate_every": 2, "learning_rate": 0.02}
    chosen: Recipe = recipe_of(train=settings, budget={"density": 0.7}, pack={"weights": "int8"})
    theirs = teacher_of("gru", readout="last")
    task = tasks.resolve(chosen, theirs.spec, sequences())
    train, valid = (tasks.settled(task, sequences(seed=seed)) for seed in (3, 7))
    network = student.student(theirs, chosen.gates, weights="int8")
    return network, trainer.train(network, theirs, task=task, recipe=chosen, train=train, valid=valid, out=out, **options)


@pytest.mark.parametrize("stop_at", [3, 4])
def test_resumed_equals_uninterrupted_bit_for_bit(stop_at, tmp_path):
    whole, wanted = whole_run(tmp_path / "whole")

    def stop(now: dict[str, Any]) -> None:
        if now["step"] == stop_at:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(InterruptedRunError):
        whole_run(tmp_path / "cut", report=stop)
    torch.manual_seed(999)
    resumed, found = whole_run(tmp_path / "cut", resume=True)
    assert found == wanted
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))


def test_the_budget_is_counted_on_the_average(tmp_path, walked):
    """What a checkpoint reads, and is chosen by, is what the network that ships reads."""
    network, trained = whole_run(tmp_path)
    assert network.weights == "int8"
    best = next(p for p in trained.history if p.step == trained.best_step)
    chosen = recipe_of(budget={"density": 0.7})
    theirs = teacher_of("gru", readout="last")
    task = tasks.resolve(chosen, theirs.spec, sequences())
    part = tasks.settled(task, sequences(seed=7))
    again = trainer.DistillTrainer(network, theirs, task=task, recipe=chosen, train=part, valid=part, out=tmp_path / "again")
    found = again.measure(BINARY, trained.soft_mode)
    assert (found.hard, found.density) == pytest.approx((best.hard, best.density))
    with torch.no_grad():
        for name, weight in walked[trained.best_step - 1].items():
            network.get_parameter(name).copy_(weight)
    assert again.measure(BINARY, trained.soft_mode).density != pytest.approx(
        found.density, rel=1e-3
    )  # the step's own weights read other rows


def test_a_module_ships_its_average(tmp_path, walked):
    short = recipe(train={"steps": 6, "evaluate_every": 6, "max_steps": 6, "averaging": DECAY, "learning_rate": 0.05})
    rnn2bin.convert(teacher(), recipe=short, data=batches(8), out=tmp_path / "OUT")
    packed = rnn2bin.load(tmp_path / "OUT", module=teacher())
    name = next(name for name in walked[0] if name.endswith("candidate.bias"))
    wanted = mean_of([one[name] for one in walked])
    assert_close(packed.get_parameter(name).half(), wanted.half())
    assert (wanted - walked[-1][name]).abs().max() > 0.01  # the test can fail


def test_the_plan_counts_it():
    network = student.student(teacher_of("lstm"), recipe_of().gates)
    with_it, without = (plan.checkpoint_bytes(network, recipe_of(train={"averaging": decay})) for decay in (0.9, 0.0))
    assert with_it - without == 4 * sum(p.numel() for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_a_decay_is_a_share_below_one(decay):
    with pytest.raises(ValidationError):
        parse({"train": {"averaging": decay}})
