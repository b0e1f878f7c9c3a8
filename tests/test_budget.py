"""The density budget: the price finds the wanted density by itself, and only checkpoints that keep it are chosen."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import VOCABULARY
from hypothesis import given
from hypothesis import strategies as st
from test_trainer import recipe_of, run, stream, teacher_of

from rnn2bin import cost, pipeline, plan, recipe_yaml, student, tasks
from rnn2bin.cells.network import EQUATIONS, Trace
from rnn2bin.distill import budget, checkpoints
from rnn2bin.distill import trainer as distiller
from rnn2bin.distill.window import run_cell
from rnn2bin.errors import UnreachableError
from rnn2bin.evaluation.density import DensityCounter
from rnn2bin.gates.estimators import BINARY, Discretize, Sample
from rnn2bin.kinds import CELLS
from rnn2bin.recipe import Budget, parse


def prepared_of(network, part):
    task = tasks.resolve(recipe_of(), network.spec, part)
    part = tasks.settled(task, part)
    from rnn2bin.data import evaluation_batches

    return tasks.prepare(task, next(evaluation_batches(part)), network, walk=run_cell)


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("cell", ["lstm", "gru", "lstm_coupled_peephole"])
def test_the_density_trained_is_the_density_reported(cell, copies):
    teacher = teacher_of(cell)
    network = student.student(teacher, recipe_of(gates={"copies": copies}).gates)
    prepared = prepared_of(teacher, stream())
    out = prepared.forward(network, mode=BINARY, walk=run_cell)
    counter = DensityCounter(network)
    counter.add(prepared, out)
    cells = counter.cells.values()
    wanted = sum(float(c.incremental) for c in cells) / sum(float(c.dense) for c in cells)
    for learn in (True, False):
        assert float(budget.density(network, prepared, out, learn=learn).detach()) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    "cell", [name for name in CELLS if name not in EQUATIONS and CELLS[name].peepholes != "full"]
)  # the others have no copies, or no sizes of their own
def test_whether_any_copy_opens_is_said_without_making_all_of_them(cell):
    """Bit for bit, by the largest bias where copies share their product; peepholes give each copy its own, which are compared."""
    teacher = teacher_of(cell)
    network = student.student(teacher, recipe_of(gates={"copies": 3}).gates)
    generator = torch.Generator().manual_seed(5)
    for one in network.cells().values():
        bias = one.part("gates").bias
        bias.data += torch.randn(bias.shape, generator=generator)
    out = prepared_of(teacher, stream()).forward(network, mode=BINARY, walk=run_cell)
    for trace, one in zip(out.traces, network.cells().values(), strict=True):
        for gate in range(len(one.binary)):
            every = trace.pre[:, :, gate].unflatten(-1, (3, -1))
            assert torch.equal(trace.highest(gate, 3), every.amax(-2))
            assert torch.equal(trace.lowest(gate, 3), every.amin(-2))


def read_of(products, biases, copies):
    """A GRU cell's read of products (T,B,2,H) with a threshold for each copy, biases (2,n·H)."""
    cell = SimpleNamespace(layer=SimpleNamespace(copies=copies))
    return cost.Read("gru", cell, Trace((), products, biases), None, None, True)


@pytest.mark.parametrize("whole", [False, True], ids=["products and biases", "whole"])
@given(data=st.data())
def test_a_copy_that_keeps_and_one_that_reads_make_no_unit_that_reads(whole, data):
    """Small whole numbers, so that pre-activations of exactly 0, a closed gate, are common; held against a walk over every copy."""
    numbers = lambda *shape: torch.tensor(data.draw(st.lists(st.integers(-2, 2), min_size=math.prod(shape), max_size=math.prod(shape))))
    products, biases = numbers(2, 1, 2, 3).view(2, 1, 2, 3).float(), numbers(2, 6).view(2, 6).float()
    pre = (products.unsqueeze(3) + biases.view(2, 2, 3)).flatten(3)
    read = read_of(pre, None, 2) if whole else read_of(products, biases, 2)
    for t, j in itertools.product(range(2), range(3)):
        r, z = (pre[t, 0, gate].view(2, 3)[:, j] for gate in (0, 1))
        assert bool(read.closed(1, cost.bits)[t, 0, j]) == any(float(one) <= 0 for one in z)
        wanted = any(float(one) <= 0 < float(other) for one, other in zip(z, r, strict=True))
        assert bool(read.closed_and_open(1, 0, cost.bits)[t, 0, j]) == wanted


def test_the_copy_that_reads_most_clearly_is_paid_for_its_unit():
    biases = torch.tensor([[1.0, 2.0, -1.0], [-1.0, -3.0, -9.0]], requires_grad=True)  # r, z of three copies; the third reads nothing
    read = read_of(torch.zeros(1, 1, 2, 1), biases, 3)
    bit = lambda pre: Sample.apply(pre, None, Discretize("straight-through", slope=1.0, backward="sigmoid"))
    read.closed_and_open(1, 0, bit).sum().backward()
    assert [bool(g) for g in biases.grad.abs().sum(0)] == [False, True, False]
    assert biases.grad[0, 1] > 0 > biases.grad[1, 1]  # opening r and closing z both make it read


@pytest.mark.parametrize("cell", ["lstm", "gru", "lstm_coupled_peephole"])
def test_the_density_has_a_gradient_in_every_cell(cell):
    teacher = teacher_of(cell)
    network = student.student(teacher, recipe_of(gates={"copies": 2}).gates)
    prepared = prepared_of(teacher, stream())
    budget.density(network, prepared, prepared.forward(network, mode=BINARY, walk=run_cell)).backward()
    for name, one in network.cells().items():
        assert float(one.part("gates").bias.grad.abs().max()) > 0, name


def test_the_layer_below_is_paid_for_what_the_layer_above_reads():
    """Its o opens columns of the next layer's input: closing it must save more than its own recurrent columns."""
    teacher = teacher_of("lstm")
    network = student.student(teacher, recipe_of(gates={"copies": 1}).gates)
    prepared = prepared_of(teacher, stream())
    out = prepared.forward(network, mode=BINARY, walk=run_cell)
    bit = lambda pre: Sample.apply(pre, None, Discretize("straight-through", slope=1.0, backward="sigmoid")).double()
    above = [cost.count(read, bit=bit) for read in cost.cells(network, prepared, out, bit=bit)][1]
    (grad,) = torch.autograd.grad(above.touched, [network.get_submodule("main.layers.0.fwd.gates").bias])
    assert float(grad.view(3, -1)[2].sum()) > 0


def test_soft_gates_let_through_what_their_bits_would():
    """No value of a soft layer's output is 0: counted as it stands, the layer above would read all of it whatever the gates do."""
    teacher = teacher_of("lstm")
    network = student.student(teacher, recipe_of(gates={"copies": 2}).gates)
    prepared = prepared_of(teacher, stream())
    soft = prepared.forward(network, mode=Discretize("sigmoid"), walk=run_cell)
    assert bool((soft.inputs[1] != 0).all())  # the test can fail
    read = [*cost.cells(network, prepared, soft)]
    open_below = read[0].units(cost.bits, opened=2)
    assert torch.equal(read[1].inputs, open_below)
    assert float(open_below.mean()) < teacher.spec.main.layers[0].hidden_size


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 0.1),
        ({"budget": {"density": 0.1}}, 0.0),
        ({"budget": {"price": 0.1}}, 0.0),
        ({"budget": {"density": 0.1}, "gates": {"estimator": "gumbel-hard"}}, 0.1),
        ({"budget": {"density": 0.1}, "gates": {"straight_through_from": 0.3}}, 0.3),
    ],
)
def test_gates_are_bits_from_the_start_where_what_they_read_has_a_price(settings, expected):
    assert recipe_of(**settings).straight_through_from == expected


@pytest.mark.parametrize(("cell", "wanted", "copies", "scale"), [("lstm", 0.15, 1, 0.02), ("lstm", 0.15, 3, 50.0), ("gru", 0.2, 2, 1.0)])
def test_the_wanted_density_is_reached_within_a_hundredth_whatever_the_scale_of_the_loss(cell, wanted, copies, scale, tmp_path):
    teacher = teacher_of(cell, hidden=32)
    recipe = recipe_of(
        train={"steps": 600, "max_steps": 600, "learning_rate": 0.01, "evaluate_every": 50, "batch_size": 8, "window": 16},
        gates={"straight_through_from": 0.1, "copies": copies},
        budget={"density": wanted},
        loss={"hidden": scale},
    )
    task = tasks.resolve(recipe, teacher.spec, stream())
    network = student.student(teacher, recipe.gates)
    part = stream(2000)
    trained = distiller.train(network, teacher, task=task, recipe=recipe, train=part, valid=stream(500, rows=8, seed=7), out=tmp_path)
    held = [p.density for p in trained.history if p.progress >= 0.75]  # one measurement of these small networks is noisy
    assert sum(held) / len(held) == pytest.approx(wanted, abs=budget.TOLERANCE)
    assert next(p.density for p in trained.history if p.step == trained.best_step) <= wanted + budget.TOLERANCE


def test_the_wanted_density_falls_in_equal_ratios_and_never_below():
    price = budget.Price(first=0.8)
    plan = Budget(density=0.2, until=0.5)
    assert [round(price.wanted(plan, p), 6) for p in (0, 0.25, 0.5, 1)] == [0.8, 0.4, 0.2, 0.2]
    assert budget.Price(first=0.1).wanted(plan, 0) == 0.2


@given(found=st.floats(0, 1), wanted=st.floats(0.02, 0.9), price=st.floats(0.01, 900))
def test_a_weight_costs_the_price_above_the_aim_pays_it_below_and_a_share_of_it_between(found, wanted, price):
    one, density = budget.Price(price, first=1.0, shift=0.0), torch.tensor(found, dtype=torch.float64, requires_grad=True)
    charged = one.charge(density, Budget(density=wanted), 1.0)
    charged.backward()
    share = min(max((found - wanted) / budget.TOLERANCE, -1.0), 1.0)
    assert float(density.grad) == pytest.approx(price * share, rel=1e-4, abs=1e-6 * price)
    assert float(charged.detach()) == pytest.approx(price * share * (found - wanted), rel=1e-4, abs=1e-6 * price)
    if abs(abs(found - wanted) - budget.TOLERANCE / 2) > 1e-6:
        assert (one.price > price) == (abs(found - wanted) > budget.TOLERANCE / 2)


@given(st.integers(0, 2**32 - 1))
def test_noise_of_single_batches_does_not_raise_the_price(seed):
    """It once rose at any batch that was half a hundredth beside the aim, on either side, and had no end: with sequences of a few steps
    most batches are, until the price was all of the loss."""
    noise = torch.Generator().manual_seed(seed)
    one, plan = budget.Price(10.0, first=1.0, shift=0.0), Budget(density=0.1)
    for _ in range(1000):
        one.charge(0.1 + 0.015 * torch.randn((), generator=noise), plan, 1.0)
    assert one.price < 0.1


def test_the_price_has_bounds():
    one = budget.Price(first=1.0, shift=0.0)
    for found, bound in ((0.9, budget.MOST_PRICE), (0.1, budget.LEAST_PRICE), (0.01, budget.MOST_PRICE)):
        for _ in range(2000):
            one.charge(torch.tensor(found), Budget(density=0.1), 1.0)
        assert one.price == pytest.approx(bound)


def test_a_density_that_is_on_its_way_to_the_aim_is_not_charged_ever_more():
    """Else the price overshoots by what it takes gates to follow, and closes more than was asked."""
    plan, falling, standing = Budget(density=0.1), budget.Price(first=1.0, shift=0.0), budget.Price(first=1.0, shift=0.0)
    for step in range(100):
        falling.charge(torch.tensor(0.1 + 0.4 * 0.95**step), plan, 1.0)
        standing.charge(torch.tensor(0.15), plan, 1.0)
    assert falling.price < budget.FIRST_PRICE < standing.price


@pytest.mark.parametrize(("tokens", "wanted", "refused"), [(False, 0.2, True), (False, 0.5, False), (True, 0.05, False)])
def test_a_density_below_what_dense_inputs_read_is_refused_before_training(tokens, wanted, refused, save_model, save_data, tmp_path):
    """It was tried to the end before, at a price that left nothing of the network."""
    given = {"overrides": [f"budget.density={wanted}"], "recipe": "smoke.yaml", "data": save_data(tokens=tokens), "out": tmp_path / "out"}
    model = save_model(tokens=tokens, outputs=VOCABULARY)
    if not refused:
        pipeline.convert(model, **given)
        return
    recipe = recipe_yaml.resolve(given["recipe"], given["overrides"])
    for ask in (lambda: pipeline.convert(model, **given), lambda: plan.plan(model, recipe, given["data"])):
        with pytest.raises(
            UnreachableError,
            match=r"budget.density: 0.2 cannot be reached: a step reads [2-4]\d\.\d% of .* \(main.layers.0.fwd\); ask for more",
        ):
            ask()
    assert not (tmp_path / "out").exists()


def test_a_price_of_its_own_is_charged_for_every_weight_and_stays():
    one, found = budget.Price(), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    charged = one.charge(found, Budget(price=0.05), 0.7)
    charged.backward()
    assert (float(charged.detach()), float(found.grad)) == (pytest.approx(0.02), pytest.approx(0.05))
    assert one == budget.Price()


def test_a_price_makes_the_network_read_less_and_a_higher_one_less_still(tmp_path):
    read = []
    for price in (1e-6, 0.03, 1.0):
        train = {"steps": 60, "max_steps": 60, "learning_rate": 0.02, "evaluate_every": 60}
        case = {"cell": "lstm", "readout": "all", "train": train, "gates": {}}
        _, trained = run(case | {"more": {"budget": {"price": price}}}, tmp_path / str(price))
        read.append(trained.history[-1].density)
    assert read == sorted(read, reverse=True)
    assert read[2] < read[0] - 0.1


def test_a_price_beside_a_density_is_refused():
    with pytest.raises(ValueError, match="a density finds its price"):
        parse({"budget": {"density": 0.2, "price": 0.1}})


def test_the_rate_of_learning_follows_the_budget_unless_it_is_given():
    rates = [recipe_of(budget=b, train=t).learning_rate for b in ({}, {"density": 0.2}) for t in ({}, {"learning_rate": 0.003})]
    assert rates == [0.001, 0.003, 0.016, 0.003]


@pytest.mark.parametrize(("density", "hidden"), [(0.2, 0.0), (None, 20.0)])
def test_the_float_control_is_trained_with_the_students_losses_but_without_the_budget_and_its_rate(density, hidden, tmp_path, monkeypatch):
    """A float network has no gates to close: at the budget's rate it would only be harmed, and the control would say nothing."""
    seen = []
    monkeypatch.setattr(distiller, "train", lambda *_, recipe, **__: seen.append(recipe))
    teacher, parts = teacher_of("lstm"), SimpleNamespace(train=stream(), valid=None)
    recipe = recipe_of(task="match", budget={"density": density}, train={"steps": 7})
    job = SimpleNamespace(teacher=teacher, task=tasks.resolve(recipe, teacher.spec, parts.train), recipe=recipe, parts=parts)
    pipeline.float_control(job, tmp_path, rate_found=0.005)
    assert (seen[0].budget, seen[0].train.steps, seen[0].loss.hidden) == (Budget(), 7, hidden)
    assert seen[0].learning_rate == (0.001 if density else 0.005)  # the student's own, where it had no budget


def test_a_network_that_reads_less_than_it_may_from_the_start_is_left_alone():
    one = budget.Price(5.0, first=0.3)
    found = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    one.charge(found, Budget(density=0.5), 0.0).backward()
    assert float(found.grad) == 0.0


def test_training_aims_beside_the_wanted_density_by_what_the_validation_part_reads_too_much():
    """Only once the wanted density has been the budget for a whole stretch between two measurements."""
    plan, one = Budget(density=0.2, until=0.5), budget.Price(first=0.8, shift=0.0)
    shifts = []
    for found, progress in ((0.5, 0.25), (0.3, 0.5), (0.21, 0.75), (0.204, 1.0), (0.9, 1.0)):
        one.correct(found, plan, progress)
        shifts.append(one.shift)
    assert shifts == pytest.approx([0, 0, -0.005, -0.007, -budget.MOST_SHIFT])
    one.price, found = 1.0, torch.tensor(0.195, dtype=torch.float64, requires_grad=True)
    one.charge(found, plan, 1.0).backward()
    assert float(found.grad) == pytest.approx(1.0)  # below the budget, and still charged


def test_a_checkpoint_over_budget_is_chosen_only_where_none_keeps_it():
    good, bad, dense, denser = (budget.choice(m, d, 0.2) for m, d in ((0.9, 0.2), (0.5, 0.21), (0.99, 0.3), (0.99, 0.4)))
    assert sorted([denser, bad, dense, good], reverse=True) == [good, bad, dense, denser]
    assert budget.choice(0.7, None, None) == 0.7


def test_the_price_survives_a_checkpoint(tmp_path):
    case = {"cell": "lstm", "readout": "all", "train": {}, "gates": {}, "more": {"budget": {"density": 0.2}}}
    run(case, tmp_path)
    folder = checkpoints.newest(tmp_path)
    assert folder is not None
    kept = json.loads((folder / "price.json").read_text())
    assert kept["first"] is not None
    assert kept["price"] != budget.FIRST_PRICE
    assert set(kept) == {f.name for f in dataclasses.fields(budget.Price)}
