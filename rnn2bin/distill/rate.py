"""The rate of learning that a network wants, found by short runs of the whole anneal (docs/decisions/028-rate.md).

What a rate does depends on the network more than on anything a recipe could say: a converged one is harmed by the rate that another needs
to get anywhere. A short run, annealed and decayed to its end, put rates in the order of the long one where that was tried. Each
starts from the same calibrated student and is measured as checkpoints are, on the validation part with hard gates.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rnn2bin import tasks
from rnn2bin.cells.network import Network
from rnn2bin.distill import anneal, trainer
from rnn2bin.distill import budget as budgets
from rnn2bin.distill.anneal import Tried
from rnn2bin.errors import DivergedError
from rnn2bin.recipe import Recipe

log = logging.getLogger("rnn2bin")


@dataclass(frozen=True)
class Ladder:
    """What is tried: from `rates[first]` on, each for `share` of the conversion's steps, within bounds; a conversion of fewer than
    `shortest` steps is not worth it and takes the default. Of two rates the lower is taken where its metric is behind by at most a share
    of `ties`. `usual` and `most` count short runs."""

    rates: tuple[float, ...]
    first: int
    share: float
    bounds: tuple[int, int]
    shortest: int
    ties: float
    usual: int = 3
    most: int = 4


FREE = Ladder(rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2), first=2, share=1 / 40, bounds=(50, 200), shortest=500, ties=0.0)
# A budget has to be reached first, and what it needs shows later: a short run is longer. Long runs bear less than short ones do.
BUDGET = Ladder(rates=(5e-4, 1.6e-3, 5e-3, 1.6e-2, 5e-2), first=3, share=1 / 16, bounds=(250, 1000), shortest=4000, ties=0.005)
LOWER, ATTEMPTS = 10**-0.5, 3  # where training diverges at a rate that was not given, it starts over at so much of it
FOLDER = "rate-"  # before the rate: where a short run's checkpoint lies


def ladder(recipe: Recipe) -> Ladder:
    return FREE if recipe.budget.density is None else BUDGET


def wanted(recipe: Recipe) -> bool:
    """Whether the rate is to be looked for: where the recipe leaves it open, and the run is long enough."""
    return recipe.train.learning_rate == "auto" and recipe.train.steps >= ladder(recipe).shortest


def steps(recipe: Recipe) -> int:
    """Of one short run."""
    used = ladder(recipe)
    fewest, most = used.bounds
    return min(max(round(used.share * recipe.train.steps), fewest), most)


def with_rate(recipe: Recipe, rate: float) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"learning_rate": rate})})


def climb(measure: Callable[[float], float], rates: tuple[float, ...], *, first: int, ties: float = 0.0) -> float:
    """From `rates[first]` down while that is better, or as good by `ties`; else up while that is better: where it ends. More is better."""
    best, at = measure(rates[first]), first
    for way in (-1, 1):
        while 0 <= (new := at + way) < len(rates):
            value = measure(rates[new])
            if not better(value, best, ties=ties * -way):
                break
            best, at = max(best, value), new
        if at != first:
            break
    return rates[at]


def better(value: float, than: float, *, ties: float) -> bool:
    """With positive `ties` even where it is behind by that share, with negative ones only where it is ahead by it."""
    margin = ties * abs(than) if min(value, than) > budgets.TOO_DENSE else 0.0
    return value > than - margin


def find(
    student: Network,
    teacher: Network,
    *,
    task: tasks.Task,
    recipe: Recipe,
    out: Path,
    report: Callable[[dict[str, Any]], None] | None = None,
    **given: Any,
) -> tuple[Recipe, tuple[Tried, ...]]:
    """The recipe with the best rate, and what was tried; `student` is calibrated, and stays as it is. `given`: what else `trainer.train`
    takes; it raises what that does, but for a rate at which training diverges: that one is out."""
    count, sign = steps(recipe), 1 if task.higher_is_better else -1
    short = recipe.train.model_copy(update={"steps": count, "max_steps": count, "evaluate_every": count})

    metrics: dict[float, float | None] = {}

    def measure(rate: float) -> float:
        one = with_rate(recipe.model_copy(update={"train": short}), rate)
        watch = report and (lambda now: report(now | {"trying_rate": rate}))
        folder, network = out / f"{FOLDER}{rate:g}", copy.deepcopy(student)
        try:
            run = trainer.train(network, teacher, task=task, recipe=one, out=folder, report=watch, **given)
        except DivergedError:
            metrics[rate] = None
            return float("-inf")
        last = run.history[-1]
        metrics[rate] = last.hard
        return budgets.choice(sign * last.hard, last.density, recipe.budget.density)

    used = ladder(recipe)
    best = climb(measure, used.rates, first=used.first, ties=used.ties)
    return with_rate(recipe, best), tuple(Tried(*one) for one in metrics.items())


def train(student: Network, *args: Any, recipe: Recipe, out: Path, lower: bool, **given: Any) -> anneal.Trained:
    """`trainer.train`; with `lower`, where training diverges, again from the same student at a lower rate, at most ATTEMPTS in all."""
    start = {name: t.clone() for name, t in student.state_dict().items()}
    diverged: list[Tried] = []
    while True:
        count = len(diverged)
        one = with_rate(recipe, recipe.learning_rate * LOWER**count) if count else recipe
        try:
            run = trainer.train(student, *args, recipe=one, out=out / f"{FOLDER}lower-{count}" if count else out, **given)
            return replace(run, tried=tuple(diverged))
        except DivergedError as error:
            diverged.append(Tried(one.learning_rate, None))
            if not lower or len(diverged) == ATTEMPTS:
                raise
            log.warning("%s; it starts over at a lower rate", error.reasons[0].partition(";")[0])
        student.load_state_dict(start)
