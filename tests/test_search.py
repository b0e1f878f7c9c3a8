"""Searches: what is chosen, which knobs are searched, a stored study that goes on and is shared, a conversion that keeps two limits."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY
from hypothesis import given
from hypothesis import strategies as st
from test_cli import assert_refused, call

from rnn2bin import pipeline, recipe_yaml, reproduce, storage
from rnn2bin.distill import rate, trainer
from rnn2bin.errors import DivergedError, InterruptedRunError, RecipeError, UnreachableError, UsageError
from rnn2bin.search import descent, measured, picture, space, study
from rnn2bin.search.descent import AGAIN, LOWER
from rnn2bin.search.front import Found, Limits, choose, front, missed

optuna = pytest.importorskip("optuna")

TINY = ["train.steps=6", "train.max_steps=6", "train.evaluate_every=3"]
found_anywhere = st.builds(Found, st.floats(-0.1, 1), st.floats(0.01, 1), st.floats(0, 1))


def tiny(*extra: str):
    return recipe_yaml.read("smoke.yaml", overrides=[*TINY, *extra])


@pytest.fixture
def model(save_model) -> Path:
    return save_model(tokens=True, outputs=VOCABULARY)


@pytest.fixture
def data(tmp_path, save_data):
    """Three files of tokens; another number is another part held out."""

    def make(held_out: int = 3) -> list[str]:
        parts = {"train": (40, 1), "valid": (16, 2), "test": (16, held_out)}
        return [f"{name}={save_data(f'{name}{seed}.npz', n=n, seed=seed, tokens=True)}" for name, (n, seed) in parts.items()]

    return make


# ---------------------------------------------------------------------------------------------- what is chosen


@given(st.lists(found_anywhere, min_size=1, max_size=12))
def test_nothing_beats_the_front_and_the_front_beats_the_rest(found):
    best = front(found)
    better = lambda a, b: a.drop <= b.drop and a.density <= b.density and (a.drop, a.density) != (b.drop, b.density)
    assert not any(better(a, b) for a in found for b in best)
    assert all(any(better(b, a) or (a.drop, a.density) == (b.drop, b.density) for b in best) for a in found)
    assert [b.density for b in best] == sorted(b.density for b in best)


@given(st.lists(found_anywhere, min_size=1, max_size=12), st.floats(0, 0.5), st.floats(0.05, 1))
def test_the_fastest_that_surely_keeps_the_limits_is_chosen_or_the_nearest(found, max_drop, max_density):
    limits = Limits(max_drop, max_density)
    best, kept = choose(found, limits)
    assert kept == any(f.drop <= max_drop and f.density <= max_density for f in found)
    sure = [f for f in found if max(f.drop, f.highest) <= max_drop and f.density <= max_density]
    if sure:
        assert best in sure
        assert best.density == min(f.density for f in sure)
    elif kept:
        assert best.drop == min(f.drop for f in found if limits.keeps(f))
    else:
        assert limits.excess(best) == min(map(limits.excess, found)) > 0


def test_without_limits_the_bend_of_the_front_is_chosen():
    found = [Found(0.5, 0.1, 0.5), Found(0.05, 0.2, 0.05), Found(0.04, 0.6, 0.04), Found(0.9, 0.9, 0.9)]
    assert choose(found, Limits()) == (found[1], True)
    assert choose(found[:1], Limits()) == (found[0], True)


def test_the_line_of_exit_code_5_names_the_nearest_and_limits_that_it_keeps():
    nearest, limits = Found(0.021, 0.149, 0.03), Limits(0.005, 0.15)
    line = missed(nearest, limits)
    assert "0.005" in line
    assert "0.15" in line
    assert "0.021 at density 0.149" in line
    offered = float(line.split("--max-drop ")[1].split()[0])
    assert Limits(offered, 0.15).keeps(nearest)


# ---------------------------------------------------------------------------------------------- knobs


def test_every_knob_is_one_of_the_recipe_and_its_ends_are_allowed():
    found = space.read(tiny())
    assert set(found) == set(space.KNOBS)
    assert found[space.STEPS] == space.Choice((2, 6))
    with pytest.raises(TypeError):
        found["x"] = None  # type: ignore[index]


def test_a_yaml_changes_the_knobs(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text(
        "budget.density: {low: 0.1, high: 0.3}\ngates.copies: [1, 4]\nloss.task: null\ntrain.clip: {low: 0.1, high: 2, log: true}\n"
    )
    found = space.read(tiny(), file)
    assert found["budget.density"] == space.Range(0.1, 0.3)
    assert found["gates.copies"] == space.Choice((1, 4))
    assert found["train.clip"] == space.Range(0.1, 2.0, log=True)
    assert "loss.task" not in found
    assert "train.learning_rate" in found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train.stepz: [1, 2]", ("train.stepz", "unknown key", "did you mean steps")),
        ("budget.density: {low: 0.5, high: 0.2}", ("budget.density", "low must be less than high")),
        ("budget.density: {low: 0.5, high: 2}", ("budget.density", "at most 1")),
        ("train.clip: {low: 0, high: 1, log: true}", ("train.clip", "more than 0")),
        ("train.clip: {from: 0, to: 1}", ("unknown key from", "low, high, log")),
        ("train.clip: []", ("train.clip", "plain values")),
        ("- a", ("must be a map",)),
        ("a: &x 1", ("anchors",)),
    ],
)
def test_a_space_that_does_not_fit_is_refused_with_the_knob(tmp_path, text, words):
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        space.read(tiny(), tmp_path / "space.yaml")
    assert any(all(word in reason for word in words) for reason in caught.value.reasons), caught.value.reasons
    assert "space.yaml" in caught.value.reasons[0]


def test_a_limit_ends_the_range_of_densities():
    found = space.read(tiny("report.max_density=0.2"))
    assert found["budget.density"].high == pytest.approx(0.19)
    assert found["budget.density"].low == 0.05
    assert space.read(tiny("report.max_density=0.04"))["budget.density"].high == pytest.approx(0.03)


def test_the_recipe_of_a_trial_is_scaled_and_has_no_limits():
    base = recipe_yaml.read("g2p.yaml", overrides=["report.max_drop=0.1", "report.max_density=0.5"])
    made = space.applied(base, {"train.steps": 2000, "gates.copies": 2, "budget.density": 0.3})
    assert (made.train.steps, made.train.max_steps, made.train.evaluate_every) == (2000, 2000, 250)
    assert (made.gates.copies, made.budget.density, made.report.max_drop, made.report.max_density) == (2, 0.3, None, None)
    assert recipe_yaml.validate_text(recipe_yaml.dump(made), name="r") == made


def test_the_recipe_itself_is_the_first_trial_where_it_lies_in_the_ranges():
    first = space.start(tiny("budget.density=0.9", "gates.copies=4"), space.read(tiny()))
    assert first["gates.copies"] == 4
    assert first["train.steps"] == 6
    assert "budget.density" not in first


# ---------------------------------------------------------------------------------------------- limits of a conversion


def test_a_density_limit_sets_a_lower_budget_and_leaves_a_lower_one():
    limited = lambda limit, *extra: tiny(f"report.max_density={limit}", *extra).budget.density
    assert limited(0.15) == pytest.approx(0.14)
    assert limited(0.01) == pytest.approx(0.005)
    assert limited(0.15, "budget.density=0.1") == 0.1
    assert limited(0.15, "budget.density=0.3") == pytest.approx(0.14)
    again = tiny("report.max_density=0.15")
    assert recipe_yaml.validate_text(recipe_yaml.dump(again), name="r") == again


def steps_of(figures: list[tuple[float, float]], limits: Limits) -> list[str]:
    """Kinds of trainings that follow, when each gives the next of these (drop, upper end)."""
    found, kinds = [Found(*figures[0][:1], 0.1, figures[0][1])], []
    for drop, highest in [*figures[1:], (9, 9)]:
        kind = descent.following(found, limits)
        if kind is None:
            break
        kinds.append(kind)
        found.append(Found(drop, 0.1, highest))
    return kinds


def test_a_descent_goes_lower_while_the_drop_is_surely_kept_and_again_while_that_helps():
    limits = Limits(0.01, 0.15)
    sure, near, bad = (0.005, 0.008), (0.009, 0.02), (0.05, 0.06)
    assert steps_of([sure, sure, near], limits) == [LOWER, LOWER]
    assert steps_of([sure] * 9, limits) == [LOWER] * descent.FURTHER
    assert steps_of([near, sure, near], limits) == [AGAIN, LOWER]
    assert steps_of([bad, (0.049, 0.06)], limits) == [AGAIN]  # it did not help
    assert steps_of([bad, (0.03, 0.04), near, sure, near], limits) == [AGAIN, AGAIN, AGAIN, LOWER]


def command(name: str, model: Path, out: Path, data: list[str], *, knobs: list[str] = TINY) -> list[str]:
    words = [name, str(model), "--recipe", "smoke.yaml", "--out", str(out)]
    return words + [word for pair in knobs for word in ("--set", pair)] + [word for item in data for word in ("--data", item)]


def convert(model: Path, data: list[str], out: Path, **options: Any):
    return pipeline.convert(model, recipe="smoke.yaml", overrides=TINY, data=data, out=out, **options)


LOOSE = {"max_drop": 10.0, "max_density": 0.99}


def test_another_part_held_out_changes_nothing_that_is_chosen(model, data, tmp_path, monkeypatch):
    """To the bit: neither the trainer's selection nor the descent has seen it."""
    monkeypatch.setattr(descent, "FURTHER", 2)
    made = [convert(model, data(seed), tmp_path / f"OUT{seed}", **LOOSE) for seed in (3, 4)]
    assert len({storage.sha256(one.path / "model.safetensors") for one in made}) == 1
    assert made[0].report["search"] == made[1].report["search"]
    assert made[0].report["binary"]["metric"] != made[1].report["binary"]["metric"]
    trainings = made[0].report["search"]["trainings"]
    assert [t["after"] for t in trainings] == [[LOWER] * k for k in range(descent.FURTHER + 1)]
    assert [t["wanted_density"] for t in trainings] == pytest.approx([0.98 * 0.7**k for k in range(3)])
    assert sum(t["chosen"] for t in trainings) == 1
    assert made[0].report["cost"]["steps"] == next(t["steps"] for t in trainings if t["chosen"])


def test_further_trainings_keep_the_rate_that_the_first_one_found(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(descent, "FURTHER", 1)
    monkeypatch.setattr(rate, "BUDGET", replace(rate.BUDGET, shortest=1, bounds=(2, 2), rates=(2e-3, 3e-3, 4e-3), first=0))
    rates, train = [], trainer.train

    def noted(*args, recipe, **given):
        rates.append(recipe.learning_rate)
        return train(*args, recipe=recipe, **given)

    monkeypatch.setattr(trainer, "train", noted)
    report = convert(model, data(3), tmp_path / "OUT", **LOOSE).report
    assert len(report["search"]["trainings"]) == 2
    assert rates[-2:] == [report["cost"]["learning_rate"]] * 2
    assert rates[-1] in (2e-3, 3e-3, 4e-3)


@pytest.mark.slow
def test_a_search_sees_no_more_of_it(model, data, tmp_path):
    figures = []
    for seed in (3, 4):
        report = study.search(model, recipe=tiny(), data=data(seed), out=tmp_path / f"S{seed}", trials=5)
        figures.append([(t["drop"], t["density"], t["knobs"]) for t in report["trials"]])
    assert figures[0] == figures[1]


def test_what_chooses_has_no_test_part(model, data):
    job = pipeline.prepare(model, tiny(), data())
    assert measured.blind(job).parts.test is None
    assert job.parts.test is not None


def test_an_interrupted_descent_goes_on_to_the_same_bits_and_can_be_reproduced(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(descent, "FURTHER", 2)
    whole = convert(model, data(), tmp_path / "whole", **LOOSE)
    stopped: list[int] = []

    def stop(now: dict[str, Any]) -> None:
        if now.get("training") == 3 and now["step"] == 2 and not stopped:
            stopped.append(1)
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(InterruptedRunError, match="--resume"):
        convert(model, data(), tmp_path / "cut", progress=stop, **LOOSE)
    steps: list[tuple[int, int]] = []
    again = convert(
        model, data(), tmp_path / "cut", resume=True, progress=lambda now: steps.append((now.get("training", 1), now["step"])), **LOOSE
    )
    assert steps[0] == (3, 3)  # nothing that was trained is trained again
    assert storage.sha256(again.path / "model.safetensors") == storage.sha256(whole.path / "model.safetensors")
    assert again.report["search"] == whole.report["search"]
    assert not pipeline.work_folder(again.path).exists()
    assert reproduce.reproduce(whole.path)["reproduced"]


def test_limits_that_no_network_keeps_are_exit_5_with_the_nearest_and_another_drop_takes_the_trainings_up(model, data, tmp_path):
    knobs = [*TINY, "task=match"]  # held against the teacher itself, nothing is without a drop
    wanted = [*command("convert", model, tmp_path / "OUT", data(), knobs=knobs), "--max-density", "0.99"]
    refused = call(*wanted, "--max-drop", "0")
    assert_refused(
        refused, 5, "no network kept a relative drop of 0 at density 0.99", "the nearest has", "--max-drop", out=tmp_path / "OUT"
    )
    resumed = call(*wanted, "--max-drop", "10", "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert "step 1/6" not in resumed.stderr
    report = json.loads((tmp_path / "OUT" / "report.json").read_text())
    assert report["search"]["limits"] == {"max_drop": 10.0, "max_density": 0.99}


def test_a_density_limit_alone_refuses_what_reads_more(model, data, tmp_path):
    result = call(*command("convert", model, tmp_path / "OUT", data()), "--max-density", "0.1")
    assert_refused(result, 5, "density budget missed", "0.1", "relative drop", "--max-density", out=tmp_path / "OUT")


def test_the_plan_says_that_it_will_search(model, data):
    result = call("convert", model, "--recipe", "smoke.yaml", "--data", data()[0], "--max-drop", "0.1", "--max-density", "0.2", "--plan")
    assert result.exit_code == 0, result.stderr
    assert "at most 4 more trainings of 10 steps" in result.output
    assert "0.19, then 0.133" in result.output


def test_training_further_starts_with_bits_and_ends_in_half_the_steps():
    further = descent.recipe_of(recipe_yaml.read("anneal.yaml"), 0.1)
    assert (further.train.steps, further.max_steps, further.train.evaluate_every) == (2000, 2000, 125)
    assert further.gates.straight_through_from == 0
    assert (further.gates.slope.start, further.gates.temperature.start) == (3.0, 0.1)
    assert further.budget.density == 0.1


# ---------------------------------------------------------------------------------------------- the study


@pytest.fixture
def played(monkeypatch):
    """Trials that are not trained: two figures that follow from the knobs. Gives the recipes that were asked for."""
    seen: list[Any] = []

    def train(self, trial, recipe, folder):
        seen.append(recipe)
        density = recipe.budget.density
        drop = 0.002 / density + abs(recipe.train.learning_rate - 0.002) + 0.05 * (recipe.train.steps < 6)
        trial.set_user_attr("measured", {"highest": drop, "steps": recipe.train.steps, "seconds": 0.0, "curve": [(1.0, drop)]})
        return drop, density

    monkeypatch.setattr(study.Worker, "_train", train)
    return seen


def test_a_study_is_kept_and_goes_on(model, data, tmp_path, played):
    search = lambda trials: study.search(model, recipe=tiny("budget.density=0.5"), data=data(), out=tmp_path / "S", trials=trials)
    first = search(3)
    assert [t["number"] for t in first["trials"]] == [0, 1, 2]
    second = search(8)
    assert second["trials"][:3] == first["trials"]
    assert len(played) == len(second["trials"]) == 8
    search(8)
    assert len(played) == 8  # nothing left to do
    assert played[0].budget.density == 0.5  # the recipe as it is
    lengths = [recipe.train.steps for recipe in played]
    assert lengths.count(6) == 2  # the first, and one in four: the most promising short one at full length
    long = played[lengths.index(6, 1)]
    assert long.model_copy(update={"train": None}) in [r.model_copy(update={"train": None}) for r in played if r.train.steps == 2]
    assert xml.fromstring((tmp_path / "S" / "front.svg").read_text()).tag.endswith("svg")


def test_what_is_tried_follows_from_the_seed(model, data, tmp_path, played):
    def knobs(name: str, *stops: int, seed: int = 0) -> list[Any]:
        for trials in stops:
            report = study.search(model, recipe=tiny(), seed=seed, data=data(), out=tmp_path / name, trials=trials)
        return [t["knobs"] for t in report["trials"]]

    once = knobs("a", 6)
    assert once == knobs("b", 2, 6)  # stopped in between or not
    assert once != knobs("c", 6, seed=1)


def test_the_chosen_recipe_keeps_the_limits_and_none_is_exit_5(model, data, tmp_path, played):
    wanted = [*command("search", model, tmp_path / "S", data()), "--trials", "12"]
    result = call(*wanted, "--max-drop", "0.03", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    chosen = next(t for t in report["trials"] if t["number"] == report["chosen"])
    assert chosen["density"] == min(t["density"] for t in report["trials"] if t["drop"] <= 0.03)
    written = recipe_yaml.read(tmp_path / "S" / "recipe.yaml")
    assert written.budget.density == chosen["knobs"]["budget.density"]
    assert [json.loads(line)["number"] for line in result.stderr.splitlines()] == list(range(12))
    # The same trials, chosen among again: no training.
    count = len(played)
    refused = call(*wanted, "--max-drop", "0")
    assert_refused(SimpleLines(refused), 5, "the nearest has a relative drop of", "no recipe was written")
    assert len(played) == count
    assert not (tmp_path / "S" / "recipe.yaml").exists()
    assert json.loads((tmp_path / "S" / "search.json").read_text())["chosen"] is None
    assert f"*{report['chosen']}" in call(*wanted, "--max-drop", "0.03").output


class SimpleLines:
    """A result without the lines of finished trials."""

    def __init__(self, result):
        self.exit_code, self.output = result.exit_code, result.output
        self.stderr = "\n".join(line for line in result.stderr.splitlines() if not line.startswith("trial "))


def test_a_signal_keeps_the_study_and_the_trial(model, data, tmp_path, monkeypatch):
    """The trial waits with its checkpoint; the same command goes on in the middle of it."""
    steps: list[int] = []
    watch = study.Worker._watch

    def stop_once(self, trial, recipe):
        plain = watch(self, trial, recipe)

        def look(now):
            steps.append(now["step"])
            plain(now)
            if len(steps) == 4:
                signal.raise_signal(signal.SIGINT)

        return look

    monkeypatch.setattr(study.Worker, "_watch", stop_once)
    search = lambda: study.search(model, recipe=tiny(), data=data(), out=tmp_path / "S", trials=1)
    with pytest.raises(InterruptedRunError, match="the same command goes on"):
        search()
    report = search()
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [t["state"] for t in report["trials"]] == ["complete"]
    whole = study.search(model, recipe=tiny(), data=data(), out=tmp_path / "whole", trials=1)
    assert [(t["drop"], t["density"]) for t in whole["trials"]] == [(t["drop"], t["density"]) for t in report["trials"]]
    assert not list((tmp_path / "S" / "trials").glob("*/checkpoint-*"))


def test_convert_reproduces_the_chosen_recipe(model, data, tmp_path, monkeypatch):
    """The weights that the trial was judged by, bit for bit before they are rounded to fp16."""
    plain, weights = pipeline.distil, []

    def keep(*args, **options):
        network, trained = plain(*args, **options)
        weights.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        return network, trained

    monkeypatch.setattr(pipeline, "distil", keep)
    report = study.search(model, recipe=tiny(), data=data(), out=tmp_path / "S", trials=2)
    result = pipeline.convert(model, recipe=tmp_path / "S" / "recipe.yaml", data=data(), out=tmp_path / "OUT")
    at = [t["number"] for t in report["trials"]].index(report["chosen"])
    assert all(torch.equal(weights[at][name], tensor) for name, tensor in weights[-1].items())
    job = pipeline.prepare(model, tiny(), data())
    from rnn2bin.evaluation import load_model

    found = measured.measure(job, load_model(result.path).network)
    assert found.drop == pytest.approx(report["trials"][at]["drop"], abs=2e-3)  # fp16


@pytest.mark.parametrize("error", ["diverged", "unreachable", "behind"])
def test_a_trial_that_fails_is_told_and_the_search_goes_on(model, data, tmp_path, monkeypatch, error):
    told = {
        "diverged": DivergedError("training diverged: the loss is nan at step 1; lower it"),
        "unreachable": UnreachableError("budget.density: 0.05 cannot be reached; ask for more"),
    }
    if error in told:

        def distil(job, *args, **options):
            if job.recipe.train.steps == 2:
                raise told[error]
            return plain(job, *args, **options)

        plain = pipeline.distil
        monkeypatch.setattr(pipeline, "distil", distil)
    else:
        answers = iter([False, True])  # each of the trials is measured once before its last step
        monkeypatch.setattr(study, "behind", lambda progress, drop, rivals: next(answers))
    report = study.search(model, recipe=tiny("budget.density=0.05"), data=data(), out=tmp_path / "S", trials=2)
    stopped = [t["stopped"] for t in report["trials"] if t["state"] == "pruned"]
    if error in told:
        assert stopped == [told[error].reasons[0].split(";")[0]]
    else:
        assert stopped == ["behind at step 1"]
        assert not list((tmp_path / "S" / "trials").glob("*/"))
    assert report["chosen"] == 0


def test_behind_is_worse_than_the_median_of_those_that_read_no_more():
    rivals = [[(0.1, 0.9), (0.5, 0.2), (1.0, 0.1)], [(0.5, 0.3)], [(0.5, 0.4)]]
    assert study.behind(0.5, 0.31, rivals)
    assert not study.behind(0.5, 0.29, rivals)
    assert not study.behind(0.2, 9.0, rivals)  # too early
    assert not study.behind(0.5, 9.0, rivals[:2])  # too few
    assert not study.behind(0.4, 9.0, [*rivals[1:], [(0.45, 0.1)]])  # none of them was measured so early


def test_refusals(model, data, tmp_path, played, monkeypatch):
    search = lambda **options: study.search(model, recipe=tiny(), data=data(), **({"out": tmp_path / "S", "trials": 1} | options))
    search()
    with pytest.raises(UsageError, match="another model, recipe, data or knobs; --force"):
        search(overrides=["train.clip=2"])
    search(overrides=["train.clip=2"], force=True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    with pytest.raises(UsageError, match="holds something else"):
        search(out=tmp_path / "thesis")
    with pytest.raises(UsageError, match="not a data base URL"):
        search(out=tmp_path / "T", study="nonsense")
    from rnn2bin.errors import ResourceError

    with pytest.raises(ResourceError, match="the study cannot be read or written"):
        search(out=tmp_path / "T", study=f"sqlite:///{tmp_path}/none/study.db")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="torchrun is for one long conversion"):
        search(out=tmp_path / "T")


def test_without_optuna_it_says_what_to_install(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert_refused(call("search", model, "--recipe", "smoke.yaml", "--out", tmp_path / "S"), 2, "pip install 'rnn2bin[search]'")


def test_the_picture_holds_every_trial_and_the_limits():
    trials = [
        {"number": k, "drop": d, "density": p} for k, (d, p) in enumerate([(0.5, 0.1), (0.1, 0.2), (0.3, 0.3), (70.0, 0.4), (None, None)])
    ]
    report = {"trials": trials, "front": [0, 1], "limits": {"max_drop": 0.2, "max_density": 0.25}, "chosen": 1, "nearest": 1}
    drawn = xml.fromstring(picture.draw(report))
    kinds = [one.get("class") for one in drawn.iter()]
    assert (kinds.count("other"), kinds.count("best"), kinds.count("chosen"), kinds.count("limit")) == (4, 2, 1, 2)
    heights = [float(one.get("cy")) for one in drawn.iter() if one.get("class") == "other"]
    assert min(heights) == heights[3] >= picture.TOP - 1  # far off: on the upper edge
    alone = {**report, "trials": trials[:1], "front": [0], "chosen": None, "nearest": 0, "limits": {"max_drop": None, "max_density": None}}
    assert "nearest to the limits" in picture.draw(alone)


@pytest.mark.slow
def test_two_workers_share_a_study(model, data, tmp_path):
    wanted = [sys.executable, "-m", "rnn2bin", *command("search", model, tmp_path / "S", data()), "--trials", "8"]
    workers = [subprocess.Popen(wanted, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [worker.communicate(timeout=500)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], told
    took = [[line.split(":")[0] for line in text.splitlines() if line.startswith("trial")] for text in told]
    assert all(took)
    assert not set(took[0]) & set(took[1])
    report = json.loads((tmp_path / "S" / "search.json").read_text())
    assert len({json.dumps(t["knobs"]) for t in report["trials"]}) == len(report["trials"]) >= 8


@pytest.mark.slow
def test_a_killed_worker_gives_its_trial_back(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "HEARTBEAT", 1)
    monkeypatch.setattr(study, "GRACE", 3)
    long = ["train.steps=4000", "train.max_steps=4000", "train.evaluate_every=20"]
    wanted = [sys.executable, "-m", "rnn2bin", *command("search", model, tmp_path / "S", data(), knobs=long), "--trials", "1"]
    worker = subprocess.Popen(wanted, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "S" / "trials").glob("*/checkpoint-*/manifest.json")):
        assert worker.poll() is None
    worker.kill()
    worker.wait()
    time.sleep(4)
    steps: list[int] = []
    plain = study.Worker._watch

    def look(self, trial, recipe):
        inner = plain(self, trial, recipe)
        return lambda now: (steps.append(now["step"]), inner(now), _enough(steps))

    monkeypatch.setattr(study.Worker, "_watch", look)
    recipe = recipe_yaml.read("smoke.yaml", overrides=long)
    with pytest.raises(InterruptedRunError):
        study.search(model, recipe=recipe, data=data(), out=tmp_path / "S", trials=1)
    assert steps[0] > 10  # from its checkpoint


def _enough(steps: list[int]) -> None:
    if len(steps) == 2:
        signal.raise_signal(signal.SIGINT)
