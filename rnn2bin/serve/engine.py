"""DBOS, the job engine, from the side that only asks: its tables, and putting a run of a job into its queue (decision 019)."""

from __future__ import annotations

import logging
from typing import Any

import sqlalchemy as sa
from dbos import DBOSClient, DBOSPortableJSONSerializer, EnqueueOptions
from dbos._dbos import DBOS

from rnn2bin.serve.settings import QUEUE, VERSION, WORKFLOW

APPLICATION = "rnn2bin"
SERIALIZER = DBOSPortableJSONSerializer()  # JSON, and no pickles


def quiet() -> None:
    """DBOS speaks of its launches and queues; what goes wrong with a job stands in the job."""
    logging.getLogger("dbos").setLevel(logging.ERROR)


def migrate(db: str) -> None:
    """Make the engine's tables, or bring them up to date; several processes may do so at once."""
    quiet()
    DBOS.migrate(db)


class Queue:
    """Where runs of jobs are put. `put` takes part in the caller's transaction: job and run are there both, or neither."""

    def __init__(self, engine: sa.Engine) -> None:
        quiet()
        self.client = DBOSClient(system_database_engine=engine, serializer=SERIALIZER, application_name=APPLICATION, lazy=True)

    def put(self, db: sa.Connection, job: str, run: int) -> None:
        options: EnqueueOptions = {
            "workflow_name": WORKFLOW,
            "queue_name": QUEUE,
            "workflow_id": workflow_id(job, run),
            "app_version": VERSION,
        }
        self.client.enqueue_in_transaction(db, options, job, run)

    def forget(self, job: str, runs: int) -> None:
        """What the engine keeps of a job's runs."""
        self.client.delete_workflows([workflow_id(job, run) for run in range(1, runs + 1)])

    def close(self) -> None:
        self.client.destroy()


def workflow_id(job: str, run: int) -> str:
    return f"{job}-{run}"


def config(db: str, *, worker: str) -> dict[str, Any]:
    return {
        "name": APPLICATION,
        "system_database_url": db,
        "application_version": VERSION,
        "executor_id": worker,
        "log_level": "ERROR",
        "serializer": SERIALIZER,
        "use_listen_notify": False,
        "sys_db_pool_size": 10,
    }
