"""The losses of distillation beside those of the task: hidden and gate match, and the activity budget that makes density."""

from __future__ import annotations

import torch
from torch import Tensor

from rnn2bin import tasks
from rnn2bin.cells.network import Network, Output, valid_steps
from rnn2bin.cells.weights import fold
from rnn2bin.gates.estimators import Discretize, Sample, sample
from rnn2bin.recipe import Recipe

# The open rate is counted in bits; its gradient is that of σ(pre), which reaches every unit and not only those near the threshold.
_COUNT = Discretize("straight-through", slope=1.0, backward="sigmoid")


def total(
    task: tasks.Task, recipe: Recipe, prepared: tasks.Prepared, output: Output, target: Output, *, student: Network, mode: Discretize
) -> Tensor:
    """The whole loss of a batch. `output` and `target` are student's and teacher's."""
    weights = recipe.loss
    value = tasks.loss(task, weights, prepared, output.y, target.y)
    hidden = weights.hidden_weight(task.name, priced=recipe.budget.counts)
    if hidden:
        value = value + hidden * hidden_match(task, output, target)
    if weights.gate and mode.estimator != "float":
        value = value + weights.gate * gate_match(output, target, step_masks(output))
    if recipe.budget.open and recipe.budget.weight and mode.estimator != "float":
        value = value + recipe.budget.weight * budget(student, output, step_masks(output), recipe.budget.open)
    return value


def hidden_match(task: tasks.Task, output: Output, target: Output) -> Tensor:
    """Σ over layers of the mean squared error between the layers' outputs, over real steps (both are zero at pads). What a GRU keeps behind
    an output gate is compared instead of what it shows of it."""
    return hidden_rows(task, output, target).mean()


def hidden_rows(task: tasks.Task, output: Output, target: Output) -> Tensor:
    """`hidden_match` of each sequence (B,), whose mean is that of the batch."""
    layers = [layer for spec in task.spec.sections.values() for layer in spec.layers]
    terms, cell = [], 0
    for layer, ours, theirs in zip(layers, output.hidden, target.hidden, strict=True):
        lengths, cells = output.lengths[cell], slice(cell, cell + layer.directions)
        steps = ours.shape[0] * ours.shape[1] if lengths is None else lengths.sum().clamp_min(1)
        pairs = [*zip(output.traces[cells], target.traces[cells], strict=True)]
        if all(len(mine.states) > len(its.states) for mine, its in pairs):
            copies = pairs[0][0].states[1].shape[2] // layer.hidden_size
            ours = torch.cat([fold(mine.states[1], copies) for mine, _ in pairs], 2)
            theirs = torch.cat([its.states[0] for _, its in pairs], 2)
            if lengths is not None:
                ours, theirs = (valid_steps(lengths, len(x)) * x for x in (ours, theirs))
        terms.append((ours - theirs).square().sum((0, 2)) * (ours.shape[1] / (steps * ours.shape[2])))
        cell += layer.directions
    return torch.stack(terms).sum(0)


def step_masks(output: Output) -> list[Tensor]:
    """For each cell its real steps, (T,B,1,1) in its own direction's order (sequences start at 0 in both)."""
    masks = []
    for trace, lengths in zip(output.traces, output.lengths, strict=True):
        steps, rows = trace.products.shape[:2]
        mask = trace.products.new_ones(steps, rows, 1) if lengths is None else valid_steps(lengths, steps).to(trace.products.dtype)
        masks.append(mask.unsqueeze(-1))
    return masks


def gate_match(output: Output, target: Output, masks: list[Tensor]) -> Tensor:
    """Mean squared error between the student's gates as probabilities and the teacher's."""
    terms = []
    for ours, theirs, mask in zip(output.pre, target.pre, masks, strict=True):
        if not theirs.numel():  # a cell without gates
            continue
        ours = ours[:, :, : theirs.shape[2]]  # an output gate that the teacher has not stands last
        value = torch.sigmoid(ours).unflatten(-1, (-1, theirs.shape[3])).mean(-2)  # over the copies of a unit
        error = (value - torch.sigmoid(theirs)).square() * mask
        terms.append(error.sum() / mask.sum().clamp_min(1) / (theirs.shape[2] * theirs.shape[3]))
    return torch.stack(terms).sum()


def open_rates(pre: Tensor, mask: Tensor) -> Tensor:
    """pre (T,B,G,H) -> share of ones of each gate (G,), counted in bits, differentiable."""
    bits = Sample.apply(pre, None, _COUNT)
    return (bits * mask).sum((0, 1, 3)) / (mask.sum().clamp_min(1) * pre.shape[3])


def opened(student: Network, output: Output) -> dict[str, tuple[float, float]]:
    """For each gate (`main.layers.0.fwd.i`) its ones and how many decisions were counted. Of z the zeros: units that are updated."""
    found = {}
    for (prefix, cell), pre, mask in zip(student.cells().items(), output.pre, step_masks(output), strict=True):
        ones = ((pre > 0) * mask).sum((0, 1, 3)).tolist()
        counted = float(mask.sum()) * pre.shape[3]
        for gate, count in zip(cell.layer.kind.gate_names, ones, strict=True):
            found[f"{prefix}.{gate}"] = (counted - count if gate == "z" else count, max(counted, 1.0))
    return found


def budget(student: Network, output: Output, masks: list[Tensor], wanted: dict[str, float]) -> Tensor:
    """Σ over cells and gates of max(0, open rate − wanted), in units. For z the rate is that of updated units, 1 − share of keeps."""
    terms = []
    for (_, cell), pre, mask in zip(student.cells().items(), output.pre, masks, strict=True):
        every = pre.unflatten(-1, (cell.layer.copies, -1))
        for k, gate in enumerate(cell.layer.kind.gates):
            if gate.letter in wanted and cell.binary[k]:
                # A row is read when any copy of its unit wants it: one that is open, or for z one that does not keep.
                unit = every[:, :, k : k + 1].amin(-2) if gate.keeps else every[:, :, k : k + 1].amax(-2)
                rate = open_rates(unit, mask)[0]
                terms.append(torch.relu((1 - rate if gate.keeps else rate) - wanted[gate.letter]))
    return torch.stack(terms).sum() if terms else output.y.new_zeros(())


def saturation(mode: Discretize, pre: Tensor) -> Tensor:
    """Share of soft gate values within 0.05 of 0 or 1."""
    value = sample(mode, pre)
    return ((value < 0.05) | (value > 0.95)).float().mean()
