"""Watching a distillation from outside: transformers' TrainerCallbacks, functions of each measurement, TensorBoard.

What the trainer logs, and a TrainerCallback's `on_log` sees, at every measurement: `loss`, `temperature`, `slope`, `progress`,
`learning_rate`; and of the validation part `eval_hard`, `eval_soft`, `eval_saturation`, and `eval_density` where a budget counts it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rnn2bin.errors import UsageError

if TYPE_CHECKING:
    from rnn2bin.distill.anneal import AnnealTrainer, Point

Callback = TrainerCallback | Callable[["Point"], Any]


class Told(TrainerCallback):
    """Hands every measurement of a trainer, a frozen `Point`, to a function; in the process that leads."""

    def __init__(self, trainer: AnnealTrainer, tell: Callable[[Point], Any]) -> None:
        self.trainer, self.tell = trainer, tell

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.tell(self.trainer.history[-1])


def checked(callbacks: Sequence[Any]) -> tuple[Callback, ...]:
    """UsageError for what is neither a TrainerCallback (an instance) nor a function, before any work."""
    for one in callbacks:
        if isinstance(one, type) or not (isinstance(one, TrainerCallback) or callable(one)):
            said = one.__name__ if isinstance(one, type) else type(one).__name__
            raise UsageError(f"callbacks: {said} is no TrainerCallback instance and no function of one measurement")
    return tuple(callbacks)


def attach(trainer: AnnealTrainer, callbacks: Sequence[Callback]) -> None:
    """Adds them in order."""
    for one in callbacks:
        trainer.add_callback(one if isinstance(one, TrainerCallback) else Told(trainer, one))


def logged(point: Point, learning_rate: float | None) -> dict[str, float]:
    """A measurement under the names that the trainer logs."""
    values = asdict(point)
    found = {f"eval_{name}": values[name] for name in ("hard", "soft", "saturation", "density")}
    found |= {name: values[name] for name in ("loss", "temperature", "slope", "progress")} | {"learning_rate": learning_rate}
    return {name: value for name, value in found.items() if value is not None and value == value}


def tensorboard(folder: str | Path) -> TrainerCallback:
    """transformers' TensorBoardCallback, writing to `folder`: look with `tensorboard --logdir FOLDER`. Raises UsageError where
    tensorboard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UsageError("tensorboard: is not installed; pip install 'rnn2bin[tensorboard]'")
    from transformers.integrations import TensorBoardCallback

    callback = TensorBoardCallback()
    callback.logging_dir = str(folder)
    return callback
