"""A worker: DBOS's queue hands it runs of jobs; each is a durable workflow whose steps are the conversion's stages.

What a step has returned is recorded; after a crash the workflow begins again behind the last recorded step, wherever a worker is. The
child process does not outlive its worker, so the next step starts a new one, which repeats what takes seconds and goes on from the last
checkpoint.

A worker that is gone is noticed in two ways, neither of which compares clocks: on the same machine by its lock file, which the system lets
go; from elsewhere by its counter of signs of life, which has not moved for the length of a lease as the observer measures it. A worker that
cannot give signs of life stops its own children before that time is over.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from dbos import DBOS
from dbos import error as dbos_errors

from rnn2bin.serve import engine
from rnn2bin.serve.conversion import OVER, Conversion, Left, Outcome
from rnn2bin.serve.folders import Folders
from rnn2bin.serve.settings import QUEUE, WORKFLOW, Settings
from rnn2bin.serve.store import Store, new_id
from rnn2bin.stages import STAGES

log = logging.getLogger("rnn2bin.serve")
_here: Worker | None = None  # DBOS is one a process, and so is this


@DBOS.workflow(name=WORKFLOW, max_recovery_attempts=None)
def convert(job: str, run: int) -> str:
    """A run of a job; its final state. How often it may fail to get further is ours to say (`Limits.stalls`)."""
    outcome: Outcome | None = None
    for stage in STAGES:
        outcome = DBOS.run_step({"name": stage}, _reach, job, run, stage)
        if outcome is not None:
            break
    assert outcome is not None
    DBOS.run_step({"name": "finish"}, _finish, job, run, outcome)
    return str(outcome["state"])


def _reach(job: str, run: int, stage: str) -> Outcome | None:
    assert _here is not None
    return _here.reach(job, run, stage)


def _finish(job: str, run: int, outcome: Outcome) -> None:
    assert _here is not None
    _here.finish(job, run, outcome)


class Worker:
    """`start` it, and `stop` it before the process ends."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self.settings, self.store = settings, store
        self.folders = Folders(settings.home, store, settings.remote)
        self.id = new_id("wrk")
        self.conversions: dict[tuple[str, int], Conversion] = {}
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.dropped: set[str] = set()  # workflows that were let go here without an end
        self.seen: dict[str, tuple[int, float]] = {}  # worker -> its beat, and since when we see that one
        self.lock_file: int | None = None
        self.threads = [threading.Thread(target=self._live, daemon=True), threading.Thread(target=self._look_after, daemon=True)]

    def start(self) -> None:
        global _here
        _here = self
        self.lock_file = _lock(self._lock_path(self.id))
        self.store.add_worker(self.id, slots=self.settings.slots)
        engine.quiet()
        DBOS(config=engine.config(self.settings.db, worker=self.id))  # type: ignore[arg-type]
        DBOS.launch()
        DBOS.register_queue(
            QUEUE, worker_concurrency=self.settings.slots, polling_interval_sec=self.settings.pickup, on_conflict="always_update"
        )
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """Children write a checkpoint and end; their jobs go on with another worker, or after the next start. The process is to end then:
        the engine's threads are left as they are."""
        self.stopping.set()
        with self.lock:
            conversions = list(self.conversions.values())
        for one in conversions:
            one.stopping.set()
        deadline = time.monotonic() + self.settings.grace + 1
        while time.monotonic() < deadline and any(one.child and one.child.poll() is None for one in conversions):
            time.sleep(0.05)
        for one in conversions:
            one.kill()
        with suppress(Exception):  # the data base may be gone, and the lease ends by itself
            self.store.remove_worker(self.id)
        if self.lock_file is not None:
            self._lock_path(self.id).unlink(missing_ok=True)
            os.close(self.lock_file)

    # -- steps

    def reach(self, job: str, run: int, stage: str) -> Outcome | None:
        with self.lock:
            if self.stopping.is_set():
                raise Left
            if (job, run) not in self.conversions:
                options: dict[str, Any] = {"store": self.store, "folders": self.folders, "settings": self.settings, "worker": self.id}
                self.conversions[job, run] = Conversion(job, run, **options)
            one = self.conversions[job, run]
        outcome: Outcome | None = None
        try:
            outcome = one.reach(stage)
            if outcome is not None and outcome["state"] == "done":
                artifacts, size = self.folders.wrap_up(job)
                outcome = {**outcome, "artifacts": artifacts, "bytes": size}
        except BaseException:
            one.kill()
            self._forget(job, run)
            if one.stopping.is_set():
                self.dropped.add(engine.workflow_id(job, run))
            raise
        if outcome is not None:
            self._forget(job, run)
        return outcome

    def _forget(self, job: str, run: int) -> None:
        with self.lock:
            self.conversions.pop((job, run), None)

    def finish(self, job: str, run: int, outcome: Outcome) -> None:
        """May come twice after a crash: the second changes nothing."""
        state = outcome["state"]
        if state == OVER:
            return
        self.folders.clean_up(job)  # before a retry may lay it out again
        if state == "done":
            values = {name: outcome[name] for name in ("result", "artifacts", "bytes")}
            self.store.finish(job, run, state, outcome["result"], **values)
        else:
            error = outcome.get("error")
            self.store.finish(job, run, state, error or {}, error=error)

    # -- life and death

    def _live(self) -> None:
        """Signs of life; stops what runs here when none was possible for most of a lease, or the others have given this worker up."""
        last = time.monotonic()
        while not self.stopping.wait(self.settings.lease / 10):
            try:
                alive = self.store.beat(self.id)
                if alive:
                    last = time.monotonic()
                    self._take_up_dropped()
                    continue
            except Exception:
                log.warning("no sign of life possible: the data base does not answer")
                alive = True
            if not alive or time.monotonic() - last > 0.6 * self.settings.lease:
                self._let_go()
            if not alive:
                with suppress(Exception):
                    self.dropped.clear()  # the others may have taken them up
                    self._recover(self.id)
                    self.store.add_worker(self.id, slots=self.settings.slots)

    def _take_up_dropped(self) -> None:
        """The data base answers again, and nobody has given this worker up: what it let go is still its own."""
        while self.dropped and not self.stopping.is_set():
            one = next(iter(self.dropped))
            with suppress(dbos_errors.DBOSNonExistentWorkflowError):  # deleted meanwhile
                DBOS.resume_workflow(one, queue_name=QUEUE)
            self.dropped.discard(one)

    def _let_go(self) -> None:
        with self.lock:
            conversions = list(self.conversions.values())
        for one in conversions:
            one.stopping.set()
            one.kill()

    def _look_after(self) -> None:
        """Takes up what workers that are gone have left."""
        while not self.stopping.wait(min(1.0, self.settings.lease / 10)):
            try:
                self._bury()
                self._take_up()
            except Exception as error:
                if not self.stopping.is_set():
                    log.warning("looking after the other workers failed: %s", type(error).__name__)

    def _bury(self) -> None:
        now, workers = time.monotonic(), self.store.list_workers()
        self.seen = {id: self.seen[id] if id in self.seen and self.seen[id][0] == beat else (beat, now) for id, beat in workers.items()}
        for id, (beat, since) in self.seen.items():
            if id != self.id and (self._is_free(id) or now - since > self.settings.lease):
                self.store.remove_worker(id, beat)
                self._lock_path(id).unlink(missing_ok=True)

    def _take_up(self) -> None:
        alive = set(self.store.list_workers())
        for id in {status.executor_id for status in DBOS.list_workflows(status="PENDING", load_input=False, load_output=False)}:
            if id is not None and id not in alive and id != self.id:
                self._recover(id)

    def _recover(self, id: str) -> None:
        DBOS._recover_pending_workflows([id])

    def _lock_path(self, id: str) -> Path:
        folder = self.settings.home / "workers"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{id}.lock"

    def _is_free(self, id: str) -> bool:
        """Whether a worker of this machine is gone: nobody holds its lock."""
        path = self._lock_path(id)
        if not path.exists():
            return False
        held = _lock(path)
        if held is None:
            return False
        os.close(held)
        return True


def _lock(path: Path) -> int | None:
    """The file, locked for as long as this process has it open; None where another has."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle
