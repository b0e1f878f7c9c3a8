"""`convert --plan`: what it says is what a conversion then does, and it leaves nothing behind."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import CLASSES, VOCABULARY, WIDTH

from rnn2bin import cli, pack, pipeline, plan, recipe_yaml
from rnn2bin.distill import native
from rnn2bin.errors import RecipeError, ResourceError, UsageError
from rnn2bin.recipe import Recipe

KNOBS = ["train.steps=6", "train.max_steps=6", "train.evaluate_every=3"]


def smoke(*knobs: str):
    return recipe_yaml.read("smoke.yaml", overrides=[*KNOBS, *knobs])


def test_layers_task_and_counts(save_model, save_data):
    model = save_model(both=True, layers=2)
    data = save_data(targets=np.zeros(40, int), lengths=np.full(40, 5))
    found = plan.plan(model, smoke("gates.soft=[o, main.layers.1.f]"), data)
    layers = found["sections"]["main"]["layers"]
    assert [layer["gates"] for layer in layers] == [{"i": "binary", "f": "binary", "o": "soft"}, {"i": "binary", "f": "soft", "o": "soft"}]
    assert all(layer["directions"] == 2 for layer in layers)
    assert found["task"]["name"] == "classify"
    assert found["data"]["train"] == {"sequences": 32, "steps": 160}
    assert found["data"]["test"] == {"sequences": 4, "steps": 20}
    assert any("readout" in note for note in found["notes"])
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("network", "data", "how"),
    [
        ({"tokens": True, "outputs": VOCABULARY}, None, "sampled from the network"),
        ({"tokens": True, "outputs": VOCABULARY}, {"tokens": True}, "tokens without targets"),
        ({}, {}, "no targets"),
        ({}, {"targets": np.zeros((40, 9), int)}, "one a step"),
        ({}, {"targets": np.zeros((40, 9, CLASSES), np.float32)}, "floats"),
    ],
)
def test_how_the_task_was_decided(save_model, save_data, network, data, how):
    found = plan.plan(save_model(**network), smoke(), save_data(**data) if data is not None else None)
    assert how in found["task"]["how"]
    assert found["time"]["basis"] == f"estimated from {plan.PROBE_STEPS} probe steps on this machine"
    assert 0 < found["time"]["seconds"] <= found["time"]["seconds_at_most"] < 60


@pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")
def test_memory_is_that_of_the_kernels_that_run(tmp_path, save_data, monkeypatch):
    """The estimate was that of windows in torch, ten times what the kernels in C keep of sixteen decisions."""
    model, data = tmp_path / "m.pt", save_data()
    torch.save(torch.nn.ModuleDict({"rnn": torch.nn.LSTM(WIDTH, 40), "head": torch.nn.Linear(40, CLASSES)}).state_dict(), model)
    memory = lambda: plan.plan(model, smoke("gates.copies=16"), data)["memory"]["training_bytes"]
    in_c = memory()
    monkeypatch.setattr(native, "takes", lambda *_: False)
    assert memory() > 3 * in_c


def test_units_share_rows_where_the_recipe_says_so_for_the_task_that_the_data_are_of(tmp_path, save_data, monkeypatch):
    model, asked = tmp_path / "m.pt", []
    torch.save(torch.nn.ModuleDict({"rnn": torch.nn.LSTM(WIDTH, 40), "head": torch.nn.Linear(40, CLASSES)}).state_dict(), model)
    shared = lambda data, *knobs: plan.plan(model, smoke(*knobs), data)["sections"]["main"]["layers"][0]["shared"]
    labelled, priced = save_data("l.npz", targets=np.zeros((40, 9), int)), "budget.density=0.6"
    assert shared(labelled, priced) == 1
    assert shared(labelled, priced, "gates.share=2") == 2
    monkeypatch.setattr(Recipe, "share", lambda self, task: asked.append(task) or (2 if task == "match" else 1))
    assert (shared(save_data(), priced), shared(labelled, priced)) == (2, 1)
    assert set(asked) == {"match", "tag"}


def test_a_named_task_is_said_to_be_named(save_model, save_data):
    found = plan.plan(save_model(), smoke("task=match", "metric=mse"), save_data())
    assert found["task"]["how"] == found["task"]["metric_how"] == "named in the recipe"


def test_packed_size_is_what_is_packed(tmp_path, save_model):
    model = save_model(tokens=True, outputs=VOCABULARY, cell="GRU", layers=2)
    found = plan.plan(model, smoke(), None, tmp_path / "OUT")
    pipeline.convert(model, recipe=smoke(), out=tmp_path / "OUT")
    assert found["size"]["packed_bytes"] == pytest.approx(pack.packed_bytes(tmp_path / "OUT"), rel=0.05)


def test_checkpoints_fit_into_what_is_needed(tmp_path, save_model, monkeypatch):
    """Everything that lies beside OUT at the end of training, before it is removed."""
    monkeypatch.setattr(pipeline.shutil, "rmtree", lambda *_, **__: None)
    model = save_model(tokens=True, outputs=VOCABULARY)
    found = plan.plan(model, smoke(), None, tmp_path / "OUT")
    pipeline.run(model, smoke(), None, tmp_path / "OUT")
    lies = sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file() and f != model)
    assert lies <= found["disk"]["needed_bytes"]


def test_nothing_is_written_and_the_generator_is_left(tmp_path, save_model, save_data, monkeypatch):
    model, data = save_model(), save_data(targets=np.zeros((40, 9), int))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    plan.plan(model, smoke(), data)
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.npz", "model.pt"]


def test_disk(tmp_path, save_model, monkeypatch):
    model = save_model(tokens=True, outputs=VOCABULARY)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    found = plan.plan(model, smoke(), None, tmp_path / "far" / "away" / "OUT")
    assert (found["disk"]["enough"], found["disk"]["free_bytes"], found["disk"]["at"]) == (False, 1000, str(tmp_path))
    assert "NOT ENOUGH" in plan.render(found)
    with pytest.raises(ResourceError, match="needed for checkpoints"):
        pipeline.run(model, smoke(), None, tmp_path / "OUT")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pt"]


def test_the_control_needs_more_disk_and_time(save_model):
    model = save_model(tokens=True, outputs=VOCABULARY)
    one, two = plan.plan(model, smoke(), None), plan.plan(model, smoke("report.float_same_compute=true"), None)
    assert two["disk"]["needed_bytes"] > one["disk"]["needed_bytes"]


def test_refuses_what_convert_refuses(save_model):
    with pytest.raises(UsageError, match="no data"):
        plan.plan(save_model(), smoke(), None)
    with pytest.raises(RecipeError, match=r"gates\.soft"):
        plan.plan(save_model(tokens=True, outputs=VOCABULARY), smoke("gates.soft=[z]"), None)


def test_command(tmp_path, save_model):
    model = save_model(tokens=True, outputs=VOCABULARY)
    args = ["convert", str(model), "--recipe", "smoke.yaml", "--plan", "--out", str(tmp_path / "OUT")]
    text = CliRunner().invoke(cli.main, args)
    assert text.exit_code == 0, text.output
    assert "probe steps on this machine" in text.output
    assert "layer 0: lstm 5 -> 7, one direction; binary: i, f, o" in text.output
    found = json.loads(CliRunner().invoke(cli.main, [*args, "--json"]).stdout)
    assert found["steps"] == {"expected": 20, "at_most": 25, "evaluate_every": 10}
    assert not (tmp_path / "OUT").exists()


@pytest.mark.parametrize(("seconds", "text"), [(0.123, "0.12 s"), (12.3, "12 s"), (99.9, "100 s"), (600, "10 min"), (7200, "2.0 h")])
def test_clock(seconds, text):
    assert plan.clock(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.34e6, "2.34 MB"), (5e12, "5 TB")])
def test_size(count, text):
    assert plan.size(count) == text
