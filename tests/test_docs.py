"""What the documentation shows runs: doctests, the Python of README and pages. scripts/docs.sh builds the site itself."""

from __future__ import annotations

import doctest
import functools
import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import rnn2bin

ROOT = Path(__file__).parent.parent
FEW = ["train.steps=4", "train.max_steps=4", "train.evaluate_every=2", "report.controls=false"]
LEAVE = ("rnn2bin.__main__", "rnn2bin.fuzz")


def modules() -> list[str]:
    return [one.name for one in pkgutil.walk_packages(rnn2bin.__path__, "rnn2bin.") if one.name not in LEAVE]


def test_docstrings_do_what_they_show() -> None:
    """Every example in a docstring that is not skipped."""
    tried = 0
    for name in ["rnn2bin", *modules()]:
        source = importlib.util.find_spec(name).origin or ""  # type: ignore[union-attr]
        if not source.endswith(".py") or ">>>" not in Path(source).read_text(encoding="utf-8"):
            continue
        found = doctest.testmod(importlib.import_module(name))
        assert found.failed == 0, name
        tried += found.attempted
    assert tried > 0


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)


@pytest.fixture
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The files and names that the pages speak of, and few training steps."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    weights = {"embedding.weight": (7, 3), "lstm.weight_ih_l0": (16, 3), "lstm.weight_hh_l0": (16, 4)}
    weights |= {"lstm.bias_ih_l0": (16,), "lstm.bias_hh_l0": (16,), "fc.weight": (7, 4), "fc.bias": (7,)}
    torch.save({name: torch.randn(shape) for name, shape in weights.items()}, "model.pt")
    np.savez("data.npz", inputs=np.random.default_rng(0).integers(0, 7, (40, 6)))
    real = rnn2bin.convert

    def few(source: Any, **options: Any) -> Any:
        return real(source, **options | {"overrides": [*options.get("overrides", ()), *FEW], "force": True})

    monkeypatch.setattr(rnn2bin, "convert", functools.wraps(real)(few))
    return {
        "x": torch.randint(7, (5, 2)),
        "x_t": 3,
        "any_nn_module": torch.nn.GRU(3, 4),
        "batches": [torch.randn(5, 2, 3) for _ in range(10)],
        "my_loss": lambda output, batch: output[0].square().mean(),
    }


@pytest.mark.parametrize("page", ["README.md", "docs/ecosystem.md"])
def test_the_python_of_a_page_runs(page: str, surroundings: dict[str, Any]) -> None:
    rnn2bin.convert("model.pt", data="data.npz", out="OUT")  # what a page without a conversion of its own loads
    found = blocks(page)
    assert found
    for block in found:
        exec(compile(block, page, "exec"), surroundings)


def test_the_tutorial_runs(surroundings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks("docs/tutorial.md"):
        exec(compile(block, "docs/tutorial.md", "exec"), surroundings)
    assert surroundings["result"].report["teacher"]["metric"] > 0.9  # the float network learned it
    assert Path("counter-sparse.rnn2bin/report.html").is_file()
    assert "gru" in capsys.readouterr().out
    report = surroundings["result"].report
    (heat,) = report["figures"]["heatmaps"]
    assert len(heat["tokens"]) == 20
    assert set(heat["tokens"]) <= set("0123")
    assert {len(row["units"][0]) for row in heat["rows"]} == {20}
    assert {len(one["before"]) for one in report["figures"]["histograms"]} == {40}
    assert all(row["target"] in "01" and row["binary"][0] != row["target"] for row in report["worst"])
    page = Path("counter.rnn2bin/report.html").read_text(encoding="utf-8")
    assert "Decisions along one sequence" in page
    assert "main.layers.0.fwd: " in page


def test_a_card_of_a_packed_directory_runs(surroundings: dict[str, Any]) -> None:
    rnn2bin.convert("model.pt", data="data.npz", out="OUT")
    card = Path("OUT/README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", card, re.S)
    exec(block, surroundings)
    assert surroundings["y"].shape == (5, 2, 7)


def test_every_page_of_the_menu_is_there() -> None:
    class Loose(yaml.SafeLoader):
        pass

    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for one in (entry.values() if isinstance(entry, dict) else entry) for page in pages(one)]

    menu = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loose)["nav"]
    missing = [page for page in pages(menu) if page != "decisions/index.md" and not (ROOT / "docs" / page).is_file()]
    assert missing == []
