"""One conversion as its worker sees it: a child process, what it says, and how it is stopped."""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from rnn2bin.errors import InterruptedRunError, ResourceError, Rnn2binError, UsageError
from rnn2bin.serve.folders import LOG, OUT, Folders
from rnn2bin.serve.settings import Settings
from rnn2bin.serve.store import Row, Store
from rnn2bin.stages import STAGES

log = logging.getLogger("rnn2bin.serve")
OVER = "over"  # of a run that had ended before it came here
Outcome = dict[str, Any]  # {state: done | failed | cancelled | over, result | error}


class Left(BaseException):
    """This worker does not go on with a job: it stops, or another has it. Not an Exception: nothing of it is to be recorded as an end."""


class Conversion:
    """A run of a job here: its child is started when it is first needed and lives across the workflow's steps."""

    def __init__(self, job: str, run: int, *, store: Store, folders: Folders, settings: Settings, worker: str) -> None:
        self.job, self.run, self.worker = job, run, worker
        self.store, self.folders, self.settings = store, folders, settings
        self.lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.child: subprocess.Popen[str] | None = None
        self.at = -1  # index of the stage that has begun
        self.said: Outcome | None = None  # by the child, of its end
        self.outcome: Outcome | None = None
        self.measured: object = None
        self.stopping = threading.Event()

    def reach(self, stage: str) -> Outcome | None:
        """Goes on until `stage` is behind us: None; or until the conversion has ended: how."""
        wanted = STAGES.index(stage)
        if self.child is None and self.outcome is None:
            self._start()
        while self.outcome is None and self.at <= wanted:
            self._look()
            try:
                line = self.lines.get(timeout=self.settings.poll)
            except queue.Empty:
                continue
            if line is None:
                self.outcome = self._ended()
            else:
                self._hear(line)
        if self.outcome is None or (self.outcome["state"] == "done" and stage != STAGES[-1]):
            return None
        return self.outcome

    def _start(self) -> None:
        job = self.store.begin(self.job, self.run, self.worker)
        if job is None:  # cancelled while it waited, or deleted
            self.outcome = {"state": OVER}
        elif job["cancel"]:
            self.outcome = {"state": "cancelled"}
        elif job["stalls"] > self.settings.limits.stalls:
            self.outcome = failed(
                ResourceError("the machine failed under this conversion again and again; lower train.batch_size, or retry")
            )
        else:
            try:
                given = self.folders.lay_out(job)
            except FileNotFoundError as error:
                self.outcome = failed(UsageError(f"{error}: the upload is gone"))
                return
            self._spawn({**given, "recipe": job["recipe"], "out": OUT})

    def _spawn(self, task: dict[str, Any]) -> None:
        limits, folder = self.settings.limits, self.folders.job(self.job)
        bounds = {"memory": limits.memory, "cpu": limits.cpu, "file": limits.file, "parent": os.getpid()}
        with (folder / LOG).open("ab") as errors:
            # -I: no variable and no file in the folder changes what Python imports
            command = [sys.executable, "-I", "-m", "rnn2bin.serve.child"]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            self.child = subprocess.Popen(
                command, cwd=folder, env=environment(folder, limits.threads), text=True, start_new_session=True, **pipes
            )
        assert self.child.stdin is not None
        with suppress(BrokenPipeError):
            self.child.stdin.write(json.dumps({**task, **bounds}) + "\n")
            self.child.stdin.flush()
        threading.Thread(target=self._read, args=(self.child,), daemon=True).start()

    def _read(self, child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None
        for line in child.stdout:
            with suppress(ValueError):
                self.lines.put(json.loads(line))
        self.lines.put(None)

    def _look(self) -> None:
        """Whether we are to stop, or the job is asked to, or is another's by now."""
        if self.stopping.is_set():
            self._end()
            raise Left
        ours, cancel = self.store.watch(self.job, self.worker)
        if not ours:
            self._end(now=True)
            raise Left
        if cancel:
            self._end()
            self.outcome = {"state": "cancelled"}

    def _hear(self, line: dict[str, Any]) -> None:
        if (stage := line.get("stage")) in STAGES:
            if self.at != STAGES.index(stage):
                self.at = STAGES.index(stage)
                self._note("stage", {"stage": stage}, stage=stage)
        elif progress := line.get("progress"):
            fresh = {"stalls": 0} if self.measured not in (None, progress["measured"]) else {}
            self.measured = progress["measured"] or self.measured
            self._note("progress", progress, progress=progress, **fresh)
        elif "network" in line:
            self._note("isolated", {"network": line["network"]})
        elif "done" in line:
            self.said = {"state": "done", "result": line["done"]}
        elif error := line.get("error"):
            self.said = {"state": "failed", "error": {**error, "reasons": [without_paths(r, self.folders.home) for r in error["reasons"]]}}

    def _note(self, kind: str, data: Row, **values: Any) -> None:
        if not self.store.note(self.job, self.worker, kind, data, **values):
            self._end(now=True)
            raise Left

    def _ended(self) -> Outcome:
        """What the end of the child means."""
        assert self.child is not None
        code = self.child.wait()
        if self.said is not None:
            return self.said
        if code == -signal.SIGXCPU:
            return failed(ResourceError("the conversion used up its processor time; lower train.steps, or ask for a higher limit"))
        if code == -signal.SIGKILL:
            return failed(
                ResourceError("the system ended the conversion, most likely for its memory; lower train.batch_size or train.window")
            )
        log.error("job %s: its process ended with %s; see its log", self.job, code)
        return failed(Rnn2binError("the conversion failed by an error of rnn2bin's own; its operator finds it in the job's log"))

    def _end(self, *, now: bool = False) -> None:
        """The child and all it started are gone afterwards; unless `now`, with time to write a checkpoint."""
        child = self.child
        if child is None:
            return
        if not now:
            signal_group(child, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                child.wait(self.settings.grace)
        signal_group(child, signal.SIGKILL)
        child.wait()

    def kill(self) -> None:
        if self.child is not None:
            signal_group(self.child, signal.SIGKILL)


def signal_group(child: subprocess.Popen[str], number: int) -> None:
    """To the child's whole session, as long as it is not waited for: its number is then still its own."""
    if child.returncode is None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, number)


def environment(folder: Path, threads: int) -> dict[str, str]:
    """All that a child knows of where it runs."""
    home = str(folder / "tmp")
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "HOME": home,
        "TMPDIR": home,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
    }


def failed(error: Rnn2binError) -> Outcome:
    return {"state": "failed", "error": {"code": error.code, "status": error.http_status, "reasons": list(error.reasons)}}


def interrupted() -> Outcome:
    return failed(InterruptedRunError("the conversion was interrupted; retry goes on from its last checkpoint"))


def without_paths(text: str, home: Path) -> str:
    """A message with nothing in it of where things lie: children see names only, this is for what libraries add."""
    return re.sub(r"(?<![\w.])(/[\w.+@~-]+){2,}/?", "…", text.replace(str(home), "…"))
