"""Tasks: what a network's outputs mean, the losses that follow from it, and the metrics that conversions are judged by.

A metric is kept as per-sequence totals and counts, so that the same numbers give the mean and the paired interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from rnn2bin.cells.network import Network, Output, Walk, valid_steps, walk
from rnn2bin.data import IGNORE, Batch, Part
from rnn2bin.errors import DataError
from rnn2bin.gates.estimators import Discretize
from rnn2bin.recipe import Loss, Recipe
from rnn2bin.spec import RnnSpec

HIGHER_IS_BETTER = {
    "bits_per_token": False,
    "accuracy": True,
    "mse": False,
    "cosine": True,
    "agreement": True,
    "sequence_accuracy": True,
    "token_error_rate": False,
}
DEFAULT_METRIC = {
    "next-token": "bits_per_token",
    "classify": "accuracy",
    "tag": "accuracy",
    "regress": "mse",
    "match": "cosine",
    "transduce": "sequence_accuracy",
}
METRICS = {
    "next-token": ("bits_per_token", "accuracy", "agreement"),
    "classify": ("accuracy", "agreement"),
    "tag": ("accuracy", "agreement"),
    "regress": ("mse", "cosine"),
    "match": ("cosine", "mse", "agreement"),
    "transduce": ("sequence_accuracy", "agreement"),
}


@dataclass(frozen=True)
class Task:
    """`name` and `metric` resolved; `spec` for what the outputs are."""

    name: str
    metric: str
    spec: RnnSpec

    @property
    def higher_is_better(self) -> bool:
        return HIGHER_IS_BETTER[self.metric]

    @property
    def binary_output(self) -> bool:
        """One output a step or sequence that is a yes or no: a logit of the sigmoid."""
        return self.spec.main.output_size == 1 and self.name in ("classify", "tag")

    @property
    def windowed(self) -> bool:
        """Whether training may cut sequences into windows: one direction, and an output at every step."""
        return self.spec.decode is None and self.spec.main.readout == "all" and all(layer.directions == 1 for layer in self.spec.main.layers)


def resolve(recipe: Recipe, spec: RnnSpec, part: Part) -> Task:
    """The task the recipe names, or the one the data say. Raises DataError where targets and outputs do not fit."""
    name = recipe.task if recipe.task != "auto" else _guess(spec, part)
    metric = recipe.metric if recipe.metric != "auto" else DEFAULT_METRIC[name]
    reasons = _misfits(name, metric, spec, part)
    if reasons:
        raise DataError(*reasons)
    return Task(name, metric, spec)


def _guess(spec: RnnSpec, part: Part) -> str:
    if spec.decode:
        return "transduce"
    if part.stream:
        return "next-token"
    targets, main = part.targets, spec.main
    if targets is None:
        vocabulary = main.embedding.num_embeddings if main.embedding else None
        return "next-token" if main.head and main.readout == "all" and vocabulary == main.output_size else "match"
    if targets.is_floating_point():
        return "regress"
    return "classify" if targets.ndim == 1 else "tag"


def _misfits(name: str, metric: str, spec: RnnSpec, part: Part) -> list[str]:
    reasons, targets, size = [], part.targets, spec.main.output_size
    if metric not in METRICS[name]:
        reasons.append(f"task {name}: metric {metric!r} does not fit; choose of {', '.join(METRICS[name])}")
    if name == "transduce" and spec.decode is None:
        reasons.append("task transduce: the network is not an encoder–decoder")
    if name != "transduce" and spec.decode is not None:
        reasons.append(f"task {name}: an encoder–decoder is converted with task transduce")
    if name == "next-token" and not (part.tokens and spec.main.embedding and size == spec.main.embedding.num_embeddings):
        reasons.append("task next-token: needs token inputs and one output for every token")
    if name in ("classify", "tag", "regress") and targets is None and not part.stream:
        reasons.append(f"task {name}: the data have no targets; give them, or use task match")
    if targets is not None and name in ("classify", "tag"):
        reasons += _label_misfits(name, targets, part, max(size, 2))
    if targets is not None and name == "regress" and targets.shape[-1] != size and not (size == 1 and targets.ndim == 1):
        reasons.append(f"task regress: targets have width {targets.shape[-1]}, the network's output {size}")
    return reasons


def _label_misfits(name: str, targets: Tensor, part: Part, classes: int) -> list[str]:
    if targets.is_floating_point():
        return [f"task {name}: targets must be whole numbers"]
    wanted = 1 if name == "classify" else 2
    if targets.ndim != wanted or wanted == 2 and targets.shape[1] != part.inputs.shape[1]:
        shape = "(N,)" if wanted == 1 else f"(N,{part.inputs.shape[1]})"
        return [f"task {name}: targets have shape {tuple(targets.shape)}; wanted {shape}"]
    valid = targets[targets != IGNORE]
    if valid.numel() == 0 or int(valid.min()) < 0 or int(valid.max()) >= classes:
        return [f"task {name}: labels must lie in 0…{classes - 1} (or {IGNORE}: not counted)"]
    return []


# ---------------------------------------------------------------------------------------------- one batch


@dataclass(frozen=True)
class Prepared:
    """A batch as the network reads it: `decoder_input` for encoder–decoders; `targets` (T,B) or (B,…) with `mask` of what counts."""

    batch: Batch
    targets: Tensor | None
    mask: Tensor  # (T,B) or (B,) bool
    lengths: Tensor | None
    inputs: Tensor
    decoder_input: Tensor | None = None
    decoder_lengths: Tensor | None = None

    def forward(self, network: Network, *, mode: Discretize, walk: Walk, state=None) -> Output:
        return network(
            self.inputs,
            state,
            lengths=self.lengths,
            decoder_input=self.decoder_input,
            decoder_lengths=self.decoder_lengths,
            mode=mode,
            walk=walk,
            logits=True,
        )


def prepare(task: Task, batch: Batch, teacher: Network, *, walk: Walk = walk) -> Prepared:
    """Targets, masks and decoder inputs of a batch. An unlabelled transduction batch gets the teacher's own free-running output."""
    if task.name == "transduce":
        return _prepare_transduce(task, batch, teacher, walk)
    inputs, lengths, targets = batch.inputs, batch.lengths, batch.targets
    if task.name == "next-token" and targets is None:
        inputs, targets = inputs[:-1], inputs[1:]
        lengths = None if lengths is None else (lengths - 1).clamp_min(0)
    steps, rows = inputs.shape[:2]
    if task.spec.main.readout != "all":
        mask = torch.ones(rows, dtype=torch.bool, device=inputs.device)
    else:
        mask = inputs.new_ones(steps, rows, dtype=torch.bool) if lengths is None else valid_steps(lengths, steps)[..., 0]
    if task.name == "tag" and targets is not None:
        mask = mask & (targets != IGNORE)
    return Prepared(batch, targets, mask, lengths, inputs)


def _prepare_transduce(task: Task, batch: Batch, teacher: Network, walk: Walk) -> Prepared:
    decode = task.spec.decode
    assert decode is not None
    targets, lengths = batch.targets, batch.target_lengths
    if targets is None:
        targets = teacher.generate(batch.inputs, lengths=batch.lengths, walk=walk)
        lengths = (targets != decode.end).sum(0) + 1
        lengths = lengths.clamp_max(len(targets))
    if lengths is None:
        lengths = ((targets == decode.end).cumsum(0) == 0).sum(0).add(1).clamp_max(len(targets))
    fed = torch.cat([torch.full_like(targets[:1], decode.start), targets[:-1]])
    mask = valid_steps(lengths, len(targets))[..., 0]
    return Prepared(batch, targets, mask, batch.lengths, batch.inputs, fed, lengths)


# ---------------------------------------------------------------------------------------------- losses


def loss(task: Task, weights: Loss, prepared: Prepared, student: Tensor, teacher: Tensor) -> Tensor:
    """Weighted mean of the loss against labels and the loss against the teacher's outputs; a task without labels uses the latter alone."""
    labelled = prepared.targets is not None and task.name != "match" and weights.task > 0
    parts = []
    if labelled:
        parts.append((weights.task, task_loss(task, prepared, student)))
    if weights.teacher > 0 or not labelled:
        parts.append((weights.teacher or 1.0, teacher_loss(task, weights, prepared, student, teacher)))
    return sum(w * value for w, value in parts) / sum(w for w, _ in parts)  # type: ignore[return-value]


def task_loss(task: Task, prepared: Prepared, y: Tensor) -> Tensor:
    return (example_losses(task, prepared, y) * prepared.mask).sum() / prepared.mask.sum().clamp_min(1)


def example_losses(task: Task, prepared: Prepared, y: Tensor) -> Tensor:
    """Loss of each step or sequence against its label, shaped like the mask; pads hold anything finite."""
    targets = prepared.targets
    assert targets is not None
    if task.name == "regress":
        return (y - targets.reshape(y.shape)).square().mean(-1)
    safe = targets.clamp_min(0)
    if task.binary_output:
        return functional.binary_cross_entropy_with_logits(y[..., 0], safe.to(y.dtype), reduction="none")
    return functional.cross_entropy(y.flatten(0, -2), safe.flatten(), reduction="none").view(safe.shape)


def teacher_loss(task: Task, weights: Loss, prepared: Prepared, student: Tensor, teacher: Tensor) -> Tensor:
    """KL between the distributions at `weights.temperature`; squared error, in units of the teacher's variance, where outputs are no logits."""
    mask, scale = prepared.mask, weights.temperature
    if distribution(task) == "values":
        error = (student - teacher).square().mean(-1)
        spread = teacher[mask].var(0, unbiased=False).mean().clamp_min(1e-8) if int(mask.sum()) > 1 else teacher.new_ones(())
        return (error * mask).sum() / mask.sum().clamp_min(1) / spread
    if distribution(task) == "bernoulli":
        # Cross-entropy less the teacher's own entropy: zero when both agree.
        p = torch.sigmoid(teacher / scale)
        kl = functional.binary_cross_entropy_with_logits(student / scale, p, reduction="none")
        kl = (kl - functional.binary_cross_entropy_with_logits(teacher / scale, p, reduction="none")).mean(-1)
    else:
        log_q, log_p = functional.log_softmax(student / scale, -1), functional.log_softmax(teacher / scale, -1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return (kl * mask).sum() / mask.sum().clamp_min(1) * scale**2


def distribution(task: Task) -> str:
    """What the outputs are: "categorical" logits, "bernoulli" logits, or "values"."""
    head = task.spec.main.head
    activation = head[-1].activation if head else "none"
    if activation == "sigmoid" or task.binary_output:
        return "bernoulli"
    if activation in ("softmax", "log_softmax") or task.name in ("next-token", "classify", "tag", "transduce"):
        return "categorical"
    return "values"


# ---------------------------------------------------------------------------------------------- metrics


@dataclass(frozen=True)
class Measurement:
    """Per-sequence totals and counts (N,) of the metric, mean loss, and further metrics by name (each as totals and counts)."""

    metric: str
    totals: Tensor
    counts: Tensor
    loss: float
    extra: dict[str, tuple[Tensor, Tensor]]

    @property
    def value(self) -> float:
        return _ratio(self.totals, self.counts)

    def extra_values(self) -> dict[str, float]:
        return {name: _ratio(*pair) for name, pair in self.extra.items()}

    def to_dict(self) -> dict[str, object]:
        return {"metric": self.value, "loss": self.loss, "n": len(self.totals), "extra": self.extra_values()}


def _ratio(totals: Tensor, counts: Tensor) -> float:
    return float(totals.double().sum() / counts.double().sum().clamp_min(1e-12))


def per_sequence(prepared: Prepared, values: Tensor) -> tuple[Tensor, Tensor]:
    """values shaped like the mask -> totals and counts for each sequence."""
    masked, counts = values * prepared.mask, prepared.mask.to(values.dtype)
    if masked.ndim == 1:
        return masked, counts
    return masked.sum(0), counts.sum(0)


def measure(task: Task, prepared: Prepared, network: Network, teacher_y: Tensor, y: Tensor, *, mode: Discretize, walk: Walk = walk) -> Measurement:
    """One batch: `y` and `teacher_y` are logits. Encoder–decoders also run free."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    add = lambda name, values: found.__setitem__(name, per_sequence(prepared, values))  # noqa: E731
    kind = distribution(task)
    labelled = prepared.targets is not None and task.name != "match"
    losses = example_losses(task, prepared, y) if labelled else (y - teacher_y).square().mean(-1)
    if kind == "values":
        add("cosine", functional.cosine_similarity(y, teacher_y, dim=-1))
        if task.name in ("regress", "match"):
            add("mse", losses)
    else:
        decide = (lambda t: (t[..., 0] > 0).long()) if task.binary_output else (lambda t: t.argmax(-1))
        if kind == "bernoulli" and not task.binary_output:
            add("agreement", ((y > 0) == (teacher_y > 0)).float().mean(-1))
            add("cosine", functional.cosine_similarity(torch.sigmoid(y), torch.sigmoid(teacher_y), dim=-1))
        else:
            add("agreement", (decide(y) == decide(teacher_y)).float())
        if labelled and task.name != "regress":
            name = "teacher_forced_accuracy" if task.name == "transduce" else "accuracy"
            if not (kind == "bernoulli" and not task.binary_output):
                add(name, (decide(y) == prepared.targets).float())
        if task.name == "match" and kind == "categorical":
            add("cosine", functional.cosine_similarity(y.softmax(-1), teacher_y.softmax(-1), dim=-1))
            add("mse", losses)
    if task.name == "next-token":
        add("bits_per_token", losses / math.log(2))
    if task.name == "transduce":
        found |= _free_running(task, prepared, network, mode, walk)
    totals, counts = found.pop(task.metric)
    return Measurement(task.metric, totals, counts, _ratio(*per_sequence(prepared, losses)), found)


def _free_running(task: Task, prepared: Prepared, network: Network, mode: Discretize, walk: Walk) -> dict[str, tuple[Tensor, Tensor]]:
    """Words right and token error rate of greedy decoding, against the targets of the batch."""
    decode = task.spec.decode
    assert decode is not None and prepared.targets is not None
    written = network.generate(prepared.inputs, lengths=prepared.lengths, mode=mode, walk=walk).t().tolist()
    references = prepared.targets.t().tolist()
    right, edits, lengths = [], [], []
    for ours, reference in zip(written, references, strict=True):
        ours, reference = _until(ours, decode.end), _until(reference, decode.end)
        distance = edit_distance(ours, reference)
        right.append(float(distance == 0))
        edits.append(float(distance))
        lengths.append(float(len(reference)))
    ones = torch.ones(len(right))
    return {"sequence_accuracy": (torch.tensor(right), ones), "token_error_rate": (torch.tensor(edits), torch.tensor(lengths))}


def _until(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens


def edit_distance(a: list[int], b: list[int]) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def merge(parts: list[Measurement]) -> Measurement:
    """Batches of one part -> the part."""
    weights = torch.tensor([float(p.counts.sum()) for p in parts])
    losses = torch.tensor([p.loss for p in parts])
    extra = {
        name: (torch.cat([p.extra[name][0] for p in parts]), torch.cat([p.extra[name][1] for p in parts])) for name in parts[0].extra
    }
    mean = float((losses * weights).sum() / weights.sum().clamp_min(1e-12))
    return Measurement(parts[0].metric, torch.cat([p.totals for p in parts]), torch.cat([p.counts for p in parts]), mean, extra)
