"""The service from Python.

    from rnn2bin.serve.client import Client

    service = Client("http://127.0.0.1:8765")
    job = service.convert("model.pt", data="data.npz", recipe="anneal", set={"train.steps": 2000})
    for event in service.events(job["id"]):
        print(event["event"], event["data"])
    service.download(job["id"], "OUT")

Errors of the service are raised as those of rnn2bin.errors that they are, with its reasons.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from rnn2bin import storage
from rnn2bin.errors import InterruptedRunError, Rnn2binError, UnavailableError, UsageError

ENDED = ("done", "failed", "cancelled")
CHUNK = 2**20
PATIENCE = 10.0  # seconds between attempts to reach a service that is gone, at most

Job = dict[str, Any]


class Client:
    """`key`: where the service asks for one. `patience`: seconds for which a service that cannot be reached is waited for."""

    def __init__(self, url: str, *, key: str | None = None, patience: float = 60.0, transport: httpx.BaseTransport | None = None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=httpx.Timeout(30.0), transport=transport)
        self.patience = patience

    def close(self) -> None:
        self.http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # -- uploads

    def upload(self, path: str | Path, *, name: str | None = None) -> dict[str, Any]:
        """Send a file, with its sha256, which the service checks."""
        path = Path(path)
        try:
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
        send = lambda: self.http.put("/v1/uploads", params={"name": name or path.name, "sha256": digest}, content=_chunks(path))
        return self._asked(send).json()  # type: ignore[no-any-return]

    # -- conversions

    def convert(
        self,
        model: str | Path,
        *,
        data: str | Path | Mapping[str, str | Path] | None = None,
        recipe: str = "anneal",
        recipe_text: str | None = None,
        source: str | None = None,
        set: Mapping[str, Any] | None = None,
        name: str = "",
        idempotency_key: str | None = None,
    ) -> Job:
        """Upload `model` and `data` (one file, or {train, valid, test}) and ask for a conversion. Asked twice, it is one job all the same:
        without a key of its own, each call has its own."""
        given = {role: self.upload(path)["id"] for role, path in data.items()} if isinstance(data, Mapping) else None
        sent = given if data is None or given is not None else self.upload(data)["id"]  # type: ignore[arg-type]
        body = {"model": self.upload(model)["id"], "data": sent, "recipe": recipe, "set": dict(set or {}), "name": name}
        body |= {"recipe_text": recipe_text, "source": source}
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        return self._asked(lambda: self.http.post("/v1/conversions", json=body, headers=headers)).json()  # type: ignore[no-any-return]

    def get(self, id: str) -> Job:
        return self._asked(lambda: self.http.get(f"/v1/conversions/{id}")).json()  # type: ignore[no-any-return]

    def list(self, *, state: str | None = None) -> Iterator[Job]:
        """All conversions, newest first, page by page."""
        before: str | None = None
        while True:
            asked = {name: value for name, value in {"state": state, "before": before}.items() if value is not None}
            page = self._asked(lambda asked=asked: self.http.get("/v1/conversions", params=asked)).json()  # type: ignore[misc]
            yield from page["items"]
            before = page["next"]
            if before is None:
                return

    def cancel(self, id: str) -> Job:
        return self._asked(lambda: self.http.post(f"/v1/conversions/{id}/cancel")).json()  # type: ignore[no-any-return]

    def retry(self, id: str) -> Job:
        return self._asked(lambda: self.http.post(f"/v1/conversions/{id}/retry")).json()  # type: ignore[no-any-return]

    def delete(self, id: str) -> None:
        self._asked(lambda: self.http.delete(f"/v1/conversions/{id}"))

    def wait(self, id: str) -> Job:
        """The job when it has ended."""
        for _ in self.events(id):
            pass
        return self.get(id)

    def finished(self, id: str, *, progress: Callable[[dict[str, Any]], None] | None = None) -> Job:
        """The job when it is done, its progress told on the way; the error that it failed by is raised."""
        for event in self.events(id):
            if event["event"] == "progress" and progress is not None:
                progress(event["data"])
        job = self.get(id)
        if job["state"] == "cancelled":
            raise InterruptedRunError("the conversion was cancelled; retry goes on from its last checkpoint")
        if job["state"] == "failed":
            raise error_by(job["error"]["code"])(*job["error"]["reasons"])
        return job

    def events(self, id: str, *, after: int = 0) -> Iterator[dict[str, Any]]:
        """{id, event, data} of a conversion, from the one behind `after` to its end; each once, however often the connection is lost."""
        since = time.monotonic()
        while True:
            try:
                with self.http.stream("GET", f"/v1/conversions/{id}/events", headers={"Last-Event-ID": str(after)}) as response:
                    if response.status_code == 204:
                        return
                    if response.is_error:
                        response.read()
                        raise error_of(response)
                    for event in _parsed(response.iter_lines()):
                        after, since = event["id"], time.monotonic()
                        yield event
                        if event["event"] in ENDED and self.get(id)["state"] in ENDED:
                            return
            except (httpx.TransportError, UnavailableError) as error:
                if time.monotonic() - since > self.patience:
                    raise UnavailableError("the service cannot be reached") from error
            time.sleep(0.5)

    # -- what came of it

    def check_out(self, out: Path, *, force: bool) -> None:
        """UsageError where `download` would refuse `out`."""
        if out.exists() and not (force and out.is_dir()):
            raise UsageError(f"{out}: exists already; {'choose another name' if force else 'choose another --out, or --force'}")

    def download(self, id: str, out: str | Path, *, force: bool = False) -> Path:
        """The packed directory of a finished conversion, as `out`: whole and with the sha256 that the service has, or not at all. What is
        there is replaced with `force` alone."""
        out = Path(out)
        self.check_out(out, force=force)
        with tempfile.TemporaryDirectory(dir=_folder(out), prefix=f".{out.name}-") as folder:
            archive, digest = Path(folder) / "out.tar", hashlib.sha256()
            with self.http.stream("GET", f"/v1/conversions/{id}/artifacts.tar") as response, archive.open("wb") as stream:
                if response.is_error:
                    response.read()
                    raise error_of(response)
                for chunk in response.iter_bytes(CHUNK):
                    digest.update(chunk)
                    stream.write(chunk)
            if digest.hexdigest() != response.headers["X-Content-SHA256"]:
                raise UnavailableError("the archive came with another sha256 than was said; ask again")
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
            storage.replace(Path(folder) / "out", out)
        return out

    def _asked(self, ask: Any) -> httpx.Response:
        """The answer; asked again while the service cannot be reached or has no time: everything asked here may be asked twice."""
        since, pause = time.monotonic(), 0.2
        while True:
            try:
                response: httpx.Response = ask()
                if response.status_code != 503:
                    break
            except httpx.TransportError as error:
                if time.monotonic() - since > self.patience:
                    raise UnavailableError(f"the service cannot be reached ({type(error).__name__})") from error
            else:
                if time.monotonic() - since > self.patience:
                    break
            time.sleep(pause)
            pause = min(2 * pause, PATIENCE)
        if response.is_error:
            raise error_of(response)
        return response


def _folder(out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.parent


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


def _parsed(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Events of a stream of lines; comments and `retry` are passed over."""
    now: dict[str, str] = {}
    for line in lines:
        if not line:
            if "data" in now:
                yield {"id": int(now["id"]), "event": now["event"], "data": json.loads(now["data"])}
            now = {}
            continue
        name, _, value = line.partition(":")
        if name:
            now[name] = value.removeprefix(" ")


def error_of(response: httpx.Response) -> Rnn2binError:
    """The error of rnn2bin.errors that a problem is."""
    try:
        found = response.json()
        code, reasons = found["code"], found["reasons"] or [found["detail"]]
    except (ValueError, KeyError, TypeError):
        code, reasons = "", [f"the service answered {response.status_code}"]
    return error_by(code, default=UsageError if response.status_code < 500 else UnavailableError)(*reasons)


def error_by(code: str, *, default: type[Rnn2binError] = Rnn2binError) -> type[Rnn2binError]:
    waiting = [Rnn2binError]
    while waiting:
        one = waiting.pop()
        if one.code == code:
            return one
        waiting += one.__subclasses__()
    return default
