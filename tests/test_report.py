"""What a report holds beyond its numbers: plots drawn again from it, worst examples, the file on disk, the model card."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_evaluation_html import EVIL, FULL, MINIMAL, TEXT, figures, parsed

from rnn2bin import data, tasks
from rnn2bin.cells.network import Network
from rnn2bin.data import IGNORE, TEXT_BLOCK, Names, Part
from rnn2bin.errors import DataError, UnsupportedError, UsageError
from rnn2bin.evaluation import html, stored
from rnn2bin.evaluation.html.examples import marked
from rnn2bin.evaluation.html.figures import Figures
from rnn2bin.evaluation.html.glance import tiles
from rnn2bin.evaluation.html.speed import machine, speed
from rnn2bin.evaluation.html.standing import standing
from rnn2bin.evaluation.worst import STEPS, shown, worst
from rnn2bin.gates.estimators import FLOAT
from rnn2bin.measure import Candidate, compare
from rnn2bin.recipe import Recipe
from rnn2bin.spec import DecodeSpec, EmbeddingSpec, LayerSpec, LinearSpec, RnnSpec, SectionSpec

SPEED = {
    "machine": {"cpu": "A processor", "isa": "avx2", "versions": {"torch": "2.13"}, "load_average": 0.1},
    "rows": [
        {
            "call": call,
            "steps_per_call": steps,
            "batch": 1,
            "compute": compute,
            "density": 0.2,
            "us_per_step": us,
            "rivals": {
                "ort int8": {"us_per_step": 2 * us, "ratio": 2.0, "ci95": [1.9, 2.1]},
                "torch fp32": {"us_per_step": 4 * us, "ratio": 4},
            },
        }
        for call, steps in (("sequence", 100), ("stream", 1))
        for compute, us in (("auto", 3.0), ("int8", 2.5))
    ],
}
STEP = {"input": "a", "target": "x", "teacher": "x", "binary": "y", "lost": 1.5}


def full(**fields: Any) -> dict[str, Any]:
    return copy.deepcopy(FULL) | fields


# ---------------------------------------------------------------------------------------------- plots


def test_a_page_is_drawn_again_from_the_report_alone() -> None:
    drawn = figures()
    report = full(figures=json.loads(json.dumps(drawn.to_dict())))
    assert html.render(report) == html.render(report, drawn)
    assert html.render(report).count("<svg") > html.render(full()).count("<svg")


def test_bits_survive_the_report() -> None:
    bits = np.random.default_rng(0).integers(0, 2, (7, 5))
    drawn = Figures([], [html.Heatmap("decoder", ["a"] * 7, [("o", bits, 40)])])
    (again,) = Figures.from_dict(drawn.to_dict()).heatmaps
    assert again.section == "decoder"
    assert again.rows[0][2] == 40
    assert np.array_equal(again.rows[0][1], bits)


def test_where_networks_stand() -> None:
    found = standing(full())
    assert found is not None
    rows = {row["name"]: row for row in found.rows}
    binary = rows["binary"]["interval"] or rows["binary, in C"]["interval"]
    assert found.teacher == rows["teacher"]["x"]
    assert binary[0] < rows["binary"]["x"] < binary[1] < found.teacher  # all of the interval is a loss
    assert rows["random gates"]["edge"] == "left"
    assert rows["random gates"]["text"] == "0.0%"
    assert rows["soft student"]["edge"] is None
    assert found.left <= min(row["x"] for row in found.rows)
    assert max(row["x"] for row in found.rows) <= found.right


def test_a_lower_metric_stands_on_the_other_side() -> None:
    report = full(metric={"name": "bits_per_token", "higher_is_better": False})
    report |= {"teacher": {"metric": 1.7}, "binary": {"metric": 1.8}, "soft_student": None, "native": None, "controls": None}
    report["drop"] = {"value": 0.1, "ci95": [0.05, 0.15]}
    found = standing(report)
    assert found is not None
    interval = found.rows[1]["interval"]
    assert found.teacher is not None
    assert found.teacher < interval[0] < found.rows[1]["x"] < interval[1]


def test_figures_at_a_glance() -> None:
    shown_ = {tile.label: (tile.value, tile.about) for tile in tiles(full(speed=SPEED))}
    assert shown_["words right"] == ("68.3%", "float network: 69.1%")
    assert shown_["worse by"] == ("0.8 points", "95%: 0.1 to 1.5")
    assert shown_["weights read"] == ("41%", "649 kB of 1.58 MB a step")
    assert shown_["speed"] == ("3 µs", "a step; onnxruntime int8: 6 µs")
    gained = full(drop={"value": -0.02, "ci95": [-0.03, 0.01]})
    assert {tile.label: tile.about for tile in tiles(gained)}["better by"] == "95%: −1.0 to 3.0"
    assert {tile.label for tile in tiles(MINIMAL)} == {"mean squared error", "worse by"}


def test_speed_is_that_of_the_default_arithmetic() -> None:
    panels = speed(full(speed=SPEED))
    assert [panel["title"] for panel in panels] == ["A sequence at once", "One step a call"]
    assert [(bar["name"], bar["text"], bar["ratio"]) for bar in panels[0]["bars"]] == [
        ("rnn2bin", "3 µs", ""),
        ("onnxruntime int8", "6 µs", "2 × (1.9 to 2.1)"),
        ("PyTorch fp32", "12 µs", "4 ×"),
    ]
    assert panels[0]["bars"][-1]["width"] == 100
    page = html.render(full(speed=SPEED))
    assert "100 steps a call" in page
    assert "other programs" not in page
    assert "other programs ran beside it" in machine({"speed": {"machine": {"load_average": 9.0}}})


def test_layers_are_drawn_one_by_one() -> None:
    report = full()
    report["density"]["layers"] = {
        "main.layers.0.fwd": {"weights_touched": 0.25, "weights": 1000},
        "main": {"weights_touched": 1.0},
    }
    page = html.render(report)
    assert 'aria-label="main.layers.0.fwd: 25%"' in page
    assert "of 1,000 weights" in page
    assert "main: output layer" in page


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ("a b c", "a b c", [("a b c", False)]),
        ("a x c", "a b c", [("a", False), ("x", True), ("c", False)]),
        ("a c", "a b c", [("a", False), ("·", True), ("c", False)]),
        ("", "a", [("", True)]),
        ("known (61%)", "known", [("known (61%)", False)]),
        ("made (61%)", "known", [("made (61%)", True)]),
    ],
)
def test_differences_are_marked(ours: str, theirs: str, expected: list[tuple[str, bool]]) -> None:
    assert marked(ours, theirs) == expected


def test_an_example_shows_every_step() -> None:
    right = STEP | {"binary": "x", "lost": -0.2}
    row = {"index": 3, "input": "ab", "target": "x x", "teacher": "x x", "binary": "x y", "difference": "1", "steps": [right, STEP]}
    page = html.render(full(worst=[row | {"metric": {"teacher": 1.0, "binary": 0.5}}]))
    parsed(page)
    strip = page[page.index('class="strip"') :]
    assert strip.count('<span class="wrong">y</span>') == 1
    assert "teacher 100%, binary 50%" in page
    assert 'height="10.0"' in strip
    evil = dict.fromkeys(("input", "target", "teacher", "binary"), EVIL) | {"lost": 1.0}
    assert "script" not in parsed(html.render(full(worst=[row | {"steps": [evil]}]))).tags


# ---------------------------------------------------------------------------------------------- worst examples


def networks(section: SectionSpec) -> tuple[Network, Network]:
    torch.manual_seed(3)
    teacher, other = Network(RnnSpec({"main": section})), Network(RnnSpec({"main": section}))
    with torch.no_grad():
        for network in (teacher, other):
            for parameter in network.parameters():
                parameter.uniform_(-1.5, 1.5)
    return teacher.eval(), other.eval()


def measured(task: tasks.Task, part: Part, teacher: Network, other: Network) -> dict[str, tasks.Measurement]:
    return compare(task, part, Candidate(teacher, FLOAT), {"binary": Candidate(other, FLOAT)})


def found(task: tasks.Task, part: Part, teacher: Network, other: Network, names: Names = Names()) -> list[dict[str, Any]]:  # noqa: B008
    both = measured(task, part, teacher, other)
    return worst(task, part, teacher=Candidate(teacher, FLOAT), binary=Candidate(other, FLOAT), measured=both, names=names)


LETTERS = tuple("abcdefg")
TOKENS = {"embedding": EmbeddingSpec(7, 3), "layers": (LayerSpec("lstm", 3, 4),)}


def test_worst_of_a_tagger() -> None:
    teacher, other = networks(SectionSpec(TOKENS["layers"], TOKENS["embedding"], (LinearSpec(4, 5),)))  # type: ignore[arg-type]
    inputs, lengths = torch.randint(7, (40, 60)), torch.randint(1, 61, (40,))
    targets = teacher(inputs.t()).y.argmax(-1).t().clone()
    targets[:, ::3] = IGNORE
    part = Part(inputs, lengths, targets)
    task = tasks.resolve(Recipe(), teacher.spec, part)
    rows = found(task, part, teacher, other, Names(LETTERS, tuple("vwxyz")))
    assert len(rows) == 6
    losses = [row["metric"]["teacher"] - row["metric"]["binary"] for row in rows]
    assert losses == sorted(losses, reverse=True)
    row = rows[0]
    at = row["index"]
    ours = other(inputs[at : at + 1, : lengths[at]].t()).y[:, 0].argmax(-1).tolist()
    start = next(k for k in range(60) if row["input"] == "".join(LETTERS[t] for t in inputs[at, k : k + len(row["steps"])].tolist()))
    assert len(row["steps"]) == min(STEPS, int(lengths[at]))
    for k, step in enumerate(row["steps"], start):
        assert step["input"] == LETTERS[inputs[at, k]]
        counted = int(targets[at, k]) != IGNORE
        assert step["target"] == ("vwxyz"[targets[at, k]] if counted else None)
        assert step["binary"] == ("vwxyz"[ours[k]] if counted else None)
        assert step["teacher"] == step["target"]  # the labels are the teacher's own
    assert max(step["lost"] for step in row["steps"]) > 0


def test_worst_of_a_classifier() -> None:
    section = SectionSpec(TOKENS["layers"], TOKENS["embedding"], (LinearSpec(4, 3),), "last")  # type: ignore[arg-type]
    teacher, other = networks(section)
    inputs = torch.randint(7, (300, 6))
    targets = teacher(inputs.t()).y.argmax(-1)
    part = Part(inputs, None, targets)
    rows = found(tasks.resolve(Recipe(), teacher.spec, part), part, teacher, other, Names(LETTERS, ("one", "two", "three")))
    for row in rows:
        at, names = row["index"], ("one", "two", "three")
        assert row["target"] == names[targets[at]]
        assert row["teacher"].startswith(row["target"])
        assert row["binary"].startswith(names[other(inputs[at][:, None]).y[0].argmax()])
        assert not row["binary"].startswith(row["target"])
    assert rows


def test_worst_of_text_carries_the_state_of_what_stood_before() -> None:
    teacher, other = networks(SectionSpec(TOKENS["layers"], TOKENS["embedding"], (LinearSpec(4, 7),)))  # type: ignore[arg-type]
    part = Part(torch.randint(7, (3, 2 * TEXT_BLOCK + 100)), stream=True)
    task = tasks.resolve(Recipe(), teacher.spec, part)
    rows = found(task, part, teacher, other, Names(LETTERS))
    later = [row for row in rows if row["index"] >= 3]
    assert later
    block, place = divmod(later[0]["index"], 3)
    text = "".join(LETTERS[t] for t in part.inputs[place].tolist())
    start = text.index(later[0]["input"], block * TEXT_BLOCK)
    guesses = other(part.inputs[place : place + 1].t()).y[:, 0].argmax(-1).tolist()
    assert "".join(step["binary"] for step in later[0]["steps"]) == "".join(LETTERS[g] for g in guesses[start : start + STEPS])
    assert "".join(step["target"] for step in later[0]["steps"]) == text[start + 1 : start + 1 + len(later[0]["steps"])]


def test_worst_of_an_encoder_decoder_runs_free() -> None:
    torch.manual_seed(0)
    encoder = SectionSpec((LayerSpec("gru", 3, 4),), EmbeddingSpec(7, 3), (), "final")
    decoder = SectionSpec((LayerSpec("gru", 3, 4),), EmbeddingSpec(5, 3), (LinearSpec(4, 5),))
    spec = RnnSpec({"encoder": encoder, "decoder": decoder}, DecodeSpec(start=1, end=0, max_length=6))
    teacher, other = Network(spec).eval(), Network(spec).eval()
    with torch.no_grad():
        for network in (teacher, other):
            for parameter in network.parameters():
                parameter.uniform_(-2, 2)
    inputs = torch.randint(7, (200, 5))
    written = teacher.generate(inputs.t()).t()
    part = Part(inputs, None, written, torch.full((200,), written.shape[1]))
    rows = found(tasks.resolve(Recipe(), spec, part), part, teacher, other, Names(LETTERS, tuple("EABCD")))
    row = rows[0]
    wanted = other.generate(inputs[row["index"]][:, None])[:, 0].tolist()
    wanted = wanted[: wanted.index(0)] if 0 in wanted else wanted
    assert row["binary"] == " ".join("EABCD"[t] for t in wanted)
    assert row["teacher"] == row["target"] != row["binary"]


def test_values_have_steps_without_answers() -> None:
    teacher, other = networks(SectionSpec((LayerSpec("gru", 3, 4),), None, (LinearSpec(4, 2),)))
    part = Part(torch.randn(9, 8, 3))
    rows = found(tasks.resolve(Recipe(), teacher.spec, part), part, teacher, other)
    assert rows[0]["input"] == "8 steps of 3 numbers"
    assert {step.get("teacher") for step in rows[0]["steps"]} == {None}
    assert all(step["lost"] >= 0 for step in rows[0]["steps"])


def test_nothing_lost_is_no_example() -> None:
    teacher, _ = networks(SectionSpec((LayerSpec("gru", 3, 4),), None, (LinearSpec(4, 2),)))
    part = Part(torch.randn(9, 8, 3))
    assert found(tasks.resolve(Recipe(), teacher.spec, part), part, teacher, teacher) == []


def test_a_long_pad_is_cut() -> None:
    assert shown(torch.tensor([1, 2, *[0] * 40]), LETTERS) == "bcaa"
    assert shown(torch.tensor([1, 2, 0, 0, 0]), LETTERS) == "bcaaa"


# ---------------------------------------------------------------------------------------------- names


def test_names_of_tokens_and_classes(tmp_path: Path) -> None:
    teacher, _ = networks(SectionSpec(TOKENS["layers"], TOKENS["embedding"], (LinearSpec(4, 5),)))  # type: ignore[arg-type]
    np.savez(tmp_path / "d.npz", inputs=np.zeros((30, 4), int), targets=np.zeros((30, 4), int))
    tokens, labels = tmp_path / "tokens.txt", tmp_path / "labels.txt"
    tokens.write_text("\n".join(LETTERS) + "\n")
    labels.write_text("v\nw\nx\n\nz\n")
    recipe = Recipe.model_validate({"data": {"vocabulary": str(tokens), "labels": str(labels)}})
    parts = data.load_parts(tmp_path / "d.npz", recipe, teacher.spec)
    assert parts is not None
    assert parts.names == Names(LETTERS, ("v", "w", "x", "", "z"))
    labels.write_text("v\n")
    with pytest.raises(DataError, match=r"1 labels, but the network knows 5; data.labels"):
        data.load_parts(tmp_path / "d.npz", recipe, teacher.spec)


# ---------------------------------------------------------------------------------------------- on disk


def folder(path: Path, **fields: Any) -> Path:
    path.mkdir()
    stored.write(path, full(figures=figures().to_dict(), **fields))
    return path


def test_speed_is_added_to_a_report(tmp_path: Path) -> None:
    out = folder(tmp_path / "OUT")
    before = stored.read(out)
    stored.add(out, speed=SPEED)
    after = stored.read(out / "report.json")
    assert after.pop("speed") == json.loads(json.dumps(SPEED))
    assert after == before
    page = (out / "report.html").read_text()
    assert "onnxruntime int8" in page
    assert TEXT.split()[0][0] in page
    assert "## Speed" in (out / "README.md").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "report.html", "report.json"]


def test_a_card_that_was_edited_stays(tmp_path: Path) -> None:
    out = folder(tmp_path / "OUT")
    (out / "README.md").write_text("license: mine")
    stored.add(out, speed=SPEED)
    assert (out / "README.md").read_text() == "license: mine"
    assert "onnxruntime int8" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "not a JSON object"),
        ("{}", "not a report of rnn2bin"),
        (json.dumps(FULL | {"schema_version": 99}), "reads up to 1: update it"),
        (json.dumps(FULL | {"gates": 5}), "a damaged report"),
        (json.dumps(FULL | {"figures": {"heatmaps": [{"section": "main", "rows": [{"gate": "o"}]}]}}), "a damaged report"),
        (json.dumps(FULL | {"training": [3]}), "a damaged report"),
        (json.dumps(FULL | {"drop": None}), "not a report"),
    ],
)
def test_a_damaged_report_is_refused_in_a_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(UnsupportedError, match=message) as caught:
        stored.add(tmp_path, speed=SPEED)
    assert len(caught.value.reasons) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    with pytest.raises(UsageError, match="no such report"):
        stored.read(tmp_path / "none")


# ---------------------------------------------------------------------------------------------- the card


def test_the_hub_reads_the_card() -> None:
    from huggingface_hub import ModelCard

    card = ModelCard(html.render_card(full(task="tag", speed=SPEED)))
    assert card.data.library_name == "rnn2bin"
    assert card.data.pipeline_tag == "token-classification"
    assert {"rnn", "gru", "binary-gates"} <= set(card.data.tags or [])
    (result,) = card.data.eval_results or []
    assert (result.metric_type, result.metric_value, result.metric_name) == ("sequence_accuracy", 0.683, "words right")
    assert card.data.license is None
    assert "AutoModelForTokenClassification" in card.text
    assert "onnxruntime int8" in card.text


def test_a_name_cannot_leave_the_front_matter() -> None:
    from huggingface_hub import ModelCard

    report = full()
    report["provenance"]["source"] = report["metric"]["label"] = "x\n---\nlicense: mit\ntags: [evil]\n---"
    card = ModelCard(html.render_card(report))
    assert card.data.license is None
    assert "evil" not in card.data.tags
    assert "\n---\n" not in card.text


def test_the_card_says_its_limits() -> None:
    report = full(native=None)
    report["provenance"]["data_free"] = True
    limits = re.search(r"## Limits\n\n(.*?)\n\n", html.render_card(report), re.S)
    assert limits is not None
    for text in ("3,000 sequences", "made up, not on real ones", "reads 41%", "native runtime was not measured", "69.5%"):
        assert text in limits[1]


# ---------------------------------------------------------------------------------------------- rnn2bin bench --save


@pytest.fixture
def benched(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Directories that were measured, in no time."""
    from rnn2bin import bench, packed
    from rnn2bin import spec as specs

    seen: list[Path] = []
    content = specs.to_dict(RnnSpec({"main": SectionSpec((LayerSpec("gru", 3, 4),), None)}))
    monkeypatch.setattr(packed, "read_config", lambda path: {"spec": content})
    monkeypatch.setattr(bench, "bench", lambda path, *_: seen.append(path) or SPEED)
    monkeypatch.setattr(bench, "render", lambda found: "benched")
    return seen


def test_bench_saves_into_the_report(tmp_path: Path, benched: list[Path]) -> None:
    from click.testing import CliRunner

    from rnn2bin import cli

    out = folder(tmp_path / "OUT")
    assert CliRunner().invoke(cli.main, ["bench", str(out)]).exit_code == 0
    assert "speed" not in stored.read(out)
    result = CliRunner().invoke(cli.main, ["bench", str(out), "--save"])
    assert result.exit_code == 0, result.output
    assert stored.read(out)["speed"] == json.loads(json.dumps(SPEED))
    assert "onnxruntime int8" in (out / "report.html").read_text()


def test_bench_measures_nothing_where_it_could_not_save(tmp_path: Path, benched: list[Path]) -> None:
    from click.testing import CliRunner

    from rnn2bin import cli

    result = CliRunner().invoke(cli.main, ["bench", str(tmp_path), "--save"])
    assert result.exit_code == 2
    assert "no such report" in result.output
    assert benched == []
