"""The native runtime against the oracle, its own streams against its calls, its counters against density.py, and bad files."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import assert_close

import rnn2bin
from rnn2bin import pack, runtime, tasks
from rnn2bin.cells.network import Network, walk, zero_state
from rnn2bin.data import Batch, Part
from rnn2bin.errors import Rnn2binError, UnsupportedError, UsageError
from rnn2bin.evaluation.density import DensityCounter
from rnn2bin.evaluation.parity import parity
from rnn2bin.gates.estimators import BINARY
from rnn2bin.kinds import CELLS
from rnn2bin.runtime import library, native_backend
from rnn2bin.spec import ACTIVATIONS, DecodeSpec, EmbeddingSpec, GraphSpec, LayerSpec, LinearSpec, Node, RnnSpec, SectionSpec

SOURCES = Path(native_backend.__file__).parent / "native"
HERE = Path(__file__).parent / "native"
T, B, I, H, V = 9, 4, 5, 37, 7  # noqa: E741

built = pytest.mark.skipif(library.library() is None, reason="the native runtime is not compiled here")
compiles = pytest.mark.skipif(not (shutil.which("cc") and shutil.which("make")), reason="no C compiler and make")


def filled(
    spec: RnnSpec, *, soft: tuple[str, ...] = (), levels: str = "learned", seed: int = 0, scale: float = 0.4, weights: str = "fp16"
) -> Network:
    """Random weights that fp16 holds exactly, levels that a projection leaves alone."""
    network = Network(spec, {name: tuple(g not in soft for g in y.kind.gate_names) for name, y in spec.cell_names()}, levels=levels)
    with torch.no_grad():
        for k, (name, p) in enumerate(network.named_parameters()):
            generator = torch.Generator().manual_seed(100 * seed + k)
            if ".levels." in name:
                low = 0.1 if name.endswith("lo") else 0.6
                p.copy_(low + 0.4 * torch.rand(p.shape, generator=generator))
            else:
                p.copy_(torch.randn(p.shape, generator=generator) * scale)
        for k, cell in enumerate(network.cells().values()):
            if cell.layer.shared > 1:
                rows = cell.layer.gate_rows(cell.layer.shared)
                chosen = torch.randint(
                    rows, (len(cell.binary) * cell.layer.hidden_size,), generator=torch.Generator().manual_seed(seed + k)
                )
                cell.tensor("gates.row").copy_(chosen)
    if weights == "int8":
        network.round_weights()
    network.load_state_dict(network.shipped())
    return network.half().float().eval().requires_grad_(False)


def network_of(cell: str, *, tokens: str = "", readout: str = "all", head: bool = True, proj: int = 0, directions: int = 1, copies: int = 1,
               hidden: int = H, activation: str = "none", clips: dict[str, float] | None = None, shared: tuple[int, int] = (1, 1),
               **options: Any) -> Network:  # fmt: skip
    """`shared`: units that share a row of gates, of the state and of the input."""
    width = V if tokens == "one_hot" else I
    first = LayerSpec(cell, width, hidden, directions, proj, copies, **(clips or {}))
    second = LayerSpec(cell, first.output_size, hidden, directions, proj, copies, **(clips or {}))
    own, asked = shared
    first, second = replace(first, shared=own, shared_inputs=1 if tokens else asked), replace(second, shared=own, shared_inputs=asked)
    embedding = EmbeddingSpec(V, width, one_hot=tokens == "one_hot") if tokens else None
    linears = (LinearSpec(second.output_size, 9, activation="tanh"), LinearSpec(9, 6, bias=False, activation=activation)) if head else ()
    return filled(RnnSpec({"main": SectionSpec((first, second), embedding, linears, readout)}), **options)


def stack_of(
    cell: str, *, depth: int = 1, copies: int = 1, tokens: bool = False, hidden: int = H, directions: int = 1, **options: Any
) -> Network:
    """Two layers of a cell that is deep, or that carries its input."""
    width = I
    layers = []
    for _ in range(2):
        one = LayerSpec(cell, width, hidden if CELLS[cell].recurrent else width, directions, depth=depth)
        layers.append(replace(one, copies=copies if one.kind.unit_gates else 1))
        width = one.output_size
    section = SectionSpec(tuple(layers), EmbeddingSpec(V, I) if tokens else None, (LinearSpec(width, 6),))
    return filled(RnnSpec({"main": section}), scale=0.1, **options)


def translator(cell: str = "gru", copies: int = 2, hidden: int = H) -> Network:
    layer, head = LayerSpec(cell, I, hidden, 1, 0, copies), (LinearSpec(hidden, V),)
    sections = {name: SectionSpec((layer,), EmbeddingSpec(V, I), head if name == "decoder" else ()) for name in ("encoder", "decoder")}
    return filled(RnnSpec(sections, DecodeSpec(start=0, end=1, max_length=12)), scale=0.8)


def mixed_translator(hidden: int = H) -> Network:
    """An encoder of plain cells whose states start a decoder of clipped ones: they share states, not kernels."""
    network = translator("lstm", hidden=hidden)
    decoder = network.spec.sections["decoder"]
    layers = tuple(replace(layer, cell_clip=0.3) for layer in decoder.layers)
    return filled(replace(network.spec, sections={**network.spec.sections, "decoder": replace(decoder, layers=layers)}), scale=0.8)


def graph_network(cell: str = "lstm", hidden: int = H) -> Network:
    """Floats or tokens -> convolution -> a layer -> a bidirectional one -> linear; weights of one to three dimensions around the layers."""
    nodes = (
        Node("Transpose", ("input",), ("x",), {"perm": [1, 2, 0]}),
        Node("Conv", ("x", "kernel", "bias"), ("conv",), {"pads": [1, 1]}),
        Node("Transpose", ("conv",), ("below",), {"perm": [2, 0, 1]}),
        Node("Recurrent", ("below",), ("h", "", ""), {"layer": 0}),
        Node("Recurrent", ("h",), ("both", "last"), {"layer": 1}),
        Node("MatMul", ("both", "out"), ("y",)),
    )
    tensors = {"kernel": (6, I, 3), "bias": (6,), "out": (2 * hidden, 4)}
    graph = GraphSpec(nodes, "y", (), 4, per_step=True, batch_first=False, tensors=tensors)
    layers = (LayerSpec(cell, 6, hidden, copies=2), LayerSpec(cell, hidden, hidden, directions=2))
    return filled(RnnSpec({"main": SectionSpec(layers, EmbeddingSpec(V, I), graph=graph)}))


def packed(network: Network, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    pack.write_model(network, folder, provenance={}, task={"name": "match"})
    return folder


def both(network: Network, folder: Path, **options: Any):
    path = packed(network, folder)
    return runtime.load(path, backend="torch"), runtime.load(path, backend="native", **options)


def inputs_of(network: Network, *, steps: int = T, batch: int = B, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if network.spec.entry.embedding:
        return torch.randint(V, (steps, batch), generator=generator)
    return torch.randn(steps, batch, I, generator=generator)


def flat(state) -> list[torch.Tensor]:
    return [t for layer in state for direction in layer for t in direction]


CASES: list[dict[str, Any]] = [
    {"cell": cell, **more}
    for cell in ("lstm", "gru", "gru_reset_before", "gru_output")
    for more in (
        {},
        {"copies": 3},
        {"directions": 2, "copies": 2},
        {"tokens": "embedding"},
        {"tokens": "one_hot", "levels": "strict"},
        {"soft": ("o", "z")},
        {"soft": ("f", "r"), "copies": 2},
        {"soft": ("i",), "hidden": 64},
        {"readout": "last"},
        {"readout": "final", "directions": 2},
        {"readout": "mean"},
        {"readout": "max", "head": False},
    )
] + [{"cell": "lstm", "proj": 11, "copies": 2}, {"cell": "lstm", "proj": 11, "directions": 2, "tokens": "embedding"}]
CLIPS = {"clip": 0.7, "cell_clip": 0.5}
CASES += [
    {"cell": cell, **more}
    for cell in ("lstm_peephole", "lstm_coupled", "lstm_coupled_peephole")
    for more in (
        {},
        {"copies": 3, "levels": "strict"},
        {"directions": 2, "copies": 2, "tokens": "embedding"},
        {"proj": 11, "copies": 2, "clips": {**CLIPS, "proj_clip": 0.3}},
        {"soft": ("i",), "hidden": 64},
        {"soft": ("o", "f"), "copies": 2, "clips": CLIPS},
        {"readout": "max", "head": False},
    )
]
CASES += [
    {"cell": "lstm", "copies": 2, "clips": CLIPS},
    {"cell": "lstm", "soft": ("f",), "clips": CLIPS},
    {"cell": "gru", "copies": 2, "soft": ("r",), "clips": {"clip": 0.7}},
    {"cell": "gru_output", "copies": 2, "soft": ("r", "o"), "clips": {"clip": 0.7}},
    {"cell": "gru_reset_before", "soft": ("z",), "clips": {"clip": 0.7}},
    {"cell": "gru", "copies": 3, "clips": {"clip": 0.7}},
    {"cell": "gru_output", "copies": 3, "clips": {"clip": 0.7}},
]
CASES += [
    {"cell": cell, "weights": "int8", **more}
    for cell in ("lstm", "gru", "gru_reset_before", "gru_output", "lstm_coupled", "lstm_peephole")
    for more in ({}, {"copies": 3, "tokens": "embedding"}, {"directions": 2, "hidden": 64}, {"soft": ("o", "z")})
] + [{"cell": "lstm", "weights": "int8", "proj": 11, "copies": 2}]
CASES += [
    {"cell": cell, "shared": (4, 4), **more}
    for cell in ("lstm", "gru", "gru_reset_before", "gru_output", "lstm_coupled", "lstm_peephole")
    for more in (
        {"copies": 3, "weights": "int8"},
        {"tokens": "embedding", "weights": "int8", "copies": 2},
        {"directions": 2, "hidden": 64, "shared": (8, 1)},
        {"shared": (40, 40), "soft": ("o", "z")},  # one row for all
    )
] + [{"cell": "lstm", "shared": (3, 1), "proj": 11, "copies": 2, "weights": "int8"}]
every = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(v) for v in case.values()))

# A network of every kernel and every way through it, for sanitizers, fuzzers, instruction sets and the emulator.
CHAINS: dict[str, Callable[[], Network]] = {
    "lstm": lambda: network_of("lstm", tokens="embedding", copies=3),
    "projection": lambda: network_of("lstm", proj=11),
    "gru": lambda: network_of("gru", hidden=130),
    "bytes": lambda: network_of("lstm", proj=11, copies=2, weights="int8", hidden=70),
    "gru_output": lambda: network_of("gru_output", copies=2, hidden=130),
    "gru_output_bytes": lambda: network_of("gru_output", weights="int8", hidden=130),
    "gru_bytes": lambda: network_of("gru", weights="int8", hidden=130),
    "shared": lambda: network_of("lstm", copies=2, weights="int8", hidden=130, shared=(8, 8)),
    "shared words": lambda: network_of("gru_output", tokens="embedding", copies=2, hidden=130, shared=(8, 1)),
    "kinds": lambda: network_of("lstm_peephole", tokens="embedding", copies=2, soft=("f",), clips=CLIPS),
    "coupled": lambda: network_of("lstm_coupled", directions=2, proj=11),
    "mixed": mixed_translator,
    "both": lambda: network_of("gru_reset_before", directions=2, readout="final"),
    "words": translator,
    "large": lambda: network_of("lstm", tokens="embedding", hidden=256, weights="int8"),  # in huge pages
    "graph": graph_network,
    "graph of GRUs": lambda: graph_network("gru"),
}
BLOCKS: dict[str, Callable[[], Network]] = {
    "full": lambda: network_of("lstm_peephole_full", tokens="embedding", copies=2, proj=7, clips=CLIPS, hidden=13),
    "rnn": lambda: network_of("rnn", directions=2, hidden=13),
    "minimal": lambda: network_of("rnn_minimal", copies=2, hidden=17),
    "residual": lambda: network_of("rnn_residual", tokens="embedding", copies=3, scale=0.2, hidden=17),
    "prototype": lambda: network_of("prototype_normalized", copies=2, hidden=13),
    "pseudo": lambda: network_of("pseudo_12", copies=2, weights="int8", tokens="embedding", hidden=17),
    "pseudo late": lambda: network_of("pseudo_23", copies=3, soft=("o",), hidden=13),
    "pseudo all": lambda: network_of("pseudo_123", hidden=19),
    "highway": lambda: stack_of("highway", tokens=True, copies=2),
    "recurrent highway": lambda: stack_of("recurrent_highway", depth=9, copies=2, directions=2, hidden=7),
    "feedback": lambda: stack_of("gf_lstm", depth=9, copies=2, hidden=3),
    "feedback of GRUs": lambda: stack_of("gf_gru", depth=3, copies=3, tokens=True, weights="int8", hidden=17),
    "feedback of tanh": lambda: stack_of("gf_tanh", depth=2, hidden=13),
    "feedback words": lambda: translator("gf_gru", 2, hidden=13),
    "pseudo words": lambda: translator("pseudo_1", 2, hidden=13),
}


@built
@every
def test_as_the_oracle(case, tmp_path):
    network = network_of(**case)
    theirs, ours = both(network, tmp_path)
    x = inputs_of(network)
    for lengths in (None, torch.tensor([9, 1, 0, 5])):
        (y, state), (mine, my_state) = theirs(x, lengths=lengths), ours(x, lengths=lengths)
        (y, state), (mine, my_state) = theirs(x, state, lengths=lengths), ours(x, my_state, lengths=lengths)
        assert_close(mine, y)
        for a, b in zip(flat(my_state), flat(state), strict=True):
            assert_close(a, b)


def fuzzed() -> list[Network]:
    """Small networks that a fuzzer starts from, one or more for each way of laying weights out: scripts/check_native.sh."""
    return [
        network_of("lstm", hidden=5, tokens="embedding", copies=2), network_of("lstm", hidden=5, proj=3, weights="int8"),
        network_of("lstm", hidden=5, shared=(2, 2), weights="int8"), network_of("gru_output", hidden=5, shared=(2, 1), tokens="embedding"),
        network_of("gru", hidden=5, tokens="one_hot"), network_of("gru_output", hidden=5, weights="int8"),
        network_of("lstm_peephole", hidden=5, clips=CLIPS), network_of("lstm_coupled", hidden=5, directions=2, readout="mean"),
        network_of("lstm_peephole_full", hidden=5), network_of("rnn", hidden=5), network_of("rnn_minimal", hidden=5, copies=2),
        network_of("pseudo_12", hidden=5), stack_of("highway", tokens=True), stack_of("recurrent_highway", depth=3, hidden=5),
        stack_of("gf_tanh", depth=2, hidden=3), stack_of("gf_gru", depth=2, hidden=3, tokens=True, weights="int8"),
        stack_of("gf_lstm", depth=2, hidden=3, tokens=True), translator(hidden=5), translator("gf_gru", 2, hidden=5), mixed_translator(5),
        graph_network(hidden=5),
    ]  # fmt: skip


def as_the_oracle(make: Callable[[], Network], folder: Path) -> None:
    network = make()
    theirs, ours = both(network, folder)
    x = inputs_of(network)
    y, mine = theirs(x)[0], ours(x)[0]
    if network.spec.decode:
        assert torch.equal(mine, y)
    else:
        assert_close(mine, y)


@built
@pytest.mark.parametrize("name", [*CHAINS, *BLOCKS])
def test_a_network_of_every_kernel(name, tmp_path):
    as_the_oracle({**CHAINS, **BLOCKS}[name], tmp_path)


@built
@every
def test_step_by_step(case, tmp_path):
    network = network_of(**case)
    path = packed(network, tmp_path)
    for compute in native_backend.COMPUTE:
        ours = runtime.load(path, backend="native", compute=compute)
        found = parity(network, ours, Part(inputs_of(network).transpose(0, 1)))
        assert found["flips_outside"] == 0
        assert found["steps"] == T * B
        assert found["max_abs"] < 1e-5


@built
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_logits(activation, tmp_path):
    network = network_of("lstm", activation=activation)
    theirs, ours = both(network, tmp_path)
    x = inputs_of(network)
    assert_close(ours(x)[0], theirs(x)[0])
    assert_close(ours.call(x, logits=True)[0], network(x, logits=True).y)


@built
@every
def test_a_stream_agrees_exactly_with_a_call(case, tmp_path):
    network = network_of(**case)
    path = packed(network, tmp_path)
    for compute in native_backend.COMPUTE:
        ours = runtime.load(path, backend="native", compute=compute)
        if network.spec.main.layers[0].directions == 2 or network.spec.main.readout in ("mean", "max"):
            with pytest.raises(UnsupportedError, match="whole sequence"):
                ours.stream()
            continue
        x = inputs_of(network, steps=70, batch=1)  # longer than what goes through the layers together
        stream = ours.stream()
        steps = torch.stack([stream.step(x_t[0]) for x_t in x])
        y, _ = ours(x)
        assert torch.equal(steps if y.ndim == 3 else steps[-1], y[:, 0] if y.ndim == 3 else y[0])


@built
@pytest.mark.parametrize("weights", ["fp16", "int8"])
@pytest.mark.parametrize("scale", [0.05, 0.4, 2.0])
@pytest.mark.parametrize(
    "case", [c for c in CASES if not {"soft", "weights"} & c.keys()], ids=lambda case: "-".join(str(v) for v in case.values())
)
def test_screening_changes_no_bit(case, scale, weights, tmp_path):
    wide = {"proj": 60} if "proj" in case else {}  # narrow states have too few columns for AVX2's screen
    network = network_of(**{**case, **wide, "hidden": 70, "weights": weights}, scale=scale)
    path = packed(network, tmp_path)
    exact, screened = (runtime.load(path, backend="native", compute=c) for c in ("fp16", "int8"))
    x = inputs_of(network, steps=40)
    x = x if x.dtype == torch.int64 else x * 3
    (y, state), (mine, my_state) = exact(x), screened(x)
    assert torch.equal(y, mine)
    assert all(torch.equal(a, b) for a, b in zip(flat(state), flat(my_state), strict=True))


@built
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_bytes_add_up_as_halves_do(cell, tmp_path):
    """One weight off its grid, and the whole matrix is read in fp16: no unit but its own may see a bit of difference."""
    network = network_of(cell, weights="int8", head=False, hidden=70)
    network.spec = RnnSpec(network.spec.sections)
    other = network_of(cell, weights="int8", head=False, hidden=70)
    layer = other.cells()["main.layers.1.fwd"]
    layer.grid = "none"
    with torch.no_grad():
        for matrix in (layer.part("gates").weight_hh, layer.part("candidate").weight_hh):
            matrix[5, 3] *= 1 + 2**-10  # of unit 5
    x = inputs_of(network, steps=1)
    state = [[tuple(torch.randn(B, n) for n in layer.state_sizes)] for layer in network.spec.main.layers]
    counters = []
    found = []
    for k, one in enumerate((network, other)):
        model = both(one, tmp_path / str(k), compute="fp16")[1]
        found.append(model(x, state)[0])
        handle = native_backend.Handle(model, 1)
        handle.run(x[:, :1].numpy(), None, None)
        counters.append(handle.counters().bytes)
    rest = [j for j in range(70) if j != 5]
    assert torch.equal(found[0][..., rest], found[1][..., rest])
    assert counters[0] < 0.8 * counters[1]


@built
@pytest.mark.parametrize("weights", ["fp16", "int8"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_output"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -3e38])
def test_a_reset_forgets_values_that_are_no_numbers(cell, weights, bad, tmp_path):
    """What a screened GRU keeps from step to step stays whole: the next sequence is that of a new state."""
    network = network_of(cell, hidden=70, weights=weights)
    model = both(network, tmp_path, compute="int8")[1]
    x = inputs_of(network, steps=30, batch=1).numpy()
    broken = x.copy()
    broken[2, 0, 1] = bad
    used, new = native_backend.Handle(model, 1), native_backend.Handle(model, 1)
    used.run(broken, None, None)
    used.reset()
    after, fresh = np.zeros((2, 30, 1, 6), np.float32)
    used.run(x, None, after)
    new.run(x, None, fresh)
    assert np.array_equal(after, fresh)
    assert fresh.any()


# Which weights an instruction set screens in integers.
SCREENED = {"avx2": ("int8",), "avx512vnni": ("fp16", "int8"), "avx512wide": ("fp16", "int8")}


def screened_here(weights):
    return weights in SCREENED.get(library.isa(), ())


@built
def test_eight_bit_weights_leave_nothing_in_doubt(tmp_path):
    """What screening rounds of an LSTM's weights is nothing where they are bytes; `auto` then screens it."""
    if not screened_here("int8"):
        pytest.skip("this instruction set does not screen")
    doubts = {}
    for weights in ("fp16", "int8"):
        network = network_of("lstm", hidden=256, weights=weights)
        for compute in ("int8", "auto"):
            handle = native_backend.Handle(both(network, tmp_path / weights, compute=compute)[1], 1)
            handle.run(inputs_of(network, steps=60, batch=1).numpy(), None, None)
            doubts[weights, compute] = (handle.counters().rows > 0, handle.counters().uncertain / max(1, handle.counters().rows))
    assert doubts["int8", "auto"] == doubts["int8", "int8"]
    assert doubts["fp16", "auto"] == (False, 0)
    assert doubts["int8", "int8"][0]
    assert doubts["fp16", "int8"][0] == screened_here("fp16")
    assert doubts["int8", "int8"][1] < (doubts["fp16", "int8"][1] / 4 if screened_here("fp16") else 0.005)


@built
@pytest.mark.parametrize("weights", ["fp16", "int8"])
def test_screening_reads_less(weights, tmp_path):
    if not screened_here(weights):
        pytest.skip("this instruction set does not screen such weights")
    network = network_of("gru", tokens="embedding", hidden=256, weights=weights)
    with torch.no_grad():
        for cell in network.cells().values():
            cell.part("gates").bias[256:] += 4.0  # most units keep
    counters = {}
    for compute in native_backend.COMPUTE:
        handle = native_backend.Handle(both(network, tmp_path, compute=compute)[1], 1)
        start = torch.rand(1, 256, generator=torch.Generator().manual_seed(1)).sub(0.5).numpy()
        handle.write([[(start,)]] * 2)
        handle.run(inputs_of(network, steps=60, batch=1).numpy(), None, None)
        counters[compute] = handle.counters()
    assert counters["int8"].bytes < counters["fp16"].bytes / 2
    assert 0 < counters["int8"].uncertain < counters["int8"].rows / 20


@built
@pytest.mark.parametrize(("cell", "screened"), [("lstm_coupled", True), ("lstm_peephole", False), ("lstm_coupled_peephole", False)])
def test_cells_with_peepholes_are_not_screened(cell, screened, tmp_path):
    """What a peephole adds to a pre-activation is in no bound of the screen's."""
    if not screened_here("int8"):
        pytest.skip("this instruction set does not screen")
    network = network_of(cell, hidden=128, weights="int8")
    handle = native_backend.Handle(both(network, tmp_path, compute="int8")[1], 1)
    handle.run(inputs_of(network, batch=1).numpy(), None, None)
    assert (handle.counters().rows > 0) == screened


@built
def test_encoder_and_decoder(tmp_path):
    for network in (*map(translator, ("gru", "gru_output", "lstm", "gru_reset_before", "lstm_coupled_peephole")), mixed_translator()):
        theirs, _ = both(network, tmp_path)
        for compute in native_backend.COMPUTE:
            ours = runtime.load(tmp_path, backend="native", compute=compute)
            x, lengths = inputs_of(network), torch.tensor([9, 2, 5, 1])
            assert torch.equal(ours(x, lengths=lengths)[0], theirs(x, lengths=lengths)[0])
            given = inputs_of(network, steps=6, seed=1)
            (y, state), (mine, my_state) = theirs(x, decoder_input=given), ours(x, decoder_input=given)
            assert_close(mine, y)
            assert_close(flat(my_state)[0], flat(state)[0])
            assert parity(network, ours, Part(x.t()))["flips_outside"] == 0


@built
def test_threads_and_numpy(tmp_path):
    network = network_of("lstm", tokens="embedding", directions=2)
    path = packed(network, tmp_path)
    alone, shared = runtime.load(path, backend="native"), runtime.load(path, backend="native", threads=3)
    x, lengths = inputs_of(network, batch=7), torch.arange(7)
    (y, state), (mine, my_state) = alone(x, lengths=lengths), shared(x.numpy(), lengths=lengths.numpy())
    assert isinstance(mine, np.ndarray)
    assert torch.equal(y, torch.from_numpy(mine))
    assert all(torch.equal(a, torch.from_numpy(b)) for a, b in zip(flat(state), flat(my_state), strict=True))


@built
def test_few_tokens_fold_at_every_size(tmp_path):
    """Of 256 tokens and 520 units the table takes more products than a larger vocabulary may cost; from a state of zero nothing is left to
    read. Without it a benchmark of 2,048 units read the input's matrix at every step."""
    layer = LayerSpec("lstm", 520, 520)
    network = filled(RnnSpec({"main": SectionSpec((layer,), EmbeddingSpec(256, 520))}), scale=0.05)
    theirs, ours = both(network, tmp_path)
    x = torch.arange(256)[:, None]
    state = [[(torch.zeros(256, 520), torch.zeros(256, 520))]]
    assert_close(ours(x.T, state)[0], theirs(x.T, state)[0])
    handle = native_backend.Handle(ours, 1)
    handle.run(x[:1].numpy(), None, None)
    assert handle.counters().weights == 0


COUNTED: list[dict[str, Any]] = [
    {"cell": "lstm"},
    {"cell": "lstm", "copies": 3, "tokens": "embedding"},
    {"cell": "lstm", "proj": 11, "copies": 2},
    {"cell": "lstm", "soft": ("o",)},
    {"cell": "lstm_peephole", "copies": 2},
    {"cell": "lstm_coupled", "copies": 3, "proj": 11},
    {"cell": "lstm_coupled_peephole", "tokens": "embedding", "clips": CLIPS},
    {"cell": "gru"},
    {"cell": "gru", "copies": 3, "tokens": "embedding"},
    {"cell": "gru", "soft": ("z",)},
    {"cell": "gru_reset_before", "copies": 2},
    {"cell": "gru_output", "copies": 3, "tokens": "embedding"},
    {"cell": "gru_output", "soft": ("o",)},
]


@built
@pytest.mark.parametrize("case", COUNTED, ids=lambda case: "-".join(str(v) for v in case.values()))
def test_weights_touched_are_what_density_counts(case, tmp_path):
    """From states without a zero, so that a column is zero exactly where its gate is closed; densities count the first step as whole."""
    network = network_of(head=False, **case)
    network.spec = RnnSpec(network.spec.sections)
    _, ours = both(network, tmp_path, compute="fp16")
    x = inputs_of(network, batch=1)
    nonzero = lambda n, k: torch.rand(1, n, generator=torch.Generator().manual_seed(k)) + 0.5
    state = [[tuple(nonzero(n, k) for k, n in enumerate(layer.state_sizes))] for layer in network.spec.main.layers]
    out = network(x, state)
    counter = DensityCounter(network)
    task = tasks.Task("match", "cosine", network.spec)
    counter.add(tasks.prepare(task, Batch(x, None, None, None, first=False), network), out)
    handle = native_backend.Handle(ours, 1)
    handle.write([[tuple(s.numpy() for s in both_) for both_ in layer] for layer in state])
    for x_t in x:
        handle.run(np.ascontiguousarray(x_t.unsqueeze(0).numpy()), None, None)
    assert handle.counters().weights == sum(c.touched for c in counter.cells.values())
    assert handle.counters().steps == T
    assert handle.counters().bytes >= 2 * handle.counters().weights


@built
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512vnni", "avx512wide"])
def test_every_instruction_set(isa, tmp_path):
    """Each in a process of its own: the choice is made when a model is opened. What this processor lacks runs as the best it has, once."""
    if isa in ("avx512", "avx512vnni") and isa not in _processor().split():
        pytest.skip(f"no {isa} here; avx512wide stands for what is lacking")
    code = f"""
import torch
from pathlib import Path
import test_runtime_native as t
for k, case in enumerate(t.CASES[::5]):
    t.test_as_the_oracle(case, Path({str(tmp_path)!r}))
    t.test_step_by_step(case, Path({str(tmp_path)!r}))
t.test_encoder_and_decoder(Path({str(tmp_path)!r}))
for make in t.BLOCKS.values():
    t.as_the_oracle(make, Path({str(tmp_path)!r}))
print(t.library.isa())
"""
    environment = {**os.environ, "RNN2BIN_ISA": isa, "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa or isa not in _processor().split()


def _processor() -> str:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "scalar " + " ".join(n for n, flag in (("avx2", "avx2"), ("avx512", "avx512vl"), ("avx512vnni", "avx512_vnni")) if flag in flags)


# ---------------------------------------------------------------------------------------------- bad input


@built
def test_what_does_not_fit_is_refused(tmp_path):
    tokens, floats = (both(network_of("lstm", tokens=t), tmp_path / t)[1] for t in ("embedding", ""))
    with pytest.raises(UsageError, match=r"0…6; found 0…7"):
        tokens(torch.tensor([[0], [7]]))
    with pytest.raises(UsageError, match="whole numbers"):
        tokens(torch.zeros(2, 1))
    with pytest.raises(UsageError, match=r"\(T,B,5\)"):
        floats(torch.zeros(2, 1, 4))
    with pytest.raises(UsageError, match="T is 0"):
        floats(torch.zeros(0, 1, 5))
    with pytest.raises(UsageError, match="lengths"):
        floats(torch.zeros(2, 1, 5), lengths=torch.tensor([3]))
    with pytest.raises(UsageError, match="state"):
        floats(torch.zeros(2, 1, 5), state=[[(torch.zeros(1, 3), torch.zeros(1, 3))]] * 2)
    with pytest.raises(UsageError, match="5 floats"):
        floats.stream().step(torch.zeros(4))
    with pytest.raises(UsageError, match="tokens must lie in"):
        tokens.stream().step(7)
    with pytest.raises(UsageError, match="compute"):
        runtime.load(tmp_path / "embedding", backend="native", compute="int4")


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def edit_weights(change):
    def edit(folder: Path) -> None:
        header, data = header_of((folder / pack.WEIGHTS).read_bytes())
        (folder / pack.WEIGHTS).write_bytes(change(header, data))

    return edit


def edit_config(change):
    def edit(folder: Path) -> None:
        config = json.loads((folder / pack.CONFIG).read_text())
        change(config)
        (folder / pack.CONFIG).write_text(json.dumps(config))

    return edit


def first_layer(**fields):
    return edit_config(lambda c: c["spec"]["sections"]["main"]["layers"][0].update(fields))


def _set(header, name, **fields):
    header[name].update(fields)
    return header


ONE, LAYER = "main.layers.0.fwd.gates.weight_ih", "main"
BAD_FILES = {
    "truncated data": (edit_weights(lambda h, d: joined(h, d[:-2])), "truncated"),
    "truncated header": (lambda f: (f / pack.WEIGHTS).write_bytes((f / pack.WEIGHTS).read_bytes()[:100]), "truncated"),
    "empty": (lambda f: (f / pack.WEIGHTS).write_bytes(b""), "no safetensors file"),
    "no header": (lambda f: (f / pack.WEIGHTS).write_bytes(struct.pack("<Q", 4) + b"nope"), "not readable JSON"),
    "huge header": (lambda f: (f / pack.WEIGHTS).write_bytes(struct.pack("<Q", 1 << 62) + b"{}"), "header"),
    "more data": (edit_weights(lambda h, d: joined(h, d + b"\0\0")), "belong to no tensor"),
    "huge offset": (edit_weights(lambda h, d: joined(_set(h, ONE, data_offsets=[0, 1 << 61]), d)), "outside the file"),
    "negative offset": (edit_weights(lambda h, d: joined(_set(h, ONE, data_offsets=[-2, 8]), d)), "outside the file"),
    "overlap": (edit_weights(lambda h, d: joined(_overlapping(h), d)), "overlaps|leaves a gap"),
    "dtype": (edit_weights(lambda h, d: joined(_set(h, ONE, dtype="F32"), d)), "not F16"),
    "shape": (edit_weights(lambda h, d: joined(_set(h, ONE, shape=[5, 111]), d)), "shape that config.json says"),
    "huge shape": (edit_weights(lambda h, d: joined(_set(h, ONE, shape=[1 << 40, 1 << 40]), d)), "out of range"),
    "negative shape": (edit_weights(lambda h, d: joined(_set(h, ONE, shape=[-111, -5]), d)), "out of range"),
    "not finite": (edit_weights(lambda h, d: joined(h, b"\x00\x7c" + d[2:])), "not finite"),
    "unknown tensor": (edit_weights(lambda h, d: joined({**h, "x": {"dtype": "F16", "shape": [1], "data_offsets": [len(d), len(d) + 2]}}, d + b"\0\0")), "unknown tensor x"),  # noqa: E501
    "missing tensor": (edit_weights(lambda h, d: joined({k.replace(ONE, "other"): v for k, v in h.items()}, d)), "weight_ih is missing"),
    "hidden size": (edit_config(lambda c: c["spec"]["sections"]["main"]["layers"][1].update(hidden_size=1 << 19)), "shape|missing|reads"),
    "zero size": (edit_config(lambda c: c["spec"]["sections"]["main"]["layers"][0].update(hidden_size=0)), "hidden_size"),
    "unknown cell": (first_layer(cell="lstm_of_tomorrow"), "unknown cell"),
    "peepholes missing": (first_layer(cell="lstm_peephole"), "peephole is missing"),
    "clip below 0": (first_layer(clip=-1.0), "clip must be a number from 0"),
    "clip no number": (first_layer(cell_clip="1"), "cell_clip must be a number"),
    "clip too large": (first_layer(proj_clip=1e300), "proj_clip must be a number"),
    "gates": (edit_config(lambda c: c["gates"]["main.layers.0.fwd"].update(i="maybe")), "binary or soft"),
    "levels": (edit_config(lambda c: c.update(levels="loose")), "levels"),
    "weights": (edit_config(lambda c: c.update(weights="int3")), "weights must be"),
    "no weights": (edit_config(lambda c: c.update(weights=None)), "weights must be"),
    "widths": (edit_config(lambda c: c["spec"]["sections"]["main"]["head"][0].update(in_features=3)), "receives"),
}  # fmt: skip


def _overlapping(header):
    begin, end = header[ONE]["data_offsets"]
    header[ONE]["data_offsets"] = [begin - 2, end - 2] if begin else [2, end + 2]
    return header


def assert_refused(change: Callable[[Path], None], path: Path, message: str) -> None:
    """A directory that was changed for the worse: C says what is wrong with it, Python raises that."""
    change(path)
    assert library.library().r2b_open(str(path).encode(), 0) is None
    assert re.search(message, library.last_error()), library.last_error()
    with pytest.raises(Rnn2binError):
        runtime.load(path, backend="native")


@built
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named(name, tmp_path):
    change, message = BAD_FILES[name]
    assert_refused(change, packed(network_of("lstm"), tmp_path), message)


def main_section(**fields):
    return edit_config(lambda c: c["spec"]["sections"]["main"].update(fields))


BAD_GRAPHS = {
    "graph": (main_section(graph=[]), "graph must be an object"),
    "head": (main_section(head=[{"in_features": 6, "out_features": 3, "bias": True, "activation": "none"}]), "head must be empty"),
    "readout": (main_section(readout="last"), "readout must be all"),
    "embedding": (main_section(embedding={"num_embeddings": 8, "embedding_dim": 5, "one_hot": False}), "embedding.weight does not have"),
    "no embedding": (main_section(embedding=None), "unknown tensor main.embedding.weight"),
    "no graph": (main_section(graph=None), "reads 6 values but receives 5"),
    "width": (first_layer(input_size=7), "weight_ih does not have the shape"),
    "unknown tensor": (edit_weights(lambda h, d: joined({k.replace("main.graph.", "graph."): v for k, v in h.items()}, d)), "unknown tensor graph."),  # noqa: E501
    "no name": (edit_weights(lambda h, d: joined({k.replace("graph.bias", "graph."): v for k, v in h.items()}, d)), "unknown tensor main.graph."),  # noqa: E501
    "nine sizes": (edit_weights(lambda h, d: joined(_set(h, "main.graph.kernel", shape=[1] * 9), d)), "at most 8 sizes"),
    "huge product": (edit_weights(lambda h, d: joined(_set(h, "main.graph.kernel", shape=[1 << 30] * 4), d)), "out of range"),
    "a size": (edit_weights(lambda h, d: joined(_set(h, "main.graph.kernel", shape=[6, 5, 4]), d)), "do not agree"),
    "not finite": (edit_weights(lambda h, d: joined(h, d[: h["main.graph.kernel"]["data_offsets"][0]] + b"\x00\x7c" + d[h["main.graph.kernel"]["data_offsets"][0] + 2 :])), "kernel is not finite"),  # noqa: E501
}  # fmt: skip


@built
@pytest.mark.parametrize("name", BAD_GRAPHS)
def test_bad_graphs_are_named(name, tmp_path):
    change, message = BAD_GRAPHS[name]
    assert_refused(change, packed(graph_network(), tmp_path), message)


def with_row(value: float) -> Callable[[Path], None]:
    """The row that the third unit of the second layer reads."""

    def change(h: dict[str, Any], d: bytes) -> bytes:
        at = h["main.layers.1.fwd.gates.row"]["data_offsets"][0] + 4
        return joined(h, d[:at] + struct.pack("<e", value) + d[at + 2 :])

    return edit_weights(change)


BAD_SHARING = {
    "no such row": (with_row(10), r"gates\.row: a unit reads no row of 10"),
    "half a row": (with_row(1.5), r"gates\.row: a unit reads no row of 10"),
    "a row before": (with_row(-1), r"gates\.row: a unit reads no row of 10"),
    "another share": (first_layer(shared=2, shared_inputs=2), "shape"),
    "one share and another": (first_layer(shared_inputs=3), "share"),
    "no share": (first_layer(shared=0), "shared|out of range"),
    "a cell that cannot": (first_layer(cell="lstm_peephole_full"), "share"),
}


@built
@pytest.mark.parametrize("name", BAD_SHARING)
def test_rows_that_are_not_there_are_named(name, tmp_path):
    change, message = BAD_SHARING[name]
    folder = packed(network_of("lstm", shared=(4, 4)), tmp_path)
    change(folder)
    for backend in ("torch", "native"):
        with pytest.raises(UnsupportedError, match=message):
            runtime.load(folder, backend=backend)


def token_graph() -> Network:
    """Tokens -> a layer that looks them up -> linear."""
    nodes = (Node("Recurrent", ("tokens",), ("h",), {"layer": 0}), Node("MatMul", ("h", "out"), ("y",)))
    graph = GraphSpec(nodes, "y", (), 4, per_step=True, batch_first=False, tensors={"out": (H, 4)}, token_layers=(0,))
    return filled(RnnSpec({"main": SectionSpec((LayerSpec("lstm", I, H, copies=2),), EmbeddingSpec(V, I), graph=graph)}))


def looked_up(layers: Any) -> Callable[[Path], None]:
    return edit_config(lambda c: c["spec"]["sections"]["main"]["graph"].update(token_layers=layers))


BAD_LOOKUPS = {
    "not a list": (looked_up({}), "token_layers must be a list"),
    "no such layer": (looked_up([1]), "a layer that there is not"),
    "negative": (looked_up([-1]), "a layer that there is not"),
    "twice": (looked_up([0, 0]), "one twice"),
    "no number": (looked_up(["0"]), "a layer that there is not"),
    "no embedding": (main_section(embedding=None), "there is no embedding"),
    "width": (first_layer(input_size=I + 1), f"reads {I + 1} values but receives {I}"),
}  # fmt: skip


@built
@pytest.mark.parametrize("name", BAD_LOOKUPS)
def test_bad_lookups_are_named(name, tmp_path):
    change, message = BAD_LOOKUPS[name]
    assert_refused(change, packed(token_graph(), tmp_path), message)
    with pytest.raises(Rnn2binError):
        runtime.load(tmp_path, backend="torch")


@built
@pytest.mark.parametrize("weights", ["fp16", "int8"])
def test_a_layer_of_a_graph_that_looks_tokens_up_reads_no_input_matrix(weights, tmp_path):
    network = token_graph()
    if weights == "int8":
        network.round_weights()
        assert [cell.grid for cell in network.cells().values()] == ["recurrent"]
    theirs, ours = both(network, tmp_path, compute="fp16")
    x = torch.randint(V, (T, 3), generator=torch.Generator().manual_seed(0))
    assert_close(ours(x)[0], theirs(x)[0])
    generator = torch.Generator().manual_seed(1)
    state = [[tuple(torch.rand(3, n, generator=generator) + 0.5 for n in network.spec.main.layers[0].state_sizes)]]  # no zero in it
    counter = DensityCounter(network)
    task = tasks.Task("match", "cosine", network.spec)
    counter.add(tasks.prepare(task, Batch(x, None, None, None, first=False), network), network(x, state))
    counted = counter.cells["main.layers.0.fwd"]
    handle = native_backend.Handle(ours, 3, T, layer=0)
    handle.write([[tuple(s.numpy() for s in both_) for both_ in layer] for layer in state])
    handle.run(np.ascontiguousarray(x.numpy()), None, None)
    assert handle.counters().weights == counted.touched > 0
    assert counted.dense == T * 3 * 4 * H * H
    x[2, 1] = V
    with pytest.raises(UsageError, match=f"tokens must lie in 0 to {V - 1}; found {V}"):
        handle.run(np.ascontiguousarray(x.numpy()), None, None)


@built
def test_weights_around_the_layers_are_checked_by_who_reads_them(tmp_path):
    for name, change, message in (
        ("shape", lambda c: c["kernel"].append(1), "main.graph.kernel has shape"),
        ("unknown", lambda c: c.pop("bias"), "reads 'bias', which nothing before it makes"),
    ):
        path = packed(graph_network(), tmp_path / name)
        edit_config(lambda c, change=change: change(c["spec"]["sections"]["main"]["graph"]["tensors"]))(path)
        with pytest.raises(UnsupportedError, match=message):
            runtime.load(path, backend="native")


@built
def test_states_of_layers_are_of_graphs(tmp_path):
    native, layers = library.library(), packed(graph_network(), tmp_path / "graph")
    for path, new, words in (
        (layers, lambda model: native.r2b_new_state(model, 1, 1), "the network is a graph"),
        (layers, lambda model: native.r2b_new_layer_state(model, 2, 1, 1), "no such layer"),
        (layers, lambda model: native.r2b_new_layer_state(model, -1, 1, 1), "no such layer"),
        (
            packed(network_of("lstm"), tmp_path / "chain"),
            lambda model: native.r2b_new_layer_state(model, 0, 1, 1),
            "no such layer of a graph",
        ),
    ):
        model = native.r2b_open(str(path).encode(), 0)
        assert new(model) is None
        assert words in library.last_error()
        native.r2b_close(model)
    ours = runtime.load(layers, backend="native")
    handle = native_backend.Handle(ours, 2, 3, layer=1)
    values = np.empty((2, H), np.float32)
    assert native.r2b_get_state(handle.address, 0, 0, 0, values.ctypes.data) == -1  # another layer's
    assert native.r2b_get_gates(handle.address, 0, 0, values.ctypes.data) == -1
    assert native.r2b_get_state(handle.address, 1, 1, 0, values.ctypes.data) == 0
    handle.reset()


@pytest.mark.parametrize("bound", [1e38, 1e300, -1.0, float("nan")])
def test_bounds_that_float32_does_not_hold_are_refused_by_both(bound, tmp_path):
    path = packed(network_of("lstm"), tmp_path)
    first_layer(clip=bound)(path)
    for backend in runtime.BACKENDS if library.library() else ("torch",):
        with pytest.raises(UnsupportedError, match="clip"):
            runtime.load(path, backend=backend)


@built
@pytest.mark.parametrize("bound", [0.7, 3.0, 0.1, 1e-05, 12345.678, 0.30000001192092896, 1e-300, 2.5e20])
def test_bounds_are_read_as_numbers_are_written(bound, tmp_path):
    """A clip at a bound: a cell that grows to it has exactly its float32."""
    network = network_of("lstm", head=False, clips={"cell_clip": bound})
    with torch.no_grad():
        for cell in network.cells().values():
            cell.part("candidate").bias.fill_(50.0)
            cell.part("gates").bias.fill_(50.0)
    theirs, ours = both(network, tmp_path)
    x = inputs_of(network, steps=1)
    (_, state), (_, mine) = theirs(x), ours(x)
    assert_close(mine[0][0][1], state[0][0][1])
    assert bound > 0.6 or torch.equal(mine[0][0][1], torch.full((B, H), bound))


@built
def test_a_newer_format_is_told_from_a_broken_one(tmp_path):
    path = packed(network_of("lstm"), tmp_path)
    edit_config(lambda c: c.update(format_version=2))(path)
    assert library.library().r2b_open(str(path).encode(), 0) is None
    assert "format version 2" in library.last_error()
    assert "update it" in library.last_error()


@built
def test_loading_imports_no_torch(tmp_path):
    path = packed(network_of("lstm", tokens="embedding"), tmp_path)
    code = f"import sys, rnn2bin; m = rnn2bin.load({str(path)!r}); m([[1], [2]]); m.stream().step(3); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


def test_without_the_library_torch_runs_and_says_so_once(tmp_path, monkeypatch):
    path = packed(network_of("lstm"), tmp_path)
    monkeypatch.setattr(library, "library", lambda: None)
    library.warn_missing.cache_clear()
    with pytest.warns(UserWarning, match="installed without its C kernels"):
        model = rnn2bin.load(path)
    rnn2bin.load(path)  # a second warning would be an error here
    assert type(model).__module__ == "rnn2bin.runtime.torch_backend"
    with pytest.raises(UsageError, match="C compiler"):
        rnn2bin.load(path, backend="native")


# ---------------------------------------------------------------------------------------------- the C sources on their own


compilers = pytest.mark.parametrize(
    "compiler", [pytest.param(name, marks=pytest.mark.skipif(not shutil.which(name), reason=f"no {name}")) for name in ("gcc", "clang")]
)


def made(folder: Path, *, flags: str = "-O2 -Werror", compiler: str = "cc", target: str = "all") -> Path:
    """The sources as `pack` writes them, built in an otherwise empty directory."""
    pack.write_runtime(folder)
    place = folder / pack.RUNTIME
    done = subprocess.run(
        ["make", "-s", f"CC={compiler}", f"CFLAGS={flags}", target], cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return place


@compiles
def test_a_packed_directory_builds_and_runs_itself(tmp_path):
    place = made(tmp_path / "OUT")
    for kind, network in {"floats": network_of("gru"), "tokens": network_of("lstm", tokens="embedding"), "words": translator()}.items():
        packed(network, tmp_path / kind)
        shutil.copytree(place, tmp_path / kind / "runtime")
        x = inputs_of(network, batch=1)
        words = " ".join(str(v) for v in x.flatten().tolist())
        command = ["./rnn2bin-run", ".."]
        done = subprocess.run(command, input=words, cwd=tmp_path / kind / "runtime", capture_output=True, text=True, check=True)
        lines = torch.tensor([[float(v) for v in line.split()] for line in done.stdout.splitlines()])
        y = runtime.load(tmp_path / kind, backend="torch")(x)[0]
        if kind == "words":
            assert lines[0].tolist() == y[:, 0].tolist()
        else:
            assert_close(lines, y[:, 0])
    refused = subprocess.run(
        ["./rnn2bin-run", ".."], input="1 x", cwd=tmp_path / "tokens" / "runtime", capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert "not numbers" in refused.stderr


@compiles
def test_a_graphs_layer_that_looks_tokens_up_runs_on_them(tmp_path):
    path = packed(token_graph(), tmp_path / "OUT")
    made(path)
    done = subprocess.run(
        ["./rnn2bin-run", ".."],
        input="1 0 2",
        cwd=path / "runtime",
        env={**os.environ, "RNN2BIN_LAYER": "0"},
        capture_output=True,
        text=True,
    )
    lines = torch.tensor([[float(v) for v in line.split()] for line in done.stdout.splitlines()])
    network = runtime.load(path, backend="torch").network
    assert_close(lines, network(torch.tensor([[1], [0], [2]])).hidden[0][:, 0])


@compiles
def test_a_graphs_directory_runs_one_layer_itself(tmp_path):
    path = packed(graph_network(), tmp_path / "OUT")
    made(path)
    network = runtime.load(path, backend="torch").network
    x = torch.randn(T, 6, generator=torch.Generator().manual_seed(0))
    words = " ".join(str(v) for v in x.flatten().tolist())

    def run(layer: str | None) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **({"RNN2BIN_LAYER": layer} if layer is not None else {})}
        return subprocess.run(
            ["./rnn2bin-run", ".."], input=words, cwd=path / "runtime", env=environment, capture_output=True, text=True, check=False
        )

    lines = torch.tensor([[float(v) for v in line.split()] for line in run("0").stdout.splitlines()])
    assert_close(
        lines, walk(network.entry.cell(0, "fwd"), x[:, None], zero_state(network.spec.main.layers[0], 1, x), BINARY).states[0][:, 0]
    )
    for layer, message in (
        (None, "only Python runs what stands around"),
        ("2", "no such layer"),
        ("x", "no such layer"),
        ("", "no such layer"),
    ):
        refused = run(layer)
        assert refused.returncode == 1
        assert message in refused.stderr
        assert refused.stderr.count("\n") == 1


def exercise(tmp_path: Path, flags: list[str], *, compiler: str = "cc", make_flags: str = "-O1 -g", runner: tuple[str, ...] = ()) -> None:
    place = made(
        tmp_path / "build",
        flags=f"{make_flags} {' '.join(f for f in flags if f.startswith('-fsanitize'))}",
        compiler=compiler,
        target="librnn2bin.a",
    )
    program = place / "exercise"
    command = [
        compiler,
        "-std=c11",
        *make_flags.split(),
        *flags,
        f"-I{place}",
        str(HERE / "exercise.c"),
        str(place / "librnn2bin.a"),
        "-o",
        str(program),
        "-lm",
        "-lpthread",
    ]
    subprocess.run(command, check=True)
    for name, make in {**CHAINS, **BLOCKS}.items():
        packed(make(), tmp_path / name)
        for compute in native_backend.COMPUTE if name in CHAINS else ("auto",):  # cells in blocks are not screened
            done = subprocess.run([*runner, str(program), str(tmp_path / name), compute], capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{name} {compute}: {done.stderr}"


@compiles
def test_no_step_allocates(tmp_path):
    wraps = ",".join(f"--wrap={name}" for name in ("malloc", "calloc", "realloc", "aligned_alloc"))
    exercise(tmp_path, ["-DCOUNT_ALLOCATIONS", f"-Wl,{wraps}"])


@pytest.mark.slow
@compiles
@compilers
def test_the_sources_give_no_warning(compiler, tmp_path):
    made(tmp_path, flags="-O3 -Werror", compiler=compiler)


@pytest.mark.slow
@compiles
@compilers
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers(compiler, sanitizer, tmp_path):
    exercise(tmp_path, [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"], compiler=compiler)


@pytest.mark.slow
@compiles
def test_fuzzed_files_never_crash_the_reader(tmp_path):
    place = made(tmp_path / "build", flags="-O1 -g -fsanitize=address,undefined", target="librnn2bin.a")
    program = place / "fuzz"
    command = [
        "cc",
        "-std=c11",
        "-O1",
        "-g",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        f"-I{place}",
        str(HERE / "fuzz.c"),
    ]
    subprocess.run([*command, str(place / "librnn2bin.a"), "-o", str(program), "-lm"], check=True)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for seed, network in enumerate(fuzzed()):
        path = packed(network, tmp_path / str(seed))
        done = subprocess.run([str(program), str(path), str(scratch), "3000", str(seed)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


emulated = pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-gcc") and shutil.which("qemu-aarch64-static")), reason="no cross compiler or qemu"
)
TO_ARM: dict[str, Any] = {"compiler": "aarch64-linux-gnu-gcc", "runner": ("qemu-aarch64-static",)}


@pytest.mark.slow
@emulated
def test_neon_under_qemu(tmp_path):
    """The kernels for Arm, run by an emulator: the same outputs, of every kernel."""
    place = made(tmp_path / "build", flags="-O2 -static -Werror", compiler=TO_ARM["compiler"], target="rnn2bin-run")
    networks = [network_of(**case) for case in CASES] + [make() for make in (*CHAINS.values(), *BLOCKS.values())]
    for k, network in enumerate(networks):
        if network.spec.decode or network.spec.main.graph or network.spec.main.readout != "all":
            continue  # the exerciser takes those below
        path = packed(network, tmp_path / str(k))
        x = inputs_of(network, batch=1)
        words = " ".join(str(v) for v in x.flatten().tolist())
        command = [*TO_ARM["runner"], str(place / "rnn2bin-run"), str(path)]
        done = subprocess.run(command, input=words, capture_output=True, text=True, check=True)
        lines = torch.tensor([[float(v) for v in line.split()] for line in done.stdout.splitlines()])
        assert_close(lines, runtime.load(path, backend="torch")(x)[0][:, 0])


@pytest.mark.slow
@emulated
def test_every_way_under_qemu(tmp_path):
    exercise(tmp_path, ["-static"], **TO_ARM)
