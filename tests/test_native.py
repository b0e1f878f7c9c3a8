"""The C kernels against the torch kernels, which the oracle's autograd checks: every instruction set at hand, odd sizes, all modes."""

from types import SimpleNamespace

import pytest
import torch

from rnn2bin import cost
from rnn2bin.cells.network import Lookup, Trace, zero_state
from rnn2bin.cells.weights import Cell
from rnn2bin.distill import native, window
from rnn2bin.distill.windows import inputs
from rnn2bin.gates.estimators import BINARY, FLOAT, Discretize, Sample
from rnn2bin.spec import LayerSpec

pytestmark = pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")

SIZES = {"odd": (7, 3, 5), "one": (1, 1, 1), "blocks": (3, 17, 50), "wide": (2, 9, 131)}  # T, B, H
MODES = {
    "float": FLOAT,
    "binary": BINARY,
    "sigmoid": Discretize("sigmoid", temperature=0.7, slope=2.0),
    "gumbel": Discretize("gumbel", temperature=0.5, slope=1.5, noise=0.5),
    "gumbel-hard": Discretize("gumbel-hard", temperature=0.5, slope=1.5),
    "straight-through-sigmoid": Discretize("straight-through", slope=2.0, backward="sigmoid"),
    "straight-through-window": Discretize("straight-through", slope=1.5),
    "straight-through-identity": Discretize("straight-through", backward="identity"),
}


def cell_of(kind: str, hidden: int, *, copies: int = 1, scale: float = 0.4, shared: tuple[int, int] = (1, 1)) -> Cell:
    """`shared`: units that read one row of recurrent weights, and of the input's."""
    torch.manual_seed(0)
    layer = LayerSpec(kind, 6, hidden, copies=copies, shared=shared[0], shared_inputs=shared[1])
    cell = Cell(layer, (True,) * len(layer.kind.gates), levels="learned")
    with torch.no_grad():
        for name, p in cell.named_parameters():
            p.copy_(torch.rand_like(p) * 0.5 + 0.25 if "levels" in name else torch.randn_like(p) * scale)
        if layer.shared > 1:
            rows = cell.tensor("gates.row")
            rows.copy_(torch.randint(layer.gate_rows(layer.shared), rows.shape))
    return cell


def everything(cell: Cell, x, mode: Discretize, *, precision: str = "float32") -> dict[str, torch.Tensor]:
    """Outputs and the gradients of all inputs, parameters, states and pre-activations."""
    torch.manual_seed(1)
    rows = x if isinstance(x, Lookup) else x.clone().requires_grad_()
    state = tuple(torch.randn_like(s).requires_grad_() for s in zero_state(cell.layer, x.shape[1], cell.part("gates").bias))
    cell.zero_grad()
    trace = window.run_cell(cell, rows, state, mode, precision=precision)
    outs = [*trace.states, trace.pre]
    torch.manual_seed(2)
    sum((o * torch.randn_like(o)).sum() for o in outs).backward()
    found = {f"out {k}": o.detach() for k, o in enumerate(outs)} | {f"state {k}": s.grad for k, s in enumerate(state)}
    found |= {name: p.grad.clone() for name, p in cell.named_parameters() if p.grad is not None}
    if not isinstance(rows, Lookup):
        found["x"] = rows.grad
    elif rows.table is not None:
        found["table"] = rows.table.grad.clone()
        rows.table.grad = None
    return found


def in_torch(monkeypatch, *args, **kwargs):
    with monkeypatch.context() as m:
        m.setattr(native, "takes", lambda *_: False)
        return everything(*args, **kwargs)


def assert_same(ours, wanted, *, tolerance: float) -> None:
    assert ours.keys() == wanted.keys()
    for name, b in wanted.items():
        error = float((ours[name] - b).abs().max() / b.abs().max().clamp_min(1e-3))
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "best"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("kind", ["lstm", "gru", "gru_output"])
def test_float32_equals_the_torch_kernels(kind, copies, size, mode, isa, monkeypatch):
    if isa != "best":
        monkeypatch.setenv("RNN2BIN_ISA", isa)
        if native.isa() != isa:
            pytest.skip(f"this processor has no {isa}")
    steps, batch, hidden = SIZES[size]
    cell, x = cell_of(kind, hidden, copies=copies), torch.randn(steps, batch, 6, generator=torch.Generator().manual_seed(3))
    assert native.takes(cell, x, cell.modes(MODES[mode]))
    assert_same(everything(cell, x, MODES[mode]), in_torch(monkeypatch, cell, x, MODES[mode]), tolerance=2e-5)


@pytest.mark.parametrize("isa", ["generic", "best"])
@pytest.mark.parametrize("mode", ["float", "gumbel", "straight-through-sigmoid"])
@pytest.mark.parametrize("shared", [(2, 1), (3, 3), (40, 40)])
@pytest.mark.parametrize("hidden", [5, 40])
@pytest.mark.parametrize("kind", ["lstm", "gru", "gru_output"])
def test_rows_that_units_share_are_computed_once(kind, hidden, shared, mode, isa, monkeypatch):
    """The torch kernels write them out for every unit."""
    if isa != "best":
        monkeypatch.setenv("RNN2BIN_ISA", isa)
    cell, x = cell_of(kind, hidden, copies=3, shared=shared), torch.randn(4, 9, 6, generator=torch.Generator().manual_seed(3))
    assert native.takes(cell, x, cell.modes(MODES[mode]))
    found = everything(cell, x, MODES[mode])
    assert {"gates.scale", "gates.weight_hh", "gates.weight_ih"} <= found.keys()
    assert_same(found, in_torch(monkeypatch, cell, x, MODES[mode]), tolerance=2e-5)
    with torch.no_grad():  # and one that does not learn
        trace = window.run_cell(cell, x, zero_state(cell.layer, 9, x), MODES["straight-through-sigmoid"])
    torch.testing.assert_close(trace.states[0], window.run_cell(cell, x, zero_state(cell.layer, 9, x), BINARY).states[0])


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "best"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("copies", [1, 2, 5])
@pytest.mark.parametrize("gates", [(1, 0), (0, 2)])
def test_units_that_close_one_gate_and_open_another_are_counted_as_in_torch(gates, copies, size, isa, monkeypatch):
    """And their gradients; small whole numbers, so that pre-activations of exactly 0 and copies as good as each other are common."""
    if isa != "best":
        monkeypatch.setenv("RNN2BIN_ISA", isa)
        if native.isa() != isa:
            pytest.skip(f"this processor has no {isa}")
    (steps, batch, hidden), generator = SIZES[size], torch.Generator().manual_seed(5)
    read = SimpleNamespace(layer=SimpleNamespace(copies=copies))
    bit = lambda pre: Sample.apply(pre, None, Discretize("straight-through", slope=1.0, backward="sigmoid"))
    weights, found = torch.randn(steps, batch, generator=generator), {}
    products = torch.randint(-2, 3, (steps, batch, 3, hidden), generator=generator).float()
    biases = torch.randint(-2, 3, (3, copies * hidden), generator=generator).float()
    for pairs in (None, native.closed_and_open):
        leaves = [products.clone().requires_grad_(), biases.clone().requires_grad_()]
        one = cost.Read("gru", read, Trace((), *leaves), None, None, True, pairs=pairs)
        count = one.units(bit, closed=gates[0], opened=gates[1])
        (count * weights).sum().backward()
        found[pairs] = (count.detach(), *(leaf.grad for leaf in leaves))
    assert torch.equal(found[None][0], found[native.closed_and_open][0])
    for ours, wanted in zip(found[native.closed_and_open][1:], found[None][1:], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def test_a_row_that_is_not_there_is_refused():
    """C would read beyond the product."""
    cell = cell_of("lstm", 10, shared=(2, 1))
    cell.tensor("gates.row")[-1] = 5
    with pytest.raises(ValueError, match=r"gates\.row does not give each unit one of the 5 rows"):
        window.run_cell(cell, torch.randn(2, 3, 6), zero_state(cell.layer, 3, cell.part("gates").bias), BINARY)


@pytest.mark.parametrize("kind", ["lstm", "gru", "gru_output"])
def test_one_thread_and_many_give_the_same_bits(kind):
    cell, x = cell_of(kind, 33, copies=2), torch.randn(4, 29, 6)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything(cell, x, MODES["straight-through-sigmoid"])
        torch.set_num_threads(3)
        three = everything(cell, x, MODES["straight-through-sigmoid"])
    finally:
        torch.set_num_threads(before)
    for name in ("out 0", "out 1", "state 0"):  # rows never meet; sums over rows (weights, levels) depend on the split
        assert torch.equal(one[name], three[name]), name


@pytest.mark.skipif(not native.has_bfloat16(), reason="this processor multiplies no bfloat16")
@pytest.mark.parametrize("kind", ["lstm", "gru", "gru_output"])
def test_bfloat16_is_float32_but_for_the_rounding_of_operands(kind):
    """Soft gates: a bit may flip where a pre-activation is near zero, and then nothing is close."""
    cell, x = cell_of(kind, 64, copies=2, scale=0.1), torch.randn(6, 16, 6)
    exact, low = everything(cell, x, FLOAT), everything(cell, x, FLOAT, precision="bfloat16")
    assert_same(low, exact, tolerance=2e-2)
    assert any(not torch.equal(low[name], exact[name]) for name in exact)


@pytest.mark.parametrize("kind", ["lstm", "gru", "gru_output"])
def test_soft_gates_beside_noisy_ones_get_no_noise(kind, monkeypatch):
    cell = cell_of(kind, 9, copies=2)
    cell.binary = (False, *cell.binary[1:])
    x = torch.randn(5, 3, 6)
    for name in ("gumbel", "gumbel-hard"):
        assert_same(everything(cell, x, MODES[name]), in_torch(monkeypatch, cell, x, MODES[name]), tolerance=2e-5)


def test_noise_is_logistic_on_its_share_and_hangs_on_seed_and_place_alone():
    noise = native.Noise(5, 1.0).fill(20, 10, 3, 1001)
    assert torch.equal(noise, native.Noise(5, 1.0).fill(20, 10, 3, 1001))
    assert torch.equal(noise[:7], native.Noise(5, 1.0).fill(7, 10, 3, 1001))
    assert not torch.equal(noise, native.Noise(5 + 2**32, 1.0).fill(20, 10, 3, 1001))
    uniform = torch.sigmoid(noise.double()).flatten()
    found = torch.histc(uniform, 50, 0, 1) / uniform.numel()  # 600,600 draws: a standard error of 0.00018 a bin
    assert float((found - 0.02).abs().max()) < 0.001
    pairs = noise.flatten(0, 2)
    correlation = torch.corrcoef(torch.stack([pairs[:-1].flatten(), pairs[1:].flatten(), pairs.roll(1, 1)[:-1].flatten()]))
    assert float((correlation - torch.eye(3)).abs().max()) < 0.01
    shared = native.Noise(5, 0.2).fill(20, 10, 3, 1001)
    assert float((shared != 0).float().mean()) == pytest.approx(0.2, abs=0.003)
    drawn = shared[shared != 0].double()
    assert float(drawn.square().mean()) == pytest.approx(torch.pi**2 / 3, rel=0.03)


def test_noise_follows_torchs_generator():
    """So a run that is resumed with torch's random state draws what it would have drawn."""
    mode = MODES["gumbel"]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = native.Noise.of(mode)
    assert native.Noise.of(mode) != first
    torch.set_rng_state(state)
    assert native.Noise.of(mode) == first


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (70, 50, 401), (9, 49, 193), (64, 400, 33), (129, 7, 3)])
def test_products_of_any_strides(sizes, precision):
    if precision == "bfloat16" and not native.has_bfloat16():
        pytest.skip("this processor multiplies no bfloat16")
    (m, n, k), generator = sizes, torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator).bfloat16().float()  # what both precisions hold
    for a in (random(m, k), random(k, m).t(), random(m, k + 3)[:, 3:]):
        for b in (random(k, n), random(n, k).t()):
            exact = a.double() @ b.double()
            torch.testing.assert_close(native.multiply(a, b, precision).double(), exact, rtol=1e-4, atol=1e-4)
            more = native.multiply(a, b, precision, out=torch.ones(m, n))
            torch.testing.assert_close(more.double(), exact + 1, rtol=1e-4, atol=1e-4)


def test_products_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="no product"):
        native.multiply(torch.zeros(2, 3), torch.zeros(4, 2), "float32")
    with pytest.raises(ValueError, match="no product"):
        native.multiply(torch.zeros(2, 3), torch.zeros(3, 2), "float32", out=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="no product"):
        native.multiply(torch.zeros(2, 3).double(), torch.zeros(3, 2).double(), "float32")


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("vocabulary", [3, 100])
@pytest.mark.parametrize("kind", ["lstm", "gru", "gru_output"])
def test_tokens_equal_their_rows(kind, vocabulary, one_hot):
    """3 tokens take the product of the table, 100 that of the rows."""
    cell = cell_of(kind, 10)
    width = vocabulary if one_hot else 6
    if one_hot:
        cell = Cell(LayerSpec(kind, width, 10), (True,) * len(cell.binary), levels="learned")
        torch.manual_seed(4)
        with torch.no_grad():
            for name, p in cell.named_parameters():
                p.copy_(torch.rand_like(p) if "levels" in name else torch.randn_like(p) * 0.4)
    index = torch.randint(vocabulary, (5, 4), generator=torch.Generator().manual_seed(5))
    table = None if one_hot else torch.randn(vocabulary, 6, requires_grad=True)
    lookup = Lookup(index, table, vocabulary)
    mode = MODES["straight-through-sigmoid"]
    ours, wanted = everything(cell, lookup, mode), everything(cell, lookup.rows(torch.float32).detach(), mode)
    if table is not None:
        rows = wanted["x"]
        wanted["table"] = torch.zeros_like(table).index_add(0, index.flatten(), rows.flatten(0, 1))
    del wanted["x"]
    assert_same(ours, wanted, tolerance=2e-5)


@pytest.mark.parametrize("copies", [1, 3])
def test_the_memory_with_all_differences_is_the_lstm_here_too(copies, monkeypatch):
    args = (cell_of("pseudo_123", 16, copies=copies), torch.randn(5, 4, 6), MODES["straight-through-sigmoid"])
    assert native.takes(args[0], args[1], args[0].modes(args[2]))
    assert_same(everything(*args), in_torch(monkeypatch, *args), tolerance=2e-5)


def test_a_large_vocabulary_adds_row_by_row(monkeypatch):
    """All ways of the table's gradient agree."""
    grads = []
    for limit, in_c in ((512, True), (512, False), (1, False)):
        monkeypatch.setattr(inputs, "ONE_HOT_LIMIT", limit)
        monkeypatch.setattr(inputs, "is_native", lambda _, in_c=in_c: in_c)
        table = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
        index = torch.tensor([0, 3, 3, 1, 0, 0])
        rows = inputs.Rows.apply(table, index)
        (rows * torch.arange(42.0).view(6, 7)).sum().backward()
        grads.append(table.grad)
    torch.testing.assert_close(grads[0], grads[1])
    torch.testing.assert_close(grads[0], grads[2])
    with pytest.raises(ValueError, match="not within"):
        native.add_rows(torch.zeros(2, 3), torch.tensor([0, 4]), 4)


def test_what_the_kernels_do_not_take():
    lstm = cell_of("lstm", 4)
    x = torch.zeros(1, 1, 6)
    assert not native.takes(lstm, x.double(), lstm.modes(BINARY))
    assert not native.takes(lstm, x, lstm.modes(Discretize("stochastic")))
    before = cell_of("gru_reset_before", 4)
    assert not native.takes(before, x, before.modes(BINARY))
    for layer in (
        LayerSpec("lstm", 6, 4, proj_size=2),
        LayerSpec("lstm_peephole", 6, 4),
        LayerSpec("lstm_coupled", 6, 4),
        LayerSpec("lstm", 6, 4, clip=1.0),
        LayerSpec("lstm", 6, 4, cell_clip=1.0),
        LayerSpec("gru", 6, 4, clip=1.0),
    ):
        other = Cell(layer, (True,) * len(layer.kind.gates))
        assert not native.takes(other, x, other.modes(BINARY))


@pytest.mark.parametrize("kind", ["lstm", "gru", "gru_output"])
def test_a_state_of_another_width_is_refused(kind):
    """C would read and write beyond it."""
    cell = cell_of(kind, 5, copies=2)
    narrow = tuple(torch.zeros(3, 5) for _ in cell.layer.kind.states)
    with pytest.raises(ValueError, match=r"has shape \(3, 5\)"):
        window.run_cell(cell, torch.randn(2, 3, 6), narrow, BINARY)


def test_without_the_extension_training_runs_in_torch_and_says_so_once(monkeypatch):
    native.library.cache_clear()
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    try:
        with pytest.warns(UserWarning, match="without its C kernels"):
            assert native.isa() is None
        assert not native.has_bfloat16()  # no second warning: warnings are errors here
        cell = cell_of("gru", 5)
        assert everything(cell, torch.randn(3, 2, 6), BINARY)["out 0"].shape == (3, 2, 5)
    finally:
        native.library.cache_clear()


def test_nan_stays_nan():
    """A diverged run must be seen: no kernel may turn what is not a number into one."""
    for kind in ("lstm", "gru", "gru_output"):
        cell = cell_of(kind, 20)
        x = torch.randn(3, 2, 6)
        x[1, 0, 0] = float("nan")
        with torch.no_grad():
            h = window.run_cell(cell, x, zero_state(cell.layer, 2, x), FLOAT).states[0]
        assert torch.isnan(h[1:, 0]).all()
        assert torch.isfinite(h[:, 1]).all()
        assert torch.isfinite(h[0]).all()


def test_saturated_values_stay_finite():
    for kind in ("lstm", "gru", "gru_output"):
        cell = cell_of(kind, 20)
        x = torch.randn(3, 2, 6) * 1e4
        found = everything(cell, x, FLOAT)
        assert all(torch.isfinite(t).all() for t in found.values())
        assert float(found["out 0"].abs().max()) < 10
