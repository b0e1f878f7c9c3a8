"""Distillation: what training sees, carries, keeps and resumes."""

from __future__ import annotations

import itertools
import math
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tolerances import assert_close

from rnn2bin import data, storage, student, tasks
from rnn2bin.cells.network import Network, Trace, teacher_network
from rnn2bin.cells.weights import fold
from rnn2bin.data import Batches, Part
from rnn2bin.distill import anneal, checkpoints, losses, states, trainer
from rnn2bin.distill.window import run_cell
from rnn2bin.errors import DivergedError, InterruptedRunError
from rnn2bin.gates.estimators import BINARY, FLOAT
from rnn2bin.kinds import CELLS
from rnn2bin.measure import Candidate, compare
from rnn2bin.recipe import Gates, Recipe, parse
from rnn2bin.spec import EmbeddingSpec, LayerSpec, LinearSpec, RnnSpec, SectionSpec

WORDS, H = 5, 6


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def teacher_of(cell: str, hidden: int = H, **parts: Any) -> Network:
    """Two layers over tokens with random weights and biases."""
    layers = (LayerSpec(cell, 3, hidden), LayerSpec(cell, hidden, hidden))
    section = SectionSpec(layers, EmbeddingSpec(WORDS, 3), (LinearSpec(hidden, WORDS),), **parts)
    network = Network(RnnSpec({"main": section}))
    with torch.no_grad():
        for seed, p in enumerate(network.parameters()):
            p.copy_(torch.randn(p.shape, generator=seeded(seed)) * (0.7 if hidden == H else 0.3))
    return network.eval().requires_grad_(False)


def stream(steps: int = 60, *, rows: int = 4, seed: int = 2) -> Part:
    return Part(torch.randint(WORDS, (rows, steps), generator=seeded(seed)), stream=True)


def sequences(n: int = 12, *, steps: int = 9, seed: int = 3) -> Part:
    lengths = torch.randint(2, steps + 1, (n,), generator=seeded(seed))
    return Part(
        torch.randint(WORDS, (n, steps), generator=seeded(seed + 1)), lengths, torch.randint(WORDS, (n,), generator=seeded(seed + 2))
    )


def recipe_of(**parts: Any) -> Recipe:
    train = {"steps": 8, "max_steps": 10, "batch_size": 2, "window": 4, "evaluate_every": 4, "tolerance": 0} | parts.pop("train", {})
    return parse({"train": train, **parts})


TEXT = {"cell": "lstm", "readout": "all", "train": {}, "gates": {"estimator": "gumbel"}}
PADDED = {"cell": "gru", "readout": "last", "train": {"accumulation": 2}, "gates": {"estimator": "gumbel-hard", "noise": 0.5}}


def run(case: dict[str, Any], out: Path, *, train: Part | None = None, valid: Part | None = None, **options: Any):
    """(student, what training returned) of a case; fresh networks each time."""
    teacher = teacher_of(case["cell"], readout=case["readout"])
    recipe = recipe_of(train=case["train"], gates=case["gates"], **case.get("more", {}))
    made = stream if case["readout"] == "all" else sequences
    train, valid = train or made(), valid or made(seed=7)
    task = tasks.resolve(recipe, teacher.spec, train)
    train, valid = tasks.settled(task, train), tasks.settled(task, valid)
    network = student.student(teacher, recipe.gates)
    return network, trainer.train(network, teacher, task=task, recipe=recipe, train=train, valid=valid, out=out, **options)


# ---------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("labelled", ["stream", "sequences"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_states_carried_across_windows_equal_one_long_window(cell, labelled, tmp_path, monkeypatch):
    """Read from the trainer itself: the outputs of its windows side by side are those of the whole, for teacher and student."""
    teacher = teacher_of(cell)
    recipe = recipe_of(
        task="next-token",
        gates={"estimator": "straight-through"},
        train={"steps": 3, "max_steps": 3, "learning_rate": 1e-30, "precision": "float32"},
    )
    part = stream(49, rows=1) if labelled == "stream" else replace(sequences(2, steps=12), targets=None, lengths=None)
    task = tasks.resolve(recipe, teacher.spec, part)
    part = tasks.settled(task, part)
    network = student.student(teacher, recipe.gates)
    seen: dict[str, list[torch.Tensor]] = {"theirs": [], "ours": []}

    def spy(task, recipe, prepared, output, target, **kwargs):
        seen["ours"].append(output.y.detach())
        seen["theirs"].append(target.y)
        return output.y.sum() * 0

    monkeypatch.setattr(losses, "total", spy)
    trainer.train(network, teacher, task=task, recipe=recipe, train=part, valid=stream(), out=tmp_path)
    feed = Batches(part, batch_size=2, window=4, seed=0, length=3, windowed=True)
    x = torch.cat([feed[k].inputs for k in range(3)])
    if labelled == "sequences":
        assert sorted(map(tuple, x.t().tolist())) == sorted(map(tuple, part.inputs.tolist()))  # nothing is left out
    for name, whole, mode in (("theirs", teacher, FLOAT), ("ours", network, BINARY)):
        wanted = whole(x, mode=mode, walk=run_cell, logits=True).y
        assert_close(torch.cat(seen[name]), wanted.detach(), name=name)
        fresh = torch.cat([whole(piece, mode=mode, walk=run_cell, logits=True).y for piece in x.split(4)])
        assert not torch.allclose(fresh, wanted, atol=1e-3)  # the state matters


def test_windows_of_a_sequence_concatenated_give_the_sequence():
    lengths = torch.tensor([11, 3, 8])
    part = Part(torch.randn(3, 11, 2), lengths, torch.randint(4, (3, 11)))
    feed = Batches(part, batch_size=3, window=4, seed=1, length=9, windowed=True)
    cuts = [feed[k] for k in range(3)]
    order = torch.cat([c.inputs for c in cuts])[0, :, 0].argsort()
    wanted = part.inputs[:, 0, 0].argsort()
    assert torch.equal(torch.cat([c.inputs for c in cuts])[:, order], part.inputs[wanted].transpose(0, 1))
    assert torch.equal(torch.cat([c.targets for c in cuts])[:, order], part.targets[wanted].t())
    assert torch.equal(sum(c.lengths for c in cuts)[order], lengths[wanted])
    assert [c.first for c in cuts] == [True, False, False]
    assert feed[3].first


def test_a_window_behind_the_end_of_its_batch_counts_nothing():
    batch = data.collate(Part(torch.randn(2, 12, 2), torch.tensor([3, 4])))
    counted = [data.cut_window(batch, start, 4).lengths.tolist() for start in (0, 4, 8)]
    assert counted == [[3, 4], [0, 0], [0, 0]]
    assert all(len(data.cut_window(batch, start, 4).inputs) >= 1 for start in (0, 4, 8))


# ---------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("part", [stream(), sequences()], ids=["stream", "sequences"])
def test_item_k_is_the_same_whatever_was_asked_before(part, windowed):
    make = lambda: Batches(part, batch_size=4, window=5, seed=3, length=40, windowed=windowed)
    forward = [make()[k] for k in range(30)]
    feed = make()
    for k in torch.randperm(30, generator=seeded()).tolist():
        again = feed[k]
        assert torch.equal(again.inputs, forward[k].inputs)
        assert again.first == forward[k].first
    other = Batches(part, batch_size=4, window=5, seed=4, length=40, windowed=windowed)
    assert part.stream or any(
        other[k].inputs.shape != f.inputs.shape or not torch.equal(other[k].inputs, f.inputs) for k, f in enumerate(forward)
    )


@pytest.mark.parametrize("lengths", [None, "ragged"])
@pytest.mark.parametrize(("n", "size"), [(12, 3), (64, 2), (7, 9)])
def test_every_epoch_covers_each_sequence_once(n, size, lengths):
    inputs = torch.arange(n).view(n, 1, 1).expand(n, 6, 1).float()
    part = Part(inputs, torch.randint(1, 7, (n,), generator=seeded()) if lengths else None)
    feed = Batches(part, batch_size=size, window=64, seed=0, length=10**6, windowed=False)
    per_epoch = max(1, n // size)
    orders = [[int(i) for k in range(per_epoch) for i in feed[e * per_epoch + k].inputs[0, :, 0]] for e in range(3)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert orders[0] != orders[1]


def test_lengths_are_bucketed():
    lengths = torch.randint(1, 101, (640,), generator=seeded())
    part = Part(torch.zeros(640, 100, dtype=torch.long), lengths)
    feed = Batches(part, batch_size=8, window=200, seed=0, length=80, windowed=False)
    padding = sum(feed[k].inputs[..., 0].numel() * 8 - int(feed[k].lengths.sum()) for k in range(80)) / int(lengths.sum())
    assert padding < 0.2
    assert all(len(feed[k].inputs) == int(feed[k].lengths.max()) for k in range(80))


def test_a_stream_is_read_in_order():
    part = Part(torch.arange(50)[None], stream=True)
    feed = Batches(part, batch_size=2, window=6, seed=0, length=99, windowed=True)
    for k in range(feed.per_pass):
        batch = feed[k]
        assert batch.inputs.t().tolist() == [list(range(r + 6 * k, r + 6 * k + 6)) for r in (0, 25)]
        assert torch.equal(batch.targets, batch.inputs + 1)
        assert batch.first == (k == 0)
    assert torch.equal(feed[feed.per_pass].inputs, feed[0].inputs)


# ---------------------------------------------------------------------------------------------- stopping and resuming


@pytest.mark.parametrize("stop_at", [3, 4, 6])
@pytest.mark.parametrize("case", [TEXT, PADDED], ids=["lstm-text", "gru-accumulated"])
def test_resumed_equals_uninterrupted_bit_for_bit(case, stop_at, tmp_path):
    whole, wanted = run(case, tmp_path / "whole")
    assert wanted.steps > stop_at

    def stop(now: dict[str, Any]) -> None:
        if now["step"] == stop_at:
            signal.raise_signal(signal.SIGINT)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(InterruptedRunError, match=f"interrupted at step {stop_at}"):
        run(case, tmp_path / "cut", report=stop)
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    steps: list[int] = []
    torch.manual_seed(999)  # another process
    resumed, found = run(case, tmp_path / "cut", resume=True, report=lambda now: steps.append(now["step"]))
    assert steps == list(range(stop_at + 1, wanted.steps + 1))  # all of them, or until the gates were binary
    assert found == wanted
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))


def test_training_is_reproducible_and_the_seed_matters(tmp_path):
    first, _ = run(TEXT, tmp_path / "a")
    second, _ = run(TEXT, tmp_path / "b")
    other, _ = run(TEXT | {"more": {"seed": 1}}, tmp_path / "c")
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    assert all(same)
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_resuming_without_a_whole_checkpoint_starts_anew(tmp_path):
    run(TEXT, tmp_path / "a")
    for folder in (tmp_path / "a").glob("checkpoint-*"):
        (folder / storage.MANIFEST).unlink()
    assert checkpoints.newest(tmp_path / "a") is None
    steps: list[int] = []
    run(TEXT, tmp_path / "a", resume=True, report=lambda now: steps.append(now["step"]))
    assert steps[0] == 1


def test_checkpoints_that_will_be_written_again_go_first(tmp_path):
    """A stale checkpoint with a higher number made the Trainer's rotation delete the folder that was being written."""
    for number in (4, 8, 100):
        (tmp_path / f"checkpoint-{number}").mkdir()
    checkpoints.discard_newer(tmp_path, tmp_path / "checkpoint-4")
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint-4"]
    checkpoints.discard_newer(tmp_path, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", [1, 6])
def test_a_loss_that_is_not_finite_stops_at_once_and_keeps_the_last_checkpoint(at, tmp_path, monkeypatch):
    plain, calls = losses.total, []

    def spoiled(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs) * (math.nan if len(calls) == at else 1.0)

    monkeypatch.setattr(losses, "total", spoiled)
    with pytest.raises(DivergedError, match=f"at step {at - 1}"):
        run(TEXT, tmp_path)
    assert len(calls) == at
    kept = checkpoints.newest(tmp_path)
    assert (kept.name if kept else None) == ("checkpoint-4" if at > 4 else None)


# ---------------------------------------------------------------------------------------------- selection

# Fitting a text of one token makes every other text worse, step by step.
ZEROS = Part(torch.zeros(4, 60, dtype=torch.long), stream=True)
RUINOUS = TEXT | {"train": {"evaluate_every": 1, "learning_rate": 0.05, "warmup": 0.0}, "more": {"loss": {"task": 1, "teacher": 0}}}


def test_the_checkpoint_best_by_the_hard_metric_is_restored(tmp_path):
    case, valid = RUINOUS | {"gates": {"estimator": "gumbel"}}, stream(seed=7)
    network, trained = run(case, tmp_path, train=ZEROS, valid=valid)
    best = min(trained.history, key=lambda p: p.hard)
    assert best.step < trained.steps  # the test can fail
    assert any(abs(p.hard - p.soft) > 1e-4 for p in trained.history)
    assert trained.best_step == best.step
    task = tasks.resolve(recipe_of(), network.spec, valid)
    again = compare(task, valid, Candidate(teacher_of("lstm"), FLOAT), {"hard": Candidate(network, BINARY, run_cell)})["hard"].value
    assert again == pytest.approx(best.hard, rel=1e-6)
    assert trained.soft_mode == anneal.soft_mode_at(recipe_of(gates=case["gates"]), best.progress)


@pytest.mark.parametrize(("tolerance", "steps", "binarized"), [(1e9, 8, True), (0, 10, False)])
def test_training_ends_when_soft_and_hard_agree(tolerance, steps, binarized, tmp_path):
    _, trained = run(TEXT | {"train": {"tolerance": tolerance}}, tmp_path)
    assert (trained.steps, trained.binarized) == (steps, binarized)
    assert trained.history[-1].progress == pytest.approx(1.0)


def test_a_float_student_trains_exactly_its_steps_without_bits(tmp_path):
    _, trained = run(TEXT | {"train": {"tolerance": 1e9}}, tmp_path, float_student=True)
    assert trained.steps == 8
    assert trained.soft_mode == FLOAT
    assert all(p.hard == p.soft for p in trained.history)


def test_closed_loop_waits_while_the_hard_metric_lags(tmp_path):
    progress: list[float] = []
    _, trained = run(RUINOUS | {"gates": {"closed_loop": True}}, tmp_path, train=ZEROS, report=lambda now: progress.append(now["progress"]))
    worse = [p.hard > min(q.hard for q in trained.history[: k + 1]) for k, p in enumerate(trained.history)]
    moved = [b > a for a, b in itertools.pairwise(progress)]
    assert any(worse)
    assert moved == [not w for w in worse[:-1]]


@pytest.mark.parametrize("budget", [{}, {"density": 0.2}])
def test_selection_sees_a_share_of_the_validation_part_and_nothing_else(budget, tmp_path, monkeypatch):
    """Every part that is measured during training is the validation part: train and test tokens have other numbers."""
    train, valid = (
        Part(torch.randint(0, 3, (4, 60), generator=seeded()), stream=True),
        Part(torch.randint(3, 5, (4, 60), generator=seeded(1)), stream=True),
    )
    seen: list[Part] = []
    plain = trainer.compare

    def spy(task, part, *args, **kwargs):
        seen.append(part)
        return plain(task, part, *args, **kwargs)

    monkeypatch.setattr(trainer, "compare", spy)
    run(TEXT | {"more": {"budget": budget}}, tmp_path, train=train, valid=valid)
    assert len(seen) >= 2
    assert all(int(part.inputs.min()) >= 3 for part in seen)


def test_selection_part_is_cut_and_keeps_its_order():
    cut = trainer.selection_part(sequences(3000))
    assert torch.equal(cut.inputs, sequences(3000).inputs[: trainer.SELECTION_SEQUENCES])
    assert trainer.selection_part(stream(40_000)).inputs.numel() <= trainer.SELECTION_TOKENS
    assert len(trainer.selection_part(Part(torch.zeros(5, 100_000, 1)))) == 1


# ---------------------------------------------------------------------------------------------- modes and losses


def test_straight_through_from_one_means_never():
    never = recipe_of(gates={"straight_through_from": 1.0})
    assert [anneal.mode_at(never, p).estimator for p in (0.0, 0.99, 1.0)] == ["gumbel"] * 3


def test_straight_through_begins_at_its_share():
    half = recipe_of(gates={"straight_through_from": 0.5})
    assert [anneal.mode_at(half, p).estimator for p in (0.49, 0.5)] == ["gumbel", "straight-through"]
    assert anneal.soft_mode_at(half, 0.9).estimator == "sigmoid"


@pytest.mark.parametrize(("cell", "wanted"), [("lstm", {"i": 0.1, "o": 0.1}), ("gru", {"z": 0.15, "r": 0.1})])
def test_the_budget_drives_open_rates(cell, wanted, tmp_path):
    """For z the rate is that of updated units."""
    case = {
        "cell": cell,
        "readout": "all",
        "train": {"steps": 60, "max_steps": 60, "learning_rate": 0.03, "evaluate_every": 60},
        "gates": {"estimator": "straight-through"},
        "more": {"budget": {"open": wanted, "weight": 30.0}},
    }
    network, _ = run(case, tmp_path)
    before = student.student(teacher_of(cell), recipe_of().gates)
    x = stream(seed=5).inputs.t()
    for index, name in enumerate(network.cells()):
        for k, gate in enumerate(network.spec.main.layers[0].kind.gate_names):
            if gate in wanted:
                rates = [float((n(x).pre[index][:, :, k] > 0).float().mean()) for n in (before, network)]
                old, new = (1 - r for r in rates) if gate == "z" else rates
                assert old > wanted[gate] + 0.1, name
                assert new < wanted[gate] + 0.1, (name, gate, old, new)


def test_the_budget_counts_real_steps_and_binary_gates_only():
    teacher = teacher_of("lstm")
    network = student.student(teacher, recipe_of(gates={"soft": ["o"]}).gates)
    lengths = torch.tensor([2, 5])
    x = torch.randint(WORDS, (5, 2), generator=seeded())
    out = network(x, lengths=lengths)
    masks = losses.step_masks(out)
    rate = [float((torch.cat([p[:2, 0, 0], p[:, 1, 0]]) > 0).double().mean()) for p in out.pre]
    assert float(losses.budget(network, out, masks, {"i": 0.0, "o": 0.0}).detach()) == pytest.approx(sum(rate))
    assert float(losses.budget(network, out, masks, {"i": 1.0}).detach()) == 0


@pytest.mark.parametrize(
    ("given", "task", "weight"),
    [("auto", "match", 20.0), ("auto", "transduce", 5.0), ("auto", "classify", 0.0), (3.0, "match", 3.0), (0.0, "transduce", 0.0)],
)
def test_hidden_match_is_on_where_only_outputs_would_teach(given, task, weight):
    assert recipe_of(loss={"hidden": given}).loss.hidden_weight(task) == weight


@pytest.mark.parametrize(("given", "task", "weight"), [("auto", "match", 0.0), ("auto", "transduce", 0.0), (5.0, "transduce", 5.0)])
def test_a_student_with_a_budget_is_not_held_to_the_teachers_states(given, task, weight):
    assert recipe_of(loss={"hidden": given}).loss.hidden_weight(task, priced=True) == weight


@pytest.mark.parametrize(("more", "wanted"), [({}, 5.0), ({"budget": {"density": 0.2}}, 0.0), ({"budget": {"price": 0.1}}, 0.0)])
def test_the_loss_asks_whether_weights_have_a_price(more, wanted, monkeypatch):
    monkeypatch.setattr(losses, "hidden_match", lambda *_: torch.ones(()))
    monkeypatch.setattr(losses.tasks, "loss", lambda *_: torch.zeros(()))
    nothing = SimpleNamespace(name="transduce", y=None)
    found = losses.total(nothing, recipe_of(**more), nothing, nothing, nothing, student=nothing, mode=FLOAT)
    assert float(found) == wanted


def test_gate_match_is_zero_for_equal_gates_and_skips_pads():
    teacher = teacher_of("gru")
    lengths = torch.tensor([2, 5])
    x = torch.randint(WORDS, (5, 2), generator=seeded())
    out = teacher(x, lengths=lengths)
    masks = losses.step_masks(out)
    assert float(losses.gate_match(out, out, masks)) == 0
    padded = replace(out, traces=[Trace((), torch.cat([p[:2], p[2:] + torch.tensor([9.0, 0.0])[None, :, None, None]])) for p in out.pre])
    assert float(losses.gate_match(padded, out, masks)) == 0
    moved = replace(out, traces=[Trace((), p + 1) for p in out.pre])
    each = [(torch.sigmoid(p + 1) - torch.sigmoid(p)).square() for p in out.pre]
    wanted = sum(torch.cat([e[:2, 0], e[:, 1]]).mean() for e in each)
    assert_close(losses.gate_match(moved, out, masks), wanted)


def test_a_carried_state_survives_its_file():
    state = [[(torch.randn(2, 3), torch.randn(2, 4))], [(torch.randn(2, 3), torch.randn(2, 4))]]
    layers = (LayerSpec("lstm", 1, 4, proj_size=3),) * 2
    for carried in ((state, None), (None, None), (state, state)):
        again = states.unflattened(states.flattened(carried), layers, layers)
        assert str(again) == str(carried)


@torch.no_grad()
@pytest.mark.parametrize("directions", [1, 2])
def test_behind_an_output_gate_what_is_kept_is_matched(directions):
    """Closing it hides a unit from others and changes nothing of the match; pads do not count."""
    layer = LayerSpec("gru", 3, 4, directions)
    spec = RnnSpec({"main": SectionSpec((layer,))})
    torch.manual_seed(0)
    teacher = teacher_network(spec, {name: torch.randn_like(t) for name, t in Network(spec).state_dict().items()})
    gated = student.student(teacher, Gates(levels="strict", copies=2), output=True)
    task, x, lengths = tasks.Task("match", "cosine", spec), torch.randn(5, 2, 3), torch.tensor([5, 3])
    target = teacher(x, lengths=lengths)
    found = []
    for bias in (2.0, -2.0):
        for cell in gated.cells().values():
            cell.part("gates").weight_hh.zero_()  # what is shown changes nothing else then
            cell.part("candidate").weight_hh.zero_()
            cell.part("gates").bias[-8:] = bias
        found.append(losses.hidden_match(task, gated(x, lengths=lengths, mode=BINARY), target))
    assert found[0] > 0
    assert_close(found[0], found[1])
    out = gated(x, lengths=lengths, mode=BINARY)
    kept = [fold(trace.states[1], 2) - its.states[0] for trace, its in zip(out.traces, target.traces, strict=True)]
    wanted = sum(float(k[:, 0].square().sum() + k[:3, 1].square().sum()) for k in kept) / (8 * 4 * directions)
    assert float(found[0]) == pytest.approx(wanted, rel=1e-5)


def test_open_rates_count_real_steps_and_of_z_the_units_that_are_updated():
    cell = SimpleNamespace(layer=SimpleNamespace(kind=CELLS["gru"]))
    student = SimpleNamespace(cells=lambda: {"main.layers.0.fwd": cell})
    pre = torch.tensor([[[[1.0, -1.0], [1.0, 1.0]]], [[[1.0, 1.0], [-1.0, 1.0]]], [[[1.0, 1.0], [1.0, 1.0]]]])  # (T,B,G,H), r and z
    output = SimpleNamespace(pre=[pre], traces=[SimpleNamespace(products=torch.zeros(3, 1, 1))], lengths=[torch.tensor([2])])
    assert losses.opened(student, output) == {"main.layers.0.fwd.r": (3.0, 4.0), "main.layers.0.fwd.z": (1.0, 4.0)}
