"""The HTTP API and the page. Routes look up, check and hand over; files are looked into by a job's child process alone."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Any

from fastapi import Depends, FastAPI, Header, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rnn2bin import __version__, recipe_yaml
from rnn2bin.errors import AuthenticationError, ConflictError, NotFoundError, Rnn2binError, TooLargeError, UnavailableError, UsageError
from rnn2bin.serve import access, forms, problems, recipes
from rnn2bin.serve.access import Caller
from rnn2bin.serve.engine import Queue
from rnn2bin.serve.folders import ARCHIVE, NAMES, Folders, safe_name
from rnn2bin.serve.metrics import MEDIA, Metrics
from rnn2bin.serve.settings import Settings
from rnn2bin.serve.store import ENDED, Row, Store, new_id
from rnn2bin.serve.streams import Streams

PAGE = Path(__file__).parent / "page"
BODY = 4 * 2**20  # bytes of a JSON body
CHUNK = 2**20  # of an upload, written at once
LARGE = 2**31 - 1
PAGE_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
TYPES = {".html": "text/html", ".json": "application/json"}
NOBODY_READS = 499
Answers = dict[int | str, dict[str, Any]]


class Service:
    """What the routes share."""

    def __init__(self, settings: Settings, store: Store, queue: Queue, *, open_to_all: bool, hosts: frozenset[str] | None) -> None:
        self.settings, self.store, self.queue = settings, store, queue
        self.folders = Folders(settings.home, store, settings.remote)
        self.streams = Streams(store, poll=settings.poll)
        self.metrics = Metrics(store, lambda: self.streams.open)
        self.open_to_all, self.hosts = open_to_all, hosts
        self.coming: Counter[str] = Counter()  # owner -> bytes of uploads that are not whole yet

    def job_of(self, caller: Caller, id: str) -> Row:
        job = self.store.job(id, caller.owner) if forms.ID.fullmatch(id) else None
        if job is None:
            raise NotFoundError("there is no such conversion")
        return job

    def upload_of(self, caller: Caller, id: str, *, role: str = "upload") -> Row:
        found = self.store.upload(caller.owner, id) if forms.ID.fullmatch(id) else None
        if found is None:
            raise NotFoundError(f"{role}: there is no such upload") if role == "upload" else UsageError(f"{role}: there is no such upload")
        return found


async def service_of(request: Request) -> Service:  # async: not worth a thread
    return request.app.state.service  # type: ignore[no-any-return]


async def caller_of(request: Request) -> Caller:
    """Who asks; a thread only where a key is to be looked up."""
    service: Service = request.app.state.service
    token = access.token_of(request.headers, request.cookies)
    if token is not None:
        return await run_in_threadpool(access.caller_of, token, service.store)
    if service.open_to_all:
        return access.ANYBODY
    raise AuthenticationError("a key is needed: Authorization: Bearer r2b_…")


Here = Annotated[Service, Depends(service_of)]
By = Annotated[Caller, Depends(caller_of)]


def create(service: Service) -> FastAPI:
    """The application, for uvicorn or a test."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service.streams.start()
        yield
        await service.streams.stop()

    app = FastAPI(
        title="rnn2bin", version=__version__, docs_url=None, redoc_url=None, lifespan=life, description="Pretrained RNNs to binary gates."
    )
    app.state.service = service
    problems.install(app)
    _uploads(app)
    _conversions(app)
    _artifacts(app)
    _recipes(app)
    _around(app)
    app.add_middleware(Guard, service=service)
    return app


# -- uploads


def _uploads(app: FastAPI) -> None:
    body = {"requestBody": {"required": True, "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}}

    @app.put("/v1/uploads", status_code=201, response_model=forms.Upload, openapi_extra=body,
             responses=problems.responses(400, 401, 403, 413, 422, 429, 507))  # fmt: skip
    async def put_upload(
        request: Request,
        here: Here,
        by: By,
        name: Annotated[str, Query(min_length=1, max_length=200, description="the file's name; its end says what it is")],
        sha256: Annotated[str | None, Query(pattern="^[0-9a-fA-F]{64}$", description="refused (422) where the bytes have another")] = None,
    ) -> Any:
        """Send a file: the body is its bytes. It is written as it comes, and not looked into."""
        return forms.upload(await _receive(request, here, by, name, sha256))

    @app.get("/v1/uploads", response_model=forms.Uploads, responses=problems.responses(401, 403, 422))
    def list_uploads(here: Here, by: By, limit: Annotated[int, Query(ge=1, le=500)] = 100) -> Any:
        """Uploads, newest first."""
        return {"items": [forms.upload(row) for row in here.store.list_uploads(by.owner, limit=limit)]}

    @app.delete("/v1/uploads/{id}", status_code=204, responses=problems.responses(401, 403, 404, 409, 422))
    def delete_upload(id: str, here: Here, by: By) -> None:
        """Forget an upload; 409 while a conversion needs it."""
        here.upload_of(by, id)
        if here.store.uses_upload(by.owner, id):
            raise ConflictError("a conversion that is waiting or running needs this upload")
        here.store.delete_upload(by.owner, id)
        here.folders.drop_upload(id)


async def _receive(request: Request, here: Service, by: Caller, name: str, wanted: str | None) -> Row:
    safe, most = safe_name(name), here.settings.upload_bytes
    if not safe:
        raise UsageError("name: has nothing that a file may be called")
    jobs, stored = await run_in_threadpool(here.store.used, by.owner)
    coming, size = here.coming, 0
    told = request.headers.get("content-length", "")

    def check(more: int) -> None:
        """All that comes under this key at this moment counts."""
        if size + more > most:
            raise TooLargeError(f"more than the {most} bytes that are taken")
        access.check_quota(by, (jobs, stored + coming[by.owner] + more))

    check(int(told) if told.isascii() and told.isdigit() else 0)
    id = new_id("upl")
    path = here.folders.upload(id)
    path.parent.mkdir(parents=True, exist_ok=True)
    part, digest = path.with_suffix(".part"), hashlib.sha256()
    try:
        with part.open("wb") as out:
            async for chunk in _large_chunks(request):
                check(len(chunk))
                size += len(chunk)
                coming[by.owner] += len(chunk)
                digest.update(chunk)
                await run_in_threadpool(out.write, chunk)
            await run_in_threadpool(_settle, out)
        if size == 0:
            raise UsageError("the upload is empty")
        if wanted is not None and wanted.lower() != digest.hexdigest():
            raise UsageError("the bytes that came have another sha256 than was said; send them again")
        part.replace(path)
        row = {"id": id, "owner": by.owner, "name": safe, "bytes": size, "sha256": digest.hexdigest()}
        await run_in_threadpool(here.folders.keep_upload, id)
        here.metrics.uploaded.inc(size)
        return await run_in_threadpool(here.store.add_upload, row, allow=partial(access.check_quota, by))
    except BaseException:
        here.folders.drop_upload(id)
        raise
    finally:
        part.unlink(missing_ok=True)
        coming[by.owner] -= size
        if not coming[by.owner]:
            del coming[by.owner]


def _settle(out: IO[bytes]) -> None:
    out.flush()
    os.fsync(out.fileno())


async def _large_chunks(request: Request) -> AsyncIterator[bytes]:
    waiting = bytearray()
    async for chunk in request.stream():
        waiting += chunk
        if len(waiting) >= CHUNK:
            yield bytes(waiting)
            waiting.clear()
    if waiting:
        yield bytes(waiting)


# -- conversions


def _conversions(app: FastAPI) -> None:
    one = problems.responses(401, 403, 404, 422)

    @app.post("/v1/conversions", status_code=202, response_model=forms.Conversion, responses=problems.responses(401, 403, 422, 429))
    def convert(
        asked: forms.ConversionRequest,
        response: Response,
        here: Here,
        by: By,
        idempotency_key: Annotated[str | None, Header(pattern="^[\x21-\x7e]+$", max_length=200)] = None,
    ) -> Any:
        """Ask for a conversion. With an `Idempotency-Key` seen before: that same job, or 422 where the request was another."""
        digest = hashlib.sha256(json.dumps(asked.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
        job = here.store.by_key(by.owner, idempotency_key) or _add(asked, digest, idempotency_key, here, by)
        if job["body_sha256"] != digest:
            raise UsageError("Idempotency-Key: was used for another request; take a new one")
        response.headers["Location"] = f"/v1/conversions/{job['id']}"
        return forms.conversion(job)

    @app.get("/v1/conversions", response_model=forms.Conversions, responses=problems.responses(401, 403, 422))
    def list_conversions(
        here: Here,
        by: By,
        state: forms.State | None = None,
        before: Annotated[float | None, Query(ge=0, le=LARGE, allow_inf_nan=False, description="`next` of the page before")] = None,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
    ) -> Any:
        """Conversions, newest first."""
        found = here.store.list_jobs(by.owner, state=state, before=before, limit=limit)
        return {"items": [forms.conversion(job) for job in found], "next": repr(found[-1]["created"]) if len(found) == limit else None}

    @app.get("/v1/conversions/{id}", response_model=forms.Conversion, responses=one)
    def get_conversion(id: str, here: Here, by: By) -> Any:
        """A conversion as it is now."""
        return forms.conversion(here.job_of(by, id))

    stream: Answers = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}, 204: {"description": "Nothing will follow"}}

    @app.get("/v1/conversions/{id}/events", response_class=StreamingResponse, responses={**one, **stream})
    def events(
        id: str,
        here: Here,
        by: By,
        last_event_id: Annotated[int | None, Header(ge=0, le=LARGE)] = None,
        after: Annotated[int, Query(ge=0, le=LARGE, description="as Last-Event-ID, which comes first")] = 0,
    ) -> Response:
        """Server-sent events: everything since the event named, then what happens, until the end."""
        job, last = here.job_of(by, id), after if last_event_id is None else last_event_id
        if job["state"] in ENDED and last >= job["last_event"]:
            return Response(status_code=204)  # a browser's EventSource stops asking
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(here.streams.of(id, last), media_type="text/event-stream", headers=headers)

    @app.post("/v1/conversions/{id}/cancel", status_code=202, response_model=forms.Conversion,
              responses={**one, **problems.responses(409)})  # fmt: skip
    def cancel(id: str, here: Here, by: By) -> Any:
        """Stop it: at once where it waits, with a last checkpoint where it runs."""
        here.job_of(by, id)
        if not here.store.cancel(by.owner, id):
            raise ConflictError("the conversion has ended already")
        return forms.conversion(here.job_of(by, id))

    @app.post("/v1/conversions/{id}/retry", status_code=202, response_model=forms.Conversion,
              responses={**one, **problems.responses(409, 429)})  # fmt: skip
    def retry(id: str, here: Here, by: By) -> Any:
        """Begin again what failed or was cancelled, from its last checkpoint where there is one."""
        here.job_of(by, id)
        if not here.store.retry(by.owner, id, enqueue=here.queue.put, allow=partial(access.check_quota, by)):
            raise ConflictError("only what failed or was cancelled is begun again")
        return forms.conversion(here.job_of(by, id))

    @app.delete("/v1/conversions/{id}", status_code=204, responses={**one, **problems.responses(409)})
    def delete(id: str, here: Here, by: By) -> None:
        """Forget an ended conversion with all it made."""
        job = here.job_of(by, id)
        if not here.store.delete_job(by.owner, id):
            raise ConflictError("the conversion has not ended; cancel it first")
        here.queue.forget(id, job["run"])
        here.folders.drop_job(id)


def _add(asked: forms.ConversionRequest, digest: str, key: str | None, here: Service, by: Caller) -> Row:
    recipe = recipes.resolve(asked.recipe, text=asked.recipe_text, source=asked.source, overrides=asked.set)
    named = {"all": asked.data} if isinstance(asked.data, str) else dict(asked.data or {})
    parts = set(named) - set(NAMES)
    if parts and ("all" in parts) is ("train" in parts):
        raise UsageError("data: give `all`, or `train` with `valid` and `test` where they are apart")
    given = {role: here.upload_of(by, id, role=f"data.{role}") for role, id in named.items()}
    model = here.upload_of(by, asked.model, role="model")
    how = {"name": asked.recipe if asked.recipe_text is None else None, "source": asked.source, "set": asked.set}
    row = {
        "id": new_id("job"),
        "owner": by.owner,
        "name": asked.name.strip() or model["name"],
        "request": {"model": _input(model), "data": {role: _input(one) for role, one in given.items()}, "recipe": how},
        "recipe": recipe_yaml.dump(recipe),
        "idempotency_key": key,
        "body_sha256": digest,
    }
    return here.store.add_job(row, enqueue=here.queue.put, allow=partial(access.check_quota, by))[0]


def _input(upload: Row) -> Row:
    return {name: upload[name] for name in ("id", "name", "bytes", "sha256")}


# -- artifacts


def _artifacts(app: FastAPI) -> None:
    binary: Answers = {200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}}
    ranged: Answers = {
        206: {"description": "The range asked for"},
        304: {"description": "Unchanged"},
        416: {"description": "No such range"},
    }
    answers: Answers = {**binary, **ranged, **problems.responses(400, 401, 403, 404, 409, 422)}

    @app.get("/v1/conversions/{id}/artifacts", response_model=list[forms.Artifact], responses=problems.responses(401, 403, 404, 422))
    def list_artifacts(id: str, here: Here, by: By) -> Any:
        """What a conversion has made: nothing before it is done."""
        return forms.artifacts(here.job_of(by, id))

    @app.head("/v1/conversions/{id}/artifacts.tar", include_in_schema=False)
    @app.get("/v1/conversions/{id}/artifacts.tar", response_class=FileResponse, responses=answers)
    def archive(id: str, request: Request, here: Here, by: By) -> Response:
        """All of it: the packed directory as `out/` in a tar."""
        return _file(here, here.job_of(by, id), ARCHIVE, request)

    @app.head("/v1/conversions/{id}/artifacts/{name:path}", include_in_schema=False)
    @app.get("/v1/conversions/{id}/artifacts/{name:path}", response_class=FileResponse, responses=answers)
    def artifact(id: str, name: str, request: Request, here: Here, by: By) -> Response:
        """One file. `ETag` is its sha256, ranges are served."""
        return _file(here, here.job_of(by, id), name, request)


def _file(here: Service, job: Row, name: str, request: Request) -> Response:
    entry = (job["artifacts"] or {}).get(name)
    if entry is None:
        if job["state"] != "done":
            raise ConflictError("the conversion is not done: there are no files yet")
        raise NotFoundError("the conversion has made no such file")
    path = here.folders.artifact(job["id"], name)
    if path is None:
        raise NotFoundError("the file is gone")
    tag, html = f'"{entry["sha256"]}"', name.endswith(".html")
    headers = {"ETag": tag, "X-Content-SHA256": entry["sha256"], "Cache-Control": "private, no-cache"}
    if html:
        headers["Content-Security-Policy"] = access.REPORT_POLICY
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    filename = f"{Path(job['request']['model']['name']).stem}.rnn2bin.tar" if name == ARCHIVE else name.rpartition("/")[2]
    kind = TYPES.get(path.suffix, "application/x-tar" if name == ARCHIVE else "application/octet-stream")
    shown = "inline" if html and "download" not in request.query_params else "attachment"
    return FileResponse(path, media_type=kind, headers=headers, filename=filename, content_disposition_type=shown)


# -- recipes


def _recipes(app: FastAPI) -> None:
    listed = forms.Recipes.model_validate({"items": recipes.bundled(), "knobs": recipes.knobs()}).model_dump_json()  # never changes

    @app.get("/v1/recipes", response_model=forms.Recipes)
    async def list_recipes() -> Any:
        """The bundled recipes, and every knob there is, with its meaning and bounds."""
        return Response(listed, media_type="application/json")

    @app.get("/v1/recipes/{name}", response_model=forms.BundledRecipe, responses=problems.responses(404, 422))
    def get_recipe(name: str) -> Any:
        """A bundled recipe: its text with comments, and the value of every knob."""
        if name not in [one["name"] for one in recipes.bundled()]:
            raise NotFoundError("there is no such bundled recipe")
        return recipes.shown(name)

    @app.post("/v1/recipes/validate", response_model=forms.Validity, responses=problems.responses(403, 422))
    def validate(asked: forms.RecipeRequest) -> Any:
        """Whether a recipe with these knobs would be taken; every reason why not."""
        return recipes.reasons(asked.recipe, text=asked.recipe_text, source=asked.source, overrides=asked.set)


# -- around


def _around(app: FastAPI) -> None:
    @app.get("/v1/session", response_model=forms.Session, responses=problems.responses(403))
    async def session(request: Request, here: Here) -> Any:
        """Whether a key is needed, whose this one is, and what it has used."""
        try:
            by = await caller_of(request)
        except Rnn2binError:
            return {"needs_key": True, "owner": None}
        jobs, size = await run_in_threadpool(here.store.used, by.owner)
        quota = {"max_jobs": by.max_jobs, "max_bytes": by.max_bytes, "jobs": jobs, "bytes": size}
        return {"needs_key": not here.open_to_all, "owner": by.owner, **quota}

    @app.post("/v1/session", status_code=204, responses=problems.responses(401, 403, 422))
    def login(asked: forms.Login, request: Request, here: Here) -> Response:
        """For the page: keep the key in a cookie that no script reads and no other site sends."""
        access.caller_of(asked.key, here.store)
        response = Response(status_code=204)
        secure = request.url.scheme == "https"
        response.set_cookie(access.COOKIE, asked.key, httponly=True, samesite="strict", secure=secure, path="/")
        return response

    @app.delete("/v1/session", status_code=204, responses=problems.responses(403))
    def logout() -> Response:
        """Forget the cookie."""
        response = Response(status_code=204)
        response.delete_cookie(access.COOKIE, path="/")
        return response

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", response_model=forms.Health, responses=problems.responses(503))
    def health(here: Here) -> Any:
        """Whether the data base answers, and how many workers live."""
        try:
            workers = len(here.store.list_workers())
        except Exception as error:
            raise UnavailableError("the data base does not answer") from error
        return {"status": "ok", "version": __version__, "workers": workers}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
                                                            **problems.responses(401, 403)})  # fmt: skip
    def metrics(here: Here, by: By) -> Response:
        """Prometheus."""
        return Response(here.metrics.text(), media_type=MEDIA)

    files = {path.name: (path.read_bytes(), PAGE_TYPES[path.suffix]) for path in PAGE.iterdir() if path.suffix in PAGE_TYPES}

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return _page(*files["index.html"], request)

    @app.get("/page/{name}", include_in_schema=False)
    async def page(name: str, request: Request) -> Response:
        if name not in files:
            raise NotFoundError("the page has no such file")
        return _page(*files[name], request)


def _page(content: bytes, media: str, request: Request) -> Response:
    """From memory: it is small, and asked for again and again; an unchanged file is not sent again."""
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": "no-cache"}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=media, headers=headers)


class Guard:
    """Around every request: who it names and comes from, how large it may be; headers, and the time it took."""

    def __init__(self, app: ASGIApp, *, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, told = time.perf_counter(), False

        async def answer(message: Message) -> None:
            nonlocal told
            if message["type"] == "http.response.start" and not told:
                told = True
                have = {name.lower() for name, _ in message["headers"]}
                extra = [(n.lower().encode(), v.encode()) for n, v in access.HEADERS.items() if n.lower().encode() not in have]
                message = {**message, "headers": [*message["headers"], *extra]}
                route = getattr(scope.get("route"), "path", "other")
                self.service.metrics.answered(scope["method"], route, message["status"], time.perf_counter() - began)
            await send(message)

        request = Request(scope)
        try:
            access.check_site(scope["method"], request.headers, hosts=self.service.hosts)
            await self.app(scope, self._bounded(scope, receive), answer)
        except Rnn2binError as error:
            await problems.of(error)(scope, receive, answer)
        except ClientDisconnect:
            if not told:
                await JSONResponse({}, NOBODY_READS)(scope, receive, answer)
        except Exception as error:  # here, so that it has the headers and is counted, as every other answer is
            if told:
                raise
            await problems.unexpected(error, method=scope["method"], path=scope["path"])(scope, receive, answer)

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """Bodies that are read whole are small; an upload is counted as it is written."""
        if scope["method"] == "PUT":
            return receive
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > BODY:
                # as FastAPI's own kind: any other, raised while it reads a body, it takes for a body that cannot be parsed
                raise HTTPException(TooLargeError.http_status, f"more than the {BODY} bytes that a request may have")
            return message

        return limited
