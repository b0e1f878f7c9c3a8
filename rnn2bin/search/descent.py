"""`convert` with a limit for the drop and one for the density: few trainings, each started from the network before.

The first is the plain conversion at the density allowed. A network that surely keeps the drop is trained on to a lower density; one that
does not is trained on at its own, while that helps. A training depends on those before it and on nothing else, so a run that is gone on
with, or asked again for another drop, takes up those that are there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rnn2bin import processes
from rnn2bin.cells.network import Network
from rnn2bin.distill import rate
from rnn2bin.distill import trainer as distiller
from rnn2bin.distill.anneal import Trained
from rnn2bin.distill.answers import with_answers
from rnn2bin.errors import BudgetError
from rnn2bin.recipe import Recipe
from rnn2bin.search.front import Found, Limits, choose, missed
from rnn2bin.search.measured import blind, measure
from rnn2bin.search.space import with_steps

FURTHER = 4  # trainings after the first, at most
SHARE = 0.5  # of the first one's steps
RATIO = 0.7  # of the density before, where it is lowered
GAIN = 0.1  # the share of the drop that a training at the same density must take away for another one to follow

LOWER, AGAIN = "lower", "again"


@dataclass(frozen=True)
class Rung:
    """One training: the kinds of those after the first that lead to it, the density it wanted, and what came out."""

    path: tuple[str, ...]
    wanted: float
    found: Found
    network: Network
    trained: Trained  # of the whole way to it

    @property
    def folder(self) -> str:
        """Where its checkpoints lie in the work folder: the same for the same way."""
        return "rung-" + "".join(kind[0] for kind in self.path)


def limits_of(recipe: Recipe) -> Limits:
    return Limits(recipe.report.max_drop, recipe.report.max_density)


def following(found: Sequence[Found], limits: Limits) -> str | None:
    """What is trained after these: LOWER, AGAIN, or None where the search ends."""
    if len(found) > FURTHER:
        return None
    if limits.surely(found[-1]):
        return LOWER
    if any(limits.surely(one) for one in found):
        return None
    gained = len(found) < 2 or found[-1].drop <= (1 - GAIN) * found[-2].drop
    return AGAIN if gained else None


def recipe_of(recipe: Recipe, wanted: float) -> Recipe:
    """That of a further training: bits from the first step on, as the network before ended."""
    gates, at_end = recipe.gates, lambda s: s.model_copy(update={"schedule": "constant", "start": s.end})
    gates = gates.model_copy(update={"straight_through_from": 0.0, "temperature": at_end(gates.temperature), "slope": at_end(gates.slope)})
    shorter = with_steps(recipe, max(1, round(SHARE * recipe.train.steps)))
    train = shorter.train.model_copy(update={"max_steps": shorter.train.steps})
    return shorter.model_copy(update={"gates": gates, "train": train, "budget": recipe.budget.model_copy(update={"density": wanted})})


def descend(
    job: Any,
    network: Network,
    trained: Trained,
    work: Path,
    *,
    resume: bool,
    report: Callable[[dict[str, Any]], None] | None = None,
    callbacks: Sequence[Any] = (),
) -> tuple[Network, Trained, dict[str, Any]]:
    """From the first network on to the one that is wanted: (network, how it was trained, what was tried for report.json).

    Raises BudgetError (exit 5) where none keeps the limits, with the nearest; InterruptedRunError and DivergedError as training does.
    """
    job, limits = blind(job), limits_of(job.recipe)
    wanted = job.recipe.budget.density
    assert wanted is not None
    rungs = [Rung((), wanted, processes.lead(lambda: measure(job, network)), network, trained)]
    while kind := following([rung.found for rung in rungs], limits):
        rungs.append(_train(job, rungs[-1], kind, work, resume=resume, report=report, callbacks=callbacks))
    best, kept = choose([replace(rung.found, what=rung) for rung in rungs], limits)
    if not kept:
        raise BudgetError(missed(best, limits))
    # Later trainings are paid for too, whichever is chosen.
    chosen, seconds = best.what, rungs[-1].trained.seconds_before
    return chosen.network, replace(chosen.trained, seconds_before=seconds), summary(rungs, chosen, limits)


def _train(
    job: Any,
    before: Rung,
    kind: str,
    work: Path,
    *,
    resume: bool,
    report: Callable[[dict[str, Any]], None] | None,
    callbacks: Sequence[Any],
) -> Rung:
    wanted = before.wanted * RATIO if kind == LOWER else before.wanted
    network, path = copy.deepcopy(before.network), (*before.path, kind)
    rung = Rung(path, wanted, before.found, network, before.trained)
    recipe = recipe_of(rate.with_rate(job.recipe, before.trained.rate), wanted)
    trained = distiller.train(
        network,
        job.teacher,
        task=job.task,
        recipe=recipe,
        train=with_answers(job.parts.train, job.teacher, task=job.task, recipe=recipe),
        valid=job.parts.valid,
        out=work / rung.folder,
        resume=resume,
        report=report and (lambda now: report(now | {"training": len(path) + 1, "wanted_density": wanted})),
        callbacks=callbacks,
    )
    return replace(rung, found=processes.lead(lambda: measure(job, network)), trained=after(before.trained, trained))


def after(first: Trained, second: Trained) -> Trained:
    """Two trainings as one: points and steps one behind the other, the second's network."""
    points = [replace(point, step=point.step + first.steps) for point in second.history]
    return replace(
        second,
        history=[*first.history, *points],
        steps=first.steps + second.steps,
        best_step=first.steps + second.best_step,
        tokens=first.tokens + second.tokens,
        seconds_before=first.seconds_before + second.seconds_before,
    )


def summary(rungs: Sequence[Rung], chosen: Rung, limits: Limits) -> dict[str, Any]:
    """What was tried, on the validation part."""
    return {
        "limits": asdict(limits),
        "trainings": [
            {
                "after": list(rung.path),
                "wanted_density": rung.wanted,
                "density": rung.found.density,
                "drop": rung.found.drop,
                "drop_at_most": rung.found.highest,
                "steps": rung.trained.steps,
                "chosen": rung is chosen,
            }
            for rung in rungs
        ],
    }
