"""The held-out sequences on which the binary network loses most against the teacher, with what both of them gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rnn2bin import tasks
from rnn2bin.cells.network import Output
from rnn2bin.data import IGNORE, TEXT_BLOCK, Names, Part
from rnn2bin.measure import Candidate, compare

WORST = 6
STEPS = 48  # of a long sequence: those around the step that lost most


def ranked(task: tasks.Task, teacher: tasks.Measurement, binary: tasks.Measurement) -> list[tuple[int, float]]:
    """(index, metric lost) of at most WORST sequences that lost any, the worst first; of equals the one whose loss grew more."""
    mean = lambda totals, counts: totals.double() / counts.double().clamp_min(1)
    lost = mean(teacher.totals, teacher.counts) - mean(binary.totals, binary.counts)
    lost = lost if task.higher_is_better else -lost
    grew = mean(*binary.losses) - mean(*teacher.losses)
    order = sorted(range(len(lost)), key=lambda k: (-float(lost[k]), -float(grew[k]), k))[:WORST]
    return [(k, float(lost[k])) for k in order if lost[k] > 0]


def worst(
    task: tasks.Task,
    part: Part,
    *,
    teacher: Candidate,
    binary: Candidate,
    measured: dict[str, tasks.Measurement],
    names: Names,
) -> list[dict[str, Any]]:
    """report.json's `worst`: {index, input, target, teacher, binary, difference, metric {teacher, binary}, steps}.

    `teacher`, `binary`: what each gave, in words. `steps`, where the network gives one output a step: [{input, target, teacher, binary,
    lost}] of at most STEPS steps, `lost` in nats against the label, or in what the outputs differ. The networks run once more on these
    sequences.
    """
    chosen = ranked(task, measured["teacher"], measured["binary"])
    if not chosen:
        return []
    outputs = _Outputs(task, part, [index for index, _ in chosen])
    compare(task, outputs.part, teacher, {"binary": binary}, seen=outputs.seen)
    rows = []
    for place, (index, lost) in enumerate(chosen):
        scores = {name: _mean(measured[name], index) for name in ("teacher", "binary")}
        shown = outputs.row(place, {"teacher": teacher, "binary": binary}, names)
        rows.append({"index": index, **shown, "difference": f"{lost:.4g} {task.metric}", "metric": scores})
    return rows


def _mean(measurement: tasks.Measurement, index: int) -> float:
    return float(measurement.totals[index].double() / measurement.counts[index].double().clamp_min(1))


@dataclass(frozen=True)
class _Seen:
    """One sequence: inputs (T,…), targets and mask as the task has them, outputs (T′,O) or (O,) of both networks."""

    inputs: Tensor
    targets: Tensor | None
    mask: Tensor
    y: dict[str, Tensor]


class _Outputs:
    """Runs a part of a few sequences and keeps what `row` needs of each."""

    def __init__(self, task: tasks.Task, part: Part, indices: Sequence[int]) -> None:
        self.task, self.stream = task, part.stream
        if part.stream:  # rows are read from their start: their state is carried
            self.at = [divmod(index, len(part)) for index in indices]  # (window, row)
            end = (max(window for window, _ in self.at) + 1) * TEXT_BLOCK + 1
            self.part = replace(part, inputs=part.inputs[[row for _, row in self.at], :end])
        else:
            self.at = [(0, place) for place in range(len(indices))]
            self.part = part.take(torch.tensor(indices))
        self.found: dict[int, _Seen] = {}
        self.y: dict[str, Tensor] = {}
        self.prepared: list[tasks.Prepared] = []
        self.window = -1

    def seen(self, name: str, prepared: tasks.Prepared, out: Output) -> None:
        if name == "teacher":
            self.window += 1
            self.prepared.append(prepared)
        self.y[name] = out.y.detach().float().cpu()
        if name != "binary":
            return
        first = sum(one.inputs.shape[1] for one in self.prepared[:-1]) if not self.stream else 0
        for place, (window, _) in enumerate(self.at):
            column = place if self.stream else place - first
            if (self.stream and window != self.window) or not 0 <= column < prepared.inputs.shape[1]:
                continue
            pick = lambda t, column=column: t[:, column] if t.ndim > 1 else t[column]
            targets = None if prepared.targets is None else self._targets(prepared, column)
            per_step = prepared.mask.ndim == 2
            ys = {who: (y[:, column] if per_step else y[column]) for who, y in self.y.items()}
            self.found[place] = _Seen(self._real(prepared, column), targets, pick(prepared.mask).cpu(), ys)

    @staticmethod
    def _real(prepared: tasks.Prepared, column: int) -> Tensor:
        steps = len(prepared.inputs) if prepared.lengths is None else int(prepared.lengths[column])
        return prepared.inputs[:steps, column].cpu()

    @staticmethod
    def _targets(prepared: tasks.Prepared, column: int) -> Tensor:
        assert prepared.targets is not None
        return (prepared.targets[:, column] if prepared.mask.ndim == 2 else prepared.targets[column]).cpu()

    def row(self, place: int, networks: dict[str, Candidate], names: Names) -> dict[str, Any]:
        one = self.found[place]
        if self.task.name == "transduce":
            return self._transduced(place, one, networks, names)
        if one.mask.ndim == 0:
            answers = {who: self._answer(y, names) for who, y in one.y.items()}
            target = None if one.targets is None or one.targets.ndim else _name(names.outputs, int(one.targets))
            return {"input": shown(one.inputs, names.inputs), "target": target, **answers, "steps": None}
        return self._per_step(one, names)

    def _transduced(self, place: int, one: _Seen, networks: dict[str, Candidate], names: Names) -> dict[str, Any]:
        """Free-running outputs, as the metric reads them."""
        decode = self.task.spec.decode
        assert decode is not None
        until = lambda tokens: tokens[: tokens.index(decode.end)] if decode.end in tokens else tokens
        written = {
            who: candidate.network.generate(one.inputs[:, None], mode=candidate.mode, walk=candidate.walk)[:, 0].tolist()
            for who, candidate in networks.items()
        }
        words = {who: " ".join(_name(names.outputs, token) for token in until(tokens)) for who, tokens in written.items()}
        target = None if one.targets is None else " ".join(_name(names.outputs, t) for t in until(one.targets.tolist()))
        return {"input": shown(one.inputs, names.inputs), "target": target, **words, "steps": None}

    def _answer(self, y: Tensor, names: Names) -> str:
        """One output of a sequence, (O,), in words: the class and its probability; the values where there are few."""
        if tasks.distribution(self.task) == "values" or (tasks.distribution(self.task) == "bernoulli" and not self.task.binary_output):
            return " ".join(f"{value:.3g}" for value in y[:4].tolist()) + (" …" if len(y) > 4 else "")
        token, probability = _decided(self.task, y)
        return f"{_name(names.outputs, int(token))} ({float(probability):.0%})"

    def _per_step(self, one: _Seen, names: Names) -> dict[str, Any]:
        lost = self._lost(one) * one.mask
        steps = min(int(one.mask.nonzero().max()) + 1, len(lost)) if bool(one.mask.any()) else len(lost)
        start = max(0, min(int(lost.argmax()) - STEPS // 2, steps - STEPS))
        window = range(start, min(start + STEPS, steps))
        values = tasks.distribution(self.task) == "values" or (tasks.distribution(self.task) == "bernoulli" and not self.task.binary_output)
        outputs = names.inputs if self.task.name == "next-token" else names.outputs
        decided = {} if values else {who: _decided(self.task, y)[0].tolist() for who, y in one.y.items()}
        aligned = not one.inputs.is_floating_point() and len(one.inputs) >= steps
        counted = lambda t: bool(one.mask[t]) and (one.targets is None or one.targets.ndim > 1 or int(one.targets[t]) != IGNORE)
        rows = [
            {
                "input": _name(names.inputs, int(one.inputs[t])) if aligned else None,
                "target": _name(outputs, int(one.targets[t])) if one.targets is not None and not values and counted(t) else None,
                **{who: _name(outputs, tokens[t]) if counted(t) else None for who, tokens in decided.items()},
                "lost": round(float(lost[t]), 4),
            }
            for t in window
        ]
        join = lambda who: None if values else shown_words([str(row[who]) for row in rows if row.get(who) is not None])
        part = one.inputs[start : start + len(rows)] if aligned else one.inputs
        return {
            "input": shown(part, names.inputs),
            "target": join("target") or None,
            "teacher": join("teacher") or NONE,
            "binary": join("binary") or NONE,
            "steps": rows,
        }

    def _lost(self, one: _Seen) -> Tensor:
        """(T′,) how much more the binary network lost at each step: in nats where there are labels, else the squared difference."""
        labelled = one.targets is not None and self.task.name in ("next-token", "tag") and not one.targets.is_floating_point()
        if not labelled or one.targets is None:
            return (one.y["teacher"] - one.y["binary"]).square().mean(-1)
        safe = one.targets.clamp_min(0)
        if self.task.binary_output:
            of = lambda y: functional.binary_cross_entropy_with_logits(y[..., 0], safe.to(y.dtype), reduction="none")
        else:
            of = lambda y: functional.cross_entropy(y, safe, reduction="none")
        return of(one.y["binary"]) - of(one.y["teacher"])


NONE = "–"


def _decided(task: tasks.Task, y: Tensor) -> tuple[Tensor, Tensor]:
    """The class decided for, and its probability. y (…,O)"""
    if task.binary_output:
        p = torch.sigmoid(y[..., 0])
        return (p > 0.5).long(), torch.maximum(p, 1 - p)
    p = y.softmax(-1)
    return p.argmax(-1), p.amax(-1)


def _name(names: Sequence[str] | None, token: int) -> str:
    return names[token] if names and 0 <= token < len(names) else str(token)


def shown(inputs: Tensor, names: Sequence[str] | None, most: int = 60) -> str:
    """A sequence in a line: its tokens, or its shape."""
    if inputs.is_floating_point():
        return f"{len(inputs)} steps of {' × '.join(map(str, inputs.shape[1:])) or 'one'} numbers"
    return shown_words([_name(names, token) for token in _unpadded(inputs.tolist())[:most]])


def _unpadded(tokens: list[int], least: int = 8) -> list[int]:
    """Without a long run of one token at the end: a pad that no length told of. Two of it stay."""
    same = next((k for k, token in enumerate(reversed(tokens)) if token != tokens[-1]), len(tokens))
    return tokens[: len(tokens) - same + 2] if same >= least else tokens


def shown_words(words: Sequence[str]) -> str:
    """Characters close together (names such as <unk> among them do not matter), words apart."""
    letters = all(len(word) == 1 or word[:1] + word[-1:] == "<>" for word in words)
    return ("" if letters else " ").join(words)
