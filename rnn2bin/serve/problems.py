"""Errors as answers: problem+json (RFC 9457) with the codes and statuses of rnn2bin.errors. Nothing of paths, variables or code in them."""

from __future__ import annotations

import errno
import logging
from typing import Any

import sqlalchemy as sa
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from rnn2bin.errors import ResourceError, Rnn2binError, UnavailableError, UsageError

log = logging.getLogger("rnn2bin.serve")
MEDIA = "application/problem+json"
FULL = (errno.ENOSPC, errno.EDQUOT)
GONE = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError)  # of a data base that does not answer, or not in time


class Problem(BaseModel):
    """What went wrong. `code` is stable; `reasons` holds every reason found, a line each."""

    type: str = Field(examples=["urn:rnn2bin:error:quota"])
    title: str
    status: int
    code: str
    detail: str
    reasons: list[str]


def titles() -> dict[str, str]:
    """Code -> what it means, of every error there is."""
    found: dict[str, str] = {}
    waiting = [Rnn2binError]
    while waiting:
        one = waiting.pop()
        found[one.code] = (one.__doc__ or "").strip().splitlines()[0].rstrip(".")
        waiting += one.__subclasses__()
    return {**found, "bug": "An error of rnn2bin's own", "method": "No such method here", "request": "Not a request that is understood"}


TITLES = titles()


def problem(code: str, status: int, reasons: list[str]) -> dict[str, Any]:
    title = TITLES.get(code, code)
    reasons = [reason.encode("utf-8", "replace").decode() for reason in reasons]  # JSON may hold what UTF-8 cannot
    detail = "; ".join(reasons) or title
    return {"type": f"urn:rnn2bin:error:{code}", "title": title, "status": status, "code": code, "detail": detail, "reasons": reasons}


def answer(code: str, status: int, reasons: list[str], *, headers: Any = None) -> JSONResponse:
    return JSONResponse(problem(code, status, reasons), status, media_type=MEDIA, headers=headers)


def of(error: Rnn2binError) -> JSONResponse:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "60"}, 503: {"Retry-After": "5"}}.get(error.http_status)
    return answer(error.code, error.http_status, list(error.reasons), headers=headers)


def unexpected(error: Exception, *, method: str, path: str) -> JSONResponse:
    """What nobody answers for: a full disk, a data base that is gone, or a bug. Its text goes to the log alone."""
    log.error("%s %s failed", method, path, exc_info=error)
    if (isinstance(error, OSError) and error.errno in FULL) or (isinstance(error, GONE) and "is full" in str(error)):
        return of(ResourceError("the service's disk is full"))
    if isinstance(error, GONE):
        return of(UnavailableError("the data base does not answer; ask again"))
    return answer("bug", 500, ["the service failed by an error of its own; its operator finds it in the log"])


def install(app: FastAPI) -> None:
    @app.exception_handler(Rnn2binError)
    async def _(request: Request, error: Rnn2binError) -> JSONResponse:
        return of(error)

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> JSONResponse:
        lines = [f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}" for one in error.errors()[:20]]
        return answer(UsageError.code, UsageError.http_status, lines)

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not-found", 405: "method", 413: "too-large"}.get(error.status_code, "request")
        return answer(code, error.status_code, [str(error.detail)], headers=error.headers)


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For OpenAPI: the problems that a route answers with."""
    schema = {"schema": {"$ref": "#/components/schemas/Problem"}}
    return {status: {"description": "Problem", "content": {MEDIA: schema}} for status in statuses}
