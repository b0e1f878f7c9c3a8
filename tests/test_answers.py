"""The teacher's outputs, made once: the same as asked at every step, where they are all that a run wants to know."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_tasks import transducer, transduction
from test_trainer import PADDED, TEXT, recipe_of, sequences, stream, teacher_of
from tolerances import assert_close

from rnn2bin import student, tasks
from rnn2bin.data import Batches
from rnn2bin.distill import anneal, answers, trainer


def labelled(n: int = 12, *, steps: int = 9):
    """Sequences with a label at every step, of several lengths."""
    part = sequences(n, steps=steps)
    return replace(part, targets=part.inputs.clone())


def transduced():
    return transduction(given=True)[0]


# teacher, training part, the task's name, what is trained in windows
CASES = {
    "text in windows": (lambda: teacher_of("lstm"), lambda: stream(61), "next-token", True),
    "tags in windows": (lambda: teacher_of("gru"), labelled, "tag", True),
    "one label a sequence": (lambda: teacher_of("gru", readout="last"), sequences, "classify", False),
    "an encoder and a decoder": (transducer, transduced, "transduce", False),
}


def prepared(name: str, **recipe):
    make, part, task_name, windowed = CASES[name]
    teacher = make().eval().requires_grad_(False)
    recipe = recipe_of(**{"task": task_name, "loss": {"hidden": 0}, **recipe})
    given = part()
    task = tasks.resolve(recipe, teacher.spec, given)
    assert task.windowed == windowed
    return teacher, tasks.settled(task, given), task, recipe


@pytest.mark.parametrize("name", CASES)
def test_answers_are_what_the_teacher_says_at_every_step(name):
    """All batches of two passes over the data, windows, pads and wrapping around among them; of each process its rows."""
    teacher, part, task, recipe = prepared(name, train={"steps": 64, "max_steps": 64})
    known, walk = answers.with_answers(part, teacher, task=task, recipe=recipe), anneal.training_walk(recipe)
    assert known.answers is not None
    for processes in (1, 2):
        make = lambda p: Batches(p, batch_size=2, window=4, seed=3, length=40, windowed=task.windowed, processes=processes)  # noqa: B023
        states = [None] * processes
        for k, (batch, with_them) in enumerate(
            zip(map(make(part).__getitem__, range(40)), map(make(known).__getitem__, range(40)), strict=True)
        ):
            assert torch.equal(batch.inputs, with_them.inputs)
            ready = tasks.prepare(task, with_them, teacher, walk=walk)
            state = None if batch.first or not task.windowed else states[k % processes]
            wanted = trainer.asked(teacher, tasks.prepare(task, batch, teacher, walk=walk), walk=walk, state=state)
            states[k % processes] = wanted.state
            found = trainer.asked(teacher, ready, walk=walk, state=None).y
            assert found.shape == wanted.y.shape
            assert_close(found[ready.mask], wanted.y[ready.mask])


@pytest.mark.parametrize("case", [TEXT, PADDED], ids=["text", "sequences"])
def test_training_gives_the_same_network_and_does_not_ask_again(case, tmp_path, monkeypatch):
    def trained(out, *, known: bool):
        teacher = teacher_of(case["cell"], readout=case["readout"])
        recipe = recipe_of(train=case["train"] | {"steps": 80, "max_steps": 80, "evaluate_every": 80}, gates=case["gates"])
        part, valid = (stream(), stream(seed=7)) if case["readout"] == "all" else (sequences(), sequences(seed=7))
        task = tasks.resolve(recipe, teacher.spec, part)
        part, valid = tasks.settled(task, part), tasks.settled(task, valid)
        if known:
            part = answers.with_answers(part, teacher, task=task, recipe=recipe)
            assert part.answers is not None
        network = student.student(teacher, recipe.gates)
        calls: list[int] = []
        teacher.register_forward_hook(lambda *_: calls.append(0))
        trainer.train(network, teacher, task=task, recipe=recipe, train=part, valid=valid, out=out)
        return network, len(calls)

    (one, asked), (other, measured) = trained(tmp_path / "asked", known=False), trained(tmp_path / "known", known=True)
    assert asked > 80
    assert measured < 5  # by measurements alone
    for name, value in one.state_dict().items():
        assert_close(other.state_dict()[name], value)


def test_answers_made_again_are_the_same():
    """So a resumed run goes on with them: nothing of them is in a checkpoint."""
    teacher, part, task, recipe = prepared("one label a sequence", train={"steps": 64, "max_steps": 64})
    first, again = (answers.with_answers(part, teacher, task=task, recipe=recipe).answers for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    "more",
    [
        {"loss": {"hidden": 1.0}},
        {"loss": {"hidden": 0, "gate": 0.5}},
        {"gates": {"estimator": "reinforce"}},
        {"train": {"steps": 11, "max_steps": 11}},  # 22 of 12 sequences: less than two passes
    ],
    ids=["hidden match", "gate match", "credit", "short run"],
)
def test_what_needs_the_teacher_itself_asks_it(more):
    teacher, part, task, recipe = prepared("one label a sequence", **{"train": {"steps": 64, "max_steps": 64}, **more})
    assert answers.with_answers(part, teacher, task=task, recipe=recipe) is part


def test_answers_that_do_not_fit_are_not_kept(monkeypatch):
    teacher, part, task, recipe = prepared("tags in windows", train={"steps": 64, "max_steps": 64})
    size = answers.size(part, teacher)
    assert size == answers.with_answers(part, teacher, task=task, recipe=recipe).answers.numel() * 4
    monkeypatch.setattr(answers, "MOST_BYTES", size - 1)
    assert answers.with_answers(part, teacher, task=task, recipe=recipe) is part
    monkeypatch.setattr(answers, "MOST_BYTES", size)
    monkeypatch.setattr(answers, "memory", lambda: 4 * size - 1)
    assert answers.with_answers(part, teacher, task=task, recipe=recipe) is part
    monkeypatch.setattr(answers, "memory", lambda: None)
    assert answers.with_answers(part, teacher, task=task, recipe=recipe).answers is not None


def test_the_memory_of_this_process_is_the_least_that_machine_container_and_limits_say(tmp_path, monkeypatch):
    whole = answers.memory(cgroup=tmp_path / "none")
    assert whole is not None
    bound = tmp_path / "memory.max"
    for text, wanted in (("max\n", whole), (f"{whole // 2}\n", whole // 2), (f"{2 * whole}\n", whole)):
        bound.write_text(text)
        assert answers.memory(cgroup=bound) == wanted
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (whole // 4, whole))
    assert answers.memory(cgroup=bound) == whole // 4


def test_what_the_teacher_writes_by_itself_is_not_known_before():
    """Without targets a batch's decoder reads what the teacher writes in that batch."""
    teacher, part, task, recipe = prepared("an encoder and a decoder", train={"steps": 64, "max_steps": 64})
    unlabelled = replace(part, targets=None, target_lengths=None)
    assert answers.with_answers(unlabelled, teacher, task=task, recipe=recipe) is unlabelled
