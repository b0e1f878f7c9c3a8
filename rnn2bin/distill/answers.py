"""The teacher's outputs on the training part, made once where the run reads it more than once: the teacher never changes, and asking it
again at every step takes up to half of the step (docs/decisions/038-answers.md).

Only its outputs are kept. Where a loss compares hidden states or gates as well, or bits are credited by what the teacher's layers say, it
is asked as before.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rnn2bin import processes, tasks
from rnn2bin.cells.network import Network, State, Walk
from rnn2bin.data import Batch, Part, collate, cut_window
from rnn2bin.distill.anneal import training_walk
from rnn2bin.distill.trainer import batches
from rnn2bin.gates.estimators import FLOAT, SCORE
from rnn2bin.measure import Candidate, rows_at_once
from rnn2bin.recipe import Recipe
from rnn2bin.spec import SectionSpec

MOST_BYTES = 2**30
PASSES = 2  # over the data, at least: fewer are not worth a pass before
ROWS = 256  # sequences at once


def with_answers(part: Part, teacher: Network, *, task: tasks.Task, recipe: Recipe) -> Part:
    """The training part with the teacher's outputs beside its targets, `Part.answers`; as it is where they are not `wanted`."""
    if not wanted(part, teacher, task=task, recipe=recipe):
        return part
    shaped = _of_stream if part.stream else _of_sequences
    with torch.no_grad():
        return replace(part, answers=shaped(part, teacher, task=task, recipe=recipe, walk=training_walk(recipe)))


def wanted(part: Part, teacher: Network, *, task: tasks.Task, recipe: Recipe) -> bool:
    """Whether training with this recipe keeps them: where they are all that its losses ask for, each step has one, they fit, and they are
    read often enough. Recipe, data and this machine's memory decide, so that a resumed run does the same."""
    loss = recipe.loss
    more = loss.gate or loss.hidden_weight(task.name, priced=recipe.budget.counts) or recipe.gates.estimator in SCORE
    if more or (task.name == "transduce" and part.targets is None) or passes(part, task=task, recipe=recipe) < PASSES:
        return False
    section = _outputs_of(teacher)
    if part.target_lengths is not None and not teacher.spec.decode:  # a graph that shortens sequences
        return False
    if section.graph and section.per_step and teacher.output_steps(part.inputs[:1].transpose(0, 1)) != part.inputs.shape[1]:
        return False
    there = memory()  # of which each process, here or elsewhere, holds its own
    return size(part, teacher) <= min(MOST_BYTES, MOST_BYTES if there is None else there // (4 * processes.count()))


def passes(part: Part, *, task: tasks.Task, recipe: Recipe) -> float:
    """How often training reads the part."""
    train = recipe.train
    updates = train.steps * train.accumulation
    if part.stream:
        rows = batches(part, recipe, task, length=1).rows
        return updates * train.window / max(1, rows.shape[1] - 1)
    windows = -(-part.inputs.shape[1] // train.window) if task.windowed else 1
    return updates * min(train.batch_size, len(part)) / windows / len(part)


def size(part: Part, teacher: Network) -> int:
    """Bytes of the answers."""
    return 4 * len(part) * _steps(part, teacher) * _outputs_of(teacher).output_size


def _outputs_of(teacher: Network) -> SectionSpec:
    return teacher.spec.sections["decoder"] if teacher.spec.decode else teacher.spec.main


def _steps(part: Part, teacher: Network) -> int:
    """Of a sequence's outputs."""
    if teacher.spec.decode:
        assert part.targets is not None
        return part.targets.shape[1]
    return part.inputs.shape[1] if teacher.spec.main.per_step else 1


def memory(*, cgroup: Path = Path("/sys/fs/cgroup/memory.max")) -> int | None:
    """Bytes that this process may have: the machine's, or fewer where a container or a limit of the process says so. None where nobody
    says."""
    found = []
    with contextlib.suppress(AttributeError, OSError, ValueError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no bound
        found.append(int(cgroup.read_text()))
    with contextlib.suppress(ImportError):
        import resource

        found += [soft for soft, _ in map(resource.getrlimit, (resource.RLIMIT_DATA, resource.RLIMIT_AS)) if soft != resource.RLIM_INFINITY]
    return min(found, default=None)


def _of_stream(part: Part, teacher: Network, *, task: tasks.Task, recipe: Recipe, walk: Walk) -> Tensor:
    """(rows,T,O) of the rows side by side that training walks along, from zero states."""
    feed = batches(part, recipe, task, length=1)
    rows, window = feed.rows, recipe.train.window
    answers = torch.zeros(*rows.shape, _outputs_of(teacher).output_size)
    for at, y in enumerate(_along((feed[k] for k in range(feed.per_pass)), teacher, task=task, walk=walk)):
        answers[:, at * window : at * window + len(y)] = y.transpose(0, 1)
    return answers


def _of_sequences(part: Part, teacher: Network, *, task: tasks.Task, recipe: Recipe, walk: Walk) -> Tensor:
    """(N,T,O), zeros behind a sequence's batch, or (N,O). Sequences of a length go together, so that little is padded."""
    section, window = _outputs_of(teacher), recipe.train.window
    shape = (len(part), _steps(part, teacher), section.output_size) if section.per_step else (len(part), section.output_size)
    answers = torch.zeros(shape)
    order = torch.arange(len(part)) if part.lengths is None else part.lengths.argsort(stable=True)
    for rows in order.split(rows_at_once(Candidate(teacher, FLOAT, walk), part, ROWS, _device(teacher))):
        batch = collate(part.take(rows))
        cuts = range(0, len(batch.inputs), window) if task.windowed else ()
        pieces = (cut_window(batch, start, window) for start in cuts) if len(cuts) > 1 else iter((batch,))
        found = list(_along(pieces, teacher, task=task, walk=walk))
        if section.per_step:
            y = torch.cat(found).transpose(0, 1)
            answers[rows, : y.shape[1]] = y
        else:
            answers[rows] = found[0]
    return answers


def _along(windows: Iterator[Batch], teacher: Network, *, task: tasks.Task, walk: Walk) -> Iterator[Tensor]:
    """The teacher's outputs on batches that follow each other, its state carried as training carries it."""
    state: State | None = None
    for batch in windows:
        prepared = tasks.prepare(task, batch.to(_device(teacher)), teacher, walk=walk)
        out = prepared.forward(teacher, mode=FLOAT, walk=walk, state=None if batch.first else state)
        state = out.state if task.windowed else None
        yield out.y.float().cpu()


def _device(teacher: Network) -> torch.device:
    return next(teacher.parameters()).device
