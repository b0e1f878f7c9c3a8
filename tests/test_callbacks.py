"""Watching a distillation: transformers' callbacks, functions of each measurement, TensorBoard, completion of the shell."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import TEXT, run
from transformers import TrainerCallback

import rnn2bin
from rnn2bin.distill import callbacks
from rnn2bin.distill.anneal import Point
from rnn2bin.errors import UsageError


class Seen(TrainerCallback):
    def __init__(self, stop_at: int | None = None) -> None:
        self.logs: list[dict[str, float]] = []
        self.steps, self.stop_at = 0, stop_at

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1
        if self.steps == self.stop_at:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs or {}))


def test_callbacks_see_every_step_and_measurement(tmp_path: Path) -> None:
    seen, told = Seen(), list[Point]()
    _, trained = run(TEXT, tmp_path, callbacks=[seen, told.append])
    assert seen.steps == trained.steps
    assert told == trained.history
    with pytest.raises(dataclasses.FrozenInstanceError):
        told[0].step = 5  # type: ignore[misc]
    measured = [log for log in seen.logs if "eval_hard" in log]
    assert [log["eval_hard"] for log in measured] == [point.hard for point in trained.history]
    assert {"eval_soft", "eval_saturation", "temperature", "slope", "progress", "learning_rate", "loss"} <= measured[-1].keys()
    assert "eval_density" not in measured[-1]


def test_watching_changes_no_bit(tmp_path: Path) -> None:
    plain, watched = (run(TEXT, tmp_path / name, callbacks=given)[0] for name, given in (("a", []), ("b", [Seen(), lambda point: None])))
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True))


def test_a_callback_may_stop_the_training(tmp_path: Path) -> None:
    _, trained = run(TEXT, tmp_path, callbacks=[Seen(stop_at=3)])
    assert trained.steps == 3
    assert [point.step for point in trained.history] == [3]
    assert trained.best_step == 3


@pytest.mark.parametrize("wrong", [3, "x", Seen])
def test_what_is_no_callback_is_refused_before_any_work(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(UsageError, match="is no TrainerCallback instance"):
        rnn2bin.convert(tmp_path / "missing.pt", callbacks=[wrong])


def test_modules_are_watched_too(tmp_path: Path) -> None:
    told = list[Point]()
    recipe = rnn2bin.Recipe.model_validate({"train": {"steps": 4, "max_steps": 4, "evaluate_every": 2}})
    batches = [torch.randn(5, 2, 3) for _ in range(10)]
    rnn2bin.convert(torch.nn.GRU(3, 4), data=batches, recipe=recipe, out=tmp_path / "OUT", callbacks=[told.append])
    assert [point.step for point in told] == [2, 4]


def test_tensorboard_holds_the_curves(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, trained = run(TEXT, tmp_path / "work", callbacks=[callbacks.tensorboard(tmp_path / "runs")])
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    assert [round(e.value, 5) for e in events.Scalars("eval/hard")] == [round(point.hard, 5) for point in trained.history]
    assert [e.step for e in events.Scalars("train/temperature")] == [point.step for point in trained.history]
    assert {"eval/soft", "eval/saturation", "train/slope", "train/loss"} <= set(events.Tags()["scalars"])


def test_tensorboard_that_is_missing_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"rnn2bin\[tensorboard\]"):
        callbacks.tensorboard(tmp_path)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    from click.testing import CliRunner

    from rnn2bin import cli

    result = CliRunner().invoke(cli.main, ["completion", shell])
    assert result.exit_code == 0
    assert "_RNN2BIN_COMPLETE" in result.stdout
    assert CliRunner().invoke(cli.main, ["completion", "tcsh"]).exit_code == 2


def complete(*words: str, incomplete: str) -> list[str]:
    """What the shell would be offered."""
    from click.shell_completion import ShellComplete

    from rnn2bin import cli

    return [item.value for item in ShellComplete(cli.main, {}, "rnn2bin", "_RNN2BIN_COMPLETE").get_completions(list(words), incomplete)]


def test_commands_options_and_recipes_are_completed() -> None:
    assert complete(incomplete="co") == ["compare", "completion", "convert"]
    assert complete("convert", incomplete="--ten") == ["--tensorboard"]
    assert complete("convert", "m.pt", "--recipe", incomplete="g2pm") == ["g2pm.yaml", "g2pm"]


def test_the_bash_script_is_bash(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from rnn2bin import cli

    script = tmp_path / "script"
    script.write_text(CliRunner().invoke(cli.main, ["completion", "bash"]).stdout)
    assert subprocess.run(["bash", "-n", str(script)], timeout=30).returncode == 0
