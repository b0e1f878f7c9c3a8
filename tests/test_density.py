"""Density against a walk over every weight of a tiny network that asks of each whether the step must touch it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rnn2bin import tasks
from rnn2bin.cells.network import Network
from rnn2bin.data import Batch
from rnn2bin.evaluation.density import DensityCounter
from rnn2bin.spec import EmbeddingSpec, LayerSpec, LinearSpec, RnnSpec, SectionSpec

T, B, I, H = 5, 3, 3, 5  # noqa: E741
LENGTHS = torch.tensor([5, 2, 4])
CASES = {
    "lstm": {"cell": "lstm"},
    "lstm-bi": {"cell": "lstm", "directions": 2},
    "lstm-projection": {"cell": "lstm", "proj_size": 3},
    "lstm-projection-bi": {"cell": "lstm", "proj_size": 3, "directions": 2},
    "gru": {"cell": "gru"},
    "gru-bi": {"cell": "gru", "directions": 2},
    "gru_output": {"cell": "gru_output"},
    "gru_output-copies-bi": {"cell": "gru_output", "copies": 3, "directions": 2},
    "gru_reset_before": {"cell": "gru_reset_before"},
    "gru_reset_before-bi": {"cell": "gru_reset_before", "directions": 2},
    "lstm-copies": {"cell": "lstm", "copies": 3},
    "lstm-projection-copies": {"cell": "lstm", "proj_size": 3, "copies": 2},
    "gru-copies": {"cell": "gru", "copies": 2},
    "gru-copies-bi": {"cell": "gru", "copies": 3, "directions": 2},
    "gru_reset_before-copies": {"cell": "gru_reset_before", "copies": 2},
    "lstm-shared": {"cell": "lstm", "shared": 2, "copies": 2},
    "lstm-shared-projection-bi": {"cell": "lstm", "shared": 3, "proj_size": 3, "directions": 2},
    "gru-shared": {"cell": "gru", "shared": 2},
    "gru_output-shared-copies": {"cell": "gru_output", "shared": 5, "copies": 2},
    "lstm_peephole": {"cell": "lstm_peephole"},
    "lstm_peephole-projection-copies": {"cell": "lstm_peephole", "proj_size": 3, "copies": 2},
    "lstm_coupled-bi": {"cell": "lstm_coupled", "directions": 2},
    "lstm_coupled-projection": {"cell": "lstm_coupled", "proj_size": 3},
    "lstm_coupled_peephole-copies": {"cell": "lstm_coupled_peephole", "copies": 3},
}


def network_of(
    cell: str,
    *,
    directions: int = 1,
    proj_size: int = 0,
    copies: int = 1,
    shared: int = 1,
    tokens: bool = False,
    soft: int | None = None,
    readout: str = "all",
) -> Network:
    """Two layers and two linear ones; `soft`: the gate left a sigmoid."""
    first = LayerSpec(cell, I, H, directions, proj_size, copies, shared=shared, shared_inputs=1 if tokens else shared)
    second = LayerSpec(cell, first.output_size, H, directions, proj_size, copies, shared=shared, shared_inputs=shared)
    head = (LinearSpec(second.output_size, 4, activation="relu"), LinearSpec(4, 2))
    spec = RnnSpec({"main": SectionSpec((first, second), EmbeddingSpec(6, I) if tokens else None, head, readout)})
    plan = {name: tuple(k != soft for k in range(len(layer.kind.gates))) for name, layer in spec.cell_names()}
    network = Network(spec, plan)
    with torch.no_grad():
        for seed, p in enumerate(network.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
        for cell_ in network.cells().values():
            cell_.levels.lo.zero_()
            cell_.levels.hi.fill_(1.0)
    return network.requires_grad_(False)


def inputs_of(network: Network) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    if network.spec.main.embedding:
        return torch.randint(6, (T, B), generator=generator)
    x = torch.randn(T, B, I, generator=generator)
    return x * (torch.rand(T, B, I, generator=generator) < 0.7)  # zeros in the input save their columns


def counted(network: Network, *, lengths: torch.Tensor | None) -> tuple[DensityCounter, Any]:
    x = inputs_of(network)
    batch = Batch(x, lengths, None, None)
    task = tasks.Task("match", "cosine", network.spec)
    prepared = tasks.prepare(task, batch, network)
    out = network(x, lengths=lengths)
    counter = DensityCounter(network)
    counter.add(prepared, out)
    return counter, out


def brute_force(network: Network, out: Any, lengths: torch.Tensor | None) -> dict[str, int]:
    """Every weight of every real step of every sequence: must it be read? Written from the equations, not from the counter."""
    total = {"touched": 0, "dense": 0, "recurrent": 0, "recurrent_dense": 0, "rows": 0, "rows_dense": 0}

    def count(must: bool, *, recurrent: bool = False, added: bool = False) -> None:
        total["touched"] += must
        total["dense"] += not added  # an output gate that the float GRU had not
        total["recurrent"] += must and recurrent
        total["recurrent_dense"] += recurrent and not added

    main, x = network.spec.main, inputs_of(network)
    pres = iter(out.pre)
    below = None if main.embedding else x
    for index, layer in enumerate(main.layers):
        for direction in ("fwd", "bwd")[: layer.directions]:
            pre = next(pres)
            binary = network.cells()[f"main.layers.{index}.{direction}"].binary
            for b in range(B):
                steps = T if lengths is None else int(lengths[b])
                for t in range(steps):
                    at = steps - 1 - t if direction == "bwd" else t
                    # one(g, j, c): may the gate of copy c be open? A soft gate always is. bit(g, j): any copy's?
                    one = lambda g, j, c, t=t, b=b, pre=pre, binary=binary: not binary[g] or bool(pre[t, b, g, c * H + j] > 0)
                    n = layer.copies
                    bit = lambda g, j, n=n, one=one: any(one(g, j, c) for c in range(n))
                    before = lambda g, j, t=t, n=n, one=one: t > 0 and any(one(g, j, c, t=t - 1) for c in range(n))
                    lstm, o = layer.cell.startswith("lstm"), len(binary) - 1
                    moves = lambda j, c, one=one, binary=binary: not binary[1] or not one(1, j, c)
                    keeps = lambda j, n=n, moves=moves: not any(moves(j, c) for c in range(n))
                    looks = lambda j, n=n, moves=moves, one=one: any(moves(j, c) and one(0, j, c) for c in range(n))
                    # Of a gate's H rows that a float network reads, as many are there as units share them in.
                    own, asked = layer.gate_rows(layer.shared), layer.gate_rows(layer.shared_inputs)
                    admits = [bit(0, j) if lstm else not keeps(j) for j in range(H)]
                    total["rows"] += sum(admits)
                    total["rows_dense"] += H
                    for k in range(layer.input_size if below is not None else 0):
                        for row in range(len(binary) * H):
                            count(bool(below[at, b, k] != 0) and row % H < asked, added=layer.cell == "gru_output" and row >= o * H)
                        for j in range(H):
                            count(admits[j] and bool(below[at, b, k] != 0))
                    for k in range(layer.recurrent_size):
                        if lstm or layer.cell == "gru_output":
                            there = t > 0 if layer.proj_size else before(o, k)
                        else:
                            there = t > 0
                        for row in range(len(binary) * H):
                            count(there and row % H < own, recurrent=True, added=layer.cell == "gru_output" and row >= o * H)
                        for j in range(H):
                            reads = True if lstm else looks(j) if layer.cell in ("gru", "gru_output") else bit(0, k)
                            count(admits[j] and there and reads, recurrent=True)
                    for j in range(H if layer.proj_size else 0):
                        for _ in range(layer.proj_size):
                            count(bit(o, j))
        below = out.hidden[index]
    if main.readout == "all":
        for b in range(B):
            for t in range(T if lengths is None else int(lengths[b])):
                for k in range(below.shape[2]):
                    for _ in range(4):
                        count(bool(below[t, b, k] != 0))
                for _ in range(4 * 2):
                    count(True)
    return total


@pytest.mark.parametrize("ragged", [False, True], ids=["whole", "lengths"])
@pytest.mark.parametrize("tokens", [False, True], ids=["floats", "tokens"])
@pytest.mark.parametrize("name", CASES)
def test_counts_equal_a_walk_over_every_weight(name, tokens, ragged):
    network = network_of(**CASES[name], tokens=tokens)
    lengths = LENGTHS if ragged else None
    counter, out = counted(network, lengths=lengths)
    total, result = brute_force(network, out, lengths), counter.result()
    assert 0 < total["touched"] < total["dense"]
    assert result["weights_touched"] == pytest.approx(total["touched"] / total["dense"])
    assert result["recurrent"] == pytest.approx(total["recurrent"] / total["recurrent_dense"])
    assert result["candidate_rows"] == pytest.approx(total["rows"] / total["rows_dense"])
    steps = int(lengths.sum()) if lengths is not None else T * B
    assert result["bytes_per_step"] == pytest.approx(2 * total["touched"] / steps)
    assert result["dense_bytes_per_step"] == pytest.approx(2 * total["dense"] / steps)


@pytest.mark.parametrize("soft", [0, 1, 2])
@pytest.mark.parametrize(
    "name", ["lstm", "lstm-projection", "gru", "gru_reset_before", "gru-copies", "lstm-copies", "lstm_peephole", "lstm_coupled-projection"]
)
def test_a_soft_gate_saves_nothing(name, soft):
    if soft == 2 and ("gru" in name or "coupled" in name):
        soft = 0
    network = network_of(**CASES[name], soft=soft)
    counter, out = counted(network, lengths=LENGTHS)
    total = brute_force(network, out, LENGTHS)
    assert counter.result()["weights_touched"] == pytest.approx(total["touched"] / total["dense"])


@pytest.mark.parametrize("name", ["lstm", "gru", "gru_reset_before", "lstm_peephole", "lstm_coupled_peephole-copies"])
def test_what_is_not_counted_is_really_not_read(name):
    """Columns of h that are counted as skipped are exactly zero; units counted as kept are unchanged."""
    network = network_of(**CASES[name])
    _, out = counted(network, lengths=None)
    for pre, h in zip(out.pre, out.hidden, strict=True):
        if name.startswith("lstm"):
            closed = (pre[:, :, -1].unflatten(-1, (-1, H)) <= 0).all(-2)
            assert (h[closed] == 0).all()
        else:
            kept = pre[1:, :, 1] > 0
            assert torch.equal(h[1:][kept], h[:-1][kept])


def test_open_rates_are_shares_of_ones_over_real_steps():
    network = network_of("lstm", directions=2)
    counter, out = counted(network, lengths=LENGTHS)
    for name, pre in zip(network.cells(), out.pre, strict=True):
        real = torch.cat([pre[:steps, b] for b, steps in enumerate(LENGTHS.tolist())])
        assert counter.open_rate(name) == pytest.approx((real > 0).float().mean((0, 2)).tolist())


def test_batches_add_up():
    network = network_of("gru")
    counter, out = counted(network, lengths=LENGTHS)
    once = counter.result()
    prepared = tasks.prepare(tasks.Task("match", "cosine", network.spec), Batch(inputs_of(network), LENGTHS, None, None), network)
    counter.add(prepared, out)
    twice = counter.result()
    assert twice.pop("layers").keys() == once.pop("layers").keys() == {*network.cells(), "main"}
    assert twice == pytest.approx(once)


def test_a_network_that_never_closes_a_gate_touches_everything_but_the_zero_start():
    network = network_of("lstm")
    with torch.no_grad():
        for cell in network.cells().values():
            cell.get_submodule("gates").bias.fill_(1e3)
    counter, _ = counted(network, lengths=None)
    assert counter.result()["candidate_rows"] == 1
    assert counter.result()["columns"] == pytest.approx((T - 1) / T)
    assert counter.result()["recurrent"] == pytest.approx((T - 1) / T)


def test_incremental_counts_changed_columns_of_gates_alone():
    network = network_of("gru", tokens=True, readout="last")
    counter, out = counted(network, lengths=None)
    touched = dense = 0
    for pre in out.pre:
        update, read = pre[:, :, 1] <= 0, pre[:, :, 0] > 0
        for t in range(T):
            for b in range(B):
                changed = int(update[t - 1, b].sum()) if t else 0
                touched += 2 * H * changed + (H * int((update[t, b] & read[t, b]).sum()) if t else 0)
                dense += 3 * H * H
    # The second layer also reads the first one's output.
    second, below = out.pre[1], out.hidden[0]
    for t in range(T):
        for b in range(B):
            touched += (2 * H + int((second[t, b, 1] <= 0).sum())) * int((below[t, b] != 0).sum())
            dense += 3 * H * H
    assert counter.result()["incremental"] == pytest.approx(touched / dense)


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before", "lstm_coupled"])
def test_a_window_that_continues_counts_its_first_step_as_dense(cell):
    """What the step before left open is not in the batch: the count may be too high there, never too low."""
    network = network_of(cell)
    x = inputs_of(network)
    columns = []
    for first in (True, False):
        batch = Batch(x, None, None, None, first=first)
        prepared = tasks.prepare(tasks.Task("match", "cosine", network.spec), batch, network)
        counter = DensityCounter(network)
        counter.add(prepared, network(x))
        columns.append(counter.cells["main.layers.0.fwd"].columns)
    assert columns[1] - columns[0] == B * H
