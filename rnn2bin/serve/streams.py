"""Server-sent events: one task looks for news of all jobs that anybody listens to; a stream costs no query and no rendering of its own.

Events of a job are numbered 1, 2, 3, …, so a job that is listened to has its history here as a list, and a listener is a place in it.
"""

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
BATCH = 1000  # events read, or sent, at once


class Topic:
    """A job that somebody listens to."""

    def __init__(self) -> None:
        self.history: list[bytes] = []  # event n at n - 1
        self.ended = False
        self.gone = False
        self.news = asyncio.Event()
        self.listeners = 0
        self.reading = asyncio.Lock()

    def wake(self) -> None:
        self.news.set()
        self.news = asyncio.Event()


class Streams:
    def __init__(self, store: Store, *, poll: float) -> None:
        self.store, self.poll = store, poll
        self.topics: dict[str, Topic] = {}
        self.stopping = False
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.task = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        """Every stream ends at once."""
        self.stopping = True
        for topic in self.topics.values():
            topic.wake()
        if self.task is not None:
            self.task.cancel()
            with suppress(asyncio.CancelledError):
                await self.task

    @property
    def open(self) -> int:
        return sum(topic.listeners for topic in self.topics.values())

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
                topic.gone = True
                topic.wake()
            elif newest[job] > len(topic.history):
                await self._read(job, topic)

    async def _read(self, job: str, topic: Topic) -> None:
        """Bring the history up to date."""
        async with topic.reading:
            while found := await run_in_threadpool(self._rendered, job, len(topic.history)):
                texts, kind = found
                topic.history += texts
                topic.ended = kind in ENDED
                topic.wake()

    def _rendered(self, job: str, after: int) -> tuple[list[bytes], str] | None:
        found = self.store.events_after(job, after, limit=BATCH)
        return ([rendered(event) for event in found], found[-1]["kind"]) if found else None

    async def of(self, job: str, after: int) -> AsyncIterator[bytes]:
        """The job's events behind `after` as parts of a stream, until the last one, the end of the service, or of the job itself."""
        topic = self.topics.setdefault(job, Topic())
        topic.listeners += 1
        try:
            yield b"retry: 1000\n\n"
            if topic.listeners == 1 or not topic.history:
                await self._read(job, topic)
            while not (self.stopping or topic.gone):
                if after < len(topic.history):
                    some = topic.history[after : after + BATCH]
                    after += len(some)
                    yield b"".join(some)
                elif topic.ended:
                    return
                else:
                    try:
                        await asyncio.wait_for(topic.news.wait(), KEEP_ALIVE)
                    except TimeoutError:
                        yield b": still here\n\n"
        finally:
            topic.listeners -= 1
            if not topic.listeners and self.topics.get(job) is topic:
                del self.topics[job]


def rendered(event: Row) -> bytes:
    data = json.dumps({"at": event["at"], **event["data"]}, separators=(",", ":"))
    return f"id: {event['id']}\nevent: {event['kind']}\ndata: {data}\n\n".encode()
