"""Runs the command line in forked children and makes a disk fail, or kills them, at a counted operation.

As a program it is a server: torch is imported once, each request (one JSON line) is answered by a fork of it. A child counts what it does
to the file system below its folder: opening for writing, writing, fsync, rename, exchange, mkdir, unlink, rmdir, and each file that torch
or safetensors write natively. A request may name the operation `at` which something happens:

- kill: SIGKILL; a native write has then written half of its file
- error: the operation fails once, with ENOSPC or EIO; a native write really fails, by RLIMIT_FSIZE
- fill: a ballast file leaves `left` bytes on the file system, for good

`limit`: RLIMIT_FSIZE for the whole run. `after`: SIGKILL from outside after so many seconds.
"""

from __future__ import annotations

import builtins
import errno
import gc
import io
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "fsync")
HALF = 500  # bytes after which a native write fails: less than any of them needs


class Counter:
    """Sees every operation before it happens; at number `at` it acts. `seen` names them all."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.root, self.at, self.kind = request["cwd"], request.get("at"), request.get("kind")
        self.left, self.seen = request.get("left", 0), list[str]()

    def step(self, what: str, path: Any) -> None:
        if self._now(what, path):
            if self.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.kind == "error":
                code = (errno.ENOSPC, errno.EIO)[self.at % 2]
                raise OSError(code, os.strerror(code), str(path))
            self.fill()

    def native(self, what: str, path: Any, write: Callable[[], Any]) -> Any:
        """A write that Python does not see: it is torn before the process dies, or the system refuses its end."""
        acts = self._now(what, path)
        if acts and self.kind == "error":
            resource.setrlimit(resource.RLIMIT_FSIZE, (HALF, resource.RLIM_INFINITY))
            try:
                return write()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if acts and self.kind == "fill":
            self.fill()
        found = write()
        if acts and self.kind == "kill":
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    def fill(self) -> None:
        free = os.statvfs(self.root)
        with io.FileIO(os.path.join(self.root, "ballast"), "w") as stream:
            os.posix_fallocate(stream.fileno(), 0, max(1, free.f_bavail * free.f_frsize - self.left))

    def _now(self, what: str, path: Any) -> bool:
        name = os.path.basename(os.fspath(path)) if isinstance(path, str | os.PathLike) else ""
        self.seen.append(f"{what} {name}".strip())
        return len(self.seen) == self.at


def watch(counter: Counter) -> None:
    """Puts the counter before everything that writes. Never undone: this is a child."""
    import safetensors.torch
    import torch

    from rnn2bin import storage

    def counted(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            # A descriptor names what it belongs to.
            where = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else path
            counter.step(name, where)
            return plain(path, *args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, counted(name, getattr(os, name)))
    storage._exchange = counted("exchange", storage._exchange)
    plain_open = io.open

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        ours = isinstance(file, str | os.PathLike) and os.path.abspath(file).startswith(counter.root)
        if not ours or not set(mode) & set("wxa+"):
            return plain_open(file, mode, *args, **kwargs)
        counter.step("open", file)
        stream = plain_open(file, mode, *args, **kwargs)
        plain_write = stream.write

        def write(content: Any) -> int:
            counter.step("write", file)
            return plain_write(content)

        stream.write = write
        return stream

    io.open = builtins.open = opened
    plain_save, plain_serialize = torch.save, safetensors.torch.serialize_file
    torch.save = lambda obj, f, *a, **k: counter.native("torch.save", f, lambda: plain_save(obj, f, *a, **k))
    safetensors.torch.serialize_file = lambda tensors, f, *a, **k: counter.native(
        "safetensors", f, lambda: plain_serialize(tensors, f, *a, **k)
    )


def child(request: dict[str, Any], counted: int) -> None:
    from rnn2bin.cli import main

    os.chdir(request["cwd"])
    if request.get("limit") is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], resource.RLIM_INFINITY))
    counter = Counter(request)
    watch(counter)
    code: Any = 0
    try:
        main(request["args"], prog_name="rnn2bin")
    except SystemExit as stop:
        code = stop.code
    os.write(counted, json.dumps(counter.seen).encode())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def fork(request: dict[str, Any]) -> dict[str, Any]:
    """One request in a child. `code` is the exit code, or minus the signal's number."""
    pipes = [os.pipe() for _ in range(3)]
    began = time.perf_counter()
    pid = os.fork()
    if not pid:
        os.dup2(pipes[0][1], 1)
        os.dup2(pipes[1][1], 2)
        try:
            child(request, pipes[2][1])
        except BaseException:  # a bug, or a signal where nobody listens: what the interpreter would say
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            sys.stderr.flush()
        os._exit(1)
    for _, end in pipes:
        os.close(end)
    texts = _drain([end for end, _ in pipes], pid, began + request["after"] if request.get("after") else None)
    _, status = os.waitpid(pid, 0)
    seconds = time.perf_counter() - began
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "out": texts[0], "err": texts[1], "seen": json.loads(texts[2] or "[]"), "seconds": seconds}


def _drain(ends: list[int], pid: int, kill_at: float | None) -> list[str]:
    """All that comes through the pipes until they close; the child is killed when its time is over."""
    texts = dict.fromkeys(ends, b"")
    while ends:
        wait = None if kill_at is None else max(0.0, kill_at - time.perf_counter())
        ready, _, _ = select.select(ends, [], [], wait)
        if not ready and kill_at is not None:
            os.kill(pid, signal.SIGKILL)
            kill_at = None
        for end in ready:
            piece = os.read(end, 1 << 16)
            texts[end] += piece
            if not piece:
                os.close(end)
                ends = [e for e in ends if e != end]
    return [text.decode() for text in texts.values()]


class Server:
    """The other side: `with Server() as run: run(["convert", …], cwd=folder, at=17, kind="kill")`."""

    def __enter__(self) -> Server:
        import rnn2bin

        path = os.pathsep.join([str(Path(rnn2bin.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        return self

    def __call__(self, args: list[Any], *, cwd: Path, **fault: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = {"args": [str(a) for a in args], "cwd": str(cwd), **fault}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=30)


def serve() -> None:
    import torch

    torch.set_num_threads(1)
    from rnn2bin import doctor

    doctor.conversion()  # everything that is imported late
    gc.freeze()  # the Trainer collects garbage: in a child there is little to look through
    for line in sys.stdin:
        print(json.dumps(fork(json.loads(line))), flush=True)


if __name__ == "__main__":
    serve()
