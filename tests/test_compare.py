"""`rnn2bin compare`: two reports side by side, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_evaluation_html import EVIL, FULL, parsed
from test_report import SPEED

from rnn2bin import cli
from rnn2bin.errors import UnsupportedError, UsageError
from rnn2bin.evaluation import html
from rnn2bin.evaluation.comparing import compare


def report(path: Path, **fields: Any) -> Path:
    content = copy.deepcopy(FULL)
    content["provenance"] |= {"data_sha256": "d" * 64, "recipe": {"train": {"steps": 10, "rate": 0.1}, "budget": {}}}
    for name, value in fields.items():
        content[name] = content[name] | value if isinstance(content.get(name), dict) else value
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    density = {"weights_touched": 0.2, "bytes_per_step": 324_456}
    other = {
        "binary": {"metric": 0.6},
        "drop": {"value": 0.091, "relative": 0.13, "ci95": [0.08, 0.1], "n": 3000},
        "density": density,
        "speed": SPEED,
        "provenance": {"recipe": {"train": {"steps": 20, "rate": 0.1}, "budget": {"density": 0.2}}},
    }
    return report(tmp_path / "a.json"), report(tmp_path / "b.json", **other)


def test_every_figure_of_both(pair: tuple[Path, Path]) -> None:
    found = compare(*pair)
    figures = {figure["name"]: figure for figure in found["figures"]}
    assert figures["binary"] == {"name": "binary", "a": 0.683, "b": 0.6, "difference": pytest.approx(-0.083), "better": "a"}
    assert (figures["drop"]["better"], figures["weights_touched"]["better"]) == ("a", "b")
    assert figures["teacher"]["better"] is None
    assert figures["us_per_step sequence, batch 1"] == {
        "name": "us_per_step sequence, batch 1",
        "a": None,
        "b": 3.0,
        "difference": None,
        "better": None,
    }
    assert found["recipe"] == {"train.steps": [10, 20], "budget.density": [None, 0.2]}
    assert found["overlap"] is False
    assert found["warnings"] == []
    assert json.loads(json.dumps(found)) == found


def test_a_lower_metric_is_judged_the_other_way(tmp_path: Path) -> None:
    metric = {"name": "bits_per_token", "higher_is_better": False}
    found = compare(report(tmp_path / "a", metric=metric), report(tmp_path / "b", metric=metric, binary={"metric": 0.7}))
    assert next(f for f in found["figures"] if f["name"] == "binary")["better"] == "a"


def test_the_verdict() -> None:
    found = {"figures": [], "overlap": None, "drop_ci95": [None, None]}
    assert html.comparison.verdict(found) == "Nothing was measured in both."
    drop = {"name": "drop", "a": 0.1, "b": 0.2, "difference": 0.1, "better": "a"}
    read = {"name": "weights_touched", "a": 0.5, "b": 0.25, "difference": -0.25, "better": "b"}
    both = found | {"figures": [drop, read], "overlap": False}
    assert html.comparison.verdict(both) == "A lost less, beyond both intervals; B reads less of the weights (A 50%, B 25%)."
    assert "do not tell the two apart" in html.comparison.verdict(both | {"overlap": True})


def test_the_page_and_the_table(pair: tuple[Path, Path], tmp_path: Path) -> None:
    target = tmp_path / "F.html"
    result = CliRunner().invoke(cli.main, ["compare", *map(str, pair), "--out", str(target)])
    assert result.exit_code == 0, result.output
    assert "budget.density" in result.output
    assert result.output.isascii()
    assert "+8.3" in result.output
    page = target.read_text()
    parsed(page)
    assert "8.0 to 10.0" in page
    assert page.count("<circle") == 2
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".part"]
    as_json = CliRunner().invoke(cli.main, ["compare", *map(str, pair), "--json"])
    assert json.loads(as_json.stdout) == json.loads(json.dumps(compare(*pair)))


def test_other_data_is_said_loudly(tmp_path: Path) -> None:
    one, other = report(tmp_path / "a"), report(tmp_path / "b", provenance={"data_sha256": "e" * 64, "source_sha256": "f"}, drop={"n": 5})
    found = compare(one, other)
    assert [text.split(" differ")[0] for text in found["warnings"]] == [
        "the held-out data",
        "the number of held-out sequences",
        "the source networks",
    ]
    assert html.render_comparison_table(found).startswith("WARNING: the held-out data differ")
    assert html.render_comparison(found).count('role="alert"') == 3


def test_other_metrics_are_refused(tmp_path: Path) -> None:
    one, other = report(tmp_path / "a"), report(tmp_path / "b", metric={"name": "mse"}, task="match")
    with pytest.raises(UsageError) as caught:
        compare(one, other)
    assert [reason.split(" is ")[0] for reason in caught.value.reasons] == ["compare: task", "compare: metric"]
    result = CliRunner().invoke(cli.main, ["compare", str(one), str(other), "--out", str(tmp_path / "F.html")])
    assert result.exit_code == 2
    assert not (tmp_path / "F.html").exists()


def test_what_is_no_report_is_refused(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="no such report"):
        compare(pair[0], tmp_path / "none")
    (tmp_path / "x.json").write_text('{"schema_version": 1}')
    with pytest.raises(UnsupportedError, match="not a report of rnn2bin"):
        compare(pair[0], tmp_path / "x.json")


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    evil = {"source": EVIL, "recipe": {EVIL: EVIL}}
    found = compare(report(tmp_path / "a"), report(tmp_path / "b", provenance=evil, metric={"label": EVIL + "\x1b[2J"}))
    assert "script" not in parsed(html.render_comparison(found)).tags
    assert "\x1b" not in html.render_comparison_table(found)
