"""REINFORCE in a conversion: each cell's drawn bits are credited with the loss of their sequence.

A sequence's loss is one number for all bits of a window, T·G·n·H of them: the estimate is unbiased and very noisy, and costs nothing beside
the forward pass. What the bits of a window do to later windows is cut off, as in truncated backpropagation.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rnn2bin import tasks
from rnn2bin.cells.network import Network, Output
from rnn2bin.distill.losses import hidden_rows, step_masks
from rnn2bin.gates import score
from rnn2bin.gates.estimators import Discretize, sample
from rnn2bin.recipe import Recipe

Baselines = dict[str, score.Baseline]  # one for each cell, by name


def start(student: Network, recipe: Recipe) -> Baselines:
    """Baselines that have seen nothing."""
    return {name: score.baseline(recipe.gates.reinforce.baseline) for name in student.cells()}


def sequence_losses(task: tasks.Task, recipe: Recipe, prepared: tasks.Prepared, output: Output, target: Output) -> Tensor:
    """What a sequence costs (B,), without gradient: the loss on its outputs and the match of its hidden states, as a reward where asked."""
    with torch.no_grad():
        found = tasks.sequence_losses(task, recipe.loss, prepared, output.y, target.y)
        hidden = recipe.loss.hidden_weight(task.name, priced=recipe.budget.counts)
        if hidden:
            found = found + hidden * hidden_rows(task, output, target)
    chosen = recipe.gates.reinforce
    return score.exponential(found, temperature=chosen.temperature) if chosen.reward == "exponential" else found


def surrogate(
    task: tasks.Task,
    recipe: Recipe,
    prepared: tasks.Prepared,
    output: Output,
    target: Output,
    *,
    student: Network,
    mode: Discretize,
    baselines: Mapping[str, score.Baseline],
) -> tuple[Tensor, Baselines]:
    """A term of value 0 whose gradient is REINFORCE's, and the next baselines. The conditional mean guesses a sequence's loss from the
    teacher's last layer, averaged over time: it knows the input and not the bits."""
    losses = sequence_losses(task, recipe, prepared, output, target)
    context = target.hidden[-1].mean(0)
    total, found = losses.new_zeros(()), dict(baselines)
    for (name, cell), trace, mask in zip(student.cells().items(), output.traces, step_masks(output), strict=True):
        if trace.noise is None:
            continue
        steps = len(trace.noise)
        pre = mode.slope * trace.pre
        bits = sample(mode, trace.pre.detach(), trace.noise)
        binary = torch.tensor(cell.binary, device=pre.device).view(1, 1, -1, 1)
        drawn = (trace.noise != 0) * mask * binary  # not: gates without noise, pads, gates left soft
        each = lambda x: x.flatten(2).flatten(0, 1)  # (T,B,G,W) -> (T·B,G·W): a unit has one baseline for all its steps
        term, found[name] = score.reinforce(
            each(pre),
            each(bits),
            losses=losses.repeat(steps),
            baseline=baselines[name],
            context=context.repeat(steps, 1),
            counts=each(drawn),
        )
        total = total + steps * term  # the sum over a sequence's steps, the mean over sequences
    return total - total.detach(), found
