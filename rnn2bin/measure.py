"""Running several networks over the same held-out part: the measurements that distillation selects by and reports are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rnn2bin import tasks
from rnn2bin.cells.network import Network, Output, Walk, walk
from rnn2bin.data import Part, evaluation_batches
from rnn2bin.gates.estimators import FLOAT, Discretize


@dataclass(frozen=True)
class Candidate:
    """A network (or what is called like one) with the mode its gates run in, and how its cells walk over time."""

    network: Any
    mode: Discretize
    walk: Walk = walk


Seen = Callable[[str, tasks.Prepared, Output], None]


@torch.no_grad()
def compare(
    task: tasks.Task,
    part: Part,
    teacher: Candidate,
    candidates: dict[str, Candidate],
    *,
    seen: Seen | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
) -> dict[str, tasks.Measurement]:
    """Name -> measurement, "teacher" included. `seen` is shown every output (of the teacher under the name "teacher")."""
    everyone = {"teacher": teacher, **candidates}
    found: dict[str, list[tasks.Measurement]] = {name: [] for name in everyone}
    states: dict[str, object] = dict.fromkeys(everyone)
    for batch in evaluation_batches(part, batch_size=batch_size):
        batch = batch.to(device)
        prepared = tasks.prepare(task, batch, teacher.network, walk=teacher.walk)
        wanted = None
        for name, one in everyone.items():
            state = None if batch.first else states[name]
            out = prepared.forward(one.network, mode=one.mode, walk=one.walk, state=state)
            states[name] = out.state if part.stream else None
            wanted = out.y if wanted is None else wanted
            found[name].append(tasks.measure(task, prepared, one.network, wanted, out.y, mode=one.mode, walk=one.walk))
            if seen:
                seen(name, prepared, out)
    return {name: tasks.merge(parts) for name, parts in found.items()}


def infer_readout(task_of: Callable[[Network], tasks.Task], part: Part, readouts: Sequence[Network]) -> Network:
    """Of networks that differ in what their head reads, the one whose metric on `part` is best: the file does not say which it was."""
    best: tuple[float, Network] | None = None
    for network in readouts:
        task = task_of(network)
        value = compare(task, part, Candidate(network, FLOAT), {})["teacher"].value
        score = value if task.higher_is_better else -value
        if best is None or score > best[0]:
            best = (score, network)
    assert best is not None
    return best[1]
