"""What a benchmark runs on: sequences as they are, cut into calls. A sequence begins from the zero state, as it does where it is used: a
state that is carried into the next one opens other gates, and reads other weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from rnn2bin.errors import UsageError
from rnn2bin.spec import RnnSpec

SEQUENCE = 100  # steps of a call, at most, where a sequence may be cut


@dataclass(frozen=True)
class Inputs:
    """Sequences end to end, pads left out: (N,) tokens or (N,…) floats, and how long each is; None: one long one."""

    values: np.ndarray
    lengths: tuple[int, ...] | None = None

    @classmethod
    def random(cls, spec: RnnSpec, steps: int, seed: int) -> Inputs:
        """One long sequence of the network's input."""
        generator, entry = np.random.default_rng(seed), spec.entry
        if entry.embedding:
            return cls(generator.integers(0, entry.embedding.num_embeddings, steps))
        return cls(generator.normal(size=(steps, *entry.input_shape)).astype(np.float32))

    @classmethod
    def read(cls, path: Path, spec: RnnSpec, vocabulary: Sequence[str] | None) -> Inputs:
        """Those of a file: a text is one sequence, tensors have many. Raises DataError where it does not fit the network."""
        from rnn2bin import data

        if path.suffix.lower() in (".txt", ".text"):
            return cls(data.encode_text(data.read_text(path), vocabulary).numpy())
        part = data.read_tensors(path)
        data.check_part(part, spec, where=str(path))
        lengths = [part.inputs.shape[1]] * len(part) if part.lengths is None else part.lengths.tolist()
        rows = [x[:n].numpy() for x, n in zip(part.inputs, lengths, strict=True)]
        return cls(np.concatenate(rows), tuple(n for n in lengths if n))


@dataclass(frozen=True)
class Call:
    """x (T,B,…), and whether sequences begin with it."""

    x: np.ndarray
    first: bool


def calls_of(inputs: Inputs, spec: RnnSpec, *, most: int, whole: bool = False, batch: int = 1) -> list[Call]:
    """Calls of at most `most` steps; `whole`: a sequence is one call, and of one long sequence every call is a sequence. One long sequence
    gives `batch` that run beside each other; of many each runs alone. Raises UsageError where there is not a step for each."""
    values = np.ascontiguousarray(inputs.values, np.int64 if spec.entry.embedding else np.float32)
    if inputs.lengths is None:
        return _beside(values, batch, most, whole=whole)
    if batch > 1:
        raise UsageError("bench: many sequences run one after another; a batch takes one long one")
    found = []
    for start, end in pairwise(np.cumsum((0, *inputs.lengths)).tolist()):
        step = end - start if whole else most
        found += [Call(np.ascontiguousarray(values[at : min(at + step, end), None]), at == start) for at in range(start, end, step)]
    if not found:
        raise UsageError("bench: the data have no steps")
    return found


def _beside(values: np.ndarray, batch: int, steps: int, *, whole: bool) -> list[Call]:
    length = len(values) // batch
    if not length:
        raise UsageError(f"bench: {len(values)} steps of data are too few for a batch of {batch}")
    rows, steps = values[: length * batch].reshape(batch, length, *values.shape[1:]).swapaxes(0, 1), min(steps, length)
    count = length // steps
    return [Call(np.ascontiguousarray(part), at == 0 or whole) for at, part in enumerate(np.split(rows[: count * steps], count))]


def mean_steps(found: Sequence[Call]) -> int:
    """Steps of a call, rounded."""
    return max(1, round(sum(len(one.x) for one in found) / len(found)))
