"""transformers reads a packed directory through its Auto classes, whichever of the two packages is imported first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rnn2bin
from rnn2bin import pack
from rnn2bin.cells.network import Network
from rnn2bin.errors import UsageError
from rnn2bin.spec import EmbeddingSpec, LayerSpec, LinearSpec, RnnSpec, SectionSpec

SPECS = {
    "tokens": SectionSpec(
        (LayerSpec("lstm", 3, 4), LayerSpec("gru", 4, 5)), EmbeddingSpec(7, 3), (LinearSpec(5, 7, activation="log_softmax"),)
    ),
    "floats": SectionSpec((LayerSpec("gru", 3, 4, 2),), None, (LinearSpec(8, 2),), "final"),
    "shared": SectionSpec((LayerSpec("lstm", 3, 6, shared=3, shared_inputs=3),), None, (LinearSpec(6, 2),), "final"),
}


def packed(folder: Path, name: str, *, levels: str = "learned") -> Path:
    torch.manual_seed(0)
    spec = RnnSpec({"main": SPECS[name]})
    binary = {prefix: tuple(gate != "f" for gate in layer.kind.gate_names) for prefix, layer in spec.cell_names()}
    network = Network(spec, binary, levels=levels)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.uniform_(-0.9, 0.9)
        for cell in network.cells().values():
            if (n := cell.layer.shared) > 1:
                cell.tensor("gates.row").copy_(torch.arange(len(cell.tensor("gates.row"))) % cell.layer.gate_rows(n))
    network.project_levels()
    out = folder / name
    with pack.staging(out) as staged:
        pack.write_model(network, staged, provenance={"source": "x.pt"}, task={"name": "match"})
    return out


def inputs(name: str) -> torch.Tensor:
    """(B,T) or (B,T,I)"""
    return torch.randint(7, (3, 6)) if name == "tokens" else torch.randn(3, 6, 3)


def call(model: Any, name: str, x: torch.Tensor, **options: Any) -> Any:
    with torch.no_grad():
        return model(x, **options) if name == "tokens" else model(inputs=x, **options)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("levels", ["learned", "strict"])
def test_auto_model_equals_the_torch_backend(tmp_path: Path, name: str, levels: str) -> None:
    from transformers import AutoConfig, AutoModel

    out = packed(tmp_path, name, levels=levels)
    config, model, ours = AutoConfig.from_pretrained(out), AutoModel.from_pretrained(out), rnn2bin.load(out, backend="torch")
    assert config.model_type == "rnn2bin"
    assert model.dtype == torch.float32
    x = inputs(name)
    y, state = ours(x.transpose(0, 1))
    assert state is not None
    found = call(model, name, x)
    assert torch.equal(found.logits, y.transpose(0, 1) if name == "tokens" else y)
    assert found.y is found.logits
    assert all(torch.equal(a, b) for one, two in zip(found.state[0], state[0], strict=True) for a, b in zip(one, two, strict=True))
    again, _ = call(model, name, x, return_dict=False)
    assert torch.equal(again, found.logits)


@pytest.mark.parametrize("name", SPECS)
def test_save_and_load_again_changes_nothing(tmp_path: Path, name: str) -> None:
    from transformers import AutoModel

    first, x = AutoModel.from_pretrained(packed(tmp_path, name)), inputs(name)
    first.save_pretrained(tmp_path / "saved")
    second = AutoModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(call(first, name, x).logits, call(second, name, x).logits)
    assert torch.equal(call(first, name, x).logits, call(first.from_pretrained(tmp_path / "saved"), name, x).logits)
    y, _ = rnn2bin.load(tmp_path / "saved", backend="torch")(x.transpose(0, 1))
    assert torch.equal(y.transpose(0, 1) if name == "tokens" else y, call(first, name, x).logits)
    sizes = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("saved", name)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_masks_and_lengths_mean_the_same(tmp_path: Path) -> None:
    from transformers import AutoModel

    model, x = AutoModel.from_pretrained(packed(tmp_path, "tokens")), inputs("tokens")
    lengths = torch.tensor([6, 2, 4])
    mask = (torch.arange(6) < lengths[:, None]).long()
    masked = call(model, "tokens", x, attention_mask=mask)
    assert torch.equal(masked.logits, call(model, "tokens", x, lengths=lengths).logits)
    alone = call(model, "tokens", x[1:2, :2])
    torch.testing.assert_close(masked.logits[1, :2], alone.logits[0], rtol=0, atol=1e-6)
    with pytest.raises(UsageError, match="on the right"):
        call(model, "tokens", x, attention_mask=mask.flip(1))
    with pytest.raises(UsageError, match="one of them"):
        model()


def test_a_packed_module_says_how_it_is_loaded(tmp_path: Path) -> None:
    from transformers import AutoModel

    from rnn2bin import modules

    modules.write(modules.binarize(torch.nn.GRU(2, 3)), tmp_path, levels="learned", provenance={}, task={})
    with pytest.raises(UsageError, match="module="):
        AutoModel.from_pretrained(tmp_path)


ORDERS = {
    "rnn2bin first": "import rnn2bin; from transformers import AutoConfig, AutoModel",
    "transformers first": "from transformers import AutoConfig, AutoModel; import rnn2bin",
    "lazy transformers first": "import transformers, rnn2bin; AutoConfig, AutoModel = transformers.AutoConfig, transformers.AutoModel",
    "the Trainer first": "import rnn2bin; from transformers import Trainer; from transformers import AutoConfig, AutoModel",
    "modeling_utils between": "import transformers.modeling_utils, rnn2bin; from transformers import AutoModel, AutoConfig",
    "hub model first": "import rnn2bin.hub.model; from transformers import AutoConfig, AutoModel",
    "config alone": "import rnn2bin; from transformers import AutoConfig; AutoModel = None",
}


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_in_any_order_of_imports(tmp_path: Path, order: str) -> None:
    code = f"""
{ORDERS[order]}
config = AutoConfig.from_pretrained({str(packed(tmp_path, "tokens"))!r})
assert type(config).__name__ == "Rnn2binConfig", type(config)
if AutoModel:
    model = AutoModel.from_pretrained({str(tmp_path / "tokens")!r})
    assert type(model).__name__ == "Rnn2binModel", type(model)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import time, sys; began = time.perf_counter(); import rnn2bin; took = time.perf_counter() - began;"
        "assert took < 0.3, took; assert not {'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
