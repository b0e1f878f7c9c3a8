"""The recipe's own rules, without YAML."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rnn2bin.kinds import CELLS
from rnn2bin.recipe import GATE_NAMES, Recipe, parse

SECTION = {"cell": "gru", "layers": [{"weight_ih": "a", "weight_hh": "b"}]}
DECODE = {"start": 0, "end": 1, "max_length": 2}


def errors(data: dict[str, Any]) -> list[tuple[str, tuple[str | int, ...]]]:
    with pytest.raises(ValidationError) as caught:
        parse(data)
    return [(each["type"], each["loc"]) for each in caught.value.errors()]


def test_gate_names_are_those_of_the_cells() -> None:
    assert set(GATE_NAMES) == {gate.letter for kind in CELLS.values() for gate in kind.at(2).gates} == set("iforztg")


def test_nothing_given_is_the_default() -> None:
    assert parse({}) == Recipe()


@pytest.mark.parametrize("gate", GATE_NAMES)
def test_every_gate_may_be_soft_or_have_a_budget(gate: str) -> None:
    recipe = parse({"gates": {"soft": [gate, f"main.layers.0.{gate}"]}, "budget": {"open": {gate: 0.5}}})
    assert recipe.gates.soft == [gate, f"main.layers.0.{gate}"]
    assert recipe.budget.open == {gate: 0.5}


@pytest.mark.parametrize("gate", ["q", "", "n", "main.layers.0.n", "o.", "I"])
def test_a_gate_of_no_cell_is_refused(gate: str) -> None:
    assert errors({"gates": {"soft": ["o", gate]}}) == [("gate_name", ("gates", "soft", 1))]
    assert errors({"budget": {"open": {gate: 0.5}}}) == [("gate_name", ("budget", "open", gate))]


def test_gate_names_are_checked_beside_the_other_values() -> None:
    data = {"gates": {"soft": ["q"], "noise": 2, "temperature": {"start": 1}}, "budget": {"open": {"q": 2}, "weight": -1}}
    assert set(errors(data)) == {
        ("gate_name", ("gates", "soft", 0)),
        ("less_than_equal", ("gates", "noise")),
        ("missing", ("gates", "temperature", "end")),
        ("gate_name", ("budget", "open", "q")),
        ("less_than_equal", ("budget", "open", "q")),
        ("greater_than_equal", ("budget", "weight")),
    }


@pytest.mark.parametrize("soft", ["o", {"o": 1}, [1], None])
def test_soft_of_another_type_is_a_type_error(soft: object) -> None:
    assert [kind for kind, _ in errors({"gates": {"soft": soft}})] in (["list_type"], ["string_type"])


@pytest.mark.parametrize(
    "source",
    [
        {"encoder": SECTION},
        {"encoder": SECTION, "decoder": SECTION},
        {"main": SECTION, "decode": DECODE},
        {"main": SECTION, "encoder": SECTION, "decoder": SECTION, "decode": DECODE},
    ],
)
def test_source_is_one_network_or_a_whole_pair(source: dict[str, Any]) -> None:
    assert errors({"source": source}) == [("value_error", ("source",))]


def test_values_never_change() -> None:
    with pytest.raises(ValidationError):
        Recipe().train.steps = 3  # type: ignore[misc]


def test_the_hard_stop_follows_the_steps() -> None:
    assert parse({"train": {"steps": 100}}).max_steps == 125
    assert parse({"train": {"steps": 100, "max_steps": 300}}).max_steps == 300
