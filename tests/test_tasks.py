"""Losses and metrics against plain torch on unpadded slices; pads never count."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close
from torch.nn import functional

from rnn2bin import tasks
from rnn2bin.cells.network import Network
from rnn2bin.data import IGNORE, Batch, Part, collate
from rnn2bin.errors import DataError
from rnn2bin.gates.estimators import FLOAT
from rnn2bin.measure import Candidate, compare
from rnn2bin.recipe import Loss, parse
from rnn2bin.spec import DecodeSpec, EmbeddingSpec, LayerSpec, LinearSpec, RnnSpec, SectionSpec

N, T, I, H, C = 5, 7, 2, 4, 3  # noqa: E741
LENGTHS = torch.tensor([7, 1, 4, 2, 6])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network_of(readout: str, *, size: int = C, activation: str = "none", words: int = 0, seed: int = 0) -> Network:
    embedding = EmbeddingSpec(words, I) if words else None
    section = SectionSpec((LayerSpec("gru", I, H),), embedding, (LinearSpec(H, size, activation=activation),), readout)
    return filled(Network(RnnSpec({"main": section})), seed)


def filled(network: Network, seed: int) -> Network:
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=seeded(seed + p.numel())))
    return network.eval().requires_grad_(False)


def labels(*shape: int, classes: int = C) -> torch.Tensor:
    return torch.randint(classes, shape, generator=seeded(4))


def case(name: str) -> tuple[Network, Network, Part, tasks.Task]:
    """(teacher, another network, data, task)."""
    x = torch.randn(N, T, I, generator=seeded(1))
    tagged = labels(N, T)
    tagged[0, 2] = IGNORE
    options: dict[str, Any] = {"readout": "all"}
    targets: torch.Tensor | None = None
    match name:
        case "tag":
            targets = tagged
        case "tag-binary":
            options |= {"size": 1, "activation": "sigmoid"}
            targets = labels(N, T, classes=2)
        case "classify":
            options["readout"], targets = "mean", labels(N)
        case "classify-sigmoid":
            options |= {"readout": "last", "activation": "sigmoid"}
            targets = labels(N)
        case "regress":
            targets = torch.randn(N, T, C, generator=seeded(2))
        case "regress-sigmoid":
            options["activation"], targets = "sigmoid", torch.rand(N, T, C, generator=seeded(2))
        case "regress-one":
            options |= {"readout": "last", "size": T}
            targets = torch.randn(N, T, generator=seeded(2))  # as wide as the sequences are long
        case "next-token":
            options |= {"size": 6, "words": 6}
            x = torch.randint(6, (N, T), generator=seeded(1))
    lengths = LENGTHS.clamp_min(2) if name == "next-token" else LENGTHS
    teacher, other = network_of(**options), network_of(**options, seed=50)
    part = Part(x, lengths, targets)
    task = tasks.resolve(parse({"task": name.split("-")[0] if name != "next-token" else name}), teacher.spec, part)
    return teacher, other, tasks.settled(task, part), task


CASES = ["tag", "tag-binary", "classify", "classify-sigmoid", "regress", "regress-sigmoid", "regress-one", "next-token", "match"]


def slices(network: Network, part: Part, task: tasks.Task) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Each sequence alone, without its pads: (outputs (K,O), targets (K,…)), what is not counted left out."""
    found = []
    for n in range(len(part)):
        steps = int(part.lengths[n])
        y = network(part.inputs[n : n + 1, :steps].transpose(0, 1), mode=FLOAT, logits=task.name != "regress").y
        every = task.spec.main.readout == "all"
        y = y[:, 0] if every else y
        targets = None if part.targets is None else (part.targets[n, :steps] if every else part.targets[n : n + 1])
        if targets is not None and not targets.is_floating_point():
            y, targets = y[targets != IGNORE], targets[targets != IGNORE]
        found.append((y, targets))
    return found


def plain_loss(task: tasks.Task, y: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean over steps."""
    if task.name == "regress":
        return functional.mse_loss(y, targets)
    if y.shape[-1] == 1:
        return functional.binary_cross_entropy(torch.sigmoid(y[:, 0]), targets.float())
    return functional.cross_entropy(y, targets)


def joined(rows: list[tuple[torch.Tensor, torch.Tensor | None]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([y for y, _ in rows]), torch.cat([t for _, t in rows if t is not None])


@pytest.mark.parametrize("name", [c for c in CASES if c != "match"])
def test_the_task_loss_is_plain_torch_on_unpadded_slices(name):
    teacher, other, part, task = case(name)
    prepared = tasks.prepare(task, collate(part), teacher)
    y = prepared.forward(other, mode=FLOAT, walk=tasks.walk).y
    assert_close(tasks.task_loss(task, prepared, y), plain_loss(task, *joined(slices(other, part, task))))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", CASES)
def test_the_teacher_loss_is_plain_torch_on_unpadded_slices(name, temperature):
    teacher, other, part, task = case(name)
    prepared = tasks.prepare(task, collate(part), teacher)
    theirs, ours = (prepared.forward(network, mode=FLOAT, walk=tasks.walk).y for network in (teacher, other))
    p, q = (torch.cat([y for y, _ in slices(network, part, task)]) for network in (teacher, other))
    if tasks.distribution(task) == "values":
        wanted = (p - q).square().mean() / p.var(0, unbiased=False).mean()
    elif tasks.distribution(task) == "bernoulli":
        p, q = torch.sigmoid(p / temperature), torch.sigmoid(q / temperature)
        kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        wanted = kl.mean() * temperature**2
    else:
        wanted = functional.kl_div((q / temperature).log_softmax(-1), (p / temperature).softmax(-1), reduction="batchmean") * temperature**2
    weights = Loss(temperature=temperature)
    assert_close(tasks.teacher_loss(task, weights, prepared, ours, theirs), wanted)
    assert float(tasks.teacher_loss(task, weights, prepared, theirs, theirs)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_the_losses_of_sequences_have_the_loss_as_their_mean_and_belong_to_their_sequence(name):
    teacher, other, part, task = case(name)
    prepared = tasks.prepare(task, collate(part), teacher)
    theirs, ours = (prepared.forward(network, mode=FLOAT, walk=tasks.walk).y for network in (teacher, other))
    each = tasks.sequence_losses(task, Loss(), prepared, ours, theirs)
    assert each.shape == (len(part),)
    assert_close(each.mean(), tasks.loss(task, Loss(), prepared, ours, theirs))
    changed = ours.clone()
    changed[..., 1, :] += torch.randn(ours.shape[-1], generator=seeded(4))  # outputs of the second sequence
    moved = tasks.sequence_losses(task, Loss(), prepared, changed, theirs) != each
    assert moved.tolist() == [n == 1 for n in range(len(part))]


def test_loss_weights():
    teacher, other, part, task = case("tag")
    prepared = tasks.prepare(task, collate(part), teacher)
    theirs, ours = (prepared.forward(network, mode=FLOAT, walk=tasks.walk).y for network in (teacher, other))
    of = lambda **weights: float(tasks.loss(task, Loss(**weights), prepared, ours, theirs))
    label, match = of(task=1, teacher=0), of(task=0, teacher=1)
    assert of(task=1, teacher=3) == pytest.approx((label + 3 * match) / 4)
    assert of(task=2, teacher=0) == pytest.approx(label)
    unlabelled = replace(prepared, targets=None)
    assert float(tasks.loss(task, Loss(task=1, teacher=0), unlabelled, ours, theirs)) == pytest.approx(match)


@pytest.mark.parametrize("name", CASES)
def test_metrics_are_plain_torch_on_unpadded_slices(name):
    teacher, other, part, task = case(name)
    found = compare(task, part, Candidate(teacher, FLOAT), {"other": Candidate(other, FLOAT)}, batch_size=2)["other"]
    values = {found.metric: found.value, **found.extra_values()}
    rows, theirs = slices(other, part, task), torch.cat([y for y, _ in slices(teacher, part, task)])
    y = torch.cat([y for y, _ in rows])
    decide = (lambda t: t[:, 0] > 0) if y.shape[-1] == 1 else (lambda t: t.argmax(-1))
    wanted: dict[str, torch.Tensor] = {}
    if task.name == "match":
        wanted = {"cosine": functional.cosine_similarity(y, theirs, dim=-1).mean(), "mse": functional.mse_loss(y, theirs)}
    elif task.name == "regress":
        wanted = {"mse": functional.mse_loss(*joined(rows)), "cosine": functional.cosine_similarity(y, theirs, dim=-1).mean()}
    else:
        targets = joined(rows)[1]
        wanted["accuracy"] = (decide(y) == targets).float().mean()
        wanted["agreement"] = (decide(y) == decide(theirs)).float().mean()
        if task.name == "next-token":
            wanted["bits_per_token"] = functional.cross_entropy(y, targets) / math.log(2)
    assert set(values) == set(wanted)
    assert found.metric == tasks.DEFAULT_METRIC[task.name]
    for metric, value in wanted.items():
        assert values[metric] == pytest.approx(float(value), rel=1e-4), metric
    assert found.counts.tolist() == [len(y) for y, _ in rows]
    if part.targets is not None:
        assert found.loss == pytest.approx(float(plain_loss(task, *joined(rows))), rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_pads_never_count(name):
    """Other pads, other labels of pads: the same numbers, bit for bit."""
    teacher, other, part, task = case(name)
    dirty, targets = part.inputs.clone(), None if part.targets is None else part.targets.clone()
    for n, steps in enumerate(part.lengths.tolist()):
        dirty[n, steps:] = 5 if part.tokens else 1e6
        if targets is not None and task.spec.main.readout == "all":
            targets[n, steps:] = 0
    numbers = []
    for one in (part, replace(part, inputs=dirty, targets=targets)):
        prepared = tasks.prepare(task, collate(one), teacher)
        theirs, ours = (prepared.forward(network, mode=FLOAT, walk=tasks.walk).y for network in (teacher, other))
        found = compare(task, one, Candidate(teacher, FLOAT), {"other": Candidate(other, FLOAT)})["other"]
        numbers.append((float(tasks.loss(task, Loss(), prepared, ours, theirs)), found.to_dict()))
    assert numbers[0] == numbers[1]


# ---------------------------------------------------------------------------------------------- encoder–decoders


def transducer(seed: int = 0) -> Network:
    encoder = SectionSpec((LayerSpec("gru", I, H),), EmbeddingSpec(6, I))
    decoder = SectionSpec((LayerSpec("gru", I, H),), EmbeddingSpec(C + 1, I), (LinearSpec(H, C + 1),))
    return filled(Network(RnnSpec({"encoder": encoder, "decoder": decoder}, DecodeSpec(start=0, end=1, max_length=6))), seed)


def transduction(*, given: bool) -> tuple[Part, list[list[int]]]:
    """Sequences and what is to be written for each, the end token included; `given`: their lengths stand in the data."""
    written = [[2, 1], [3, 2, 2, 1], [1], [2, 3, 1]]
    targets = torch.tensor([w + [3 if given else 1] * (5 - len(w)) for w in written])
    lengths = torch.tensor([len(w) for w in written]) if given else None
    return Part(torch.randint(6, (4, 5), generator=seeded()), torch.tensor([5, 2, 3, 1]), targets, lengths), written


@pytest.mark.parametrize("given", [False, True], ids=["lengths found", "lengths given"])
def test_the_transduction_loss_counts_up_to_the_end_token(given):
    part, written = transduction(given=given)
    network = transducer()
    task = tasks.resolve(parse({}), network.spec, part)
    assert (task.name, task.metric) == ("transduce", "sequence_accuracy")
    prepared = tasks.prepare(task, collate(tasks.settled(task, part)), network)
    y = prepared.forward(network, mode=FLOAT, walk=tasks.walk).y
    losses = []
    for n, tokens in enumerate(written):
        x = part.inputs[n : n + 1, : int(part.lengths[n])].t()
        alone = network(x, decoder_input=torch.tensor([[0, *tokens[:-1]]]).t(), logits=True).y[:, 0]
        losses += functional.cross_entropy(alone, torch.tensor(tokens), reduction="none").tolist()
    assert float(tasks.task_loss(task, prepared, y)) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_the_teachers_own_output_stands_in_for_missing_targets():
    part, _ = transduction(given=False)
    teacher = transducer(29)
    part = replace(part, targets=None)
    task = tasks.resolve(parse({}), teacher.spec, part)
    found = compare(
        task,
        tasks.settled(task, part),
        Candidate(teacher, FLOAT),
        {"same": Candidate(teacher, FLOAT), "other": Candidate(transducer(12), FLOAT)},
    )
    assert found["same"].value == 1
    assert found["same"].extra_values()["token_error_rate"] == 0
    assert found["other"].value < 1


def test_a_teacher_that_is_not_judged_writes_nothing(monkeypatch):
    """Training measures its students every few hundred steps; what the teacher is worth does not change."""
    part, _ = transduction(given=True)
    teacher, other = transducer(29), transducer(12)
    task, wrote = tasks.resolve(parse({}), teacher.spec, part), []
    monkeypatch.setattr(teacher, "generate", lambda *_, **__: wrote.append(0))
    given = (task, tasks.settled(task, part), Candidate(teacher, FLOAT), {"other": Candidate(other, FLOAT)})
    alone = compare(*given, judges_teacher=False)
    assert (list(alone), wrote) == (["other"], [])
    monkeypatch.undo()
    both = compare(*given)
    assert torch.equal(both["other"].totals, alone["other"].totals)
    assert both["other"].extra_values() == alone["other"].extra_values()


def test_free_running_metrics():
    part, written = transduction(given=True)
    network = transducer(54)
    task = tasks.resolve(parse({}), network.spec, part)
    found = compare(task, tasks.settled(task, part), Candidate(network, FLOAT), {"x": Candidate(network, FLOAT)})["x"]
    tokens = network.generate(part.inputs.t(), lengths=part.lengths).t().tolist()
    cut = lambda ts: ts[: ts.index(1)] if 1 in ts else ts
    edits = [slow_distance(tuple(cut(a)), tuple(cut(b))) for a, b in zip(tokens, written, strict=True)]
    assert len({tuple(w) for w in tokens}) > 1
    assert found.value == pytest.approx(sum(e == 0 for e in edits) / 4)
    assert found.extra_values()["token_error_rate"] == pytest.approx(sum(edits) / sum(len(cut(w)) for w in written))


# ---------------------------------------------------------------------------------------------- edit distance


@cache
def slow_distance(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """By definition: drop, insert or replace the first token."""
    if not a or not b:
        return len(a) + len(b)
    return min(slow_distance(a[1:], b) + 1, slow_distance(a, b[1:]) + 1, slow_distance(a[1:], b[1:]) + (a[0] != b[0]))


words = st.lists(st.integers(0, 2), max_size=7)


@settings(deadline=None)
@given(words, words)
def test_edit_distance(a, b):
    assert tasks.edit_distance(a, b) == slow_distance(tuple(a), tuple(b))


@settings(deadline=None)
@given(words, words, words)
def test_edit_distance_is_a_metric(a, b, c):
    d = tasks.edit_distance
    assert d(a, a) == 0
    assert d(a, b) == d(b, a)
    assert d(a, c) <= d(a, b) + d(b, c)


# ---------------------------------------------------------------------------------------------- which task


@pytest.mark.parametrize(
    ("part", "network", "name"),
    [
        (Part(torch.zeros(2, 9, dtype=torch.long), stream=True), network_of("all", size=6, words=6), "next-token"),
        (Part(torch.zeros(2, 9, dtype=torch.long)), network_of("all", size=6, words=6), "next-token"),
        (Part(torch.zeros(2, 9, dtype=torch.long)), network_of("all", size=C, words=6), "match"),
        (Part(torch.zeros(2, T, I)), network_of("all"), "match"),
        (Part(torch.zeros(2, T, I), None, torch.zeros(2, dtype=torch.long)), network_of("last"), "classify"),
        (Part(torch.zeros(2, T, I), None, torch.zeros(2, T, dtype=torch.long)), network_of("all"), "tag"),
        (Part(torch.zeros(2, T, I), None, torch.zeros(2, C)), network_of("last"), "regress"),
    ],
)
def test_the_data_say_the_task(part, network, name):
    assert tasks.resolve(parse({}), network.spec, part).name == name


@pytest.mark.parametrize(
    ("task", "targets", "network", "word"),
    [
        ({"task": "classify"}, None, network_of("last"), "no targets"),
        ({"task": "classify"}, torch.tensor([0, C]), network_of("last"), "labels must lie in 0…2"),
        ({"task": "classify"}, torch.tensor([0, -1]), network_of("last"), "labels must lie in"),
        ({"task": "classify"}, torch.tensor([0.0, 1.0]), network_of("last"), "whole numbers"),
        ({"task": "classify"}, torch.tensor([0, 1]), network_of("all"), "readout"),
        ({"task": "tag"}, torch.zeros(2, T - 1, dtype=torch.long), network_of("all"), f"wanted (N,{T})"),
        ({"task": "regress"}, torch.zeros(2, C + 1), network_of("last"), "targets have shape (2, 4)"),
        ({"task": "regress"}, torch.zeros(2, C), network_of("all"), "targets have shape (2, 3)"),
        ({"task": "next-token"}, None, network_of("all"), "needs token inputs"),
        ({"task": "transduce"}, None, network_of("all"), "not an encoder–decoder"),
        ({"task": "match"}, None, transducer(), "task transduce"),
        ({"task": "match", "metric": "bits_per_token"}, None, network_of("all"), "choose of cosine"),
        ({"task": "match", "metric": "agreement"}, None, network_of("all"), "ends in sigmoid or softmax"),
    ],
)
def test_misfits(task, targets, network, word):
    with pytest.raises(DataError) as caught:
        tasks.resolve(parse(task), network.spec, Part(torch.zeros(2, T, I), None, targets))
    assert any(word in reason for reason in caught.value.reasons), caught.value.reasons


@pytest.mark.parametrize("activation", ["none", "tanh", "sigmoid", "softmax", "log_softmax"])
@pytest.mark.parametrize("name", ["classify", "tag", "regress", "match"])
def test_every_metric_a_task_offers_is_measured(name, activation):
    targets = {"classify": labels(N), "tag": labels(N, T), "regress": torch.rand(N, T, C), "match": None}[name]
    network = network_of("last" if name == "classify" else "all", activation=activation)
    part = Part(torch.randn(N, T, I), LENGTHS, targets)
    for metric in tasks.METRICS[name]:
        try:
            task = tasks.resolve(parse({"task": name, "metric": metric}), network.spec, part)
        except DataError:
            assert (name, metric) == ("match", "agreement")
            continue
        found = compare(task, tasks.settled(task, part), Candidate(network, FLOAT), {})["teacher"]
        assert math.isfinite(found.value)
        assert found.metric == metric


@pytest.mark.parametrize(("lengths", "wanted"), [(None, 12), ([4, 1, 2], 7)])
def test_steps_are_counted_not_sequences(lengths, wanted):
    """One target a sequence is still many steps of work."""
    spec = RnnSpec({"main": SectionSpec((LayerSpec("lstm", 2, 3),), None, (), "last")})
    network = Network(spec)
    batch = Batch(torch.zeros(4, 3, 2), None if lengths is None else torch.tensor(lengths), None, None)
    assert tasks.prepare(tasks.Task("match", "cosine", spec), batch, network).steps == wanted


@pytest.mark.parametrize(("size", "metric"), [(1, "mse"), (3, "cosine")])
def test_a_single_output_is_not_matched_by_its_direction(size, metric):
    """The cosine of two numbers is 1 or −1, whatever they are."""
    spec = RnnSpec({"main": SectionSpec((LayerSpec("lstm", 2, 4),), head=(LinearSpec(4, size, activation="sigmoid"),))})
    assert tasks.resolve(parse({"task": "match"}), spec, Part(torch.randn(3, 5, 2))).metric == metric
