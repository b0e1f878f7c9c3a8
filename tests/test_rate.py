"""The rate of learning that a conversion finds for itself: which rates are tried, what is taken, that nothing but validation decides."""

import pytest
import torch

from rnn2bin import data, pipeline, student, tasks
from rnn2bin.cells.network import Network, teacher_network
from rnn2bin.distill import anneal, rate, trainer
from rnn2bin.errors import DivergedError
from rnn2bin.recipe import Recipe
from rnn2bin.spec import LayerSpec, LinearSpec, RnnSpec, SectionSpec

RATES = (1.0, 2.0, 3.0, 4.0, 5.0)


@pytest.mark.parametrize(
    ("values", "tried", "taken", "ties"),
    [
        ((0, 1, 2, 1, 0), (3, 2, 4), 3, 0.0),  # the first is best
        ((1, 3, 2, 9, 9), (3, 2, 1), 2, 0.0),  # lower is better: higher ones are not asked for
        ((5, 4, 3, 2, 1), (3, 2, 1), 1, 0.0),
        ((0, 1, 2, 3, 4), (3, 2, 4, 5), 5, 0.0),
        ((2, 2, 2, 2, 2), (3, 2, 4), 3, 0.0),  # as good is no reason to go on
        ((0, float("-inf"), 1, float("-inf"), 9), (3, 2, 4), 3, 0.0),
        ((2, 2, 2, 2, 2), (3, 2, 1), 1, 0.1),  # but to go down
        ((1.81, 1.85, 2, 9, 9), (3, 2, 1), 1, 0.1),
        ((1.7, 1.85, 2, 9, 9), (3, 2, 1), 2, 0.1),  # a tie with the last is not one with the best
        ((1.6, 1.85, 2, 9, 9), (3, 2, 1), 2, 0.1),
        ((0, 1.7, 2, 2.1, 9), (3, 2, 4), 3, 0.1),  # higher has to be clearly better
        ((0, 1.7, 2, 2.3, 2.4), (3, 2, 4, 5), 4, 0.1),
        ((-2.3, -2.1, -2, 0, 0), (3, 2, 1), 2, 0.09),  # a metric that is to be low, its sign turned
        ((0, -1e6 - 0.3, -1e6 - 0.2, -1e6 - 0.1, -1e6 - 0.4), (3, 2, 4, 5), 4, 0.1),  # too dense: nothing is a tie
    ],
)
def test_the_climb_goes_on_while_it_gets_better(values, tried, taken, ties):
    seen = []
    found = rate.climb(lambda one: seen.append(int(one)) or values[int(one) - 1], RATES, first=2, ties=ties)
    assert tuple(seen) == tried
    assert found == taken


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, True),
        ({"train": {"learning_rate": 0.01}}, False),
        ({"budget": {"density": 0.3}}, True),
        ({"budget": {"density": 0.3}, "train": {"steps": rate.BUDGET.shortest - 1}}, False),
        ({"budget": {"price": 0.3}}, True),
        ({"train": {"steps": rate.FREE.shortest - 1}}, False),
        ({"train": {"steps": rate.FREE.shortest}}, True),
    ],
)
def test_when_it_is_looked_for(given, wanted):
    assert rate.wanted(Recipe(**given)) is wanted


@pytest.mark.parametrize(("steps", "short", "with_budget"), [(500, 50, 250), (4000, 100, 250), (16_000, 200, 1000), (100_000, 200, 1000)])
def test_short_runs_are_a_share_of_the_long_one(steps, short, with_budget):
    assert rate.steps(Recipe(train={"steps": steps})) == short
    assert rate.steps(Recipe(train={"steps": steps}, budget={"density": 0.3})) == with_budget


@pytest.mark.parametrize(("given", "start"), [({}, 1e-3), ({"budget": {"density": 0.3}}, 1.6e-2)])
def test_a_run_too_short_to_look_takes_the_rate_that_others_start_from(given, start):
    recipe = Recipe(**given)
    ladder = rate.ladder(recipe)
    assert ladder.rates[ladder.first] == recipe.learning_rate == start


def test_with_a_budget_a_short_run_that_reads_too_much_is_behind_all_that_do_not(tmp_path, monkeypatch):
    given = job(tmp_path)
    given["recipe"] = Recipe(train={"steps": 4000}, budget={"density": 0.3})
    sign = 1 if given["task"].higher_is_better else -1
    ends = {1.6e-2: (5.0, 0.3), 5e-3: (9.0, 0.4), 5e-2: (6.0, 0.305)}  # rate -> how good, density

    def trained(*_, recipe, **__):
        good, density = ends[recipe.learning_rate]
        point = anneal.Point(250, 0.0, sign * good, sign * good, 1.0, 1.0, 1.0, 1.0, density)
        return anneal.Trained([point], trainer.FLOAT, 250, 250, 0, True, recipe.learning_rate)

    monkeypatch.setattr(trainer, "train", trained)
    recipe, tried = rate.find(given.pop("student"), given.pop("teacher"), **given)
    assert [one.rate for one in tried] == list(ends)
    assert recipe.learning_rate == 5e-2


def job(tmp_path) -> dict:
    spec = RnnSpec({"main": SectionSpec((LayerSpec("gru", 3, 6),), head=(LinearSpec(6, 4),), readout="last")})
    torch.manual_seed(0)
    teacher = teacher_network(spec, {name: torch.randn_like(t) for name, t in Network(spec).state_dict().items()})
    part = lambda n, seed: data.Part(torch.randn(n, 5, 3, generator=torch.Generator().manual_seed(seed)))
    recipe = Recipe(train={"steps": 500, "batch_size": 8, "precision": "float32"})
    task = tasks.resolve(recipe, spec, part(4, 1))
    parts = {"train": tasks.settled(task, part(64, 2)), "valid": tasks.settled(task, part(32, 3))}
    return {"student": student.of_recipe(teacher, recipe), "teacher": teacher, "task": task, "recipe": recipe, "out": tmp_path, **parts}


def test_the_best_of_real_short_runs_is_taken_and_the_student_stays(tmp_path):
    given = job(tmp_path)
    network, seen = given.pop("student"), []
    before = {name: t.clone() for name, t in network.state_dict().items()}
    recipe, tried = rate.find(network, given.pop("teacher"), report=seen.append, **given)
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    sign = 1 if given["task"].higher_is_better else -1
    assert recipe.learning_rate == max(tried, key=lambda one: sign * one.metric).rate
    assert len({one.metric for one in tried}) > 1
    assert {now["trying_rate"] for now in seen} == {one.rate for one in tried}
    assert {now["steps"] for now in seen} == {50}
    assert recipe.model_copy(update={"train": given["recipe"].train}) == given["recipe"]


def test_what_was_run_is_taken_up_again(tmp_path, monkeypatch):
    given = job(tmp_path)
    network, teacher = given.pop("student"), given.pop("teacher")
    first = rate.find(network, teacher, **given)
    monkeypatch.setattr(trainer.DistillTrainer, "train", lambda *_, **__: pytest.fail("trained again"))
    assert rate.find(network, teacher, resume=True, **given) == first


def test_a_rate_that_diverges_is_out(tmp_path, monkeypatch):
    given = job(tmp_path)
    train = trainer.train

    def diverges(*args, recipe, **kwargs):
        if recipe.learning_rate > 5e-4:
            raise DivergedError("the loss is nan")
        return train(*args, recipe=recipe, **kwargs)

    monkeypatch.setattr(trainer, "train", diverges)
    recipe, tried = rate.find(given.pop("student"), given.pop("teacher"), **given)
    assert recipe.learning_rate <= 5e-4
    assert tried[0] == anneal.Tried(1e-3, None)


def test_a_conversion_finds_and_reports_it(tmp_path):
    torch.manual_seed(0)
    torch.save(torch.nn.GRU(3, 6).state_dict(), tmp_path / "gru.pt")
    torch.save({"inputs": torch.randn(80, 5, 3)}, tmp_path / "data.pt")
    knobs = ["train.steps=500", "train.max_steps=500", "train.evaluate_every=250", "train.batch_size=8", "report.controls=false"]
    result = pipeline.convert(tmp_path / "gru.pt", data=tmp_path / "data.pt", out=tmp_path / "out", overrides=knobs)
    cost = result.report["cost"]
    assert cost["learning_rate"] in {one["rate"] for one in cost["tried_rates"]}
    assert cost["steps"] == 500
    assert len(cost["tried_rates"]) in (3, 4)
    assert not (tmp_path / "out.work").exists()


def test_training_that_diverges_starts_over_at_a_lower_rate(tmp_path, monkeypatch, caplog):
    torch.manual_seed(0)
    torch.save(torch.nn.GRU(3, 6).state_dict(), tmp_path / "gru.pt")
    torch.save({"inputs": torch.randn(80, 5, 3)}, tmp_path / "data.pt")
    train = trainer.train

    def diverges(student, *args, recipe, **kwargs):
        run = train(student, *args, recipe=recipe, **kwargs)
        if recipe.learning_rate > 2e-3:
            for p in student.parameters():
                p.detach().fill_(float("nan"))
            raise DivergedError("training diverged: the loss is nan at step 9; nothing was packed")
        return run

    monkeypatch.setattr(trainer, "train", diverges)
    knobs = ["train.steps=20", "train.max_steps=20", "train.evaluate_every=10", "train.batch_size=8", "report.controls=false"]
    knobs += ["budget.density=0.5"]
    given = {"data": tmp_path / "data.pt", "out": tmp_path / "out"}
    result = pipeline.convert(tmp_path / "gru.pt", overrides=knobs, **given)
    cost = result.report["cost"]
    assert [one["metric"] for one in cost["tried_rates"]] == [None, None]
    assert cost["learning_rate"] == pytest.approx(1.6e-3)
    assert "training diverged: the loss is nan at step 9; it starts over at a lower rate" in caplog.text
    with pytest.raises(DivergedError):
        pipeline.convert(tmp_path / "gru.pt", overrides=[*knobs, "train.learning_rate=0.01"], force=True, **given)
