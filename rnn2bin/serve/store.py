"""What the service knows: uploads, jobs, their events, keys, workers, in the data base that the job engine uses too.

A job's state moves one way: queued -> running -> done | failed | cancelled; `retry` begins again. Every change is one transaction with its
event, and is guarded by what it starts from, so that whoever comes second changes nothing. Events of a job are numbered 1, 2, 3, … without
gaps.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event as sa_event
from sqlalchemy.exc import IntegrityError

ENDED = ("done", "failed", "cancelled")
STATES = ("queued", "running", *ENDED)
PART = 4 * 2**20  # bytes of a file in one row

Row = dict[str, Any]
Enqueue = Callable[[sa.Connection, str, int], object]
Allow = Callable[[tuple[int, int]], object]  # of what `used` says after a change; raises where it is too much, and nothing is changed
meta = sa.MetaData()


class Json(sa.TypeDecorator[Any]):
    impl, cache_ok = sa.Text, True

    def process_bind_param(self, value: Any, dialect: Any) -> str | None:
        return None if value is None else json.dumps(value)

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return None if value is None else json.loads(value)


uploads = sa.Table(
    "r2b_uploads",
    meta,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("owner", sa.String(40), nullable=False, index=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("created", sa.Float, nullable=False),
)
jobs = sa.Table(
    "r2b_jobs",
    meta,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("owner", sa.String(40), nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("state", sa.String(16), nullable=False, index=True),
    sa.Column("stage", sa.String(16)),
    sa.Column("run", sa.Integer, nullable=False, default=1),  # 2 after the first retry
    sa.Column("starts", sa.Integer, nullable=False, default=0),  # of its child, all in all
    sa.Column("stalls", sa.Integer, nullable=False, default=0),  # of these, the last ones without a new checkpoint
    sa.Column("cancel", sa.Boolean, nullable=False, default=False),
    sa.Column("worker", sa.String(40)),
    sa.Column("created", sa.Float, nullable=False, index=True),
    sa.Column("started", sa.Float),
    sa.Column("finished", sa.Float),
    sa.Column("request", Json, nullable=False),  # what was asked, uploads with their names
    sa.Column("recipe", sa.Text, nullable=False),  # resolved, as YAML
    sa.Column("progress", Json),
    sa.Column("result", Json),
    sa.Column("error", Json),
    sa.Column("artifacts", Json),
    sa.Column("bytes", sa.BigInteger, nullable=False, default=0),
    sa.Column("last_event", sa.Integer, nullable=False, default=0),
    sa.Column("idempotency_key", sa.Text),
    sa.Column("body_sha256", sa.String(64), nullable=False),
    sa.UniqueConstraint("owner", "idempotency_key"),
)
events = sa.Table(
    "r2b_events",
    meta,
    sa.Column("job", sa.String(40), primary_key=True),
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("data", Json, nullable=False),
)
keys = sa.Table(
    "r2b_keys",
    meta,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("max_jobs", sa.Integer, nullable=False),
    sa.Column("max_bytes", sa.BigInteger, nullable=False),
    sa.Column("created", sa.Float, nullable=False),
)
workers = sa.Table(
    "r2b_workers",
    meta,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("beat", sa.BigInteger, nullable=False, default=0),
    sa.Column("slots", sa.Integer, nullable=False),
    sa.Column("started", sa.Float, nullable=False),
)
parts = sa.Table(
    "r2b_parts",
    meta,
    sa.Column("file", sa.String(80), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("bytes", sa.LargeBinary, nullable=False),
)


def new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def open_engine(db: str) -> sa.Engine:
    """An engine on which a reader never waits for a writer, and a writer at most half a minute for another."""
    url = sa.make_url(db)
    if url.get_backend_name() == "sqlite":
        engine = sa.create_engine(url, connect_args={"timeout": 30}, pool_size=20, max_overflow=30)

        @sa_event.listens_for(engine, "connect")
        def _(connection: Any, __: Any) -> None:
            connection.isolation_level = "IMMEDIATE"
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA busy_timeout=30000")

        return engine
    return sa.create_engine(url.set(drivername="postgresql+psycopg"), pool_size=10, max_overflow=20, pool_pre_ping=True)


class Store:
    """All reads and changes; safe to use from many threads and processes."""

    def __init__(self, engine: sa.Engine, *, clock: Callable[[], float] = time.time) -> None:
        self.engine, self.clock = engine, clock

    def create(self) -> None:
        """Make the tables that are missing; several processes may do so at once."""
        for last in (False, True):
            try:
                return meta.create_all(self.engine)
            except sa.exc.DBAPIError:
                if last:
                    raise
                time.sleep(0.5)

    def ping(self) -> None:
        with self.engine.connect() as db:
            db.execute(sa.select(1))

    # -- uploads

    def add_upload(self, row: Row, *, allow: Allow) -> Row:
        row = {**row, "created": self.clock()}
        with self._quota(row["owner"], allow) as db:
            db.execute(sa.insert(uploads).values(**row))
        return row

    def upload(self, owner: str, id: str) -> Row | None:
        return self._one(sa.select(uploads).where(uploads.c.owner == owner, uploads.c.id == id))

    def list_uploads(self, owner: str, *, limit: int) -> list[Row]:
        return self._all(sa.select(uploads).where(uploads.c.owner == owner).order_by(uploads.c.created.desc()).limit(limit))

    def delete_upload(self, owner: str, id: str) -> bool:
        return self._change(sa.delete(uploads).where(uploads.c.owner == owner, uploads.c.id == id))

    # -- jobs

    def add_job(self, row: Row, *, enqueue: Enqueue, allow: Allow) -> tuple[Row, bool]:
        """(the job, whether it is new): with an idempotency key that this owner used, that job. `enqueue` runs in the transaction."""
        row = {"run": 1, "state": "queued", "created": self.clock(), **row}
        try:
            with self._quota(row["owner"], allow) as db:
                db.execute(sa.insert(jobs).values(**row))
                self._event(db, row["id"], "queued", {"run": 1})
                enqueue(db, row["id"], 1)
        except IntegrityError:
            found = self.by_key(row["owner"], row["idempotency_key"])
            if found is None:
                raise
            return found, False
        return self._expect(row["owner"], row["id"]), True

    def by_key(self, owner: str, key: str | None) -> Row | None:
        return self._one(sa.select(jobs).where(jobs.c.owner == owner, jobs.c.idempotency_key == key)) if key else None

    def job(self, id: str, owner: str | None = None) -> Row | None:
        query = sa.select(jobs).where(jobs.c.id == id)
        return self._one(query if owner is None else query.where(jobs.c.owner == owner))

    def _expect(self, owner: str, id: str) -> Row:
        found = self.job(id, owner)
        assert found is not None
        return found

    def list_jobs(self, owner: str, *, state: str | None, before: float | None, limit: int) -> list[Row]:
        query = sa.select(jobs).where(jobs.c.owner == owner)
        query = query if state is None else query.where(jobs.c.state == state)
        query = query if before is None else query.where(jobs.c.created < before)
        return self._all(query.order_by(jobs.c.created.desc(), jobs.c.id).limit(limit))

    def used(self, owner: str) -> tuple[int, int]:
        """(jobs that are not ended, bytes stored) of an owner."""
        with self.engine.connect() as db:
            return self._used(db, owner)

    def _used(self, db: sa.Connection, owner: str) -> tuple[int, int]:
        active = sa.select(sa.func.count()).select_from(jobs).where(jobs.c.owner == owner, jobs.c.state.not_in(ENDED))
        made = sa.select(sa.func.coalesce(sa.func.sum(jobs.c.bytes), 0)).where(jobs.c.owner == owner)
        sent = sa.select(sa.func.coalesce(sa.func.sum(uploads.c.bytes), 0)).where(uploads.c.owner == owner)
        return int(db.scalar(active) or 0), int(db.scalar(made) or 0) + int(db.scalar(sent) or 0)

    @contextmanager
    def _quota(self, owner: str, allow: Allow) -> Iterator[sa.Connection]:
        """A transaction for changes that `allow` judges at its end. Those of an owner wait for each other, or two that fit alone might not
        fit together: here for the row of the key; an SQLite file has one writer anyhow."""
        with self.engine.begin() as db:
            db.execute(sa.select(keys.c.id).where(keys.c.id == owner).with_for_update())
            yield db
            allow(self._used(db, owner))

    def uses_upload(self, owner: str, id: str) -> bool:
        """Whether a job that is not ended needs this upload."""
        rows = self._all(sa.select(jobs.c.request).where(jobs.c.owner == owner, jobs.c.state.not_in(ENDED)))
        return any(id in (one["id"] for one in inputs_of(row["request"])) for row in rows)

    def counts(self) -> dict[str, int]:
        with self.engine.connect() as db:
            found = _pairs(db.execute(sa.select(jobs.c.state, sa.func.count()).group_by(jobs.c.state)))
        return {state: found.get(state, 0) for state in STATES}

    def cancel(self, owner: str, id: str) -> bool:
        """A queued job is cancelled; a running one is asked to stop. False where it is ended already."""
        with self.engine.begin() as db:
            mine = (jobs.c.id == id, jobs.c.owner == owner)
            now = {"state": "cancelled", "finished": self.clock(), "cancel": True}
            if db.execute(sa.update(jobs).where(*mine, jobs.c.state == "queued").values(**now)).rowcount:
                self._event(db, id, "cancelled", {})
                return True
            asked = sa.update(jobs).where(*mine, jobs.c.state == "running", jobs.c.cancel.is_(False)).values(cancel=True)
            if db.execute(asked).rowcount:
                self._event(db, id, "cancelling", {})
                return True
            return db.execute(sa.select(jobs.c.id).where(*mine, jobs.c.state == "running")).first() is not None

    def retry(self, owner: str, id: str, *, enqueue: Enqueue, allow: Allow) -> bool:
        """A job that failed or was cancelled is queued again; False where it is neither."""
        again = {
            "state": "queued",
            "run": jobs.c.run + 1,
            "cancel": False,
            "error": None,
            "finished": None,
            "started": None,
            "worker": None,
        }
        with self._quota(owner, allow) as db:
            where = (jobs.c.id == id, jobs.c.owner == owner, jobs.c.state.in_(("failed", "cancelled")))
            run = db.execute(sa.update(jobs).where(*where).values(**again, stage=None, stalls=0).returning(jobs.c.run)).scalar()
            if run is None:
                return False
            self._event(db, id, "queued", {"run": run})
            enqueue(db, id, run)
        return True

    def delete_job(self, owner: str, id: str) -> bool:
        """Forget an ended job and its events; False where it is not ended, or not there."""
        with self.engine.begin() as db:
            gone = db.execute(sa.delete(jobs).where(jobs.c.id == id, jobs.c.owner == owner, jobs.c.state.in_(ENDED))).rowcount > 0
            if gone:
                db.execute(sa.delete(events).where(events.c.job == id))
            return gone

    # -- a job, by its worker

    def begin(self, id: str, run: int, worker: str) -> Row | None:
        """The job, now this worker's, its child about to start; None where this run of it is ended."""
        with self.engine.begin() as db:
            where = (jobs.c.id == id, jobs.c.run == run, jobs.c.state.not_in(ENDED))
            now = {"state": "running", "worker": worker, "starts": jobs.c.starts + 1, "stalls": jobs.c.stalls + 1}
            started = sa.func.coalesce(jobs.c.started, self.clock())
            found = db.execute(sa.update(jobs).where(*where).values(**now, started=started).returning(*jobs.c)).mappings().first()
            if found is None:
                return None
            self._event(db, id, "started", {"run": run, "start": found["starts"], "worker": worker})
        return dict(found)

    def note(self, id: str, worker: str, kind: str, data: Row, **values: Any) -> bool:
        """An event of a running job, and columns of it; False where it is another worker's, or ended."""
        with self.engine.begin() as db:
            return self._event(db, id, kind, data, jobs.c.worker == worker, jobs.c.state == "running", **values) is not None

    def watch(self, id: str, worker: str) -> tuple[bool, bool]:
        """(still this worker's, asked to stop)."""
        with self.engine.connect() as db:
            row = db.execute(sa.select(jobs.c.worker, jobs.c.state, jobs.c.cancel).where(jobs.c.id == id)).first()
        return (row is not None and row.worker == worker and row.state == "running", row is not None and row.cancel)

    def finish(self, id: str, run: int, state: str, data: Row, **values: Any) -> bool:
        """The end of a run, once: False, and nothing changed, where it is ended already."""
        with self.engine.begin() as db:
            now = {**values, "state": state, "finished": self.clock(), "worker": None}
            return self._event(db, id, state, data, jobs.c.run == run, jobs.c.state == "running", **now) is not None

    # -- events

    def _event(self, db: sa.Connection, job: str, kind: str, data: Row, *where: Any, **values: Any) -> int | None:
        change = sa.update(jobs).where(jobs.c.id == job, *where).values(last_event=jobs.c.last_event + 1, **values)
        number = db.execute(change.returning(jobs.c.last_event)).scalar()
        if number is not None:
            db.execute(sa.insert(events).values(job=job, id=number, at=self.clock(), kind=kind, data=data))
        return number

    def events_after(self, job: str, after: int, *, limit: int = 1000) -> list[Row]:
        return self._all(sa.select(events).where(events.c.job == job, events.c.id > after).order_by(events.c.id).limit(limit))

    def newest_events(self, ids: Iterable[str]) -> dict[str, int]:
        """Job -> number of its last event; a job that is gone is not in it."""
        with self.engine.connect() as db:
            return _pairs(db.execute(sa.select(jobs.c.id, jobs.c.last_event).where(jobs.c.id.in_(list(ids)))))

    # -- keys

    def add_key(self, row: Row) -> None:
        """Raises IntegrityError where there is a key of that name."""
        self._change(sa.insert(keys).values(**row, created=self.clock()))

    def key(self, id: str) -> Row | None:
        return self._one(sa.select(keys).where(keys.c.id == id))

    def list_keys(self) -> list[Row]:
        return self._all(sa.select(keys).order_by(keys.c.created))

    def has_keys(self) -> bool:
        with self.engine.connect() as db:
            return db.execute(sa.select(keys.c.id).limit(1)).first() is not None

    def remove_key(self, name: str) -> bool:
        return self._change(sa.delete(keys).where(keys.c.name == name))

    # -- workers

    def add_worker(self, id: str, *, slots: int) -> None:
        self._change(sa.insert(workers).values(id=id, slots=slots, started=self.clock(), beat=0))

    def beat(self, id: str) -> bool:
        """A sign of life; False where the others have given this worker up."""
        return self._change(sa.update(workers).where(workers.c.id == id).values(beat=workers.c.beat + 1))

    def list_workers(self) -> dict[str, int]:
        """Worker -> its last beat."""
        with self.engine.connect() as db:
            return _pairs(db.execute(sa.select(workers.c.id, workers.c.beat)))

    def remove_worker(self, id: str, beat: int | None = None) -> bool:
        """Forget a worker; with `beat` only where it has given no sign since."""
        where = [workers.c.id == id, *([workers.c.beat == beat] if beat is not None else [])]
        return self._change(sa.delete(workers).where(*where))

    # -- files, for workers on other machines

    def put_file(self, name: str, path: Path) -> None:
        """A file's bytes, under a name; whole or not there."""
        with self.engine.begin() as db, path.open("rb") as stream:
            db.execute(sa.delete(parts).where(parts.c.file == name))
            for number, content in enumerate(_chunks(stream)):
                db.execute(sa.insert(parts).values(file=name, number=number, bytes=content))

    def get_file(self, name: str, path: Path) -> bool:
        """Write what was put to `path`; False where there is nothing."""
        found = False
        temporary = path.with_name(path.name + ".part-" + uuid.uuid4().hex[:8])
        with temporary.open("wb") as out:
            number = 0
            while (content := self._part(name, number)) is not None:
                out.write(content)
                found, number = True, number + 1
        temporary.replace(path) if found else temporary.unlink()
        return found

    def _part(self, name: str, number: int) -> bytes | None:
        with self.engine.connect() as db:
            return db.execute(sa.select(parts.c.bytes).where(parts.c.file == name, parts.c.number == number)).scalar()

    def drop_file(self, name: str) -> None:
        self._change(sa.delete(parts).where(parts.c.file == name))

    # -- one statement

    def _change(self, statement: Any) -> bool:
        """Whether it changed anything."""
        with self.engine.begin() as db:
            return db.execute(statement).rowcount > 0

    def _one(self, query: Any) -> Row | None:
        with self.engine.connect() as db:
            found = db.execute(query).mappings().first()
        return None if found is None else dict(found)

    def _all(self, query: Any) -> list[Row]:
        with self.engine.connect() as db:
            return [dict(row) for row in db.execute(query).mappings()]


def _pairs(rows: Iterable[Any]) -> dict[str, int]:
    return {row[0]: row[1] for row in rows}


def _chunks(stream: Any) -> Iterator[bytes]:
    """The bytes in parts; an empty file is one empty part."""
    first = stream.read(PART)
    yield first
    while more := stream.read(PART):
        yield more


def inputs_of(request: Row) -> list[Row]:
    """The uploads a job reads: its model, then its data."""
    return [request["model"], *request["data"].values()]


@contextmanager
def opened(db: str) -> Iterator[Store]:
    """A store with its tables, for a command; the engine is let go afterwards."""
    engine = open_engine(db)
    try:
        store = Store(engine)
        store.create()
        yield store
    finally:
        engine.dispose()
