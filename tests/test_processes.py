"""Several processes at one conversion: the losses of one process, one that writes and reports, one way to stop."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLASSES, VOCABULARY
from test_cli import call
from tolerances import assert_close

from rnn2bin import pipeline, processes
from rnn2bin.data import Batches, Part
from rnn2bin.distill import checkpoints, states
from rnn2bin.errors import DataError, UsageError

# Without noise, which every process draws for its own rows.
QUIET = ["gates.noise=0", "train.evaluate_every=3", "train.batch_size=5", "report.controls=false"]


def words(model: Path, out: Path, *knobs: str, data: Path | None = None) -> list[str]:
    given = ["--data", str(data)] if data else []
    sets = [word for knob in (*QUIET, *knobs) for word in ("--set", knob)]
    return ["convert", str(model), "--recipe", "smoke.yaml", "--out", str(out), "--json", *sets, *given]


def losses_of(text: str) -> list[float]:
    return [json.loads(line)["loss"] for line in text.splitlines() if line.startswith("{")]


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def pair(command: list[str]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each of two processes, started as torchrun starts them."""
    around = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "rnn2bin", *command],
            env={**os.environ, **around, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [one.communicate(timeout=300) for one in started]
    return [(one.returncode, *text) for one, text in zip(started, said, strict=True)]


def same(one: dict[str, Any], two: dict[str, Any], losses: list[float], others: list[float]) -> None:
    """One process and two saw the same: every loss, what was measured and chosen, what was counted."""
    assert len(losses) == len(others) > 0
    assert_close(torch.tensor(losses), torch.tensor(others))
    assert_close(torch.tensor([p["hard"] for p in one["training"]]), torch.tensor([p["hard"] for p in two["training"]]))
    assert one["cost"]["tokens"] == two["cost"]["tokens"]
    assert one["cost"]["best_step"] == two["cost"]["best_step"]


def test_two_processes_give_the_losses_of_one_and_only_the_first_speaks(tmp_path, save_model):
    """Windows of text with carried states, five rows for two processes, a density budget, averaged weights, a signal-free run."""
    model = save_model(tokens=True, outputs=VOCABULARY)
    knobs = ("train.steps=6", "train.max_steps=6", "budget.density=0.5", "train.averaging=0.5")
    alone = call(*words(model, tmp_path / "ONE", *knobs))
    assert alone.exit_code == 0, alone.stderr
    (first, out, told), (second, silent, quiet) = pair(words(model, tmp_path / "TWO", *knobs))
    assert (first, second) == (0, 0), told + quiet
    assert (silent, quiet) == ("", "")
    two = json.loads(out)
    assert two == json.loads((tmp_path / "TWO" / "report.json").read_text())
    assert two["provenance"]["machine"]["processes"] == 2
    same(json.loads(alone.stdout), two, losses_of(alone.stderr), losses_of(told))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ONE", "TWO", "model.pt"]


@pytest.mark.slow
def test_an_error_is_told_once_with_its_exit_code_everywhere(tmp_path, save_model):
    model = save_model(tokens=True, outputs=VOCABULARY)
    for knobs, code, said in (
        (("train.batch_size=1",), 2, "too few for 2 processes"),
        (("gates.soft=[z]",), 2, "gates.soft"),
        (("train.steps=3", "train.max_steps=3", "report.max_density=0.1"), 5, "density budget missed"),
        (("train.steps=9", "train.learning_rate=1e30"), 5, "diverged"),
    ):
        (first, _, told), (second, silent, quiet) = pair(words(model, tmp_path / "OUT", *knobs, "report.controls=false"))
        assert (first, second) == (code, code), told + quiet
        assert said in told
        assert "Traceback" not in told + quiet
        assert silent == ""
        assert said not in quiet or quiet.startswith("rnn2bin (process 1): ")
        assert not (tmp_path / "OUT").exists()
        pipeline.discard(tmp_path / "OUT.work")


CASES = {
    "labels a step": ({}, {"targets": (np.arange(360) % CLASSES).reshape(40, 9), "lengths": 1 + np.arange(40) % 9}, ("train.window=4",)),
    "labels a sequence": ({"both": True}, {"targets": np.arange(40) % CLASSES}, ("train.accumulation=2",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_torchrun(tmp_path, save_model, save_data, name):
    """Sequences of their own lengths; then a signal to torchrun, and --resume with two processes and with one."""
    options, arrays, knobs = CASES[name]
    model, data = save_model(**options), save_data(**arrays)
    steps = ("train.steps=12", "train.max_steps=12", *knobs)
    alone = call(*words(model, tmp_path / "ONE", *steps, data=data))
    assert alone.exit_code == 0, alone.stderr
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port()), "-m", "rnn2bin"]
    done = subprocess.run([*run, *words(model, tmp_path / "TWO", *steps, data=data)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    same(json.loads(alone.stdout), json.loads(done.stdout), losses_of(alone.stderr), losses_of(done.stderr))


@pytest.mark.slow
def test_a_signal_to_torchrun_leaves_a_checkpoint_that_any_number_of_processes_goes_on_from(tmp_path, save_model):
    model = save_model(tokens=True, outputs=VOCABULARY)
    knobs = ("train.steps=400", "train.max_steps=400", "train.evaluate_every=200", "gates.estimator=hard-sigmoid")
    whole = call(*words(model, tmp_path / "ONE", *knobs))
    assert whole.exit_code == 0, whole.stderr
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port()), "-m", "rnn2bin"]
    command = words(model, tmp_path / "TWO", *knobs)
    started = subprocess.Popen([*run, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert started.stderr is not None
    first = started.stderr.readline()
    started.send_signal(signal.SIGTERM)
    told = first + started.communicate(timeout=120)[1]
    assert "the same command with --resume goes on" in told, told
    assert not (tmp_path / "TWO").exists()
    left = checkpoints.newest(pipeline.work_folder(tmp_path / "TWO"))
    assert left is not None
    resumed = call(*command, "--resume")  # by one process
    assert resumed.exit_code == 0, resumed.stderr
    assert json.loads(resumed.stderr.splitlines()[0])["step"] > checkpoints.step_of(left)
    same_end = [json.loads(text.stdout)["training"][-1]["hard"] for text in (whole, resumed)]
    assert same_end[0] == pytest.approx(same_end[1], rel=1e-3)


# ---------------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("count", [2, 3])
def test_the_shares_of_a_batch_are_the_batch(stream, count):
    generator = torch.Generator().manual_seed(0)
    part = Part(torch.randint(5, (1, 203) if stream else (17, 12), generator=generator), stream=stream)
    make = lambda n: Batches(part, batch_size=5, window=4, seed=0, length=20, windowed=True, processes=n)
    one, many = make(1), make(count)
    assert len(many) == count * len(one)
    for k in range(len(one)):
        shares = [many[count * k + process] for process in range(count)]
        assert torch.equal(torch.cat([share.inputs for share in shares], 1), one[k].inputs)
        assert {share.first for share in shares} == {one[k].first}
        assert max(share.inputs.shape[1] for share in shares) - min(share.inputs.shape[1] for share in shares) <= 1


def test_fewer_rows_than_processes_are_refused():
    with pytest.raises(DataError, match=r"2 sequences, too few for 3 processes"):
        Batches(Part(torch.zeros(9, 4, 1)), batch_size=2, window=4, seed=0, length=1, windowed=True, processes=3)


def test_carried_states_of_the_processes_are_those_of_the_whole_batch():
    whole = [[(torch.randn(5, 3), torch.randn(5, 4))], [(torch.randn(5, 2),)]]
    cut = [[[tuple(t.tensor_split(2)[rank] for t in states) for states in layer] for layer in whole] for rank in range(2)]
    assert str(states.joined([(None, one) for one in cut])) == str((None, whole))


def test_alone_nothing_is_shared(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes.total(1.5, 2) == [1.5, 2]
    assert processes.gathered("x") == ["x"]
    assert processes.lead(lambda: 3) == processes.first(lambda: 3) == 3
    with pytest.raises(UsageError, match="wrong"):
        processes.lead(lambda: (_ for _ in ()).throw(UsageError("wrong")))
    assert not torch.distributed.is_initialized()


def test_a_module_is_converted_by_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="without torchrun"):
        pipeline.convert(torch.nn.LSTM(2, 3), data=[])
