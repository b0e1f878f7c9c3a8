"""transformers' names for tasks, pipelines and the tokenizer of a packed directory; nothing here uses the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import rnn2bin
from rnn2bin import pack, tokenizer
from rnn2bin.cells.network import Network
from rnn2bin.errors import UsageError
from rnn2bin.evaluation import html
from rnn2bin.spec import EmbeddingSpec, LayerSpec, LinearSpec, RnnSpec, SectionSpec

LETTERS = list("abcdef\n")
TASKS = {
    "classify": SectionSpec((LayerSpec("gru", 3, 5),), EmbeddingSpec(7, 3), (LinearSpec(5, 3, activation="softmax"),), "last"),
    "yes or no": SectionSpec((LayerSpec("gru", 3, 5),), EmbeddingSpec(7, 3), (LinearSpec(5, 1, activation="sigmoid"),), "last"),
    "tag": SectionSpec((LayerSpec("lstm", 3, 5),), EmbeddingSpec(7, 3), (LinearSpec(5, 3),)),
    "next-token": SectionSpec((LayerSpec("lstm", 3, 5), LayerSpec("gru", 5, 5)), EmbeddingSpec(7, 3), (LinearSpec(5, 7),)),
}
LABELS = {"classify": ["one", "two", "three"], "yes or no": ["no", "yes"], "tag": ["A", "B", "C"], "next-token": None}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def packed(folder: Path, name: str) -> Path:
    torch.manual_seed(0)
    spec = RnnSpec({"main": TASKS[name]})
    network = Network(spec, {prefix: (True,) * len(layer.kind.gate_names) for prefix, layer in spec.cell_names()}, levels="learned")
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.uniform_(-2, 2)
    network.project_levels()
    task = {"name": "classify" if name == "yes or no" else name, "vocabulary": LETTERS, "labels": LABELS[name]}
    with pack.staging(folder / "OUT") as staged:
        pack.write_model(network, staged, provenance={"source": "x.pt"}, task=task)
        assert tokenizer.write(staged, LETTERS)
        (staged / "README.md").write_text(html.render_card({"task": task["name"]}))
    return folder / "OUT"


def logits_of(path: Path, x: torch.Tensor) -> torch.Tensor:
    """(B,T,O) or (B,O), by the packed network itself."""
    network = pack.read_network(path, json.loads((path / "config.json").read_text()))
    with torch.no_grad():
        y = network.eval()(x.t(), logits=True).y
    return y.transpose(0, 1) if y.ndim == 3 else y


@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("classify", "SequenceClassification"),
        ("yes or no", "SequenceClassification"),
        ("tag", "TokenClassification"),
        ("next-token", "CausalLM"),
    ],
)
def test_auto_models_of_tasks(tmp_path: Path, name: str, auto: str) -> None:
    import transformers

    out, x = packed(tmp_path, name), torch.randint(7, (4, 9))
    model = getattr(transformers, f"AutoModelFor{auto}").from_pretrained(out)
    assert type(model).__name__ == f"Rnn2binFor{auto}"
    assert json.loads((out / "config.json").read_text())["architectures"] == [f"Rnn2binFor{auto}"]
    logits = logits_of(out, x)
    assert torch.equal(model(x).logits, logits)
    outputs = logits.shape[-1]
    labels = x if name == "next-token" else torch.randint(max(2, outputs), logits.shape[:-1])
    loss = model(x, labels=labels).loss
    if name == "yes or no":
        wanted = -torch.nn.functional.logsigmoid(logits[:, 0] * (2 * labels - 1)).mean()
    else:
        ours, theirs = (logits[:, :-1], labels[:, 1:]) if name == "next-token" else (logits, labels)
        wanted = -ours.log_softmax(-1).gather(-1, theirs[..., None]).mean()
    torch.testing.assert_close(loss, wanted)
    loss.backward()  # it can be trained on, as any of transformers' models
    assert all(p.grad is not None for name, p in model.named_parameters() if name.endswith("head.0.weight"))
    if LABELS[name]:
        assert model.config.id2label == dict(enumerate(LABELS[name]))  # type: ignore[arg-type]


def test_save_and_load_again_as_any_class(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForTokenClassification

    out, x = packed(tmp_path, "tag"), torch.randint(7, (2, 5))
    first = AutoModelForTokenClassification.from_pretrained(out)
    first.save_pretrained(tmp_path / "saved")
    second = AutoModelForTokenClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(first(x).logits, second(x).logits)
    assert second.config.id2label == {0: "A", 1: "B", 2: "C"}
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "saved")(x).logits, first(x).logits)
    y, _ = rnn2bin.load(tmp_path / "saved", backend="torch")(x.t())
    assert torch.equal(y.transpose(0, 1), first(x).logits)


@pytest.mark.parametrize(("name", "auto"), [("classify", "TokenClassification"), ("tag", "SequenceClassification"), ("tag", "CausalLM")])
def test_a_network_of_another_task_is_refused(tmp_path: Path, name: str, auto: str) -> None:
    import transformers

    with pytest.raises(UsageError, match="AutoModel loads any packed network"):
        getattr(transformers, f"AutoModelFor{auto}").from_pretrained(packed(tmp_path, name))


def test_generation_carries_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    out = packed(tmp_path, "next-token")
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    prompt = torch.randint(7, (3, 4))
    read: list[int] = []
    run = model.run
    monkeypatch.setattr(model, "run", lambda ids, **given: read.append(ids.shape[1]) or run(ids, **given))
    written = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert written.shape == (3, 10)
    assert read == [4, 1, 1, 1, 1, 1]
    x = prompt
    for _ in range(6):
        x = torch.cat([x, logits_of(out, x)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(written, x)
    torch.manual_seed(1)
    assert model.generate(prompt, max_new_tokens=3, do_sample=True, pad_token_id=0).shape == (3, 7)
    with pytest.raises(UsageError, match="num_beams"):
        model.generate(prompt, num_beams=2, max_new_tokens=2)
    with pytest.raises(UsageError, match="same length"):
        model.generate(prompt, attention_mask=torch.tensor([[0, 1, 1, 1]] * 3), max_new_tokens=2, pad_token_id=0)


def test_pipelines_need_nothing_but_the_directory(tmp_path: Path) -> None:
    from transformers import pipeline

    text = pipeline("text-generation", model=str(packed(tmp_path / "lm", "next-token")))
    (written,) = text("abc", max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert written["generated_text"].startswith("abc")
    assert len(written["generated_text"]) == 7
    out = packed(tmp_path / "classify", "classify")
    found: Any = pipeline("text-classification", model=str(out))("abcf")
    scores = logits_of(out, torch.tensor([[0, 1, 2, 5]])).softmax(-1)[0]
    assert found == [{"label": LABELS["classify"][int(scores.argmax())], "score": pytest.approx(float(scores.max()))}]  # type: ignore[index]
    tags: Any = pipeline("token-classification", model=str(packed(tmp_path / "tag", "tag")), ignore_labels=[])("abd")
    assert [(tag["word"], tag["start"]) for tag in tags] == [("a", 0), ("b", 1), ("d", 2)]
    assert {tag["entity"] for tag in tags} <= {"A", "B", "C"}


@pytest.mark.parametrize(
    ("vocabulary", "text", "ids"),
    [
        (["<pad>", "<unk>", "a", "b", " "], "ab x", [2, 3, 4, 1]),
        (["<pad>", "<unk>", "the", "cat"], "the cat sat", [2, 3, 1]),
        (["a", "\n", "é"], "é\na", [2, 1, 0]),
    ],
)
def test_the_tokenizer_numbers_as_the_network_does(tmp_path: Path, vocabulary: list[str], text: str, ids: list[int]) -> None:
    from transformers import AutoTokenizer

    assert tokenizer.write(tmp_path, vocabulary)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "rnn2bin", "format_version": 1}))
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert found(text)["input_ids"] == ids
    if "<unk>" not in vocabulary:
        assert found.decode(ids) == text
    else:
        assert (found.unk_token, found.pad_token) == ("<unk>", "<pad>")


@pytest.mark.parametrize("vocabulary", [None, [], ["a", "a"], ["a", ""]])
def test_what_can_be_no_tokenizer_writes_none(tmp_path: Path, vocabulary: list[str] | None) -> None:
    assert not tokenizer.write(tmp_path, vocabulary)
    assert not list(tmp_path.iterdir())
