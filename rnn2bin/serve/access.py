"""Who may ask: keys, quotas, names and sites a request may come by, and the headers of every answer.

Without keys the service is its machine's own: it listens on loopback, everything belongs to `local`, and only a request that names this
machine and comes from no other site is answered, so that no page elsewhere reaches it through a browser. With keys each key sees its own.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy.exc import IntegrityError

from rnn2bin.errors import AuthenticationError, ForbiddenError, QuotaError, UsageError
from rnn2bin.serve.store import Row, Store, new_id

LOCAL, COOKIE = "local", "rnn2bin_key"
TOKEN = re.compile(r"r2b_([0-9a-f]{32})_([A-Za-z0-9_-]{43})")
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; frame-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'self'"
)
REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'"
HEADERS = {
    "Content-Security-Policy": PAGE_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


@dataclass(frozen=True)
class Caller:
    owner: str
    max_jobs: int | None = None  # that are not ended
    max_bytes: int | None = None  # of uploads and results


ANYBODY = Caller(LOCAL)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_bind(host: str, store: Store) -> None:
    """UsageError where others could reach a service that has no keys."""
    if not is_loopback(host) and not store.has_keys():
        raise UsageError(
            f"--host {host}: others could use this service; make a key first (rnn2bin serve keys add NAME), or stay on 127.0.0.1"
        )


# -- keys


def add_key(store: Store, name: str, *, max_jobs: int, max_bytes: int) -> str:
    """A new key, shown this once: the data base has its SHA-256, which is enough for 256 random bits. UsageError for a name in use."""
    if not re.fullmatch(r"[A-Za-z0-9._@-]{1,60}", name):
        raise UsageError(f"{name!r}: a key's name has letters, digits and . _ @ -, at most 60")
    id, secret = new_id("key").removeprefix("key_"), secrets.token_urlsafe(32)
    try:
        store.add_key({"id": id, "name": name, "digest": _digest(secret), "max_jobs": max_jobs, "max_bytes": max_bytes})
    except IntegrityError:
        raise UsageError(f"{name}: there is a key of this name; remove it first") from None
    return f"r2b_{id}_{secret}"


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def caller_of(token: str, store: Store) -> Caller:
    """Whose key this is. AuthenticationError where nobody's."""
    found = TOKEN.fullmatch(token)
    key = store.key(found[1]) if found else None
    if found is None or key is None or not hmac.compare_digest(key["digest"], _digest(found[2])):
        raise AuthenticationError("this key is not known here")
    return Caller(key["id"], key["max_jobs"], key["max_bytes"])


def token_of(headers: Any, cookies: Any) -> str | None:
    """The key that a request came with, in its header or the page's cookie."""
    kind, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else cookies.get(COOKIE)


def check_site(method: str, headers: Any, *, hosts: frozenset[str] | None) -> None:
    """ForbiddenError for a name that is not this machine's (`hosts`; None: any), and for changes that another site's page asks for."""
    host = headers.get("host", "")
    if hosts is not None and (urlsplit(f"//{host}").hostname or "") not in hosts:
        raise ForbiddenError("this service answers to this machine's own name only")
    if method in ("GET", "HEAD", "OPTIONS"):
        return
    origin = headers.get("origin")
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none") or (
        origin is not None and urlsplit(origin).netloc != host
    ):
        raise ForbiddenError("changes are not taken from another site's page")


# -- quotas


def check_quota(caller: Caller, used: tuple[int, int]) -> None:
    """QuotaError where `used`, (jobs not ended, bytes stored) with what is asked for, is more than the caller's key allows."""
    active, stored = used
    if caller.max_jobs is not None and active > caller.max_jobs:
        raise QuotaError(f"jobs at once: this key allows {caller.max_jobs}; wait for one to end, or cancel it")
    if caller.max_bytes is not None and stored > caller.max_bytes:
        raise QuotaError(f"bytes stored: this key allows {caller.max_bytes}; delete uploads or jobs")


def shown(key: Row) -> Row:
    """A key as it may be listed."""
    return {name: key[name] for name in ("name", "id", "max_jobs", "max_bytes", "created")}
