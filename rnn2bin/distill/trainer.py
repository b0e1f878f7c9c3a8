"""The distiller: a teacher, a student, what a batch costs, and states that are carried from window to window."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rnn2bin import processes, tasks
from rnn2bin.cells.network import Network, Output, State, Walk
from rnn2bin.data import Batch, Batches, Part, share
from rnn2bin.distill import budget as budgets
from rnn2bin.distill import callbacks as watching
from rnn2bin.distill import credit, losses, states
from rnn2bin.distill.anneal import AnnealTrainer, Measured, Trained, fit, total_steps
from rnn2bin.distill.window import run_cell
from rnn2bin.errors import UsageError
from rnn2bin.gates import score
from rnn2bin.gates.estimators import FLOAT, SCORE, Discretize
from rnn2bin.measure import Candidate, compare
from rnn2bin.recipe import Recipe

SELECTION_SEQUENCES = 1024  # the validation part is cut to these for the measurements during training
SELECTION_TOKENS = 65_536
CALIBRATION_BATCHES = 20
BASELINES = "baselines.safetensors"


def selection_part(valid: Part) -> Part:
    """The share of the validation part that checkpoints are chosen by; the test part is never seen here."""
    if valid.stream:
        return replace(valid, inputs=valid.inputs[:, : max(2, SELECTION_TOKENS // len(valid))])
    keep = max(1, min(SELECTION_SEQUENCES, SELECTION_TOKENS // valid.inputs.shape[1]))
    return valid.take(torch.arange(min(keep, len(valid))))


def batches(part: Part, recipe: Recipe, task: tasks.Task, *, length: int) -> Batches:
    """The training batches of a recipe, by index."""
    train = recipe.train
    return Batches(part, batch_size=train.batch_size, window=train.window, seed=recipe.seed, length=length, windowed=task.windowed)


def calibration_batches(part: Part, recipe: Recipe, task: tasks.Task) -> Iterator[Batch]:
    """The first batches of training, which levels and thresholds are fitted to."""
    feed = batches(part, recipe, task, length=CALIBRATION_BATCHES)
    return (feed[k] for k in range(CALIBRATION_BATCHES))


class DistillTrainer(AnnealTrainer):
    """`student` and `teacher` are Networks; the teacher stays in eval and without gradients. States are carried from window to window."""

    def __init__(
        self,
        student: Network,
        teacher: Network,
        *,
        task: tasks.Task,
        recipe: Recipe,
        train: Part,
        valid: Part,
        out: Path,
        float_student: bool = False,
    ) -> None:
        if recipe.gates.estimator in SCORE and processes.count() > 1:
            raise UsageError("gates.estimator reinforce runs in one process: its baselines are not shared between several")
        self.teacher, self.task = teacher, task
        self.valid = selection_part(valid)
        self.carried: tuple[State | None, State | None] = (None, None)  # teacher's, student's
        self.price = budgets.Price()
        self.baselines = credit.start(student, recipe)
        feed = Batches(
            train,
            batch_size=recipe.train.batch_size,
            window=recipe.train.window,
            seed=recipe.seed,
            # an index, not a store: longer than any run
            length=total_steps(recipe, float_student=float_student) * recipe.train.accumulation * 64,
            windowed=task.windowed,
            processes=processes.count(),
        )
        super().__init__(
            student,
            feed,  # type: ignore[arg-type]
            recipe=recipe,
            out=out,
            metric=task.metric,
            higher_is_better=task.higher_is_better,
            float_student=float_student,
        )
        self.teacher.to(self.args.device)

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
        """In order: the batches themselves are shuffled, by seed."""
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = inputs["batch"].to(self.args.device)
        prepared = tasks.prepare(self.task, batch, self.teacher, walk=self.walk)
        if batch.first or not self.task.windowed:
            self.carried = (None, None)
        target = asked(self.teacher, prepared, walk=self.walk, state=self.carried[0])
        mode = self.training_mode()
        output = prepared.forward(model, mode=mode, walk=self.walk, state=self.carried[1])
        if self.task.windowed:
            self.carried = (target.state or None, states.detached(output))
        total = losses.total(self.task, self.recipe, prepared, output, target, student=self.student(), mode=mode)
        if mode.estimator in SCORE:
            given = (self.task, self.recipe, prepared, output, target)
            term, self.baselines = credit.surrogate(*given, student=self.student(), mode=mode, baselines=self.baselines)
            total = total + term
        wanted = self.recipe.budget.counts and not self.float_student
        found = budgets.density(self.student(), prepared, output) if wanted else None
        # The other processes have other rows of this batch: each counts by what its rows count, and the density is that of all.
        own = float(prepared.mask.sum())
        counted, steps, read = processes.total(own, prepared.steps, own * float(found.detach()) if found is not None else 0.0)
        self.tokens += int(steps)
        if found is not None:
            if processes.count() > 1:
                found = found + (read / max(counted, 1.0) - found.detach())  # the gradient stays that of these rows
            total = total + self.price.charge(found, self.recipe.budget, self.progress)
        total = self.checked(total * (processes.count() * own / counted) if processes.count() > 1 and counted else total)
        return (total, output) if return_outputs else total

    def student(self) -> Network:
        return super().student()  # type: ignore[return-value]

    def measure(self, hard_mode: Discretize, soft_mode: Discretize) -> Measured:
        saturated: list[float] = []
        densities: list[float] = []
        opened: list[dict[str, tuple[float, float]]] = []
        wanted = self.recipe.budget.counts and not self.float_student

        def seen(name: str, prepared: tasks.Prepared, out: Output) -> None:
            if name == "soft":
                saturated.extend(float(losses.saturation(soft_mode, pre)) for pre in out.pre if pre.numel())
            elif name == "hard":
                opened.append(losses.opened(student, out))
                if wanted:
                    densities.append(float(budgets.density(student, prepared, out, learn=False)))

        student = self.student()
        found = compare(
            self.task,
            self.valid,
            Candidate(self.teacher, FLOAT, run_cell),
            {"hard": Candidate(student, hard_mode, run_cell), "soft": Candidate(student, soft_mode, run_cell)},
            seen=seen,
            device=self.args.device,
            judges_teacher=False,
        )
        self.open_rates = {gate: sum(one[gate][0] for one in opened) / sum(one[gate][1] for one in opened) for gate in opened[0]}
        dense = sum(densities) / len(densities) if densities else None
        if dense is not None and self.recipe.budget.density is not None:
            self.price.correct(dense, self.recipe.budget, self.progress)
        return Measured(found["hard"].value, found["soft"].value, sum(saturated) / len(saturated), dense)

    def _save_checkpoint(self, model, trial):
        self.all_carried = states.joined(processes.gathered(self.carried))
        super()._save_checkpoint(model, trial)

    def save_more(self, folder: Path) -> None:
        super().save_more(folder)
        save_file(states.flattened(self.all_carried), folder / "carried.safetensors")
        (folder / "price.json").write_text(json.dumps(asdict(self.price)))
        if remembered := {f"{name}/{key}": t for name, one in self.baselines.items() for key, t in one.tensors().items()}:
            save_file(remembered, folder / BASELINES)

    def restore(self, folder: Path) -> None:
        super().restore(folder)
        self.price = budgets.Price(**json.loads((folder / "price.json").read_text()))
        remembered = load_file(folder / BASELINES, device=str(self.args.device)) if (folder / BASELINES).exists() else {}
        for name in self.baselines:
            own = {key.rpartition("/")[2]: t for key, t in remembered.items() if key.rpartition("/")[0] == name}
            self.baselines[name] = score.restored(self.recipe.gates.reinforce.baseline, own)
        rows = load_file(folder / "carried.safetensors", device=str(self.args.device))
        rows = {name: share(tensor, processes.rank(), processes.count()) for name, tensor in rows.items()}
        self.carried = states.unflattened(rows, self.teacher.spec.entry.layers, self.student().spec.entry.layers)


@torch.no_grad()
def asked(teacher: Network, prepared: tasks.Prepared, *, walk: Walk, state: State | None) -> Output:
    """What the teacher makes of a batch: of its answers the outputs alone are known, and no state."""
    known = prepared.batch.answers
    if known is not None:
        return Output(known, [], [], [], [], [])
    return prepared.forward(teacher, mode=FLOAT, walk=walk, state=state)


def train(
    student: Network,
    teacher: Network,
    *,
    task: tasks.Task,
    recipe: Recipe,
    train: Part,
    valid: Part,
    out: Path,
    resume: bool = False,
    float_student: bool = False,
    report: Callable[[dict[str, Any]], None] | None = None,
    callbacks: Sequence[watching.Callback] = (),
) -> Trained:
    """Distil `teacher` into `student`, in place: afterwards it holds the weights with the best hard metric.

    Checkpoints lie in `out`; with `resume` training goes on from the newest complete one. Raises DivergedError on a non-finite loss
    and InterruptedRunError after SIGINT or SIGTERM, both with a checkpoint kept.
    """
    torch.manual_seed(recipe.seed)
    trainer = DistillTrainer(student, teacher, task=task, recipe=recipe, train=train, valid=valid, out=out, float_student=float_student)
    return fit(trainer, resume=resume, report=report, callbacks=callbacks)
