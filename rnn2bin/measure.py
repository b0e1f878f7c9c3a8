"""Running several networks over the same held-out part: the measurements that distillation selects by and reports are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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


MOST_NUMBERS = 2**25  # of one value in a batch, 128 MiB of float32

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
    judges_teacher: bool = True,
) -> dict[str, tasks.Measurement]:
    """Name -> measurement, "teacher" included but for `judges_teacher=False`: then its own metric, for which an encoder–decoder writes
    every sequence, is not taken. `seen` is shown every output (of the teacher under the name "teacher")."""
    everyone = {"teacher": teacher, **candidates}
    found: dict[str, list[tasks.Measurement]] = {name: [] for name in everyone if judges_teacher or name != "teacher"}
    states: dict[str, object] = dict.fromkeys(everyone)
    for batch in evaluation_batches(part, batch_size=rows_at_once(teacher, part, batch_size, device)):
        batch = batch.to(device)
        prepared = tasks.prepare(task, batch, teacher.network, walk=teacher.walk)
        wanted = None
        for name, one in everyone.items():
            state = None if batch.first else states[name]
            out = prepared.forward(one.network, mode=one.mode, walk=one.walk, state=state)
            states[name] = out.state if part.stream else None
            wanted = out.y if wanted is None else wanted
            if name in found:
                found[name].append(tasks.measure(task, prepared, one.network, wanted, out.y, mode=one.mode, walk=one.walk))
            if seen:
                seen(name, prepared, out)
    return {name: tasks.merge(parts) for name, parts in found.items()}


class _Largest(TorchDispatchMode):
    """Notes the numbers in the largest tensor that anything makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else [made]:
            self.numbers = max(self.numbers, one.numel() if isinstance(one, Tensor) else 0)
        return made


def rows_at_once(one: Candidate, part: Part, most: int, device: torch.device | str = "cpu") -> int:
    """Sequences that are run at once. What a graph's operations make may grow with T² (attention): seen on one sequence."""
    if part.stream or all(section.graph is None for section in one.network.spec.sections.values()):
        return most
    (first, *_) = evaluation_batches(part.take(torch.arange(1)), batch_size=1)
    first = first.to(device)
    with _Largest() as largest:
        one.network.entry(first.inputs, lengths=first.lengths, mode=one.mode, walk=one.walk)
    weights = max(weight.numel() for weight in one.network.parameters())
    return most if largest.numbers <= weights else max(1, min(most, MOST_NUMBERS // largest.numbers))


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
