"""The page, the card and the terminal table, from made-up reports. `python tests/test_evaluate_html.py FILE` writes the page to look at."""

from __future__ import annotations

import copy
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rnn2bin.evaluation.html import Figures, Heatmap, Histogram, render, render_card, render_table, sentence

EVIL = "<script>alert('x')</script>"
VOID = {"meta", "br", "link", "img", "hr", "input"}
GATES = [(layer, gate) for layer in ("encoder.layers.0", "decoder.layers.0") for gate in ("r", "z")]

TEXT = "In the beginning God created the heaven and the earth.\nAnd the earth was without form, and void; and"
LEVELS = {
    "r": {"lo": [0.0, 0.0, 0.0], "hi": [0.62, 0.94, 1.38]},
    "z": {"lo": [0.0, 0.13, 0.47], "hi": [1.0, 1.0, 1.0]},
}


def entry(metric: float, loss: float, errors: float) -> dict[str, Any]:
    return {"metric": metric, "loss": loss, "n": 3000, "extra": {"phoneme_error_rate": errors, "mean_edit_distance": errors * 6.1}}


def training() -> list[dict[str, Any]]:
    generator = np.random.default_rng(1)
    log = []
    for step in range(0, 12001, 100):
        progress = step / 12000
        soft = 0.69 - 0.5 * np.exp(-progress * 18) + generator.normal() * 0.006
        log.append(
            {
                "step": step,
                "loss": float(0.31 + 1.4 * np.exp(-progress * 14) + 0.06 * progress + generator.normal() * 0.01),
                "soft": float(soft),
                "hard": max(0.0, float(soft - 0.55 * np.exp(-progress * 5))) if step % 300 == 0 else None,
                "temperature": 0.2**progress,
                "slope": 1 + progress,
                "progress": progress,
                "saturation": float(0.42 + 0.55 * (1 - np.exp(-3 * progress))),
            }
        )
    return log


FULL: dict[str, Any] = {
    "schema_version": 1,
    "task": "transduce",
    "metric": {"name": "sequence_accuracy", "label": "words right", "higher_is_better": True},
    "teacher": entry(0.691, 0.402, 0.0982),
    "soft_student": entry(0.6893, 0.409, 0.0989),
    "binary": entry(0.683, 0.421, 0.1011),
    "native": entry(0.683, 0.421, 0.1011),
    "drop": {"value": 0.008, "relative": 0.0116, "ci95": [0.0007, 0.0153], "n": 3000},
    "controls": {
        "threshold_only": entry(0.0133, 5.913, 0.8127),
        "sharpened_sigmoid": entry(0.214, 2.31, 0.4471),
        "random_gates": entry(0.0, 9.204, 1.0312),
        "float_same_compute": entry(0.6947, 0.398, 0.0969),
    },
    "gates": [
        {
            "layer": layer,
            "direction": "forward",
            "gate": gate,
            "binary": (layer, gate) != ("decoder.layers.0", "r"),
            "open_rate": rate,
            "levels": LEVELS[gate],
        }
        for (layer, gate), rate in zip(GATES, (0.37, 0.22, 0.51, 0.318), strict=True)
    ],
    "density": {
        "weights_touched": 0.412,
        "columns": 0.83,
        "candidate_rows": 0.27,
        "bytes_per_step": 648_912,
        "dense_bytes_per_step": 1_575_936,
    },
    "parity": {"max_abs": 4.7e-7, "steps": 41_233, "flips_in_margin": 2},
    "cost": {"seconds": 1893.4, "steps": 12000, "tokens": 8_423_112, "tokens_per_second": 4448.6, "teacher_tokens_per_second": 10213.0},
    "size": {"source_bytes": 3_342_817, "packed_bytes": 1_704_220},
    "provenance": {
        "source": "/models/g2p_en/checkpoint20.npz",
        "source_sha256": "9f2b" * 16,
        "recipe": "anneal.yaml",
        "seed": 0,
        "versions": {"rnn2bin": "0.1.0", "torch": "2.5.1", "numpy": "2.1.3"},
        "data_free": False,
        "levels": "learned",
    },
    "training": training(),
    "worst": [
        {
            "index": 1841,
            "input": "beauregard",
            "teacher": "B OW1 R AH0 G AA2 R D",
            "binary": "B Y UW0 R IH0 G ER0 D",
            "difference": "5 of 8 phonemes",
        },
        {"index": 77, "input": "schuylkill", "teacher": "SH AY1 L K IH2 L", "binary": "S K AY1 L K AH0 L", "difference": "4 of 6 phonemes"},
        {
            "index": 2204,
            "input": "oaxaca",
            "teacher": "OW0 AA1 K AH0 K AH0",
            "binary": "OW0 AE1 K S AH0 K AH0",
            "difference": "2 of 6 phonemes",
        },
    ],
}


def figures(tokens: list[str] | None = None) -> Figures:
    generator = np.random.default_rng(0)
    edges = np.linspace(0, 1, 31)
    before = [np.histogram(generator.beta(0.9 + k * 0.4, 1.1, 40_000), edges)[0] for k in range(len(GATES))]
    after = np.histogram(generator.beta(0.05, 0.09, 40_000), edges)[0]
    histograms = [Histogram(layer, "forward", gate, edges, counts, after) for (layer, gate), counts in zip(GATES, before, strict=True)]
    drive = generator.normal(size=(120, 256)).cumsum(0) * 0.4 + generator.normal(size=256) * 2 - 0.8
    bits = [drive + generator.normal(size=drive.shape) * 0.8 + k * 0.3 > 0 for k in range(len(GATES))]
    rows = [(f"{layer}.forward {gate}", on, 256) for (layer, gate), on in zip(GATES, bits, strict=True)]
    return Figures(histograms, [Heatmap("main", list(TEXT) if tokens is None else tokens, rows)])


class Balance(HTMLParser):
    """Collects tags that do not close, ids used twice, and every text and attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.wrong: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if len({name for name, _ in attrs}) != len(attrs):
            self.wrong.append(f"{tag} has an attribute twice")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.stack or self.stack.pop() != tag:
            self.wrong.append(f"</{tag}> at {self.getpos()}")


def parsed(page: str) -> Balance:
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert not parser.wrong
    assert not parser.stack
    assert len(parser.ids) == len(set(parser.ids))
    return parser


MINIMAL: dict[str, Any] = {
    "schema_version": 1,
    "task": "match",
    "metric": {"name": "mse", "higher_is_better": False},
    "teacher": {"metric": 0.0, "loss": None, "n": 4},
    "soft_student": None,
    "binary": {"metric": 1.234e-7, "loss": None, "n": 4},
    "native": None,
    "drop": {"value": 1.234e-7, "relative": None, "ci95": [1e-7, 1.5e-7], "n": 4},
    "controls": None,
    "gates": [],
    "density": None,
    "parity": None,
    "cost": None,
    "size": None,
}


@pytest.mark.parametrize("report", [FULL, MINIMAL, {}])
@pytest.mark.parametrize(
    "drawn",
    [figures(), figures(["in", "the", "beginning"] * 32), Figures(), Figures([], [Heatmap("main", None, [("a", np.zeros((0, 0)), 0)])])],
)
def test_the_page_is_well_formed_and_needs_no_network(report: dict[str, Any], drawn: Figures) -> None:
    page = render(report, drawn)
    tags = parsed(page).tags
    assert not re.search(r"https?:|src=|url\((?!#)|@import|<link", page)
    assert "script" not in tags
    assert "None" not in page
    assert not re.search(r"\bnan\b", page)
    assert tags.count("svg") == len(re.findall(r"<svg[^>]* aria-label=\"[^\"]+\"", page)) == page.count("<title>") - 1
    assert tags.count("table") == tags.count("caption")
    assert page.count(sentence(report)) == 1


def test_everything_of_a_full_report_is_on_the_page() -> None:
    page = render(FULL, figures())
    for layer, gate in GATES:
        assert page.count(layer) >= 3
        assert re.search(rf"{layer} forward</th><td class=\"left\">{gate} \(", page)
    for text in ("words right", "threshold only", "float, same training", "random gates", "phoneme error rate"):
        assert text in page
    for text in ("9f2b9f2b", "beauregard", "32 min", "649 kB of 1.58 MB", "learned: each unit", "4.7e−7"):
        assert text in page
    assert page.count('<span class="badge soft">') == 1
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert [heading.split()[0] for heading in headings] == [
        "Where",
        "Training",
        "What",
        "Gates",
        "Gate",
        "Decisions",
        "Worst",
        "Size",
        "Provenance",
    ]
    places = [page.index(text) for text in ("Binary gates cost", "<h2>", "threshold only")]
    assert places == sorted(places)


def test_decisions_and_shared_rows_of_a_gate_are_on_the_page() -> None:
    report = copy.deepcopy(FULL)
    assert "units a row" not in render(report)
    report["gates"][0] |= {"copies": 4, "shared": 8}
    page = render(report)
    assert "× 4<br><small>8 units a row</small>" in page
    assert "so many read one row of the gate's weights" in page


def test_what_was_not_measured_is_left_out() -> None:
    page = render(MINIMAL, Figures())
    for heading in ("Training</h2>", "What a step reads", "Gates</h2>", "along one sequence", "Worst", "Provenance", "soft student"):
        assert heading not in page


def test_text_from_outside_is_escaped_everywhere() -> None:
    report = copy.deepcopy(FULL)
    report["task"] = report["metric"]["label"] = EVIL
    report["provenance"] = {"source": EVIL, "recipe": EVIL, "versions": {EVIL: EVIL}, EVIL: EVIL}
    report["worst"] = [dict.fromkeys(("index", "input", "teacher", "binary", "difference"), EVIL)]
    report["gates"][0] |= {"layer": EVIL, "direction": EVIL, "gate": EVIL}
    report["controls"] = {EVIL: entry(0.5, 1.0, 0.1)}
    report["binary"]["extra"] = {EVIL: 1.0, "note": EVIL}
    histogram = Histogram(EVIL, EVIL, EVIL, np.array([0, 1]), np.array([0]), np.array([1]))
    tokens = [EVIL, "<b>", '"', "&", "'"]
    page = render(report, Figures([histogram], [Heatmap(EVIL, tokens, [('"' + EVIL, np.eye(5), 5)])]))
    assert "script" not in parsed(page).tags
    assert "&lt;script&gt;" in page
    assert "<b>" not in page
    assert "<script" not in render_card(report)


def card_cells(card: str) -> set[int]:
    """Numbers of unescaped bars in the table lines."""
    return {len(re.findall(r"(?<!\\)\|", line)) for line in card.splitlines() if line.startswith("|")}


@pytest.mark.parametrize("report", [FULL, MINIMAL, {}])
def test_the_card_says_what_it_is_and_how_to_load_it(report: dict[str, Any]) -> None:
    card, extras = render_card(report), report.get("binary", {}).get("extra", {})
    assert re.match(r"---\n# license: .*\nlibrary_name: rnn2bin\n", card)
    for line in ("import rnn2bin", 'model = rnn2bin.load("OUT")', "y, state = model(x)", sentence(report)):
        assert line in card
    assert card_cells(card) <= {3, len(extras) + 6}
    assert "None" not in card


def test_a_bar_in_a_name_breaks_no_table_of_the_card() -> None:
    report = copy.deepcopy(FULL)
    report["provenance"]["source"], extras = "a|b\n| c |", report["binary"]["extra"]
    assert card_cells(render_card(report)) <= {3, len(extras) + 6}


def test_the_terminal_table_lines_up() -> None:
    lines = render_table(FULL).splitlines()
    assert [line.split("  ")[0] for line in lines[2:7]] == ["teacher", "threshold only", "soft student", "binary", "binary, in C"]
    assert "0.1 to 1.5" in lines[5]
    assert "41%" in lines[5]
    assert len(lines[0]) == len(lines[1]) >= max(map(len, lines[2:7]))
    assert lines[-1] == sentence(FULL)
    assert render_table(FULL).isascii()


@pytest.mark.parametrize("report", [MINIMAL, {}])
def test_the_terminal_table_takes_what_there_is(report: dict[str, Any]) -> None:
    assert "None" not in render_table(report)


def test_a_name_cannot_steer_the_terminal() -> None:
    report = copy.deepcopy(FULL)
    report["metric"]["label"] = "\x1b[2Jaccuracy"
    assert "\x1b" not in render_table(report)


@pytest.mark.parametrize(
    ("name", "drop", "expected"),
    [
        ("accuracy", (0.008, 0.001, 0.015), "Binary gates cost 0.8 points of accuracy (95% interval 0.1 to 1.5)."),
        ("accuracy", (0.0008, 0.0006, 0.0011), "Binary gates cost 0.08 points of accuracy (95% interval 0.06 to 0.11)."),
        ("accuracy", (0.0, 0.0, 0.0), "Binary gates cost 0.0 points of accuracy (95% interval 0.0 to 0.0)."),
        (
            "sequence_accuracy",
            (0.002, -0.003, 0.007),
            "Binary gates cost 0.2 points of whole sequences right (95% interval −0.3 to 0.7, so possibly nothing).",
        ),
        ("agreement", (-0.02, -0.03, -0.01), "Binary gates gained 2.0 points of agreement with the teacher (95% interval 1.0 to 3.0)."),
        ("bits_per_token", (0.0423, 0.031, 0.055), "Binary gates cost 0.042 bits per token (95% interval 0.031 to 0.055)."),
        ("mse", (0.000123, 0.0001, 0.00015), "Binary gates cost 0.000123 of mean squared error (95% interval 0.0001 to 0.00015)."),
        ("cosine", (0.0123, 0.01, 0.015), "Binary gates cost 0.012 of cosine similarity (95% interval 0.010 to 0.015)."),
        ("my_score", (1.5, 1, 2), "Binary gates cost 1.5 of my score (95% interval 1 to 2)."),
    ],
)
def test_the_sentence(name: str, drop: tuple[float, float, float], expected: str) -> None:
    report = {"metric": {"name": name}, "drop": {"value": drop[0], "ci95": list(drop[1:])}}
    assert sentence(report) == expected
    report["density"] = {"weights_touched": 0.412}
    assert sentence(report) == expected[:-1] + ", reading 41% of the weights."


def test_the_sentence_without_a_measurement() -> None:
    assert sentence({}) == "What binary gates cost was not measured."


def test_the_interval_stands_beside_the_network_it_belongs_to() -> None:
    report = copy.deepcopy(FULL)
    report["binary"]["metric"] = 0.5
    rows = re.findall(r"<tr.*?</tr>", render(report, Figures()))
    assert ["0.1 to 1.5" in row for row in rows if re.search(r'<th scope="row">binary', row)] == [False, True]


def test_a_heat_map_of_known_bits() -> None:
    bits = np.array([[1, 0], [1, 0], [0, 0], [1, 1]])  # (T, H)
    page = render({}, Figures([], [Heatmap("main", None, [("cell o", bits, 2)])]))
    assert 'd="M0 0h2v1h-2zM3 0h1v1h-1zM3 1h1v1h-1z"' in page
    assert "cell o: open 50%, 2 units" in page


def test_steps_after_the_last_token_are_padding_and_not_drawn() -> None:
    page = render({}, Figures([], [Heatmap("main", ["a", "b"], [("cell o", np.array([[1], [0], [1], [1]]), 1)])]))
    assert 'd="M0 0h1v1h-1z"' in page
    assert "cell o: open 50%" in page


def test_large_figures_are_cut_to_what_a_page_can_show() -> None:
    bits = np.random.default_rng(0).integers(0, 2, (5000, 2048))
    page = render({}, Figures([], [Heatmap("main", [str(k) for k in range(5000)], [("cell o", bits, 2048)])]))
    assert "64 of 2048 units" in page
    assert len(page) < 120_000


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [0.0, 0.0, 0.0], [float("nan"), 1.0, None], [1e9, 1.0] * 3, [-3.0, -1.0]])
def test_curves_of_any_values(values: list[float | None]) -> None:
    keys = ("loss", "soft", "hard", "temperature", "slope", "saturation")
    log = [{"step": step, **dict.fromkeys(keys, value)} for step, value in enumerate(values)]
    page = render({"metric": {"name": "mse"}, "training": log}, Figures())
    parsed(page)
    assert not re.search(r"\bnan\b", page)
    assert "Training loss" in page


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render(FULL, figures()), encoding="utf-8")
    print(render_card(FULL))
    print(render_table(FULL))
