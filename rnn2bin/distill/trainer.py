"""The distiller: transformers' Trainer with a teacher, annealed gates, carried states and selection by the hard metric.

Batching, accumulation, checkpoints, resuming, devices and several processes are the Trainer's own.
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from rnn2bin import tasks
from rnn2bin.cells.network import Network, Output, State
from rnn2bin.data import Batches, Part
from rnn2bin.distill import losses
from rnn2bin.distill.window import run_cell
from rnn2bin.errors import DivergedError, InterruptedRunError
from rnn2bin.gates import schedules
from rnn2bin.gates.estimators import BINARY, FLOAT, Discretize
from rnn2bin.measure import Candidate, compare
from rnn2bin.recipe import Gates, Recipe

SELECTION_SEQUENCES = 1024  # the validation part is cut to these for the measurements during training
SELECTION_TOKENS = 65_536
COMPLETE = "distill.json"  # written last: a checkpoint without it is not resumed from


@dataclass(frozen=True)
class Point:
    """One measurement during training."""

    step: int
    loss: float
    hard: float
    soft: float
    temperature: float
    slope: float
    progress: float
    saturation: float  # share of soft gates within 0.05 of 0 or 1


@dataclass(frozen=True)
class Trained:
    """What training leaves: the points measured, the mode the chosen checkpoint's soft gates ran in, and counts."""

    history: list[Point]
    soft_mode: Discretize
    steps: int
    best_step: int
    tokens: int
    binarized: bool


def mode_at(gates: Gates, progress: float) -> Discretize:
    """How binary gates are sampled in training at this progress."""
    straight = progress >= gates.straight_through_from
    return Discretize(
        "straight-through" if straight else gates.estimator,
        temperature=schedules.value(gates.temperature, progress),
        slope=schedules.value(gates.slope, progress),
        backward=gates.backward,
        noise=gates.noise,
    )


def soft_mode_at(gates: Gates, progress: float) -> Discretize:
    """The student's gates without bits and noise at the same temperature and slope."""
    mode = replace(mode_at(gates, progress), estimator=gates.estimator)
    return mode.soft()


def selection_part(valid: Part) -> Part:
    """The share of the validation part that checkpoints are chosen by; the test part is never seen here."""
    if valid.stream:
        return replace(valid, inputs=valid.inputs[:, : max(2, SELECTION_TOKENS // len(valid))])
    keep = max(1, min(SELECTION_SEQUENCES, SELECTION_TOKENS // valid.inputs.shape[1]))
    return valid.take(torch.arange(min(keep, len(valid))))


class DistillTrainer(Trainer):
    """`model` is the student; `teacher` stays in eval and without gradients."""

    def __init__(self, student: Network, teacher: Network, *, task: tasks.Task, recipe: Recipe, train: Part, valid: Part, out: Path, float_student: bool = False):
        self.teacher, self.task, self.recipe = teacher, task, recipe
        self.valid = selection_part(valid)
        self.float_student = float_student
        self.progress, self.keeps_up = 0.0, True
        self.history: list[Point] = []
        self.carried: tuple[State | None, State | None] = (None, None)  # teacher's, student's
        self.last_loss, self.tokens = math.nan, 0
        self.binarized = False
        steps = recipe.train.steps if float_student else recipe.max_steps
        feed = Batches(
            train,
            batch_size=recipe.train.batch_size,
            window=recipe.train.window,
            seed=recipe.seed,
            length=steps * recipe.train.accumulation * 64,  # an index, not a store: long enough for any number of processes
            windowed=task.windowed,
        )
        super().__init__(
            model=student,
            args=arguments(recipe, out, steps=steps, higher_is_better=task.higher_is_better),
            train_dataset=feed,  # type: ignore[arg-type]
            eval_dataset=feed,  # type: ignore[arg-type]
            data_collator=lambda items: {"batch": items[0]},
            callbacks=[_Project()],
        )
        self.remove_callback(PrinterCallback)
        self.teacher.to(self.args.device)

    # -- what the Trainer asks for

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
        """In order: the batches themselves are shuffled, by seed."""
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        train = self.recipe.train
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer,
            lambda step: schedules.learning_rate_factor(min(step / train.steps, 1.0), warmup=train.warmup, final=train.final_learning_rate),
        )
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = inputs["batch"].to(self.args.device)
        prepared = tasks.prepare(self.task, batch, self.teacher, walk=run_cell)
        if batch.first or not self.task.windowed:
            self.carried = (None, None)
        with torch.no_grad():
            target = prepared.forward(self.teacher, mode=FLOAT, walk=run_cell, state=self.carried[0])
        mode = self.training_mode()
        output = prepared.forward(model, mode=mode, walk=run_cell, state=self.carried[1])
        if self.task.windowed:
            self.carried = (target.state, detached(output))
        self.tokens += int(prepared.mask.sum())
        total = losses.total(self.task, self.recipe, prepared, output, target, student=self.unwrapped(model), mode=mode)
        self.last_loss = float(total.detach())
        if not math.isfinite(self.last_loss):
            raise DivergedError(
                f"training diverged: the loss is {self.last_loss} at step {self.state.global_step}; "
                f"the last good checkpoint stays in {self.args.output_dir}; lower train.learning_rate or train.clip"
            )
        return (total, output) if return_outputs else total

    def training_mode(self) -> Discretize:
        return FLOAT if self.float_student else mode_at(self.recipe.gates, self.progress)

    @staticmethod
    def unwrapped(model: torch.nn.Module) -> Network:
        return getattr(model, "module", model)

    def after_step(self) -> None:
        """Moves the anneal on; levels back into bounds."""
        self.unwrapped(self.model).project_levels()
        self.progress = schedules.advance(
            self.progress, 1 / self.recipe.train.steps, closed_loop=self.recipe.gates.closed_loop, keeps_up=self.keeps_up
        )

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Hard and soft metric on the selection part."""
        student = self.unwrapped(self.model)
        soft_mode = FLOAT if self.float_student else soft_mode_at(self.recipe.gates, self.progress)
        hard_mode = FLOAT if self.float_student else BINARY
        hard, soft, saturation = self._hard_and_soft(student, hard_mode, soft_mode)
        point = Point(self.state.global_step, self.last_loss, hard, soft, soft_mode.temperature, soft_mode.slope, self.progress, saturation)
        self.history.append(point)
        self._judge(point)
        metrics = {"eval_hard": hard, "eval_soft": soft}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _judge(self, point: Point) -> None:
        """Whether the anneal may go on (closed loop), and whether the gates have binarized: then training ends."""
        sign = 1 if self.task.higher_is_better else -1
        scale = max(abs(point.hard), 1e-6)
        best = max(sign * p.hard for p in self.history)
        self.keeps_up = best - sign * point.hard <= 2 * self.recipe.train.tolerance * scale
        agree = abs(point.hard - point.soft) <= self.recipe.train.tolerance * scale
        self.binarized = agree and point.progress >= 1 - 1e-9
        if self.binarized and not self.float_student:
            self.control.should_training_stop = True

    def _hard_and_soft(self, student: Network, hard_mode: Discretize, soft_mode: Discretize) -> tuple[float, float, float]:
        saturated: list[float] = []

        def seen(name: str, _: tasks.Prepared, out: Output) -> None:
            if name == "soft":
                saturated.extend(float(losses.saturation(soft_mode, pre)) for pre in out.pre)

        found = compare(
            self.task,
            self.valid,
            Candidate(self.teacher, FLOAT, run_cell),
            {"hard": Candidate(student, hard_mode, run_cell), "soft": Candidate(student, soft_mode, run_cell)},
            seen=seen,
            device=self.args.device,
        )
        return found["hard"].value, found["soft"].value, sum(saturated) / len(saturated)

    # -- checkpoints

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            save_file(flatten_state(self.carried), folder / "carried.safetensors")
            content = {
                "progress": self.progress,
                "keeps_up": self.keeps_up,
                "tokens": self.tokens,
                "last_loss": self.last_loss,
                "history": [asdict(p) for p in self.history],
            }
            write_synced(folder / COMPLETE, json.dumps(content))

    def restore(self, folder: Path) -> None:
        content = json.loads((folder / COMPLETE).read_text())
        self.progress, self.keeps_up, self.tokens = content["progress"], content["keeps_up"], content["tokens"]
        self.last_loss = content["last_loss"]
        self.history = [Point(**p) for p in content["history"]]
        self.carried = unflatten_state(load_file(folder / "carried.safetensors", device=str(self.args.device)), self.task.spec.entry.layers)


class _Project(TrainerCallback):
    """Calls the trainer back after each weight update; `trainer` is set by `train`."""

    trainer: DistillTrainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.after_step()


class _Progress(TrainerCallback):
    """Reports every step to `report` and stops, with a checkpoint, when a signal came."""

    def __init__(self, trainer: DistillTrainer, report: Callable[[dict[str, Any]], None] | None, stopped: list[int]) -> None:
        self.trainer, self.report, self.stopped = trainer, report, stopped

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.report:
            self.report(self.now(state))
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def now(self, state: TrainerState) -> dict[str, Any]:
        trainer, last = self.trainer, self.trainer.history[-1] if self.trainer.history else None
        mode = trainer.training_mode()
        return {
            "step": state.global_step,
            "steps": trainer.recipe.train.steps,
            "loss": trainer.last_loss,
            "metric": trainer.task.metric,
            "hard": last.hard if last else None,
            "soft": last.soft if last else None,
            "temperature": mode.temperature,
            "slope": mode.slope,
            "progress": trainer.progress,
        }


def arguments(recipe: Recipe, out: Path, *, steps: int, higher_is_better: bool) -> TrainingArguments:
    train = recipe.train
    return TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=1,  # one item is one batch already
        gradient_accumulation_steps=train.accumulation,
        max_steps=steps,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        max_grad_norm=train.clip,
        optim="adamw_torch",
        eval_strategy="steps",
        eval_steps=train.evaluate_every,
        save_strategy="steps",
        save_steps=train.evaluate_every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_hard",
        greater_is_better=higher_is_better,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        seed=recipe.seed,
        data_seed=recipe.seed,
    )


def newest_checkpoint(out: Path) -> Path | None:
    """The latest complete checkpoint in `out`; incomplete ones are passed over."""
    found = [f for f in out.glob("checkpoint-*") if (f / COMPLETE).is_file() and (f / "trainer_state.json").is_file()]
    return max(found, key=lambda f: int(f.name.rpartition("-")[2]), default=None)


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
) -> Trained:
    """Distil `teacher` into `student`, in place: afterwards it holds the weights with the best hard metric.

    Checkpoints lie in `out`; with `resume` training goes on from the newest complete one. Raises DivergedError on a non-finite loss
    and InterruptedRunError after SIGINT or SIGTERM, both with a checkpoint kept.
    """
    torch.manual_seed(recipe.seed)
    trainer = DistillTrainer(student, teacher, task=task, recipe=recipe, train=train, valid=valid, out=out, float_student=float_student)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, _Project):
            callback.trainer = trainer
    checkpoint = newest_checkpoint(out) if resume else None
    if checkpoint:
        trainer.restore(checkpoint)
    with stop_signals() as stopped:
        trainer.add_callback(_Progress(trainer, report, stopped))
        student.train()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stopped:
        raise InterruptedRunError(f"interrupted at step {trainer.state.global_step}; the same command with --resume goes on from there")
    if not trainer.history or trainer.history[-1].step != trainer.state.global_step:
        trainer.evaluate()
    best = trainer.state.best_global_step or trainer.state.global_step
    at = next((p for p in trainer.history if p.step == best), trainer.history[-1])
    gates = recipe.gates
    soft = FLOAT if float_student else soft_mode_at(gates, at.progress)
    return Trained(trainer.history, soft, trainer.state.global_step, best, trainer.tokens, trainer.binarized)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted in the list instead of killing; a second one kills."""
    seen: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, _: Any) -> None:
        seen.append(number)
        signal.signal(number, before[number])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        pass
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def detached(output: Output) -> State:
    return [[tuple(t.detach() for t in direction) for direction in layer] for layer in output.state]


def flatten_state(carried: tuple[State | None, State | None]) -> dict[str, Tensor]:
    return {
        f"{who}.{layer}.{direction}.{k}": tensor.contiguous()
        for who, state in zip(("teacher", "student"), carried, strict=True)
        for layer, directions in enumerate(state or [])
        for direction, states in enumerate(directions)
        for k, tensor in enumerate(states)
    }


def unflatten_state(tensors: dict[str, Tensor], layers: tuple[Any, ...]) -> tuple[State | None, State | None]:
    def of(who: str) -> State | None:
        if not any(name.startswith(who) for name in tensors):
            return None
        return [
            [tuple(tensors[f"{who}.{i}.{d}.{k}"] for k in range(len(layer.kind.states))) for d in range(layer.directions)]
            for i, layer in enumerate(layers)
        ]

    return of("teacher"), of("student")


def write_synced(path: Path, text: str) -> None:
    """Temporary name, fsync, rename: the file is there whole or not at all."""
    import os

    temporary = path.with_name(path.name + ".part")
    with temporary.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(path)
