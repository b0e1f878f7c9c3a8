"""Conversions by the service from outside: real processes, tiny networks. scripts/service_trials.py in small, and (slow) in full."""

from __future__ import annotations

import concurrent.futures
import json
import os
import pickle
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from rnn2bin.errors import BudgetError, QuotaError, UnsafeError
from rnn2bin.serve import access, isolation, store
from rnn2bin.serve.child import Watch
from rnn2bin.serve.client import Client

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import service_trials as trials  # type: ignore[import-not-found]

sys.path.pop(0)

FAST = {"train.steps": 6, "train.max_steps": 6, "train.evaluate_every": 3}
PATIENCE = 240.0  # seconds; a machine may be busy


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Client, Path]]:
    """(process, client, folder) of one service for the tests that leave it alive."""
    at = tmp_path_factory.mktemp("service")
    trials.write_model(at / "model.npz")
    with trials.Process("serve", at / "home", "--port", "0", "--memory", "8") as server, Client(server.url) as client:
        yield server, client, at


def ended(client: Client, id: str) -> dict[str, Any]:
    (job,) = trials.until_ended(client, [id], seconds=PATIENCE)
    assert job["state"] in ("done", "failed", "cancelled"), job
    return job  # type: ignore[no-any-return]


def test_from_upload_to_packed_directory(service, tmp_path):
    _, client, at = service
    job = client.convert(at / "model.npz", recipe="smoke", set=FAST)
    events = list(client.events(job["id"]))
    job = client.get(job["id"])
    assert job["state"] == "done", job["error"]
    kinds = [event["event"] for event in events]
    assert [event["data"]["stage"] for event in events if event["event"] == "stage"] == ["load", "calibrate", "distill", "pack", "verify"]
    assert kinds[:2] == ["queued", "started"]
    assert kinds[-1] == "done"
    progress = [event["data"] for event in events if event["event"] == "progress"]
    assert progress[-1]["step"] == 6
    assert {"hard", "soft", "temperature", "slope", "seconds_left"} < set(progress[-1])
    assert {gate.rpartition(".")[2] for gate in progress[-1]["open"]} == {"i", "f", "o"}
    assert all(0 < share < 1 for share in progress[-1]["open"].values())
    out = client.download(job["id"], tmp_path / "OUT")
    report = json.loads((out / "report.json").read_text())
    assert report["drop"] == job["result"]["drop"]
    assert report["provenance"]["command"] == {"model": "model/model.npz", "data": []}  # nothing of where it lay
    assert str(at) not in "".join(path.read_text() for path in out.glob("*.json"))
    done = subprocess.run([sys.executable, "-m", "rnn2bin", "convert", "model.npz", "--recipe", "smoke.yaml", "--out", "CLI", "--json",
                           *[word for knob, value in FAST.items() for word in ("--set", f"{knob}={value}")]],
                          cwd=at, capture_output=True, text=True, env=trials.quiet(), check=True)  # fmt: skip
    assert json.loads(done.stdout)["binary"] == report["binary"]
    assert (at / "CLI" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def command(at: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "rnn2bin", *words], cwd=at, capture_output=True, text=True, env=trials.quiet())


def test_the_command_lets_a_service_do_it(service, tmp_path):
    server, client, at = service
    tokens = [f"token-{n}" for n in range(11)]
    (tmp_path / "tokens.txt").write_text("".join(f"{token}\n" for token in tokens))
    np.savez(tmp_path / "data.npz", inputs=np.random.default_rng(0).integers(11, size=(40, 12)))
    words = ("convert", str(at / "model.npz"), "--data", "data.npz", "--recipe", "smoke", "--set", "data.vocabulary=tokens.txt", "--json")
    words += tuple(word for knob, value in FAST.items() for word in ("--set", f"{knob}={value}"))
    there = command(tmp_path, *words, "--server", server.url, "--out", "THERE")
    assert there.returncode == 0, there.stderr
    here = command(tmp_path, *words, "--out", "HERE")
    assert here.returncode == 0, here.stderr
    reports = [json.loads(one.stdout) for one in (there, here)]
    assert [set(one["figures"]["heatmaps"][0]["tokens"]) <= set(tokens) for one in reports] == [True, True]  # their names came along
    assert reports[0]["binary"] == reports[1]["binary"]
    assert (tmp_path / "THERE" / "model.safetensors").read_bytes() == (tmp_path / "HERE" / "model.safetensors").read_bytes()
    job = next(iter(client.list()))
    assert f"{server.url}/#/jobs/{job['id']}" in there.stderr
    assert '"step": 6' in there.stderr  # progress, as of a conversion here
    assert set(job["data"]) == {"vocabulary", "all"}
    again = command(tmp_path, *words, "--server", server.url, "--out", "THERE")
    assert (again.returncode, "exists already" in again.stderr) == (2, True)
    assert len([one for one in client.list() if one["data"]]) == 1  # it was refused before anything was sent
    fetched = command(tmp_path, "jobs", "--server", server.url, "fetch", job["id"], "--out", "THERE", "--force")
    assert fetched.returncode == 0, fetched.stderr
    listed = json.loads(command(tmp_path, "jobs", "--server", server.url, "ls", "--state", "done", "--json").stdout)
    assert job["id"] in [one["id"] for one in listed]
    assert command(tmp_path, "jobs", "--server", server.url, "rm", job["id"]).returncode == 0
    gone = command(tmp_path, "jobs", "--server", server.url, "show", job["id"])
    assert (gone.returncode, "no such conversion" in gone.stderr) == (2, True)


def test_an_error_of_a_job_is_the_commands(service, tmp_path):
    server, client, _ = service
    write_evil(tmp_path / "m.pt")
    done = command(tmp_path, "convert", "m.pt", "--recipe", "smoke", "--server", server.url)
    assert done.returncode == UnsafeError.exit_code
    assert "posix.system" in done.stderr
    id = next(iter(client.list(state="failed")))["id"]
    assert "posix.system" in command(tmp_path, "jobs", "--server", server.url, "show", id).stdout
    assert command(tmp_path, "convert", "m.pt", "--server", server.url, "--resume").returncode == 2
    assert not (tmp_path / "m.pt.rnn2bin").exists()


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("jq")), reason="the examples use curl and jq")
def test_the_documents_curl_examples_run(service, tmp_path):
    server, client, at = service
    page = (Path(__file__).parents[1] / "docs" / "service.md").read_text(encoding="utf-8")
    (block,) = (found for found in re.findall(r"```sh\n(.*?)```", page, re.S) if found.startswith("U="))
    for theirs, ours in (("http://127.0.0.1:8765", server.url), ("model.pt", "model.npz"), ("anneal", "smoke"), ("2000", "6"),
                         ("today-1", str(tmp_path))):  # fmt: skip
        assert theirs in block
        block = block.replace(theirs, ours)
    shutil.copy(at / "model.npz", tmp_path)
    np.savez(tmp_path / "data.npz", inputs=np.random.default_rng(0).integers(11, size=(40, 12)))
    before = {job["id"] for job in client.list()}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "event: done" in done.stdout
    assert '"drop"' in done.stdout
    assert [json.loads(line)["code"] for line in done.stdout.splitlines()[-1].replace("}{", "}\n{").splitlines()] == ["conflict"] * 2
    with tarfile.open(tmp_path / "model.rnn2bin.tar") as archive:
        assert "out/model.safetensors" in archive.getnames()
    assert {job["id"] for job in client.list()} == before  # the last line deletes it


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch EVIL",)


def write_evil(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"w": Evil()}))
        archive.writestr("archive/version", "3\n")


def test_a_file_that_would_run_code_fails_with_the_loaders_reason(service, tmp_path):
    _, client, at = service
    write_evil(tmp_path / "m.pt")
    job = ended(client, client.convert(tmp_path / "m.pt", recipe="smoke")["id"])
    error = job["error"]
    assert (job["state"], error["code"], error["status"]) == ("failed", UnsafeError.code, 422)
    assert "model/m.pt" in error["detail"]
    assert str(at) not in json.dumps(job)
    assert not list(at.rglob("EVIL"))


def test_a_missed_budget_fails_and_a_retry_goes_on_from_what_was_trained(service):
    _, client, at = service
    limit = {"report.max_density": 0.02, "train.learning_rate": 0.0001}
    job = ended(client, client.convert(at / "model.npz", recipe="smoke", set={**FAST, **limit})["id"])
    assert (job["state"], job["error"]["code"], job["error"]["status"]) == ("failed", BudgetError.code, 409)
    assert client.retry(job["id"])["run"] == 2
    job = ended(client, job["id"])
    again = [event["data"] for event in client.events(job["id"]) if event["event"] == "progress"]
    assert job["error"]["code"] == BudgetError.code
    assert sum(data["step"] == 6 for data in again) == 1  # the second run trained nothing
    client.delete(job["id"])
    assert not (at / "home" / "jobs" / job["id"]).exists()


def test_cancel_stops_the_process_and_retry_resumes(service):
    _, client, at = service
    job = client.convert(at / "model.npz", recipe="smoke", set={**trials.LONG, "train.evaluate_every": 20})
    for event in client.events(job["id"]):
        if event["event"] == "progress" and event["data"]["measured"]:
            break
    assert trials.children_of(at / "home") == 1
    waiting = client.convert(at / "model.npz", recipe="smoke")
    assert client.cancel(waiting["id"])["state"] == "cancelled"
    assert client.cancel(job["id"])["cancelling"]
    assert ended(client, job["id"])["state"] == "cancelled"
    assert trials.children_of(at / "home") == 0
    last = max(event["id"] for event in client.events(job["id"]))
    client.retry(job["id"])
    for event in client.events(job["id"], after=last):
        if event["event"] == "progress":
            assert event["data"]["step"] > 20  # behind the checkpoint
            break
    client.cancel(job["id"])
    ended(client, job["id"])
    with sqlite3.connect(at / "home" / "service.sqlite") as db:  # what was cancelled in the queue has ended there too
        state = lambda: db.execute("SELECT status FROM workflow_status WHERE workflow_uuid = ?", [f"{waiting['id']}-1"]).fetchone()[0]
        end = time.monotonic() + 30
        while state() != "SUCCESS" and time.monotonic() < end:
            time.sleep(0.2)
        assert state() == "SUCCESS"
    db.close()


def test_a_child_dies_with_its_worker(tmp_path):
    model = trials.write_model(tmp_path / "model.npz")
    with trials.Process("serve", tmp_path / "home", "--port", "0") as server, Client(server.url) as client:
        job = client.convert(model, recipe="smoke", set=trials.LONG)
        for event in client.events(job["id"]):
            if event["event"] == "stage":
                break
        assert trials.children_of(tmp_path / "home") == 1
        server.kill()
        end = time.monotonic() + 10
        while trials.children_of(tmp_path / "home") and time.monotonic() < end:
            time.sleep(0.1)
        assert trials.children_of(tmp_path / "home") == 0


# ---------------------------------------------------------------------------------------------- limits


def in_child(code: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    text = f"import os, socket, sys\nfrom rnn2bin.serve import isolation\n{code}"
    return subprocess.run([sys.executable, "-I", "-c", text], capture_output=True, text=True, cwd=tmp_path, timeout=60)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="namespaces and seccomp are Linux's")
def test_a_child_reaches_no_network(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        ask = f"socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)"
        assert in_child(ask, tmp_path).returncode == 0
        done = in_child(f"print(isolation.leave_network())\ntry:\n    {ask}\nexcept OSError:\n    print('refused')", tmp_path)
    assert done.stdout.split() in (["namespace", "refused"], ["seccomp", "refused"]), done


@pytest.mark.skipif(isolation.platform.machine() not in isolation.CALLS, reason="the filter knows x86_64 and aarch64")
def test_where_namespaces_are_forbidden_a_filter_refuses_sockets(tmp_path):
    code = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(isolation.NO_NEW_PRIVILEGES, 1, 0, 0, 0)
print(isolation._no_internet_sockets(libc))
for family in (socket.AF_INET, socket.AF_INET6):
    try:
        socket.socket(family)
    except PermissionError:
        print("refused")
socket.socketpair()
print(os.getpid() > 0)"""
    assert in_child(code, tmp_path).stdout.split() == ["True", "refused", "refused", "True"]


def test_a_child_has_its_share_of_memory_and_files(tmp_path):
    code = """
isolation.limit(memory=300_000_000, cpu=60, file=1000)
try:
    bytearray(400_000_000)
except MemoryError:
    print("memory")
try:
    with open("large", "wb") as out:
        out.write(bytes(2000))
except OSError:
    print("file")"""
    assert in_child(code, tmp_path).stdout.split() == ["memory", "file"]


def test_a_child_out_of_processor_time_is_ended(tmp_path):
    done = in_child("isolation.limit(memory=10**10, cpu=1, file=10**6)\nwhile True: pass", tmp_path)
    assert done.returncode == -24  # SIGXCPU


def test_progress_is_told_now_and_then_with_the_time_left():
    now, told = [0.0], []
    watch = Watch(told.append, clock=lambda: now[0])
    for step in range(1, 1001):
        now[0] += 0.01
        watch({"step": step, "steps": 1000, "measured": None, "loss": float("nan")})
    assert 10 <= len(told) <= 25
    assert told[-1]["progress"]["step"] == 1000
    assert told[0]["progress"]["seconds_left"] is None
    middle = next(one["progress"] for one in told if one["progress"]["step"] > 400)
    assert middle["seconds_left"] == pytest.approx(0.01 * (1000 - middle["step"]))
    assert middle["loss"] is None  # JSON has no NaN


# ---------------------------------------------------------------------------------------------- losing nothing


def test_a_killed_server_and_a_killed_worker_lose_nothing():
    found = trials.kills(2, pauses=(1.0, 5.0))
    assert found["ok"], found


def test_it_ends_in_five_seconds_with_streams_open():
    found = trials.shutdown(20)
    assert found["ok"], found
    assert found["ended"] == 20


def test_duplicates_are_one_job():
    assert trials.duplicates(30)["ok"]


@pytest.fixture
def installed() -> ModuleType:
    if not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    return trials


def test_two_workers_share_one_postgresql(installed):
    found = installed.workers(3)
    assert found["ok"], found


def test_a_quota_holds_on_postgresql_too(installed):
    """Where two transactions do not see each other's rows, they wait for the key's."""
    with installed.folder() as at, installed.postgres(at) as db, store.opened(db) as found:
        caller = access.caller_of(access.add_key(found, "one", max_jobs=3, max_bytes=100), found)
        row = {"owner": caller.owner, "name": "", "request": {"model": {}, "data": {}}, "recipe": "", "idempotency_key": None}

        def ask(_: int) -> bool:
            try:
                found.add_job({**row, "id": store.new_id("job"), "body_sha256": ""}, enqueue=lambda *_: time.sleep(0.02),
                              allow=lambda used: access.check_quota(caller, used))  # fmt: skip
            except QuotaError:
                return False
            return True

        with concurrent.futures.ThreadPoolExecutor(10) as threads:
            assert sum(threads.map(ask, range(20))) == 3
        assert found.used(caller.owner)[0] == 3


@pytest.mark.slow
def test_a_hundred_kills():
    found = trials.kills(100)
    assert found["ok"], found


@pytest.mark.slow
def test_twenty_jobs_of_two_workers(installed):
    found = installed.workers(20)
    assert found["ok"], found


@pytest.mark.slow
def test_two_hundred_streams_leave_the_page_quick():
    found = trials.streams(200)
    assert found["ok"], found


@pytest.mark.slow
def test_ten_thousand_requests_without_a_server_error():
    found = trials.fuzz(10_000)
    assert found["ok"], found
