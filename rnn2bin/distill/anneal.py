"""What every distillation shares: transformers' Trainer with annealed gates, selection by the hard metric, checkpoints and stopping.

Batching, accumulation, checkpoints, resuming, devices and several processes are the Trainer's own.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from rnn2bin import processes, signals, storage
from rnn2bin.cells.network import Walk
from rnn2bin.cells.weights import Cell
from rnn2bin.distill import budget as budgets
from rnn2bin.distill import callbacks as watching
from rnn2bin.distill import checkpoints
from rnn2bin.distill.averaging import Average
from rnn2bin.distill.window import run_cell
from rnn2bin.errors import DivergedError, InterruptedRunError
from rnn2bin.gates import schedules
from rnn2bin.gates.estimators import BINARY, FLOAT, Discretize
from rnn2bin.recipe import Recipe

STATE, BEST, MEANS = "distill.json", "best.safetensors", "means.safetensors"


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
    density: float | None = None  # share of weights read with hard gates, where a budget counts them


@dataclass(frozen=True)
class Measured:
    """The student on the validation part: hard and soft metric, saturation of soft gates, density where a budget counts it."""

    hard: float
    soft: float
    saturation: float
    density: float | None = None


@dataclass(frozen=True)
class Tried:
    """A short run: its rate and the hard metric at its end, None where it diverged."""

    rate: float
    metric: float | None


@dataclass(frozen=True)
class Trained:
    """What training leaves: the points measured, the mode the chosen checkpoint's soft gates ran in, and counts; its rate of learning, and
    the short runs by which that was chosen."""

    history: list[Point]
    soft_mode: Discretize
    steps: int
    best_step: int
    tokens: int
    binarized: bool
    rate: float
    tried: tuple[Tried, ...] = ()
    seconds_before: float = field(default=0.0, compare=False)  # that earlier processes spent on the steps this one went on from


def mode_at(recipe: Recipe, progress: float) -> Discretize:
    """How binary gates are sampled in training at this progress."""
    gates, bits_from = recipe.gates, recipe.straight_through_from
    straight = bits_from < 1 and progress >= bits_from
    return Discretize(
        "straight-through" if straight else gates.estimator,
        temperature=schedules.value(gates.temperature, progress),
        slope=schedules.value(gates.slope, progress),
        backward=gates.backward,
        noise=gates.noise,
    )


def soft_mode_at(recipe: Recipe, progress: float) -> Discretize:
    """The student's gates without bits and noise at the same temperature and slope."""
    mode = replace(mode_at(recipe, progress), estimator=recipe.gates.estimator)
    return mode.soft()


class AnnealTrainer(Trainer):
    """What every distillation shares: schedules, the anneal's progress, selection by the hard metric, checkpoints, stopping.

    A subclass says what a batch's loss is (`compute_loss`, through `checked`) and how a student is measured (`measure`). `feed` gives
    ready batches. `float_student`: the student's gates stay sigmoids, and it trains exactly `train.steps`.
    """

    def __init__(
        self,
        student: torch.nn.Module,
        feed: torch.utils.data.Dataset,
        *,
        recipe: Recipe,
        out: Path,
        metric: str,
        higher_is_better: bool,
        float_student: bool = False,
    ) -> None:
        self.recipe, self.metric, self.higher_is_better, self.float_student = recipe, metric, higher_is_better, float_student
        self.walk = training_walk(recipe)
        self.progress, self.keeps_up = 0.0, True
        self.history: list[Point] = []
        self.last_loss, self.tokens = math.nan, 0
        self.began, self.seconds_before = time.perf_counter(), 0.0
        self.binarized = False
        self.open_rates: dict[str, float] = {}  # of the last measurement, for who watches
        self.best_step, self.best = 0, dict[str, Tensor]()  # the weights with the best hard metric so far
        super().__init__(
            model=student,
            args=arguments(recipe, out, steps=total_steps(recipe, float_student=float_student)),
            train_dataset=feed,
            eval_dataset=feed,
            data_collator=lambda items: {"batch": items[0]},
        )
        self.average = Average(self.student(), recipe.train.averaging)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Project(self))

    def measure(self, hard_mode: Discretize, soft_mode: Discretize) -> Measured:
        """The student now."""
        raise NotImplementedError

    def student(self) -> torch.nn.Module:
        """What is trained, without what wraps it."""
        return getattr(self.model, "module", self.model)  # type: ignore[return-value, arg-type]

    # -- what the Trainer asks for

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        train = self.recipe.train
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer,  # type: ignore[arg-type]
            lambda step: schedules.learning_rate_factor(min(step / train.steps, 1.0), warmup=train.warmup, final=train.final_learning_rate),
        )
        return self.lr_scheduler

    def checked(self, total: Tensor) -> Tensor:
        """The loss, noted as the mean over processes; DivergedError, in all of them, where it is not finite."""
        self.last_loss = processes.total(float(total.detach()))[0] / processes.count()
        if not math.isfinite(self.last_loss):
            raise self.diverged(f"the loss is {self.last_loss}")
        return total

    def diverged(self, what: str) -> DivergedError:
        return DivergedError(
            f"training diverged: {what} at step {self.state.global_step}; nothing was packed, the last good checkpoint stays in "
            f"{self.args.output_dir}; lower train.learning_rate or train.clip, and start over with --force"
        )

    def training_mode(self) -> Discretize:
        return FLOAT if self.float_student else mode_at(self.recipe, self.progress)

    def after_step(self) -> None:
        """Moves the anneal and the average on; levels back into bounds. DivergedError where a weight is not finite: before it is measured
        or saved."""
        for part in self.model.modules():  # type: ignore[union-attr]
            if isinstance(part, Cell):
                part.project_levels()
        weights = dict(self.student().named_parameters())
        sizes = torch.stack(torch._foreach_norm(list(weights.values())))  # one pass, and one wait for the device
        if not bool(torch.isfinite(sizes).all()):
            name = next(name for name, size in zip(weights, sizes, strict=True) if not bool(torch.isfinite(size)))
            raise self.diverged(f"{name} is not finite")
        self.average.update(self.state.global_step)
        self.progress = schedules.advance(
            self.progress, 1 / self.recipe.train.steps, closed_loop=self.recipe.gates.closed_loop, keeps_up=self.keeps_up
        )

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Hard and soft metric on the selection part, of the weights' average where there is one."""
        with self.average.shown():
            point = self._measured()
            if all(self._worth(point) > self._worth(earlier) for earlier in self.history):
                self.best_step, self.best = point.step, self._snapshot()
        self.history.append(point)
        self._judge(point)
        rate = float(self.lr_scheduler.get_last_lr()[0]) if self.lr_scheduler is not None else None
        self.log(watching.logged(point, rate))
        metrics = {"eval_hard": point.hard, "eval_soft": point.soft}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measured(self) -> Point:
        soft_mode = FLOAT if self.float_student else soft_mode_at(self.recipe, self.progress)
        found = processes.lead(lambda: self.measure(FLOAT if self.float_student else BINARY, soft_mode))
        if not (math.isfinite(found.hard) and math.isfinite(found.soft)):
            raise self.diverged(f"{self.metric} is {found.hard} with hard gates and {found.soft} with soft ones")
        at = (self.state.global_step, self.last_loss, found.hard, found.soft)
        return Point(*at, soft_mode.temperature, soft_mode.slope, self.progress, found.saturation, found.density)

    def _snapshot(self) -> dict[str, Tensor]:
        state = self.student().state_dict()
        return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in state.items() if isinstance(t, Tensor)}

    def _worth(self, point: Point) -> float:
        """What checkpoints are chosen by, higher is better: the hard metric, within the density budget."""
        metric = point.hard if self.higher_is_better else -point.hard
        return budgets.choice(metric, point.density, self.recipe.budget.density)

    def _judge(self, point: Point) -> None:
        """Whether the anneal may go on (closed loop), and whether the gates have binarized: then training ends."""
        sign = 1 if self.higher_is_better else -1
        scale = max(abs(point.hard), 1e-6)
        best = max(sign * p.hard for p in self.history)
        self.keeps_up = best - sign * point.hard <= 2 * self.recipe.train.tolerance * scale
        agree = abs(point.hard - point.soft) <= self.recipe.train.tolerance * scale
        self.binarized = agree and point.progress >= 1 - 1e-9
        if self.binarized and not self.float_student:
            self.control.should_training_stop = True

    # -- checkpoints

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process saves a random state of its own
        if self.args.should_save:
            out = Path(str(self.args.output_dir))
            folder = out / f"checkpoint-{self.state.global_step}"
            self.save_more(folder)
            storage.seal(folder)
            checkpoints.rotate(out)

    def save_more(self, folder: Path) -> None:
        """What the Trainer does not know of."""
        save_file(self.best, folder / BEST)
        if self.average.means:
            save_file(self.average.means, folder / MEANS)
        content = {
            "step": self.state.global_step,
            "progress": self.progress,
            "keeps_up": self.keeps_up,
            "tokens": self.tokens,
            "seconds": self.seconds_before + time.perf_counter() - self.began,
            "last_loss": self.last_loss,
            "binarized": self.binarized,
            "best_step": self.best_step,
            "history": [asdict(p) for p in self.history],
        }
        (folder / STATE).write_text(json.dumps(content))

    def restore(self, folder: Path) -> None:
        content = json.loads((folder / STATE).read_text())
        self.state.global_step = content["step"]
        self.progress, self.keeps_up, self.tokens = content["progress"], content["keeps_up"], content["tokens"]
        self.last_loss, self.binarized, self.best_step = content["last_loss"], content["binarized"], content["best_step"]
        self.history, self.seconds_before = [Point(**p) for p in content["history"]], content["seconds"]
        self.best = load_file(folder / BEST)
        if self.average.means:
            self.average.restore(load_file(folder / MEANS))

    @property
    def ended(self) -> bool:
        """Whether nothing is left to train: said by what was restored, the Trainer itself would take one more step."""
        return self.state.global_step >= self.args.max_steps or (self.binarized and not self.float_student)

    def choose_best(self) -> None:
        self.student().load_state_dict({**self.student().state_dict(), **self.best})


def training_walk(recipe: Recipe) -> Walk:
    """The kernels of training; measurements run in float32."""
    precision = recipe.train.precision
    return partial(run_cell, precision="bfloat16" if precision == "auto" else precision)


def total_steps(recipe: Recipe, *, float_student: bool) -> int:
    return recipe.train.steps if float_student else recipe.max_steps


class _Project(TrainerCallback):
    """Calls the trainer back after each weight update; the last one is measured whatever its number."""

    def __init__(self, trainer: AnnealTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.after_step()
        if control.should_training_stop:
            control.should_evaluate = control.should_save = True


class _Progress(TrainerCallback):
    """Reports every step to `report` and stops, with a checkpoint, when a signal came."""

    def __init__(self, trainer: AnnealTrainer, report: Callable[[dict[str, Any]], None] | None, stopped: list[int]) -> None:
        self.trainer, self.report, self.stopped, self.stops = trainer, report, stopped, False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.report:
            self.report(self.now(state))
        self.stops = processes.total(len(self.stopped))[0] > 0  # all at the same step, whoever the signal reached
        if self.stops:
            control.should_save = control.should_training_stop = True

    def now(self, state: TrainerState) -> dict[str, Any]:
        trainer, last = self.trainer, self.trainer.history[-1] if self.trainer.history else None
        mode = trainer.training_mode()
        return {
            "step": state.global_step,
            "steps": trainer.recipe.train.steps,
            "loss": trainer.last_loss,
            "metric": trainer.metric,
            "hard": last.hard if last else None,
            "soft": last.soft if last else None,
            "measured": last.step if last else None,
            "temperature": mode.temperature,
            "slope": mode.slope,
            "progress": trainer.progress,
            "open": trainer.open_rates,
        }


def arguments(recipe: Recipe, out: Path, *, steps: int) -> TrainingArguments:
    train = recipe.train
    on_processors = processes.count() > 1 and not torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(out),
        # Several processes on processors have to be asked for; one finds its device by itself.
        **({"use_cpu": True, "ddp_backend": "gloo"} if on_processors else {}),  # type: ignore[arg-type]
        per_device_train_batch_size=1,  # one item is one batch already
        gradient_accumulation_steps=train.accumulation,
        max_steps=steps,
        learning_rate=recipe.learning_rate,
        weight_decay=train.weight_decay,
        max_grad_norm=train.clip,
        optim="adamw_torch_fused",
        eval_strategy="steps",
        eval_steps=train.evaluate_every,
        save_strategy="steps",
        save_steps=train.evaluate_every,
        # Which checkpoints stay, and which weights were best, is ours: the Trainer deletes before the new one is whole.
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        accelerator_config={"dispatch_batches": False},  # batches are objects of ours: only tensors can be sent between processes
        remove_unused_columns=False,
        seed=recipe.seed,
        data_seed=recipe.seed,
    )


def _begin(out: Path, *, resume: bool) -> Path | None:
    """The checkpoint to go on from; those behind it are removed."""
    checkpoint = checkpoints.newest(out) if resume else None
    checkpoints.discard_newer(out, checkpoint)
    return checkpoint


def fit(
    trainer: AnnealTrainer,
    *,
    resume: bool = False,
    report: Callable[[dict[str, Any]], None] | None = None,
    callbacks: Sequence[watching.Callback] = (),
) -> Trained:
    """Trains; afterwards the trainer's model holds the weights with the best hard metric. Raises as `train` does.

    A callback that sets `control.should_training_stop` ends the training there: that step is measured, and the best so far is taken.
    """
    out = Path(str(trainer.args.output_dir))
    checkpoint = processes.lead(lambda: _begin(out, resume=resume))
    if checkpoint:
        trainer.restore(checkpoint)
    if not trainer.ended:
        if processes.count() > 1:
            torch.manual_seed(trainer.recipe.seed * 1_000_003 + processes.rank())  # noise of its own for other rows
        with signals.noted() as stopped:
            watch = _Progress(trainer, report, stopped)
            watching.attach(trainer, callbacks)
            project = trainer.pop_callback(_Project)  # after them: it measures where one of them stops
            assert project is not None
            trainer.add_callback(project)
            trainer.add_callback(watch)
            trainer.model.train()  # type: ignore[union-attr]
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if watch.stops:
            raise InterruptedRunError(f"interrupted at step {trainer.state.global_step}; the same command with --resume goes on from there")
    trainer.choose_best()
    at = next(p for p in trainer.history if p.step == trainer.best_step)
    soft = FLOAT if trainer.float_student else soft_mode_at(trainer.recipe, at.progress)
    return Trained(
        trainer.history,
        soft,
        trainer.history[-1].step,
        at.step,
        trainer.tokens,
        trainer.binarized,
        trainer.recipe.learning_rate,
        seconds_before=trainer.seconds_before,
    )
