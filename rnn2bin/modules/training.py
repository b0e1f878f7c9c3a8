"""Distilling any nn.Module into its binary-gated copy: how a batch is run, what counts as a match, and the trainer."""

from __future__ import annotations

import inspect
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from rnn2bin.cells.network import Walk
from rnn2bin.distill import anneal, losses
from rnn2bin.distill.anneal import AnnealTrainer
from rnn2bin.distill.window import run_cell
from rnn2bin.errors import DataError, UsageError
from rnn2bin.gates.estimators import FLOAT, Discretize
from rnn2bin.modules import Call, gate_mode
from rnn2bin.recipe import Recipe

MATCH = "relative_squared_error"
Forward = Callable[[nn.Module, Any], Any]
Loss = Callable[[Any, Any], Tensor]


class Metric(Protocol):
    """`higher_is_better` is read where the callable has it, and taken as True where not."""

    def __call__(self, module: nn.Module, batches: list[Any], /) -> float: ...


# --- batches and outputs -------------------------------------------------------------------------------------------------


def forward(module: nn.Module, batch: Any) -> Any:
    """A tensor: module(batch). A dict: its entries that the module's forward names. A tuple: as many of its first values as the forward
    has parameters without defaults, so that (x, y) of inputs and labels is module(x)."""
    if isinstance(batch, Mapping):
        known = inspect.signature(module.forward).parameters.values()
        every = any(p.kind is p.VAR_KEYWORD for p in known)
        return module(**{k: v for k, v in batch.items() if every or k in {p.name for p in known}})
    if isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence):
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        wanted = [p for p in inspect.signature(module.forward).parameters.values() if p.kind in positional and p.default is p.empty]
        return module(*batch[: max(1, len(wanted))])
    return module(batch)


def to_device(batch: Any, device: torch.device | str) -> Any:
    """The batch with its tensors on `device`, in the same structure."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, PackedSequence):
        return batch.to(torch.device(device))  # type: ignore[arg-type]
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def check_batch(batch: Any, where: str) -> None:
    """DataError where a batch holds NaN; infinities may be a mask of the module's own."""
    if any(bool(torch.isnan(t).any()) for t in float_tensors(batch)):
        raise DataError(f"data: {where} holds NaN; remove or repair these values")


def float_tensors(output: Any) -> Iterator[Tensor]:
    """Every float tensor in an output of tensors, packed sequences, tuples, lists, dicts and dataclasses, in order, as float32."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output.float()
    elif isinstance(output, PackedSequence):
        yield output.data.float()
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from float_tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from float_tensors(value)
    elif is_dataclass(output):
        for part in fields(output):
            yield from float_tensors(getattr(output, part.name))


def pairs(output: Any, target: Any) -> list[tuple[Tensor, Tensor]]:
    """Student's and teacher's float tensors side by side; UsageError where they cannot be compared."""
    ours, theirs = list(float_tensors(output)), list(float_tensors(target))
    if not theirs:
        raise UsageError(f"the module's output ({type(target).__name__}) holds no float tensor to match")
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        raise UsageError("student and teacher gave outputs of different shapes for one batch; give a forward whose outputs compare")
    return list(zip(ours, theirs, strict=True))


def match(output: Any, target: Any, scales: Sequence[float]) -> Tensor:
    """Mean over the output's float tensors of the squared error in units of the teacher's variance; entries that the teacher masks (±inf)
    are left out."""
    found = pairs(output, target)
    if len(found) != len(scales):
        raise UsageError(f"the module's output holds {len(found)} float tensors in one batch and {len(scales)} in another")
    terms = []
    for (ours, theirs), scale in zip(found, scales, strict=True):
        real = torch.isfinite(theirs)
        error = torch.where(real, ours - theirs, ours.new_zeros(())).square().sum() / real.sum().clamp_min(1)
        terms.append(error / scale)
    return torch.stack(terms).mean()


@torch.no_grad()
def variances(teacher: nn.Module, batches: Iterable[Any], run: Forward) -> list[float]:
    """Variance of each float tensor of the teacher's output over the batches: the unit that errors are counted in."""
    sums: list[list[float]] = []
    for batch in batches:
        found = [t[torch.isfinite(t)].double() for t in float_tensors(run(teacher, batch))]
        sums = sums or [[0.0, 0.0, 0.0] for _ in found]
        for total, values in zip(sums, found, strict=False):
            for k, value in enumerate((values.numel(), float(values.sum()), float(values.square().sum()))):
                total[k] += value
    if not sums:
        raise UsageError("the module's output holds no float tensor to match")

    def variance(count: float, total: float, squares: float) -> float:
        mean, square = total / max(count, 1), squares / max(count, 1)
        spread = square - mean * mean
        return spread if spread > 1e-9 * square else square or 1.0  # a constant output: in units of its square

    return [variance(*total) for total in sums]


# --- measuring -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What stays the same over a conversion. `teacher` is in eval, without gradients; `scales` of `match`."""

    teacher: nn.Module
    run: Forward
    loss: Loss | None
    metric: Metric | None
    scales: list[float]
    recipe: Recipe
    device: torch.device | str = "cpu"

    @property
    def metric_name(self) -> str:
        return getattr(self.metric, "__name__", type(self.metric).__name__) if self.metric else MATCH

    @property
    def higher_is_better(self) -> bool:
        return bool(getattr(self.metric, "higher_is_better", True)) if self.metric else False


@dataclass(frozen=True)
class Gated:
    """A module with the mode its gates run in, how its cells walk, and who watches them."""

    module: nn.Module
    mode: Discretize = FLOAT
    walk: Walk | None = None
    seen: Callable[[Call], None] | None = None


@dataclass
class Measured:
    """One module over the held-out batches: its errors against the teacher, and losses, of each batch."""

    metric: float = 0.0
    errors: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {"metric": self.metric, "loss": sum(self.losses) / len(self.losses), "n": len(self.errors)}


@torch.no_grad()
def measure(job: Job, batches: Sequence[Any], candidates: Mapping[str, Gated]) -> dict[str, Measured]:
    """Name -> measurement. One pass for the errors; the user's metric, where there is one, makes its own."""
    found = {name: Measured() for name in candidates}
    for held in batches:
        batch = to_device(held, job.device)
        target = job.run(job.teacher, batch)
        for name, one in candidates.items():
            began = time.perf_counter()
            with gate_mode(one.mode, walk=one.walk, seen=one.seen):
                output = job.run(one.module, batch)
            found[name].seconds += time.perf_counter() - began
            error = match(output, target, job.scales)
            found[name].errors.append(float(error))
            found[name].losses.append(float(job.loss(output, batch) if job.loss else error))
    for name, one in candidates.items():
        found[name].metric = _mean(found[name].errors) if job.metric is None else _asked(job, one, batches)
    return found


def _asked(job: Job, one: Gated, batches: Sequence[Any]) -> float:
    assert job.metric is not None
    with gate_mode(one.mode, walk=one.walk):
        return float(job.metric(one.module, [to_device(batch, job.device) for batch in batches]))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# --- training ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """A batch that nothing looks into: the Trainer would take structures apart that it does not know."""

    batch: Any


class Feed(torch.utils.data.IterableDataset):
    """The training batches over and over. Those of a list are shuffled anew each time, by seed; a loader keeps the order it gives."""

    def __init__(self, batches: Iterable[Any], *, seed: int) -> None:
        self.batches, self.seed = batches, seed

    def __iter__(self) -> Iterator[Held]:
        order = random.Random(self.seed)
        while True:
            epoch = order.sample(self.batches, len(self.batches)) if isinstance(self.batches, list) else self.batches
            count = 0
            for count, batch in enumerate(epoch, 1):
                if epoch is self.batches:  # a list was looked through when it was split
                    check_batch(batch, f"batch {count} of the training part")
                yield Held(batch)
            if not count:
                raise DataError("data: the training part gave no batch")


class Wrapped(nn.Module):
    """Hides the student's own attributes and signature from the Trainer, which would read meaning into them."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, call: Callable[[nn.Module], Any]) -> Any:
        return call(self.student)


class ModuleTrainer(AnnealTrainer):
    """`twin` is the teacher as a float module whose gates can be watched; needed only where the recipe matches gates or hidden states."""

    def __init__(
        self,
        student: nn.Module,
        *,
        job: Job,
        twin: nn.Module | None,
        train: Iterable[Any],
        valid: list[Any],
        out: Path,
        float_student: bool = False,
    ) -> None:
        self.valid, self.twin = valid, twin
        self.pure = student
        super().__init__(
            Wrapped(student),
            Feed(train, seed=job.recipe.seed),
            recipe=job.recipe,
            out=out,
            metric=job.metric_name,
            higher_is_better=job.higher_is_better,
            float_student=float_student,
        )
        self.job = replace(job, device=self.args.device)
        for one in (self.job.teacher, *([twin] if twin else [])):
            one.to(self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = to_device(inputs["batch"].batch, self.args.device)
        theirs: list[Call] = []
        with torch.no_grad(), gate_mode(FLOAT, walk=self.walk, seen=theirs.append):
            target = self.job.run(self.twin or self.job.teacher, batch)
        calls: list[Call] = []
        mode = self.training_mode()
        with gate_mode(mode, walk=self.walk, seen=calls.append):
            output = model(lambda student: self.job.run(student, batch))
        self.tokens += steps_seen(calls)
        total = self.checked(outer_loss(self.job, output, target, batch) + inner_loss(self.recipe, calls, theirs, mode))
        return (total, output) if return_outputs else total

    def student(self) -> nn.Module:
        return self.pure

    def measure(self, hard_mode: Discretize, soft_mode: Discretize) -> anneal.Measured:
        saturated: list[float] = []

        def seen(call: Call) -> None:
            saturated.append(float(losses.saturation(soft_mode, call.trace.pre)))

        was_training = self.pure.training
        self.pure.eval()
        found = measure(
            self.job,
            self.valid,
            {"hard": Gated(self.pure, hard_mode, run_cell), "soft": Gated(self.pure, soft_mode, run_cell, seen)},
        )
        self.pure.train(was_training)
        return anneal.Measured(found["hard"].metric, found["soft"].metric, sum(saturated) / max(len(saturated), 1))

    # Modules with tied weights need safetensors' own way of saving them once.

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            folder = Path(str(output_dir or self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_model(self.pure, str(folder / "model.safetensors"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_model(self.pure, Path(resume_from_checkpoint) / "model.safetensors", device=str(self.args.device))


def steps_seen(calls: Sequence[Call]) -> int:
    """Real time steps of the first cell that ran, over all its calls."""
    return int(sum(float(call.mask().sum()) for call in calls if call.cell is calls[0].cell))


def outer_loss(job: Job, output: Any, target: Any, batch: Any) -> Tensor:
    """Weighted mean of the user's loss and the match of outputs; the match alone where no loss is given."""
    weights = job.recipe.loss
    parts = [(weights.task, job.loss(output, batch))] if job.loss and weights.task else []
    if weights.teacher or not parts:
        parts.append((weights.teacher or 1.0, match(output, target, job.scales)))
    return torch.stack([w * value for w, value in parts]).sum() / sum(w for w, _ in parts)


def inner_loss(recipe: Recipe, calls: Sequence[Call], theirs: Sequence[Call], mode: Discretize) -> Tensor | float:
    """The recipe's match of hidden states and gates with the teacher's, and the activity budget; each a sum over cells' calls."""
    total: Tensor | float = 0.0
    gated = mode.estimator != "float"
    hidden = recipe.loss.hidden_weight()
    if hidden or (recipe.loss.gate and gated):
        for ours, other in zip(calls, theirs, strict=True):
            if hidden:
                mask = ours.mask()[..., 0]
                total = total + hidden * functional.mse_loss(ours.trace.states[0] * mask, other.trace.states[0] * mask)
            if recipe.loss.gate and gated:
                total = total + recipe.loss.gate * _gate_match(ours, other)
    if recipe.budget.open and recipe.budget.weight and gated:
        total = total + recipe.budget.weight * sum(_over_budget(call, recipe.budget.open) for call in calls)
    return total


def _gate_match(ours: Call, theirs: Call) -> Tensor:
    mask = ours.mask()
    error = (torch.sigmoid(ours.trace.pre) - torch.sigmoid(theirs.trace.pre)).square() * mask
    return error.sum() / mask.sum().clamp_min(1) / (error.shape[2] * error.shape[3])


def _over_budget(call: Call, wanted: Mapping[str, float]) -> Tensor:
    """Σ over binary gates of max(0, open rate − wanted); of z the rate is that of updated units."""
    rates = losses.open_rates(call.trace.pre, call.mask())
    names = call.cell.layer.kind.gate_names
    over = [
        torch.relu((1 - rates[k] if gate == "z" else rates[k]) - wanted[gate])
        for k, gate in enumerate(names)
        if gate in wanted and call.cell.binary[k]
    ]
    return torch.stack(over).sum() if over else rates.new_zeros(())
