"""A student on the validation part: the two figures that a search is about."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rnn2bin import evaluation
from rnn2bin.cells.network import Network
from rnn2bin.distill.window import run_cell
from rnn2bin.evaluation.density import DensityCounter
from rnn2bin.gates.estimators import BINARY, FLOAT
from rnn2bin.measure import Candidate, compare
from rnn2bin.search.front import Found


def blind(job: Any) -> Any:
    """The job without the part held out for the report: what chooses cannot see it."""
    return replace(job, parts=replace(job.parts, test=None))


def measure(job: Any, network: Network, *, what: Any = None) -> Found:
    """With bits, on the whole validation part. Where the float network's metric is 0 the drop is the plain difference."""
    counter = DensityCounter(network)
    found = compare(
        job.task,
        job.parts.valid,
        Candidate(job.teacher, FLOAT, run_cell),
        {"binary": Candidate(network, BINARY, run_cell)},
        seen=lambda name, prepared, out: counter.add(prepared, out) if name == "binary" else None,
    )
    lost = evaluation.drop(job.task, found["teacher"], found["binary"])
    relative, highest = lost["relative"], lost["ci95"][1]
    if relative is None or not lost["value"]:
        scale = abs(found["teacher"].value) or 1.0
    else:
        scale = lost["value"] / relative
    return Found(lost["value"] / scale, counter.result()["read"], highest / scale, what)
