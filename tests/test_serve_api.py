"""The conversion service's HTTP side, in this process and without a worker: what is answered, refused, hidden, and counted."""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from fastapi.testclient import TestClient

from rnn2bin import cli, errors
from rnn2bin.errors import ConflictError, UsageError
from rnn2bin.recipe import Data
from rnn2bin.serve import access, api, conversion, engine, folders, problems, recipes, settings, store
from rnn2bin.serve.client import Client
from rnn2bin.serve.streams import Streams

Made = tuple[TestClient, api.Service]
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="session")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data base with all its tables: making them takes longer than most tests."""
    found = settings.settings(tmp_path_factory.mktemp("empty"))
    engine_ = store.open_engine(found.db)
    store.Store(engine_).create()
    engine.migrate(found.db)
    engine_.dispose()
    return found.home / "service.sqlite"


@pytest.fixture
def make(tmp_path: Path, empty: Path) -> Iterator[Callable[..., Made]]:
    """`make(keys=False, **settings)`: a service on a data base of its own, and a client of it."""
    opened: list[TestClient] = []

    def build(*, keys: bool = False, **options: Any) -> Made:
        found = settings.settings(tmp_path / "home", poll=0.05, **options)
        shutil.copy(empty, found.home / "service.sqlite")
        engine_ = store.open_engine(found.db)
        things = store.Store(engine_)
        hosts = frozenset({"localhost", "testserver"})
        service = api.Service(found, things, engine.Queue(engine_), open_to_all=not keys, hosts=hosts)
        client = TestClient(api.create(service), raise_server_exceptions=False)
        client.__enter__()
        opened.append(client)
        return client, service

    yield build
    for client in opened:
        service = client.app.state.service  # type: ignore[attr-defined]
        client.__exit__(None, None, None)
        service.queue.close()
        service.store.engine.dispose()


@pytest.fixture
def made(make: Callable[..., Made]) -> Made:
    return make()


@pytest.fixture
def web(made: Made) -> TestClient:
    return made[0]


def upload(web: TestClient, content: bytes = b"bytes", name: str = "model.npz", **options: Any) -> dict[str, Any]:
    answer = web.put("/v1/uploads", params={"name": name}, content=content, **options)
    assert answer.status_code == 201, answer.text
    return answer.json()  # type: ignore[no-any-return]


def convert(web: TestClient, key: str | None = None, **body: Any) -> Any:
    body.setdefault("model", upload(web)["id"])
    return web.post("/v1/conversions", json={"recipe": "smoke", **body}, headers={"Idempotency-Key": key} if key else {})


def finish(service: api.Service, id: str) -> None:
    """The job as if a worker had made two files and an archive of it."""
    out = service.folders.job(id) / folders.OUT
    (out / "runtime").mkdir(parents=True)
    (out / "report.html").write_text("<p>report")
    (out / "runtime" / "main.c").write_text("int main;")
    service.store.begin(id, 1, "wrk_1")
    files, size = service.folders.wrap_up(id)
    assert service.store.finish(id, 1, "done", {}, artifacts=files, bytes=size, result={"metric": {"name": "mse"}})


def assert_problem(answer: Any, status: int, code: str, *words: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    found = answer.json()
    assert (found["status"], found["code"], found["type"]) == (status, code, f"urn:rnn2bin:error:{code}")
    assert found["title"] != code
    text = "\n".join(found["reasons"])
    assert all(word in text for word in words), text
    return found  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------- uploads


def test_an_upload_is_written_whole_and_measured(made):
    web, service = made
    content = bytes(range(256)) * 9000  # more than one chunk
    found = upload(web, content, "../../etc/a model (1).npz")
    assert found["name"] == "a_model_1_.npz"
    assert (found["bytes"], found["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert service.folders.upload(found["id"]).read_bytes() == content
    assert [one["id"] for one in web.get("/v1/uploads").json()["items"]] == [found["id"]]
    assert web.delete(f"/v1/uploads/{found['id']}").status_code == 204
    assert_problem(web.delete(f"/v1/uploads/{found['id']}"), 404, "not-found")
    assert not any((service.settings.home / "uploads").iterdir())


@pytest.mark.parametrize("told", [True, False], ids=["said beforehand", "found as it comes"])
def test_an_upload_larger_than_the_limit_leaves_nothing(make, told):
    web, service = make(upload_bytes=1000)
    content = b"x" * 1001
    answer = web.put("/v1/uploads", params={"name": "m.pt"}, content=content if told else iter([content[:600], content[600:]]))
    assert_problem(answer, 413, "too-large", "1000")
    assert not any((service.settings.home / "uploads").iterdir()) if (service.settings.home / "uploads").exists() else True
    assert web.get("/v1/uploads").json()["items"] == []


def test_an_upload_with_another_sha256_is_refused(made):
    web, service = made
    asked = {"name": "m.pt", "sha256": hashlib.sha256(b"one").hexdigest()}
    assert_problem(web.put("/v1/uploads", params=asked, content=b"two"), 422, "usage", "sha256")
    assert web.put("/v1/uploads", params=asked, content=b"one").status_code == 201
    assert len(list((service.settings.home / "uploads").iterdir())) == 1


@pytest.mark.parametrize(("name", "content"), [("m.pt", b""), ("///", b"x"), ("...", b"x")])
def test_an_upload_of_nothing_or_without_a_name(web, name, content):
    assert_problem(web.put("/v1/uploads", params={"name": name}, content=content), 422, "usage")


def test_an_upload_that_a_job_needs_stays(web):
    model = upload(web)["id"]
    job = convert(web, model=model).json()
    assert_problem(web.delete(f"/v1/uploads/{model}"), 409, "conflict")
    web.post(f"/v1/conversions/{job['id']}/cancel")
    assert web.delete(f"/v1/uploads/{model}").status_code == 204


# ---------------------------------------------------------------------------------------------- conversions


def test_a_conversion_is_asked_for_and_shown(web):
    model, data = upload(web), upload(web, name="data.npz")
    answer = convert(web, model=model["id"], data=data["id"], set={"train.steps": 7}, name="mine")
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/v1/conversions/{job['id']}" == job["links"]["self"]
    assert (job["state"], job["name"], job["run"]) == ("queued", "mine", 1)
    assert job["recipe"] == {"name": "smoke", "source": None, "set": {"train.steps": 7}}
    assert job["data"]["all"]["sha256"] == data["sha256"]
    assert web.get(job["links"]["self"]).json() == job
    assert [one["id"] for one in web.get("/v1/conversions?state=queued").json()["items"]] == [job["id"]]
    assert web.get("/v1/conversions?state=done").json()["items"] == []


def test_the_list_goes_on_page_by_page(web):
    model = upload(web)["id"]
    ids = [convert(web, model=model).json()["id"] for _ in range(5)]
    with Client("http://testserver", transport=Through(web)) as client:
        client.http.get = lambda path, **options: web.get(path, **{**options, "params": {**options.get("params", {}), "limit": 2}})  # type: ignore[method-assign]
        assert [job["id"] for job in client.list()] == ids[::-1]


def test_the_same_key_is_the_same_job_and_another_body_is_refused(web):
    model = upload(web)["id"]
    first, second = convert(web, "k-1", model=model), convert(web, "k-1", model=model)
    assert first.status_code == second.status_code == 202
    assert first.json() == second.json()
    assert_problem(convert(web, "k-1", model=model, set={"seed": 3}), 422, "usage", "Idempotency-Key")
    assert convert(web, "k-2", model=model).json()["id"] != first.json()["id"]
    assert len(web.get("/v1/conversions").json()["items"]) == 2


def test_twenty_duplicates_at_once_are_one_job(web):
    model = upload(web)["id"]
    with concurrent.futures.ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(lambda _: convert(web, "same", model=model), range(20)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(web.get("/v1/conversions").json()["items"]) == 1


def test_every_reason_of_a_recipe_is_told(web):
    found = assert_problem(convert(web, set={"train.stepz": 5, "train.batch_size": 0}), 422, "recipe", "did you mean steps", "at least 1")
    assert len(found["reasons"]) == 2
    assert_problem(convert(web, recipe="../../secret"), 422, "recipe", "no bundled recipe")
    assert_problem(convert(web, recipe_text="version: 1\ntrain:\n  stepz: 1\n"), 422, "recipe", "recipe:3:3")


WRITTEN = [name for name, field in Data.model_fields.items() if field.annotation == str | None]  # whatever may be added


@pytest.mark.parametrize("place", WRITTEN)
def test_a_recipe_reads_no_file_of_the_service(web, place):
    answer = convert(web, recipe_text=f"version: 1\ndata:\n  {place}: /etc/passwd\n")
    assert_problem(answer, 422, "recipe", f"data.{place}", "upload them")
    assert_problem(convert(web, set={f"data.{place}": "/etc/passwd"}), 422, "recipe", f"data.{place}")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"model": "upl_" + "0" * 32}, ("model", "no such upload")),
        ({"data": "upl_" + "0" * 32}, ("data.all", "no such upload")),
        ({"data": {"valid": "x"}}, ("train",)),
        ({"data": {"all": "x", "train": "x"}}, ("train",)),
        ({"data": {"other": "x"}}, ("data",)),
        ({"more": 1}, ("more",)),
        ({"name": "a\nb"}, ("name",)),
    ],
)
def test_requests_that_do_not_fit(web, body, words):
    assert_problem(convert(web, **body), 422, "usage", *words)


@pytest.mark.parametrize(
    "content", [b"{", b'{"model": "\\ud800"}', b'{"model": "upl_1", "set": {"\\ud800": "\\ud800"}}', b"[" * 5000, b"\xff"]
)
def test_bodies_that_are_no_request(web, content):
    answer = web.post("/v1/conversions", content=content, headers=JSON)
    assert answer.status_code in (400, 422)
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_body_may_not_be_large(web):
    assert_problem(web.post("/v1/conversions", content=b" " * (api.BODY + 1), headers=JSON), 413, "too-large")


def test_cancel_retry_delete(made):
    web, service = made
    job = convert(web).json()
    here = job["links"]["self"]
    assert_problem(web.delete(here), 409, "conflict", "cancel it first")
    assert_problem(web.post(f"{here}/retry"), 409, "conflict")
    assert web.post(f"{here}/cancel").json()["state"] == "cancelled"
    assert_problem(web.post(f"{here}/cancel"), 409, "conflict")
    again = web.post(f"{here}/retry")
    assert (again.status_code, again.json()["state"], again.json()["run"]) == (202, "queued", 2)
    service.store.begin(job["id"], 2, "wrk_1")
    assert web.post(f"{here}/cancel").json()["cancelling"]
    assert service.store.watch(job["id"], "wrk_1") == (True, True)
    assert service.store.finish(job["id"], 2, "cancelled", {})
    assert web.delete(here).status_code == 204
    assert_problem(web.get(here), 404, "not-found")
    assert service.store.events_after(job["id"], 0) == []


def test_an_end_comes_once_and_an_old_worker_changes_nothing(made):
    web, service = made
    id = convert(web).json()["id"]
    service.store.begin(id, 1, "wrk_1")
    service.store.begin(id, 1, "wrk_2")  # took over
    assert not service.store.note(id, "wrk_1", "stage", {"stage": "load"}, stage="load")
    assert service.store.watch(id, "wrk_1") == (False, False)
    assert service.store.note(id, "wrk_2", "stage", {"stage": "load"}, stage="load")
    assert service.store.finish(id, 1, "done", {})
    assert not service.store.finish(id, 1, "failed", {})
    assert not service.store.note(id, "wrk_2", "stage", {"stage": "pack"})
    assert service.store.begin(id, 1, "wrk_3") is None
    kinds = [event["kind"] for event in service.store.events_after(id, 0)]
    assert kinds == ["queued", "started", "started", "stage", "done"]


# ---------------------------------------------------------------------------------------------- events


def parsed(text: str) -> list[tuple[int, str]]:
    blocks = [dict(line.split(": ", 1) for line in block.splitlines()) for block in text.split("\n\n") if block]
    return [(int(block["id"]), block["event"]) for block in blocks if "data" in block]


def test_events_are_replayed_behind_the_last_one_seen(made):
    web, service = made
    job = convert(web).json()
    finish(service, job["id"])
    there = job["links"]["events"]
    answer = web.get(there)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert parsed(answer.text) == [(1, "queued"), (2, "started"), (3, "done")]
    assert parsed(web.get(there, headers={"Last-Event-ID": "2"}).text) == [(3, "done")]
    assert parsed(web.get(f"{there}?after=1").text) == [(2, "started"), (3, "done")]
    assert web.get(there, headers={"Last-Event-ID": "3"}).status_code == 204  # a browser asks no more
    assert_problem(web.get(there, headers={"Last-Event-ID": "x"}), 422, "usage")


def test_events_come_as_they_happen_and_end_with_the_job(made):
    web, service = made
    job = convert(web).json()
    streams = Streams(service.store, poll=0.05)

    def work() -> None:
        service.store.begin(job["id"], 1, "wrk_1")
        service.store.note(job["id"], "wrk_1", "stage", {"stage": "load"}, stage="load")
        service.store.finish(job["id"], 1, "failed", {"code": "unsafe"}, error={"code": "unsafe", "status": 422, "reasons": ["no"]})

    async def listen(after: int) -> str:
        return b"".join([part async for part in streams.of(job["id"], after)]).decode()

    async def all_of_it() -> list[str]:
        streams.start()
        listening = [asyncio.create_task(listen(after)) for after in (0, 0, 1)]
        await asyncio.sleep(0.2)
        assert streams.open == 3
        await asyncio.to_thread(work)
        return await asyncio.wait_for(asyncio.gather(*listening), 20)

    texts = asyncio.run(all_of_it())
    whole = [(1, "queued"), (2, "started"), (3, "stage"), (4, "failed")]
    assert [parsed(text) for text in texts] == [whole, whole, whole[1:]]
    assert streams.topics == {}
    error = web.get(job["links"]["self"]).json()["error"]
    assert (error["code"], error["detail"]) == ("unsafe", "no")
    assert error["title"].startswith("The source file could run code")


def test_more_events_than_are_read_at_once(made, monkeypatch):
    web, service = made
    monkeypatch.setattr("rnn2bin.serve.streams.BATCH", 7)
    job = convert(web).json()
    service.store.begin(job["id"], 1, "wrk_1")
    for step in range(20):
        service.store.note(job["id"], "wrk_1", "progress", {"step": step})
    service.store.finish(job["id"], 1, "done", {})
    assert [number for number, _ in parsed(web.get(job["links"]["events"]).text)] == list(range(1, 24))


# ---------------------------------------------------------------------------------------------- artifacts


def test_artifacts_ranges_and_sha256(made):
    web, service = made
    job = convert(web).json()
    there = f"{job['links']['self']}/artifacts"
    assert_problem(web.get(f"{there}/report.html"), 409, "conflict", "not done")
    assert web.get(there).json() == []
    finish(service, job["id"])
    listed = {one["name"]: one for one in web.get(there).json()}
    assert set(listed) == {"report.html", "runtime/main.c"}
    content = b"int main;"
    source = web.get(listed["runtime/main.c"]["href"])
    assert source.content == content
    assert source.headers["etag"] == f'"{hashlib.sha256(content).hexdigest()}"' == f'"{listed["runtime/main.c"]["sha256"]}"'
    assert source.headers["content-disposition"].startswith("attachment")
    part = web.get(source.url.path, headers={"Range": "bytes=4-7"})
    assert (part.status_code, part.content, part.headers["content-range"]) == (206, b"main", "bytes 4-7/9")
    assert web.get(source.url.path, headers={"Range": "bytes=99-"}).status_code == 416
    both = web.get(source.url.path, headers={"Range": "bytes=4-7", "If-Range": '"of another file"'})
    assert (both.status_code, both.content) == (200, content)
    asked = web.head(source.url.path)
    assert (asked.status_code, asked.content) == (200, b"")
    assert {asked.headers[name] == source.headers[name] for name in ("content-length", "etag", "x-content-sha256")} == {True}
    assert web.get(source.url.path, headers={"If-None-Match": source.headers["etag"]}).status_code == 304
    for name in ("../home", "%2e%2e/%2e%2e/service.sqlite", "out.tar/", "nothing"):
        assert web.get(f"{there}/{name}").status_code in (404, 422)


def test_the_archive_is_the_same_bytes_whenever_it_is_made(made):
    web, service = made
    job = convert(web).json()
    finish(service, job["id"])
    answer = web.get(f"{job['links']['self']}/artifacts.tar")
    assert answer.headers["x-content-sha256"] == hashlib.sha256(answer.content).hexdigest()
    assert 'filename="model.rnn2bin.tar"' in answer.headers["content-disposition"]
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        assert tar.getnames() == ["out/report.html", "out/runtime/main.c"]
        assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "")}
    assert service.folders.wrap_up(job["id"])[0]["out.tar"]["sha256"] == hashlib.sha256(answer.content).hexdigest()


def test_a_report_is_shown_shut_off_from_everything(made):
    web, service = made
    job = convert(web).json()
    finish(service, job["id"])
    report = web.get(web.get(job["links"]["self"]).json()["links"]["report"])
    assert report.headers["content-type"].startswith("text/html")
    assert report.headers["content-disposition"].startswith("inline")
    policy = report.headers["content-security-policy"]
    assert "sandbox;" in policy
    assert "default-src 'none'" in policy
    assert "script" not in policy


# ---------------------------------------------------------------------------------------------- who may ask


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_with_keys_everybody_sees_their_own(make):
    web, service = make(keys=True)
    one, two = (access.add_key(service.store, name, max_jobs=2, max_bytes=10**6) for name in ("one", "two"))
    refused = web.get("/v1/conversions")
    assert_problem(refused, 401, "unauthorized", "key")
    assert refused.headers["www-authenticate"] == "Bearer"
    for token in ("r2b_x", one[:-1] + ("A" if one[-1] != "A" else "B"), "", "é"):
        assert web.get("/v1/uploads", headers={"Authorization": f"Bearer {token}".encode()}).status_code == 401
    model = upload(web, headers=bearer(one))["id"]
    job = web.post("/v1/conversions", json={"model": model, "recipe": "smoke"}, headers=bearer(one)).json()
    there = job["links"]["self"]
    assert web.get(there, headers=bearer(one)).status_code == 200
    for method, path in [
        ("GET", there),
        ("GET", f"{there}/events"),
        ("POST", f"{there}/cancel"),
        ("DELETE", there),
        ("DELETE", f"/v1/uploads/{model}"),
    ]:
        assert_problem(web.request(method, path, headers=bearer(two)), 404, "not-found")
    assert_problem(web.post("/v1/conversions", json={"model": model}, headers=bearer(two)), 422, "usage", "no such upload")
    assert web.get("/v1/conversions", headers=bearer(two)).json()["items"] == []
    assert web.get("/healthz").status_code == 200
    assert web.get("/metrics").status_code == 401


def test_keys_are_kept_as_hashes_and_end_when_taken_away(make):
    web, service = make(keys=True)
    token = access.add_key(service.store, "one", max_jobs=2, max_bytes=10**6)
    database = (service.settings.home / "service.sqlite").read_bytes() + (service.settings.home / "service.sqlite-wal").read_bytes()
    assert token.rpartition("_")[2].encode() not in database
    assert web.get("/v1/uploads", headers=bearer(token)).status_code == 200
    with pytest.raises(UsageError, match="one"):
        access.add_key(service.store, "one", max_jobs=2, max_bytes=1)
    assert service.store.remove_key("one")
    assert web.get("/v1/uploads", headers=bearer(token)).status_code == 401


def test_quotas(make):
    web, service = make(keys=True)
    headers = bearer(access.add_key(service.store, "one", max_jobs=1, max_bytes=100))
    model = upload(web, b"x" * 60, headers=headers)["id"]
    too_much = web.put("/v1/uploads?name=b.pt", content=b"x" * 41, headers=headers)
    assert_problem(too_much, 429, "quota", "100")
    assert too_much.headers["retry-after"]
    ask = lambda: web.post("/v1/conversions", json={"model": model, "recipe": "smoke"}, headers=headers)
    job = ask().json()
    assert_problem(ask(), 429, "quota", "allows 1;")
    web.post(f"/v1/conversions/{job['id']}/cancel", headers=headers)
    assert ask().status_code == 202
    assert web.get("/v1/session", headers=headers).json()["jobs"] == 1


def test_a_quota_holds_against_requests_at_once(make):
    """Each alone would fit: the last look at what is used is part of the change."""
    web, service = make(keys=True)
    headers = bearer(access.add_key(service.store, "one", max_jobs=3, max_bytes=100))
    with concurrent.futures.ThreadPoolExecutor(12) as threads:
        sent = list(threads.map(lambda _: web.put("/v1/uploads?name=m.npz", content=b"x" * 30, headers=headers), range(12)))
        assert sorted(answer.status_code for answer in sent) == [201] * 3 + [429] * 9
        body = {"model": next(answer.json()["id"] for answer in sent if answer.status_code == 201), "recipe": "smoke"}
        asked = list(threads.map(lambda _: web.post("/v1/conversions", json=body, headers=headers), range(12)))
    assert sorted(answer.status_code for answer in asked) == [202] * 3 + [429] * 9
    assert service.coming == {}
    kept = {one["id"] for one in web.get("/v1/uploads", headers=headers).json()["items"]}
    assert {path.name for path in (service.settings.home / "uploads").iterdir()} == kept  # what was refused has left nothing
    one, *_ = web.get("/v1/conversions", headers=headers).json()["items"]
    web.post(f"{one['links']['self']}/cancel", headers=headers)
    assert web.post("/v1/conversions", json=body, headers=headers).status_code == 202
    assert_problem(web.post(f"{one['links']['self']}/retry", headers=headers), 429, "quota")
    assert web.get(one["links"]["self"], headers=headers).json()["state"] == "cancelled"


def test_the_pages_cookie(make):
    web, service = make(keys=True)
    assert web.get("/v1/session").json() == {
        "needs_key": True,
        "owner": None,
        "max_jobs": None,
        "max_bytes": None,
        "jobs": None,
        "bytes": None,
    }
    token = access.add_key(service.store, "one", max_jobs=2, max_bytes=10**6)
    assert_problem(web.post("/v1/session", json={"key": "r2b_wrong"}), 401, "unauthorized")
    answer = web.post("/v1/session", json={"key": token})
    cookie = answer.headers["set-cookie"].lower()
    assert answer.status_code == 204
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert web.get("/v1/conversions").status_code == 200
    assert web.get("/v1/session").json()["owner"]
    web.delete("/v1/session")
    assert web.get("/v1/conversions").status_code == 401


@pytest.mark.parametrize(
    "headers",
    [{"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "null"}],
    ids=["rebound name", "another site", "said by the browser", "a sandboxed page"],
)
def test_another_sites_page_changes_nothing(web, headers):
    assert_problem(web.put("/v1/uploads?name=a.pt", content=b"x", headers=headers), 403, "forbidden")
    assert web.get("/v1/uploads").json()["items"] == []


def test_another_name_reads_nothing_either(web):
    assert_problem(web.get("/v1/conversions", headers={"Host": "evil.example"}), 403, "forbidden")
    assert web.put("/v1/uploads?name=a.pt", content=b"x", headers={"Origin": "http://testserver"}).status_code == 201


def test_a_public_bind_without_a_key_is_refused(made):
    _, service = made
    for host in ("127.0.0.1", "localhost", "::1", "127.9.9.9"):
        access.check_bind(host, service.store)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""):
        with pytest.raises(UsageError, match="rnn2bin serve keys add"):
            access.check_bind(host, service.store)
    access.add_key(service.store, "one", max_jobs=1, max_bytes=1)
    access.check_bind("0.0.0.0", service.store)


def test_a_public_bind_is_refused_by_the_command(tmp_path):
    result = CliRunner().invoke(cli.main, ["serve", "--home", str(tmp_path / "h"), "--host", "0.0.0.0", "--port", "0"])
    assert result.exit_code == 2
    assert "make a key first" in result.stderr
    assert "Traceback" not in result.output


# ---------------------------------------------------------------------------------------------- what is said, and what is not


def test_every_answer_has_the_headers_of_security(web):
    for answer in (web.get("/"), web.get("/v1/conversions"), web.get("/nothing"), web.get("/page/app.js"), web.put("/v1/uploads")):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "server" not in answer.headers


def test_the_page_loads_nothing_from_elsewhere():
    for path in api.PAGE.iterdir():
        text = path.read_text()
        links = [word for word in text.replace('"', " ").replace("(", " ").split() if word.startswith(("http://", "https://", "//cdn"))]
        assert [link for link in links if not link.startswith("http://www.w3.org/2000/svg")] == []
        assert "innerHTML" not in text


def test_a_bug_says_nothing_of_itself(made, monkeypatch):
    web, service = made

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("/secret/path and DATABASE_PASSWORD")

    monkeypatch.setattr(service.store, "list_jobs", broken)
    answer = web.get("/v1/conversions")
    assert_problem(answer, 500, "bug")
    assert "secret" not in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]  # as every other answer, and counted as one
    assert 'rnn2bin_http_requests_total{method="GET",route="/v1/conversions",status="500"} 1.0' in web.get("/metrics").text
    monkeypatch.setattr(service.store, "list_workers", broken)
    health = web.get("/healthz")
    assert_problem(health, 503, "unavailable")
    assert "secret" not in health.text


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_and_leaves_nothing(made, monkeypatch, number):
    web, service = made

    def full(_: Any) -> None:
        raise OSError(number, "no room", "/secret/path")

    monkeypatch.setattr(api, "_settle", full)
    assert_problem(web.put("/v1/uploads?name=m.pt", content=b"x"), 507, "resources", "disk is full")
    assert list((service.settings.home / "uploads").iterdir()) == []
    assert web.get("/v1/uploads").json()["items"] == []


def test_a_data_base_that_is_gone_is_no_bug(made, monkeypatch):
    """A client asks again after 503; after 500 it gives up."""
    web, service = made

    def gone(*_: Any, **__: Any) -> None:
        raise sa.exc.OperationalError("SELECT secret", {}, Exception("server closed the connection unexpectedly"))

    monkeypatch.setattr(service.store, "list_jobs", gone)
    answer = web.get("/v1/conversions")
    assert_problem(answer, 503, "unavailable", "data base")
    assert answer.headers["retry-after"]
    assert "SELECT" not in answer.text


@pytest.mark.parametrize(
    "text", ["/home/me/.venv/lib/python3.11/site-packages/torch/x.py: no", "cannot read /srv/rnn2bin/jobs/job_1/model/a.pt"]
)
def test_messages_lose_their_paths(text):
    said = conversion.without_paths(text, Path("/srv/rnn2bin"))
    assert "/" not in said.replace("…", "")
    assert conversion.without_paths("model/a.npz: (N,T) and/or 3/4", Path("/srv")) == "model/a.npz: (N,T) and/or 3/4"


def test_every_error_has_a_status_a_code_and_a_title():
    waiting, seen = [errors.Rnn2binError], {}
    while waiting:
        one = waiting.pop()
        assert 400 <= one.http_status < 600
        assert seen.setdefault(one.code, one) is one, "two errors with one code"
        assert problems.TITLES[one.code]
        waiting += [kind for kind in one.__subclasses__() if kind.__module__ == errors.__name__]  # not what a reader throws to itself
    assert seen["unsafe"].http_status == seen["unsupported"].http_status == seen["data"].http_status == 422
    page = (Path(__file__).parents[1] / "docs" / "service.md").read_text()
    assert [code for code in seen if f"`{code}`" not in page] == []


def test_metrics_count_answers_jobs_and_streams(web):
    convert(web)
    web.get("/v1/conversions/job_nothing")
    text = web.get("/metrics").text
    assert 'rnn2bin_conversions{state="queued"} 1.0' in text
    assert 'rnn2bin_http_requests_total{method="POST",route="/v1/conversions",status="202"} 1.0' in text
    assert 'rnn2bin_http_requests_total{method="GET",route="/v1/conversions/{id}",status="404"} 1.0' in text
    assert "rnn2bin_uploaded_bytes_total 5.0" in text
    assert "job_nothing" not in text


def test_openapi_names_every_route_and_its_problems(web):
    schema = web.get("/openapi.json").json()
    wanted = {"/v1/uploads", "/v1/conversions", "/v1/conversions/{id}", "/v1/conversions/{id}/events", "/v1/conversions/{id}/cancel"}
    wanted |= {
        "/v1/conversions/{id}/retry",
        "/v1/conversions/{id}/artifacts/{name}",
        "/v1/conversions/{id}/artifacts.tar",
        "/healthz",
        "/metrics",
    }
    assert wanted <= set(schema["paths"])
    assert "application/problem+json" in schema["paths"]["/v1/conversions"]["post"]["responses"]["422"]["content"]
    assert "Problem" in schema["components"]["schemas"]


# ---------------------------------------------------------------------------------------------- recipes


def test_every_knob_is_explained(web):
    found = web.get("/v1/recipes").json()
    assert {"anneal", "smoke", "strict"} <= {one["name"] for one in found["items"]}
    assert [knob["knob"] for knob in found["knobs"] if len(knob["help"]) < 8] == []
    knobs = {knob["knob"]: knob for knob in found["knobs"]}
    assert (knobs["train.steps"]["kind"], knobs["train.steps"]["low"], knobs["train.steps"]["default"]) == ("count", 1, 4000)
    assert (knobs["budget.density"]["above"], knobs["budget.density"]["high"], knobs["budget.density"]["optional"]) == (0, 1, True)
    assert (knobs["gates.copies"]["high"], knobs["gates.copies"]["choices"]) == (16, ["auto"])
    assert knobs["gates.levels"]["choices"] == ["learned", "strict"]
    assert not any(name.startswith(("source", "data.path", "version")) for name in knobs)


def test_the_values_of_a_bundled_recipe_set_nothing_anew():
    shown = recipes.shown("sparse")
    assert shown["values"]["pack.weights"] == "int8"
    same = {knob: value for knob, value in shown["values"].items() if value is not None}
    found = recipes.resolve("sparse", text=None, source=None, overrides=same)
    assert found == recipes.resolve("sparse", text=None, source=None, overrides={})


def test_validation_tells_each_knob_its_reason(web):
    ask = lambda **body: web.post("/v1/recipes/validate", json=body).json()
    assert ask(recipe="anneal", set={"train.steps": 5}) == {"valid": True, "reasons": [], "knobs": {}}
    found = ask(recipe="anneal", set={"train.steps": 0, "seed": 1, "budget.density": 2})
    assert not found["valid"]
    assert set(found["knobs"]) == {"train.steps", "budget.density"}
    assert found["knobs"]["train.steps"] == "Must be at least 1; given 0"
    assert not ask(recipe_text="version: 2\n")["valid"]
    assert_problem(web.get("/v1/recipes/nothing"), 404, "not-found")
    assert web.get("/v1/recipes/smoke").json()["values"]["train.steps"] == 20


# ---------------------------------------------------------------------------------------------- the client, the commands


class Through(httpx.BaseTransport):
    """Hands the client's requests to the service in this process."""

    def __init__(self, web: TestClient) -> None:
        self.web = web

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        headers = {name: value for name, value in request.headers.items() if name not in ("content-length", "transfer-encoding")}
        answer = self.web.request(request.method, str(request.url), content=request.read(), headers=headers)
        return httpx.Response(answer.status_code, headers=dict(answer.headers), content=answer.content)


@pytest.fixture
def client(web: TestClient) -> Iterator[Client]:
    with Client("http://testserver", transport=Through(web), patience=0.5) as found:
        yield found


def test_the_client_uploads_asks_waits_and_downloads(made, client, tmp_path):
    _, service = made
    (tmp_path / "m.npz").write_bytes(b"model")
    job = client.convert(tmp_path / "m.npz", data={"train": tmp_path / "m.npz"}, recipe="smoke", set={"seed": 4})
    assert job["data"]["train"]["sha256"] == hashlib.sha256(b"model").hexdigest()
    finish(service, job["id"])
    assert client.wait(job["id"])["state"] == "done"
    assert [event["event"] for event in client.events(job["id"], after=1)] == ["started", "done"]
    out = client.download(job["id"], tmp_path / "OUT")
    assert (out / "runtime" / "main.c").read_text() == "int main;"
    with pytest.raises(UsageError, match="exists already"):
        client.download(job["id"], out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["OUT", "home", "m.npz"]


def test_the_client_raises_the_services_errors(client, tmp_path):
    (tmp_path / "m.npz").write_bytes(b"model")
    with pytest.raises(errors.RecipeError, match="did you mean"):
        client.convert(tmp_path / "m.npz", set={"train.stepz": 1})
    with pytest.raises(errors.NotFoundError):
        client.get("job_" + "0" * 32)
    job = client.convert(tmp_path / "m.npz")
    with pytest.raises(ConflictError):
        client.delete(job["id"])
    with pytest.raises(UsageError, match=r"none\.pt"):
        client.upload(tmp_path / "none.pt")


def test_the_client_says_when_nobody_answers():
    with Client("http://127.0.0.1:9", patience=0.1) as client, pytest.raises(errors.UnavailableError, match="cannot be reached"):
        client.get("job_1")


def test_keys_by_the_command(tmp_path):
    call = lambda *words: CliRunner().invoke(cli.main, ["serve", "--home", str(tmp_path / "h"), "keys", *words])
    assert call("ls").output == "no keys\n"
    token = call("add", "me", "--jobs", "2").output.strip()
    assert access.TOKEN.fullmatch(token)
    assert call("add", "me").exit_code == 2
    listed = json.loads(call("ls", "--json").output)
    assert (listed[0]["name"], listed[0]["max_jobs"]) == ("me", 2)
    assert "digest" not in listed[0]
    assert call("rm", "me").exit_code == 0
    assert call("rm", "me").exit_code == 2


@pytest.mark.parametrize("command", ["serve", "worker"])
def test_without_the_extra_a_line_says_what_to_install(tmp_path, monkeypatch, command):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "dbos" else object())
    result = CliRunner().invoke(cli.main, [command, "--home", str(tmp_path / "h")])
    assert (result.exit_code, result.stderr) == (2, "rnn2bin: the service needs dbos: pip install 'rnn2bin[serve]'\n")


def test_a_data_base_that_is_none(tmp_path):
    result = CliRunner().invoke(cli.main, ["worker", "--home", str(tmp_path), "--db", "mysql://x/y"])
    assert result.exit_code == 2
    assert "postgresql://" in result.stderr
    assert CliRunner().invoke(cli.main, ["worker"]).exit_code == 2
