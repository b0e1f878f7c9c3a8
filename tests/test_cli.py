"""The command line from outside: help, exit codes with one clear line a reason, nothing left behind, and every task once, in seconds."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import CLASSES, HIDDEN, VOCABULARY, WIDTH, state_dict
from safetensors.torch import load_file

from rnn2bin import cli, pipeline, recipe_yaml, runtime
from rnn2bin.cells.grid import rounded
from rnn2bin.runtime import library

FAST = ["--recipe", "smoke.yaml", "--set", "train.steps=6", "--set", "train.max_steps=6", "--set", "train.evaluate_every=3"]
LABELS = np.random.default_rng(1).integers(0, CLASSES, 40)


def call(*args: Any) -> Result:
    """A command in this process. An exception that is not an exit is a bug: it is raised."""
    result = CliRunner().invoke(cli.main, [str(a) for a in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def convert(model: Path, *args: Any, data: Path | None = None) -> Result:
    """A fast conversion into OUT beside the model."""
    given = ["--data", data] if data else []
    return call("convert", model, *FAST, *given, "--out", model.parent / "OUT", *args)


def converted(model: Path, *args: Any, data: Path | None = None) -> dict[str, Any]:
    """The report of a fast conversion that must succeed."""
    result = convert(model, "--json", *args, data=data)
    assert result.exit_code == 0, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def assert_refused(result: Result, code: int, *words: str, out: Path | None = None) -> None:
    """The exit code, one line with these words on stderr, and nothing left of OUT."""
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert any(all(word in line for word in words) for line in lines), result.stderr
    assert all(line.startswith(("rnn2bin: ", "step ")) for line in lines), result.stderr
    assert "Traceback" not in result.output
    if out is not None:
        assert not out.exists()
        assert not out.with_name(out.name + ".partial").exists()


def commands(group: click.Group, prefix: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    found: list[tuple[tuple[str, ...], click.Command]] = []
    for name, command in group.commands.items():
        inner = commands(command, (*prefix, name)) if isinstance(command, click.Group) else []
        found += [((*prefix, name), command), *inner]
    return found


# ---------------------------------------------------------------------------------------------- help and start


@pytest.mark.parametrize("path", [p for p, _ in commands(cli.main)], ids=" ".join)
def test_every_command_has_help(path):
    result = call(*path, "--help")
    assert result.exit_code == 0
    command = dict(commands(cli.main))[path]
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name != "help":
            assert parameter.help, f"{path}: {parameter.name}"


ROOT = Path(__file__).parents[1]
DOCS = "".join(page.read_text(encoding="utf-8") for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("path", [p for p, c in commands(cli.main) if not isinstance(c, click.Group)], ids=" ".join)
def test_every_command_stands_in_the_docs(path):
    shown = f"rnn2bin {' '.join(path)}"
    assert re.search(rf"{shown}\b", DOCS), f"{shown}: in no *.md"


def test_every_option_of_a_search_and_of_limits_is_documented():
    page = (ROOT / "docs" / "search.md").read_text(encoding="utf-8")
    ordinary = {"--help", "--set", "--seed", "--json", "--force", "--recipe", "--data", "--out"}
    wanted = {option for parameter in cli.conversion.search.params for option in parameter.opts if option.startswith("--")} - ordinary
    assert {"--trials", "--study", "--space"} < wanted
    assert [option for option in sorted(wanted) if option not in page] == []


def test_the_commands_of_the_design_are_there():
    names = {" ".join(path) for path, _ in commands(cli.main)}
    recipes = {f"recipes {name}" for name in ("ls", "show", "cp", "validate", "schema")}
    wanted = {"convert", "search", "inspect", "eval", "run", "doctor", *recipes}
    assert wanted <= names
    listed = call("--help").output
    assert all(name in listed for name in names if " " not in name)


HEAVY = "{'torch', 'transformers', 'accelerate', 'numpy', 'pydantic', 'yaml', 'rich'}"


@pytest.mark.parametrize(
    "code",
    ["import rnn2bin", "import sys; sys.argv = ['rnn2bin', '--help']; from rnn2bin.cli import main; main(standalone_mode=False)"],
    ids=["import", "help"],
)
def test_starts_without_heavy_imports_in_time(code):
    check = f"{code}\nimport sys; found = {HEAVY} & set(sys.modules)\nif found: sys.exit(str(found))"
    seconds = []
    for _ in range(5):
        began = processor_seconds()
        done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
        seconds.append(processor_seconds() - began)
        assert done.returncode == 0, done.stderr
    assert min(seconds) < 0.3, seconds


def processor_seconds() -> float:
    """Of all processes that this one has waited for: what they wait for others on a busy machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_eight_bit_weights_are_trained_and_packed(tmp_path, save_data):
    """The knob reaches the student of a conversion: every matrix of a layer stands on its grid, and half the bytes are counted."""
    torch.save(state_dict(), tmp_path / "m.pt")
    data = save_data(targets=LABELS)
    dense = {w: converted(tmp_path / "m.pt", "--set", f"pack.weights={w}", "--force", data=data)["density"] for w in ("fp16", "int8")}
    assert dense["int8"]["dense_bytes_per_step"] < 0.6 * dense["fp16"]["dense_bytes_per_step"]
    assert json.loads((tmp_path / "OUT" / "config.json").read_text())["weights"] == "int8"
    found = load_file(tmp_path / "OUT" / "model.safetensors")
    for part in ("gates", "candidate"):
        rows = torch.cat([found[f"main.layers.0.fwd.{part}.weight_{side}"].float() for side in ("ih", "hh")], 1)
        assert torch.equal(rounded(rows)[0], rows)


# ---------------------------------------------------------------------------------------------- refusals


def test_missing_model_file(tmp_path, save_data):
    assert_refused(convert(tmp_path / "none.pt", data=save_data(targets=LABELS)), 2, "none.pt", "no such file", out=tmp_path / "OUT")


def test_missing_tensor_in_the_file(tmp_path, save_data):
    weights = state_dict()
    del weights["rnn.weight_hh_l0"]
    torch.save(weights, tmp_path / "m.pt")
    assert_refused(convert(tmp_path / "m.pt", data=save_data(targets=LABELS)), 3, "rnn", out=tmp_path / "OUT")


def test_wrong_shape_in_the_file(tmp_path, save_data):
    weights = state_dict()
    weights["rnn.weight_hh_l0"] = weights["rnn.weight_hh_l0"][:, :-1]
    torch.save(weights, tmp_path / "m.pt")
    assert_refused(convert(tmp_path / "m.pt", data=save_data(targets=LABELS)), 3, "weight_hh_l0", out=tmp_path / "OUT")


def test_of_a_source_the_file_alone(tmp_path, save_model, save_data):
    (tmp_path / "about.yaml").write_text("version: 1\ntask: match\ntrain: {steps: 9}\n")
    words = ["--source", tmp_path / "about.yaml", "--data", save_data(), "--out", tmp_path / "OUT"]
    report = json.loads(call("convert", save_model(), *FAST, *words, "--json").stdout)
    assert (report["task"], report["cost"]["steps"]) == ("match", 6)
    recorded = recipe_yaml.read(tmp_path / "OUT" / "recipe.yaml")  # resolved: it needs no second file
    assert (recorded.task, recorded.train.steps) == ("match", 6)


def test_recipe_typo(tmp_path, save_model):
    (tmp_path / "r.yaml").write_text("version: 1\ntrain:\n  stepz: 5\n")
    result = call("convert", save_model(), "--recipe", tmp_path / "r.yaml", "--out", tmp_path / "OUT")
    assert_refused(result, 2, "r.yaml:3:3", "stepz", "did you mean", "steps", out=tmp_path / "OUT")


def test_unknown_set_key(tmp_path, save_model):
    assert_refused(
        convert(save_model(), "--set", "train.stepz=5"), 2, "--set", "train.stepz", "did you mean", "steps", out=tmp_path / "OUT"
    )


def test_empty_data_file(tmp_path, save_model):
    (tmp_path / "d.npz").touch()
    assert_refused(convert(save_model(), data=tmp_path / "d.npz"), 2, "d.npz", "empty", out=tmp_path / "OUT")


def test_data_without_sequences(tmp_path, save_model, save_data):
    assert_refused(convert(save_model(), data=save_data(n=0)), 2, "no sequences", out=tmp_path / "OUT")


def test_data_with_nan(tmp_path, save_model, save_data):
    inputs = np.zeros((40, 9, WIDTH), np.float32)
    inputs[3, 2, 1] = np.nan
    assert_refused(convert(save_model(), data=save_data(inputs=inputs)), 2, "inputs[3, 2, 1]", "NaN", out=tmp_path / "OUT")


def test_wrong_width(tmp_path, save_model, save_data):
    data = save_data(inputs=np.zeros((40, 9, WIDTH + 1), np.float32))
    assert_refused(convert(save_model(), data=data), 2, f"(N,T,{WIDTH})", "(32, 9, 4)", out=tmp_path / "OUT")


def test_tokens_out_of_range(tmp_path, save_model, save_data):
    inputs = np.full((40, 9), VOCABULARY)
    assert_refused(convert(save_model(tokens=True), data=save_data(inputs=inputs)), 2, f"0…{VOCABULARY - 1}", out=tmp_path / "OUT")


def test_no_data_for_a_network_that_needs_it(tmp_path, save_model):
    assert_refused(convert(save_model()), 2, "no data", "--data FILE", "data: {path: FILE}", out=tmp_path / "OUT")


def test_no_such_data_file(tmp_path, save_model):
    assert_refused(convert(save_model(), data=tmp_path / "none.npz"), 2, "none.npz", "no such data file", out=tmp_path / "OUT")


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (np.full(40, CLASSES), ("classify", f"0…{CLASSES - 1}")),
        (np.zeros((40, 8), int), ("tag", "(40, 8)".replace("40", "32"), "(N,9)")),
        (np.zeros((40, 9, CLASSES + 1), np.float32), ("regress", "(32, 9, 5)", "(32, 9, 4)")),
        (np.zeros(39, int), ("39 sequences", "inputs 40")),
    ],
    ids=["class too large", "labels too short", "values too wide", "too few"],
)
def test_targets_that_do_not_fit(tmp_path, save_model, save_data, targets, words):
    assert_refused(convert(save_model(), data=save_data(targets=targets)), 2, *words, out=tmp_path / "OUT")


@pytest.mark.parametrize(("readout", "shape"), [("all", (40,)), ("last", (40, 9))])
def test_a_stated_readout_that_contradicts_the_targets(tmp_path, save_model, save_data, readout, shape):
    (tmp_path / "r.yaml").write_text(f"version: 1\nsource: {{readout: {readout}}}\n")
    data = save_data(targets=np.zeros(shape, int))
    result = call("convert", save_model(), "--recipe", tmp_path / "r.yaml", "--data", data, "--out", tmp_path / "OUT")
    assert_refused(result, 2, "source.readout", out=tmp_path / "OUT")


def test_a_gate_that_the_network_does_not_have_leaves_nothing(tmp_path, save_model):
    assert_refused(
        convert(save_model(tokens=True, outputs=VOCABULARY), "--set", "gates.soft=[z]"), 2, "gates.soft", "'z'", out=tmp_path / "OUT"
    )
    assert not pipeline.work_folder(tmp_path / "OUT").exists()


class Evil:
    def __reduce__(self):
        return os.system, ("touch EVIL",)


def test_malicious_pickle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("m.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"w": Evil()}))
        archive.writestr("archive/version", "3\n")
    assert_refused(convert(tmp_path / "m.pt"), 4, "m.pt", out=tmp_path / "OUT")
    assert not Path("EVIL").exists()
    assert call("inspect", "m.pt").exit_code == 4


def test_a_full_disk_is_refused_before_the_work(tmp_path, save_model, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    model = save_model(tokens=True, outputs=VOCABULARY)
    assert_refused(convert(model), 6, "1 kB free", "needed", out=tmp_path / "OUT")
    assert not pipeline.work_folder(tmp_path / "OUT").exists()


def test_an_unwritable_place_is_a_line_and_not_a_traceback(tmp_path, save_model):
    (tmp_path / "file").touch()
    result = call("convert", save_model(tokens=True, outputs=VOCABULARY), *FAST, "--out", tmp_path / "file" / "OUT")
    assert_refused(result, 6, "file")


def test_errors_as_json(tmp_path, save_model):
    result = convert(save_model(), "--json")
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert (error["code"], error["exit_code"]) == ("usage", 2)
    assert error["reasons"][0] in result.stderr


# ---------------------------------------------------------------------------------------------- OUT


def test_out_exists(tmp_path, save_model):
    model, out = save_model(tokens=True, outputs=VOCABULARY), tmp_path / "OUT"
    converted(model)
    before = (out / "report.json").read_bytes()
    assert_refused(convert(model), 2, "exists already", "--force")
    assert (out / "report.json").read_bytes() == before
    assert convert(model, "--force", "--seed", "3").exit_code == 0
    assert (out / "report.json").read_bytes() != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["OUT", "model.pt"]


def test_force_replaces_nothing_else(tmp_path, save_model):
    out = tmp_path / "OUT"
    out.mkdir()
    (out / "thesis.tex").write_text("years")
    assert_refused(convert(save_model(tokens=True, outputs=VOCABULARY), "--force"), 2, "--force replaces nothing else")
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]


def test_force_does_not_replace_another_model(tmp_path, save_model):
    out = tmp_path / "OUT"
    out.mkdir()
    (out / "config.json").write_text('{"model_type": "bert"}')
    result = convert(save_model(tokens=True, outputs=VOCABULARY), "--force")
    assert_refused(result, 2, "--force replaces nothing else")
    assert (out / "config.json").exists()


def test_max_drop_missed_writes_nothing_and_is_raised_without_training(tmp_path, save_model, monkeypatch):
    model, out = save_model(tokens=True, outputs=VOCABULARY), tmp_path / "OUT"
    real = pipeline.evaluation.evaluate_parts

    def worse(**options):
        report = real(**options)
        return {**report, "drop": {**report["drop"], "relative": 0.5}}

    monkeypatch.setattr(pipeline.evaluation, "evaluate_parts", worse)
    assert_refused(convert(model, "--max-drop", "0.1"), 5, "accuracy budget missed", "0.5", "0.1", "--max-drop", out=out)
    assert_refused(convert(model, "--max-drop", "0.6"), 2, "--resume", "--force", out=out)
    result = convert(model, "--max-drop", "0.6", "--resume")
    assert result.exit_code == 0, result.stderr
    assert "step 1/" not in result.stderr
    assert not pipeline.work_folder(out).exists()


def test_another_recipe_does_not_resume(tmp_path, save_model):
    model, out = save_model(tokens=True, outputs=VOCABULARY), tmp_path / "OUT"
    assert convert(model, "--max-drop", "0").exit_code in (0, 5)
    work = pipeline.work_folder(out)
    if not work.exists():  # nothing was lost
        pytest.skip("the tiny network lost nothing")
    assert_refused(convert(model, "--set", "train.learning_rate=0.1", "--resume"), 2, "another model, recipe or data", "--force", out=out)


# ---------------------------------------------------------------------------------------------- tasks


def test_json_is_one_document_and_progress_is_ndjson(tmp_path, save_model):
    result = convert(save_model(tokens=True, outputs=VOCABULARY), "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "OUT" / "report.json").read_text())
    lines = [json.loads(line) for line in result.stderr.splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"steps", "loss", "metric", "hard", "temperature"} <= set(lines[0])


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_data_free(tmp_path, save_model, cell):
    report = converted(save_model(tokens=True, outputs=VOCABULARY, cell=cell, layers=2))
    assert report["provenance"]["data_free"]
    assert (report["task"], report["metric"]["name"]) == ("next-token", "bits_per_token")
    assert {p.name for p in (tmp_path / "OUT").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "recipe.yaml",
        "report.json",
        "report.html",
        "README.md",
        "runtime",
    }
    assert {"Makefile", "main.c", "rnn2bin.h", "kernels"} <= {p.name for p in (tmp_path / "OUT" / "runtime").iterdir()}
    if library.library():
        assert report["native"]["metric"] == pytest.approx(report["binary"]["metric"], rel=1e-3)
        assert report["parity"]["steps"] > 0
        assert report["parity"]["flips_outside"] == 0


def test_tokens_have_their_names_without_data_too(tmp_path, save_model):
    tokens = [f"token-{n}" for n in range(VOCABULARY)]
    (tmp_path / "tokens.txt").write_text("\n".join(tokens))
    model = save_model(tokens=True, outputs=VOCABULARY)
    report = converted(model, "--set", f"data.vocabulary={tmp_path / 'tokens.txt'}")
    assert set(report["figures"]["heatmaps"][0]["tokens"]) <= set(tokens)
    (tmp_path / "tokens.txt").unlink()  # they stand in the packed directory by now
    again = call("eval", str(model), str(tmp_path / "OUT"), "--json")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["binary"] == report["binary"]


TASKS = [
    ("classify", {}, {"targets": LABELS}, "accuracy"),
    ("classify", {"both": True, "layers": 2}, {"targets": LABELS}, "accuracy"),
    ("classify", {"outputs": 1}, {"targets": LABELS % 2}, "accuracy"),
    ("tag", {"cell": "GRU"}, {"targets": np.tile(LABELS[:, None], 9), "lengths": 1 + LABELS * 2}, "accuracy"),
    ("tag", {"both": True}, {"targets": np.where(np.arange(9) < 3, -100, LABELS[:, None])}, "accuracy"),
    ("regress", {}, {"targets": np.ones((40, 9, CLASSES), np.float32)}, "mse"),
    ("regress", {"outputs": 9}, {"targets": np.ones((40, 9), np.float32)}, "mse"),  # as wide as the sequences are long
    ("regress", {"outputs": 1}, {"targets": np.ones((40, 9), np.float32)}, "mse"),
    ("regress", {"outputs": 1}, {"targets": np.ones(40, np.float32)}, "mse"),
    ("match", {}, {"lengths": 1 + LABELS * 2}, "cosine"),
    ("next-token", {"tokens": True, "outputs": VOCABULARY}, {"tokens": True, "lengths": 1 + LABELS * 2}, "bits_per_token"),
    ("next-token", {"tokens": True, "outputs": VOCABULARY}, {"tokens": True, "steps": 17}, "bits_per_token"),  # one step more than a window
]


@pytest.mark.parametrize(("task", "network", "arrays", "metric"), TASKS, ids=[f"{t[0]}-{i}" for i, t in enumerate(TASKS)])
def test_task_and_metric_follow_from_the_data(save_model, save_data, task, network, arrays, metric):
    report = converted(save_model(**network), data=save_data(**arrays))
    assert (report["task"], report["metric"]["name"]) == (task, metric)
    assert report["binary"]["n"] == 4
    assert all(np.isfinite(report[who]["metric"]) for who in ("teacher", "soft_student", "binary"))


def test_readout_is_chosen_by_the_data_and_kept_by_eval(tmp_path, save_model, save_data):
    """Targets made by the network's own mean readout: no other readout can do better."""
    weights = state_dict(both=True)
    rnn = torch.nn.LSTM(WIDTH, HIDDEN, bidirectional=True)
    rnn.load_state_dict({name.removeprefix("rnn."): t for name, t in weights.items() if name.startswith("rnn.")})
    inputs = 3 * torch.randn(120, 9, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mean = rnn(inputs.transpose(0, 1))[0].mean(0)
        targets = (mean @ weights["head.weight"].t() + weights["head.bias"]).argmax(-1)
    data, model = save_data(inputs=inputs.numpy(), targets=targets.numpy()), save_model(both=True)
    report = converted(model, data=data)
    assert report["teacher"]["metric"] == 1.0
    assert any("readout 'mean'" in note for note in report["provenance"]["notes"])
    other = save_data("other.npz", targets=LABELS)  # under which another readout may do better
    result = call("eval", model, tmp_path / "OUT", "--data", other, "--json")
    assert result.exit_code == 0, result.stderr


def test_separate_files_for_train_valid_and_test(save_model, save_data):
    files = [save_data(f"{name}.npz", n=n, seed=n, targets=LABELS[:n]) for name, n in (("train", 20), ("valid", 7), ("test", 5))]
    given = [arg for file in files for arg in ("--data", f"{file.stem}={file}")]
    assert converted(save_model(), *given)["binary"]["n"] == 5


@pytest.mark.parametrize("names", [("valid",), ("train", "train"), ("", "train")])
def test_impossible_choices_of_files(tmp_path, save_model, save_data, names):
    file = save_data(targets=LABELS)
    given = [arg for name in names for arg in ("--data", f"{name}={file}" if name else file)]
    assert_refused(convert(save_model(), *given), 2, "data:", out=tmp_path / "OUT")


def test_text(tmp_path, save_model):
    letters = "abcdefghijk"
    (tmp_path / "d.txt").write_text("".join(np.random.default_rng(0).choice(list(letters), 2000)) + letters)
    report = converted(save_model(tokens=True, outputs=VOCABULARY), data=tmp_path / "d.txt")
    assert report["task"] == "next-token"
    result = call("run", tmp_path / "OUT", "--data", tmp_path / "d.txt", "--json")
    assert json.loads(result.stdout)["outputs"] == [1, 2011, VOCABULARY]


# ---------------------------------------------------------------------------------------------- the other commands


@pytest.fixture(scope="module")
def once_packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT, converted once for all tests."""
    folder = tmp_path_factory.mktemp("packed")
    torch.save(state_dict(), folder / "model.pt")
    inputs = np.random.default_rng(0).normal(size=(40, 9, WIDTH)).astype(np.float32)
    np.savez(folder / "data.npz", inputs=inputs, targets=np.tile(LABELS[:, None], 9), lengths=1 + LABELS * 2)
    converted(folder / "model.pt", data=folder / "data.npz")
    return folder


@pytest.fixture
def packed(once_packed: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A network, data and OUT, to do with what a test likes."""
    shutil.copytree(once_packed, tmp_path, dirs_exist_ok=True)
    return tmp_path / "model.pt", tmp_path / "data.npz", tmp_path / "OUT"


def test_eval(packed):
    model, data, out = packed
    result = call("eval", model, out, "--data", data, "--json")
    assert result.exit_code == 0, result.stderr
    report, at_conversion = json.loads(result.stdout), json.loads((out / "report.json").read_text())
    for who in ("teacher", "binary"):
        assert report[who]["metric"] == pytest.approx(at_conversion[who]["metric"])  # the same held-out part
    assert {"value", "ci95"} <= set(report["drop"])
    assert "teacher" in call("eval", model, out, "--data", data).output


def test_eval_reads_all_of_a_file_it_has_not_seen(packed, save_data):
    model, _, out = packed
    count = 37
    fresh = save_data(
        "fresh.npz",
        inputs=np.random.default_rng(5).normal(size=(count, 9, WIDTH)).astype("float32"),
        targets=np.tile(LABELS[:count, None], 9),
    )
    for given in (fresh, f"test={fresh}"):
        result = call("eval", model, out, "--data", given, "--json")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["drop"]["n"] == count


def test_eval_reads_a_file_too_small_to_split(packed, save_data):
    model, _, out = packed
    one = save_data("one.npz", inputs=np.ones((1, 9, WIDTH), "float32"), targets=np.zeros((1, 9), "int64"))
    assert json.loads(call("eval", model, out, "--data", one, "--json").stdout)["drop"]["n"] == 1


def test_eval_numbers_new_text_by_the_packed_vocabulary(tmp_path, save_model):
    """New text need not hold every character; one that the network does not know is named."""
    model, old, new, odd = save_model(tokens=True, outputs=11), tmp_path / "old.txt", tmp_path / "new.txt", tmp_path / "odd.txt"
    old.write_text("abcdefghijk" * 200)
    new.write_text("kab" * 200)
    odd.write_text("xab" * 200)
    converted(model, data=old)
    result = call("eval", model, tmp_path / "OUT", "--data", new, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["teacher"]["n"] == 32  # streams side by side
    assert_refused(call("eval", model, tmp_path / "OUT", "--data", odd), 2, "not in the vocabulary, e.g. 'x'")


def test_eval_refuses_another_network(packed, save_model):
    _, data, out = packed
    assert_refused(call("eval", save_model("other.pt", layers=2), out, "--data", data), 2, "not made from a network of this shape")


def test_run(packed, tmp_path):
    _, data, out = packed
    result = call("run", out, "--data", data, "--out", tmp_path / "y.npz", "--json")
    assert json.loads(result.stdout) == {"sequences": 40, "outputs": [40, 7, CLASSES], "written": str(tmp_path / "y.npz")}
    with np.load(tmp_path / "y.npz") as written, np.load(data) as given:
        y, _ = runtime.load(out)(torch.tensor(given["inputs"][:, :7]).transpose(0, 1), lengths=torch.tensor(given["lengths"]))
        np.testing.assert_array_equal(written["outputs"], y.transpose(0, 1).numpy())
        np.testing.assert_array_equal(written["lengths"], given["lengths"])
    assert_refused(call("run", out, "--data", data, "--out", tmp_path / "y.npz"), 2, "y.npz", "new file")


def test_run_refusals(packed, tmp_path, save_data):
    model, data, out = packed
    assert_refused(call("run", tmp_path, "--data", data), 2, "not a packed directory")
    assert_refused(call("run", model, "--data", data), 2, "not a packed directory")
    assert_refused(call("run", out, "--data", data, "--backend", "abacus"), 2, "abacus", "torch")
    assert_refused(call("run", out, "--data", save_data("t.npz", tokens=True)), 2, "floats")
    (out / "model.safetensors").write_bytes(b"\0" * 100)
    assert_refused(call("run", out, "--data", data), 3, "model.safetensors")


def test_inspect(save_model):
    found = json.loads(call("inspect", save_model(), "--json").stdout)
    assert found["recognised"]["sections"]["main"]["layers"][0]["hidden_size"] == HIDDEN
    assert "rnn.weight_ih_l0" in call("inspect", save_model()).output


def test_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = json.loads(call("recipes", "ls", "--json").stdout)
    assert {"anneal.yaml", "smoke.yaml"} <= set(names)
    assert all(names.values())
    for name in names:
        assert name in call("recipes", "ls").output
        assert "version: 1" in call("recipes", "show", name).output
        assert call("recipes", "validate", name).exit_code == 0
    assert call("recipes", "cp", "smoke").exit_code == 0
    assert_refused(call("recipes", "cp", "smoke"), 2, "smoke.yaml", "exists already")
    resolved = json.loads(call("recipes", "validate", "smoke.yaml", "--set", "train.steps=3", "--json").stdout)
    assert resolved["train"]["steps"] == 3
    assert "train" in json.loads(call("recipes", "schema").stdout)["properties"]
    assert_refused(call("recipes", "show", "smok"), 2, "smok", "did you mean", "smoke")


# ---------------------------------------------------------------------------------------------- interruption


def test_interrupted_and_resumed(tmp_path, save_model):
    """SIGINT in the middle: exit 7, a checkpoint stays; without --resume the command says what to do, with it the run is finished."""
    model, out = save_model(tokens=True, outputs=VOCABULARY), tmp_path / "OUT"
    command = ["convert", str(model), "--recipe", "smoke.yaml", "--set", "train.steps=600", "--set", "train.max_steps=600"]
    command += ["--set", "train.evaluate_every=600", "--set", "report.controls=false", "--out", str(out), "--json"]
    process = subprocess.Popen([sys.executable, "-m", "rnn2bin", *command], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    first = json.loads(process.stderr.readline())
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 7, errors
    assert json.loads(output)["error"]["code"] == "interrupted"
    assert "--resume" in errors
    assert pipeline.work_folder(out).is_dir()
    assert not out.exists()
    assert_refused(call(*command), 2, "--resume goes on", "--force starts over", out=out)
    resumed = call(*command, "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    report = json.loads(resumed.stdout)
    begun_at = json.loads(resumed.stderr.splitlines()[0])["step"]
    assert begun_at > first["step"]
    assert report["cost"]["steps"] == 600
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["OUT", "model.pt"]


def test_the_bar_fits_a_terminal():
    """At 80 columns rich cut the step and the time left away."""
    now = {"metric": "sequence_accuracy", "hard": 12.3456, "temperature": 0.1, "slope": 10.5, "loss": 12.345}
    assert len("100000/100000 ━━━━━━━━━━━━ 0:00:00 ") + len(cli.progress.short(now)) <= 80
