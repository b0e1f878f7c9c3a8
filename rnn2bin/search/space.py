"""Which knobs of a recipe are searched, and over which values: frozen data, and a small YAML that changes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rnn2bin import recipe_yaml
from rnn2bin.errors import RecipeError
from rnn2bin.recipe import Recipe

STEPS = "train.steps"
DENSITY = "budget.density"


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; `log`: their ratios count, not their differences."""

    low: float
    high: float
    log: bool = False

    def holds(self, value: Any) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high

    @property
    def ends(self) -> tuple[Any, ...]:
        return (self.low, self.high)


@dataclass(frozen=True)
class Choice:
    values: tuple[Any, ...]

    def holds(self, value: Any) -> bool:
        return value in self.values

    @property
    def ends(self) -> tuple[Any, ...]:
        return self.values


@dataclass(frozen=True)
class Shares:
    """Of what the recipe says: short trainings that tell which are worth the long one."""

    shares: tuple[float, ...]

    def of(self, whole: int) -> Choice:
        return Choice(tuple(sorted({max(1, round(share * whole)) for share in self.shares})))


Knob = Range | Choice
Space = Mapping[str, Knob]

KNOBS: Mapping[str, Knob | Shares] = MappingProxyType(
    {
        DENSITY: Range(0.05, 0.6, log=True),
        "gates.copies": Choice((1, 2, 4, 8, 16)),
        "loss.task": Range(0.0, 0.9),
        "loss.hidden": Choice((0.0, 1.0, 5.0, 20.0)),
        "train.learning_rate": Range(5e-4, 3.2e-2, log=True),
        STEPS: Shares((0.25, 1.0)),
    }
)


def read(recipe: Recipe, file: str | Path | None = None) -> Space:
    """The knobs searched around `recipe`: KNOBS, changed by a YAML of `knob: {low, high, log}`, `knob: [values]`, or `knob: null` for one
    that stays as the recipe says. A density range ends at `report.max_density`. Raises RecipeError with every reason found."""
    space: dict[str, Knob] = {name: knob.of(recipe.train.steps) if isinstance(knob, Shares) else knob for name, knob in KNOBS.items()}
    given = recipe_yaml.plain(file) if file is not None else {}
    reasons = []
    for name, value in given.items():
        space.pop(name, None)
        if value is None:
            continue
        try:
            space[name] = _knob(value)
        except ValueError as error:
            reasons.append(f"{file}: {name}: {error}")
    limit = recipe.report.max_density and recipe.budget.density
    density = space.get(DENSITY)
    if limit and isinstance(density, Range):
        space[DENSITY] = replace(density, low=min(density.low, limit / 2), high=min(density.high, limit))
    reasons += [reason for name, knob in space.items() for reason in _misfits(recipe, name, knob, str(file))]
    if not space and not reasons:
        reasons.append(f"{file}: every knob is taken out; nothing is left to search")
    if reasons:
        raise RecipeError(*reasons)
    return MappingProxyType(space)


def _knob(value: Any) -> Knob:
    if isinstance(value, list):
        if not value or any(isinstance(one, list | dict) for one in value):
            raise ValueError("must list plain values, such as [1, 4]")
        return Choice(tuple(value))
    if not isinstance(value, dict):
        return Choice((value,))
    unknown = sorted(value.keys() - {"low", "high", "log"})
    if unknown:
        raise ValueError(f"unknown key {unknown[0]}; keys here: low, high, log")
    low, high, log = value.get("low"), value.get("high"), value.get("log", False)
    if any(isinstance(end, bool) or not isinstance(end, int | float) for end in (low, high)) or not isinstance(log, bool):
        raise ValueError("a range is {low: 0.1, high: 0.5} or {low: 0.001, high: 0.1, log: true}")
    if not low < high or (log and low <= 0):  # type: ignore[operator]
        raise ValueError(f"low must be less than high{', and more than 0 with log: true' if log else ''}; given {low:g} and {high:g}")
    return Range(float(low), float(high), log)  # type: ignore[arg-type]


def _misfits(recipe: Recipe, name: str, knob: Knob, where: str) -> list[str]:
    """Values that the recipe refuses, in its own words."""
    reasons: dict[str, None] = {}
    for value in knob.ends:
        try:
            recipe_yaml.override(recipe, [f"{name}={_written(value)}"])
        except RecipeError as error:
            reasons |= dict.fromkeys(f"{where}: {reason.removeprefix('--set ')}" for reason in error.reasons)
    return list(reasons)


def applied(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe of a trial: `recipe` with these knobs, without limits of its own, and all that goes by steps scaled to them."""
    report = recipe.report.model_copy(update={"max_drop": None, "max_density": None})
    free = recipe.model_copy(update={"report": report})
    if STEPS in values:
        free = with_steps(free, int(values[STEPS]))
    return recipe_yaml.override(free, [f"{name}={_written(value)}" for name, value in values.items() if name != STEPS])


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    """The same recipe over another number of steps, measured as often."""
    train = recipe.train
    scaled = lambda value: None if value is None else max(1, round(value * steps / train.steps))
    changed = {"steps": steps, "max_steps": scaled(train.max_steps), "evaluate_every": scaled(train.evaluate_every)}
    return recipe.model_copy(update={"train": train.model_copy(update=changed)})


def start(recipe: Recipe, space: Space) -> dict[str, Any]:
    """What the recipe itself has for these knobs, where that lies in their ranges: the first trial."""
    found = {}
    for name, knob in space.items():
        value: Any = recipe
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
        if knob.holds(value):
            found[name] = value
    return found


def _written(value: Any) -> str:
    """As YAML reads it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
