"""The oracle's equations against torch.nn and hand-written loops: T > 1, odd sizes, two layers, both directions, non-zero biases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn

from rnn2bin.cells.network import EQUATIONS, Network, State, reverse, walk, zero_state
from rnn2bin.cells.weights import Cell, select
from rnn2bin.distill.window import run_cell
from rnn2bin.errors import UnsupportedError
from rnn2bin.gates.estimators import BINARY, FLOAT, Discretize
from rnn2bin.kinds import CELLS
from rnn2bin.spec import DecodeSpec, EmbeddingSpec, LayerSpec, LinearSpec, RnnSpec, SectionSpec, check

T, B, I, H = 7, 3, 3, 5  # noqa: E741
KINDS = [name for name in CELLS if name not in EQUATIONS and CELLS[name].peepholes != "full"]  # the others: tests/test_every_cell.py
LENGTHS = torch.tensor([4, 7, 1])


def randomize(module: nn.Module, *, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.6)
    return module


def layers_of(cell: str, *, count: int, directions: int, proj_size: int = 0, input_size: int = I) -> tuple[LayerSpec, ...]:
    first = LayerSpec(cell, input_size, H, directions, proj_size)
    return (first, *(LayerSpec(cell, first.output_size, H, directions, proj_size) for _ in range(count - 1)))


def single(*layers: LayerSpec, **parts: Any) -> RnnSpec:
    spec = RnnSpec({"main": SectionSpec(layers, **parts)})
    check(spec)
    return spec


def binary_network(spec: RnnSpec, *, levels: str = "strict", seed: int = 0) -> Network:
    plan = {name: (True,) * len(layer.kind.gates) for name, layer in spec.cell_names()}
    return randomize(Network(spec, plan, levels=levels), seed=seed)


def from_torch(module: nn.RNNBase) -> Network:
    """torch's rows i,f,g,o or r,z,n -> gates in canonical order and the candidate apart."""
    cell = module.mode.lower()
    directions = 2 if module.bidirectional else 1
    network = Network(single(*layers_of(cell, count=module.num_layers, directions=directions, proj_size=module.proj_size)))
    order, candidate = ([0, 1, 3], 2) if cell == "lstm" else ([0, 1], 2)
    for index in range(module.num_layers):
        for direction in ("fwd", "bwd")[:directions]:
            suffix = f"l{index}" + ("_reverse" if direction == "bwd" else "")
            theirs = {n: getattr(module, f"{n}_{suffix}").detach() for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
            rows = {n: t.split(H) for n, t in theirs.items()}
            tensors = {f"gates.{n}": torch.cat([rows[n][k] for k in order]) for n in ("weight_ih", "weight_hh")}
            tensors |= {f"candidate.{n}": rows[n][candidate] for n in ("weight_ih", "weight_hh")}
            tensors["gates.bias"] = torch.cat([rows["bias_ih"][k] + rows["bias_hh"][k] for k in order])
            tensors["candidate.bias"] = rows["bias_ih"][candidate]
            if cell == "gru":
                tensors["candidate.bias_hh"] = rows["bias_hh"][candidate]
            else:
                tensors["candidate.bias"] = tensors["candidate.bias"] + rows["bias_hh"][candidate]
            if module.proj_size:
                tensors["projection.weight"] = getattr(module, f"weight_hr_{suffix}").detach()
            network.get_submodule(f"main.layers.{index}.{direction}").load_state_dict(tensors)
    return network


def torch_state(state: State, which: int) -> Tensor:
    """Our [layer][direction] states -> torch's (L·D,B,·)."""
    return torch.stack([direction[which] for layer in state for direction in layer])


# ---------------------------------------------------------------------------------------------- against torch


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("walking", [walk, run_cell], ids=["oracle", "window"])
@pytest.mark.parametrize("ragged", [False, True], ids=["whole", "lengths"])
@pytest.mark.parametrize("started", [False, True], ids=["zero", "state"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["lstm", "lstm-projection", "gru"])
def test_float_mode_equals_torch(name, count, bidirectional, started, ragged, walking):
    options = {"num_layers": count, "bidirectional": bidirectional}
    module = randomize(nn.GRU(I, H, **options) if name == "gru" else nn.LSTM(I, H, proj_size=4 if "-" in name else 0, **options))
    ours = from_torch(module)
    x = torch.randn(T, B, I, generator=torch.Generator().manual_seed(1))
    state, theirs = None, None
    if started:
        state = [
            [tuple(torch.randn_like(s) for s in zero_state(layer, B, x)) for _ in range(layer.directions)]
            for layer in ours.spec.main.layers
        ]
        theirs = torch_state(state, 0) if name == "gru" else (torch_state(state, 0), torch_state(state, 1))
    lengths = LENGTHS if ragged else None
    with torch.no_grad():
        given = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False) if ragged else x
        y, last = module(given, theirs)
        if ragged:
            y, _ = nn.utils.rnn.pad_packed_sequence(y, total_length=T)
        out = ours(x, state, lengths=lengths, mode=FLOAT, walk=walking)
    assert_close(out.y, y, name="y")
    for which, wanted in enumerate((last,) if name == "gru" else last):
        assert_close(torch_state(out.state, which), wanted, name=f"state {which}")


def test_the_four_bias_groups_of_a_gru_are_apart():
    """b_hn stands inside r ⊙ (…): moving it to b_in, the classic silent error, must change the output."""
    module = randomize(nn.GRU(I, H))
    ours, merged = from_torch(module), from_torch(module)
    cell = merged.cells()["main.layers.0.fwd"].get_submodule("candidate")
    with torch.no_grad():
        cell.bias.add_(cell.bias_hh)
        cell.bias_hh.zero_()
    x = torch.randn(T, B, I)
    assert (ours(x).y - merged(x).y).abs().max() > 1e-2


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_reset_before_gru_equals_numpy_loop():
    spec = single(*layers_of("gru_reset_before", count=1, directions=1))
    network = randomize(Network(spec)).double()
    w = {name.removeprefix("main.layers.0.fwd."): t.detach().numpy() for name, t in network.named_parameters()}
    x, h = torch.randn(T, I, dtype=torch.float64), np.zeros(H)
    (w_r, w_z), (u_r, u_z), (b_r, b_z) = (np.split(w[f"gates.{n}"], 2) for n in ("weight_ih", "weight_hh", "bias"))
    wanted = []
    for x_t in x.numpy():
        r, z = sigmoid(w_r @ x_t + u_r @ h + b_r), sigmoid(w_z @ x_t + u_z @ h + b_z)
        n = np.tanh(w["candidate.weight_ih"] @ x_t + w["candidate.weight_hh"] @ (r * h) + w["candidate.bias"])
        h = z * h + (1 - z) * n
        wanted.append(h)
    assert_close(network(x[:, None]).y[:, 0].detach(), torch.tensor(np.array(wanted)))


@pytest.mark.parametrize("name", KINDS)
def test_binary_gates_equal_a_numpy_loop_of_if_and_else(name):
    network = binary_network(single(*layers_of(name, count=1, directions=1))).double()
    w = {n.removeprefix("main.layers.0.fwd."): t.detach().numpy() for n, t in network.named_parameters()}
    x, h, c = torch.randn(T, I, dtype=torch.float64), np.zeros(H), np.zeros(H)
    wanted = []
    for x_t in x.numpy():
        pre = w["gates.weight_ih"] @ x_t + w["gates.weight_hh"] @ h + w["gates.bias"]
        peephole = w.get("gates.peephole", np.zeros_like(pre))
        own = w["candidate.weight_ih"] @ x_t + w["candidate.bias"]
        new_h = np.zeros(H)
        for j in range(H):
            row = w["candidate.weight_hh"][j]
            if name in ("lstm", "lstm_peephole"):
                admitted = pre[j] + peephole[j] * c[j] > 0
                kept = pre[H + j] + peephole[H + j] * c[j] > 0
                c[j] = (c[j] if kept else 0.0) + (np.tanh(own[j] + row @ h) if admitted else 0.0)
                new_h[j] = np.tanh(c[j]) if pre[2 * H + j] + peephole[2 * H + j] * c[j] > 0 else 0.0
            elif name in ("lstm_coupled", "lstm_coupled_peephole"):
                if pre[j] + peephole[j] * c[j] > 0:
                    c[j] = np.tanh(own[j] + row @ h)
                new_h[j] = np.tanh(c[j]) if pre[H + j] + peephole[H + j] * c[j] > 0 else 0.0
            elif name == "gru_output":
                if not pre[H + j] > 0:
                    c[j] = np.tanh(own[j] + (row @ h + w["candidate.bias_hh"][j] if pre[j] > 0 else 0.0))
                new_h[j] = c[j] if pre[2 * H + j] > 0 else 0.0
            elif pre[H + j] > 0:
                new_h[j] = h[j]
            elif name == "gru":
                new_h[j] = np.tanh(own[j] + (row @ h + w["candidate.bias_hh"][j] if pre[j] > 0 else 0.0))
            else:
                new_h[j] = np.tanh(own[j] + sum(row[k] * h[k] for k in range(H) if pre[k] > 0))
        h = new_h
        wanted.append(h)
    with torch.no_grad():
        assert_close(network(x[:, None], mode=BINARY).y[:, 0], torch.tensor(np.array(wanted)))


CLIPS = {"clip": 0.8, "cell_clip": 0.4, "proj_clip": 0.15}


@pytest.mark.parametrize("clips", [{}, CLIPS], ids=["free", "clipped"])
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("name", ["lstm", "lstm_peephole", "lstm_coupled", "lstm_coupled_peephole"])
def test_float_lstms_equal_a_numpy_loop(name, copies, clips):
    """Graves 2013, eq. 7-11, f = 1 − i where they are coupled; TensorFlow 1's and ONNX's clips; each copy of a unit has its own cell."""
    network = randomize(Network(single(LayerSpec(name, I, H, proj_size=4, copies=copies, **clips)))).double()
    w = {n.removeprefix("main.layers.0.fwd."): t.detach().numpy() for n, t in network.named_parameters()}
    at, free = {"i": 0, "f": 1, "o": -1}, {"clip": np.inf, "cell_clip": np.inf, "proj_clip": np.inf}
    within = lambda v, bound: np.clip(v, -{**free, **clips}[bound], {**free, **clips}[bound])
    blocks = lambda n: w[n].reshape(-1, H, *w[n].shape[1:])
    peephole = blocks("gates.peephole") if "peephole" in name else np.zeros((3, H))
    x = 2 * torch.randn(T, I, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    h, c, wanted = np.zeros(4), np.zeros((copies, H)), []
    for x_t in x.numpy():
        bias = w["gates.bias"].reshape(-1, copies, H)
        gate = lambda g, c, h=h, x_t=x_t, bias=bias: sigmoid(
            within(
                blocks("gates.weight_ih")[at[g]] @ x_t + blocks("gates.weight_hh")[at[g]] @ h + bias[at[g]] + peephole[at[g]] * c, "clip"
            )
        )
        i = gate("i", c)
        f = 1 - i if "coupled" in name else gate("f", c)
        new = np.tanh(within(w["candidate.weight_ih"] @ x_t + w["candidate.weight_hh"] @ h + w["candidate.bias"], "clip"))
        c = within(f * c + i * new, "cell_clip")
        h = within(w["projection.weight"] @ (gate("o", c) * np.tanh(c)).mean(0), "proj_clip")
        wanted.append(h)
    with torch.no_grad():
        assert_close(network(x[:, None]).y[:, 0], torch.tensor(np.array(wanted)))
    if clips:  # each of them bites
        assert np.abs(wanted).max() == pytest.approx(0.15)
        for one in clips:
            other = Network(single(LayerSpec(name, I, H, proj_size=4, copies=copies, **{**clips, one: 0.0}))).double()
            other.load_state_dict(network.state_dict())
            assert (other(x[:, None]).y[:, 0] - torch.tensor(np.array(wanted))).abs().max() > 1e-3, one


def test_a_clip_of_pre_activations_changes_no_bit():
    for name in KINDS:
        cell = cell_with(LayerSpec(name, I, H, clip=1e-3), [0.0] * len(LayerSpec(name, I, H).kind.gates))
        pre = torch.randn(B, len(cell.binary), H)
        assert torch.equal(cell.gate(BINARY)(pre), (pre > 0).float())


# ---------------------------------------------------------------------------------------------- around the cells


@pytest.mark.parametrize("ragged", [False, True], ids=["whole", "lengths"])
@pytest.mark.parametrize("readout", ["all", "last", "final", "mean", "max"])
def test_readouts(readout, ragged):
    """What the head reads, from the outputs of each sequence run alone."""
    layers = layers_of("gru", count=2, directions=2)
    head = (LinearSpec(2 * H, 4, activation="relu"), LinearSpec(4, 3))
    network = randomize(Network(single(*layers, head=head, readout=readout)))
    plain = Network(single(*layers))
    plain.load_state_dict({n: t for n, t in network.state_dict().items() if "head" not in n})
    x, lengths = torch.randn(T, B, I), LENGTHS if ragged else torch.full((B,), T)
    with torch.no_grad():
        y = network(x, lengths=lengths if ragged else None).y
        for b, steps in enumerate(lengths.tolist()):
            out = plain(x[:steps, b : b + 1])
            h = out.y[:, 0]
            final = torch.cat([out.state[-1][0][0], out.state[-1][1][0]], -1)[0]
            read = {"all": h, "last": h[-1], "final": final, "mean": h.mean(0), "max": h.max(0).values}[readout]
            wanted = network.main.head[1](torch.relu(network.main.head[0](read)))
            assert_close(y[:steps, b] if readout == "all" else y[b], wanted)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "softmax", "log_softmax", "l2", "relu_l2"])
def test_last_activation_and_its_logits(activation):
    network = randomize(Network(single(*layers_of("lstm", count=1, directions=1), head=(LinearSpec(H, 3, activation=activation),))))
    x = torch.randn(T, B, I)
    y, raw = network(x).y, network(x, logits=True).y
    of = {
        "tanh": raw,  # no distribution: `logits` leaves it on
        "sigmoid": 1 / (1 + torch.exp(-raw)),
        "softmax": raw.exp() / raw.exp().sum(-1, keepdim=True),
        "log_softmax": raw - raw.exp().sum(-1, keepdim=True).log(),
        "l2": raw,
        "relu_l2": raw,
    }
    assert_close(y, of[activation])
    if "l2" in activation:
        assert_close(y.norm(dim=-1), torch.ones(T, B))


def transducer(*, max_length: int = 6) -> Network:
    tokens = EmbeddingSpec(4, I)
    encoder = SectionSpec(layers_of("gru", count=2, directions=1), embedding=EmbeddingSpec(6, I))
    decoder = SectionSpec(layers_of("gru", count=2, directions=1), embedding=tokens, head=(LinearSpec(H, 4),))
    spec = RnnSpec({"encoder": encoder, "decoder": decoder}, DecodeSpec(start=0, end=1, max_length=max_length))
    check(spec)
    network = randomize(Network(spec), seed=46)
    with torch.no_grad():
        network.decoder.embedding.weight.mul_(4)  # so that what was written last decides what is written next
    return network


def test_generate_equals_hand_loop():
    network = transducer()
    x = torch.randint(6, (T, 9), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([7, 1, 3, 5, 2, 7, 4, 6, 1])
    wanted = []
    with torch.no_grad():
        for b, steps in enumerate(lengths.tolist()):
            state = network.encoder(x[:steps, b : b + 1], mode=FLOAT).state
            token, tokens = 0, []
            while len(tokens) < 6 and token != 1:
                out = network.decoder(torch.tensor([[token]]), state, mode=FLOAT)
                state, token = out.state, int(out.y[0, 0].argmax())
                tokens.append(token)
            wanted.append(tokens)
    ours = network.generate(x, lengths=lengths)
    assert len({tuple(w) for w in wanted}) > 2  # the inputs matter
    assert len({len(w) for w in wanted}) > 1  # some end early
    longest = max(map(len, wanted))
    assert ours.t().tolist() == [w + [1] * (longest - len(w)) for w in wanted]


def test_teacher_forcing_on_its_own_output_repeats_it():
    network = transducer()
    x = torch.randint(6, (T, B))
    written = network.generate(x)
    fed = torch.cat([torch.zeros(1, B, dtype=torch.long), written[:-1]])
    again = network(x, decoder_input=fed).y.argmax(-1)
    before_end = (written == 1).cumsum(0) - (written == 1).long() == 0
    assert torch.equal(again[before_end], written[before_end])


def test_an_encoder_decoder_needs_a_decoder_input_and_only_it_generates():
    with pytest.raises(ValueError, match="needs decoder_input"):
        transducer()(torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="encoder–decoders"):
        Network(single(*layers_of("gru", count=1, directions=1))).generate(torch.zeros(2, 1, I))


@pytest.mark.parametrize("walking", [walk, run_cell], ids=["oracle", "window"])
@pytest.mark.parametrize("readout", ["all", "last", "final", "mean", "max"])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("name", KINDS)
def test_no_pad_reaches_a_state_or_an_output(name, directions, readout, walking):
    network = binary_network(
        single(*layers_of(name, count=2, directions=directions), head=(LinearSpec(directions * H, 2),), readout=readout)
    )
    x = torch.randn(T, B, I)
    dirty = x.clone()
    for b, steps in enumerate(LENGTHS.tolist()):
        dirty[steps:, b] = 1e6 * (-1) ** b
    clean, ours = (network(v, lengths=LENGTHS, walk=walking) for v in (x, dirty))
    assert torch.equal(clean.y, ours.y)
    for a, b in zip(clean.hidden, ours.hidden, strict=True):
        assert torch.equal(a, b)
        assert all((b[steps:, at] == 0).all() for at, steps in enumerate(LENGTHS.tolist()))
    assert all(
        torch.equal(a, b)
        for p, q in zip(clean.state, ours.state, strict=True)
        for u, v in zip(p, q, strict=True)
        for a, b in zip(u, v, strict=True)
    )


def test_a_sequence_of_length_zero_keeps_its_state():
    network = binary_network(single(*layers_of("lstm", count=2, directions=1)))
    x, lengths = torch.randn(T, B, I), torch.tensor([0, 2, 0])
    state = [[(torch.randn(B, H), torch.randn(B, H))] for _ in range(2)]
    after = network(x, state, lengths=lengths).state
    for before, now in zip(state, after, strict=True):
        for a, b in zip(before[0], now[0], strict=True):
            assert torch.equal(a[[0, 2]], b[[0, 2]])
            assert not torch.equal(a[1], b[1])


def test_reverse_within_lengths():
    x = torch.arange(1, 7).view(6, 1, 1).expand(6, 2, 1).float()
    assert reverse(x, torch.tensor([4, 6]))[..., 0].t().tolist() == [[4, 3, 2, 1, 5, 6], [6, 5, 4, 3, 2, 1]]
    assert torch.equal(reverse(reverse(x, torch.tensor([3, 1])), torch.tensor([3, 1])), x)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_one_hot_equals_embedding_with_identity(dtype):
    layers = layers_of("lstm", count=1, directions=2, input_size=6)
    hot = randomize(Network(single(*layers, embedding=EmbeddingSpec(6, 6, one_hot=True))))
    table = Network(single(*layers, embedding=EmbeddingSpec(6, 6)))
    table.load_state_dict(hot.state_dict() | {"main.embedding.weight": torch.eye(6)})
    x = torch.randint(6, (T, B), dtype=dtype)
    assert torch.equal(hot(x).y, table(x).y)


def test_parts_that_do_not_join_are_all_named():
    spec = RnnSpec(
        {
            "main": SectionSpec(
                (LayerSpec("lstm", 3, 4, proj_clip=1.0), LayerSpec("ltsm", 5, 4), LayerSpec("gru", 4, 4, cell_clip=1.0, clip=-1.0)),
                head=(LinearSpec(9, 1, activation="gelu"),),
                readout="first",
            )
        }
    )
    with pytest.raises(UnsupportedError) as caught:
        check(spec)
    assert [
        any(word in reason for reason in caught.value.reasons)
        for word in ("clips a projection", "ltsm", "clips a cell", "positive number", "reads 5", "reads 9", "gelu", "first")
    ] == [True] * 8


# ---------------------------------------------------------------------------------------------- bits and levels


def cell_with(layer: LayerSpec, pre: list[float], *, levels: str = "strict") -> Cell:
    """A cell whose gates' pre-activations are constants, in canonical order; the candidate stays random."""
    cell = randomize(Cell(layer, (True,) * len(layer.kind.gates), levels=levels), seed=5)
    gates = cell.get_submodule("gates")
    with torch.no_grad():
        gates.weight_ih.zero_()
        gates.weight_hh.zero_()
        gates.bias.copy_(torch.tensor(pre).repeat_interleave(layer.hidden_size))
    return cell


@pytest.mark.parametrize("walking", [walk, run_cell], ids=["oracle", "window"])
@pytest.mark.parametrize("levels", ["strict", "learned"])
@pytest.mark.parametrize("name", ["gru", "gru_reset_before"])
def test_a_kept_unit_is_unchanged_bit_for_bit(name, levels, walking):
    cell = cell_with(LayerSpec(name, I, H), [1.0, 1.0], levels=levels)
    h = torch.randn(B, H) * 1e-3 + 1 / 3
    trace = walking(cell, torch.randn(T, B, I), (h,), BINARY)
    assert torch.equal(trace.states[0], h.expand(T, B, H))


@pytest.mark.parametrize("walking", [walk, run_cell], ids=["oracle", "window"])
@pytest.mark.parametrize("levels", ["strict", "learned"])
@pytest.mark.parametrize("name", ["lstm_coupled", "lstm_coupled_peephole"])
def test_a_cell_that_is_not_overwritten_is_unchanged_bit_for_bit(name, levels, walking):
    cell = cell_with(LayerSpec(name, I, H), [-1.0, 1.0], levels=levels)
    c = torch.randn(B, H) * 1e-3 + 1 / 3
    assert torch.equal(walking(cell, torch.randn(T, B, I), (torch.randn(B, H), c), BINARY).states[1], c.expand(T, B, H))


@pytest.mark.parametrize("walking", [walk, run_cell], ids=["oracle", "window"])
@pytest.mark.parametrize("levels", ["strict", "learned"])
def test_a_closed_output_gate_gives_exactly_zero(levels, walking):
    cell = cell_with(LayerSpec("lstm", I, H), [1.0, 1.0, -1.0], levels=levels)
    h, c = walking(cell, torch.randn(T, B, I), (torch.randn(B, H), torch.randn(B, H)), BINARY).states
    assert (h == 0).all()
    assert (c != 0).all()


def test_a_cell_that_keeps_and_admits_nothing_is_unchanged_bit_for_bit():
    cell = cell_with(LayerSpec("lstm", I, H), [-1.0, 1.0, 1.0])
    c = torch.randn(B, H)
    assert torch.equal(walk(cell, torch.randn(T, B, I), (torch.randn(B, H), c), BINARY).states[1], c.expand(T, B, H))


@pytest.mark.parametrize("levels", ["strict", "learned"])
@pytest.mark.parametrize("name", KINDS)
def test_levels_that_a_skip_depends_on_are_exact_whatever_is_stored(name, levels):
    layer = LayerSpec(name, I, H)
    cell = Cell(layer, (True,) * len(layer.kind.gates), levels=levels)
    with torch.no_grad():
        cell.levels.lo.fill_(0.3)
        cell.levels.hi.fill_(0.7)
    lo, hi = cell.level_values()
    for k, gate in enumerate(layer.kind.gate_names):
        free_lo, free_hi = (levels == "learned" and gate in names for names in (("f", "z"), ("i", "f", "o", "r")))
        assert (lo[k] == (torch.tensor(0.3) if free_lo else 0)).all(), gate
        assert (hi[k] == (torch.tensor(0.7) if free_hi else 1)).all(), gate


def test_a_soft_gate_has_no_levels_and_stays_a_sigmoid():
    cell = Cell(LayerSpec("lstm", I, H), (True, False, True), levels="learned")
    with torch.no_grad():
        cell.levels.lo.fill_(0.3)
        cell.levels.hi.fill_(0.7)
    pre = torch.randn(B, 3, H)
    value = cell.gate(BINARY)(pre)
    assert_close(value[:, 1], torch.sigmoid(pre[:, 1]))
    assert torch.equal(value[:, 0], torch.where(pre[:, 0] > 0, 0.7, 0.0))


def test_projected_levels_stay_in_bounds():
    cell = Cell(LayerSpec("lstm", I, H), (True,) * 3, levels="learned")
    with torch.no_grad():
        cell.levels.lo.copy_(torch.linspace(-2, 3, 3 * H).view(3, H))
        cell.levels.hi.copy_(torch.linspace(3, -2, 3 * H).view(3, H))
        cell.levels.hi[2].add_(3)
    cell.project_levels()
    lo, hi = cell.level_values()
    for forget in (lo[1], hi[1]):
        assert (forget >= 0).all()
        assert (forget <= 1).all()
    assert (lo >= 0).all()
    assert (hi >= 0).all()
    assert (hi[2] > 1).any()  # an output gate may let through more than 1
    coupled = Cell(LayerSpec("lstm_coupled", I, H), (True,) * 2, levels="learned")
    with torch.no_grad():
        coupled.levels.hi.fill_(4.0)
    coupled.project_levels()
    assert (coupled.level_values()[1][0] == 1).all()  # 1 − i is never below 0
    gru = Cell(LayerSpec("gru", I, H), (True,) * 2, levels="learned")
    with torch.no_grad():
        gru.levels.lo.fill_(4.0)
    gru.project_levels()
    assert (gru.level_values()[0][1] == 1).all()


def test_select_is_exact_at_both_ends():
    lo, hi = torch.rand(1000), torch.rand(1000) * 3
    assert torch.equal(select(torch.ones(1000), lo, hi), hi)
    assert torch.equal(select(torch.zeros(1000), lo, hi), lo)


@pytest.mark.parametrize("name", KINDS)
def test_strict_soft_gates_at_temperature_and_slope_one_are_the_teacher(name):
    spec = single(*layers_of(name, count=2, directions=2))
    student = binary_network(spec)
    teacher = Network(spec)
    teacher.load_state_dict({n: t for n, t in student.state_dict().items() if "levels" not in n})
    with torch.no_grad():
        for cell in student.cells().values():
            cell.levels.lo.fill_(0.0)
            cell.levels.hi.fill_(1.0)
    x = torch.randn(T, B, I)
    assert_close(student(x, mode=Discretize("sigmoid")).y, teacher(x).y)
    assert (student(x, mode=BINARY).y - teacher(x).y).abs().max() > 0.05
