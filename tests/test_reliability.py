"""Losing nothing: killed, failed and stopped at many moments, a conversion goes on where it was and ends with the same bits.

The default run holds 20 kills and each kind of failing operation; `-m nightly` holds 200 kills and every single operation.
What was run, with figures: docs/reliability.md.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import VOCABULARY, WIDTH, state_dict
from faults import Server
from safetensors.torch import load_file, save_file

import rnn2bin
from rnn2bin import cli, data, machine, pack, pipeline, plan, recipe_yaml, runtime, storage, student, tasks
from rnn2bin.cells.network import Network
from rnn2bin.data import Part
from rnn2bin.distill import anneal, calibrate, checkpoints, losses, trainer
from rnn2bin.errors import DataError, DivergedError, InterruptedRunError, ResourceError, UsageError
from rnn2bin.recipe import Recipe, parse
from rnn2bin.spec import EmbeddingSpec, LayerSpec, LinearSpec, RnnSpec, SectionSpec

STEPS, EVERY = 6, 2
KNOBS = [f"train.steps={STEPS}", f"train.max_steps={STEPS}", f"train.evaluate_every={EVERY}", "gates.straight_through_from=0.5"]
CONVERT = ["convert", "m.pt", "--recipe", "smoke.yaml", *(arg for knob in KNOBS for arg in ("--set", knob)), "--out", "OUT", "--json"]
CELLS = ["LSTM", "GRU"]


def sha256(out: Path) -> str:
    return hashlib.sha256((out / pack.WEIGHTS).read_bytes()).hexdigest()


def words(text: str) -> list[str]:
    """The lines of stderr that are not progress."""
    return [line for line in text.splitlines() if line and not line.startswith("{")]


def steps(text: str) -> list[int]:
    """The steps that were reported; a line that a kill has cut is none."""
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line)["step"])
        except ValueError:
            continue
    return found


# ---------------------------------------------------------------------------------------------- killed


@dataclass(frozen=True)
class Reference:
    """An uninterrupted conversion: its folder, what it did to the disk, the weights' sha256 and the seconds it took."""

    folder: Path
    operations: list[str]
    sha: str
    seconds: float

    def copy(self, to: Path, *, older: Path | None = None) -> Path:
        to.mkdir()
        shutil.copy(self.folder / "m.pt", to)
        if older:
            shutil.copytree(older, to / "OUT")
        return to


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as run:
        yield run


@pytest.fixture(scope="module")
def older(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed directory of before, to be replaced by --force."""
    folder = tmp_path_factory.mktemp("older")
    torch.save(state_dict(tokens=True, outputs=VOCABULARY, seed=5), folder / "m.pt")
    assert server(CONVERT, cwd=folder)["code"] == 0
    return folder / "OUT"


@pytest.fixture(scope="module")
def references(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    found = {}
    for cell in CELLS:
        folder = tmp_path_factory.mktemp(cell)
        torch.save(state_dict(cell=cell, tokens=True, outputs=VOCABULARY), folder / "m.pt")
        done = server(CONVERT, cwd=folder)
        assert done["code"] == 0, done["err"]
        found[cell] = Reference(folder, done["seen"], sha256(folder / "OUT"), done["seconds"])
    return found


def assert_old_or_new(out: Path, *shas: str | None) -> None:
    """`out` is not there (None), or a whole directory with weights of one of these sha256."""
    if not out.exists():
        assert None in shas
        return
    assert sha256(out) in shas
    assert {"config.json", "recipe.yaml", "report.json", "report.html", "README.md"} <= {path.name for path in out.iterdir()}
    json.loads((out / "report.json").read_text())
    runtime.load(out)


def goes_on(server: Server, folder: Path, wanted: Reference, *options: str) -> list[int]:
    """The same command with --resume ends with the same bits and leaves nothing else; gives the steps it trained."""
    resumed = server([*CONVERT, *options, "--resume"], cwd=folder)
    assert resumed["code"] == 0, resumed["err"]
    assert sha256(folder / "OUT") == wanted.sha
    assert json.loads(resumed["out"])["cost"]["steps"] == STEPS
    assert sorted(path.name for path in folder.iterdir()) == ["OUT", "m.pt"]
    return steps(resumed["err"])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("count", [10, pytest.param(100, marks=pytest.mark.nightly)])
def test_kill_9_at_random_moments(cell, count, server, references, older, tmp_path):
    """Half of the moments are operations on the disk, half are times; half replace an older directory. Seed: 20261123."""
    wanted, draw = references[cell], random.Random(f"20261123 {cell} {count}")
    killed = lost_most = 0
    for number in range(count):
        force = number % 4 > 1
        folder = wanted.copy(tmp_path / str(number), older=older if force else None)
        options = ["--force"] if force else []
        # The first moment is the beginning of the second checkpoint, when a whole interval is lost; all others are drawn.
        second = next(k for k, operation in enumerate(wanted.operations, 1) if f"checkpoint-{2 * EVERY}" in operation)
        at = draw.randint(1, len(wanted.operations)) if number else second
        moment: dict[str, Any] = {"after": draw.uniform(0, wanted.seconds)} if number % 2 else {"at": at, "kind": "kill"}
        done = server([*CONVERT, *options], cwd=folder, **moment)
        killed += done["code"] == -signal.SIGKILL
        assert done["code"] in (0, -signal.SIGKILL), done["err"]
        assert_old_or_new(folder / "OUT", wanted.sha, sha256(older) if force else None)
        before, after = steps(done["err"]), goes_on(server, folder, wanted, *options)
        lost = max(before, default=0) - (min(after, default=STEPS + 1) - 1)
        assert lost <= EVERY, (moment, before, after)
        lost_most = max(lost_most, lost)
        shutil.rmtree(folder)
    assert killed > 0.6 * count  # a time may lie behind the end
    assert lost_most > 0


def test_same_file_recipe_and_seed_give_the_same_bits_in_another_process(references, tmp_path):
    wanted = references["LSTM"]
    folder = wanted.copy(tmp_path / "again")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(rnn2bin.__file__).parent.parent)}
    subprocess.run([sys.executable, "-m", "rnn2bin", *CONVERT], cwd=folder, env=env, check=True, capture_output=True)
    assert sha256(folder / "OUT") == wanted.sha
    assert references["GRU"].sha != wanted.sha


def test_a_conversion_that_was_done_is_not_done_again(references, tmp_path):
    """Killed between the last rename and the removal of the checkpoints, a run has nothing left to do; another conversion is refused."""
    folder = references["LSTM"].copy(tmp_path / "a", older=references["LSTM"].folder / "OUT")
    before = (folder / "OUT" / "report.json").read_bytes()
    where = [arg.replace("m.pt", str(folder / "m.pt")).replace("OUT", str(folder / "OUT")) for arg in CONVERT]
    done = call(*where, "--resume")
    assert done.exit_code == 0, done.stderr
    assert (folder / "OUT" / "report.json").read_bytes() == before
    assert call(*where, "--resume", "--seed", "3").exit_code == 2


# ---------------------------------------------------------------------------------------------- failing disks

CLEANING = ("unlink", "rmdir")  # whose failure costs nothing but room


def assert_failed_well(done: dict[str, Any], operation: str) -> None:
    said = words(done["err"])
    if done["code"] == 0:
        assert operation.startswith(CLEANING), (operation, said)
        return
    assert done["code"] == 6, (operation, done["err"])
    assert len(said) == 1, said
    assert said[0].startswith("rnn2bin: ")
    assert "cannot write (" in said[0]
    assert json.loads(done["out"])["error"]["code"] == "resources"


@pytest.mark.parametrize("kind", ["each kind once", pytest.param("every single one", marks=pytest.mark.nightly)])
def test_every_write_fsync_and_rename_failed_in_turn(kind, server, references, older, tmp_path):
    wanted = references["GRU"]
    first = {operation: k for k, operation in reversed(list(enumerate(wanted.operations, 1)))}
    every = kind == "every single one"
    turns = range(1, len(wanted.operations) + 1) if every else sorted(k for op, k in first.items() if not op.startswith(CLEANING))
    for number, at in enumerate(turns):
        folder = wanted.copy(tmp_path / str(at), older=older if at % 2 else None)
        options = ["--force"] if at % 2 else []
        done = server([*CONVERT, *options], cwd=folder, at=at, kind="error")
        # With an older directory to replace there are a few operations more, of the same kinds.
        seen = done["seen"][:at]
        # The libraries make directories that may be there already: such a failure is none.
        assert_failed_well(done, "unlink" if seen[-1].startswith("mkdir") and seen[-1] in seen[:-1] else seen[-1])
        assert_old_or_new(folder / "OUT", wanted.sha, sha256(older) if at % 2 else None)
        if every or number % 5 == 0:
            goes_on(server, folder, wanted, *options)
        shutil.rmtree(folder)


def test_disk_full_at_20_offsets(server, references, tmp_path):
    """RLIMIT_FSIZE: no file grows beyond the offset, whoever writes it. Seed: 20261123."""
    wanted, draw = references["LSTM"], random.Random(20261123)
    largest = max(path.stat().st_size for path in (wanted.folder / "OUT").iterdir())
    for number in range(20):
        folder = wanted.copy(tmp_path / str(number))
        done = server(CONVERT, cwd=folder, limit=int(math.exp(draw.uniform(0, math.log(largest - 1)))))
        assert_failed_well(done, "write")
        assert not (folder / "OUT").exists()
        if number % 4 == 0:
            goes_on(server, folder, wanted)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder]).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.nightly
def test_a_full_file_system_at_20_offsets(server, references, older, small_disk):
    """ENOSPC by the file system itself: from a drawn operation on only so many bytes are left. Seed: 20261123."""
    wanted, draw = references["LSTM"], random.Random(20261123)
    failed = 0
    for number in range(20):
        folder = wanted.copy(small_disk / str(number), older=older if number % 2 else None)
        options = ["--force"] if number % 2 else []
        at, left = draw.randint(1, len(wanted.operations) - 60), 4096 * draw.randint(0, 12)
        done = server([*CONVERT, *options], cwd=folder, at=at, kind="fill", left=left)
        failed += done["code"] == 6
        assert_failed_well(done, "unlink" if left else "write")  # what is left may suffice
        assert_old_or_new(folder / "OUT", wanted.sha, sha256(older) if number % 2 else None)
        (folder / "ballast").unlink()
        goes_on(server, folder, wanted, *options)
        shutil.rmtree(folder)
    assert failed > 10


def call(*args: Any) -> Result:
    """A command in this process. An exception that is not an exit is a bug: it is raised."""
    result = CliRunner().invoke(cli.main, [str(a) for a in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a token network, as the working directory."""
    monkeypatch.chdir(tmp_path)
    torch.save(state_dict(tokens=True, outputs=VOCABULARY), tmp_path / "m.pt")
    return tmp_path


def test_a_place_that_cannot_be_written_is_told_before_the_work(here, monkeypatch):
    """Also where checkpoints could still be written: only a new name beside OUT cannot be made."""
    plain = os.mkdir

    def mkdir(path, *args, **kwargs):
        if str(path).endswith(pack.PARTIAL):
            raise PermissionError(13, "Permission denied")
        return plain(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", mkdir)
    monkeypatch.setattr(calibrate, "calibrate", lambda *_: pytest.fail("the work has begun"))
    result = call(*CONVERT)
    assert result.exit_code == 6
    assert "Permission denied" in result.stderr
    assert [path.name for path in here.iterdir()] == ["m.pt"]


@pytest.mark.parametrize("control", [False, True])
def test_the_disk_check_covers_the_most_that_lies_there(here, monkeypatch, control):
    """Bytes are counted whenever something was renamed or is about to be removed."""
    most = 0

    def look(*_: Any, **__: Any) -> None:
        nonlocal most
        most = max(most, sum(f.stat().st_size for f in here.rglob("*") if f.is_file() and f.name != "m.pt"))

    for module, name in ((storage, "sync"), (shutil, "rmtree")):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, plain=plain, **k: (look(), plain(*a, **k))[1])
    recipe = recipe_yaml.read("smoke.yaml", overrides=[*KNOBS, f"report.float_same_compute={str(control).lower()}"])
    needed = plan.plan("m.pt", recipe, None, "OUT")["disk"]["needed_bytes"]
    pipeline.run("m.pt", recipe, None, Path("OUT"))
    assert 0 < most <= needed


@pytest.mark.parametrize("name", ["OUT.work", "OUT.old"])
def test_folders_that_are_not_ours_are_left_alone(here, name):
    """OUT.old was removed when OUT was replaced, OUT.work whenever it held no checkpoint."""
    (here / name).mkdir()
    (here / name / "thesis.tex").write_text("years")
    first = call(*CONVERT)
    assert first.exit_code == (2 if name == "OUT.work" else 0), first.stderr
    call(*CONVERT, "--force")
    assert (here / name / "thesis.tex").read_text() == "years"


def test_the_time_of_an_interrupted_run_counts(here, monkeypatch):
    """Tokens of all steps were divided by the seconds of the last process."""
    with monkeypatch.context() as patch:
        signalled(patch, "report", signal.SIGINT)
        assert call(*CONVERT).exit_code == 7
    state = here / "OUT.work" / "checkpoint-6" / anneal.STATE
    content = json.loads(state.read_text())
    assert content["seconds"] > 0
    state.write_text(json.dumps(content | {"seconds": 1000.0}))
    storage.seal(state.parent)
    cost = json.loads(call(*CONVERT, "--resume").stdout)["cost"]
    assert 1000 < cost["seconds"] < 1100
    assert cost["tokens_per_second"] == pytest.approx(cost["tokens"] / cost["seconds"])


def test_what_a_half_removed_work_folder_holds_is_not_gone_on_with(here):
    """Without its stamp --resume was answered with advice to give --resume."""
    (here / "OUT.work" / "checkpoint-2").mkdir(parents=True)
    result = call(*CONVERT, "--resume")
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in here.iterdir()) == ["OUT", "m.pt"]


def test_force_and_resume_together_start_another_conversion_over(here):
    assert call(*CONVERT, "--max-drop", "0").exit_code in (0, 5)
    shutil.rmtree(here / "OUT", ignore_errors=True)
    (here / "OUT.work").mkdir(exist_ok=True)
    storage.write_synced(here / "OUT.work" / pipeline.STAMP, json.dumps({"key": "another"}))
    assert call(*CONVERT, "--resume").exit_code == 2
    assert call(*CONVERT, "--resume", "--force").exit_code == 0


# ---------------------------------------------------------------------------------------------- old or new


def folder_with(path: Path, text: str) -> Path:
    path.mkdir()
    (path / pack.CONFIG).write_text(text)
    return path


@pytest.mark.parametrize("exchanges", [True, False])
def test_replacing_is_undone_when_the_disk_does_not_confirm_it(exchanges, tmp_path, monkeypatch):
    new, out = folder_with(tmp_path / "out.partial", "new"), folder_with(tmp_path / "out", "old")
    if not exchanges:
        monkeypatch.setattr(storage, "_exchange", lambda *_: False)
    monkeypatch.setattr(storage, "sync", lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):
        storage.replace(new, out)
    assert ((out / pack.CONFIG).read_text(), (new / pack.CONFIG).read_text()) == ("old", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.partial"]


def test_an_older_directory_that_was_moved_aside_comes_back(tmp_path):
    """A kill between the two renames, on systems that cannot exchange names."""
    folder_with(tmp_path / f"out{storage.ASIDE}", "old")
    pack.check_free(tmp_path / "out", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_names_are_exchanged_at_once_where_the_system_can(tmp_path):
    one, other = folder_with(tmp_path / "one", "1"), folder_with(tmp_path / "other", "2")
    if not storage._exchange(one, other):
        pytest.skip("this file system cannot exchange names")
    assert (one / pack.CONFIG).read_text() == "2"
    with pytest.raises(FileNotFoundError):
        storage._exchange(one, tmp_path / "none")


# ---------------------------------------------------------------------------------------------- resumed = uninterrupted


class Killed(BaseException):
    """What nothing catches: the trainer is gone between two checkpoints, as after a kill."""


TOKENS, UNITS = 5, 6


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network_of(cell: str, readout: str) -> Network:
    section = SectionSpec(
        (LayerSpec(cell, 3, UNITS), LayerSpec(cell, UNITS, UNITS)), EmbeddingSpec(TOKENS, 3), (LinearSpec(UNITS, TOKENS),), readout
    )
    network = Network(RnnSpec({"main": section}))
    with torch.no_grad():
        for seed, p in enumerate(network.parameters()):
            p.copy_(torch.randn(p.shape, generator=seeded(seed)) * 0.7)
    return network.eval().requires_grad_(False)


def part_of(kind: str, seed: int) -> Part:
    tokens = torch.randint(TOKENS, (12, 9), generator=seeded(seed))
    if kind == "stream":
        return Part(tokens.flatten()[None], stream=True)
    lengths = torch.randint(2, 10, (12,), generator=seeded(seed + 1))
    return Part(tokens, lengths, None if kind == "windows" else torch.randint(TOKENS, (12,), generator=seeded(seed + 2)))


KINDS = {"stream": "all", "windows": "all", "padded": "last"}  # text; sequences of three windows; one label a sequence
GATES = {"gumbel": {"noise": 0.5}, "gumbel-hard": {"noise": 1.0}, "straight-through": {}}
GATES["reinforce"] = {"noise": 1.0, "straight_through_from": 1.0, "reinforce": {"baseline": "unit"}}


def train(cell: str, kind: str, recipe: Recipe, out: Path, **options: Any) -> tuple[Network, anneal.Trained]:
    teacher = network_of(cell, KINDS[kind])
    parts = [part_of(kind, seed) for seed in (3, 7)]
    task = tasks.resolve(recipe, teacher.spec, parts[0])
    train, valid = (tasks.settled(task, part) for part in parts)
    network = student.student(teacher, recipe.gates)
    return network, trainer.train(network, teacher, task=task, recipe=recipe, train=train, valid=valid, out=out, **options)


def recipe_for(estimator: str, *, accumulation: int = 1, copies: int | str = 2, **more: Any) -> Recipe:
    gates = {"estimator": estimator, "copies": copies, "straight_through_from": 0.7, **GATES[estimator]}
    settings = {"steps": 8, "max_steps": 9, "batch_size": 2, "window": 4, "evaluate_every": 3, "tolerance": 0, "accumulation": accumulation}
    return parse({"train": settings | more, "gates": gates})


def kill_at(step: int) -> Any:
    def report(now: dict[str, Any]) -> None:
        if now["step"] == step:
            raise Killed

    return report


def content(folder: Path) -> dict[str, Any]:
    """All that a checkpoint holds, as plain data."""
    found: dict[str, Any] = {}
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            found[path.name] = load_file(path)
        elif path.suffix in (".pt", ".pth"):
            found[path.name] = torch.load(path, weights_only=False)
        elif path.suffix == ".json" and path.name != storage.MANIFEST:
            found[path.name] = json.loads(path.read_text())
    return found


def same(one: Any, other: Any) -> bool:
    """Equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return bool((one == other).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize(("estimator", "accumulation"), [("gumbel", 1), ("gumbel-hard", 2), ("straight-through", 2), ("reinforce", 1)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_after_a_kill_everything_is_as_uninterrupted(cell, kind, accumulation, estimator, tmp_path):
    """Weights, the best ones, optimizer, schedule, random states, carried states, history: all files of the last checkpoint."""
    recipe = recipe_for(estimator, accumulation=accumulation)
    wanted, whole = train(cell, kind, recipe, tmp_path / "whole")
    with pytest.raises(Killed):
        train(cell, kind, recipe, tmp_path / "cut", report=kill_at(2))
    with pytest.raises(Killed):
        train(cell, kind, recipe, tmp_path / "cut", resume=True, report=kill_at(5))
    torch.manual_seed(999)  # another process
    again: list[int] = []
    found, resumed = train(cell, kind, recipe, tmp_path / "cut", resume=True, report=lambda now: again.append(now["step"]))
    assert again == list(range(4, 10))  # the checkpoint of step 3 stood
    assert resumed == whole
    assert same(found.state_dict(), wanted.state_dict())
    for step in (6, 9):
        ours, theirs = content(tmp_path / "cut" / f"checkpoint-{step}"), content(tmp_path / "whole" / f"checkpoint-{step}")
        assert {"model.safetensors", "best.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "carried.safetensors"} <= set(
            ours
        )
        assert ours["trainer_state.json"].pop("log_history") is not None  # times of the clock
        theirs["trainer_state.json"].pop("log_history")
        assert ours["distill.json"].pop("seconds") > 0 < theirs["distill.json"].pop("seconds")
        assert [name for name in theirs if not same(ours[name], theirs[name])] == []
        assert bool(ours["carried.safetensors"]) == (kind != "padded")
        assert ("baselines.safetensors" in ours) == (estimator == "reinforce")


@pytest.mark.parametrize(("tolerance", "last"), [(0, 9), (1e9, 8)])
def test_a_run_that_had_ended_takes_no_step_more(tolerance, last, tmp_path):
    """Resumed at its last checkpoint the Trainer took one more step, and after gates had binarized all up to the hard stop."""
    recipe = recipe_for("gumbel", tolerance=tolerance, evaluate_every=4)
    wanted, whole = train("lstm", "stream", recipe, tmp_path / "a")
    assert whole.steps == last
    again: list[int] = []
    found, resumed = train("lstm", "stream", recipe, tmp_path / "a", resume=True, report=again.append)
    assert again == []
    assert resumed == whole
    assert same(found.state_dict(), wanted.state_dict())


def test_the_last_step_is_measured_whatever_its_number(tmp_path):
    _, trained = train("lstm", "stream", recipe_for("gumbel", evaluate_every=4), tmp_path)
    assert [point.step for point in trained.history] == [4, 8, 9]


# ---------------------------------------------------------------------------------------------- checkpoints


def spoil(path: Path, how: str) -> None:
    content = path.read_bytes()
    match how:
        case "truncated":
            path.write_bytes(content[: len(content) // 2])
        case "empty":
            path.write_bytes(b"")
        case "one bit":
            path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        case "missing":
            path.unlink()


FILES = ["model.safetensors", "best.safetensors", "optimizer.pt", "rng_state.pth", "distill.json", "trainer_state.json", "manifest.json"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Network, anneal.Trained]:
    out = tmp_path_factory.mktemp("trained")
    return out, *train("gru", "stream", recipe_for("gumbel"), out)


@pytest.mark.parametrize("how", ["truncated", "empty", "one bit", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over_with_a_word(name, how, trained, tmp_path, caplog):
    folder = shutil.copytree(trained[0], tmp_path / "a")
    assert [path.name for path in checkpoints.every(folder)] == ["checkpoint-6", "checkpoint-9"]  # two are kept
    spoil(folder / "checkpoint-9" / name, how)
    assert checkpoints.newest(folder) == folder / "checkpoint-6"
    checkpoints.discard_newer(folder, folder / "checkpoint-6")
    assert [path.name for path in checkpoints.every(folder)] == ["checkpoint-6"]
    assert len(caplog.messages) == 1
    assert "checkpoint-9 is passed over: " in caplog.text
    assert name in caplog.text or (name == "manifest.json" and how == "missing")


def test_from_the_checkpoint_before_the_end_is_the_same(trained, tmp_path):
    folder = shutil.copytree(trained[0], tmp_path / "a")
    spoil(folder / "checkpoint-9" / "optimizer.pt", "one bit")
    again: list[int] = []
    network, found = train("gru", "stream", recipe_for("gumbel"), folder, resume=True, report=lambda now: again.append(now["step"]))
    assert again == [7, 8, 9]
    assert found == trained[2]
    assert same(network.state_dict(), trained[1].state_dict())


def test_both_damaged_starts_over_with_two_words(trained, tmp_path, caplog):
    folder = shutil.copytree(trained[0], tmp_path / "a")
    for checkpoint in checkpoints.every(folder):
        spoil(checkpoint / "model.safetensors", "truncated")
    again: list[int] = []
    _, found = train("gru", "stream", recipe_for("gumbel"), folder, resume=True, report=lambda now: again.append(now["step"]))
    assert again[0] == 1
    assert len(caplog.messages) == 2
    assert found == trained[2]


def test_the_command_line_passes_the_word_on(here):
    assert call(*CONVERT, "--max-drop", "0").exit_code in (0, 5)
    if not (here / "OUT.work").exists():
        pytest.skip("the tiny network lost nothing")
    spoil(here / "OUT.work" / "checkpoint-6" / "model.safetensors", "truncated")
    result = call(*CONVERT, "--resume")
    assert result.exit_code == 0
    assert words(result.stderr)[0].startswith("rnn2bin: OUT.work/checkpoint-6 is passed over: model.safetensors has ")
    assert steps(result.stderr) == [5, 6]


def test_the_best_weights_survive_the_removal_of_their_checkpoint_and_a_move(tmp_path, monkeypatch):
    """They lie in every checkpoint: no other one and no path is needed."""
    monkeypatch.setattr(
        trainer.DistillTrainer, "measure", lambda self, *_: anneal.Measured(abs(self.state.global_step - 3) + 1.0, 0.0, 0.0)
    )
    recipe = recipe_for("gumbel", evaluate_every=1)
    wanted, whole = train("lstm", "stream", recipe, tmp_path / "whole")
    assert whole.best_step == 3
    with pytest.raises(Killed):
        train("lstm", "stream", recipe, tmp_path / "cut", report=kill_at(9))
    (tmp_path / "cut").rename(tmp_path / "moved")
    assert [path.name for path in checkpoints.every(tmp_path / "moved")] == ["checkpoint-7", "checkpoint-8"]
    found, resumed = train("lstm", "stream", recipe, tmp_path / "moved", resume=True)
    assert resumed == whole
    assert same(found.state_dict(), wanted.state_dict())


# ---------------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at", [1, 6, 7])
def test_a_gradient_that_is_not_finite_is_caught_in_its_step(value, at, tmp_path, monkeypatch):
    """At step 6 the weights would have been measured and saved as the newest checkpoint before a loss showed it."""
    plain, calls = losses.total, []

    def spoiled(*args: Any, **kwargs: Any) -> torch.Tensor:
        total = plain(*args, **kwargs)
        calls.append(1)
        if len(calls) == at:
            total.register_hook(lambda grad: grad * value)
        return total

    monkeypatch.setattr(losses, "total", spoiled)
    with pytest.raises(DivergedError, match=rf"not finite at step {at}; nothing was packed"):
        train("lstm", "stream", recipe_for("gumbel"), tmp_path)
    assert len(calls) == at
    kept = checkpoints.newest(tmp_path)
    assert (kept.name if kept else None) == {1: None, 6: "checkpoint-3", 7: "checkpoint-6"}[at]
    if kept:
        assert all(bool(torch.isfinite(t).all()) for t in load_file(kept / "model.safetensors").values())


def test_a_metric_that_is_not_finite_stops_too(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.DistillTrainer, "measure", lambda *_: anneal.Measured(math.nan, 1.0, 0.0))
    with pytest.raises(DivergedError, match="is nan with hard gates"):
        train("lstm", "stream", recipe_for("gumbel"), tmp_path)


def test_a_diverged_conversion_packs_nothing(here, monkeypatch):
    plain, calls = losses.total, []

    def spoiled(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return plain(*args, **kwargs) * (math.nan if len(calls) == 5 else 1)

    monkeypatch.setattr(losses, "total", spoiled)
    result = call(*CONVERT)
    assert result.exit_code == 5
    assert "the loss is nan at step 4" in result.stderr
    assert sorted(path.name for path in here.iterdir()) == ["OUT.work", "m.pt"]
    assert checkpoints.newest(here / "OUT.work") == here / "OUT.work" / "checkpoint-4"
    assert call(*CONVERT, "--resume").exit_code == 0  # calls 6 … are sound again


def test_data_too_large_for_float32_are_refused():
    """They became infinite after the check."""
    inputs = torch.zeros(4, 2, 3, dtype=torch.float64)
    inputs[1, 0, 2] = 1e39
    with pytest.raises(DataError, match=r"inputs\[1, 0, 2\] is NaN or infinite in float32"):
        data.part_from({"inputs": inputs})


# ---------------------------------------------------------------------------------------------- stopped by a signal

MOMENTS = {
    "calibration": (calibrate, "calibrate"),
    "measurement": (trainer.DistillTrainer, "measure"),
    "checkpoint": (storage, "seal"),
    "report": (pipeline.evaluation, "evaluate_parts"),
    "packing": (pack, "write_model"),
    "replacing": (storage, "replace"),
    "removal": (pipeline, "discard"),
}


def signalled(monkeypatch: pytest.MonkeyPatch, moment: str, *numbers: int, at: int = 1) -> None:
    """Signals come in the middle of the call: before it does what it does, and after."""
    where, name = MOMENTS[moment]
    plain, calls = getattr(where, name), []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) != at:
            return plain(*args, **kwargs)
        signal.raise_signal(numbers[0])
        found = plain(*args, **kwargs)
        for number in numbers[1:]:
            signal.raise_signal(number)
        return found

    monkeypatch.setattr(where, name, call)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_anywhere_ends_with_7_and_how_to_go_on(moment, number, here, references, monkeypatch):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        signalled(patch, moment, number, at=2 if moment == "removal" else 1)  # the first removal is of what lay there
        result = call(*CONVERT)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert result.exit_code == 7, result.stderr
    said = words(result.stderr)
    assert len(said) == 1
    assert "--resume goes on from" in said[0]
    assert not (here / "OUT").exists() or moment == "removal"
    assert not (here / "OUT.partial").exists()
    resumed = call(*CONVERT, "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert sha256(here / "OUT") == references["LSTM"].sha
    assert sorted(path.name for path in here.iterdir()) == ["OUT", "m.pt"]


@pytest.mark.parametrize("moment", ["checkpoint", "measurement"])
def test_a_second_signal_while_the_first_is_obeyed_tears_nothing(moment, here, references, monkeypatch):
    with monkeypatch.context() as patch:
        signalled(patch, moment, signal.SIGTERM, signal.SIGINT, at=2)
        result = call(*CONVERT)
    assert result.exit_code == 7
    assert "--resume goes on from step" in result.stderr
    resumed = call(*CONVERT, "--resume")
    assert resumed.exit_code == 0
    assert sha256(here / "OUT") == references["LSTM"].sha


def test_a_signal_while_data_are_read_writes_nothing(here, monkeypatch):
    monkeypatch.setattr(pipeline, "prepare", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    result = call(*CONVERT)
    assert result.exit_code == 7
    assert "nothing was written" in result.stderr


# ---------------------------------------------------------------------------------------------- reproduce


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network, data, and its conversion in OUT."""
    folder = tmp_path_factory.mktemp("packed")
    torch.save(state_dict(), folder / "m.pt")
    generator = np.random.default_rng(0)
    np.savez(folder / "d.npz", inputs=generator.normal(size=(40, 9, WIDTH)).astype(np.float32), targets=generator.integers(0, 4, 40))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*CONVERT, "--data", "d.npz").exit_code == 0
    return folder


@pytest.fixture
def copied(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(shutil.copytree(packed, tmp_path / "copy"))
    return Path.cwd()


def change(report: Path, **changes: Any) -> None:
    found = json.loads(report.read_text())
    found["provenance"] |= changes
    report.write_text(json.dumps(found))


def test_the_report_records_what_it_takes_to_run_it_again(packed):
    found = json.loads((packed / "OUT" / "report.json").read_text())["provenance"]
    assert found["model_sha256"] == sha256(packed / "OUT")
    assert found["command"] == {"model": "m.pt", "data": ["d.npz"]}
    assert found["machine"] == machine.computing("float32")
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert {"source", "source_sha256", "data_sha256", "seed", "versions", "data_free", "levels", "notes", "recipe"} <= set(found)


@pytest.mark.parametrize("report", ["OUT", "OUT/report.json"])
def test_reproduced(copied, report):
    result = call("reproduce", report, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {"reproduced": True, "model_sha256": sha256(Path("OUT")), "differences": []}
    assert sorted(path.name for path in copied.iterdir()) == ["OUT", "d.npz", "m.pt"]


def test_reproduced_from_other_places_and_with_other_versions(copied, tmp_path, monkeypatch):
    """A version that is another and still gives the same bits is said, and no failure."""
    recorded = json.loads((copied / "OUT" / "report.json").read_text())["provenance"]
    change(copied / "OUT" / "report.json", versions={**recorded["versions"], "numpy": "0.1"})
    monkeypatch.chdir(tmp_path)
    missing = call("reproduce", copied / "OUT")
    assert missing.exit_code == 2
    assert "m.pt" in missing.stderr
    result = call("reproduce", copied / "OUT", copied / "m.pt", "--data", copied / "d.npz")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("reproduced: ")
    assert f"another numpy: 0.1 then, {np.__version__} now" in result.stdout


def test_another_source_or_other_data_are_named_before_the_work(copied, monkeypatch):
    monkeypatch.setattr(pipeline, "run", lambda *_, **__: pytest.fail("the work has begun"))
    torch.save(state_dict(seed=1), "other.pt")
    result = call("reproduce", "OUT", "other.pt")
    assert (result.exit_code, "source file sha256" in result.stderr) == (5, True)
    arrays = dict(np.load("d.npz"))
    arrays["inputs"][0, 0, 0] += 1
    np.savez("other.npz", **arrays)
    result = call("reproduce", "OUT", "--data", "other.npz", "--json")
    assert (result.exit_code, "data sha256" in result.stderr) == (5, True)
    assert json.loads(result.stdout)["error"]["code"] == "not-reproduced"


def test_a_recipe_that_was_changed_is_shown_by_the_first_tensor(copied):
    """The weights lie beside the report: the first tensor that differs is named, and by how much."""
    recorded = json.loads((copied / "OUT" / "report.json").read_text())["provenance"]
    recipe = recorded["recipe"] | {"train": recorded["recipe"]["train"] | {"learning_rate": 0.1}}
    change(copied / "OUT" / "report.json", recipe=recipe)
    result = call("reproduce", "OUT")
    assert result.exit_code == 5
    assert len(words(result.stderr)) >= 1
    assert "tensor main.head.0.bias differs first, by up to" in words(result.stderr)[-1]


def test_what_is_around_is_named_before_the_tensor(copied):
    recorded = json.loads((copied / "OUT" / "report.json").read_text())["provenance"]
    tensors = load_file(copied / "OUT" / pack.WEIGHTS)
    tensors["main.head.0.bias"][0] += 0.5
    save_file(tensors, copied / "OUT" / pack.WEIGHTS, metadata={"format": "pt"})
    change(
        copied / "OUT" / "report.json",
        model_sha256=sha256(copied / "OUT"),
        versions={**recorded["versions"], "torch": "1.0"},
        machine={**recorded["machine"], "kernels": "sve"},
    )
    said = words(call("reproduce", "OUT").stderr)
    assert [line for line in said if line.startswith("rnn2bin: not reproduced: ")][:2] == [
        f"rnn2bin: not reproduced: torch: 1.0 then, {torch.__version__} now",
        f"rnn2bin: not reproduced: kernels: sve then, {machine.kernels()['isa']} now",
    ]
    assert "tensor main.head.0.bias differs first, by up to 0.5" in said[-1]
    (copied / "OUT" / pack.WEIGHTS).unlink()
    assert "do not lie beside it" in words(call("reproduce", "OUT").stderr)[-1]


def test_reports_that_cannot_be_run_again(copied):
    assert "no such report" in call("reproduce", "none.json").stderr
    (copied / "broken.json").write_text("{")
    for path, word in (("broken.json", "not a report"), ("m.pt", "not a report")):
        result = call("reproduce", path)
        assert (result.exit_code, word in result.stderr) == (2, True)
    report = copied / "OUT" / "report.json"
    whole = report.read_text()
    for text in ("[" * 100_000, '{"provenance": ["command"]}'):
        report.write_text(text)
        result = call("reproduce", "OUT")
        assert (result.exit_code, "not a report" in result.stderr) == (2, True)
    machine_then = json.loads(whole)["provenance"]["machine"]
    for name, value in {
        "command": {"model": 3, "data": []},
        "machine": {**machine_then, "threads": "2"},
        "versions": ["torch"],
        "recipe": [],
        "model_sha256": 0,
    }.items():
        report.write_text(whole)
        change(report, **{name: value})
        result = call("reproduce", "OUT")
        assert (result.exit_code, f"{name}: not as rnn2bin writes a report" in result.stderr) == (2, True)
    report.write_text(whole)
    change(report, command=None)
    assert "nn.Module" in call("reproduce", "OUT").stderr
    found = json.loads(report.read_text())
    del found["provenance"]["machine"]
    report.write_text(json.dumps(found))
    result = call("reproduce", "OUT")
    assert (result.exit_code, "does not record machine" in result.stderr) == (2, True)


# ---------------------------------------------------------------------------------------------- modules


class Tagger(torch.nn.Module):
    """Embedding tied with the head, dropout, batch norm: everything that has a state or draws numbers."""

    def __init__(self, cell: str = "LSTM") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(TOKENS, 6)
        self.rnn = getattr(torch.nn, cell)(6, 6, batch_first=True)
        self.norm, self.drop = torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.2)
        self.head = torch.nn.Linear(6, TOKENS)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.rnn(self.embedding(x))[0]
        return self.head(self.drop(self.norm(h.transpose(1, 2)).transpose(1, 2)))


def batches(n: int = 12) -> list[torch.Tensor]:
    return [torch.randint(TOKENS, (3, 7), generator=seeded(k)) for k in range(n)]


class Loader:
    """Batches again and again in the same order."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(batches(5))


MODULE_DATA = {
    "list": batches,
    "iterator": lambda: iter(batches()),
    "loader": lambda: {"train": Loader(), "valid": batches(2), "test": batches(2)},
}


def module_convert(out: Path, data: Any, *, cell: str = "LSTM", **options: Any) -> Any:
    recipe = recipe_for("gumbel", accumulation=2, copies="auto")
    recipe = recipe.model_copy(update={"report": recipe.report.model_copy(update={"controls": False})})
    return rnn2bin.convert(Tagger(cell), recipe=recipe, data=data, out=out, **options)


@pytest.mark.parametrize("given", MODULE_DATA)
@pytest.mark.parametrize("cell", CELLS)
def test_a_module_goes_on_bit_for_bit(cell, given, tmp_path):
    module_convert(tmp_path / "whole", MODULE_DATA[given](), cell=cell)
    with pytest.raises(Killed):
        module_convert(tmp_path / "cut", MODULE_DATA[given](), cell=cell, progress=kill_at(5))
    with pytest.raises(UsageError, match="--resume goes on"):
        module_convert(tmp_path / "cut", MODULE_DATA[given](), cell=cell)
    torch.manual_seed(999)
    again: list[int] = []
    result = module_convert(tmp_path / "cut", MODULE_DATA[given](), cell=cell, resume=True, progress=lambda now: again.append(now["step"]))
    assert again == list(range(4, 10))
    assert sha256(tmp_path / "cut") == sha256(tmp_path / "whole")
    assert result.report["provenance"]["model_sha256"] == sha256(tmp_path / "cut")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]
    assert module_convert(tmp_path / "cut", MODULE_DATA[given](), cell=cell, resume=True).report == json.loads(
        (tmp_path / "cut" / "report.json").read_text()
    )


def test_a_module_stopped_by_a_signal_says_how_to_go_on(tmp_path):
    def stop(now: dict[str, Any]) -> None:
        if now["step"] == 4:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(InterruptedRunError, match="step 4; the same command with --resume"):
        module_convert(tmp_path / "a", batches(), progress=stop)
    with pytest.raises(UsageError, match="another model, recipe or data"):
        module_convert(tmp_path / "a", batches(13), resume=True)
    module_convert(tmp_path / "a", batches(), resume=True)
    module_convert(tmp_path / "b", batches())
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")


class Scale(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = torch.nn.GRU(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x)[0]


@pytest.mark.parametrize("part", ["train", "valid", "test"])
@pytest.mark.parametrize("loader", [False, True])
def test_nan_in_a_modules_batches_is_named(part, loader, tmp_path):
    given: dict[str, Any] = {name: [torch.zeros(4, 2, 2) for _ in range(3)] for name in ("train", "valid", "test")}
    given[part][1][0, 0, 0] = math.nan
    if loader:
        given["train"] = torch.utils.data.DataLoader(given["train"], batch_size=None)
    with pytest.raises(DataError, match=f"batch 2 of the {part}(ing)? part holds NaN"):
        rnn2bin.convert(Scale(), recipe=recipe_for("gumbel", copies="auto"), data=given, out=tmp_path / "OUT")


def test_a_module_that_does_not_fit_on_the_disk_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ResourceError, match=r"1 kB free, .* needed for checkpoints"):
        module_convert(tmp_path / "OUT", batches())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_during_a_module_is_a_resource_error(tmp_path, monkeypatch):
    plain, calls = storage.seal, []

    def full(folder: Path) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        plain(folder)

    monkeypatch.setattr(storage, "seal", full)
    with pytest.raises(ResourceError, match=r"No space left on device\); free space; .* goes on from step 3"):
        module_convert(tmp_path / "OUT", batches())
