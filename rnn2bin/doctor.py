"""`rnn2bin doctor`: what this machine offers, and a tiny real conversion from a file to outputs."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from rnn2bin.machine import Findings, cpu, kernels, threads, versions
from rnn2bin.runtime import library

COMPILERS = ("cc", "gcc", "clang")
VOCABULARY, WIDTH, HIDDEN, SEQUENCES, STEPS = 13, 7, 17, 8, 11  # odd, so that rows lie unaligned


def examine() -> Findings:
    """Everything `render` shows, as plain data. `conversion` is {ok, seconds, error}; nothing is raised for what does not work."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "cpu": cpu(),
        "threads": threads(),
        "kernels": kernels(),
        "runtime": library.isa(),
        "devices": devices(),
        "compiler": next((found for name in (os.environ.get("CC"), *COMPILERS) if name and (found := shutil.which(name))), None),
        "disk": {"at": str(Path.cwd()), "free_bytes": shutil.disk_usage(Path.cwd()).free},
        "conversion": conversion(),
    }


def devices() -> list[str]:
    """What torch can run on: cpu first."""
    import torch

    found = ["cpu"]
    if torch.cuda.is_available():
        found += [f"cuda:{k} {torch.cuda.get_device_name(k)}" for k in range(torch.cuda.device_count())]
    return found + (["mps"] if torch.backends.mps.is_available() else [])


def conversion() -> Findings:
    """A small network with random weights through the whole way, and the result run both ways."""
    began = time.perf_counter()
    error = None
    try:
        with tempfile.TemporaryDirectory(prefix="rnn2bin-doctor-") as folder:
            error = _convert_and_run(Path(folder))
    except Exception as problem:  # whatever it is, the user is to see it beside the versions
        error = f"{type(problem).__name__}: {problem}"
    return {"ok": error is None, "seconds": round(time.perf_counter() - began, 2), "error": error}


def _convert_and_run(folder: Path) -> str | None:
    """None, or what differs. A token-in, token-out LSTM needs no data: its own sequences train it."""
    import torch

    from rnn2bin import pipeline, runtime

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = {
            "embedding": torch.nn.Embedding(VOCABULARY, WIDTH),
            "lstm": torch.nn.LSTM(WIDTH, HIDDEN),
            "head": torch.nn.Linear(HIDDEN, VOCABULARY),
        }
        network = torch.nn.ModuleDict(parts)
        torch.save(network.state_dict(), folder / "model.pt")
        pipeline.convert(folder / "model.pt", recipe="smoke.yaml", out=folder / "out")
        model = runtime.load(folder / "out")
        sequences = torch.randint(VOCABULARY, (SEQUENCES, STEPS, 1))
    found = [(model(tokens)[0][:, 0], _streamed(model, tokens[:, 0])) for tokens in sequences]
    whole, steps = (torch.stack(pair) for pair in zip(*found, strict=True))
    if not bool(torch.isfinite(whole).all()):
        return "the converted network's outputs are not finite"
    different = int((whole != steps).any(-1).sum())
    return f"a call and a stream differ in {different} of {SEQUENCES * STEPS} steps" if different else None


def _streamed(model: Any, tokens: Any) -> Any:
    import torch

    stream = model.stream()
    return torch.stack([stream.step(token) for token in tokens])


def _kernel_row(found: Findings) -> str:
    if found["isa"] is None:
        return "not compiled: training runs in torch, several times slower; install again with a C compiler"
    return f"{found['isa']}, bfloat16 products {'on' if found['bfloat16'] else 'not in this processor'}"


def render(found: Findings) -> str:
    """The findings for people."""
    chip, done = found["cpu"], found["conversion"]
    outcome = f"works, {done['seconds']:.1f} s" if done["ok"] else f"FAILED after {done['seconds']:.1f} s: {done['error']}"
    rows = [
        *((name, number or "not installed") for name, number in found["versions"].items()),
        ("platform", found["platform"]),
        ("cpu", f"{chip['model']} ({chip['machine']}, {chip['cores']} cores)"),
        ("isa", " ".join(chip["isa"]) or "unknown"),
        ("threads", f"{found['threads']['torch']} (torch)"),
        ("kernels", _kernel_row(found["kernels"])),
        ("runtime", found["runtime"] or "not compiled: packed networks run on torch, which skips nothing; install again with a C compiler"),
        ("devices", ", ".join(found["devices"])),
        ("compiler", found["compiler"] or "none on PATH (needed to install the training kernels and for the C runtime)"),
        ("disk", f"{found['disk']['free_bytes'] / 1e9:.1f} GB free at {found['disk']['at']}"),
        ("convert", f"a tiny network, from file to outputs: {outcome}"),
    ]
    return "\n".join(f"{name:13} {value}" for name, value in rows)
