"""Surgery on modules: drop-ins equal the torch layers in every call form, conversion beats the hard cut, packing keeps every value."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import rnn2bin
from rnn2bin import modules
from rnn2bin.cells.network import walk
from rnn2bin.distill.window import run_cell
from rnn2bin.errors import BudgetError, DataError, RecipeError, UnsupportedError, UsageError
from rnn2bin.gates.estimators import BINARY, FLOAT
from rnn2bin.modules import BinaryCell, BinaryRnn, binarize, conversion, gate_mode
from rnn2bin.modules.training import forward
from rnn2bin.recipe import Recipe, parse

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}
RECIPE = parse({})

LAYERS: dict[str, Any] = {
    "lstm": lambda: nn.LSTM(3, 5),
    "gru": lambda: nn.GRU(3, 5),
    "lstm-stack": lambda: nn.LSTM(3, 5, num_layers=2, bidirectional=True),
    "gru-stack": lambda: nn.GRU(3, 5, num_layers=3, bidirectional=True),
    "lstm-projected": lambda: nn.LSTM(3, 5, num_layers=2, bidirectional=True, proj_size=2),
    "lstm-no-bias": lambda: nn.LSTM(3, 5, bias=False),
    "gru-no-bias": lambda: nn.GRU(3, 5, bias=False, num_layers=2),
    "gru-batch-first": lambda: nn.GRU(3, 5, batch_first=True, bidirectional=True),
    "lstm-batch-first": lambda: nn.LSTM(3, 5, batch_first=True, num_layers=2),
    "lstm-double": lambda: nn.LSTM(3, 5, dtype=torch.float64),
}


def filled(module: nn.Module) -> nn.Module:
    """Non-zero weights everywhere, biases included."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-0.9, 0.9)
    return module


def same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, PackedSequence):
        for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            a, b = getattr(ours, name), getattr(theirs, name)
            assert a is b is None or torch.equal(a, b)
        same(ours.data, theirs.data)
    elif isinstance(theirs, tuple):
        assert type(ours) is type(theirs)
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            same(a, b)
    else:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE[theirs.dtype])


def states(layer: Any, *, batch: int | None) -> Any:
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    shape = lambda size: (rows, size) if batch is None else (rows, batch, size)
    like = layer.weight_hh_l0
    h = torch.rand(shape(getattr(layer, "proj_size", 0) or 5), dtype=like.dtype)
    return (h, torch.rand(shape(5), dtype=like.dtype)) if isinstance(layer, nn.LSTM) else h


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("call", ["batched", "unbatched", "packed", "packed-sorted"])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kernel", [walk, run_cell])
def test_float_mode_equals_the_torch_layer(name: str, call: str, given: bool, kernel: Any) -> None:
    layer = filled(LAYERS[name]())
    twin = binarize(layer, recipe=RECIPE)
    assert isinstance(twin, BinaryRnn)
    dtype = layer.weight_hh_l0.dtype  # type: ignore[union-attr]
    x: Any = torch.randn((7, 3) if call == "unbatched" else (7, 7, 3), dtype=dtype)  # type: ignore[arg-type]
    if call == "packed":
        x = pack_sequence([torch.randn(n, 3, dtype=dtype) for n in (2, 6, 1, 4)], enforce_sorted=False)  # type: ignore[arg-type]
    if call == "packed-sorted":
        x = pack_padded_sequence(torch.randn(6, 4, 3, dtype=dtype), torch.tensor([6, 4, 4, 1]))  # type: ignore[arg-type]
    hx = states(layer, batch={"batched": 7, "unbatched": None}.get(call, 4)) if given else None
    with torch.no_grad(), gate_mode(FLOAT, walk=kernel):
        same(twin(x, hx), layer(x, hx))


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 3), (3,)])
def test_cells_equal_torch_in_float_mode(kind: Any, bias: bool, shape: tuple[int, ...]) -> None:
    cell = filled(kind(3, 5, bias=bias))
    twin = binarize(cell, recipe=RECIPE)
    assert isinstance(twin, BinaryCell)
    h = torch.rand(*shape[:-1], 5)
    hx = (h, torch.rand(*shape[:-1], 5)) if kind is nn.LSTMCell else h
    x = torch.randn(*shape)
    with gate_mode(FLOAT):
        same(twin(x), cell(x))
        same(twin(x, hx), cell(x, hx))


@pytest.mark.parametrize("name", ["lstm-stack", "gru-stack", "lstm-projected"])
def test_float_gradients_equal_the_torch_layers(name: str) -> None:
    layer = filled(LAYERS[name]())
    twin = binarize(layer, recipe=RECIPE)
    x, y = (torch.randn(5, 2, 3).requires_grad_() for _ in range(2))
    y.data = x.data.clone()
    layer(x)[0].square().sum().backward()
    with gate_mode(FLOAT):
        twin(y)[0].square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-4, atol=1e-5)


def test_gates_are_bits_outside_of_a_mode_and_nothing_is_stored() -> None:
    twin = binarize(filled(nn.GRU(3, 5)), recipe=RECIPE)
    x = torch.randn(6, 2, 3)
    seen: list[modules.Call] = []
    with torch.no_grad():
        bare = twin(x)
        with gate_mode(FLOAT):
            soft = twin(x)
            with gate_mode(BINARY, seen=seen.append):
                inner = twin(x)
        after = twin(x)
    assert torch.equal(bare[0], inner[0])
    assert torch.equal(bare[0], after[0])
    assert not torch.equal(bare[0], soft[0])
    assert len(seen) == 1
    # An update gate that keeps leaves the state exactly as it was.
    keeps = seen[0].trace.pre[1:, :, 1] > 0
    assert torch.equal(bare[0][1:][keeps], bare[0][:-1][keeps])


def test_dropout_between_layers_only_while_training() -> None:
    layer = filled(nn.LSTM(3, 5, num_layers=2, dropout=0.5))
    twin, x = binarize(layer, recipe=RECIPE), torch.randn(4, 2, 3)
    with gate_mode(FLOAT):
        torch.manual_seed(1)
        first = twin(x)[0]
        assert not torch.equal(first, twin(x)[0])
        same(twin.eval()(x), layer.eval()(x))


@pytest.mark.parametrize("bad", [torch.zeros(4, 2, 4), torch.zeros(0, 2, 3), torch.zeros(1, 1, 2, 3)])
def test_wrong_inputs_raise_what_torch_raises(bad: Tensor) -> None:
    layer = nn.GRU(3, 5)
    with pytest.raises((RuntimeError, ValueError)) as theirs:
        layer(bad)
    with pytest.raises(theirs.type):
        binarize(layer, recipe=RECIPE)(bad)


def test_a_state_of_the_wrong_shape_is_refused() -> None:
    twin = binarize(nn.LSTM(3, 5), recipe=RECIPE)
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        twin(torch.zeros(4, 2, 3), (torch.zeros(1, 1, 5), torch.zeros(1, 2, 5)))


# --- surgery -------------------------------------------------------------------------------------------------------------


class Tagger(nn.Module):
    """conv -> two-way GRU -> attention pooling -> linear; x (B,T,4) -> (B,3)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.norm = nn.BatchNorm1d(6)
        self.rnn = nn.GRU(6, 8, batch_first=True, bidirectional=True)
        self.score, self.out = nn.Linear(16, 1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.rnn.flatten_parameters()
        y, _ = self.rnn(self.norm(self.conv(x.transpose(1, 2))).relu().transpose(1, 2))
        weights = torch.softmax(self.score(y), 1)
        return self.out((weights * y).sum(1))


def test_the_original_is_untouched_and_the_rest_is_left_alone() -> None:
    module = filled(Tagger())
    before = {name: t.clone() for name, t in module.state_dict().items()}
    student = binarize(module, recipe=RECIPE)
    for parameter in student.parameters():
        parameter.data.zero_()
    assert isinstance(module.rnn, nn.GRU)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    assert type(student.conv) is nn.Conv1d
    assert not {id(p) for p in module.parameters()} & {id(p) for p in student.parameters()}


def test_a_layer_in_two_places_stays_one() -> None:
    shared = nn.GRU(3, 3)
    student = binarize(nn.ModuleDict({"a": shared, "b": shared, "list": nn.ModuleList([shared, nn.Linear(3, 3)])}), recipe=RECIPE)
    assert student["a"] is student["b"] is student["list"][0]  # type: ignore[index]


def test_soft_gates_by_name() -> None:
    module = nn.ModuleDict({"one": nn.LSTM(2, 3), "two": nn.LSTM(2, 3), "cell": nn.GRUCell(2, 3)})
    student = binarize(module, recipe=parse({"gates": {"soft": ["f", "two.layers.0.o", "cell.z"]}}))
    found = {name: cell.binary for name, cell in modules.Cells(student).cells().items()}
    assert found == {"one.layers.0.fwd": (True, False, True), "two.layers.0.fwd": (True, False, False), "cell.cell": (True, False)}
    with pytest.raises(RecipeError, match="three"):
        binarize(module, recipe=parse({"gates": {"soft": ["three.layers.0.o"]}}))


class OwnForward(nn.LSTM):
    def forward(self, *args: Any) -> Any:  # type: ignore[override]
        return super().forward(*args)


def test_refusals_list_every_reason() -> None:
    hooked, tied = nn.GRU(2, 3), nn.LSTM(2, 3)
    hooked.register_forward_hook(lambda *_: None)
    other = nn.LSTM(2, 3)
    other.weight_hh_l0 = tied.weight_hh_l0
    with pytest.raises(UnsupportedError) as error:
        binarize(nn.ModuleDict({"own": OwnForward(2, 3), "hooked": hooked, "tied": tied, "other": other}), recipe=RECIPE)
    assert [reason.partition(":")[0] for reason in error.value.reasons] == ["own", "hooked", "tied", "other"]


NOTHING = [(nn.Linear(2, 2), "no LSTM or GRU layer"), (nn.ModuleDict({"r": nn.RNN(2, 2)}), r"r \(RNN\)")]


@pytest.mark.parametrize(("module", "says"), NOTHING)
def test_nothing_to_binarize(module: nn.Module, says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        binarize(module, recipe=RECIPE)


# --- batches -------------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def forward(self, x: Tensor, lengths: Tensor, hx: Tensor | None = None) -> Any:
        return x, lengths, hx


def test_what_a_batch_gives_to_the_module() -> None:
    x, n, y = torch.ones(2), torch.zeros(2), torch.zeros(1)
    one = nn.Identity()
    assert forward(one, x) is x
    assert forward(one, (x, y)) is x
    assert forward(Two(), (x, n, y)) == (x, n, None)
    assert forward(Two(), {"x": x, "lengths": n, "labels": y}) == (x, n, None)


def test_splits_do_not_overlap_and_refuse_what_does_not_fit() -> None:
    batches = [torch.tensor([float(k)]) for k in range(20)]
    parts = conversion.split(iter(batches), RECIPE)
    numbers = [int(t) for part in (parts.train, parts.valid, parts.test) for t in part]
    assert sorted(numbers) == list(range(20))
    assert (len(parts.valid), len(parts.test)) == (2, 2)
    for bad in (None, "file.npz", batches[:2], {"train": batches}, {"train": [], "valid": batches, "test": batches}):
        with pytest.raises(DataError):
            conversion.split(bad, RECIPE)


# --- conversion ----------------------------------------------------------------------------------------------------------


def recipe(**changes: Any) -> Recipe:
    train = {"steps": 60, "evaluate_every": 20, "learning_rate": 0.01, "max_steps": 60}
    return parse({"train": train, "report": {"controls": True}, **changes})


def batches(count: int = 24) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(16, 9, 4, generator=generator), torch.randint(3, (16,), generator=generator)) for _ in range(count)]


def teacher() -> Tagger:
    torch.manual_seed(0)
    module = Tagger()
    with torch.no_grad():
        for parameter in module.rnn.parameters():
            parameter.mul_(2)
    module(batches(1)[0][0])  # batch norm has seen data
    return module


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tagger, Path]:
    module, out = teacher(), tmp_path_factory.mktemp("modules") / "OUT"
    steps: list[dict[str, Any]] = []
    chosen = recipe(budget={"open": {"r": 0.3}}, loss={"hidden": 0.1, "gate": 0.1})
    result = rnn2bin.convert(module, recipe=chosen, data=batches(), out=out, progress=steps.append)
    assert steps[-1]["step"] == 60
    return result, module, out


def test_conversion_improves_on_the_hard_cut(converted: Any) -> None:
    result, module, out = converted
    report = json.loads((out / "report.json").read_text())
    assert report["binary"]["metric"] <= report["controls"]["threshold_only"]["metric"]
    assert report["teacher"]["metric"] == 0
    assert report["drop"]["value"] == pytest.approx(report["binary"]["metric"])
    lo, hi = report["drop"]["ci95"]
    assert lo <= report["drop"]["value"] <= hi
    assert {g["gate"] for g in report["gates"]} == {"r", "z"}
    assert 0 < report["density"]["weights_touched"] < 1
    assert module.training  # as it was given
    names = ["README.md", "config.json", "model.safetensors", "recipe.yaml", "report.html", "report.json"]
    assert sorted(p.name for p in out.iterdir()) == names
    assert list(out.parent.iterdir()) == [out]
    assert result.report["cost"]["tokens"] == 60 * 16 * 9


def test_packed_module_loads_and_gives_the_reported_outputs(converted: Any) -> None:
    result, module, out = converted
    loaded, again = rnn2bin.load(out, module=module), result.model
    x = torch.randn(5, 9, 4)
    assert torch.equal(loaded(x), again(x))
    assert not any(p.requires_grad for p in loaded.parameters())
    # fp16 on disk, exactly: packing what was loaded changes nothing.
    folder = out.parent / "again"
    folder.mkdir()
    modules.write(loaded, folder, levels="learned", provenance={}, task={})
    assert torch.equal(rnn2bin.load(folder, module=module)(x), loaded(x))
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def test_loading_without_or_with_another_module_is_refused(converted: Any) -> None:
    _, _, out = converted
    with pytest.raises(UsageError, match="module="):
        rnn2bin.load(out)
    with pytest.raises(UsageError, match="layers"):
        rnn2bin.load(out, module=nn.LSTM(3, 4))


def error_rate(module: nn.Module, held: list[Any]) -> float:
    return sum(float((module(x).argmax(-1) != y).float().mean()) for x, y in held) / len(held)


error_rate.higher_is_better = False  # type: ignore[attr-defined]


def test_a_loss_and_a_metric_of_ones_own(tmp_path: Path) -> None:
    short = recipe(train={"steps": 8, "evaluate_every": 4, "max_steps": 8}, report={"controls": False, "float_same_compute": True})
    parts = {"train": batches(6), "valid": batches(2), "test": batches(3)}
    result = rnn2bin.convert(
        teacher(),
        recipe=short,
        data=parts,
        out=tmp_path / "OUT",
        loss=lambda output, batch: nn.functional.cross_entropy(output, batch[1]),
        metric=error_rate,
    )
    assert result.report["metric"] == {"name": "error_rate", "higher_is_better": False}
    assert result.report["drop"]["ci95"] is None
    assert result.report["teacher"]["metric"] == pytest.approx(error_rate(teacher().eval(), parts["test"]))
    assert set(result.report["controls"]) == {"float_same_compute"}


class Decoder(nn.Module):
    """A cell in a loop, and an embedding tied to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.cell, self.out = nn.Embedding(7, 5), nn.LSTMCell(5, 5), nn.Linear(5, 7)
        self.out.weight = self.table.weight

    def forward(self, tokens: Tensor) -> dict[str, Any]:
        state, outs = None, []
        for token in tokens.t():
            state = self.cell(self.table(token), state)
            outs.append(self.out(state[0]))
        assert state is not None
        return {"logits": torch.stack(outs, 1), "last": state}


def test_cells_and_tied_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    short = recipe(train={"steps": 6, "evaluate_every": 3, "max_steps": 6})
    module = Decoder()
    result = rnn2bin.convert(module, recipe=short, data=[torch.randint(7, (4, 5)) for _ in range(12)], out=tmp_path / "OUT")
    model = rnn2bin.load(tmp_path / "OUT", module=module)
    assert model.get_parameter("out.weight") is model.get_parameter("table.weight")
    assert result.report["density"] is None
    assert all(0 <= gate["open_rate"] <= 1 for gate in result.report["gates"])


def test_a_missed_budget_writes_nothing(tmp_path: Path) -> None:
    short = recipe(train={"steps": 2, "evaluate_every": 2, "max_steps": 2}, report={"controls": False, "max_drop": 1e-9})
    with pytest.raises(BudgetError):
        rnn2bin.convert(teacher(), recipe=short, data=batches(6), out=tmp_path / "OUT")
    assert [path.name for path in tmp_path.iterdir()] == ["OUT.work"]  # for a larger budget with resume


def test_a_copy_of_a_student_is_a_student() -> None:
    student = binarize(filled(Tagger()), recipe=RECIPE).eval()
    x = torch.randn(2, 5, 4)
    assert torch.equal(copy.deepcopy(student)(x), student(x))


@pytest.mark.parametrize("budget", [{"density": 0.2}, {"price": 0.1}])
def test_a_density_budget_is_refused_for_a_module(budget: dict[str, float]) -> None:
    """What the parts around its layers read is not counted: the budget would be passed over in silence."""
    with pytest.raises(RecipeError, match=r"budget.density, budget.price: .* give budget.open"):
        modules.binarize(nn.LSTM(3, 4), recipe=recipe(budget=budget))
