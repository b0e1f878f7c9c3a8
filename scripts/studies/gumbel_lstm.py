"""Gumbel LSTM: English words at character level by an LSTM trained from nothing, its gates float, or binary {i, f} or {i, f, o}.

    python scripts/studies/gumbel_lstm.py                # one night on two cores
    python scripts/studies/gumbel_lstm.py --quick        # a minute

Words are those of Debian's wamerican in small letters alone; a tenth is held out to choose the checkpoint by, a tenth to report. Binary
gates have strict levels (0 and 1) and one decision each; the checkpoint is chosen by the metric with bits. Temperatures fall with progress.
"""

from __future__ import annotations

import copy
import functools
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common import Column, Numbers, Results, Study, over_examples, points, run
from torch import Tensor, nn
from torch.nn import functional

from rnn2bin import student
from rnn2bin.cells.network import Network, Output
from rnn2bin.distill.window import run_cell
from rnn2bin.gates.estimators import BINARY, FLOAT, Discretize
from rnn2bin.recipe import parse
from rnn2bin.spec import EmbeddingSpec, LayerSpec, LinearSpec, RnnSpec, SectionSpec

DICTIONARY = Path("/usr/share/dict/american-english")
END = 26  # the end of a word, and what stands before its first letter
LOG = lambda end: lambda at: end**at
FIXED = lambda value: lambda at: value
GUMBEL, STRAIGHT = Discretize("gumbel"), Discretize("straight-through", backward="sigmoid")
ROWS = {  # gates left soft, estimator, temperature of progress
    "float": (None, FLOAT, FIXED(1.0)),
    "{i, f}, Gumbel, τ 1 → 0.01": (["o"], GUMBEL, LOG(0.01)),
    "{i, f}, Gumbel on a fifth, τ 0.9": (["o"], replace(GUMBEL, noise=0.2), FIXED(0.9)),
    "{i, f, o}, Gumbel, τ 1 → 0.01": ([], GUMBEL, LOG(0.01)),
    "{i, f, o}, Gumbel, τ 1 → 0.5": ([], GUMBEL, LOG(0.5)),
    "{i, f, o}, Gumbel, τ 0.9": ([], GUMBEL, FIXED(0.9)),
    "{i, f, o}, Gumbel hard, τ 1 → 0.5": ([], replace(GUMBEL, estimator="gumbel-hard"), LOG(0.5)),
    "{i, f, o}, straight-through": ([], STRAIGHT, FIXED(1.0)),
}
QUICK = ("float", "{i, f}, Gumbel, τ 1 → 0.01", "{i, f, o}, Gumbel, τ 1 → 0.01")


@dataclass(frozen=True)
class Size:
    steps: int
    batch_size: int
    hidden: int
    words: int
    seeds: int


SIZES = {"quick": Size(40, 32, 32, 2000, 1), "full": Size(20_000, 64, 256, 1_000_000, 5)}


@functools.cache
def words(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(train, valid, test), each (L,N): letters as 0…25, END behind a word and at pads."""
    if not DICTIONARY.exists():
        raise SystemExit(f"{DICTIONARY} is not there; apt-get install wamerican")
    found = [w for w in DICTIONARY.read_text(encoding="utf-8").split() if re.fullmatch("[a-z]{2,15}", w)]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:count]
    tokens = torch.full((16, len(order)), END)
    for n, index in enumerate(order.tolist()):
        tokens[: len(found[index]), n] = torch.tensor([ord(c) - 97 for c in found[index]])
    tenth = len(order) // 10
    return tokens[:, 2 * tenth :], tokens[:, :tenth], tokens[:, tenth : 2 * tenth]


def network(soft: list[str] | None, size: Size) -> Network:
    section = SectionSpec((LayerSpec("lstm", 32, size.hidden),), EmbeddingSpec(27, 32), (LinearSpec(size.hidden, 27),))
    float_ = Network(RnnSpec({"main": section}))
    bound = size.hidden**-0.5
    for name, p in float_.named_parameters():
        nn.init.normal_(p) if "embedding" in name else nn.init.uniform_(p, -bound, bound)
    if soft is None:
        return float_
    return student.student(float_, parse({"gates": {"soft": soft, "levels": "strict"}}).gates)


def outputs(net: Network, tokens: Tensor, mode: Discretize) -> tuple[Output, Tensor, Tensor]:
    """(output, targets, what counts) of words (L,B)."""
    before = torch.cat([torch.full_like(tokens[:1], END), tokens[:-1]])
    counts = (before != END) | (torch.arange(len(tokens)) == 0).unsqueeze(1)
    return net(before, mode=mode, walk=run_cell, logits=True), tokens, counts


def nats(net: Network, tokens: Tensor, mode: Discretize) -> Tensor:
    """Mean over letters and ends of words."""
    out, targets, counts = outputs(net, tokens, mode)
    each = functional.cross_entropy(out.y.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    return (each * counts).sum() / counts.sum()


def spread(net: Network, tokens: Tensor, mode: Discretize) -> float:
    """Half the 95% interval of `nats` over words: of a ratio of sums, linearized."""
    out, targets, counts = outputs(net, tokens, mode)
    each = functional.cross_entropy(out.y.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    mean = (each * counts).sum() / counts.sum()
    return over_examples(((each - mean) * counts).sum(0) / counts.sum(0).float().mean())


@torch.no_grad()
def spoken(net: Network, mode: Discretize, *, seed: int, count: int = 12) -> list[str]:
    """Words drawn from the network."""
    generator = torch.Generator().manual_seed(seed)
    last, state, found = torch.full((1, count), END), None, [""] * count
    done = [False] * count
    for _ in range(20):
        out = net(last, state, mode=mode, walk=run_cell, logits=True)
        last, state = torch.multinomial(out.y[0].softmax(1), 1, generator=generator).t(), out.state
        for n, letter in enumerate(last[0].tolist()):
            done[n] = done[n] or letter == END
            found[n] += "" if done[n] else chr(97 + letter)
    return found


def measure(row: str, seed: int, size: Size) -> Numbers:
    soft, estimator, temperature = ROWS[row]
    train, valid, test = words(size.words)
    net = network(soft, size)
    hard, quiet = (FLOAT, FLOAT) if soft is None else (BINARY, Discretize("sigmoid"))
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, size.steps, 1e-4)
    generator = torch.Generator().manual_seed(seed)
    best, kept, best_at = math.inf, net.state_dict(), 0.0
    for step in range(size.steps):
        at = step / size.steps
        mode = replace(estimator, temperature=temperature(at), generator=generator)
        index = torch.randint(train.shape[1], (size.batch_size,), generator=generator)
        loss = nats(net, train[:, index], mode)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, size.steps // 20) == 0:
            with torch.no_grad():
                found = float(nats(net, valid[:, :2000], hard))
            if found < best:
                best, kept, best_at = found, copy.deepcopy(net.state_dict()), (step + 1) / size.steps
    last = temperature(best_at)
    with torch.no_grad():
        final = float(nats(net, test, hard))
        net.load_state_dict(kept)
        numbers: Numbers = {"nats": float(nats(net, test, hard)), "nats_half": spread(net, test, hard)}
        numbers |= {"final": final, "best_at": 100 * best_at}
        if soft is not None:
            numbers["soft"] = float(nats(net, test, replace(quiet, temperature=last)))
    if seed == 0:
        numbers["words"] = " ".join(spoken(net, hard, seed=1))  # type: ignore[assignment]
    return numbers


def plot(results: Results, path: Path) -> None:
    points(results, path, column="nats", label="nats per letter on held-out words, gates as bits (the float row: as sigmoids)")


def drawn(results: Results, out: Path) -> None:
    """Words drawn from each network, for the page."""
    lines = [f"- {row}: {runs['0']['words']}" for row, runs in results.runs.items() if "words" in runs.get("0", {})]
    (out / "gumbel_lstm_words.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


STUDY = Study(
    name="gumbel_lstm",
    title="Gumbel LSTM: words at character level",
    columns=(
        Column("nats", "nats per letter, bits", 3),
        Column("soft", "soft gates", 3),
        Column("final", "at the last step", 3),
        Column("best_at", "best at % of the run", 0, interval=False),
        Column("seconds", "s", 0, interval=False),
    ),
    variants=lambda size: list(ROWS) if size != SIZES["quick"] else QUICK,
    measure=measure,
    sizes=SIZES,
    plot=plot,
    finish=drawn,
)

if __name__ == "__main__":
    run(STUDY)
