"""Small networks and data, the same for every test: odd sizes, random weights, fixed seeds. torch is imported by the tests that need it."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
# A shell that starts the tests in the background has them ignore SIGINT, and all their children: what is tested is what a terminal sees.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Both go by the clock on the wall, which says nothing where other jobs run.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

VOCABULARY, EMBEDDED, WIDTH, HIDDEN, CLASSES = 11, 5, 3, 7, 4

Save = Callable[..., Path]


def state_dict(
    *, cell: str = "LSTM", tokens: bool = False, outputs: int = CLASSES, layers: int = 1, both: bool = False, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Embedding (where `tokens`), one recurrent stack and a linear head, as PyTorch names them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: dict[str, torch.nn.Module] = {"embedding": torch.nn.Embedding(VOCABULARY, EMBEDDED)} if tokens else {}
        parts["rnn"] = getattr(torch.nn, cell)(EMBEDDED if tokens else WIDTH, HIDDEN, layers, bidirectional=both)
        parts["head"] = torch.nn.Linear(HIDDEN * (1 + both), outputs)
        return torch.nn.ModuleDict(parts).state_dict()


@pytest.fixture(scope="module", autouse=True)
def collected() -> None:
    """The Trainer collects garbage each time it starts, Python now and then: what the libraries and all tests hold is not looked through
    again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def save_model(tmp_path: Path) -> Save:
    """`save_model("m.pt", tokens=True, …)` writes a state dict and gives its path; options as of `state_dict`."""

    def save(name: str = "model.pt", **options: Any) -> Path:
        torch.save(state_dict(**options), tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def save_data(tmp_path: Path) -> Save:
    """`save_data("d.npz", targets=…, n=40, steps=9)` writes float or token inputs, and what else is given, and gives its path."""

    def save(name: str = "data.npz", *, n: int = 40, steps: int = 9, tokens: bool = False, seed: int = 0, **arrays: Any) -> Path:
        random = np.random.default_rng(seed)
        inputs = random.integers(0, VOCABULARY, (n, steps)) if tokens else random.normal(size=(n, steps, WIDTH)).astype(np.float32)
        np.savez(tmp_path / name, **{"inputs": inputs, **arrays})
        return tmp_path / name

    return save
