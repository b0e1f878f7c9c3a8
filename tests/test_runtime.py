"""The torch backend: a call on the whole sequence, a call on its halves and a stream agree bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rnn2bin import runtime
from rnn2bin.cells.network import Network
from rnn2bin.errors import UnsupportedError, UsageError
from rnn2bin.runtime.torch_backend import Model
from rnn2bin.spec import DecodeSpec, EmbeddingSpec, LayerSpec, LinearSpec, RnnSpec, SectionSpec

T, B, I, H, V = 19, 3, 5, 33, 7  # noqa: E741


def model_of(
    cell: str = "lstm",
    *,
    count: int = 2,
    directions: int = 1,
    proj: int = 0,
    tokens: str = "",
    levels: str = "strict",
    readout: str = "all",
) -> Model:
    width = {"": I, "embedding": I, "one_hot": V}[tokens]
    layers = []
    for _ in range(count):
        layers.append(LayerSpec(cell, width, H, directions, proj))
        width = layers[-1].output_size
    embedding = EmbeddingSpec(V, layers[0].input_size, one_hot=tokens == "one_hot") if tokens else None
    head = (LinearSpec(width, 11, activation="tanh"), LinearSpec(11, V))
    return filled(RnnSpec({"main": SectionSpec(tuple(layers), embedding, head, readout)}), levels)


def filled(spec: RnnSpec, levels: str = "strict") -> Model:
    plan = {name: (True,) * len(layer.kind.gates) for name, layer in spec.cell_names()}
    network = Network(spec, plan, levels=levels)
    with torch.no_grad():
        for seed, (name, p) in enumerate(network.named_parameters()):
            draw = torch.rand if ".levels." in name else torch.randn
            p.copy_((draw(p.shape, generator=torch.Generator().manual_seed(seed)) * (1.0 if ".levels." in name else 0.5)).half())
    network.project_levels()
    return Model(network, {})


def inputs_of(model: Model, *, batch: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if model.spec.main.embedding:
        return torch.randint(V, (T, batch), generator=generator)
    return torch.randn(T, batch, I, generator=generator)


CASES: list[dict[str, Any]] = [
    {"cell": "lstm", "count": 1},
    {"cell": "lstm"},
    {"cell": "lstm", "proj": 9},
    {"cell": "lstm", "levels": "learned"},
    {"cell": "lstm", "tokens": "embedding"},
    {"cell": "lstm", "tokens": "one_hot", "proj": 9, "levels": "learned"},
    {"cell": "gru", "count": 1},
    {"cell": "gru", "levels": "learned"},
    {"cell": "gru", "tokens": "embedding"},
    {"cell": "gru_reset_before"},
    {"cell": "gru_reset_before", "tokens": "one_hot", "levels": "learned"},
]
named = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(v) for v in case.values()))


def flat(state) -> list[torch.Tensor]:
    return [t for layer in state for direction in layer for t in direction]


@named
def test_a_stream_agrees_exactly_with_a_call(case):
    model = model_of(**case)
    x = inputs_of(model)
    y, state = model(x)
    stream = model.stream()
    steps = torch.stack([stream.step(int(x_t) if model.spec.main.embedding else x_t[0]) for x_t in x])
    assert torch.equal(steps, y[:, 0])
    assert all(torch.equal(a, b) for a, b in zip(flat(stream.state), flat(state), strict=True))
    assert y.std() > 0.01
    stream.reset()
    assert torch.equal(stream.step(x[0, 0]), y[0, 0])


@named
@pytest.mark.parametrize("batch", [1, B])
def test_two_halves_equal_the_whole_exactly(case, batch):
    model = model_of(**case)
    x = inputs_of(model, batch=batch)
    y, last = model(x)
    first, state = model(x[:8])
    second, end = model(x[8:], state)
    assert torch.equal(torch.cat([first, second]), y)
    assert all(torch.equal(a, b) for a, b in zip(flat(end), flat(last), strict=True))
    assert not torch.equal(model(x[8:])[0], second)  # the state matters


def test_streams_are_apart():
    model = model_of("gru")
    x = inputs_of(model)
    one, other = model.stream(), model.stream()
    first = one.step(x[0, 0])
    one.step(x[1, 0])
    assert torch.equal(other.step(x[0, 0]), first)


@pytest.mark.parametrize("readout", ["last", "final"])
def test_a_stream_of_a_network_that_reads_the_last_step_gives_the_answer_so_far(readout):
    model = model_of("lstm", readout=readout)
    x = inputs_of(model)
    stream = model.stream()
    for t in range(T):
        assert torch.equal(stream.step(x[t, 0]), model(x[: t + 1])[0][0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floats_of_any_width_are_read(dtype):
    model = model_of("gru")
    x = inputs_of(model).half().to(dtype).float()
    assert torch.equal(model(x.to(dtype))[0], model(x)[0])


def test_a_numpy_step(tmp_path):
    model = model_of("gru")
    x = inputs_of(model)
    assert torch.equal(model.stream().step(x[0, 0].double().numpy()), model(x)[0][0, 0])


# ---------------------------------------------------------------------------------------------- refusals


def transducer() -> Model:
    section = SectionSpec((LayerSpec("gru", I, H),), EmbeddingSpec(V, I))
    decoder = SectionSpec((LayerSpec("gru", I, H),), EmbeddingSpec(V, I), (LinearSpec(H, V),))
    return filled(RnnSpec({"encoder": section, "decoder": decoder}, DecodeSpec(0, 1, 6)))


@pytest.mark.parametrize(
    ("model", "word"),
    [
        (model_of(directions=2), "bidirectional"),
        (model_of(readout="mean"), "mean over time"),
        (model_of(readout="max"), "max over time"),
        (transducer(), "reads a whole sequence first"),
    ],
)
def test_networks_that_cannot_stream(model, word):
    with pytest.raises(UnsupportedError, match=word):
        model.stream()


@pytest.mark.parametrize(
    ("x", "word"),
    [
        (torch.zeros(T, I), r"wanted floats of shape \(T,B,5\)"),
        (torch.zeros(T, 1, I + 1), r"not torch.float32 \(19, 1, 6\)"),
        (torch.zeros(T, 1, I, dtype=torch.long), "wanted floats"),
        (torch.zeros(0, 1, I), "T is 0"),
    ],
)
def test_refused_floats(x, word):
    with pytest.raises(UsageError, match=word):
        model_of()(x)


@pytest.mark.parametrize(
    ("x", "word"),
    [
        (torch.zeros(T, 1), "wanted whole numbers"),
        (torch.zeros(T, dtype=torch.long), "wanted whole numbers"),
        (torch.tensor([[0], [V]]), "tokens must lie in 0…6; found 0…7"),
        (torch.tensor([[-1]]), "found -1…-1"),
        (torch.zeros(0, 1, dtype=torch.long), "T is 0"),
    ],
)
@pytest.mark.parametrize("tokens", ["embedding", "one_hot"])
def test_refused_tokens(tokens, x, word):
    with pytest.raises(UsageError, match=word):
        model_of(tokens=tokens)(x)


def test_a_stream_refuses_what_does_not_fit():
    with pytest.raises(UsageError):
        model_of().stream().step(torch.zeros(I + 1))
    with pytest.raises(UsageError):
        model_of(tokens="embedding").stream().step(V)


def test_an_encoder_decoder_runs_free_without_a_decoder_input():
    model = transducer()
    x = torch.randint(V, (T, B))
    written, state = model(x)
    assert state is None
    assert torch.equal(written, model.generate(x))
    y, state = model(x, decoder_input=written)
    assert y.shape == (len(written), B, V)
    assert state is not None


def test_an_unknown_backend(tmp_path):
    with pytest.raises(UsageError, match="backend 'cuda'"):
        runtime.load(tmp_path, backend="cuda")
