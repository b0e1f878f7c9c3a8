"""The results table: how a row is trained, what it keeps of a report, and what tables and plot say of it (scripts/results.py)."""

import itertools
import json
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

from rnn2bin import cli, recipe_yaml
from rnn2bin.recipe import Recipe

ROOT = Path(__file__).parent.parent


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import results  # type: ignore[import-not-found]

    return results


def asked(results: ModuleType, case: str, budget: str = "none", levels: str = "learned", steps: int | None = None) -> Any:
    here = Path("demo")
    return results.Asked(case, budget, levels, steps, 0, here, here, here)


def recipe(results: ModuleType, wanted: Any) -> Recipe:
    """What the command of a row resolves to."""
    words = results.conversion(wanted, Path("FILE"), ["train=DATA"], steps=results.steps_of(wanted))
    given = {name: [value for key, value in itertools.pairwise(words) if key == name] for name in ("--recipe", "--source", "--set")}
    return recipe_yaml.resolve(given["--recipe"][0], given["--set"], source=next(iter(given["--source"]), None))


@pytest.mark.parametrize(
    ("budget", "rate", "batch", "steps"), [("none", 0.001, 64, 4000), ("0.25", 0.016, 32, 16_000), ("0.10", 0.016, 32, 16_000)]
)
def test_every_case_is_trained_by_the_same_rule(results, budget, rate, batch, steps):
    """But for `source`, task and metric, which say what the file is, fewer steps of the long cases, and the one batch that memory wants."""
    seen = {name: recipe(results, asked(results, name, budget)) for name in results.CASES}
    assert {name for name, one in seen.items() if one.train.batch_size != batch} == {"diacritics"}
    assert {name for name, one in seen.items() if one.train.steps != steps} == {"vad", "voice", "diacritics"}
    for one in seen.values():
        assert (one.learning_rate, one.budget.until, one.gates.copies, one.loss.task) == (rate, 0.2, "auto", 0.1)
        assert one.budget.density == (None if budget == "none" else float(budget))
        assert one.train.max_steps == one.train.steps == 8 * one.train.evaluate_every
    alike = {"source": None, "task": "auto", "metric": "auto"}
    trained = [
        one.model_copy(
            update={**alike, "train": one.train.model_copy(update={"batch_size": 1, "steps": 1, "max_steps": 1, "evaluate_every": 1})}
        )
        for one in seen.values()
    ]
    assert all(one == trained[0] for one in trained)
    assert seen["polyphone"].source.activations == ["relu", "none"]
    assert seen["vad"].source.input_shape == [576]


def test_strict_rows_differ_in_their_levels_alone(results):
    learned, strict = (recipe(results, asked(results, "dga", "none", levels)) for levels in ("learned", "strict"))
    assert strict.gates == learned.gates.model_copy(update={"levels": "strict"})
    assert strict.train == learned.train
    assert learned.report.float_same_compute
    assert learned.report.controls  # once a case: the float network's are the same in its other rows
    assert recipe(results, asked(results, "dga", "0.10")).report.float_same_compute  # every row's own


def test_steps_may_be_said(results):
    assert results.steps_of(asked(results, "voice", steps=7)) == 7
    assert recipe(results, asked(results, "voice", steps=80)).train.evaluate_every == 10


@pytest.fixture
def row(results, tmp_path, save_model, save_data) -> Any:
    """A row of a real conversion, with the figures of a benchmark as `rnn2bin bench` prints them."""
    words = ["convert", str(save_model()), "--recipe", "smoke.yaml", "--set", "train.steps=4", "--set", "report.controls=true"]
    more = ["--set", "report.float_same_compute=true", "--data", str(save_data()), "--out", str(tmp_path / "OUT"), "--json"]
    done = CliRunner().invoke(cli.main, [*words, *more])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    made = results.row_of(asked(results, "dga"), report, command=words, seconds={"all": 75.0, "student": 45.0, "processor": 24.0})
    assert (made["teacher"], made["binary"], made["drop"]) == (report["teacher"]["metric"], report["binary"]["metric"], report["drop"])
    assert made["controls"]["float_same_compute"] == report["controls"]["float_same_compute"]["metric"]
    assert made["density"]["read"] == report["density"]["read"]
    assert made["command"] == shlex.join(["rnn2bin", *words])
    assert json.loads(json.dumps(made)) == made
    rivals = {
        "ort int8": {"us_per_step": 3.0, "ratio": 1.5, "ci95": [1.4, 1.6]},
        "torch fp32": {"us_per_step": 9.0, "ratio": 4.5, "ci95": [4, 5]},
    }
    auto = {"call": "sequence", "compute": "auto", "density": 0.5, "us_per_step": 2.0, "rivals": rivals}
    made["bench"] = results.speeds({"rows": [auto, {**auto, "compute": "int8", "us_per_step": 1.0}]})
    return made


def test_a_conversion_is_timed_to_the_students_last_step(results, tmp_path):
    said = "import sys, time; print('{}', file=sys.stderr, flush=True); time.sleep(0.2); print('a word', file=sys.stderr); print([7])"
    report, seconds = results.converted([sys.executable, "-c", said], tmp_path / "row.log")
    assert report == [7]
    assert 0 < seconds["student"] < seconds["all"] - 0.19
    assert seconds["processor"] > 0
    assert (tmp_path / "row.log").read_text() == "{}\na word\n"
    with pytest.raises(SystemExit, match=r"exit code 5: .*row\.log"):
        results.converted([sys.executable, "-c", "raise SystemExit(5)"], tmp_path / "row.log")


def changed(row: Any, **changes: Any) -> Any:
    return {**row, **changes}


def lost(row: Any, value: float, low: float, high: float, *, read: float = 0.1, **changes: Any) -> Any:
    return {
        **row,
        "drop": {"value": value, "relative": value, "ci95": [low, high], "n": 9},
        "density": {**row["density"], "read": read},
        **changes,
    }


def test_rows_are_added_and_none_is_left_out(results, tmp_path):
    path = tmp_path / "rows.json"
    for k in range(3):
        results.append(path, {"case": "dga", "k": k, "text": "µ"})
    assert [one["k"] for one in results.read_rows(path)] == [0, 1, 2]
    assert len(path.read_text().splitlines()) == 5  # one a line


def test_speed_alone_is_measured_again(results, row, tmp_path, monkeypatch):
    wanted = results.Asked("dga", "none", "learned", None, 0, tmp_path, tmp_path, tmp_path)
    with pytest.raises(SystemExit, match="make it first"):
        results.bench_again(wanted, [row])
    (tmp_path / "results" / wanted.name).mkdir(parents=True)
    monkeypatch.setattr(results, "data_of", lambda asked: ["train=a", "test=b"])
    monkeypatch.setattr(results, "benched", lambda out, data: (None, f"{out.name} {data}"))
    again = results.bench_again(wanted, [changed(row, binary=0.25), changed(row, budget="0.10")])
    assert (again["binary"], again["bench"], again["bench_reason"]) == (0.25, None, "dga-none-learned b")
    assert again["drop"] == row["drop"]


def test_a_row_is_given_the_control_that_its_conversion_would_have_made(results, row, tmp_path, monkeypatch, save_model, save_data):
    wanted = results.Asked("dga", "none", "learned", None, 0, tmp_path, tmp_path, tmp_path)
    monkeypatch.setattr(results, "model_of", lambda asked: save_model())
    monkeypatch.setattr(results, "data_of", lambda asked: str(save_data()))
    monkeypatch.setattr(results, "recipe_name", lambda asked: "smoke.yaml")
    monkeypatch.setattr(results, "knobs_of", lambda asked, steps: [f"train.steps={steps}"])
    again = results.control_again(wanted, [changed(row, controls={"threshold_only": 0.5})])
    assert again["controls"] == {
        "threshold_only": 0.5,
        "float_same_compute": pytest.approx(row["controls"]["float_same_compute"], rel=1e-6),
    }
    assert again["drop"] == row["drop"]
    with pytest.raises(SystemExit, match="other data"):
        results.control_again(wanted, [changed(row, teacher=row["teacher"] * 1.01)])
    with pytest.raises(SystemExit, match="too old to say its rate"):
        results.control_again(wanted, [{name: value for name, value in row.items() if name != "learning_rate"}])


def test_the_table_says_what_the_rows_say(results, row):
    table, names = results.results_table, {"g2p": "the other", "dga": "the network"}
    first = lost(row, 0.01, -0.002, 0.03, read=0.77)
    sparse = lost(row, 0.0312, 0.02, 0.04, read=0.163, budget="0.10", controls={}, bench=None)
    again = lost(row, 0.02, 0.01, 0.03, read=0.149, budget="0.10", controls={}, bench=None)
    text = table.table([first, sparse, again], names)
    lines = [line for line in text.splitlines() if line.startswith("| the network")]
    assert len(lines) == 2  # the row made again takes the place of the one before
    assert "| 0.0100 (-0.0020 to 0.0300) |" in lines[0]
    assert "| 77.0% | 2.0 | 1.50 ort int8 |" in lines[0]
    assert f"| {row['controls']['threshold_only']:.4f} |" in lines[0]
    assert f"| **{row['binary']:.4f}** |" in lines[0]
    assert "0.8 of 1.2 min (0.4 of a core)" in lines[0]
    assert "| 0.0200 (0.0100 to 0.0300) | 2.00% | – | 14.9% | – | – |" in lines[1]
    assert "interval reaches 0: 1 of 1." in text
    assert "Density 0.10: the relative drop is at most 1%: 0 of 1 (not dga)." in text
    assert "Density 0.10: at most 0.15 is read on the test part: 1 of 1." in text


def test_the_short_table_has_a_line_a_network(results, row):
    rows = [row, changed(row, budget="0.10", binary=0.125), changed(row, levels="strict", binary=0.5), changed(row, case="vad")]
    lines = results.results_table.short_table(rows, {"dga": "D", "vad": "V"}).splitlines()[2:]
    assert [line[:4] for line in lines] == ["| D ", "| V "]
    assert "| – | 0.1250 (" in lines[0]
    assert "0.5000" not in lines[0]


def test_replaces_between_its_markers_only(results, tmp_path):
    table, page = results.results_table, tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    table.replace(page, "new")
    table.replace(page, "newer")
    assert page.read_text() == f"before\n{table.BEGIN}\nnewer\n{table.END}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(SystemExit, match=r"page\.md"):
        table.replace(page, "new")
    assert page.read_text() == "no markers"


def test_points_stand_where_the_rows_say(results, row):
    teacher = changed(row, teacher=-2.0)
    rows = [
        lost(teacher, 0.02, 0.01, 0.05, read=0.8),
        lost(teacher, 0.1, 0.04, 0.2, read=0.15, budget="0.10"),
        changed(row, levels="strict"),
    ]
    assert results.results_table.points(rows, "dga") == [pytest.approx((0.15, 5, 2, 10)), pytest.approx((0.8, 1, 0.5, 2.5))]
    assert len(results.results_table.points(rows, "dga", "strict")) == 1
    assert results.results_table.points(rows, "vad") == []


def test_plots(results, row, tmp_path):
    pytest.importorskip("matplotlib")
    empty, full = tmp_path / "empty.png", tmp_path / "full.png"
    results.results_table.plot([], {"dga": "D"}, empty)
    results.results_table.plot([lost(row, 0.02, 0.01, 0.05, read=0.8), lost(row, 0.1, 0.04, 0.2, budget="0.10")], {"dga": "D"}, full)
    assert full.read_bytes() != empty.read_bytes()


def test_the_pages_hold_what_the_rows_say(results):
    """docs/results.md and README.md are made from docs/results.json: a row or a page changed by hand is noticed."""
    rows, names, table = results.read_rows(results.ROWS), {name: case.what for name, case in results.CASES.items()}, results.results_table
    for page, text in (("docs/results.md", table.table(rows, names)), ("README.md", table.short_table(rows, names))):
        assert f"{table.BEGIN}\n{text}\n{table.END}" in (ROOT / page).read_text(encoding="utf-8"), f"{page}: scripts/results.py --table"


def test_text_parts_hold_out_what_the_teacher_never_saw(results):
    parts = results.text_parts("".join(map(str, range(10))) * 20)
    assert [len(parts[name]) for name in ("train", "valid", "test")] == [180, 10, 10]
    assert "".join(parts.values()) == "0123456789" * 20
