#!/usr/bin/env python3
"""Trials of the conversion service from outside, each of which docs/service.md quotes:

    python scripts/service_trials.py kills 100        # server or worker killed or restarted at random moments
    python scripts/service_trials.py duplicates 100   # the same request at once
    python scripts/service_trials.py shutdown 50      # with event streams open
    python scripts/service_trials.py streams 200      # what open event streams cost the page
    python scripts/service_trials.py workers 20       # two workers on one PostgreSQL, one of them killed
    python scripts/service_trials.py fuzz 10000       # schemathesis; counts the requests that the service has answered

Every trial starts its own service in a temporary folder and prints what it found as JSON; it exits with 1 where that falls short.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from rnn2bin.serve.client import Client

Found = dict[str, Any]
TINY = {"train.steps": 20, "train.max_steps": 20, "train.evaluate_every": 5}
LONG = {"train.steps": 200_000, "train.evaluate_every": 2000}


def write_model(path: Path) -> Path:
    """A language model of eleven tokens, as bare arrays: small enough that a conversion is mostly its start."""
    draw = np.random.default_rng(0)
    shapes = {"embedding.weight": (11, 5), "rnn.weight_ih_l0": (28, 5), "rnn.weight_hh_l0": (28, 7), "rnn.bias_ih_l0": (28,),
              "rnn.bias_hh_l0": (28,), "head.weight": (11, 7), "head.bias": (11,)}  # fmt: skip
    np.savez(path, **{name: draw.normal(size=shape).astype(np.float32) / 2 for name, shape in shapes.items()})
    return path


class Process:
    """`rnn2bin serve` or `rnn2bin worker`, and where it says that it listens."""

    def __init__(self, command: str, home: Path, *options: str) -> None:
        self.words = [sys.executable, "-m", "rnn2bin", command, "--home", str(home), *options]
        self.errors = home.parent / f"{home.name}-{command}.log"
        self.start()

    def start(self) -> None:
        with self.errors.open("ab") as errors:
            self.running = subprocess.Popen(self.words, stdout=subprocess.PIPE, stderr=errors, text=True, env=quiet())
        assert self.running.stdout is not None
        said = self.running.stdout.readline()
        if not said:
            raise SystemExit(f"{' '.join(self.words[2:])} ended: {self.errors.read_text()[-2000:]}")
        self.url = said.split()[-1]

    def kill(self) -> None:
        self.running.kill()
        self.running.communicate()

    def stop(self, most: float = 20.0) -> float:
        """Seconds from SIGTERM to its end."""
        began = time.monotonic()
        self.running.send_signal(signal.SIGTERM)
        try:
            self.running.wait(most)
        except subprocess.TimeoutExpired:
            self.running.kill()
        took = time.monotonic() - began
        self.running.communicate()
        return took

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.running.poll() is None:
            self.stop()


def quiet() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rnn2bin-trial-", ignore_cleanup_errors=True) as path:
        yield Path(path)


@contextmanager
def postgres(at: Path) -> Iterator[str]:
    """A PostgreSQL of its own (Debian's package) on a free port, gone afterwards; its URL. FileNotFoundError where there is none."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not installed:
        raise FileNotFoundError("PostgreSQL is not installed: apt-get install postgresql")
    binaries, port, data = installed[-1].parent, free_port(), at / "pg"
    data.mkdir()
    os.chmod(at, 0o755)
    as_user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []  # it refuses to be root
    if as_user:
        shutil.chown(data, "postgres")
    run = lambda *words: subprocess.run([*as_user, *map(str, words)], check=True, capture_output=True, cwd=data)
    run(binaries / "initdb", "-D", data / "db", "-U", "rnn2bin", "-A", "trust", "-N")
    options = f"-p {port} -k {data} -c listen_addresses=127.0.0.1 -c fsync=off"
    run(binaries / "pg_ctl", "-D", data / "db", "-o", options, "-l", data / "log", "-w", "start")
    try:
        run(binaries / "createdb", "-h", "127.0.0.1", "-p", port, "-U", "rnn2bin", "jobs")
        yield f"postgresql://rnn2bin@127.0.0.1:{port}/jobs"
    finally:
        run(binaries / "pg_ctl", "-D", data / "db", "-m", "immediate", "stop")


def until_ended(service: Client, ids: list[str], *, seconds: float) -> list[Found]:
    """The jobs, when all have ended or the time is over."""
    end = time.monotonic() + seconds
    while True:
        jobs = [service.get(id) for id in ids]
        if all(job["state"] in ("done", "failed", "cancelled") for job in jobs) or time.monotonic() > end:
            return jobs
        time.sleep(0.5)


def flaws(service: Client, job: Found) -> list[str]:
    """What is not as it should be with a job that should have been done exactly once."""
    found = [] if job["state"] == "done" else [f"{job['id']}: {job['state']} {job['error'] and job['error']['detail']}"]
    events = list(service.events(job["id"]))
    if [event["id"] for event in events] != list(range(1, len(events) + 1)):
        found.append(f"{job['id']}: its events are not numbered 1, 2, 3, …")
    ends = [event["event"] for event in events if event["event"] in ("done", "failed", "cancelled")]
    if ends != ["done"]:
        found.append(f"{job['id']}: ended {ends}")
    return found


def weights(job: Found) -> str:
    return next((one["sha256"] for one in job["artifacts"] if one["name"] == "model.safetensors"), "none")


def kills(count: int, *, seed: int = 0, pauses: tuple[float, float] = (1.0, 18.0)) -> Found:
    """A server with a worker in it and a second worker; one of them is killed, or the server stopped, at random moments, and started again.

    All jobs ask for the same: each must be done, once, with the weights of the one that nobody disturbed.
    """
    draw, began = random.Random(seed), time.monotonic()
    with folder() as at:
        home, model = at / "home", write_model(at / "model.npz")
        port = str(free_port())
        with Process("serve", home, "--port", port) as server, Client(server.url, patience=120) as service:
            ask = lambda: service.convert(model, recipe="smoke", set=TINY)["id"]
            (undisturbed,) = until_ended(service, [ask()], seconds=300)
            with Process("worker", home) as worker:
                ids, done = [ask() for _ in range(4)], {"server killed": 0, "server restarted": 0, "worker killed": 0}
                for _ in range(count):
                    time.sleep(draw.uniform(*pauses))
                    what = draw.choice(list(done))
                    done[what] += 1
                    victim = worker if what == "worker killed" else server
                    victim.stop() if what == "server restarted" else victim.kill()
                    victim.start()
                    open_ = sum(service.get(id)["state"] in ("queued", "running") for id in ids[-8:])
                    ids += [ask() for _ in range(max(0, 4 - open_))]
                jobs = until_ended(service, ids, seconds=900)
                wrong = [flaw for job in jobs for flaw in flaws(service, job)]
                others = [job["id"] for job in jobs if weights(job) != weights(undisturbed)]
                starts = [sum(event["event"] == "started" for event in service.events(job["id"])) for job in jobs]
    return {
        "ok": not wrong and not others,
        **done,
        "jobs": len(jobs),
        "started more than once": sum(n > 1 for n in starts),
        "starts": sum(starts),
        "wrong": wrong,
        "other weights": others,
        "seconds": round(time.monotonic() - began),
        "seed": seed,
    }


def duplicates(count: int) -> Found:
    """The same request with the same key from many threads at once."""
    with folder() as at, Process("serve", at / "home", "--port", "0", "--no-worker") as server, Client(server.url) as service:
        body = {"model": service.upload(write_model(at / "model.npz"))["id"], "recipe": "smoke"}

        def ask(_: int) -> tuple[int, str]:
            with httpx.Client(base_url=server.url, timeout=60) as one:
                answer = one.post("/v1/conversions", json=body, headers={"Idempotency-Key": "the-same"})
            return answer.status_code, answer.json().get("id", answer.text)

        with concurrent.futures.ThreadPoolExecutor(count) as threads:
            answers = list(threads.map(ask, range(count)))
        listed = len(list(service.list()))
        other = service.http.post("/v1/conversions", json={**body, "recipe": "anneal"}, headers={"Idempotency-Key": "the-same"})
    statuses, ids = {status for status, _ in answers}, {id for _, id in answers}
    ok = statuses == {202} and len(ids) == listed == 1 and other.status_code == 422
    return {"ok": ok, "requests": count, "statuses": sorted(statuses), "jobs": listed, "another body": other.status_code}


Streams = list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]


async def open_streams(url: str, path: str, count: int) -> Streams:
    host, port = re.fullmatch(r"http://([\d.]+):(\d+)", url).groups()  # type: ignore[union-attr]
    found = []
    for _ in range(count):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n".encode())
        found.append((reader, writer))
    for reader, _ in found:
        await reader.readuntil(b"\r\n\r\n")
    return found


async def close(streams: Streams) -> None:
    for _, writer in streams:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


def shutdown(count: int) -> Found:
    """How long the service takes to end on SIGTERM while a conversion runs and streams are open."""
    with folder() as at, Process("serve", at / "home", "--port", "0") as server, Client(server.url) as service:
        job = service.convert(write_model(at / "model.npz"), recipe="smoke", set=LONG)
        for event in service.events(job["id"]):
            if event["event"] == "progress":
                break

        async def trial() -> tuple[float, int]:
            streams = await open_streams(server.url, f"/v1/conversions/{job['id']}/events", count)
            seconds = await asyncio.to_thread(server.stop)
            ended = 0
            for reader, _ in streams:
                with suppress(ConnectionError):
                    await asyncio.wait_for(reader.read(-1), 1)
                    ended += 1
            await close(streams)
            return seconds, ended

        seconds, ended = asyncio.run(trial())
        left = children_of(at / "home")
    return {"ok": seconds < 5 and not left, "seconds": round(seconds, 2), "streams": count, "ended": ended, "processes left": left}


def children_of(home: Path) -> int:
    """Processes of conversions that lie below `home`."""
    found = 0
    for one in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):
            found += str(one.readlink()).startswith(str(home))
    return found


def streams(count: int, *, requests: int = 300) -> Found:
    """Seconds of the page's own requests, one after another, while a conversion runs: without and with open event streams."""
    with folder() as at, Process("serve", at / "home", "--port", "0") as server, Client(server.url) as service:
        job = service.convert(write_model(at / "model.npz"), recipe="smoke", set=LONG)
        for event in service.events(job["id"]):
            if event["event"] == "progress":
                break
        paths = ["/", "/page/app.js", "/v1/conversions?limit=50", f"/v1/conversions/{job['id']}", "/v1/recipes"]

        async def timed() -> list[float]:
            seconds = []
            async with httpx.AsyncClient(base_url=server.url, timeout=30) as one:
                for number in range(requests):
                    began = time.perf_counter()
                    (await one.get(paths[number % len(paths)])).raise_for_status()
                    seconds.append(time.perf_counter() - began)
                    await asyncio.sleep(0.01)
            return sorted(seconds)

        async def trial() -> tuple[list[float], list[float], int]:
            alone = await timed()
            opened = await open_streams(server.url, f"/v1/conversions/{job['id']}/events", count)
            read = [0]

            async def listen(reader: asyncio.StreamReader) -> None:
                while content := await reader.read(65536):
                    read[0] += content.count(b"event: ")

            listening = [asyncio.create_task(listen(reader)) for reader, _ in opened]
            beside = await timed()
            for task in listening:
                task.cancel()
            await asyncio.gather(*listening, return_exceptions=True)
            await close(opened)
            return alone, beside, read[0]

        alone, beside, events = asyncio.run(trial())
    share = lambda seconds, part: round(1000 * seconds[int(part * len(seconds))], 1)
    figures = lambda seconds: {"p50 ms": share(seconds, 0.5), "p95 ms": share(seconds, 0.95), "max ms": round(1000 * seconds[-1], 1)}
    ok = beside[int(0.95 * len(beside))] < 0.1
    return {"ok": ok, "streams": count, "requests": requests, "without": figures(alone), "with": figures(beside), "events read": events,
            "mean ms": round(1000 * statistics.mean(beside), 1)}  # fmt: skip


def finished(service: Client, ids: list[str]) -> int:
    return sum(service.get(id)["state"] == "done" for id in ids)


def starters(service: Client, ids: list[str]) -> set[str]:
    """The workers that were the first to begin one of these jobs."""
    begun = [id for id in ids if service.get(id)["state"] != "queued"]
    return {next(event["data"]["worker"] for event in service.events(id) if event["event"] == "started") for id in begun}


def workers(count: int) -> Found:
    """Two workers that share nothing but a PostgreSQL take jobs; one is killed half way, and not started again."""
    began = time.monotonic()
    with folder() as at, postgres(at) as db:
        options = ("--db", db, "--lease", "4")
        with (
            Process("serve", at / "page", "--port", "0", "--no-worker", *options) as server,
            Process("worker", at / "one", *options) as first,
            Process("worker", at / "two", *options),
            Client(server.url) as service,
        ):
            model = write_model(at / "model.npz")
            ids = [service.convert(model, recipe="smoke", set=TINY)["id"] for _ in range(count)]
            # Of few jobs the one that dies may have ended none: what they share is who began them, so both have begun one by then.
            while (finished(service, ids) < count // 2 or len(starters(service, ids)) < 2) and time.monotonic() - began < 600:
                time.sleep(0.5)
            first.kill()
            at_death = finished(service, ids)
            jobs = until_ended(service, ids, seconds=900)
            wrong = [flaw for job in jobs for flaw in flaws(service, job)]
            same = len({weights(job) for job in jobs})
            by: dict[str, int] = {}
            again = 0
            for id in ids:
                starts = [event["data"]["worker"] for event in service.events(id) if event["event"] == "started"]
                by[starts[-1]] = by.get(starts[-1], 0) + 1
                again += len(starts) > 1
            both = len(starters(service, ids)) == 2
            whole = service.download(ids[0], at / "OUT").is_dir()
    ok = not wrong and same == 1 and both and whole
    return {"ok": ok, "jobs": count, "done by each": sorted(by.values()), "done at its death": at_death,
            "taken over": again, "wrong": wrong, "seconds": round(time.monotonic() - began)}  # fmt: skip


KNOWN = """[parameters]
"path.id" = "{id}"

[[operations]]
include-name = "DELETE /v1/conversions/{{id}}"
enabled = false
"""  # schemathesis.toml of every second run: ids that exist reach what lies behind the look-up


def fuzz(count: int, *, seed: int = 1, examples: int = 200) -> Found:
    """Schemathesis until the service has answered so many requests; how many with 5xx."""
    began, runs, said = time.monotonic(), 0, ""
    with folder() as at, Process("serve", at / "home", "--port", "0", "--no-worker") as server, Client(server.url) as service:
        model = write_model(at / "model.npz")
        answers: dict[str, int] = {}
        while sum(answers.values()) < count and runs < 60 and not any(status.startswith("5") for status in answers):
            job = service.cancel(service.convert(model, recipe="smoke")["id"])
            (at / "schemathesis.toml").write_text(KNOWN.format(id=job["id"]) if runs % 2 else "")
            words = [str(Path(sys.executable).parent / "schemathesis"), "run", f"{server.url}/openapi.json"]
            words += ["--checks", "not_a_server_error", "--max-examples", str(examples), "--seed", str(seed + runs)]
            words += ["--request-timeout", "3", "--workers", "2", "--no-color", "--suppress-health-check", "all", "--continue-on-failure"]
            said = subprocess.run(words, capture_output=True, text=True, env=quiet(), cwd=at, timeout=1800).stdout[-3000:]
            runs += 1
            answers = answered(service.http.get("/metrics").text)
        errors = server.errors.read_text()[-3000:]
    failed = {status: n for status, n in answers.items() if status.startswith("5")}
    ok = not failed and sum(answers.values()) >= count
    found = {"ok": ok, "requests": sum(answers.values()), "by status": answers, "5xx": failed, "runs": runs, "seed": seed}
    return {**found, "seconds": round(time.monotonic() - began), **({} if ok else {"said": said, "errors": errors})}


def answered(metrics: str) -> dict[str, int]:
    """Status -> answers, of the service's own count."""
    found: dict[str, int] = {}
    for status, number in re.findall(r'^rnn2bin_http_requests_total{.*status="(\d+)"} ([\d.e+]+)$', metrics, re.M):
        found[status] = found.get(status, 0) + int(float(number))
    return dict(sorted(found.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", choices=["kills", "duplicates", "shutdown", "streams", "workers", "fuzz"])
    parser.add_argument("count", type=int)
    asked = parser.parse_args()
    found: Found = globals()[asked.trial](asked.count)
    print(json.dumps(found, indent=2, ensure_ascii=False))
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
