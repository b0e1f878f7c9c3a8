"""One process: the page, the API and, unless told otherwise, a worker."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import threading
from typing import Any

import sqlalchemy as sa
import uvicorn

from rnn2bin import signals
from rnn2bin.errors import UsageError
from rnn2bin.serve import access, api, engine
from rnn2bin.serve.settings import Settings
from rnn2bin.serve.store import Store, open_engine

log = logging.getLogger("rnn2bin.serve")
GRACE = 2  # seconds that answers under way have


def connect(settings: Settings) -> Store:
    """The store with all tables made. UsageError where the data base cannot be reached."""
    try:
        store = Store(open_engine(settings.db))
        store.create()
        engine.migrate(settings.db)
    except (sa.exc.SQLAlchemyError, OSError) as error:
        raise UsageError(f"--db: cannot be used ({type(getattr(error, 'orig', error)).__name__}); is it there, and is it yours?") from None
    return store


class Server(uvicorn.Server):
    """Ends open event streams before it waits for answers under way."""

    def __init__(self, config: uvicorn.Config, service: api.Service) -> None:
        super().__init__(config)
        self.service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self.service.streams.stop()
        await super().shutdown(sockets)


def serve(settings: Settings, *, host: str, port: int, names: tuple[str, ...] = (), work: bool = True, ready: Any = print) -> int:
    """Until SIGINT or SIGTERM; then at most five seconds. The exit code. UsageError for a bind that others reach without keys."""
    store = connect(settings)
    access.check_bind(host, store)
    bound = _listen(host, port)
    open_to_all = access.is_loopback(host) and not store.has_keys()
    hosts = frozenset({"localhost", "127.0.0.1", "::1", *names}) if access.is_loopback(host) else None
    service = api.Service(settings, store, engine.Queue(store.engine), open_to_all=open_to_all, hosts=hosts)
    config = uvicorn.Config(
        api.create(service), log_config=None, access_log=False, server_header=False, date_header=True, timeout_graceful_shutdown=GRACE
    )
    worker = _worker(settings, store) if work else None
    ready(f"rnn2bin: http://{_shown(host)}:{bound.getsockname()[1]}")
    server = Server(config, service)
    # uvicorn raises the signal again when it is done; it has been answered by then
    with signals.noted():
        asyncio.run(server.serve(sockets=[bound]))
    if worker is not None:
        worker.stop()
    _leave(0)
    return 0


def work(settings: Settings, *, ready: Any = print) -> int:
    """A worker alone, until SIGINT or SIGTERM."""
    stop = threading.Event()
    with signals.raised():
        worker = _worker(settings, connect(settings))
        ready(f"rnn2bin: worker {worker.id} with {settings.slots} at once")
        try:
            stop.wait()
        except KeyboardInterrupt:
            worker.stop()
    _leave(0)
    return 0


def _worker(settings: Settings, store: Store) -> Any:
    from rnn2bin.serve.worker import Worker

    worker = Worker(settings, store)
    worker.start()
    return worker


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol said: asyncio turns Nagle's algorithm off only then, and every answer would wait 40 ms for an acknowledgement.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host.strip("[]"), port))
    except OSError as error:
        found.close()
        raise UsageError(f"--host {host} --port {port}: cannot be listened on ({error.strerror})") from None
    found.listen(512)
    return found


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _leave(code: int) -> None:
    """The end of the process. The engine's threads wait for things that no longer matter: nobody waits for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
