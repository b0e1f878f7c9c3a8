"""Tasks: what a network's outputs mean, the losses that follow from it, and the metrics that conversions are judged by.

A metric is kept as per-sequence totals and counts, so that the same numbers give the mean and the paired interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

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
        return self.spec.decode is None and self.spec.main.windowed


def resolve(recipe: Recipe, spec: RnnSpec, part: Part) -> Task:
    """The task the recipe names, or the one the data say. Raises DataError where targets and outputs do not fit."""
    name = recipe.task if recipe.task != "auto" else _guess(spec, part)
    metric = recipe.metric if recipe.metric != "auto" else _default_metric(name, spec)
    reasons = _misfits(name, metric, spec, part)
    if reasons:
        raise DataError(*reasons)
    return Task(name, metric, spec)


def _default_metric(name: str, spec: RnnSpec) -> str:
    """Two numbers of one sign always point the same way: a single output is compared by its value."""
    return "mse" if name == "match" and spec.main.output_size == 1 else DEFAULT_METRIC[name]


def _guess(spec: RnnSpec, part: Part) -> str:
    if spec.decode:
        return "transduce"
    if part.stream:
        return "next-token"
    targets, main = part.targets, spec.main
    if targets is None:
        vocabulary = main.embedding.num_embeddings if main.embedding else None
        return "next-token" if (main.head or main.graph) and main.per_step and vocabulary == main.output_size else "match"
    if targets.is_floating_point():
        return "regress"
    return "classify" if targets.ndim == 1 else "tag"


def settled(task: Task, part: Part) -> Part:
    """The part as `prepare` reads its batches: next tokens as targets, lengths of what is written, whether targets have a time axis."""
    targets, lengths = part.targets, part.target_lengths
    if task.name == "next-token":
        part = _next_tokens(part)
    if task.spec.decode is not None and targets is not None:
        targets = targets.masked_fill(targets == IGNORE, task.spec.decode.end)
        part = replace(part, targets=targets, target_lengths=_written(targets.t(), task.spec) if lengths is None else lengths)
    return replace(part, per_sequence=not task.spec.main.per_step)


def _next_tokens(part: Part) -> Part:
    """Sequences (N,T) without targets -> inputs without the last token, targets without the first. Done for the whole part: cut inside a
    window, the last token of each window would be neither read nor predicted."""
    if part.stream or part.targets is not None:
        return part
    if part.inputs.shape[1] < 2:
        raise DataError(f"task next-token: inputs have shape {tuple(part.inputs.shape)}; sequences need at least 2 tokens")
    lengths = None if part.lengths is None else part.lengths - 1
    if lengths is not None and not int(lengths.max()):
        raise DataError("task next-token: every sequence has length 1; there is no next token to predict")
    return replace(part, inputs=part.inputs[:, :-1].contiguous(), targets=part.inputs[:, 1:].contiguous(), lengths=lengths)


def _written(targets: Tensor, spec: RnnSpec) -> Tensor:
    """Targets (U,B) -> steps of each up to and with the end token (B,)."""
    assert spec.decode is not None
    return ((targets == spec.decode.end).cumsum(0) == 0).sum(0).add(1).clamp_max(len(targets))


def _misfits(name: str, metric: str, spec: RnnSpec, part: Part) -> list[str]:
    reasons, targets, size = [], part.targets, spec.main.output_size
    if metric not in METRICS[name]:
        reasons.append(f"task {name}: metric {metric!r} does not fit; choose of {', '.join(METRICS[name])}")
    if name == "match" and metric == "agreement" and _last_activation(spec) not in _DISTRIBUTIONS:
        reasons.append("task match: metric 'agreement' needs a network that ends in sigmoid or softmax; choose cosine or mse")
    if name == "transduce" and spec.decode is None:
        reasons.append("task transduce: the network is not an encoder–decoder")
    if name != "transduce" and spec.decode is not None:
        reasons.append(f"task {name}: an encoder–decoder is converted with task transduce")
    if name == "next-token" and not (part.tokens and spec.main.embedding and size == spec.main.embedding.num_embeddings):
        reasons.append("task next-token: needs token inputs and one output for every token")
    if name in ("classify", "tag", "regress") and targets is None and not part.stream:
        reasons.append(f"task {name}: the data have no targets; give them, or use task match")
    if targets is not None and name in ("classify", "tag"):
        reasons += _label_misfits(name, targets, part, spec, max(size, 2))
    if targets is not None and name in ("next-token", "transduce"):
        reasons += _label_misfits(name, targets, part, spec, size)
    if targets is not None and name == "regress":
        reasons += _value_misfits(spec, part, targets)
    if targets is not None and name in ("classify", "tag") and (name == "tag") != spec.main.per_step:
        every = "every step" if spec.main.per_step else "a whole sequence" + ("" if spec.main.graph else f" ({spec.main.readout})")
        reasons.append(f"task {name}: the network gives one output for {every}; see source.readout, or give targets of that shape")
    return reasons


def _value_misfits(spec: RnnSpec, part: Part, targets: Tensor) -> list[str]:
    """Float targets: the shape of the outputs, whose last axis may be left out where it is 1."""
    size, (rows, steps) = spec.main.output_size, part.inputs.shape[:2]
    if spec.main.graph and spec.main.per_step:
        steps = targets.shape[1] if targets.ndim > 1 else steps
    wanted: tuple[int, ...] = (rows, steps, size) if spec.main.per_step else (rows, size)
    if tuple(targets.shape) == wanted or (size == 1 and tuple(targets.shape) == wanted[:-1]):
        return []
    return [f"task regress: targets have shape {tuple(targets.shape)}; the network's outputs have shape {wanted}"]


def _label_misfits(name: str, targets: Tensor, part: Part, spec: RnnSpec, classes: int) -> list[str]:
    if targets.is_floating_point():
        return [f"task {name}: targets must be whole numbers"]
    wanted = 1 if name == "classify" else 2
    steps = "U" if name == "transduce" or spec.main.graph else part.inputs.shape[1]  # a graph may give fewer steps than it reads
    if targets.ndim != wanted or (wanted == 2 and steps not in ("U", targets.shape[1])):
        shape = "(N,)" if wanted == 1 else f"(N,{steps})"
        return [f"task {name}: targets have shape {tuple(targets.shape)}; wanted {shape}"]
    valid = targets[targets != IGNORE]
    if valid.numel() == 0 or int(valid.min()) < 0 or int(valid.max()) >= classes:
        found = f"found {int(targets.min())}…{int(targets.max())}"
        return [f"task {name}: labels must lie in 0…{classes - 1} (or {IGNORE}: not counted); {found}"]
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
    logits: bool = True  # values to regress are compared behind the last activation

    @property
    def steps(self) -> int:
        """Real steps of the batch: what the network reads, the decoder's included."""
        pairs = [(self.inputs, self.lengths)]
        if self.decoder_input is not None:
            pairs.append((self.decoder_input, self.decoder_lengths))
        return sum(x.shape[0] * x.shape[1] if lengths is None else int(lengths.sum()) for x, lengths in pairs)

    def forward(self, network: Network, *, mode: Discretize, walk: Walk, state=None) -> Output:
        return network(
            self.inputs,
            state,
            lengths=self.lengths,
            decoder_input=self.decoder_input,
            decoder_lengths=self.decoder_lengths,
            mode=mode,
            walk=walk,
            logits=self.logits,
        )


def prepare(task: Task, batch: Batch, teacher: Network, *, walk: Walk = walk) -> Prepared:
    """Targets, masks and decoder inputs of a batch. An unlabelled transduction batch gets the teacher's own free-running output."""
    if task.name == "transduce":
        return _prepare_transduce(task, batch, teacher, walk)
    inputs, lengths, targets = batch.inputs, batch.lengths, batch.targets
    if task.name == "next-token" and targets is None:
        inputs, targets = inputs[:-1], inputs[1:]
        lengths = None if lengths is None else (lengths - 1).clamp_min(0)
    steps, rows = teacher.output_steps(inputs), inputs.shape[1]
    if not task.spec.main.per_step:
        mask = torch.ones(rows, dtype=torch.bool, device=inputs.device)
    else:
        mask = inputs.new_ones(steps, rows, dtype=torch.bool) if lengths is None else valid_steps(lengths, steps)[..., 0]
    if targets is not None and task.name in ("tag", "regress") and task.spec.main.per_step and len(targets) != steps:
        raise DataError(f"task {task.name}: targets have {len(targets)} steps; for {len(inputs)} steps of input the network gives {steps}")
    if task.name in ("classify", "tag", "next-token") and targets is not None:
        mask = mask & (targets != IGNORE)
    return Prepared(batch, targets, mask, lengths, inputs, logits=task.name != "regress")


def _prepare_transduce(task: Task, batch: Batch, teacher: Network, walk: Walk) -> Prepared:
    decode = task.spec.decode
    assert decode is not None
    targets, lengths = batch.targets, batch.target_lengths
    if targets is None:
        targets = teacher.generate(batch.inputs, lengths=batch.lengths, walk=walk)
        lengths = _written(targets, task.spec)
    if lengths is None:
        lengths = _written(targets, task.spec)
    fed = torch.cat([torch.full_like(targets[:1], decode.start), targets[:-1]])
    mask = valid_steps(lengths, len(targets))[..., 0]
    return Prepared(batch, targets, mask, batch.lengths, batch.inputs, fed, lengths)


# ---------------------------------------------------------------------------------------------- losses


def loss(task: Task, weights: Loss, prepared: Prepared, student: Tensor, teacher: Tensor) -> Tensor:
    """Weighted mean of the loss against labels and the loss against the teacher's outputs; a task without labels uses the latter alone."""
    labels, outputs = _shares(task, weights, prepared)
    parts = [labels * task_loss(task, prepared, student)] if labels else []
    if outputs:
        parts.append(outputs * teacher_loss(task, weights, prepared, student, teacher))
    return sum(parts) / (labels + outputs)  # type: ignore[return-value]


def sequence_losses(task: Task, weights: Loss, prepared: Prepared, student: Tensor, teacher: Tensor) -> Tensor:
    """`loss` before sequences are averaged: one for each (B,), whose mean over the batch is `loss`."""
    labels, outputs = _shares(task, weights, prepared)
    each = student.new_zeros(prepared.mask.shape)
    if labels:
        each = each + labels * example_losses(task, prepared, student)
    if outputs:
        each = each + outputs * teacher_losses(task, weights, prepared, student, teacher)
    each = each * prepared.mask / ((labels + outputs) * prepared.mask.sum().clamp_min(1))
    return (each.sum(0) if each.ndim == 2 else each) * each.shape[-1]


def _shares(task: Task, weights: Loss, prepared: Prepared) -> tuple[float, float]:
    """What labels and what the teacher's outputs count for; 0: not looked at."""
    labels = weights.task if prepared.targets is not None and task.name != "match" else 0.0
    return labels, weights.teacher or (0.0 if labels else 1.0)


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
    """Mean over what counts of `teacher_losses`."""
    return (teacher_losses(task, weights, prepared, student, teacher) * prepared.mask).sum() / prepared.mask.sum().clamp_min(1)


def teacher_losses(task: Task, weights: Loss, prepared: Prepared, student: Tensor, teacher: Tensor) -> Tensor:
    """KL between the distributions at `weights.temperature`; squared error in the teacher's variance where outputs are no logits. Of each
    step or sequence, shaped like the mask."""
    mask, scale = prepared.mask, weights.temperature
    if distribution(task) == "values":
        spread = teacher[mask].var(0, unbiased=False).mean().clamp_min(1e-8) if int(mask.sum()) > 1 else teacher.new_ones(())
        return (student - teacher).square().mean(-1) / spread
    if distribution(task) == "bernoulli":
        # Cross-entropy less the teacher's own entropy: zero when both agree.
        p = torch.sigmoid(teacher / scale)
        kl = functional.binary_cross_entropy_with_logits(student / scale, p, reduction="none")
        kl = (kl - functional.binary_cross_entropy_with_logits(teacher / scale, p, reduction="none")).mean(-1)
    else:
        log_q, log_p = functional.log_softmax(student / scale, -1), functional.log_softmax(teacher / scale, -1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return kl * scale**2


def distribution(task: Task) -> str:
    """What the outputs are: "categorical" logits, "bernoulli" logits, or "values"."""
    if task.binary_output:
        return "bernoulli"
    if task.name != "match":
        return "values" if task.name == "regress" else "categorical"
    return _DISTRIBUTIONS.get(_last_activation(task.spec), "values")


_DISTRIBUTIONS = {"sigmoid": "bernoulli", "softmax": "categorical", "log_softmax": "categorical"}


def _last_activation(spec: RnnSpec) -> str:
    return spec.main.activation


# ---------------------------------------------------------------------------------------------- metrics


@dataclass(frozen=True)
class Measurement:
    """Per-sequence totals and counts (N,) of the metric, of the loss, and of further metrics by name."""

    metric: str
    totals: Tensor
    counts: Tensor
    losses: tuple[Tensor, Tensor]
    extra: dict[str, tuple[Tensor, Tensor]]

    @property
    def value(self) -> float:
        return _ratio(self.totals, self.counts)

    @property
    def loss(self) -> float:
        return _ratio(*self.losses)

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


def measure(
    task: Task, prepared: Prepared, network: Network, teacher_y: Tensor, y: Tensor, *, mode: Discretize, walk: Walk = walk
) -> Measurement:
    """One batch: `y` and `teacher_y` are logits. Encoder–decoders also run free."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    add = lambda name, values: found.__setitem__(name, per_sequence(prepared, values))
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
            add("mse", losses)
        else:
            add("agreement", (decide(y) == decide(teacher_y)).float())
        if labelled and task.name != "regress":
            name = "teacher_forced_accuracy" if task.name == "transduce" else "accuracy"
            add(name, (decide(y) == prepared.targets).float())
        if task.name == "match" and kind == "categorical":
            add("cosine", functional.cosine_similarity(y.softmax(-1), teacher_y.softmax(-1), dim=-1))
            add("mse", losses)
    if task.name == "next-token":
        add("bits_per_token", losses / math.log(2))
    if task.name == "transduce":
        found |= _free_running(task, prepared, network, mode, walk)
    totals, counts = found.pop(task.metric)
    return Measurement(task.metric, totals, counts, per_sequence(prepared, losses), found)


def _free_running(task: Task, prepared: Prepared, network: Network, mode: Discretize, walk: Walk) -> dict[str, tuple[Tensor, Tensor]]:
    """Words right and token error rate of greedy decoding, against the targets of the batch."""
    decode = task.spec.decode
    assert decode is not None
    assert prepared.targets is not None
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

    def joined(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return torch.cat([totals for totals, _ in pairs]), torch.cat([counts for _, counts in pairs])

    extra = {name: joined([p.extra[name] for p in parts]) for name in parts[0].extra}
    return Measurement(parts[0].metric, *joined([(p.totals, p.counts) for p in parts]), joined([p.losses for p in parts]), extra)
