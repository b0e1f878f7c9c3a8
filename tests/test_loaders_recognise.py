"""Which networks are recognised by names and shapes alone, and what is refused as uncertain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from rnn2bin.errors import UnsupportedError
from rnn2bin.loaders import inspect, load
from rnn2bin.loaders.recognise import recognise
from rnn2bin.recipe import Source

torch.set_num_threads(1)


def shapes_of(*modules: tuple[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    return {f"{name}{key}": tuple(tensor.shape) for name, net in modules for key, tensor in net.state_dict().items()}


def main_of(shapes: dict[str, tuple[int, ...]], **hints: Any) -> dict[str, Any]:
    """The draft of a network about which nothing is uncertain."""
    proposal = recognise(shapes, hints=Source.model_validate(hints))
    assert proposal.reasons == []
    assert proposal.source() is not None
    assert proposal.draft is not None
    assert set(shapes) <= proposal.uses()
    main: dict[str, Any] = proposal.draft["main"]
    return main


def reasons_of(shapes: dict[str, tuple[int, ...]], **hints: Any) -> str:
    reasons = recognise(shapes, hints=Source.model_validate(hints)).reasons
    assert reasons
    return "\n".join(reasons)


def save(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    torch.manual_seed(0)
    torch.save({name: torch.randn(shape) for name, shape in shapes.items()}, tmp_path / "m.pt")
    return tmp_path / "m.pt"


def test_language_model() -> None:
    main = main_of(shapes_of(("embedding.", nn.Embedding(11, 6)), ("rnn.", nn.LSTM(6, 8, 2)), ("head.", nn.Linear(8, 11))))
    assert (main["cell"], main["embedding"], len(main["layers"])) == ("lstm", "embedding.weight", 2)
    assert main["head"] == [{"weight": "head.weight", "bias": "head.bias"}]


def test_equal_widths_are_told_apart_by_names() -> None:
    """PyTorch's word_language_model: encoder.weight is the table, decoder the output layer; every width is 8."""
    main = main_of(shapes_of(("encoder.", nn.Embedding(11, 8)), ("rnn.", nn.GRU(8, 8)), ("decoder.", nn.Linear(8, 11))))
    assert main["embedding"] == "encoder.weight"
    assert main["head"][0]["weight"] == "decoder.weight"


def test_output_layer_without_bias_and_table_of_the_same_shape() -> None:
    shapes = shapes_of(("tok_emb.", nn.Embedding(11, 8)), ("rnn.", nn.GRU(8, 8)), ("fc.", nn.Linear(8, 11, bias=False)))
    for ordered in (shapes, dict(sorted(shapes.items()))):
        main = main_of(ordered)
        assert (main["embedding"], main["head"]) == ("tok_emb.weight", [{"weight": "fc.weight"}])


def test_sequential_numbers() -> None:
    main = main_of(shapes_of(("0.", nn.Embedding(11, 6)), ("1.", nn.GRU(6, 8, bidirectional=True)), ("2.", nn.Linear(16, 3))))
    assert (main["embedding"], main["head"][0]["weight"]) == ("0.weight", "2.weight")
    assert main["layers"][0]["reverse"]["weight_ih"] == "1.weight_ih_l0_reverse"


def test_sequential_table_without_other_hint() -> None:
    main = main_of(shapes_of(("0.", nn.Embedding(11, 8)), ("1.", nn.GRU(8, 8)), ("2.", nn.Linear(8, 11, bias=False))))
    assert (main["embedding"], main["head"][0]["weight"]) == ("0.weight", "2.weight")


def test_cells_in_order_of_their_numbers() -> None:
    shapes = shapes_of(*((f"cells.{n}.", nn.LSTMCell(8, 8)) for n in (10, 2, 0)))
    assert [layer["weight_hh"] for layer in main_of(shapes)["layers"]] == [f"cells.{n}.weight_hh" for n in (0, 2, 10)]


def test_one_bare_cell() -> None:
    assert main_of(shapes_of(("", nn.GRUCell(3, 5))))["layers"] == [
        {"weight_ih": "weight_ih", "weight_hh": "weight_hh", "bias_ih": "bias_ih", "bias_hh": "bias_hh"}
    ]


def test_named_stacks_chain_where_widths_fit_once() -> None:
    main = main_of(shapes_of(("b.", nn.LSTM(7, 5)), ("a.", nn.LSTM(3, 7, 2))))
    assert [layer["weight_ih"] for layer in main["layers"]] == ["a.weight_ih_l0", "a.weight_ih_l1", "b.weight_ih_l0"]


def test_numbered_stacks_of_equal_width() -> None:
    main = main_of(shapes_of(("lstm2.", nn.LSTM(5, 5)), ("lstm1.", nn.LSTM(5, 5))))
    assert [layer["weight_ih"] for layer in main["layers"]] == ["lstm1.weight_ih_l0", "lstm2.weight_ih_l0"]


def test_projection_counts_as_output() -> None:
    main = main_of(shapes_of(("rnn.", nn.LSTM(3, 8, proj_size=5, bidirectional=True)), ("out.", nn.Linear(10, 2))))
    assert main["layers"][0]["weight_hr"] == "rnn.weight_hr_l0"
    assert main["head"][0]["weight"] == "out.weight"


HEAD2 = shapes_of(("rnn.", nn.GRU(3, 8)), ("fc.0.", nn.Linear(8, 8)), ("fc.2.", nn.Linear(8, 2)))


def test_activation_between_linear_layers_is_asked_for(tmp_path: Path) -> None:
    assert "activations" in reasons_of(HEAD2)
    with pytest.raises(UnsupportedError, match="activations"):
        load(save(tmp_path, HEAD2))
    # The proposal holds a word that no recipe accepts where the file does not say.
    proposed = yaml.safe_load(inspect(tmp_path / "m.pt").source)["source"]
    assert proposed["main"]["head"][0]["activation"] == "unknown"
    with pytest.raises(ValueError, match="Input should be"):
        Source.model_validate(proposed)
    loaded = load(tmp_path / "m.pt", source=Source.model_validate({"activations": ["relu", "none"], "readout": "mean"}))
    assert [linear.activation for linear in loaded.spec.main.head] == ["relu", "none"]
    assert (loaded.spec.main.readout, loaded.readout_stated) == ("mean", True)


def test_relu_then_l2_after_the_last_layer(tmp_path: Path) -> None:
    shapes = shapes_of(("lstm.", nn.LSTM(4, 6, 3)), ("linear.", nn.Linear(6, 6))) | {"similarity_weight": (1,), "similarity_bias": (1,)}
    hints = {"ignore": ["similarity_*"], "activations": ["relu_l2"]}
    assert load(save(tmp_path, shapes), source=Source.model_validate(hints)).spec.main.head[0].activation == "relu_l2"
    with pytest.raises(UnsupportedError, match="similarity_weight") as caught:
        load(tmp_path / "m.pt")
    assert len(caught.value.reasons) == 3  # one for each, and what to do


@pytest.mark.parametrize("given", [["relu"], ["relu", "none", "none"]])
def test_wrong_number_of_activations(given: list[str]) -> None:
    assert f"{len(given)} given for 2 linear layers" in reasons_of(HEAD2, activations=given)


SEQ2SEQ: dict[str, tuple[int, ...]] = {
    "enc_emb": (9, 8),
    **{f"enc_{k}": s for k, s in {"w_ih": (24, 8), "w_hh": (24, 8), "b_ih": (24,), "b_hh": (24,)}.items()},
    "dec_emb": (7, 8),
    **{f"dec_{k}": s for k, s in {"w_ih": (24, 8), "w_hh": (24, 8), "b_ih": (24,), "b_hh": (24,)}.items()},
    "fc_w": (7, 8),
    "fc_b": (7,),
}
DECODE = {"start": 2, "end": 3, "max_length": 20}


def test_encoder_decoder(tmp_path: Path) -> None:
    path = save(tmp_path, SEQ2SEQ)
    found = inspect(path)
    assert found.recognised is None
    assert len(found.reasons) == 1
    assert "start and end" in found.reasons[0]
    proposed = yaml.safe_load(found.source)["source"]
    assert proposed["decode"]["start"] == "unknown"
    automatic = load(path, source=Source.model_validate({"decode": DECODE}))
    by_hand = load(path, source=Source.model_validate(proposed | {"decode": DECODE}))
    assert automatic.spec == by_hand.spec
    assert automatic.spec.kind == "encoder-decoder"
    assert automatic.weights.keys() == by_hand.weights.keys() == automatic.spec.tensors().keys()
    assert all(torch.equal(automatic.weights[name], by_hand.weights[name]) for name in automatic.weights)


def test_decode_token_outside_the_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="below the decoder's vocabulary of 7"):
        load(save(tmp_path, SEQ2SEQ), source=Source.model_validate({"decode": DECODE | {"end": 7}}))


def test_torch_style_encoder_decoder(tmp_path: Path) -> None:
    shapes = shapes_of(
        ("encoder.embedding.", nn.Embedding(9, 4)),
        ("encoder.rnn.", nn.LSTM(4, 6, 2)),
        ("decoder.embedding.", nn.Embedding(7, 5)),
        ("decoder.rnn.", nn.LSTM(5, 6, 2)),
        ("decoder.fc_out.", nn.Linear(6, 7)),
    )
    spec = load(save(tmp_path, shapes), source=Source.model_validate({"decode": DECODE})).spec
    assert spec.entry.embedding is not None
    assert (spec.entry.embedding.num_embeddings, spec.main.output_size) == (9, 7)


RNN = ("rnn.", nn.LSTM(6, 8))


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        (shapes_of(("a.", nn.LSTM(5, 5)), ("b.", nn.LSTM(5, 5))), "join in 2 different orders"),
        (shapes_of(("a.", nn.LSTM(5, 4)), ("b.", nn.LSTM(5, 3))), "do not join"),
        (shapes_of(("fwd.", nn.LSTM(5, 5)), ("bwd.", nn.LSTM(5, 5))), "two directions"),
        (shapes_of(("a1.", nn.LSTM(5, 4)), ("a2.", nn.GRU(4, 3))), "different kinds"),
        (shapes_of(("rnn.", nn.RNN(5, 4))), "plain RNN"),
        (shapes_of(RNN, ("x.", nn.Linear(8, 3)), ("y.", nn.Linear(8, 4))), "do not join"),
        (shapes_of(RNN, ("fc.", nn.Linear(9, 3))), "do not join to the last recurrent layer's 8 outputs"),
        (shapes_of(("word_emb.", nn.Embedding(9, 6)), ("tag_emb.", nn.Embedding(5, 6)), RNN), "several tensors could be the embedding"),
        (shapes_of(("proj.", nn.Linear(8, 8)), ("rnn.", nn.GRU(8, 8))), "could stand before"),
        (shapes_of(("l1.", nn.GRU(3, 8)), ("mix.", nn.Linear(8, 8)), ("l2.", nn.GRU(8, 8))), "could stand before or between"),
        (
            dict(sorted(shapes_of(("rnn.", nn.GRU(8, 8)), ("table.", nn.Embedding(9, 8))).items(), reverse=False)),
            "could be the embedding or",
        ),
        ({k: v for k, v in shapes_of(RNN).items() if "weight_ih" not in k}, "no weight_ih"),
        ({k.replace("_l1", "_l2"): v for k, v in shapes_of(("rnn.", nn.GRU(5, 4, 2))).items()}, "missing"),
        ({k: v for k, v in shapes_of(("rnn.", nn.GRU(5, 4, 2, bidirectional=True))).items() if "l1_reverse" not in k}, "layer 1 reverse"),
        (shapes_of(("conv.", nn.Conv1d(2, 3, 3))), "no recurrent layer"),
        (SEQ2SEQ, "start and end"),
    ],
)
def test_uncertainty_is_a_reason_and_load_refuses(tmp_path: Path, shapes: dict[str, tuple[int, ...]], says: str) -> None:
    assert says in reasons_of(shapes)
    path = save(tmp_path, shapes)
    with pytest.raises(UnsupportedError) as caught:
        load(path)
    assert says in str(caught.value)
    found = inspect(path)
    assert found.recognised is None
    assert says in found.render()
    assert yaml.safe_load(found.source)["source"]


def test_leftovers_are_each_named_with_what_they_look_like(tmp_path: Path) -> None:
    shapes = shapes_of(
        RNN, ("attn.", nn.Linear(8, 1)), ("norm.", nn.LayerNorm(8)), ("conv.", nn.Conv1d(6, 6, 3)), ("crf.", nn.Linear(8, 8))
    )
    with pytest.raises(UnsupportedError) as caught:
        load(save(tmp_path, shapes))
    told = caught.value.reasons
    assert len(told) == 9  # one for each, and what to do
    for part in ("attention", "normalisation", "convolution", "conditional random field"):
        assert part in str(caught.value)
    ignored = load(tmp_path / "m.pt", source=Source.model_validate({"ignore": ["attn.*", "norm.*", "conv.*", "crf.*"]}))
    assert ignored.spec.main.head == ()


def test_hints_that_do_not_apply() -> None:
    lstm = shapes_of(RNN)
    assert "gru_reset_before was asked for" in reasons_of(lstm, cell="gru_reset_before")
    assert "no linear layer" in reasons_of(lstm, activations=["relu"])
    assert "source.decode" in reasons_of(lstm, decode=DECODE)


def test_proposed_source_gives_the_same_network(tmp_path: Path) -> None:
    shapes = shapes_of(("emb.", nn.Embedding(9, 6)), ("rnn.", nn.LSTM(6, 8, 2, bidirectional=True, proj_size=3)), ("out.", nn.Linear(6, 9)))
    path = save(tmp_path, shapes)
    found, automatic = inspect(path), load(path)
    assert found.recognised == automatic.spec
    assert found.readout_stated is False
    by_hand = load(path, source=Source.model_validate(yaml.safe_load(found.source)["source"]))
    assert by_hand.spec == automatic.spec
    assert all(torch.equal(by_hand.weights[name], automatic.weights[name]) for name in automatic.weights)


def test_inspection_shows_names_without_control_characters(tmp_path: Path) -> None:
    shapes = shapes_of(RNN) | {"evil\n  main: {}\x1b[2J": (2,)}
    found = inspect(save(tmp_path, shapes))
    assert "\x1b" not in found.render()
    assert list(yaml.safe_load(found.source)["source"]) == ["main"]
