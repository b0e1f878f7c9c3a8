"""Reading data: every format, every refusal (which file, what is wrong, what to do), and parts that never overlap."""

from __future__ import annotations

import functools
import operator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rnn2bin import data
from rnn2bin.data import Part
from rnn2bin.errors import DataError, UnsafeError
from rnn2bin.recipe import Recipe, parse
from rnn2bin.spec import DecodeSpec, EmbeddingSpec, LayerSpec, RnnSpec, SectionSpec

TENSORS = {
    "inputs": torch.arange(90.0).view(10, 3, 3),
    "lengths": torch.tensor([1, 2, 3, 3, 2, 1, 3, 3, 2, 1]),
    "targets": torch.arange(10) % 4,
}


def floats(size: int = 3) -> RnnSpec:
    return RnnSpec({"main": SectionSpec((LayerSpec("gru", size, 4),))})


def tokens(size: int) -> RnnSpec:
    return RnnSpec({"main": SectionSpec((LayerSpec("gru", 2, 4),), EmbeddingSpec(size, 2))})


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **{name: t.numpy() for name, t in tensors.items()})
    elif path.suffix == ".safetensors":
        save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return path


def reasons(call, *args: Any, **kwargs: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        call(*args, **kwargs)
    return list(caught.value.reasons)


# ---------------------------------------------------------------------------------------------- tensor files


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt", ".pth", ".NPZ"])
def test_formats(tmp_path, suffix):
    if suffix == ".NPZ":
        path = write(tmp_path / "data.npz", TENSORS).rename(tmp_path / "data.NPZ")
    else:
        path = write(tmp_path / f"data{suffix}", TENSORS)
    part = data.read_tensors(path)
    for name, wanted in TENSORS.items():
        assert torch.equal(getattr(part, name), wanted)
    assert part.target_lengths is None
    assert not part.stream


@pytest.mark.parametrize(("given", "wanted"), [(torch.float64, torch.float32), (torch.float16, torch.float32), (torch.uint8, torch.int64)])
def test_numbers_are_floats_or_longs(tmp_path, given, wanted):
    inputs = torch.ones(4, 3, 3, dtype=given) if wanted == torch.float32 else torch.ones(4, 3, dtype=given)
    assert data.read_tensors(write(tmp_path / "d.npz", {"inputs": inputs})).inputs.dtype == wanted


def changed(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {name: t for name, t in {**TENSORS, **tensors}.items() if t is not None}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (changed(inputs=None), ["needs an array 'inputs'", "(N,T,I)"]),
        (changed(input=torch.zeros(1)), ["unknown array 'input'", "known: inputs, lengths"]),
        (changed(inputs=torch.zeros(10)), ["shape (10,)", "wanted (N,T) tokens"]),
        (changed(inputs=torch.zeros(10, 0, 3), lengths=None), ["no sequences", "(10, 0, 3)"]),
        (changed(inputs=TENSORS["inputs"].index_fill(1, torch.tensor(1), float("nan"))), ["inputs[0, 1, 0] is NaN or infinite", "repair"]),
        (changed(targets=torch.full((10, 3), float("inf"))), ["targets[0, 0] is NaN or infinite"]),
        (changed(targets=torch.arange(9)), ["targets has 9 sequences, inputs 10"]),
        (changed(targets=torch.tensor(3)), ["targets is a single number"]),
        (changed(lengths=torch.full((10,), 4)), ["lengths must lie in 1…3; found 4…4"]),
        (changed(lengths=torch.zeros(10, dtype=torch.long)), ["lengths must lie in 1…3; found 0…0"]),
        (changed(lengths=torch.ones(10)), ["lengths must be whole numbers of shape (N,)"]),
        (changed(lengths=torch.ones(10, 1, dtype=torch.long)), ["lengths must be whole numbers of shape (N,), not (10, 1)"]),
        (changed(target_lengths=torch.ones(10, dtype=torch.long)), ["target_lengths given, but targets have no time axis"]),
    ],
)
def test_refused_arrays(tmp_path, tensors, words):
    path = write(tmp_path / "bad.npz", tensors)
    found = reasons(data.read_tensors, path)
    assert all(reason.startswith(str(path)) for reason in found)
    assert all(any(word in reason for reason in found) for word in words), found


def test_all_reasons_at_once(tmp_path):
    path = write(tmp_path / "bad.npz", changed(x=torch.zeros(10), lengths=torch.full((10,), 9), targets=torch.arange(4)))
    assert len(reasons(data.read_tensors, path)) == 3


def test_refused_files(tmp_path):
    for name, text, word in (
        ("d.csv", "1,2", "give .npz"),
        ("d.npz", "no zip", "npz"),
        ("d.safetensors", "x" * 50, "safetensors"),
        ("d.pt", "?", "d.pt"),
    ):
        path = tmp_path / name
        path.write_text(text)
        assert any(str(path) in reason and word in reason for reason in reasons(data.read_tensors, path))


def test_an_array_of_objects_stays_unsafe(tmp_path):
    np.savez(tmp_path / "d.npz", inputs=np.array([{}, {}], dtype=object))
    with pytest.raises(UnsafeError, match="pickled"):
        data.read_tensors(tmp_path / "d.npz")


# ---------------------------------------------------------------------------------------------- what is given


def load(given: Any, spec: RnnSpec, **parts: Any) -> data.Parts:
    found = data.load_parts(given, parse({"data": parts}), spec)
    assert found is not None
    return found


def test_no_data_is_none():
    assert data.load_parts(None, Recipe(), floats()) is None


def test_parts_given_apart_are_taken_as_they_are(tmp_path):
    paths = {
        name: write(tmp_path / f"{name}.npz", {"inputs": torch.full((k, 3, 3), float(k))})
        for k, name in enumerate(("train", "valid", "test"), 2)
    }
    for parts in (
        load([f"{name}={path}" for name, path in paths.items()], floats()),
        load(None, floats(), train=str(paths["train"]), valid_path=str(paths["valid"]), test_path=str(paths["test"])),
    ):
        assert [len(p) for p in (parts.train, parts.valid, parts.test)] == [2, 3, 4]
        assert [float(p.inputs.max()) for p in (parts.train, parts.valid, parts.test)] == [2, 3, 4]


def test_a_name_with_an_equals_sign_is_a_path(tmp_path):
    path = write(tmp_path / "a=b.npz", TENSORS)
    assert len(load(path, floats()).train) == 8


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (["missing.npz"], "missing.npz: no such data file"),
        (["empty.npz"], "empty.npz: the data file is empty"),
        (["valid=data.npz"], "train=FILE"),
        (["data.npz", "train=data.npz"], "give one file"),
        (["data.npz", "data.npz"], "given for the same part"),
        (["train=data.npz", "valid=text.txt"], "not both"),
    ],
)
def test_refused_choices(tmp_path, monkeypatch, given, word):
    monkeypatch.chdir(tmp_path)
    write(Path("data.npz"), TENSORS)
    Path("empty.npz").touch()
    Path("text.txt").write_text("abc" * 100)
    assert word in reasons(data.load_parts, given, Recipe(), floats())[0]


@pytest.mark.parametrize(
    ("inputs", "spec", "word"),
    [
        (torch.zeros(20, 3, 3), tokens(5), "train: the network reads tokens"),
        (torch.full((20, 3), 5), tokens(5), "tokens must lie in 0…4; found 5…5"),
        (torch.full((20, 3), -1), tokens(5), "found -1…-1"),
        (torch.zeros(20, 3, 2), floats(), "reads floats (N,T,3), but inputs are floats (16, 3, 2)"),
        (torch.zeros(20, 3, dtype=torch.long), floats(), "but inputs are whole numbers"),
    ],
)
def test_inputs_that_the_network_does_not_read(tmp_path, inputs, spec, word):
    assert word in reasons(load, write(tmp_path / "d.npz", {"inputs": inputs}), spec)[0]


# ---------------------------------------------------------------------------------------------- splits


@settings(deadline=None, max_examples=80)
@given(st.integers(3, 200), st.floats(0, 1), st.floats(0, 1), st.integers(0, 10))
def test_splits_never_overlap_and_leave_nothing_out(n, valid, test, seed):
    whole = Part(torch.arange(n)[:, None], torch.ones(n, dtype=torch.long), torch.arange(n))
    recipe = parse({"seed": seed, "data": {"valid": valid, "test": test}})
    try:
        parts = data.split(whole, recipe)
    except DataError:
        assert max(1, round(n * valid)) + max(1, round(n * test)) >= n
        return
    members = [p.targets.tolist() for p in (parts.train, parts.valid, parts.test)]
    assert sorted(functools.reduce(operator.iadd, members, [])) == list(range(n))
    assert all(members)
    assert all(torch.equal(p.inputs[:, 0], p.targets) for p in (parts.train, parts.valid, parts.test))
    again = data.split(whole, recipe)
    assert torch.equal(again.test.targets, parts.test.targets)


def test_another_seed_splits_otherwise():
    whole = Part(torch.arange(100)[:, None])
    held = [set(data.split(whole, parse({"seed": seed})).test.inputs[:, 0].tolist()) for seed in (0, 1)]
    assert held[0] != held[1]


def test_a_part_given_apart_is_not_split_again():
    whole, other = Part(torch.arange(100)[:, None]), Part(torch.arange(5)[:, None])
    parts = data.split(whole, Recipe(), test=other)
    assert parts.test is other
    assert len(parts.train) + len(parts.valid) == 100


def test_too_few_sequences(tmp_path):
    assert "too few to hold out" in reasons(data.split, Part(torch.zeros(2, 3, 3)), Recipe())[0]


# ---------------------------------------------------------------------------------------------- text


def text_file(tmp_path: Path, text: str, name: str = "t.txt") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@settings(deadline=None, max_examples=30)
@given(st.integers(700, 3000), st.floats(0.1, 0.3), st.floats(0.1, 0.3))
def test_text_is_cut_in_order_without_overlap(tmp_path_factory, n, valid, test):
    spec = tokens(256)
    text = "".join(chr(65 + (k * k + k // 7) % 26) for k in range(n))
    path = text_file(tmp_path_factory.mktemp("t"), text)
    parts = load(path, spec, valid=valid, test=test)
    train = parts.train.inputs[0]
    held = [p.inputs.flatten() for p in (parts.valid, parts.test)]
    assert train.tolist() == list(text.encode())[: len(train)]
    start = len(train)
    assert held[0].tolist() == list(text.encode())[start : start + len(held[0])]
    assert held[1].tolist() == list(text.encode())[n - int(n * test) :][: len(held[1])]
    assert start + int(n * valid) + int(n * test) == n
    assert all(len(p.inputs) == data.TEXT_ROWS and p.stream for p in (parts.valid, parts.test))


def test_characters_in_sorted_order(tmp_path):
    parts = load(text_file(tmp_path, "cab" * 300), tokens(3))
    assert parts.vocabulary == ("a", "b", "c")
    assert parts.train.inputs[0, :6].tolist() == [2, 0, 1, 2, 0, 1]


def test_characters_of_all_files_are_numbered_together(tmp_path):
    given = [f"train={text_file(tmp_path, 'ab' * 500, 'a.txt')}", f"valid={text_file(tmp_path, 'cb' * 200, 'b.txt')}"]
    parts = load(given, tokens(3))
    assert parts.vocabulary == ("a", "b", "c")
    assert set(parts.valid.inputs.flatten().tolist()) == {1, 2}


def test_bytes_where_the_network_knows_256(tmp_path):
    parts = load(text_file(tmp_path, "hé" * 300), tokens(256))
    assert parts.vocabulary is None
    assert parts.train.inputs[0, :3].tolist() == list("hé".encode())


def test_words_of_a_vocabulary_file(tmp_path):
    vocabulary = text_file(tmp_path, "the\ncat\n<unk>\n", "v.txt")
    parts = load(text_file(tmp_path, "the cat sat\n" * 300), tokens(3), tokens="words", vocabulary=str(vocabulary))
    assert parts.train.inputs[0, :4].tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("text", "size", "options", "words"),
    [
        ("abc" * 300, 7, {}, ["knows 7 tokens", "3 different characters", "data.vocabulary"]),
        ("abc" * 300, 3, {"vocabulary": "ab"}, ["2 tokens, but the network knows 3"]),
        ("abd" * 300, 3, {"vocabulary": "abc"}, ["not in the vocabulary, e.g. 'd'"]),
        ("abc" * 300, 3, {"vocabulary": None}, ["no such vocabulary file"]),
        ("abc" * 30, 3, {}, ["tokens of text for", "at least 64"]),
    ],
)
def test_refused_text(tmp_path, text, size, options, words):
    if "vocabulary" in options:
        letters = options["vocabulary"]
        path = text_file(tmp_path, "\n".join(letters), "v.txt") if letters else tmp_path / "none"
        options = {"vocabulary": str(path)}
    found = reasons(load, text_file(tmp_path, text), tokens(size), **options)
    assert all(any(word in reason for reason in found) for word in words), found


def test_refused_kinds_of_text(tmp_path):
    path = text_file(tmp_path, "abc" * 300)
    assert "token input" in reasons(load, path, floats())[0]
    section = SectionSpec((LayerSpec("gru", 2, 4),), EmbeddingSpec(3, 2))
    assert "token input" in reasons(load, path, RnnSpec({"encoder": section, "decoder": section}, DecodeSpec(0, 1, 5)))[0]
    path.write_bytes(b"abc\xff" * 300)
    assert f"{path}: not UTF-8 text (byte 3)" in reasons(load, path, tokens(3))[0]


@pytest.mark.parametrize(
    ("vocabulary", "text", "wanted"),
    [
        (None, "hé", [104, 195, 169]),
        (("a", "b"), "abba", [0, 1, 1, 0]),
        (("<unk>", "a", "b"), "abc", [1, 2, 0]),
        (("the", "cat", "[UNK]"), "the  dog\ncat", [0, 2, 1]),
        (("a",), "", []),
    ],
)
def test_encode_text(vocabulary, text, wanted):
    found = data.encode_text(text, vocabulary)
    assert found.tolist() == wanted
    assert found.dtype == torch.long


# ---------------------------------------------------------------------------------------------- batches of a part


@pytest.mark.parametrize("values", [5, 2], ids=["as wide as long", "narrow"])
def test_values_of_a_sequence_are_never_taken_for_steps(values):
    part = Part(torch.randn(3, 5, 2), None, torch.randn(3, values), per_sequence=True)
    assert torch.equal(data.collate(part).targets, part.targets)


def test_a_batch_is_time_major_and_cut_to_its_longest():
    part = Part(torch.randn(3, 6, 2), torch.tensor([2, 4, 1]), torch.arange(18).view(3, 6), None)
    batch = data.collate(part)
    assert torch.equal(batch.inputs, part.inputs[:, :4].transpose(0, 1))
    assert torch.equal(batch.targets, part.targets[:, :4].t())


def test_evaluation_covers_a_part_once_and_in_order():
    part = Part(torch.arange(10).view(10, 1, 1).float())
    seen = torch.cat([b.inputs[0, :, 0] for b in data.evaluation_batches(part, batch_size=4)])
    assert seen.tolist() == list(range(10))


def test_evaluation_of_a_stream_predicts_every_token_but_the_first():
    part = Part(torch.arange(2 * 1300).view(2, 1300), stream=True)
    batches = list(data.evaluation_batches(part))
    assert torch.equal(torch.cat([b.inputs for b in batches]), part.inputs[:, :-1].t())
    assert torch.equal(torch.cat([b.targets for b in batches]), part.inputs[:, 1:].t())
    assert [b.first for b in batches] == [True, False, False]


def test_the_digest_sees_every_tensor():
    part = Part(torch.zeros(2, 3), torch.ones(2), torch.zeros(2))
    parts = data.Parts(part, part, part)
    changes = [
        Part(torch.ones(2, 3), part.lengths, part.targets),
        Part(part.inputs, torch.zeros(2), part.targets),
        Part(part.inputs, part.lengths, torch.ones(2)),
    ]
    digests = {data.digest(parts), *(data.digest(data.Parts(part, change, part)) for change in changes)}
    assert len(digests) == 4
