"""Server-sent events: one task looks for news of all jobs that anybody listens to; a stream that has caught up costs no query of its own."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import suppress

from starlette.concurrency import run_in_threadpool

from rnn2bin.serve.store import ENDED, Row, Store

log = logging.getLogger("rnn2bin.serve")
KEEP_ALIVE = 15.0  # seconds of silence after which a comment says that the stream lives
BACKLOG = 1000


class Topic:
    """A job that somebody listens to."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.listeners: set[asyncio.Queue[list[Row] | None]] = set()


class Streams:
    def __init__(self, store: Store, *, poll: float) -> None:
        self.store, self.poll = store, poll
        self.topics: dict[str, Topic] = {}
        self.stopping = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.task = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        """Every stream ends at once."""
        self.stopping.set()
        for topic in self.topics.values():
            for listener in topic.listeners:
                listener.put_nowait(None)
        if self.task is not None:
            self.task.cancel()
            with suppress(asyncio.CancelledError):
                await self.task

    @property
    def open(self) -> int:
        return sum(len(topic.listeners) for topic in self.topics.values())

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self.poll)
            try:
                await self._look()
            except Exception as error:
                log.warning("events cannot be read: %s", type(error).__name__)

    async def _look(self) -> None:
        topics = dict(self.topics)
        if not topics:
            return
        newest = await run_in_threadpool(self.store.newest_events, list(topics))
        for job, topic in topics.items():
            if job not in newest:  # deleted
                self._tell(topic, None)
            elif newest[job] > topic.last:
                found = await run_in_threadpool(self.store.events_after, job, topic.last, limit=BACKLOG)
                if found:
                    topic.last = found[-1]["id"]
                    self._tell(topic, found)

    def _tell(self, topic: Topic, news: list[Row] | None) -> None:
        for listener in topic.listeners:
            listener.put_nowait(news)

    async def of(self, job: str, after: int) -> AsyncIterator[str]:
        """The job's events behind `after` as text of a stream, until the last one, the end of the service, or of the job itself."""
        news: asyncio.Queue[list[Row] | None] = asyncio.Queue()
        topic = self.topics.setdefault(job, Topic(after))
        topic.listeners.add(news)
        try:
            yield "retry: 1000\n\n"
            while backlog := await run_in_threadpool(self.store.events_after, job, after, limit=BACKLOG):
                for event in backlog:
                    yield rendered(event)
                after = backlog[-1]["id"]
                if backlog[-1]["kind"] in ENDED and len(backlog) < BACKLOG:
                    return
            while not self.stopping.is_set():
                try:
                    found = await asyncio.wait_for(news.get(), KEEP_ALIVE)
                except TimeoutError:
                    yield ": still here\n\n"
                    continue
                if found is None:
                    return
                for event in found:
                    if event["id"] > after:
                        after = event["id"]
                        yield rendered(event)
                if found[-1]["kind"] in ENDED and found[-1]["id"] == after:
                    return
        finally:
            topic.listeners.discard(news)
            if not topic.listeners and self.topics.get(job) is topic:
                del self.topics[job]


def rendered(event: Row) -> str:
    data = json.dumps({"at": event["at"], **event["data"]}, separators=(",", ":"))
    return f"id: {event['id']}\nevent: {event['kind']}\ndata: {data}\n\n"
